"""Parts of a model in training on a CPU, each computed in one pass over memory: the Python face of fused_parts.c.

PyTorch computes a SwiGLU, a norm, a rotation or a cross-entropy operation by operation, and reads and writes whole
tensors for each. Beside the matrix products, these passes are most of what a step of a small model takes. Attention of
short texts is computed head by head, whose scores stay in the processor's cache. The results are those of PyTorch but
for rounding; what the C code does not know (other types, devices, layouts) PyTorch computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable

import transformer_components
from machine.native_code import load_native
from transformer_components import PartKernels

SOURCE = Path(__file__).with_suffix(".c")
LONGEST_ATTENTION = 512  # tokens of a text: the weights of longer ones would not fit the cache
ROWS = 6  # of a tile, as in causal_attention.h
PARTS_OF_A_SUM = 16  # of rows; a fixed number, so that sums do not depend on the number of threads

POINTER, INTEGER, FLOAT, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
ARGUMENTS = {
    "swiglu": [*[POINTER] * 3, INTEGER, INT],
    "swiglu_backward": [*[POINTER] * 5, INTEGER, INT],
    "rms_norm": [*[POINTER] * 4, *[INTEGER] * 2, FLOAT, INT],
    "rms_norm_backward": [*[POINTER] * 6, *[INTEGER] * 3, INT],
    "rotate": [*[POINTER] * 3, *[INTEGER] * 4, INT, INT],
    "cross_entropy": [*[POINTER] * 3, *[INTEGER] * 2, INT],
    "causal_attention": [*[POINTER] * 6, *[INTEGER] * 6, FLOAT, INT],
    "causal_attention_backward": [*[POINTER] * 10, *[INTEGER] * 6, FLOAT, INT],
}


@contextmanager
def fused_parts() -> Iterator[bool]:
    """Within it, models compute what they can by fused_parts.c; gives whether that was compiled."""
    library = load_native(SOURCE)
    if library is None:
        yield False
        return
    for name, types in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    before, transformer_components.kernels = transformer_components.kernels, FusedKernels(library)
    try:
        yield True
    finally:
        transformer_components.kernels = before


def is_known(*tensors: torch.Tensor) -> bool:
    """Whether they are ordinary tensors of floats on the CPU, one number beside the other."""
    return not torch.compiler.is_compiling() and all(
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        for tensor in tensors
    )


class FusedKernels(PartKernels):
    """See `PartKernels` for what each of them computes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def run(self, name: str, *arguments: torch.Tensor | float) -> None:
        """Call a function of the C file with the addresses of tensors, numbers, and the number of threads."""
        addresses = (item.data_ptr() if isinstance(item, torch.Tensor) else item for item in arguments)
        getattr(self.library, name)(*addresses, torch.get_num_threads())

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return _SwiGLU.apply(self, gate, up) if is_known(gate, up) else super().swiglu(gate, up)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if is_known(x, weight):
            return _RMSNorm.apply(self, x, weight, eps)
        if x.ndim == 4 and is_known(rows := x.transpose(1, 2), weight):  # heads: (B, T, heads, K)
            return _RMSNorm.apply(self, rows, weight, eps).transpose(1, 2)
        return super().rms_norm(x, weight, eps)

    def rotate(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        rows, rotary = x.transpose(1, 2), rotary.contiguous()  # (B, T, heads, K), as the projections made them
        if not is_known(rows, rotary) or rotary[0].numel() not in (rows[0, :, 0].numel(), rows[:, :, 0].numel()):
            return super().rotate(x, rotary)
        return _Rotation.apply(self, rows, rotary).transpose(1, 2)

    def causal_attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float = 0.0
    ) -> torch.Tensor:
        rows = [x.transpose(1, 2) for x in (query, key, value)]  # (B, T, heads, K), as the projections made them
        length, width = query.shape[2:]
        if dropout or not is_known(*rows) or key.size(2) != length or length > LONGEST_ATTENTION or width % 16:
            return super().causal_attention(query, key, value, dropout)
        return _CausalAttention.apply(self, *rows).transpose(1, 2)

    def cross_entropy_(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if not is_known(logits):
            return super().cross_entropy_(logits, targets)
        losses = logits.new_empty(len(logits))  # (n,)
        self.run("cross_entropy", losses, logits, targets.contiguous(), *logits.shape)
        return losses


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: FusedKernels, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.kernels, out = kernels, torch.empty_like(gate)
        ctx.save_for_backward(gate, up)
        kernels.run("swiglu", out, gate, up, gate.numel())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        ctx.kernels.run("swiglu_backward", of_gate, of_up, of_out.contiguous(), gate, up, gate.numel())
        return None, of_gate, of_up


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: FusedKernels, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        width, out = x.size(-1), torch.empty_like(x)
        inverse = x.new_empty(x.numel() // width)  # (rows,)
        kernels.run("rms_norm", out, inverse, x, weight, len(inverse), width, eps)
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        of_x, of_weight = torch.empty_like(x), x.new_zeros(PARTS_OF_A_SUM, len(weight))
        sizes = len(inverse), len(weight), PARTS_OF_A_SUM
        ctx.kernels.run("rms_norm_backward", of_x, of_weight, of_out.contiguous(), inverse, x, weight, *sizes)
        return None, of_x, of_weight.sum(dim=0), None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: FusedKernels, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(rotary)
        return _rotated(kernels, x, rotary, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, _rotated(ctx.kernels, of_out.contiguous(), *ctx.saved_tensors, back=True), None


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: FusedKernels, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        batch, length, heads, width = query.shape
        ctx.padded = padded = -(-length // 32) * 32  # whole tiles, of however many lanes
        ctx.sizes = batch, length, padded, heads, key.size(2), width, width**-0.5
        out, shifts = torch.empty_like(query), query.new_empty(batch, heads, length)
        memory = query.new_empty(torch.get_num_threads(), padded * (width + ROWS))
        kernels.run("causal_attention", out, shifts, memory, query, key, value, *ctx.sizes)
        ctx.kernels = kernels
        ctx.save_for_backward(out, shifts, query, key, value)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out, *saved = ctx.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in saved[1:]]
        memory = out.new_empty(torch.get_num_threads(), 2 * ctx.padded * (out.size(3) + out.size(1)))
        inputs = of_out.contiguous(), out, *saved
        ctx.kernels.run("causal_attention_backward", *gradients, memory, *inputs, *ctx.sizes)
        return None, *gradients


def _rotated(kernels: FusedKernels, x: torch.Tensor, rotary: torch.Tensor, back: bool) -> torch.Tensor:
    """x (B, T, heads, K) by `rotary` (2, T, K) or (2, B, 1, T, K)."""
    out, width = torch.empty_like(x), x.size(-1)
    n_positions = rotary[0].numel() // width
    kernels.run("rotate", out, x, rotary, n_positions, x.size(2), x.numel() // width, width, int(back))
    return out
