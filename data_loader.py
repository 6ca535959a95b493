"""From text and JSON to batches of token ids.

    pretraining text  → token shards on the disk (memory-mapped) → windows of max_seq_len tokens
    instruction data  → conversations → ids and labels, padded to the longest of a batch
    preference data   → conversations that differ in their last answer, and which of them is better
    unpaired data     → conversations whose last answer is good or bad
    prompts           → ids, padded on the left

A batch is a dict of tensors that the model's `forward` takes. Which samples make up the batch of step n is a pure
function of the seed and n (`BatchOrder`), so a resumed run sees exactly the data an uninterrupted one would have seen.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError
from gpt_model import IGNORED_LABEL
from text.chat_template import Message
from text.conversation_data import load_conversations
from text.text_files import iter_documents, resolve_files

Batch = dict[str, torch.Tensor]

SHARD_TOKENS = 50_000_000  # tokens a shard file


# ------------------------------------------------------------------------------------------------------ token shards


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


def in_validation_part(index: int, fraction: float) -> bool:
    """Whether document number `index` (from 0) is set aside for validation: evenly spread, the same in every run.

    Multiples of the golden ratio fill the unit interval evenly, whatever the number of documents.
    """
    return index * 618_034 % 1_000_000 < fraction * 1_000_000


def set_validation_part_aside(records: Sequence[Any], fraction: float) -> tuple[list[Any], list[Any]]:
    """Records cut into those to train on and those of the validation part; one of the two may come out empty."""
    parts: tuple[list[Any], list[Any]] = ([], [])
    for index, record in enumerate(records):
        parts[in_validation_part(index, fraction)].append(record)
    return parts


def tokenize_to_shards(
    path: str | Path,
    tokenizer: ByteLevelBPETokenizer,
    shard_dir: str | Path,
    *,
    part: str = "all",
    val_fraction: float = 0.0,
) -> TokenShards:
    """Tokenize the documents of a data path once, with all cores; later calls reuse the shards.

    Args:
        path: file, folder or name without ending, see text/text_files.py.
        shard_dir: folder for the shards and their manifest.
        part: "all", or "train" / "val": the documents outside / inside the validation part.
        val_fraction: the share of documents in the validation part.

    Raises:
        UserError: the text cannot be read, or there is none, or the disk is full.
    """
    files = resolve_files(path)
    sources = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    identity = {"tokenizer": tokenizer.fingerprint, "sources": sources, "part": part, "val_fraction": val_fraction}
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder = Path(shard_dir) / f"{Path(path).name.split('.')[0]}-{part}-{digest}"
    try:
        if not _complete(folder):
            with _alone_in(folder.parent):
                if not _complete(folder):  # another process may have made it while this one waited
                    _make_shards(path, tokenizer, folder, identity)
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


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process tokenizes into this folder; where the disk knows no locks, nobody waits."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _make_shards(path: str | Path, tokenizer: ByteLevelBPETokenizer, folder: Path, identity: dict) -> None:
    """Write the shards beside their place and move the whole folder there."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        temporary.mkdir()
        _write_shards(path, tokenizer, temporary, identity)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_shards(path: str | Path, tokenizer: ByteLevelBPETokenizer, folder: Path, identity: dict) -> None:
    part, fraction = identity["part"], identity["val_fraction"]
    documents = (
        document
        for index, document in enumerate(iter_documents(path))
        if part == "all" or in_validation_part(index, fraction) == (part == "val")
    )
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    before = tokenizer.prefix_ids
    shards: list[str] = []
    n_bytes = n_documents = in_shard = 0
    file = None
    with tqdm(desc="tokenizing", unit="B", unit_scale=True, leave=False, disable=None) as progress:
        while chunk := list(islice(documents, 2048)):
            ids: list[int] = []
            for document_ids in tokenizer.encode_documents(chunk):
                ids += [*before, *document_ids, tokenizer.eos_token_id]
            if file is None or in_shard >= SHARD_TOKENS:
                if file is not None:
                    file.close()
                shards.append(f"shard_{len(shards):05d}.bin")
                file, in_shard = (folder / shards[-1]).open("wb"), 0
            file.write(np.asarray(ids, dtype=dtype).tobytes())
            size = sum(len(document.encode(errors="surrogatepass")) for document in chunk)
            in_shard += len(ids)
            n_bytes += size
            n_documents += len(chunk)
            progress.update(size)
    if file is None:
        raise UserError(
            f"{path} has no document in its {part} part; give more text, another --val_fraction, or --val_data_dir"
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


# ---------------------------------------------------------------------------------------------------------- datasets


class GPTPretrainDataset(Dataset):
    """Windows of `max_seq_len` tokens over tokenized text.

    Neighbouring windows share one token: the last of a window is only predicted, the first only read. So every token
    (but the very first) is predicted exactly once in a pass. The last window reaches back to be full; the tokens that
    the window before it has predicted already carry no label.

    Raises:
        UserError: the text is shorter than one window.
    """

    def __init__(self, shards: TokenShards, max_seq_len: int, name: str = "the text") -> None:
        if max_seq_len < 2:
            raise UserError(
                f"--max_seq_len must be at least 2, not {max_seq_len}: a window of one token predicts nothing"
            )
        if shards.n_tokens < max_seq_len:
            raise UserError(
                f"{name} has {shards.n_tokens} tokens, less than one window; lower --max_seq_len (now {max_seq_len}) "
                "or give more text"
            )
        self.shards, self.max_seq_len = shards, max_seq_len

    def __len__(self) -> int:
        # ⌈(n − 1) / (T − 1)⌉: a window predicts all of its tokens but the first, and so do all windows together
        return max(1, -(-(self.shards.n_tokens - 1) // (self.max_seq_len - 1)))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """{"input_ids", "labels"}: both (max_seq_len,) int64; the model shifts the labels."""
        index = range(len(self))[index]  # an IndexError beyond the end is what stops a `for` loop
        wanted = index * (self.max_seq_len - 1)
        start = min(wanted, self.shards.n_tokens - self.max_seq_len)  # the last window reaches back to be full
        ids = torch.from_numpy(self.shards.slice(start, start + self.max_seq_len).astype(np.int64))
        labels = ids.clone()
        labels[: wanted - start + 1] = IGNORED_LABEL  # the first has nothing before it; the others are not new
        return {"input_ids": ids, "labels": labels}

    def collate(self, samples: Sequence[dict[str, torch.Tensor]]) -> Batch:
        """{"input_ids", "labels"}: both (B, max_seq_len) int64."""
        return {name: torch.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels")}

    def count(self, batch: Batch) -> int:
        """How many tokens of the batch are predicted."""
        return count_labels(batch)


class GPTSFTDataset(Dataset):
    """Conversations as token ids, with labels on what the assistant says and on the `</s>` that ends it.

    A conversation that is longer than `max_seq_len` is cut at the end; one whose first answer lies beyond the cut
    teaches nothing and is left out (`n_dropped` counts them).

    Raises:
        UserError: a malformed record (which one, which field), or none that fits.
    """

    def __init__(
        self, conversations: Sequence[Sequence[Message]], tokenizer: ByteLevelBPETokenizer, max_seq_len: int
    ) -> None:
        self.pad_token_id = tokenizer.pad_token_id
        encoded = [tokenizer.encode_chat(conversation) for conversation in conversations]
        cut = [(sample["input_ids"][:max_seq_len], sample["labels"][:max_seq_len]) for sample in encoded]
        self.samples = [pair for pair in cut if any(label != IGNORED_LABEL for label in pair[1][1:])]
        self.n_dropped = len(cut) - len(self.samples)
        if not self.samples:
            raise UserError(f"no conversation fits into {max_seq_len} tokens; raise --max_seq_len")

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids, _ in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        return self.samples[index]

    def collate(self, samples: Sequence[tuple[list[int], list[int]]]) -> Batch:
        """{"input_ids", "labels"}: (B, longest) int64, padded on the right.

        Without an attention mask: causal attention never looks at padding on the right, and it carries no label.
        """
        rows, labels = zip(*samples, strict=True)
        return {"input_ids": pad_rows(rows, self.pad_token_id), "labels": pad_rows(labels, IGNORED_LABEL)}

    def count(self, batch: Batch) -> int:
        """How many tokens of the batch are predicted."""
        return count_labels(batch)


class PreferenceDataset(Dataset):
    """Preferences: a prompt with two or more answers, the best one first.

    All pairs of a better and a worse answer are compared, and those of one prompt share a weight of 1: so InstructGPT
    has it (arXiv:2203.02155, equation 1), because a ranking of nine would otherwise count as 36 questions.
    Answers that do not fit into `max_seq_len` are left out, and with them preferences that keep fewer than two
    (`n_dropped` counts these).

    Args:
        preferences: as `conversation_data.parse_preference` gives them.

    Raises:
        UserError: no preference fits.
    """

    def __init__(
        self, preferences: Sequence[dict[str, Any]], tokenizer: ByteLevelBPETokenizer, max_seq_len: int
    ) -> None:
        self.pad_token_id = tokenizer.pad_token_id
        self.samples: list[dict[str, Any]] = []
        for preference in preferences:
            encoded = [encode_answer(tokenizer, preference["prompt"], answer) for answer in preference["answers"]]
            answers = [(ids, labels) for ids, labels in encoded if len(ids) <= max_seq_len]
            if len(answers) >= 2:
                self.samples.append({"answers": answers, "margin": preference["margin"]})
        self.n_dropped = len(preferences) - len(self.samples)
        if not self.samples:
            raise UserError(f"no preference pair fits into {max_seq_len} tokens; raise --max_seq_len")

    @property
    def lengths(self) -> list[int]:
        return [max(len(ids) for ids, _ in sample["answers"]) for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"answers": [(ids, labels), …] with labels on the answer alone, best first; "margin": float}"""
        return self.samples[index]

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """N answers, a row each, and the P comparisons between them.

        Returns:
            "input_ids", "attention_mask": (N, longest) int64, padded on the right.
            "pairs": (P, 2) int64, the rows of the better and of the worse answer.
            "margins": (P,), by how much the better one should be better.
            "weights": (P,), 1 for all pairs of a prompt together.
        """
        rows = pad_samples([answer for sample in samples for answer in sample["answers"]], self.pad_token_id)
        pairs, margins, weights, first = [], [], [], 0
        for sample in samples:
            n_answers = len(sample["answers"])
            compared = list(combinations(range(first, first + n_answers), 2))
            pairs += compared
            margins += [sample["margin"]] * len(compared)
            weights += [1 / len(compared)] * len(compared)
            first += n_answers
        return {
            **{name: rows[name] for name in ("input_ids", "attention_mask")},
            "pairs": torch.tensor(pairs),
            "margins": torch.tensor(margins),
            "weights": torch.tensor(weights),
        }

    def count(self, batch: Batch) -> int:
        """How many prompts the batch holds."""
        return round(float(batch["weights"].sum()))


class UnpairedDataset(Dataset):
    """Answers that are good or bad, each beside an answer that was given to another prompt.

    The policy's divergence is estimated from prompts with others' answers (arXiv:2402.01306, section 4.1). Which answer
    stands beside a prompt is drawn once, so that the reference need be asked once only. Answers that do not fit into
    `max_seq_len` are left out (`n_dropped` counts them), others' answers are cut there.

    Args:
        records: as `conversation_data.parse_unpaired` gives them.

    Raises:
        UserError: no answer fits, or all are to the same prompt.
    """

    def __init__(self, records: Sequence[dict[str, Any]], tokenizer: ByteLevelBPETokenizer, max_seq_len: int) -> None:
        self.pad_token_id = tokenizer.pad_token_id
        encoded = [encode_answer(tokenizer, record["prompt"], record["answer"]) for record in records]
        fitting = [index for index, (ids, _) in enumerate(encoded) if len(ids) <= max_seq_len]
        self.n_dropped = len(records) - len(fitting)
        if not fitting:
            raise UserError(f"no answer fits into {max_seq_len} tokens; raise --max_seq_len")
        generator = torch.Generator().manual_seed(0)
        order = [fitting[index] for index in torch.randperm(len(fitting), generator=generator).tolist()]
        self.samples: list[dict[str, Any]] = []
        for place, index in enumerate(order):
            prompt = records[index]["prompt"]
            following = (records[other] for other in chain(order[place + 1 :], order[:place]))
            other = next((record["answer"] for record in following if record["prompt"] != prompt), None)
            if other is None:
                raise UserError("all answers are to the same prompt; give answers to two different ones at least")
            ids, labels = encode_answer(tokenizer, prompt, other)
            answers = [encoded[index], (ids[:max_seq_len], labels[:max_seq_len])]
            self.samples.append({"answers": answers, "good": records[index]["good"]})

    @property
    def lengths(self) -> list[int]:
        return [len(sample["answers"][0][0]) for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"answers": [(ids, labels) of the answer, (ids, labels) of another prompt's], "good": bool}"""
        return self.samples[index]

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """ "input_ids", "attention_mask", "labels": (B, longest); "good": (B,); the other answers under "other_…"."""
        answers = zip(*(sample["answers"] for sample in samples), strict=True)
        own, other = (pad_samples(rows, self.pad_token_id) for rows in answers)
        good = torch.tensor([sample["good"] for sample in samples])
        return {**own, **{f"other_{name}": value for name, value in other.items()}, "good": good}

    def count(self, batch: Batch) -> int:
        """How many answers the batch holds."""
        return len(batch["good"])


class GPTPPODataset(Dataset):
    """Prompts for a policy to answer, each once.

    Raises:
        UserError: no prompt leaves room for an answer.
    """

    def __init__(
        self, prompts: Sequence[Sequence[Message]], tokenizer: ByteLevelBPETokenizer, max_prompt_len: int
    ) -> None:
        self.pad_token_id = tokenizer.pad_token_id
        encoded = [tuple(tokenizer.encode_chat(prompt, add_generation_prompt=True)["input_ids"]) for prompt in prompts]
        self.samples = list(dict.fromkeys(ids for ids in encoded if len(ids) <= max_prompt_len))
        if not self.samples:
            raise UserError(f"no prompt fits into {max_prompt_len} tokens; raise --max_seq_len or lower --max_gen_len")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[int, ...]:
        return self.samples[index]

    def collate(self, samples: Sequence[Sequence[int]]) -> Batch:
        """{"input_ids", "attention_mask"}: (B, longest) int64, padded on the left."""
        return {
            "input_ids": pad_rows(samples, self.pad_token_id, on_the_left=True),
            "attention_mask": pad_rows([[1] * len(ids) for ids in samples], 0, on_the_left=True),
        }


def pad_rows(rows: Sequence[Sequence[int]], value: int, on_the_left: bool = False) -> torch.Tensor:
    """B rows of ids, labels or ones → (B, T) int64, T being the longest; `value` fills up the others."""
    longest = max(map(len, rows))
    if on_the_left:
        return torch.tensor([[value] * (longest - len(row)) + list(row) for row in rows])
    return torch.tensor([list(row) + [value] * (longest - len(row)) for row in rows])


def pad_samples(samples: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token_id: int) -> Batch:
    """(ids, labels) of N texts as "input_ids", "attention_mask", "labels": (N, longest) int64, padded on the right."""
    rows, labels = zip(*samples, strict=True)
    return {
        "input_ids": pad_rows(rows, pad_token_id),
        "attention_mask": pad_rows([[1] * len(ids) for ids in rows], 0),
        "labels": pad_rows(labels, IGNORED_LABEL),
    }


def encode_answer(
    tokenizer: ByteLevelBPETokenizer, prompt: Sequence[Message], answer: Message
) -> tuple[list[int], list[int]]:
    """(ids, labels) of a prompt and an answer, which alone has labels: the assistant's earlier turns are not judged."""
    n_prompt = len(tokenizer.encode_chat(prompt, add_generation_prompt=True)["input_ids"])
    encoded = tokenizer.encode_chat([*prompt, answer])
    return encoded["input_ids"], [IGNORED_LABEL] * n_prompt + encoded["labels"][n_prompt:]


def count_labels(batch: Batch) -> int:
    """How many positions of a batch are predicted: labels that are not ignored, but for the first column."""
    return int(batch["labels"][:, 1:].ne(IGNORED_LABEL).sum())


# ------------------------------------------------------------------------------------------------------------- order


class BatchOrder:
    """Which samples each step's global batch consists of, as a pure function of the seed and the step.

    Every epoch is a new permutation, cut into ⌈n / batch_size⌉ full batches; the last one is filled up from the
    beginning of the permutation, so that no sample is lost and no data set is too small.

    Args:
        n_samples: size of the data set.
        batch_size: samples of one optimiser step over all accumulation steps and ranks.
        seed: of the permutations.
        lengths: tokens of each sample. If given, samples of similar length share a batch (sorted within every 32
            batches), which spares padding.
    """

    def __init__(self, n_samples: int, batch_size: int, seed: int = 0, lengths: Sequence[int] | None = None) -> None:
        self.n_samples, self.batch_size, self.seed = n_samples, batch_size, seed
        self.lengths = None if lengths is None else torch.tensor(lengths)
        self.steps_per_epoch = -(-n_samples // batch_size)
        self._epoch, self._batches = -1, torch.empty(0)

    def batch(self, step: int) -> list[int]:
        """The indices of the samples of `step` (from 0)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._batches_of(epoch)
        return self._batches[position].tolist()

    def _batches_of(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)  # no epoch of another seed's
        order = torch.randperm(self.n_samples, generator=generator)
        needed = self.steps_per_epoch * self.batch_size
        order = order.repeat(-(-needed // self.n_samples))[:needed]  # (needed,)
        if self.lengths is not None:
            # Sorted by stretches and not as a whole: which samples meet in a batch still changes with every epoch
            chunks = order.split(32 * self.batch_size)
            order = torch.cat([chunk[self.lengths[chunk].argsort(stable=True)] for chunk in chunks])
        batches = order.view(self.steps_per_epoch, self.batch_size)
        if self.lengths is not None:  # or each stretch would be trained on from its short samples to its long ones
            batches = batches[torch.randperm(len(batches), generator=generator)]
        return batches

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of the first epoch; this makes it a `batch_sampler` for PyTorch's DataLoader."""
        return (self.batch(step) for step in range(self.steps_per_epoch))


# ------------------------------------------------------------------------------------------------------- dataloaders


def create_pretrain_dataloader(
    path: str | Path,
    tokenizer: ByteLevelBPETokenizer,
    batch_size: int = 8,
    max_seq_len: int = 512,
    shuffle: bool = True,
    seed: int = 0,
    shard_dir: str | Path = "models/token_shards",
) -> DataLoader:
    """One epoch of pretraining batches as a PyTorch DataLoader; see `GPTPretrainDataset` for what a batch holds."""
    dataset = GPTPretrainDataset(tokenize_to_shards(path, tokenizer, shard_dir), max_seq_len, str(path))
    return _dataloader(dataset, batch_size, BatchOrder(len(dataset), batch_size, seed) if shuffle else None)


def create_sft_dataloader(
    path: str | Path,
    tokenizer: ByteLevelBPETokenizer,
    batch_size: int = 8,
    max_seq_len: int = 512,
    shuffle: bool = True,
    seed: int = 0,
) -> DataLoader:
    """One epoch of instruction batches as a PyTorch DataLoader; see `GPTSFTDataset` for what a batch holds."""
    dataset = GPTSFTDataset(load_conversations(path), tokenizer, max_seq_len)
    order = BatchOrder(len(dataset), batch_size, seed, dataset.lengths) if shuffle else None
    return _dataloader(dataset, batch_size, order)


def _dataloader(dataset: GPTPretrainDataset | GPTSFTDataset, batch_size: int, order: BatchOrder | None) -> DataLoader:
    sizes = {"batch_size": batch_size} if order is None else {"batch_sampler": order}
    return DataLoader(dataset, collate_fn=dataset.collate, **sizes)
