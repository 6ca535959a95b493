"""Products of rows with the weights of the expert that each goes through, where only the device knows how many go
through which: nobody waits for these counts.

All shapes follow from the number of rows, and whatever depends on counts is computed where the counts are:

    few rows     (no more than experts) each takes its expert's weights, and all are multiplied in one batch: only the
                 weights of chosen experts are read
    many, bf16   PyTorch's grouped product of sorted rows, which reads the groups' ends on the GPU; its kernel is for
                 NVIDIA's compute capabilities 9 and 10, elsewhere it would wait for them
    many         sorted rows in blocks of one expert each, of which there can be at most a known number; what blocks are
                 filled up with is computed and thrown away

`arrange` says where rows lie. `at_once` and `multiply` are for training; inference, with weights of more kinds, has
products of its own (stacked_experts.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

Layer = Callable[[torch.Tensor], torch.Tensor]
GROUPED_CAPABILITIES = (9, 10)  # major ones for which PyTorch 2.13 has its grouped product
GROUPED_EXPERTS = 1023  # that it takes at most
BLOCK_MULTIPLE = 16  # of a block's rows, as tensor cores take them


class ExpertRows(NamedTuple):
    """How S rows lie, each of which goes through one of E experts: in M blocks of b, or in groups, one after another.

    Attributes:
        expert: (M,), of each block; of groups (S,), of each row.
        place: (S,), of each row among the M · b, or the S; None if they lie as they came.
        shape: (M, b), or (S,).
        ends: (E,) int32, of the groups; None of blocks.
    """

    expert: torch.Tensor
    place: torch.Tensor | None
    shape: tuple[int, ...]
    ends: torch.Tensor | None = None

    def lay(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (S, K) as they came → as they lie, (M, b, K) or (S, K); between them are zeros."""
        if self.place is None:
            return rows.view(*self.shape, -1)
        n_places = self.shape[0] * self.shape[1] if self.ends is None else self.shape[0]
        return rows.new_zeros(n_places, rows.size(1)).index_copy_(0, self.place, rows).view(*self.shape, -1)

    def lift(self, outputs: torch.Tensor) -> torch.Tensor:
        """What became of them, (M, b, N) or (S, N) → (S, N), in the order in which they came."""
        outputs = outputs.flatten(0, -2)
        return outputs if self.place is None else outputs.index_select(0, self.place)


def counts_of(expert: torch.Tensor, n_experts: int) -> torch.Tensor:
    """How often each expert occurs, (E,) int64. `bincount` would read its largest number, and be waited for."""
    return expert.new_zeros(n_experts).scatter_add_(0, expert, torch.ones_like(expert))


def arrange(expert: torch.Tensor, n_experts: int, grouped: bool) -> ExpertRows:
    """How rows are to lie of which each goes through one `expert` (S,) of `n_experts`.

    A block has as many rows as an expert gets if all get alike, ⌈S / E⌉ up to the next multiple of 16. So there are
    fewer than 2 E blocks however unlike they get, and fewer than 2 S + 16 E rows are computed.

    Args:
        grouped: whether the grouped product is to be had, see `has_grouped_product`.
    """
    n_rows = len(expert)
    if n_rows <= n_experts:
        return ExpertRows(expert, None, (n_rows, 1))
    order = expert.argsort(stable=True)  # (S,)
    sorted_expert, place = expert[order], torch.arange(n_rows, device=expert.device)  # (S,)
    counts = counts_of(expert, n_experts)  # (E,)
    ends = counts.cumsum(dim=0)
    if grouped:
        return ExpertRows(sorted_expert, torch.empty_like(order).scatter_(0, order, place), (n_rows,), ends.int())
    size = -(-n_rows // (n_experts * BLOCK_MULTIPLE)) * BLOCK_MULTIPLE
    n_blocks = (counts + size - 1) // size  # (E,), of each expert
    block_ends = n_blocks.cumsum(dim=0)
    most = (n_rows + n_experts * (size - 1)) // size  # blocks that there can be
    of_block = torch.searchsorted(block_ends, torch.arange(most, device=expert.device), right=True)  # (M,)
    place = place + ((block_ends - n_blocks) * size - (ends - counts))[sorted_expert]
    place = torch.empty_like(order).scatter_(0, order, place)
    return ExpertRows(of_block.clamp(max=n_experts - 1), place, (most, size))


def has_grouped_product(device: torch.device, dtype: torch.dtype, n_experts: int, *widths: int) -> bool:
    """Whether PyTorch's grouped product of rows and weights of a type and of such widths reads the groups' ends on the
    GPU."""
    aligned = not any(width % 8 for width in widths)  # it reads 16 bytes at a time
    return dtype == torch.bfloat16 and n_experts <= GROUPED_EXPERTS and aligned and has_grouped_kernel(device)


def has_grouped_kernel(device: torch.device) -> bool:
    """Whether a device is one of those for which PyTorch has it; its builds for Windows have none."""
    if device.type != "cuda" or torch.version.hip or sys.platform == "win32":
        return False
    return torch.cuda.get_device_capability(device)[0] in GROUPED_CAPABILITIES


# As `torch.compiler.assume_constant_result` does it, but without importing the compiler, which takes a second
has_grouped_kernel._dynamo_marked_constant = True


def signature(layer: nn.Module) -> tuple | None:
    """What linear layers must have in common to be computed at once; None: this one cannot be, as it is of an unknown
    class. Those of the project say so themselves, by methods `signature` and `at_once`."""
    if type(layer) is nn.Linear:
        weight = layer.weight
        return nn.Linear, weight.shape, weight.dtype, layer.bias is None
    return layer.signature() if "signature" in vars(type(layer)) else None


def at_once(layers: Sequence[nn.Module], rows: ExpertRows) -> Layer:
    """The linear layers of E experts, which have the same `signature`, as one layer for rows as they lie."""
    if type(layers[0]) is not nn.Linear:
        return type(layers[0]).at_once(layers, rows)
    return partial(multiply, rows=rows, weights=[layer.weight for layer in layers], biases=biases_of(layers))


def biases_of(layers: Sequence[nn.Module]) -> list[torch.Tensor] | None:
    """Those of layers of the same `signature`."""
    return None if layers[0].bias is None else [layer.bias for layer in layers]


def multiply(
    x: torch.Tensor,
    rows: ExpertRows,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None = None,
    scales: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Rows x as they lie, (M, b, K) or (S, K), by the weights of their experts → (M, b, N) or (S, N), in x's type.

    Kept for the backward pass are x and the weights themselves. Only while a layer is computed, forwards and once more
    backwards, its weights stand one behind the other, E · N · K numbers, in their own type and in that of x; what
    blocks take of these is less than twice as much, and so are the gradients of blocks.

    Args:
        weights: E times (N, K), in any floating type, in which their gradients come; or integers, with
        scales: E times (N,), by which their rows are multiplied; then weights do not learn.
        biases: E times (N,), or None.
    """
    parameters = (*weights, *(biases or ()), *(scales or ()))
    return _Product.apply(x, rows.expert, rows.ends, len(weights), scales is not None, *parameters)


class _Product(torch.autograd.Function):
    """See `multiply`. The two products of a linear layer's backward pass are of the same kind as its own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        expert: torch.Tensor,
        ends: torch.Tensor | None,
        n_experts: int,
        scaled: bool,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, expert, ends, *parameters)
        ctx.n_experts, ctx.scaled = n_experts, scaled
        weight, bias = _stacked(parameters, n_experts, scaled, x.dtype)
        y = _product(x, weight, expert, ends)
        if bias is None:
            return y
        bias = bias[expert]  # (M, N) or (S, N)
        return y.add_(bias.unsqueeze(1) if ends is None else bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, expert, ends, *parameters = ctx.saved_tensors
        gradient, of_x, of_parameters = gradient.contiguous(), None, [None] * len(parameters)
        if ctx.needs_input_grad[0]:
            stacked = _stacked(parameters, ctx.n_experts, ctx.scaled, x.dtype)
            of_x = _product(gradient, stacked[0].mT, expert, ends)
            del stacked
        if any(ctx.needs_input_grad[-len(parameters) :]):
            sums = _sums(gradient, x, expert, ends, ctx.n_experts, with_bias=len(parameters) > ctx.n_experts)
            of_parameters = [part for of_all in sums for part in of_all.to(parameters[0].dtype).unbind()]
        return of_x, None, None, None, None, *of_parameters


def _stacked(
    parameters: Sequence[torch.Tensor], n_experts: int, scaled: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights (E, N, K), and the biases (E, N) if there are any, of what `multiply` is given."""
    weight, *rest = (torch.stack(parameters[i : i + n_experts]) for i in range(0, len(parameters), n_experts))
    if scaled:
        weight = weight * rest.pop().unsqueeze(-1)
    return weight.to(dtype), rest[0].to(dtype) if rest else None


def _product(x: torch.Tensor, weight: torch.Tensor, expert: torch.Tensor, ends: torch.Tensor | None) -> torch.Tensor:
    """Rows as they lie, times the transposes of their experts' weights (E, N, K)."""
    return torch.bmm(x, weight[expert].mT) if ends is None else F.grouped_mm(x, weight.mT, offs=ends)


def _sums(
    gradient: torch.Tensor,
    x: torch.Tensor,
    expert: torch.Tensor,
    ends: torch.Tensor | None,
    n_experts: int,
    with_bias: bool,
) -> list[torch.Tensor]:
    """The gradients of the weights (E, N, K) and, if asked for, of the biases (E, N)."""
    members = expert == torch.arange(n_experts, device=x.device).unsqueeze(1)  # (E, M) or (E, S)
    if ends is None:  # a sum by a product, which adds in fp32 and always in the same order
        members, of_blocks = members.to(x.dtype), torch.bmm(gradient.mT, x)
        sums = [(members @ of_blocks.flatten(1)).view(n_experts, *of_blocks.shape[1:])]
        return [*sums, members @ gradient.sum(dim=1)] if with_bias else sums
    # What the kernel writes for an expert without rows depends on the GPU
    sums = [F.grouped_mm(gradient.mT, x, offs=ends).masked_fill_(~members.any(dim=1).view(-1, 1, 1), 0)]
    return [*sums, members.to(x.dtype) @ gradient] if with_bias else sums
