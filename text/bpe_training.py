"""Learning the merges of byte-pair encoding, from any amount of text in bounded memory.

A text is cut into pieces, and no merge reaches over the edge of one. For training the pieces are those of the
tokenizer's own pattern, cut once more by GPT-2's, which keeps punctuation apart from the letters after it: otherwise
half of the Chinese tokens would begin with a comma and end inside of a character. Pieces that are longer than
`LONGEST_PIECE` (base64, minified code) are cut as well; the work grows with the square of their length.

`gigatoken` learns; where it is missing, `tokenizers` learns the same merges more slowly.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator

import numpy as np
import regex
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from text.tokenizer_files import PRETOKENIZER_PATTERN

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LONGEST_PIECE = 128  # characters
SLICE = 1 << 20  # characters of a text that are looked at at once
SEPARATOR = b"\xff"  # a byte that no text has in UTF-8

Merges = list[tuple[bytes, bytes]]

_piece = regex.compile(PRETOKENIZER_PATTERN)


class PieceSample:
    """Texts in pieces; if they are more than `max_bytes`, every second, fourth, … text of all that came.

    Attributes:
        n_texts, n_bytes: how much came.
        step: every step-th text is in the sample.
    """

    def __init__(self, max_bytes: int | None) -> None:
        self.max_bytes, self.step = max_bytes, 1
        self.n_texts = self.n_bytes = 0
        self._kept: list[bytes] = []
        self._size = 0

    def add(self, text: str) -> None:
        """Take a text, which has no lone surrogates."""
        for start in range(0, len(text), SLICE):
            part = text[start : start + SLICE]
            if self.n_texts % self.step == 0:
                pieces = _piece.findall(part)
                if len(max(pieces, key=len)) > LONGEST_PIECE:
                    pieces = [short for piece in pieces for short in _shortened(piece)]
                self._kept.append("\udcff".join(pieces).encode(errors="surrogateescape"))  # that is SEPARATOR
                self._size += len(self._kept[-1]) - len(pieces) + 1
                while self.max_bytes and self._size > self.max_bytes and len(self._kept) > 1:
                    self._kept, self.step = self._kept[::2], 2 * self.step
                    self._size = sum(len(kept) - kept.count(SEPARATOR) for kept in self._kept)
            self.n_texts += 1
        self.n_bytes += len(text.encode())

    @property
    def size(self) -> int:
        """Bytes of text in the sample."""
        return self._size

    def joined(self) -> bytes:
        """All pieces, with SEPARATOR between them; the sample is empty afterwards."""
        kept, self._kept = self._kept, []
        return SEPARATOR.join(kept)


def _shortened(piece: str) -> Iterator[str]:
    return (piece[start : start + LONGEST_PIECE] for start in range(0, len(piece), LONGEST_PIECE))


def learn_merges(pieces: bytes, n_merges: int, min_frequency: int) -> Merges:
    """The merges of the commonest neighbours, at most `n_merges` of them.

    Of equally common pairs the one comes first whose tokens are older, as in `tokenizers`.

    Args:
        pieces: with SEPARATOR between them.
        min_frequency: a merge must be made this often, or it and all later ones are left out.
    """
    try:
        import gigatoken
    except ImportError:
        merges, counts = _learn_with_tokenizers(pieces, n_merges)
    else:
        with _quiet():  # it writes lines of its own to standard output
            # The order of ties is the order of ids: those of the bytes are GPT-2's alphabet's
            _, merges = gigatoken.train_bpe(pieces, n_merges + 256, [], separator=SEPARATOR)
        counts = None
    if min_frequency > 1:
        counts = counts_of_tokens(pieces, merges) if counts is None else counts
        made = times_made(merges, counts)
        merges = merges[: next((n for n, count in enumerate(made) if count < min_frequency), len(merges))]
    return merges


def times_made(merges: Merges, counts: dict[bytes, int]) -> list[int]:
    """How often each merge was made: its token is still there, or inside a token that a later merge made of it."""
    total = dict(counts)
    for left, right in reversed(merges):
        made = total.get(left + right, 0)
        total[left] = total.get(left, 0) + made
        total[right] = total.get(right, 0) + made
    return [total[left + right] if left + right in total else 0 for left, right in merges]


def counts_of_tokens(pieces: bytes, merges: Merges) -> dict[bytes, int]:
    """How often each token stands in the pieces once all merges are made."""
    import gigatoken

    names, engine = training_engine(merges)
    fast = gigatoken.Tokenizer.from_json(engine.to_str())
    totals = np.zeros(len(names), np.int64)
    start = 0
    while start < len(pieces):
        end = pieces.find(SEPARATOR, start + (1 << 24))
        end = len(pieces) if end < 0 else end
        encoded = fast.encode_batch(gigatoken.BytesSource(pieces[start:end], separator=SEPARATOR))
        totals += np.bincount(np.asarray(encoded.layout.content.data), minlength=len(names))
        start = end + 1
    return dict(zip(names, totals.tolist(), strict=True))


def training_engine(merges: Merges) -> tuple[list[bytes], Tokenizer]:
    """The tokens by id and a tokenizer that makes these merges, inside GPT-2's pieces of what it is given."""
    names = [bytes([byte]) for byte in byte_of_character().values()]
    names = list(dict.fromkeys([*names, *(left + right for left, right in merges)]))
    vocab = {written(token): index for index, token in enumerate(names)}
    engine = Tokenizer(models.BPE(vocab, [(written(left), written(right)) for left, right in merges]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    engine.decoder = decoders.ByteLevel()
    return names, engine


def _learn_with_tokenizers(pieces: bytes, n_merges: int) -> tuple[Merges, dict[bytes, int]]:
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\ufdd0"), "removed"),
            pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=n_merges + 256,
        min_frequency=0,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # or bytes unseen in training would vanish
        show_progress=False,
    )
    engine.train_from_iterator(_texts(pieces), trainer)
    byte_of = byte_of_character()
    merges = [
        tuple(bytes(byte_of[character] for character in token) for token in pair)
        for pair in json.loads(engine.to_str())["model"]["merges"]
    ]
    names, encoder = training_engine(merges)
    encoder.pre_tokenizer = engine.pre_tokenizer
    totals = np.zeros(len(names), np.int64)
    for text in _texts(pieces):
        totals += np.bincount(encoder.encode(text).ids, minlength=len(names))
    return merges, dict(zip(names, totals.tolist(), strict=True))


def _texts(pieces: bytes) -> Iterator[str]:
    """The pieces as texts of some length, a character that is none between them."""
    parts = pieces.split(SEPARATOR)
    for start in range(0, len(parts), 10_000):
        yield b"\xef\xb7\x90".join(parts[start : start + 10_000]).decode()  # U+FDD0


def byte_of_character() -> dict[str, int]:
    """The characters that stand for bytes in tokens: printable ones for themselves, the others in order from U+0100."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [character for character in characters if ord(character) < 256]
    others = sorted(set(range(256)) - set(map(ord, printable)))
    return {**{c: ord(c) for c in printable}, **dict(zip(characters[len(printable) :], others, strict=True))}


_CHARACTER_OF = {byte: character for character, byte in byte_of_character().items()}


def written(token: bytes) -> str:
    """A token in the byte alphabet of GPT-2, as files have it."""
    return "".join(_CHARACTER_OF[byte] for byte in token)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that a library writes by itself reaches the terminal."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)


def sample_of(texts: Iterable[str], max_bytes: int | None) -> PieceSample:
    """All texts, or as many of them, evenly spread, as there is room for."""
    sample = PieceSample(max_bytes)
    for text in texts:
        sample.add(text)
    return sample

