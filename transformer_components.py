"""The parts of a Transformer: attention, feed-forward network, norms, positions, the decoder layer and the KV cache.

Shapes are written with these letters: B batch, T new tokens, S all tokens that can be attended to (cached + new),
D = d_model, H heads, G key/value heads (G divides H), K = head_dim, V = vocabulary.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F


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
            tokens, which is right only without a past (or for a single new token).
        dropout: the share of attention weights that are dropped.
    """
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        # SDPA aligns its causal mask upper-left: with a past, one new query would see the first key only
        is_causal=mask is None and query.size(2) > 1,
        enable_gqa=query.size(1) != key.size(1),
    )


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


def sinusoidal_positions(max_seq_len: int, d_model: int) -> torch.Tensor:
    """The fixed position table of "Attention Is All You Need" (arXiv:1706.03762, section 3.5), (max_seq_len, D)."""
    position = torch.arange(max_seq_len, dtype=torch.float32).unsqueeze(1)  # (max_seq_len, 1)
    frequency = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float32) * (-math.log(10000.0) / d_model))
    table = torch.zeros(max_seq_len, d_model)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)[:, : d_model // 2]
    return table


def rotary_angles(max_seq_len: int, head_dim: int, theta: float) -> torch.Tensor:
    """Cosines and sines of rotary position embedding (RoFormer, arXiv:2104.09864), (2, max_seq_len, K).

    The two halves of a head are rotated against each other, as Llama's and Qwen's public weights expect.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # (K/2,)
    angle = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequency)  # (max_seq_len, K/2)
    angle = torch.cat((angle, angle), dim=-1)  # (max_seq_len, K)
    return torch.stack((angle.cos(), angle.sin()))


def apply_rotary(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, heads, T, K) by `rotary` (2, T, K) or, with positions of its own for each row, (2, B, 1, T, K)."""
    cos, sin = rotary.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv:1910.07467) that stays on PyTorch's fused kernel under autocast.

    There the input is bf16 and the weight fp32, and the kernel wants both of one type.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, size) → (…, size)."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(kind: str, size: int, eps: float) -> nn.Module:
    """`layernorm` (arXiv:1607.06450) or `rmsnorm` over the last dimension."""
    return nn.LayerNorm(size, eps=eps) if kind == "layernorm" else RMSNorm(size, eps=eps)


class MultiHeadAttention(nn.Module):
    """Causal self-attention with optional grouped key/value heads (GQA, arXiv:2305.13245) and QK-norm.

    Args:
        d_model: width of the residual stream.
        n_heads: query heads.
        n_kv_heads: key/value heads, a divisor of `n_heads`; None means as many as query heads.
        head_dim: width of one head; None means d_model / n_heads.
        dropout: dropout of the attention weights, in training only.
        bias: whether the four projections have biases.
        qk_norm: whether queries and keys pass an RMSNorm over each head (arXiv:2302.05442), as in Qwen3.
        norm_eps: epsilon of that norm.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        n_kv_heads = n_kv_heads or n_heads
        if head_dim is None and d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not divisible by n_heads {n_heads}")
        if n_heads % n_kv_heads:
            raise ValueError(f"n_heads {n_heads} is not divisible by n_kv_heads {n_kv_heads}")
        self.head_dim = head_dim or d_model // n_heads
        self.dropout = dropout
        self.query_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=bias)
        self.key_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias)
        self.value_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias)
        self.output_proj = nn.Linear(n_heads * self.head_dim, d_model, bias=bias)
        self.query_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else nn.Identity()

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
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        if cache is None:
            attended = attend(query, key, value, mask, self.dropout if self.training else 0.0)  # (B, H, T, K)
        else:
            attended = cache.attend(layer, query, key, value, mask)  # (B, H, T, K)
        return self.output_proj(attended.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForwardNetwork(nn.Module):
    """The position-wise network: `gelu` (tanh-approximated, as in GPT-2) or `swiglu` (arXiv:2002.05202).

    Args:
        d_model: width of the residual stream.
        d_ff: inner width.
        dropout: dropout of the inner activations, in training only.
        activation: "gelu" or "swiglu".
        bias: whether the layers have biases.
    """

    def __init__(
        self, d_model: int, d_ff: int, dropout: float = 0.0, activation: str = "gelu", bias: bool = True
    ) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias) if activation == "swiglu" else None
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) → (B, T, D)."""
        inner = self.up_proj(x)  # (B, T, d_ff)
        inner = F.gelu(inner, approximate="tanh") if self.gate_proj is None else F.silu(self.gate_proj(x)) * inner
        return self.down_proj(self.dropout(inner))  # (B, T, D)


class TransformerDecoderLayer(nn.Module):
    """Pre-norm decoder layer: x + attention(norm(x)), then x + feed_forward(norm(x)).

    Args:
        d_model, n_heads, d_ff, dropout: sizes, and dropout of both branches in training.
        n_kv_heads, head_dim, bias, qk_norm: see `MultiHeadAttention`.
        norm: "layernorm" or "rmsnorm".
        activation: "gelu" or "swiglu".
        norm_eps: epsilon of every norm.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        dropout: float = 0.0,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        norm: str = "layernorm",
        activation: str = "gelu",
        bias: bool = True,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.attention_norm = make_norm(norm, d_model, norm_eps)
        self.attention = MultiHeadAttention(d_model, n_heads, n_kv_heads, head_dim, dropout, bias, qk_norm, norm_eps)
        self.feed_forward_norm = make_norm(norm, d_model, norm_eps)
        self.feed_forward = FeedForwardNetwork(d_model, d_ff, 0.0, activation, bias)
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
