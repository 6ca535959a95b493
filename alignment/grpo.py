"""GRPO: the policy writes several answers to each prompt, a function scores them, and the better ones become likelier.

Group Relative Policy Optimization (DeepSeekMath, arXiv:2402.03300) is PPO without a critic: what an answer is worth is
measured against the other answers of its group, those to the same prompt. The reward is a Python function of yours:

    def reward(prompts: list[str], responses: list[str], records: list[dict]) -> list[float]: ...

    python finetune.py --mode grpo --data_path questions.json --reward my_rewards.py:reward

`prompts` are the user's last words, `responses` what the policy wrote (without special tokens), `records` the data's
JSON records, in which a function finds the right answer, test cases or whatever else it needs. It returns a number for
each response, the more the better, and is called with `batch_size` responses at a time.

What later work has settled on are options: advantages without the standard deviation (Dr. GRPO, arXiv:2503.20783) or
with that of the whole batch (arXiv:2508.08221), a mean over tokens, and a wider clip upwards (DAPO, arXiv:2503.14476).

Shapes: B answers (whole groups of G), P prompt tokens (padded on the left), R answer tokens, T = P + R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn

from alignment.reward_function import SAMPLE_REWARD, RewardFunction, call_reward, load_reward, parse_place
from alignment.rollouts import (
    RolloutConfig,
    RolloutLoop,
    advice_on_prompts,
    answer_token_log_probs,
    kl_terms,
    masked_mean,
    policy_figures,
    room_for_prompts,
)
from alignment.stage import InstructionData, load_parts, open_stage, run
from byte_level_bpe import ByteLevelBPETokenizer
from command_line import option
from data_loader import Batch, GPTPPODataset
from gpt_model import GPTModel
from text.account import Account
from text.chat_template import Message
from text.conversation_data import load_tasks
from training import ranks
from training.run_identity import Inputs, content_fingerprint


@dataclass
class GRPOConfig(InstructionData, RolloutConfig):
    """Settings of GRPO. A step is one batch of fresh answers and the updates that are made with them."""

    models_in_memory: ClassVar = (1, 1)  # policy and reference
    val_fraction: float = 0.02
    reward: str = option(SAMPLE_REWARD, "PATH.py:FUNCTION(prompts, responses, records)")
    output_dir: str = "models/grpo"
    rollout_batch_size: int = 128
    batch_size: int = 128
    lr: float = 5e-5
    epochs: float = 0.1
    group_size: int = option(8, "G: answers to each prompt", at_least=2)
    grpo_epochs: int = option(2, "passes over the answers of a step", at_least=1)
    advantage_scale: str = option(
        "group", "advantages are divided by the standard deviation of", choices=("group", "batch", "none")
    )
    loss_mean: str = option(
        "tokens",
        "each token weighs the same (tokens), or each answer (answers), or a token 1 / --max_gen_len (constant)",
        choices=("tokens", "answers", "constant"),
    )
    kl_coef: float = option(0.2, "β: weight of the divergence from the SFT model; 0: no reference", at_least=0)
    clip_low: float = option(0.2, "the probability ratio is clipped to at least 1 − this", above=0, below=1)
    clip_high: float = option(0.28, "the probability ratio is clipped to at most 1 + this", above=0)

    def validate(self) -> list[str]:
        """What does not fit together, a sentence each."""
        complaints = super().validate()
        if self.rollout_batch_size % max(1, self.group_size):
            complaints.append(
                f"--rollout_batch_size {self.rollout_batch_size} must be a multiple of --group_size {self.group_size}"
            )
        return complaints


class GroupPolicy(nn.Module):
    """The policy and GRPO's loss."""

    def __init__(self, policy: GPTModel, config: GRPOConfig) -> None:
        super().__init__()
        self.policy, self.grpo = policy, config

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        answer_mask: torch.Tensor,
        old_log_probs: torch.Tensor,
        advantages: torch.Tensor,
        reference_log_probs: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """GRPO's loss, a mean over tokens or answers (arXiv:2402.03300, equation 3).

        Args:
            input_ids, attention_mask: (B, T).
            answer_mask: (B, R) bool, the tokens that the policy wrote.
            old_log_probs: (B, R), of the policy that wrote the answers.
            advantages: (B,).
            reference_log_probs: (B, R), or None if divergence costs nothing.
            places: see `answer_token_log_probs`.
        """
        config, mask = self.grpo, answer_mask
        answers = {"input_ids": input_ids, "attention_mask": attention_mask, "answer_mask": answer_mask}
        answers |= {} if places is None else {"places": places}
        log_probs, entropy = answer_token_log_probs(self.policy, answers, config.temperature, with_entropy=True)

        ratio = (log_probs - old_log_probs).exp()  # (B, R)
        clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        advantages = advantages.unsqueeze(1)  # (B, 1): every token of an answer has the answer's
        losses = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)  # (B, R)
        figures = {"loss/policy_avg": self.mean(losses, mask)}
        loss = figures["loss/policy_avg"]
        if reference_log_probs is not None:  # the divergence is part of the loss, not of the reward (equation 4: k3)
            figures["loss/kl_avg"] = self.mean(kl_terms(log_probs, reference_log_probs, "k3"), mask)
            loss = loss + config.kl_coef * figures["loss/kl_avg"]
        with torch.no_grad():
            clipped = (ratio < 1 - config.clip_low) & (advantages < 0) | (ratio > 1 + config.clip_high) & (
                advantages > 0
            )
            figures |= {
                **policy_figures(old_log_probs, log_probs, entropy, mask),
                "policy/clipfrac_avg": masked_mean(clipped.float(), mask),
            }
        return {"loss": loss, **figures}

    def mean(self, losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The mean of token losses (B, R) that `--loss_mean` asks for."""
        if self.grpo.loss_mean == "tokens":  # arXiv:2503.14476, equation 8: long answers count for their length
            return masked_mean(losses, mask)
        n_tokens = mask.sum(dim=1) if self.grpo.loss_mean == "answers" else self.grpo.max_gen_len
        return ((losses * mask).sum(dim=1) / n_tokens).mean()  # "constant": arXiv:2503.20783, appendix A


def group_advantages(scores: torch.Tensor, group_size: int, scale: str, batch_std: float = 1.0) -> torch.Tensor:
    """How much better each answer is than its group: (B,) → (B,), the answers of a group standing together.

    group: (r − mean) / std of the group (arXiv:2402.03300, section 4.1.2); batch: / std of all scores
    (arXiv:2508.08221); none: r − mean (arXiv:2503.20783: dividing gives more weight to prompts that are nearly always,
    or nearly never, answered well). Where a group differs by rounding alone, all of its advantages are 0.
    """
    groups = scores.view(-1, group_size)  # (B / G, G)
    centred = (groups - groups.mean(dim=1, keepdim=True)) * ~alike(groups).unsqueeze(1)
    spread = {"group": groups.std(dim=1, keepdim=True) + 1e-4, "batch": batch_std + 1e-4, "none": 1.0}[scale]
    return (centred / spread).flatten().float()


def alike(groups: torch.Tensor) -> torch.Tensor:
    """Which groups of scores (N, G) differ by rounding alone: (N,) bool."""
    return groups.amax(dim=1) - groups.amin(dim=1) <= 1e-6 * groups.abs().amax(dim=1)


class RecordDataset(GPTPPODataset):
    """The prompts of records, each beside the record that a reward function may need.

    Args:
        tasks: prompts and records, as `conversation_data.parse_task` gives them.

    Raises:
        UserError: no prompt leaves room for an answer.
    """

    parallel = ("samples", "questions", "records")

    def __init__(
        self,
        tasks: Sequence[tuple[list[Message], dict]],
        tokenizer: ByteLevelBPETokenizer,
        max_prompt_len: int,
        account: Account | None = None,
    ) -> None:
        super().__init__([prompt for prompt, _ in tasks], tokenizer, max_prompt_len, account)
        self.questions = [tasks[place][0][-1]["content"] for place in self.places]
        self.records = [tasks[place][1] for place in self.places]


class GRPOLoop(RolloutLoop):
    """The training loop with GRPO's step: groups of answers, their scores, and several updates."""

    def __init__(
        self,
        config: GRPOConfig,
        policy: GPTModel,
        tokenizer: ByteLevelBPETokenizer,
        reward: RewardFunction,
        data: RecordDataset,
        val_data: RecordDataset,
        device: torch.device,
    ) -> None:
        self.reward, self.group_size = reward, config.group_size
        model = GroupPolicy(policy, config)
        super().__init__(config, model, "grpo", tokenizer, data, val_data, device, needs_reference=config.kl_coef > 0)
        if not self.needs_reference:
            self.shown = ("objective/scores", "objective/ended")

    def inputs(self) -> Inputs:
        """What the result depends on, the text of the reward function's file among it."""
        path, name = parse_place(self.config.reward)
        return {**super().inputs(), "reward": [self.config.reward, f"{content_fingerprint([path])} {name}"]}

    def judge(self, data: RecordDataset, answers: Batch, on_device: Batch) -> Batch:
        """ "scores" (B,), "old_log_probs" and, if there is a reference, "reference_log_probs" and "kl" (B, R)."""
        log_probs = self.log_probs(on_device)  # (B, R)
        figures = {"old_log_probs": log_probs, "scores": self.scores(data, answers)}
        if self.needs_reference:
            figures["reference_log_probs"] = self.reference_log_probs(on_device)
            figures["kl"] = kl_terms(log_probs, figures["reference_log_probs"], "k3")
        return figures

    def scores(self, data: RecordDataset, answers: Batch) -> torch.Tensor:
        """What the reward function says of answers, (B,)."""
        indices, n_answer = answers["indices"].tolist(), answers["answer_mask"].size(1)
        rows = zip(answers["input_ids"][:, -n_answer:], answers["answer_mask"], strict=True)
        responses = [self.tokenizer.decode(ids[wrote]) for ids, wrote in rows]
        prompts, records = ([values[index] for index in indices] for values in (data.questions, data.records))
        scores = call_reward(self.reward, prompts, responses, records)
        return torch.tensor(scores, dtype=torch.float64)  # in fp32, 16777217 would be as much as 16777216

    def before_first_step(self) -> None:
        """Say what the SFT model earns."""
        figures = ", ".join(f"{name} {value:.4f}" for name, value in self.evaluate().items())
        if ranks.is_main():
            print(f"before training: {figures}", flush=True)

    def learn_from(self, rollout: Batch) -> dict[str, float]:
        """The passes of updates over the groups of one step; returns its figures."""
        config = self.config
        rewards = rollout["scores"] - config.missing_eos_penalty * ~rollout["ended"]  # (B,)
        groups = rewards.view(-1, config.group_size)  # (B / G, G)
        # Nothing can be learned from groups of equal answers
        spreads = groups.std(dim=1, unbiased=False)
        figures = self.figures_of(rollout, group_std=spreads, equal_groups=alike(groups))
        _, batch_std = self.moments(rewards)
        names = ("input_ids", "attention_mask", "answer_mask", "old_log_probs")
        batch = {name: rollout[name] for name in (*names, "reference_log_probs") if name in rollout}
        batch["advantages"] = group_advantages(rewards, config.group_size, config.advantage_scale, batch_std)
        figures |= self.update(batch, config.grpo_epochs)
        self.step += 1
        return {**figures, "tokens": int(rollout["attention_mask"].sum()) * self.ranks}

    def count(self, batch: Batch) -> int:
        """How many items the loss of a minibatch is the mean of: answer tokens, or answers."""
        return super().count(batch) if self.config.loss_mean == "tokens" else len(batch["input_ids"])


def train_grpo(config: GRPOConfig | None = None, **settings: Any) -> dict[str, float]:
    """Let an SFT model learn from a reward function; leaves `grpo_best.pth`.

    Returns:
        the metrics of the best policy.
    """
    config = config or GRPOConfig(**settings)
    reward = load_reward(config.reward)
    policy, tokenizer, device = open_stage(config)
    data, val_data = load_parts(
        config,
        policy.config,
        load_tasks,
        lambda tasks, account: RecordDataset(tasks, tokenizer, room_for_prompts(config), account),
        "prompts",
        advice=advice_on_prompts(config, policy.config),
    )
    loop = GRPOLoop(config, policy, tokenizer, reward, data, val_data, device)
    size = f"{loop.max_steps} steps of {loop.order.batch_size} prompts with {config.group_size} answers each"

    def figures(best: dict[str, float]) -> str:
        divergence = f", KL {best['val_kl']:.2f} nats an answer" if "val_kl" in best else ""
        return f"held-out reward {best['val_reward']:.3f}{divergence}"

    return run(loop, f"GRPO on {len(data)} prompts, {size}, rewarded by {config.reward}", "aligned", figures)
