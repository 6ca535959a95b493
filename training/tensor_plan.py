"""Tensor parallelism (Megatron-LM, arXiv:1909.08053, section 3): how the matrices of a layer are cut into parts.

The first matrices of both branches are cut by their outputs, so a part has whole heads, and the last by its inputs; the
parts' results add up to the branch's. Embeddings and norms stay whole. Training cuts with PyTorch's distributed tensors
(parallel_model.py); serving needs no gradients and cuts with plain ones (inference/tensor_parallel.py).
"""

from __future__ import annotations

from gpt_model import GPTConfig

# By their names in a layer
BY_OUTPUTS = (
    *(f"attention.{name}_proj" for name in ("query", "key", "value")),
    *(f"feed_forward.{name}_proj" for name in ("gate", "up")),
)
BY_INPUTS = ("attention.output_proj", "feed_forward.down_proj")
DIVIDED = ("n_heads", "n_kv_heads", "d_ff")  # of a model's configuration, what a part has its share of


def indivisible(config: GPTConfig, n_parts: int) -> str | None:
    """Which of `DIVIDED` a model's layers cannot be divided by; None: they can be."""
    return next((name for name in DIVIDED if getattr(config, name) % n_parts), None)
