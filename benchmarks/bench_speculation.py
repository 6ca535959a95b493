"""What does speculative decoding bring? Batch 1, greedy, with and without in turn, by drafter and kind of weights.

    python benchmarks/bench_speculation.py --draft_model models/distill/distill_best.pth \\
        --draft_texts data/sft/sft_data.json
    python benchmarks/bench_speculation.py --model_path models/smollm2.pth --shape false \\
        --test_data_path benchmarks/questions/editing.json

Two tables:

    questions   those of a test file, each answered by a model without drafts, with prompt lookup, with a draft model
                and with drafts from texts; the tokens must be identical
    passes      how much longer a pass takes with more tokens, for the same model and for the shape of GPT-2 (124M,
                random weights): what drafting costs. A draft of k tokens pays where it is right more often than that

Random weights repeat themselves under greedy decoding, so for the shape of GPT-2 a lookup is nearly always right: its
speed is what a text that repeats itself would have, not what answers have. Every figure is the median of the rounds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.tables import Table, about, in_a_sentence, write_section  # noqa: E402
from command_line import UserError, option, parse_config, run_main  # noqa: E402
from gpt_model import GPTConfig, GPTModel  # noqa: E402
from inference.draft_model import DraftModel  # noqa: E402
from inference.draft_texts import FollowerTable, TextLookup, read_texts  # noqa: E402
from inference.engine import Engine  # noqa: E402
from inference.quantizer import load_any, prepare_for_inference, quantization_of  # noqa: E402
from inference.request import encode_prompt  # noqa: E402
from inference.sampling import SamplingParams  # noqa: E402
from inference.speculation import Drafter, PromptLookup  # noqa: E402
from text.conversation_data import load_conversations  # noqa: E402

WIDTHS = (1, 2, 4, 8, 16)
PAST = 64  # tokens in the cache before a pass


@dataclass
class BenchConfig:
    """Settings of the benchmark."""

    model_path: str = option("models/sft/sft_best.pth", "the checkpoint that answers")
    draft_model: str | None = option(None, "a smaller one with the same tokenizer; none: without that row")
    draft_texts: list[str] = option(list, "texts to draft from; none: without that row")
    test_data_path: str = option(str(ROOT / "data" / "sft" / "sft_test.json"), "the questions")
    n_questions: int = option(96, "how many of them, evenly spread; 0: all", at_least=0)
    max_gen_len: int = option(100, "the longest answer, in tokens", at_least=1)
    weights: str = option("fp32,int8", "kinds of weights")
    shape: bool = option(True, "measure the shape of GPT-2, too")
    rounds: int = option(7, "rounds in turn", at_least=1)
    num_threads: int = option(2, "CPU threads", at_least=1)
    write: str = option("", "a Markdown page that takes the tables; empty: none")


def answer_speeds(
    model: GPTModel,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    drafters: dict[str, Drafter | None],
    rounds: int,
) -> list[dict[str, object]]:
    """Each drafter's tokens a second after the first, passes and acceptance over the prompts, one after another.

    Raises:
        AssertionError: a drafter changes the tokens.
    """
    engines = {
        name: Engine(model, None, max_running=1, reuse_prefixes=False, drafter=drafter)
        for name, drafter in drafters.items()
    }
    whole: dict[str, list[float]] = {name: [] for name in engines}  # seconds of each round
    writing: dict[str, list[float]] = {name: [] for name in engines}  # and those after the first tokens
    expected: list[list[int]] = []
    for number in range(rounds + 1):  # the first round warms up, and shows the tokens
        spent = {name: [0.0, 0.0] for name in engines}
        for index, prompt in enumerate(prompts):  # question by question, so that what disturbs one disturbs all
            for name, engine in engines.items():
                began = time.perf_counter()
                request = engine.submit(prompt, params)
                while not request.token_ids:
                    engine.step()
                first = time.perf_counter()
                answer = request.result()
                ended = time.perf_counter()
                spent[name][0] += ended - began
                spent[name][1] += ended - first
                if len(expected) == index:
                    expected.append(answer.token_ids)
                assert answer.token_ids == expected[index], f"{name} changes the answer to question {index}"
        if number:
            for name in engines:
                whole[name].append(spent[name][0])
                writing[name].append(spent[name][1])
    n_tokens = sum(map(len, expected))

    def speedup(seconds: dict[str, list[float]], name: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds["none"], seconds[name], strict=True))

    rows = []
    for name, engine in engines.items():
        counted = engine.statistics()
        rows.append(
            {
                "drafter": name,
                "tokens_per_second": (n_tokens - len(prompts)) / statistics.median(writing[name]),
                "speedup": speedup(writing, name),
                "speedup_with_prompts": speedup(whole, name),
                "tokens_per_pass": counted.tokens_generated / counted.steps,
                "drafted": counted.tokens_drafted,
                "accepted": counted.tokens_accepted,
                "drafting_share": counted.drafting_seconds / (counted.seconds_elsewhere + counted.overhead_seconds),
            }
        )
    return rows


def pass_seconds(model: GPTModel, rounds: int) -> dict[int, float]:
    """The seconds of a pass of so many tokens of one answer, widths in turn."""
    engine = Engine(model, None, max_running=1, reuse_prefixes=False)
    engine.model_step.look_at_model()
    sequence = engine.cache.open(range(PAST + max(WIDTHS)))
    times: dict[int, list[float]] = {width: [] for width in WIDTHS}

    @torch.inference_mode()
    def one(width: int) -> float:
        sequence.length = PAST
        began = time.perf_counter()
        engine.cache.begin_step([(sequence, width)])
        engine.model_step.forward(list(range(width)), list(range(width)))
        return time.perf_counter() - began

    for number in range(4 * rounds + 1):
        for width in WIDTHS:
            seconds = one(width)
            if number:
                times[width].append(seconds)
    return {width: statistics.median(each) for width, each in times.items()}


def main(argv: list[str] | None = None) -> None:
    """Measure, and print two tables and one JSON object."""
    config = parse_config(BenchConfig, argv, description=__doc__.splitlines()[0])
    torch.set_num_threads(config.num_threads)
    facts = about()
    print(in_a_sentence(facts), flush=True)
    model, tokenizer, _ = load_any(config.model_path)
    if quantization_of(model):
        raise UserError(f"--model_path {config.model_path} is quantized; give the checkpoint that it was made from")
    params = SamplingParams(config.max_gen_len, temperature=0, stop_token_ids=tuple(tokenizer.end_token_ids))
    conversations = load_conversations(config.test_data_path)
    step = max(1, len(conversations) // config.n_questions) if config.n_questions else 1
    questions = [conversation[:-1] for conversation in conversations[::step][: config.n_questions or None]]
    prompts = [encode_prompt(tokenizer, question, chat=True) for question in questions]
    answers, passes, name = [], [], Path(config.model_path).name
    kinds = config.weights.split(",")
    for kind in kinds:
        prepared = prepare_for_inference(model, kind)
        drafters: dict[str, Drafter | None] = {"none": None, "lookup": PromptLookup()}
        if config.draft_model:
            drafters["draft model"] = DraftModel(load_any(config.draft_model)[0], max_running=1)
        if config.draft_texts:
            drafters["texts"] = TextLookup(FollowerTable(read_texts(config.draft_texts, tokenizer)))
        for row in answer_speeds(prepared, prompts, params, drafters, config.rounds):
            answers.append({"model": name, "weights": kind, **row})
        passes.append({"model": name, "weights": kind, "seconds": pass_seconds(prepared, config.rounds)})
    if config.shape:
        torch.manual_seed(0)
        large = GPTModel.from_config(GPTConfig.for_architecture("gpt2", vocab_size=50257, max_seq_len=256)).eval()
        prompt, params = torch.randint(50257, (32,)).tolist(), SamplingParams(config.max_gen_len, temperature=0)
        for kind in kinds:
            prepared, named = prepare_for_inference(large, kind), {"model": "shape of GPT-2", "weights": kind}
            drafters = {"none": None, "lookup": PromptLookup()}
            answers += [{**named, **row} for row in answer_speeds(prepared, [prompt], params, drafters, config.rounds)]
            passes.append({**named, "seconds": pass_seconds(prepared, config.rounds)})
    tables = [answers_table(answers, config, len(prompts)), passes_table(passes)]
    print(*(table.plain() for table in tables), sep="\n")
    if config.write:
        is_usual = config.test_data_path == BenchConfig.test_data_path
        of = "" if is_usual else f", {name}, {Path(config.test_data_path).name}"
        text = "\n\n".join((f"## Speculative decoding{of}", in_a_sentence(facts), *(t.markdown() for t in tables)))
        write_section(Path(config.write), f"speculation{of}", text)
    print(json.dumps({**facts, "answers": answers, "passes": passes}))


def answers_table(rows: Sequence[dict], config: BenchConfig, n_questions: int) -> Table:
    """Speed and acceptance."""
    note = (
        f"{n_questions} questions of {Path(config.test_data_path).name}, one after another, up to"
        f" {config.max_gen_len} tokens each; greedy, the same tokens in all rows. Tokens/s and × without: after each"
        f" answer's first token; medians of {config.rounds} rounds in turn."
    )
    if config.shape:
        note += " Random weights of the shape of GPT-2 repeat themselves: their acceptance says nothing about answers."
    header = ["model", "weights", "drafter", "tokens/s", "× without", "with prompts", "tokens a pass", "drafted, right"]

    def drafted(row: dict) -> str:
        return f"{row['drafted']}, {row['accepted'] / row['drafted']:.0%}" if row["drafted"] else "–"

    cells = [
        [row["model"], row["weights"], row["drafter"], f"{row['tokens_per_second']:.0f}", f"{row['speedup']:.2f}"]
        + [f"{row['speedup_with_prompts']:.2f}", f"{row['tokens_per_pass']:.2f}", drafted(row)]
        for row in rows
    ]
    return Table("Answers with and without drafts, batch 1", note, header, cells)


def passes_table(rows: Sequence[dict]) -> Table:
    """The cost of wider passes."""
    note = f"Milliseconds of a pass of so many tokens of one answer after {PAST} others; × that of one token."
    header = ["model", "weights", *(f"{width} token{'s' * (width > 1)}" for width in WIDTHS)]
    cells = [
        [row["model"], row["weights"]]
        + [f"{1000 * row['seconds'][width]:.2f} ({row['seconds'][width] / row['seconds'][1]:.2f})" for width in WIDTHS]
        for row in rows
    ]
    return Table("The cost of a pass", note, header, cells)


if __name__ == "__main__":
    run_main(main)
