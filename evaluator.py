"""How good a model is: perplexity and bits per byte of text; exactness, BLEU and ROUGE of answers, skill by skill.

    python evaluator.py --model_path models/sft/sft_best.pth --test_data_path data/sft/sft_test.json --model_type sft
    python evaluator.py --model_path models/pretrain/pretrain_best.pth --test_data_path data/pretrain/val

It prints a table for people and writes everything, each answer included, as JSON next to the checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from rouge import Rouge
from tqdm import tqdm

from answer_checker import check_answer
from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError, option, parse_config, run_main
from conversation_data import parse_conversation
from gpt_model import IGNORED_LABEL, GPTModel
from optimization import resolve_device
from text_files import iter_documents, iter_records
from text_generation import Generation, Prompt, generate_texts

# -- texts against references ------------------------------------------------------------------------------------------

_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana and Han characters
_SEGMENT = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:[.'’-][^\W{_UNSPACED}]+)*|[^\w\s]")
ROUGE_MAX_SEGMENTS = 300  # the library `rouge` recurses once a segment; Python allows about 1,000 calls


def segment(text: str) -> list[str]:
    """Cut a text into what BLEU and ROUGE count: Chinese and Japanese characters, other words, punctuation marks.

    Chinese has no spaces. Split on spaces, a sentence is one "word", and even a nearly right answer scores 0.
    """
    return _SEGMENT.findall(text)


def corpus_bleu_score(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of a corpus (Papineni et al., 2002), 0 … 1, over the segments of `segment`, by nltk.

    Up to 4-grams, or fewer where no reference is that long: "42" against "42" is 1. An n-gram order without a match
    counts as 0.1 matches (method 1 of Chen and Cherry, 2014).
    """
    require_same_length(predictions, references)
    references, predictions = [segment(text) for text in references], [segment(text) for text in predictions]
    order = max(1, min(4, max(map(len, references), default=0)))
    smoothing = SmoothingFunction().method1
    return float(corpus_bleu([[reference] for reference in references], predictions, (1 / order,) * order, smoothing))


def mean_rouge_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004), 0 … 1, over the segments of `segment`, by `rouge`.

    Repetitions count as often as the reference has them. Equal texts score 1, however short; an empty one scores 0
    against a text. Only the first 300 segments of a text are compared.
    """
    require_same_length(predictions, references)
    totals = {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
    rouge = Rouge(exclusive=False)  # clipped counts as in the paper; the default would count sets
    for prediction, reference in zip(predictions, references, strict=True):
        segments, expected = segment(prediction)[:ROUGE_MAX_SEGMENTS], segment(reference)[:ROUGE_MAX_SEGMENTS]
        if segments == expected:
            totals = {name: total + 1.0 for name, total in totals.items()}
        elif segments and expected:
            # Numbers in place of words: the library would take every full stop for the end of a sentence
            numbers = {word: str(number) for number, word in enumerate(dict.fromkeys(segments + expected))}
            texts = (" ".join(numbers[word] for word in words) for words in (segments, expected))
            scores = rouge.get_scores(*texts)[0]
            totals = {name: total + scores[name]["f"] for name, total in totals.items()}
    return {name: total / max(1, len(references)) for name, total in totals.items()}


def require_same_length(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Raise a `ValueError` unless there is one reference for each prediction."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions cannot be compared with {len(references)} references")


# -- questions and their answers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A conversation up to its last answer, that answer, and whatever else the record says (skill, language, …)."""

    prompt: list[dict[str, str]]
    reference: str
    fields: dict[str, Any]


def load_questions(data_path: str | Path, max_samples: int | None = None) -> list[Question]:
    """The questions of an instruction file; with `max_samples`, so many of them, evenly spread over the file.

    Raises:
        UserError: the file cannot be read, or a record is malformed.
    """
    questions = []
    for where, record in iter_records(data_path):
        *prompt, answer = parse_conversation(record, where)
        if not prompt:
            raise UserError(f"{where} holds an answer without a question; put the user's message before it")
        if not isinstance(record.get("answer", ""), str):
            raise UserError(f'{where}: the field "answer" is not a text; it must be a string')
        questions.append(Question(prompt, answer["content"], record))
    count = min(max_samples or len(questions), len(questions))
    return [questions[index * len(questions) // count] for index in range(count)]


def grade(question: Question, generation: Generation) -> dict[str, Any]:
    """One answer beside its question: whether it is right and, where the record has an "answer", well-mannered."""
    fields = question.fields
    graded = {
        "instruction": question.prompt[-1]["content"],
        "reference": question.reference,
        "prediction": generation.text,
        "ended": generation.ended,
        "tokens": len(generation.token_ids) - generation.ended,  # </s> is no part of the answer
        **{name: fields[name] for name in ("answer", "skill", "language", "held_out") if name in fields},
    }
    if "answer" not in fields:
        return {**graded, "exact": generation.text.split() == question.reference.split()}
    check = check_answer(generation.text, fields["answer"], ended=generation.ended)
    return {**graded, **asdict(check), "preferred": check.preferred}


def score_answers(graded: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Scores of a group of graded answers: shares (0 … 1), BLEU, ROUGE, and the mean length in tokens."""
    predictions, references = [row["prediction"] for row in graded], [row["reference"] for row in graded]
    names = ("exact", "preferred", "complete", "polite", "repetitive", "rude", "ended")
    flags = {name: [row[name] for row in graded if name in row] for name in names}
    return {
        "count": len(graded),
        **{name: _mean(values) for name, values in flags.items() if values},
        "bleu": corpus_bleu_score(predictions, references),
        **mean_rouge_scores(predictions, references),
        "mean_tokens": _mean([row["tokens"] for row in graded]),
    }


def report_answers(questions: Sequence[Question], generations: Sequence[Generation]) -> dict[str, Any]:
    """Grade all answers: "scores" of all, "by_skill", "by_language", "by_held_out", and each of the "predictions"."""
    graded = [grade(*pair) for pair in zip(questions, generations, strict=True)]

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


# -- the evaluator -----------------------------------------------------------------------------------------------------


class GPTEvaluator:
    """Scores a language model.

    Args:
        model: the model; it is moved to `device` if one is given.
        tokenizer: the tokenizer that it was trained with.
        device: where to compute; None leaves the model where it is.

    Raises:
        UserError: the tokenizer has ids that the model does not know.
    """

    def __init__(
        self, model: GPTModel, tokenizer: ByteLevelBPETokenizer, device: torch.device | str | None = None
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
        self.model = model if device is None else model.to(device)
        self.tokenizer = tokenizer

    @torch.no_grad()
    def compute_perplexity(
        self,
        texts: str | Path | Iterable[str],
        *,
        batch_size: int = 16,
        stride: int | None = None,
        show_progress: bool = False,
    ) -> dict[str, float]:
        """Score every token of some texts exactly once, each text as a document of its own.

        The sums run over tokens, so no batch counts for more than its tokens. `<s>` opens each document and is not
        scored. A document longer than the context is read in windows that advance by `stride` tokens, and only the
        tokens that no earlier window has scored count: each is predicted from at least context − stride tokens.

        Args:
            texts: the texts; or the path of a text file, a folder or a name without its ending.
            batch_size: windows that are computed together; it changes nothing but speed and memory.
            stride: 1 … context; None means half the context.

        Returns:
            {"loss": nats a token, "perplexity": e^loss, "bits_per_byte": of the UTF-8 text, "tokens", "bytes"}

        Raises:
            UserError: there is no text, or the model's loss is not finite.
        """
        documents = iter_documents(texts) if isinstance(texts, str | Path) else iter(texts)
        stride = stride or max(1, self.model.config.max_seq_len // 2)
        if not 1 <= stride <= self.model.config.max_seq_len:
            raise ValueError(f"stride must be 1 to {self.model.config.max_seq_len}, not {stride}")
        nats, tokens, n_bytes = 0.0, 0, 0
        was_training = self.model.training
        self.model.eval()
        progress = tqdm(desc="scoring", unit="document", disable=not show_progress)
        try:
            while chunk := list(islice(documents, 1024)):  # so that a corpus never has to fit into memory
                windows = [
                    window for ids in self.tokenizer.encode_batch(chunk) for window in self._windows(ids, stride)
                ]
                windows.sort(key=lambda window: len(window[0]))  # windows of similar length need little padding
                for start in range(0, len(windows), batch_size):
                    nats += self._sum_of_losses(windows[start : start + batch_size])
                tokens += sum(target != IGNORED_LABEL for _, targets in windows for target in targets)
                n_bytes += sum(len(text.encode("utf-8", "replace")) for text in chunk)
                progress.update(len(chunk))
        finally:
            progress.close()
            self.model.train(was_training)
        if tokens == 0:
            raise UserError("there is no text to score; give at least one text that is not empty")
        loss = nats / tokens
        if not math.isfinite(loss):
            raise UserError("the model's loss is not a finite number; its weights are damaged, use another checkpoint")
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": nats / math.log(2) / n_bytes,
            "tokens": tokens,
            "bytes": n_bytes,
        }

    def _windows(self, ids: list[int], stride: int) -> Iterator[tuple[list[int], list[int]]]:
        """Inputs and targets, of equal length, that score each id of a document once; a target −100 counts not."""
        start_token = self.tokenizer.bos_token_id
        inputs = [self.tokenizer.eos_token_id if start_token is None else start_token, *ids]
        scored = begin = 0
        while scored < len(ids):
            end = min(begin + self.model.config.max_seq_len, len(ids))
            yield inputs[begin:end], [IGNORED_LABEL] * (scored - begin) + ids[scored:end]
            scored, begin = end, begin + stride

    def _sum_of_losses(self, windows: Sequence[tuple[list[int], list[int]]]) -> float:
        """Total −log p, in nats, of the targets of some windows."""
        device, width = self.model.token_embedding.weight.device, max(len(inputs) for inputs, _ in windows)
        # Padding stands on the right, where a causal model cannot see it: it needs no mask
        pad, ignored = [self.tokenizer.pad_token_id], [IGNORED_LABEL]
        inputs = torch.tensor([ids + pad * (width - len(ids)) for ids, _ in windows], device=device)  # (B, T)
        targets = torch.tensor([ids + ignored * (width - len(ids)) for _, ids in windows], device=device)  # (B, T)
        scored = targets != IGNORED_LABEL  # (B, T)
        hidden, targets = self.model.hidden_states(inputs)[scored], targets[scored]  # (N, D), (N,)
        # Logits are the largest tensor of all, so they are made for a thousand tokens at a time
        return sum(
            F.cross_entropy(self.model.lm_head(some).float(), their_targets, reduction="sum").item()
            for some, their_targets in zip(hidden.split(1024), targets.split(1024), strict=True)
        )

    def generate_predictions(
        self, instructions: Sequence[Prompt], max_gen_len: int = 64, *, chat: bool = True, **settings: Any
    ) -> list[str]:
        """The model's answers, greedy unless `settings` (those of `generate_texts`) say otherwise."""
        settings = {"max_gen_len": max_gen_len, "chat": chat, **settings}
        return [generation.text for generation in generate_texts(self.model, self.tokenizer, instructions, **settings)]

    @staticmethod
    def compute_bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
        """See `corpus_bleu_score`."""
        return corpus_bleu_score(predictions, references)

    @staticmethod
    def compute_rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """See `mean_rouge_scores`."""
        return mean_rouge_scores(predictions, references)

    def evaluate_pretrained(
        self,
        data_path: str | Path,
        *,
        max_samples: int | None = None,
        batch_size: int = 16,
        n_continuations: int = 8,
        show_progress: bool = False,
        **settings: Any,
    ) -> dict[str, Any]:
        """Perplexity of a text file, and how the model continues the beginnings of its first documents.

        Args:
            max_samples: score only so many documents, from the beginning.
            settings: those of `generate_texts`, for the continuations.

        Returns:
            {"scores": see `compute_perplexity`, "predictions": [{"prompt", "reference", "prediction"}]}
        """
        scores = self.compute_perplexity(
            islice(iter_documents(data_path), max_samples), batch_size=batch_size, show_progress=show_progress
        )
        documents = list(islice(iter_documents(data_path), n_continuations))
        prompts = [text[: max(1, min(len(text) // 3, 40))] for text in documents]
        continued = self.generate_predictions(prompts, **{"chat": False, **settings})
        return {
            "scores": scores,
            "predictions": [
                {"prompt": prompt, "reference": text[len(prompt) :], "prediction": prediction}
                for prompt, text, prediction in zip(prompts, documents, continued, strict=True)
            ],
        }

    def evaluate_sft(self, data_path: str | Path, *, max_samples: int | None = None, **settings: Any) -> dict[str, Any]:
        """Answer the questions of an instruction file and grade the answers.

        Where a record has an "answer", `answer_checker` grades with it; otherwise an answer is exact if it equals the
        record's response but for white space.

        Args:
            settings: those of `generate_texts`.

        Returns:
            see `report_answers`.
        """
        questions = load_questions(data_path, max_samples)
        prompts = [question.prompt for question in questions]
        return report_answers(questions, generate_texts(self.model, self.tokenizer, prompts, chat=True, **settings))


# -- the command line --------------------------------------------------------------------------------------------------


@dataclass
class EvaluationConfig:
    """Settings of one evaluation."""

    model_path: str = option("models/sft/sft_best.pth", "the checkpoint, in full precision or INT8")
    test_data_path: str | None = option(
        None, "text for pretrain, instruction data for sft; default data/pretrain/val or data/sft/sft_test.json"
    )
    model_type: str | None = option(
        None, "score text or answers; default by the checkpoint's stage", choices=("pretrain", "sft")
    )
    output_path: str | None = option(None, "JSON file for all results; default <model>_eval.json beside the model")
    max_samples: int | None = option(None, "score only so many records or documents")
    max_gen_len: int = option(64, "longest answer, in tokens")
    temperature: float = option(0.0, "0 takes the likeliest token; otherwise sample at this temperature")
    top_k: int = option(0, "sample among the k likeliest tokens; 0 means among all")
    batch_size: int = option(64, "answers or windows of text that are computed together")
    seed: int = option(42, "makes sampling repeatable")
    device: str = option("auto", "auto, cpu or cuda")
    num_threads: int | None = option(None, "CPU threads; default as many as torch takes")

    def validate(self) -> list[str]:
        """What is wrong with these settings, a sentence each."""
        limits = {"max_samples": 1, "max_gen_len": 1, "temperature": 0, "top_k": 0, "batch_size": 1, "num_threads": 1}
        return [
            f"--{name} must be at least {least}, not {value}"
            for name, least in limits.items()
            if (value := getattr(self, name)) is not None and not value >= least
        ]


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
    shares = [name for name in ("preferred", "ended", "bleu", "rouge-l") if name in report["scores"]]

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
    return format_table([*headings, *(f"{name} %" for name in shares), "tokens"], rows)


def answers_summary(report: Mapping[str, Any]) -> str:
    """The main scores of answers in one line."""
    scores = report["scores"]
    preferred = f", preferred {scores['preferred']:.1%}" if "preferred" in scores else ""
    return (
        f"{scores['count']} questions, exact {scores['exact']:.1%}{preferred}, BLEU {scores['bleu']:.3f}, "
        f"ROUGE-L {scores['rouge-l']:.3f}, {scores['mean_tokens']:.1f} tokens an answer, {scores['ended']:.1%} ended"
    )


def text_summary(report: Mapping[str, Any]) -> str:
    """The scores of text in one line."""
    scores = report["scores"]
    return (
        f"{scores['tokens']:,} tokens, loss {scores['loss']:.4f} nats a token, perplexity {scores['perplexity']:.2f}, "
        f"{scores['bits_per_byte']:.4f} bits per byte"
    )


def check_writable(path: str | Path) -> Path:
    """The path, if a file can be written there. To be called before the work, not after it."""
    path = Path(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{path} cannot be written; give --output_path a file in a folder that you may write to")
    return path


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write JSON whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror}); free some space and try again") from error


def main(argv: list[str] | None = None) -> None:
    """Evaluate a checkpoint from the command line."""
    from inference.quantizer import load_any  # a script may look upwards; the library part of this file does not

    config = parse_config(EvaluationConfig, argv, description="Evaluate a pretrained or a fine-tuned model.")
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    model_path = Path(config.model_path)
    output_path = check_writable(config.output_path or model_path.with_name(f"{model_path.stem}_eval.json"))
    model, tokenizer, checkpoint = load_any(model_path, resolve_device(config.device))
    model_type = config.model_type or ("pretrain" if checkpoint["stage"] == "pretrain" else "sft")
    data_path = config.test_data_path or ("data/pretrain/val" if model_type == "pretrain" else "data/sft/sft_test.json")

    started = time.perf_counter()
    evaluator = GPTEvaluator(model, tokenizer)
    evaluate = evaluator.evaluate_pretrained if model_type == "pretrain" else evaluator.evaluate_sft
    report = evaluate(
        data_path,
        max_samples=config.max_samples,
        batch_size=config.batch_size,
        max_gen_len=config.max_gen_len,
        temperature=config.temperature,
        top_k=config.top_k,
        seed=config.seed,
        show_progress=True,
    )
    about = {
        "model_path": str(model_path),
        "stage": checkpoint["stage"],
        "step": checkpoint["step"],
        "quantization": checkpoint.get("quantization"),
        "model_type": model_type,
        "test_data_path": str(data_path),
        "temperature": config.temperature,
        "seconds": round(time.perf_counter() - started, 2),
    }
    write_json({**about, **report}, output_path)
    if model_type == "sft":
        print(answers_table(report))
    summary = answers_summary(report) if model_type == "sft" else text_summary(report)
    print(f"{model_path} on {data_path}: {summary}; written to {output_path}")


if __name__ == "__main__":
    run_main(main)
