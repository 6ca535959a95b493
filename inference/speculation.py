"""Speculative decoding (arXiv:2211.17192): several tokens of an answer from one pass of the model.

A drafter proposes what may come next, by a cheaper way than the model. The engine then computes the proposed tokens
together with the answer's next one, which takes hardly longer where a pass mostly reads weights, and `verify` keeps
those that the model would have chosen itself.

The rule is one for all: each token is chosen from the model's own logits, with the request's own settings and its own
random numbers, one a token, as without a draft; a drafted token is right if it is the one that was chosen. So an answer
has the same tokens with any drafter and with none, greedy or sampled ("drafter-invariant", arXiv:2408.07978), whatever
is decided here from measured times. A draft that is not drawn at random is accepted as often as by the rule of
arXiv:2211.17192: with the probability that the model gives the token.

`Speculation` decides how many tokens are worth drafting. `PromptLookup` drafts from the text so far, `DraftModel`
(draft_model.py) with a smaller model.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Protocol

import torch

from inference.paged_cache import PagedCache
from inference.request import Request, Span
from inference.sampling import SampledTokens, TokenSampler, sample_batch

MOST = 15  # drafted tokens of a request in a pass
LONGEST = 4  # tokens that are looked up together
REST = 8  # passes without a look at drafts, once none was worth its time
PROBE_EVERY = 8  # looks at a draft that would not pay: after so many, two are made all the same, as times change,
PROBE_SHARE = 0.02  # or after more, so that reading contexts for them takes at most this share of the time
PROBES = 1, 4  # their tokens: the first also reads what is new in a context, the second shows what tokens cost
HELD_UP = 1.1  # times the expected seconds
FADE = 0.97  # what an observation counts for when the next one comes

Wanted = Sequence[tuple[Request, int]]  # requests, and at most how many tokens to draft for each


class Drafter(Protocol):
    """Proposes tokens; made for one engine, whose thread alone calls it."""

    def propose(self, wanted: Wanted) -> list[list[int]]:
        """What may come next in each of these answers: as many tokens as are wanted, fewer, or none."""

    def drop(self, request: Request) -> None:
        """Forget a request: it has ended, gave its memory to another one or lost the beginning of its context."""


# -- looking it up -----------------------------------------------------------------------------------------------------


class PromptLookup:
    """Proposes what followed when the last tokens stood in the prompt or the answer before.

    It costs next to nothing, and is right where answers repeat: names of the question, quotations, code, tables.
    """

    def __init__(self) -> None:
        self.texts: dict[Request, IndexedText] = {}

    def propose(self, wanted: Wanted) -> list[list[int]]:
        """See `Drafter.propose`."""
        drafts = []
        for request, most in wanted:
            text = self.texts.setdefault(request, IndexedText())
            n_prompt = len(request.prompt_ids)
            if not text.ids:
                text.extend(request.prompt_ids)
            text.extend(request.token_ids[len(text.ids) - n_prompt :])
            drafts.append(text.continuation(most))
        return drafts

    def drop(self, request: Request) -> None:
        """See `Drafter.drop`."""
        self.texts.pop(request, None)


class IndexedText:
    """Tokens, and where each run of up to `LONGEST` of them last stood with another token after it."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.follower: dict[tuple[int, ...], int] = {}  # run of tokens → the place after it

    def extend(self, ids: Sequence[int]) -> None:
        """Add tokens at the end."""
        for token_id in ids:
            end = len(self.ids)
            for start in range(max(0, end - LONGEST), end):
                self.follower[tuple(self.ids[start:])] = end
            self.ids.append(token_id)

    def continuation(self, n_tokens: int) -> list[int]:
        """So many tokens as followed the longest run that ends the text and stood in it before; [] if none did."""
        for start in range(max(0, len(self.ids) - LONGEST), len(self.ids)):
            place = self.follower.get(tuple(self.ids[start:]))
            if place is not None:  # a text that repeats itself goes on with its own draft
                period = len(self.ids) - place
                return [self.ids[place + index % period] for index in range(n_tokens)]
        return []


# -- what is right -----------------------------------------------------------------------------------------------------


def verify(
    logits: torch.Tensor, samplers: Sequence[TokenSampler], drafts: Sequence[Sequence[int]]
) -> list[SampledTokens]:
    """The tokens that each request goes on with: those of its draft that are right, and one more.

    Args:
        logits: (R, V), of each request a row after its context and one after each token of its draft.
        samplers: of the requests; each takes as many random numbers as it gets tokens.
        drafts: of the requests; they may be empty.

    Returns:
        for each request its tokens, of which the last one is not finite if a row was not.
    """
    first_rows, n_rows = [], 0
    for draft in drafts:
        first_rows.append(n_rows)
        n_rows += 1 + len(draft)
    if all(sampler.is_stateless for sampler in samplers):  # one choice for all rows is quicker than one a token
        return right_tokens(sample_batch(logits, one_a_row(samplers, drafts)), drafts)
    chosen = [SampledTokens([], [], []) for _ in samplers]
    going = list(range(len(samplers)))  # the requests whose draft was right so far
    step = 0  # how many tokens these have
    while going:
        rows = [first_rows[index] + step for index in going]
        all_rows = len(rows) == len(logits)
        sampled = sample_batch(logits if all_rows else logits[rows], [samplers[index] for index in going])
        still_going = []
        for row, index in enumerate(going):
            token_id, finite, draft = sampled.token_ids[row], sampled.finite[row], drafts[index]
            chosen[index].token_ids.append(token_id)
            chosen[index].finite.append(finite)
            chosen[index].log_probs.append(sampled.log_probs[row])
            if finite and step < len(draft) and draft[step] == token_id:
                still_going.append(index)
        going, step = still_going, step + 1
    return chosen


def one_a_row(samplers: Sequence[TokenSampler], drafts: Sequence[Sequence[int]]) -> list[TokenSampler]:
    """The samplers of the rows of `verify`, for one choice of them all: where there is a draft, a copy that draws with
    the request's next random numbers and takes none. None of them may look back."""
    rows = []
    for sampler, draft in zip(samplers, drafts, strict=True):
        if draft and not sampler.greedy:
            sampler, own = sampler.ahead(), sampler
            sampler.params = own.params
        rows += [sampler] * (1 + len(draft))
    return rows


def right_tokens(rows: SampledTokens, drafts: Sequence[Sequence[int]]) -> list[SampledTokens]:
    """What `verify` returns, of the choices of all rows at once."""
    chosen, row = [], 0
    for draft in drafts:
        end = row
        for following in (*draft, None):
            end += 1
            if not rows.finite[end - 1] or rows.token_ids[end - 1] != following:
                break
        chosen.append(SampledTokens(rows.token_ids[row:end], rows.finite[row:end], rows.log_probs[row:end]))
        row += 1 + len(draft)
    return chosen


# -- what pays ---------------------------------------------------------------------------------------------------------


class Acceptance:
    """Which share of the drafted tokens was right, among those that were looked at: the first wrong one ends a draft.

    Args:
        rate: what it is taken for at first, as if `tried` tokens had shown it.
    """

    def __init__(self, rate: float = 0.5, tried: float = 4.0) -> None:
        self.accepted, self.tried = rate * tried, tried

    @property
    def rate(self) -> float:
        """The share, from 0 to 1."""
        return self.accepted / self.tried

    def add(self, n_drafted: int, n_accepted: int) -> None:
        """Take one more draft."""
        self.accepted = FADE * self.accepted + n_accepted
        self.tried = FADE * self.tried + min(n_drafted, n_accepted + 1)


class Cost:
    """Seconds as a straight line in the number of tokens: least squares over what was measured, older times counting
    less.

    Attributes:
        token_seconds: its slope, what one more token costs.
    """

    def __init__(self) -> None:
        self.weight = self.mean_tokens = self.mean_seconds = 0.0
        self.variance = self.covariance = 0.0  # of the number of tokens, and of it and the seconds; times the weight
        self.token_seconds = 0.0

    def add(self, n_tokens: int, seconds: float) -> None:
        """Take one more time; one that was held up, as by other programs, counts as slightly more than expected."""
        if self.weight:
            seconds = min(seconds, HELD_UP * self.seconds(n_tokens))
        self.weight = FADE * self.weight + 1
        from_mean = n_tokens - self.mean_tokens
        self.mean_tokens += from_mean / self.weight
        self.mean_seconds += (seconds - self.mean_seconds) / self.weight
        self.variance = FADE * self.variance + from_mean * (n_tokens - self.mean_tokens)
        self.covariance = FADE * self.covariance + from_mean * (seconds - self.mean_seconds)
        if self.variance > 0.5:  # otherwise too few had another number of tokens
            self.token_seconds = max(0.0, self.covariance / self.variance)

    def seconds(self, n_tokens: int) -> float:
        """Of so many tokens; 0 as long as nothing is known."""
        return max(self.mean_seconds / 2, self.mean_seconds + self.token_seconds * (n_tokens - self.mean_tokens))


class Speculation:
    """A drafter, and how many tokens it is worth asking it for.

    Attributes:
        passes, drafts: what passes and drafts cost; not what a drafter takes to read a context that is new to it.
        overall: the acceptance of all requests.
        resting: for how many passes nobody is asked.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.passes, self.drafts = drafter, Cost(), Cost()
        self.overall = Acceptance()
        self._own: dict[Request, Acceptance] = {}
        self.resting = 0
        self._n_not_worth, self._probe_after = 0, PROBE_EVERY
        self._probed: Request | None = None  # for which the first probe has been made

    def extended(
        self, spans: Sequence[Span], cache: PagedCache, n_running: int, end_token_ids: Collection[int]
    ) -> list[Span]:
        """The spans, with what the drafter proposes to come after the next token of answers.

        Drafts take no memory that others will need: no request gives way for one, and a block is left for each.

        Args:
            cache: of the engine, with `n_running` requests in it.
            end_token_ids: after which an answer has ended unless it is to go on.
        """
        followed = {request for request, _ in spans if request.draft}  # what the drafter has of these is not old
        for request, _ in spans:
            request.draft = []
        if self.resting:
            self.resting -= 1
            return spans
        began, context = time.perf_counter(), cache.config.max_seq_len
        wanted = []
        for request, _ in spans:
            left = min(request.params.max_gen_len - len(request.token_ids), context - len(request.context))
            is_next = request.sequence.length + 1 == len(request.context)
            if is_next and left > 1:  # the pass brings one token more than are drafted
                wanted.append((request, left - 1))
        n_tokens = sum(n_new for _, n_new in spans)
        lengths = self.lengths(wanted, n_tokens, len(spans))
        if not any(lengths):
            self.resting = REST if wanted and self.passes.weight else 0
            return spans
        wanted = [
            (request, min(length, cache.stretch(request.sequence, 1 + length, n_running) - 1))
            for (request, _), length in zip(wanted, lengths, strict=True)
            if length
        ]
        for (request, _), draft in zip(wanted, self.drafter.propose(wanted), strict=True):
            ends = request.params.stop_token_ids, () if request.params.ignore_eos else end_token_ids
            end = next((at for at, token_id in enumerate(draft) if any(token_id in each for each in ends)), len(draft))
            request.draft = draft[:end]  # nothing comes after an end
        n_drafted, seconds = sum(len(request.draft) for request, _ in wanted), time.perf_counter() - began
        if n_drafted and all(request in followed for request, _ in wanted):
            self.drafts.add(n_drafted, seconds)
        elif n_drafted and self.passes.weight:  # a context was to be read first
            between_looks = (REST + 1) * max(1e-9, self.passes.seconds(n_tokens))
            self._probe_after = max(PROBE_EVERY, round(seconds / PROBE_SHARE / between_looks))
        return sorted(((request, n_new + len(request.draft)) for request, n_new in spans), key=lambda span: span[1])

    def lengths(self, wanted: Wanted, n_tokens: int, n_answers: int) -> list[int]:
        """How many tokens to draft for each request, so that tokens come fastest.

        The chance that the k-th token of a draft is right is the k-th power of the request's acceptance. All lengths
        are weighed, as the first token of a draft may cost more than the others.

        Args:
            wanted: the most for each request.
            n_tokens, n_answers: of the pass without drafts: its tokens, and how many answers it lengthens by one.
        """
        expected, seconds = float(n_answers), self.passes.seconds(n_tokens)
        lengths = []
        for request, most in wanted:
            chance = rate = self.acceptance_of(request).rate
            best = 0, expected, seconds  # the length, and the tokens that it promises in so many seconds
            with_draft, until = expected, seconds + self.drafts.seconds(1) - self.drafts.token_seconds
            for length in range(1, min(most, MOST) + 1):
                with_draft, chance = with_draft + chance, chance * rate
                until += self.passes.token_seconds + self.drafts.token_seconds
                if with_draft * best[2] > best[1] * until:
                    best = length, with_draft, until
            length, expected, seconds = best
            if not length and self.passes.weight:
                self._n_not_worth += 1
                if request is self._probed:
                    length, self._probed = min(PROBES[1], most), None
                elif self._n_not_worth >= self._probe_after:
                    length, self._probed, self._n_not_worth = PROBES[0], request, 0
            lengths.append(length)
        return lengths

    def acceptance_of(self, request: Request) -> Acceptance:
        """Its own, which begins as that of all requests so far."""
        if request not in self._own:
            self._own[request] = Acceptance(self.overall.rate)
        return self._own[request]

    def passed(self, n_tokens: int, seconds: float) -> None:
        """A pass of so many tokens has taken so long."""
        if not self.resting:
            self.passes.add(n_tokens, seconds)

    def verified(self, request: Request, n_drafted: int, n_accepted: int) -> None:
        """So many of a request's drafted tokens were right."""
        for acceptance in (self.overall, self.acceptance_of(request)):
            acceptance.add(n_drafted, n_accepted)

    def drop(self, request: Request) -> None:
        """Forget a request, see `Drafter.drop`; the next one may be worth a draft."""
        self.drafter.drop(request)
        self._own.pop(request, None)
        self.resting = 0
