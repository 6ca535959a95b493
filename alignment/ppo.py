"""PPO: the policy writes answers, a reward model scores them, and the policy moves towards the better ones.

The objective is InstructGPT's (arXiv:2203.02155): the reward at the end of an answer minus β times the divergence from
the SFT model at every token. Advantages are GAE's (arXiv:1506.02438), the update is PPO's clipped one
(arXiv:1707.06347), with the details of "The N Implementation Details of RLHF with PPO"
(https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo).

Four networks, none of which shares weights with another:

    policy     trained; starts as the SFT model
    critic     trained; starts as the reward model; predicts what is still to come, at every token
    reference  frozen SFT model
    reward     frozen reward model

Shapes: B answers, P prompt tokens (padded on the left), R answer tokens, T = P + R.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

import distributed
from alignment.reward_model import RewardConfig, RewardModel, load_reward_model, split_pairs, train_reward_model
from alignment.sft import fit_context
from checkpoint import load_model
from command_line import UserError, option, require_file
from conversation_data import load_conversations
from data_loader import Batch, BatchOrder, GPTPPODataset, GPTSFTDataset
from gpt_model import GPTModel
from optimization import build_optimizers
from training_config import TrainingConfig, prepare_machine
from training_loop import TrainingLoop


@dataclass
class PPOConfig(TrainingConfig):
    """Settings of PPO. A step is one batch of fresh answers and the updates that are made with them."""

    pairwise_data: str = option("data/sft/rlhf_pairwise.json", "preference data; its prompts are answered")
    val_pairwise_data: str = option("", "held-out preferences; empty: --val_fraction of the training data")
    val_fraction: float = option(0.05, "share of the pairs set aside, if there are no held-out preferences")
    sft_model: str = option("models/sft/sft_best.pth", "the checkpoint that the policy starts from")
    reward_model: str = option("", "a trained reward model; empty: train one in <output_dir>/reward first")
    output_dir: str = option("models/rlhf", "folder for checkpoints, metrics and curves")
    sft_data: str = option("", "instruction data to keep learning from, so that nothing is forgotten; empty: none")
    sft_coef: float = option(1.0, "weight of the supervised loss on --sft_data")
    max_seq_len: int = option(0, "longest prompt and answer, in tokens; 0 means the model's context")
    max_gen_len: int = option(32, "longest answer, in tokens")
    rollout_batch_size: int = option(64, "answers that each rank writes for one step")
    ppo_epochs: int = option(2, "passes over the answers of a step")
    batch_size: int = option(64, "answers of one forward pass")
    lr: float = option(1e-4, "peak learning rate of the policy")
    schedule: str = option("cosine", "course of the learning rate", choices=("cosine", "wsd", "constant"))
    weight_decay: float = option(0.0, "decoupled weight decay of matrices")
    compile: str = option("false", "torch.compile; new lengths are compiled anew", choices=("auto", "true", "false"))
    epochs: float = option(1.0, "passes over the prompts, if --max_steps is 0")
    temperature: float = option(1.0, "of sampling; probabilities are taken at the same temperature")
    log_interval: int = option(1, "steps between records of the metrics")
    kl_coef: float = option(0.2, "β: the price of a nat of divergence from the SFT model")
    clip_range: float = option(0.2, "the probability ratio is clipped to 1 ± this")
    value_clip_range: float = option(0.2, "the critic may move by so much from its earlier prediction")
    value_coef: float = option(0.5, "weight of the critic's loss")
    critic_lr_scale: float = option(5.0, "the critic's learning rate as a multiple of --lr: it has more to learn")
    critic_warmup_steps: int = option(4, "first steps in which only the critic learns: its first guesses mislead")
    gae_lambda: float = option(0.3, "λ of advantage estimation (γ is 1): how far a surprise at the end reaches back")
    missing_eos_penalty: float = option(1.0, "taken off the reward of an answer that does not end by itself")

    def validate(self) -> list[str]:
        """What is wrong with the settings, a sentence each."""
        complaints = super().validate()
        for name in ("max_gen_len", "rollout_batch_size", "ppo_epochs"):
            if getattr(self, name) < 1:
                complaints.append(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.rollout_batch_size % (self.batch_size * self.grad_accum_steps):
            complaints.append(
                f"--rollout_batch_size {self.rollout_batch_size} must be a multiple of --batch_size times "
                f"--grad_accum_steps ({self.batch_size * self.grad_accum_steps})"
            )
        for name in ("temperature", "clip_range", "value_clip_range"):
            if not getattr(self, name) > 0:
                complaints.append(f"--{name} must be positive, not {getattr(self, name)}")
        for name in ("kl_coef", "value_coef"):
            if not getattr(self, name) >= 0:
                complaints.append(f"--{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.gae_lambda <= 1:
            complaints.append(f"--gae_lambda must be between 0 and 1, not {self.gae_lambda}")
        return complaints


class ActorCritic(nn.Module):
    """The two networks that PPO trains, and the loss of both.

    The statistics of the SFT model's rewards travel along: rewards are measured in their standard deviations, so that
    `kl_coef` and the critic mean the same for every reward model.
    """

    def __init__(self, policy: GPTModel, critic: RewardModel, config: PPOConfig) -> None:
        super().__init__()
        self.policy, self.critic, self.ppo = policy, critic, config
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))
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
        sft_input_ids: torch.Tensor | None = None,
        sft_labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """PPO's loss, a mean over answer tokens.

        Args:
            input_ids, attention_mask: (B, T).
            answer_mask: (B, R) bool, the tokens that the policy wrote.
            old_log_probs, old_values: (B, R), of the networks that wrote the answers.
            advantages, returns: (B, R).
            sft_input_ids, sft_labels: (B', T'), a batch of the instruction data, if it is mixed in.
        """
        clip, n_answer = self.ppo.clip_range, answer_mask.size(1)
        log_probs, entropy = answer_log_probs(
            self.policy, input_ids, attention_mask, n_answer, self.ppo.temperature
        )  # (B, R), (B, R)
        values = answer_values(self.critic, input_ids, attention_mask, n_answer)  # (B, R)

        def mean(x: torch.Tensor) -> torch.Tensor:
            return (x * answer_mask).sum() / answer_mask.sum().clamp(min=1)

        # The ratio is against the policy that sampled (arXiv:1707.06347, eq. 7), not against the reference
        log_ratio = log_probs - old_log_probs  # (B, R)
        ratio = log_ratio.exp()
        policy_loss = mean(torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)))
        value_range = self.ppo.value_clip_range
        clipped_values = old_values + (values - old_values).clamp(-value_range, value_range)
        value_loss = 0.5 * mean(torch.maximum((values - returns).square(), (clipped_values - returns).square()))
        with torch.no_grad():
            figures = {
                "policy/approxkl_avg": mean(ratio - 1 - log_ratio),  # http://joschu.net/blog/kl-approx.html, k3
                "policy/clipfrac_avg": mean(((ratio - 1).abs() > clip).float()),
                "policy/entropy_avg": mean(entropy),
                "val/ratio": mean(ratio),
            }
        loss = self.policy_weight * policy_loss + self.ppo.value_coef * value_loss
        if sft_input_ids is not None:  # PPO-ptx of arXiv:2203.02155, eq. 2, with instructions in place of raw text
            figures["loss/sft_avg"] = self.policy(sft_input_ids, labels=sft_labels)["loss"]
            loss = loss + self.policy_weight * self.ppo.sft_coef * figures["loss/sft_avg"]
        return {
            "loss": loss,
            "loss/policy_avg": policy_loss.detach(),
            "loss/value_avg": value_loss.detach(),
            **figures,
        }


def answer_log_probs(
    model: GPTModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, n_answer: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the last `n_answer` tokens of (B, T) ids, and the entropies there: (B, R), (B, R)."""
    hidden = model.hidden_states(input_ids, attention_mask)[:, -n_answer - 1 : -1]  # (B, R, D): states before them
    log_probs = (model.lm_head(hidden).float() / temperature).log_softmax(dim=-1)  # (B, R, V)
    chosen = log_probs.gather(2, input_ids[:, -n_answer:].unsqueeze(2)).squeeze(2)  # (B, R)
    return chosen, -(log_probs.detach().exp() * log_probs.detach()).sum(dim=-1)


def answer_values(
    critic: RewardModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, n_answer: int
) -> torch.Tensor:
    """What the critic expects before each of the last `n_answer` tokens, (B, R)."""
    return critic.token_values(input_ids, attention_mask)[:, -n_answer - 1 : -1]


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gae_lambda: float
) -> torch.Tensor:
    """GAE with γ = 1 (arXiv:1506.02438, eq. 16): Â_t = Σ_l λˡ δ_{t+l}, δ_t = r_t + V_{t+1} − V_t.

    Args:
        rewards, values: (B, R); mask: (B, R) bool, true up to and including the last token of the answer.

    Returns:
        advantages (B, R), zero where the mask is false.
    """
    values = values * mask
    advantages, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        next_value = values[:, t + 1] if t + 1 < rewards.size(1) else 0.0  # nothing comes after the end
        delta = rewards[:, t] + next_value - values[:, t]  # (B,)
        following = (delta + gae_lambda * following) * mask[:, t]
        advantages[:, t] = following
    return advantages


def mask_after_end(answers: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Which tokens of (B, R) answers were written: all up to and including the first `</s>`; (B, R) bool."""
    is_end = answers.eq(eos_token_id)
    return (is_end.cumsum(dim=1) - is_end.int()).eq(0)


class PPOLoop(TrainingLoop):
    """The training loop with PPO's step: answer, score, estimate advantages, update several times."""

    shown = ("objective/reward", "objective/kl")

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
        self.reference = copy.deepcopy(policy).to(device).eval().requires_grad_(False)
        self.reward_model = reward_model.to(device).eval().requires_grad_(False)
        critic = copy.deepcopy(reward_model).requires_grad_(True)
        model = ActorCritic(policy, critic, config)
        super().__init__(config, model, policy.config, tokenizer, "ppo", prompts, val_prompts, device)
        if len(val_prompts) < self.ranks:
            raise UserError(
                f"{len(val_prompts)} held-out prompts are too few for {self.ranks} ranks; raise --val_fraction or give "
                "--val_pairwise_data"
            )
        self.eos_token_id = tokenizer.eos_token_id
        self.sft_data = sft_data
        if sft_data is not None:
            self.sft_order = BatchOrder(len(sft_data), self.global_batch(), config.seed, sft_data.lengths)

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """The policy's and the critic's, each with its own learning rate."""
        config = self.config
        policy = build_optimizers(self.model.policy, config.optimizer, config.lr, config.weight_decay)
        critic = build_optimizers(self.model.critic, config.optimizer, config.lr, config.weight_decay)
        for group in (group for optimizer in critic for group in optimizer.param_groups):
            group["lr_scale"] = config.critic_lr_scale
        return policy + critic

    def global_batch(self) -> int:
        """Prompts of one step over all ranks."""
        return self.config.rollout_batch_size * self.ranks

    # ------------------------------------------------------------------------------------------------------- rollouts

    @torch.no_grad()
    def answer(self, prompts: Batch, generator: torch.Generator | None = None) -> Batch:
        """Let the policy answer and score the answers.

        Returns:
            the batch that `ActorCritic.forward` takes but for advantages and returns, and "rewards" (B,) in standard
            deviations of the SFT model's rewards, "kl" (B, R) and "ended" (B,).
        """
        prompts = self._to_device(prompts)
        policy, n_prompt = self.model.policy, prompts["input_ids"].size(1)
        input_ids = policy.generate(
            **prompts,
            max_gen_len=self.config.max_gen_len,
            temperature=self.config.temperature,
            eos_token_id=self.eos_token_id,
            generator=generator,
        )  # (B, T)
        answer_mask = mask_after_end(input_ids[:, n_prompt:], self.eos_token_id)  # (B, R)
        attention_mask = torch.cat((prompts["attention_mask"], answer_mask.long()), dim=1)  # (B, T)
        ended = (input_ids[:, n_prompt:].eq(self.eos_token_id) & answer_mask).any(dim=1)  # (B,)
        n_answer, temperature = answer_mask.size(1), self.config.temperature
        with self.updater.autocast():
            log_probs, _ = answer_log_probs(policy, input_ids, attention_mask, n_answer, temperature)
            reference, _ = answer_log_probs(self.reference, input_ids, attention_mask, n_answer, temperature)
            values = answer_values(self.model.critic, input_ids, attention_mask, n_answer)
            rewards = self.reward_model.rewards(input_ids, attention_mask)  # (B,)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "answer_mask": answer_mask,
            "old_log_probs": log_probs,
            "old_values": values,
            "rewards": (rewards - self.model.reward_mean) / self.model.reward_std,
            "kl": (log_probs - reference) * answer_mask,
            "ended": ended,
        }

    def _with_advantages(self, rollout: Batch) -> Batch:
        """Replace what the rewards and the divergence are by what they mean: advantages (whitened) and returns."""
        config, mask = self.config, rollout["answer_mask"]
        score = rollout.pop("rewards") - config.missing_eos_penalty * ~rollout.pop("ended")  # (B,)
        token_rewards = -config.kl_coef * rollout.pop("kl")  # (B, R)
        last = mask.sum(dim=1, keepdim=True) - 1  # (B, 1): an answer has at least one token
        token_rewards.scatter_add_(1, last, score.unsqueeze(1))
        advantages = generalized_advantages(token_rewards, rollout["old_values"], mask, config.gae_lambda)
        returns = advantages + rollout["old_values"]
        mean, std = self._moments(advantages[mask])
        return {**rollout, "returns": returns, "advantages": (advantages - mean) / (std + 1e-8)}

    def _moments(self, x: torch.Tensor) -> tuple[float, float]:
        """Mean and standard deviation over the values of all ranks."""
        n, total, squares = (
            distributed.sum_over_ranks(float(value), self.device) for value in (x.numel(), x.sum(), x.square().sum())
        )
        mean = total / n
        return mean, max(squares / n - mean * mean, 0.0) ** 0.5

    # ------------------------------------------------------------------------------------------------------- the step

    def before_first_step(self) -> None:
        """Measure the SFT model's rewards."""
        rewards = torch.cat([rollout["rewards"] for rollout in self._validation_rollouts()])
        mean, std = self._moments(rewards)
        self.model.reward_mean.fill_(mean)
        self.model.reward_std.fill_(std or 1.0)

    def train_step(self) -> dict[str, float]:
        """One batch of answers and `ppo_epochs` passes of updates over it."""
        config = self.config
        self.parallel_model.eval()  # dropout would make the ratio differ from 1 before anything has changed
        mine = self.order.batch(self.step)[distributed.rank() :: self.ranks]
        rollout = self.answer(self.train_data.collate([self.train_data[index] for index in mine]))
        figures = {
            "objective/reward": float(rollout["rewards"].mean()),
            "objective/kl": float(rollout["kl"].sum(dim=1).mean()),
            "objective/ended": float(rollout["ended"].float().mean()),
            "answer_length": float(rollout["answer_mask"].sum(dim=1).float().mean()),
        }
        figures = {k: distributed.sum_over_ranks(v, self.device) / self.ranks for k, v in figures.items()}
        rollout = self._with_advantages(rollout)
        self.sft_batches = 0
        self.model.policy_weight = float(self.step >= config.critic_warmup_steps)
        lr, size, means = self.learning_rate(), config.batch_size * config.grad_accum_steps, []
        for _ in range(config.ppo_epochs):
            for rows in torch.randperm(len(mine)).split(size):
                parts = [part.to(self.device) for part in rows.split(config.batch_size)]
                batches = [{name: value[part] for name, value in rollout.items()} for part in parts]
                if self.sft_data is not None:
                    batches = [{**batch, **self._instructions(len(batch["input_ids"]))} for batch in batches]
                result = self.accumulate(batches, [int(batch["answer_mask"].sum()) for batch in batches])
                result["grad_norm"] = self.updater.step(lr, result["loss"])
                means.append(result)
        self.step += 1
        averages = {name: sum(result[name] for result in means) / len(means) for name in means[0]}
        tokens = int(rollout["attention_mask"].sum()) * self.ranks
        return {**figures, **averages, "lr": lr, "tokens": tokens}

    def _instructions(self, n_samples: int) -> Batch:
        """A batch of the instruction data; which, depends on the step and the rank alone."""
        mine = self.sft_order.batch(self.step)[distributed.rank() :: self.ranks]
        first = self.sft_batches * n_samples % len(mine)
        self.sft_batches += 1
        batch = self.sft_data.collate([self.sft_data[index] for index in mine[first : first + n_samples]])
        return {f"sft_{name}": value for name, value in batch.items()}

    # ----------------------------------------------------------------------------------------------------- evaluation

    def _validation_rollouts(self) -> list[Batch]:
        """Answers to this rank's share of the held-out prompts, with the same random numbers every time."""
        self.parallel_model.eval()
        generator = torch.Generator(self.device).manual_seed(self.config.seed + 1)
        size = self.config.rollout_batch_size
        indices = range(distributed.rank(), len(self.val_data), self.ranks)
        rollouts = []
        for start in range(0, len(indices), size):
            prompts = self.val_data.collate([self.val_data[index] for index in indices[start : start + size]])
            rollouts.append(self.answer(prompts, generator))
        return rollouts

    def evaluate(self) -> dict[str, float]:
        """Mean reward of, and divergence over, answers to held-out prompts; the objective joins them."""
        rollouts = self._validation_rollouts()
        reward, _ = self._moments(torch.cat([rollout["rewards"] for rollout in rollouts]))
        kl, _ = self._moments(torch.cat([rollout["kl"].sum(dim=1) for rollout in rollouts]))
        return {"val_reward": reward, "val_kl": kl, "val_objective": reward - self.config.kl_coef * kl}

    def is_better(self, metrics: dict[str, float], best: dict[str, float]) -> bool:
        """The best policy has the highest objective."""
        return metrics["val_objective"] > best["val_objective"]

    def published_state(self) -> dict[str, torch.Tensor]:
        """The policy alone: a plain language model."""
        prefix = "policy."
        return {
            name.removeprefix(prefix): value
            for name, value in super().published_state().items()
            if name.startswith(prefix)
        }


def rlhf_ppo(config: PPOConfig | None = None, **settings: Any) -> dict[str, float]:
    """Align an SFT model with preferences; leaves `ppo_best.pth`.

    Without a reward model one is trained first, from the same preferences.

    Returns:
        the metrics of the best policy.
    """
    config = config or PPOConfig(**settings)
    require_file(config.sft_model, "the SFT model", "run finetune.py --mode sft first, or check the path")
    if not config.reward_model:
        config.reward_model = train_reward_for(config)
    device = prepare_machine(config)
    pairs, val_pairs = split_pairs(config.pairwise_data, config.val_pairwise_data, config.val_fraction)
    policy, tokenizer, _ = load_model(config.sft_model)
    reward_model, reward_tokenizer = load_reward_model(config.reward_model)
    if reward_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{config.reward_model} and {config.sft_model} have different tokenizers; use a matching pair")
    fit_context(config, policy)
    if reward_model.config.max_seq_len < config.max_seq_len:
        limit = reward_model.config.max_seq_len
        raise UserError(
            f"{config.reward_model} reads at most {limit} tokens, fewer than the policy; use --max_seq_len {limit}"
        )
    room = config.max_seq_len - config.max_gen_len
    loop = PPOLoop(
        config,
        policy,
        reward_model,
        tokenizer,
        GPTPPODataset([pair["prompt"] for pair in pairs], tokenizer, room),
        GPTPPODataset([pair["prompt"] for pair in val_pairs], tokenizer, room),
        device,
        GPTSFTDataset(load_conversations(config.sft_data), tokenizer, config.max_seq_len) if config.sft_data else None,
    )
    if distributed.is_main():
        print(f"PPO on {len(loop.train_data)} prompts, {loop.max_steps} steps of {loop.order.batch_size} answers")
    best = loop.train()
    if distributed.is_main():
        print(
            f"aligned: {loop.best_path}, held-out reward {best['val_reward']:+.2f} standard deviations above the SFT "
            f"model, KL {best['val_kl']:.2f} nats an answer, {loop.seconds:.0f} s; "
            f"curves in {Path(config.output_dir) / 'curves.png'}"
        )
    return best


def train_reward_for(config: PPOConfig) -> str:
    """Train the reward model that a PPO run needs (unless it is finished already); returns its path."""
    reward_config = RewardConfig(
        pairwise_data=config.pairwise_data,
        val_pairwise_data=config.val_pairwise_data,
        val_fraction=config.val_fraction,
        sft_model=config.sft_model,
        output_dir=str(Path(config.output_dir) / "reward"),
        max_seq_len=config.max_seq_len,
        seed=config.seed,
        device=config.device,
        num_threads=config.num_threads,
        precision=config.precision,
        resume="auto" if config.resume else "",  # a path is of PPO's checkpoint
    )
    train_reward_model(reward_config)
    return str(Path(reward_config.output_dir) / "reward_best.pth")
