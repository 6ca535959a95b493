"""Supervised fine-tuning: next-token prediction on the assistant's turns only, of the whole model or with LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint import load_model
from command_line import UserError, option, require_file
from data_loader import GPTSFTDataset, set_validation_part_aside
from gpt_model import GPTModel
from lora import LoRAOptions, apply_lora
from text.conversation_data import load_conversations
from training import ranks
from training.training_config import TrainingConfig, prepare_machine
from training.training_loop import TrainingLoop


@dataclass
class SFTConfig(LoRAOptions, TrainingConfig):
    """Settings of supervised fine-tuning."""

    data_path: str = option("data/sft/sft_data.json", "instruction data, see the README for its shapes")
    val_data_path: str = option("", "validation data; empty: --val_fraction of the training data")
    val_fraction: float = option(0.05, "share of the records set aside, if there is no validation data")
    pretrained_model: str = option("models/pretrain/pretrain_best.pth", "the checkpoint to start from")
    output_dir: str = option("models/sft", "folder for checkpoints, metrics and curves")
    max_seq_len: int = option(0, "longest conversation, in tokens; 0 means the model's context")
    optimizer: str = option("muon", "adamw, or muon for hidden matrices beside adamw", choices=("adamw", "muon"))
    batch_size: int = option(32, "conversations of one forward pass on one rank")
    lr: float = option(1.5e-3, "peak learning rate")
    epochs: float = option(4.0, "passes over the training data, if --max_steps is 0")
    lora_lr_scale: float = option(3.0, "the learning rate of adapters, as a multiple of --lr")
    neftune_alpha: float = option(0.0, "noise on the embeddings in training (NEFTune), such as 5; 0 for none")

    def validate(self) -> list[str]:
        """What is wrong with the settings, a sentence each."""
        complaints = super().validate()
        if not self.val_data_path and not 0 < self.val_fraction < 1:
            complaints.append(f"--val_fraction must be between 0 and 1, not {self.val_fraction}")
        if not 0 <= self.neftune_alpha < math.inf:
            complaints.append(f"--neftune_alpha must not be negative, not {self.neftune_alpha}")
        return complaints


def add_embedding_noise(model: GPTModel, alpha: float) -> None:
    """NEFTune (arXiv:2310.05914, algorithm 1): in training, embeddings (B, T, D) get noise U(−1, 1) · α / √(L · D).

    L is the number of tokens of each row, padding not counted: a row has the same noise in any batch.
    """

    def noisy(embedding: torch.nn.Embedding, arguments: tuple, embedded: torch.Tensor) -> torch.Tensor:
        if not embedding.training:
            return embedded
        lengths = arguments[0].ne(model.config.pad_token_id).sum(dim=1)[:, None, None]  # (B, 1, 1)
        size = alpha / (lengths * embedded.size(-1)).sqrt()
        return embedded + size * torch.empty_like(embedded).uniform_(-1, 1)  # (B, T, D)

    model.token_embedding.register_forward_hook(noisy)


def fit_context(config: TrainingConfig, model: GPTModel) -> None:
    """Settle `max_seq_len`: what the model can take, unless the user asked for less."""
    limit = model.config.max_seq_len
    if config.max_seq_len > limit:
        raise UserError(f"--max_seq_len {config.max_seq_len} is beyond the model's context of {limit}; lower it")
    config.max_seq_len = config.max_seq_len or limit


def sft_finetune(config: SFTConfig | None = None, **settings: Any) -> dict[str, float]:
    """Fine-tune a pretrained model on instruction data; leaves `sft_best.pth`.

    Args:
        config: the settings, or give them as keyword arguments.

    Returns:
        the metrics of the best model.
    """
    config = config or SFTConfig(**settings)
    require_file(config.pretrained_model, "the pretrained model", "run pretrain_trainer.py first, or check the path")
    device = prepare_machine(config)
    conversations = load_conversations(config.data_path)
    model, tokenizer, _ = load_model(config.pretrained_model)
    fit_context(config, model)
    apply_lora(model, config, config.pretrained_model)
    if config.neftune_alpha:
        add_embedding_noise(model, config.neftune_alpha)
    if config.val_data_path:
        val_conversations = load_conversations(config.val_data_path)
    else:
        conversations, val_conversations = set_validation_part_aside(conversations, config.val_fraction)
        if not conversations:
            raise UserError(f"{config.data_path} has too few records to set some aside; give --val_data_path")
    train_data = GPTSFTDataset(conversations, tokenizer, config.max_seq_len)
    loop = TrainingLoop(
        config,
        model,
        model.config,
        tokenizer,
        "sft",
        train_data,
        GPTSFTDataset(val_conversations, tokenizer, config.max_seq_len),
        device,
        lengths=train_data.lengths,
    )
    if ranks.is_main():
        left_out = f" ({train_data.n_dropped} too long, left out)" if train_data.n_dropped else ""
        size = f"{len(train_data)} conversations{left_out}, {loop.max_steps} steps"
        print(f"fine-tuning {config.pretrained_model} on {size}")
    best = loop.train()
    if ranks.is_main():
        print(
            f"fine-tuned: {loop.best_path}, validation loss {best['val_loss']:.4f} nats a token, {loop.seconds:.0f} s; "
            f"curves in {Path(config.output_dir) / 'curves.png'}"
        )
    return best
