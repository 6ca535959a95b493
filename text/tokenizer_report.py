"""How well a tokenizer fits a text: what it makes of each script, what it never uses, what more tokens would give."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import regex

from command_line import replacing
from text.bpe_training import batches, byte_of_character, engine_of
from text.fast_encoding import fast_encoder, ids_of
from text.text_files import ReadingOptions, UnreadRecords, iter_documents

SCRIPTS = {
    "Chinese": r"\p{Han}",
    "Latin": r"\p{Latin}",
    "digits": r"\p{N}",
    "other scripts": r"[^\P{L}\p{Han}\p{Latin}]",
}
N_LONGEST = 20
SAMPLE_SIZE, SAMPLE_CHARACTERS = 2000, 4096  # documents of a sample, and of each of them


class ATokenizer(Protocol):
    """What is asked of a tokenizer here."""

    def __len__(self) -> int: ...
    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def to_files(self) -> dict[str, str]: ...


class SampledDocuments:
    """Passes documents through and keeps a uniform sample of them (Vitter 1985, algorithm R) for `examine`."""

    def __init__(self, paths: Sequence[str], reading: ReadingOptions, unread: UnreadRecords) -> None:
        self.paths, self.reading, self.unread = paths, reading, unread
        self.sample: list[str] = []

    def __iter__(self) -> Iterator[str]:
        generator = random.Random(0)
        documents = (document for path in self.paths for document in iter_documents(path, self.reading, self.unread))
        for count, document in enumerate(documents, start=1):
            yield document
            if len(self.sample) < SAMPLE_SIZE:
                self.sample.append(document[:SAMPLE_CHARACTERS])
            elif (place := generator.randrange(count)) < SAMPLE_SIZE:
                self.sample[place] = document[:SAMPLE_CHARACTERS]


def examine(tokenizer: ATokenizer, texts: Sequence[str]) -> dict:
    """Figures about a tokenizer on some texts.

    Returns:
        bytes_per_token: of all texts, and of the stretches of each script alone that are in them.
        unused: the share of the tokens that never occur in these texts.
        longest: the longest tokens, as text.
        by_vocab_size: bytes a token, had the training ended at fewer tokens.
    """
    counts = np.zeros(len(tokenizer), np.int64)
    for batch in batches(iter(texts)):
        counts += np.bincount(tokenizer.encode_arrays(batch)[0], minlength=len(tokenizer))
    compression = {"all": _bytes_of(texts) / max(1, int(counts.sum()))}
    for script, pattern in SCRIPTS.items():
        runs = [run for text in texts for run in regex.findall(rf"{pattern}(?:[\s\p{{P}}]*{pattern})*", text)]
        if _bytes_of(runs) >= 1000:
            compression[script] = _bytes_of(runs) / len(tokenizer.encode_arrays(runs)[0])
    named = [token for index in range(len(tokenizer)) if (token := tokenizer.token_bytes(index))]
    longest = sorted(named, key=lambda token: (-len(token), token))[:N_LONGEST]
    return {
        "vocab_size": len(tokenizer),
        "bytes": _bytes_of(texts),
        "bytes_per_token": compression,
        "unused": float((counts == 0).mean()),
        "longest": [token.decode(errors="replace") for token in longest],
        "by_vocab_size": _by_vocab_size(tokenizer, texts),
    }


def _bytes_of(texts: Sequence[str]) -> int:
    return sum(len(text.encode(errors="surrogatepass")) for text in texts)


def _by_vocab_size(tokenizer: ATokenizer, texts: Sequence[str]) -> dict[int, float]:
    """{tokens: bytes a token} of the first merges alone, for powers of two."""
    lines = tokenizer.to_files()["merges.txt"].split("\n")[1:-1]
    byte_of = byte_of_character()
    merges = [
        tuple(bytes(byte_of[character] for character in token) for token in line.split(" ")) for line in lines
    ]
    sizes = [1 << power for power in range(9, 20) if 1 << power < len(merges) + 256] + [len(merges) + 256]
    result = {}
    for size in sizes:
        _, engine = engine_of(merges[: size - 256])
        encoder = fast_encoder(engine)
        ids = encoder.encode_batch(list(texts)) if encoder else ids_of(engine, texts)
        result[size] = _bytes_of(texts) / max(1, sum(map(len, ids)))
    return result


def write_report(figures: dict, folder: Path) -> None:
    """report.json, and report.png: bytes a token against the size of the vocabulary."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with replacing(folder / "report.json", "choose another --output_dir") as file:
        file.write(json.dumps(figures, ensure_ascii=False, indent=1).encode())
    plot, axes = pyplot.subplots(figsize=(6, 4))
    sizes = figures["by_vocab_size"]
    axes.plot(list(sizes), list(sizes.values()), marker="o")
    axes.set(xlabel="tokens", ylabel="bytes a token", title="What more tokens give", xscale="log")
    axes.set_xticks(list(sizes), [f"{size:,}" for size in sizes], rotation=45)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    plot.tight_layout()
    with replacing(folder / "report.png", "choose another --output_dir") as file:
        plot.savefig(file, format="png", dpi=110)
    pyplot.close(plot)
