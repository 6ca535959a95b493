"""Learning the merges of byte-pair encoding, from any amount of text in bounded memory.

The memory that it takes grows with the number of distinct pieces (some 40 bytes for each byte of Chinese verse, whose
clauses hardly come twice), so of much text a sample is learned from. The time grows with the square of a piece's
length, so long ones (base64, minified code) are cut.

`rustbpe` learns; where it is missing, `tokenizers` learns the same more slowly. Where two pairs are equally common, the
two may choose differently.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import regex
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from text.fast_encoding import fast_encoder, ids_of
from text.tokenizer_files import PRETOKENIZER_PATTERN, byte_pre_tokenizer

LONGEST_PIECE = 128  # characters
SLICE = 1 << 20  # characters of a text that are looked at at once
COUNTED_AT_ONCE = 100_000  # characters

Merges = list[tuple[bytes, bytes]]

# From where a run begins, so that each is looked at once
_kinds = (r"\p{L}", r"[^\s\p{L}\p{N}]", r"\s")
_long = regex.compile("|".join(f"(?<!{kind}){kind}{{{LONGEST_PIECE + 1},}}+" for kind in _kinds))


class TextSample:
    """Texts to learn from; if they are more than `max_bytes`, every second, fourth, … of all that came.

    Attributes:
        texts: the sample, long pieces cut.
        size: its UTF-8 bytes.
        n_texts, n_bytes: how much came.
        step: every step-th text is in the sample.
    """

    def __init__(self, max_bytes: int | None) -> None:
        self.max_bytes, self.step = max_bytes, 1
        self.texts: list[str] = []
        self.size = self.n_texts = self.n_bytes = 0

    def add(self, text: str) -> int:
        """Take a text, which has no lone surrogates; its UTF-8 bytes are returned."""
        n_bytes = 0
        for start in range(0, len(text), SLICE):
            part = text[start : start + SLICE]
            size = len(part.encode())
            if self.n_texts % self.step == 0:
                self.texts.append(part)
                self.size += size
                while self.max_bytes and self.size > self.max_bytes and len(self.texts) > 1:
                    self.texts, self.step = self.texts[::2], 2 * self.step
                    self.size = sum(len(kept.encode()) for kept in self.texts)
            self.n_texts += 1
            n_bytes += size
        self.n_bytes += n_bytes
        return n_bytes

    def cut(self) -> Iterator[str]:
        """The texts, ended and begun anew wherever a piece would be longer than LONGEST_PIECE."""
        for text in self.texts:
            start = 0
            for match in _long.finditer(text):
                for end in range(match.start() + LONGEST_PIECE, match.end(), LONGEST_PIECE):
                    yield text[start:end]
                    start = end
            yield text[start:]


def learn_merges(sample: TextSample, n_merges: int, min_frequency: int) -> Merges:
    """The merges of the commonest neighbours, at most `n_merges` of them.

    Args:
        min_frequency: a merge must be made this often, or it and all later ones are left out.
    """
    try:
        import rustbpe
    except ImportError:
        merges = _learn_with_tokenizers(sample.cut(), n_merges)
    else:
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(sample.cut(), n_merges + 256, pattern=PRETOKENIZER_PATTERN)
        merges = merges_of_tokens([bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=_rank)][256:])
    return often_made(merges, sample.cut(), min_frequency) if min_frequency > 1 and merges else merges


def _rank(entry: tuple[bytes, int]) -> int:
    return entry[1]


def merges_of_tokens(tokens: Sequence[bytes]) -> Merges:
    """Which two tokens each one was made of: those that the merges before it leave of its bytes."""
    rank = {bytes([byte]): -1 for byte in range(256)}
    merges = []
    for number, token in enumerate(tokens):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            ranks = [rank.get(left + right, number) for left, right in zip(parts, parts[1:], strict=False)]
            place = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[place] == number:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2 and token not in rank:  # the same token can be made in two ways; the first one counts
            merges.append((parts[0], parts[1]))
            rank[token] = number
    return merges


def times_made(merges: Merges, counts: dict[bytes, int]) -> list[int]:
    """How often each merge was made: its token is still there, or inside a token that a later merge made of it."""
    total = dict(counts)
    for left, right in reversed(merges):
        made = total.get(left + right, 0)
        total[left] = total.get(left, 0) + made
        total[right] = total.get(right, 0) + made
    return [total.get(left + right, 0) for left, right in merges]


def often_made(merges: Merges, texts: Iterator[str], min_frequency: int) -> Merges:
    """The merges up to the first one that the texts make less than `min_frequency` times.

    Commoner merges come first: where the last one is seen often enough, the rest of the texts need not be looked at.
    """
    names, engine = engine_of(merges)
    encoder = fast_encoder(engine)
    totals = np.zeros(len(names), np.int64)
    last = names.index(b"".join(merges[-1]))
    for batch in batches(texts, COUNTED_AT_ONCE):
        ids = encoder.encode_arrays(batch)[0] if encoder else np.concatenate([[], *ids_of(engine, batch)]).astype(int)
        totals += np.bincount(ids, minlength=len(names))
        if totals[last] >= min_frequency:
            return merges
    made = times_made(merges, dict(zip(names, totals.tolist(), strict=True)))
    return merges[: next((n for n, count in enumerate(made) if count < min_frequency), len(merges))]


def batches(texts: Iterator[str], characters: int = 4_000_000) -> Iterator[list[str]]:
    """Texts in lists of about as many characters: many short ones, or a single long one."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def engine_of(merges: Merges) -> tuple[list[bytes], Tokenizer]:
    """The tokens by id, and what makes these merges."""
    names = [bytes([byte]) for byte in byte_of_character().values()]
    names = list(dict.fromkeys([*names, *(left + right for left, right in merges)]))
    vocab = {written(token): index for index, token in enumerate(names)}
    engine = Tokenizer(models.BPE(vocab, [(written(left), written(right)) for left, right in merges]))
    engine.pre_tokenizer, engine.decoder = byte_pre_tokenizer(), decoders.ByteLevel()
    return names, engine


def _learn_with_tokenizers(texts: Iterator[str], n_merges: int) -> Merges:
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = byte_pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=n_merges + 256,
        min_frequency=0,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # or bytes unseen in training would vanish
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    pairs, byte_of = json.loads(engine.to_str())["model"]["merges"], byte_of_character()
    return [tuple(bytes(byte_of[character] for character in token) for token in pair) for pair in pairs]


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
