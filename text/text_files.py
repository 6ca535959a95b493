"""Reading text that people have: `.txt`, `.jsonl` and `.parquet`, plain or gzipped, one file or a folder of them.

A data path may be a file, a folder, or a name without its ending (`data/pretrain/train` finds `train.txt`). Documents
are read one at a time, so a corpus never has to fit into memory.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from command_line import UserError

TEXT_ENDINGS = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")
RECORD_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".parquet")


def resolve_files(path: str | Path, endings: tuple[str, ...] = TEXT_ENDINGS) -> list[Path]:
    """The files that a data path means, in a fixed order.

    Raises:
        UserError: nothing is there, or nothing with one of the endings.
    """
    path = Path(path)
    if path.is_file():
        if not path.name.endswith(endings):
            raise UserError(f"{path} is none of the supported kinds of file; convert it to {' or '.join(endings)}")
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(endings))
        if not files:
            raise UserError(f"the folder {path} holds no file that ends in {' or '.join(endings)}; put the data there")
        return files
    candidates = [path.with_name(path.name + ending) for ending in endings]
    files = [file for file in candidates if file.is_file()]
    if not files:
        raise UserError(
            f"there is no data at {path} (nor with one of the endings {', '.join(endings)}); check the path"
        )
    return files[:1]


def _open_bytes(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")


def _open_text(path: Path) -> TextIO:
    # utf-8-sig: a byte-order mark, which Windows editors leave, is not part of the text
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", newline="\n")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a `UserError` that names it."""
    try:
        yield
    except UnicodeDecodeError as error:  # its own position counts from the last block that was read
        with _open_bytes(path) as file:
            line = next(number for number, line in enumerate(file, start=1) if not _is_utf8(line))
        raise UserError(f"{path} is not UTF-8 text ({error.reason} in line {line}); save it as UTF-8") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a sound gzip file ({error}); create it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); mend that and try again") from None


def _text_of(record: object, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f'{where} has no field "text" holding a string; each line must be like {{"text": "…"}}')
    return record["text"]


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow; `pip install pyarrow` and try again") from None
    return pyarrow


def _documents_of_parquet(path: Path) -> Iterator[str]:
    pyarrow = _pyarrow(path)
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if "text" not in names:
            raise UserError(f'{path} has no column "text"; its columns are {", ".join(names)}')
        for batch in table.iter_batches(columns=["text"]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise UserError(f'the column "text" of {path} does not hold texts but {type(text).__name__} values')
                if text and text.strip():
                    yield text
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a sound parquet file ({error}); create it again") from None


def _documents_of_file(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from _documents_of_parquet(path)
        return
    is_jsonl = ".jsonl" in path.suffixes
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.rstrip("\r\n")
            if "\0" in line:
                raise UserError(f"{path} is a binary file (line {number} has a zero byte); give a text file")
            if not line.strip():
                continue
            if is_jsonl:
                line = _text_of(parse_json(line, f"line {number} of {path}"), f"line {number} of {path}")
            if line.strip():
                yield line


def parse_json(text: str, where: str) -> object:
    """Parse JSON; a mistake in it is a `UserError` that says where."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise UserError(f"{where} is not valid JSON ({error}); mend it and try again") from None


def iter_documents(path: str | Path) -> Iterator[str]:
    """The documents of a file or folder, one string each: a line of `.txt`, a record of `.jsonl` or `.parquet`.

    Raises:
        UserError: no such file, no text in it, not UTF-8, binary, or a record without "text".
    """
    for file in resolve_files(path):
        count = 0
        with _reading(file):
            for document in _documents_of_file(file):
                count += 1
                yield document
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
    with path.open(encoding="utf-8-sig", newline="") as stream:
        try:
            rows = list(csv.DictReader(stream, strict=True))
        except csv.Error as error:
            raise UserError(f"{path} is not a sound CSV file ({error}); create it again") from None
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise UserError(f"record {number} of {path} has not as many fields as the first line; mend it")
        # There are no types in CSV
        row |= {name: row[name].lower() == "true" for name in row if row[name].lower() in ("true", "false")}
    return rows


def holds_records(path: str | Path) -> bool:
    """Whether the first file of a data path holds records (conversations, preferences) and no documents.

    JSON, CSV and, where nothing is called "text" in it, JSONL and parquet do.
    """
    file = resolve_files(path, tuple(dict.fromkeys(TEXT_ENDINGS + RECORD_ENDINGS)))[0]
    if file.suffix == ".parquet":
        return "text" not in _pyarrow(file).parquet.ParquetFile(file).schema_arrow.names
    if ".jsonl" not in file.suffixes:
        return ".txt" not in file.suffixes
    with _reading(file), _open_text(file) as stream:
        line = next((line for line in stream if line.strip()), "{}")
    first = parse_json(line, f"record 1 of {file}")
    return not (isinstance(first, dict) and isinstance(first.get("text"), str))


def _is_json_lines(text: str) -> bool:
    """Whether a whole JSON value ends before the text does: many a .json file is published with an object a line."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg == "Extra data" and text.lstrip().startswith("{")
    except (ValueError, RecursionError):
        pass
    return False


def _records_of_json(path: Path) -> list[tuple[str, object]]:
    with _open_text(path) as stream:
        text = stream.read()
    if ".jsonl" in path.suffixes or _is_json_lines(text):
        lines = ((f"record {number} of {path}", line) for number, line in enumerate(text.split("\n"), start=1))
        return [(where, parse_json(line, where)) for where, line in lines if line.strip()]
    content = parse_json(text, str(path))
    if not isinstance(content, list):
        raise UserError(f"{path} must hold a list of records like [{{…}}, {{…}}]")
    return [(f"record {number} of {path}", record) for number, record in enumerate(content, start=1)]


def iter_records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """The records of JSON (one list, or one object a line as in JSONL), CSV or parquet files, each with a name for
    error messages.

    Raises:
        UserError: no such file, invalid JSON, not UTF-8, or a record that is not an object.
    """
    for file in resolve_files(path, RECORD_ENDINGS):
        with _reading(file):
            if file.suffix in (".csv", ".parquet"):
                records = [(f"record {number} of {file}", row) for number, row in enumerate(_rows(file), start=1)]
            else:
                records = _records_of_json(file)
        if not records:
            raise UserError(f"{file} holds no record; give at least one")
        for where, record in records:
            if not isinstance(record, dict):
                raise UserError(f"{where} is not an object like {{…}}")
            yield where, record
