"""A request to the engine, as its sender sees it: `stream()`, `result()`, `cancel()`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError
from gpt_model import GPTConfig
from inference.cache_blocks import CachedSequence
from inference.sampling import SamplingParams, TokenLogProb, TokenSampler
from inference.text_stream import TextStream, whole_characters
from text.chat_template import Message

logger = logging.getLogger(__name__)

Prompt = str | list[Message]  # the user's words, or the messages of a conversation so far


class QueueFull(Exception):
    """As many requests wait as may wait; try again later."""


class RequestFailed(Exception):
    """The engine could not answer this request; the sentence says why."""


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt.

    Attributes:
        text: the answer, without special tokens, up to the stop string if there was one. Where it ends inside a
            character, that character is left out.
        ended: whether the answer is complete: the model ended it with `</s>`, or a stop token or string was found.
        token_ids: the ids it produced, the closing `</s>` included when it ended.
        finish_reason: "stop" (it ended), "length" (`max_gen_len` or the context's end), "cancelled" or "deadline".
        log_probs: one entry a token where the request asked for them.
        prompt_log_probs: one a token of the prompt where the request asked for them; of n answers, the first has them.
    """

    text: str
    ended: bool
    token_ids: list[int]
    finish_reason: str = ""
    log_probs: list[TokenLogProb] | None = None
    prompt_log_probs: list[TokenLogProb] | None = None


def encode_prompt(tokenizer: ByteLevelBPETokenizer, prompt: Prompt, chat: bool) -> list[int]:
    """Token ids of a prompt: a user's turn in the chat template, or `<s>` and plain text that is to be continued."""
    if not chat:
        # Where the tokenizer puts nothing before a text, an empty one begins after the end of another
        return tokenizer.encode(prompt, add_special_tokens=True)["input_ids"] or [tokenizer.eos_token_id]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.encode_chat(messages, add_generation_prompt=True)["input_ids"]


def recommended_sampling(tokenizer: ByteLevelBPETokenizer, given: Collection[str] = ()) -> dict[str, float]:
    """The sampling settings that came with a model, but for those that its user has `given`.

    Raises:
        UserError: nothing can be sampled with them.
    """
    settings = tokenizer.generation_defaults
    if complaints := SamplingParams(**settings).complaints():
        raise UserError(f"the model's generation_config.json is wrong: {'; '.join(complaints)}; import it anew, mended")
    return {name: value for name, value in settings.items() if name not in given}


def checked_ids(
    prompt: Prompt | list[int],
    params: SamplingParams,
    chat: bool,
    tokenizer: ByteLevelBPETokenizer | None,
    config: GPTConfig,
) -> list[int]:
    """The ids of a prompt, if a model of this configuration can go on from there with these parameters.

    Raises:
        UserError: it cannot, and why.
    """
    complaints = params.complaints(config.vocab_size)
    if complaints:
        raise UserError("; ".join(complaints))
    if len(prompt) == 0:
        raise UserError("the prompt is empty; give at least one token to go on from")
    if isinstance(prompt, str) or isinstance(prompt[0], dict):
        if tokenizer is None:
            raise UserError("an engine without a tokenizer takes token ids only")
        ids = encode_prompt(tokenizer, prompt, chat)
    else:
        ids = list(prompt)
    if min(ids) < 0 or max(ids) >= config.vocab_size:
        raise UserError(f"the prompt has a token id outside the model's vocabulary of {config.vocab_size}")
    if len(ids) >= config.max_seq_len and params.overflow != "slide":
        raise UserError(
            f"the prompt has {len(ids)} tokens and the model's context only {config.max_seq_len}, which leaves no "
            'room for an answer; shorten it, or choose overflow "slide"'
        )
    return ids


class Computer(Protocol):
    """What a request asks of the engine."""

    started: bool  # whether a thread of its own computes

    def step(self) -> None:
        """Compute one step for all requests."""

    def cancel(self, request: Request) -> None:
        """End a request."""


class Request:
    """One answer in the making. `Engine.submit` makes it; its methods may be called from any thread.

    Where the engine has no thread of its own, `stream` and `result` compute the steps that they wait for.

    Attributes:
        prompt_ids: the prompt.
        token_ids: what was generated so far.
        log_probs: of these tokens, where asked for.
        prompt_log_probs: of the prompt's tokens as far as they are computed, where asked for; None where not.
        samples: the `n` requests of one call of `submit`, of which this is one.
        generation: the result, once there is one.
    """

    def __init__(
        self,
        engine: Computer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        index: int = 0,
        deadline: float | None = None,
        text: TextStream | None = None,
        on_piece: Callable[[str | None], None] | None = None,
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.params = params
        self.token_ids: list[int] = []
        self.log_probs: list[TokenLogProb] = []
        self.prompt_log_probs: list[TokenLogProb] | None = None
        if params.prompt_logprobs is not None and index == 0:  # what n answers share is reported once
            self.prompt_log_probs = [TokenLogProb(prompt_ids[0], None, {})]
        self.samples: list[Request] = [self]
        self.generation: Generation | None = None
        self._engine = engine
        self._error: RequestFailed | None = None
        self._done = threading.Event()
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._on_piece = on_piece or self._pieces.put
        # What follows belongs to the engine
        self.deadline = deadline  # on the clock of time.monotonic
        self.arrival = 0  # its number in the line
        self.context = list(prompt_ids)  # what the model is to see: prompt and answer, or the newer part of them
        self.sequence: CachedSequence | None = None  # its cells, while it is running
        self.draft: list[int] = []  # what may come after the context, computed with it in this step
        self.sampler = TokenSampler(params, prompt_ids, index)
        self.text = text
        self.submitted = self.last_token = time.monotonic()
        self.admitted: float | None = None  # when it was first computed

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self._done.is_set()

    def stream(self) -> Iterator[str]:
        """The text, piece by piece as it is made; leaving the loop early cancels the request.

        Raises:
            RequestFailed: after the pieces there were.
        """
        try:
            while True:
                while not self._engine.started and self._pieces.empty():
                    self._engine.step()
                piece = self._pieces.get()
                if piece is None:
                    break
                yield piece
        finally:
            self.cancel()
        if self._error is not None:
            raise self._error

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the whole answer.

        Raises:
            RequestFailed: there is none.
            TimeoutError: it is not there after `timeout` seconds; the request goes on.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not self._done.is_set():
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"the answer is not complete after {timeout} s")
            if self._engine.started:
                self._done.wait(left)
            else:
                self._engine.step()
        if self._error is not None:
            raise self._error
        return self.generation

    def cancel(self) -> None:
        """End the request now; its memory is free for others in the engine's next step."""
        if not self._done.is_set():
            self._engine.cancel(self)

    # -- for the engine ------------------------------------------------------------------------------------------------

    @property
    def unscored(self) -> range:
        """The positions in the prompt whose next token's log-probability is wanted and not yet there."""
        known = self.prompt_log_probs
        return range(0) if known is None else range(len(known) - 1, len(self.prompt_ids) - 1)

    @property
    def findable(self) -> Sequence[int]:
        """The part of the context that need not be computed where it is stored already."""
        return self.context[: self.unscored.start + 1] if self.unscored else self.context

    def emit(self, piece: str | None) -> None:
        """Hand a piece of text to whoever listens; None says that it was the last."""
        try:
            self._on_piece(piece)
        except Exception:
            logger.exception("a request's listener failed; the request is cancelled")
            self.cancel()

    def finish(self, reason: str, tokenizer: ByteLevelBPETokenizer | None, error: RequestFailed | None = None) -> None:
        """Complete the request with what it has so far."""
        if self.text is not None:
            rest = self.text.flush()
            if rest:
                self.emit(rest)
            text = self.text.text
        else:
            text = "" if tokenizer is None else whole_characters(tokenizer, self.text_ids)
        log_probs = None if self.params.logprobs is None else self.log_probs
        self.generation = Generation(text, reason == "stop", self.token_ids, reason, log_probs, self.prompt_log_probs)
        self._error = error
        self._done.set()
        self.emit(None)

    @property
    def text_ids(self) -> list[int]:
        """The tokens that make the text: a stop token does not show."""
        stopped = self.token_ids and self.token_ids[-1] in self.params.stop_token_ids
        return self.token_ids[:-1] if stopped else self.token_ids


Span = tuple[Request, int]  # a running request and how many tokens come next: of its context, then its whole draft
