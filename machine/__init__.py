"""The machine: which device and precision to compute in, its cores and peak speed, and the memory used.

`native_code` makes functions of C files on the machine that runs them; `vectors.h` is for these.
`python -m machine` (`__main__`) prints a page on what this computer offers and lacks, and `python -m machine.what_fits`
(`what_fits`) which models fit into a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import sys
import time
from pathlib import Path

try:
    import psutil
    import torch
except ModuleNotFoundError as error:  # what the page is asked for, too
    sys.exit(f"error: the package {error.name} is not installed; pip install -r requirements.txt")

from command_line import UserError
from cpu_level import cpu_level

PRECISIONS = ("auto", "fp32", "bf16", "fp16")

# Dense bf16 peak (before Ampere fp16) with sums in fp32 of common GPUs, by `card_name`: TFLOP/s of NVIDIA's data sheets
PEAK_TFLOPS: dict[str, float] = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100": 989, "H100 PCIE": 756, "H100 NVL": 835, "H800": 989, "H20": 148,
    "A100": 312, "A100 PCIE": 312, "A800": 312, "A40": 150, "A30": 165, "A10": 125, "A10G": 70, "L40S": 362, "L40": 181,
    "L4": 121, "T4": 65, "V100": 125, "V100 PCIE": 112,
    "RTX 6000 ADA GENERATION": 364, "RTX A6000": 155, "RTX A5000": 111, "RTX A4000": 77,
    "RTX 5090": 210, "RTX 5080": 113, "RTX 5070 TI": 88, "RTX 5070": 62,
    "RTX 4090": 165, "RTX 4080 SUPER": 104, "RTX 4080": 97, "RTX 4070 TI SUPER": 88, "RTX 4070 TI": 80,
    "RTX 4070 SUPER": 71, "RTX 4070": 58, "RTX 4060 TI": 44, "RTX 4060": 30,
    "RTX 3090 TI": 80, "RTX 3090": 71, "RTX 3080 TI": 68, "RTX 3080": 59, "RTX 3070": 41, "RTX 3060 TI": 32,
    "RTX 3060": 25,
}  # fmt: skip


def resolve_device(name: str = "auto") -> torch.device:
    """The device to compute on: `auto` takes a CUDA GPU, then Apple's MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and (rank := os.environ.get("LOCAL_RANK")):
            # torchrun: each process has its own GPU, chosen before anything opens a context on the first one
            device = torch.device("cuda", int(rank))
            torch.cuda.set_device(device)
        if device.type not in ("cpu", "cuda", "mps"):  # such as meta, which has no numbers
            raise RuntimeError(f"nothing is computed on {device.type}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        ranks = f" to each of {os.environ.get('LOCAL_WORLD_SIZE')} processes" if "LOCAL_RANK" in os.environ else ""
        raise UserError(f"the device {name!r} is not available here{ranks}; use --device cpu or auto") from error
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in: `auto` takes bf16 or fp16 where the hardware is fast in it, otherwise fp32.

    fp16 is for CUDA GPUs before Ampere. On a CPU bf16 pays only with AMX matrix units: elsewhere PyTorch's bf16 matrix
    products are 2–10 times slower than fp32.
    """
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise UserError("--precision fp16 needs a GPU; on a CPU use fp32 or bf16")
        return named[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        limit = cpu_level()
        return torch.bfloat16 if limit is None or limit.name == "amx" else torch.float32
    return torch.float32


def inference_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that a model is to have on a device before it is used; None: the one that it has.

    A GPU reads half as many bytes a token in bf16 or fp16, which `auto` takes there. Elsewhere `auto` and `fp32` leave
    weights as they are, since the kernels for CPUs compute in fp32 with weights of any kind.

    Args:
        precision: one of `PRECISIONS`.
    """
    if device.type != "cuda" and precision in ("auto", "fp32"):
        return None
    return resolve_precision(precision, device)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Compute matrix products in `dtype`; parameters and the loss stay in fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def peak_memory_bytes(device: torch.device) -> float:
    """The most memory used so far: of the GPU, or of this process on a CPU. Apple's GPU tells what it uses now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_gpu_bytes(device: torch.device) -> int:
    """What can still be allocated on a CUDA GPU: what it has left, and what PyTorch keeps in reserve."""
    in_reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + in_reserve


def is_device_lost(error: BaseException) -> bool:
    """Whether a process can compute nothing more on its GPU: after an illegal access, a failed assertion in a kernel or
    a failed driver call CUDA answers every call with an error; after one that has found no memory it goes on."""
    words = str(error)
    is_of_device = isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and ("CUDA error" in words or "CUDA driver error" in words)
    )
    return is_of_device and "out of memory" not in words and "ALLOC_FAILED" not in words


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The cores that this process may use: of the machine's, those that it is bound to, or a container's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share, period = quota.read_text().split()
        return max(1, min(cores, math.ceil(int(share) / int(period))))
    except (OSError, ValueError):  # no such limit
        return cores


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has computed what it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def to_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU; an accelerator is waited for once for all of them, and not once for each."""
    copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    for device in {tensor.device for tensor in tensors.values()}:
        synchronize(device)
    return copies


def card_name(device_name: str) -> str:
    """The model of an NVIDIA GPU, in capitals, of the name that its driver gives it: without maker, series, memory and
    form, unless the form makes it another model. Parts (MIG) and laptops' GPUs keep what tells them apart."""
    others = r"NVIDIA|TESLA|GEFORCE|\d+GB|HBM\w+|SXM\d?"
    words = re.split(r"[\s-]+", device_name.upper())
    return " ".join(word for word in words if word and not re.fullmatch(others, word))


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The machine's peak in FLOP/s: from the data sheet of a known GPU, measured for a CPU or an unknown GPU.

    The random numbers are its own: the generators that dropout uses stand untouched, as exact resuming needs.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = card_name(torch.cuda.get_device_name(device))
        if name in PEAK_TFLOPS:
            return PEAK_TFLOPS[name] * 1e12
    size = 1024 if device.type == "cpu" else 4096
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype, generator=generator)
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
