"""A classifier of texts: a GPT with one number a label in place of its vocabulary (alignment/classify.py trains it)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, restore_model, tokenizer_of
from command_line import UserError
from gpt_model import GPTModel
from inference.service.filters import Classifier


class TextClassifier(nn.Module):
    """The backbone is read at the last token of a text, as in a reward model; the head has a row for each label.

    Args:
        backbone: the model to start from; it is copied.
        n_labels: two or more.
    """

    def __init__(self, backbone: GPTModel, n_labels: int) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        self.backbone.lm_head = nn.Identity()
        self.label_head = nn.Linear(backbone.config.d_model, n_labels)
        nn.init.normal_(self.label_head.weight, std=1.0 / (backbone.config.d_model + 1) ** 0.5)
        nn.init.zeros_(self.label_head.bias)

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.backbone.config

    def logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """One number for each label, before the softmax: (B, T) ids and mask → (B, L). Padding on either side."""
        hidden = self.backbone.hidden_states(input_ids, attention_mask)  # (B, T, D)
        positions = torch.arange(input_ids.size(1), device=input_ids.device)
        last = (attention_mask * positions).argmax(dim=1)  # (B,)
        return self.label_head(hidden[torch.arange(len(last), device=last.device), last]).float()  # (B, L)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, label: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The cross-entropy, and the share that is right, of B texts with labels (B,)."""
        logits = self.logits(input_ids, attention_mask)  # (B, L)
        return {"loss": F.cross_entropy(logits, label), "accuracy": (logits.argmax(1) == label).float().mean()}


def load_classifier(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[TextClassifier, ByteLevelBPETokenizer, list[str]]:
    """A trained classifier (in eval mode), its tokenizer and its labels.

    Raises:
        UserError: the file is missing, damaged or no classifier.
    """
    content = load_checkpoint(path)
    if content["stage"] != "classify":
        raise UserError(f"{path} is a {content['stage']} model; give one that finetune.py --mode classify wrote")
    labels = content["labels"]
    model = restore_model(content, path, lambda backbone: TextClassifier(backbone, len(labels)))
    return model.to(device).eval(), tokenizer_of(content), labels


def encode_text(tokenizer: ByteLevelBPETokenizer, text: str, max_seq_len: int) -> list[int]:
    """The ids of a text; of one that is too long, the end, where it is read."""
    return (tokenizer.encode(text, add_special_tokens=True)["input_ids"] or [tokenizer.eos_token_id])[-max_seq_len:]


def load_filter_classifier(path: str | Path, forbidden: Sequence[str]) -> Classifier:
    """A classifier as a filter: a text → its label, if that is forbidden, else None.

    A long text is judged in parts of the model's context, and as its worst part.

    Args:
        forbidden: labels; empty means all but the first.

    Raises:
        UserError: see `load_classifier`; or there is no such label.
    """
    model, tokenizer, labels = load_classifier(path)
    if unknown := set(forbidden) - set(labels):
        raise UserError(f"{path} knows the labels {', '.join(labels)}, not {', '.join(sorted(unknown))}")
    blocked, length = set(forbidden or labels[1:]), model.config.max_seq_len

    @torch.inference_mode()
    def classify(text: str) -> str | None:
        ids = tokenizer.encode(text, add_special_tokens=True)["input_ids"] or [tokenizer.eos_token_id]
        for start in range(0, len(ids), length):
            part = torch.tensor([ids[start : start + length]])
            label = labels[int(model.logits(part, torch.ones_like(part)).argmax())]
            if label in blocked:
                return label
        return None

    return classify
