"""What a GPU does with this project: decoding, prompts, many streams, training, and steps of PPO and GRPO.

    bash benchmarks/gpu.sh                               # the tests that need a GPU, then this; at most ten minutes
    bash benchmarks/gpu.sh --nanogpt_dir ../nanoGPT      # with nanoGPT's training beside this project's
    python benchmarks/bench_gpu.py --smoke               # does everything work? on a CPU, too, through a GPU's code

Weights are random, of GPT-2's shape with 124 million parameters; trainings are command lines that a user would type.
The tables are followed by one line of JSON; `--write benchmarks/RESULTS.md` puts them into that page, under the name of
the device.
"""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import byte_level_bpe  # noqa: E402
import finetune  # noqa: E402
import pretrain_trainer  # noqa: E402
from alignment.rollouts import RolloutLoop  # noqa: E402
from alignment.transformers_names import in_transformers  # noqa: E402
from benchmarks.bench_inference import BenchmarkConfig, random_model  # noqa: E402
from benchmarks.peers import bytes_read  # noqa: E402
from benchmarks.tables import Table, about  # noqa: E402
from benchmarks.turns import Report, memory_reader  # noqa: E402
from command_line import UserError, option, parse_config, run_main  # noqa: E402
from gpt_model import GPTModel  # noqa: E402
from inference.engine import Engine  # noqa: E402
from inference.kernels.gpu_products import choices  # noqa: E402
from inference.kernels.linear_layers import tile_for_gpu  # noqa: E402
from inference.quantizer import place, prepare_for_inference  # noqa: E402
from inference.sampling import SamplingParams  # noqa: E402
from machine import inference_dtype, peak_flops, resolve_device, resolve_precision, synchronize  # noqa: E402
from training.run_log import read_metrics  # noqa: E402

PARTS = ("decoding", "prefill", "streams", "training", "alignment")
TINY = ["--d_model", "32", "--n_layers", "1", "--n_heads", "2", "--max_seq_len", "256", "--batch_size", "2"]
STREAMS = (1, 16, 64, 256)
TRAINED_SECONDS, USUAL_MFU, MOST_STEPS = 60, 0.35, 100  # of training `gpt2`, which sets the number of its steps
GPT2_TOKENS, GPT2_PARAMETERS = 8 * 8 * 1024, 124e6  # tokens of a step: 8 rows, 8 times
FIRST_WORD = 257


@dataclass
class GpuConfig:
    """Settings of the benchmark."""

    parts: list[str] = option(list, f"what to measure, of {', '.join(PARTS)}; none: everything")
    smoke: bool = option(False, "tiny models and few tokens, on a CPU where there is no GPU; no figures to quote")
    rounds: int = option(5, "how often each speed is measured; medians count", at_least=1)
    nanogpt_dir: str = option("", "a clone of nanoGPT, whose training is measured, too; empty: it is left out")
    write: str = option("", "a Markdown page that takes the tables; empty: none")

    def validate(self) -> list[str]:
        """What is wrong with the settings, a sentence each."""
        complaints = [f"--parts must be of {', '.join(PARTS)}, not {part}" for part in self.parts if part not in PARTS]
        if self.nanogpt_dir and not (Path(self.nanogpt_dir) / "train.py").is_file():
            complaints.append(f"--nanogpt_dir {self.nanogpt_dir} holds no train.py; give a clone of nanoGPT")
        return complaints


@dataclass
class Bench:
    """What all parts share."""

    config: GpuConfig
    device: torch.device
    report: Report
    model: GPTModel  # FP32, on the CPU

    def engine(self, model: GPTModel, n_streams: int = 1, graphs: bool = True) -> Engine:
        """An engine that computes as on a GPU, wherever it is."""
        settings = dict(max_running=n_streams, reuse_prefixes=False, gpu_step=True, cuda_graphs=graphs)
        return Engine(model, None, **settings)

    def candidates(self) -> dict[str, GPTModel]:
        """The model in each kind of weights, on the device."""
        half = inference_dtype("auto", self.device) or torch.bfloat16
        name = {torch.bfloat16: "BF16", torch.float16: "FP16"}[half]
        models = {
            "FP32": copy.deepcopy(self.model).to(self.device),
            name: copy.deepcopy(self.model).to(self.device, half),
            "INT8": place(prepare_for_inference(self.model, "int8"), self.device, half),
            "INT4": place(prepare_for_inference(self.model, "int4"), self.device, half),
        }
        if self.config.smoke:
            tile_for_gpu(models["INT4"])  # on a CPU, too
        return models

    def seconds(self, action: Callable[[], object]) -> float:
        """How long an action takes, the median after two that warm up (and record graphs)."""
        for _ in range(0 if self.config.smoke else 2):
            action()
        times = []
        for _ in range(1 if self.config.smoke else self.config.rounds):
            synchronize(self.device)
            start = time.perf_counter()
            action()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        """Random words."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(FIRST_WORD, self.model.config.vocab_size, (length,), generator=generator).tolist()


def peer(bench: Bench, model: GPTModel) -> Any:
    """`transformers` with the same weights, or None where it is not installed."""
    if not find_spec("transformers"):
        return None
    theirs = in_transformers(model.float().cpu(), bos_token_id=None, eos_token_id=None)
    return theirs.to(bench.device, inference_dtype("auto", bench.device) or torch.bfloat16)


def measure_decoding(bench: Bench) -> None:
    """Tokens a second of one stream, with graphs and without, beside `transformers` and the limit of the memory."""
    n_tokens = 8 if bench.config.smoke else 256
    read, n_bytes = memory_reader(bench.device, bench.config.smoke)
    bandwidth = n_bytes / bench.seconds(read)
    params = SamplingParams(n_tokens, temperature=0)
    figures: dict[str, dict[str, float]] = {}

    def add(name: str, model: GPTModel, action: Callable[[], object]) -> None:
        speed = n_tokens / bench.seconds(action)
        figures[name] = {"tokens_per_second": speed, "share_of_bandwidth": bytes_read(model) * speed / bandwidth}

    candidates = bench.candidates()
    for name, model in candidates.items():
        for graphs in (True, False):
            engine = bench.engine(model, graphs=graphs)
            way = "graphs" if graphs else "from Python"
            add(f"{name}, {way}", model, lambda engine=engine: engine.run([[FIRST_WORD]], params))
    half = next(model for name, model in candidates.items() if name in ("BF16", "FP16"))
    if theirs := peer(bench, copy.deepcopy(bench.model)):
        ids = torch.tensor([[FIRST_WORD]], device=bench.device)
        settings = dict(max_new_tokens=n_tokens, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
        add("transformers, the same type", half, lambda: theirs.generate(ids, **settings))
    rows = [[name, f"{row['tokens_per_second']:.1f}", f"{row['share_of_bandwidth']:.0%}"]
            for name, row in figures.items()]  # fmt: skip
    note = f"Greedy, {n_tokens} tokens after one; the limit is reading at {bandwidth / 1e9:.0f} GB/s, as a sum does."
    bench.report.add("decoding", Table("Decoding, batch 1", note, ["", "tokens/s", "of the limit"], rows), figures)


def measure_prefill(bench: Bench) -> None:
    """Tokens a second of reading a prompt."""
    prompt = bench.prompt(bench.model.config.max_seq_len - 1)
    params, figures = SamplingParams(1, temperature=0), {}
    for name, model in bench.candidates().items():
        engine = bench.engine(model)
        figures[name] = len(prompt) / bench.seconds(lambda engine=engine: engine.run([prompt], params))
    if theirs := peer(bench, copy.deepcopy(bench.model)):
        ids = torch.tensor([prompt], device=bench.device)
        with torch.inference_mode():
            seconds = bench.seconds(lambda: theirs(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist())
        figures["transformers, half precision"] = len(prompt) / seconds
    rows = [[name, f"{speed:.0f}"] for name, speed in figures.items()]
    note = f"{len(prompt)} random tokens into an empty cache, and the token after them."
    bench.report.add("prefill", Table("Prompts", note, ["", "tokens/s"], rows), figures)


def measure_streams(bench: Bench) -> None:
    """Tokens a second of many streams at once, drawn with top-k and top-p."""
    length, n_tokens = (4, 2) if bench.config.smoke else (32, 64)
    figures: dict[str, dict[str, float]] = {}
    for name, model in bench.candidates().items():
        figures[name] = {}
        for count in STREAMS:
            engine = bench.engine(model, count)
            prompts = [bench.prompt(length, seed) for seed in range(count)]
            params = [SamplingParams(n_tokens, 0.8, 50, 0.95, ignore_eos=True, seed=seed) for seed in range(count)]
            run = bench.seconds(lambda e=engine, prompts=prompts, params=params: e.run(prompts, params))
            figures[name][str(count)] = count * n_tokens / run
    rows = [[name, *(f"{speed:.0f}" for speed in row.values())] for name, row in figures.items()]
    new = f"{n_tokens} new ones each at temperature 0.8, top-k 50, top-p 0.95"
    header = ["tokens/s", *(f"{count} streams" for count in STREAMS)]
    table = Table("The engine", f"Prompts of {length} tokens, {new}; prompts included.", header, rows)
    bench.report.add("streams", table, figures)


def report_products(bench: Bench) -> None:
    """Which kernels the layers have taken, as measured at their first calls."""
    made = choices()
    if not made:  # no GPU
        return
    rows = [
        [choice.kind, f"{choice.shape[1]} → {choice.shape[0]}", str(choice.n_rows)]
        + [*(f"{each:.4f}" for each in choice.milliseconds), "directly" if choice.reads_directly else "expanded"]
        for choice in made
    ]
    figures = [vars(choice) | {"reads_directly": choice.reads_directly} for choice in made]
    note = "Weights read as they are, or expanded at every call: milliseconds of a product."
    header = ["weights", "layer", "rows", "directly", "expanded", "taken"]
    bench.report.add("products", Table("Products with small weights", note, header, rows), figures)


def last_metrics(folder: Path) -> dict[str, Any]:
    """The last record of a training's steps: by then nothing is compiled or loaded any more."""
    return [record for record in read_metrics(folder / "metrics.jsonl") if "tokens_per_second" in record][-1]


def on_sample_text(bench: Bench, folder: Path) -> list[str]:
    """Options of pretraining on the sample text, with a tokenizer and shards that leave the user's own alone."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.is_dir():
        size = "300" if bench.config.smoke else "2048"
        options = ["--input", "data/pretrain/train.txt", "--vocab_size", size]
        byte_level_bpe.main([*options, "--output_dir", str(tokenizer)])
    return ["--sample_tokens", "0", "--tokenizer_dir", str(tokenizer), "--shard_dir", str(folder / "shards")]


def measure_training(bench: Bench, folder: Path) -> None:
    """Pretraining of presets, and nanoGPT's of the same shape where it is given: speed, share of the peak, memory."""
    figures: dict[str, dict[str, float | None]] = {}

    def train(name: str, steps: int, *options: str) -> None:
        pretrain_trainer.main([
            *options, "--max_steps", str(steps), "--log_interval", "1", "--eval_interval", str(steps),
            "--output_dir", str(folder / name), *on_sample_text(bench, folder),
        ])  # fmt: skip
        last = last_metrics(folder / name)
        figures[name] = {each: last.get(each) for each in ("tokens_per_second", "mfu", "memory_mib")}

    if bench.config.smoke:
        ours, steps = "tiny", 2
        sizes = dict(n_layer=1, n_head=2, n_embd=32, block_size=256, batch_size=2, gradient_accumulation_steps=1)
        train(ours, steps, *TINY, "--architecture", "gpt2")
    else:
        train("small", 120, "--preset", "small")  # about a minute on a large GPU
        ours, flops = "gpt2", 6 * GPT2_PARAMETERS * GPT2_TOKENS
        peak = peak_flops(bench.device, resolve_precision("auto", bench.device))
        steps = min(MOST_STEPS, max(8, int(TRAINED_SECONDS * USUAL_MFU * peak / flops)))
        sizes = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=8, gradient_accumulation_steps=8)
        train(ours, steps, "--preset", "gpt2", "--grad_accum_steps", "8", "--compile", "true")
    if bench.config.nanogpt_dir:
        speed = nanogpt_speed(bench, folder, sizes, 300 if bench.config.smoke else 2048, max(steps, 6))
        mfu, our_speed = figures[ours]["mfu"], figures[ours]["tokens_per_second"]
        figures["nanogpt"] = {"tokens_per_second": speed, "mfu": mfu and mfu * speed / our_speed, "memory_mib": None}
    rows = [[name, *(f"{value:.4g}" if value is not None else "" for value in row.values())]
            for name, row in figures.items()]  # fmt: skip
    note = "The last logged step of a short run on the sample text, whose vocabulary is smaller than the presets' own."
    if "nanogpt" in figures:
        note += f" nanoGPT: as large as {ours}, on random tokens; the median of its iterations after the fifth."
    bench.report.add("training", Table("Pretraining", note, ["", "tokens/s", "MFU", "MiB"], rows), figures)


def nanogpt_speed(bench: Bench, folder: Path, sizes: dict[str, int], vocab_size: int, steps: int) -> float:
    """Tokens a second of nanoGPT's train.py, with the settings that it has for a GPU.

    Args:
        sizes: its options of that name.
    """
    home, data = folder / "nanogpt", folder / "nanogpt/data/random"
    data.mkdir(parents=True)  # the clone stays as it is
    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(Path(bench.config.nanogpt_dir) / name, home)
    tokens = np.random.default_rng(0).integers(0, vocab_size, 100_000, dtype=np.uint16)
    for name in ("train.bin", "val.bin"):
        tokens.tofile(data / name)
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    options = {**sizes, "dataset": "random", "bias": True, "max_iters": steps, "eval_iters": 1}
    if bench.device.type == "cpu":
        options |= {"device": "cpu", "compile": False, "dtype": "float32"}
    command = [sys.executable, "train.py", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, cwd=home, text=True, capture_output=True)
    times = [float(time) for time in re.findall(r"^iter \d+: .* time ([\d.]+)ms", done.stdout, re.MULTILINE)]
    if done.returncode or len(times) <= 5:
        raise UserError(f"nanoGPT's train.py failed: {done.stderr.strip()[-500:]}")
    n_tokens = sizes["block_size"] * sizes["batch_size"] * sizes["gradient_accumulation_steps"]
    return n_tokens / statistics.median(times[5:]) * 1000


@contextmanager
def timed(owner: type, name: str) -> Iterator[list[tuple[float, float]]]:
    """Collects when calls of a method begin and end, in seconds."""
    calls, method = [], getattr(owner, name)

    def call(*arguments: Any, **settings: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*arguments, **settings)
        finally:
            calls.append((start, time.perf_counter()))

    setattr(owner, name, call)
    try:
        yield calls
    finally:
        setattr(owner, name, method)


def measure_alignment(bench: Bench, folder: Path) -> None:
    """Steps of PPO and of GRPO, and the share of them in which answers are generated."""
    smoke, steps, figures = bench.config.smoke, 1 if bench.config.smoke else 6, {}
    for name in ("sft_data", "rlhf_pairwise"):  # a few records, as their reading is not what is measured
        records = json.loads((ROOT / f"data/sft/{name}.json").read_text(encoding="utf-8"))[: 60 if smoke else 1000]
        (folder / f"{name}.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    data = ["--data_path", str(folder / "sft_data.json")]
    pairs = ["--pairwise_data", str(folder / "rlhf_pairwise.json")]

    def train(mode: str, *options: str) -> Path:
        finetune.main(["--mode", mode, *options, "--output_dir", str(folder / mode)])
        return folder / mode / f"{mode}_best.pth"

    size = TINY if smoke else ["--preset", "small"]
    base = folder / "base"
    pretrain_trainer.main([*size, "--max_steps", "1", "--output_dir", str(base), *on_sample_text(bench, folder)])
    short = ["--max_steps", "1", *(["--batch_size", "2"] if smoke else [])]
    sft = train("sft", *data, "--pretrained_model", str(base / "pretrain_best.pth"), *short)
    small = ["--max_gen_len", "4", "--rollout_batch_size", "8", "--batch_size", "8"] if smoke else []
    policy = ["--sft_model", str(sft), "--max_steps", str(steps), *small]
    reward = train("reward", *pairs, "--sft_model", str(sft), *short)
    runs = {"grpo": data, "ppo": [*pairs, "--reward_model", str(reward), "--sft_data", str(folder / "sft_data.json")]}
    for mode, options in runs.items():
        with timed(Engine, "run") as answering, timed(RolloutLoop, "train_step") as of_steps:
            train(mode, *options, *policy)
        counted = of_steps[min(1, steps - 1) :]  # the first one warms up
        whole = [end - start for start, end in counted]
        writing = [end - start for start, end in answering if any(a <= start and end <= b for a, b in counted)]
        figures[mode] = {"seconds_a_step": statistics.median(whole), "generating": sum(writing) / sum(whole)}
    rows = [[name, f"{row['seconds_a_step']:.2f}", f"{row['generating']:.0%}"] for name, row in figures.items()]
    answers = "8 answers of 4 tokens" if smoke else "64 answers of at most 32 tokens"
    note = f"A step of {answers}, its updates included: the median of {len(counted)}, and the share of the answers."
    table = Table("PPO and GRPO", note, ["", "s a step", "of it generating"], rows)
    bench.report.add("alignment", table, figures)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    config = parse_config(GpuConfig, argv, description="Speed on a GPU.")
    if not config.smoke and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU here; --smoke shows on a CPU that everything works")
    device = resolve_device("auto" if torch.cuda.is_available() else "cpu")
    facts = {"model": "GPT-2 with random weights", **about("transformers")}
    sizes = BenchmarkConfig()
    if config.smoke:
        sizes = BenchmarkConfig(vocab_size=600, d_model=32, n_layers=2, n_heads=2, max_seq_len=256)
    bench = Bench(config, device, Report(facts, "gpu"), random_model(sizes))
    with tempfile.TemporaryDirectory() as folder:
        for part in config.parts or PARTS:
            measure = globals()[f"measure_{part}"]
            measure(bench, *([Path(folder)] if part in ("training", "alignment") else []))
    report_products(bench)
    bench.report.finish(config.write, "gpu", f"On {facts['gpu'] or facts['processor']}")


if __name__ == "__main__":
    run_main(main)
