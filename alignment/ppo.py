"""PPO: the policy writes answers, a reward model scores them, and the policy moves towards the better ones.

The objective is InstructGPT's (arXiv:2203.02155): the reward at the end of an answer minus β times the divergence from
the SFT model at every token. Advantages are GAE's (arXiv:1506.02438), the update is PPO's clipped one
(arXiv:1707.06347), with the details of "The N Implementation Details of RLHF with PPO"
(https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo).

Four networks:

    policy     trained; starts as the SFT model
    critic     trained; starts as the reward model; predicts what is still to come, at every token
    reference  frozen SFT model
    reward     frozen reward model

In full training none shares weights with another. With LoRA the reference is the policy without its adapters, and the
critic's adapters stand beside the weights of the reward model: two networks in memory and not four.

A step:

    answers = policy(prompts)                                          # write_answers, as it samples
    score   = (reward(answers) − mean) / std                           # judge, and kl = log π − log π_ref
    rewards = −β · kl at every token, + score at the last              # token_rewards
    Â       = GAE(rewards, critic's values), whitened                  # estimate_advantages
    for each of ppo_epochs, for each minibatch of answers:             # update
        ratio = π / π of the policy that wrote them
        loss  = max(−Â · ratio, −Â · clip(ratio))                      # ActorCritic.forward
              + value_coef · the critic's loss + sft_coef · the supervised loss
        step of both networks
    β follows the divergence, if there is a kl_target

Shapes: B answers, P prompt tokens (padded on the left), R answer tokens, T = P + R.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn as nn

from alignment.reward_model import RewardModel, load_reward_model, train_reward_model
from alignment.rollouts import (
    RolloutConfig,
    RolloutLoop,
    advice_on_prompts,
    answer_token_log_probs,
    kl_terms,
    masked_mean,
    policy_figures,
    room_for_prompts,
    rounding_noise,
)
from alignment.stage import InstructionsMixedIn, PreferenceData, load_instructions, load_parts, mix_in, open_stage, run
from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError, option
from data_loader import Batch, GPTPPODataset, GPTSFTDataset
from gpt_model import GPTConfig, GPTModel
from inference.kernels.int8_weights import hold_in_int8
from lora import apply_lora
from text.conversation_data import load_preferences
from training import ranks

ANSWERS_TO_MEASURE = 64  # whose rewards give the SFT model's mean and spread: those of a few may be alike by chance
# In standard deviations of the SFT model's rewards: advantages and returns that differ by less are alike, and dividing
# by their spread would make noise large
LEAST_SPREAD = 1e-3


@dataclass
class PPOConfig(PreferenceData, InstructionsMixedIn, RolloutConfig):
    """Settings of PPO. A step is one batch of fresh answers and the updates that are made with them."""

    models_in_memory: ClassVar = (2, 2)  # policy and critic; reference and reward model
    rows_of_sample: ClassVar = 1

    reward_model: str = option(
        "", "a trained reward model; empty: train one in <output_dir>/reward first", reads="model"
    )
    output_dir: str = "models/rlhf"
    ppo_epochs: int = option(2, "passes over the answers of a step", at_least=1)
    kl_coef: float = option(0.2, "β: the price of a nat of divergence from the SFT model", at_least=0)
    kl_estimator: str = option("k1", "of the divergence at a token: k1 = log π/π_ref, or k3", choices=("k1", "k3"))
    kl_target: float = option(0.0, "β adapts until an answer diverges by so many nats; 0: it stays", at_least=0)
    clip_range: float = option(0.2, "the probability ratio is clipped to 1 ± this", above=0)
    value_clip_range: float = option(0.2, "the critic may move by so much from its earlier prediction", above=0)
    value_coef: float = option(0.5, "weight of the critic's loss", at_least=0)
    critic_lr_scale: float = option(5.0, "the critic's learning rate as a multiple of --lr: it has more to learn")
    critic_warmup_steps: int = option(4, "first steps in which only the critic learns: its first guesses mislead")
    gamma: float = option(1.0, "γ: what a reward is worth one token earlier", at_least=0, at_most=1)
    gae_lambda: float = option(
        0.3, "λ of advantage estimation: how far a surprise at the end reaches back", at_least=0, at_most=1
    )


class ActorCritic(nn.Module):
    """The two networks that PPO trains, and the loss of both.

    What a run has settled travels along and is saved with it: the statistics of the SFT model's rewards (rewards are
    measured in their standard deviations, so that β and the critic mean the same for every reward model), and β.
    """

    def __init__(self, policy: GPTModel, critic: RewardModel, config: PPOConfig) -> None:
        super().__init__()
        self.policy, self.critic, self.ppo = policy, critic, config
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))
        self.register_buffer("kl_coef", torch.tensor(float(config.kl_coef)))
        self.policy_weight = 1.0  # 0 while only the critic learns

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        answer_mask: torch.Tensor,
        old_log_probs: torch.Tensor,
        old_values: torch.Tensor,
        advantages: torch.Tensor,
        returns: torch.Tensor,
        places: torch.Tensor | None = None,
        sft_input_ids: torch.Tensor | None = None,
        sft_labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """PPO's loss, a mean over answer tokens.

        Args:
            input_ids, attention_mask: (B, T).
            answer_mask: (B, R) bool, the tokens that the policy wrote.
            old_log_probs, old_values: (B, R), of the networks that wrote the answers.
            advantages, returns: (B, R).
            places: see `answer_token_log_probs`.
            sft_input_ids, sft_labels: (B', T'), a batch of the instruction data, if it is mixed in.
        """
        config, mask = self.ppo, answer_mask
        answers = {"input_ids": input_ids, "attention_mask": attention_mask, "answer_mask": answer_mask}
        answers |= {} if places is None else {"places": places}
        log_probs, entropy = answer_token_log_probs(self.policy, answers, config.temperature, with_entropy=True)
        values = answer_values(self.critic, answers)  # (B, R)

        # The ratio is against the policy that sampled, not the reference; L^CLIP of arXiv:1707.06347, equation 7
        ratio = (log_probs - old_log_probs).exp()  # (B, R)
        clipped_ratio = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
        policy_loss = masked_mean(torch.maximum(-advantages * ratio, -advantages * clipped_ratio), mask)

        # The value loss is clipped likewise, as in the code that came with the paper (N Implementation Details, 3.5)
        moved = (values - old_values).clamp(-config.value_clip_range, config.value_clip_range)
        square, clipped_square = (values - returns).square(), (old_values + moved - returns).square()  # (B, R)
        value_loss = 0.5 * masked_mean(torch.maximum(square, clipped_square), mask)

        loss = self.policy_weight * policy_loss + config.value_coef * value_loss
        with torch.no_grad():
            figures = {
                "loss/policy_avg": policy_loss,
                "loss/value_avg": value_loss,
                **policy_figures(old_log_probs, log_probs, entropy, mask),
                "policy/clipfrac_avg": masked_mean(((ratio - 1).abs() > config.clip_range).float(), mask),
                "val/clipfrac_avg": masked_mean((clipped_square > square).float(), mask),
            }
        if sft_input_ids is not None:  # PPO-ptx of arXiv:2203.02155, equation 2, with instructions in place of raw text
            figures["loss/sft_avg"] = self.policy(sft_input_ids, labels=sft_labels)["loss"]
            loss = loss + self.policy_weight * config.sft_coef * figures["loss/sft_avg"]
        return {"loss": loss, **figures}


def answer_values(critic: RewardModel, answers: Batch) -> torch.Tensor:
    """What the critic expects before each answer token, (B, R)."""
    values = critic.token_values(answers["input_ids"], answers["attention_mask"])  # (B, T)
    return values[:, -answers["answer_mask"].size(1) - 1 : -1]


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gae_lambda: float, gamma: float = 1.0
) -> torch.Tensor:
    """GAE (arXiv:1506.02438, equation 16): Â_t = Σ_l (γλ)ˡ δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t.

    Args:
        rewards, values: (B, R); mask: (B, R) bool, true up to and including the last token of the answer.

    Returns:
        advantages (B, R), zero where the mask is false.
    """
    values = values * mask
    advantages, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        next_value = values[:, t + 1] if t + 1 < rewards.size(1) else 0.0  # nothing comes after the end
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        following = (delta + gamma * gae_lambda * following) * mask[:, t]
        advantages[:, t] = following
    return advantages


def adapted_kl_coef(kl_coef: float, kl: float, kl_target: float) -> float:
    """β for the next step, larger after too much divergence and smaller after too little.

    Ziegler et al., arXiv:1909.08593, section 2.2: e = clip(KL / KL_target − 1, ± 0.2), β ← β (1 + 0.1 e).
    """
    return kl_coef * (1 + 0.1 * min(max(kl / kl_target - 1, -0.2), 0.2))


class PPOLoop(RolloutLoop):
    """The training loop with PPO's step: answer, score, estimate advantages, update several times."""

    best_by = "val_objective"

    def __init__(
        self,
        config: PPOConfig,
        policy: GPTModel,
        reward_model: RewardModel,
        tokenizer: Any,
        prompts: GPTPPODataset,
        val_prompts: GPTPPODataset,
        device: torch.device,
        sft_data: GPTSFTDataset | None = None,
    ) -> None:
        reward_model.requires_grad_(False)
        if config.lora_rank and config.frozen_weights == "int8":
            hold_in_int8(reward_model.backbone)
        self.reward_model = reward_model.to(device).eval()
        # With LoRA the critic's frozen layers are the reward model's own, beside which it gets adapters
        shared = {id(p): p for p in reward_model.backbone.parameters()} if config.lora_rank else {}
        critic = copy.deepcopy(reward_model, shared)
        critic.requires_grad_(not config.lora_rank).reward_head.requires_grad_(True)
        apply_lora(critic.backbone, config, config.reward_model)
        super().__init__(config, ActorCritic(policy, critic, config), "ppo", tokenizer, prompts, val_prompts, device)
        self.updater.clip = self.clip_each
        self.instructions = mix_in(self, sft_data)

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """The policy's and the critic's, each with its own learning rate."""
        policy, critic = self.optimizers_of(self.model.policy), self.optimizers_of(self.model.critic)
        for group in (group for optimizer in critic for group in optimizer.param_groups):
            group["lr_scale"] = self.config.critic_lr_scale * group.get("lr_scale", 1.0)
        return policy + critic

    def clip_each(self, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Clip the gradients of policy and critic, each to `max_norm`: a surprised critic must not slow the policy."""
        norms = [
            self.parallel_model.clip_gradients([p for p in network.parameters() if p.requires_grad], max_norm)
            for network in (self.model.policy, self.model.critic)
        ]
        return torch.stack(norms).norm()

    # --------------------------------------------------------------------------------------------- rewards, advantages

    def judge(self, data: GPTPPODataset, answers: Batch, on_device: Batch) -> Batch:
        """What all four networks say of answers.

        Returns:
            "old_log_probs", "old_values", "kl": (B, R). "scores": (B,), in standard deviations of the SFT model's.
        """
        rewards = self.reward_model.rewards(on_device["input_ids"], on_device["attention_mask"])  # (B,)
        log_probs = self.log_probs(on_device)  # (B, R)
        return {
            "old_log_probs": log_probs,
            "old_values": answer_values(self.model.critic, on_device),
            "kl": kl_terms(log_probs, self.reference_log_probs(on_device), self.config.kl_estimator),
            "scores": (rewards - self.model.reward_mean) / self.model.reward_std,
        }

    def token_rewards(self, rollout: Batch, kl_coef: float) -> torch.Tensor:
        """−β · KL at every token and, at the last one, the score, less the penalty for a missing end: (B, R).

        arXiv:1909.08593, equation 2.
        """
        mask = rollout["answer_mask"]
        score = rollout["scores"] - self.config.missing_eos_penalty * ~rollout["ended"]  # (B,)
        last = mask.sum(dim=1, keepdim=True) - 1  # (B, 1): an answer has at least one token
        return (-kl_coef * rollout["kl"] * mask).scatter_add(1, last, score.unsqueeze(1))

    def estimate_advantages(self, rollout: Batch, rewards: torch.Tensor) -> Batch:
        """What `ActorCritic.forward` takes: a rollout with returns and, over the whole batch, whitened advantages.

        Args:
            rewards: `token_rewards`, (B, R).
        """
        config, mask, values = self.config, rollout["answer_mask"], rollout["old_values"]
        advantages = generalized_advantages(rewards, values, mask, config.gae_lambda, config.gamma)  # (B, R)
        mean, std = self.moments(advantages[mask])
        names = ("input_ids", "attention_mask", "answer_mask", "old_log_probs", "old_values")
        return {name: rollout[name] for name in names} | {
            "returns": advantages + values,  # before whitening: the critic predicts rewards, not their ranks
            "advantages": (advantages - mean) / max(std, LEAST_SPREAD) * mask,
        }

    # ------------------------------------------------------------------------------------------------------- the step

    def before_first_step(self) -> None:
        """Measure the SFT model's rewards, and show some of its answers."""
        rollouts = self.validation_rollouts()
        mean, std = self.measured_rewards(torch.cat([rollout["scores"] for rollout in rollouts]))
        self.model.reward_mean.fill_(mean)
        self.model.reward_std.fill_(std)
        self.show([{**rollout, "scores": (rollout["scores"] - mean) / std} for rollout in rollouts])

    def measured_rewards(self, rewards: torch.Tensor) -> tuple[float, float]:
        """Mean and standard deviation of the SFT model's rewards.

        The mean is that of answers to held-out prompts, so that `val_reward` begins at 0. Where these are few, answers
        to training prompts join them for the deviation, which is 1 where it cannot be measured.

        Args:
            rewards: of answers to this rank's held-out prompts.
        """
        level = self.mean(rewards)
        missing = ANSWERS_TO_MEASURE - round(ranks.sum_over_ranks(float(len(rewards)))[0])
        if missing > 0:
            generator = torch.Generator().manual_seed(self.config.seed + 2 + ranks.rank())
            count = -(-missing // self.ranks)  # as many on every rank
            indices = [(ranks.rank() + number * self.ranks) % len(self.train_data) for number in range(count)]
            size = self.config.rollout_batch_size
            parts = [indices[start : start + size] for start in range(0, count, size)]
            rewards = torch.cat([rewards, *(self.rollout(self.train_data, p, generator)["scores"] for p in parts)])
        mean, std = self.moments(rewards)
        if std > rounding_noise(self.precision) * (mean * mean + std * std) ** 0.5:
            return level, std
        if ranks.is_main():
            print(
                f"warning: the reward model finds all of the SFT model's answers alike (rewards of {mean:.4g} ± "
                f"{std:.1g}, which is rounding): rewards are not measured in standard deviations but taken as they "
                "are; a reward model that cannot tell answers apart teaches nothing",
                flush=True,
            )
        return level, 1.0

    def learn_from(self, rollout: Batch) -> dict[str, float]:
        """The passes of updates over the answers of one step; returns its figures."""
        config, mask = self.config, rollout["answer_mask"]
        kl_coef = float(self.model.kl_coef)
        rewards = self.token_rewards(rollout, kl_coef)  # (B, R)
        batch = self.estimate_advantages(rollout, rewards)
        figures = self.figures_of(
            rollout,
            rlhf_reward=rewards.sum(dim=1),  # what PPO maximises
            non_score_reward=-kl_coef * rollout["kl"].sum(dim=1),
        )
        figures["objective/kl_coef"] = kl_coef
        _, unexplained = self.moments((batch["returns"] - batch["old_values"])[mask])
        _, spread = self.moments(batch["returns"][mask])
        if spread > LEAST_SPREAD:  # of returns that are all alike there is nothing to explain
            figures["val/explained_variance"] = 1 - (unexplained / spread) ** 2  # 1: the critic foresees returns
        self.model.policy_weight = float(self.step >= config.critic_warmup_steps)
        figures |= self.update(batch, config.ppo_epochs)
        if config.kl_target and self.model.policy_weight:
            adapted = adapted_kl_coef(kl_coef, figures["objective/kl"], config.kl_target)
            self.model.kl_coef.fill_(adapted)
        self.step += 1
        return {**figures, "tokens": int(rollout["attention_mask"].sum()) * self.ranks}

    def minibatch(self, rollout: Batch, rows: torch.Tensor, first: int) -> Batch:
        """Some rows of a rollout and, if it is mixed in, as many of the instruction data."""
        batch = super().minibatch(rollout, rows, first)
        if self.instructions is None:
            return batch
        mine = self.instructions.order.batch(self.step)[ranks.rank() :: self.ranks]
        first %= len(mine)
        return batch | self.instructions.batch(mine[first : first + len(rows)])

    def evaluate(self) -> dict[str, float]:
        """Mean score of, and divergence over, answers to held-out prompts; the objective joins them."""
        figures = super().evaluate()
        return figures | {"val_objective": figures["val_reward"] - self.config.kl_coef * figures["val_kl"]}


def rlhf_ppo(config: PPOConfig | None = None, **settings: Any) -> dict[str, float]:
    """Align an SFT model with preferences; leaves `ppo_best.pth`.

    Without a reward model one is trained first, from the same preferences.

    Returns:
        the metrics of the best policy.
    """
    config = config or PPOConfig(**settings)
    if not config.reward_model:
        policy, tokenizer, _ = open_stage(config)
        load_data(config, policy.config, tokenizer, quiet=True)  # what is wrong with it shows before any training
        config.reward_model = train_reward_for(config)
    policy, tokenizer, device = open_stage(config)
    data = load_data(config, policy.config, tokenizer)
    reward_model, reward_tokenizer = load_reward_model(config.reward_model)
    if reward_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{config.reward_model} and {config.sft_model} have different tokenizers; use a matching pair")
    if reward_model.config.max_seq_len < config.max_seq_len:
        limit = reward_model.config.max_seq_len
        raise UserError(
            f"{config.reward_model} reads at most {limit} tokens, fewer than the policy; use --max_seq_len {limit}"
        )
    sft_data = load_instructions(config, tokenizer, policy.config)
    loop = PPOLoop(config, policy, reward_model, tokenizer, *data, device, sft_data)
    return run(
        loop,
        f"PPO on {len(loop.train_data)} prompts, {loop.max_steps} steps of {loop.order.batch_size} answers",
        "aligned",
        lambda best: f"held-out reward {best['val_reward']:+.2f} standard deviations above the SFT model, KL "
        f"{best['val_kl']:.2f} nats an answer",
    )


def load_data(
    config: PPOConfig, model: GPTConfig, tokenizer: ByteLevelBPETokenizer, quiet: bool = False
) -> tuple[GPTPPODataset, GPTPPODataset]:
    """The prompts to train on, and those held out; see `stage.load_parts`."""
    return load_parts(
        config,
        model,
        load_preferences,
        lambda preferences, account: GPTPPODataset(
            [preference["prompt"] for preference in preferences], tokenizer, room_for_prompts(config), account
        ),
        "prompts",
        advice=advice_on_prompts(config, model),
        quiet=quiet,
    )


def train_reward_for(config: PPOConfig) -> str:
    """Train the reward model that a PPO run needs (unless it is finished already); returns its path."""
    names = ("pairwise_data", "val_pairwise_data", "val_fraction", "sft_model", "max_seq_len")
    names += ("seed", "device", "num_threads", "precision", "columns", "skip_bad_records")
    folder = Path(config.output_dir) / "reward"
    resume = "auto" if config.resume else ""  # a path is of PPO's checkpoint
    train_reward_model(**{name: getattr(config, name) for name in names}, output_dir=str(folder), resume=resume)
    return str(folder / "reward_best.pth")
