"""Multiple choice by likelihood: which of the given answers does the model find likeliest?

    python -m evaluation.multiple_choice --model_path models/sft/sft_best.pth --data_path data/public/ceval/val

Questions are read as they are published: C-Eval, CMMLU and MMLU (CSV with or without a first line of names, a subject a
file; JSONL or parquet), ARC (JSONL, both shapes), or {"question", "choices": […], "answer": number, letter or text}.

Everything that decides an answer is as in lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness):
the words around a question, a blank between it and its answer, and

    acc       the answer of the highest log p(answer | question) is the right one
    acc_norm  the answer of the highest log p(answer | question) / characters of the answer is
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: modules are imported from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, weight_fingerprint
from command_line import UserError, option, parse_config, run_main
from data_loader import length_multiple, lengthened, pad_rows
from evaluation.answer_report import check_writable, format_table, interval_table, write_json
from evaluation.intervals import RESAMPLES, middle, wilson
from evaluation.kept_work import KeptWork
from evaluation.score_page import ScorePage, figures_of, write_page
from evaluation.text_report import CALIBRATION_BINS, calibration_error, calibration_rows
from gpt_model import GPTModel
from inference.quantizer import load_any
from machine import PRECISIONS, resolve_device
from progress import Progress
from text.text_files import RECORD_ENDINGS, csv_lines, iter_records, resolve_files

LETTERS = "ABCDEFGHIJ"
SPLIT = re.compile(r"_(test|val|validation|dev|train)$")  # what published files have behind their subject
CHINESE = re.compile(r"[\u4e00-\u9fff]")
PIECE = 256  # questions between two moments at which an interrupted evaluation can go on


@dataclass(frozen=True)
class Choice:
    """A question, the answers to choose from, and the number of the right one."""

    question: str
    choices: tuple[str, ...]
    right: int
    subject: str
    style: str  # "letters" or "texts": what is scored behind the question


# -- questions as they are published -----------------------------------------------------------------------------------


def parse_choice(record: dict, where: str, subject: str) -> Choice | None:
    """A question of any of the shapes above; None if it has no right answer, as in test sets that keep theirs secret.

    Raises:
        UserError: it has none of the shapes, or its answer is none of the choices.
    """
    lower = {str(name).strip().lower(): value for name, value in record.items()}
    question, choices, labels, style = lower.get("question"), lower.get("choices"), list(LETTERS), "letters"
    if isinstance(question, dict):  # ARC as AI2 publishes it
        question, choices = question.get("stem"), question.get("choices")
    if isinstance(choices, dict):  # ARC in Hugging Face's shape
        labels, choices, style = choices.get("label"), choices.get("text"), "texts"
    elif isinstance(choices, list) and choices and all(isinstance(choice, dict) for choice in choices):
        labels, style = [choice.get("label") for choice in choices], "texts"
        choices = [choice.get("text") for choice in choices]
    elif choices is None:
        choices = []
        for letter in LETTERS:
            if letter.lower() not in lower:
                break
            choices.append(lower[letter.lower()])
    if isinstance(choices, list):
        choices = [str(choice) if isinstance(choice, int | float) else choice for choice in choices]
    is_sound = isinstance(question, str) and isinstance(choices, list) and isinstance(labels, list)
    if not is_sound or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise UserError(
            f"{where} is no multiple-choice question; it needs question and choices, or question and A, B, C, D, and "
            f"an answer (it has {', '.join(map(str, record))})"
        )
    answer = lower.get("answerkey", lower.get("answer"))
    if answer is None or answer == "" or answer == -1:
        return None
    labels = [str(label) for label in labels[: len(choices)]]
    numbers = {str(number): number for number in range(len(choices))}
    ways = (numbers,) if isinstance(answer, int) else (
        {label: number for number, label in enumerate(labels)},
        {choice: number for number, choice in enumerate(choices)},
        numbers,
    )  # fmt: skip
    right = next((way[str(answer).strip()] for way in ways if str(answer).strip() in way), None)
    if right is None:
        raise UserError(f"{where}: the answer {answer!r} is none of the {len(choices)} choices")
    return Choice(question.strip(), tuple(choices), right, str(lower.get("subject") or subject), style)


def load_choices(path: str | Path, account: dict[str, int] | None = None) -> list[Choice]:
    """All questions of a file or folder that have an answer.

    Args:
        account: learns how many were "read", and how many are "without an answer".
    """
    found, account = [], {} if account is None else account
    for file in resolve_files(path, RECORD_ENDINGS):
        subject = SPLIT.sub("", file.name.partition(".")[0])
        for where, record in _records(file):
            choice = parse_choice(record, where, subject)
            account["read"] = account.get("read", 0) + 1
            if choice is None:
                account["without an answer"] = account.get("without an answer", 0) + 1
            else:
                found.append(choice)
    if not found:
        raise UserError(f"{path} has no question with an answer; give a split whose answers are published")
    return found


def _records(file: Path) -> Iterator[tuple[str, dict]]:
    if ".csv" not in file.suffixes:
        yield from iter_records(file)
        return
    lines = csv_lines(file)
    names = [name.strip().lower() for name in lines[0]] if lines else []
    if "question" in names:
        lines = lines[1:]
    else:  # MMLU: question, answers, the right one's letter
        names = ["question", *LETTERS[: len(lines[0]) - 2], "answer"] if lines and len(lines[0]) >= 4 else []
    for number, line in enumerate(lines, start=1):
        where = f"question {number} of {file}"
        if not names or len(line) != len(names):
            raise UserError(f"{where} has {len(line)} fields and not {len(names) or 'six'}; mend the file")
        yield where, {name: value for name, value in zip(names, line, strict=True) if name}


# -- what the model reads ----------------------------------------------------------------------------------------------


def question_text(choice: Choice) -> str:
    """The question as lm-evaluation-harness puts it."""
    if choice.style == "texts":
        return f"Question: {choice.question}\nAnswer:"
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, choice.choices, strict=False)]
    answer = "答案：" if CHINESE.search(choice.question + "".join(choice.choices)) else "Answer:"
    return "\n".join((choice.question, *lines, answer))


def answers_of(choice: Choice) -> list[str]:
    """What is scored: the letters, or the texts."""
    return list(choice.choices) if choice.style == "texts" else list(LETTERS[: len(choice.choices)])


def description_of(choice: Choice) -> str:
    """What stands before everything, unless something else is asked for: MMLU's sentence, CMMLU's without a subject."""
    if choice.style == "texts":
        return ""
    if CHINESE.search(choice.question):
        return "以下是单项选择题，请直接给出正确答案的选项。"
    return f"The following are multiple choice questions (with answers) about {choice.subject.replace('_', ' ')}."


def context_of(choice: Choice, shots: Sequence[Choice], description: str | None) -> str:
    """What stands before an answer: a description, some questions with their answers, the question."""
    described = description_of(choice) if description is None else description.replace("{subject}", choice.subject)
    solved = [f"{question_text(shot)} {answers_of(shot)[shot.right]}" for shot in shots]
    return "\n\n".join(([described] if described else []) + solved + [question_text(choice)])


def encode_pairs(
    tokenizer: ByteLevelBPETokenizer, context: str, answers: Sequence[str], chat: bool
) -> list[tuple[list[int], list[int]]]:
    """Token ids of the context and of each answer behind it, as lm-evaluation-harness cuts them apart: what of the
    whole text's ids is beyond the length of the context's.

    Raises:
        UserError: an answer is empty.
    """
    if not all(answer.strip() for answer in answers):
        raise UserError(f"the question {context[-200:]!r} has an empty answer; mend it, or score --style letters")
    if chat:
        before = tokenizer.encode_chat([{"role": "user", "content": context}], add_generation_prompt=True)["input_ids"]
        return [(before, ids) for ids in tokenizer.encode_batch(list(answers))]
    before, *wholes = tokenizer.encode_batch([context, *(f"{context} {answer}" for answer in answers)])
    prefix = [*(tokenizer.prefix_ids or ([] if before else [tokenizer.eos_token_id]))]
    return [([*prefix, *before], whole[len(before) :]) for whole in wholes]


@torch.inference_mode()
def log_likelihoods(
    model: GPTModel, pairs: Sequence[tuple[list[int], list[int]]], pad_token_id: int, batch_size: int = 16
) -> list[float]:
    """log p(answer | context) in nats of each pair of ids.

    Of a pair longer than the model's context the end is read. Answers of one token share a forward pass.
    """
    rows: dict[tuple[int, ...], list[int]] = {}  # what is read → the pairs that read it
    for number, (context, answer) in enumerate(pairs):
        ids = [*context, *answer][-(model.config.max_seq_len + 1) :]
        rows.setdefault((*ids[:-1], -len(answer)), []).append(number)
    order = sorted(rows, key=len)
    found = [0.0] * len(pairs)
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        # Padding stands on the right, where a causal model cannot see it: it needs no mask
        batch = {"input_ids": pad_rows([list(row[:-1]) for row in some], pad_token_id)}
        batch = lengthened(batch, length_multiple(model.device), pad_token_id, model.config.max_seq_len)
        hidden = model.hidden_states(batch["input_ids"].to(model.device))
        for row, states in zip(some, hidden, strict=True):
            end, length = len(row) - 1, min(-row[-1], len(row) - 1)
            log_probs = model.lm_head(states[end - length : end]).float().log_softmax(dim=-1)  # (length, V)
            for number in rows[row]:
                answer = torch.tensor(pairs[number][1][-length:], device=log_probs.device)
                found[number] = float(log_probs.gather(1, answer.unsqueeze(1)).double().sum())
    return found


# -- scores ------------------------------------------------------------------------------------------------------------


def grade_choice(choice: Choice, nats: Sequence[float]) -> dict[str, Any]:
    """One question: what the model chose, by both rules, and the probability of it and of the right answer."""
    scores = np.array(nats)
    lengths = np.array([float(len(answer)) for answer in answers_of(choice)])
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    chosen, normed = int(scores.argmax()), int((scores / lengths).argmax())
    return {
        "subject": choice.subject,
        "question": choice.question,
        "right": choice.choices[choice.right],
        "chosen": choice.choices[chosen],
        "acc": chosen == choice.right,
        "acc_norm": normed == choice.right,
        "p_right": float(shares[choice.right]),
        "p_chosen": float(shares.max()),
        "log_likelihoods": list(nats),
    }


def report_choices(graded: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """The "scores" and "intervals" of all, "by_subject", "calibration" (see `GPTEvaluator.score_texts`), "predictions".

    "acc_by_subject" is the mean over subjects, which C-Eval publishes, and "acc" that over questions.
    """
    subjects: dict[str, list[dict[str, Any]]] = {}
    for row in graded:
        subjects.setdefault(row["subject"], []).append(row)
    by_subject = {}
    for name in sorted(subjects):
        rows = subjects[name]
        by_subject[name] = {"count": len(rows)}
        for rule in ("acc", "acc_norm"):
            hits = sum(row[rule] for row in rows)
            by_subject[name] |= {rule: hits / len(rows), f"{rule}_interval": wilson(hits, len(rows))}
    scores, intervals = {"count": len(graded), "subjects": len(subjects)}, {}
    generator = np.random.default_rng(seed)
    for rule in ("acc", "acc_norm"):
        hits = sum(row[rule] for row in graded)
        scores[rule], intervals[rule] = hits / len(graded), wilson(hits, len(graded))
        counts, shares = (np.array([each[key] for each in by_subject.values()]) for key in ("count", rule))
        name = f"{rule}_by_subject"
        # Questions drawn anew within each subject: the right ones are then binomially distributed
        drawn = generator.binomial(counts, shares, size=(RESAMPLES, len(counts))) / counts
        scores[name], intervals[name] = float(shares.mean()), middle(drawn.mean(axis=1))
    bins = np.zeros((CALIBRATION_BINS, 3))
    for row in graded:
        bins[min(CALIBRATION_BINS - 1, int(row["p_chosen"] * CALIBRATION_BINS))] += 1, row["acc"], row["p_chosen"]
    scores["calibration_error"] = calibration_error(bins)
    return {
        "scores": scores,
        "intervals": intervals,
        "by_subject": by_subject,
        "calibration": calibration_rows(bins),
        "predictions": list(graded),
    }


def subject_table(report: dict[str, Any]) -> str:
    """Accuracy by subject."""
    rows = []
    for name, scores in report["by_subject"].items():
        low, high = scores["acc_interval"]
        shares = (f"{100 * scores[rule]:.1f}" for rule in ("acc", "acc_norm"))
        rows.append([name, str(scores["count"]), *shares, f"{100 * low:.1f} … {100 * high:.1f}"])
    return format_table(["subject", "count", "acc %", "acc_norm %", "95 % interval of acc"], rows)


def choices_page(report: dict[str, Any], title: str, about: dict[str, Any]) -> ScorePage:
    """The report as a page; the worst answers are those whose right one was given the least probability."""
    wrong = sorted((row for row in report["predictions"] if not row["acc"]), key=lambda row: row["p_right"])[:30]
    names = ("subject", "question", "right", "p_right", "chosen", "p_chosen")
    groups = [(name, each["count"], each["acc"], each["acc_interval"]) for name, each in report["by_subject"].items()]
    return ScorePage(
        title,
        about,
        figures_of(report),
        groups={"Accuracy by subject": groups},
        calibration=report["calibration"],
        worst=[{name: row[name] for name in names} for row in wrong],
    )


# -- the command line --------------------------------------------------------------------------------------------------


@dataclass
class ChoiceConfig:
    """Settings of one evaluation."""

    model_path: str = option("models/sft/sft_best.pth", "the checkpoint, in full precision or INT8")
    data_path: str = option("data/public/ceval/val", "questions: a file, or a folder with a subject a file")
    shots_path: str = option("", "questions with answers to show before each, such as the dev split")
    shots: int = option(5, "how many of the same subject are shown, the first ones; none without --shots_path",
                        at_least=0, at_most=100)  # fmt: skip
    style: str = option("auto", "score the answers' letters or texts; auto: texts for ARC",
                        choices=("auto", "letters", "texts"))  # fmt: skip
    description: str | None = option(
        None, "what stands before everything, with {subject} for the subject; empty: nothing; default as MMLU and CMMLU"
    )
    chat: bool = option(False, "put the question into the chat template, as tuned models expect it")
    output_path: str | None = option(None, "JSON file for all results; default <model>_choice.json beside the model")
    max_samples: int | None = option(None, "ask at most so many questions, evenly spread over the files", at_least=1)
    batch_size: int = option(16, "texts that are computed together", at_least=1)
    seed: int = option(42, "of the bootstrap")
    device: str = option("auto", "auto, cpu, cuda or mps")
    precision: str = option(
        "auto", "what to compute in; auto: bf16 on a GPU, fp16 on one before Ampere, otherwise fp32", choices=PRECISIONS
    )
    num_threads: int = option(0, "CPU threads; 0 means as many as torch takes", at_least=0)


def ask(
    model: GPTModel,
    tokenizer: ByteLevelBPETokenizer,
    choices: Sequence[Choice],
    shots: Sequence[Choice] = (),
    n_shots: int = 0,
    description: str | None = None,
    chat: bool = False,
    batch_size: int = 16,
    kept: KeptWork | None = None,
    show_progress: bool = False,
) -> tuple[list[dict[str, Any]], int]:
    """Graded questions, see `grade_choice`, and how many texts were longer than the context and lost their beginning.

    Args:
        shots: questions with answers, of which the first `n_shots` of the same subject and style are shown before each.
        description, chat: see `ChoiceConfig`.
    """
    kept, graded, too_long = kept or KeptWork(), [], 0
    shown: dict[tuple[str, str], list[Choice]] = {}
    for shot in shots:
        shown.setdefault((shot.subject, shot.style), []).append(shot)
    with Progress("choosing", len(choices), "question", shown=show_progress) as progress:
        for start in range(0, len(choices), PIECE):
            piece, pairs = choices[start : start + PIECE], []
            for choice in piece:
                before = shown.get((choice.subject, choice.style), [])[:n_shots]
                pairs += encode_pairs(tokenizer, context_of(choice, before, description), answers_of(choice), chat)
            too_long += sum(len(one) + len(other) > model.config.max_seq_len + 1 for one, other in pairs)
            compute = partial(log_likelihoods, model, pairs, tokenizer.pad_token_id, batch_size)
            nats = iter(kept.of(f"questions {start}", compute))
            graded += [grade_choice(choice, [next(nats) for _ in choice.choices]) for choice in piece]
            progress.update(len(piece))
    return graded, too_long


def main(argv: list[str] | None = None) -> None:
    """Ask a model multiple-choice questions."""
    config = parse_config(ChoiceConfig, argv, description=__doc__.splitlines()[0])
    torch.set_num_threads(config.num_threads or torch.get_num_threads())
    started, model_path = time.perf_counter(), Path(config.model_path)
    output_path = check_writable(config.output_path or model_path.with_name(f"{model_path.stem}_choice.json"))
    account: dict[str, int] = {}
    choices = load_choices(config.data_path, account)
    count = min(config.max_samples or len(choices), len(choices))
    choices = [choices[index * len(choices) // count] for index in range(count)]
    shots = load_choices(config.shots_path) if config.shots_path else []
    if config.style != "auto":
        choices, shots = ([Choice(**{**asdict(each), "style": config.style}) for each in some]
                          for some in (choices, shots))  # fmt: skip
    if shots and not {choice.subject for choice in choices} & {shot.subject for shot in shots}:
        raise UserError(f"{config.shots_path} has questions of none of the subjects of {config.data_path}")
    checkpoint, device = load_checkpoint(model_path), resolve_device(config.device)
    model, tokenizer, _ = load_any(model_path, device, precision=config.precision)
    depends_on = [weight_fingerprint(checkpoint), [asdict(each) for each in (*choices, *shots)], config.shots,
                  config.description, config.chat, str(device), config.precision]  # fmt: skip
    kept = KeptWork(output_path.with_name(f"{output_path.stem}_unfinished.jsonl"), depends_on)
    if kept.found:
        print(f"going on with {kept.found} finished pieces of an interrupted evaluation", flush=True)
    settings = (config.shots, config.description, config.chat, config.batch_size)
    graded, too_long = ask(model, tokenizer, choices, shots, *settings, kept=kept, show_progress=True)
    report = report_choices(graded, config.seed)
    about = {
        "model_path": str(model_path),
        "stage": checkpoint["stage"],
        "quantization": checkpoint.get("quantization"),
        "data_path": config.data_path,
        "shots": config.shots if shots else 0,
        "chat": config.chat,
        "seed": config.seed,
        "read": account["read"],
        "without_answer": account.get("without an answer", 0),
        "texts_cut": too_long,
    }
    write_json({**about, "seconds": round(time.perf_counter() - started, 2), **report}, output_path)
    shown = {name: value for name, value in about.items() if value is not None}
    write_page(choices_page(report, f"Multiple choice: {model_path.name}", shown), output_path.with_suffix(".html"))
    kept.finish()
    print(subject_table(report), interval_table(report), sep="\n\n", end="\n\n")
    left_out = f", {about['without_answer']:,} left out without an answer" if about["without_answer"] else ""
    cut = f"; {too_long:,} texts were longer than the context and lost their beginning" if too_long else ""
    print(
        f"{model_path} on {config.data_path}: {account['read']:,} questions read{left_out}, {count:,} asked{cut}; "
        f"acc {report['scores']['acc']:.1%}, acc_norm {report['scores']['acc_norm']:.1%}; "
        f"written to {output_path} and {output_path.with_suffix('.html').name}"
    )


if __name__ == "__main__":
    run_main(main)
