"""What is held out of the sample data, and the proof that none of it stands in a training file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations

_SENTENCE_END = re.compile(r"[。！？；\n]|[.!?;](?=\s|$)")
_REPEATED_WORD = re.compile(r"(?<!\S)(\S+)((?: \1)+)(?=\W|$)")
_WORD = re.compile(r"×?\d+|[^\W\d_\u4e00-\u9fff]+|[\u4e00-\u9fff]|[-+=<>]")
_STATED_COUNT = re.compile(r"(?:(\w+?) ?出现了 (\d) 次)|(?:the word (\w+) appears (\d) times)", re.IGNORECASE)


class LeakError(Exception):
    """Something that is held out for the test stands in the training data."""


@dataclass
class HeldOutOperands:
    """Operands that no training text may show, in whatever order, language or skill."""

    pairs: set[frozenset[int]] = field(default_factory=set)  # two numbers that never stand in one sentence
    lists: set[frozenset[int]] = field(default_factory=set)  # the numbers of a list to be sorted
    counts: set[tuple[str, int]] = field(default_factory=set)  # (word in either language, how often it is repeated)
    passages: set[tuple[str, ...]] = field(default_factory=set)  # who, where and what, in one language

    def found_in(self, text: str) -> str | None:
        """Name the first held-out operands that stand together in a sentence of the text (those of a passage: in the
        whole text, as its sentences share them); None if none do."""
        lowered = text.lower()
        for parts in self.passages:
            if all(part.lower() in lowered for part in parts):
                return f"the passage of {', '.join(parts)}"
        for sentence in _SENTENCE_END.split(text):
            numbers = frozenset(int(digits) for digits in re.findall(r"\d+", sentence))
            for pair in combinations(sorted(numbers), 2):
                if frozenset(pair) in self.pairs:
                    return f"the numbers {pair[0]} and {pair[1]}"
            if numbers in self.lists:
                return f"the list {sorted(numbers)}"
            counts = [(word, 1 + len(rest.split())) for word, rest in _REPEATED_WORD.findall(sentence)]
            counts += [(zh or en, int(m or n)) for zh, m, en, n in _STATED_COUNT.findall(sentence)]
            for count in counts:
                if count in self.counts:
                    return f"{count[1]} times the word {count[0]}"
        return None


@cache
def normalise(text: str) -> str:
    """The words of a text without case and punctuation, each Chinese character a word, " " around each.

    Operators stay ("37 + 45" is not "37 - 45"), and a word that is repeated is counted, so that a shorter run of a
    word is not found in a longer one: "Count: key key." → " count key ×2 ".
    """
    text = _REPEATED_WORD.sub(lambda run: f"{run[1]} ×{1 + len(run[2].split())} ", text.lower())
    return " ".join(["", *_WORD.findall(text), ""])


def phrasing_pattern(phrasing: str) -> re.Pattern[str]:
    """What matches every normalised question of this phrasing: "Who wrote {a}?" → " who wrote (.+) "."""
    return re.compile("(.+)".join(re.escape(piece) for piece in _fixed_parts(phrasing)))


def _fixed_parts(phrasing: str) -> list[str]:
    """What stands between the fields of a template, normalised."""
    return [normalise(piece) for piece in re.split(r"\{\w+\}", phrasing)]


def sentences_of(texts: Iterable[str]) -> str:
    """The sentences of some texts, normalised, one a line."""
    return "\n".join(normalise(sentence) for text in texts for sentence in _SENTENCE_END.split(text))


def asked_in(phrasing: str, corpus: str) -> str | None:
    """A question of this phrasing in a corpus of normalised sentences, one a line; None if there is none."""
    # A phrasing of several sentences is known by one of them: "How many times does it appear? {x}" by the first
    phrasing = max(_SENTENCE_END.split(phrasing), key=lambda sentence: len("".join(_fixed_parts(sentence))))
    longest = max(_fixed_parts(phrasing), key=len)
    if longest not in corpus:  # spares a slow search
        return None
    pattern = phrasing_pattern(phrasing)
    return next((line for line in corpus.splitlines() if longest in line and pattern.search(line)), None)


def prove_no_leak(
    training: dict[str, list[str]],
    instructions: list[str],
    tests: list[dict],
    operands: HeldOutOperands,
    held_out_phrasings: Iterable[str],
) -> None:
    """Raise `LeakError` unless the training data is free of everything that the tests hold out.

    Args:
        training: every text of every training file, by file name (questions, answers, rejected answers, all).
        instructions: the training questions among them.
        tests: test records; those with "held_out": "combination" also name their "phrasing".
        operands: the operands held out.
        held_out_phrasings: templates that only the test may use.
    """
    corpus = {name: "\n".join(normalise(text) for text in texts) for name, texts in training.items()}
    sentences = {name: sentences_of(texts) for name, texts in training.items()}
    for name, texts in training.items():
        for text in texts:
            if (found := operands.found_in(text)) is not None:
                raise LeakError(f"{name}: held-out operands, {found}, stand in: {text}")
        for record in tests:
            if normalise(record["instruction"]) in corpus[name]:
                raise LeakError(f"{name}: a test question stands in the training data: {record['instruction']}")
        for phrasing in held_out_phrasings:
            if (question := asked_in(phrasing, sentences[name])) is not None:
                raise LeakError(f"{name}: the held-out phrasing “{phrasing}” is used: {question}")
    asked = [normalise(instruction) for instruction in instructions]
    everything = "\n".join(corpus.values())
    for record in (record for record in tests if record["held_out"] == "combination"):
        if normalise(record["answer"]) not in everything:
            raise LeakError(f"the fact of a held-out combination is never told: {record['answer']}")
        pattern = phrasing_pattern(record["phrasing"])
        if not any(pattern.fullmatch(question) for question in asked):
            raise LeakError(f"the phrasing of a held-out combination is never used: {record['phrasing']}")
