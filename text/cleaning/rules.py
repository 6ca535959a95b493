"""Which numbers a document may have.

The rules called `gopher` are those of Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from
Training Gopher" (arXiv:2112.11446, section A.1.1 and table A1), those called `c4` are of Raffel et al. 2020, "Exploring
the Limits of Transfer Learning" (arXiv:1910.10683, section 2.2). Their own thresholds are for pages of the English
web; `--preset web` sets them. The defaults let short texts, verse and notes pass. In Chinese two characters count as
one word where runs of words are compared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import ClassVar

import numpy as np

from command_line import option
from text.cleaning.measure import DIGIT, HAN, LETTER, PUNCTUATION, SPACE, SYMBOL, Measured

TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}  # Gopher: share of the characters in the commonest run of n words
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # … in runs that came before
LEAST_WORDS_TO_REPEAT = 20
STOP_WORDS = re.compile(
    r"\b(?:the|be|to|of|and|that|have|with)\b|[的了是在和有不我他这也就人]", re.IGNORECASE
)  # Gopher's eight; the commonest Chinese characters beside them
BULLET_LINE = re.compile(r"^[ \t]*[•\-*·●■▪◆○►]", re.MULTILINE)
ELLIPSIS_LINE = re.compile(r"(?:…|\.\.\.)[ \t]*$", re.MULTILINE)
SENTENCE_END = re.compile(r"[.!?。！？…][\"'”’」』)）]*(?=\s|$|[\u4e00-\u9fff])")
WORD = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\u3040-\u30ff]|[^\W\u3400-\u4dbf\u4e00-\u9fff\u3040-\u30ff]+")
HISTOGRAM_BINS = 40


@dataclass
class Thresholds:
    """What a document may be like."""

    presets: ClassVar[dict[str, dict]] = {
        "web": {
            "min_words": 50, "max_words": 100_000, "min_mean_word_length": 3, "max_mean_word_length": 10,
            "min_alphabetic_words": 0.8, "min_stop_words": 2, "c4_min_sentences": 3,
        },
    }  # fmt: skip

    min_words: int = option(3, "documents of fewer words go; a Chinese character is one (Gopher: 50)", at_least=0)
    max_words: int = option(0, "documents of more words go (Gopher: 100000); 0: no limit", at_least=0)
    max_chars: int = option(2_000_000, "documents of more characters go, before anything else", at_least=1)
    min_mean_word_length: float = option(
        2, "least mean length of the words that are not Chinese (Gopher: 3)", at_least=0
    )
    max_mean_word_length: float = option(15, "greatest mean length of such words (Gopher: 10)", above=0)
    max_symbols_per_word: float = option(0.1, "most # and … for each word (Gopher: 0.1)", at_least=0)
    max_symbol_share: float = option(0.35, "most of the characters that may be no letters, digits or blanks", above=0)
    min_alphabetic_words: float = option(
        0.4, "least share of the words that have a letter (Gopher: 0.8)", at_least=0, at_most=1
    )
    min_stop_words: int = option(0, "how many of the commonest words there must be (Gopher: 2)", at_least=0)
    max_bullet_lines: float = option(0.9, "most of the lines that may begin with a bullet (Gopher: 0.9)", at_least=0)
    max_ellipsis_lines: float = option(0.3, "most of the lines that may end with an ellipsis (Gopher: 0.3)", at_least=0)
    max_duplicate_lines: float = option(0.3, "most of the lines that may have come before (Gopher: 0.3)", at_least=0)
    max_duplicate_line_chars: float = option(0.2, "most of the characters in such lines (Gopher: 0.2)", at_least=0)
    max_repetition: float = option(
        1.0, "how near to Gopher's limits for repeated runs of 2 to 10 words a document may come; 1: to them", above=0
    )
    c4_min_sentences: int = option(0, "least number of sentences (C4: 3)", at_least=0)
    c4_lines: bool = option(
        False,
        "C4's rule for lines: only those of 5 words or more that end like a sentence, without the word Javascript",
    )
    c4_no_code: bool = option(False, "C4's rule against code: documents with a curly bracket go")


@dataclass(frozen=True)
class Rule:
    """A number that must not be under one option's value nor above another's."""

    name: str
    number: str
    least: str | None = None
    most: str | None = None


RULES = (
    Rule("too few words", "words", least="min_words"),
    Rule("too many words", "words", most="max_words"),
    Rule("gopher: mean word length", "mean word length", "min_mean_word_length", "max_mean_word_length"),
    Rule("gopher: symbols per word", "symbols per word", most="max_symbols_per_word"),
    Rule("too many symbols", "symbol share", most="max_symbol_share"),
    Rule("gopher: alphabetic words", "alphabetic words", least="min_alphabetic_words"),
    Rule("gopher: stop words", "stop words", least="min_stop_words"),
    Rule("gopher: bullet lines", "bullet lines", most="max_bullet_lines"),
    Rule("gopher: ellipsis lines", "ellipsis lines", most="max_ellipsis_lines"),
    Rule("gopher: duplicate lines", "duplicate lines", most="max_duplicate_lines"),
    Rule("gopher: characters in duplicate lines", "duplicate line characters", most="max_duplicate_line_chars"),
    Rule("gopher: repeated words", "repetition", most="max_repetition"),
    Rule("c4: sentences", "sentences", least="c4_min_sentences"),
)


def judge(texts: Sequence[str], measured: Measured, thresholds: Thresholds) -> tuple[list[str | None], dict]:
    """Why each document goes, None where it stays, and the numbers: {name: (N,) float, NaN where none applies}."""
    numbers = _numbers(texts, measured, thresholds)
    reasons: list[str | None] = [None] * len(texts)
    for rule in RULES:
        values = numbers.get(rule.number)
        if values is None:
            continue
        wrong = np.zeros(len(texts), bool)
        if rule.least:
            wrong |= values < getattr(thresholds, rule.least)
        if rule.most and (most := getattr(thresholds, rule.most)):
            wrong |= values > most
        for index in np.flatnonzero(wrong):
            reasons[index] = reasons[index] or rule.name
    for index, text in enumerate(texts):
        if thresholds.c4_no_code and "{" in text:
            reasons[index] = reasons[index] or "c4: curly bracket"
    return reasons, numbers


def _numbers(texts: Sequence[str], measured: Measured, thresholds: Thresholds) -> dict[str, np.ndarray]:
    kinds, words = measured.kinds, measured.n_words
    n_han = kinds[:, HAN]
    n_other = words - n_han  # words that are no Chinese character
    written = kinds.sum(1) - kinds[:, SPACE]
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers = {
            "words": words.astype(float),
            "mean word length": np.where(
                (n_other >= 20) & (n_other > n_han), (kinds[:, LETTER] + kinds[:, DIGIT]) / n_other, np.nan
            ),
            "symbol share": (kinds[:, PUNCTUATION] + kinds[:, SYMBOL]) / written,
            "alphabetic words": 1 - measured.words_of_digits / words,
        }
    marks = [text.count("#") + text.count("…") + text.count("...") for text in texts]
    numbers["symbols per word"] = np.array(marks) / np.maximum(words, 1)
    if thresholds.min_stop_words:
        numbers["stop words"] = np.array([_count_up_to(STOP_WORDS, text, thresholds.min_stop_words) for text in texts])
    if thresholds.c4_min_sentences:
        least = thresholds.c4_min_sentences
        numbers["sentences"] = np.array([_count_up_to(SENTENCE_END, text, least) for text in texts])
    names = ("bullet lines", "ellipsis lines", "duplicate lines", "duplicate line characters")
    by_line = np.array([_of_lines(text) for text in texts]).reshape(len(texts), len(names))
    numbers |= dict(zip(names, by_line.T, strict=True))
    numbers["repetition"] = _repetition(texts, measured)
    return {name: values.astype(float) for name, values in numbers.items()}


def _count_up_to(pattern: re.Pattern[str], text: str, limit: int) -> int:
    return sum(1 for _, _ in zip(range(limit), pattern.finditer(text), strict=False))


def _of_lines(text: str) -> tuple[float, float, float, float]:
    """The shares of lines with a bullet, with an ellipsis, of duplicate lines and of characters in those."""
    if text.count("\n") < 3:
        return (float("nan"),) * 4
    lines = list(filter(None, map(str.strip, text.split("\n"))))
    bullets, ellipses = len(BULLET_LINE.findall(text)), len(ELLIPSIS_LINE.findall(text))
    once = set(lines)
    if len(once) == len(lines):
        return bullets / len(lines), ellipses / len(lines), 0.0, 0.0
    duplicate_characters = 1 - sum(map(len, once)) / sum(map(len, lines))
    return bullets / len(lines), ellipses / len(lines), 1 - len(once) / len(lines), duplicate_characters


def _repetition(texts: Sequence[str], measured: Measured) -> np.ndarray:
    """(N,) the largest of Gopher's repetition shares, each divided by its limit: above 1, a document repeats itself.

    A run of ten words that came before is also runs of five that did, so a document whose runs of five are new has
    nothing to look for; and the share of a commonest run of four is at most twice that of its commonest pair.
    """
    result = np.full(len(texts), np.nan)
    words = measured.n_words
    is_chinese = 2 * measured.kinds[:, HAN] > words
    for step, group in ((1, ~is_chinese), (2, is_chinese)):
        indices = np.flatnonzero(group & (words >= LEAST_WORDS_TO_REPEAT))
        if len(indices) == 0:
            continue
        part = measured.select(indices)
        again, _ = part.repeated(5 * step)
        _, most = part.repeated(2 * step)
        count = part.n_words
        result[indices] = 0.0
        for n_grams, suspicious in (
            (DUPLICATE_NGRAMS, again * 5 * step >= 0.05 * count),
            (TOP_NGRAMS, (most >= 3) & (most * 2 * step >= 0.08 * count)),
        ):
            for index in indices[suspicious]:
                result[index] = max(result[index], repetition(texts[index], step, n_grams))
    return result


def repetition(text: str, step: int = 1, limits: dict[int, float] | None = None) -> float:
    """Gopher's repetition shares of one text, the largest in units of its limit.

    Args:
        step: how many of our words make one of Gopher's: 2 in Chinese.
        limits: `TOP_NGRAMS` or `DUPLICATE_NGRAMS` to look at these alone.
    """
    words = WORD.findall(text.lower())
    total = sum(map(len, words))
    largest = 0.0
    for n, limit in TOP_NGRAMS.items() if limits is not DUPLICATE_NGRAMS else ():
        runs = Counter(zip(*(words[start:] for start in range(n * step)), strict=False))
        run, count = max(runs.items(), key=itemgetter(1), default=((), 0))
        if count > 1:
            largest = max(largest, count * sum(map(len, run)) / total / limit)
    for n, limit in DUPLICATE_NGRAMS.items() if limits is not TOP_NGRAMS else ():
        seen, covered, end = set(), 0, 0
        for start, run in enumerate(zip(*(words[begin:] for begin in range(n * step)), strict=False)):
            if run in seen:
                covered += sum(map(len, words[max(start, end) : start + n * step]))  # each character once
                end = start + n * step
            seen.add(run)
        largest = max(largest, covered / total / limit if total else 0.0)
    return largest


def lines_like_c4(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The lines that C4 keeps, and the others with their reason."""
    kept, removed = [], []
    for line in text.split("\n"):
        if not line.strip():
            kept.append(line)
        elif "javascript" in line.lower():
            removed.append(("c4: javascript", line))
        elif not SENTENCE_END.search(line.rstrip()[-3:]):
            removed.append(("c4: terminal punctuation", line))
        elif _count_up_to(WORD, line, 5) < 5:
            removed.append(("c4: short line", line))
        else:
            kept.append(line)
    return "\n".join(kept).strip("\n"), removed


# What a threshold would change: counts of documents by the value of each number
EDGES = {
    "words": np.concatenate([[0, 1, 2, 3, 5, 8, 10, 15, 20, 30, 50, 75], np.geomspace(100, 1e7, 26)]),
    "mean word length": np.linspace(0, 20, HISTOGRAM_BINS + 1),
    "symbols per word": np.linspace(0, 0.4, HISTOGRAM_BINS + 1),
    "stop words": np.arange(0, 10.0),
    "sentences": np.arange(0, 10.0),
    "repetition": np.linspace(0, 4, HISTOGRAM_BINS + 1),
}
SHARE_EDGES = np.linspace(0, 1, HISTOGRAM_BINS + 1)


def edges_of(number: str) -> np.ndarray:
    """Where the histogram of a number is cut; what lies beyond the last edge counts to the last bin."""
    return EDGES.get(number, SHARE_EDGES)
