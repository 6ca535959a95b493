"""How fast a model generates: this project beside other programs, on the same weights, in the same run.

    python benchmarks/bench_inference.py                          # a GPT-2 of 124 million parameters; half an hour
    python benchmarks/bench_inference.py --model SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/bench_inference.py --preset tiny --quick    # does everything work? half a minute
    CPU_LEVEL=avx2 python benchmarks/bench_inference.py           # as on a processor with nothing wider than AVX2

Without `--model`, weights are random: speed does not depend on them. Contestants have processes of their own and take
turns, so that a drift of the machine hits all of them, and medians count. A peer that is not installed, or fails, is
left out, and the table of peers says why. A row with a goal says whether it was reached. The tables are followed by one
line of JSON; `--write benchmarks/RESULTS.md` puts them into that page, too.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.contestants import OURS, Contestant, Process, our_contestants, peer_contestants, with_ours  # noqa: E402
from benchmarks.model_files import ModelFiles  # noqa: E402
from benchmarks.peer_programs import PROGRAMS, Setting  # noqa: E402
from benchmarks.peers import synthetic_tokenizer  # noqa: E402
from benchmarks.serving import cache_times, delays_and_costs, stream_times  # noqa: E402
from benchmarks.tables import Table, about  # noqa: E402
from benchmarks.turns import READ, Report, Times, memory_reader, rates, seconds, speedup, take_turns  # noqa: E402
from command_line import option, parse_config, run_main  # noqa: E402
from cpu_level import cpu_level  # noqa: E402
from gpt_model import GPTConfig, GPTModel  # noqa: E402

FIRST_WORD = 257  # ids from here on are letters; before them stand the end of a text, padding and single bytes
Contestants = dict[str, Contestant]
PREFILLS = {"prefill": 256, "prefill_long": 1024}  # tokens


@dataclass
class BenchmarkConfig:
    """The command line of the benchmark."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-124m": {},
        "tiny": dict(vocab_size=1000, d_model=64, n_layers=2, n_heads=2, max_seq_len=512),
    }
    vocab_size: int = option(50257, "tokens of the vocabulary", at_least=512)
    d_model: int = option(768, "width")
    n_layers: int = option(12, "layers")
    n_heads: int = option(12, "heads")
    max_seq_len: int = option(1280, "context: more than the longest prompt, of 1,024 tokens", at_least=256)
    model: str = option("", "a checkpoint, GGUF file or Hugging Face folder; empty: random weights")
    num_threads: int = option(0, "CPU threads of every contestant; 0 means as many as torch takes", at_least=0)
    rounds: int = option(9, "how often the contestants take turns", at_least=1)
    quick: bool = option(False, "one round of few tokens: shows that everything works, gives no figures to quote")
    write: str = option("", "a Markdown page that takes the tables; empty: none")
    seed: int = option(0, "of the random weights and prompts", at_least=0)


def random_model(config: BenchmarkConfig) -> GPTModel:
    """A GPT-2 of random weights, such that the logits show any mistake in moving them to a peer.

    Unlike at the start of training, vectors are random as well, and attention is not nearly uniform.
    """
    sizes = {name: getattr(config, name) for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len")}
    model = GPTModel.from_config(GPTConfig.for_architecture("gpt2", **sizes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        elif name.endswith(("query_proj.weight", "key_proj.weight")):
            parameter.normal_(std=1.5 / config.d_model**0.5)
    return model


@torch.inference_mode()
def logits_of(model: GPTModel, prompt: Sequence[int]) -> Any:
    """Those of the token after a prompt, (V,), by PyTorch alone."""
    return model(torch.tensor([prompt]))["logits"][0, -1].numpy()


def report_peers(report: Report, n_threads: int, remarks: Mapping[str, Mapping[str, str]]) -> None:
    """What is to be said of the peers: the instructions that they use, or why they were left out."""
    columns = ("instructions", "matrices", "left_out")
    rows = [[name, *(remark.get(column, "") for column in columns)] for name, remark in remarks.items()]
    at = f", CPU_LEVEL={level.name}" if (level := cpu_level()) else ""
    note = (
        f"All with {n_threads} threads{at}, each in a process of its own; kinds of weights have rows if there is more "
        "to say. What is not held to CPU_LEVEL is measured, and is no measure for goals."
    )
    report.add("peers", Table("Peers", note, ["peer", *columns[:2], "left out, because"], rows), remarks)


def in_turn(
    found: Contestants, rounds: int, quick: bool, method: str, *arguments: Any, warm_up: Sequence[Any] = ()
) -> tuple[Times, int]:
    """How long a method of every contestant takes, in turn, and how long reading memory does, in the same rounds; and
    how many bytes are read there. `warm_up`: the arguments of a first round, which does not count, if they differ."""
    read, n_bytes = memory_reader(torch.device("cpu"), quick)
    actions = {name: lambda c=c: c.seconds(method, *arguments) for name, c in found.items()}
    for contestant in found.values():
        contestant.seconds(method, *(warm_up or arguments))
    return take_turns({**actions, READ: lambda: seconds(read)}, rounds, measure=lambda action: action()), n_bytes


def fastest(speeds: Mapping[str, float], found: Contestants, bits: int | None = None) -> str:
    """The name of the fastest peer that keeps to CPU_LEVEL, of those whose weights have so many bits, or empty."""
    names = [name for name in speeds if name in found and found[name].held and not found[name].ours]
    return max((name for name in names if bits in (None, found[name].bits)), key=speeds.get, default="")


def our_fastest(speeds: Mapping[str, float], bits: int) -> str:
    """The name of our fastest contestant with so many bits a weight; at 8, inputs may be rounded, too, as peers do."""
    names = [f"ours {name}" for name, kind in OURS.items() if kind[1] == bits]
    return max((name for name in names if name in speeds), key=speeds.get)


def measure_decoding(report: Report, found: Contestants, n_tokens: int, rounds: int, quick: bool) -> None:
    """Tokens a second of one stream."""
    times, n_bytes = in_turn(found, rounds, quick, "generate", [FIRST_WORD], n_tokens, warm_up=([FIRST_WORD], 4))
    measured = dict(found)
    base, uncached = "transformers FP32", "transformers FP32, no cache"
    if base in found:  # slow enough to be timed once
        times[uncached] = [found[base].seconds("generate_without_cache", [FIRST_WORD], n_tokens)] * rounds
        measured[uncached] = found[base]
    speeds, bandwidth = rates(times, n_tokens), n_bytes / statistics.median(times[READ])
    figures = {
        name: {
            "tokens_per_second": speeds[name],
            "weight_bytes": contestant.weight_bytes,
            "share_of_bandwidth": contestant.weight_bytes * n_tokens / n_bytes * speedup(times, name, READ),
            "logits_error": contestant.error,
        }
        for name, contestant in measured.items()
    }
    rows = [
        [
            name,
            f"{row['tokens_per_second']:.1f}",
            f"{speedup(times, name, base):.2f}" if base in found else "",
            f"{row['weight_bytes'] / 1e6:.0f}",
            f"{row['share_of_bandwidth']:.0%}",
            "not shown" if row["logits_error"] is None else f"{row['logits_error']:.2%}",
        ]
        for name, row in figures.items()
    ]
    note = (
        f"Greedy, {n_tokens} tokens after a prompt of one. Of the limit: bytes of weights a token reads × tokens/s ÷ "
        f"the speed at which the same threads, in the same round, sum an FP32 tensor ({bandwidth / 1e9:.1f} GB/s). "
        "Logits' error: relative to our FP32 model's; where a program does not show them, its token was compared."
    )
    header = ["decoding, batch 1", "tokens/s", "× transformers", "MB a token", "of the limit", "logits' error"]
    report.add("decoding", Table("Decoding, batch 1", note, header, rows), figures)
    report.figures["bandwidth"] = bandwidth
    report.goal("decoding FP32 ÷ transformers FP32", speedup(times, "ours FP32", base), 2.2)
    report.goal("decoding FP32 ÷ llama.cpp F32", speedup(times, "ours FP32", "llama.cpp F32"), 1.0)
    report.goal("decoding INT8 ÷ transformers FP32", speedup(times, "ours INT8", base), 6.0)
    report.goal("decoding INT8, share of the bandwidth", figures["ours INT8"]["share_of_bandwidth"], 0.6)
    for bits in (8, 4):
        ours, peer = our_fastest(speeds, bits), fastest(speeds, found, bits)
        goal = f"decoding {ours.removeprefix('ours ')} ÷ the fastest peer at {bits} bits ({peer or 'none'})"
        report.goal(goal, speedup(times, ours, peer), 1.1)
    report.goal("decoding INT4 ÷ INT8", speedup(times, "ours INT4", "ours INT8"), 1.5)


def measure_prefill(
    report: Report, name: str, found: Contestants, prompt: Sequence[int], rounds: int, quick: bool
) -> None:
    """Tokens a second of reading a prompt."""
    times, n_bytes = in_turn(found, rounds, quick, "prefill", prompt)
    bandwidth = rates(times, n_bytes).pop(READ)
    speeds = {name: speed for name, speed in rates(times, len(prompt)).items() if name != READ}
    rows = [[name, f"{speed:.0f}", f"{len(prompt) / speed * 1e3:.0f}"] for name, speed in speeds.items()]
    title = f"Prefill, {len(prompt)} tokens"
    note = (
        f"{len(prompt)} random tokens into an empty cache, logits of the last one; memory, in the same rounds, was "
        f"read at {bandwidth / 1e9:.1f} GB/s."
    )
    report.add(name, Table(title, note, ["prefill", "tokens/s", "ms"], rows), speeds)
    ours = max((name for name in speeds if found[name].ours), key=speeds.get)
    peer = fastest(speeds, found)
    goal = f"prefill of {len(prompt)}, our best ({ours.removeprefix('ours ')}) ÷ the fastest peer ({peer or 'none'})"
    report.goal(goal, speedup(times, ours, peer), 1.1)


def measure_batches(
    report: Report, found: Contestants, prompts: Sequence[Sequence[int]], n_tokens: int, rounds: int, quick: bool
) -> None:
    """Tokens a second of many streams at once, beside the peers that compute them in one pass."""
    n_streams = len(prompts)
    batching = {name: contestant for name, contestant in found.items() if contestant.batches}
    times, n_bytes = in_turn(batching, rounds, quick, "generate_all", prompts, n_tokens)
    bandwidth = rates(times, n_bytes).pop(READ)
    speeds = {name: speed for name, speed in rates(times, n_streams * n_tokens).items() if name != READ}
    note = (
        f"{n_streams} prompts of {len(prompts[0])} tokens at once, {n_tokens} new ones each; memory, in the same "
        f"rounds, was read at {bandwidth / 1e9:.1f} GB/s."
    )
    rows = [[name, f"{speed:.1f}"] for name, speed in speeds.items()]
    title = f"{n_streams} streams, beside the peers that batch"
    report.add("batches", Table(title, note, [f"{n_streams} streams", "tokens/s"], rows), speeds)
    peer = fastest(speeds, found)
    for bits in (8, 4):
        ours = our_fastest(speeds, bits)
        goal = f"{n_streams} streams, {ours.removeprefix('ours ')} ÷ the fastest peer that batches ({peer or 'none'})"
        report.goal(goal, speedup(times, ours, peer), 1.3)


def measure_cache(report: Report, ours: Process, n_tokens: int, n_samples: int, rounds: int) -> None:
    """What the KV cache brings: without it, every new token reads the whole text again."""
    times = ours.call(with_ours, cache_times, FIRST_WORD, n_tokens, n_samples, rounds)
    speeds = {
        "with cache": rates(times, n_tokens)["with"],
        "without cache": rates(times, n_samples)["without"],
    }
    figures = {"n_tokens": n_tokens, **speeds}
    rows = [[name, f"{speed:.1f}", f"{n_tokens / speed:.1f}"] for name, speed in speeds.items()]
    note = f"FP32, {n_tokens} new tokens; without the cache, {n_samples} of the steps are timed, evenly spaced."
    report.add("cache", Table("KV cache", note, ["KV cache", "tokens/s", f"s for {n_tokens}"], rows), figures)
    gain = speedup(times, "with", "without") * n_tokens / n_samples
    report.goal(f"cache ÷ no cache, {n_tokens} tokens", gain, 8.0)


def measure_streams(report: Report, ours: Process, prompts: list[list[int]], n_tokens: int, rounds: int) -> None:
    """Tokens a second of many streams through the engine at once, against the same ones one after another."""
    n_streams = len(prompts)
    times = ours.call(with_ours, stream_times, prompts, n_tokens, rounds)
    speeds = rates(times, n_streams * n_tokens)
    rows = [[name, f"{speed:.1f}"] for name, speed in speeds.items()]
    note = f"Through the engine: {n_streams} prompts of {len(prompts[0])} tokens, {n_tokens} new ones each."
    report.add("streams", Table("Many streams", note, ["streams", "tokens/s"], rows), speeds)
    for kind in ("FP32", "INT8"):
        gain = speedup(times, f"{kind}, at once", f"{kind}, one after another")
        report.goal(f"{n_streams} streams ÷ one after another, {kind}", gain, 3.0)


def measure_delays(
    report: Report, ours: Process, prompts: list[list[int]], n_tokens: int, counts: Sequence[int]
) -> None:
    """Time to the first token and between tokens, and the engine's own share of a step, by number of streams."""
    delays, costs = ours.call(with_ours, delays_and_costs, prompts, n_tokens, counts)
    kinds = ("first_token_median", "first_token_p99", "between_tokens_median", "between_tokens_p99")
    rows = [
        [
            f"{figures['streams']}",
            f"{figures['tokens_per_second']:.0f}",
            *(f"{figures[kind] * 1e3:.1f}" for kind in kinds),
        ]
        for figures in delays
    ]
    header = ["streams", "tokens/s", "first token, ms", "99 %", "between tokens, ms", "99 %"]
    note = (
        f"INT8, {len(prompts)} requests in groups of one size, each stream read by a thread of its own; prompts "
        f"of {len(prompts[0])} tokens, {n_tokens} new ones. Medians and 99th percentiles; the first token is "
        "counted from `submit`, the prompts of the whole group included."
    )
    report.add("latency", Table("Delays", note, header, rows), delays)

    rows = [
        [f"{figures['streams']}", *(f"{figures[part] * 1e3:.3f}" for part in ("model", "sampling", "engine"))]
        + [f"{figures['engine'] / sum(figures[part] for part in ('model', 'sampling', 'engine')):.1%}"]
        for figures in costs
    ]
    header = ["streams", "model, ms", "sampling, ms", "engine itself, ms", "its share"]
    note = "A step of the same requests, on average; the engine's own time is all that is neither model nor sampling."
    report.add("overhead", Table("A step of the engine", note, header, rows), costs)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config = parse_config(BenchmarkConfig, argv, description="Speed of generation, beside other programs.")
    torch.set_num_threads(config.num_threads or torch.get_num_threads())
    torch.manual_seed(config.seed)
    quick, rounds = config.quick, 1 if config.quick else config.rounds
    n_streams, prompt_tokens, new_tokens = (4, 32, 4) if quick else (16, 32, 64)
    with tempfile.TemporaryDirectory() as name, ExitStack() as cleanup:
        folder = Path(name)
        if config.model:
            files = ModelFiles.of(config.model, folder, config.max_seq_len)
        else:
            files = ModelFiles.of_weights(random_model(config), synthetic_tokenizer(config.vocab_size), folder)
        packages = [program.packages.split()[0] for program in PROGRAMS]
        report = Report({"model": Path(config.model).name or "random weights", **about(*packages, "gguf")})
        model, context = files.model, files.model.config.max_seq_len
        words = range(FIRST_WORD, len(files.tokenizer))
        texts = torch.randint(words.start, words.stop, (8 if quick else 64, prompt_tokens)).tolist()
        prompt = torch.randint(words.start, words.stop, (max(PREFILLS.values()),)).tolist()
        setting = Setting(torch.get_num_threads(), context, n_streams, prompt_tokens + new_tokens)
        ours = Process(setting.n_threads)
        cleanup.callback(ours.close)
        expected = logits_of(model, prompt[:64])
        found = our_contestants(files, ours, prompt[:64], expected)
        peers, remarks = peer_contestants(files, setting, prompt[:64], expected, cleanup)
        found |= peers
        report_peers(report, setting.n_threads, remarks)
        measure_decoding(report, found, 16 if quick else 64, rounds, quick)
        for name, length in (("prefill", 64), ("prefill_long", 256)) if quick else PREFILLS.items():
            if length < context:
                measure_prefill(report, name, found, prompt[:length], rounds, quick)
            else:
                report.goal(f"prefill of {length}, which the context of {context} does not hold", None, 1.1)
        measure_batches(report, found, texts[:n_streams], new_tokens, rounds, quick)
        measure_cache(report, ours, *((64, 4) if quick else (min(512, context), 16)), min(rounds, 3))
        measure_streams(report, ours, texts[:n_streams], new_tokens, min(rounds, 3))
        measure_delays(report, ours, texts, 4 if quick else 32, (1, 8) if quick else (1, 4, 16, 64))
    at_level = f"CPU_LEVEL={level.name}" if (level := cpu_level()) else ""
    title = ", ".join(filter(None, ("Inference", Path(config.model).name, at_level)))
    report.finish(config.write, name=title.lower(), title=title)


if __name__ == "__main__":
    run_main(main)
