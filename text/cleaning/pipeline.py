"""Files → parts → output.

    clean     documents of one file, some MB at a time, with all cores → a part: texts, keys, signatures, counts
    compare   all parts → which document doubles which, which lines stand everywhere
    write     each part, without doubles, with all cores → compressed pieces, put one after another

A part is made once: a run that was interrupted goes on with the next. What comes out depends on the input and the
options alone, not on the number of processes.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from command_line import UserError, option, replacing, require_writable_folder
from progress import Progress
from text.cleaning import duplicates, rules
from text.cleaning.contamination import TestSets
from text.cleaning.measure import measure
from text.cleaning.personal_data import KINDS, mask_personal_data
from text.cleaning.repair import PATTERN_FILE, Removed, Repairer, read_patterns
from text.text_files import ReadingOptions, UnreadRecords, iter_documents, resolve_files

VERSION = 1  # of the parts: one that is made otherwise is not taken for one of these
PART_CHARS = 4_000_000
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


# --------------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class Part:
    """Some documents of one file, in the work folder under `name`."""

    folder: Path
    name: str

    def path(self, ending: str) -> Path:
        return self.folder / f"{self.name}{ending}"

    @property
    def is_there(self) -> bool:
        return self.path(".json").is_file()  # which is written last

    def statistics(self) -> dict[str, Any]:
        return json.loads(self.path(".json").read_text(encoding="utf-8"))

    def write(self, cleaned: Cleaned) -> None:
        with replacing(self.path(".texts")) as file:
            file.writelines(as_line({"text": text}) for text in cleaned.texts)
        with replacing(self.path(".out")) as file:
            for kind, pieces in (("document", cleaned.rejected), ("line", cleaned.removed)):
                file.writelines(as_line({"reason": why, "kind": kind, "text": piece}) for why, piece in pieces)
        sketches = (
            np.concatenate(cleaned.sketches) if cleaned.sketches else np.empty((0, duplicates.N_HASHES), np.uint32)
        )
        for name, values in (
            (".keys", np.array(cleaned.keys, np.uint64)),
            (".lines", np.concatenate([np.empty(0, np.uint64), *cleaned.line_keys])),
            (".sketches", sketches),
        ):
            with replacing(self.path(name)) as file:
                file.write(values.tobytes())
        with replacing(self.path(".json")) as file:
            file.write(json.dumps(cleaned.statistics(), ensure_ascii=False).encode())


def as_line(record: dict[str, str]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def documents_by_part(
    file: Path, file_number: int, config: ReadingOptions, left_out: UnreadRecords | None = None
) -> Iterator[tuple[str, list[str]]]:
    """(name, documents) of the parts of a file; a part is ended by its size, so it is the same in every run."""
    batch: list[str] = []
    size = number = 0
    for document in iter_documents(file, config, left_out):
        batch.append(document)
        size += len(document)
        if size >= PART_CHARS:
            yield f"part-{file_number:05d}-{number:05d}", batch
            batch, size, number = [], 0, number + 1
    if batch:
        yield f"part-{file_number:05d}-{number:05d}", batch


_cleaner: Cleaner | None = None


def _start_worker(config: CleaningConfig) -> None:
    global _cleaner
    _cleaner = Cleaner(config)


def _clean_part(part: Part, documents: list[str]) -> None:
    part.write(_cleaner.clean(documents))


def in_order(work: Callable, tasks: Iterable[tuple], workers: int, config: CleaningConfig) -> Iterator[Any]:
    """The results of work(*task), in the order of the tasks; no more tasks are in flight than keep everybody busy."""
    if workers == 1:
        _start_worker(config)
        yield from (work(*task) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (config,)) as pool:
        flying: deque = deque()
        try:
            for task in tasks:
                flying.append(pool.submit(work, *task))
                if len(flying) > 2 * workers:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker process was ended, as happens without memory; lower --num_workers") from None
        finally:
            for future in flying:
                future.cancel()


# -------------------------------------------------------------------------------------------------------------- compare


@dataclass(frozen=True)
class Comparison:
    """What all parts together show; arrays over all documents, on the disk, and the keys of lines that stand
    everywhere with the number of the first document's line."""

    group: np.ndarray
    equal: np.ndarray
    common_lines: np.ndarray  # (L,) uint64, sorted
    first_lines: np.ndarray  # (L,) int64: where each of them stays


def _joined(parts: Sequence[Part], ending: str, dtype: type, width: int = 1) -> np.ndarray:
    """The arrays of all parts as one file."""
    path = parts[0].folder / f"all{ending}"
    with path.open("wb") as file:
        for part in parts:
            with part.path(ending).open("rb") as piece:
                shutil.copyfileobj(piece, file)
    if path.stat().st_size == 0:
        return np.empty((0, width) if width > 1 else 0, dtype)
    array = np.memmap(path, dtype, "r")
    return array.reshape(-1, width) if width > 1 else array


def compare(parts: Sequence[Part], config: CleaningConfig) -> Comparison:
    """Find doubles among all documents of all parts, and lines that stand in many."""
    keys = _joined(parts, ".keys", np.uint64)
    sketches = _joined(parts, ".sketches", np.uint32, duplicates.N_HASHES) if config.near_duplicates else None
    if len(keys):
        group, equal = duplicates.find_duplicates(keys, sketches, config.near_duplicates, parts[0].folder)
    else:
        group, equal = np.empty(0, np.int64), np.empty(0, bool)
    common, first = [], []
    if config.line_copies:
        lines = _joined(parts, ".lines", np.uint64)
        for firsts, _ in duplicates.equal_keys(lines):
            indices, counts = np.unique(firsts, return_counts=True)
            often = indices[counts >= config.line_copies]
            often = often[lines[often] != 0] if len(often) else often
            common.append(lines[often])
            first.append(often)
    common_lines = np.concatenate(common) if common else np.empty(0, np.uint64)
    order = np.argsort(common_lines)
    first_lines = np.concatenate(first)[order] if first else np.empty(0, np.int64)
    return Comparison(group, equal, common_lines[order], first_lines)


# ---------------------------------------------------------------------------------------------------------------- write


def write_part(
    part: Part,
    start: int,
    line_start: int,
    group: np.ndarray,
    equal: np.ndarray,
    comparison: Comparison,
    config: CleaningConfig,
) -> dict[str, Any]:
    """Write the part's pieces of the output and of what was rejected; return its statistics.

    Args:
        start, line_start: the numbers of its first document and of its first line.
        group, equal: the part's own stretch of the comparison.
    """
    result = Cleaned()
    kept, out = [], []
    line_keys = np.fromfile(part.path(".lines"), np.uint64)
    place = np.minimum(np.searchsorted(comparison.common_lines, line_keys), max(0, len(comparison.common_lines) - 1))
    is_common = (
        comparison.common_lines[place] == line_keys if len(comparison.common_lines) else np.zeros(len(line_keys), bool)
    )
    if is_common.any():
        is_common &= comparison.first_lines[place] != np.arange(line_start, line_start + len(line_keys))
    line = 0
    with part.path(".texts").open("rb") as file:
        for index, raw in enumerate(file):
            # "\\n" is how JSON writes a line end; a document without one has no line to look at
            text = json.loads(raw)["text"]
            n_lines = text.count("\n") + 1 if b"\\n" in raw and "\n" in text else 0
            if group[index] != start + index:
                reason = "duplicate" if equal[index] else "near duplicate"
                result.reject(reason, text)
                out.append(as_line({"reason": reason, "kind": "document", "text": text}))
            else:
                common = is_common[line : line + n_lines] if config.line_copies else np.zeros(0, bool)
                if common.any():
                    lines = text.split("\n")
                    for furniture in (piece for piece, away in zip(lines, common, strict=True) if away):
                        result.removed.append(("line of many documents", furniture))
                        out.append(as_line({"reason": "line of many documents", "kind": "line", "text": furniture}))
                    text = "\n".join(piece for piece, away in zip(lines, common, strict=True) if not away).strip("\n")
                    raw = as_line({"text": text})
                if text.strip():
                    result.counts["kept"][0] += 1
                    result.counts["kept"][1] += len(text)
                    kept.append(raw)
                else:
                    result.reject("line of many documents", text)
            line += n_lines
    for path, ending, lines in ((config.output, ".kept", kept), (config.rejected, ".rejected", out)):
        if path:
            before = part.path(".out").read_bytes() if ending == ".rejected" else b""
            data = before + b"".join(lines)
            with replacing(part.path(ending)) as file:
                file.write(gzip.compress(data, 6, mtime=0) if path.endswith(".gz") and data else data)
    return result.statistics()


def concatenate(parts: Sequence[Part], ending: str, path: str) -> None:
    """Put the pieces one after another; several gzip streams are a gzip file."""
    with replacing(path, "free some space or choose another place") as file:
        for part in parts:
            with part.path(ending).open("rb") as piece:
                shutil.copyfileobj(piece, file)


# ------------------------------------------------------------------------------------------------------------- together


def open_work_folder(config: CleaningConfig, files: Sequence[Path]) -> Path:
    """The folder for the parts; what lies there of other options or other input is removed.

    Raises:
        UserError: it holds something that is not ours, or it or a place of the output cannot be written to.
    """
    folder = Path(config.work_dir or f"{config.output}.work")
    for name in ("output", "report", "rejected"):
        if path := getattr(config, name):
            require_writable_folder(Path(path).parent, f"--{name}")
    require_writable_folder(folder, "--work_dir")
    mark, fingerprint = folder / "fingerprint", config.fingerprint(files)
    if folder.exists():
        if not mark.is_file():
            raise UserError(f"{folder} is not a work folder of this program; remove it or choose another --work_dir")
        if mark.read_text() != fingerprint:
            print(f"options or input have changed: {folder} is made anew")
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(mark) as file:
        file.write(fingerprint.encode())
    return folder


def input_files(config: CleaningConfig) -> list[Path]:
    """All files, each once, in the order of the command line."""
    return list(dict.fromkeys(file for path in config.input for file in resolve_files(path)))


def numbers_of(parts: Sequence[Part]) -> list[tuple[int, int, int, int]]:
    """(first document, documents, first line, lines) of each part."""
    result, document, line = [], 0, 0
    for part in parts:
        n, m = part.path(".keys").stat().st_size // 8, part.path(".lines").stat().st_size // 8
        result.append((document, n, line, m))
        document, line = document + n, line + m
    return result


def write_tasks(parts: Sequence[Part], comparison: Comparison, config: CleaningConfig) -> Iterator[tuple]:
    """The arguments of `write_part` for each part."""
    for part, (first, count, line, _) in zip(parts, numbers_of(parts), strict=True):
        group, equal = (np.array(a[first : first + count]) for a in (comparison.group, comparison.equal))
        yield part, first, line, group, equal, replace(comparison, group=group[:0], equal=equal[:0]), config


def merge(statistics: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts added up; of the examples, the first ones."""
    total: dict[str, Any] = {}
    for one in statistics:
        for name, value in one.items():
            if isinstance(value, dict):
                total[name] = merge([total.get(name, {}), value])
            elif name == "examples":
                total[name] = (total.get(name, []) + value)[:EXAMPLES]
            elif isinstance(value, list):
                before = total.get(name, [0] * len(value))
                total[name] = [a + b for a, b in zip(before, value, strict=True)]
            else:
                total[name] = total.get(name, 0) + value
    return total


def run_cleaning(config: CleaningConfig) -> dict[str, Any]:
    """Clean all input and write the output; what is counted is returned for the report.

    Raises:
        UserError: something cannot be read or written.
    """
    files = input_files(config)
    Cleaner(config)  # its complaints come before any work
    folder = open_work_folder(config, files)
    try:
        return _clean_into(folder, files, config)
    except OSError as error:
        raise UserError(
            f"cleaning cannot write into {folder} ({error.strerror}); free some space or choose another --work_dir, "
            "and give the same command again: it goes on where it was"
        ) from error
    finally:
        if folder.is_dir() and [path.name for path in folder.iterdir()] == ["fingerprint"]:
            shutil.rmtree(folder)  # there is nothing to go on with


def _clean_into(folder: Path, files: Sequence[Path], config: CleaningConfig) -> dict[str, Any]:
    workers = config.num_workers or len(_cores())
    parts: list[Part] = []
    left_out = UnreadRecords(f"{config.output}.left_out.jsonl")

    def missing() -> Iterator[tuple[Part, list[str]]]:
        with Progress("cleaning", sum(file.stat().st_size for file in files), "B") as progress:
            for number, file in enumerate(files):
                progress.go_on_with(f"cleaning {file.name}")
                for name, documents in documents_by_part(file, number, config, left_out):
                    parts.append(Part(folder, name))
                    if not parts[-1].is_there:
                        yield parts[-1], documents
                progress.update(file.stat().st_size)

    with contextlib.closing(in_order(_clean_part, missing(), workers, config)) as results:
        for _ in results:
            pass
    if left_out.count:
        print(left_out)
    comparison = compare(parts, config)
    tasks = write_tasks(parts, comparison, config)
    written = list(in_order(write_part, tasks, workers, config))
    return finish(parts, written, config)


def finish(parts: Sequence[Part], written: Sequence[dict[str, Any]], config: CleaningConfig) -> dict[str, Any]:
    """Put the output together, remove the work folder, and return all counts."""
    concatenate(parts, ".kept", config.output)
    if config.rejected:
        concatenate(parts, ".rejected", config.rejected)
    cleaned, last = merge(part.statistics() for part in parts), merge(written)
    statistics = merge([cleaned, {name: last[name] for name in ("rejected", "removed")}])
    statistics["kept"] = last["kept"]
    shutil.rmtree(parts[0].folder)
    return statistics


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
