"""Our models in Hugging Face `transformers`: by which names their weights and sizes go there.

One table, `FAMILIES`, for everything that leaves this project or is compared with others: adapters for `peft`, the same
weights in another program, the tests of parity. A further family of models is one more entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from command_line import UserError
from gpt_model import ARCHITECTURES, GPTConfig, GPTModel


@dataclass(frozen=True)
class Family:
    """An architecture as `transformers` has it; parts go by our name: theirs."""

    name: str  # <name>Config, and the model's class <name>…
    model: str
    sizes: dict[str, str]  # fields of the configuration
    outside: dict[str, str]  # parts of the model that are not in a layer
    layers: str  # where layer 0 is, but for its number
    inside: dict[str, str]  # parts of a layer
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)  # their part: ours, which stand in it in this order
    is_transposed: bool = False  # whether the matrices of their layers are (in, out)
    settings: Callable[[GPTConfig], dict[str, Any]] = lambda config: {}  # of their configuration, beside the sizes


FAMILIES = {  # by the names in `ARCHITECTURES`
    "gpt2": Family(
        "GPT2",
        "GPT2LMHeadModel",
        sizes={
            "vocab_size": "vocab_size",
            "max_seq_len": "n_positions",
            "d_model": "n_embd",
            "n_layers": "n_layer",
            "n_heads": "n_head",
            "d_ff": "n_inner",
            "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
        },
        outside={
            "token_embedding": "transformer.wte",
            "position_embedding": "transformer.wpe",
            "final_norm": "transformer.ln_f",
            "lm_head": "lm_head",
        },
        layers="transformer.h",
        inside={
            "attention_norm": "ln_1",
            "attention.output_proj": "attn.c_proj",
            "feed_forward_norm": "ln_2",
            "feed_forward.up_proj": "mlp.c_fc",
            "feed_forward.down_proj": "mlp.c_proj",
        },
        fused={"attn.c_attn": ("attention.query_proj", "attention.key_proj", "attention.value_proj")},
        is_transposed=True,
    ),
    "modern": Family(
        "Qwen3",
        "Qwen3ForCausalLM",
        sizes={
            "vocab_size": "vocab_size",
            "max_seq_len": "max_position_embeddings",
            "d_model": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "n_kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
            "d_ff": "intermediate_size",
            "norm_eps": "rms_norm_eps",
            "tie_embeddings": "tie_word_embeddings",
        },
        outside={"token_embedding": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"},
        layers="model.layers",
        inside={
            "attention_norm": "input_layernorm",
            "attention.query_proj": "self_attn.q_proj",
            "attention.key_proj": "self_attn.k_proj",
            "attention.value_proj": "self_attn.v_proj",
            "attention.output_proj": "self_attn.o_proj",
            "attention.query_norm": "self_attn.q_norm",
            "attention.key_norm": "self_attn.k_norm",
            "feed_forward_norm": "post_attention_layernorm",
            "feed_forward.gate_proj": "mlp.gate_proj",
            "feed_forward.up_proj": "mlp.up_proj",
            "feed_forward.down_proj": "mlp.down_proj",
        },
        settings=lambda config: {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}},
    ),
}


def family_of(config: GPTConfig) -> Family:
    """The family that a configuration belongs to.

    Raises:
        UserError: `transformers` has no such architecture.
    """
    for architecture, switches in ARCHITECTURES.items():
        if all(getattr(config, name) == value for name, value in switches.items() if name != "norm_eps"):
            return FAMILIES[architecture]
    raise UserError(f"transformers has no such model; it has those of the architectures {' and '.join(FAMILIES)}")


def parts_of(config: GPTConfig) -> dict[str, tuple[str, ...]]:
    """All parts of a model with weights by their names in `transformers`: ours, several where theirs is a fused one."""
    family = family_of(config)
    of_layer = {theirs: (ours,) for ours, theirs in family.inside.items()} | family.fused
    return {theirs: (ours,) for ours, theirs in family.outside.items()} | {
        f"{family.layers}.{index}.{theirs}": tuple(f"layers.{index}.{name}" for name in ours)
        for index in range(config.n_layers)
        for theirs, ours in of_layer.items()
    }


def weights_for_transformers(state: dict[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    """The weights of a whole model under the names and in the shapes of `transformers`."""
    family, weights = family_of(config), {}
    for theirs, ours in parts_of(config).items():
        for kind in ("weight", "bias"):
            if f"{ours[0]}.{kind}" in state:
                weight = torch.cat([state[f"{name}.{kind}"] for name in ours])
                is_transposed = family.is_transposed and theirs.startswith(family.layers) and weight.ndim == 2
                weights[f"{theirs}.{kind}"] = weight.mT if is_transposed else weight
    return weights


def in_transformers(model: GPTModel, **settings: Any) -> Any:
    """The model of `transformers` with the same weights, in eval mode.

    Args:
        settings: of its configuration, beside those that follow from ours.

    Raises:
        UserError: `transformers` has no such architecture.
    """
    import transformers  # needed here only, and slow to import

    config, family = model.config, family_of(model.config)
    sizes = {theirs: getattr(config, ours) for ours, theirs in family.sizes.items()}
    their_config = getattr(transformers, f"{family.name}Config")(**sizes, **family.settings(config), **settings)
    theirs = getattr(transformers, family.model)(their_config).eval()
    theirs.load_state_dict(weights_for_transformers(model.state_dict(), config), strict=True)
    return theirs
