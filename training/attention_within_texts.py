"""Attention of several texts in a row, each to itself: on a GPU, by PyTorch's flash attention to texts of any lengths.

Apart from transformer_components.py, as importing PyTorch's function takes a second, which a CPU need not wait.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

# What makes it causal, by the names of newer and of older versions
IS_NEWER = "window_size" in inspect.signature(varlen_attn).parameters
CAUSAL: dict[str, Any] = {"window_size": (-1, 0)} if IS_NEWER else {"is_causal": True}


def attend_within_texts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor
) -> torch.Tensor:
    """Causal attention of each text to itself, of queries (B, H, T, K), keys and values (B, G, T, K), as (B, H, T, K).

    Args:
        bounds: see `transformer_components.text_bounds`.
    """
    n_rows, length, groups = query.size(0), query.size(2), query.size(1) // key.size(1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    tokens = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B · T, H, K) each
    attended = varlen_attn(*tokens, bounds, bounds, length, length, **CAUSAL)  # no text is longer than a row
    return attended.unflatten(0, (n_rows, length)).transpose(1, 2)
