"""The parts of a Transformer, and `GPTConfig`, the description of a model that all of them are made from.

In order: attention and its KV cache, losses of single parts, kinds of positions, the description, norms, attention,
feed-forward network and experts as modules, the decoder layer.

Shapes are written with these letters: B batch, T new tokens, S all tokens that can be attended to (cached + new),
D = d_model, H heads, G key/value heads (G divides H), K = head_dim, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from command_line import beyond_bounds, option
from inference.kernels.expert_products import (
    BLOCK_MULTIPLE,
    ExpertRows,
    arrange,
    at_once,
    counts_of,
    has_grouped_product,
    signature,
)

PartClass = TypeVar("PartClass", bound="Part")


class _Undrawn(TorchFunctionMode):
    """`torch.nn.init` leaves tensors as they are."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Modules are made without memory for their weights, which are to come from elsewhere, and without drawing them: to
    draw what has no memory, PyTorch loads its compiler, which takes a second."""
    with torch.device("meta"), _Undrawn():
        yield


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of queries (B, H, T, K) to keys and values (B, G, S, K), as (B, H, T, K).

    Args:
        mask: boolean, broadcastable to (B, H, T, S), True where a query may look. None means causal among the new
            tokens, which is right only without a past (or for a single new token). Whole numbers are the
            `text_bounds` of texts that do not see each other, for which `takes_text_bounds`.
        dropout: the share of attention weights that are dropped.
    """
    if mask is not None and mask.dtype == torch.int32:
        from training.attention_within_texts import attend_within_texts  # here: it takes a second, and is for GPUs

        return attend_within_texts(query, key, value, mask)
    groups = query.size(1) // key.size(1)
    is_grouped = groups > 1
    if is_grouped and not takes_groups(query.device.type, query.dtype, mask is not None):
        key, value, is_grouped = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1), False
    # SDPA aligns its causal mask upper-left: with a past, one new query would see the first key only
    if mask is None and query.size(2) > 1:
        return kernels.causal_attention(query, key, value, dropout)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, enable_gqa=is_grouped
    )


def takes_groups(device_type: str, dtype: torch.dtype, masked: bool) -> bool:
    """Whether a fused kernel of SDPA takes fewer key/value heads than query heads.

    On CUDA that is flash attention, which knows neither fp32 nor masks; the memory-efficient kernel, which knows both,
    wants equal heads. Where none takes them, SDPA silently computes all T × S weights ("math"); with the heads repeated
    it does not.
    """
    if device_type == "cuda":
        return not masked and dtype in (torch.bfloat16, torch.float16)
    return device_type == "cpu"


def takes_text_bounds(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float) -> bool:
    """Whether flash attention computes several texts in a row by their bounds, without a mask. Elsewhere a mask says
    which tokens see each other, and the memory-efficient kernel computes it, with the heads repeated."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 8:
        return False
    return dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256 and not dropout


def text_bounds(segments: torch.Tensor, multiple: int = 64) -> torch.Tensor:
    """Where each text begins among the B · T tokens of rows of texts and, behind the last, where all end; (S,) int32.

    Args:
        segments: (B, T), which text of its row a token is of.
        multiple: of the length, so that few shapes occur; the texts that fill it up are empty.
    """
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)  # (B, T): no text goes on in the next row
    starts = begins.flatten().nonzero().flatten()
    missing = -(len(starts) + 1) % multiple + 1
    return F.pad(starts, (0, missing), value=segments.numel()).int()


class PartKernels:
    """How parts that are no linear layers are computed: here by PyTorch, operation by operation. Training on a CPU has
    faster ones, training/fused_parts.py."""

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) · up, of the same shape."""
        return F.silu(gate) * up

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x (…, size) over its root mean square, times weight (size,)."""
        return F.rms_norm(x, weight.shape, weight, eps)

    def rotate(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """x (B, heads, T, K) by `rotary`, see `apply_rotary`."""
        return apply_rotary(x, rotary)

    def causal_attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float = 0.0
    ) -> torch.Tensor:
        """Attention of a text's queries (B, H, T, K) to its keys and values (B, G, T, K) up to their own."""
        is_grouped = query.size(1) != key.size(1)
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=is_grouped
        )

    def cross_entropy_(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The losses (n,) of logits (n, V), which become their gradients: probabilities, less 1 at the target.

        Args:
            targets: (n,) int64; a row without one, below 0, has loss and gradient 0.
        """
        log_probs = logits.float().log_softmax(dim=-1)  # (n, V)
        ignored, places = targets.lt(0).unsqueeze(1), targets.clamp(min=0).unsqueeze(1)  # (n, 1), (n, 1)
        losses = -log_probs.gather(1, places).masked_fill(ignored, 0.0).squeeze(1)  # (n,)
        errors = log_probs.exp_().scatter_add_(1, places, torch.full_like(places, -1.0, dtype=torch.float32))
        logits.copy_(errors.masked_fill_(ignored, 0.0))
        return losses


kernels = PartKernels()  # those that are in use
LINEAR_LAYERS = ("up_proj", "gate_proj", "down_proj")  # of a feed-forward network; it need not have the second


class Cache(Protocol):
    """What attention asks of a cache: to remember the new keys and values, and to attend to all that it remembers."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Store key and value (B, G, T, K) of one layer; the attention of query (B, H, T, K), of the same shape."""

    def advance(self, n_tokens: int) -> None:
        """Called once after all layers have attended, with the number T of new tokens."""


class KVCache:
    """Keys and values of all layers for the tokens seen so far, in memory that is allocated once.

    Attention appends to it; the model advances `length` once a forward pass. Cells beyond `length` are zeros: memory
    that was never written could hold NaN, which leaks through a mask.

    Attributes:
        length: number of positions that are filled (padding included), the same for every row.
        keys, values: (n_layers, B, G, max_len, K).
    """

    def __init__(
        self,
        n_layers: int,
        batch_size: int,
        n_kv_heads: int,
        max_len: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (n_layers, batch_size, n_kv_heads, max_len, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def max_len(self) -> int:
        return self.keys.size(3)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values of one layer, both (B, G, T, K); returns all so far, (B, G, S, K)."""
        end = self.length + key.size(2)
        if end > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} positions, {end} are needed")
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Append key and value (B, G, T, K); the attention of query (B, H, T, K) to all so far, of the same shape."""
        return attend(query, *self.append(layer, key, value), mask)

    def advance(self, n_tokens: int) -> None:
        """Count `n_tokens` positions as filled; called once after all layers have appended them."""
        self.length += n_tokens

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Keep only some rows of the batch: `rows` is a (B',) index or a (B,) mask."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


# -- losses of single parts --------------------------------------------------------------------------------------------

_collected: list[list[torch.Tensor]] = []  # what the innermost `auxiliary_losses()` has collected stands last


@contextmanager
def auxiliary_losses() -> Iterator[list[torch.Tensor]]:
    """Collects the losses that parts of models add to the one of the predictions, see `AuxiliaryLoss`."""
    _collected.append([])
    try:
        yield _collected[-1]
    finally:
        _collected.pop()


class AuxiliaryLoss:
    """What a module inherits, too, if its `forward` has something of its own to be minimised.

    A mixture of experts wants all experts to be used. The one loop of all trainers collects such losses
    of a micro-batch, adds them to its loss and logs their sum as `aux_loss`. Nothing is collected in evaluations, of
    models that are asked without gradients (references, teachers), and where activations are recomputed.
    """

    def add_auxiliary_loss(self, loss: torch.Tensor) -> None:
        """Have a scalar minimised; its weight is already in it, and it is a mean and no sum over tokens."""
        if _collected and torch.is_grad_enabled():
            _collected[-1].append(loss.float())


# -- positions ---------------------------------------------------------------------------------------------------------


def sinusoidal_positions(max_seq_len: int, d_model: int) -> torch.Tensor:
    """The fixed position table of "Attention Is All You Need" (arXiv:1706.03762, section 3.5), (max_seq_len, D)."""
    position = torch.arange(max_seq_len, dtype=torch.float32).unsqueeze(1)  # (max_seq_len, 1)
    frequency = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float32) * (-math.log(10000.0) / d_model))
    table = torch.zeros(max_seq_len, d_model)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)[:, : d_model // 2]
    return table


# What stretches rotary positions beyond the context that a model was trained with, by the names of `transformers`:
# kind → the parameters that it must have, and those that it may have
ROPE_SCALINGS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor", "original_max_position_embeddings"}, set()),
    "llama3": ({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}


def rotary_frequencies(
    head_dim: int, theta: float, scaling: dict[str, Any] | None = None, length: int = 0
) -> tuple[torch.Tensor, float]:
    """Radians a position of each pair of rotary positions, (K/2,), and what cosines and sines are multiplied by.

    Args:
        scaling: `GPTConfig.rope_scaling`. The kinds: linear, arXiv:2306.15595; dynamic, "NTK-aware", which depends on
            the `length` of the text; yarn, arXiv:2309.00071, section 3; llama3, as Llama 3.1 came with.
    """
    scaling = scaling or {"rope_type": "none"}
    kind, factor = scaling["rope_type"], scaling.get("factor", 1.0)
    original = scaling.get("original_max_position_embeddings", 0)
    if kind == "dynamic" and length > original:
        theta *= (factor * length / original - (factor - 1)) ** (head_dim / (head_dim - 2))
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # (K/2,)
    if kind == "linear":
        return frequency / factor, 1.0
    if kind == "llama3":  # long waves are stretched, short ones are not, those between them are mixed
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * frequency / (2 * math.pi)  # of a wave within the original context
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - share) * frequency / factor + share * frequency, 1.0
    if kind == "yarn":

        def pair_that_turns(times: float) -> float:
            return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

        first = pair_that_turns(scaling.get("beta_fast") or 32)
        last = pair_that_turns(scaling.get("beta_slow") or 1)
        if scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        width = 0.001 if first == last else last - first
        stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)

        def magnitude(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

        magnitudes = [scaling.get(name) for name in ("mscale", "mscale_all_dim")]
        usual = magnitude(magnitudes[0]) / magnitude(magnitudes[1]) if all(magnitudes) else magnitude(1)
        attention_factor = scaling.get("attention_factor")
        scale = usual if attention_factor is None else attention_factor
        return frequency / factor * stretched + frequency * (1 - stretched), scale
    return frequency, 1.0


def rotary_angles(
    max_seq_len: int, head_dim: int, theta: float, scaling: dict[str, Any] | None = None, length: int = 0
) -> torch.Tensor:
    """Cosines and sines of rotary position embedding (RoFormer, arXiv:2104.09864), (2, max_seq_len, K).

    The two halves of a head are rotated against each other, as Llama's and Qwen's public weights expect.

    Args:
        scaling, length: see `rotary_frequencies`.
    """
    frequency, scale = rotary_frequencies(head_dim, theta, scaling, length)  # (K/2,)
    angle = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequency)  # (max_seq_len, K/2)
    angle = torch.cat((angle, angle), dim=-1)  # (max_seq_len, K)
    return torch.stack((angle.cos(), angle.sin())) * scale


def apply_rotary(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, heads, T, K) by `rotary` (2, T, K) or, with positions of its own for each row, (2, B, 1, T, K)."""
    cos, sin = rotary.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Positions(nn.Module):
    """How tokens know where they stand: one subclass a kind. With this class itself they do not know it.

    A new kind overrides what it needs and goes into `POSITIONS`; a model has it as its `position_embedding`, which is
    what its weights are called in checkpoints. It then trains and runs everywhere: the engine computes through PyTorch
    until decoder_step.c has learned it and known_parts.py lists it. To be exported it needs an architecture of
    `transformers`, in alignment/transformers_names.py.

    `here` is a slice of positions, the same in all rows, or (B, T) int64.

    Attributes:
        depends_on_length: whether what a token gets depends on where the last one of its row stands.
    """

    depends_on_length = False

    @classmethod
    def complaints(cls, config: GPTConfig) -> list[str]:
        """What in a configuration does not suit this kind, a sentence each."""
        return []

    def add_to(self, x: torch.Tensor, here: slice | torch.Tensor) -> torch.Tensor:
        """The embeddings x (B, T, D) of tokens, and whatever is added to them."""
        return x

    def rotary(self, here: slice | torch.Tensor) -> torch.Tensor | None:
        """By which angles queries and keys are rotated, see `apply_rotary`; None if they are not."""
        return None

    def _keep(self, table: Callable[[], torch.Tensor]) -> None:
        """Register what is no weight but follows from the configuration; it is real also in a model without memory, on
        PyTorch's meta device, since no checkpoint will fill it."""
        device = torch.get_default_device()
        with torch.device("cpu") if device.type == "meta" else device:
            self.register_buffer("table", table(), persistent=False)


class LearnedPositions(nn.Embedding, Positions):
    """A vector for each position is learned and added to the embeddings, as in GPT-2."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config.max_seq_len, config.d_model)

    def add_to(self, x: torch.Tensor, here: slice | torch.Tensor) -> torch.Tensor:
        return x + self.weight[here]  # (T, D) or (B, T, D)


class SinusoidalPositions(Positions):
    """Waves of many lengths are added to the embeddings, see `sinusoidal_positions`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self._keep(lambda: sinusoidal_positions(config.max_seq_len, config.d_model))  # (max_seq_len, D)

    def add_to(self, x: torch.Tensor, here: slice | torch.Tensor) -> torch.Tensor:
        return x + self.table[here]  # (T, D) or (B, T, D)


class RotaryPositions(Positions):
    """Queries and keys are rotated, so that their products depend on distances alone, see `rotary_angles`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        sizes = config.max_seq_len, config.head_dim, config.rope_theta
        self._keep(lambda: rotary_angles(*sizes, config.rope_scaling))  # (2, max_seq_len, K)

    @classmethod
    def complaints(cls, config: GPTConfig) -> list[str]:
        complaints = [f"rotary positions need an even head_dim, not {config.head_dim}"] if config.head_dim % 2 else []
        scaling = config.rope_scaling
        if scaling is None:
            return complaints
        kind, given = scaling.get("rope_type"), scaling.keys() - {"rope_type"}
        if kind not in ROPE_SCALINGS:
            return [*complaints, f"rope_scaling must be of the type {', '.join(ROPE_SCALINGS)}, not {kind!r}"]
        needed, possible = ROPE_SCALINGS[kind]
        if missing := needed - given:
            complaints.append(f"rope_scaling of the type {kind} lacks {', '.join(sorted(missing))}")
        if unknown := given - needed - possible:
            complaints.append(f"rope_scaling of the type {kind} has unknown {', '.join(sorted(unknown))}")
        unfit = [name for name in given - {"truncate"} if not _is_positive(scaling[name])]
        if unfit:
            complaints.append(f"rope_scaling must have numbers above 0 for {', '.join(sorted(unfit))}")
        elif not missing and kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            complaints.append("rope_scaling must have a high_freq_factor above its low_freq_factor")
        elif kind == "dynamic" and config.head_dim < 4:
            complaints.append("rope_scaling of the type dynamic needs a head_dim of 4 or more")
        return complaints

    def rotary(self, here: slice | torch.Tensor) -> torch.Tensor:
        angles = self.table[:, here]  # (2, T, K) or (2, B, T, K)
        return angles if isinstance(here, slice) else angles.unsqueeze(2)  # (2, B, 1, T, K)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


class DynamicRotaryPositions(RotaryPositions):
    """Rotary positions whose waves grow with a text that is longer than the original context ("dynamic" scaling).

    The angles of all tokens of a forward pass depend on the last one's position. Each row of a batch has its own, so
    that rows do not influence each other. Keys that are in a cache stay as they were, as in `transformers`: what comes
    out depends on how a text is cut into passes, so the engine computes one request at a time, its prompt in one piece.
    """

    depends_on_length = True

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.config = config

    def rotary(self, here: slice | torch.Tensor) -> torch.Tensor:
        original = self.config.rope_scaling["original_max_position_embeddings"]
        if isinstance(here, slice):
            return self._angles(here.stop)[:, here] if here.stop > original else super().rotary(here)
        lengths = (here.max(dim=-1).values + 1).tolist()  # of each row
        if max(lengths) <= original:
            return super().rotary(here)
        rows = [self._angles(length)[:, row] for length, row in zip(lengths, here, strict=True)]
        return torch.stack(rows, dim=1).unsqueeze(2)  # (2, B, 1, T, K)

    def _angles(self, length: int) -> torch.Tensor:
        config = self.config
        angles = rotary_angles(length, config.head_dim, config.rope_theta, config.rope_scaling, length)
        return angles.to(self.table.device)  # (2, length, K)


POSITIONS: dict[str, type[Positions]] = {
    "learned": LearnedPositions,
    "rotary": RotaryPositions,
    "sinusoidal": SinusoidalPositions,
}


def make_positions(config: GPTConfig) -> Positions:
    """The positions of a model."""
    is_dynamic = config.position == "rotary" and (config.rope_scaling or {}).get("rope_type") == "dynamic"
    return (DynamicRotaryPositions if is_dynamic else POSITIONS[config.position])(config)


# -- the description of a model ----------------------------------------------------------------------------------------

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": dict(position="learned", norm="layernorm", activation="gelu", bias=True, qk_norm=False, norm_eps=1e-5),
    "modern": dict(position="rotary", norm="rmsnorm", activation="swiglu", bias=False, qk_norm=True, norm_eps=1e-6),
}
ARCHITECTURES["moe"] = ARCHITECTURES["modern"] | dict(n_experts=8)


@dataclass
class GPTConfig:
    """Everything that determines the model's function and the names and shapes of its weights.

    Raises:
        ValueError: all values that are not allowed or, if there are none, all that do not go together.
    """

    vocab_size: int = option(MISSING, "how many tokens there are", at_least=1)
    d_model: int = option(768, "width of the residual stream", at_least=1)
    n_layers: int = option(12, "decoder layers", at_least=1, at_most=4096)
    n_heads: int = option(12, "query heads", at_least=1)
    d_ff: int | None = option(
        None,
        "inner width; None: 4 × d_model, for SwiGLU 8/3 × d_model, of experts divided by experts_per_token; rounded up "
        "to a multiple of 32",
        at_least=1,
    )
    max_seq_len: int = option(1024, "context, in tokens", at_least=1)
    dropout: float = option(0.0, "share that is dropped in training", at_least=0, below=1)
    pad_token_id: int = option(1, "the token that fills up rows", at_least=0)
    n_kv_heads: int | None = option(None, "key/value heads, a divisor of n_heads; None: n_heads", at_least=1)
    head_dim: int | None = option(None, "width of one head; None: d_model / n_heads", at_least=1)
    position: str = option("learned", "kind of positions", choices=POSITIONS)
    norm: str = option("layernorm", "kind of norms", choices=("layernorm", "rmsnorm"))
    activation: str = option("gelu", "kind of feed-forward networks", choices=("gelu", "swiglu"))
    bias: bool = option(True, "whether linear layers have biases; the next three may say otherwise of some")
    qkv_bias: bool | None = option(None, "whether query, key and value layers have biases; None: as bias says")
    attention_output_bias: bool | None = option(None, "whether attention's output layers have biases; None: as bias")
    mlp_bias: bool | None = option(None, "whether feed-forward networks have biases; None: as bias says")
    qk_norm: bool = option(False, "whether queries and keys pass a norm over each head")
    norm_eps: float = option(1e-5, "epsilon of all norms", above=0)
    rope_theta: float = option(10000.0, "base of the wave lengths of rotary positions", above=0)
    rope_scaling: dict[str, Any] | None = option(
        None, "what stretches rotary positions: a rope_type of ROPE_SCALINGS with its parameters; None: nothing"
    )
    tie_embeddings: bool = option(True, "whether the output layer is the token embedding")
    n_experts: int = option(0, "feed-forward networks of a layer, a few of which each token passes; 0: one", at_least=0)
    experts_per_token: int = option(2, "how many of them each token passes", at_least=1)
    balance_coef: float = option(0.01, "weight of the loss that has all experts used alike", at_least=0)
    router_z_coef: float = option(0.001, "weight of the loss that keeps the routers' logits small", at_least=0)

    def __post_init__(self) -> None:
        if self.d_ff is None:
            width = self.d_model * (8 / 3 if self.activation == "swiglu" else 4)
            width /= self.experts_per_token if self.n_experts else 1  # so that as much is computed as without experts
            self.d_ff = math.ceil(width / 32) * 32 if self.activation == "swiglu" else math.ceil(width)
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.d_model // max(1, self.n_heads)
        for name in ("qkv_bias", "attention_output_bias", "mlp_bias"):
            if getattr(self, name) is None:
                setattr(self, name, self.bias)
        if complaints := beyond_bounds(self, prefix="") or self.complaints():
            raise ValueError("; ".join(complaints))

    def complaints(self) -> list[str]:
        """What does not go together, a sentence each."""
        complaints = POSITIONS[self.position].complaints(self)
        if self.head_dim * self.n_heads != self.d_model and self.d_model % self.n_heads:
            complaints.append(f"d_model {self.d_model} must be a multiple of n_heads {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            complaints.append(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if self.pad_token_id >= self.vocab_size:
            complaints.append(f"pad_token_id {self.pad_token_id} is outside the vocabulary of {self.vocab_size}")
        if self.n_experts and self.experts_per_token > self.n_experts:
            complaints.append(f"experts_per_token {self.experts_per_token} must be at most n_experts {self.n_experts}")
        return complaints

    @classmethod
    def for_architecture(cls, architecture: str, **sizes: Any) -> GPTConfig:
        """A configuration of one of the `ARCHITECTURES` with the given sizes."""
        return cls(**{**ARCHITECTURES[architecture], **sizes})

    @classmethod
    def for_part(cls, **fields: Any) -> GPTConfig:
        """The same for a part alone, which has no vocabulary and need not have heads."""
        return cls(**{"vocab_size": 2, "n_heads": 1, **fields})


class Part(nn.Module):
    """What is made from a `GPTConfig`: from the whole one, or from those of its fields that matter, as arguments."""

    @classmethod
    def from_config(cls: type[PartClass], config: GPTConfig) -> PartClass:
        """A part with freshly initialised weights."""
        return cls(**vars(config))


# -- modules -----------------------------------------------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv:1910.07467) that stays on PyTorch's fused kernel under autocast, and in the type of its input.

    Queries and keys come in bf16 there and the weight is fp32; the kernel wants both of one type, and takes the mean
    square in fp32 whatever that is. On CUDA, autocast would compute all of it in fp32, and queries and keys would come
    out twice as large: `rms_norm` is on its list in newer versions of PyTorch.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, size) → (…, size), of the same type."""
        if x.dtype == self.weight.dtype:
            return kernels.rms_norm(x, self.weight, self.eps)
        with torch.autocast(x.device.type, enabled=False):
            return kernels.rms_norm(x, self.weight.to(x.dtype), self.eps)


def make_norm(kind: str, size: int, eps: float) -> nn.Module:
    """`layernorm` (arXiv:1607.06450) or `rmsnorm` over the last dimension."""
    return nn.LayerNorm(size, eps=eps) if kind == "layernorm" else RMSNorm(size, eps=eps)


class MultiHeadAttention(Part):
    """Causal self-attention with optional grouped key/value heads (GQA, arXiv:2305.13245) and QK-norm, an RMSNorm of
    queries and keys over each head (arXiv:2302.05442), as in Qwen3.

    The arguments are fields of `GPTConfig`; `fields` may have bias, qk_norm, norm_eps. Dropout is that of the attention
    weights.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        dropout: float = 0.0,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        config = GPTConfig.for_part(
            d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, dropout=dropout, **fields
        )
        query_width, key_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.head_dim, self.dropout = config.head_dim, config.dropout
        self.query_proj = nn.Linear(d_model, query_width, bias=config.qkv_bias)
        self.key_proj = nn.Linear(d_model, key_width, bias=config.qkv_bias)
        self.value_proj = nn.Linear(d_model, key_width, bias=config.qkv_bias)
        self.output_proj = nn.Linear(query_width, d_model, bias=config.attention_output_bias)
        self.query_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        # -1 and not n_heads: under tensor parallelism a rank holds only some of the heads
        return x.view(x.size(0), x.size(1), -1, self.head_dim).transpose(1, 2)  # (B, heads, T, K)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        rotary: torch.Tensor | None = None,
        cache: Cache | None = None,
        layer: int = 0,
    ) -> torch.Tensor:
        """Attend from x, (B, T, D), to itself and to what the cache holds; returns (B, T, D).

        Args:
            mask: where a query may look, see `attend`.
            rotary: cosines and sines of the new positions, see `apply_rotary`; None for other kinds of positions.
            cache: if given, it stores the new keys and values of this `layer` and attends to what it holds.
        """
        query = self.query_norm(self._split_heads(self.query_proj(x)))  # (B, H, T, K)
        key = self.key_norm(self._split_heads(self.key_proj(x)))  # (B, G, T, K)
        value = self._split_heads(self.value_proj(x))  # (B, G, T, K)
        if rotary is not None:
            query, key = kernels.rotate(query, rotary), kernels.rotate(key, rotary)
        if cache is None:
            attended = attend(query, key, value, mask, self.dropout if self.training else 0.0)  # (B, H, T, K)
        else:
            attended = cache.attend(layer, query, key, value, mask)  # (B, H, T, K)
        return self.output_proj(attended.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForwardNetwork(Part):
    """The position-wise network: `gelu` (tanh-approximated, as in GPT-2) or `swiglu` (arXiv:2002.05202).

    The arguments are fields of `GPTConfig`; `fields` may have activation, bias. Dropout is that of inner activations.
    """

    def __init__(self, d_model: int, d_ff: int | None = None, dropout: float = 0.0, **fields: Any) -> None:
        super().__init__()
        config = GPTConfig.for_part(d_model=d_model, d_ff=d_ff, dropout=dropout, **fields)
        self.up_proj = nn.Linear(d_model, config.d_ff, bias=config.mlp_bias)
        is_gated = config.activation == "swiglu"
        self.gate_proj = nn.Linear(d_model, config.d_ff, bias=config.mlp_bias) if is_gated else None
        self.down_proj = nn.Linear(config.d_ff, d_model, bias=config.mlp_bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) → (B, T, D)."""
        inner = self.up_proj(x)  # (B, T, d_ff)
        is_plain = self.gate_proj is None
        inner = F.gelu(inner, approximate="tanh") if is_plain else kernels.swiglu(self.gate_proj(x), inner)
        return self.down_proj(self.dropout(inner))  # (B, T, D)


class NetworksAtOnce:
    """Feed-forward networks that are alike, as one that takes each of its rows through the network which that is for.

    Args:
        rows: how the rows lie, see inference/kernels/expert_products.py.
    """

    forward = FeedForwardNetwork.forward

    def __init__(self, networks: Sequence[FeedForwardNetwork], rows: ExpertRows) -> None:
        self.dropout = networks[0].dropout
        layers = ([getattr(network, name) for network in networks] for name in LINEAR_LAYERS)
        self.up_proj, self.gate_proj, self.down_proj = (None if of[0] is None else at_once(of, rows) for of in layers)


def are_alike(networks: Iterable[FeedForwardNetwork]) -> bool:
    """Whether networks are of the same parts, which can be computed at once, and nobody listens to one of these."""
    kinds = set()
    for network in networks:
        parts = [network]
        for part in parts:  # which grows; `modules()` takes longer, and this is asked in every layer
            if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
                return False
            if "forward" in part.__dict__:
                return False
            parts += filter(None, part._modules.values())
        if type(network) is not FeedForwardNetwork or type(network.dropout) is not nn.Dropout:
            return False
        layers = [getattr(network, name) for name in LINEAR_LAYERS]
        signatures = [signature(layer) for layer in layers if layer is not None]
        if None in signatures:
            return False
        kinds.add((network.dropout.p, *signatures))
    return len(kinds) == 1


def reads_wait(device: torch.device) -> bool:
    """Whether who reads a number of a device has to wait for all that this is still to compute."""
    return device.type != "cpu"


class MixtureOfExperts(AuxiliaryLoss, Part):
    """Several feed-forward networks, the experts, of which each token passes the few that a router holds likeliest.

    Their outputs are added, weighted by the router's probabilities, which are made to sum to 1 over the chosen, as in
    Qwen3-MoE. In training, two losses of the router are minimised, too: the balance of Switch Transformer
    (arXiv:2101.03961, equations 4–6), E · Σ f_e · p_e with f_e the share of the choices that expert e is and p_e its
    mean probability, which is least where all are used alike; and the router z-loss (arXiv:2202.08906, equation 5),
    the mean of (log Σ exp logits)².

    On a CPU one expert computes after another, each the tokens that chose it. A GPU would be waited for to know how
    many these are: there all experts compute at once (inference/kernels/expert_products.py), also with adapters and
    frozen weights of 8 bits, unless they differ, have hooks, or belong to a model that does not train and decodes.

    The arguments are fields of `GPTConfig`; d_ff is the inner width of each expert.

    Attributes:
        n_chosen: how often each expert was chosen in training since somebody set this to zeros, (E,) int64, or None:
            nobody counts.
    """

    def __init__(
        self, d_model: int, n_experts: int, experts_per_token: int, d_ff: int | None = None, **fields: Any
    ) -> None:
        super().__init__()
        config = GPTConfig.for_part(
            d_model=d_model, n_experts=n_experts, experts_per_token=experts_per_token, d_ff=d_ff, **fields
        )
        self.experts_per_token = experts_per_token
        self.balance_coef, self.router_z_coef = config.balance_coef, config.router_z_coef
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.experts = nn.ModuleList(FeedForwardNetwork.from_config(config) for _ in range(n_experts))
        self.n_chosen: torch.Tensor | None = None

    def num_idle_parameters(self) -> int:
        """How many numbers a token passes by."""
        of_one = sum(parameter.numel() for parameter in self.experts[0].parameters())
        return of_one * (len(self.experts) - self.experts_per_token)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) → (B, T, D). Below, N = B · T tokens, E experts, C = `experts_per_token`."""
        tokens = x.flatten(0, -2)  # (N, D)
        routed = self.router(tokens)  # (N, E), in the type that linear layers compute in
        logits = routed.float()
        probabilities = logits.softmax(dim=-1)  # (N, E)
        weights, chosen = probabilities.topk(self.experts_per_token, dim=-1)  # (N, C)
        weights = weights / weights.sum(dim=-1, keepdim=True)  # (N, C)
        n_chosen = counts_of(chosen.flatten(), len(self.experts))  # (E,)
        if self.training:
            share = n_chosen / chosen.numel()  # (E,)
            balance = len(self.experts) * (share * probabilities.mean(dim=0)).sum()
            z_loss = logits.logsumexp(dim=-1).square().mean()
            self.add_auxiliary_loss(self.balance_coef * balance + self.router_z_coef * z_loss)
            if self.n_chosen is not None:
                self.n_chosen = self.n_chosen + n_chosen
        # A few tokens are worth no copy of all experts' weights
        is_worth_it = self.training or chosen.numel() >= BLOCK_MULTIPLE * len(self.experts)
        if reads_wait(x.device) and is_worth_it and are_alike(self.experts):
            outputs = self._at_once(tokens.to(routed.dtype), chosen.flatten())
        else:
            outputs = self._one_after_another(tokens, chosen.flatten(), n_chosen.tolist())
        outputs = outputs.view(*chosen.shape, -1)  # (N, C, D)
        return (outputs * weights.to(outputs.dtype).unsqueeze(-1)).sum(dim=1).view_as(x)

    def _one_after_another(self, tokens: torch.Tensor, chosen: torch.Tensor, n_chosen: list[int]) -> torch.Tensor:
        """The outputs (N · C, D) of tokens (N, D), each for the experts that it chose, (N · C,) in all."""
        # Each expert computes all tokens that chose it at once; in training also none, so that it always has a gradient
        order = chosen.argsort(stable=True)  # (N · C,): the choices, by expert
        inputs = tokens[order // self.experts_per_token].split(n_chosen)  # E times (n, D)
        pairs = zip(self.experts, inputs, strict=True)
        outputs = torch.cat([expert(rows) for expert, rows in pairs if self.training or len(rows)])
        return outputs[order.argsort()]

    def _at_once(self, tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The same, without knowing how many tokens chose an expert."""
        widths = {n for weight in self.experts[0].parameters() if weight.ndim == 2 for n in weight.shape}
        grouped = has_grouped_product(tokens.device, tokens.dtype, len(self.experts), *widths)
        rows = arrange(chosen, len(self.experts), grouped)
        inputs = rows.lay(tokens.repeat_interleave(self.experts_per_token, dim=0))
        return rows.lift(NetworksAtOnce(self.experts, rows).forward(inputs))


class TransformerDecoderLayer(Part):
    """Pre-norm decoder layer: x + attention(norm(x)), then x + feed_forward(norm(x)).

    The arguments are fields of `GPTConfig`. Dropout is that of both branches and of the attention weights.
    """

    def __init__(
        self, d_model: int, n_heads: int, d_ff: int | None = None, dropout: float = 0.0, **fields: Any
    ) -> None:
        super().__init__()
        config = GPTConfig.for_part(d_model=d_model, n_heads=n_heads, d_ff=d_ff, dropout=dropout, **fields)
        self.attention_norm = make_norm(config.norm, d_model, config.norm_eps)
        self.attention = MultiHeadAttention.from_config(config)
        self.feed_forward_norm = make_norm(config.norm, d_model, config.norm_eps)
        network = MixtureOfExperts if config.n_experts else FeedForwardNetwork
        self.feed_forward = network.from_config(replace(config, dropout=0.0))  # the branch has its own dropout
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        rotary: torch.Tensor | None = None,
        cache: Cache | None = None,
        layer: int = 0,
    ) -> torch.Tensor:
        """(B, T, D) → (B, T, D); the other arguments are those of `MultiHeadAttention.forward`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, rotary, cache, layer))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
