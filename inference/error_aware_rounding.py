"""Rounding to INT4 so that what a layer computes changes least: GPTQ (arXiv:2210.17323).

Rounded to the nearest, every weight is as near as it can be, and the sums that a layer makes of them are not. Over the
inputs X (n, K) of some text, a row w of weights changes its outputs by (ŵ − w)ᵀ H (ŵ − w) with H = Xᵀ X. So the weights
are rounded one after another, and the error of each is made up for by those that are not rounded yet:

    w_later ← w_later − (w_k − ŵ_k) / U_kk · U_k,later        with H⁻¹ = Uᵀ U, U upper triangular

Layers are taken in the order of computation, each with the inputs that the rounded layers before it give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn

from gpt_model import GPTModel
from inference.kernels.int4_weights import GROUP, expand_int4, nearest_int4, pack_int4, quantize_int4, scales_int4
from progress import tracked

DAMPING = 0.01  # of H's mean diagonal, added to it: so the paper does it, too
Rounded = tuple[torch.Tensor, torch.Tensor]  # packed weights (N, K/2) uint8, scales (N, K/32) fp16


def round_with_compensation(weight: torch.Tensor, products: torch.Tensor) -> Rounded:
    """Weights (N, K) as INT4, rounded for inputs X with the given Xᵀ X (K, K).

    A group's scale is chosen when its first weight is reached. Inputs that are always zero make no difference.
    """
    weight, products = weight.detach().double().clone(), products.double().clone()
    diagonal = products.diagonal()
    diagonal += DAMPING * diagonal.mean() + 1e-12
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(products)), upper=True)  # (K, K)
    numbers, scales = torch.empty_like(weight), []
    for start in range(0, weight.size(1), GROUP):
        group = slice(start, start + GROUP)
        scale = scales_int4(weight[:, group])  # (N, 1)
        errors = torch.empty(len(weight), GROUP, dtype=torch.float64)
        for k in range(start, start + GROUP):
            numbers[:, k] = nearest_int4(weight[:, k], scale[:, 0])
            errors[:, k - start] = (weight[:, k] - (numbers[:, k] - 8) * scale[:, 0]) / upper[k, k]
            weight[:, k : group.stop] -= errors[:, k - start, None] * upper[k, k : group.stop]
        weight[:, group.stop :] -= errors @ upper[group, group.stop :]
        scales.append(scale)
    return pack_int4(numbers), torch.cat(scales, dim=1)


@torch.no_grad()
def rounded_layers(model: GPTModel, texts: Sequence[list[int]], show_progress: bool = False) -> dict[str, Rounded]:
    """The INT4 weights and scales of all linear layers of a model but routers, by name.

    Args:
        model: in full precision and eval mode; it is as before afterwards.
        texts: token ids, each at most the model's context long; a few thousand tokens suffice.
        show_progress: say how far it is, see `progress.Progress`.
    """
    kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    rotary = [model.position_embedding.rotary(slice(0, len(ids))) for ids in texts]
    states = [model.embed(torch.tensor([ids]), slice(0, len(ids))) for ids in texts]  # (1, T, D) each
    made: dict[str, Rounded] = {}
    try:
        for index, layer in enumerate(tracked(list(model.layers), "rounding", "layer", show_progress)):
            names = {part: f"layers.{index}.{name}" for name, part in layer.named_modules() if _is_rounded(name, part)}
            with _products_of_inputs(names) as products:
                for state, waves in zip(states, rotary, strict=True):
                    layer(state, None, waves)
            for part, name in names.items():
                made[name] = _round_in_place(part, products[part])
            states = [layer(state, None, waves) for state, waves in zip(states, rotary, strict=True)]
        finals = [model.final_norm(state)[0] for state in states]  # (T, D) each
        products = sum((rows.double().T @ rows.double() for rows in finals), torch.zeros(()))
        made["lm_head"] = round_with_compensation(model.lm_head.weight, products)
    finally:
        model.load_state_dict(kept)
    return made


def _is_rounded(name: str, part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) and not name.endswith("router")


def _round_in_place(part: nn.Linear, products: torch.Tensor | None) -> Rounded:
    """Round a layer's weights, too, so that what comes after sees them; without inputs (an expert that no token met),
    to the nearest."""
    made = quantize_int4(part.weight) if products is None else round_with_compensation(part.weight, products)
    part.weight.copy_(expand_int4(*made))
    return made


@contextmanager
def _products_of_inputs(layers: Sequence[nn.Linear]) -> Iterator[dict[nn.Linear, torch.Tensor | None]]:
    """Collects Xᵀ X (K, K) of what goes into each layer meanwhile."""
    products: dict[nn.Linear, torch.Tensor | None] = dict.fromkeys(layers)

    def collect(layer: nn.Linear, inputs: tuple[torch.Tensor]) -> None:
        rows = inputs[0].reshape(-1, layer.in_features).double()  # (n, K)
        if len(rows):
            products[layer] = rows.T @ rows + (0 if products[layer] is None else products[layer])

    hooks = [layer.register_forward_pre_hook(collect) for layer in layers]
    try:
        yield products
    finally:
        for hook in hooks:
            hook.remove()
