"""The reward model: how good is an answer, learned from pairs of a chosen and a rejected one, and from rankings.

Bradley–Terry: P(chosen beats rejected) = σ(r_chosen − r_rejected); see arXiv:1706.03741 and InstructGPT,
arXiv:2203.02155, equation 1. The difference may be asked to exceed a margin (Llama 2, arXiv:2307.09288, equation 2).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from alignment.stage import PreferenceData, StageConfig, load_parts, open_stage, run
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, restore_model, tokenizer_of
from command_line import UserError, option
from data_loader import PreferenceDataset, length_multiple, lengthened
from gpt_model import GPTConfig, GPTModel
from lora import LoRAOptions
from text.conversation_data import load_preferences
from training import ranks
from training.training_loop import TrainingLoop


class RewardModel(nn.Module):
    """A GPT whose vocabulary head is replaced by one number a token.

    The backbone is a copy: a policy that starts from the same weights is trained without touching this model.

    Args:
        backbone: the model to start from, usually the SFT model.
        centring: weight of the loss that keeps the rewards' mean at 0.
    """

    def __init__(self, backbone: GPTModel, centring: float = 0.0) -> None:
        super().__init__()
        self.centring = centring
        self.backbone = copy.deepcopy(backbone)
        self.backbone.lm_head = nn.Identity()  # the head reads hidden states (d_model), never logits (vocabulary)
        self.reward_head = nn.Linear(backbone.config.d_model, 1)
        nn.init.normal_(self.reward_head.weight, std=1.0 / (backbone.config.d_model + 1) ** 0.5)
        nn.init.zeros_(self.reward_head.bias)

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.backbone.config

    def token_values(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """One number for each position: (B, T) ids and mask → (B, T)."""
        hidden = self.backbone.hidden_states(input_ids, attention_mask)  # (B, T, D)
        return self.reward_head(hidden).squeeze(-1).float()  # (B, T)

    def rewards(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The reward of each conversation, read at its last token: (B, T) → (B,). Padding may stand on either side."""
        values = self.token_values(input_ids, attention_mask)  # (B, T)
        positions = torch.arange(input_ids.size(1), device=input_ids.device)
        last = (attention_mask * positions).argmax(dim=1, keepdim=True)  # (B, 1)
        return values.gather(1, last).squeeze(1)  # (B,)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pairs: torch.Tensor,
        margins: torch.Tensor,
        weights: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The loss of N answers that are compared in P pairs, see `PreferenceDataset.collate`.

        Returns:
            {"loss": −log σ(r_chosen − r_rejected − margin) + c (r_chosen + r_rejected)², "accuracy": the share of pairs
            ranked right, "margin": r_chosen − r_rejected (weighted means over pairs), "margins": each of them, (P,)}
        """
        chosen, rejected = self.rewards(input_ids, attention_mask)[pairs].unbind(1)  # (P,), (P,)
        found = chosen - rejected  # (P,)
        losses = -F.logsigmoid(found - margins)  # (P,)
        if self.centring:  # differences leave the level open; this keeps it near 0 (arXiv:2312.09244, equation 2)
            losses = losses + self.centring * (chosen + rejected).square()
        means = {"loss": losses, "accuracy": (found > 0).float(), "margin": found}
        return {name: (x * weights).sum() / weights.sum() for name, x in means.items()} | {"margins": found}


@dataclass
class RewardConfig(PreferenceData, LoRAOptions, StageConfig):
    """Settings of reward-model training."""

    output_dir: str = "models/reward"
    optimizer: str = "muon"
    lr: float = 4e-4
    center_rewards_coefficient: float = option(
        0.0, "weight of (r_chosen + r_rejected)², which keeps rewards around 0", at_least=0
    )


@torch.no_grad()
def compare(
    model: RewardModel, data: PreferenceDataset, indices: Sequence[int], batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """The differences r_chosen − r_rejected of the pairs of some preferences, and the pairs' weights: (P,), (P,)."""
    device = model.reward_head.weight.device
    margins, weights = [torch.empty(0)], [torch.empty(0)]
    model.eval()
    for start in range(0, len(indices), batch_size):
        batch = data.collate([data[index] for index in indices[start : start + batch_size]])
        batch = lengthened(batch, length_multiple(device), data.pad_token_id, model.config.max_seq_len)
        output = model(**{name: value.to(device) for name, value in batch.items()})
        margins.append(output["margins"].float().cpu())
        weights.append(batch["weights"])
    return torch.cat(margins), torch.cat(weights)


def preference_figures(margins: torch.Tensor, weights: torch.Tensor) -> dict[str, float]:
    """How good differences r_chosen − r_rejected (P,) are, as weighted means.

    Returns:
        "loss": −log σ(difference), without the margins and the centring of training, so that all runs compare;
        "accuracy": the share ranked right; "margin": the mean difference; "calibration_error".
    """
    weights = weights.double() / weights.sum()
    margins = margins.double()
    return {
        "loss": float(-(F.logsigmoid(margins) * weights).sum()),
        "accuracy": float(((margins > 0) * weights).sum()),
        "margin": float((margins * weights).sum()),
        "calibration_error": calibration_error(margins, weights),
    }


def calibration_error(margins: torch.Tensor, weights: torch.Tensor, n_bins: int = 10) -> float:
    """Expected calibration error (arXiv:1706.04599, equation 3): is the model right as often as it claims to be?

    A pair is judged with the confidence σ(|difference|), 0.5 … 1, and rightly if the difference is positive. In each
    of `n_bins` equal bins of confidence the share of right judgements is compared with the mean confidence.

    Args:
        margins: r_chosen − r_rejected, (P,). weights: (P,), which add up to 1.
    """
    confidence = margins.abs().sigmoid()  # (P,)
    bins = ((confidence - 0.5) * 2 * n_bins).long().clamp(0, n_bins - 1)  # (P,)
    excess = ((margins > 0).to(margins.dtype) - confidence) * weights  # (P,)
    return float(torch.zeros(n_bins, dtype=margins.dtype).index_add(0, bins, excess).abs().sum())


class RewardLoop(TrainingLoop):
    """The training loop with the figures of held-out preferences."""

    def evaluate(self) -> dict[str, float]:
        """See `preference_figures`."""
        mine = range(self.data_rank, len(self.val_data), self.ranks)
        with self.updater.autocast():
            parts = ranks.gather_objects(compare(self.model, self.val_data, mine, self.evaluation_batch_size))
        margins, weights = (torch.cat(tensors) for tensors in zip(*parts, strict=True))  # (P,), (P,)
        return {f"val_{name}": value for name, value in preference_figures(margins, weights).items()}


def load_data(
    config: RewardConfig, model: GPTConfig, tokenizer: ByteLevelBPETokenizer, quiet: bool = False
) -> tuple[PreferenceDataset, PreferenceDataset]:
    """The preferences to train on, and those held out; see `stage.load_parts`."""
    return load_parts(
        config,
        model,
        load_preferences,
        lambda preferences, account: PreferenceDataset(preferences, tokenizer, config.max_seq_len, account),
        "preferences",
        quiet=quiet,
    )


def train_reward_model(config: RewardConfig | None = None, **settings: Any) -> dict[str, float]:
    """Train a reward model on preference pairs; leaves `reward_best.pth`.

    Returns:
        the figures of the best model on held-out preferences, see `preference_figures`.
    """
    config = config or RewardConfig(**settings)
    backbone, tokenizer, device = open_stage(config)
    train_data, val_data = load_data(config, backbone.config, tokenizer)
    model, lengths = RewardModel(backbone, config.center_rewards_coefficient), train_data.lengths
    loop = RewardLoop(config, model, backbone.config, tokenizer, "reward", train_data, val_data, device, lengths)
    return run(
        loop,
        f"training a reward model on {len(train_data)} preferences, {loop.max_steps} steps",
        "reward model",
        lambda best: f"right on {best['val_accuracy']:.1%} of {len(val_data)} held-out pairs, calibration error "
        f"{best['val_calibration_error']:.3f}",
    )


def load_reward_model(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[RewardModel, ByteLevelBPETokenizer]:
    """A trained reward model (in eval mode) and its tokenizer.

    Raises:
        UserError: the file is missing, damaged or no reward model.
    """
    content = load_checkpoint(path)
    if content["stage"] != "reward":
        raise UserError(f"{path} is a {content['stage']} model; give one that finetune.py --mode reward wrote")
    model = restore_model(content, path, RewardModel)
    return model.to(device).eval(), tokenizer_of(content)
