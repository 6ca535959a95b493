"""Classification: which of two or more labels does a text have? A GPT whose head is one number a label.

Records are `{"text": …, "label": …}`; labels are words or whole numbers. The result serves `inference/api_service.py
--classifier` as a filter: the first label, in alphabetical order unless `--labels` says otherwise, is what passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignment.stage import SFTStart, StageConfig, load_parts, open_stage, run
from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError, option
from data_loader import Batch, RecordData
from inference.service.text_classifier import TextClassifier, encode_text
from lora import LoRAOptions
from text.account import Account
from text.conversation_data import load_records
from training import ranks
from training.training_loop import TrainingLoop

Labelled = tuple[str, str]  # a text and its label


@dataclass
class ClassifyConfig(SFTStart, LoRAOptions, StageConfig):
    """Settings of classification."""

    data = "data_path"
    output_dir: str = "models/classify"
    optimizer: str = "muon"
    lr: float = 4e-4
    epochs: float = 3.0
    data_path: str = option("data/classify/train.json", 'records {"text": …, "label": …}')
    val_data_path: str = option("", "held-out records of the same kind; empty: --val_fraction of the training data")
    labels: list[str] = option(list, "the labels, that of harmless texts first; default: those of the data, sorted")

    def validate(self) -> list[str]:
        """What does not fit together, a sentence each."""
        twice = [label for label, n in Counter(self.labels).items() if n > 1]
        return [
            *super().validate(),
            *(["--labels must name two or more"] if len(self.labels) == 1 else []),
            *([f"--labels names {', '.join(twice)} twice"] if twice else []),
        ]


def parse_labelled(record: dict, where: str) -> Labelled:
    """The text and the label of a record.

    Raises:
        UserError: one of them is missing, or no text.
    """
    text, label = record.get("text"), record.get("label")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where} has no text; it must be like {{"text": "…", "label": "…"}}')
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise UserError(f"{where} has the label {label!r}; it must be a word or a whole number")
    return text, str(label)


def load_labelled(path: str | Path, account: Account | None = None, **how: Any) -> list[Labelled]:
    """All records of a file or folder; see `load_records`."""
    return load_records(path, parse_labelled, account, **how)


class LabelledDataset(RecordData):
    """Texts as token ids, each with its label; of a text that is too long, the end counts, where it is read.

    Args:
        account: see `RecordData`.
    """

    def __init__(
        self,
        records: Sequence[Labelled],
        tokenizer: ByteLevelBPETokenizer,
        max_seq_len: int,
        account: Account | None = None,
    ) -> None:
        super().__init__(account, "texts", records)
        self.pad_token_id = tokenizer.pad_token_id
        self.labels: list[str] = []  # set by `use`
        self.samples: list[tuple[list[int], str]] = []
        for text, label in records:
            ids = encode_text(tokenizer, text, max_seq_len + 1)
            self.account.cut += len(ids) > max_seq_len
            self.samples.append((ids[-max_seq_len:], label))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [len(ids) for ids, _ in self.samples]

    def collate(self, samples: Sequence[tuple[list[int], str]]) -> Batch:
        """{"input_ids", "attention_mask": (B, T), "label": (B,), the number of the label}; padding on the right."""
        width = max(len(ids) for ids, _ in samples)
        rows = [ids + [self.pad_token_id] * (width - len(ids)) for ids, _ in samples]
        mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in samples]
        numbers = [self.labels.index(label) for _, label in samples]
        batch = {"input_ids": rows, "attention_mask": mask, "label": numbers}
        return {name: torch.tensor(values) for name, values in batch.items()}

    @staticmethod
    def count(batch: Batch) -> int:
        """The texts of a batch."""
        return len(batch["label"])


def settle_labels(config: ClassifyConfig, train: LabelledDataset, val: LabelledDataset) -> list[str]:
    """The labels in their order; both data sets use them.

    Raises:
        UserError: fewer than two, or the data has one that `--labels` has not.
    """
    seen = sorted({label for _, label in (*train.samples, *val.samples)})
    labels = config.labels or seen
    if len(labels) < 2:
        raise UserError(f"{config.data_path} has the label {seen[0]} alone; give texts with two or more")
    if unknown := set(seen) - set(labels):
        raise UserError(f"{config.data_path} has the label {sorted(unknown)[0]}, which --labels does not name")
    train.labels = val.labels = labels
    return labels


def label_figures(truth: torch.Tensor, logits: torch.Tensor, labels: Sequence[str]) -> dict[str, float]:
    """How good a classifier is.

    Args:
        truth: numbers of labels, (N,). logits: (N, L).

    Returns:
        "loss": nats a text; "accuracy"; "f1": the mean over labels; "precision/LABEL" and "recall/LABEL" (a label that
        nothing was given, or nothing has, counts as 0 there, as in scikit-learn).
    """
    given, n = logits.argmax(1), len(labels)
    confusion = torch.bincount(truth * n + given, minlength=n * n).view(n, n).double()  # truth × given
    right = confusion.diag()
    precision, recall = (right / confusion.sum(axis).clamp(min=1) for axis in (0, 1))  # (L,), (L,)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return {
        "loss": float(torch.nn.functional.cross_entropy(logits, truth)),
        "accuracy": float(right.sum() / len(truth)),
        "f1": float(f1.mean()),
        **{f"precision/{label}": float(value) for label, value in zip(labels, precision, strict=True)},
        **{f"recall/{label}": float(value) for label, value in zip(labels, recall, strict=True)},
    }


class ClassifyLoop(TrainingLoop):
    """The training loop with the figures of held-out texts; its checkpoints name the labels."""

    shown = ("loss", "accuracy")

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """See `label_figures`."""
        self.model.eval()
        mine, size = range(self.data_rank, len(self.val_data), self.ranks), self.evaluation_batch_size
        truth, logits = [torch.empty(0, dtype=torch.long)], [torch.empty(0, len(self.val_data.labels))]
        with self.updater.autocast():
            for start in range(0, len(mine), size):
                batch = self.val_data.collate([self.val_data[index] for index in mine[start : start + size]])
                rows = self._to_device(batch)
                logits.append(self.model.logits(rows["input_ids"], rows["attention_mask"]).cpu())
                truth.append(batch["label"])
        parts = ranks.gather_objects((torch.cat(truth), torch.cat(logits)))
        truth, logits = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return {f"val_{name}": value for name, value in label_figures(truth, logits, self.val_data.labels).items()}


def classify(config: ClassifyConfig | None = None, **settings: Any) -> dict[str, float]:
    """Train a classifier; leaves `classify_best.pth`.

    Returns:
        the figures of the best model on held-out texts, see `label_figures`.
    """
    config = config or ClassifyConfig(**settings)
    backbone, tokenizer, device = open_stage(config)
    train_data, val_data = load_parts(
        config,
        backbone.config,
        load_labelled,
        lambda records, account: LabelledDataset(records, tokenizer, config.max_seq_len, account),
        "texts",
    )
    labels = settle_labels(config, train_data, val_data)
    model, lengths = TextClassifier(backbone, len(labels)), train_data.lengths
    loop = ClassifyLoop(config, model, backbone.config, tokenizer, "classify", train_data, val_data, device, lengths)
    loop.extra = {"labels": labels}
    counts = Counter(label for _, label in train_data.samples)
    shares = ", ".join(f"{label} {counts[label]}" for label in labels)
    return run(
        loop,
        f"training a classifier on {len(train_data)} texts ({shares}), {loop.max_steps} steps",
        "classifier",
        lambda best: f"right on {best['val_accuracy']:.1%} of {len(val_data)} held-out texts, F1 {best['val_f1']:.3f}",
    )
