"""Reading text that people have: `.txt`, `.jsonl`, `.json`, `.csv` and `.parquet`, plain or compressed (`.gz`, `.zst`).

A data path may be a file, a folder, or a name without its ending (`data/pretrain/train` finds `train.txt`). Documents
are read one at a time, so a corpus never has to fit into memory (but a `.json` file, which is one list, has to).
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import functools
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from command_line import UserError, option

COMPRESSED = ("", ".gz", ".zst")
TEXT_ENDINGS = tuple(kind + compressed for kind in (".txt", ".jsonl", ".json", ".csv") for compressed in COMPRESSED) + (
    ".parquet",
)
RECORD_ENDINGS = tuple(kind + compressed for kind in (".json", ".jsonl", ".csv") for compressed in COMPRESSED) + (
    ".parquet",
)
SIDE_ENDINGS = tuple(kind + compressed for kind in (".json", ".csv") for compressed in COMPRESSED)
LIKELY_ENCODINGS = ("gb18030", "big5", "shift_jis", "cp1252")  # of files that are not UTF-8
LONGEST_FIELD = 1 << 30  # characters of a CSV field


OnBad = Callable[[UserError, str], None]


@dataclass
class ReadingOptions:
    """How text is read; options of every command that reads some."""

    text_field: str = option("text", "the field of a record, or the column of a table, that holds the text")
    documents: str = option("line", "what a document of a .txt file is", choices=("line", "blank_line", "file"))
    encoding: str = option("utf-8", "of text files, like gb18030")
    errors: str = option(
        "strict", "what is done about bytes that are not of the encoding", choices=("strict", "replace", "ignore")
    )
    skip_bad_records: bool = option(False, "leave out what cannot be read, count it and keep it in a file")

    def reading_complaints(self) -> list[str]:
        try:
            "".encode(self.encoding)
        except LookupError:
            return [f"--encoding {self.encoding} is not known; it must be a name like utf-8, gb18030 or big5"]
        return []


def changed_options(reading: ReadingOptions) -> dict[str, Any]:
    """Those of the reading options that are not as usual."""
    usual = ReadingOptions()
    names = (field.name for field in fields(ReadingOptions))
    return {name: getattr(reading, name) for name in names if getattr(reading, name) != getattr(usual, name)}


class UnreadRecords:
    """Counts what cannot be read, and keeps it.

    Args:
        path: a .jsonl file for it, made when there is something; None: it is only counted.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path, self.count, self.first = path and Path(path), 0, ""

    def add(self, why: str, text: str) -> None:
        self.first = self.first or why
        if self.path:
            line = json.dumps({"why": why, "text": text}, ensure_ascii=True) + "\n"
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a" if self.count else "w", encoding="utf-8") as file:
                    file.write(line)
            except OSError as error:  # which is not a fault of the file that is being read
                raise UserError(
                    f"what is left out cannot be kept in {self.path} ({error.strerror}); free some space or choose "
                    "another place"
                ) from None
        self.count += 1

    def __str__(self) -> str:
        return f"{self.count:,} records left out that cannot be read" + (f", kept in {self.path}" if self.path else "")


def resolve_files(path: str | Path, endings: tuple[str, ...] = TEXT_ENDINGS) -> list[Path]:
    """The files that a data path means, in a fixed order. In a folder, names that begin with a dot are no data.

    Raises:
        UserError: nothing is there, or nothing with one of the endings.
    """
    path = Path(path)
    if path.is_file():
        if not path.name.endswith(endings):
            raise UserError(f"{path} is none of the supported kinds of file; convert it to {' or '.join(endings)}")
        return [path]
    if path.is_dir():
        found = (file for file in path.rglob("*") if file.is_file() and file.name.endswith(endings))
        files = sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))
        if not files:
            raise UserError(f"the folder {path} holds no file that ends in {' or '.join(endings)}; put the data there")
        texts = [file for file in files if not file.name.endswith(SIDE_ENDINGS)]
        if ".txt" in endings and texts and len(texts) < len(files):  # tables and JSON beside texts describe them
            _say_once(f"{path}: {len(files) - len(texts)} .json and .csv files beside its texts are not read")
            files = texts
        for one, other in same_content(tuple(files)):
            _say_once(f"{one} and {other} hold the same; what is in them counts twice")
        return files
    candidates = [path.with_name(path.name + ending) for ending in endings]
    files = [file for file in candidates if file.is_file()]
    if not files:
        raise UserError(
            f"there is no data at {path} (nor with one of the endings {', '.join(endings)}); check the path"
        )
    return files[:1]


def parse_sources(text: str) -> list[tuple[str, float | None]]:
    """Data paths, one a line, with the weights that they may have: `a.txt:0.7` → ("a.txt", 0.7).

    Raises:
        UserError: only some of several have a weight, or one is not positive.
    """
    sources: list[tuple[str, float | None]] = []
    for line in text.split("\n"):
        path, colon, weight = line.rpartition(":")
        try:
            number = float(weight) if colon and not Path(line).exists() else None
        except ValueError:
            number = None
        sources.append((line, None) if number is None else (path, number))
    weights = [weight for _, weight in sources]
    if None in weights and any(weight is not None for weight in weights):
        raise UserError(f"some of the sources {', '.join(text.split())} have a weight; give each one or none")
    if not all(weight is None or 0 < weight < float("inf") for weight in weights):
        raise UserError(f"the weights of {', '.join(text.split())} must be above 0; leave out what has none")
    return sources


@functools.cache
def _say_once(sentence: str) -> None:
    print(f"note: {sentence}", file=sys.stderr, flush=True)


def same_content(files: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Pairs of files of the same size whose first and last megabyte are the same; empty files are no pairs."""
    by_size: dict[int, list[Path]] = {}
    for file in files:
        by_size.setdefault(file.stat().st_size, []).append(file)
    pairs = []
    for size, alike in by_size.items():
        first: dict[bytes, Path] = {}
        for file in alike if size and len(alike) > 1 else ():
            try:
                with file.open("rb") as stream:
                    digest = hashlib.blake2b(stream.read(1 << 20))
                    stream.seek(max(0, size - (1 << 20)))
                    digest.update(stream.read(1 << 20))
            except OSError:  # reading it will say so
                continue
            if (other := first.setdefault(digest.digest(), file)) != file:
                pairs.append((other, file))
    return pairs


def _open_bytes(path: Path) -> BinaryIO:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".zst"):
        return _zstandard(path).open(path, "rb")
    return path.open("rb")


def _zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"reading {path} needs zstandard; `pip install zstandard` and try again") from None
    return zstandard


def _open_text(path: Path, reading: ReadingOptions | None = None) -> TextIO:
    reading = reading or ReadingOptions()
    # utf-8-sig: a byte-order mark, which Windows editors leave, is not part of the text
    encoding = "utf-8-sig" if reading.encoding.lower().replace("_", "-") in ("utf-8", "utf8") else reading.encoding
    errors = "surrogateescape" if reading.errors == "strict" and reading.skip_bad_records else reading.errors
    return io.TextIOWrapper(_open_bytes(path), encoding=encoding, errors=errors, newline="\n")


@contextlib.contextmanager
def _reading(path: Path, reading: ReadingOptions | None = None) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a `UserError` that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(_what_is_wrong(path, reading, error)) from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a sound gzip file ({error}); create it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); mend that and try again") from None
    except Exception as error:
        if path.name.endswith(".zst") and isinstance(error, _zstandard(path).ZstdError):
            raise UserError(f"{path} is not a sound zstd file ({error}); create it again") from None
        raise


def _what_is_wrong(path: Path, reading: ReadingOptions | None, error: UnicodeDecodeError) -> str:
    """Which byte is not of the encoding, and where; the error's own position counts from the last block read."""
    encoding = reading.encoding if reading else "utf-8"
    number, line, is_utf16 = 1, error.object, False
    with _open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            is_utf16 = is_utf16 or (number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)))
            if b"\0" in line and not is_utf16:
                return _binary(path, number)
            try:
                line.decode(encoding)
            except UnicodeDecodeError as here:
                error = here
                break
    name = "UTF-8" if encoding.lower().replace("-", "").replace("_", "") == "utf8" else encoding
    byte = error.object[error.start : error.start + 1].hex()
    place = f"{error.reason}: byte 0x{byte} at place {error.start + 1} in line {number}"
    sentence = f"{path} is not {name} text ({place}); save it as UTF-8"
    fitting = next((other for other in LIKELY_ENCODINGS if other != encoding and _reads_as(line, other)), None)
    fitting = "utf-16" if is_utf16 else fitting
    if reading is None:  # of a command that has no --encoding
        return f"{sentence}, as `iconv -f {fitting} -t utf-8` does" if fitting else sentence
    guess = f"try --encoding {fitting}, which would read this line" if fitting else "name its --encoding"
    return f"{sentence}, {guess}, or add --errors replace or --skip_bad_records"


def _binary(path: Path, number: int) -> str:
    return f"{path} is a binary file (line {number} has a zero byte); give a text file, or its --encoding"


def _reads_as(line: bytes, encoding: str) -> bool:
    try:
        return all(character.isprintable() or character.isspace() for character in line.decode(encoding))
    except UnicodeDecodeError:
        return False


def _text_of(record: object, where: str, field: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        there = f"; its fields are {', '.join(map(str, record))}" if isinstance(record, dict) and record else ""
        raise UserError(
            f'{where} has no field "{field}" holding a string; each line must be like {{"{field}": "…"}}{there}'
        )
    return record[field]


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow; `pip install pyarrow` and try again") from None
    return pyarrow


def _documents_of_parquet(path: Path, field: str) -> Iterator[str]:
    pyarrow = _pyarrow(path)
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if field not in names:
            raise UserError(f'{path} has no column "{field}"; its columns are {", ".join(names)}')
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise UserError(
                        f'the column "{field}" of {path} does not hold texts but {type(text).__name__} values'
                    )
                if text and text.strip():
                    yield text
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a sound parquet file ({error}); create it again") from None


def _documents_of_csv(path: Path, reading: ReadingOptions) -> Iterator[str]:
    with _open_text(path, reading) as stream:
        for number, row in enumerate(_csv_rows(path, stream), start=1):
            if number == 1 and reading.text_field not in row:
                raise UserError(f'{path} has no column "{reading.text_field}"; its columns are {", ".join(row)}')
            yield row[reading.text_field] or ""


def _csv_rows(path: Path, stream: TextIO) -> Iterator[dict]:
    csv.field_size_limit(LONGEST_FIELD)
    try:
        yield from csv.DictReader(stream, strict=True)
    except csv.Error as error:
        raise UserError(f"{path} is not a sound CSV file ({error}); create it again") from None


def csv_lines(path: Path) -> list[list[str]]:
    """The lines of a CSV file that are not blank, as they are: the first one need not hold names."""
    csv.field_size_limit(LONGEST_FIELD)
    with _reading(path), _open_text(path) as stream:
        try:
            return [line for line in csv.reader(stream, strict=True) if line]
        except csv.Error as error:
            raise UserError(f"{path} is not a sound CSV file ({error}); create it again") from None


def _documents_of_text(path: Path, reading: ReadingOptions) -> Iterator[str]:
    """Lines, stretches between blank lines, or the whole."""
    block: list[str] = []
    with _open_text(path, reading) as file:
        for number, line in enumerate(file, start=1):
            line = line.rstrip("\r\n")
            if "\0" in line:
                raise UserError(_binary(path, number))
            if reading.documents == "line":
                yield line
            elif reading.documents == "file" or line.strip():
                block.append(line)
            elif block:
                yield "\n".join(block)
                block = []
    yield "\n".join(block).strip("\n")


def _documents_of_file(path: Path, reading: ReadingOptions, left_out: UnreadRecords) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from _documents_of_parquet(path, reading.text_field)
        return
    kind = next(suffix for suffix in reversed(path.suffixes) if suffix not in COMPRESSED)
    if kind == ".txt":
        texts = _documents_of_text(path, reading)
    elif kind == ".csv":
        texts = _documents_of_csv(path, reading)
    else:
        texts = _texts_of_json(path, kind, reading, left_out)
    for text in texts:
        if reading.skip_bad_records and not _is_sound(text):
            left_out.add(f"a document of {path} is not {reading.encoding} text", text)
        elif text and not text.isspace():
            yield text


def _is_sound(text: str) -> bool:
    """Whether no byte of it could not be read: such bytes have become the second halves of pairs that have no first."""
    return text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text)


def _texts_of_json(path: Path, kind: str, reading: ReadingOptions, left_out: UnreadRecords) -> Iterator[str]:
    def texts(lines: Iterable[tuple[str, Any]], parse: bool) -> Iterator[str]:
        for where, line in lines:
            try:
                record = parse_json(line, where) if parse else line
                yield _text_of(record, where, reading.text_field)
            except UserError as error:
                if not reading.skip_bad_records:
                    raise
                left_out.add(str(error), line if parse else json.dumps(line))

    if kind == ".json":
        with contextlib.closing(_open_text(path, reading)) as stream:
            content = stream.read()
        yield from texts(_records_of_json(path, content), parse=False)
        return
    with _open_text(path, reading) as stream:
        numbered = ((f"line {number} of {path}", line) for number, line in enumerate(stream, start=1))
        yield from texts(((where, line) for where, line in numbered if not line.isspace()), parse=True)


def parse_json(text: str, where: str) -> object:
    """Parse JSON; a mistake in it is a `UserError` that says where."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise UserError(f"{where} is not valid JSON ({error}); mend it and try again") from None


def iter_documents(
    path: str | Path, reading: ReadingOptions | None = None, left_out: UnreadRecords | None = None
) -> Iterator[str]:
    """The documents of a file or folder, one string each: a line of `.txt`, a record of the other kinds.

    Args:
        reading: how; None for UTF-8, a line a document, and the field "text".
        left_out: takes what cannot be read, if `reading` says that this is no mistake.

    Raises:
        UserError: no such file, no text in it, not of the encoding, binary, or a record without the field.
    """
    chosen, left_out = reading or ReadingOptions(), left_out or UnreadRecords()
    for file in resolve_files(path):
        count, before = 0, left_out.count
        with _reading(file, reading):
            for document in _documents_of_file(file, chosen, left_out):
                count += 1
                yield document
        if count == 0 and left_out.count > before:
            raise UserError(f"nothing of {file} can be read, the first of it because {left_out.first}")
        if count == 0:
            raise UserError(f"{file} holds no text; give a file with at least one line that is not blank")


def _rows(path: Path) -> list[dict]:
    """The rows of a `.parquet` or, with the names of columns in the first line, a `.csv`."""
    if path.suffix == ".parquet":
        pyarrow = _pyarrow(path)
        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} is not a sound parquet file ({error}); create it again") from None
    with _open_text(path) as stream:
        rows = list(_csv_rows(path, stream))
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise UserError(f"record {number} of {path} has not as many fields as the first line; mend it")
        # There are no types in CSV
        row |= {name: row[name].lower() == "true" for name in row if row[name].lower() in ("true", "false")}
    return rows


def holds_records(path: str | Path, text_field: str = "text", encoding: str = "utf-8") -> bool:
    """Whether the first file of a data path holds records (conversations, preferences) and no documents: its first
    record has no text in `text_field`."""
    file = resolve_files(path, tuple(dict.fromkeys(TEXT_ENDINGS + RECORD_ENDINGS)))[0]
    if ".txt" in file.suffixes:
        return False
    if file.suffix == ".parquet":
        return text_field not in _pyarrow(file).parquet.ParquetFile(file).schema_arrow.names
    if ".jsonl" in file.suffixes:  # may be large
        # Bytes further down that are not of the encoding are for whoever reads them
        with _reading(file), _open_text(file, ReadingOptions(encoding=encoding, skip_bad_records=True)) as stream:
            first = parse_json(next((line for line in stream if line.strip()), "{}"), f"record 1 of {file}")
    else:
        _, first = next(iter_records(file))
    return not (isinstance(first, dict) and isinstance(first.get(text_field), str))


def iter_rows(path: Path) -> Iterator[dict]:
    """The rows of one file of records, each as it is published, read as it is needed where the kind of file allows.

    Raises:
        UserError: it is not sound.
    """
    with _reading(path):
        if path.suffix == ".parquet":
            pyarrow = _pyarrow(path)
            try:
                for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
                    yield from batch.to_pylist()
            except pyarrow.ArrowException as error:
                raise UserError(f"{path} is not a sound parquet file ({error}); create it again") from None
        elif ".csv" in path.suffixes:
            with _open_text(path) as stream:
                yield from _csv_rows(path, stream)
        else:
            yield from (record for _, record in iter_records(path))


def _is_json_lines(text: str) -> bool:
    """Whether a whole JSON value ends before the text does: many a .json file is published with an object a line."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg == "Extra data" and text.lstrip().startswith("{")
    except (ValueError, RecursionError):
        pass
    return False


def _records_of_lines(path: Path, text: str, on_bad: OnBad | None) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"record {number} of {path}"
        try:
            if not _is_sound(line):
                raise UserError(f"{where} is not UTF-8 text")
            if line.strip():
                yield where, parse_json(line, where)
        except UserError as error:
            if on_bad is None:
                raise
            on_bad(error, line)


def _records_of_json(path: Path, text: str, on_bad: OnBad | None = None) -> list[tuple[str, object]]:
    if ".jsonl" in path.suffixes or _is_json_lines(text):
        return list(_records_of_lines(path, text, on_bad))
    content = parse_json(text, str(path))
    if not isinstance(content, list):
        raise UserError(f"{path} must hold a list of records like [{{…}}, {{…}}]")
    return [(f"record {number} of {path}", record) for number, record in enumerate(content, start=1)]


def iter_records(path: str | Path, on_bad: OnBad | None = None) -> Iterator[tuple[str, dict]]:
    """The records of JSON (one list, or one object a line as in JSONL), CSV or parquet files, each with a name for
    error messages.

    Args:
        on_bad: takes what is wrong, and the text, of lines and records that cannot be read; None: that is refused.

    Raises:
        UserError: no such file, invalid JSON, not UTF-8, or a record that is not an object.
    """
    n_bad = 0

    def leave_out(error: UserError, text: str) -> None:
        nonlocal n_bad
        n_bad += 1
        on_bad(error, text)

    for file in resolve_files(path, RECORD_ENDINGS):
        with _reading(file):
            if ".csv" in file.suffixes or file.suffix == ".parquet":
                records = [(f"record {number} of {file}", row) for number, row in enumerate(_rows(file), start=1)]
            else:
                lenient = on_bad and ".jsonl" in file.suffixes
                with _open_text(file, ReadingOptions(skip_bad_records=True) if lenient else None) as stream:
                    content = stream.read()
                records = _records_of_json(file, content, leave_out if on_bad else None)
        if not records and not n_bad:
            raise UserError(f"{file} holds no record; give at least one")
        for where, record in records:
            if isinstance(record, dict):
                yield where, record
                continue
            error = UserError(f"{where} is not an object like {{…}}")
            if on_bad is None:
                raise error
            leave_out(error, json.dumps(record))
