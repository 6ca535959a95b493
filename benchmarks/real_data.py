"""Does every stage take the data that people have? Each file of a folder through all stages that it is for.

    bash benchmarks/real_data.sh my_downloads
    python benchmarks/real_data.py --data my_downloads --max_steps 20

Texts train a tokenizer and a small model; instructions then go through SFT, distillation and GRPO, preferences through
the reward model, PPO, DPO and KTO, and what is left is scored. Each run is the command line that a user would type; the
sizes are such that nothing useful is learned. The table says what became of the records, and where a stage refuses a
file, why.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import byte_level_bpe  # noqa: E402
import evaluator  # noqa: E402
import finetune  # noqa: E402
import pretrain_trainer  # noqa: E402
from benchmarks.tables import Table, about, in_a_sentence  # noqa: E402
from checkpoint import load_checkpoint  # noqa: E402
from command_line import UserError, option, parse_config, run_main  # noqa: E402
from text.conversation_data import RecordOptions, parse_columns, parse_prompt, with_columns  # noqa: E402
from text.inspect import kind_of  # noqa: E402
from text.text_files import RECORD_ENDINGS, TEXT_ENDINGS, iter_records, resolve_files  # noqa: E402
from training.run_log import read_metrics  # noqa: E402

REWARD = "def reward(prompts, responses, records):\n    return [len(set(response)) / 10 for response in responses]\n"
HEADER = ["file", "taken for", "stage", "read", "left out", "cut", "answers lost %", "steps", "score"]
LEAST_TEXT = 100_000  # characters: a few windows to train and to validate on
COUNTED = ("read", "left_out", "cut", "answer_tokens", "answer_tokens_lost")  # in an account
# By kind, the stages: name, command, what the best checkpoint is called, the figure that is shown
STAGES: dict[str, list[tuple[str, str, str, str]]] = {
    "instructions": [
        ("sft", "--data_path {file} --pretrained_model {base}", "sft_best.pth", "val_loss"),
        ("distill", "--data_path {file} --teacher_model {base} --n_layers 1", "distill_best.pth", "val_loss"),
        ("grpo", "--data_path {file} --sft_model {base} --reward {reward}:reward {rollouts} --group_size 4",
         "grpo_best.pth", "val_reward"),
    ],
    "preferences": [
        ("reward", "--pairwise_data {file} --sft_model {base}", "reward_best.pth", "val_accuracy"),
        ("ppo", "--pairwise_data {file} --sft_model {base} --reward_model {out}/reward/reward_best.pth {rollouts}",
         "ppo_best.pth", "val_reward"),
        ("dpo", "--pairwise_data {file} --sft_model {base}", "dpo_best.pth", "val_rewards/accuracies"),
        ("kto", "--pairwise_data {file} --sft_model {base}", "kto_best.pth", "val_loss"),
    ],
    "unpaired": [
        ("kto", "--pairwise_data {file} --sft_model {base}", "kto_best.pth", "val_loss"),
        ("sft", "--data_path {file} --pretrained_model {base}", "sft_best.pth", "val_loss"),
    ],
}  # fmt: skip
SCORED = {"sft": "sft", "reward": "reward"}  # stages whose model answers, or judges, its own data once more


@dataclass
class RealDataConfig(RecordOptions):
    """Settings of the trial."""

    data: str = option("data", "folder of data files, or one of them")
    max_seq_len: int = option(1024, "context of the small model", at_least=8)
    vocab_size: int = option(1024, "size of the tokenizer", at_least=260)
    max_steps: int = option(4, "steps of each run", at_least=1)
    max_samples: int = option(8, "questions that are asked of each SFT model", at_least=1)
    num_threads: int = option(1, "CPU threads", at_least=1)
    output_dir: str = option("", "where to keep the runs; empty: nowhere")

    def sizes(self) -> str:
        """What all runs have in common on their command lines."""
        steps = f"--max_steps {self.max_steps} --eval_interval {self.max_steps}"
        return f"{steps} --batch_size 4 --num_threads {self.num_threads}"


@dataclass
class Trial:
    """The runs of one folder.

    Attributes:
        rows: of the table.
        crashes: how many runs ended in anything but success or one sentence.
    """

    config: RealDataConfig
    out: Path
    rows: list[dict[str, Any]]
    crashes: int = 0

    def run(self, file: str, shape: str, stage: str, main: Callable[[list[str]], None], command: str) -> dict[str, Any]:
        """One command line; its row, which is in the table already."""
        row: dict[str, Any] = {"file": file, "shape": shape, "stage": stage}
        self.rows.append(row)
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                main(shlex.split(command))
        except UserError as error:
            row["refused"] = str(error)
        except Exception:  # whatever it is, it is what this trial looks for
            self.crashes += 1
            row["refused"] = traceback.format_exc().strip().splitlines()[-1]
            said.write(traceback.format_exc())
        with (self.out / "said.log").open("a", encoding="utf-8") as log:
            log.write(f"\n$ {stage} {command}\n{said.getvalue()}")
        return row

    def train(self, file: Path, kind: str, shape: str) -> None:
        """All stages of a file of records, and the scores of what they leave."""
        config, of_records = self.config, ""
        if config.columns:
            of_records += f" --columns {shlex.quote(config.columns)}"
        if config.skip_bad_records:
            of_records += " --skip_bad_records"
        folder = self.out / file.name
        places = {
            "file": shlex.quote(str(file)),
            "base": self.out / "pretrain" / "pretrain_best.pth",
            "out": folder,
            "reward": self.out / "reward.py",
            "rollouts": "--rollout_batch_size 8 --max_gen_len 8",
        }
        sizes = f"{config.sizes()} --val_fraction 0.1"
        for mode, command, best, figure in STAGES[kind]:
            command = f"--mode {mode} {command.format(**places)} {sizes} --output_dir {folder / mode}{of_records}"
            row = self.run(file.name, shape, mode, finetune.main, command)
            path = folder / mode / best
            if "refused" in row or not path.is_file():
                continue
            content = load_checkpoint(path)
            row |= {name: content["data"]["data"][name] for name in COUNTED}
            row["steps"] = read_metrics(path.with_name("metrics.jsonl"))[-1]["step"]
            row["score"] = (figure, content["metrics"][figure])
            if mode in SCORED:
                self.score(file, shape, path, SCORED[mode], of_records)

    def score(self, file: Path, shape: str, path: Path, model_type: str, of_records: str) -> None:
        """A model on the data that it has seen: whether the evaluator takes it."""
        config, report = self.config, path.with_suffix(".json")
        command = f"--model_path {path} --test_data_path {shlex.quote(str(file))} --model_type {model_type}{of_records}"
        command += f" --max_samples {config.max_samples} --max_gen_len 8 --output_path {report}"
        row = self.run(file.name, shape, f"evaluate {model_type}", evaluator.main, command)
        if "refused" not in row:
            content = json.loads(report.read_text(encoding="utf-8"))
            figure = "accuracy" if model_type == "reward" else "rouge-l"
            row |= {name: content["data"][name] for name in COUNTED}
            row["score"] = (figure, content["scores"][figure])


def line_of(row: dict[str, Any]) -> list[str]:
    """A row of the table as text."""
    left_out = "; ".join(f"{count:,} {reason}" for reason, count in row.get("left_out", {}).items())
    lost = row.get("answer_tokens_lost", 0) / max(1, row.get("answer_tokens", 0))
    score = "refused" if "refused" in row else ""
    if "score" in row:
        name, value = row["score"]
        score = f"{name.removeprefix('val_')} {value:.3f}" if math.isfinite(value) else f"{name} not finite"
    read, cut, steps = (f"{row[name]:,}" if name in row else "" for name in ("read", "cut", "steps"))
    shown_loss = f"{100 * lost:.1f}" if row.get("answer_tokens") else ""
    return [row["file"], row["shape"], row["stage"], read, left_out or "0" * bool(read), cut, shown_loss, steps, score]


def text_of_records(files: list[Path], columns: dict[str, str], path: Path) -> None:
    """Where a folder has little text, its questions serve as such, again and again if they are few."""
    questions = []
    for file in files:
        with contextlib.suppress(UserError):
            for where, record in iter_records(file):
                with contextlib.suppress(UserError):  # the stages will say what is wrong with it
                    prompt = parse_prompt(with_columns(record, columns, where), where)
                    questions.append(" ".join(prompt[-1]["content"].split()) + "\n")
    text = "".join(questions)
    path.write_text(text * (1 + LEAST_TEXT // max(1, len(text))), encoding="utf-8")


def try_folder(config: RealDataConfig, out: Path) -> Trial:
    """All files of a folder through all stages."""
    columns = parse_columns(config.columns)
    source = Path(config.data)
    endings = tuple(dict.fromkeys(TEXT_ENDINGS + RECORD_ENDINGS))
    files = [source] if source.is_file() else sorted(
        file for file in source.rglob("*") if file.name.endswith(endings) and not file.name.startswith(".")
    )  # fmt: skip
    if not files:
        resolve_files(source, endings)  # says what is missing
    trial, kinds = Trial(config, out, []), {}
    (out / "reward.py").write_text(REWARD, encoding="utf-8")
    for file in files:
        try:
            kind, shapes = kind_of(file, columns)
            kinds[file] = kind, ", ".join(shapes)
        except UserError as error:
            trial.rows.append({"file": file.name, "shape": "?", "stage": "reading", "refused": str(error)})
    texts = [file for file, (kind, _) in kinds.items() if kind == "text"]
    if sum(file.stat().st_size for file in texts) < LEAST_TEXT:
        text_of_records([file for file in kinds if file not in texts], columns, out / "questions.txt")
        texts.append(out / "questions.txt")
    (out / "texts").mkdir()
    for number, file in enumerate(texts):
        (out / "texts" / f"{number}_{file.name}").symlink_to(file.resolve())
    tokenizer, name = out / "bpe_tokenizer", ", ".join(file.name for file in texts)
    trial.run(name, "text", "tokenizer", byte_level_bpe.main,
              f"--input {out / 'texts'} --vocab_size {config.vocab_size} --output_dir {tokenizer}")  # fmt: skip
    row = trial.run(
        name, "text", "pretrain", pretrain_trainer.main,
        f"--train_data_dir {out / 'texts'} --val_fraction 0.1 --tokenizer_dir {tokenizer} "
        f"--output_dir {out / 'pretrain'} --shard_dir {out / 'shards'} --d_model 64 --n_layers 2 "
        f"--n_heads 2 --max_seq_len {config.max_seq_len} "
        f"--sample_tokens 0 {config.sizes()}",
    )  # fmt: skip
    if "refused" in row:
        raise UserError(f"no small model can be made of {name}: {row['refused']}")
    content = load_checkpoint(out / "pretrain" / "pretrain_best.pth")
    row |= {"steps": config.max_steps, "score": ("val_loss", content["metrics"]["val_loss"])}
    for file, (kind, shape) in kinds.items():
        if kind != "text":
            trial.train(file, kind, shape)
    return trial


def main(argv: list[str] | None = None) -> None:
    """Try a folder, and say what became of every file."""
    config = parse_config(RealDataConfig, argv, description="Try a folder of data files through every stage.")
    facts = about()
    out = Path(config.output_dir or tempfile.mkdtemp(prefix="real_data_"))
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another --output_dir")
    try:
        trial = try_folder(config, out)
    finally:
        if not config.output_dir:
            shutil.rmtree(out)
    note = f"Steps of each run: {config.max_steps}; context {config.max_seq_len}. {in_a_sentence(facts)}"
    print(Table("Every stage on every file", note, HEADER, [line_of(row) for row in trial.rows]).plain())
    refused = [row for row in trial.rows if "refused" in row]
    for row in refused:
        print(f"refused: {row['file']}, {row['stage']}: {row['refused']}")
    print(f"{len(trial.rows) - len(refused)} of {len(trial.rows)} runs went through, {trial.crashes} crashed\n")
    print(json.dumps({**facts, "rows": trial.rows, "crashes": trial.crashes}, ensure_ascii=False))
    if trial.crashes:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
