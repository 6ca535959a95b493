"""C functions, compiled on the machine that runs them.

`load_native(source)` compiles a C file with the system's compiler for exactly this processor, or for the lesser one
that CPU_LEVEL asks for (cpu_level.py), and loads it with ctypes. The result is kept in a per-user cache, so that only
the first use waits (about a second). An image may bring them along (prebuilt.py), for each level of instructions:
then the best that this processor has is taken, and no compiler is needed. Where there is no compiler, or it fails,
the answer is None, the log has a warning and `why_not(source)` says why: callers then take a slower way in PyTorch.

Rules for the C files: no #include of omp.h (clang on macOS has none), and each `#pragma omp parallel` takes its
num_threads from an argument that is `torch.get_num_threads()`. Their parallel regions run in the thread pool that
PyTorch has already started; a second pool would compete with it for the cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

from command_line import replacing
from cpu_level import CPU_LEVELS, compiler_flags, cpu_level, possible_levels

EXTRA_FLAGS = shlex.split(os.environ.get("NATIVE_CFLAGS", ""))  # for compiling and linking, such as -fsanitize=address
COMPILE_FLAGS = ["-O3", "-fPIC", *EXTRA_FLAGS]
NO_OPENMP = {  # where the usual compiler lacks it, one that has it is to be named
    "darwin": "Apple's compiler has no OpenMP; `brew install llvm`, and set CC to $(brew --prefix llvm)/bin/clang",
    "win32": "the kernels are not compiled on Windows unless CC names a GCC or Clang with OpenMP",
}
TIMEOUT = 600  # seconds for a compiler that hangs, e.g. on a network drive

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_loaded: dict[tuple, ctypes.CDLL | None] = {}  # by source, and what is asked of the compiler
_reasons: dict[tuple, str] = {}


def load_native(source: Path) -> ctypes.CDLL | None:
    """The compiled functions of a C file, or None where this machine cannot compile it; tried once in a process.

    Calls release the GIL. The caller declares `argtypes` and keeps the tensors alive whose addresses it passes.
    """
    key = _key(source)
    with _lock:
        if key not in _loaded:
            try:
                _loaded[key] = _load(source.resolve())
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                if not _reasons:
                    logger.warning("computing takes the slower way through PyTorch: %s", error)
                _loaded[key], _reasons[key] = None, str(error)
        return _loaded[key]


def c_files() -> list[Path]:
    """Those of the project."""
    root = Path(__file__).resolve().parent.parent
    return sorted(path for folder in ("training", "inference/kernels") for path in (root / folder).glob("*.c"))


def why_not(source: Path) -> str | None:
    """Why `load_native(source)` gave None; None if it did not."""
    return _reasons.get(_key(source))


def _key(source: Path) -> tuple:
    return source.resolve(), os.environ.get("CC"), compiler_flags()


class _Field(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("offset", ctypes.c_int64), ("size", ctypes.c_int64)]


def check_layout(library: ctypes.CDLL, **structures: type[ctypes.Structure]) -> None:
    """Compare what Python passes with what C reads: for each structure, by its name in C, all fields' names and places.

    Raises:
        RuntimeError: the C file, whose structs with a LAYOUT (layout.h) these are, was changed without the Python file.
    """
    for name, structure in structures.items():
        places = [(field, getattr(structure, field)) for field, _ in structure._fields_]
        ours = [(field.encode(), place.offset, place.size) for field, place in places]
        ours.append((None, 0, ctypes.sizeof(structure)))
        for expected, field in zip(ours, (_Field * len(ours)).in_dll(library, f"layout_of_{name}"), strict=True):
            found = (field.name, field.offset, field.size)
            if found != expected:
                raise RuntimeError(
                    f"the struct {name} of {library._name} differs from {structure.__qualname__} in Python: (name,"
                    f" offset, size) is {found} in C and {expected} in Python; change both together"
                )


def cache_folder() -> Path:
    """Where this user's compiled functions and measurements are kept; it may not exist yet.

    Raises:
        OSError: a user without a home, as in some containers.
    """
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError("this user has no home folder") from error
    default = {"darwin": home / "Library/Caches", "win32": home / "AppData/Local"}.get(sys.platform, home / ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "own-gpt"


def cpu_fingerprint() -> str:
    """The processor's model and instruction sets, as far as they are used: compiled code and measured times hold for
    these."""
    used = " ".join([platform.machine(), *compiler_flags()])
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{used} {platform.processor()}"
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([used, *sorted(kept)])


def _load(source: Path) -> ctypes.CDLL:
    if library := prebuilt_library(source):
        return ctypes.CDLL(str(library))
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, check=True, timeout=TIMEOUT).stdout
    link_flags = _link_flags()
    key = hashlib.sha256(_whole_text(source) + version)
    compile_flags = [*COMPILE_FLAGS, *compiler_flags()]
    key.update(repr((command, compile_flags, link_flags, cpu_fingerprint())).encode())
    library = cache_folder() / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if _is_intact(library):
        return ctypes.CDLL(str(library))
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / library.name
        _compile(source, command, compile_flags, result)
        try:
            _store(result, library)
        except OSError:  # a home that cannot be written to: this process loads what it compiled, the next one compiles
            return ctypes.CDLL(str(result))
    return ctypes.CDLL(str(library))


def _compile(source: Path, command: list[str], flags: list[str], result: Path) -> None:
    """Make a library of a C file."""
    compiled = result.with_suffix(".o")
    _run([*command, *flags, "-fopenmp", "-c", str(source), "-o", str(compiled)])
    _run([*command, "-shared", str(compiled), *_link_flags(), "-lm", "-o", str(result)])
    compiled.unlink()


def _link_flags() -> list[str]:
    openmp = _openmp_of_torch()
    return [*([str(openmp), f"-Wl,-rpath,{openmp.parent}"] if openmp else ["-fopenmp"]), *EXTRA_FLAGS]


def prebuilt_library(source: Path) -> Path | None:
    """The library of a C file that was built beforehand, for the best level that this processor has and CPU_LEVEL
    allows; None where there is none, as after a change of the C file."""
    folder, best, possible = os.environ.get("PREBUILT_KERNELS"), cpu_level(), possible_levels()
    allowed = possible[: possible.index(best.name) + 1] if best else possible
    paths = (prebuilt_path(source, level, folder) for level in reversed(allowed) if folder)
    return next((path for path in paths if path.is_file()), None)


def prebuilt_path(source: Path, level: str, folder: str | Path) -> Path:
    """Where the library of a C file for a level of instructions is kept."""
    return Path(folder) / f"{source.stem}-{level}-{hashlib.sha256(_whole_text(source)).hexdigest()[:16]}.so"


def prebuild(source: Path, level: str, folder: Path) -> Path:
    """Compile a C file for a level of instructions, which need not be one of this machine.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    path = prebuilt_path(source, level, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    _compile(source.resolve(), compiler(), [*COMPILE_FLAGS, *CPU_LEVELS[level].compiler_flags], path)
    return path


def _whole_text(source: Path) -> bytes:
    """A C file with those of the project that it includes: a change of either makes another library."""
    text = source.read_bytes()
    included = re.findall(rb'^#include "(.+)"', text, re.MULTILINE)
    return b"".join([text, *(_whole_text(source.parent / name.decode()) for name in included)])


def compiler() -> list[str]:
    """The command of the C compiler: what the variable CC says, or the first that is found."""
    if "CC" not in os.environ and sys.platform in NO_OPENMP:
        raise RuntimeError(NO_OPENMP[sys.platform])
    for command in [os.environ["CC"]] if "CC" in os.environ else ["cc", "gcc", "clang"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise RuntimeError("there is no C compiler (cc, gcc or clang, or the one that the variable CC names)")


def _openmp_of_torch() -> Path | None:
    """The OpenMP library in PyTorch's wheel, which is loaded already; None where PyTorch uses the system's."""
    package = Path(torch.__file__).parent
    for pattern in ("libgomp*.so*", "libiomp5*.so*", "libomp*.dylib"):
        for folder in (package / "lib", package.with_name("torch.libs")):
            found = sorted(folder.glob(pattern))
            if found:
                return found[0]
    return None


def _run(command: list[str]) -> None:
    # What is preloaded into Python, such as a sanitizer, would only make the compiler slow
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {result.stderr.strip()[:500]}")


def _checksum_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _is_intact(library: Path) -> bool:
    """Whether the cache has this library, whole: half a library would be loaded and crash the process later."""
    try:
        return _checksum_file(library).read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except OSError:
        return False


def _store(result: Path, library: Path) -> None:
    """Put a library and its checksum into the cache; processes that do so at the same time do not disturb each other.

    Each file is renamed into its place whole. A library that is loaded somewhere keeps its own, now nameless, file.
    """
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    content = result.read_bytes()
    for path, data in ((library, content), (_checksum_file(library), hashlib.sha256(content).hexdigest().encode())):
        with replacing(path) as file:
            file.write(data)
