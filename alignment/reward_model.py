"""The reward model: how good is an answer, learned from pairs of a chosen and a rejected one.

Bradley–Terry: P(chosen beats rejected) = σ(r_chosen − r_rejected); see arXiv:1706.03741 and InstructGPT,
arXiv:2203.02155, equation 1.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

import distributed
from alignment.sft import fit_context
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import config_of, load_checkpoint, load_model, load_weights, tokenizer_of
from command_line import UserError, option, require_file
from conversation_data import load_pairs
from data_loader import PairDataset, set_validation_part_aside
from gpt_model import GPTModel
from training_config import TrainingConfig, prepare_machine
from training_loop import TrainingLoop


class RewardModel(nn.Module):
    """A GPT whose vocabulary head is replaced by one number a token.

    The backbone is a copy: a policy that starts from the same weights is trained without touching this model.

    Args:
        backbone: the model to start from, usually the SFT model.
    """

    def __init__(self, backbone: GPTModel) -> None:
        super().__init__()
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

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss of pairs: the first half of the (2B, T) rows are the chosen answers, the second the rejected ones.

        Returns:
            {"loss": −log σ(r_chosen − r_rejected), "accuracy": the share of positive margins (both means over pairs),
            "margins": r_chosen − r_rejected, (B,)}
        """
        chosen, rejected = self.rewards(input_ids, attention_mask).chunk(2)  # (B,), (B,)
        margins = chosen - rejected  # (B,)
        return {"loss": -F.logsigmoid(margins).mean(), "accuracy": (margins > 0).float().mean(), "margins": margins}


@dataclass
class RewardConfig(TrainingConfig):
    """Settings of reward-model training."""

    pairwise_data: str = option("data/sft/rlhf_pairwise.json", "preference data, see the README for its shapes")
    val_pairwise_data: str = option("", "held-out preferences; empty: --val_fraction of the training data")
    val_fraction: float = option(0.05, "share of the pairs set aside, if there are no held-out preferences")
    sft_model: str = option("models/sft/sft_best.pth", "the checkpoint to start from")
    output_dir: str = option("models/reward", "folder for checkpoints, metrics and curves")
    max_seq_len: int = option(0, "longest conversation, in tokens; 0 means the model's context")
    optimizer: str = option("muon", "adamw, or muon for hidden matrices beside adamw", choices=("adamw", "muon"))
    batch_size: int = option(32, "pairs of one forward pass on one rank")
    lr: float = option(4e-4, "peak learning rate")
    epochs: float = option(1.0, "passes over the training data, if --max_steps is 0")


def split_pairs(path: str, val_path: str, val_fraction: float) -> tuple[list[dict], list[dict]]:
    """Training and held-out pairs: from two files, or by setting a share of one aside."""
    pairs = load_pairs(path)
    if val_path:
        return pairs, load_pairs(val_path)
    train_pairs, val_pairs = set_validation_part_aside(pairs, val_fraction)
    if not (train_pairs and val_pairs):
        raise UserError(f"{path} has too few pairs to set some aside; give --val_pairwise_data or more pairs")
    return train_pairs, val_pairs


@torch.no_grad()
def pair_accuracy(model: RewardModel, data: PairDataset, device: torch.device, batch_size: int = 64) -> float:
    """The share of pairs whose chosen answer has the higher reward."""
    right = 0
    model.eval()
    for start in range(0, len(data), batch_size):
        samples = [data[index] for index in range(start, min(start + batch_size, len(data)))]
        batch = {key: value.to(device) for key, value in data.collate(samples).items()}
        right += int((model(**batch)["margins"] > 0).sum())
    return right / len(data)


def train_reward_model(config: RewardConfig | None = None, **settings: Any) -> dict[str, float]:
    """Train a reward model on preference pairs; leaves `reward_best.pth`.

    Returns:
        the metrics of the best model: `val_loss` and `val_accuracy` on held-out pairs.
    """
    config = config or RewardConfig(**settings)
    require_file(config.sft_model, "the SFT model", "run finetune.py --mode sft first, or check the path")
    device = prepare_machine(config)
    pairs, val_pairs = split_pairs(config.pairwise_data, config.val_pairwise_data, config.val_fraction)
    backbone, tokenizer, _ = load_model(config.sft_model)
    fit_context(config, backbone)
    train_data = PairDataset(pairs, tokenizer, config.max_seq_len)
    val_data = PairDataset(val_pairs, tokenizer, config.max_seq_len)
    model = RewardModel(backbone)
    loop = TrainingLoop(
        config,
        model,
        backbone.config,
        tokenizer,
        "reward",
        train_data,
        val_data,
        device,
        lengths=train_data.lengths,
    )
    if distributed.is_main():
        print(f"training a reward model on {len(train_data)} pairs, {loop.max_steps} steps")
    best = loop.train()
    if distributed.is_main():
        print(
            f"reward model: {loop.best_path}, right on {best['val_accuracy']:.1%} of {len(val_data)} held-out pairs, "
            f"{loop.seconds:.0f} s; curves in {Path(config.output_dir) / 'curves.png'}"
        )
    return best


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
    model = RewardModel(GPTModel.from_config(config_of(content, path)))
    load_weights(model, content["model"], path)
    return model.to(device).eval(), tokenizer_of(content)
