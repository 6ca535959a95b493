"""INT8 weights: a whole number of −127 … 127 each, and a scale for each row (output channel), W ≈ scale · Q.

`linear_layers.InferenceLinear` has them for inference; `Int8Linear` here is the frozen layer beside which adapters are
trained (the idea of QLoRA, arXiv:2305.14314, with 8 bits a weight).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from inference.kernels.expert_products import ExpertRows, Layer, biases_of, multiply


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 with one scale a row: (N, K) float → integers (N, K) int8 in −127 … 127 and scales (N,) fp32."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127  # (N,)
    return (weight / scale.unsqueeze(1)).round().clamp_(-127, 127).to(torch.int8), scale


def expand_rows(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weights (N, K) that integers and scales, see `quantize_rows`, stand for."""
    return (weight * scale.unsqueeze(1)).to(dtype)


class _Int8Product(torch.autograd.Function):
    """x Wᵀ + bias, of which the backward pass keeps the integers and expands them once more: there are never more than
    one layer's expanded weights."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x (…, K), weight (N, K) int8, scale (N,), bias (N,) → (…, N) in the type of x."""
        ctx.save_for_backward(weight, scale)
        return F.linear(x, expand_rows(weight, scale, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """That of x; the weights do not learn."""
        weight, scale = ctx.saved_tensors
        return gradient @ expand_rows(weight, scale, gradient.dtype), None, None, None


class Int8Linear(nn.Module):
    """A frozen linear layer (…, K) → (…, N) with INT8 weights; gradients pass through to its input.

    Args:
        linear: the layer whose weights are rounded.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Parameters that do not learn, and no buffers: what is frozen is left out of checkpoints
        weight, scale = quantize_rows(linear.weight)
        self.weight, self.scale = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, scale))
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, K) → (…, N), in autocast's type or that of x."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Int8Product.apply(x, self.weight, self.scale, self.bias)

    def signature(self) -> tuple:
        """See `expert_products.signature`."""
        return Int8Linear, self.weight.shape, self.bias is None

    @staticmethod
    def at_once(layers: Sequence[Int8Linear], rows: ExpertRows) -> Layer:
        """See `expert_products.at_once`; here, too, integers are what the backward pass keeps."""
        weights, scales = [layer.weight for layer in layers], [layer.scale for layer in layers]
        return partial(multiply, rows=rows, weights=weights, biases=biases_of(layers), scales=scales)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, weights=int8"


def layers_to_round(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers, by name, that frozen INT8 weights are for: all in full precision but an output head, which may
    share its weight with the embedding, and routers, which are small and whose choices tip."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if hasattr(layer, "in_features")
        and torch.is_tensor(weight := getattr(layer, "weight", None))
        and weight.is_floating_point()
        and not name.endswith(("head", "router"))
    }


def hold_in_int8(model: nn.Module) -> None:
    """Put an `Int8Linear` in the place of each of a frozen model's `layers_to_round`."""
    for name, layer in layers_to_round(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Int8Linear(layer))


@torch.no_grad()
def round_to_int8(model: nn.Module) -> None:
    """Round the same layers' weights to what `hold_in_int8` makes of them, and leave them in the type that they have:
    the model that adapters were trained beside."""
    for layer in layers_to_round(model).values():
        rounded = expand_rows(*quantize_rows(layer.weight), layer.weight.dtype)
        layer.weight = nn.Parameter(rounded, requires_grad=layer.weight.requires_grad)
