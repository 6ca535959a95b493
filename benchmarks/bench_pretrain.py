"""Time to a given quality of pretraining, beside nanoGPT, on the same text and machine, one after the other.

    python benchmarks/bench_pretrain.py --text tinyshakespeare.txt --nanogpt_dir path/to/nanoGPT

The text is split by characters: the first 90 % to train on, the rest to validate on. nanoGPT reads characters and this
project its own byte-level tokens, so the two are compared in bits per byte of the raw validation text. Times are those
of whole processes: starting up, tokenizing and evaluating included.

nanoGPT runs its CPU recipe (4 layers × 128, context 64, batch 12, 2,000 steps); without --nanogpt_dir only this project
is measured.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.tables import Table, about, in_a_sentence  # noqa: E402
from command_line import option, parse_config, require_file, run_main  # noqa: E402
from training.run_log import read_metrics  # noqa: E402


@dataclass
class BenchConfig:
    """Settings of the comparison."""

    text: str = option("data/pretrain/train.txt", "a text file")
    nanogpt_dir: str = option("", "a clone of nanoGPT; empty: measure this project only")
    nanogpt_steps: int = option(2000, "steps of nanoGPT's recipe", at_least=1)
    vocab_size: int = option(1024, "tokens of this project's vocabulary")
    num_threads: int = option(2, "CPU threads of both", at_least=1)
    options: str = option(
        "--d_model 128 --n_layers 4 --n_heads 4 --n_kv_heads 4 --max_seq_len 128 --batch_size 16 --max_steps 400",
        "this project's training options",
    )


def run(command: list[str], folder: Path, n_threads: int) -> tuple[float, str]:
    """Seconds and output of a process."""
    threads = str(n_threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - start, done.stdout


def train_ours(config: BenchConfig, train: str, val: str, folder: Path) -> dict:
    """Tokenizer and model of this project; the curve is (seconds since the start, bits per byte)."""
    for name, text in (("train", train), ("val", val)):
        record = json.dumps({"text": text}, ensure_ascii=False)  # one document: line ends are part of the text
        (folder / f"{name}.jsonl").write_text(record, encoding="utf-8")
    tokenizer, output = folder / "tokenizer", folder / "run"
    command = [sys.executable, "byte_level_bpe.py", "--input", str(folder / "train.jsonl")]
    command += ["--vocab_size", str(config.vocab_size), "--output_dir", str(tokenizer)]
    tokenizer_seconds, _ = run(command, ROOT, config.num_threads)
    command = [sys.executable, "pretrain_trainer.py", "--train_data_dir", str(folder / "train.jsonl")]
    command += ["--val_data_dir", str(folder / "val.jsonl"), "--tokenizer_dir", str(tokenizer)]
    command += ["--output_dir", str(output), "--shard_dir", str(folder / "shards"), "--sample_tokens", "0"]
    command += ["--num_threads", str(config.num_threads), *config.options.split()]
    seconds, _ = run(command, ROOT, config.num_threads)
    evaluations = [record for record in read_metrics(output / "metrics.jsonl") if "val_bpb" in record]
    overhead = tokenizer_seconds + seconds - evaluations[-1]["seconds"]  # start-up, tokenizing, last evaluation
    curve = [(round(overhead + record["seconds"], 1), round(record["val_bpb"], 4)) for record in evaluations]
    return {"seconds": tokenizer_seconds + seconds, "bits_per_byte": min(bpb for _, bpb in curve), "curve": curve}


def train_nanogpt(config: BenchConfig, train: str, val: str) -> dict:
    """nanoGPT's character model by its own scripts; its validation loss is in nats a character."""
    home = Path(config.nanogpt_dir).resolve()
    data = home / "data" / "shakespeare_char"
    (data / "input.txt").write_text(train + val, encoding="utf-8")
    preparation, _ = run([sys.executable, str(data / "prepare.py")], home, config.num_threads)
    with tempfile.TemporaryDirectory() as out:
        steps = config.nanogpt_steps
        command = [sys.executable, "train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False"]
        command += ["--eval_iters=20", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4"]
        command += ["--n_embd=128", f"--max_iters={steps}", f"--lr_decay_iters={steps}", "--dropout=0.0"]
        seconds, output = run([*command, f"--out_dir={out}"], home, config.num_threads)
    losses = [float(loss) for loss in re.findall(r"val loss ([\d.]+)", output)]
    characters_per_byte = len(val) / len(val.encode())
    return {
        "seconds": preparation + seconds,
        "bits_per_byte": min(losses) / math.log(2) * characters_per_byte,
        "val_loss": min(losses),
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config = parse_config(BenchConfig, argv, description="Time to quality of pretraining, beside nanoGPT.")
    text = require_file(config.text, "the text").read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    train, val = text[:cut], text[cut:]
    torch.set_num_threads(config.num_threads)
    facts = about()
    result: dict = {"benchmark": "pretrain", **facts}
    if config.nanogpt_dir:
        result["nanogpt"] = train_nanogpt(config, train, val)
    with tempfile.TemporaryDirectory() as folder:
        result["ours"] = train_ours(config, train, val, Path(folder))
    rows = [
        [name, f"{result[name]['seconds']:.1f}", f"{result[name]['bits_per_byte']:.4f}"]
        for name in ("nanogpt", "ours")
        if name in result
    ]
    print(in_a_sentence(facts))
    print(Table("Pretraining", "Whole processes.", ["trainer", "seconds", "bits per byte"], rows).plain())
    if "nanogpt" in result:
        goal = result["nanogpt"]["bits_per_byte"]
        reached = next((seconds for seconds, bpb in result["ours"]["curve"] if bpb <= goal), None)
        result["seconds_to_nanogpt_quality"] = reached
        print(f"ours reaches nanoGPT's {goal:.3f} bits per byte after {reached} s")
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
