"""How fast a model generates: this project beside `transformers` and llama.cpp, on the same weights, in the same run.

    python benchmarks/bench_inference.py                          # a GPT-2 of 124 million parameters; minutes
    python benchmarks/bench_inference.py --preset tiny --quick    # does everything work? half a minute

Weights are random: speed does not depend on them. Contestants take turns, so that a drift of the machine hits all of
them, and medians count. A peer that is not installed is left out. A row with a goal says whether it was reached. The
tables are followed by one line of JSON; `--write benchmarks/RESULTS.md` puts them into that page, too.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.peers import (  # noqa: E402
    Generator,
    LlamaCpp,
    Ours,
    Transformers,
    check_logits,
    synthetic_tokenizer,
    write_gguf,
)
from benchmarks.serving import Load  # noqa: E402
from benchmarks.tables import Table, about, in_a_sentence, write_section  # noqa: E402
from command_line import option, parse_config, run_main  # noqa: E402
from gpt_model import GPTConfig, GPTModel  # noqa: E402
from inference.quantizer import prepare_for_inference, weight_bytes  # noqa: E402

Result = dict[str, Any]
FIRST_WORD = 257  # ids from here on are letters; before them stand the end of a text, padding and single bytes
READ = "memory read"  # an action among those that are timed
EXACT, INTEGER = 1e-3, 5e-2  # how far logits may be off with floating-point and with INT8 weights
OURS = {  # name: kind of weights, how far its logits may be off
    "FP32": ("fp32", EXACT),
    "FP16": ("fp16", EXACT),
    "INT8": ("int8", INTEGER),
    "INT8 dynamic": ("int8_dynamic", INTEGER),  # activations rounded as well, as llama.cpp does with Q8_0
}


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
    max_seq_len: int = option(1024, "context", at_least=256)
    num_threads: int = option(0, "CPU threads of every contestant; 0 means as many as torch takes", at_least=0)
    rounds: int = option(9, "how often the contestants take turns", at_least=1)
    quick: bool = option(False, "one round of few tokens: shows that everything works, gives no figures to quote")
    write: str = option("", "a Markdown page that takes the tables; empty: none")
    seed: int = option(0, "of the random weights and prompts", at_least=0)


def random_model(config: BenchmarkConfig) -> GPTModel:
    """A GPT-2 of random weights, such that the logits show any mistake in moving them to a peer.

    Unlike at the start of training, vectors are random as well, and attention is not nearly uniform.
    """
    torch.manual_seed(config.seed)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len")}
    model = GPTModel.from_config(GPTConfig.for_architecture("gpt2", **sizes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        elif name.endswith(("query_proj.weight", "key_proj.weight")):
            parameter.normal_(std=1.5 / config.d_model**0.5)
    return model


def seconds(action: Callable[[], object]) -> float:
    """How long an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


Times = dict[str, list[float]]  # of each action in seconds, a number for each round


def take_turns(actions: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """How long each action takes, in turn, once in each round."""
    of_rounds = [{name: seconds(action) for name, action in actions.items()} for _ in range(rounds)]
    return {name: [of_round[name] for of_round in of_rounds] for name in actions}


def rates(times: Times, n_items: int) -> dict[str, float]:
    """Items a second of each action, by its median time."""
    return {name: n_items / statistics.median(durations) for name, durations in times.items()}


def speedup(times: Times, ours: str, theirs: str) -> float | None:
    """How many times as fast; None if one of them was left out.

    The median of the ratios within each round: a machine that slows down for a while slows both.
    """
    if ours not in times or theirs not in times:
        return None
    return statistics.median(their / our for our, their in zip(times[ours], times[theirs], strict=True))


def memory_reader(device: torch.device, quick: bool) -> tuple[Callable[[], float], int]:
    """An action that reads memory with all threads, the sum of an FP32 tensor far larger than any cache; and how many
    bytes it reads."""
    numbers = torch.ones((1 << 24 if quick else 1 << 28) * (4 if device.type == "cuda" else 1), device=device)
    return lambda: numbers.sum().item(), numbers.nbytes


@dataclass
class Contestant:
    """A generator with what is known about it: bytes of weights that a token reads, and its logits' relative error."""

    generator: Generator
    weight_bytes: int
    error: float


class Report:
    """Collects tables, figures and goals; prints each table as soon as it is there."""

    def __init__(self, facts: Result, benchmark: str = "inference") -> None:
        self.figures: Result = {"benchmark": benchmark, **facts}
        self.setting = in_a_sentence(facts)
        self.tables: list[Table] = []
        self.goals: list[Result] = []
        print(self.setting, flush=True)

    def add(self, name: str, table: Table, figures: object) -> None:
        """A table and the figures in it."""
        self.figures[name] = figures
        self.tables.append(table)
        print(table.plain(), flush=True)

    def goal(self, name: str, measured: float | None, at_least: float) -> None:
        """What was to be reached; `measured` is None where the peer is missing."""
        met = None if measured is None else measured >= at_least
        self.goals.append({"goal": name, "measured": measured and round(measured, 3), "at_least": at_least, "met": met})

    def finish(self, page: str, name: str = "inference", title: str = "Inference") -> None:
        """The table of goals, if there are any; all tables into the section `name` of a Markdown page, if one is named;
        the line of JSON."""
        words = {True: "yes", False: "no", None: "left out"}
        rows = [
            [goal["goal"], "" if goal["met"] is None else f"{goal['measured']:.2f}", f"{goal['at_least']:.2f}"]
            + [words[goal["met"]]]
            for goal in self.goals
        ]
        if rows:
            header = ["", "measured", "at least", "met"]
            self.add("goals", Table("Goals", "Medians of the ratios within each round.", header, rows), self.goals)
        if page:
            tables = "\n\n".join(table.markdown() for table in self.tables)
            write_section(Path(page), name, f"## {title}\n\n{self.setting}\n\n{tables}")
        print(json.dumps(self.figures))


def bytes_read(model: GPTModel) -> int:
    """Bytes of weights that a token reads: all but the position table, of which it reads a row."""
    return weight_bytes(model) - model.position_embedding.weight.nbytes


def contestants(
    model: GPTModel, config: BenchmarkConfig, prompt: Sequence[int], folder: Path, cleanup: ExitStack
) -> dict[str, Contestant]:
    """Everything that can be measured here, each with the weights of `model`; logits are checked after `prompt`."""
    found: dict[str, Contestant] = {}
    with torch.inference_mode():
        expected = model(torch.tensor([prompt]))["logits"][0, -1].numpy()  # (V,), by PyTorch alone

    def enter(name: str, generator: Generator, n_bytes: int, limit: float) -> None:
        found[name] = Contestant(generator, n_bytes, check_logits(name, generator, expected, prompt, limit))

    for name, (weights, limit) in OURS.items():
        prepared = prepare_for_inference(model, weights)
        enter(f"ours {name}", Ours(prepared), bytes_read(prepared), limit)
    if find_spec("transformers"):
        enter("transformers FP32", Transformers(model), bytes_read(model), EXACT)
    if find_spec("llama_cpp"):
        for precision, limit in (("F32", EXACT), ("Q8_0", INTEGER)):
            path = write_gguf(model, folder / f"{precision}.gguf", precision)
            llama = LlamaCpp(path, config.max_seq_len, torch.get_num_threads())
            cleanup.enter_context(closing(llama))
            n_bytes = path.stat().st_size - model.position_embedding.weight.nbytes  # it stays FP32
            enter(f"llama.cpp {precision}", llama, n_bytes, limit)
    return found


def measure_decoding(report: Report, found: Mapping[str, Contestant], n_tokens: int, rounds: int, quick: bool) -> None:
    """Tokens a second of one stream."""
    actions = {name: lambda c=c: c.generator.generate([FIRST_WORD], n_tokens) for name, c in found.items()}
    read, n_bytes = memory_reader(torch.device("cpu"), quick)
    take_turns({name: lambda c=c: c.generator.generate([FIRST_WORD], 4) for name, c in found.items()}, 1)  # warm up
    times = take_turns({**actions, READ: read}, rounds)
    goals = [
        ("decoding FP32 ÷ transformers FP32", speedup(times, "ours FP32", "transformers FP32"), 2.2),
        ("decoding FP32 ÷ llama.cpp F32", speedup(times, "ours FP32", "llama.cpp F32"), 1.0),
        ("decoding INT8 ÷ transformers FP32", speedup(times, "ours INT8", "transformers FP32"), 6.0),
        ("decoding INT8 ÷ llama.cpp Q8_0", speedup(times, "ours INT8", "llama.cpp Q8_0"), 1.1),
    ]
    base, uncached = "transformers FP32", "transformers FP32, no cache"
    if base in found:
        found[base].generator.use_cache = False
        times[uncached] = [seconds(actions[base])] * rounds  # it is slow enough to be timed once
        found[base].generator.use_cache = True
        found = {**found, uncached: found[base]}
    speeds, bandwidth = rates(times, n_tokens), n_bytes / statistics.median(times[READ])
    figures = {
        name: {
            "tokens_per_second": speeds[name],
            "weight_bytes": contestant.weight_bytes,
            "share_of_bandwidth": contestant.weight_bytes * n_tokens / n_bytes * speedup(times, name, READ),
            "logits_error": contestant.error,
        }
        for name, contestant in found.items()
    }
    rows = [
        [
            name,
            f"{row['tokens_per_second']:.1f}",
            f"{speedup(times, name, base):.2f}" if base in found else "",
            f"{row['weight_bytes'] / 1e6:.0f}",
            f"{row['share_of_bandwidth']:.0%}",
            f"{row['logits_error']:.2%}",
        ]
        for name, row in figures.items()
    ]
    note = (
        f"Greedy, {n_tokens} tokens after a prompt of one. Of the limit: bytes of weights a token reads × tokens/s ÷ "
        f"the speed at which the same threads, in the same round, sum an FP32 tensor ({bandwidth / 1e9:.1f} GB/s). "
        "Logits' error: relative to our FP32 model's."
    )
    header = ["decoding, batch 1", "tokens/s", "× transformers", "MB a token", "of the limit", "logits' error"]
    report.add("decoding", Table("Decoding, batch 1", note, header, rows), figures)
    report.figures["bandwidth"] = bandwidth
    for goal in [*goals, ("decoding INT8, share of the bandwidth", figures["ours INT8"]["share_of_bandwidth"], 0.6)]:
        report.goal(*goal)


def measure_prefill(report: Report, found: Mapping[str, Contestant], prompt: Sequence[int], rounds: int) -> None:
    """Tokens a second of reading a prompt."""
    times = take_turns({name: lambda c=c: c.generator.prefill(prompt) for name, c in found.items()}, rounds)
    speeds = rates(times, len(prompt))
    rows = [[name, f"{speed:.0f}", f"{len(prompt) / speed * 1e3:.0f}"] for name, speed in speeds.items()]
    note = f"{len(prompt)} random tokens into an empty cache, logits of the last one."
    report.add("prefill", Table("Prefill", note, ["prefill", "tokens/s", "ms"], rows), speeds)
    ours, theirs = (
        max((name for name in speeds if name.startswith(side)), key=speeds.get, default="")
        for side in ("ours", "llama.cpp")
    )
    report.goal("prefill, our best ÷ llama.cpp's best", speedup(times, ours, theirs), 1.0)


@torch.inference_mode()
def measure_cache(report: Report, model: GPTModel, n_tokens: int, n_samples: int, rounds: int) -> None:
    """What the KV cache brings: without it, every new token reads the whole text again."""
    device = model.token_embedding.weight.device
    lengths = [round((index + 0.5) * n_tokens / n_samples) for index in range(n_samples)]
    texts = [torch.full((1, length), FIRST_WORD, device=device) for length in lengths]

    def steps_without_cache() -> None:
        for text in texts:
            model.lm_head(model.hidden_states(text)[:, -1]).argmax().item()

    def steps_with_cache() -> None:  # through PyTorch, too, and not in the engine's compiled code
        model.generate(torch.full((1, 1), FIRST_WORD, device=device), max_gen_len=n_tokens, temperature=0)

    times = take_turns({"with": steps_with_cache, "without": steps_without_cache}, rounds)
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


def measure_streams(report: Report, loads: Mapping[str, Load], n_streams: int, rounds: int) -> None:
    """Tokens a second of many streams through the engine at once, against the same ones one after another."""
    actions = {}
    for precision, load in loads.items():
        engine = load.engine(n_streams)
        load.at_once(engine)  # warm up
        actions[f"{precision}, one after another"] = lambda load=load, engine=engine: load.one_after_another(engine)
        actions[f"{precision}, {n_streams} at once"] = lambda load=load, engine=engine: load.at_once(engine)
    load = next(iter(loads.values()))
    times = take_turns(actions, rounds)
    speeds = rates(times, len(load.prompts) * load.n_tokens)
    rows = [[name, f"{speed:.1f}"] for name, speed in speeds.items()]
    note = f"Through the engine: {n_streams} prompts of {len(load.prompts[0])} tokens, {load.n_tokens} new ones each."
    report.add("streams", Table("Many streams", note, ["streams", "tokens/s"], rows), speeds)
    for precision in loads:
        gain = speedup(times, f"{precision}, {n_streams} at once", f"{precision}, one after another")
        report.goal(f"{n_streams} streams ÷ one after another, {precision}", gain, 3.0)


def measure_delays(report: Report, load: Load, counts: Sequence[int]) -> None:
    """Time to the first token and between tokens, and the engine's own share of a step, by number of streams."""
    delays = [load.delays(count) for count in counts]
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
        f"INT8, {len(load.prompts)} requests in groups of one size, each stream read by a thread of its own; prompts "
        f"of {len(load.prompts[0])} tokens, {load.n_tokens} new ones. Medians and 99th percentiles; the first token is "
        "counted from `submit`, the prompts of the whole group included."
    )
    report.add("latency", Table("Delays", note, header, rows), delays)

    costs = [load.step_costs(count) for count in counts]
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
    config = parse_config(BenchmarkConfig, argv, description="Speed of generation, beside transformers and llama.cpp.")
    torch.set_num_threads(config.num_threads or torch.get_num_threads())
    rounds = 1 if config.quick else config.rounds
    report = Report(about("transformers", "llama-cpp-python", "gguf"))
    model = random_model(config)
    prompt = torch.randint(FIRST_WORD, config.vocab_size, (256,)).tolist()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as cleanup:
        found = contestants(model, config, prompt[:64], Path(folder), cleanup)
        measure_decoding(report, found, 16 if config.quick else 64, rounds, config.quick)
        measure_prefill(report, found, prompt[: 64 if config.quick else 256], rounds)
        models = {name: found[f"ours {name}"].generator.model for name in OURS}
    measure_cache(report, models["FP32"], *((64, 4) if config.quick else (512, 16)), min(rounds, 3))
    tokenizer, n_streams = synthetic_tokenizer(config.vocab_size), 4 if config.quick else 16
    texts = torch.randint(FIRST_WORD, config.vocab_size, (8 if config.quick else 64, 32)).tolist()
    loads = {
        name: Load(models[name], tokenizer, texts[:n_streams], 4 if config.quick else 64) for name in ("FP32", "INT8")
    }
    measure_streams(report, loads, n_streams, min(rounds, 3))
    load = Load(models["INT8"], tokenizer, texts, 4 if config.quick else 32)
    measure_delays(report, load, (1, 8) if config.quick else (1, 4, 16, 64))
    report.finish(config.write)


if __name__ == "__main__":
    run_main(main)
