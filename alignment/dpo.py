"""DPO: the policy learns preferences directly, without a reward model and without sampling (arXiv:2305.18290).

The policy is its own reward model: r(x, y) = β log π(y|x) / π_ref(y|x), where the reference π_ref is the policy before
training. What the reference thinks of every answer is computed once, before the first step, and kept with the data, so
that training needs no second model.

Shapes: N answers of T tokens, P pairs of a better and a worse answer among them, see `PreferenceDataset.collate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from alignment.log_probabilities import token_log_probs
from alignment.reward_model import split_preferences
from alignment.sft import fit_context
from checkpoint import load_model
from command_line import option, require_file
from data_loader import Batch, BatchOrder, GPTSFTDataset, PreferenceDataset, pad_rows
from gpt_model import IGNORED_LABEL, GPTModel
from lora import LoRAOptions, apply_lora
from text.conversation_data import load_conversations
from training import ranks
from training.training_config import TrainingConfig, prepare_machine
from training.training_loop import TrainingLoop


@dataclass
class DPOConfig(LoRAOptions, TrainingConfig):
    """Settings of DPO."""

    pairwise_data: str = option("data/sft/rlhf_pairwise.json", "preference data, see the README for its shapes")
    val_pairwise_data: str = option("", "held-out preferences; empty: --val_fraction of the training data")
    val_fraction: float = option(0.05, "share of the preferences set aside, if there are no held-out ones")
    sft_model: str = option("models/sft/sft_best.pth", "the checkpoint to start from, which is also the reference")
    output_dir: str = option("models/dpo", "folder for checkpoints, metrics and curves")
    sft_data: str = option("", "instruction data to keep learning from, so that nothing is forgotten; empty: none")
    sft_coef: float = option(1.0, "weight of the supervised loss on --sft_data")
    max_seq_len: int = option(0, "longest conversation, in tokens; 0 means the model's context")
    batch_size: int = option(32, "preferences of one forward pass on one rank")
    lr: float = option(5e-5, "peak learning rate")
    weight_decay: float = option(0.0, "decoupled weight decay of matrices")
    compile: str = option("false", "torch.compile; new lengths are compiled anew", choices=("auto", "true", "false"))
    epochs: float = option(1.0, "passes over the preferences, if --max_steps is 0")
    loss: str = option("sigmoid", "sigmoid (DPO) or ipo", choices=("sigmoid", "ipo"))
    beta: float = option(0.1, "β: how dear it is to move away from the reference")
    label_smoothing: float = option(0.0, "the share of preferences that are taken to be the wrong way round")
    rpo_alpha: float = option(1.0, "weight of the supervised loss on the better answers")

    def validate(self) -> list[str]:
        """What is wrong with the settings, a sentence each."""
        complaints = super().validate()
        if not 0 < self.beta < math.inf:
            complaints.append(f"--beta must be positive, not {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            complaints.append(f"--label_smoothing must be at least 0 and below 0.5, not {self.label_smoothing}")
        if self.label_smoothing and self.loss != "sigmoid":
            complaints.append(f"--label_smoothing is for --loss sigmoid, not {self.loss}")
        for name in ("sft_coef", "rpo_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                complaints.append(f"--{name} must not be negative, not {getattr(self, name)}")
        return complaints


def answer_log_probs(
    policy: GPTModel, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """log π(answer | prompt), the sum over the answer's tokens, and how many these are.

    Args:
        input_ids, attention_mask: (N, T).
        labels: (N, T), −100 on the prompt and on padding.

    Returns:
        (N,) fp32 in nats, (N,) int64.
    """
    answer = labels.ne(IGNORED_LABEL)  # (N, T)
    first = max(1, int(answer.any(dim=0).int().argmax()))  # before it, nothing of this batch is asked for
    log_probs, _ = token_log_probs(policy, input_ids, attention_mask, first=first)  # (N, T − first)
    answer = answer[:, first:]
    return (log_probs * answer).sum(dim=1), answer.sum(dim=1)


def dpo_loss(margins: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """−log σ(β Δ) (arXiv:2305.18290, equation 7). Where a share ε of the preferences is taken to be the wrong way
    round, −(1 − ε) log σ(β Δ) − ε log σ(−β Δ) (conservative DPO, https://ericmitchell.ai/cdpo.pdf).

    Args:
        margins: Δ = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x), (P,).
    """
    right, wrong = F.logsigmoid(beta * margins), F.logsigmoid(-beta * margins)  # (P,), (P,)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(margins: torch.Tensor, beta: float) -> torch.Tensor:
    """(Δ − 1/(2β))² (arXiv:2310.12036, equation 17, with τ for β): Δ has a goal, so that none is pushed to extremes.

    Args:
        margins: Δ as in `dpo_loss`, but of log-ratios a token, (P,): with sums, long answers would dominate the square.
            The paper leaves this open; TRL does the same and has asked its authors.
    """
    return (margins - 1 / (2 * beta)).square()


class DPOModel(nn.Module):
    """The policy and the loss of preferences."""

    def __init__(self, policy: GPTModel, config: DPOConfig) -> None:
        super().__init__()
        self.policy, self.dpo = policy, config
        policy.recompute_activations = config.recompute_activations

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        pairs: torch.Tensor,
        weights: torch.Tensor,
        reference_log_probs: torch.Tensor,
        sft_input_ids: torch.Tensor | None = None,
        sft_labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss, and figures by the names of TRL's, as weighted means over pairs.

        Args:
            input_ids, attention_mask, labels: (N, T); labels are −100 but for the answers.
            pairs: (P, 2), the rows of the better and of the worse answer; weights: (P,).
            reference_log_probs: (N,), of the answers.
            sft_input_ids, sft_labels: (B, T'), a batch of the instruction data, if it is mixed in.
        """
        log_probs, n_tokens = answer_log_probs(self.policy, input_ids, labels, attention_mask)  # (N,), (N,)
        ratios = log_probs - reference_log_probs  # (N,): log π / π_ref
        if self.dpo.loss == "ipo":
            better, worse = (ratios / n_tokens)[pairs].unbind(1)  # (P,), (P,)
            losses = ipo_loss(better - worse, self.dpo.beta)  # (P,)
        else:
            better, worse = ratios[pairs].unbind(1)  # (P,), (P,)
            losses = dpo_loss(better - worse, self.dpo.beta, self.dpo.label_smoothing)  # (P,)
        chosen, rejected = pairs.unbind(1)  # (P,), (P,)
        with torch.no_grad():
            rewards = self.dpo.beta * ratios  # (N,)
            figures = {
                "loss/dpo_avg": losses.detach(),
                "rewards/chosen": rewards[chosen],
                "rewards/rejected": rewards[rejected],
                "rewards/accuracies": (rewards[chosen] > rewards[rejected]).float(),
                "rewards/margins": rewards[chosen] - rewards[rejected],
                "logps/chosen": log_probs[chosen],
                "logps/rejected": log_probs[rejected],
            }
        if self.dpo.rpo_alpha:  # RPO, arXiv:2404.19733, equation 1: keeps the better answers likely themselves
            losses = losses - self.dpo.rpo_alpha * (log_probs / n_tokens)[chosen]
        means = {name: (x * weights).sum() / weights.sum() for name, x in {"loss": losses, **figures}.items()}
        if sft_input_ids is not None:
            log_probs, n_tokens = answer_log_probs(self.policy, sft_input_ids, sft_labels)  # (B,), (B,)
            means["loss/sft_avg"] = -(log_probs / n_tokens).mean()
            means["loss"] = means["loss"] + self.dpo.sft_coef * means["loss/sft_avg"]
        return means


class DPODataset(PreferenceDataset):
    """Preferences, and how likely each answer is to the reference."""

    @torch.no_grad()
    def ask_reference(self, reference: GPTModel, device: torch.device, batch_size: int) -> None:
        """Compute the log-probabilities of all answers and keep them; ranks share the work."""
        reference.eval()
        mine = self.samples[ranks.rank() :: ranks.world_size()]
        log_probs: list[float] = []
        for start in range(0, len(mine), batch_size):
            batch = super().collate(mine[start : start + batch_size])
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            labels = self._labels(mine[start : start + batch_size]).to(device)
            log_probs += answer_log_probs(reference, ids, labels, mask)[0].tolist()
        for rank, values in enumerate(ranks.gather_objects(log_probs)):
            following = iter(values)
            for sample in self.samples[rank :: ranks.world_size()]:
                sample["reference_log_probs"] = [next(following) for _ in sample["answers"]]

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """As `PreferenceDataset.collate`, but without margins; and "labels" (N, T), "reference_log_probs" (N,)."""
        batch = super().collate(samples)
        del batch["margins"]
        batch["labels"] = self._labels(samples)
        batch["reference_log_probs"] = torch.tensor([x for sample in samples for x in sample["reference_log_probs"]])
        return batch

    @staticmethod
    def _labels(samples: Sequence[dict[str, Any]]) -> torch.Tensor:
        rows = [labels for sample in samples for _, labels in sample["answers"]]
        return pad_rows(rows, IGNORED_LABEL)  # (N, T)


class DPOLoop(TrainingLoop):
    """The training loop with instruction data mixed in, if there is any."""

    shown = ("loss", "rewards/accuracies")

    def __init__(
        self,
        config: DPOConfig,
        policy: GPTModel,
        tokenizer: Any,
        train_data: DPODataset,
        val_data: DPODataset,
        device: torch.device,
        sft_data: GPTSFTDataset | None = None,
    ) -> None:
        model, lengths = DPOModel(policy, config), train_data.lengths
        super().__init__(config, model, policy.config, tokenizer, "dpo", train_data, val_data, device, lengths)
        with self.updater.autocast():  # nothing is trained yet, so the policy is the reference
            for data in (train_data, val_data):
                data.ask_reference(policy, device, config.batch_size)
        self.sft_data = sft_data
        if sft_data is not None:
            self.sft_order = BatchOrder(len(sft_data), self.global_batch(), config.seed, sft_data.lengths)

    def accumulate(self, batches: list[Batch], counts: list[int]) -> dict[str, float]:
        """As `TrainingLoop.accumulate`; to each micro-batch comes as much of the instruction data."""
        if self.sft_data is not None:
            indices, size = self.sft_order.batch(self.step), self.config.batch_size
            for number, batch in enumerate(batches):
                mine = indices[(number * self.ranks + self.data_rank) * size :][:size]
                instructions = self.sft_data.collate([self.sft_data[index] for index in mine])
                batch |= {f"sft_{name}": value for name, value in instructions.items()}
        return super().accumulate(batches, counts)

    def published_state(self) -> dict[str, torch.Tensor]:
        """The policy: a plain language model."""
        return {name.removeprefix("policy."): value for name, value in super().published_state().items()}


def without_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: policy and reference are to differ by what was learned, not by chance."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0


def dpo(config: DPOConfig | None = None, **settings: Any) -> dict[str, float]:
    """Align an SFT model with preferences, without a reward model; leaves `dpo_best.pth`.

    Returns:
        the metrics of the best policy, on held-out preferences.
    """
    config = config or DPOConfig(**settings)
    require_file(config.sft_model, "the SFT model", "run finetune.py --mode sft first, or check the path")
    device = prepare_machine(config)
    preferences, val_preferences = split_preferences(
        config.pairwise_data, config.val_pairwise_data, config.val_fraction
    )
    policy, tokenizer, _ = load_model(config.sft_model)
    fit_context(config, policy)
    without_dropout(policy)
    apply_lora(policy, config, config.sft_model)
    loop = DPOLoop(
        config,
        policy,
        tokenizer,
        DPODataset(preferences, tokenizer, config.max_seq_len),
        DPODataset(val_preferences, tokenizer, config.max_seq_len),
        device,
        GPTSFTDataset(load_conversations(config.sft_data), tokenizer, config.max_seq_len) if config.sft_data else None,
    )
    if ranks.is_main():
        print(f"DPO on {len(loop.train_data)} preferences, {loop.max_steps} steps")
    best = loop.train()
    if ranks.is_main():
        print(
            f"aligned: {loop.best_path}, prefers the better answer in {best['val_rewards/accuracies']:.1%} of "
            f"{len(loop.val_data)} held-out pairs, margin {best['val_rewards/margins']:.2f}, {loop.seconds:.0f} s; "
            f"curves in {Path(config.output_dir) / 'curves.png'}"
        )
    return best
