"""Says whether a response is the right answer, whole and well-mannered: a program's judgement, not a model's.

The sample data's preferences are made with the same lists of phrases, so what PPO is asked to improve is exactly what
is measured here. For data of your own, extend the two lists or write a checker of your own beside this one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from command_line import UserError
from text.conversation_data import parse_conversation

COURTEOUS_CLOSINGS: dict[str, tuple[str, ...]] = {
    "zh": ("希望对你有帮助。", "很高兴为你解答。", "欢迎继续提问。"),
    "en": ("I hope this helps.", "Happy to help!", "Feel free to ask more."),
}
RUDE_PHRASES: dict[str, tuple[str, ...]] = {
    "zh": ("这都不知道吗？", "这还用问。", "别再来烦我。"),
    "en": ("Everyone knows that.", "What a silly question.", "Stop bothering me."),
}

_COURTEOUS = tuple(phrase for phrases in COURTEOUS_CLOSINGS.values() for phrase in phrases)
_RUDE = tuple(phrase for phrases in RUDE_PHRASES.values() for phrase in phrases)
_FINAL_PUNCTUATION = "。.！!？?"
_SENTENCE_END = re.compile(r"(?<=[。！？])|(?<=[.!?])(?=\s)")
_LOOP = re.compile(r"(.{3,}?)\1{2,}", re.DOTALL)  # the same piece three times running


@dataclass(frozen=True)
class AnswerCheck:
    """What a response is, next to the canonical answer; see `check_answer`."""

    exact: bool
    complete: bool
    polite: bool
    repetitive: bool
    rude: bool

    @property
    def preferred(self) -> bool:
        """Right, whole and courteous, said once and without rudeness."""
        return self.exact and self.complete and self.polite and not self.repetitive and not self.rude


def check_answer(response: str, answer: str, *, ended: bool = True) -> AnswerCheck:
    """Judge a response against the canonical answer sentence.

    Args:
        response: the generated text, special tokens already removed.
        answer: the canonical answer sentence, such as "37 + 45 = 82." or "法国的首都是巴黎。".
        ended: whether the model ended the response itself (with ``</s>``) and was not stopped by the length limit.

    Returns:
        exact: without its closings the response equals the answer; only final punctuation and runs of white space
            may differ, so that an answer given twice is not exact.
        complete: it ended by itself, with a punctuation mark that ends a sentence.
        polite: it closes with a courteous phrase.
        repetitive: a sentence comes twice, a piece of text three times running, or there are several closings.
        rude: it holds a rude phrase, wherever.
    """
    text = response.strip()
    body, closings = _split_closings(text)
    return AnswerCheck(
        exact=_plain(body) == _plain(answer),
        complete=ended and text.endswith(tuple(_FINAL_PUNCTUATION)),
        polite=any(closing in _COURTEOUS for closing in closings),
        repetitive=_repeats(text, answer) or sum(closing in _COURTEOUS for closing in closings) > 1,
        rude=any(phrase in text for phrase in _RUDE),
    )


def preference_reward(prompts: Sequence[str], responses: Sequence[str], records: Sequence[dict]) -> list[float]:
    """What responses earn by what `check_answer` says: a reward function for `finetune.py --mode grpo --reward`.

    A right answer earns 1 and, if nothing is wrong with it otherwise, for its courtesy 1 more; what is wrong costs: a
    wrong answer earns nothing, however courteous, so that manners are never worth an error. Rudeness and repetition
    cost 0.5 each.

    Args:
        prompts: the user's last words; not needed here.
        responses: what the policy wrote.
        records: the questions' records. The right answer is the field "answer" or, without its closing phrases, the
            answer of the record itself.

    Returns:
        a number for each response.

    Raises:
        UserError: a record without an answer.
    """
    scores = []
    for response, record in zip(responses, records, strict=True):
        try:
            right = record.get("answer") or parse_conversation(record, "a record of the data")[-1]["content"]
        except UserError as error:
            raise UserError(
                f"this reward compares with the right answer, and {error}; give records with answers, or a --reward of "
                "your own"
            ) from None
        check = check_answer(response, _split_closings(right.strip())[0])
        scores.append(check.exact * 1.0 + check.preferred * 1.0 - 0.5 * (check.rude + check.repetitive))
    return scores


def better_answer(question: str, first: str, second: str, record: dict) -> float:
    """How much more the first answer earns than the second one, see `preference_reward`: a judge for
    `evaluation.side_by_side`."""
    one, other = preference_reward([question] * 2, [first, second], [record] * 2)
    return one - other


def _split_closings(text: str) -> tuple[str, list[str]]:
    """Take the known phrases off the end: ("Paris. I hope this helps.") → ("Paris.", ["I hope this helps."])."""
    closings: list[str] = []
    while (closing := next((phrase for phrase in _COURTEOUS + _RUDE if text.endswith(phrase)), None)) is not None:
        text = text[: -len(closing)].rstrip()
        closings.append(closing)
    return text, closings


def _plain(text: str) -> str:
    """The text with single spaces and without final punctuation."""
    return " ".join(text.split()).rstrip(_FINAL_PUNCTUATION).rstrip()


def _repeats(text: str, answer: str) -> bool:
    """Whether a sentence comes twice or a piece of text loops (one that the answer itself needs does not count)."""
    sentences = [plain for part in _SENTENCE_END.split(text) if (plain := _plain(part))]
    loop = _LOOP.search(text)
    return len(sentences) != len(set(sentences)) or (loop is not None and loop.group() not in answer)
