"""What becomes of documents, one by one: the options of cleaning, `Cleaner`, which follows them, and its account."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from command_line import UserError, option
from text.cleaning import duplicates, rules
from text.cleaning.contamination import TestSets
from text.cleaning.measure import measure
from text.cleaning.personal_data import KINDS, mask_personal_data
from text.cleaning.repair import PATTERN_FILE, Removed, Repairer, read_patterns
from text.text_files import ReadingOptions

VERSION = 1  # of what a document becomes: parts that are made otherwise are not taken for ours
MEASURED_CHARS = 40_000  # at once: what the arrays over them take stays in the processor's caches
OUTPUT_ENDINGS = (".jsonl", ".jsonl.gz")
EXAMPLES = 5  # kept for each reason
EXAMPLE_CHARS = 300


@dataclass
class CleaningConfig(rules.Thresholds, ReadingOptions):
    """Options of `python -m text.cleaning`."""

    input: list[str] = option(list, "text files, folders of them, or names without ending")
    output: str = option("clean.jsonl.gz", "where the clean text goes: a .jsonl or .jsonl.gz file")
    report: str = option("", "an .html file that says what went and why; the same as .json beside it")
    rejected: str = option("", "a .jsonl or .jsonl.gz file that keeps what goes, with the reason")
    patterns: str = option(str(PATTERN_FILE), "the list of lines that are no text; empty: none")
    normalization: str = option("nfc", "the form of composed characters", choices=("nfc", "nfkc", "none"))
    han: str = option(
        "as_is", "convert Chinese characters (needs OpenCC)", choices=("as_is", "simplified", "traditional")
    )
    lower_case: bool = option(False, "turn everything into lower case")
    strip_punctuation: bool = option(False, "take out punctuation")
    languages: list[str] = option(list, "keep only these, like zh en (needs py3langid); none: all")
    near_duplicates: float = option(
        0.8, "Jaccard index from which two documents are the same; 0: only equal ones are", at_least=0, at_most=1
    )
    line_copies: int = option(
        5,
        "a line that stands in more documents than this stays in the first alone; 0: lines are not compared",
        at_least=0,
    )
    test_sets: list[str] = option(list, "files whose questions must not be in the text")
    mask: list[str] = option(list, f"personal data to replace by its name: {', '.join(KINDS)}, or all")
    num_workers: int | None = option(None, "processes; default: one for each core", at_least=1)
    work_dir: str = option("", "folder for the parts, which goes at the end; default: beside the output")

    def validate(self) -> list[str]:
        complaints = [] if self.input else ["--input names nothing; give files or folders of text"]
        complaints += self.reading_complaints()
        for name in ("output", "rejected"):
            path = getattr(self, name)
            if path and not path.endswith(OUTPUT_ENDINGS):
                complaints.append(f"--{name} {path} must end in {' or '.join(OUTPUT_ENDINGS)}")
        if self.report and not self.report.endswith(".html"):
            complaints.append(f"--report {self.report} must end in .html")
        if unknown := sorted(set(self.mask) - {*KINDS, "all"}):
            complaints.append(f"--mask does not know {', '.join(unknown)}; it takes {', '.join(KINDS)} or all")
        return complaints

    def fingerprint(self, files: Sequence[Path]) -> str:
        """Of all that decides about a part."""
        beside = ("input", "output", "report", "rejected", "num_workers", "work_dir", "near_duplicates", "line_copies")
        decisive = {name: value for name, value in asdict(self).items() if name not in beside}
        sources = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        tests = [Path(path).read_bytes().hex() for path in map(str, self.test_sets) if Path(path).is_file()]
        patterns = read_patterns(self.patterns) if self.patterns else []
        content = json.dumps([VERSION, decisive, sources, tests, patterns, bool(self.near_duplicates)])
        return hashlib.sha256(content.encode()).hexdigest()


class Cleaner:
    """Cleans documents; holds what takes time to make."""

    def __init__(self, config: CleaningConfig) -> None:
        self.config = config
        self.repair = Repairer(
            config.patterns, config.normalization, config.han, config.lower_case, config.strip_punctuation
        )
        self.test_sets = TestSets(config.test_sets)
        self.mask = set(KINDS) if "all" in config.mask else set(config.mask)
        self.identify = _language_identifier() if config.languages else None

    def clean(self, documents: Iterable[str]) -> Cleaned:
        """All rules that look at one document."""
        result = Cleaned()
        batch: list[str] = []
        size = 0
        read = result.counts["read"]
        for document in documents:
            read[0] += 1
            read[1] += len(document)
            if len(document) > self.config.max_chars:
                result.reject("too many characters", document)
                continue
            text, removed = self.repair(document)
            if self.config.c4_lines and text:
                text, lines = rules.lines_like_c4(text)
                removed += lines
            if not text:
                result.reject(removed[0][0] if removed else "nothing left", document)
                continue
            result.removed += removed
            result.n_mended += text != document
            batch.append(text)
            size += len(text)
            if size >= MEASURED_CHARS:
                self._judge(batch, result)
                batch, size = [], 0
        if batch:
            self._judge(batch, result)
        return result

    def _judge(self, texts: list[str], result: Cleaned) -> None:
        measured = measure(texts)
        reasons, numbers = rules.judge(texts, measured, self.config)
        for name, values in numbers.items():
            result.add_histogram(name, values)
        if self.test_sets:
            for index in np.flatnonzero(self.test_sets.found_in(measured)):
                reasons[index] = reasons[index] or "contaminated by a test set"
        if self.identify:
            for index, text in enumerate(texts):
                if reasons[index] is None and self.identify(text) not in self.config.languages:
                    reasons[index] = "language"
        kept = [index for index, reason in enumerate(reasons) if reason is None]
        for text, reason in zip(texts, reasons, strict=True):
            if reason:
                result.reject(reason, text)
        if self.config.near_duplicates and kept:
            result.sketches.append(duplicates.signatures(measured.select(np.array(kept))))
        for index in kept:
            text = texts[index]
            if self.mask:
                text, counts = mask_personal_data(text, self.mask)
                for kind, count in counts.items():
                    result.masked[kind] = result.masked.get(kind, 0) + count
            result.keep(text)
            if self.config.line_copies and "\n" in text:
                result.line_keys.append(
                    measured.line_hashes[measured.first_line[index] : measured.first_line[index + 1]]
                )


class Cleaned:
    """What became of some documents."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.keys: list[int] = []
        self.line_keys: list[np.ndarray] = []  # of the lines of documents that have several, one document after another
        self.sketches: list[np.ndarray] = []
        self.rejected: list[tuple[str, str]] = []
        self.removed: Removed = []
        self.masked: dict[str, int] = {}
        self.counts: dict[str, list[int]] = {"read": [0, 0], "kept": [0, 0]}  # documents and characters
        self.histograms: dict[str, np.ndarray] = {}
        self.n_mended = 0

    def reject(self, reason: str, text: str) -> None:
        self.rejected.append((reason, text))

    def keep(self, text: str) -> None:
        self.counts["kept"][0] += 1
        self.counts["kept"][1] += len(text)
        self.texts.append(text)
        self.keys.append(duplicates.key_of(text))

    def add_histogram(self, name: str, values: np.ndarray) -> None:
        edges = rules.edges_of(name)
        values = np.clip(values[~np.isnan(values)], edges[0], edges[-1])
        counts = np.histogram(values, edges)[0]
        self.histograms[name] = self.histograms.get(name, 0) + counts

    def statistics(self) -> dict[str, Any]:
        """Counts and examples, as JSON takes them."""

        def summary(pieces: Iterable[tuple[str, str]]) -> dict[str, dict]:
            reasons: dict[str, dict] = {}
            for reason, piece in pieces:
                entry = reasons.setdefault(reason, {"count": 0, "characters": 0, "examples": []})
                entry["count"] += 1
                entry["characters"] += len(piece)
                if len(entry["examples"]) < EXAMPLES and (shown := piece.strip()[:EXAMPLE_CHARS]):
                    entry["examples"].append(shown)
            return reasons

        return {
            **{name: {"documents": n, "characters": chars} for name, (n, chars) in self.counts.items()},
            "mended": self.n_mended,
            "rejected": summary(self.rejected),
            "removed": summary(self.removed),
            "masked": self.masked,
            "histograms": {name: counts.tolist() for name, counts in self.histograms.items()},
        }


def _language_identifier() -> Callable[[str], str]:
    try:
        import py3langid
    except ImportError:
        raise UserError("--languages needs py3langid; `pip install py3langid` and try again") from None
    return lambda text: py3langid.classify(text[:2000])[0]
