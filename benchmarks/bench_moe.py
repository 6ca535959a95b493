"""What do experts bring? A mixture beside dense models that cost as much a token, or hold as much.

    python benchmarks/bench_moe.py --seeds 0,1,2 --num_threads 2

All are pretrained on the sample text with the same tokenizer, order, steps and settings of the preset `tiny`:

    dense            the model whose feed-forward network is as wide as the experts that a token passes, together
    moe              8 experts, of which a token passes 2
    dense, as large  the model whose feed-forward network is as wide as all experts together; one seed

Compared are the losses of the best states on the validation text, and the engine's speed of decoding (batch 1, FP32, in
turn, the best of several rounds).
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.tables import Table, about, in_a_sentence, write_section  # noqa: E402
from byte_level_bpe import ByteLevelBPETokenizer  # noqa: E402
from command_line import option, parse_config, run_main  # noqa: E402
from gpt_model import GPTModel  # noqa: E402
from inference.quantizer import decode_speed, prepare_for_inference  # noqa: E402
from pretrain_trainer import GPTTrainer, PretrainConfig  # noqa: E402
from text.text_files import iter_documents  # noqa: E402

TEXT = {part: str(ROOT / "data" / "pretrain" / f"{part}.txt") for part in ("train", "val")}
N_EXPERTS = 8


@dataclass
class BenchConfig:
    """Settings of the benchmark."""

    seeds: str = option("0,1,2", "seeds of initialisation and order; the model that is as large takes the first")
    epochs: float = option(5.0, "passes over the text", above=0)
    max_steps: int = option(0, "steps of each run; 0 means as many as --epochs needs", at_least=0)
    num_threads: int = option(2, "CPU threads", at_least=1)
    write: str = option("", "a Markdown page that takes the table; empty: none")


def models_to_compare() -> dict[str, PretrainConfig]:
    """The settings of each."""
    preset = PretrainConfig.presets
    d_expert = PretrainConfig(**preset["moe"]).model_config(vocab_size=2048, pad_token_id=1).d_ff
    tiny = preset["tiny"]
    return {
        "dense": PretrainConfig(**tiny, d_ff=2 * d_expert),
        f"moe, 2 of {N_EXPERTS}": PretrainConfig(**preset["moe"], n_experts=N_EXPERTS),
        "dense, as large": PretrainConfig(**tiny, d_ff=N_EXPERTS * d_expert),
    }


def train(settings: PretrainConfig, seed: int, config: BenchConfig, folder: Path) -> tuple[float, GPTModel, float]:
    """The validation loss of the best state, the model, and the seconds that training took."""
    settings.seed, settings.num_threads, settings.given = seed, config.num_threads, frozenset()
    settings.epochs, settings.max_steps = config.epochs, config.max_steps
    settings.train_data_dir, settings.val_data_dir = TEXT["train"], TEXT["val"]
    settings.tokenizer_dir, settings.shard_dir = str(folder / "tokenizer"), str(folder / "shards")
    settings.output_dir = str(folder / "run")
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = GPTTrainer(settings)
        best = trainer.train()
    return best["val_loss"], trainer.model, trainer.loop.seconds


def main(argv: list[str] | None = None) -> None:
    """Train all, and print a table and one JSON object."""
    config = parse_config(BenchConfig, argv, description=__doc__.splitlines()[0])
    torch.set_num_threads(config.num_threads)
    facts = about()
    print(in_a_sentence(facts), flush=True)
    losses: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    trained: dict[str, GPTModel] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = ByteLevelBPETokenizer(vocab_size=2048)
        tokenizer.train(iter_documents(TEXT["train"]), min_frequency=2)
        tokenizer.save(folder / "tokenizer")
        for number, seed in enumerate(map(int, config.seeds.split(","))):
            for name, settings in list(models_to_compare().items())[: 2 if number else 3]:
                loss, trained[name], spent = train(settings, seed, config, folder)
                losses.setdefault(name, []).append(loss)
                seconds.setdefault(name, []).append(spent)
                print(f"seed {seed}, {name}: validation loss {loss:.4f}, {spent:.0f} s", flush=True)
    ready = {name: prepare_for_inference(model) for name, model in trained.items()}
    speed = dict.fromkeys(ready, 0.0)
    for _ in range(5):
        for name, model in ready.items():
            speed[name] = max(speed[name], decode_speed(model, seconds=0.5))
    rows = [
        {"model": name, "parameters": trained[name].num_parameters(), "losses": losses[name],
         "active": trained[name].num_active_parameters(), "seconds": seconds[name], "tokens_per_second": speed[name]}
        for name in trained
    ]  # fmt: skip
    header = ["model", "parameters", "of which a token meets", "validation loss", "each seed", "training, s"]
    cells = [
        [row["model"], *(f"{row[key] / 1e6:.2f} M" for key in ("parameters", "active"))]
        + [f"{statistics.mean(row['losses']):.4f}", ", ".join(f"{loss:.4f}" for loss in row["losses"])]
        + [f"{statistics.median(row['seconds']):.0f}", f"{row['tokens_per_second']:.0f}"]
        for row in rows
    ]
    steps = f"{config.max_steps} steps" if config.max_steps else f"{config.epochs:g} passes over the sample text, steps"
    note = f"{steps} of 4,096 tokens; loss in nats a token, the mean of the runs; decoding at batch 1."
    table = Table("Experts", note, [*header, "decoding, tokens/s"], cells)
    print(table.plain())
    if config.write:
        write_section(Path(config.write), "moe", f"## Experts\n\n{in_a_sentence(facts)}\n\n{table.markdown()}")
    print(json.dumps({**facts, "rows": rows}))


if __name__ == "__main__":
    run_main(main)
