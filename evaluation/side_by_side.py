"""Two models answer the same questions; a reward model or a program judges whose answer is better.

    python -m evaluation.side_by_side --model_path models/rlhf/ppo_best.pth --other_model models/sft/sft_best.pth
    python -m evaluation.side_by_side --judge models/reward/reward_best.pth --data_path data/sft/sft_test.json

A program is a Python function, `PATH.py:FUNCTION`, that compares two answers and says by a number above, below or equal
to 0 whether the first one is better, the second one is, or neither:

    def judge(question: str, first: str, second: str, record: dict) -> float: ...

It is asked in both orders, since a judge may favour what it sees first: an answer wins only if it wins in both.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: modules are imported from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch

from alignment.reward_function import described, load_reward
from alignment.reward_model import RewardModel, load_reward_model
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, require_language_model, weight_fingerprint
from command_line import UserError, option, parse_config, run_main
from data_loader import pad_rows
from evaluation.answer_report import Question, check_writable, format_table, interval_table, load_questions, write_json
from evaluation.intervals import bootstrap_mean, wilson
from evaluation.kept_work import KeptWork
from evaluation.score_page import ScorePage, figures_of, write_page
from inference.quantizer import load_any
from inference.text_generation import generate_texts
from machine import PRECISIONS, resolve_device
from text.account import Account
from text.conversation_data import RecordOptions, parse_columns

PIECE = 256  # questions between two moments at which an interrupted comparison can go on
OUTCOMES = {1.0: "win", 0.5: "tie", 0.0: "loss"}  # of the model, by what it earns

Margins = tuple[float, float]  # by how much the model's answer is better, as judged first and as judged second
Judge = Callable[[Sequence[Question], Sequence[str], Sequence[str]], list[Margins]]


# -- judges ------------------------------------------------------------------------------------------------------------


def program_judge(place: str) -> Judge:
    """The judge that `PATH.py:FUNCTION` names, asked in both orders.

    Raises:
        UserError: no such function; or, later, it fails or returns no finite number.
    """
    function = load_reward(place, "--judge")

    def ask(question: Question, first: str, second: str) -> float:
        try:
            margin = float(function(question.prompt[-1]["content"], first, second, question.fields))
        except UserError:
            raise
        except Exception as error:  # whatever somebody else's code raises
            raise UserError(f"the judge {place} failed: {described(error)}; mend it") from error
        if not math.isfinite(margin):
            raise UserError(f"the judge {place} said {margin}; it must return a finite number")
        return margin

    def judge(questions: Sequence[Question], ours: Sequence[str], theirs: Sequence[str]) -> list[Margins]:
        threes = zip(questions, ours, theirs, strict=True)
        return [(ask(question, our, their), -ask(question, their, our)) for question, our, their in threes]

    return judge


def reward_judge(model: RewardModel, tokenizer: ByteLevelBPETokenizer, batch_size: int = 32) -> Judge:
    """A reward model as a judge: r(our answer) − r(their answer), the same in both orders. Of a conversation longer
    than its context the end is read."""

    @torch.inference_mode()
    def rewards(questions: Sequence[Question], answers: Sequence[str]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(questions), batch_size):
            pairs = zip(questions[start : start + batch_size], answers[start : start + batch_size], strict=True)
            chats = [[*question.prompt, {"role": "assistant", "content": answer}] for question, answer in pairs]
            rows = [tokenizer.encode_chat(chat)["input_ids"][-model.config.max_seq_len :] for chat in chats]
            device = model.reward_head.weight.device
            ids, mask = pad_rows(rows, tokenizer.pad_token_id), pad_rows([[1] * len(row) for row in rows], 0)
            found += model.rewards(ids.to(device), mask.to(device)).tolist()
        return found

    def judge(questions: Sequence[Question], ours: Sequence[str], theirs: Sequence[str]) -> list[Margins]:
        differences = np.subtract(rewards(questions, ours), rewards(questions, theirs)).tolist()
        return [(difference, difference) for difference in differences]

    return judge


def outcome_of(margins: Margins, tie_margin: float = 0.0) -> float:
    """1 for a win, 0 for a loss, ½ for a tie: margins that are small, or of different signs in the two orders."""
    first, second = ((margin > tie_margin) - (margin < -tie_margin) for margin in margins)
    return 0.5 if first != second else (first + 1) / 2


# -- scores ------------------------------------------------------------------------------------------------------------


def report_outcomes(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """The "scores" with "intervals", "by_skill" and the like, and the "predictions".

    Args:
        rows: with "earned", see `outcome_of`, "orders_agree", whether the judge says the same in both orders, and the
            record's fields.

    Returns:
        "win_rate": wins and half of the ties, of all; ½ means that the two are equally good. "wins", "ties", "losses":
        shares. "orders_differ": the share of questions about which the judge contradicts itself.
    """
    earned = np.array([row["earned"] for row in rows])
    shares = {f"{name}{'es' if name == 'loss' else 's'}": float((earned == value).mean())
              for value, name in OUTCOMES.items()}  # fmt: skip
    shares["orders_differ"] = float(np.mean([not row["orders_agree"] for row in rows]))
    report: dict[str, Any] = {
        "scores": {"count": len(rows), "win_rate": float(earned.mean()), **shares},
        "intervals": {
            "win_rate": bootstrap_mean(earned, seed),
            **{name: wilson(round(share * len(rows)), len(rows)) for name, share in shares.items()},
        },
    }
    for name in ("skill", "language", "held_out"):
        groups: dict[str, list[float]] = {}
        for row in rows:
            if name in row:
                groups.setdefault(str(row[name]), []).append(row["earned"])
        if groups:
            report[f"by_{name}"] = {
                group: {
                    "count": len(values),
                    "win_rate": float(np.mean(values)),
                    "interval": wilson(sum(values), len(values)),  # of few, all alike, the bootstrap's has no width
                }
                for group, values in sorted(groups.items())
            }
    return {**report, "predictions": list(rows)}


def verdict(report: Mapping[str, Any]) -> str:
    """What the interval of the win rate allows to say."""
    low, high = report["intervals"]["win_rate"]
    if low > 0.5:
        return "the model is better"
    return "the other model is better" if high < 0.5 else "no difference is shown"


def outcomes_page(report: Mapping[str, Any], title: str, about: Mapping[str, Any]) -> ScorePage:
    """The comparison as a page, with the questions that the model lost by most."""
    lost = sorted((row for row in report["predictions"] if row["earned"] == 0), key=lambda row: sum(row["margins"]))
    names = ("instruction", "reference", "answer_of_model", "answer_of_other")
    groups = {
        f"Win rate, by {name.replace('_', ' ')}": [
            (group, each["count"], each["win_rate"], each["interval"])
            for group, each in report[f"by_{name}"].items()
        ]
        for name in ("skill", "language", "held_out")
        if f"by_{name}" in report
    }
    worst = [{**{name: row[name] for name in names}, "margin": sum(row["margins"]) / 2} for row in lost[:30]]
    return ScorePage(title, about, figures_of(report), groups=groups, worst=worst, worst_title="Lost by most")


# -- the command line --------------------------------------------------------------------------------------------------


@dataclass
class SideBySideConfig(RecordOptions):
    """Settings of one comparison."""

    model_path: str = option("models/rlhf/ppo_best.pth", "the model, whose win rate is measured")
    other_model: str = option("models/sft/sft_best.pth", "the model that it is compared with")
    judge: str = option(
        "evaluation/answer_checker.py:better_answer", "a reward model's checkpoint, or PATH.py:FUNCTION"
    )
    data_path: str = option("data/sft/sft_test.json", "questions: instruction data")
    output_path: str | None = option(None, "JSON file for all results; default <model>_beside_<other>.json")
    tie_margin: float = option(0.0, "margins up to this are ties", at_least=0)
    max_samples: int | None = option(None, "ask at most so many questions, evenly spread", at_least=1)
    max_gen_len: int = option(64, "longest answer, in tokens", at_least=1)
    temperature: float = option(0.0, "0 takes the likeliest token; otherwise sample at this temperature", at_least=0)
    top_k: int = option(0, "sample among the k likeliest tokens; 0 means among all", at_least=0)
    batch_size: int = option(64, "answers that are computed together", at_least=1)
    seed: int = option(42, "makes sampling and the bootstrap repeatable")
    device: str = option("auto", "auto, cpu, cuda or mps")
    precision: str = option(
        "auto", "what to compute in; auto: bf16 on a GPU, fp16 on one before Ampere, otherwise fp32", choices=PRECISIONS
    )
    num_threads: int = option(0, "CPU threads; 0 means as many as torch takes", at_least=0)


def answers_of(
    path: Path,
    questions: Sequence[Question],
    settings: dict[str, Any],
    device: torch.device,
    kept: KeptWork,
    precision: str = "auto",
) -> list[str]:
    """The answers of a checkpoint's model; only the pieces that are not kept already are computed."""
    model, tokenizer, _ = load_any(path, device, precision=precision)

    def answer(start: int) -> list[str]:
        prompts = [question.prompt for question in questions[start : start + PIECE]]
        own = {**settings, "seed": settings["seed"] + start}  # equal questions are not to get equal answers
        generations = generate_texts(model, tokenizer, prompts, chat=True, show_progress=True, **own)
        return [generation.text for generation in generations]

    starts = range(0, len(questions), PIECE)
    return [text for start in starts for text in kept.of(f"{path} {start}", partial(answer, start))]


def main(argv: list[str] | None = None) -> None:
    """Compare two models."""
    config = parse_config(SideBySideConfig, argv, description=__doc__.splitlines()[0])
    torch.set_num_threads(config.num_threads or torch.get_num_threads())
    started, device = time.perf_counter(), resolve_device(config.device)
    paths = Path(config.model_path), Path(config.other_model)
    checkpoints = [load_checkpoint(path) for path in paths]
    for checkpoint, path in zip(checkpoints, paths, strict=True):
        require_language_model(checkpoint, path)
    output_path = config.output_path or paths[0].with_name(f"{paths[0].stem}_beside_{paths[1].stem}.json")
    output_path = check_writable(output_path)
    if config.judge.endswith(".pth"):
        judge = reward_judge(*load_reward_model(config.judge, device))
    else:
        judge = program_judge(config.judge)
    account = Account(config.data_path, "questions", skips_bad_records=config.skip_bad_records)
    questions = load_questions(config.data_path, config.max_samples, account, parse_columns(config.columns))
    names = ("max_gen_len", "temperature", "top_k", "batch_size", "seed")
    settings = {name: getattr(config, name) for name in names}
    prompts = [question.prompt for question in questions]
    weights = [weight_fingerprint(checkpoint) for checkpoint in checkpoints]
    depends_on = [weights, prompts, {**settings, "batch_size": 0}, str(device), config.precision]
    kept = KeptWork(output_path.with_name(f"{output_path.stem}_unfinished.jsonl"), depends_on)
    if kept.found:
        print(f"going on with {kept.found} finished pieces of an interrupted comparison", flush=True)
    ours, theirs = (answers_of(path, questions, settings, device, kept, config.precision) for path in paths)
    rows = []
    judged = judge(questions, ours, theirs)
    for question, our, their, margins in zip(questions, ours, theirs, judged, strict=True):
        orders = [outcome_of((margin, margin), config.tie_margin) for margin in margins]
        rows.append({
            "instruction": question.prompt[-1]["content"],
            "reference": question.reference,
            "answer_of_model": our,
            "answer_of_other": their,
            "margins": margins,
            "earned": outcome_of(margins, config.tie_margin),
            "orders_agree": orders[0] == orders[1],
            **{name: question.fields[name] for name in ("skill", "language", "held_out") if name in question.fields},
        })  # fmt: skip
    report = report_outcomes(rows, config.seed)
    about = {
        "model_path": config.model_path,
        "other_model": config.other_model,
        "judge": config.judge,
        "data_path": config.data_path,
        "temperature": config.temperature,
        "tie_margin": config.tie_margin,
        "seed": config.seed,
    }
    read = {"data": account.as_dict(), "seconds": round(time.perf_counter() - started, 2)}
    write_json({**about, **read, **report}, output_path)
    page = outcomes_page(report, f"{paths[0].name} beside {paths[1].name}", about)
    write_page(page, output_path.with_suffix(".html"))
    kept.finish()
    if "by_skill" in report:
        cells = [
            [name, str(each["count"]), f"{each['win_rate']:.1%}", "{:.1%} … {:.1%}".format(*each["interval"])]
            for name, each in report["by_skill"].items()
        ]
        print(format_table(["skill", "count", "win rate", "95 % interval"], cells), end="\n\n")
    low, high = report["intervals"]["win_rate"]
    print(interval_table(report), *account.sentences(), sep="\n")
    print(
        f"{config.model_path} beside {config.other_model}, judged by {config.judge}: win rate "
        f"{report['scores']['win_rate']:.1%} ({low:.1%} … {high:.1%}), {verdict(report)}; written to {output_path} and "
        f"{output_path.with_suffix('.html').name}"
    )


if __name__ == "__main__":
    run_main(main)
