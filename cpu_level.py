"""What the processor has, instructions and caches, and any lesser one that it can stand in for.

    CPU_LEVEL=avx2 bash run_tests.sh        any command, as on a processor with nothing wider than AVX2

The variable limits what the project's own kernels are compiled for and what PyTorch's parts (ATen, oneDNN, MKL, fbgemm)
choose from. It is read when this module is imported, which has to be before PyTorch computes anything: from then on a
process keeps to what it has found.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from command_line import UserError

ARM = platform.machine().lower() in ("arm64", "aarch64")


@dataclass(frozen=True)
class CPULevel:
    """A set of instructions.

    Attributes:
        name: what CPU_LEVEL is set to.
        needs: words that /proc/cpuinfo has among the flags of such a processor.
        compiler_flags: for GCC and Clang.
        libraries: environment variables by which PyTorch's parts keep to it.
    """

    name: str
    needs: frozenset[str]
    compiler_flags: tuple[str, ...]
    libraries: dict[str, str]


def _x86(name: str, needs: str, compiler_flags: str, aten: str, onednn: str, mkl: str, fbgemm: str) -> CPULevel:
    libraries = {
        "ATEN_CPU_CAPABILITY": aten,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "FBGEMM_ENABLE_INSTRUCTIONS": fbgemm,
    }
    return CPULevel(name, frozenset(needs.split()), tuple(compiler_flags.split()), libraries)


AVX2 = "avx2 fma f16c bmi2"
AVX512 = f"{AVX2} avx512f avx512bw avx512dq avx512vl"
X86_LEVELS = [  # from the least to the most
    _x86("sse2", "", "-march=x86-64", "default", "SSE41", "SSE4_2", "SSE4_2"),
    _x86("avx2", AVX2, "-march=haswell", "avx2", "AVX2", "AVX2", "AVX2"),
    _x86("avx2_vnni", f"{AVX2} avx_vnni", "-march=haswell -mavxvnni", "avx2", "AVX2_VNNI", "AVX2", "AVX2"),
    _x86("avx512", AVX512, "-march=skylake-avx512", "avx512", "AVX512_CORE", "AVX512", "AVX512"),
    _x86("avx512_vnni", f"{AVX512} avx512_vnni", "-march=cascadelake", "avx512", "AVX512_CORE_VNNI", "AVX512_E1",
         "AVX512_VNNI"),
    _x86("amx", f"{AVX512} avx512_vnni amx_tile amx_int8", "-march=cascadelake -mamx-tile -mamx-int8", "avx512",
         "AVX512_CORE_AMX", "AVX512_E4", "AVX512_VNNI"),
]  # fmt: skip
ARM_LEVELS = [
    CPULevel("neon", frozenset({"asimd"}), ("-march=armv8-a",), {}),
    CPULevel("neon_dotprod", frozenset({"asimd", "asimddp"}), ("-march=armv8.2-a+dotprod",), {}),
]
CPU_LEVELS = {level.name: level for level in X86_LEVELS + ARM_LEVELS}
NATIVE_FLAGS = ("-mcpu=native",) if ARM else ("-march=native",)


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The processor's instruction sets as Linux names them; elsewhere none is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(word for line in lines if line.startswith(("flags", "Features")) for word in line.split()[2:])


def possible_levels() -> list[str]:
    """The names of the levels that this processor has, from the least to the most."""
    return [level.name for level in (ARM_LEVELS if ARM else X86_LEVELS) if cpu_flags() and level.needs <= cpu_flags()]


def cpu_level() -> CPULevel | None:
    """The level that CPU_LEVEL asks for; None, if it is not set, is all that the processor has.

    Raises:
        UserError: no such level, or the processor does not have it.
    """
    name = os.environ.get("CPU_LEVEL")
    if not name:
        return None
    if name not in possible_levels():
        here = ", ".join(possible_levels()) or "none, as only Linux says what a processor has"
        raise UserError(f"CPU_LEVEL={name} is not available on this machine, which has {here}")
    return CPU_LEVELS[name]


def compiler_flags() -> tuple[str, ...]:
    """What GCC and Clang may use of the processor."""
    level = cpu_level()
    return level.compiler_flags if level else NATIVE_FLAGS


try:
    os.environ.update(level.libraries if (level := cpu_level()) else {})
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
