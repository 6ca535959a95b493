"""A model's forward pass for the tokens of a step in one call of compiled code (decoder_step.c).

Between the products with the weights stand hundreds of small operations, each of which Python and PyTorch need some
microseconds to start. With one token at a time that is a quarter of the time of a GPT-2, and nearly all of a small
model's. Here it is nothing. The mathematics is that of `GPTModel.hidden_states_at`, which the engine uses wherever
this cannot be had: on a GPU, in half precision, with adapters, without a compiler, and for any model that is not made
of the very parts that known_parts.py lists.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn as nn

from gpt_model import GPTModel
from inference.kernels.known_parts import UnknownPart, check_numbers, facts_of, weights_of
from inference.kernels.linear_layers import InferenceEmbedding
from inference.kernels.linear_products import NativeLinear, n_inputs, native_library
from inference.kernels.paged_attention import BLOCK_SIZE, NativeCache, PagedAttention
from machine.native_code import check_layout, load_native
from transformer_components import (
    FeedForwardNetwork,
    LearnedPositions,
    MixtureOfExperts,
    RMSNorm,
    RotaryPositions,
    TransformerDecoderLayer,
)

SOURCE = Path(__file__).with_suffix(".c")
WORTH_THREADS = 1 << 17  # multiplications with the weights of one layer
BLOCK_BYTES = 4 * BLOCK_SIZE

logger = logging.getLogger(__name__)


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("size", "is_rms")),
        ("eps", ctypes.c_double),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("attention_norm", "query_norm", "key_norm", "feed_forward_norm")),
        *((name, NativeLinear) for name in ("query", "key", "value", "output", "up", "down", "gate", "router")),
        ("experts", ctypes.POINTER(NativeLinear)),
        *((name, ctypes.c_int64) for name in ("n_experts", "experts_per_token")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("final_norm", _Norm),
        ("rotary", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n_layers", "d_model", "d_ff", "max_seq_len")),
        *((name, NativeLinear) for name in ("head", "tokens", "positions")),
    ]


class _Tokens(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ids", "slots", "positions", "last")),
        *((name, ctypes.c_int64) for name in ("tokens", "n_last")),
    ]


class _Scratch(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("hidden", "normed", "query", "key", "value", "attended", "inner", "gate", "digits")
        + ("shares", "gathered", "computed", "rows")
    ]


class DecoderStep:
    """The forward pass of a model over a cache; `DecoderStep.of` makes one where that is possible.

    The weights are read where they are and may change there, as in training; where they move, another one must be made.
    """

    @classmethod
    def of(
        cls, model: GPTModel, attention: PagedAttention | None, before: DecoderStep | None = None
    ) -> DecoderStep | None:
        """None if a part, a type or the machine is not one that the compiled code knows.

        Args:
            attention: the compiled attention to the cache, if there is one.
            before: the model's step until now; it is returned if it is still right.
        """
        if attention is None:
            return None
        try:
            facts = facts_of(model)
            if before is not None and before.facts == facts:
                return before
            check_numbers(model, attention.sizes)
        except UnknownPart as unknown:
            _say_once(str(unknown))
            return None
        library = load_native(SOURCE)
        if library is None:
            return None
        check_layout(library, Cache=NativeCache, Linear=NativeLinear, Norm=_Norm, Layer=_Layer, Model=_Model,
                     Tokens=_Tokens, Scratch=_Scratch)  # fmt: skip
        return cls(model, attention, facts, library.decoder_step)

    def __init__(
        self, model: GPTModel, attention: PagedAttention, facts: list[object], function: Callable[..., None]
    ) -> None:
        self.attention, self.config, self.facts, self.function = attention, model.config, facts, function
        function.argtypes = [*map(ctypes.POINTER, (_Model, NativeCache, _Tokens, _Scratch)), ctypes.c_void_p,
                             ctypes.c_int]  # fmt: skip
        function.restype = None
        config = model.config
        linears, tables, positions = [*_linears(model), model.lm_head], _tables(model), model.position_embedding
        # Should the weights move while requests run, the old ones are read until the next request comes
        self.keep_alive = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
        self.layers = [_layer(layer) for layer in model.layers]  # they hold their experts, their copies do not
        self.model = _Model(
            (_Layer * config.n_layers)(*self.layers),
            _norm(model.final_norm),
            positions.table.data_ptr() if isinstance(positions, RotaryPositions) else None,
            *(config.n_layers, config.d_model, config.d_ff, config.max_seq_len),
            *map(_native, (model.lm_head, *tables)),
        )
        idle = sum(layer.feed_forward.num_idle_parameters() for layer in model.layers) if config.n_experts else 0
        n_weights = sum(len(linear.weight) * n_inputs(linear.weight) for linear in _linears(model))
        self.layer_weights = (n_weights - idle) // config.n_layers
        digit_bytes = native_library().linear_digit_bytes
        query, key = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        widths = (config.d_model, config.d_model, query, key, key, query, config.d_ff, config.d_ff)
        self.token_bytes = [4 * width for width in widths]
        natives = list(map(_native, linears))
        self.token_bytes.append(max(digit_bytes(native.type, native.n_in) for native in natives))
        gathered = config.d_model if config.n_experts else 0
        self.token_bytes += [4 * config.n_experts, 4 * gathered, 4 * gathered, 8 * config.n_experts]
        self.room_for = 0

    def __call__(
        self, ids: Sequence[int], slots: array[int], positions: array[int], last: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The forward pass of N tokens, which have cells in the cache.

        Args:
            ids, slots, positions: of the tokens; the latter two 64-bit integers, as `PagedCache` has them.
            last: those of the tokens, 0 … N − 1, whose logits are wanted.

        Returns:
            the final, normed hidden states (N, D) fp32, in memory that the next step overwrites; logits
            (len(last), V) fp32.
        """
        n_tokens = len(ids)
        if self.room_for < n_tokens:
            self._make_room(n_tokens)
        numbers = array("q", ids), slots, positions, array("q", last)
        tokens = _Tokens(*(each.buffer_info()[0] for each in numbers), n_tokens, len(last))
        logits = torch.empty(len(last), self.config.vocab_size)
        threads = torch.get_num_threads() if n_tokens * self.layer_weights > WORTH_THREADS else 1
        self.function(self.model, self.attention.cache, tokens, self.scratch, logits.data_ptr(), threads)
        return self.hidden[:n_tokens], logits

    def _make_room(self, n_tokens: int) -> None:
        sizes = {
            name: n_tokens * n_bytes for (name, _), n_bytes in zip(_Scratch._fields_, self.token_bytes, strict=True)
        }
        sizes["rows"] += 8 * self.config.n_experts  # each expert's number of tokens
        for name in ("inner", "gate"):  # C goes over them in whole blocks, to the end of the last
            sizes[name] = -(-sizes[name] // BLOCK_BYTES) * BLOCK_BYTES
        # One tensor for each: a sanitizer then sees who writes beyond the end of its own
        rooms = [torch.empty(size, dtype=torch.uint8) for size in sizes.values()]
        self.rooms, self.scratch = rooms, _Scratch(*(room.data_ptr() for room in rooms))
        self.hidden = rooms[0].view(torch.float32).view(n_tokens, -1)  # (N, D)
        self.room_for = n_tokens


@functools.cache
def _say_once(reason: str) -> None:
    logger.info("the engine computes through PyTorch: %s", reason)


def _linears(model: GPTModel) -> list[nn.Module]:
    return [linear for layer in model.layers for linear in _linears_of(layer)]


def _tables(model: GPTModel) -> list[nn.Module]:
    """The embeddings: of tokens and, but for rotary models, of positions."""
    positions = model.position_embedding
    if isinstance(positions, RotaryPositions):
        return [model.token_embedding]
    learned = isinstance(positions, LearnedPositions)
    return [model.token_embedding, positions if learned else InferenceEmbedding(positions.table)]


def _linears_of(layer: TransformerDecoderLayer) -> list[nn.Module]:
    """Query, key, value, output, and of each feed-forward network up, down and, with SwiGLU, gate."""
    attention, network = layer.attention, layer.feed_forward
    networks = network.experts if isinstance(network, MixtureOfExperts) else [network]
    projections = [attention.query_proj, attention.key_proj, attention.value_proj, attention.output_proj]
    return projections + [part for network in networks for part in _parts_of(network) if part is not None]


def _parts_of(network: FeedForwardNetwork) -> tuple[nn.Module | None, ...]:
    return network.up_proj, network.down_proj, network.gate_proj


def _native(layer: nn.Module) -> NativeLinear:
    """Of a linear layer, or an embedding table."""
    scale, minimum, bias = (getattr(layer, name, None) for name in ("scale", "minimum", "bias"))
    return NativeLinear(layer.weight, scale, bias, weights_of(layer), minimum)


def _norm(norm: nn.Module) -> _Norm:
    if isinstance(norm, nn.Identity):
        return _Norm()
    weight, bias = norm.weight, getattr(norm, "bias", None)
    is_rms = isinstance(norm, RMSNorm)
    return _Norm(weight.data_ptr(), None if bias is None else bias.data_ptr(), weight.numel(), is_rms, norm.eps)


def _layer(layer: TransformerDecoderLayer) -> _Layer:
    attention, network = layer.attention, layer.feed_forward
    norms = (layer.attention_norm, attention.query_norm, attention.key_norm, layer.feed_forward_norm)
    native = list(map(_native, _linears_of(layer)[:4]))

    def natives(network: FeedForwardNetwork) -> list[NativeLinear]:
        nothing = NativeLinear.from_buffer_copy(bytes(ctypes.sizeof(NativeLinear)))
        return [nothing if part is None else _native(part) for part in _parts_of(network)]

    if not isinstance(network, MixtureOfExperts):
        return _Layer(*map(_norm, norms), *native, *natives(network))
    experts = [part for expert in network.experts for part in natives(expert)]
    made = _Layer(*map(_norm, norms), *native)
    made.router, made.experts = _native(network.router), (NativeLinear * len(experts))(*experts)
    made.n_experts, made.experts_per_token = len(network.experts), network.experts_per_token
    return made
