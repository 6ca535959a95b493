"""Adapters (LoRA) that Hugging Face's `peft` has saved become a checkpoint of adapters; the way out is
alignment/lora_export.py.

Ours have one rank and one scaling for all layers, theirs may have some for each: smaller ones are filled up with zeros,
other scalings go into B. What GPT-2's one layer c_attn has is cut into those of query, key and value.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from alignment.transformers_names import parts_of
from checkpoint import config_of, load_checkpoint, save_checkpoint, tokenizer_of, weight_fingerprint
from command_line import UserError
from exchange.hugging_face import read_json
from gpt_model import GPTConfig, GPTModel
from lora import TARGETS, LoRAOptions, attach_lora, lora_layers
from transformer_components import shapes_only

Adapter = tuple[torch.Tensor, torch.Tensor, float]  # A (R, K), B (N, R), scaling
# What an adapter may have besides, with the values that add nothing to it
MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "modules_to_save": (None, []),
    "lora_bias": (False,),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
}


def import_adapters(folder: Path, base: str | Path, output: Path) -> Path:
    """Write a checkpoint of adapters for the model `base`, a checkpoint of ours.

    Raises:
        UserError: something is missing, unknown, or belongs to another model.
    """
    content = load_checkpoint(base)
    if content.get("quantization") or "lora" in content:
        raise UserError(f"--base_model {base} is quantized or made of adapters; give the model in full precision")
    config = config_of(content, base)
    state, options = read_adapters(folder, config)
    lora = {**asdict(options), "base": str(base), "base_fingerprint": weight_fingerprint(content)}
    return save_checkpoint(
        output,
        model_state=state,
        config=config,
        tokenizer=tokenizer_of(content),
        stage="sft",
        lora=lora,
        imported={"from": folder.name, "architecture": "LoRA"},
    )


def read_adapters(folder: Path, config: GPTConfig) -> tuple[dict[str, torch.Tensor], LoRAOptions]:
    """The adapters by our names, and the options with which they are attached.

    Raises:
        UserError: see `import_adapters`.
    """
    settings = read_json(folder / "adapter_config.json", "peft writes it beside the adapters")
    given = {name: settings.get(name, usual[0]) for name, usual in MUST_BE.items()}
    other = [f"{name} {value!r}" for name, value in given.items() if value not in MUST_BE[name]]
    if other:
        raise UserError(f"{folder} has adapters with {', '.join(other)}, which is not known; merge them with peft")
    if not isinstance(settings.get("lora_alpha"), int | float):
        raise UserError(f"adapter_config.json in {folder} lacks lora_alpha; fetch it again")
    found = _adapters_of(folder, settings, config)
    rank = max(a.size(0) for a, _, _ in found.values())
    scaling = Counter(scale for _, _, scale in found.values()).most_common(1)[0][0]
    options = LoRAOptions(
        lora_rank=rank,
        lora_alpha=scaling * rank,
        lora_dropout=float(settings.get("lora_dropout") or 0.0),
        lora_targets=",".join(sorted({_target(name) for name in found})),
    )
    with shapes_only():
        model = GPTModel.from_config(config)
        attach_lora(model, options)
    state = {}
    for name, layer in lora_layers(model).items():
        filled_a, filled_b = torch.zeros(layer.lora_A.shape), torch.zeros(layer.lora_B.shape)
        if name in found:
            a, b, own = found[name]
            if (a.size(1), b.size(0)) != (layer.in_features, layer.out_features):
                raise UserError(f"{folder} holds adapters for another model: {name} has other sizes there")
            filled_a[: len(a)], filled_b[:, : len(a)] = a, b if own == scaling else b * (own / scaling)
        state |= {f"{name}.lora_A": filled_a, f"{name}.lora_B": filled_b}
    return state, options


def _adapters_of(folder: Path, settings: dict[str, Any], config: GPTConfig) -> dict[str, Adapter]:
    tensors = _tensors(folder)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))", name)
        if match is None:
            raise UserError(f"{folder} holds {name}, which is no adapter of a linear layer; merge it with peft")
        if match[3]:  # of an embedding: the product of the two is the transpose of ours
            layers.setdefault(match[1], {})["BA"["AB".index(match[3])]] = tensor.float().mT
        else:
            layers.setdefault(match[1], {})[match[2]] = tensor.float()
    ours_of, found = parts_of(config), {}
    sizes = {"query_proj": config.n_heads, "key_proj": config.n_kv_heads, "value_proj": config.n_kv_heads}
    for theirs, matrices in layers.items():
        if theirs not in ours_of or not ours_of[theirs][0].startswith(("layers.", *TARGETS["embedding"])):
            raise UserError(f"{folder} holds adapters for {theirs}, which the model does not have or cannot adapt")
        if matrices.keys() != {"A", "B"}:
            raise UserError(f"{folder} holds half an adapter for {theirs}; fetch it again")
        a, b = matrices["A"], matrices["B"]
        alpha = _by_pattern(settings.get("alpha_pattern"), theirs, settings["lora_alpha"])
        scaling = alpha / (math.sqrt(len(a)) if settings.get("use_rslora") else len(a))
        ours = ours_of[theirs]
        if len(ours) == 1:
            found[ours[0]] = a, b, scaling
            continue
        rows = b.split([sizes[name.rpartition(".")[2]] * config.head_dim for name in ours])
        for place, (name, part) in enumerate(zip(ours, rows, strict=True)):
            own = _own_columns(rows, place, len(a))
            found[name] = a[own], part[:, own], scaling
    embedding, head = (found.get(name) for name in TARGETS["embedding"])
    if config.tie_embeddings and not _are_same(embedding, head):
        raise UserError(
            f"{folder} holds other adapters for the token embedding than for the output head, which are one matrix in "
            "this model; merge them with peft"
        )
    return found


def _are_same(one: Adapter | None, other: Adapter | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2] == other[2]


def _target(name: str) -> str:
    """What `--lora_targets` calls a layer."""
    kind = name.rpartition(".")[2]
    return "embedding" if kind in TARGETS["embedding"] else kind


def _own_columns(rows: tuple[torch.Tensor, ...], place: int, rank: int) -> slice:
    """Which columns of B reach one of the layers that are one there: a third, if it was put together of three."""
    third = rank // len(rows)
    blocks = [slice(index * third, (index + 1) * third) for index in range(len(rows))]
    is_diagonal = third * len(rows) == rank and all(
        not part[:, block].any() for row, part in enumerate(rows) for index, block in enumerate(blocks) if index != row
    )
    return blocks[place] if is_diagonal else slice(0, rank)


def _by_pattern(patterns: dict[str, float] | None, name: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({re.escape(pattern)})", name):
            return value
    return default


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} has no adapter_model.safetensors; save the adapters with a recent peft")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut off ({error}); fetch it again") from None
    if not tensors:
        raise UserError(f"{path} holds no adapters; fetch it again")
    return tensors
