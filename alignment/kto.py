"""KTO: the policy learns from answers that are called good or bad, one by one, without pairs (arXiv:2402.01306).

As in DPO the policy is its own reward model: r(x, y) = β log π(y|x) / π_ref(y|x). A good answer is to gain, a bad one
to lose, against a point of reference: the divergence of the policy from the reference, which is estimated from answers
to other questions. Both sides saturate, so that an answer which is wrongly called good or bad pulls ever less.

Shapes: B answers of T tokens, see `UnpairedDataset.collate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from alignment.dpo import AnswersWithReference, DPOLoop
from alignment.log_probabilities import answer_log_probs
from alignment.stage import (
    InstructionsMixedIn,
    PreferenceData,
    StageConfig,
    load_instructions,
    load_parts,
    open_stage,
    run,
)
from command_line import option
from data_loader import Batch, UnpairedDataset
from gpt_model import GPTModel
from lora import LoRAOptions
from text.conversation_data import load_unpaired
from training import ranks


@dataclass
class KTOConfig(PreferenceData, InstructionsMixedIn, LoRAOptions, StageConfig):
    """Settings of KTO. `pairwise_data` takes unpaired records, and pairs, whose answers then stand each for itself."""

    output_dir: str = "models/kto"
    lr: float = 5e-5
    weight_decay: float = 0.0
    compile: str = "false"
    beta: float = option(0.1, "β: how soon an answer has gained or lost enough", above=0)
    desirable_weight: float = option(1.0, "λ_D: weight of the good answers", at_least=0)
    undesirable_weight: float = option(1.0, "λ_U: weight of the bad answers", at_least=0)


def kto_loss(
    log_ratios: torch.Tensor, good: torch.Tensor, kl: torch.Tensor, beta: float, weights: tuple[float, float]
) -> torch.Tensor:
    """λ_D (1 − σ(β (ρ − z))) for good answers and λ_U (1 − σ(β (z − ρ))) for bad ones (arXiv:2402.01306, equation 8).

    Args:
        log_ratios: ρ = log π(y|x)/π_ref(y|x), (B,). good: (B,) bool.
        kl: z ≥ 0, the divergence of the policy from the reference in nats; a point of reference without gradient.
        weights: λ_D, λ_U.
    """
    gains = torch.where(good, log_ratios - kl, kl - log_ratios)  # (B,)
    return torch.where(good, *weights) * (1 - (beta * gains).sigmoid())


class KTOModel(nn.Module):
    """The policy and the loss of answers that are good or bad."""

    def __init__(self, policy: GPTModel, config: KTOConfig) -> None:
        super().__init__()
        self.policy, self.kto = policy, config
        self.register_buffer("kl", torch.zeros(()), persistent=False)  # z, which `KTOLoop` estimates

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        good: torch.Tensor,
        reference_log_probs: torch.Tensor,
        places: torch.Tensor | None = None,
        sft_input_ids: torch.Tensor | None = None,
        sft_labels: torch.Tensor | None = None,
        sft_places: torch.Tensor | None = None,
        **others: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The loss and figures, all of them means over the B answers; see `of_each_kind`.

        Args:
            input_ids, attention_mask, labels: (B, T); labels are −100 but for the answers.
            good: (B,) bool. reference_log_probs: (B,), of the answers.
            sft_input_ids, sft_labels: (B', T'), a batch of the instruction data, if it is mixed in.
            places, sft_places: where the labels are, see `with_places`; None: they are looked for.
            others: answers to other questions, which the estimate of the divergence is made from.
        """
        config = self.kto
        log_probs, _ = answer_log_probs(self.policy, input_ids, labels, attention_mask, places)  # (B,)
        log_ratios = log_probs - reference_log_probs  # (B,)
        weights = config.desirable_weight, config.undesirable_weight
        loss = kto_loss(log_ratios, good, self.kl, config.beta, weights).mean()
        with torch.no_grad():
            figures = {"loss/kto_avg": loss.detach(), "kl": self.kl.clone()}
            for kind, those in (("chosen", good.float()), ("rejected", 1 - good.float())):
                figures[f"share/{kind}"] = those.mean()
                figures[f"rewards/{kind}"] = (config.beta * log_ratios * those).mean()
                figures[f"logps/{kind}"] = (log_probs * those).mean()
        if sft_input_ids is not None:
            log_probs, n_tokens = answer_log_probs(self.policy, sft_input_ids, sft_labels, places=sft_places)
            figures["loss/sft_avg"] = -(log_probs / n_tokens).mean()
            loss = loss + config.sft_coef * figures["loss/sft_avg"]
        return {"loss": loss, **figures}


def of_each_kind(figures: dict[str, float], prefix: str = "") -> dict[str, float]:
    """Figures of the whole batch, with those of good and of bad answers as means over these; names as TRL's.

    Good answers are "chosen" and bad ones "rejected"; of a kind that the batch does not have nothing is said.
    """
    figures = dict(figures)
    for kind in ("chosen", "rejected"):
        share = figures.pop(f"{prefix}share/{kind}")
        for name in (f"{prefix}rewards/{kind}", f"{prefix}logps/{kind}"):
            figures[name] /= share or float("nan")
    margin = figures[f"{prefix}rewards/chosen"] - figures[f"{prefix}rewards/rejected"]
    return {name: value for name, value in {**figures, f"{prefix}rewards/margins": margin}.items() if value == value}


class KTODataset(AnswersWithReference, UnpairedDataset):
    """Good and bad answers, asked of the reference."""

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """As `UnpairedDataset.collate`; and "reference_log_probs", "other_reference_log_probs": (B,)."""
        own, other = zip(*(sample["reference_log_probs"] for sample in samples), strict=True)
        log_probs = {"reference_log_probs": torch.tensor(own), "other_reference_log_probs": torch.tensor(other)}
        return super().collate(samples) | log_probs


class KTOLoop(DPOLoop):
    """DPO's loop, with an estimate of the divergence before every step and every evaluation.

    It is one number for the whole global batch, so that accumulation and ranks change nothing.
    """

    algorithm, model_class = "kto", KTOModel
    shown = ("loss", "kl")

    @torch.no_grad()
    def estimate_kl(self, batches: Iterable[Batch]) -> None:
        """z = max(0, mean of log π(y'|x)/π_ref(y'|x)) over prompts x with others' answers y', those of all ranks."""
        total, n_answers = torch.zeros((), device=self.device), 0
        for batch in map(self._to_device, batches):
            rows = {name: batch[f"other_{name}"] for name in ("input_ids", "labels", "attention_mask", "places")}
            with self.updater.autocast():
                log_probs, _ = answer_log_probs(self.model.policy, **rows)  # (B,)
            total += (log_probs - batch["other_reference_log_probs"]).sum()
            n_answers += len(log_probs)
        mean = ranks.tensor_over_ranks(total) / self.parallel_model.sum(float(n_answers))
        self.model.kl.copy_(mean.clamp(min=0))  # it never leaves the device

    def accumulate(self, batches: list[Batch], counts: list[int]) -> dict[str, torch.Tensor]:
        """As `DPOLoop.accumulate`, after the estimate."""
        self.estimate_kl(batches)
        return super().accumulate(batches, counts)

    def means(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """See `of_each_kind`."""
        return of_each_kind(super().means(sums))

    def evaluate(self) -> dict[str, float]:
        """As `TrainingLoop.evaluate`, with the divergence over all held-out prompts."""
        self.parallel_model.eval()
        mine, size = range(self.data_rank, len(self.val_data), self.ranks), self.evaluation_batch_size
        parts = (mine[start : start + size] for start in range(0, len(mine), size))
        self.estimate_kl(self.val_data.collate([self.val_data[index] for index in part]) for part in parts)
        return of_each_kind(super().evaluate(), "val_")


def kto(config: KTOConfig | None = None, **settings: Any) -> dict[str, float]:
    """Align an SFT model with answers that are called good or bad; leaves `kto_best.pth`.

    Returns:
        the metrics of the best policy, on held-out answers.
    """
    config = config or KTOConfig(**settings)
    policy, tokenizer, device = open_stage(config)
    data = load_parts(
        config,
        policy.config,
        load_unpaired,
        lambda records, account: KTODataset(records, tokenizer, config.max_seq_len, account),
        "records",
    )
    sft_data = load_instructions(config, tokenizer, policy.config)
    loop = KTOLoop(config, policy, tokenizer, *data, device, sft_data)
    n_answers = len(loop.train_data)
    n_good = sum(sample["good"] for sample in loop.train_data.samples)
    return run(
        loop,
        f"KTO on {n_good} good and {n_answers - n_good} bad answers, {loop.max_steps} steps",
        "aligned",
        lambda best: f"held-out loss {best['val_loss']:.4f}, margin {best.get('val_rewards/margins', 0.0):.2f}, KL "
        f"{best['val_kl']:.2f} nats an answer",
    )
