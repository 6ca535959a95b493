"""How fast is the tokenizer beside its peers? Training, encoding of long and short texts, files to shards, loading.

    python benchmarks/bench_tokenizer.py --write benchmarks/RESULTS.md

Every peer gets the same text and, for encoding, the same tokenizer; who gives other ids is named. Training is compared
at equal compression: bytes a token stand beside the time. MB/s of encoding are of the wall clock and all cores; the
best of three rounds counts, and the peers take turns in each.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402

from benchmarks.bench_cleaning import make_text  # noqa: E402
from benchmarks.tables import Table, about, in_a_sentence, write_section  # noqa: E402
from byte_level_bpe import ByteLevelBPETokenizer  # noqa: E402
from command_line import option, parse_config, run_main  # noqa: E402
from text.text_files import iter_documents  # noqa: E402
from text.token_shards import tokenize_to_shards  # noqa: E402
from text.tokenizer_files import PRETOKENIZER_PATTERN, byte_pre_tokenizer  # noqa: E402

GOALS = {  # what is compared: (at least or at most, how much)
    "training, ours ÷ the fastest peer of equal compression": ("at_most", 1.1),
    "long texts, ours ÷ the fastest peer": ("at_least", 0.9),
    "short texts, ours ÷ the fastest peer": ("at_least", 0.9),
    "files to shards ÷ the engine's raw speed": ("at_least", 0.6),
    "loading, ms": ("at_most", 50),
}


@dataclass
class BenchConfig:
    """Settings of the benchmark."""

    input: list[str] = option(list, "text beside the sample data; none: some is made here")
    megabytes: int = option(20, "how much is made", at_least=1)
    train_megabytes: int = option(6, "how much of the text the training is measured on", at_least=1)
    vocab_size: int = option(8192, "tokens", at_least=300)
    rounds: int = option(3, "rounds; the best one counts", at_least=1)
    write: str = option("", "a Markdown page that takes the tables; empty: none")


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def size_of(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def training(texts: list[str], config: BenchConfig) -> tuple[dict[str, dict], ByteLevelBPETokenizer]:
    """Seconds and bytes a token of each trainer; and our tokenizer."""
    ours = ByteLevelBPETokenizer(config.vocab_size)
    rows = {"ours": {"seconds": seconds(lambda: ours.train(texts, sample_bytes=None))}}
    sample = texts[:: max(1, len(texts) // 2000)]
    rows["ours"]["bytes_per_token"] = size_of(sample) / len(ours.encode_arrays(sample)[0])

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = byte_pre_tokenizer()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    took = seconds(lambda: engine.train_from_iterator(texts, trainer))
    n_tokens = sum(len(encoding.ids) for encoding in engine.encode_batch_fast(sample))
    rows["tokenizers"] = {"seconds": took, "bytes_per_token": size_of(sample) / n_tokens}
    if find_spec("rustbpe"):
        import rustbpe

        peer = rustbpe.Tokenizer()
        took = seconds(lambda: peer.train_from_iterator(iter(texts), config.vocab_size, pattern=PRETOKENIZER_PATTERN))
        rows["rustbpe"] = {
            "seconds": took,
            "bytes_per_token": size_of(sample) / sum(map(len, map(peer.encode, sample))),
        }
    return rows, ours


def encoding(tokenizer: ByteLevelBPETokenizer, texts: list[str], config: BenchConfig) -> dict[str, dict]:
    """MB/s of each encoder, and how many texts have other ids."""
    engine, content = tokenizer._engine, json.loads(tokenizer.to_files()["tokenizer.json"])
    peers: dict[str, Callable[[list[str]], object]] = {
        "ours, arrays": lambda some: tokenizer.encode_arrays(some),
        "ours, lists": lambda some: tokenizer.encode_batch(some),
        "tokenizers": lambda some: [one.ids for one in engine.encode_batch_fast(some, add_special_tokens=False)],
    }
    if find_spec("gigatoken"):
        import gigatoken

        raw = gigatoken.Tokenizer.from_json(json.dumps({**content, "added_tokens": []}))
        peers |= {"gigatoken, arrays": raw.encode_batch, "gigatoken, lists": raw.encode_batch_list}
    if find_spec("tiktoken"):
        import tiktoken

        ranks = {tokenizer.token_bytes(i): i for i in range(len(tokenizer)) if tokenizer.token_bytes(i)}
        tik = tiktoken.Encoding("ours", pat_str=PRETOKENIZER_PATTERN, mergeable_ranks=ranks, special_tokens={})
        peers["tiktoken"] = lambda some: [tik.encode_ordinary(text) for text in some]
    expected = tokenizer.encode_batch(texts)
    best = dict.fromkeys(peers, float("inf"))
    for _ in range(config.rounds):
        for name, encode in peers.items():
            best[name] = min(best[name], seconds(lambda encode=encode: encode(texts)))
    rows = {}
    for name, encode in peers.items():
        given = tokenizer.encode_batch(texts) if name == "ours, arrays" else encode(texts)
        given = given.to_list() if hasattr(given, "to_list") else given
        different = sum(list(one) != other for one, other in zip(given, expected, strict=True))
        rows[name] = {"megabytes_per_second": size_of(texts) / best[name] / 1e6, "different": different}
    return rows


def shards(tokenizer: ByteLevelBPETokenizer, texts: list[str], folder: Path, config: BenchConfig) -> float:
    """MB/s from a text file to token shards on the disk."""
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    took = [
        seconds(lambda number=number: tokenize_to_shards(path, tokenizer, folder / str(number)))
        for number in range(config.rounds)
    ]
    return size_of(texts) / min(took) / 1e6


def loading(tokenizer: ByteLevelBPETokenizer, folder: Path) -> float:
    """Milliseconds until a folder is loaded; the best of five."""
    tokenizer.save(folder)
    return 1000 * min(seconds(lambda: ByteLevelBPETokenizer.from_pretrained(folder)) for _ in range(5))


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchConfig, argv, description="measure the tokenizer")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not config.input:
            make_text(folder / "made.jsonl", config.megabytes)
        texts = [text for path in (config.input or [folder / "made.jsonl"]) for text in iter_documents(path)]
        texts += iter_documents(ROOT / "data/pretrain/train.txt")
        step = max(1, size_of(texts) // (config.train_megabytes * 1_000_000))
        trained, tokenizer = training(texts[::step], config)
        long = ["\n".join(texts[start : start + 200]) for start in range(0, len(texts), 200)]
        short = list(islice((line[:120] for text in texts for line in text.split("\n") if line.strip()), 100_000))
        encoded = {"long texts": encoding(tokenizer, long, config), "short texts": encoding(tokenizer, short, config)}
        to_shards = shards(tokenizer, texts, folder, config)
        load = loading(tokenizer, folder / "tokenizer")

    least = 0.99 * trained["ours"]["bytes_per_token"]
    peers = [row["seconds"] for who, row in trained.items() if who != "ours" and row["bytes_per_token"] >= least]
    measured = {"training, ours ÷ the fastest peer of equal compression": trained["ours"]["seconds"] / min(peers)}
    for kind, rows in encoded.items():
        speeds = {who: row["megabytes_per_second"] for who, row in rows.items() if not row["different"]}
        others = max(speed for who, speed in speeds.items() if not who.startswith("ours"))
        measured[f"{kind}, ours ÷ the fastest peer"] = speeds["ours, arrays"] / others
    raw = max(row["megabytes_per_second"] for row in encoded["long texts"].values())
    measured |= {"files to shards ÷ the engine's raw speed": to_shards / raw, "loading, ms": load}
    goals = [
        {"goal": name, GOALS[name][0]: GOALS[name][1], "measured": value, "met": value >= GOALS[name][1]}
        if GOALS[name][0] == "at_least"
        else {"goal": name, GOALS[name][0]: GOALS[name][1], "measured": value, "met": value <= GOALS[name][1]}
        for name, value in measured.items()
    ]
    facts = about("tokenizers", "gigatoken", "rustbpe", "tiktoken")
    figures = {"goals": goals, "training": trained, "encoding": encoded, "shards": to_shards, "loading": load, **facts}
    note = f"{size_of(texts[::step]) / 1e6:.1f} MB, {config.vocab_size} tokens. {in_a_sentence(facts)}"
    tables = [
        Table(
            "Training",
            note,
            ("", "seconds", "bytes a token"),
            [(who, f"{row['seconds']:.1f}", f"{row['bytes_per_token']:.3f}") for who, row in trained.items()],
        )
    ]
    for kind, rows in encoded.items():
        lines = [(who, f"{row['megabytes_per_second']:.1f}", str(row["different"])) for who, row in rows.items()]
        some = long if kind == "long texts" else short
        note = f"{len(some):,} texts, {size_of(some) / 1e6:.1f} MB; a text file to token shards: {to_shards:.1f} MB/s."
        tables.append(Table(f"Encoding {kind}", note, ("", "MB/s", "texts with other ids"), lines))
    lines = [(goal["goal"], f"{goal['measured']:.2f}", "yes" if goal["met"] else "no") for goal in goals]
    tables.append(Table("Goals", "What was aimed at.", ("", "measured", "met"), lines))
    print("\n".join(table.plain() for table in tables))
    if config.write:
        write_section(Path(config.write), "tokenizer", "\n\n".join(table.markdown() for table in tables))
    print(json.dumps(figures))


if __name__ == "__main__":
    run_main(main)
