"""How many samples are computed at once, a micro-batch. Only memory and speed depend on it: a step's loss and gradient
are means over the items of its whole global batch.

On a GPU the largest micro-batch that fits is found once, at the beginning. The peak of memory is a straight line in the
size, so that two measured points give all others; which two is guessed by arithmetic (`machine.what_fits`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from data_loader import Batch, BatchOrder
from gpt_model import GPTConfig
from machine import free_gpu_bytes
from machine.what_fits import size_of, training_bytes
from training import ranks
from training.expert_use import ExpertUse
from training.interruptions import is_out_of_memory
from training.parallel_model import ParallelModel
from training.saved_run import TrainingData, random_state, set_random_state
from training.training_config import TrainingConfig

RESERVE = 0.08  # the share of the memory that stays free: for gaps between tensors, and lengths that were not measured
GIB = 2**30
Result = TypeVar("Result")


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


class MicroBatches:
    """The part of `TrainingLoop` that sees to it that memory suffices.

    Attributes:
        memory: what limits the two sizes; None: nothing that could be measured.
        n_of_step: samples of a step on this rank.
        micro_batch_size: of which so many are computed at once.
        evaluation_batch_size: the same where nothing learns.
    """

    config: TrainingConfig
    gpt_config: GPTConfig
    train_data: TrainingData
    device: torch.device
    lora: dict[str, Any] | None
    order: BatchOrder
    parallel_model: ParallelModel
    optimizers: list[torch.optim.Optimizer]
    expert_use: ExpertUse
    step: int
    measures_at_start = True  # whether `largest_batch` gives what a step's samples are

    def settle_sizes(self) -> None:
        """The sizes before anything is measured."""
        config = self.config
        self.memory: Memory | None = GpuMemory(self.device) if self.device.type == "cuda" else None
        self.n_of_step = config.batch_size * config.grad_accum_steps
        self.micro_batch_size = config.micro_batch_size or config.batch_size
        self.evaluation_batch_size = min(config.batch_size, self.micro_batch_size)

    def fit_memory(self, batch_of: Callable[[int], Batch], stretch: float = 1.0) -> None:
        """Where memory is limited and the user chose no micro-batch, measure the largest that fits, and say which.

        Weights, random numbers and figures stay as they are. All ranks choose the same. Models that are cut among ranks
        are left as `--batch_size` says: measuring them, one rank could wait for another that is out of memory.

        Args:
            batch_of: a batch of so many samples, the longest if possible.
            stretch: how many times as long rows may become.
        """
        if self.memory is None or self.config.micro_batch_size or self.parallel_model.is_sharded:
            return
        random, sizes, limit = random_state(self.device), divisors(self.n_of_step), self.memory.limit()

        def peak_of(size: int) -> float:
            self.memory.forget_peak()
            batch = batch_of(size)
            failed = failed_for_memory(lambda: self._measured_pass(batch))
            self._forget_gradients()
            return max(ranks.gather_objects(math.inf if failed else self.memory.peak()))

        measured = measure(sizes, self._guess(limit), peak_of)
        room = (1 - RESERVE) * limit - bytes_to_come(self.optimizers)
        chosen = largest_within(room, sizes, measured, stretch)
        self.micro_batch_size, self.evaluation_batch_size = (
            min(ranks.gather_objects(size)) for size in (chosen, min(self.config.batch_size, chosen))
        )
        self._ahead = None  # batches that were read for another size
        self.expert_use.forget()
        set_random_state(random, self.device)
        self.memory.forget_peak()
        if ranks.is_main():
            print(said(self.micro_batch_size, self.n_of_step, measured, limit), flush=True)

    def largest_batch(self, n_samples: int) -> Batch:
        """A batch of the longest samples, of which there may be fewer."""
        lengths = self.order.lengths
        longest = range(len(self.train_data)) if lengths is None else lengths.argsort(descending=True).tolist()
        return self.train_data.collate([self.train_data[longest[i % len(longest)]] for i in range(n_samples)])

    def _measured_pass(self, batch: Batch) -> None:
        with self.parallel_model.synchronised(last=False):  # no exchange between ranks
            self._forward_and_backward(batch, 1.0)

    def _forget_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _guess(self, limit: float) -> int:
        """The micro-batch that arithmetic takes for the largest; of models that it does not know `--batch_size`."""
        size = size_of(self.gpt_config)
        if size is None:
            return self.config.batch_size
        config = self.config
        kind = (self.lora["frozen_weights"], self.lora["lora_rank"]) if self.lora else ("", 0)
        settings = config.max_seq_len, config.recompute_activations, *kind, config.optimizer
        sizes = {n: training_bytes(size, n * config.rows_of_sample, *settings) for n in divisors(self.n_of_step)}
        return max((n for n, needed in sizes.items() if needed <= (1 - RESERVE) * limit), default=1)

    def within_memory(self, compute: Callable[[], Result], batch: str = "micro_batch_size") -> Result:
        """What `compute` gives. Where memory runs out, it is computed again, with the same random numbers, in parts of
        half the size.

        Of several ranks one may run out alone, while others wait for its gradients: then the run ends with advice.

        Args:
            batch: the attribute that says how many samples are computed at once.
        """
        while True:
            random, results = random_state(self.device), []
            if ranks.world_size() > 1 or getattr(self, batch) == 1:
                return compute()
            if not failed_for_memory(lambda results=results: results.append(compute())):
                return results[0]
            size = getattr(self, batch)
            half = next_smaller(size, self.n_of_step) if batch == "micro_batch_size" else size // 2
            setattr(self, batch, half)
            self._ahead = None  # batches that were read for the size of before
            self._forget_gradients()
            self.expert_use.forget()
            set_random_state(random, self.device)
            what = "micro-batches" if batch == "micro_batch_size" else "evaluations"
            print(f"step {self.step}: out of memory with {what} of {size}; computing it again with {half}", flush=True)

    def _memory_advice(self) -> str:
        config, size = self.config, self.micro_batch_size
        several = f"give --micro_batch_size {next_smaller(size, self.n_of_step)}" if size > 1 else ""
        remedies = [several if ranks.world_size() > 1 else "lower --batch_size" * (size > 1)]
        remedies.append("add --recompute_activations true" * (not config.recompute_activations))
        remedies += ["lower --max_seq_len", "take a smaller model"]
        sizes = f"micro-batches of {size} and --max_seq_len {config.max_seq_len}"
        return f"with {sizes}; {', or '.join(filter(None, remedies))}"
