"""Documents that contain a test set's questions: who trains on those measures memory.

A document is contaminated if it shares a run of 13 words with a test set (Brown et al. 2020, "Language Models are
Few-Shot Learners", appendix C), or holds the whole of a shorter text of at least 6 words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from command_line import UserError
from text.cleaning.measure import Measured, measure
from text.text_files import iter_documents, iter_records

RUN, LEAST = 13, 6


class TestSets:
    """The runs of words in some files: JSON and JSONL (all their texts), or `.txt` (a text a line)."""

    __test__ = False  # for pytest, which collects what is called so

    def __init__(self, paths: Sequence[str]) -> None:
        runs: dict[int, list[np.ndarray]] = {}
        self.n_texts = self.n_short = 0
        for path in paths:
            texts = list(_texts(path))
            measured = measure(texts) if texts else None
            for length in range(LEAST, RUN + 1):
                if measured is None:
                    break
                found, owners = measured.ngrams(length)
                long_enough = measured.n_words[owners] >= RUN if length == RUN else measured.n_words[owners] == length
                runs.setdefault(length, []).append(found[long_enough])
            self.n_texts += len(texts)
            self.n_short += int((measured.n_words < LEAST).sum()) if measured else 0
        self._runs = {length: np.unique(np.concatenate(parts)) for length, parts in runs.items()}
        self._runs = {length: values for length, values in self._runs.items() if len(values)}
        if paths and not self._runs:
            raise UserError(f"--test_sets {' '.join(paths)} hold no text of {LEAST} words; name files with questions")

    def __bool__(self) -> bool:
        return bool(self._runs)

    def found_in(self, measured: Measured) -> np.ndarray:
        """(N,) bool: the documents that contain something of the test sets."""
        contaminated = np.zeros(len(measured.kinds), bool)
        for length, known in self._runs.items():
            runs, documents = measured.ngrams(length)
            place = np.minimum(np.searchsorted(known, runs), len(known) - 1)
            contaminated[documents[known[place] == runs]] = True
        return contaminated


def _texts(path: str) -> Iterator[str]:
    if Path(path).name.endswith((".json", ".json.gz", ".jsonl", ".jsonl.gz")):
        for _, record in iter_records(path):
            yield from _strings(record)
    else:
        yield from iter_documents(path)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
