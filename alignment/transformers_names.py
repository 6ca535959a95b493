"""Our models in Hugging Face `transformers`: what their weights and sizes are called there.

One table for everything that comes into this project, leaves it or is compared with others: models and adapters, the
same weights in another program, the tests of parity. A further family of models is one more column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch

from command_line import UserError
from gpt_model import GPTConfig, GPTModel
from transformer_components import shapes_only

MODELS = {  # by architecture
    "gpt2": "GPT2LMHeadModel",
    "modern": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "moe": "Qwen3MoeForCausalLM",
}
COLUMNS = {"gpt2": 1, "modern": 2, "llama": 2, "qwen2": 2, "moe": 3}  # of the tables below; = is "as on the left"
TRANSPOSED = ("gpt2",)  # whose layers have matrices (in, out)

# Parts with weights; # is the number of a layer, @ of an expert. Several of ours with one name stand in it below one
# another
PARTS = """
    token_embedding                  transformer.wte              model.embed_tokens                       =
    position_embedding               transformer.wpe              -                                        =
    layers.#.attention_norm          transformer.h.#.ln_1         model.layers.#.input_layernorm           =
    layers.#.attention.query_proj    transformer.h.#.attn.c_attn  model.layers.#.self_attn.q_proj          =
    layers.#.attention.key_proj      transformer.h.#.attn.c_attn  model.layers.#.self_attn.k_proj          =
    layers.#.attention.value_proj    transformer.h.#.attn.c_attn  model.layers.#.self_attn.v_proj          =
    layers.#.attention.query_norm    -                            model.layers.#.self_attn.q_norm          =
    layers.#.attention.key_norm      -                            model.layers.#.self_attn.k_norm          =
    layers.#.attention.output_proj   transformer.h.#.attn.c_proj  model.layers.#.self_attn.o_proj          =
    layers.#.feed_forward_norm       transformer.h.#.ln_2         model.layers.#.post_attention_layernorm  =
    layers.#.feed_forward.gate_proj  -                            model.layers.#.mlp.gate_proj             -
    layers.#.feed_forward.up_proj    transformer.h.#.mlp.c_fc     model.layers.#.mlp.up_proj               -
    layers.#.feed_forward.down_proj  transformer.h.#.mlp.c_proj   model.layers.#.mlp.down_proj             -
    final_norm                       transformer.ln_f             model.norm                               =
    lm_head                          lm_head                      lm_head                                  =
"""
EXPERTS = """
    layers.#.feed_forward.router               model.layers.#.mlp.gate
    layers.#.feed_forward.experts.@.gate_proj  model.layers.#.mlp.experts.@.gate_proj
    layers.#.feed_forward.experts.@.up_proj    model.layers.#.mlp.experts.@.up_proj
    layers.#.feed_forward.experts.@.down_proj  model.layers.#.mlp.experts.@.down_proj
"""
SIZES = """
    vocab_size         vocab_size           vocab_size               =
    max_seq_len        n_positions          max_position_embeddings  =
    d_model            n_embd               hidden_size              =
    n_layers           n_layer              num_hidden_layers        =
    n_heads            n_head               num_attention_heads      =
    n_kv_heads         -                    num_key_value_heads      =
    head_dim           -                    head_dim                 =
    d_ff               n_inner              intermediate_size        moe_intermediate_size
    norm_eps           layer_norm_epsilon   rms_norm_eps             =
    tie_embeddings     tie_word_embeddings  tie_word_embeddings      =
    n_experts          -                    -                        num_experts
    experts_per_token  -                    -                        num_experts_per_tok
    balance_coef       -                    -                        router_aux_loss_coef
"""


LLAMA_LIKE = dict(position="rotary", norm="rmsnorm", activation="swiglu")
# What an architecture says of each of our switches; of those that it leaves open nothing
SWITCHES: dict[str, dict[str, Any]] = {
    "gpt2": dict(
        position="learned", norm="layernorm", activation="gelu", qk_norm=False, qkv_bias=True,
        attention_output_bias=True, mlp_bias=True,
    ),
    "modern": dict(LLAMA_LIKE, qk_norm=True, mlp_bias=False),
    "moe": dict(LLAMA_LIKE, qk_norm=True, mlp_bias=False),
    "llama": dict(LLAMA_LIKE, qk_norm=False),
    "qwen2": dict(LLAMA_LIKE, qk_norm=False, qkv_bias=True, attention_output_bias=False, mlp_bias=False),
}  # fmt: skip


def column(table: str, architecture: str) -> list[tuple[str, str]]:
    """(ours, theirs) of whatever an architecture has of a table."""
    rows = [line.split() for line in table.strip().splitlines()]
    number = COLUMNS[architecture]
    theirs = [row[number - 1] if row[number] == "=" else row[number] for row in rows]
    return [(row[0], name) for row, name in zip(rows, theirs, strict=True) if name != "-"]


def architecture_of(config: GPTConfig) -> str:
    """A key of `MODELS`.

    Raises:
        UserError: `transformers` has no such model.
    """
    for architecture, switches in SWITCHES.items():
        fits = all(getattr(config, name) == value for name, value in switches.items())
        fits = fits and bool(config.n_experts) == (architecture == "moe")
        if architecture == "gpt2":  # has no other kinds of heads
            fits = fits and config.n_kv_heads == config.n_heads and config.head_dim * config.n_heads == config.d_model
        elif architecture != "qwen2":  # has one setting for all layers of attention
            fits = fits and config.qkv_bias == config.attention_output_bias
        if fits:
            return architecture
    names = list(MODELS)
    raise UserError(
        f"transformers has no such model; it has those of the architectures {', '.join(names[:-1])} and {names[-1]}"
    )


def parts_of(config: GPTConfig) -> dict[str, list[str]]:
    """The parts of a model with weights, {theirs: ours}."""
    parts: dict[str, list[str]] = {}
    rows = column(PARTS, architecture_of(config))
    if config.n_experts:
        rows += [(ours, theirs) for ours, theirs in map(str.split, EXPERTS.strip().splitlines())]
    for ours, theirs in rows:
        layers = range(config.n_layers if "#" in ours else 1)
        experts = range(config.n_experts if "@" in ours else 1)
        for layer, expert in product(map(str, layers), map(str, experts)):
            name = theirs.replace("#", layer).replace("@", expert)
            parts.setdefault(name, []).append(ours.replace("#", layer).replace("@", expert))
    return parts


def each_for_transformers(
    state: dict[str, torch.Tensor], config: GPTConfig
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]]:
    """The weights of a whole model under the names of `transformers`: name, shape, and what makes the tensor."""
    is_transposed = architecture_of(config) in TRANSPOSED
    for theirs, ours in parts_of(config).items():
        for kind in ("weight", "bias"):
            if f"{ours[0]}.{kind}" in state:
                parts = [state[f"{name}.{kind}"] for name in ours]
                shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
                turned = is_transposed and ours[0].startswith("layers.") and len(shape) == 2

                def make(parts: list[torch.Tensor] = parts, turned: bool = turned) -> torch.Tensor:
                    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
                    return whole.mT if turned else whole

                yield f"{theirs}.{kind}", shape[::-1] if turned else shape, make


def weights_for_transformers(state: dict[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    """The weights of a whole model under the names and in the shapes of `transformers`."""
    return {name: make() for name, _, make in each_for_transformers(state, config)}


def weights_from_transformers(
    config: GPTConfig, read: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a whole model by our names, the tied ones once, a tensor of theirs at a time.

    Args:
        read: theirs → the tensor.
    """
    with shapes_only():
        shapes = {name: tensor.shape for name, tensor in GPTModel.from_config(config).state_dict().items()}
    if config.tie_embeddings:
        del shapes["lm_head.weight"]
    is_transposed = architecture_of(config) in TRANSPOSED
    for theirs, ours in parts_of(config).items():
        for kind in ("weight", "bias"):
            names = [f"{name}.{kind}" for name in ours if f"{name}.{kind}" in shapes]
            if names:
                weight = read(f"{theirs}.{kind}")
                in_layer = names[0].startswith("layers.") and weight.ndim == 2
                rows = (weight.mT if is_transposed and in_layer else weight).split([shapes[name][0] for name in names])
                yield from zip(names, rows, strict=True)


def settings_for_transformers(config: GPTConfig) -> dict[str, Any]:
    """What `config.json` says of a model: sizes, biases, positions.

    Raises:
        UserError: `transformers` has no such model.
    """
    architecture = architecture_of(config)
    settings = {theirs: getattr(config, ours) for ours, theirs in column(SIZES, architecture)}
    if architecture == "gpt2":
        return settings | {"activation_function": "gelu_new"}
    settings |= {"hidden_act": "silu", "rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}
    if architecture != "qwen2":
        settings["attention_bias"] = config.qkv_bias
    if architecture == "llama":
        settings["mlp_bias"] = config.mlp_bias
    if architecture == "moe":
        settings |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if config.rope_scaling and config.rope_scaling["rope_type"] == "dynamic":  # means the original context there
        settings["max_position_embeddings"] = config.rope_scaling["original_max_position_embeddings"]
    scaling = config.rope_scaling or {"rope_type": "default"}
    settings["rope_parameters"] = {**scaling, "rope_theta": config.rope_theta}
    return settings


def in_transformers(model: GPTModel, **settings: Any) -> Any:
    """The model of `transformers` with the same weights, in eval mode.

    Args:
        settings: of its configuration, beside those that follow from ours.

    Raises:
        UserError: `transformers` has no such model.
    """
    import transformers  # needed here only, and slow to import

    config = model.config
    settings |= settings_for_transformers(config)
    kind = getattr(transformers, MODELS[architecture_of(config)])
    theirs = kind(kind.config_class(**settings)).eval()
    weights = weights_for_transformers(model.state_dict(), config)
    if config.n_experts:
        weights = stack_experts(weights, config)
    theirs.load_state_dict(weights, strict=True)
    return theirs


def stack_experts(weights: dict[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    """The weights of files as `transformers` has them in memory: all experts of a layer in one tensor (E, …)."""
    stacked = {name: weight for name, weight in weights.items() if ".experts." not in name}
    for layer in range(config.n_layers):
        base = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([weights[f"{base}.{expert}.{part}_proj.weight"] for expert in range(config.n_experts)])
            for part in ("gate", "up", "down")
        )
        stacked |= {f"{base}.gate_up_proj": torch.cat((gate, up), dim=1), f"{base}.down_proj": down}
    return stacked
