"""Beam search: the answers of highest probability that a search of bounded width finds, with a KV cache.

Where sampling goes one way, beam search follows the `num_beams` likeliest beginnings at once. An answer of n tokens
(its closing token included) is scored by

    score = Σ log p(token | what precedes it) / n ^ length_penalty

so a penalty of 0 compares plain log-probabilities, and a higher one favours longer answers. With several groups
(diverse beam search, arXiv:1610.02424, algorithm 1, Hamming diversity) the beams are split, and a group pays
`diversity_penalty` for a token as often as the groups before it chose the same one in the same step.

Candidates, lengths and the rules for stopping are those of `transformers`, whose results these are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from command_line import UserError
from gpt_model import GPTModel

EARLY_STOPPING = (False, True, "never")


@dataclass(frozen=True)
class BeamSettings:
    """How to search.

    Attributes:
        num_beams: beginnings that are followed at once, all groups together.
        length_penalty: exponent of the length in the score.
        early_stopping: True ends as soon as there are `num_beams` finished answers; False when no beam's score at its
            present length beats the worst of them; "never" when none can beat it at any length.
        num_beam_groups: groups of beams, a divisor of `num_beams`.
        diversity_penalty: the price of a token that an earlier group has chosen in the same step.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    @property
    def width(self) -> int:
        """The beams of one group."""
        return self.num_beams // self.num_beam_groups

    def complaints(self, n: int = 1) -> list[str]:
        """What is wrong with these settings for a search that is to return n answers, a sentence each."""
        found = []
        if self.num_beams < 1:
            found.append(f"num_beams must be at least 1, not {self.num_beams}")
        if not 1 <= n <= max(1, self.num_beams):
            found.append(f"n must be from 1 to num_beams, {self.num_beams}, not {n}")
        if self.num_beam_groups < 1 or self.num_beams % self.num_beam_groups:
            found.append(f"num_beams {self.num_beams} must be a multiple of num_beam_groups {self.num_beam_groups}")
        if not abs(self.length_penalty) < float("inf"):
            found.append(f"length_penalty must be a finite number, not {self.length_penalty}")
        if not 0 <= self.diversity_penalty < float("inf"):
            found.append(f"diversity_penalty must be a number of at least 0, not {self.diversity_penalty}")
        if self.early_stopping not in EARLY_STOPPING:
            found.append(f"early_stopping must be one of False, True and 'never', not {self.early_stopping!r}")
        return found


@dataclass(frozen=True)
class Hypothesis:
    """An answer that was found.

    Attributes:
        token_ids: its tokens, the closing one included when it ended by itself.
        score: see the module; the penalties for repeating other groups are part of it.
        ended: False if it was cut off at the length limit.
    """

    token_ids: list[int]
    score: float
    ended: bool


@dataclass
class Group:
    """A group of beams: for each its row in the batch, the sum of its log-probabilities, and its tokens."""

    rows: list[int] = field(default_factory=lambda: [0])  # at first all beams are the prompt
    sums: list[float] = field(default_factory=lambda: [0.0])
    token_ids: list[list[int]] = field(default_factory=lambda: [[]])
    finished: list[Hypothesis] = field(default_factory=list)


@torch.no_grad()
def beam_search(
    model: GPTModel,
    prompt_ids: Sequence[int],
    settings: BeamSettings,
    *,
    max_gen_len: int = 64,
    end_token_ids: Collection[int] = (),
    n: int = 1,
) -> list[Hypothesis]:
    """The n best answers to one prompt, best first; fewer where the vocabulary allows no more.

    Args:
        max_gen_len: at most this many new tokens, and never more than the context holds.
        end_token_ids: tokens that end an answer.

    Raises:
        UserError: settings that cannot be, a prompt that leaves no room for an answer, or weights that are damaged.
    """
    context = model.config.max_seq_len
    if complaints := settings.complaints(n):
        raise UserError("; ".join(complaints))
    if max_gen_len < 1:
        raise UserError(f"max_gen_len must be at least 1, not {max_gen_len}")
    if not 1 <= len(prompt_ids) < context:
        raise UserError(f"the prompt has {len(prompt_ids)} tokens; a context of {context} takes 1 to {context - 1}")
    max_gen_len = min(max_gen_len, context - len(prompt_ids))
    groups = [Group() for _ in range(settings.num_beam_groups)]
    active = list(groups)
    cache = model.new_cache(1, len(prompt_ids) + max_gen_len)
    new_ids = torch.tensor([list(prompt_ids)], device=model.device)  # (1, T)
    was_training = model.training
    model.eval()
    try:
        for length in range(1, max_gen_len + 1):
            hidden = model.hidden_states(new_ids, cache=cache)[:, -1]  # (rows, D)
            log_probs = model.lm_head(hidden).float().log_softmax(dim=-1)  # (rows, V)
            if not log_probs.isfinite().any(dim=-1).all():
                raise UserError("the model's logits are not finite; its weights are damaged, use another checkpoint")
            chosen: Counter[int] = Counter()  # what earlier groups took in this step
            for group in active:
                penalty = log_probs.new_zeros(log_probs.size(-1))  # (V,)
                for token, count in chosen.items():
                    penalty[token] = settings.diversity_penalty * count
                log_probs_here = log_probs[group.rows] - penalty  # (beams, V)
                chosen.update(_extend(group, log_probs_here, settings, length, length == max_gen_len, end_token_ids))
            active = [group for group in active if _can_improve(group, settings, length, max_gen_len)]
            if not active:
                break
            rows = [row for group in active for row in group.rows]
            cache.keep_rows(torch.tensor(rows, device=new_ids.device))
            new_ids = new_ids.new_tensor([ids[-1:] for group in active for ids in group.token_ids])  # (rows, 1)
            places = iter(range(len(rows)))
            for group in active:
                group.rows = [next(places) for _ in group.rows]
    finally:
        model.train(was_training)
    found = [hypothesis for group in groups for hypothesis in group.finished]
    return sorted(found, key=lambda hypothesis: -hypothesis.score)[:n]


def _extend(
    group: Group,
    log_probs: torch.Tensor,
    settings: BeamSettings,
    length: int,
    is_last: bool,
    end_token_ids: Collection[int],
) -> list[int]:
    """Replace the beams of a group by their best extensions to `length` tokens; returns the tokens it chose.

    Args:
        log_probs: (beams, V), of the next token after each beam.
    """
    width = settings.width
    totals = log_probs + log_probs.new_tensor(group.sums).unsqueeze(1)  # (beams, V)
    # So many that `width` beams go on even if each of the best ones ends here
    n_candidates = width * max(2, 1 + len(end_token_ids))
    best = totals.flatten().topk(min(n_candidates, totals.numel()))
    rows, sums, token_ids = [], [], []
    for rank, (total, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        beam, token = divmod(index, totals.size(-1))
        ids = [*group.token_ids[beam], token]
        if token in end_token_ids or is_last:
            if rank < width:  # those further down are only there to go on
                ended = token in end_token_ids
                group.finished.append(Hypothesis(ids, total / length**settings.length_penalty, ended))
        elif len(rows) < width:
            rows.append(group.rows[beam])
            sums.append(total)
            token_ids.append(ids)
    group.rows, group.sums, group.token_ids = rows, sums, token_ids
    group.finished = sorted(group.finished, key=lambda hypothesis: -hypothesis.score)[:width]
    return [index % totals.size(-1) for index in best.indices[:width].tolist()]


def _can_improve(group: Group, settings: BeamSettings, length: int, max_gen_len: int) -> bool:
    """Whether a group whose beams have `length` tokens has to go on."""
    if not group.rows:
        return False
    if len(group.finished) < settings.width:
        return True
    if settings.early_stopping is True:
        return False
    longest = settings.early_stopping == "never" and settings.length_penalty > 0
    hoped_for = group.sums[0] / (max_gen_len if longest else length) ** settings.length_penalty
    return hoped_for > group.finished[-1].score
