"""Texts against references: Chinese, English and mixed; swapped, spaced, empty; and how certain the figures are."""

import json
import math

import numpy as np
import pytest
import sacrebleu
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu, sentence_bleu
from sacrebleu.metrics import CHRF

from evaluation.answer_report import Question, interval_table, report_answers
from evaluation.intervals import bootstrap_mean, middle, resampled_sums, wilson
from evaluation.kept_work import KeptWork
from evaluation.text_metrics import (
    ROUGE_NAMES,
    bleu_interval,
    bleu_metric,
    corpus_bleu_score,
    corpus_score,
    distinct,
    last_number,
    numbers_match,
    repetition,
    rouge_scores,
    segment,
)
from inference.request import Generation

CHINESE = ["法国的首都是巴黎。", "机器学习让计算机从数据中学习。", "二加三等于五。"]
ENGLISH = ["The capital of France is Paris.", "Machines learn from data.", "Two plus three is five."]
MIXED = ["GPT-2 用了 12 层 Transformer。", "学习 machine learning 很有趣。", "答案是 42 apples。"]
WRONG = ["德国的首都是柏林。", "The capital of Germany is Berlin.", "答案是 24 pears。"]


def scores(predictions, references):
    """All scores of a corpus against references, on the scale 0 … 1."""
    found = {"bleu": corpus_bleu_score(predictions, references)}
    for name, metric in (("sacrebleu", bleu_metric(references)), ("chrf", CHRF())):
        found[name] = corpus_score(metric, predictions, references)[0] / 100
    rouges = [rouge_scores(*pair) for pair in zip(predictions, references, strict=True)]
    return {**found, **{name: sum(each[name] for each in rouges) / len(rouges) for name in ROUGE_NAMES}}


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [CHINESE, ENGLISH, MIXED], ids=["zh", "en", "mixed"])
def test_identical_is_one_and_empty_is_zero(texts):
    assert all(value == pytest.approx(1) for value in scores(texts, texts).values())
    assert all(value == 0 for value in scores([""] * len(texts), texts).values())
    partly = scores([text[:-3] for text in texts], texts)
    assert all(0 < value < 1 for value in partly.values()), partly


@pytest.mark.parametrize("texts", [CHINESE, ENGLISH, MIXED], ids=["zh", "en", "mixed"])
def test_swapping_prediction_and_reference(texts):
    """ROUGE's F1 is symmetric. BLEU is not: it punishes what is too short, and counts what the prediction says."""
    longer = [text + text[:4] for text in texts]
    one, other = scores(texts, longer), scores(longer, texts)
    for name in ROUGE_NAMES:
        assert one[name] == pytest.approx(other[name])
    assert one["bleu"] != pytest.approx(other["bleu"])
    assert one["sacrebleu"] != pytest.approx(other["sacrebleu"])


def test_spaces_change_nothing_in_chinese():
    spaced = [" ".join(text) + " " for text in CHINESE]
    assert all(value == pytest.approx(1) for value in scores(spaced, CHINESE).values())


def test_full_width_forms_are_what_they_stand_for():
    """In BLEU, ROUGE and numbers; sacreBLEU and chrF compare as written, which is what their signatures promise."""
    full, usual = ["答案是４２，ＡＢＣ。"], ["答案是42,ABC。"]
    found = scores(full, usual)
    assert segment(full[0]) == segment(usual[0])
    assert all(found[name] == 1 for name in ("bleu", *ROUGE_NAMES))
    assert 0 < found["chrf"] < 1
    assert numbers_match(full[0], usual[0])


def test_scores_of_others_are_theirs():
    """The very numbers of sacreBLEU and nltk, and the signature names the tokenizer for the language."""
    predictions = [CHINESE[0], *WRONG[:2]]
    references = [CHINESE[0], *ENGLISH[:2]]
    score, (low, high), signature = corpus_score(bleu_metric(references), predictions, references)
    assert score == pytest.approx(sacrebleu.corpus_bleu(predictions, [references], tokenize="zh").score)
    assert low <= score <= high and "tok:zh" in signature
    assert "tok:13a" in corpus_score(bleu_metric(ENGLISH), ENGLISH, ENGLISH)[2]
    chrf = corpus_score(CHRF(), predictions, references)
    assert chrf[0] == pytest.approx(sacrebleu.corpus_chrf(predictions, [references]).score) and "nc:6" in chrf[2]


def test_several_references_of_different_number():
    references = [[CHINESE[0], "巴黎。"], [CHINESE[1]], [CHINESE[2], "五。", "是五。"]]
    predictions = ["巴黎。", CHINESE[1], "是五。"]
    assert corpus_score(bleu_metric(references), predictions, references)[0] == pytest.approx(100)
    assert corpus_score(CHRF(), predictions, references)[0] == pytest.approx(100)


# -- numbers, repetition -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 and 4, so #### 7", 7),
        ("答案是１２。", 12),
        ("$1,234,567.50 in all.", 1234567.5),
        ("It is -3", -3),
        ("It is −3.5 °C.", -3.5),
        ("between 3-5", 5),
        ("GPT-2", 2),
        ("1e3 m", 1000),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_numbers_are_compared_as_numbers():
    assert numbers_match("So 3 + 4 = 7.0", "#### 7") is True
    assert numbers_match("7 apples, no, 8", "#### 7") is False
    assert numbers_match("no idea", "#### 7") is False
    assert numbers_match("7", "seven") is None, "there is nothing to match"
    assert numbers_match("7", ["eight", "7"]) is True


def test_repetition_and_distinct():
    assert repetition("a b c d e f g") == 0
    assert repetition("好" * 10) == pytest.approx(1 - 1 / 7)
    assert repetition("") == repetition("a b") == 0
    assert distinct(["a b", "a c"], 1) == 3 / 4
    assert distinct(["a b", "a b"], 2) == 1 / 2
    assert distinct([], 1) == 0


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_wilson_is_the_published_interval():
    """Against the quadratic that defines it: |p̂ − p| = z √(p (1 − p) / n) at both ends."""
    for hits, count in ((0, 10), (3, 10), (88, 120), (10, 10)):
        low, high = wilson(hits, count)
        share = hits / count
        assert 0 <= low <= share <= high <= 1 and high - low > 0.05
        for end in {low, high} - {0.0, 1.0}:
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), rel=1e-6)
    assert wilson(0, 0) == (0, 1)
    # The first two exercises of docs/evaluation.md
    assert wilson(10, 10)[0] == pytest.approx(1 / (1 + 1.96**2 / 10), abs=1e-4)
    assert wilson(541, 612) == pytest.approx((0.856, 0.907), abs=1e-3)


def test_bootstrap_covers_and_repeats():
    """Nearly all of many experiments' intervals of a mean hold the true one; the same seed gives the same interval."""
    generator = np.random.default_rng(0)
    held = 0
    for experiment in range(40):
        low, high = bootstrap_mean(generator.normal(size=60), experiment)
        held += low <= 0 <= high
    assert 34 <= held <= 40
    values = generator.normal(size=50)
    assert bootstrap_mean(values, 1) == bootstrap_mean(values, 1) != bootstrap_mean(values, 2)


def test_bleu_interval_resamples_the_score_of_nltk():
    """Each resample's BLEU equals nltk's of the drawn sentences."""
    predictions = [*CHINESE, *ENGLISH, WRONG[0], "", "42"]
    references = [*CHINESE, *ENGLISH[::-1], CHINESE[0], "a b", "42"]
    low, high = bleu_interval(predictions, references, seed=3)
    found = []
    generator = np.random.default_rng(3)
    for _ in range(1000):
        drawn = generator.integers(len(references), size=len(references))
        right = [[segment(references[place])] for place in drawn]
        said = [segment(predictions[place]) for place in drawn]
        found.append(corpus_bleu(right, said, (0.25,) * 4, SmoothingFunction().method1))
    assert (low, high) == pytest.approx(middle(np.array(found)))
    assert resampled_sums(np.ones((5, 1))).tolist() == [[5.0]] * 1000


def test_a_report_has_an_interval_for_each_figure():
    """But for counts, and for distinct-n, which a bootstrap cannot tell of."""
    questions = [Question([{"role": "user", "content": "?"}], text, {}) for text in (*CHINESE, *MIXED)]
    answers = [Generation(text, True, [1, 2]) for text in (*CHINESE, *WRONG)]
    report = report_answers(questions, answers, seed=1)
    without = {"count", "distinct_1", "distinct_2"}
    assert set(report["scores"]) - without == set(report["intervals"])
    for name, (low, high) in report["intervals"].items():
        assert low <= report["scores"][name] <= high, name
    assert report["scores"]["exact"] == 0.5
    assert report["scores"]["number"] == 0, "12 and 42 are not said"
    assert "exact" in interval_table(report) and "sacrebleu" in interval_table(report)
    assert json.dumps(report) == json.dumps(report_answers(questions, answers, seed=1))


def test_bleu_of_sentences_is_the_mean_of_nltk_s():
    texts = [("the red cat sat down", "the red cat sat there"), ("法国的首都是巴黎。", "法国的首都是里昂。")]
    questions = [Question([{"role": "user", "content": "?"}], reference, {}) for _, reference in texts]
    report = report_answers(questions, [Generation(said, True, [1]) for said, _ in texts])
    words = [[list(text) if "的" in text else text.split() for text in pair] for pair in texts]
    expected = [sentence_bleu([right], said, smoothing_function=SmoothingFunction().method1) for said, right in words]
    assert report["scores"]["sentence_bleu"] == pytest.approx(sum(expected) / 2, abs=1e-4)


# -- interruptions -----------------------------------------------------------------------------------------------------


def test_interrupted_work_goes_on(tmp_path):
    path, done = tmp_path / "x" / "unfinished.jsonl", []

    def piece(number):
        done.append(number)
        return [number, "文"]

    first = KeptWork(path, {"model": 1})
    assert [first.of(str(number), lambda number=number: piece(number)) for number in (0, 1)] == [[0, "文"], [1, "文"]]
    with path.open("a") as file:
        file.write('{"key": "cut sh')
    again = KeptWork(path, {"model": 1})
    assert again.found == 2
    assert [again.of(str(number), lambda number=number: piece(number))[0] for number in (0, 1, 2)] == [0, 1, 2]
    assert done == [0, 1, 2]
    assert KeptWork(path, {"model": 2}).found == 0
    assert not path.exists(), "another model's work is of no use"
    again.finish()
