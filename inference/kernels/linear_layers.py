"""Layers for inference, with weights of any of `DTYPES`.

`InferenceLinear` replaces `nn.Linear`, `InferenceEmbedding` `nn.Embedding`. Weights are FP32, FP16, BF16, INT8
(W ≈ scale · Q with Q in −127 … 127 and one scale for each output channel) or INT4 (int4_weights.py). On a CPU inputs
and results are FP32, so that the rounding of the weights is the only error that counts; on a GPU they are of the type
that the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from inference.kernels.fastest_way import ROW_BUCKETS, fastest_way
from inference.kernels.gpu_products import gpu_linear
from inference.kernels.int4_tiles import TILE_ROWS, expand_tiles, tile_int4
from inference.kernels.int4_weights import expand_int4, quantize_int4
from inference.kernels.int8_weights import quantize_rows
from inference.kernels.linear_products import (
    DTYPES,
    Product,
    is_tiled,
    kind_of,
    n_inputs,
    plain_linear,
    round_inputs,
    ways_to_multiply,
)

Conversion = Callable[[torch.Tensor], torch.Tensor]  # what `nn.Module.to` does with each tensor


def rounded(weight: torch.Tensor, weights: str) -> tuple[torch.Tensor, ...]:
    """A matrix (N, K) as one of `DTYPES`, each number rounded to the nearest: the weights and, if they have some, the
    scales; what needs no other type is shared."""
    if weights == "int4":
        return quantize_int4(weight)
    return quantize_rows(weight) if DTYPES[weights] == torch.int8 else (weight.detach().to(DTYPES[weights]),)


class InferenceLinear(nn.Module):
    """A linear layer for inference, (…, K) → (…, N), with weights of any of `DTYPES`.

    Gradients pass through to its input (adapters can be trained beside it), but its own weights do not learn.

    Args:
        weight: (N, K) fp32, fp16, bf16 or int8, or (N, K/2) uint8 for int4; kept, not copied.
        scale: (N,) fp32 with int8 weights, one for each output channel; (N, K/32) fp16 with int4; otherwise None.
        bias: (N,) fp32 or None.
        int8_inputs: whether inputs are rounded, too, to 8 bits a number with one scale a row: less exact, and the
            fastest way where many rows are computed at once. INT8 weights only.
        minimum: (N, K/32) fp16, of INT4 weights whose groups have one, as those of some files; otherwise None.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        int8_inputs: bool = False,
        minimum: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = len(weight), n_inputs(weight)
        self.weight = _constant(weight)
        self.register_buffer("scale", scale)
        self.register_buffer("minimum", minimum)
        self.register_parameter("bias", None if bias is None else _constant(bias))
        self.int8_inputs = int8_inputs
        self._forget_products()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, weights: str, made: tuple[torch.Tensor, ...] | None = None
    ) -> InferenceLinear:
        """A linear layer's counterpart with weights of one of `DTYPES`; what needs no other type is shared.

        Args:
            made: its weights and scales, where they were made in another way than by `rounded`.
        """
        made = rounded(linear.weight, weights) if made is None else made
        # A parameter of its own, even of the same numbers: one that was shared would take the model along to a GPU
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(*made, bias=bias, int8_inputs=weights == "int8_dynamic")

    @property
    def weights(self) -> str:
        """The name of its kind of weights, a key of `DTYPES`."""
        return "int8_dynamic" if self.int8_inputs else kind_of(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, K) → (…, N), in the type of x."""
        if not x.is_cpu or (x.requires_grad and torch.is_grad_enabled()):
            inputs = round_inputs(x) if self.int8_inputs else x
            product = gpu_linear if x.is_cuda else plain_linear
            y = product(inputs, self.weight, self.scale, self.bias, self.minimum)
            return y if y.size(-1) == self.out_features else y[..., : self.out_features]  # tiles are filled up
        # Nothing more than needed: of a small model's step, a fifth would go into views and conversions to what x is
        rows = x if x.dtype == torch.float32 else x.float()
        rows = rows if rows.is_contiguous() else rows.contiguous()
        n_rows = rows.numel() // self.in_features
        bucket = (n_rows > 1) + (n_rows > 4) + (n_rows > 16) + (n_rows > 64)
        product = self._products[bucket]
        if product is None:
            product = self._products[bucket] = self._choose(bucket)
        y = product(rows)  # (…, N)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def _choose(self, bucket: int) -> Product:
        if is_tiled(self.weight):
            return lambda x: plain_linear(x, self.weight, self.scale, self.bias)[..., : self.out_features]
        ways = ways_to_multiply(self.weight, self.scale, self.bias, self.weights, self.minimum)
        name = next(iter(ways)) if len(ways) == 1 else fastest_way(ways, self.weights, self.weight.shape, bucket)
        if name not in self._prepared:
            self._prepared[name] = ways[name]()
        return self._prepared[name]

    def _forget_products(self) -> None:
        self._products: list[Product | None] = [None] * (len(ROW_BUCKETS) + 1)  # by bucket of rows
        self._prepared: dict[str, Product] = {}  # by name, as a packed copy serves several buckets

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args, **kwargs) -> None:
        self._forget_products()  # other weights are coming
        _expect_minimum(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Conversion, recurse: bool = True) -> nn.Module:
        self._forget_products()  # the weights go to another device or type
        return _apply_except_scales(self, super()._apply, fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_products": [None] * len(self._products), "_prepared": {}}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, weights={self.weights}"


class InferenceEmbedding(nn.Module):
    """An embedding table (V, D) of any of `DTYPES`; only rows looked up are expanded.

    Args:
        weight, scale, minimum: the table, as `InferenceLinear` has its weights; tied to the output layer, the very
            tensors of that layer.

    Attributes:
        output_dtype: of the rows that it gives; it follows the module's conversions (`model.to(torch.bfloat16)`).
    """

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor | None = None, minimum: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.weight = _constant(weight)
        self.register_buffer("scale", scale)
        self.register_buffer("minimum", minimum)
        self.output_dtype = torch.float32

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) int64 → (B, T, D) of `output_dtype`."""
        if is_tiled(self.weight):
            return expand_tiles(self.weight, self.scale, input_ids).to(self.output_dtype)
        rows = F.embedding(input_ids, self.weight)  # (B, T, D), or (B, T, D/2) of int4
        if self.weight.dtype == torch.uint8:
            minimum = None if self.minimum is None else self.minimum[input_ids]
            rows = expand_int4(rows, self.scale[input_ids], minimum)
        elif self.scale is not None:
            rows = rows * self.scale[input_ids].unsqueeze(-1)
        return rows.to(self.output_dtype)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args, **kwargs) -> None:
        _expect_minimum(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Conversion, recurse: bool = True) -> nn.Module:
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype)).dtype
        return _apply_except_scales(self, super()._apply, fn, recurse)


def tile_for_gpu(model: nn.Module) -> None:
    """Put a model's INT4 weights into the order in which PyTorch's kernel for GPUs reads them, in place of the order
    that they have; scales become bf16. An embedding stays as it is unless it is tied to a linear layer.

    A model in this order computes the same on any device; what saves models refuses it.
    """
    tables = {part.weight: part for part in model.modules() if isinstance(part, InferenceEmbedding)}
    for layer in model.modules():
        if isinstance(layer, InferenceLinear) and layer.weight.dtype == torch.uint8:
            layer._forget_products()
            tiles, scales_and_zeros = tile_int4(layer.weight, layer.scale, layer.minimum)
            layer.weight.data = tiles
            if layer.bias is not None:
                layer.bias.data = F.pad(layer.bias, (0, -layer.out_features % TILE_ROWS))
            for part in filter(None, (layer, tables.get(layer.weight))):
                part.scale, part.minimum = scales_and_zeros, None


def _expect_minimum(layer: InferenceLinear | InferenceEmbedding, state: dict[str, torch.Tensor], prefix: str) -> None:
    """Minima come with the weights that have them."""
    if layer.weight.dtype == torch.uint8:
        layer.minimum = torch.empty_like(layer.scale) if f"{prefix}minimum" in state else None


def _apply_except_scales(
    module: InferenceLinear | InferenceEmbedding, apply: Callable[..., nn.Module], fn: Conversion, recurse: bool
) -> nn.Module:
    """A module's `_apply` (`.to`, `.bfloat16()`, …) that leaves scales and minima in their type."""
    exact = {name: buffer for name in ("scale", "minimum") if (buffer := getattr(module, name)) is not None}
    apply(fn, recurse)
    for name, buffer in exact.items():
        if getattr(module, name).dtype != buffer.dtype:
            setattr(module, name, buffer.to(module.weight.device))
    return module


def _constant(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter that does not learn; `tensor` itself if it is one, so that what is tied stays tied."""
    tied = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    return tensor if tied else nn.Parameter(tensor.detach(), requires_grad=False)
