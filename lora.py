"""LoRA: the model stays frozen, and beside its linear layers small matrices learn (arXiv:2106.09685).

    y = W x + s · B A x        W (N, K) frozen, A (R, K) random, B (N, R) zero at the start, so that nothing changes yet

A trainer learns it in two lines (the stages have the second in `open_stage`): its settings inherit `LoRAOptions`, and
right after `load_model`

    apply_lora(model, config, base=config.sft_model)        # with --lora_rank 0 it does nothing

The model is then trained, copied or put into a larger module (a reward model, an actor-critic) like any other. What the
larger module brings along, such as a reward head, trains beside the adapters. `TrainingLoop` saves what trains and
nothing else, and records the base; `checkpoint.restore_model` puts the two together again.

    with adapters_disabled(model): …        # the model that training started from: no second copy as a reference

A checkpoint of adapters can be given wherever a model is wanted. For use elsewhere, `python -m alignment.lora_export`
turns it into a plain checkpoint or into `peft`'s format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from command_line import UserError, option
from inference.kernels.expert_products import ExpertRows, Layer, at_once, multiply, signature
from inference.kernels.int8_weights import hold_in_int8

FROZEN_WEIGHTS = ("fp32", "int8")
TARGETS = {
    "attention": ("attention",),
    "mlp": ("feed_forward",),
    "all": ("attention", "feed_forward"),
    "embedding": ("token_embedding", "lm_head"),  # the output head as well, which mostly is the same matrix
}


@dataclass
class LoRAOptions:
    """The settings of LoRA, for the settings of a stage to inherit: `class SFTConfig(LoRAOptions, StageConfig)`."""

    lora_rank: int = option(0, "rank of the adapters (LoRA); 0 trains the whole model", at_least=0)
    lora_alpha: float = option(16.0, "what adapters add is multiplied by this, divided by the rank", above=0)
    lora_dropout: float = option(0.0, "share of an adapter's inputs dropped in training", at_least=0, below=1)
    lora_targets: str = option(
        "all", "layers with adapters: attention, mlp, all, embedding (with the output head), or names such as up_proj"
    )
    lora_rslora: bool = option(False, "divide --lora_alpha by √rank instead of the rank (rsLoRA)")
    lora_lr_scale: float = option(10.0, "the learning rate of adapters, as a multiple of --lr", above=0)
    frozen_weights: str = option(
        "fp32", "what the frozen linear layers are held in; int8 takes a quarter of the memory", choices=FROZEN_WEIGHTS
    )

    def validate(self) -> list[str]:
        """What does not fit together, a sentence each."""
        complaints = getattr(super(), "validate", list)()
        parallel = getattr(self, "parallel", "ddp")
        if self.frozen_weights != "fp32" and not self.lora_rank:
            complaints.append(f"--frozen_weights {self.frozen_weights} is for LoRA; give --lora_rank, such as 16")
        if self.lora_rank and parallel.partition(":")[0] != "ddp":
            complaints.append(f"--lora_rank works with --parallel ddp, not {parallel}; there is little left to cut up")
        return complaints


class LoRALinear(nn.Module):
    """A linear layer (…, K) → (…, N) with an adapter of rank R beside it.

    Args:
        base: the layer, in full precision or quantized. It stays as it is.
        options: rank, alpha, dropout and scaling.
        base_path: the checkpoint that the base layer comes from, for the record.
    """

    def __init__(self, base: nn.Module, options: LoRAOptions, base_path: str = "") -> None:
        super().__init__()
        self.base, self.options, self.base_path = base, options, base_path
        self.in_features, self.out_features = sizes_of(base)
        device = next((tensor.device for tensor in (*base.parameters(), *base.buffers())), None)
        self.lora_A = nn.Parameter(torch.empty(options.lora_rank, self.in_features, device=device))  # (R, K)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, options.lora_rank, device=device))  # (N, R)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # uniform in ± 1/√K, as a linear layer's own weights
        self.dropout = nn.Dropout(options.lora_dropout)
        # s = α / R, section 4.1 of LoRA; α / √R keeps the size of what is learned the same for all R (arXiv:2312.03732)
        self.scaling = options.lora_alpha / (math.sqrt(options.lora_rank) if options.lora_rslora else options.lora_rank)
        self.enabled = True
        self.unmerged_weight: torch.Tensor | None = None  # of the base, while the adapter is merged into it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, K) → (…, N), in the type that the base gives."""
        output = self.base(x)  # (…, N)
        if not self.enabled or self.unmerged_weight is not None:
            return output
        inner = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A) * self.scaling  # (…, R)
        return output + F.linear(inner, self.lora_B).to(output.dtype)

    def signature(self) -> tuple | None:
        """See `expert_products.signature`. Adapters of another type than their base compute in types of their own."""
        base, dtype = signature(self.base), getattr(self.base, "weight", self.lora_A).dtype
        if base is None or (dtype.is_floating_point and dtype != self.lora_A.dtype):
            return None
        computes = self.enabled and self.unmerged_weight is None
        return LoRALinear, len(self.lora_A), self.scaling, self.dropout.p, computes, base

    @staticmethod
    def at_once(layers: Sequence[LoRALinear], rows: ExpertRows) -> Layer:
        """See `expert_products.at_once`."""
        first, base = layers[0], at_once([layer.base for layer in layers], rows)
        if not first.enabled or first.unmerged_weight is not None:
            return base
        parts = [[getattr(layer, name) for layer in layers] for name in ("lora_A", "lora_B")]

        def with_adapters(x: torch.Tensor) -> torch.Tensor:
            inner = multiply(first.dropout(x), rows, parts[0]) * first.scaling  # (M, b, R) or (S, R)
            return base(x) + multiply(inner, rows, parts[1])

        return with_adapters

    @torch.no_grad()
    def merge(self) -> None:
        """Add s · B A to the base's weight; `unmerge` restores it bit for bit.

        Raises:
            UserError: the base is quantized, so its weight cannot take an addition.
        """
        weight = getattr(self.base, "weight", None)
        if not (torch.is_tensor(weight) and weight.is_floating_point() and weight.shape[-1] == self.in_features):
            raise UserError("adapters cannot be merged into a quantized model; merge into the original, then quantize")
        if self.unmerged_weight is None:
            self.unmerged_weight = weight.detach().clone()
            weight += (self.scaling * self.lora_B @ self.lora_A).to(weight.dtype)  # (N, K)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`."""
        if self.unmerged_weight is not None:
            self.base.weight.copy_(self.unmerged_weight)
            self.unmerged_weight = None

    def extra_repr(self) -> str:
        return f"rank={self.options.lora_rank}, scaling={self.scaling:g}"


class LoRAEmbedding(LoRALinear):
    """A token embedding, ids (…) → (…, D), with an adapter: the row of token t is E_t + s · B_t A.

    A (R, D) and B (V, R) are those of a linear layer with the same matrix (V, D), the output head: tied to it, it
    shares them.
    """

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(…) int64 → (…, D), in the type that the base gives."""
        output = self.base(input_ids)  # (…, D)
        if not self.enabled or self.unmerged_weight is not None:
            return output
        inner = F.embedding(input_ids, self.lora_B) * self.scaling  # (…, R)
        return output + (inner @ self.lora_A).to(output.dtype)


def sizes_of(base: nn.Module) -> tuple[int, int]:
    """(K, N) of a linear layer or, as (D, V), of an embedding, in full precision or quantized."""
    if hasattr(base, "in_features"):
        return base.in_features, base.out_features
    rows, columns = base.weight.shape
    return columns * (2 if base.weight.dtype == torch.uint8 else 1), rows  # a byte of int4 holds two weights


def target_layers(model: nn.Module, targets: str) -> dict[str, nn.Module]:
    """The layers of a model, by name, that `--lora_targets` means: linear ones, the token embedding, the output head.

    Other heads, such as a reward model's, are not among them: they train as they are.

    Raises:
        UserError: a name that no linear layer has.
    """
    modules = dict(model.named_modules())
    linear = {name: module for name, module in modules.items() if hasattr(module, "in_features")}
    linear = {name: module for name, module in linear.items() if not name.endswith("head")}
    vocabulary = {
        name: module
        for name, module in modules.items()
        if name.rpartition(".")[2] in TARGETS["embedding"] and hasattr(module, "weight")
    }
    layers = linear | vocabulary
    chosen: dict[str, nn.Module] = {}
    for target in (part.strip() for part in targets.split(",")):
        if target in TARGETS:
            found = [name for name in layers if set(TARGETS[target]) & set(name.split("."))]
        else:
            found = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not found:
            names = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f"--lora_targets {target or '(empty)'} is no linear layer of the model; give {', '.join(TARGETS)}, or "
                f"some of {', '.join(names)}"
            )
        chosen |= {name: layers[name] for name in found}
    return chosen


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers of a model that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def attach_lora(model: nn.Module, options: LoRAOptions, base: str = "") -> None:
    """Put an adapter, zero at first, beside each layer that `options.lora_targets` means; nothing is frozen.

    Raises:
        UserError: a target that the model does not have.
        ValueError: the model has adapters already.
    """
    if lora_layers(model):
        raise ValueError("the model has adapters already; merge_lora and detach_lora them first")
    # A copy of these fields alone: a layer should not drag a trainer's other settings along
    options = LoRAOptions(**{field.name: getattr(options, field.name) for field in fields(LoRAOptions)})
    for name, layer in target_layers(model, options.lora_targets).items():
        parent, _, child = name.rpartition(".")
        kind = LoRALinear if hasattr(layer, "in_features") else LoRAEmbedding
        setattr(model.get_submodule(parent), child, kind(layer, options, base))
    for part in model.modules():  # a tied head is the embedding's matrix, so it has the embedding's adapter
        embedding, head = getattr(part, "token_embedding", None), getattr(part, "lm_head", None)
        if isinstance(embedding, LoRAEmbedding) and isinstance(head, LoRALinear) and part.config.tie_embeddings:
            head.lora_A, head.lora_B = embedding.lora_A, embedding.lora_B


def apply_lora(model: nn.Module, options: LoRAOptions, base: str) -> None:
    """Make a model ready for LoRA: everything that it has is frozen, its linear layers are rounded to INT8 if
    `options.frozen_weights` says so, and adapters are attached that will train.

    Args:
        options: the settings of the stage; with `lora_rank` 0 nothing happens.
        base: the path of the checkpoint that the model was loaded from; recorded with the adapters.

    Raises:
        UserError: a target that the model does not have.
        ValueError: the model has adapters already.
    """
    if options.lora_rank:
        model.requires_grad_(False)
        if options.frozen_weights == "int8":
            hold_in_int8(model)
        attach_lora(model, options, base)


def detach_lora(model: nn.Module) -> None:
    """Take the adapters away: the layers beneath them are back in their places, merged or as they were."""
    for name, layer in lora_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes what it did before LoRA.

    Raises:
        ValueError: the adapters are merged; `unmerge_lora` first.
    """
    layers = list(lora_layers(model).values())
    if any(layer.unmerged_weight is not None for layer in layers):
        raise ValueError("merged adapters cannot be disabled; unmerge_lora first")
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def merge_lora(model: nn.Module) -> None:
    """Add every adapter to the weight beneath it: the same function, without the adapters' cost.

    Raises:
        UserError: the model is quantized.
    """
    first_with: dict[int, LoRALinear] = {}
    for layer in lora_layers(model).values():
        first = first_with.setdefault(id(getattr(layer.base, "weight", layer)), layer)
        first.merge()
        layer.unmerged_weight = first.unmerged_weight  # tied layers have one weight, to which an adapter is added once


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`, bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def trained_state(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a model's state dict, what is not frozen: with LoRA the adapters and what trains beside them."""
    parameters = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in parameters if not parameter.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def lora_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters alone, by the names they have in the model's state dict."""
    return {
        f"{name}.{part}": getattr(layer, part).detach()
        for name, layer in lora_layers(model).items()
        for part in ("lora_A", "lora_B")
    }


def lora_settings(model: nn.Module) -> dict[str, Any] | None:
    """What a checkpoint has to know to attach the adapters again: the options and the path of the base, or None."""
    layer = next(iter(lora_layers(model).values()), None)
    return layer and {**asdict(layer.options), "base": layer.base_path}
