"""Compiling C on the spot: it is right, shares PyTorch's threads, is remembered, and is never needed."""

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from cpu_level import possible_levels
from machine import native_code
from machine.native_code import check_layout, load_native, why_not

SOURCE = """
void add(const float *x, const float *y, float *sum, long n, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < n; i++) sum[i] = x[i] + y[i];
}
"""
KERNELS = Path(__file__).resolve().parent.parent / "inference" / "kernels"
HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no compiler")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A C file, a cache of its own, and a process that has compiled nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "add.c"
    path.write_text(SOURCE)
    return path


def forget():
    """As if the process had just started."""
    native_code._loaded.clear()
    native_code._reasons.clear()


@pytest.fixture(autouse=True)
def fresh():
    kept = dict(native_code._loaded), dict(native_code._reasons)
    forget()
    yield
    native_code._loaded.update(kept[0])
    native_code._reasons.update(kept[1])


def is_right(library, threads=1):
    x, y = torch.arange(1000.0), torch.ones(1000)
    total = torch.zeros(1000)
    library.add.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long, ctypes.c_int]
    library.add(x.data_ptr(), y.data_ptr(), total.data_ptr(), 1000, threads)
    return torch.equal(total, x + y)


def cached(source):
    return sorted(native_code.cache_folder().glob("add-*.so"))


@needs_compiler
def test_a_compiled_function_is_right(source):
    """Also with several threads."""
    library = load_native(source)
    assert is_right(library) and is_right(library, threads=2)
    assert why_not(source) is None


@needs_compiler
def test_it_is_compiled_once(source, monkeypatch):
    """Within a process it is one object; the next process loads the cached file and runs no compiler."""
    assert load_native(source) is load_native(source)
    forget()
    monkeypatch.setattr(native_code, "_run", lambda command: pytest.fail(f"compiled again: {command}"))
    assert is_right(load_native(source))


@needs_compiler
def test_another_source_is_another_library(source):
    """A changed C file is never answered with the old library."""
    load_native(source)
    forget()
    source.write_text(SOURCE.replace("x[i] + y[i]", "x[i] - y[i]"))
    assert not is_right(load_native(source))
    assert len(cached(source)) == 2


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "one byte", "no checksum"])
def test_a_damaged_cache_is_rebuilt(source, damage):
    """Loading a library with a hole in it could crash the process; it is compiled again."""
    load_native(source)
    (path,) = cached(source)
    content = path.read_bytes()
    path.unlink()  # the old file is still mapped into this process and must not change
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "one byte":
        path.write_bytes(content[:600] + bytes([content[600] ^ 255]) + content[601:])
    else:
        path.write_bytes(content)
        path.with_suffix(".sha256").unlink()
    forget()
    assert is_right(load_native(source))
    assert native_code._is_intact(path)


@pytest.mark.parametrize("compiler", ["", "there-is-no-such-compiler"])
def test_without_a_compiler_there_is_none_and_a_reason(source, monkeypatch, compiler):
    """No exception: the caller has another way."""
    monkeypatch.setenv("CC", compiler)
    assert load_native(source) is None
    assert "no C compiler" in why_not(source)


@needs_compiler
def test_a_source_that_does_not_compile_gives_the_compilers_words(source):
    """The reason names what the compiler complained about, and nothing is left in the cache."""
    source.write_text("void add( {")
    assert load_native(source) is None
    assert "error" in why_not(source)
    assert not cached(source)


@needs_compiler
def test_a_cache_that_cannot_be_written_costs_only_time(source, tmp_path, monkeypatch):
    """A read-only home: the library is compiled for this process and loaded all the same."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert is_right(load_native(source))


@needs_compiler
def test_threads_that_ask_at_once_get_one_library(source):
    """The service's threads may meet at the first request."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(load_native(source))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(library) for library in found}) == 1 and is_right(found[0])


AT_ONCE = """
import os, sys
from pathlib import Path
import at_once
from cpu_level import possible_levels
from machine import native_code
from test_native_code import is_right
source = Path(sys.argv[1])

def load():
    assert is_right(native_code.load_native(source))

def pause_in_the_middle():  # the library is written, but not at its place
    os.fsync = at_once.pause_instead

at_once.three_at_once(load, pause_in_the_middle, lambda: any(native_code.cache_folder().glob(".add-*.tmp")))
"""


@needs_compiler
def test_processes_that_compile_at_once_do_not_disturb_each_other(source):
    """Also where one of them is killed while it puts the library into the cache; the next one compiles nothing."""
    import at_once  # here, as scripts of these tests import this file from elsewhere

    at_once.run_script(AT_ONCE, source)
    assert [native_code._is_intact(path) for path in cached(source)] == [True]


@pytest.mark.parametrize(("system", "words"), [("darwin", "brew install llvm"), ("win32", "on Windows unless CC")])
def test_where_the_compiler_lacks_openmp_the_kernels_decline_with_a_reason(source, system, words, monkeypatch):
    """macOS and Windows: nothing is tried with a compiler that cannot do it, and the sentence says what would help."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.delenv("CC", raising=False)
    assert load_native(source) is None
    assert words in why_not(source)


class Point(ctypes.Structure):
    _fields_ = [("x", ctypes.c_int32), ("y", ctypes.c_double)]


POINT = """
#include "layout.h"
typedef struct { int32_t x; double y; } Point;
LAYOUT(Point, FIELD(Point, x), FIELD(Point, y));
"""


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        ("int32_t x; double y;", "double y; int32_t x;"),
        ("int32_t x;", "int64_t x;"),
        ("double y;", "double y; int32_t z;"),
        ("double y;", "float y;"),
        ("FIELD(Point, x), ", ""),
        ("{ int32_t x; double y; }", "{ int32_t x, z; double y; }"),
    ],
    ids=lambda change: change[1],
)
def test_a_struct_that_python_sees_otherwise_is_refused(source, change):
    """Other order, size, or a field more or less; a field that fits into a gap is listed or it changes nothing."""
    (source.parent / "layout.h").write_text((KERNELS / "layout.h").read_text())
    source.write_text(POINT)
    check_layout(load_native(source), Point=Point)
    forget()
    source.write_text(POINT.replace(*change).replace("y));", "y), FIELD(Point, z));" if "z;" in change[1] else "y));"))
    with pytest.raises(RuntimeError, match="the struct Point of .* differs from Point in Python.*change both together"):
        check_layout(load_native(source), Point=Point)


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_openmp_is_the_one_that_torch_has_loaded(source):
    """Two OpenMP libraries in a process are two thread pools on the same cores: after loading, there is still one, and
    a parallel region starts no thread that PyTorch has not started."""
    program = f"""
import os, re, torch
from pathlib import Path
from machine.native_code import load_native
from tests.test_native_code import is_right
torch.set_num_threads(2)
torch.ones(1000000).exp().sum()
threads = len(os.listdir("/proc/self/task"))
library = load_native(Path({str(source)!r}))
assert is_right(library, threads=2)
assert len(os.listdir("/proc/self/task")) == threads
print(len(set(re.findall(r"/\\S*lib(?:g|i)?omp\\S*", Path("/proc/self/maps").read_text()))))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "1"


@needs_compiler
@pytest.mark.skipif("address" not in os.environ.get("NATIVE_CFLAGS", ""), reason="only in tests/with_sanitizers.sh")
def test_a_write_beyond_the_end_is_seen(source):
    """The flags reach the compiler, and a mistake ends the process with a report."""
    program = f"""
import torch
from pathlib import Path
from machine.native_code import load_native
from tests.test_native_code import is_right
add = load_native(Path({str(source)!r})).add
assert is_right(load_native(Path({str(source)!r})))
print("right", flush=True)
x, y = torch.ones(1001), torch.ones(1000)
add(x.data_ptr(), x.data_ptr(), y.data_ptr(), 1001, 1)
print("not seen")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode and result.stdout == "right\n"
    assert "heap-buffer-overflow" in result.stderr and "WRITE of size 4" in result.stderr


@needs_compiler
def test_an_image_brings_its_kernels_along(source, tmp_path, monkeypatch):
    """For several levels, of which the best possible one is taken without a compiler; not after a change."""
    folder, levels = tmp_path / "prebuilt", possible_levels()
    if not levels:
        pytest.skip("only Linux says what a processor has")
    for level in levels:
        native_code.prebuild(source, level, folder)
    monkeypatch.setenv("PREBUILT_KERNELS", str(folder))
    monkeypatch.setenv("CC", "")
    best = os.environ.get("CPU_LEVEL") or levels[-1]
    assert f"add-{best}-" in native_code.prebuilt_library(source).name
    assert is_right(load_native(source))
    monkeypatch.setenv("CPU_LEVEL", levels[0])
    assert f"add-{levels[0]}-" in native_code.prebuilt_library(source).name
    assert is_right(load_native(source))
    source.write_text(SOURCE + "\n")
    forget()
    assert native_code.prebuilt_library(source) is None
    assert load_native(source) is None
