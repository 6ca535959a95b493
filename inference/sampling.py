"""From logits to the next token: greedy, temperature, truncation, penalties, bans, seeds, log-probabilities.

A request is described by `SamplingParams`; its `TokenSampler` carries what changes while it runs (counts of tokens,
random numbers); `sample_batch` chooses the next token of many requests at once, each with settings of its own. The
order of the steps is that of `transformers`:

    logits → bias and bans → repetition penalty → presence and frequency penalties → form → ÷ temperature
           → top-k → top-p → min-p → softmax → one token by inverse CDF

Every truncation is a threshold on the scores, so tokens of equal score stay or go together. A row takes one uniform
number a step from its request's own generator, and nothing else is random: a request draws the same tokens alone, in
any batch, and after it was interrupted.
"""

from __future__ import annotations

import copy
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

GREEDY_BELOW = 1e-5  # dividing logits by less may overflow, and the likeliest token wins in any case
NUCLEUS_CANDIDATES = 1024  # the nucleus is sought among this many before the whole vocabulary is sorted
REPETITION_PENALTIES = (0.01, 100)  # lowest and highest: beyond them a logit may overflow
OVERFLOWS = ("error", "slide")


class FormState(Protocol):
    """How far one answer has come in its form."""

    def restrict(self, scores: torch.Tensor) -> None:
        """Set the scores (V,) of tokens that cannot come next to −∞, in place; one at least stays finite."""

    def accept(self, token_id: int) -> None:
        """Go on with this token."""


class Form(Protocol):
    """What an answer has to look like, such as a JSON schema or a regular expression."""

    def begin(self, max_tokens: int) -> FormState:
        """The state of an answer of at most so many tokens that has none yet."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request is to be continued; the defaults sample from the model's own distribution.

    Attributes:
        max_gen_len: at most this many new tokens.
        temperature: the logits are divided by it; 0 always takes the likeliest token (greedy).
        top_k: sample among the k likeliest tokens (arXiv:1805.04833); 0 means among all.
        top_p: sample from the smallest set of likeliest tokens whose mass reaches this (nucleus, arXiv:1904.09751).
        min_p: drop tokens whose probability is below this share of the likeliest one's (arXiv:2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of the tokens of prompt and answer (CTRL,
            arXiv:1909.05858, section 4.1); 1 changes nothing.
        presence_penalty: subtracted once from the logit of every token that the answer already has.
        frequency_penalty: subtracted from a token's logit as often as the answer has it. Both as in OpenAI's API.
        logit_bias: token id → what is added to its logit.
        banned_tokens: ids that are never produced.
        stop: strings at which the answer ends; they do not appear in its text.
        stop_token_ids: ids that end the answer, besides the tokenizer's `</s>`.
        ignore_eos: go on after `</s>`.
        seed: makes the tokens repeatable; None draws a seed from torch's global generator.
        n: how many answers, each with random numbers of its own.
        logprobs: None reports none; k reports the log-probabilities of the chosen and of the k likeliest tokens.
        prompt_logprobs: the same of the prompt's tokens, by the model alone: without temperature, penalties and biases.
        overflow: at the end of the model's context, stop with an "error" before the start, or "slide": forget the
            oldest tokens.
        form: what the answer has to look like; None leaves it free.
    """

    max_gen_len: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    overflow: str = "error"
    form: Form | None = None

    def complaints(self, vocab_size: int | None = None) -> list[str]:
        """What is wrong with these parameters, a sentence each; empty if nothing is.

        Args:
            vocab_size: of the model; None leaves out what depends on it.
        """
        unlimited = math.inf
        known_size, vocab_size = vocab_size is not None, unlimited if vocab_size is None else vocab_size
        ranges = [  # name, lowest, highest, whole numbers only
            ("max_gen_len", 1, unlimited, True),
            ("temperature", 0, unlimited, False),
            ("top_k", 0, vocab_size, True),
            ("top_p", 0, 1, False),
            ("min_p", 0, 1, False),
            ("repetition_penalty", *REPETITION_PENALTIES, False),
            ("presence_penalty", -unlimited, unlimited, False),
            ("frequency_penalty", -unlimited, unlimited, False),
            ("seed", -unlimited, unlimited, True),
            ("n", 1, unlimited, True),
            ("logprobs", 0, vocab_size, True),
            ("prompt_logprobs", 0, vocab_size, True),
        ]
        found = []
        for name, lowest, highest, whole in ranges:
            value = getattr(self, name)
            if value is None and name in ("seed", "logprobs", "prompt_logprobs"):
                continue
            if not _is_number(value, whole) or not lowest <= value <= highest or abs(value) == math.inf:
                kind = "a whole number" if whole else "a number"
                limits = "" if lowest == -unlimited else f" of at least {lowest}"
                limits = limits if highest == unlimited else f" from {lowest} to {highest}"
                is_count = name in ("top_k", "logprobs", "prompt_logprobs")
                beyond = ", the size of the vocabulary" if known_size and is_count else ""
                found.append(f"{name} must be {kind}{limits}{beyond}, not {value!r}")
        if not found:
            found += ["top_p must be above 0"] * (self.top_p == 0)
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            found.append(f"stop must be a tuple of strings of at least one character, not {self.stop!r}")
        for name in ("logit_bias", "banned_tokens", "stop_token_ids"):
            outside = [i for i in getattr(self, name) if not _is_number(i, whole=True) or not 0 <= i < vocab_size]
            if outside:
                found.append(f"{name} has {outside[0]!r}, which is no token id of a vocabulary of {vocab_size}")
        if not all(_is_number(bias) and bias < unlimited for bias in self.logit_bias.values()):
            found.append("logit_bias must map token ids to numbers; minus infinity bans a token")
        lowest = torch.finfo(torch.float32).min  # a bias below it is minus infinity among the logits
        banned = {*self.banned_tokens, *(token for token, bias in self.logit_bias.items() if bias < lowest)}
        if not found and len(banned) == vocab_size:
            found.append("banned_tokens and logit_bias ban the whole vocabulary: leave at least one token")
        if self.overflow not in OVERFLOWS:
            found.append(f"overflow must be one of {', '.join(OVERFLOWS)}, not {self.overflow!r}")
        if self.overflow == "slide" and self.prompt_logprobs is not None:
            found.append('prompt_logprobs and overflow "slide" do not go together: what slid out is not computed')
        return found


def _is_number(value: object, whole: bool = False) -> bool:
    return isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)


class TokenSampler:
    """The changing side of one answer: its random numbers, and counts of its tokens where it has penalties.

    Args:
        params: the request's parameters.
        prompt_ids: the prompt, for the repetition penalty.
        index: which of the request's `n` answers this is; each has random numbers of its own.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] = (), index: int = 0) -> None:
        self.params = params
        self.greedy = params.temperature < GREEDY_BELOW
        self.penalizes = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        self.bias = {**params.logit_bias, **dict.fromkeys(params.banned_tokens, -math.inf)}
        self._bias: tuple[torch.Tensor, torch.Tensor] | None = None  # its tokens and what they get
        self.form = None if params.form is None else params.form.begin(params.max_gen_len)
        self.prompt_ids = prompt_ids if self.penalizes else ()
        self.counts: torch.Tensor | None = None  # (2, V): whether prompt or answer has a token, how often the answer
        self.random: random.Random | None = None
        if not self.greedy:
            seed = int(torch.randint(2**62, ())) if params.seed is None else params.seed
            self.random = random.Random(f"{seed}/{index}")

    @property
    def looks_back(self) -> bool:
        """Whether a choice depends on the choices before it, and not on its scores and its random number alone."""
        return self.penalizes or self.form is not None

    @property
    def is_stateless(self) -> bool:
        """Whether each choice depends on its scores alone."""
        return self.greedy and not self.looks_back

    def uniform(self) -> float:
        """The random number of the next step, in [0, 1); a greedy request needs none."""
        return self.random.random() if self.random else 0.0

    def ahead(self) -> TokenSampler:
        """A copy that draws with the same numbers without taking them from this one, holds to no form and reports
        nothing: it guesses what this one will draw from other scores."""
        twin = copy.copy(self)
        twin.form, twin.params = None, replace(self.params, logprobs=None)
        if self.random is not None:
            twin.random = random.Random()
            twin.random.setstate(self.random.getstate())
        if self.counts is not None:
            twin.counts = self.counts.clone()
        return twin

    def adjust(self, scores: torch.Tensor) -> None:
        """Add bias and bans to one row of scores (V,), subtract penalties, and leave what the form allows; in place."""
        params = self.params
        if self.bias:
            if self._bias is None:  # once, as sending it to a GPU takes a while
                ids = torch.tensor(list(self.bias), device=scores.device)
                self._bias = ids, torch.tensor(list(self.bias.values()), device=scores.device)
            ids, added = self._bias
            scores.index_add_(0, ids, added)
        if self.penalizes:
            if self.counts is None:
                self.counts = scores.new_zeros(2, len(scores))
                self.counts[0, list(self.prompt_ids)] = 1
            seen, produced = self.counts
            penalized = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
            torch.where(seen > 0, penalized, scores, out=scores)
            scores -= params.frequency_penalty * produced + params.presence_penalty * (produced > 0)
        if self.form is not None:
            self.form.restrict(scores)

    def record(self, token_id: int) -> None:
        """Count a token that was produced."""
        if self.form is not None:
            self.form.accept(token_id)
        if self.counts is not None:
            self.counts[0, token_id] = 1
            self.counts[1, token_id] += 1


@dataclass(frozen=True)
class TokenLogProb:
    """How likely a token was, in nats, under penalties and temperature but before any truncation.

    Greedy requests report temperature 1.

    Attributes:
        token_id, log_prob: the chosen token; of a prompt's first one, which comes after nothing, None.
        likeliest: the k likeliest tokens and their log-probabilities, best first.
    """

    token_id: int
    log_prob: float | None
    likeliest: dict[int, float]


@dataclass(frozen=True)
class SampledTokens:
    """What `sample_batch` chose.

    Attributes:
        token_ids: one id a row.
        finite: False for a row whose logits held NaN or infinity, or no token that is allowed; its id means nothing.
        log_probs: for each row what its request asked to report, or None.
    """

    token_ids: list[int]
    finite: list[bool]
    log_probs: list[TokenLogProb | None]


@torch.no_grad()
def sample_batch(logits: torch.Tensor, samplers: Sequence[TokenSampler]) -> SampledTokens:
    """The next token of each row of logits (B, V), by the settings of the row's own sampler."""
    scores = logits.detach().float()  # (B, V)
    adjusted = [row for row, sampler in enumerate(samplers) if sampler.penalizes or sampler.bias or sampler.form]
    if adjusted:
        scores = scores.clone()  # the caller's logits stay as they are
        for row in adjusted:
            samplers[row].adjust(scores[row])
    chosen, finite = _likeliest(scores)  # right for greedy rows; the others are drawn below
    # Rows of one top-k go together: each looks at its own candidates only, a few in place of the whole vocabulary, and
    # computes the same whichever rows stand beside it
    groups: dict[int, list[int]] = defaultdict(list)  # top-k → rows
    for row, sampler in enumerate(samplers):
        if not sampler.greedy:
            groups[sampler.params.top_k].append(row)
    for top_k, same in groups.items():
        for rows, candidates in _candidates(scores, same, top_k):
            these = _rows(scores, rows)  # (b, V)
            these = these if candidates is None else these.gather(1, candidates)  # (b, k)
            index = _drawn(these, [samplers[row] for row in rows])  # (b,)
            drawn = index if candidates is None else candidates.gather(1, index.unsqueeze(1)).squeeze(1)  # (b,) ids
            for row, token_id in zip(rows, drawn.tolist(), strict=True):
                chosen[row] = token_id
    for row in adjusted:
        samplers[row].record(chosen[row])
    return SampledTokens(chosen, finite, _reported(scores, chosen, samplers))


def _likeliest(scores: torch.Tensor) -> tuple[list[int], list[bool]]:
    """The token with the best score in each row of (B, V), or one whose score is NaN; and whether that is finite."""
    if scores.device.type == "cpu":  # NumPy takes a tenth of the time
        values = scores.numpy()
        token_ids = values.argmax(axis=-1)  # (B,)
        return token_ids.tolist(), np.isfinite(values[np.arange(len(values)), token_ids]).tolist()
    ids = scores.argmax(dim=-1, keepdim=True)  # (B, 1)
    return ids.squeeze(1).tolist(), scores.gather(1, ids).squeeze(1).isfinite().tolist()


def _rows(scores: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return scores if len(rows) == len(scores) else scores[rows]


def _candidates(
    scores: torch.Tensor, rows: list[int], top_k: int
) -> list[tuple[list[int], torch.Tensor | None]]:
    """The rows that have this top-k, with the tokens that it leaves, (b, k) in the order of their ids; with None those
    for which all tokens must be looked at: without top-k, or where more tokens are as good as the last one left.

    How a row is computed does not depend on the others.
    """
    if not 0 < top_k < scores.size(-1):
        return [(rows, None)]
    best, ids = _rows(scores, rows).topk(top_k + 1)  # (b, k + 1) each: the one too many tells of a tie
    tied = (best[:, -1] == best[:, -2]).tolist()
    few = [index for index in range(len(rows)) if not tied[index]]
    more = [row for row, is_tied in zip(rows, tied, strict=True) if is_tied]
    # In the order of ids, as `draw` goes through the whole vocabulary: the same number draws the same token either way
    parts = [([rows[index] for index in few], _rows(ids, few)[:, :top_k].sort(dim=-1).values), (more, None)]
    return [part for part in parts if part[0]]


def _drawn(scores: torch.Tensor, samplers: Sequence[TokenSampler]) -> torch.Tensor:
    """An index into each row of scores (B, V), by its sampler's temperature, truncations and random number; (B,)."""
    params = [sampler.params for sampler in samplers]
    temperatures = [p.temperature for p in params]
    if set(temperatures) != {1.0}:  # dividing by 1 changes nothing: it is left out where all rows have it
        scores = scores / scores.new_tensor(temperatures).unsqueeze(1)  # (B, V)
    top_k = [p.top_k if p.top_k < scores.size(-1) else 0 for p in params]
    scores = truncate(scores, top_k, [p.top_p for p in params], [p.min_p for p in params])
    uniforms = torch.tensor([sampler.uniform() for sampler in samplers], dtype=torch.float64)  # (B,)
    return draw(scores.softmax(dim=-1), uniforms)


def _reported(
    scores: torch.Tensor, chosen: Sequence[int], samplers: Sequence[TokenSampler]
) -> list[TokenLogProb | None]:
    reported: list[TokenLogProb | None] = [None] * len(samplers)
    for row, sampler in enumerate(samplers):
        if sampler.params.logprobs is not None:
            temperature = 1.0 if sampler.greedy else sampler.params.temperature
            one = slice(row, row + 1)
            (reported[row],) = log_probs_of(scores[one] / temperature, chosen[one], sampler.params.logprobs)
    return reported


def log_probs_of(scores: torch.Tensor, token_ids: Sequence[int], n_likeliest: int) -> list[TokenLogProb]:
    """How likely a token is by each row of scores (N, V), and which are the likeliest."""
    log_probs = scores.float().log_softmax(dim=-1)  # (N, V)
    own = log_probs.gather(1, torch.tensor(token_ids, device=scores.device).unsqueeze(1)).squeeze(1)  # (N,)
    values, ids = log_probs.topk(n_likeliest)  # (N, k) each
    rows = zip(token_ids, own.tolist(), ids.tolist(), values.tolist(), strict=True)
    return [TokenLogProb(one, log_prob, dict(zip(*top, strict=True))) for one, log_prob, *top in rows]


def sample_next(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One token id for each row of logits (B, V), as (B,) int64; all rows have the same settings and one generator.

    Temperature 0 is greedy, top_k 0 means every token.
    """
    if temperature < GREEDY_BELOW:
        return logits.argmax(dim=-1)
    batch_size, vocab_size = logits.shape
    scores = logits.float() / temperature
    scores = truncate(scores, [min(top_k, vocab_size)] * batch_size, [1.0] * batch_size, [0.0] * batch_size)
    uniforms = torch.rand(batch_size, generator=generator, device=logits.device)
    return draw(scores.softmax(dim=-1), uniforms)


def truncate(
    scores: torch.Tensor, top_k: Sequence[int], top_p: Sequence[float], min_p: Sequence[float]
) -> torch.Tensor:
    """Scores (B, V) with −∞ for the tokens that top-k, then top-p, then min-p remove; one setting of each a row."""
    if any(top_k):
        k = torch.tensor([count or scores.size(-1) for count in top_k], device=scores.device).unsqueeze(1)  # (B, 1)
        widest = max(top_k) if all(top_k) else scores.size(-1)
        threshold = scores.topk(widest).values.gather(1, k - 1)  # (B, 1), the k-th best score
        scores = scores.masked_fill(scores < threshold, -math.inf)
    if any(p < 1 for p in top_p):
        scores = scores.masked_fill(scores < nucleus_threshold(scores, scores.new_tensor(top_p)), -math.inf)
    if any(min_p):
        # p < min_p · p_max, in logarithms: no sum over the vocabulary is needed
        threshold = scores.amax(dim=-1, keepdim=True) + scores.new_tensor(min_p).log().unsqueeze(1)  # (B, 1)
        scores = scores.masked_fill(scores < threshold, -math.inf)
    return scores


def nucleus_threshold(scores: torch.Tensor, top_p: torch.Tensor, widths: Sequence[int] = ()) -> torch.Tensor:
    """The lowest score in the nucleus of each row (B, 1): before it, the likelier tokens hold less than top_p (B,).

    Args:
        widths: among how many of the best tokens to look for its end, one number after the other until it is found;
            the last one must be enough.
    """
    vocab_size = scores.size(-1)
    widths = widths or (min(NUCLEUS_CANDIDATES, vocab_size), vocab_size)
    # Sorting a whole vocabulary takes long, and nearly every nucleus ends among the first
    for width in widths:
        ordered = scores.topk(width).values  # (B, width), best first
        probabilities = (ordered - scores.logsumexp(dim=-1, keepdim=True)).exp()
        inside = probabilities.cumsum(dim=-1) - probabilities < top_p.unsqueeze(1)  # (B, width)
        inside[:, 0] = True  # something is left even of a row of NaN
        if width == widths[-1] or not inside[top_p < 1, -1].any():
            break  # every nucleus ends among the candidates
    threshold = ordered.masked_fill(~inside, math.inf).amin(dim=-1, keepdim=True)  # (B, 1), the last score inside
    return threshold.masked_fill(top_p.unsqueeze(1) == 1, -math.inf)


def draw(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """One index for each row of probabilities (B, V), by inverse CDF from uniforms (B,) in [0, 1); as (B,) int64.

    The first index whose cumulative probability exceeds the uniform number is taken, so one of probability 0 never is.
    """
    if probabilities.device.type == "mps":  # which has no 64-bit numbers
        return draw(probabilities.cpu(), uniforms.cpu()).to(probabilities.device)
    # In 64 bits, as 32 cannot tell apart the numbers just below 1
    cdf = probabilities.cumsum(dim=-1, dtype=torch.float64)  # (B, V)
    target = uniforms.to(cdf).unsqueeze(1) * cdf[:, -1:]  # (B, 1)
    index = torch.searchsorted(cdf, target, right=True).squeeze(1)  # (B,)
    return index.clamp(max=probabilities.size(-1) - 1)  # a row of NaN would point beyond the end
