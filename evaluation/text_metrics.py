"""Texts against references, and what texts are by themselves: BLEU, ROUGE, chrF, numbers, repetition.

Right for Chinese, English and both in one text: BLEU and ROUGE compare Chinese by characters and other languages by
words, chrF everything by characters.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from nltk.translate.bleu_score import SmoothingFunction, closest_ref_length, corpus_bleu, modified_precision
from rouge import Rouge
from sacrebleu.metrics import BLEU
from sacrebleu.metrics.base import Metric

from evaluation.intervals import Interval, middle, resampled_sums

_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana and Han characters
_SEGMENT = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:[.'’-][^\W{_UNSPACED}]+)*|[^\w\s]")
ROUGE_NAMES = ("rouge-1", "rouge-2", "rouge-l")
ROUGE_MAX_SEGMENTS = 300  # the library `rouge` recurses once a segment; Python allows about 1,000 calls


def segment(text: str) -> list[str]:
    """Cut a text into what BLEU and ROUGE count: Chinese and Japanese characters, other words, punctuation marks.

    Chinese has no spaces. Split on spaces, a sentence is one "word", and even a nearly right answer scores 0. White
    space does not count, and full-width forms are what they stand for ("４２" is "42", "，" is ",").
    """
    return _SEGMENT.findall(unicodedata.normalize("NFKC", text))


References = str | Sequence[str]  # one right text, or several


def _texts(references: References) -> Sequence[str]:
    return [references] if isinstance(references, str) else references


def corpus_bleu_score(predictions: Sequence[str], references: Sequence[References]) -> float:
    """BLEU of a corpus (Papineni et al., 2002), 0 … 1, over the segments of `segment`, by nltk.

    Of several references, an n-gram may stand in any, and the length closest to the prediction's is the one compared.
    Up to 4-grams, or fewer where no reference is that long: "42" against "42" is 1. An n-gram order without a match
    counts as 0.1 matches (method 1 of Chen and Cherry, 2014).
    """
    require_same_length(predictions, references)
    right = [[segment(text) for text in _texts(texts)] for texts in references]
    order = max(1, min(4, max((len(words) for texts in right for words in texts), default=0)))
    smoothing = SmoothingFunction().method1
    return float(corpus_bleu(right, [segment(text) for text in predictions], (1 / order,) * order, smoothing))


def bleu_interval(predictions: Sequence[str], references: Sequence[References], seed: int = 0) -> Interval:
    """The bootstrap interval of `corpus_bleu_score`."""
    require_same_length(predictions, references)
    right = [[segment(text) for text in _texts(texts)] for texts in references]
    order = max(1, min(4, max((len(words) for texts in right for words in texts), default=0)))
    rows = []  # matches and n-grams of each order, lengths of prediction and reference
    for prediction, texts in zip(map(segment, predictions), right, strict=True):
        precisions = [modified_precision(texts, prediction, n) for n in range(1, order + 1)]
        counts = [part for p in precisions for part in (p.numerator, p.denominator)]
        rows.append([*counts, len(prediction), closest_ref_length(texts, len(prediction))])
    sums = resampled_sums(np.array(rows, dtype=float), seed)
    matches, ngrams, (said, expected) = sums[:, 0:-2:2], sums[:, 1:-2:2], sums[:, -2:].T
    smoothed = np.where(matches == 0, 0.1, matches) / ngrams  # method 1
    brevity = np.exp(np.minimum(0, 1 - expected / np.maximum(said, 1)))
    return middle(np.where(matches[:, 0] == 0, 0, brevity * np.exp(np.log(smoothed).mean(axis=1))))


def rouge_scores(prediction: str, reference: References) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004), 0 … 1, over the segments of `segment`, by the library `rouge`.

    Repetitions count as often as the reference has them. Equal texts score 1, however short; an empty one scores 0
    against a text. Only the first 300 segments of a text are compared. Of several references the best one counts, for
    each of the three by itself (section 2.1 of the paper).
    """
    scores = [_rouge_of_one(prediction, text) for text in _texts(reference)]
    return {name: max(score[name] for score in scores) for name in ROUGE_NAMES}


def _rouge_of_one(prediction: str, reference: str) -> dict[str, float]:
    words, expected = segment(prediction)[:ROUGE_MAX_SEGMENTS], segment(reference)[:ROUGE_MAX_SEGMENTS]
    if words == expected or not words or not expected:
        return dict.fromkeys(ROUGE_NAMES, float(words == expected))
    # Numbers in place of words: the library would take every full stop for the end of a sentence
    numbers = {word: str(number) for number, word in enumerate(dict.fromkeys(words + expected))}
    texts = (" ".join(numbers[word] for word in side) for side in (words, expected))
    scores = Rouge(exclusive=False).get_scores(*texts)[0]  # clipped counts as in the paper; the default counts sets
    return {name: scores[name]["f"] for name in ROUGE_NAMES}


def mean_rouge_scores(predictions: Sequence[str], references: Sequence[References]) -> dict[str, float]:
    """The means of `rouge_scores` over a corpus."""
    require_same_length(predictions, references)
    scores = [rouge_scores(*pair) for pair in zip(predictions, references, strict=True)]
    return {name: sum(score[name] for score in scores) / max(1, len(scores)) for name in ROUGE_NAMES}


def require_same_length(predictions: Sequence[str], references: Sequence[References]) -> None:
    """Raise a `ValueError` unless each prediction has its reference, or references."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions cannot be compared with {len(references)} references")


# -- scores of others, comparable with what they publish ---------------------------------------------------------------

_HAN = re.compile(r"[\u4e00-\u9fff]")


def bleu_metric(references: Sequence[References]) -> BLEU:
    """sacreBLEU's BLEU (arXiv:1804.08771) for these references: where any has Chinese, its characters are words."""
    chinese = any(_HAN.search(text) for texts in references for text in _texts(texts))
    return BLEU(tokenize="zh" if chinese else "13a")


def corpus_score(
    metric: Metric, predictions: Sequence[str], references: Sequence[References], seed: int = 0
) -> tuple[float, Interval, str]:
    """A corpus score of sacreBLEU's, 0 … 100, its bootstrap interval, and the signature, which says what was computed.

    Raises:
        ValueError: predictions and references differ in number, or there are none.
    """
    require_same_length(predictions, references)
    if not references:
        raise ValueError("there is nothing to score")
    most = max(len(_texts(texts)) for texts in references)
    streams = [[(*_texts(texts), *[None] * most)[place] for texts in references] for place in range(most)]
    score = metric.corpus_score(list(predictions), streams).score
    # Its own bootstrap holds all statistics of all resamples in memory at once
    statistics = np.array(metric._extract_corpus_statistics(list(predictions), streams))
    sums = resampled_sums(statistics, seed)
    scores = np.array([metric._compute_score_from_stats(row.tolist()).score for row in sums])
    return score, middle(scores), metric.get_signature().format()


def sacre_bleu(translations: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """BLEU of translations, 0 … 100, and its signature.

    Raises:
        ValueError: the two differ in number, or there are none.
    """
    if len(translations) != len(references) or not references:
        raise ValueError(f"{len(translations)} translations and {len(references)} references cannot be compared")
    metric = bleu_metric(references)
    return metric.corpus_score(list(translations), [list(references)]).score, str(metric.get_signature())


# -- numbers -----------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)


def last_number(text: str) -> float | None:
    """The last number of a text, which in GSM8K's shape is the answer (arXiv:2110.14168); None if there is none.

    Full-width digits and the minus sign "−" count, commas within numbers do not. A "-" right behind a digit or letter
    is a dash: the last number of "3-5" is 5.
    """
    found = None
    text = unicodedata.normalize("NFKC", text)
    for found in _NUMBER.finditer(text):  # noqa: B007 (the last one is what is wanted)
        pass
    if found is None:
        return None
    number = found[0].replace(",", "").replace("−", "-")
    if number[0] in "-+" and found.start() and text[found.start() - 1].isalnum():
        number = number[1:]
    return float(number)


def numbers_match(prediction: str, references: References) -> bool | None:
    """Whether the last numbers agree with those of a reference; None if no reference has a number."""
    expected = [number for text in _texts(references) if (number := last_number(text)) is not None]
    if not expected:
        return None
    said = last_number(prediction)
    return said is not None and any(math.isclose(said, number, rel_tol=1e-9, abs_tol=1e-9) for number in expected)


# -- texts by themselves -----------------------------------------------------------------------------------------------


def _ngrams(words: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(order)), strict=False))


def repetition(text: str) -> float:
    """The share of a text's 4-grams of segments that it has had before, 0 … 1 (seq-rep-4, arXiv:1908.04319)."""
    grams = _ngrams(segment(text), 4)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[str], order: int) -> float:
    """Different n-grams of segments in all texts together / all of them, 0 … 1 (distinct-n, arXiv:1510.03055).

    It falls as there are more texts, so only sets of the same questions compare; and has no bootstrap interval, since
    drawing texts twice would repeat their n-grams by itself.
    """
    counts = Counter(gram for text in texts for gram in _ngrams(segment(text), order))
    return len(counts) / max(1, counts.total())
