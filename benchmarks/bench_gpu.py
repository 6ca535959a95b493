"""What a GPU does with this project: decoding, prompts, many streams, training, and steps of PPO and GRPO.

    bash benchmarks/gpu.sh                               # the tests that need a GPU, then this; at most ten minutes
    python benchmarks/bench_gpu.py --smoke               # does everything work? on a CPU, too, through a GPU's code

Weights are random, of GPT-2's shape with 124 million parameters; trainings are command lines that a user would type.
The tables are followed by one line of JSON; `--write benchmarks/RESULTS.md` puts them into that page, under the name of
the device.
"""

from __future__ import annotations

import copy
import json
import statistics
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

import torch  # noqa: E402

import byte_level_bpe  # noqa: E402
import finetune  # noqa: E402
import pretrain_trainer  # noqa: E402
from alignment.transformers_names import in_transformers  # noqa: E402
from benchmarks.bench_inference import BenchmarkConfig, random_model  # noqa: E402
from benchmarks.peers import bytes_read  # noqa: E402
from benchmarks.tables import Table, about  # noqa: E402
from benchmarks.turns import Report, memory_reader  # noqa: E402
from command_line import UserError, option, parse_config, run_main  # noqa: E402
from gpt_model import GPTModel  # noqa: E402
from inference.engine import Engine  # noqa: E402
from inference.quantizer import prepare_for_inference  # noqa: E402
from inference.sampling import SamplingParams  # noqa: E402
from machine import inference_dtype, resolve_device, synchronize  # noqa: E402
from training.run_log import read_metrics  # noqa: E402

PARTS = ("decoding", "prefill", "streams", "training", "alignment")
TINY = ["--d_model", "32", "--n_layers", "1", "--n_heads", "2", "--max_seq_len", "256", "--batch_size", "2"]
FIRST_WORD = 257


@dataclass
class GpuConfig:
    """Settings of the benchmark."""

    parts: list[str] = option(list, f"what to measure, of {', '.join(PARTS)}; none: everything")
    smoke: bool = option(False, "tiny models and few tokens, on a CPU where there is no GPU; no figures to quote")
    rounds: int = option(5, "how often each speed is measured; medians count", at_least=1)
    write: str = option("", "a Markdown page that takes the tables; empty: none")

    def validate(self) -> list[str]:
        """What is wrong with the settings, a sentence each."""
        return [f"--parts must be of {', '.join(PARTS)}, not {part}" for part in self.parts if part not in PARTS]


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
        small = prepare_for_inference(self.model, "int8")
        models = {"FP32": copy.deepcopy(self.model), name: copy.deepcopy(self.model).to(half), "INT8": small.to(half)}
        return {name: model.to(self.device) for name, model in models.items()}

    def seconds(self, action: Callable[[], object]) -> float:
        """How long an action takes, the median after one that warms up (and records graphs)."""
        action()
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
    counts, n_tokens = ((1, 4), 4) if bench.config.smoke else ((1, 16, 64, 256), 64)
    figures: dict[str, dict[str, float]] = {}
    for name, model in bench.candidates().items():
        figures[name] = {}
        for count in counts:
            engine = bench.engine(model, count)
            prompts = [bench.prompt(32, seed) for seed in range(count)]
            params = [SamplingParams(n_tokens, 0.8, 50, 0.95, ignore_eos=True, seed=seed) for seed in range(count)]
            run = bench.seconds(lambda e=engine, prompts=prompts, params=params: e.run(prompts, params))
            figures[name][str(count)] = count * n_tokens / run
    rows = [[name, *(f"{speed:.0f}" for speed in row.values())] for name, row in figures.items()]
    note = f"Prompts of 32 tokens, {n_tokens} new ones each at temperature 0.8, top-k 50, top-p 0.95; prompts included."
    header = ["tokens/s", *(f"{count} streams" for count in counts)]
    bench.report.add("streams", Table("The engine", note, header, rows), figures)


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
    """Pretraining of the presets: speed, share of the peak, memory."""
    runs = {"small": 120, "gpt2": 12}  # presets and steps: about a minute each on a large GPU
    figures = {}
    for preset, steps in {"tiny": 2}.items() if bench.config.smoke else runs.items():
        options = TINY if bench.config.smoke else ["--preset", preset]
        run_of = folder / preset
        pretrain_trainer.main([
            *options, "--max_steps", str(steps), "--log_interval", "1", "--eval_interval", str(steps),
            "--output_dir", str(run_of), *on_sample_text(bench, folder),
        ])  # fmt: skip
        figures[preset] = {name: last_metrics(run_of).get(name) for name in ("tokens_per_second", "mfu", "memory_mib")}
    rows = [[name, *(f"{value:.4g}" if value is not None else "" for value in row.values())]
            for name, row in figures.items()]  # fmt: skip
    note = "The last logged step of a short run on the sample text, whose vocabulary is smaller than the presets' own."
    bench.report.add("training", Table("Pretraining", note, ["", "tokens/s", "MFU", "MiB"], rows), figures)


@contextmanager
def timed(owner: type, name: str) -> Iterator[list[float]]:
    """Collects the seconds that calls of a method take."""
    seconds, method = [], getattr(owner, name)

    def call(*arguments: Any, **settings: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*arguments, **settings)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, call)
    try:
        yield seconds
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
        with timed(Engine, "run") as generating:
            start = time.perf_counter()
            train(mode, *options, *policy)
            whole = time.perf_counter() - start
        figures[mode] = {"seconds_a_step": whole / steps, "generating": sum(generating) / whole}
    rows = [[name, f"{row['seconds_a_step']:.2f}", f"{row['generating']:.0%}"] for name, row in figures.items()]
    note = f"Of whole runs of {steps} steps from the sample data, loading and evaluation included."
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
    bench.report.finish(config.write, "gpu", f"On {facts['gpu'] or facts['processor']}")


if __name__ == "__main__":
    run_main(main)
