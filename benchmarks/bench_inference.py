"""How fast a model generates: this project beside other programs, on the same weights, in the same run.

    python benchmarks/bench_inference.py                          # a GPT-2 of 124 million parameters; half an hour
    python benchmarks/bench_inference.py --model SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/bench_inference.py --preset tiny --quick    # does everything work? half a minute
    CPU_LEVEL=avx2 python benchmarks/bench_inference.py           # as on a processor with nothing wider than AVX2

Without `--model`, weights are random: speed does not depend on them. Contestants take turns, so that a drift of the
machine hits all of them, and medians count. A peer that is not installed, or fails, is left out, and the table of peers
says why. A row with a goal says whether it was reached. The tables are followed by one line of JSON;
`--write benchmarks/RESULTS.md` puts them into that page, too.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.model_files import ModelFiles  # noqa: E402
from benchmarks.peer_programs import PROGRAMS, Setting  # noqa: E402
from benchmarks.peers import BatchGenerator, Generator, Ours, check_logits, synthetic_tokenizer  # noqa: E402
from benchmarks.serving import Load  # noqa: E402
from benchmarks.tables import Table, about  # noqa: E402
from benchmarks.turns import READ, Report, memory_reader, rates, speedup, take_turns  # noqa: E402
from command_line import option, parse_config, run_main  # noqa: E402
from cpu_level import cpu_level  # noqa: E402
from gpt_model import GPTConfig, GPTModel  # noqa: E402
from inference.kernels.linear_products import DTYPES  # noqa: E402
from inference.quantizer import prepare_for_inference  # noqa: E402

FIRST_WORD = 257  # ids from here on are letters; before them stand the end of a text, padding and single bytes
EXACT = 1e-3  # how far logits may be off with weights in floating point
# By the weights' bits, of peers, whose caches may be FP16, and of our integers; trained weights lose most
LIMITS = {32: 5e-3, 16: 5e-2, 8: 0.15, 4: 0.6}
OURS = {  # name: kind of weights, their bits, how far its logits may be off
    "FP32": ("fp32", 32, EXACT),
    "FP16": ("fp16", 16, EXACT),
    "INT8": ("int8", 8, LIMITS[8]),
    "INT8 dynamic": ("int8_dynamic", 8, LIMITS[8]),  # activations rounded as well, as llama.cpp does with Q8_0
    "INT4": ("int4", 4, LIMITS[4]),
}
OURS = {name: kind for name, kind in OURS.items() if kind[0] in DTYPES}
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
    torch.manual_seed(config.seed)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len")}
    model = GPTModel.from_config(GPTConfig.for_architecture("gpt2", **sizes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        elif name.endswith(("query_proj.weight", "key_proj.weight")):
            parameter.normal_(std=1.5 / config.d_model**0.5)
    return model


@dataclass
class Contestant:
    """A generator, the bits of its large matrices, and its logits' relative error, if they are to be seen; whether it
    keeps to CPU_LEVEL, as far as there is a way."""

    generator: Generator
    bits: int
    error: float | None
    held: bool = True


Contestants = dict[str, Contestant]


def our_contestants(model: GPTModel, prompt: Sequence[int]) -> Contestants:
    """This project with each kind of weights; logits are checked after `prompt`."""
    expected, found = logits_of(model, prompt), {}
    for name, (weights, bits, limit) in OURS.items():
        ours = Ours(prepare_for_inference(model, weights))
        found[f"ours {name}"] = Contestant(ours, bits, check_logits(name, ours, expected, prompt, limit))
    return found


@torch.inference_mode()
def logits_of(model: GPTModel, prompt: Sequence[int]) -> Any:
    """Those of the token after a prompt, (V,), by PyTorch alone."""
    return model(torch.tensor([prompt]))["logits"][0, -1].numpy()


def peer_contestants(
    report: Report, files: ModelFiles, setting: Setting, prompt: Sequence[int], cleanup: ExitStack
) -> Contestants:
    """Every peer that works here, with the weights of `files`; a table of all says why another does not."""
    found: Contestants = {}
    expected = logits_of(files.model, prompt)
    rows, figures = [], {}
    for program in PROGRAMS:
        if not find_spec(program.module):
            figures[program.name] = {"left_out": f"not installed: pip install {program.packages}"}
            continue
        figures[program.name] = {"instructions": program.instructions()}
        for weights, bits in program.bits.items():
            name = f"{program.name} {weights}"
            try:
                generator = program.open(files, weights, setting)
                if hasattr(generator, "close"):
                    cleanup.enter_context(closing(generator))
                error = check_logits(name, generator, expected, prompt, LIMITS[bits])
                held = not figures[program.name]["instructions"].startswith("not held")
                found[name] = Contestant(generator, bits, error, held)
                if weights.startswith("Q4"):
                    figures[name] = {"matrices": files.matrices(weights)}
            except Exception as error:  # whatever another program stumbles over is no reason to measure none
                reason = str(error).strip() or type(error).__name__
                figures[name] = {"left_out": reason.splitlines()[-1][:200]}
    for name, figure in figures.items():
        rows.append([name, *(figure.get(column, "") for column in ("instructions", "matrices", "left_out"))])
    at = f", CPU_LEVEL={level.name}" if (level := cpu_level()) else ""
    note = (
        f"All with {setting.n_threads} threads{at}; kinds of weights have rows if there is more to say. What is not "
        "held to CPU_LEVEL is measured, and is no measure for goals."
    )
    report.add("peers", Table("Peers", note, ["peer", "instructions", "matrices", "left out, because"], rows), figures)
    return found


def fastest(speeds: Mapping[str, float], found: Contestants, bits: int | None = None) -> str:
    """The name of the fastest peer that keeps to CPU_LEVEL, of those whose weights have so many bits, or empty."""
    names = [name for name in speeds if name in found and found[name].held and not name.startswith("ours")]
    return max((name for name in names if bits in (None, found[name].bits)), key=speeds.get, default="")


def our_fastest(speeds: Mapping[str, float], bits: int) -> str:
    """The name of our fastest contestant with so many bits a weight; at 8, inputs may be rounded, too, as peers do."""
    names = [f"ours {name}" for name, kind in OURS.items() if kind[1] == bits]
    return max((name for name in names if name in speeds), key=speeds.get)


def measure_decoding(report: Report, found: Contestants, n_tokens: int, rounds: int, quick: bool) -> None:
    """Tokens a second of one stream."""
    actions = {name: lambda c=c: c.generator.generate([FIRST_WORD], n_tokens) for name, c in found.items()}
    read, n_bytes = memory_reader(torch.device("cpu"), quick)
    take_turns({name: lambda c=c: c.generator.generate([FIRST_WORD], 4) for name, c in found.items()}, 1)  # warm up
    times = take_turns({**actions, READ: read}, rounds)
    measured = dict(found)
    base, uncached = "transformers FP32", "transformers FP32, no cache"
    if base in found:
        found[base].generator.use_cache = False
        times[uncached] = take_turns({base: actions[base]}, 1)[base] * rounds  # it is slow enough to be timed once
        found[base].generator.use_cache = True
        measured[uncached] = found[base]
    speeds, bandwidth = rates(times, n_tokens), n_bytes / statistics.median(times[READ])
    figures = {
        name: {
            "tokens_per_second": speeds[name],
            "weight_bytes": contestant.generator.weight_bytes,
            "share_of_bandwidth": contestant.generator.weight_bytes * n_tokens / n_bytes * speedup(times, name, READ),
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
    read, n_bytes = memory_reader(torch.device("cpu"), quick)
    actions = {name: lambda c=c: c.generator.prefill(prompt) for name, c in found.items()}
    take_turns(actions, 1)  # warm up
    times = take_turns({**actions, READ: read}, rounds)
    bandwidth = rates(times, n_bytes).pop(READ)
    speeds = {name: speed for name, speed in rates(times, len(prompt)).items() if name != READ}
    rows = [[name, f"{speed:.0f}", f"{len(prompt) / speed * 1e3:.0f}"] for name, speed in speeds.items()]
    title = f"Prefill, {len(prompt)} tokens"
    note = (
        f"{len(prompt)} random tokens into an empty cache, logits of the last one; memory, in the same rounds, was "
        f"read at {bandwidth / 1e9:.1f} GB/s."
    )
    report.add(name, Table(title, note, ["prefill", "tokens/s", "ms"], rows), speeds)
    ours = max((name for name in speeds if name.startswith("ours")), key=speeds.get)
    peer = fastest(speeds, found)
    goal = f"prefill of {len(prompt)}, our best ({ours.removeprefix('ours ')}) ÷ the fastest peer ({peer or 'none'})"
    report.goal(goal, speedup(times, ours, peer), 1.1)


def measure_batches(report: Report, found: Contestants, loads: Mapping[str, Load], rounds: int, quick: bool) -> None:
    """Tokens a second of many streams at once, beside the peers that compute them in one pass."""
    load = next(iter(loads.values()))
    n_streams, n_tokens = len(load.prompts), load.n_tokens
    actions = {}
    for precision, ours in loads.items():
        engine = ours.engine(n_streams)
        actions[f"ours {precision}"] = lambda ours=ours, engine=engine: ours.at_once(engine)
    for name, contestant in found.items():
        if isinstance(contestant.generator, BatchGenerator):
            actions[name] = lambda peer=contestant.generator: load.through(peer.generate_all)
    take_turns(actions, 1)  # warm up
    read, n_bytes = memory_reader(torch.device("cpu"), quick)
    times = take_turns({**actions, READ: read}, rounds)
    bandwidth = rates(times, n_bytes).pop(READ)
    speeds = {name: speed for name, speed in rates(times, n_streams * n_tokens).items() if name != READ}
    note = (
        f"{n_streams} prompts of {len(load.prompts[0])} tokens at once, {n_tokens} new ones each; memory, in the same "
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
    config = parse_config(BenchmarkConfig, argv, description="Speed of generation, beside other programs.")
    torch.set_num_threads(config.num_threads or torch.get_num_threads())
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
        found = our_contestants(model, prompt[:64])
        setting = Setting(torch.get_num_threads(), context, n_streams, prompt_tokens + new_tokens)
        found |= peer_contestants(report, files, setting, prompt[:64], cleanup)
        models = {name: found[f"ours {name}"].generator.model for name in OURS}
        loads = {
            name: Load(models[name], files.tokenizer, texts[:n_streams], new_tokens)
            for name in ("FP32", "INT8", "INT8 dynamic", "INT4")
            if name in models
        }
        measure_decoding(report, found, 16 if quick else 64, rounds, quick)
        for name, length in (("prefill", 64), ("prefill_long", 256)) if quick else PREFILLS.items():
            if length < context:
                measure_prefill(report, name, found, prompt[:length], rounds, quick)
            else:
                report.goal(f"prefill of {length}, which the context of {context} does not hold", None, 1.1)
        measure_batches(report, found, loads, rounds, quick)
    measure_cache(report, models["FP32"], *((64, 4) if quick else (min(512, context), 16)), min(rounds, 3))
    measure_streams(report, loads, n_streams, min(rounds, 3))
    load = Load(models["INT8"], files.tokenizer, texts, 4 if quick else 32)
    measure_delays(report, load, (1, 8) if quick else (1, 4, 16, 64))
    report.finish(config.write)


if __name__ == "__main__":
    run_main(main)
