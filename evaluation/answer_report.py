"""Answers beside their references: BLEU, ROUGE and exactness, by skill, by language and by what was held out.

It grades texts, whoever wrote them: a neural model (evaluator.py) or n-grams (ngram_baseline).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from rouge import Rouge

from checkpoint import existing_parent
from command_line import UserError, replacing
from evaluation.answer_checker import check_answer
from inference.request import Generation
from text.account import Account
from text.chat_template import Message
from text.conversation_data import load_records, parse_conversation

# -- texts against references ------------------------------------------------------------------------------------------

_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana and Han characters
_SEGMENT = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:[.'’-][^\W{_UNSPACED}]+)*|[^\w\s]")
ROUGE_NAMES = ("rouge-1", "rouge-2", "rouge-l")
ROUGE_MAX_SEGMENTS = 300  # the library `rouge` recurses once a segment; Python allows about 1,000 calls


def segment(text: str) -> list[str]:
    """Cut a text into what BLEU and ROUGE count: Chinese and Japanese characters, other words, punctuation marks.

    Chinese has no spaces. Split on spaces, a sentence is one "word", and even a nearly right answer scores 0.
    """
    return _SEGMENT.findall(text)


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
    return {name: _mean([score[name] for score in scores]) for name in ROUGE_NAMES}


def require_same_length(predictions: Sequence[str], references: Sequence[References]) -> None:
    """Raise a `ValueError` unless each prediction has its reference, or references."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions cannot be compared with {len(references)} references")


# -- questions and their answers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A conversation up to its last answer, that answer, and whatever else the record says (skill, language, …)."""

    prompt: list[Message]
    reference: str
    fields: dict[str, Any]

    @property
    def references(self) -> list[str]:
        """The right answer, and others that are as good: the record's field "references"."""
        return [self.reference, *self.fields.get("references", [])]


class ReferenceScore(NamedTuple):
    """How likely a model finds a reference answer: −log p in nats, tokens that it held likeliest, tokens in all."""

    nats: float
    hits: int
    tokens: int


def parse_question(record: dict, where: str) -> Question:
    """A test question: an instruction record, whose field "answer" is the plain right answer if it has another one."""
    *prompt, answer = parse_conversation(record, where)
    if not prompt:
        raise UserError(f"{where} holds an answer without a question; put the user's message before it")
    fields = dict(record)
    if not isinstance(fields.get("answer", ""), str):
        raise UserError(f'{where}: the field "answer" is not a text; it must be a string')
    references = fields.get("references", [])
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise UserError(f'{where}: the field "references" must be a list of texts, other right answers')
    if fields.get("answer") == answer["content"] and not {"response", "output", "completion"} & record.keys():
        del fields["answer"]  # of a question/answer record it is the reference itself
    return Question(prompt, answer["content"], fields)


def load_questions(
    data_path: str | Path,
    max_samples: int | None = None,
    account: Account | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Question]:
    """The questions of an instruction file; with `max_samples`, at most that many, evenly spread over the file.

    Args:
        account, columns: see `conversation_data.load_records`.

    Raises:
        UserError: the file cannot be read, or a record is malformed.
    """
    questions = load_records(data_path, parse_question, account, columns)
    if not questions:
        raise UserError(f"{data_path} has no question with an answer to compare with; give at least one")
    count = min(max_samples or len(questions), len(questions))
    return [questions[index * len(questions) // count] for index in range(count)]


def final_answer(text: str) -> list[str]:
    """What of an answer has to be right, as words: what stands behind the last "####", where there is such a mark.

    GSM8K closes its solutions so (arXiv:2110.14168); commas within its numbers do not count.
    """
    _, mark, final = text.rpartition("####")
    return final.replace(",", "").split() if mark else text.split()


def grade(question: Question, generation: Generation, likelihood: ReferenceScore | None = None) -> dict[str, Any]:
    """One answer beside its question: whether it is right and, where the record has an "answer", well-mannered; and
    how likely the model finds the reference."""
    fields = question.fields
    graded = {
        "instruction": question.prompt[-1]["content"],
        "reference": question.reference,
        "prediction": generation.text,
        "ended": generation.ended,
        "tokens": len(generation.token_ids) - generation.ended,  # </s> is not part of the answer
        **rouge_scores(generation.text, question.references),
        **{name: fields[name] for name in ("references", "answer", "skill", "language", "held_out") if name in fields},
    }
    if likelihood is not None:
        graded |= {f"reference_{name}": value for name, value in likelihood._asdict().items()}
    if "answer" not in fields:
        said = final_answer(generation.text)
        return {**graded, "exact": any(said == final_answer(text) for text in question.references)}
    check = check_answer(generation.text, fields["answer"], ended=generation.ended)
    return {**graded, **asdict(check), "preferred": check.preferred}


def score_answers(graded: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Scores of a group of graded answers: shares (0 … 1), BLEU, ROUGE, and the mean length in tokens."""
    predictions = [row["prediction"] for row in graded]
    references = [[row["reference"], *row.get("references", [])] for row in graded]
    names = ("exact", "preferred", "complete", "polite", "repetitive", "rude", "ended")
    flags = {name: [row[name] for row in graded if name in row] for name in names}
    return {
        "count": len(graded),
        **{name: _mean(values) for name, values in flags.items() if values},
        "bleu": corpus_bleu_score(predictions, references),
        **{name: _mean([row[name] for row in graded]) for name in ROUGE_NAMES},
        **_likelihood_of_references(graded),
        "mean_tokens": _mean([row["tokens"] for row in graded]),
    }


def _likelihood_of_references(graded: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Perplexity of the reference answers and the share of their tokens that the model held likeliest, over tokens."""
    scored = [row for row in graded if row.get("reference_tokens")]
    if not scored:
        return {}
    nats, hits, tokens = (sum(row[f"reference_{name}"] for row in scored) for name in ReferenceScore._fields)
    return {
        "reference_perplexity": math.exp(min(nats / tokens, 700.0)),
        "token_accuracy": hits / tokens,
        "references_scored": len(scored),
    }


def report_answers(
    questions: Sequence[Question],
    generations: Sequence[Generation],
    likelihoods: Sequence[ReferenceScore | None] | None = None,
) -> dict[str, Any]:
    """Grade all answers: "scores" of all, "by_skill", "by_language", "by_held_out", and each of the "predictions".

    Raises:
        UserError: there is no question.
    """
    if not questions:
        raise UserError("the test data has no question; scores of nothing would only look like scores")
    likelihoods = likelihoods or [None] * len(questions)
    graded = [grade(*three) for three in zip(questions, generations, likelihoods, strict=True)]

    def scores_by(key: Callable[[Mapping[str, Any]], str]) -> dict[str, dict[str, float]]:
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for row in graded:
            groups.setdefault(key(row), []).append(row)
        return {name: score_answers(groups[name]) for name in sorted(groups)}

    report: dict[str, Any] = {"scores": score_answers(graded)}
    for name in ("skill", "language", "held_out"):
        if any(name in row for row in graded):
            report[f"by_{name}"] = scores_by(lambda row, name=name: str(row.get(name)))
    if "by_skill" in report and "by_language" in report:
        report["by_skill_and_language"] = scores_by(lambda row: f"{row.get('skill')}/{row.get('language')}")
    return {**report, "predictions": graded}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


# -- the report, for people and as a file ------------------------------------------------------------------------------


def format_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text: the first column left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(headings, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in cells).rstrip()
        for cells in (enumerate(zip(row, widths, strict=True)) for row in (headings, *rows))
    )


def answers_table(report: Mapping[str, Any]) -> str:
    """A report of answers as a table: exactly right by skill and language, then other scores, then by kind of test."""

    def percent(scores: Mapping[str, float] | None, name: str) -> str:
        return f"{100 * scores[name]:.1f}" if scores and name in scores else "–"

    crossed, languages = report.get("by_skill_and_language", {}), list(report.get("by_language", {}))
    shares = ("preferred", "ended", "bleu", *ROUGE_NAMES, "token_accuracy")
    shares = [name for name in shares if name in report["scores"]]

    def row(label: str, scores: Mapping[str, float], by_language: Mapping[str, Mapping[str, float]]) -> list[str]:
        return [
            label,
            str(scores["count"]),
            *(percent(by_language.get(language), "exact") for language in languages),
            percent(scores, "exact"),
            *(percent(scores, name) for name in shares),
            f"{scores['mean_tokens']:.1f}",
        ]

    rows = [
        row(skill, scores, {language: crossed.get(f"{skill}/{language}") for language in languages})
        for skill, scores in report.get("by_skill", {}).items()
    ]
    rows.append(row("all", report["scores"], report.get("by_language", {})))
    rows += [row(f"held out: {kind}", scores, {}) for kind, scores in report.get("by_held_out", {}).items()]
    headings = ["skill", "count", *(f"exact {language} %" for language in languages), "exact %"]
    headings += [f"{'next token' if name == 'token_accuracy' else name} %" for name in shares]
    return format_table([*headings, "tokens"], rows)


def answers_summary(report: Mapping[str, Any]) -> str:
    """The main scores of answers in one line."""
    scores = report["scores"]
    preferred = f", preferred {scores['preferred']:.1%}" if "preferred" in scores else ""
    likelihood = ""
    if "reference_perplexity" in scores:
        unscored = scores["count"] - scores["references_scored"]
        left_out = f" ({unscored} of them longer than the context, left out)" if unscored else ""
        likelihood = (
            f"; reference answers{left_out}: perplexity {scores['reference_perplexity']:.3f}, next token right "
            f"{scores['token_accuracy']:.1%}"
        )
    rouge = ", ".join(f"{name.upper()} {scores[name]:.3f}" for name in ROUGE_NAMES)
    return (
        f"{scores['count']} questions, exact {scores['exact']:.1%}{preferred}, BLEU {scores['bleu']:.3f}, {rouge}, "
        f"{scores['mean_tokens']:.1f} tokens an answer, {scores['ended']:.1%} ended{likelihood}"
    )


def check_writable(path: str | Path) -> Path:
    """The path, if a file can be written there. To be called before the work, not after it."""
    path = Path(path)
    folder = existing_parent(path)
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{path} cannot be written; give --output_path a file in a folder that you may write to")
    return path


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write JSON whole or not at all."""
    with replacing(path, "free some space or choose another --output_path") as file:
        # A record may quote half of a surrogate pair, which has no UTF-8
        file.write((json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "replace"))
