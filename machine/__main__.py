"""One page on what this computer offers to the project and what it lacks, to be read, or pasted into a report.

    python -m machine
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import matplotlib
import psutil
import torch
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from packaging.requirements import Requirement

from command_line import run_main
from cpu_level import cpu_level, possible_levels
from inference.kernels.linear_products import integer_kernel_limit
from machine import native_code, peak_flops, resolve_device, resolve_precision, usable_cores

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = (3, 10), (3, 14)
CHINESE = 0x4E2D  # 中
GIB = 2**30

# What is imported only where it is used, and for what
OPTIONAL = {
    "pyarrow": "text in .parquet",
    "zstandard": "text in .zst",
    "py3langid": "languages in text.cleaning",
    "tensorboard": "--tensorboard",
    "swanlab": "--tracker swanlab",
    "wandb": "--tracker wandb",
}
# What changes how the project computes
VARIABLES = ("CPU_LEVEL", "CC", "NATIVE_CFLAGS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "DEVICE")


@dataclass
class Finding:
    """One line of the page.

    Attributes:
        name: of the thing. value: what was found.
        remedy: what helps, if something is amiss.
    """

    name: str
    value: str
    remedy: str = ""


# ------------------------------------------------------------------------------------------------------------ software


def about_python() -> Finding:
    """The interpreter."""
    fits = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    wanted = " to ".join(f"{major}.{minor}" for major, minor in PYTHONS)
    remedy = "" if fits else f"install Python {wanted}, and name it in the variable PYTHON for the scripts"
    return Finding("Python", f"{platform.python_version()}, {sys.executable}", remedy)


def about_project() -> Finding:
    """Which version of the project this is."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return Finding("project", output_of(command) or "unknown version, as this is no git clone")


def about_packages(requirements: Path = ROOT / "requirements.txt") -> Finding:
    """Whether what is required is there, in the versions that were tested."""
    lines = (line.partition("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    wanted = [requirement for line in lines if line and (not (requirement := Requirement(line)).marker
              or requirement.marker.evaluate())]  # fmt: skip
    differing = []
    for requirement in wanted:
        found = version_of(requirement.name)
        if found is None:
            differing.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(found, prereleases=True):
            differing.append(f"{requirement.name} is {found}, tested is {requirement.specifier}")
    said = f"{len(wanted) - len(differing)} of {len(wanted)} as in {requirements.name}"
    remedy = f"pip install -r {requirements.name}" if differing else ""
    return Finding("packages", "; ".join([said, *differing]), remedy)


def about_optional_packages() -> Finding:
    """What some options need."""
    found = {name: version_of(name) for name in OPTIONAL}
    there = [f"{name} {number}" for name, number in found.items() if number]
    lacking = [f"{name} for {OPTIONAL[name]}" for name, number in found.items() if not number]
    missing = f"not installed (pip install, if you use it): {', '.join(lacking)}" if lacking else ""
    return Finding("optional", "; ".join(filter(None, [", ".join(there), missing])))


def version_of(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def about_fonts() -> Finding:
    """Whether plots can show Chinese: a font with the character 中."""
    for font in font_manager.fontManager.ttflist:
        if Path(font.fname).is_file() and FT2Font(font.fname).get_char_index(CHINESE):
            return Finding("fonts", f"{font.name}, for Chinese in plots")
    remedy = "install one, such as Noto Sans CJK (Debian, Ubuntu: apt install fonts-noto-cjk), and delete "
    remedy += f"matplotlib's list of fonts in {matplotlib.get_cachedir()}"
    return Finding("fonts", "none with Chinese characters: plots show boxes in their place", remedy)


# --------------------------------------------------------------------------------------------------------------- GPUs


@dataclass
class Driver:
    """What NVIDIA's driver says: its GPUs, its version, and the newest CUDA that it can run; empty without one."""

    gpus: Sequence[str] = ()
    version: str = ""
    cuda: str = ""

    @classmethod
    def ask(cls) -> Driver:
        """By its own program, which does not need PyTorch."""
        said = output_of(["nvidia-smi"])
        gpus = re.findall(r"^GPU \d+: (.+?) \(", output_of(["nvidia-smi", "--list-gpus"]), re.MULTILINE)
        versions = [re.search(rf"{name} Version: *([\d.]+)", said) for name in ("Driver", "CUDA")]
        return cls(gpus, *(found[1] if found else "" for found in versions))


def about_gpu(driver: Driver, build: str | None, works: bool) -> Finding:
    """Whether the GPU, its driver and PyTorch's build go together.

    Args:
        build: the CUDA version that PyTorch was built for; None for a build without CUDA.
        works: whether PyTorch can use a GPU.
    """
    if torch.backends.mps.is_available():
        return Finding("GPU", "Apple's, by mps")
    of_torch = f"PyTorch is built for CUDA {build}" if build else "PyTorch is built without CUDA"
    of_driver = f"driver {driver.version} runs CUDA up to {driver.cuda}" if driver.version else "no NVIDIA driver"
    value = f"{', '.join(driver.gpus) or 'none'}; {of_driver}; {of_torch}"
    if works:
        return Finding("GPU", value, gpu_without_kernels())
    if not driver.gpus:
        has_driver = bool(driver.version) or not build
        return Finding("GPU", value, "" if has_driver else "if there is an NVIDIA GPU, install NVIDIA's driver")
    if not build:
        return Finding("GPU", value, "install the PyTorch build with CUDA, see https://pytorch.org/get-started/locally")
    # Within a major version of CUDA, newer builds run on older drivers
    if driver.cuda and int(driver.cuda.split(".")[0]) < int(build.split(".")[0]):
        remedy = "the driver is too old for this PyTorch: update it, or install a PyTorch that is built for CUDA"
        return Finding("GPU", value, f"{remedy} {driver.cuda.split('.')[0]}")
    return Finding(
        "GPU",
        value,
        "PyTorch finds no GPU although there is one: is CUDA_VISIBLE_DEVICES empty, or was a container started without "
        "--gpus all?",
    )


def gpu_without_kernels() -> str:
    """What helps where PyTorch's build knows nothing of this GPU's generation; empty where it does."""
    major, minor = torch.cuda.get_device_capability()
    known = re.findall(r"sm_(\d+)(\d)", " ".join(torch.cuda.get_arch_list()))  # kernels run on later minor versions
    if any(int(their_major) == major and int(their_minor) <= minor for their_major, their_minor in known):
        return ""
    return f"this PyTorch has no kernels for a GPU of generation {major}.{minor}; install a build that has them"


# ----------------------------------------------------------------------------------------------------- the computer


def about_processor() -> Finding:
    """Model, and the widest instructions that the project knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    levels = possible_levels()
    parts = [names[0] if names else platform.processor() or platform.machine()]
    if levels:
        limited = cpu_level()
        parts.append(f"instructions up to {levels[-1]}" + (f", limited to {limited.name}" if limited else ""))
    elif torch.cpu._is_amx_tile_supported():  # where only Linux says more
        parts.append("AMX")
    return Finding("processor", ", ".join(parts))


def about_cores() -> Finding:
    """How many cores there are, and how many of them this process may use."""
    return Finding("cores", f"{usable_cores()} for this process, of {os.cpu_count()}")


def about_memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> Finding:
    """The machine's, and what a container may have of it."""
    memory = psutil.virtual_memory()
    value = f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} free"
    words = limit.read_text().strip() if limit.is_file() else "max"
    if words.isdecimal() and int(words) < memory.total:
        value += f", {int(words) / GIB:.1f} for this container"
    remedy = "" if memory.available > 2 * GIB else "close other programs: the sample way needs 2 GiB"
    return Finding("memory", value, remedy)


def about_disk() -> Finding:
    """Room for models/."""
    disk = shutil.disk_usage(Path.cwd())
    remedy = "" if disk.free > 2 * GIB else "free some space: the sample way needs about 1 GiB, larger presets far more"
    return Finding("disk", f"{disk.free / GIB:.1f} GiB free of {disk.total / GIB:.1f} in {Path.cwd()}", remedy)


def about_speed() -> Finding:
    """What training reckons with: precision, and the peak of matrix products."""
    device = resolve_device()
    dtype = resolve_precision("auto", device)
    rates = [f"{peak_flops(device, kind) / 1e9:,.0f} GFLOP/s in {str(kind).removeprefix('torch.')}"
             for kind in dict.fromkeys((dtype, torch.float32))]  # fmt: skip
    return Finding("training", f"on {device} (--device auto), at most {', '.join(rates)}")


def about_kernels() -> Iterator[Finding]:
    """The compiler, and what of the project's C code it could compile; otherwise the slower way through PyTorch."""
    try:
        command = native_code.compiler()
    except RuntimeError as error:
        remedy = " (Debian, Ubuntu: apt install gcc)" if sys.platform == "linux" else ""
        yield Finding("compiler", str(error), f"with a compiler, generation on a CPU is faster{remedy}")
        yield Finding("kernels", f"none compiled; {integer_products()}")
        return
    yield Finding("compiler", f"{' '.join(command)}: {output_of([*command, '--version']).partition(chr(10))[0]}")
    sources = native_code.c_files()
    compiled = [source.stem for source in sources if native_code.load_native(source) is not None]
    reasons = {native_code.why_not(source) for source in sources} - {None}
    value = [f"compiled: {', '.join(compiled) or 'none'}", *map(str, reasons), integer_products()]
    remedy = "generation takes the slower way through PyTorch; mend what the compiler says" if reasons else ""
    yield Finding("kernels", "; ".join(value), remedy)


def integer_products() -> str:
    """What PyTorch's own INT8 products are good for on this processor."""
    digits = {127: "8-bit", 63: "7-bit"}.get(integer_kernel_limit())
    return f"PyTorch's INT8 is exact with {digits} numbers" if digits else "PyTorch has no INT8 for this processor"


def about_variables() -> Finding:
    """The environment's, as far as they matter."""
    found = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return Finding("variables", " ".join(found) or "none of those that matter is set")


# --------------------------------------------------------------------------------------------------------------- page


def output_of(command: list[str]) -> str:
    """What a program prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def examine() -> Iterator[Finding]:
    """All findings, in the order of the page."""
    yield Finding("system", platform.platform())
    yield about_python()
    yield about_project()
    yield Finding("PyTorch", str(torch.__version__))
    yield about_gpu(Driver.ask(), torch.version.cuda, torch.cuda.is_available())
    yield about_processor()
    yield about_cores()
    yield about_memory()
    yield about_disk()
    yield about_speed()
    yield from about_kernels()
    yield about_fonts()
    yield about_packages()
    yield about_optional_packages()
    yield about_variables()


def main() -> None:
    """Print the page."""
    findings = []
    for finding in examine():  # line by line, as some take a second
        findings.append(finding)
        print(f"{finding.name:<11}{finding.value}", flush=True)
    lacking = [finding for finding in findings if finding.remedy]
    print("\nnothing is lacking" if not lacking else "\nwhat would help")
    for finding in lacking:
        print(f"{finding.name:<11}{finding.remedy}")


if __name__ == "__main__":
    run_main(main)
