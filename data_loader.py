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

import copy
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError
from gpt_model import IGNORED_LABEL
from text.account import REPEATED, Account
from text.chat_template import Message
from text.conversation_data import load_conversations
from text.token_shards import TokenShards, in_validation_part, tokenize_to_shards

Batch = dict[str, torch.Tensor]
GOLDEN_RATIO = (5**0.5 - 1) / 2  # whose multiples, without their whole part, keep far from each other


# ---------------------------------------------------------------------------------------------------------- datasets


class GPTPretrainDataset(Dataset):
    """Windows of `max_seq_len` tokens over tokenized text.

    Neighbouring windows share one token: the last of a window is only predicted, the first only read. So every token
    (but the very first) is predicted exactly once in a pass. The last window reaches back to be full; the tokens that
    the window before it has predicted already carry no label.

    Each pass cuts the text elsewhere, see `window`: a token that has little before it in a window of one pass has more
    in those of others.

    Args:
        eos_token_id: the token that ends a document, if documents in a window must not see each other; the first token
            of each then carries no label.

    Raises:
        UserError: the text is shorter than one window.
    """

    def __init__(
        self, shards: TokenShards, max_seq_len: int, name: str = "the text", eos_token_id: int | None = None
    ) -> None:
        if max_seq_len < 2:
            raise UserError(
                f"--max_seq_len must be at least 2, not {max_seq_len}: a window of one token predicts nothing"
            )
        if shards.n_tokens < max_seq_len:
            raise UserError(
                f"{name} has {shards.n_tokens} tokens, less than one window; lower --max_seq_len (now {max_seq_len}) "
                "or give more text"
            )
        self.shards, self.max_seq_len, self.eos_token_id = shards, max_seq_len, eos_token_id

    @property
    def n_predicted(self) -> int:
        """How many tokens a pass predicts."""
        return self.shards.n_tokens - (1 if self.eos_token_id is None else self.shards.n_documents)

    def __len__(self) -> int:
        # ⌈(n − 1) / (T − 1)⌉: a window predicts all of its tokens but the first, and so do all windows together
        return max(1, -(-(self.shards.n_tokens - 1) // (self.max_seq_len - 1)))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """A window of the first pass."""
        return self.window(index, epoch=0)

    def window(self, index: int, epoch: int) -> dict[str, torch.Tensor]:
        """{"input_ids", "labels"}: both (max_seq_len,) int64; the model shifts the labels. With separate documents
        "segments" as well, see `GPTModel.forward`.

        Args:
            epoch: the pass, from 0. The first one begins with the text, the others begin further behind, such that cuts
                are far from those of other passes, and read what they have left out there after the end of the text.
        """
        first = int(epoch * GOLDEN_RATIO % 1 * (self.max_seq_len - 1))  # token of the pass
        index = range(len(self))[index]  # an IndexError beyond the end is what stops a `for` loop
        wanted = index * (self.max_seq_len - 1)
        start = min(wanted, self.shards.n_tokens - self.max_seq_len)  # the last window reaches back to be full
        ids = torch.from_numpy(self._tokens(first + start).astype(np.int64))
        labels = ids.clone()
        labels[: wanted - start + 1] = IGNORED_LABEL  # the first has nothing before it; the others are not new
        if self.eos_token_id is None:
            return {"input_ids": ids, "labels": labels}
        ended = ids[:-1] == self.eos_token_id  # before the second token and later ones
        labels[1:][ended] = IGNORED_LABEL
        return {"input_ids": ids, "labels": labels, "segments": F.pad(ended.cumsum(0), (1, 0))}

    def _tokens(self, start: int) -> np.ndarray:
        """(max_seq_len,) tokens from `start` on; the text is a ring."""
        end, n_tokens = start + self.max_seq_len, self.shards.n_tokens
        if end <= n_tokens:
            return self.shards.slice(start, end)
        return np.concatenate((self.shards.slice(start, n_tokens), self.shards.slice(0, end - n_tokens)))

    def collate(self, samples: Sequence[dict[str, torch.Tensor]]) -> Batch:
        """What the samples have, each (B, max_seq_len) int64."""
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def count(self, batch: Batch) -> int:
        """How many tokens of the batch are predicted."""
        return count_labels(batch)


class MixedDataset(Dataset):
    """Windows of several texts, each text as often as its weight says.

    A pass sees every window of every text at least once: the text that has most windows for its weight gives each of
    them once, the others begin again from their first window as often as it takes.

    Args:
        datasets: of one text each.
        weights: their shares of the samples, in any unit.
    """

    def __init__(self, datasets: Sequence[GPTPretrainDataset], weights: Sequence[float]) -> None:
        self.datasets = datasets
        shares = np.array(weights) / sum(weights)
        lengths = np.array([len(dataset) for dataset in datasets])
        self.counts = np.maximum(lengths, np.rint(shares * (lengths / shares).max())).astype(np.int64)
        self.ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """A window of the first pass."""
        return self.window(index, epoch=0)

    def window(self, index: int, epoch: int) -> dict[str, torch.Tensor]:
        """A window, as its own data set gives it; of a text that is read several times in a pass, each time others."""
        index = range(len(self))[index]
        number = int(np.searchsorted(self.ends, index, "right"))
        dataset, count = self.datasets[number], int(self.counts[number])
        repetition, place = divmod(index - int(self.ends[number]) + count, len(dataset))
        return dataset.window(place, epoch * -(-count // len(dataset)) + repetition)

    def collate(self, samples: Sequence[dict[str, torch.Tensor]]) -> Batch:
        """As a single data set does."""
        return self.datasets[0].collate(samples)

    def count(self, batch: Batch) -> int:
        """How many tokens of the batch are predicted."""
        return count_labels(batch)

    def __str__(self) -> str:
        passes = (f"{count / len(data):.2f}" for count, data in zip(self.counts, self.datasets, strict=True))
        return f"a pass is {len(self):,} windows: {', '.join(passes)} passes over the sources in turn"


class RecordData(Dataset):
    """Samples made of records, with an account of what became of the records.

    What fits is found first and a validation part set aside afterwards, so that the two are of the sizes asked for.

    Args:
        account: what reading the records has filled in so far; None starts a new one.
        kind: what the records are called in a new account.
        records: what the samples are made of.
    """

    parallel: tuple[str, ...] = ("samples",)  # names of the lists that hold something for each sample
    part_of = ""  # of a part, which one it is, for messages

    def __init__(self, account: Account | None, kind: str, records: Sequence) -> None:
        self.account = account or Account("the data", kind, read=len(records))

    def __len__(self) -> int:
        return len(getattr(self, self.parallel[0]))

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]

    def group(self, index: int) -> int:
        """Samples of one group stay on one side of a split."""
        return index

    def split(self, fraction: float) -> tuple[RecordData, RecordData]:
        """Two data sets of the samples to train on and of those held out; one of them may come out empty."""
        inside = [in_validation_part(self.group(index), fraction) for index in range(len(self))]
        train, val = (self._part([i for i, held in enumerate(inside) if held == side]) for side in (False, True))
        train.part_of, val.part_of = "the training part of ", "the held-out part of "
        self.account.held_out = len(val)
        return train, val

    def _part(self, indices: Sequence[int]) -> RecordData:
        """Some of the samples, with the account of the whole."""
        part = copy.copy(self)
        for name in self.parallel:
            values = getattr(self, name)
            setattr(part, name, [values[index] for index in indices])
        return part


class GPTSFTDataset(RecordData):
    """Conversations as token ids, with labels on what the assistant says and on the `</s>` that ends it.

    A conversation that is longer than `max_seq_len` is cut at the end; one whose first answer lies beyond the cut
    teaches nothing and is left out.

    Args:
        account: see `RecordData`.

    Raises:
        UserError: a malformed record (which one, which field), or none that fits.
    """

    def __init__(
        self,
        conversations: Sequence[Sequence[Message]],
        tokenizer: ByteLevelBPETokenizer,
        max_seq_len: int,
        account: Account | None = None,
    ) -> None:
        super().__init__(account, "conversations", conversations)
        self.pad_token_id = tokenizer.pad_token_id
        self.samples: list[tuple[list[int], list[int]]] = []
        for conversation in conversations:
            encoded = tokenizer.encode_chat(conversation)
            ids, labels = encoded["input_ids"][:max_seq_len], encoded["labels"][:max_seq_len]
            n_labels, n_kept = (sum(label != IGNORED_LABEL for label in row[1:]) for row in (encoded["labels"], labels))
            self.account.answer_tokens += n_labels
            self.account.answer_tokens_lost += n_labels - n_kept
            if n_kept:
                self.samples.append((ids, labels))
                self.account.cut += n_kept < n_labels
            elif n_labels:
                self.account.leave_out(f"no answer within {max_seq_len} tokens")
            else:
                self.account.leave_out("no answer to learn from")
        self.account.require(len(self))

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids, _ in self.samples]

    def collate(self, samples: Sequence[tuple[list[int], list[int]]]) -> Batch:
        """{"input_ids", "labels"}: (B, longest) int64, padded on the right.

        Without an attention mask: causal attention never looks at padding on the right, and it carries no label.
        """
        rows, labels = zip(*samples, strict=True)
        return {"input_ids": pad_rows(rows, self.pad_token_id), "labels": pad_rows(labels, IGNORED_LABEL)}

    def count(self, batch: Batch) -> int:
        """How many tokens of the batch are predicted."""
        return count_labels(batch)


class PackedDataset(Dataset):
    """Conversations, several in a row of `max_seq_len` tokens, each as if it were alone: they do not see each other.

    Rows are filled best-fit (Johnson 1974, "Fast algorithms for bin packing"): the longest conversations first, each
    into the row that it leaves least room in. Padding then is what no conversation was short enough for.

    Args:
        dataset: conversations of at most `max_seq_len` tokens.
    """

    def __init__(self, dataset: GPTSFTDataset, max_seq_len: int) -> None:
        self.dataset, self.max_seq_len = dataset, max_seq_len
        self.rows = best_fit(dataset.lengths, max_seq_len)

    @property
    def waste(self) -> float:
        """The share of the tokens that is padding, when every row is filled up."""
        return 1 - sum(self.lengths) / (len(self.rows) * self.max_seq_len)

    @property
    def lengths(self) -> list[int]:
        lengths = self.dataset.lengths
        return [sum(lengths[index] for index in row) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[tuple[list[int], list[int]]]:
        return [self.dataset[place] for place in self.rows[index]]

    def collate(self, samples: Sequence[list[tuple[list[int], list[int]]]]) -> Batch:
        """{"input_ids", "labels", "segments"}: (B, longest) int64, padded on the right; see `GPTModel.forward`."""
        ids = [[token for one, _ in row for token in one] for row in samples]
        # The first token of a text is predicted from none of it
        labels = [[label for _, one in row for label in (IGNORED_LABEL, *one[1:])] for row in samples]
        segments = [[number for number, (one, _) in enumerate(row) for _ in one] for row in samples]
        return {
            "input_ids": pad_rows(ids, self.dataset.pad_token_id),
            "labels": pad_rows(labels, IGNORED_LABEL),
            "segments": pad_rows(segments, -1),
        }

    def count(self, batch: Batch) -> int:
        """How many tokens of the batch are predicted."""
        return count_labels(batch)


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of things put into bins of `size`, by decreasing length, each where it leaves least room."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, number of the bin), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(room, (lengths[index], -1))
        left, number = room.pop(place) if place < len(room) else (size, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        insort(room, (left - lengths[index], number))
    return bins


class PreferenceDataset(RecordData):
    """Preferences: a prompt with two or more answers, the best one first.

    All pairs of a better and a worse answer are compared, and those of one prompt share a weight of 1: so InstructGPT
    has it (arXiv:2203.02155, equation 1), because a ranking of nine would otherwise count as 36 questions.
    Answers that do not fit into `max_seq_len` are left out, and with them preferences that keep no pair.

    Args:
        preferences: as `conversation_data.parse_preference` gives them.
        account: see `RecordData`.

    Raises:
        UserError: no preference fits.
    """

    parallel = ("samples", "places")

    def __init__(
        self,
        preferences: Sequence[dict[str, Any]],
        tokenizer: ByteLevelBPETokenizer,
        max_seq_len: int,
        account: Account | None = None,
    ) -> None:
        super().__init__(account, "preferences", preferences)
        self.pad_token_id = tokenizer.pad_token_id
        self.samples: list[dict[str, Any]] = []
        self.places: list[int] = []  # of the samples among the preferences
        for place, preference in enumerate(preferences):
            encoded = [encode_answer(tokenizer, preference["prompt"], answer) for answer in preference["answers"]]
            scores = preference.get("scores") or range(len(encoded), 0, -1)
            fitting = [(answer, score) for answer, score in zip(encoded, scores, strict=True)
                       if len(answer[0]) <= max_seq_len]  # fmt: skip
            pairs = [(i, j) for i, j in combinations(range(len(fitting)), 2) if fitting[i][1] > fitting[j][1]]
            answers = [answer for answer, _ in fitting] if pairs else []
            n_tokens, n_kept = (
                sum(label != IGNORED_LABEL for _, labels in some for label in labels) for some in (encoded, answers)
            )
            self.account.answer_tokens += n_tokens
            self.account.answer_tokens_lost += n_tokens - n_kept if len(fitting) < len(encoded) else 0
            if pairs:
                self.samples.append({"answers": answers, "pairs": pairs, "margin": preference["margin"]})
                self.places.append(place)
                self.account.cut += len(answers) < len(encoded)
            elif len(fitting) < len(encoded):
                self.account.leave_out(f"longer than {max_seq_len} tokens")
            else:
                self.account.leave_out("all answers of the same score")
        self.account.require(len(self))

    @property
    def lengths(self) -> list[int]:
        return [max(len(ids) for ids, _ in sample["answers"]) for sample in self.samples]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"answers": [(ids, labels), …] with labels on the answer alone, best first; "pairs": [(better, worse), …],
        places in "answers"; "margin": float}"""
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
            compared = [(first + better, first + worse) for better, worse in sample["pairs"]]
            pairs += compared
            margins += [sample["margin"]] * len(compared)
            weights += [1 / len(compared)] * len(compared)
            first += len(sample["answers"])
        return {
            **{name: rows[name] for name in ("input_ids", "attention_mask")},
            "pairs": torch.tensor(pairs),
            "margins": torch.tensor(margins),
            "weights": torch.tensor(weights),
        }

    def count(self, batch: Batch) -> int:
        """How many prompts the batch holds."""
        return round(float(batch["weights"].sum()))


class UnpairedDataset(RecordData):
    """Answers that are good or bad, each beside an answer that was given to another prompt.

    The policy's divergence is estimated from prompts with others' answers (arXiv:2402.01306, section 4.1). Which answer
    stands beside a prompt is drawn once, so that the reference need be asked once only. Answers that do not fit into
    `max_seq_len` are left out, others' answers are cut there.

    Args:
        records: the answers of each record, as `conversation_data.parse_unpaired` gives them.
        account: see `RecordData`.

    Raises:
        UserError: no answer fits.
    """

    parallel = ("fitting",)

    def __init__(
        self,
        records: Sequence[Sequence[dict[str, Any]]],
        tokenizer: ByteLevelBPETokenizer,
        max_seq_len: int,
        account: Account | None = None,
    ) -> None:
        super().__init__(account, "records", records)
        self.tokenizer, self.max_seq_len, self.pad_token_id = tokenizer, max_seq_len, tokenizer.pad_token_id
        self.fitting: list[dict[str, Any]] = []
        n_groups = 0
        for answers in records:
            encoded = [(answer, encode_answer(tokenizer, answer["prompt"], answer["answer"])) for answer in answers]
            fitting = [{**answer, "encoded": row, "group": n_groups} for answer, row in encoded
                       if len(row[0]) <= max_seq_len]  # fmt: skip
            n_tokens, n_kept = (
                sum(label != IGNORED_LABEL for _, labels in rows for label in labels)
                for rows in ([row for _, row in encoded], [answer["encoded"] for answer in fitting])
            )
            self.account.answer_tokens += n_tokens
            self.account.answer_tokens_lost += n_tokens - n_kept
            if fitting:
                self.fitting += fitting
                self.account.cut += len(fitting) < len(answers)
                n_groups += 1
            else:
                self.account.leave_out(f"longer than {max_seq_len} tokens")
        self.account.require(len(self))

    def group(self, index: int) -> int:
        """The answers of one record have their prompt in common."""
        return self.fitting[index]["group"]

    def _part(self, indices: Sequence[int]) -> UnpairedDataset:
        part = super()._part(indices)
        part.__dict__.pop("samples", None)  # others' answers are of the same part
        return part

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """See `__getitem__`; made when first asked for.

        Raises:
            UserError: all answers are to the same prompt.
        """
        generator = torch.Generator().manual_seed(0)
        order = [self.fitting[index] for index in torch.randperm(len(self), generator=generator).tolist()]
        samples = []
        for place, own in enumerate(order):
            following = chain(order[place + 1 :], order[:place])
            other = next((record["answer"] for record in following if record["prompt"] != own["prompt"]), None)
            if other is None:
                raise UserError(
                    f"all {len(self)} answers of {self.part_of}{self.account.source} are to the same prompt, and KTO "
                    "needs those to another one beside them; give answers to two different ones at least"
                    + (", or a larger --val_fraction" if self.part_of else "")
                )
            ids, labels = encode_answer(self.tokenizer, own["prompt"], other)
            answers = [own["encoded"], (ids[: self.max_seq_len], labels[: self.max_seq_len])]
            samples.append({"answers": answers, "good": own["good"]})
        return samples

    @property
    def lengths(self) -> list[int]:
        return [len(sample["answers"][0][0]) for sample in self.samples]

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


class GPTPPODataset(RecordData):
    """Prompts for a policy to answer, each once.

    Args:
        account: see `RecordData`.

    Raises:
        UserError: no prompt leaves room for an answer.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[Message]],
        tokenizer: ByteLevelBPETokenizer,
        max_prompt_len: int,
        account: Account | None = None,
    ) -> None:
        super().__init__(account, "prompts", prompts)
        self.pad_token_id = tokenizer.pad_token_id
        first_place: dict[tuple[int, ...], int] = {}
        for place, prompt in enumerate(prompts):
            ids = tuple(tokenizer.encode_chat(prompt, add_generation_prompt=True)["input_ids"])
            if len(ids) > max_prompt_len:
                self.account.leave_out(f"longer than the {max_prompt_len} tokens that are left for a prompt")
            elif ids in first_place:
                self.account.leave_out(REPEATED)
            else:
                first_place[ids] = place
        self.samples = list(first_place)
        self.places = list(first_place.values())  # of the samples among the prompts
        self.account.require(len(self))

    def collate(self, samples: Sequence[Sequence[int]]) -> Batch:
        """{"input_ids", "attention_mask"}: (B, longest) int64, padded on the left."""
        return {
            "input_ids": pad_rows(samples, self.pad_token_id, on_the_left=True),
            "attention_mask": pad_rows([[1] * len(ids) for ids in samples], 0, on_the_left=True),
        }


def length_multiple(device: torch.device) -> int:
    """To a multiple of how many tokens rows of different lengths are filled up, so that few shapes occur on a GPU: each
    new one makes cuDNN's attention plan anew, which takes up to half a second, and compiled code be compiled anew."""
    return 64 if device.type == "cuda" else 1


def lengthened(batch: Batch, multiple: int, pad_token_id: int, max_len: int) -> Batch:
    """A batch whose rows, (B, T) each, are filled up on the right to a multiple of so many tokens, or to `max_len`.

    What a tensor is filled with follows from how its name ends; others, and rows that are longer, stay as they are.
    """
    fillers = {"input_ids": pad_token_id, "labels": IGNORED_LABEL, "attention_mask": 0, "segments": -1}
    result = dict(batch)
    for name, value in batch.items() if multiple > 1 else ():
        filler = next((fillers[end] for end in fillers if name.endswith(end)), None)
        if filler is not None:
            longer = min(-(-value.size(-1) // multiple) * multiple, max_len)
            result[name] = F.pad(value, (0, max(0, longer - value.size(-1))), value=filler)
    return result


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
    num_workers: int = 0,
) -> DataLoader:
    """One epoch of pretraining batches as a PyTorch DataLoader; see `GPTPretrainDataset` for what a batch holds.

    With `num_workers`, that many processes prepare batches; these are the same.
    """
    dataset = GPTPretrainDataset(tokenize_to_shards(path, tokenizer, shard_dir), max_seq_len, str(path))
    order = BatchOrder(len(dataset), batch_size, seed) if shuffle else None
    return _dataloader(dataset, batch_size, order, num_workers)


def create_sft_dataloader(
    path: str | Path,
    tokenizer: ByteLevelBPETokenizer,
    batch_size: int = 8,
    max_seq_len: int = 512,
    shuffle: bool = True,
    seed: int = 0,
    num_workers: int = 0,
) -> DataLoader:
    """One epoch of instruction batches as a PyTorch DataLoader; see `GPTSFTDataset` for what a batch holds.

    With `num_workers`, that many processes prepare batches; these are the same.
    """
    dataset = GPTSFTDataset(load_conversations(path), tokenizer, max_seq_len)
    order = BatchOrder(len(dataset), batch_size, seed, dataset.lengths) if shuffle else None
    return _dataloader(dataset, batch_size, order, num_workers)


def _dataloader(
    dataset: GPTPretrainDataset | GPTSFTDataset, batch_size: int, order: BatchOrder | None, num_workers: int
) -> DataLoader:
    sizes = {"batch_size": batch_size} if order is None else {"batch_sampler": order}
    return DataLoader(dataset, collate_fn=dataset.collate, num_workers=num_workers, **sizes)
