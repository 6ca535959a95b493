"""DPO: the policy learns preferences directly, without a reward model and without sampling (arXiv:2305.18290).

The policy is its own reward model: r(x, y) = β log π(y|x) / π_ref(y|x), where the reference π_ref is the policy before
training. What the reference thinks of every answer is computed once, before the first step, and kept with the data, so
that training needs no second model.

Shapes: N answers of T tokens, P pairs of a better and a worse answer among them, see `PreferenceDataset.collate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from alignment.log_probabilities import answer_log_probs, with_places
from alignment.stage import (
    InstructionsMixedIn,
    PreferenceData,
    StageConfig,
    load_instructions,
    load_parts,
    mix_in,
    open_stage,
    run,
)
from byte_level_bpe import IGNORED_LABEL
from command_line import option
from data_loader import (
    Batch,
    GPTSFTDataset,
    PreferenceDataset,
    length_multiple,
    lengthened,
    pad_rows,
    pad_samples,
)
from gpt_model import GPTModel
from lora import LoRAOptions, lora_layers
from progress import tracked
from text.conversation_data import load_preferences
from training import ranks
from training.training_loop import TrainingLoop


@dataclass
class DPOConfig(PreferenceData, InstructionsMixedIn, LoRAOptions, StageConfig):
    """Settings of DPO."""

    output_dir: str = "models/dpo"
    lr: float = 5e-5
    weight_decay: float = 0.0
    compile: str = "false"
    loss: str = option("sigmoid", "sigmoid (DPO) or ipo", choices=("sigmoid", "ipo"))
    beta: float = option(0.1, "β: how dear it is to move away from the reference", above=0)
    label_smoothing: float = option(0.0, "share of preferences taken to be the wrong way round", at_least=0, below=0.5)
    rpo_alpha: float = option(1.0, "weight of the supervised loss on the better answers", at_least=0)

    def validate(self) -> list[str]:
        """What does not fit together, a sentence each."""
        complaints = super().validate()
        if self.label_smoothing and self.loss != "sigmoid":
            complaints.append(f"--label_smoothing is for --loss sigmoid, not {self.loss}")
        return complaints


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

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        pairs: torch.Tensor,
        weights: torch.Tensor,
        reference_log_probs: torch.Tensor,
        places: torch.Tensor | None = None,
        sft_input_ids: torch.Tensor | None = None,
        sft_labels: torch.Tensor | None = None,
        sft_places: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss, and figures by the names of TRL's, as weighted means over pairs.

        Args:
            input_ids, attention_mask, labels: (N, T); labels are −100 but for the answers.
            pairs: (P, 2), the rows of the better and of the worse answer; weights: (P,).
            reference_log_probs: (N,), of the answers.
            sft_input_ids, sft_labels: (B, T'), a batch of the instruction data, if it is mixed in.
            places, sft_places: where the labels are, see `with_places`; None: they are looked for.
        """
        log_probs, n_tokens = answer_log_probs(self.policy, input_ids, labels, attention_mask, places)  # (N,), (N,)
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
            log_probs, n_tokens = answer_log_probs(self.policy, sft_input_ids, sft_labels, places=sft_places)
            means["loss/sft_avg"] = -(log_probs / n_tokens).mean()
            means["loss"] = means["loss"] + self.dpo.sft_coef * means["loss/sft_avg"]
        return means


class AnswersWithReference:
    """A data set whose samples have "answers", (ids, labels) each, and how likely each of them is to the reference."""

    @torch.no_grad()
    def ask_reference(self, reference: GPTModel, device: torch.device, batch_size: int) -> None:
        """Compute the log-probabilities of all answers and keep them; ranks share the work."""
        reference.eval()
        mine = self.samples[ranks.rank() :: ranks.world_size()]
        log_probs: list[float] = []
        starts = range(0, len(mine), batch_size)
        for start in tracked(starts, "asking the reference", "batch", shown=ranks.is_main()):
            rows = [answer for sample in mine[start : start + batch_size] for answer in sample["answers"]]
            batch = pad_samples(rows, self.pad_token_id)
            batch = lengthened(batch, length_multiple(device), self.pad_token_id, reference.config.max_seq_len)
            batch = {name: value.to(device) for name, value in with_places(batch).items()}
            log_probs += answer_log_probs(reference, **batch)[0].tolist()
        for rank, values in enumerate(ranks.gather_objects(log_probs)):
            following = iter(values)
            for sample in self.samples[rank :: ranks.world_size()]:
                sample["reference_log_probs"] = [next(following) for _ in sample["answers"]]


class DPODataset(AnswersWithReference, PreferenceDataset):
    """Preferences, asked of the reference."""

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """As `PreferenceDataset.collate`, but without margins; and "labels" (N, T), "reference_log_probs" (N,)."""
        batch = super().collate(samples)
        del batch["margins"]
        labels = pad_rows([labels for sample in samples for _, labels in sample["answers"]], IGNORED_LABEL)  # (N, T)
        reference_log_probs = torch.tensor([x for sample in samples for x in sample["reference_log_probs"]])  # (N,)
        return {**batch, "labels": labels, "reference_log_probs": reference_log_probs}


class DPOLoop(TrainingLoop):
    """The training loop with instruction data mixed in, if there is any."""

    algorithm, model_class = "dpo", DPOModel
    shown = ("loss", "rewards/accuracies")
    published = "policy"

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
        without_dropout(policy)
        model, stage, lengths = self.model_class(policy, config), self.algorithm, train_data.lengths
        super().__init__(config, model, policy.config, tokenizer, stage, train_data, val_data, device, lengths)
        with self.updater.autocast():  # nothing is trained yet, so the policy is the reference
            for data in (train_data, val_data):
                data.ask_reference(policy, device, config.batch_size)
        self.instructions = mix_in(self, sft_data)

    def prepared(self, batch: Batch) -> Batch:
        """With the places of the labels, which a GPU would have to be waited for."""
        return with_places(super().prepared(batch))

    def batches_of(self, step: int) -> list[Batch]:
        """As `TrainingLoop.batches_of`; to each micro-batch comes as much of the instruction data."""
        batches = super().batches_of(step)
        if self.instructions is not None:
            indices, size = self.instructions.order.batch(step), self.micro_batch_size
            for number, batch in enumerate(batches):
                batch |= self.instructions.batch(indices[(number * self.ranks + self.data_rank) * size :][:size])
        return batches

    def largest_batch(self, n_samples: int) -> Batch:
        """As `TrainingLoop.largest_batch`, with as much of the instruction data."""
        batch = super().largest_batch(n_samples)
        if self.instructions is not None:
            data = self.instructions.data
            longest = max(range(len(data)), key=data.lengths.__getitem__)
            batch |= self.instructions.batch([longest] * n_samples)
        return batch


def without_dropout(model: nn.Module) -> None:
    """Set every dropout but the adapters' to 0: policy and reference are to differ by what was learned alone."""
    asked_for = {layer.dropout for layer in lora_layers(model).values()}
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module not in asked_for:
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0


def dpo(config: DPOConfig | None = None, **settings: Any) -> dict[str, float]:
    """Align an SFT model with preferences, without a reward model; leaves `dpo_best.pth`.

    Returns:
        the metrics of the best policy, on held-out preferences.
    """
    config = config or DPOConfig(**settings)
    policy, tokenizer, device = open_stage(config)
    data = load_parts(
        config,
        policy.config,
        load_preferences,
        lambda preferences, account: DPODataset(preferences, tokenizer, config.max_seq_len, account),
        "preferences",
    )
    sft_data = load_instructions(config, tokenizer, policy.config)
    loop = DPOLoop(config, policy, tokenizer, *data, device, sft_data)
    return run(
        loop,
        f"DPO on {len(loop.train_data)} preferences, {loop.max_steps} steps",
        "aligned",
        lambda best: f"prefers the better answer in {best['val_rewards/accuracies']:.1%} of {len(loop.val_data)} "
        f"held-out pairs, margin {best['val_rewards/margins']:.2f}",
    )
