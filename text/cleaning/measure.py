"""Numbers about many documents at once, by arrays over their characters: no loop in Python runs over a text.

A word is a run of letters and digits, or a single Chinese character or kana. Upper and lower case are the same, and
what stands between words does not count.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

SPACE, LETTER, DIGIT, HAN, PUNCTUATION, SYMBOL, OTHER = range(7)
N_KINDS = 7
LEAST_LINE = 15
HAN_RANGES = ((0x2E80, 0x303F), (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF))
# A polynomial hash modulo 2^64: `BASE` is odd, so it can be divided by as well, and a word hashes alike wherever it is
BASE = 0x9E3779B97F4A7C15
WORD_BASE = 0xD6E8FEB86659FD93


@dataclass(frozen=True)
class Measured:
    """N documents of M words in all.

    Attributes:
        kinds: (N, N_KINDS) int64, how many characters of each kind a document has.
        word_hashes: (M,) uint64.
        first_word: (N + 1,) int64: the words of document i are first_word[i] … first_word[i + 1] − 1.
        words_of_digits: (N,) int64, how many words of a document have no letter.
        line_hashes: (L,) uint64, of the lines of all documents; 0 for a line of less than `LEAST_LINE` characters.
        first_line: (N + 1,) int64, as `first_word`.
    """

    kinds: np.ndarray
    word_hashes: np.ndarray
    first_word: np.ndarray
    words_of_digits: np.ndarray
    line_hashes: np.ndarray
    first_line: np.ndarray

    @property
    def n_words(self) -> np.ndarray:
        return np.diff(self.first_word)

    @property
    def document_of_word(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.kinds)), self.n_words)

    def select(self, documents: np.ndarray) -> Measured:
        """The same of some of the documents, in their order, without their lines; `documents` are ascending numbers."""
        if len(documents) == len(self.kinds):
            return self
        counts = self.n_words[documents]
        first = np.concatenate([[0], np.cumsum(counts)])
        wanted = np.zeros(len(self.kinds), bool)
        wanted[documents] = True
        hashes = self.word_hashes[wanted[self.document_of_word]]
        digits = self.words_of_digits[documents]
        return replace(self, kinds=self.kinds[documents], word_hashes=hashes, first_word=first, words_of_digits=digits)

    def ngrams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of all runs of n words inside a document, and which document each is in; both (K,)."""
        hashes, words = self.word_hashes, len(self.word_hashes)
        if words < n:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        sums = np.concatenate([[np.uint64(0)], np.cumsum(hashes * powers(WORD_BASE, words))])
        runs = mix((sums[n:] - sums[:-n]) * powers(WORD_BASE, words, inverse=True)[: words - n + 1])
        documents = self.document_of_word
        inside = documents[: words - n + 1] == documents[n - 1 :]
        return runs[inside], documents[: words - n + 1][inside]

    def repeated(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(N,) how many runs of n words a document has had before; (N,) how often it has its commonest one."""
        runs, documents = self.ngrams(n)
        again, most = np.zeros(len(self.kinds), np.int64), np.zeros(len(self.kinds), np.int64)
        if len(runs) == 0:
            return again, most
        keys = np.sort(documents.astype(np.uint64) << np.uint64(40) | runs >> np.uint64(24))
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        counts, owners = np.diff(np.append(first, len(keys))), (keys[first] >> np.uint64(40)).astype(np.int64)
        again += np.bincount(owners, counts - 1, len(again)).astype(np.int64)
        borders = np.flatnonzero(np.concatenate([[True], owners[1:] != owners[:-1]]))
        most[owners[borders]] = np.maximum.reduceat(counts, borders)
        return again, most


def measure(texts: Sequence[str]) -> Measured:
    """Count and hash; `texts` hold no lone surrogate."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts)) + 1  # a line end between documents
    borders = np.concatenate([[0], np.cumsum(lengths)])
    characters = np.frombuffer(("\n".join(texts) + "\n").encode("utf-32-le"), "<u4")
    kind_of, value_of = _tables()
    index = np.minimum(characters, len(kind_of) - 1)
    kinds, values = kind_of[index], value_of[index]
    if (beyond := np.flatnonzero(characters >= len(kind_of) - 1)).size:  # of the other planes, ideographs and emoji
        plane = characters[beyond].astype(np.uint64)
        kinds[beyond] = np.where((plane >= 0x20000) & (plane < 0x40000), HAN, SYMBOL)
        values[beyond] = mix(plane)
    documents = np.repeat(np.arange(0, len(texts) * N_KINDS, N_KINDS), lengths)
    counted = np.bincount(documents + kinds, minlength=len(texts) * N_KINDS).reshape(len(texts), N_KINDS)
    counted[:, SPACE] -= 1

    is_han, is_letter = kinds == HAN, kinds == LETTER
    in_word = is_letter | (kinds == DIGIT)
    edge = in_word[1:] != in_word[:-1]
    starts, ends = is_han.copy(), is_han.copy()
    starts[0] |= in_word[0]
    starts[1:] |= edge & in_word[1:]
    ends[:-1] |= edge & in_word[:-1]  # the last character is a line end
    starts, ends = np.flatnonzero(starts), np.flatnonzero(ends) + 1
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * powers(BASE, len(values)), out=sums[1:])
    inverse = powers(BASE, len(values), inverse=True)
    first_word = np.searchsorted(starts, borders)

    letters = np.concatenate([[0], np.cumsum(is_letter)])
    no_letter = (kinds[starts] == DIGIT) & (
        letters[starts] == letters[ends]
    )  # a digit may begin a word with letters: 3rd
    owners = np.searchsorted(borders, starts[no_letter], "right") - 1
    words_of_digits = np.bincount(owners, minlength=len(texts))

    line_ends = np.flatnonzero(characters == ord("\n"))
    line_starts = np.concatenate([[0], line_ends[:-1] + 1])
    line_hashes = mix((sums[line_ends] - sums[line_starts]) * inverse[line_starts])
    line_hashes[line_ends - line_starts < LEAST_LINE] = 0
    return Measured(
        counted,
        mix((sums[ends] - sums[starts]) * inverse[starts]),
        first_word,
        words_of_digits,
        line_hashes,
        np.searchsorted(line_starts, borders),
    )


def mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit over all others (Steele et al. 2014, "SplitMix"); (K,) uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_powers: dict[tuple[int, bool], np.ndarray] = {}


def powers(base: int, count: int, inverse: bool = False) -> np.ndarray:
    """base^0, base^1, …, or their inverses, modulo 2^64; kept, as every batch wants about as many."""
    known = _powers.get((base, inverse), np.empty(0, np.uint64))
    if len(known) < count:
        factor = np.uint64(pow(base, -1, 1 << 64) if inverse else base)
        known = np.concatenate([[np.uint64(1)], np.full(count + count // 4, factor, np.uint64)])
        _powers[base, inverse] = known = np.cumprod(known)
    return known[:count]


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """The kind of each character of the first plane and a number for it, which its upper case shares; one entry more
    for all others."""
    kinds, lower = np.full(0x10001, OTHER, np.int64), np.arange(0x10001, dtype=np.uint64)
    for code in range(0x10000):
        character = chr(code)
        category = unicodedata.category(character)
        if character.isspace():
            kinds[code] = SPACE
        elif category[0] in "LM" or category == "Pc":
            in_han = any(low <= code <= high for low, high in HAN_RANGES) and category[0] == "L"
            kinds[code] = HAN if in_han else LETTER
            small = character.lower()
            lower[code] = ord(small) if len(small) == 1 else code
        elif category[0] in "NPS":
            kinds[code] = {"N": DIGIT, "P": PUNCTUATION, "S": SYMBOL}[category[0]]
    return kinds, mix(lower)
