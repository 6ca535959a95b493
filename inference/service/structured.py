"""Answers of a given form: a mask on the scores of every step lets only those tokens through that can come next.

The masks are made by llguidance (https://github.com/guidance-ai/llguidance), from a JSON schema, a regular expression
or a grammar in Lark's notation. It knows nothing of lengths; an answer that is cut would be no JSON. So the shortest
way to a whole answer is looked for beside it, and taken when there is room for nothing else.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import torch

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError

MAX_FORM_CHARACTERS = 65_536
MAX_WAY = 4096  # tokens of the shortest way that is looked for
JSON_OPTIONS = {"whitespace_flexible": False}  # or an answer of spaces could go on for ever
# What ends things, in the order in which it is tried: within a string, and elsewhere
WITHIN_A_STRING = b'"a0A -:./@'
ELSEWHERE = b'}]"0:,1t-[{a'


class FormTokenizer:
    """A tokenizer as llguidance wants to see it.

    Raises:
        UserError: llguidance is not installed.
    """

    def __init__(self, tokenizer: ByteLevelBPETokenizer) -> None:
        try:
            import llguidance
        except ImportError:
            raise UserError(
                "answers of a given form need the package llguidance, which the service's machine has not installed; "
                "its operator can: pip install llguidance"
            ) from None
        self.llguidance = llguidance
        size = tokenizer.vocab_size
        names = {index: token for token, index in tokenizer.vocab.items()}
        contents = [tokenizer.token_bytes(index) for index in range(size)]

        class Vocabulary:
            eos_token_id, bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
            tokens = [content or names.get(index, "").encode() for index, content in enumerate(contents)]
            special_token_ids = [index for index, content in enumerate(contents) if not content]

            def __call__(self, text: str | bytes) -> list[int]:
                text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
                return tokenizer.encode(text, add_special_tokens=False)["input_ids"]

        self.eos_token_id = tokenizer.eos_token_id
        self.engine = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary()), n_vocab=size)
        self.byte_ids = {content: index for index, content in enumerate(contents) if len(content) == 1}

    def ids_of(self, content: bytes) -> list[int]:
        """The ids of single bytes, those that the tokenizer has."""
        return [self.byte_ids[bytes([byte])] for byte in content if bytes([byte]) in self.byte_ids]


class AnswerForm:
    """What answers have to look like.

    Args:
        tokenizer: of the model.
        grammar: as llguidance reads it.
        step: by how many tokens the shortest way to the end may grow with one token.

    Raises:
        UserError: it is not valid.
    """

    def __init__(self, tokenizer: FormTokenizer, grammar: str, step: int) -> None:
        self.tokenizer, self.step = tokenizer, step
        self.start = tokenizer.llguidance.LLMatcher(tokenizer.engine, grammar, log_level=0)
        if self.start.is_error():
            raise UserError(f"the form of the answer is not valid: {' '.join(self.start.get_error().split())[:300]}")
        self.shortest = shortest_way(self.start, tokenizer)

    def begin(self, max_tokens: int) -> AnswerState:
        """See `Form.begin`."""
        return AnswerState(self, max_tokens)

    def require_room(self, max_tokens: int) -> None:
        """Refuse answers that could not be complete."""
        if self.shortest is not None and len(self.shortest) + 1 > max_tokens:
            raise UserError(
                f"an answer of this form has at least {len(self.shortest) + 1} tokens, and there is room for "
                f"{max_tokens}: allow more new tokens, or shorten the prompt"
            )


class AnswerState:
    """How far an answer has come, and the way to its end when room gets short."""

    def __init__(self, form: AnswerForm, max_tokens: int) -> None:
        self.form, self.room = form, max_tokens
        self.matcher = form.start.deep_copy()
        self.way: list[int] | None = None  # once there is room for nothing else
        self.next_look = max_tokens  # how much room there is when the way is looked for next

    def restrict(self, scores: torch.Tensor) -> None:
        """See `FormState.restrict`."""
        if self.way is None and self.room <= self.next_look:
            self._look_for_the_way()
        allowed = np.zeros(len(scores), dtype=bool)  # (V,)
        if self.way is None:
            bits = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            allowed[: len(bits)] = bits[: len(scores)]
        elif self.way:
            allowed[self.way[0]] = True
        if not allowed.any():  # the way is at its end, or the grammar leads nowhere
            allowed[self.form.tokenizer.eos_token_id] = True
        forbidden = torch.from_numpy(~allowed)
        if scores.is_cuda:  # what is allowed follows from tokens that are known: no score is waited for
            forbidden = forbidden.pin_memory().to(scores.device, non_blocking=True)
        kept = scores.masked_fill(forbidden, -torch.inf)
        # Where bans leave nothing of the form, the form is what was asked for
        plain = torch.zeros_like(scores).masked_fill_(forbidden, -torch.inf)
        scores.copy_(torch.where((kept > -torch.inf).any(), kept, plain))

    def accept(self, token_id: int) -> None:
        """See `FormState.accept`."""
        self.room -= 1
        if token_id != self.form.tokenizer.eos_token_id:
            self.matcher.consume_token(token_id)
        if self.way:
            self.way.pop(0)

    def _look_for_the_way(self) -> None:
        """Take the shortest way, if after one more free token there might be no room for it; or see how long there is.

        The end itself is a token, too.
        """
        way = shortest_way(self.matcher, self.form.tokenizer)
        if way is None:
            self.next_look = -1  # none is known; the answer may be cut, and its finish_reason says so
            return
        spare = self.room - len(way) - 1
        if spare <= self.form.step:
            self.way = way
        else:
            self.next_look = self.room - max(1, spare // (self.form.step + 1))


def shortest_way(matcher: Any, tokenizer: FormTokenizer) -> list[int] | None:
    """Tokens that lead from a state to a whole answer, few if not the fewest; None if none were found.

    Whatever can be closed is closed, and what has to come is taken.
    """
    matcher, way = matcher.deep_copy(), []
    within, elsewhere = tokenizer.ids_of(WITHIN_A_STRING), tokenizer.ids_of(ELSEWHERE)
    letters = tokenizer.ids_of(b"qzQZ")
    while len(way) < MAX_WAY:
        if matcher.is_error():
            return None
        if matcher.is_accepting() or matcher.is_stopped():
            return way
        forced = matcher.compute_ff_tokens()
        if not forced:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            in_string = len(letters) > 0 and all(bits[index] for index in letters)
            choice = next((index for index in (within if in_string else elsewhere) if bits[index]), None)
            if choice is None:
                allowed = np.flatnonzero(bits[: tokenizer.engine.vocab_size])
                if not len(allowed):
                    return None
                choice = int(allowed[0])
            forced = [choice]
        if not matcher.consume_tokens(forced):
            return None
        way += forced
    return None


@functools.lru_cache(maxsize=4)
def form_tokenizer(tokenizer: ByteLevelBPETokenizer) -> FormTokenizer:
    """Made once for each model."""
    return FormTokenizer(tokenizer)


def json_form(tokenizer: ByteLevelBPETokenizer, schema: dict[str, Any]) -> AnswerForm:
    """JSON that a schema describes.

    Raises:
        UserError: the schema is not valid, or has what llguidance cannot hold an answer to.
    """
    text = _bounded(json.dumps(schema))
    made = form_tokenizer(tokenizer)
    grammar = made.llguidance.LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
    return AnswerForm(made, grammar, step=16 + len(text))


def regex_form(tokenizer: ByteLevelBPETokenizer, regex: str) -> AnswerForm:
    """A text that a regular expression describes as a whole."""
    made = form_tokenizer(tokenizer)
    return AnswerForm(made, made.llguidance.LLMatcher.grammar_from_regex(_bounded(regex)), step=16 + len(regex))


def grammar_form(tokenizer: ByteLevelBPETokenizer, grammar: str) -> AnswerForm:
    """A text of a grammar in Lark's notation."""
    made = form_tokenizer(tokenizer)
    return AnswerForm(made, made.llguidance.LLMatcher.grammar_from_lark(_bounded(grammar)), step=16 + len(grammar))


def _bounded(text: str) -> str:
    if len(text) > MAX_FORM_CHARACTERS:
        raise UserError(f"the form of the answer has {len(text)} characters; at most {MAX_FORM_CHARACTERS} are allowed")
    return text
