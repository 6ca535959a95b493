"""Answers beside their references: BLEU, ROUGE and exactness, by skill, by language and by what was held out.

It grades texts, whoever wrote them: a neural model (evaluator.py) or n-grams (ngram_baseline).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sacrebleu.metrics import CHRF

from command_line import UserError, existing_parent, replacing
from evaluation.answer_checker import check_answer
from evaluation.intervals import Interval, bootstrap_mean, middle, resampled_sums, wilson
from evaluation.score_page import ScorePage, figures_of
from evaluation.text_metrics import (
    ROUGE_NAMES,
    bleu_interval,
    bleu_metric,
    corpus_bleu_score,
    corpus_score,
    distinct,
    numbers_match,
    repetition,
    rouge_scores,
)
from inference.request import Generation
from text.account import Account
from text.chat_template import Message
from text.conversation_data import load_records, parse_conversation

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
        "repetition": repetition(generation.text),
        "sentence_bleu": corpus_bleu_score([generation.text], [question.references]),
        **rouge_scores(generation.text, question.references),
        **{name: fields[name] for name in ("references", "answer", "skill", "language", "held_out") if name in fields},
    }
    number = numbers_match(generation.text, question.references)
    if number is not None:
        graded["number"] = number
    if likelihood is not None:
        graded |= {f"reference_{name}": value for name, value in likelihood._asdict().items()}
    if "answer" not in fields:
        said = final_answer(generation.text)
        return {**graded, "exact": any(said == final_answer(text) for text in question.references)}
    check = check_answer(generation.text, fields["answer"], ended=generation.ended)
    return {**graded, **asdict(check), "preferred": check.preferred}


WORST = 30  # answers on the page
MEANS = ("sentence_bleu", *ROUGE_NAMES, "repetition")  # over answers
SHARES = ("exact", "number", "preferred", "complete", "polite", "repetitive", "rude", "ended")


def score_answers(graded: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Scores of a group of graded answers: shares (0 … 1), BLEU, ROUGE, and the mean length in tokens."""
    predictions = [row["prediction"] for row in graded]
    references = [[row["reference"], *row.get("references", [])] for row in graded]
    flags = {name: [row[name] for row in graded if name in row] for name in SHARES}
    return {
        "count": len(graded),
        **{name: _mean(values) for name, values in flags.items() if values},
        "bleu": corpus_bleu_score(predictions, references),
        **{name: _mean([row[name] for row in graded]) for name in MEANS},
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


def score_all_answers(graded: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """`score_answers` of all graded answers, what is only computed for all, and how certain it is.

    Args:
        seed: of the bootstrap.

    Returns:
        {"scores": also with "sacrebleu" and "chrf", 0 … 100, and "distinct_1", "distinct_2"; "intervals": the 95 %
        interval of each, see evaluation/intervals.py; "signatures": sacreBLEU's}
    """
    predictions = [row["prediction"] for row in graded]
    references = [[row["reference"], *row.get("references", [])] for row in graded]
    scores: dict[str, Any] = score_answers(graded)
    intervals: dict[str, Interval] = {"bleu": bleu_interval(predictions, references, seed)}
    signatures = {}
    for name, metric in (("sacrebleu", bleu_metric(references)), ("chrf", CHRF())):
        scores[name], intervals[name], signatures[name] = corpus_score(metric, predictions, references, seed)
    for name in SHARES:
        if flags := [row[name] for row in graded if name in row]:
            intervals[name] = wilson(sum(flags), len(flags))
    for name, field in (*((name, name) for name in MEANS), ("mean_tokens", "tokens")):
        intervals[name] = bootstrap_mean(np.array([row[field] for row in graded]), seed)
    if scored := [row for row in graded if row.get("reference_tokens")]:
        rows = [[row[f"reference_{name}"] for name in ReferenceScore._fields] for row in scored]
        nats, hits, tokens = resampled_sums(np.array(rows, dtype=float), seed).T
        intervals["reference_perplexity"] = middle(np.exp(np.minimum(nats / tokens, 700.0)))
        intervals["token_accuracy"] = middle(hits / tokens)
    scores |= {f"distinct_{order}": distinct(predictions, order) for order in (1, 2)}
    return {"scores": scores, "intervals": intervals, "signatures": signatures}


def report_answers(
    questions: Sequence[Question],
    generations: Sequence[Generation],
    likelihoods: Sequence[ReferenceScore | None] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Grade all answers: see `score_all_answers`; "by_skill", "by_language", "by_held_out"; and all "predictions".

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

    report = score_all_answers(graded, seed)
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


def interval_table(report: Mapping[str, Any]) -> str:
    """Each of a report's figures with its 95 % interval, as a table."""
    rows = [
        [name, f"{report['scores'][name]:.4f}", f"{low:.4f} … {high:.4f}"]
        for name, (low, high) in report["intervals"].items()
    ]
    return format_table(["figure", "value", "95 % interval"], rows)


def answers_page(report: Mapping[str, Any], title: str, about: Mapping[str, Any]) -> ScorePage:
    """A report of answers as a page; the worst are the wrong ones of lowest ROUGE-L."""
    rows = report["predictions"]
    bins = np.histogram([row["rouge-l"] for row in rows], bins=20, range=(0, 1))[0].tolist()

    def badness(row: Mapping[str, Any]) -> tuple[float, float]:
        return row["rouge-l"], -row.get("reference_nats", 0.0)

    names = ("instruction", "reference", "prediction", "skill", "rouge-l", "ended")
    wrong = sorted((row for row in rows if not row["exact"]), key=badness)
    worst = [{name: row[name] for name in names if name in row} for row in wrong[:WORST]]
    groups = {
        f"Exactly right, by {name.replace('_', ' ')}": [
            (key, scores["count"], scores["exact"], wilson(scores["exact"] * scores["count"], scores["count"]))
            for key, scores in report[f"by_{name}"].items()
        ]
        for name in ("skill", "language", "held_out")
        if f"by_{name}" in report
    }
    return ScorePage(
        title, about, figures_of(report), report["signatures"], groups, histograms={"Answers by ROUGE-L": bins},
        worst=[{**row, "ended": "yes" if row["ended"] else "no"} for row in worst],
    )  # fmt: skip


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
    number = f", the last number right {scores['number']:.1%}" if "number" in scores else ""
    return (
        f"{scores['count']} questions, exact {scores['exact']:.1%}{preferred}{number}, BLEU {scores['bleu']:.3f}, "
        f"{rouge}, {scores['mean_tokens']:.1f} tokens an answer, {scores['ended']:.1%} ended{likelihood}"
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
