"""How fast is the tokenizer beside its peers? Training, split patterns, encoding, files to shards, loading.

    python benchmarks/bench_tokenizer.py --input songci.txt tinyshakespeare.txt --write benchmarks/RESULTS.md

Texts: what --input names, the sample data, and 100 MB that are made here. Every peer gets the same text and, for
encoding, the same tokenizer; who gives other ids is named. Training is compared at equal compression: bytes a token
stand beside the time. Figures are of the wall clock and all cores; the best of three rounds counts, and the peers take
turns in each. An encoder remembers the pieces that it has met, so each round begins with new ones: a corpus is encoded
once. The slow ones get the first megabytes of a text.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
from text.bpe_training import batches, engine_of  # noqa: E402
from text.fast_encoding import ids_of  # noqa: E402
from text.text_files import iter_documents  # noqa: E402
from text.token_shards import tokenize_to_shards  # noqa: E402
from text.tokenizer_files import PRETOKENIZER_PATTERN, byte_pre_tokenizer  # noqa: E402

LONG, SHORT = 20_000, 120  # characters
SHORT_TEXTS = 200_000
FOR_THE_SLOW = 4_000_000  # characters of a text
PATTERNS = {
    "ours, which is Qwen2's and Qwen3's": PRETOKENIZER_PATTERN,
    "GPT-4's (cl100k)": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+",
    "GPT-2's": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
Encode = Callable[[list[str]], object]


@dataclass
class BenchConfig:
    """Settings of the benchmark."""

    input: list[str] = option(list, "text beside the sample data and what is made here")
    megabytes: int = option(100, "how much is made", at_least=1)
    train_megabytes: int = option(10, "how much of the real text the training is measured on", at_least=1)
    vocab_size: int = option(8192, "tokens", at_least=300)
    rounds: int = option(3, "rounds; the best one counts", at_least=1)
    write: str = option("", "a Markdown page that takes the tables; empty: none")


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def size_of(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def goal(name: str, measured: float, *, at_least: float | None = None, at_most: float | None = None) -> dict:
    if at_least is None:
        return {"goal": name, "at_most": at_most, "measured": measured, "met": measured <= at_most}
    return {"goal": name, "at_least": at_least, "measured": measured, "met": measured >= at_least}


# ------------------------------------------------------------------------------------------------------------ training


@contextlib.contextmanager
def no_output() -> Iterator[None]:
    """For a library that prints from Rust, past `sys.stdout`."""
    sys.stdout.flush()
    kept, nowhere = [os.dup(number) for number in (1, 2)], os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        for number, file in zip((1, 2), kept, strict=True):
            os.dup2(file, number)
            os.close(file)
        os.close(nowhere)


def training(texts: list[str], folder: Path, config: BenchConfig) -> tuple[dict[str, dict], ByteLevelBPETokenizer]:
    """Seconds and bytes a token of each trainer; and our tokenizer."""
    by_us = by_tokenizers = by_rustbpe = by_gigatoken = None
    path = folder / "training.txt"
    path.write_text("\n".join(texts), encoding="utf-8")

    def ours() -> None:
        nonlocal by_us
        by_us = ByteLevelBPETokenizer(config.vocab_size)
        by_us.train(texts, sample_bytes=None)

    def tokenizers() -> None:
        nonlocal by_tokenizers
        by_tokenizers = Tokenizer(models.BPE())
        by_tokenizers.pre_tokenizer = byte_pre_tokenizer()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size, min_frequency=2, initial_alphabet=alphabet, show_progress=False
        )
        by_tokenizers.train_from_iterator(texts, trainer)

    def rustbpe() -> None:
        nonlocal by_rustbpe
        import rustbpe

        by_rustbpe = rustbpe.Tokenizer()
        by_rustbpe.train_from_iterator(iter(texts), config.vocab_size, pattern=PRETOKENIZER_PATTERN)

    def gigatoken() -> None:
        nonlocal by_gigatoken
        import gigatoken

        with no_output():
            _, merges = gigatoken.train_bpe(path, config.vocab_size, ["<s>"])
        by_gigatoken = engine_of(merges)[1]
        by_gigatoken.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # with GPT-2's pattern

    peers = {"ours": ours, "rustbpe": rustbpe, "gigatoken, GPT-2's split pattern": gigatoken}
    peers = {name: train for name, train in peers.items() if name == "ours" or find_spec(name.split(",")[0])}
    best = dict.fromkeys(peers, float("inf"))
    for _ in range(config.rounds):
        for name, train in peers.items():
            best[name] = min(best[name], seconds(train))
    best["tokenizers"] = seconds(tokenizers)  # once: it is several times as slow as the others
    sample = texts[:: max(1, len(texts) // 2000)]
    n_tokens = {
        "ours": lambda: len(by_us.encode_arrays(sample)[0]),
        "rustbpe": lambda: sum(map(len, map(by_rustbpe.encode, sample))),
        "gigatoken, GPT-2's split pattern": lambda: sum(map(len, ids_of(by_gigatoken, sample))),
        "tokenizers": lambda: sum(map(len, ids_of(by_tokenizers, sample))),
    }
    size = size_of(sample)
    return {name: {"seconds": took, "bytes_per_token": size / n_tokens[name]()} for name, took in best.items()}, by_us


def split_patterns(kinds: dict[str, list[str]], config: BenchConfig) -> dict[str, dict[str, float]]:
    """Bytes a token of held-out text of each kind, every tenth document, by the pattern that training used."""
    if not find_spec("rustbpe"):
        return {}
    import rustbpe

    learned_from = [text for texts in kinds.values() for number, text in enumerate(texts) if number % 10]
    rows = {}
    for name, pattern in PATTERNS.items():
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(learned_from), config.vocab_size, pattern=pattern)
        rows[name] = {
            kind: size_of(texts[::10]) / sum(map(len, map(trainer.encode, texts[::10])))
            for kind, texts in kinds.items()
        }
    return rows


# ------------------------------------------------------------------------------------------------------------ encoding


def encoders(tokenizer: ByteLevelBPETokenizer) -> dict[str, Callable[[], Encode]]:
    """{name: what makes a new encoder}; the slow ones are named in brackets."""
    files = tokenizer.to_files()
    content = json.dumps({**json.loads(files["tokenizer.json"]), "added_tokens": []})

    def ours(method: str) -> Callable[[], Encode]:
        return lambda: getattr(ByteLevelBPETokenizer.from_files(files), method)

    def one_by_one() -> Encode:
        new = ByteLevelBPETokenizer.from_files(files)
        return lambda texts: [new.encode(text, add_special_tokens=False)["input_ids"] for text in texts]

    made: dict[str, Callable[[], Encode]] = {
        "ours, arrays": ours("encode_arrays"),
        "ours, lists": ours("encode_batch"),
        "ours, one by one": one_by_one,
        "(tokenizers)": lambda: lambda texts: ids_of(tokenizer._engine, texts),
    }
    if find_spec("gigatoken"):
        import gigatoken

        def alone() -> Encode:
            new = gigatoken.Tokenizer.from_json(content)
            return lambda texts: [new.encode(text).tolist() for text in texts]

        made |= {
            "gigatoken, arrays": lambda: gigatoken.Tokenizer.from_json(content).encode_batch,
            "gigatoken, lists": lambda: gigatoken.Tokenizer.from_json(content).encode_batch_list,
            "gigatoken, one by one": alone,
        }
    if find_spec("tiktoken"):
        import tiktoken

        ranks = {tokenizer.token_bytes(i): i for i in range(len(tokenizer)) if tokenizer.token_bytes(i)}
        tik = tiktoken.Encoding("ours", pat_str=PRETOKENIZER_PATTERN, mergeable_ranks=ranks, special_tokens={})
        made["(tiktoken)"] = lambda: lambda texts: [tik.encode_ordinary(text) for text in texts]
    return made


def as_lists(ids: object) -> list[list[int]]:
    if isinstance(ids, tuple):  # of `encode_arrays`
        return [ids[0][start:stop].tolist() for start, stop in zip(ids[1], ids[1][1:], strict=False)]
    return ids.to_list() if hasattr(ids, "to_list") else ids


def encoding(tokenizer: ByteLevelBPETokenizer, texts: list[str], config: BenchConfig) -> dict[str, dict]:
    """MB/s of each encoder, and how many of the first texts have other ids than `tokenizers` gives."""
    made, first = encoders(tokenizer), next(batches(iter(texts), FOR_THE_SLOW))
    expected = ids_of(tokenizer._engine, first)
    sizes = {name: size_of(first if name.startswith("(") else texts) for name in made}
    best = dict.fromkeys(made, float("inf"))
    for _ in range(config.rounds):
        for name, make in made.items():
            encode = make()
            encode(["x"])  # what it does at its first call is loading
            some = first if name.startswith("(") else texts
            best[name] = min(best[name], seconds(lambda encode=encode, some=some: encode(some)))
    rows = {}
    for name, make in made.items():
        other = sum(list(one) != ids for one, ids in zip(as_lists(make()(first)), expected, strict=True))
        rows[name.strip("()")] = {"megabytes_per_second": sizes[name] / best[name] / 1e6, "different": other}
    return rows


def to_long(texts: list[str]) -> list[str]:
    return ["\n".join(batch) for batch in batches(iter(texts), LONG)]


def to_short(texts: list[str]) -> list[str]:
    lines = (line[:SHORT] for text in texts for line in text.split("\n") if line.strip())
    return list(islice(lines, SHORT_TEXTS))


def shards(tokenizer: ByteLevelBPETokenizer, texts: list[str], folder: Path, config: BenchConfig) -> dict[str, float]:
    """MB/s from a text file to token shards on the disk, and of the engine that is given the same texts."""
    path, files = folder / "text.jsonl", tokenizer.to_files()
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    make_raw = encoders(tokenizer).get("gigatoken, arrays") or encoders(tokenizer)["(tokenizers)"]
    to_shards, raw = [], []
    for number in range(config.rounds):
        new, encode = ByteLevelBPETokenizer.from_files(files), make_raw()
        new.encode_arrays(["x"])
        encode(["x"])
        to_shards.append(seconds(lambda new=new, here=folder / str(number): tokenize_to_shards(path, new, here)))
        raw.append(seconds(lambda encode=encode: encode(texts)))
    size = size_of(texts) / 1e6
    return {"to_shards": size / min(to_shards), "raw": size / min(raw)}


def loading(tokenizer: ByteLevelBPETokenizer, folder: Path) -> float:
    """Milliseconds until a folder is loaded; the best of five."""
    tokenizer.save(folder)
    return 1000 * min(seconds(lambda: ByteLevelBPETokenizer.from_pretrained(folder)) for _ in range(5))


# -------------------------------------------------------------------------------------------------------------- report


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchConfig, argv, description="measure the tokenizer")
    begin, facts = time.perf_counter(), about("tokenizers", "gigatoken", "rustbpe", "tiktoken")
    sample = [text for name in ("train.txt", "val.txt") for text in iter_documents(ROOT / "data/pretrain" / name)]
    kinds = {Path(path).stem: list(iter_documents(path)) for path in config.input} | {"sample data": sample}
    real = [text for texts in kinds.values() for text in texts]
    code = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*/*.py"))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_text(folder / "made.jsonl", config.megabytes)
        made = list(iter_documents(folder / "made.jsonl"))
        step = -(-size_of(real) // (config.train_megabytes * 1_000_000))
        trained, tokenizer = training(real[::step], folder, config)
        patterns = split_patterns({**{kind: texts[::step] for kind, texts in kinds.items()}, "code": code}, config)
        encoded = {}
        for kind, texts in {**kinds, "made here": made}.items():
            for length, some in (("long", to_long(texts)), ("short", to_short(texts))):
                rows = encoding(tokenizer, some, config)
                encoded[f"{kind}, {length}"] = {"megabytes": size_of(some) / 1e6, "texts": len(some), "rows": rows}
        written = shards(tokenizer, made, folder, config)
        load = loading(tokenizer, folder / "tokenizer")

    least = 0.99 * trained["ours"]["bytes_per_token"]
    peers = {who: row["seconds"] for who, row in trained.items() if who != "ours" and row["bytes_per_token"] >= least}
    alike = [who for who in peers if "," not in who]
    goals = [
        goal(f"training time, ours ÷ the fastest peer's of {kind}", trained["ours"]["seconds"] / fastest, at_most=1.1)
        for kind, fastest in (
            ("the same split pattern", min(peers[who] for who in alike)),
            ("any split pattern", min(peers.values())),
        )
    ]
    for kind, entry in encoded.items():
        speeds = {who: row["megabytes_per_second"] for who, row in entry["rows"].items() if not row["different"]}
        ours = max(speed for who, speed in speeds.items() if who.startswith("ours"))
        fastest = max(speed for who, speed in speeds.items() if not who.startswith("ours"))
        goals.append(goal(f"encoding {kind}, ours ÷ the fastest peer", ours / fastest, at_least=0.9))
    goals.append(goal("files to shards ÷ the engine alone", written["to_shards"] / written["raw"], at_least=0.6))
    goals.append(goal("loading, ms", load, at_most=50))
    took = time.perf_counter() - begin

    note = f"{size_of(real[::step]) / 1e6:.1f} MB, {config.vocab_size} tokens. {in_a_sentence(facts)}"
    lines = [(who, f"{row['seconds']:.2f}", f"{row['bytes_per_token']:.3f}") for who, row in trained.items()]
    tables = [Table("Training", note, ("", "seconds", "bytes a token"), lines)]
    lines = [(who, *(f"{value:.3f}" for value in row.values())) for who, row in patterns.items()]
    note = f"Bytes a token of held-out text; {config.vocab_size} tokens, learned from the rest of all columns."
    tables.append(Table("Split patterns", note, ("", *kinds, "code"), lines))
    lines = [
        (who, *(f"{entry['rows'][who]['megabytes_per_second']:.1f}" for entry in encoded.values()))
        for who in next(iter(encoded.values()))["rows"]
    ]
    lines.append(("MB of text", *(f"{entry['megabytes']:.1f}" for entry in encoded.values())))
    lines.append(("texts", *(f"{entry['texts']:,}" for entry in encoded.values())))
    others = [f"{who} ({kind})" for kind, e in encoded.items() for who, row in e["rows"].items() if row["different"]]
    note = f"MB/s; long: {LONG:,} characters or more, short: lines of at most {SHORT}. Other ids than tokenizers': "
    tables.append(Table("Encoding", note + (", ".join(others) or "none") + ".", ("", *encoded), lines))
    lines = [(each["goal"], f"{each['measured']:.2f}", "yes" if each["met"] else "no") for each in goals]
    note = f"Files to shards: {written['to_shards']:.1f} MB/s. All of this took {took:.0f} s."
    tables.append(Table("Goals", note, ("", "measured", "met"), lines))
    print("\n".join(table.plain() for table in tables))
    if config.write:
        write_section(Path(config.write), "tokenizer", "\n\n".join(table.markdown() for table in tables))
    figures = {"goals": goals, "training": trained, "patterns": patterns, "encoding": encoded, "shards": written}
    print(json.dumps({**figures, "loading": load, "seconds": took, **facts}))


if __name__ == "__main__":
    run_main(main)
