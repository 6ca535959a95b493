"""How many samples are computed at once, a micro-batch. Only memory and speed depend on it: a step's loss and gradient
are means over the items of its whole global batch.

On a GPU the largest micro-batch that fits is found once, at the beginning. The peak of memory is a straight line in the
size, so that two measured points give all others; which two is guessed by arithmetic (`machine.what_fits`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from machine import free_gpu_bytes
from training.interruptions import is_out_of_memory

RESERVE = 0.08  # the share of the memory that stays free: for gaps between tensors, and lengths that were not measured
GIB = 2**30


class Memory(Protocol):
    """What a device with a memory of its own says of it, in bytes."""

    def limit(self) -> float:
        """What this process may have in all."""

    def forget_peak(self) -> None:
        """From now on `peak` is that of what comes."""

    def peak(self) -> float:
        """The most that was in use."""


class GpuMemory:
    """The `Memory` of a CUDA GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def limit(self) -> float:
        return free_gpu_bytes(self.device) + torch.cuda.memory_allocated(self.device)

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated(self.device)


def divisors(n: int) -> list[int]:
    """The whole numbers that n can be divided by, the smallest first."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return small + [n // i for i in reversed(small) if i * i != n]


def next_smaller(size: int, n: int) -> int:
    """The largest divisor of n that is at most half of a size above 1."""
    return max(divisor for divisor in divisors(n) if divisor <= size // 2)


def measure(sizes: Sequence[int], guess: int, peak_of: Callable[[int], float]) -> dict[int, float]:
    """The peaks of two sizes near a guess, as far as there are two that can be computed.

    Args:
        sizes: those that are allowed, the smallest first.
        peak_of: the bytes that one of them takes; infinite if it does not fit.
    """
    measured: dict[int, float] = {}
    size = max(size for size in sizes if size <= max(guess, sizes[0]))
    while True:
        half = max((smaller for smaller in sizes if smaller <= size // 2), default=None)
        for number in (half, size):
            if number is not None and number not in measured:
                measured[number] = peak_of(number)
        if half is None or math.isfinite(measured[size]):
            break
        size = half
    if len(measured) == 1 and math.isfinite(measured[size]) and size < sizes[-1]:
        larger = sizes[sizes.index(size) + 1]
        measured[larger] = peak_of(larger)
    return measured


def largest_within(room: float, sizes: Sequence[int], measured: dict[int, float], stretch: float = 1.0) -> int:
    """The largest size whose peak is within `room` bytes by the line through the measured ones; at least the first.

    Args:
        stretch: how many times as long rows may become as those that were measured.
    """
    finite = {size: peak for size, peak in measured.items() if math.isfinite(peak)}
    if len(finite) < 2:
        return max(finite, default=sizes[0])
    low, high = sorted(finite)[-2:]
    slope = max(0.0, (finite[high] - finite[low]) / (high - low))
    resting = finite[low] - slope * low
    too_large = min((size for size in measured if size not in finite), default=math.inf)
    fitting = [size for size in sizes if resting + slope * stretch * size <= room and size < too_large]
    return max(fitting, default=sizes[0])


def said(chosen: int, n: int, measured: dict[int, float], limit: float) -> str:
    """A sentence on what was chosen, and why."""
    peaks = (f"{size}: {peak / GIB:.2f} GiB" if math.isfinite(peak) else f"{size}: too much"
             for size, peak in sorted(measured.items()))  # fmt: skip
    return (
        f"micro-batches of {chosen}, {n // chosen} a step: measured {', '.join(peaks)}, of {limit / GIB:.2f} GiB with "
        f"{RESERVE:.0%} in reserve"
    )


def bytes_to_come(optimizers: Sequence[torch.optim.Optimizer]) -> float:
    """What the first step adds to memory: a moment of each matrix of Muon, two of what AdamW trains."""
    moments = {"Muon": 1}
    return sum(
        moments.get(type(optimizer).__name__, 2) * parameter.numel() * parameter.element_size()
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if not optimizer.state.get(parameter)
    )


def failed_for_memory(compute: Callable[[], None]) -> bool:
    """Whether something could not be computed for want of memory; what it left behind is given back."""
    try:
        compute()
    except (RuntimeError, MemoryError) as error:  # its traceback holds the tensors of the failed pass until it is left
        if not is_out_of_memory(error):
            raise
    else:
        return False
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return True
