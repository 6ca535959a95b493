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
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from command_line import UserError, replacing, require_writable_folder
from progress import Progress
from text.cleaning import duplicates
from text.cleaning.cleaner import EXAMPLES, Cleaned, Cleaner, CleaningConfig
from text.text_files import ReadingOptions, UnreadRecords, iter_documents, resolve_files

PART_CHARS = 4_000_000


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
