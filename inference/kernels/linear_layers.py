"""Layers for inference, with weights of any of `DTYPES`.

`InferenceLinear` replaces `nn.Linear`, `InferenceEmbedding` `nn.Embedding`. Weights are FP32, FP16, BF16 or INT8
(W ≈ scale · Q with Q in −127 … 127 and one scale for each output channel). On a CPU inputs and results are FP32, so
that the rounding of the weights is the only error; on a GPU they are of the type that the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from inference.kernels.fastest_way import ROW_BUCKETS, fastest_way
from inference.kernels.gpu_products import gpu_linear
from inference.kernels.linear_products import DTYPES, Product, kind_of, plain_linear, round_inputs, ways_to_multiply

Conversion = Callable[[torch.Tensor], torch.Tensor]  # what `nn.Module.to` does with each tensor


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 with one scale a row: (N, K) float → integers (N, K) int8 in −127 … 127 and scales (N,) fp32."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127  # (N,)
    return (weight / scale.unsqueeze(1)).round().clamp_(-127, 127).to(torch.int8), scale


class InferenceLinear(nn.Module):
    """A linear layer for inference, (…, K) → (…, N), with weights of any of `DTYPES`.

    Gradients pass through to its input (adapters can be trained beside it), but its own weights do not learn.

    Args:
        weight: (N, K) fp32, fp16, bf16 or int8; kept, not copied.
        scale: (N,) fp32 with int8 weights, one for each output channel; otherwise None.
        bias: (N,) fp32 or None.
        int8_inputs: whether inputs are rounded, too, to 8 bits a number with one scale a row: less exact, and the
            fastest way where many rows are computed at once. INT8 weights only.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        int8_inputs: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = _constant(weight)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", None if bias is None else _constant(bias))
        self.int8_inputs = int8_inputs
        self._forget_products()

    @classmethod
    def from_linear(cls, linear: nn.Linear, weights: str) -> InferenceLinear:
        """A linear layer's counterpart with weights of one of `DTYPES`; what needs no other type is shared."""
        weight, scale = linear.weight.detach(), None
        if DTYPES[weights] == torch.int8:
            weight, scale = quantize_rows(weight)
        # A parameter of its own, even of the same numbers: one that was shared would take the model along to a GPU
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(weight.to(DTYPES[weights]), scale, bias, weights == "int8_dynamic")

    @property
    def weights(self) -> str:
        """The name of its kind of weights, a key of `DTYPES`."""
        return "int8_dynamic" if self.int8_inputs else kind_of(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, K) → (…, N), in the type of x."""
        if not x.is_cpu or (x.requires_grad and torch.is_grad_enabled()):
            inputs = round_inputs(x) if self.int8_inputs else x
            product = gpu_linear if x.is_cuda else plain_linear
            return product(inputs, self.weight, self.scale, self.bias)
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
        ways = ways_to_multiply(self.weight, self.scale, self.bias, self.weights)
        name = next(iter(ways)) if len(ways) == 1 else fastest_way(ways, self.weights, self.weight.shape, bucket)
        if name not in self._prepared:
            self._prepared[name] = ways[name]()
        return self._prepared[name]

    def _forget_products(self) -> None:
        self._products: list[Product | None] = [None] * (len(ROW_BUCKETS) + 1)  # by bucket of rows
        self._prepared: dict[str, Product] = {}  # by name, as a packed copy serves several buckets

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._forget_products()  # other weights are coming
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Conversion, recurse: bool = True) -> nn.Module:
        self._forget_products()  # the weights go to another device or type
        return _apply_except_scale(self, super()._apply, fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_products": [None] * len(self._products), "_prepared": {}}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, weights={self.weights}"


class InferenceEmbedding(nn.Module):
    """An embedding table (V, D) of any of `DTYPES`, with an fp32 scale a row if INT8; only rows looked up are expanded.

    Args:
        weight, scale: the table; tied to the output layer, the very tensors of that layer.

    Attributes:
        output_dtype: of the rows that it gives; it follows the module's conversions (`model.to(torch.bfloat16)`).
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = _constant(weight)
        self.register_buffer("scale", scale)
        self.output_dtype = torch.float32

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) int64 → (B, T, D) of `output_dtype`."""
        rows = F.embedding(input_ids, self.weight)
        rows = rows if self.scale is None else rows * self.scale[input_ids].unsqueeze(-1)
        return rows.to(self.output_dtype)

    def _apply(self, fn: Conversion, recurse: bool = True) -> nn.Module:
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype)).dtype
        return _apply_except_scale(self, super()._apply, fn, recurse)


def _apply_except_scale(
    module: nn.Module, apply: Callable[..., nn.Module], fn: Conversion, recurse: bool
) -> nn.Module:
    """A module's `_apply` (`.to`, `.bfloat16()`, …) that leaves `scale` in fp32."""
    exact = module.scale
    apply(fn, recurse)
    if exact is not None and module.scale.dtype != exact.dtype:
        module.scale = exact.to(module.scale.device)
    return module


def _constant(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter that does not learn; `tensor` itself if it is one, so that what is tied stays tied."""
    tied = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    return tensor if tied else nn.Parameter(tensor.detach(), requires_grad=False)
