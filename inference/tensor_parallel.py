"""One model on several devices: tensor parallelism of the engine (Megatron-LM, arXiv:1909.08053).

    torchrun --nproc_per_node 2 -m inference.kv_cache_infer --model_path models/sft/sft_best.pth --prompt "你好"

torchrun starts a process ("rank") for each device. Each has its share of every layer, as training/tensor_plan.py cuts
them, of the cache (its own key/value heads) and of the output layer. Rank 0 has the engine: it takes requests, plans
the steps and chooses the tokens. What a step computes is nothing but numbers (gpu_cache.py), which it sends to the
others; they compute the same forward pass with their shares, and forget its result. So answers are those of one
process, up to the last digits of sums in another order.

The ranks lead no life of their own: where one ends, the connections between them end, and all others end with it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from command_line import UserError
from gpt_model import GPTModel
from inference.gpu_cache import GpuCache
from inference.gpu_step import GpuStep, Numbers
from inference.kernels.int4_weights import GROUP, pack_int4, unpack_int4
from inference.kernels.linear_layers import InferenceEmbedding, InferenceLinear
from machine import free_gpu_bytes, usable_cores
from training import ranks
from training.tensor_plan import BY_INPUTS, BY_OUTPUTS, DIVIDED, indivisible

Result = TypeVar("Result")

# What rank 0 tells the others, each with its numbers
CACHE, STEP, CLEAR, END = "cache", "step", "clear", "end"


class RankLost(Exception):
    """A process that computes a part of the model has ended, or is out of step; nothing can be computed any more."""


# -- the processes -----------------------------------------------------------------------------------------------------


class Ranks:
    """The processes that compute one model together, as one of them sees them.

    Attributes:
        rank: its number. 0 leads.
        n_ranks: how many there are.
        free_bytes: what can still be allocated on the fullest of their GPUs, once all have loaded; None on CPUs.
        is_split: whether the others are, or may be, where rank 0 is not: nothing can be computed then.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.n_ranks, self.device = ranks.rank(), ranks.world_size(), device
        self.free_bytes: int | None = None
        self.is_split = self._is_over = False
        if self.rank == 0:
            key = os.urandom(32)
            with Listener(backlog=self.n_ranks, authkey=key) as listener:  # of this machine, and for this user, alone
                dist.broadcast_object_list([listener.address, key], src=0, device=torch.device("cpu"))
                self._others: list[Connection] = [listener.accept() for _ in range(self.n_ranks - 1)]
        else:
            dist.broadcast_object_list(address := [None, None], src=0, device=torch.device("cpu"))
            self._leader = Client(address[0], authkey=address[1])

    @classmethod
    def start(cls, device: torch.device) -> Ranks | None:
        """Join the other processes; None if torchrun has not started several.

        Raises:
            UserError: they are on several machines.
        """
        n_ranks, n_here = int(os.environ.get("WORLD_SIZE", 1)), ranks.processes_on_this_machine()
        if "RANK" not in os.environ or n_ranks == 1:
            return None
        if n_here != n_ranks:
            raise UserError(f"{n_here} of {n_ranks} processes are on this machine; serve a model on one machine only")
        ranks.start(device)
        return cls(device)

    @property
    def n_threads(self) -> int:
        """The CPU threads of each process that they are not asked to have otherwise."""
        return max(1, usable_cores() // self.n_ranks)

    def agreed(self, work: Callable[[], Result]) -> Result:
        """What `work` gives on this rank, once it is done on all of them.

        Raises:
            UserError: on rank 0, what it was on the first rank that could not do it; the others end with status 2.
            RankLost: on rank 0, another one has ended; so do the others, with status 1.
        """
        result = complaint = None
        try:
            result = work()
        except UserError as error:
            complaint = str(error)
        free = free_gpu_bytes(self.device) if self.device.type == "cuda" else None
        try:
            reports = ranks.gather_objects((complaint, free))
        except RuntimeError as error:
            lost = "another process of the model has ended before all had loaded their share"
            raise RankLost(lost) if self.rank == 0 else SystemExit(f"error: {lost}") from error
        complaints = [complaint for complaint, _ in reports if complaint]
        if complaints:
            raise UserError(complaints[0]) if self.rank == 0 else SystemExit(2)
        self.free_bytes = None if free is None else min(free for _, free in reports)
        return result

    # -- rank 0 --------------------------------------------------------------------------------------------------------

    def watch(self, on_loss: Callable[[str], None]) -> None:
        """Have a thread say, in a sentence, that one of the others has ended before it was told to."""

        def until_one_ends() -> None:
            ended = wait(self._others)[0]  # none of them ever sends anything
            if not self._is_over:
                self.is_split = True
                on_loss(lost_sentence(1 + self._others.index(ended)))

        threading.Thread(target=until_one_ends, name="ranks", daemon=True).start()

    def tell(self, kind: str, content: object = None) -> None:
        """Say to all others what comes next.

        Raises:
            RankLost: one of them has ended.
        """
        for number, other in enumerate(self._others, 1):
            try:
                other.send((kind, content))
            except OSError as error:
                self.is_split = True
                raise RankLost(lost_sentence(number)) from error

    def end(self) -> None:
        """Let the others end; to be called once nothing is computed any more."""
        if not (self._is_over or self.is_split):
            self._is_over = True
            with contextlib.suppress(RankLost):  # it has ended before
                self.tell(END)

    def leave(self) -> None:
        """Leave the process group, at the end of a process."""
        if not self.is_split:
            ranks.stop()

    # -- the others ----------------------------------------------------------------------------------------------------

    def follow(self, model: GPTModel) -> None:
        """Compute with this rank's share of the model what rank 0 says, until it says that this is all; where rank 0 or
        another one ends before that, end the process with a sentence and status 1.

        Signals are rank 0's business: it may have answers to end first.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        try:
            self._repeat_steps(model.eval())
        except (EOFError, OSError):
            sys.exit(f"error: {lost_sentence(0)}")
        except RuntimeError as error:
            sys.exit(f"error: {out_of_step(error)}")

    def _repeat_steps(self, model: GPTModel) -> None:
        step: GpuStep | None = None
        while True:
            kind, content = self._leader.recv()
            if kind == CACHE:
                step = GpuStep(model, GpuCache(model.config, *content, model.device), graphs=False)
            elif kind == STEP:
                step.repeat(content)
            elif kind == CLEAR:
                step.cache.clear(content)
            elif kind == END:
                return


def lost_sentence(number: int) -> str:
    """That a process has ended."""
    return f"process {number} of the model has ended, and without its share of the model nothing can be computed"


def out_of_step(error: Exception) -> str:
    """That the processes no longer compute the same step, without the places in gloo's code and its advice."""
    why = re.sub(r"^\[[^]]*\] ", "", str(error).partition("\n")[0]).partition(". ")[0]
    return f"the processes of the model are out of step, as a step failed: {why}"


# -- a rank's share of the model ---------------------------------------------------------------------------------------


def cut(model: GPTModel, rank: int, n_ranks: int) -> GPTModel:
    """Leave of a model what this rank computes, in memory of its own; the model is changed.

    It is then a model with fewer heads and a narrower feed-forward network, whose branches are added up over the ranks.

    Raises:
        UserError: it cannot be cut, and why.
    """
    config = model.config
    if config.n_experts:
        raise UserError(f"a mixture of experts is not cut into {n_ranks} parts; serve it with one process")
    if name := indivisible(config, n_ranks):
        raise UserError(
            f"{n_ranks} processes cut each layer in {n_ranks}, and the model's {name} is {getattr(config, name)}; "
            "start as many processes as divide it"
        )
    for index, layer in enumerate(model.layers):
        modules = dict(layer.named_modules())
        for names, share_of in ((BY_OUTPUTS, share_of_outputs), (BY_INPUTS, SumOfShares)):
            for name in names:
                if (part := modules.get(name)) is not None:
                    if not isinstance(part, InferenceLinear) or part.int8_inputs:
                        raise UserError(_uncut(f"layers.{index}.{name}", part))
                    parent, _, own_name = name.partition(".")
                    setattr(modules[parent], own_name, share_of(part, rank, n_ranks))
    table = model.token_embedding if config.tie_embeddings else None
    model.lm_head = SharedHead(model.lm_head, table, rank, n_ranks)
    model.config = replace(config, **{name: getattr(config, name) // n_ranks for name in DIVIDED})
    return model


def _uncut(name: str, part: nn.Module) -> str:
    if isinstance(part, InferenceLinear):
        return f"{name} has int8_dynamic weights, whose inputs are rounded by the largest of all; take int8 weights"
    return (
        f"{name} has adapters beside quantized weights, which are not cut into parts; merge them with "
        "python -m alignment.lora_export, or serve the model with one process"
    )


def share_of_rows(weight: torch.Tensor | None, rank: int, n_ranks: int) -> torch.Tensor | None:
    """A rank's rows of a tensor, the ranks' numbers of which differ by one at most; a view."""
    return None if weight is None else weight.detach().tensor_split(n_ranks)[rank]


def share_of_outputs(linear: InferenceLinear, rank: int, n_ranks: int) -> InferenceLinear:
    """A linear layer with a rank's share of its outputs, in memory of its own."""
    parts = (linear.weight, linear.scale, linear.bias, linear.minimum)
    shares = [share_of_rows(part, rank, n_ranks) for part in parts]
    weight, scale, bias, minimum = (None if share is None else share.clone() for share in shares)
    return InferenceLinear(weight, scale, bias, minimum=minimum)


class SumOfShares(nn.Module):
    """A linear layer of which a rank has a share of the inputs; the ranks' results are added up.

    Raises:
        UserError: INT4 weights whose groups would be cut.
    """

    def __init__(self, linear: InferenceLinear, rank: int, n_ranks: int) -> None:
        super().__init__()
        weight, scale, minimum = linear.weight.detach(), linear.scale, linear.minimum
        if weight.dtype == torch.uint8:
            if (width := linear.in_features // n_ranks) % GROUP:
                raise UserError(
                    f"a share of {width} of a row's int4 weights is no multiple of {GROUP}, of which each has a scale; "
                    "take int8 weights or fewer processes"
                )
            weight = pack_int4(unpack_int4(weight).chunk(n_ranks, dim=1)[rank])
            scale = scale.chunk(n_ranks, dim=1)[rank].clone()
            minimum = None if minimum is None else minimum.chunk(n_ranks, dim=1)[rank].clone()
        else:
            weight = weight.chunk(n_ranks, dim=1)[rank].clone(memory_format=torch.contiguous_format)
        self.linear = InferenceLinear(weight, scale, minimum=minimum)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A rank's share of (…, K) → (…, N), the same on all ranks."""
        y = self.linear(x)
        ranks.tensor_over_ranks(y)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class SharedHead(nn.Module):
    """The output layer, of which a rank has the rows of its share of the vocabulary; rank 0 puts the logits together.

    Args:
        table: the token embedding, if it is tied; it is whole on every rank, and the rows are those in it.
    """

    def __init__(self, head: InferenceLinear, table: InferenceEmbedding | None, rank: int, n_ranks: int) -> None:
        super().__init__()
        if isinstance(head, InferenceLinear) and head.int8_inputs:
            raise UserError(_uncut("lm_head", head))
        self.rank, self.n_ranks = rank, n_ranks
        self.sizes = [len(part) for part in head.weight.tensor_split(n_ranks)]
        self._table = None if table is None else (table,)  # in a tuple, as it is the model's part and not this one's
        self.linear = share_of_outputs(head, rank, n_ranks) if table is None else self._rows_of(table)

    def _rows_of(self, table: InferenceEmbedding) -> InferenceLinear:
        weight, scale, minimum = (
            share_of_rows(part, self.rank, self.n_ranks) for part in (table.weight, table.scale, table.minimum)
        )
        return InferenceLinear(weight, scale, minimum=minimum)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        if self._table is None:
            return super()._apply(fn, recurse)
        self.linear = self._rows_of(self._table[0])  # which has moved before
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states (N, D) → on rank 0 logits (N, V), elsewhere this rank's share of them."""
        mine, n_rows = self.linear(x), len(x)
        if not n_rows:
            return mine.new_empty(0, sum(self.sizes))
        widest = max(self.sizes)
        mine = F.pad(mine, (0, widest - mine.size(1))).contiguous()
        found = [torch.empty_like(mine) for _ in self.sizes] if self.rank == 0 else None
        dist.gather(mine, found, dst=0)
        return mine if found is None else torch.cat([part[:, :n] for part, n in zip(found, self.sizes, strict=True)], 1)


# -- the engine's step and cache on rank 0 -----------------------------------------------------------------------------


class SharedCache(GpuCache):
    """Rank 0's cache: the others have the same cells for their own heads.

    Args:
        fellows: the ranks; the further arguments are those of `PagedCache`.
    """

    def __init__(self, fellows: Ranks, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.fellows = fellows
        fellows.tell(CACHE, (self.n_tokens, len(self.free_slots), self.keys.dtype))

    def clear(self, blocks: Sequence[int]) -> None:
        """See `GpuCache.clear`."""
        self.fellows.tell(CLEAR, list(blocks))
        super().clear(blocks)


class SharedStep(GpuStep):
    """Rank 0's steps, which it has the others repeat. None is recorded as a CUDA graph."""

    def __init__(self, model: GPTModel, cache: SharedCache) -> None:
        super().__init__(model, cache, graphs=False)

    def enter(self, arrays: Mapping[str, np.ndarray]) -> Numbers:
        """See `GpuStep.enter`."""
        self.cache.fellows.is_split = True  # should anything go wrong from here on, nobody knows where the others are
        self.cache.fellows.tell(STEP, dict(arrays))
        return super().enter(arrays)

    def _forward(self, numbers: Numbers) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            result = super()._forward(numbers)
        except RuntimeError as error:
            raise RankLost(out_of_step(error)) from error
        self.cache.fellows.is_split = False
        return result
