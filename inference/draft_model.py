"""Drafting with a smaller model of the same tokenizer, such as `finetune.py --mode distill` makes.

    drafter = DraftModel(small)
    engine = Engine(model, tokenizer, drafter=drafter)

The small model has a cache of its own, with the same requests in it. It draws with the settings of a request and the
very random numbers that the large model will draw with, so that of two distributions that are alike the same token
comes (speculation.py says why nothing else depends on it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError, option
from gpt_model import GPTModel
from inference.cache_blocks import CachedSequence
from inference.draft_texts import FollowerTable, TextLookup, read_texts
from inference.engine import Engine
from inference.model_step import default_cache_tokens
from inference.quantizer import load_any
from inference.request import Request
from inference.sampling import TokenSampler, sample_batch
from inference.speculation import Drafter, PromptLookup, Wanted

WAYS = ("off", "lookup")


@dataclass
class _Draft:
    """One request's tokens in the making.

    Attributes:
        sequence: its cells in the small model's cache.
        coming: the tokens that come next: of the context, later the newest drafted one.
        most: how many tokens are wanted.
    """

    request: Request
    sequence: CachedSequence
    sampler: TokenSampler
    coming: list[int]
    most: int


class DraftModel:
    """Proposes what a smaller model would write.

    Args:
        model: in evaluation mode, with the large one's vocabulary, on its device.
        max_running: requests that it keeps in mind; for others it proposes nothing.
        prefill_chunk: at most this many tokens of contexts a step; a request beyond that waits for the next one.
    """

    def __init__(self, model: GPTModel, max_running: int = 16, prefill_chunk: int = 256) -> None:
        # On a GPU, too, it takes no more than on a CPU: most of the memory is the large model's
        cells = default_cache_tokens(model.config, model.dtype, torch.device("cpu"), max_running)
        self.step = Engine(model.eval(), None, max_running, cache_tokens=cells, reuse_prefixes=False).model_step
        self.cache, self.context, self.prefill_chunk = self.step.cache, model.config.max_seq_len, prefill_chunk
        # Of each request its cells, how long its context was when it was last looked at, and what was then drafted
        self.known: dict[Request, tuple[CachedSequence, int, list[int]]] = {}

    def propose(self, wanted: Wanted) -> list[list[int]]:
        """See `Drafter.propose`."""
        drafts: dict[Request, list[int]] = {request: [] for request, _ in wanted}
        going, budget = [], self.prefill_chunk
        for request, most in wanted:
            most = min(most, self.context - len(request.context) + 1)
            if most < 1 or (sequence := self._sequence_of(request)) is None:
                continue
            coming = request.context[sequence.length :]
            if len(coming) > budget:
                coming, most = coming[:budget], 0
            budget -= len(coming)
            if coming and self.cache.reserve(sequence, sequence.length + len(coming) + max(0, most - 1)):
                going.append(_Draft(request, sequence, request.sampler.ahead(), coming, most))
        going.sort(key=lambda draft: len(draft.coming))  # as the cache wants them: single tokens first
        while going:
            tokens = self._next_tokens(going)
            for draft, token_id in zip(going, tokens, strict=True):
                if len(drafts[draft.request]) < draft.most:
                    drafts[draft.request].append(token_id)
                draft.coming = [token_id]
            going = [draft for draft in going if len(drafts[draft.request]) < draft.most]
        for request, ids in drafts.items():
            if request in self.known:
                self.known[request] = self.known[request][0], len(request.context), ids
        return list(drafts.values())

    def drop(self, request: Request) -> None:
        """See `Drafter.drop`."""
        if known := self.known.pop(request, None):
            self.cache.close(known[0])

    def _sequence_of(self, request: Request) -> CachedSequence | None:
        """A request's cells, without those of drafted tokens that turned out wrong; None if there is no place."""
        if request not in self.known:
            if not self.cache.free_slots:
                return None
            self.step.look_at_model()
            self.known[request] = self.cache.open([]), 0, []
        sequence, length, drafted = self.known[request]
        right = 0
        for ours, token_id in zip(drafted, request.context[length:], strict=False):
            if ours != token_id:
                break
            right += 1
        # Of the context, the last token is always computed anew: its logits are what is needed
        sequence.length = min(sequence.length, length + right, len(request.context) - 1)
        return sequence

    @torch.inference_mode()
    def _next_tokens(self, drafts: list[_Draft]) -> list[int]:
        """One pass over what comes next in each draft, and the token that is drawn after it."""
        ids, last = [], []
        for draft in drafts:
            ids += draft.coming
            last.append(len(ids) - 1)
        self.cache.begin_step([(draft.sequence, len(draft.coming)) for draft in drafts])
        _, logits = self.step.forward(ids, last)
        for draft in drafts:
            self.cache.stored(draft.sequence, [], len(draft.coming))
        return sample_batch(logits, [draft.sampler for draft in drafts]).token_ids


@dataclass
class SpeculationOptions:
    """The options of speculative decoding, for whatever runs an engine."""

    speculate: str = option(
        "off",
        "lookup: draft tokens from the text so far, which the model checks together, where that pays; the answers are"
        " the same",
        choices=WAYS,
    )
    draft_texts: list[str] = option(
        list,
        "texts or conversations in whose words answers are likely, such as the training data: what mostly follows there"
        " is drafted",
    )
    draft_model: str | None = option(None, "a smaller checkpoint of the same tokenizer, which then drafts")

    def speculation_complaints(self) -> list[str]:
        """What does not fit together."""
        given = [name for name in ("draft_texts", "draft_model") if getattr(self, name)]
        given += ["speculate"] * ("speculate" in getattr(self, "given", ()))
        together = " and ".join(f"--{name}" for name in sorted(given, reverse=True))
        return [f"{together} do not go together; leave all but one out"] if len(given) > 1 else []

    def drafter(
        self, model: GPTModel, tokenizer: ByteLevelBPETokenizer, max_running: int, precision: str
    ) -> Drafter | None:
        """What drafts for a model in an engine of so many requests; a draft model is computed in this precision.

        Raises:
            UserError: the draft model cannot be used for it, or texts cannot be read.
        """
        if self.draft_texts:
            return TextLookup(FollowerTable(read_texts(self.draft_texts, tokenizer)))
        if self.draft_model is None:
            return PromptLookup() if self.speculate == "lookup" else None
        draft, its_tokenizer, _ = load_any(self.draft_model, model.device, precision=precision)
        if its_tokenizer.fingerprint != tokenizer.fingerprint or draft.config.vocab_size != model.config.vocab_size:
            raise UserError(
                f"--draft_model {self.draft_model} has another tokenizer than the model that it is to draft for; give"
                " one that was made from it, such as a student of finetune.py --mode distill"
            )
        return DraftModel(draft, max_running)
