"""Equal and similar documents, found by files on the disk: memory holds a slice of them at a time.

Similar are documents whose sets of runs of five words have a Jaccard index above a threshold. It is estimated from
MinHash signatures (Broder 1997, "On the resemblance and containment of documents"), made by the library `rensa`; pairs
that are worth comparing share a whole band of the signature (Leskovec et al., "Mining of Massive Datasets", section
3.4). Of each group the first document stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from text.cleaning.measure import Measured, mix

N_HASHES = 128
BANDS, ROWS = 21, 6  # two documents of Jaccard index 0.8 share a band with a probability of 99.8 %
SHINGLE = 5
LEAST_WORDS = 20  # of a shorter document a single word is too large a part; only its double goes
SEED = 20_001
SLICE = 1 << 22  # entries that are looked at at once

_NO_SIGNATURE = 0xFFFFFFFF


def key_of(text: str) -> int:
    """64 bits that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def signatures(measured: Measured) -> np.ndarray:
    """(N, N_HASHES) uint32, a row for each document; a row of a too short one is all ones."""
    from rensa import RMinHash

    runs, documents = measured.ngrams(SHINGLE)
    rows = np.searchsorted(documents, np.arange(len(measured.kinds) + 1)).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(runs, rows, N_HASHES, SEED)
    result = np.array(matrix.to_rows(), np.uint32).reshape(-1, N_HASHES)
    result[measured.n_words < LEAST_WORDS] = _NO_SIGNATURE
    return result


def equal_keys(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(firsts, others): entry others[i] of (N,) uint64 `keys` equals entry firsts[i], the first one of that value.

    `keys` may be on the disk; it is read once for every `SLICE` entries that it has.
    """
    n_parts = 1 << max(0, (len(keys) - 1) // SLICE).bit_length()
    for part in range(n_parts):
        found = []
        for start in range(0, len(keys), SLICE):
            block = np.asarray(keys[start : start + SLICE])
            inside = mix(block) >> np.uint64(40) & np.uint64(n_parts - 1) == np.uint64(part)
            found.append(np.flatnonzero(inside) + start)
        indices = np.concatenate(found) if found else np.empty(0, np.int64)
        values = np.asarray(keys[indices])
        order = np.argsort(values, kind="stable")  # stable: the first of equal ones has the lowest index
        values, indices = values[order], indices[order]
        is_first = np.concatenate([[True], values[1:] != values[:-1]]) if len(values) else np.empty(0, bool)
        firsts = indices[np.maximum.accumulate(np.where(is_first, np.arange(len(values)), 0))]
        yield firsts[~is_first], indices[~is_first]


class Groups:
    """Which documents belong together: a forest of numbers, on the disk (Tarjan 1975, "Efficiency of a good but not
    linear set union algorithm"); the root of a tree is its lowest number."""

    def __init__(self, path: Path, size: int) -> None:
        self.parent = np.lib.format.open_memmap(path, "w+", np.int64, (size,))
        for start in range(0, size, SLICE):
            self.parent[start : start + SLICE] = np.arange(start, min(start + SLICE, size))

    def root(self, index: int) -> int:
        while (above := int(self.parent[index])) != index:
            self.parent[index] = self.parent[above]
            index = above
        return index

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self.parent[high] = low


def find_duplicates(
    keys: np.ndarray, sketches: np.ndarray | None, threshold: float, workplace: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Which document each one doubles.

    Args:
        keys: (N,) uint64 of whole texts.
        sketches: (N, N_HASHES) uint32 from `signatures`; None to find equal texts only.
        threshold: Jaccard index from which on two texts are similar.
        workplace: a folder for files.

    Returns:
        (N,) int64, the first document of the group, for the first its own number; (N,) bool, whether the text is equal
        to one before it. Both are on the disk.
    """
    groups = Groups(workplace / "groups.npy", len(keys))
    equal = np.lib.format.open_memmap(workplace / "equal.npy", "w+", bool, (len(keys),))
    for firsts, others in equal_keys(keys):
        equal[others] = True
        for first, other in zip(firsts.tolist(), others.tolist(), strict=True):
            groups.join(first, other)
    if sketches is not None:
        band_keys = np.lib.format.open_memmap(workplace / "band.npy", "w+", np.uint64, (len(keys),))
        for band in range(BANDS):
            _write_band(sketches, equal, band, band_keys)
            for firsts, others in equal_keys(band_keys):
                for start in range(0, len(firsts), SLICE // N_HASHES):
                    one, other = firsts[start : start + SLICE // N_HASHES], others[start : start + SLICE // N_HASHES]
                    similar = (sketches[one] == sketches[other]).mean(1) >= threshold
                    for pair in zip(one[similar].tolist(), other[similar].tolist(), strict=True):
                        groups.join(*pair)
    for index in range(len(keys)):
        if groups.parent[index] != index:
            groups.parent[index] = groups.root(index)
    return groups.parent, equal


def _write_band(sketches: np.ndarray, equal: np.ndarray, band: int, result: np.ndarray) -> None:
    """One key for each document's band; documents without a signature, or known to be doubles, get one of their own."""
    step = SLICE // N_HASHES
    for start in range(0, len(result), step):
        block = np.asarray(sketches[start : start + step])
        rows = block[:, band * ROWS : (band + 1) * ROWS].astype(np.uint64)
        key = np.full(len(rows), np.uint64(band + 1))
        for column in rows.T:
            key = mix(key + column)
        alone = (block == _NO_SIGNATURE).all(1) | equal[start : start + step]
        numbers = np.arange(start, start + len(rows), dtype=np.uint64)
        result[start : start + step] = np.where(alone, mix(mix(numbers) + np.uint64(0xA5A5A5A5)), key)
