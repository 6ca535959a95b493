"""Tokenized text on the disk: made once, by all cores, and read in place.

    shards/NAME-PART-DIGEST/manifest.json, shard_00000.bin, shard_00001.bin, …

The digest is of the text, the tokenizer and how the text was read; what was made of others is never taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from command_line import UserError, holding
from progress import Progress
from text.bpe_training import batches
from text.text_files import ReadingOptions, UnreadRecords, changed_options, iter_documents, resolve_files

SHARD_TOKENS = 50_000_000  # tokens a shard file
CHUNK_CHARACTERS = 4_000_000  # of text that is tokenized at once
FORSAKEN = 24 * 3600  # seconds without a change after which nobody is writing any more


class Encoder(Protocol):
    """What is asked of a tokenizer here."""

    fingerprint: str
    prefix_ids: list[int]
    eos_token_id: int

    def __len__(self) -> int: ...
    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class TokenShards:
    """Tokenized documents on the disk: `<s>` text `</s>` after one another, in files that are memory-mapped.

    Attributes:
        arrays: one array of token ids for each shard.
        n_bytes: UTF-8 bytes of the raw text, line ends not counted.
        n_documents: how many documents.
    """

    arrays: list[np.ndarray]
    n_bytes: int
    n_documents: int

    @property
    def n_tokens(self) -> int:
        return sum(len(array) for array in self.arrays)

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop − 1, counted over all shards."""
        parts, offset = [], 0
        for array in self.arrays:
            low, high = max(start - offset, 0), min(stop - offset, len(array))
            if low < high:
                parts.append(array[low:high])
            offset += len(array)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def spread_documents(self, n: int, eos_token_id: int, search: int = 1 << 16) -> list[int]:
        """Where up to `n` documents begin, evenly spread over the text; the first one is among them.

        Args:
            search: tokens behind each of the even places in which an end of a document is looked for.
        """
        starts = {0}
        for place in (self.n_tokens * number // n for number in range(1, n)):
            (ends,) = np.nonzero(self.slice(place - 1, min(place + search, self.n_tokens - 1)) == eos_token_id)
            if len(ends):  # a document longer than that has no beginning here
                starts.add(place + int(ends[0]))
        return sorted(starts)

    def __getstate__(self) -> dict[str, Any]:
        """For a data loader's workers, where these are processes that start anew: mapped files go as their names."""
        mapped = [(array.filename, array.dtype) if isinstance(array, np.memmap) else array for array in self.arrays]
        return {**vars(self), "arrays": mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = [np.memmap(*entry, mode="r") if isinstance(entry, tuple) else entry for entry in state["arrays"]]
        vars(self).update(state, arrays=arrays)


def joined_shards(parts: Sequence[TokenShards]) -> TokenShards:
    """Several texts as one."""
    arrays = [array for part in parts for array in part.arrays]
    return TokenShards(arrays, sum(part.n_bytes for part in parts), sum(part.n_documents for part in parts))


def in_validation_part(index: int, fraction: float) -> bool:
    """Whether document number `index` (from 0) is set aside for validation: evenly spread, the same in every run.

    Multiples of the golden ratio fill the unit interval evenly, whatever the number of documents.
    """
    return index * 618_034 % 1_000_000 < fraction * 1_000_000


def tokenize_to_shards(
    path: str | Path,
    tokenizer: Encoder,
    shard_dir: str | Path,
    *,
    part: str = "all",
    val_fraction: float = 0.0,
    reading: ReadingOptions | None = None,
) -> TokenShards:
    """Tokenize the documents of a data path once, with all cores; later calls reuse the shards.

    Args:
        path: file, folder or name without ending, see text/text_files.py.
        shard_dir: folder for the shards and their manifest.
        part: "all", or "train" / "val": the documents outside / inside the validation part.
        val_fraction: the share of documents in the validation part.
        reading: how the text is read; what it leaves out is kept beside the shards.

    Raises:
        UserError: the text cannot be read, or there is none, or the disk is full.
    """
    files = resolve_files(path)
    sources = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    identity = {"tokenizer": tokenizer.fingerprint, "sources": sources, "part": part, "val_fraction": val_fraction}
    if reading and (chosen := changed_options(reading)):
        identity["reading"] = chosen
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder = Path(shard_dir) / f"{Path(path).name.split('.')[0]}-{part}-{digest}"
    try:
        if not _complete(folder):
            with holding(folder.parent) as alone:  # which spares the others the work, where there are locks
                _remove_leftovers(folder, alone)
                if not _complete(folder):  # another process may have made it while this one waited
                    _make_shards(path, tokenizer, folder, identity, reading)
                    _offer_old_shards(folder, identity)
    except OSError as error:
        raise UserError(
            f"cannot write token shards into {shard_dir} ({error.strerror}); free some space or choose another "
            "--shard_dir"
        ) from error
    manifest = _read_manifest(folder)
    arrays = [np.memmap(folder / name, dtype=manifest["dtype"], mode="r") for name in manifest["shard_bytes"]]
    return TokenShards(arrays, manifest["n_bytes"], manifest["n_documents"])


def _read_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def _complete(folder: Path) -> bool:
    """Whether all shards are there with the sizes that the manifest gives: a power cut can leave less of a file."""
    try:
        sizes = _read_manifest(folder)["shard_bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _remove_leftovers(folder: Path, alone: bool) -> None:
    """Clear away what killed processes had written of this folder; unless this is `alone`, another may be writing."""
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
        changes = [path.stat().st_mtime for path in (leftover, *leftover.iterdir())]
        if alone or time.time() - max(changes) > FORSAKEN:
            shutil.rmtree(leftover, ignore_errors=True)


def _offer_old_shards(folder: Path, identity: dict) -> None:
    """Say which shards of the same text nobody will use again, as their tokenizer is another one."""
    old = []
    for other in folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*/manifest.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            manifest = json.loads(other.read_text(encoding="utf-8"))
            if manifest["sources"] == identity["sources"] and manifest["tokenizer"] != identity["tokenizer"]:
                old.append((other.parent, sum(manifest["shard_bytes"].values())))
    if old:
        size = sum(size for _, size in old) / 1e6
        names = " ".join(shlex.quote(str(other)) for other, _ in old)
        print(f"{size:,.1f} MB of token shards are another tokenizer's; to remove them: rm -r {names}", flush=True)


def _make_shards(
    path: str | Path,
    tokenizer: Encoder,
    folder: Path,
    identity: dict,
    reading: ReadingOptions | None = None,
) -> None:
    """Write the shards into a folder of this process's own, which is moved to its place when it is whole."""
    temporary = folder.with_name(f".{folder.name}.{os.urandom(6).hex()}.tmp")
    try:
        temporary.mkdir()
        unread = UnreadRecords(temporary / "left_out.jsonl")
        _write_shards(path, tokenizer, temporary, identity, reading, unread)
        if unread.count:
            unread.path = folder / "left_out.jsonl"  # where it is going to be
            print(unread, flush=True)
        if not _complete(folder):
            shutil.rmtree(folder, ignore_errors=True)  # what a power cut left
            try:
                temporary.replace(folder)
            except OSError:
                if not _complete(folder):  # otherwise another process was first, with the same content
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shards(
    path: str | Path,
    tokenizer: Encoder,
    folder: Path,
    identity: dict,
    reading: ReadingOptions | None,
    unread: UnreadRecords,
) -> None:
    part, fraction = identity["part"], identity["val_fraction"]
    documents = (
        document
        for index, document in enumerate(iter_documents(path, reading, unread))
        if part == "all" or in_validation_part(index, fraction) == (part == "val")
    )
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    shards: list[str] = []
    n_bytes = n_documents = in_shard = 0
    file = None
    with Progress("tokenizing", unit="B") as progress:
        # By size and not by number: documents are as long as books or as short as lines
        for chunk in batches(documents, min(CHUNK_CHARACTERS, SHARD_TOKENS)):
            ids = _with_ends(*tokenizer.encode_arrays(chunk), tokenizer.prefix_ids, tokenizer.eos_token_id, dtype)
            if file is None or in_shard >= SHARD_TOKENS:
                if file is not None:
                    file.close()
                shards.append(f"shard_{len(shards):05d}.bin")
                file, in_shard = (folder / shards[-1]).open("wb"), 0
            file.write(ids.data)
            size = sum(len(document) if document.isascii() else _utf8_length(document) for document in chunk)
            in_shard += len(ids)
            n_bytes += size
            n_documents += len(chunk)
            progress.update(size)
    if file is None:
        raise UserError(
            f"{path} has too few documents to set some aside: none is left for the {part} part; give more, another "
            "--val_fraction, or validation text of its own"
        )
    file.close()
    manifest = {
        **identity,
        "shard_bytes": {name: (folder / name).stat().st_size for name in shards},
        "dtype": np.dtype(dtype).name,
        "n_bytes": n_bytes,
        "n_documents": n_documents,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _utf8_length(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _with_ends(ids: np.ndarray, borders: np.ndarray, prefix: list[int], eos_token_id: int, dtype: type) -> np.ndarray:
    """Ids of documents one after another, cut at `borders` (N + 1,), with a prefix before and `</s>` after each one."""
    lengths, more = np.diff(borders), len(prefix) + 1
    ends = np.cumsum(lengths + more) - 1
    result = np.full(len(ids) + more * len(lengths), eos_token_id, dtype)
    is_text = np.ones(len(result), bool)
    is_text[ends] = False
    for place, token in enumerate(prefix):
        here = ends - lengths - (len(prefix) - place)
        result[here], is_text[here] = token, False
    result[is_text] = ids
    return result
