"""Which models the compiled step (decoder_step.py) computes: those made of the very parts that it was written for.

What a model computes is said by the `forward` of its modules. C code cannot ask them; it sees numbers in memory. So it
runs only where every module is of a class in `KNOWN`, holds what that class holds and nothing else, and has the methods
that stand in the class's file. A subclass, a method that was replaced (on an instance it is one more thing that is
held), a hook, a further weight, a new field of the configuration: each sends the model through its own `forward`, until
somebody teaches the C code and adds to the table here.
"""

from __future__ import annotations

import sys
from dataclasses import fields

import torch
import torch.nn as nn

import transformer_components
from command_line import UserError
from gpt_model import GPTConfig, GPTModel
from inference.kernels.int4_weights import GROUP
from inference.kernels.linear_layers import InferenceEmbedding, InferenceLinear
from inference.kernels.linear_products import kind_of, n_inputs, native_knows
from inference.kernels.paged_attention import Sizes
from inference.kernels.stacked_experts import StackedExperts, StackedLinear
from transformer_components import (
    FeedForwardNetwork,
    LearnedPositions,
    MixtureOfExperts,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositions,
    SinusoidalPositions,
    TransformerDecoderLayer,
)


class Missing:
    """The class of what is not there."""


NONE = type(None)
NORM, LINEAR, TABLE = (nn.LayerNorm, RMSNorm), (nn.Linear, InferenceLinear), (nn.Embedding, InferenceEmbedding)
MISSING = Missing()
DROPOUT = (nn.Dropout, nn.Identity)
WEIGHT, BUFFER, INTEGER, NUMBER, SWITCH = (nn.Parameter,), (torch.Tensor,), (int,), (float, int), (bool,)
EMBEDDING = dict(
    num_embeddings=INTEGER, embedding_dim=INTEGER, padding_idx=(int, NONE), max_norm=(NONE,), norm_type=NUMBER,
    scale_grad_by_freq=SWITCH, sparse=SWITCH, weight=WEIGHT,
)  # fmt: skip

# Whatever an instance may hold (submodules, parameters, buffers, settings), by name, and of which classes it may be
KNOWN: dict[type[nn.Module], dict[str, tuple[type, ...]]] = {
    GPTModel: dict(
        config=(GPTConfig,), recompute_activations=SWITCH, keeps_logits=SWITCH, token_embedding=TABLE,
        position_embedding=(LearnedPositions, SinusoidalPositions, RotaryPositions), embedding_dropout=DROPOUT,
        layers=(nn.ModuleList,), final_norm=NORM, lm_head=LINEAR,
    ),
    nn.ModuleList: {},  # and, under their numbers, the layers or the experts
    TransformerDecoderLayer: dict(
        attention_norm=NORM, attention=(MultiHeadAttention,), feed_forward_norm=NORM,
        feed_forward=(FeedForwardNetwork, MixtureOfExperts, StackedExperts), dropout=DROPOUT,
    ),
    MultiHeadAttention: dict(
        head_dim=INTEGER, dropout=NUMBER, query_proj=LINEAR, key_proj=LINEAR, value_proj=LINEAR, output_proj=LINEAR,
        query_norm=(*NORM, nn.Identity), key_norm=(*NORM, nn.Identity),
    ),
    FeedForwardNetwork: dict(up_proj=LINEAR, gate_proj=(*LINEAR, NONE), down_proj=LINEAR, dropout=DROPOUT),
    MixtureOfExperts: dict(
        experts_per_token=INTEGER, balance_coef=NUMBER, router_z_coef=NUMBER, router=LINEAR, experts=(nn.ModuleList,),
        n_chosen=(NONE, *BUFFER),
    ),
    StackedExperts: dict(
        n_experts=INTEGER, experts_per_token=INTEGER, router=LINEAR, up_proj=(StackedLinear,),
        gate_proj=(StackedLinear, NONE), down_proj=(StackedLinear,),
    ),
    StackedLinear: dict(
        weight=WEIGHT, scale=(*BUFFER, NONE), minimum=(*BUFFER, NONE), bias=(*BUFFER, NONE),
    ),
    nn.Linear: dict(in_features=INTEGER, out_features=INTEGER, weight=WEIGHT, bias=(*WEIGHT, NONE)),
    InferenceLinear: dict(
        in_features=INTEGER, out_features=INTEGER, int8_inputs=SWITCH, weight=WEIGHT, bias=(*WEIGHT, NONE),
        scale=(*BUFFER, NONE), minimum=(*BUFFER, NONE), _products=(list,), _prepared=(dict,),
    ),
    nn.Embedding: EMBEDDING,
    LearnedPositions: EMBEDDING,
    SinusoidalPositions: dict(table=BUFFER),
    RotaryPositions: dict(table=BUFFER),
    InferenceEmbedding: dict(
        weight=WEIGHT, scale=(*BUFFER, NONE), minimum=(*BUFFER, NONE), output_dtype=(torch.dtype,)
    ),
    nn.LayerNorm: dict(
        normalized_shape=(tuple,), eps=NUMBER, elementwise_affine=SWITCH, weight=WEIGHT, bias=(*WEIGHT, NONE)
    ),
    RMSNorm: dict(normalized_shape=(tuple,), eps=NUMBER, elementwise_affine=SWITCH, weight=WEIGHT),
    nn.Identity: {},
    nn.Dropout: dict(p=NUMBER, inplace=SWITCH),
}  # fmt: skip
OF_EVERY_MODULE = {*vars(nn.Module()), "_compiled_call_impl"}  # the last one is torch.compile's
NAMES = {kind: known.keys() | OF_EVERY_MODULE for kind, known in KNOWN.items()}
CLASSES = [base for base in {base for known in KNOWN for base in known.__mro__} if issubclass(base, nn.Module)]
# Methods of torch's classes that a forward pass goes through; libraries replace others, such as `__init__`, or add some
ON_THE_WAY = {
    "forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__", "__iter__",
    "__getitem__", "__len__",
}  # fmt: skip
_as_written: dict[type, dict[str, object]] = {}  # what a class held when all its methods were found to be its own

# Of the configuration; a further field must have its default value, which is what models had before there was the field
FIELDS = {
    "vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_seq_len", "dropout", "pad_token_id", "n_kv_heads",
    "head_dim", "position", "norm", "activation", "bias", "qkv_bias", "attention_output_bias", "mlp_bias", "qk_norm",
    "norm_eps", "rope_theta", "rope_scaling", "tie_embeddings", "n_experts", "experts_per_token", "balance_coef",
    "router_z_coef",
}  # fmt: skip
CHOICES = {
    "position": {"learned": LearnedPositions, "sinusoidal": SinusoidalPositions, "rotary": RotaryPositions},
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "swiglu"),
}


class UnknownPart(Exception):
    """Something in a model that the compiled step does not know; the text says what."""


def is_as_written(method: object, owner: type) -> bool:
    """Whether a method is from its class's own file, and not put into the class or the instance from outside."""
    return getattr(method, "__globals__", None) is vars(sys.modules[owner.__module__])


def refuse_other_forward(model: GPTModel) -> None:
    """The engine computes `lm_head(hidden_states_at(…))`, each of which may be the model's own; of what else a model
    does on its way to the logits it would know nothing.

    Raises:
        UserError: the model's `forward` or `hidden_states` is not that of `GPTModel`, or it has hooks.
    """
    for name in ("forward", "hidden_states"):
        method = getattr(model, name)
        if not is_as_written(method, GPTModel) or method.__qualname__ != f"GPTModel.{name}":
            raise UserError(
                f"the engine goes past the `{name}` that this {type(model).__name__} has of its own; give it"
                " `hidden_states_at` or an `lm_head` of its own in place of that"
            )
    if model._forward_hooks or model._forward_pre_hooks:
        raise UserError("the engine goes past the hooks on this model's `forward`; put them on the modules in it")


def facts_of(model: nn.Module) -> list[object]:
    """All that the compiled step takes from a model: classes, settings, where each tensor is. As long as this stays the
    same, so may the step; the numbers in the tensors may change.

    Raises:
        UnknownPart: the model has a part that is not in `KNOWN`.
    """
    for owner in CLASSES:
        if vars(owner) != _as_written.get(owner):
            for name, method in vars(owner).items():
                counts = name in ON_THE_WAY or not owner.__module__.startswith("torch.")
                if counts and callable(method) and not is_as_written(method, owner):
                    raise UnknownPart(f"{owner.__name__}.{name} has been replaced")
            _as_written[owner] = dict(vars(owner))
    if not is_as_written(transformer_components.apply_rotary, MultiHeadAttention):
        raise UnknownPart("apply_rotary has been replaced")
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        raise UnknownPart("there are hooks on all modules")
    if type(model) is not GPTModel:
        raise UnknownPart(f"the model is of the class {type(model).__name__}")
    facts: list[object] = []
    _look_at(model, "", facts)
    _look_at_config(model)
    return facts


def _look_at(module: nn.Module, path: str, facts: list[object]) -> None:
    """Add the facts of a module of a known class, and of all that it holds; `path` is empty or ends with a dot."""
    kind, known = type(module), KNOWN[type(module)]
    names = NAMES[kind]
    if kind is nn.ModuleList:
        known = dict.fromkeys(module._modules, (FeedForwardNetwork if "." in path[:-1] else TransformerDecoderLayer,))
        names = names | known.keys()
    held = {**module._parameters, **module._buffers, **module._modules, **vars(module)}
    if not held.keys() <= names:
        raise UnknownPart(f"{path[:-1] or 'the model'} has {', '.join(held.keys() - names)}")
    if module._forward_hooks or module._forward_pre_hooks:
        raise UnknownPart(f"{path[:-1] or 'the model'} has hooks")
    if kind is nn.Dropout and module.training and module.p:
        raise UnknownPart(f"{path[:-1]} is in training mode")
    facts.append(kind)
    for name, classes in known.items():
        value = held.get(name, MISSING)
        its_kind = type(value)
        if its_kind not in classes:
            raise UnknownPart(f"{path}{name} is of the class {its_kind.__name__}")
        if its_kind in KNOWN:
            _look_at(value, f"{path}{name}.", facts)
        elif its_kind is nn.Parameter or its_kind is torch.Tensor:
            facts.append((value.data_ptr(), value.shape, value.dtype))
        elif its_kind is GPTConfig:
            facts.append(list(vars(value).values()))
        else:
            facts.append(value)


def _look_at_config(model: GPTModel) -> None:
    config = model.config
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in FIELDS and value != field.default:
            raise UnknownPart(f"the configuration has {field.name} {value!r}")
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise UnknownPart(f"the configuration has {name} {getattr(config, name)!r}")
    networks = (MixtureOfExperts, StackedExperts) if config.n_experts else (FeedForwardNetwork,)
    if any(type(layer.feed_forward) not in networks for layer in model.layers):
        raise UnknownPart(f"a feed-forward network does not fit {config.n_experts} experts")
    if type(model.position_embedding) is not CHOICES["position"][config.position]:
        raise UnknownPart(f"position_embedding does not fit {config.position} positions")


def check_numbers(model: GPTModel, cache_sizes: Sizes) -> None:
    """That a model of known parts has the sizes, types and memory that the C code takes for granted.

    Raises:
        UnknownPart: where it does not.
    """
    config = model.config
    sizes = (config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim, config.max_seq_len)
    if len(model.layers) != config.n_layers or cache_sizes != sizes:
        raise UnknownPart("the model, its configuration and the cache differ in their sizes")
    shapes, kinds = _shapes(config), set()
    if type(model.position_embedding) is RotaryPositions:
        shapes["position_embedding"] = (2, config.max_seq_len, config.head_dim)
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name == "attention" and module.head_dim != config.head_dim:
            raise UnknownPart(f"{path}.head_dim is {module.head_dim}, in the configuration {config.head_dim}")
        if type(module) is MixtureOfExperts and (
            (len(module.experts), module.experts_per_token) != (config.n_experts, config.experts_per_token)
        ):
            raise UnknownPart(f"{path} and the configuration differ in their experts")
        for own_name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            shape = shapes[name] if own_name in ("weight", "table") else shapes[name][:1]  # of biases and scales
            is_int4 = getattr(module, "weight", tensor).dtype == torch.uint8
            if is_int4 and own_name != "bias":
                shape = (shape[0], shapes[name][1] // (2 if own_name == "weight" else GROUP))
            if tensor.shape != shape or not tensor.is_contiguous() or not tensor.is_cpu:
                raise UnknownPart(f"{path}.{own_name} has another size or place in memory than is usual")
            may_be_small = isinstance(module, InferenceLinear | InferenceEmbedding) or name == "position_embedding"
            if is_int4 and own_name in ("scale", "minimum"):
                if tensor.dtype != torch.float16:
                    raise UnknownPart(f"{path}.{own_name} is {tensor.dtype}")
            elif tensor.dtype != torch.float32 and not (may_be_small and own_name == "weight"):
                raise UnknownPart(f"{path}.{own_name} is {tensor.dtype}")
        if type(module) in (*LINEAR, *TABLE, LearnedPositions):
            kind = weights_of(module)
            if not native_knows(kind, n_inputs(module.weight)):
                raise UnknownPart(f"{path} has {kind} weights, which the kernels cannot read on this processor")
            if type(module) in LINEAR and name != "router":  # a router's input is taken as it is
                kinds.add(kind)
            if name == "router" and kind.startswith("int"):
                raise UnknownPart(f"{path} has {kind} weights")
    if len(kinds) > 1:  # what shares its input must take it in one form
        raise UnknownPart(f"the linear layers have weights of several kinds: {', '.join(sorted(kinds))}")


def weights_of(layer: nn.Module) -> str:
    """The kind of weights of a linear layer or an embedding, a key of `linear_products.DTYPES`."""
    return layer.weights if isinstance(layer, InferenceLinear) else kind_of(layer.weight)


def _shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Of the weights and tables, by the names of their modules; of positions, if they are added to embeddings."""
    model, inner, query = config.d_model, config.d_ff, config.n_heads * config.head_dim
    key, vocabulary, context = config.n_kv_heads * config.head_dim, config.vocab_size, config.max_seq_len
    return dict(
        token_embedding=(vocabulary, model), lm_head=(vocabulary, model), position_embedding=(context, model),
        query_proj=(query, model), key_proj=(key, model), value_proj=(key, model), output_proj=(model, query),
        up_proj=(inner, model), gate_proj=(inner, model), down_proj=(model, inner), router=(config.n_experts, model),
        attention_norm=(model,), feed_forward_norm=(model,), final_norm=(model,),
        query_norm=(config.head_dim,), key_norm=(config.head_dim,),
    )  # fmt: skip
