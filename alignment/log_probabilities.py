"""How likely a model finds given tokens, without ever keeping the logits of a whole batch.

The logits of 64 answers of 512 tokens over a vocabulary of 150,000 are 20 GB. Here they exist for a chunk of tokens at
a time, and a second time for the same chunk in the backward pass: peak memory grows with the chunk, not the batch.

Shapes: B rows, T tokens, D the width of the model, V the vocabulary, N tokens that are not padding.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from data_loader import Batch
from gpt_model import IGNORED_LABEL, GPTModel

LOGITS_AT_ONCE = 1 << 24  # of a chunk: 64 MiB in fp32


def token_log_probs(
    model: GPTModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    first: int = 1,
    places: torch.Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_size: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log π(token | tokens before it) of the tokens from position `first` on.

    Args:
        input_ids: (B, T) int64.
        attention_mask: (B, T), 1 for tokens and 0 for padding on either side; None if there is no padding.
        first: the position of the first token asked for, at least 1, because nothing predicts the token at 0.
        places: (N,) int64, the tokens asked for, numbered row by row among the B · (T − first) from `first` on. None:
            those that are not padding and do not follow any. To find them a GPU has to be waited for: a training step
            brings them along.
        temperature: the logits are divided by it, as they are in sampling.
        with_entropy: whether to return the entropies of the same distributions, too, in nats and without gradient.
        chunk_size: tokens whose logits exist together; 0 means as many as have `LOGITS_AT_ONCE` logits.

    Returns:
        (B, T − first) fp32 in nats, column t for `input_ids[:, first + t]`, and the entropies, of the same shape, or
        None. Both are 0 for tokens that are not asked for.
    """
    n_rows, n_columns = input_ids.size(0), input_ids.size(1) - first
    if places is None:
        asked = torch.ones_like(input_ids[:, first:], dtype=torch.bool)  # (B, T − first)
        if attention_mask is not None:
            asked = (attention_mask[:, first:] * attention_mask[:, first - 1 : -1]).bool()
        places = places_of(asked)
    before = places // n_columns * input_ids.size(1) + places % n_columns + first - 1  # (N,): the tokens before them
    hidden = model.hidden_states(input_ids, attention_mask).flatten(0, 1).index_select(0, before)  # (N, D)
    targets = input_ids.flatten().index_select(0, before + 1)  # (N,)
    size = chunk_size or max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    chunks = [
        recompute_in_backward(_of_chunk, model.lm_head, states, ids, temperature, with_entropy, use_reentrant=False)
        for states, ids in zip(hidden.split(size), targets.split(size), strict=True)
    ]

    def in_place(values: tuple[torch.Tensor, ...]) -> torch.Tensor:
        every = torch.zeros(n_rows * n_columns, device=places.device)
        return every.index_copy(0, places, torch.cat(values)).view(n_rows, n_columns)  # (B, T − first)

    log_probs, entropies = zip(*chunks, strict=True)
    return in_place(log_probs), in_place(entropies) if with_entropy else None


def answer_log_probs(
    model: GPTModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log π(answer | prompt), the sum over the answer's tokens, and how many these are.

    Args:
        input_ids, attention_mask: (B, T).
        labels: (B, T), −100 on the prompt and on padding.
        places: (N,) int64, `labelled_places(labels)`, if it is known; see `token_log_probs`.

    Returns:
        (B,) fp32 in nats, (B,) int64.
    """
    places = labelled_places(labels) if places is None else places
    log_probs, _ = token_log_probs(model, input_ids, attention_mask, places=places)  # (B, T − 1)
    return log_probs.sum(dim=1), labels[:, 1:].ne(IGNORED_LABEL).sum(dim=1)


def places_of(asked: torch.Tensor) -> torch.Tensor:
    """The numbers of the true elements of a tensor, row by row, (N,) int64."""
    return asked.flatten().nonzero().squeeze(1)


def labelled_places(labels: torch.Tensor) -> torch.Tensor:
    """Which tokens from the second on have a label: (B, T) → (N,) int64, numbered row by row among the B · (T − 1)."""
    return places_of(labels[:, 1:].ne(IGNORED_LABEL))


def with_places(batch: Batch) -> Batch:
    """A batch with `labelled_places` of all its labels: "places" for "labels", "sft_places" for "sft_labels", …"""
    labels = {name: value for name, value in batch.items() if name.endswith("labels")}
    return batch | {name.replace("labels", "places"): labelled_places(value) for name, value in labels.items()}


def _of_chunk(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of `targets` (N,) after the states `hidden` (N, D), and the entropies there: (N,), (N,)."""
    logits = head(hidden).float() / temperature  # (N, V)
    log_probs = -F.cross_entropy(logits, targets, reduction="none")  # (N,)
    if not with_entropy:
        return log_probs, None
    with torch.no_grad():
        everything = logits.log_softmax(dim=-1)  # (N, V)
        return log_probs, -(everything.exp() * everything).sum(dim=-1)
