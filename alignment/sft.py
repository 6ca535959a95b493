"""Supervised fine-tuning: next-token prediction on the assistant's turns only, of the whole model or with LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from alignment.stage import InstructionData, StageConfig, load_parts, open_stage, run
from byte_level_bpe import ByteLevelBPETokenizer
from command_line import option
from data_loader import GPTSFTDataset, PackedDataset
from gpt_model import GPTConfig, GPTModel
from lora import LoRAOptions
from text.conversation_data import load_conversations
from training.training_loop import TrainingLoop


@dataclass
class SFTConfig(InstructionData, LoRAOptions, StageConfig):
    """Settings of supervised fine-tuning."""

    start: ClassVar = ("pretrained_model", "the pretrained model", "run pretrain_trainer.py first")
    pretrained_model: str = option(
        "models/pretrain/pretrain_best.pth", "the checkpoint to start from", reads="model"
    )
    output_dir: str = "models/sft"
    optimizer: str = "muon"
    lr: float = 1.5e-3
    epochs: float = 4.0
    lora_lr_scale: float = 3.0
    lora_targets: str = "all,embedding"  # docs/lora.md says what the embedding brings
    packing: bool = option(False, "several conversations in a row of --max_seq_len tokens, each as if it were alone")
    neftune_alpha: float = option(0.0, "noise on embeddings in training (NEFTune), such as 5; 0: none", at_least=0)

    def validate(self) -> list[str]:
        """What is wrong with the settings, a sentence each."""
        complaints = super().validate()
        if self.packing and self.neftune_alpha:
            complaints.append("--packing does not go with --neftune_alpha, which goes by the length of a row; drop one")
        if self.packing and "pp" in self.parallel:
            complaints.append("--packing does not go with --parallel pp; drop one")
        return complaints


def add_embedding_noise(model: GPTModel, alpha: float) -> None:
    """NEFTune (arXiv:2310.05914, algorithm 1): in training, embeddings (B, T, D) get noise U(−1, 1) · α / √(L · D).

    L is the number of tokens of each row, padding not counted: a row has the same noise in any batch.
    """

    def noisy(embedding: torch.nn.Embedding, arguments: tuple, embedded: torch.Tensor) -> torch.Tensor:
        if not embedding.training:
            return embedded
        seen = arguments[0].ne(model.config.pad_token_id)  # (B, T); inside a row the same token may end a turn
        lengths = seen.flip(1).cumsum(dim=1).gt(0).sum(dim=1)[:, None, None]  # (B, 1, 1)
        size = alpha / (lengths * embedded.size(-1)).sqrt()
        return embedded + size * torch.empty_like(embedded).uniform_(-1, 1)  # (B, T, D)

    model.token_embedding.register_forward_hook(noisy)


def load_data(
    config: SFTConfig, model: GPTConfig, tokenizer: ByteLevelBPETokenizer, quiet: bool = False
) -> tuple[GPTSFTDataset, GPTSFTDataset]:
    """The conversations to train on, and those held out; see `stage.load_parts`."""
    return load_parts(
        config,
        model,
        load_conversations,
        lambda conversations, account: GPTSFTDataset(conversations, tokenizer, config.max_seq_len, account),
        "conversations",
        quiet=quiet,
    )


def sft_finetune(config: SFTConfig | None = None, **settings: Any) -> dict[str, float]:
    """Fine-tune a pretrained model on instruction data; leaves `sft_best.pth`.

    Args:
        config: the settings, or give them as keyword arguments.

    Returns:
        the metrics of the best model.
    """
    config = config or SFTConfig(**settings)
    model, tokenizer, device = open_stage(config)
    if config.neftune_alpha:
        add_embedding_noise(model, config.neftune_alpha)
    train_data, val_data = load_data(config, model.config, tokenizer)
    n_conversations = len(train_data)
    if config.packing:
        train_data, val_data = (PackedDataset(part, config.max_seq_len) for part in (train_data, val_data))
        print(
            f"packed: {n_conversations} conversations in {len(train_data)} rows of {config.max_seq_len} tokens, "
            f"{train_data.waste:.1%} of them padding",
            flush=True,
        )
    loop = TrainingLoop(
        config, model, model.config, tokenizer, "sft", train_data, val_data, device, lengths=train_data.lengths
    )
    return run(
        loop,
        f"fine-tuning {config.pretrained_model} on {n_conversations} conversations, {loop.max_steps} steps",
        "fine-tuned",
        lambda best: f"validation loss {best['val_loss']:.4f} nats a token",
    )
