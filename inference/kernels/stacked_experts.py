"""A mixture of experts on a GPU: what is computed depends on numbers that only the GPU knows, and nobody waits.

`MixtureOfExperts` asks how many tokens chose each expert, and so waits in every layer. Here the experts' weights lie in
one tensor, and all shapes follow from the number of tokens:

    few choices   (no more than experts) each takes its expert's weights, and all are multiplied in one batch: only
                  the weights of chosen experts are read
    many, bf16    PyTorch's grouped product of sorted rows, which reads the groups' ends on the GPU; its kernel is for
                  NVIDIA's compute capabilities 9 and 10, elsewhere it would wait for them
    many          sorted rows in blocks of one expert each, of which there can be at most a known number; what blocks
                  are filled up with is computed and thrown away

`stack_experts` exchanges the experts of a model for inference; those of other classes, with adapters or hooks, stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from inference.kernels.int4_weights import expand_int4
from inference.kernels.linear_layers import InferenceLinear
from transformer_components import FeedForwardNetwork, MixtureOfExperts

GROUPED_CAPABILITIES = (9, 10)  # major ones for which PyTorch 2.13 has its grouped product


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

    def blocks(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        """x (M, b, K), of whose blocks each goes through one `expert` (M,) → (M, b, N)."""
        weight, scale = self.weight[expert], None if self.scale is None else self.scale[expert]
        if weight.dtype == torch.uint8:
            weight = expand_int4(weight, scale, None if self.minimum is None else self.minimum[expert])
        elif scale is not None:
            weight = weight * scale.unsqueeze(-1)
        y = torch.bmm(x, weight.to(x.dtype).mT)  # (M, b, N)
        return y if self.bias is None else y + self.bias[expert].unsqueeze(1).to(y.dtype)

    def groups(self, x: torch.Tensor, expert: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """x (S, K), sorted by their `expert` (S,), whose groups have their `ends` (E,) int32 → (S, N)."""
        y = F.grouped_mm(x, self.weight.mT, offs=ends)
        return y if self.bias is None else y + self.bias[expert].to(y.dtype)


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
        """(B, T, D) → (B, T, D). Below, N = B · T tokens, E experts, C = `experts_per_token`, S = N · C choices."""
        tokens = x.flatten(0, -2)  # (N, D)
        probabilities = self.router(tokens).float().softmax(dim=-1)  # (N, E)
        weights, chosen = probabilities.topk(self.experts_per_token, dim=-1)  # (N, C)
        weights = weights / weights.sum(dim=-1, keepdim=True)  # (N, C)
        if chosen.numel() <= self.n_experts:
            rows = tokens.repeat_interleave(self.experts_per_token, dim=0).unsqueeze(1)  # (S, 1, D)
            outputs = self._network("blocks", rows, chosen.flatten())  # (S, 1, D)
        else:
            order = chosen.flatten().argsort(stable=True)  # (S,): the choices, by expert
            rows, expert = tokens[order // self.experts_per_token], chosen.flatten()[order]  # (S, D), (S,)
            outputs = self._sorted(rows, expert)[order.argsort()]  # (S, D)
        outputs = outputs.view(*chosen.shape, -1)  # (N, C, D)
        return (outputs * weights.to(outputs.dtype).unsqueeze(-1)).sum(dim=1).view_as(x)

    def _sorted(self, rows: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        """The outputs of rows (S, D), sorted by their `expert` (S,)."""
        n_rows, every = len(rows), torch.arange(self.n_experts, device=rows.device)  # (E,)
        n_chosen = (expert.unsqueeze(1) == every).sum(dim=0)  # (E,)
        ends = n_chosen.cumsum(dim=0)
        if has_grouped_product(rows, self.up_proj.weight, self.down_proj.weight):
            return self._network("groups", rows, expert, ends.int())
        size = 1 << (-(-n_rows // self.n_experts) - 1).bit_length()  # of a block: what an expert gets, if all get alike
        n_blocks = (n_chosen + size - 1) // size  # (E,), of each expert; ⌊S / size⌋ + E in all at most
        block_ends = n_blocks.cumsum(dim=0)
        within = torch.arange(n_rows, device=rows.device) - (ends - n_chosen)[expert]  # (S,), within its group
        place = (block_ends - n_blocks)[expert] * size + within  # (S,), and among all blocks
        most = n_rows // size + self.n_experts
        of_block = torch.searchsorted(block_ends, torch.arange(most, device=rows.device), right=True)  # (M,)
        filled = rows.new_zeros(most * size, rows.size(1)).index_copy_(0, place, rows).view(most, size, -1)
        return self._network("blocks", filled, of_block.clamp(max=self.n_experts - 1)).flatten(0, 1)[place]

    def _network(self, way: str, x: torch.Tensor, *of_experts: torch.Tensor) -> torch.Tensor:
        """`FeedForwardNetwork.forward` of the experts, each product in one of the ways of `StackedLinear`."""
        inner = getattr(self.up_proj, way)(x, *of_experts)
        if self.gate_proj is None:
            inner = F.gelu(inner, approximate="tanh")
        else:
            inner = F.silu(getattr(self.gate_proj, way)(x, *of_experts)) * inner
        return getattr(self.down_proj, way)(inner, *of_experts)


def has_grouped_product(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether PyTorch's grouped product of rows x with weights (E, N, K) reads the groups' ends on the GPU."""
    if not x.is_cuda or torch.version.hip or torch.cuda.get_device_capability(x.device)[0] not in GROUPED_CAPABILITIES:
        return False
    # It reads 16 bytes at a time
    return all(each.dtype == x.dtype == torch.bfloat16 and not any(n % 8 for n in each.shape[1:]) for each in weights)


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
