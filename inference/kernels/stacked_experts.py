"""A mixture of experts for inference on a GPU: the weights, of any kind, lie in one tensor; nobody waits for counts.

How they are multiplied is told in expert_products.py; training does the same with experts that lie apart.
`stack_experts` exchanges the experts of a model; those of other classes, with adapters or hooks, stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from inference.kernels.expert_products import ExpertRows, arrange, has_grouped_product
from inference.kernels.int4_weights import expand_int4
from inference.kernels.linear_layers import InferenceLinear
from transformer_components import FeedForwardNetwork, MixtureOfExperts


class StackedLinear(nn.Module):
    """The linear layers of E experts at one place, with weights (E, N, K) of any of `DTYPES` but int8_dynamic.

    Args:
        layers: of the experts, with weights of one kind.
    """

    def __init__(self, layers: Sequence[InferenceLinear]) -> None:
        super().__init__()

        def stacked(name: str) -> torch.Tensor | None:
            parts = [getattr(layer, name) for layer in layers]
            return None if parts[0] is None else torch.stack([part.detach() for part in parts])

        self.weight = nn.Parameter(stacked("weight"), requires_grad=False)
        self.register_buffer("scale", stacked("scale"))
        self.register_buffer("minimum", stacked("minimum"))
        self.register_buffer("bias", stacked("bias"))

    def forward(self, x: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        """x (M, b, K) or (S, K), as its `rows` lie → (M, b, N) or (S, N)."""
        expert, bias = rows.expert, None if self.bias is None else self.bias[rows.expert].to(x.dtype)
        if rows.ends is not None:
            y = F.grouped_mm(x, self.weight.mT, offs=rows.ends)  # (S, N)
            return y if bias is None else y + bias
        weight, scale = self.weight[expert], None if self.scale is None else self.scale[expert]
        if weight.dtype == torch.uint8:
            weight = expand_int4(weight, scale, None if self.minimum is None else self.minimum[expert])
        elif scale is not None:
            weight = weight * scale.unsqueeze(-1)
        y = torch.bmm(x, weight.to(x.dtype).mT)  # (M, b, N)
        return y if bias is None else y + bias.unsqueeze(1)


class StackedExperts(nn.Module):
    """What a `MixtureOfExperts` of `FeedForwardNetwork`s computes in evaluation mode, without waiting for a number."""

    def __init__(self, mixture: MixtureOfExperts) -> None:
        super().__init__()
        self.n_experts, self.experts_per_token = len(mixture.experts), mixture.experts_per_token
        self.router = mixture.router
        experts = list(mixture.experts)
        self.up_proj = StackedLinear([expert.up_proj for expert in experts])
        is_gated = experts[0].gate_proj is not None
        self.gate_proj = StackedLinear([expert.gate_proj for expert in experts]) if is_gated else None
        self.down_proj = StackedLinear([expert.down_proj for expert in experts])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) → (B, T, D). Below, N = B · T tokens, E experts, C = `experts_per_token`."""
        tokens = x.flatten(0, -2)  # (N, D)
        probabilities = self.router(tokens).float().softmax(dim=-1)  # (N, E)
        weights, chosen = probabilities.topk(self.experts_per_token, dim=-1)  # (N, C)
        weights = weights / weights.sum(dim=-1, keepdim=True)  # (N, C)
        rows = arrange(chosen.flatten(), self.n_experts, self._has_grouped_product(tokens))
        outputs = rows.lift(self._network(rows.lay(tokens.repeat_interleave(self.experts_per_token, dim=0)), rows))
        outputs = outputs.view(*chosen.shape, -1)  # (N, C, D)
        return (outputs * weights.to(outputs.dtype).unsqueeze(-1)).sum(dim=1).view_as(x)

    def _has_grouped_product(self, tokens: torch.Tensor) -> bool:
        weight = self.up_proj.weight
        return weight.dtype == tokens.dtype and has_grouped_product(tokens.device, tokens.dtype, *weight.shape)

    def _network(self, x: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        """`FeedForwardNetwork.forward` of the experts, of which each computes rows of its own."""
        inner, is_plain = self.up_proj(x, rows), self.gate_proj is None
        inner = F.gelu(inner, approximate="tanh") if is_plain else F.silu(self.gate_proj(x, rows)) * inner
        return self.down_proj(inner, rows)


def stack_experts(model: nn.Module) -> None:
    """Put the experts of a model that is for inference into one place in each layer, where they are of known parts."""
    for layer in model.layers:
        if _is_known(layer.feed_forward):
            layer.feed_forward = StackedExperts(layer.feed_forward)


def _is_known(mixture: nn.Module) -> bool:
    """Whether `StackedExperts` computes the same."""
    if type(mixture) is not MixtureOfExperts or any(type(each) is not FeedForwardNetwork for each in mixture.experts):
        return False
    if any(part._forward_hooks or part._forward_pre_hooks for part in mixture.modules()):
        return False
    layers = [part for each in mixture.experts for part in (each.up_proj, each.gate_proj, each.down_proj) if part]
    if any(type(layer) is not InferenceLinear or layer.int8_inputs for layer in layers):
        return False
    return len({(layer.weight.dtype, layer.minimum is None) for layer in layers}) == 1
