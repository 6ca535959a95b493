"""Our models in Hugging Face `transformers`: what their weights and sizes are called there.

One table for everything that leaves this project or is compared with others: adapters for `peft`, the same weights in
another program, the tests of parity. A further family of models is one more column.
"""

from __future__ import annotations

from typing import Any

import torch

from command_line import UserError
from gpt_model import ARCHITECTURES, GPTConfig, GPTModel

MODELS = {"gpt2": "GPT2LMHeadModel", "modern": "Qwen3ForCausalLM"}  # by architecture; the columns below, too
TRANSPOSED = ("gpt2",)  # whose layers have matrices (in, out)

# Parts with weights; # is the number of a layer. Several of ours with one name stand in it below one another
PARTS = """
    token_embedding                 transformer.wte              model.embed_tokens
    position_embedding              transformer.wpe              -
    layers.#.attention_norm         transformer.h.#.ln_1         model.layers.#.input_layernorm
    layers.#.attention.query_proj   transformer.h.#.attn.c_attn  model.layers.#.self_attn.q_proj
    layers.#.attention.key_proj     transformer.h.#.attn.c_attn  model.layers.#.self_attn.k_proj
    layers.#.attention.value_proj   transformer.h.#.attn.c_attn  model.layers.#.self_attn.v_proj
    layers.#.attention.query_norm   -                            model.layers.#.self_attn.q_norm
    layers.#.attention.key_norm     -                            model.layers.#.self_attn.k_norm
    layers.#.attention.output_proj  transformer.h.#.attn.c_proj  model.layers.#.self_attn.o_proj
    layers.#.feed_forward_norm      transformer.h.#.ln_2         model.layers.#.post_attention_layernorm
    layers.#.feed_forward.gate_proj -                            model.layers.#.mlp.gate_proj
    layers.#.feed_forward.up_proj   transformer.h.#.mlp.c_fc     model.layers.#.mlp.up_proj
    layers.#.feed_forward.down_proj transformer.h.#.mlp.c_proj   model.layers.#.mlp.down_proj
    final_norm                      transformer.ln_f             model.norm
    lm_head                         lm_head                      lm_head
"""
SIZES = """
    vocab_size      vocab_size          vocab_size
    max_seq_len     n_positions         max_position_embeddings
    d_model         n_embd              hidden_size
    n_layers        n_layer             num_hidden_layers
    n_heads         n_head              num_attention_heads
    n_kv_heads      -                   num_key_value_heads
    head_dim        -                   head_dim
    d_ff            n_inner             intermediate_size
    norm_eps        layer_norm_epsilon  rms_norm_eps
    tie_embeddings  tie_word_embeddings tie_word_embeddings
"""


def column(table: str, architecture: str) -> list[tuple[str, str]]:
    """(ours, theirs) of whatever an architecture has of a table."""
    rows = [line.split() for line in table.strip().splitlines()]
    number = 1 + list(MODELS).index(architecture)
    return [(row[0], row[number]) for row in rows if row[number] != "-"]


def architecture_of(config: GPTConfig) -> str:
    """ "gpt2" or "modern".

    Raises:
        UserError: `transformers` has no such model.
    """
    for architecture, switches in ARCHITECTURES.items():
        if all(getattr(config, name) == value for name, value in switches.items() if name != "norm_eps"):
            return architecture
    raise UserError(f"transformers has no such model; it has those of the architectures {' and '.join(MODELS)}")


def parts_of(config: GPTConfig) -> dict[str, list[str]]:
    """The parts of a model with weights, {theirs: ours}."""
    parts: dict[str, list[str]] = {}
    for ours, theirs in column(PARTS, architecture_of(config)):
        for index in map(str, range(config.n_layers if "#" in ours else 1)):
            parts.setdefault(theirs.replace("#", index), []).append(ours.replace("#", index))
    return parts


def weights_for_transformers(state: dict[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    """The weights of a whole model under the names and in the shapes of `transformers`."""
    is_transposed, weights = architecture_of(config) in TRANSPOSED, {}
    for theirs, ours in parts_of(config).items():
        for kind in ("weight", "bias"):
            if f"{ours[0]}.{kind}" in state:
                weight = torch.cat([state[f"{name}.{kind}"] for name in ours])
                in_layer = ours[0].startswith("layers.") and weight.ndim == 2
                weights[f"{theirs}.{kind}"] = weight.mT if is_transposed and in_layer else weight
    return weights


def in_transformers(model: GPTModel, **settings: Any) -> Any:
    """The model of `transformers` with the same weights, in eval mode.

    Args:
        settings: of its configuration, beside those that follow from ours.

    Raises:
        UserError: `transformers` has no such model.
    """
    import transformers  # needed here only, and slow to import

    config, architecture = model.config, architecture_of(model.config)
    settings |= {theirs: getattr(config, ours) for ours, theirs in column(SIZES, architecture)}
    if architecture != "gpt2":
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    kind = getattr(transformers, MODELS[architecture])
    theirs = kind(kind.config_class(**settings)).eval()
    theirs.load_state_dict(weights_for_transformers(model.state_dict(), config), strict=True)
    return theirs
