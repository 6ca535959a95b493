"""What does an encoder bring? The encoder–decoder beside a decoder-only model of its size, on the same pairs.

    python benchmarks/bench_seq2seq.py --num_threads 2

Both learn the sample translations in both directions with the same tokenizer, number of pairs in a step, and number of
passes, from nothing. The decoder-only model is trained as in SFT: the source is the question, the target the answer,
and the loss counts the target alone. Scored are the held-out pairs, greedily.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import finetune  # noqa: E402
from benchmarks.tables import Table, about, in_a_sentence, write_section  # noqa: E402
from checkpoint import load_model, save_checkpoint  # noqa: E402
from command_line import option, parse_config, run_main  # noqa: E402
from evaluation.text_metrics import sacre_bleu  # noqa: E402
from gpt_model import GPTConfig, GPTModel  # noqa: E402
from inference.quantizer import load_translator  # noqa: E402
from inference.text_generation import generate_texts  # noqa: E402
from inference.translate import translate  # noqa: E402
from seq2seq_trainer import Seq2SeqTrainer, Seq2SeqTrainingConfig  # noqa: E402


@dataclass
class BenchConfig:
    """Settings of the benchmark."""

    epochs: float = option(4.0, "passes over the pairs", above=0)
    max_steps: int = option(0, "steps of each run; 0 means as many as --epochs needs", at_least=0)
    num_threads: int = option(2, "CPU threads", at_least=1)
    write: str = option("", "a Markdown page that takes the table; empty: none")


def score(found: list[str], references: list[str]) -> dict[str, float]:
    """BLEU and exactness of one direction."""
    exact = sum(a == b for a, b in zip(found, references, strict=True)) / len(references)
    return {"bleu": sacre_bleu(found, references)[0], "exact": exact}


def train_encoder_decoder(config: BenchConfig, folder: Path) -> Seq2SeqTrainer:
    """Train it with its defaults; `loop.seconds` says how long it took."""
    settings = parse_config(
        Seq2SeqTrainingConfig,
        ["--epochs", str(config.epochs), "--max_steps", str(config.max_steps), "--output_dir", str(folder),
         "--num_threads", str(config.num_threads)],
        description="",
    )  # fmt: skip
    settings.tokenizer_dir = str(folder / "tokenizer")  # where it is trained
    trainer = Seq2SeqTrainer(settings)
    trainer.train()
    return trainer


def train_decoder_only(config: BenchConfig, trainer: Seq2SeqTrainer, folder: Path) -> tuple[Path, int, float]:
    """A GPT with about as many parameters, on the same pairs; the best model, its parameters, the seconds it took."""
    theirs, tokenizer = trainer.config, trainer.tokenizer
    # Cross-attention adds a third to a layer, and there is an encoder beside the decoder
    layers = theirs.num_encoder_layers + round(theirs.num_decoder_layers * 4 / 3)
    gpt_config = GPTConfig.for_architecture(
        "gpt2", vocab_size=len(tokenizer), d_model=theirs.d_model, n_layers=layers, n_heads=theirs.num_heads,
        max_seq_len=2 * theirs.max_seq_len, dropout=theirs.dropout, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(theirs.seed)
    model = GPTModel.from_config(gpt_config)
    untrained, data = folder / "untrained.pth", folder / "pairs.json"
    state = model.state_dict()
    save_checkpoint(untrained, model_state=state, config=gpt_config, tokenizer=tokenizer, stage="pretrain")
    loop = trainer.loop
    pairs = [*loop.train_data.texts, *loop.val_data.texts]  # SFT sets its own share of them aside
    records = [{"instruction": source, "response": target} for source, target in pairs]
    data.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    start = time.perf_counter()
    finetune.main(
        ["--mode", "sft", "--data_path", str(data), "--pretrained_model", str(untrained), "--output_dir", str(folder),
         "--epochs", str(config.epochs), "--max_steps", str(config.max_steps), "--batch_size", str(theirs.batch_size),
         "--max_seq_len", str(2 * theirs.max_seq_len), "--optimizer", "adamw", "--lr", str(theirs.lr),
         "--weight_decay", "0", "--warmup_steps", str(theirs.warmup_steps), "--num_threads", str(config.num_threads)]
    )  # fmt: skip
    return folder / "sft_best.pth", model.num_parameters(), time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    """Train both, and print a table and one JSON object."""
    config = parse_config(BenchConfig, argv, description=__doc__.splitlines()[0])
    os.chdir(ROOT)
    torch.set_num_threads(config.num_threads)
    facts = about()
    print(in_a_sentence(facts), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        trainer = train_encoder_decoder(config, Path(scratch, "both"))
        gpt_folder = Path(scratch, "gpt")
        gpt_folder.mkdir()
        gpt_path, n_parameters, seconds = train_decoder_only(config, trainer, gpt_folder)
        translator, tokenizer, _ = load_translator(trainer.loop.best_path)
        gpt, gpt_tokenizer, _ = load_model(gpt_path)
        ways = {"Chinese → English": trainer.test[::2], "English → Chinese": trainer.test[1::2]}
        for way, test in ways.items():
            sources, references = map(list, zip(*test, strict=True))
            found = translate(translator, tokenizer, sources, num_beams=1)
            rows.append({"model": "encoder–decoder", "way": way, "parameters": trainer.model.num_parameters()}
                        | {"seconds": trainer.loop.seconds} | score(found, references))  # fmt: skip
            answers = generate_texts(gpt, gpt_tokenizer, sources, chat=True, temperature=0, max_gen_len=64)
            found = [answer.text.strip() for answer in answers]
            rows.append({"model": "decoder only", "way": way, "parameters": n_parameters, "seconds": seconds}
                        | score(found, references))  # fmt: skip
    header = ["model", "direction", "parameters", "BLEU", "exact", "training, s"]
    cells = [
        [row["model"], row["way"], f"{row['parameters'] / 1e6:.2f} M", f"{row['bleu']:.1f}", f"{row['exact']:.1%}"]
        + [f"{row['seconds']:.0f}"]
        for row in rows
    ]
    note = f"{len(references)} held-out pairs, greedy; {config.epochs:g} passes over the training pairs both ways."
    table = Table("Translation", note, header, cells)
    print(table.plain())
    if config.write:
        write_section(Path(config.write), "seq2seq", f"## Translation\n\n{in_a_sentence(facts)}\n\n{table.markdown()}")
    print(json.dumps({"benchmark": "seq2seq", **facts, "rows": rows}))


if __name__ == "__main__":
    run_main(main)
