"""Choosing tokens on a GPU: as `sampling.sample_batch` does it, for all rows at once and without waiting for a number.

A request's settings come as numbers on the GPU. What a step has to do at all (draw? look at the k best?) is known
before it begins, a `Choice`, so that the steps of one `Choice` differ in their numbers only and can be recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from inference.sampling import TokenLogProb, TokenSampler, draw, nucleus_threshold


@dataclass(frozen=True)
class Choice:
    """What choosing the tokens of a step takes.

    Attributes:
        draws: whether any row draws its token; otherwise all take the likeliest.
        top_k: among how many of the best tokens the k-th of every row is; 0: no row has a top-k.
        nucleus: among how many of the best tokens every row's nucleus ends; 0: no row has a top-p.
        min_p: whether any row has a min-p.
    """

    draws: bool = False
    top_k: int = 0
    nucleus: int = 0
    min_p: bool = False

    @classmethod
    def of(cls, samplers: Sequence[TokenSampler], vocab_size: int) -> Choice:
        """What these requests need."""
        drawing = [sampler.params for sampler in samplers if not sampler.greedy]
        if not drawing:
            return cls()
        counts = [params.top_k for params in drawing if 0 < params.top_k < vocab_size]
        top_k = min(1 << (max(counts) - 1).bit_length(), vocab_size) if counts else 0  # few different numbers
        with_nucleus = any(params.top_p < 1 for params in drawing)
        within = top_k if len(counts) == len(drawing) else vocab_size
        return cls(True, top_k, within if with_nucleus else 0, any(params.min_p for params in drawing))


def numbers_of(samplers: Sequence[TokenSampler], n_rows: int, vocab_size: int) -> dict[str, np.ndarray]:
    """The settings and random numbers of a step's rows, filled up to `n_rows` with rows that take the likeliest."""
    names = ("temperature", "top_p", "min_p", "uniform")
    reals = np.tile(np.array([1.0, 1.0, 0.0, 0.0])[:, None], n_rows)  # (4, n_rows)
    counts = np.zeros((2, n_rows), dtype=np.int64)
    for row, sampler in enumerate(samplers):
        if not sampler.greedy:
            params = sampler.params
            reals[:, row] = params.temperature, params.top_p, params.min_p, sampler.uniform()
            counts[:, row] = params.top_k if params.top_k < vocab_size else 0, 1
    return {**dict(zip(names, reals, strict=True)), "top_k": counts[0], "draws": counts[1]}


def choose(
    scores: torch.Tensor, numbers: Mapping[str, torch.Tensor], choice: Choice
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row of scores (B, V) fp32, as (B,) int64, and whether its best score is finite, (B,)."""
    likeliest = scores.argmax(dim=-1)  # (B,), one of NaN if there is one
    finite = scores.gather(1, likeliest.unsqueeze(1)).squeeze(1).isfinite()
    if not choice.draws:
        return likeliest, finite
    scores = scores / numbers["temperature"].to(scores.dtype).unsqueeze(1)
    if choice.top_k:
        k = numbers["top_k"].unsqueeze(1)  # (B, 1)
        threshold = scores.topk(choice.top_k).values.gather(1, (k - 1).clamp(min=0))
        scores = scores.masked_fill((scores < threshold) & (k > 0), -torch.inf)
    if choice.nucleus:
        top_p = numbers["top_p"].to(scores.dtype)
        scores = scores.masked_fill(scores < nucleus_threshold(scores, top_p, (choice.nucleus,)), -torch.inf)
    if choice.min_p:
        threshold = scores.amax(dim=-1, keepdim=True) + numbers["min_p"].to(scores.dtype).log().unsqueeze(1)
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    drawn = draw(scores.softmax(dim=-1), numbers["uniform"])
    return torch.where(numbers["draws"] > 0, drawn, likeliest), finite


def judge(scores: torch.Tensor, token_ids: torch.Tensor, n_likeliest: int) -> torch.Tensor:
    """What `TokenLogProb` tells of a token (N,) by each row of scores (N, V), as (N, 1 + 2k) fp64: its log-probability,
    and the ids and log-probabilities of the k likeliest."""
    log_probs = scores.float().log_softmax(dim=-1)  # (N, V)
    values, ids = log_probs.topk(n_likeliest)  # (N, k) each
    return torch.cat([x.double() for x in (log_probs.gather(1, token_ids.unsqueeze(1)), ids, values)], dim=1)


def told(judged: np.ndarray, token_ids: Sequence[int], n_likeliest: int) -> list[TokenLogProb]:
    """The rows of `judge`, of the first `n_likeliest` of its tokens."""
    k = (judged.shape[1] - 1) // 2
    return [
        TokenLogProb(token_id, float(row[0]), dict(zip(row[1 : 1 + n_likeliest].astype(int).tolist(),
                                                       row[1 + k : 1 + k + n_likeliest].tolist(), strict=True)))
        for token_id, row in zip(token_ids, judged, strict=True)
    ]  # fmt: skip
