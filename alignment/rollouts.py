"""What PPO and GRPO have in common: a policy writes answers, minibatches of them update it, and people read samples.

Shapes: B answers, P prompt tokens (padded on the left), R answer tokens, T = P + R.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from alignment.log_probabilities import places_of, token_log_probs
from alignment.stage import SFTStart, StageConfig, room_advice
from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError, option, replacing
from data_loader import Batch, GPTPPODataset
from gpt_model import GPTConfig, GPTModel
from inference.engine import Engine
from inference.model_step import default_cache_tokens
from inference.request import RequestFailed
from inference.sampling import SamplingParams
from lora import LoRAOptions, adapters_disabled, lora_layers
from machine import free_gpu_bytes, to_host
from training import ranks
from training.run_log import read_metrics
from training.training_loop import TrainingLoop


@dataclass
class RolloutConfig(SFTStart, LoRAOptions, StageConfig):
    """Settings that PPO and GRPO share. A step is one batch of fresh answers and the updates made with them."""

    max_gen_len: int = option(32, "longest answer, in tokens", at_least=1)
    rollout_batch_size: int = option(64, "answers that each rank writes for one step", at_least=1)
    batch_size: int = 64
    lr: float = 1e-4
    schedule: str = option("cosine", "course of the learning rate", choices=("cosine", "wsd", "constant"))
    weight_decay: float = 0.0
    compile: str = "false"
    temperature: float = option(1.0, "of sampling; probabilities are taken at the same temperature", above=0)
    missing_eos_penalty: float = option(1.0, "taken off the reward of an answer that does not end by itself")
    target_kl: float = option(
        0.0, "a step's updates stop before one whose policy/approxkl_avg exceeds this; 0: never", at_least=0
    )
    log_interval: int = 1
    n_samples: int = option(3, "held-out prompts whose answers are shown at every evaluation", at_least=0)

    def validate(self) -> list[str]:
        """What does not fit together, a sentence each."""
        complaints = super().validate()
        if self.rollout_batch_size % max(1, self.batch_size * self.grad_accum_steps):
            complaints.append(
                f"--rollout_batch_size {self.rollout_batch_size} must be a multiple of --batch_size times "
                f"--grad_accum_steps ({self.batch_size * self.grad_accum_steps})"
            )
        return complaints


def room_for_prompts(config: RolloutConfig) -> int:
    """How many tokens a prompt may have.

    Raises:
        UserError: none.
    """
    room = config.max_seq_len - config.max_gen_len
    if room < 1:
        raise UserError(
            f"--max_gen_len {config.max_gen_len} leaves no room for a prompt in {config.max_seq_len} tokens; lower it"
        )
    return room


def advice_on_prompts(config: RolloutConfig, model: GPTConfig) -> str:
    """What helps where prompts are too long."""
    return f"lower --max_gen_len (now {config.max_gen_len}); or {room_advice(config, model)}"


def engine_of(policy: GPTModel, n_answers: int, longest: int) -> Engine:
    """What writes a policy's answers while it learns: made once, so that its cache, a GPU's recorded steps and what was
    measured of kernels are, too.

    Args:
        n_answers: that are written at once.
        longest: of them, prompts included, in tokens.
    """
    # Half of a GPU's free memory and not all of it, as the cache is there while the policy learns as well
    free = free_gpu_bytes(policy.device) // 2 if policy.device.type == "cuda" else None
    cells = default_cache_tokens(policy.config, policy.dtype, policy.device, n_answers, longest, free)
    return Engine(policy, None, max_running=n_answers, cache_tokens=cells)


def write_answers(
    engine: Engine,
    prompts: Batch,
    *,
    end_token_ids: Sequence[int],
    max_gen_len: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Batch:
    """Let the policy answer, from its whole distribution: probabilities are later taken of just that one.

    Args:
        engine: of the policy; what it remembers of prompts is forgotten first, as it belongs to earlier weights.
        prompts: {"input_ids", "attention_mask"}, (B, P), padded on the left; on the CPU, as what is returned.
        end_token_ids: the tokens that end an answer.
        generator: on the CPU; where the seed of each answer comes from. None: torch's own.

    Returns:
        "input_ids", "attention_mask": (B, T), the answers behind their prompts, cut at the stop token.
        "answer_mask": (B, R) bool, the tokens that the policy wrote, the stop token included.
        "ended": (B,) bool, whether there is a stop token.

    Raises:
        UserError: the policy's output is not finite.
    """
    rows = [ids[seen.bool()].tolist() for ids, seen in zip(*prompts.values(), strict=True)]
    seeds = torch.randint(2**62, (len(rows),), generator=generator).tolist()  # an answer does not depend on its batch
    ends = tuple(end_token_ids)
    settings = [SamplingParams(max_gen_len, temperature, stop_token_ids=ends, seed=seed) for seed in seeds]
    try:
        engine.forget()
        written = engine.run(rows, settings)
    except RequestFailed as failure:
        raise UserError(
            f"the policy cannot write answers: {failure}; where training has made it so, lower --lr, and otherwise "
            "start from another checkpoint"
        ) from failure
    pad = torch.nn.utils.rnn.pad_sequence
    answers = [torch.tensor(generation.token_ids) for generation in written]
    answer_mask = pad([torch.ones_like(ids, dtype=torch.bool) for ids in answers], batch_first=True)  # (B, R)
    answer_ids = pad(answers, batch_first=True, padding_value=engine.model.config.pad_token_id)  # (B, R)
    return {
        "input_ids": torch.cat((prompts["input_ids"], answer_ids), dim=1),
        "attention_mask": torch.cat((prompts["attention_mask"], answer_mask.long()), dim=1),
        "answer_mask": answer_mask,
        "ended": torch.tensor([generation.ended for generation in written]),
    }


def rounding_noise(precision: torch.dtype) -> float:
    """The spread, as a share of the values' size, below which values computed in this precision are the same."""
    return 1e-2 if precision in (torch.bfloat16, torch.float16) else 1e-5


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of x (B, R) over the tokens where the mask (B, R) is true."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def kl_terms(log_probs: torch.Tensor, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    """For each sampled token, an estimate of KL(policy ‖ reference) that is right on average; any shape.

    http://joschu.net/blog/kl-approx.html: with r = π_ref(token) / π(token), k1 = −log r, and k3 = (r − 1) − log r,
    which is never negative and varies less.
    """
    log_ratio = reference - log_probs
    return -log_ratio if estimator == "k1" else log_ratio.expm1() - log_ratio


class RolloutLoop(TrainingLoop):
    """The training loop of a policy that learns from its own answers.

    A subclass says what an answer is worth (`judge`) and how a step's answers become `update`s (`learn_from`).

    Args:
        model: has the policy as `model.policy`; turns a batch into `{"loss", "policy/approxkl_avg", …}`.
        needs_reference: whether the divergence from the policy's first state is asked for.
    """

    shown = ("objective/scores", "objective/kl")
    epoch_figures = ("objective/scores", "val_reward")
    published = "policy"
    measures_at_start = False  # a step's batch is of prompts; memory is measured when there are answers
    best_by = "val_reward"  # what the best policy has most of
    group_size = 1  # answers to each prompt
    has_measured = False  # what memory holds

    def __init__(
        self,
        config: RolloutConfig,
        model: nn.Module,
        stage: str,
        tokenizer: ByteLevelBPETokenizer,
        prompts: GPTPPODataset,
        val_prompts: GPTPPODataset,
        device: torch.device,
        needs_reference: bool = True,
    ) -> None:
        self.reference = None  # with LoRA it is the policy without its adapters
        if needs_reference and not lora_layers(model.policy):
            self.reference = copy.deepcopy(model.policy).to(device).eval().requires_grad_(False)
        super().__init__(config, model, model.policy.config, tokenizer, stage, prompts, val_prompts, device)
        self.needs_reference = needs_reference
        if len(val_prompts) < self.ranks:
            raise UserError(
                f"{len(val_prompts)} held-out prompts are too few for {self.ranks} ranks; raise --val_fraction or give "
                "held-out data"
            )

    def global_batch(self) -> int:
        """Prompts of one step over all ranks."""
        return self.config.rollout_batch_size // self.group_size * self.ranks

    def train_step(self) -> dict[str, float]:
        """A batch of fresh answers, and the updates that are made with them."""
        self.parallel_model.eval()  # dropout would make the ratio differ from 1 before anything has changed
        mine = self.order.batch(self.step)[ranks.rank() :: self.ranks]
        return self.learn_from(self.rollout(self.train_data, [index for index in mine for _ in range(self.group_size)]))

    def learn_from(self, rollout: Batch) -> dict[str, float]:
        """The updates of one step; returns its figures."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------- rollouts

    @cached_property
    def engine(self) -> Engine:
        """See `engine_of`."""
        longest = max(len(ids) for data in (self.train_data, self.val_data) for ids in data.samples)
        return engine_of(self.model.policy, self.config.rollout_batch_size, longest + self.config.max_gen_len)

    @torch.no_grad()
    def rollout(self, data: GPTPPODataset, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Let the policy answer prompts, and score the answers.

        Returns:
            see `write_answers`, and what `judge` adds; a row for each index. All of it is on the CPU: it is little, and
            what is reckoned with it are many small steps that a GPU would have to be called for one by one.
        """
        prompts = data.collate([data[index] for index in indices])
        answers = write_answers(
            self.engine,
            prompts,
            end_token_ids=self.tokenizer.end_token_ids,
            max_gen_len=self.config.max_gen_len,
            temperature=self.config.temperature,
            generator=generator,
        )
        answers["indices"] = torch.tensor(indices)

        def judged() -> list[Batch]:
            several = (select(answers, rows) for rows in torch.arange(len(indices)).split(self.evaluation_batch_size))
            with self.updater.autocast():
                return [self.judge(data, part, self._to_device(part)) for part in several]

        parts = self.within_memory(judged, "evaluation_batch_size")
        return answers | to_host({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def prepared(self, batch: Batch) -> Batch:
        """With rows of few different lengths, and the places of the answers' tokens among all that have room.

        Rows are filled up on the left: prompts are, and answers are what stands at the end.
        """
        length = batch["input_ids"].size(1)
        missing = min(-length % self.length_multiple, self.config.max_seq_len - length)
        fillers = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0}
        longer = {name: F.pad(batch[name], (missing, 0), value=filler) for name, filler in fillers.items()}
        mixed_in = super().prepared({name: value for name, value in batch.items() if name.startswith("sft_")})
        return {**batch, **longer, **mixed_in, "places": places_of(batch["answer_mask"])}

    def judge(self, data: GPTPPODataset, answers: Batch, on_device: Batch) -> Batch:
        """ "scores" (B,), "old_log_probs" and "kl" (B, R), and whatever else the loss needs.

        Args:
            answers, on_device: see `write_answers`; the second with "places", where the networks are.
        """
        raise NotImplementedError

    def log_probs(self, answers: Batch) -> torch.Tensor:
        """log π(token | tokens before it) of the policy for answer tokens, (B, R)."""
        return answer_token_log_probs(self.model.policy, answers, self.config.temperature)[0]

    def reference_log_probs(self, answers: Batch) -> torch.Tensor:
        """The same of the policy that training started from."""
        if self.reference is not None:
            return answer_token_log_probs(self.reference, answers, self.config.temperature)[0]
        with adapters_disabled(self.model.policy):
            return self.log_probs(answers)

    def figures_of(self, rollout: Batch, **more: torch.Tensor) -> dict[str, float]:
        """What can be said of answers, and `more`, (B,) each: the means over all ranks."""
        values = {
            "objective/entropy": -rollout["old_log_probs"].sum(dim=1),  # of an answer, estimated by itself
            "objective/scores": rollout["scores"],
            "objective/ended": rollout["ended"],
            "answer_length": rollout["answer_mask"].sum(dim=1),
            **{f"objective/{name}": value for name, value in more.items()},
        }
        if self.needs_reference:
            values["objective/kl"] = rollout["kl"].sum(dim=1)
        return {name: self.mean(value) for name, value in values.items()}

    def mean(self, x: torch.Tensor) -> float:
        """The mean over the values of all ranks, in double precision."""
        x = x.detach().cpu().double()
        total, n = ranks.sum_over_ranks(float(x.sum()), float(x.numel()))
        return total / n

    def moments(self, x: torch.Tensor) -> tuple[float, float]:
        """Mean and standard deviation over the values of all ranks.

        In two passes: E[x²] − E[x]² is rounding noise wherever the spread is small beside the mean.
        """
        mean = self.mean(x)
        return mean, self.mean((x.detach().cpu().double() - mean).square()) ** 0.5

    # -------------------------------------------------------------------------------------------------------- updates

    def update(self, rollout: Batch, n_epochs: int) -> dict[str, float]:
        """Passes over a batch of answers, in minibatches that are shuffled anew for each; a minibatch is an update.

        With `--target_kl` the passes end before an update that would start from a policy too far from the one that
        wrote the answers: its gradients are thrown away.

        Returns:
            the means over minibatches of the loss, the norm of its gradient and every other scalar of the model, and
            how many updates were made.
        """
        config, (n_answers, length), lr = self.config, rollout["input_ids"].shape, self.learning_rate()
        if not self.has_measured:
            self.has_measured, some = True, torch.arange(self.n_of_step) % n_answers
            self.fit_memory(lambda n: self.minibatch(rollout, some[:n], 0), config.max_seq_len / length)
        shuffled = (rows for _ in range(n_epochs) for rows in torch.randperm(n_answers).split(self.n_of_step))
        results, grad_norms = [], []
        for number, rows in enumerate(shuffled):

            def gradients(rows: torch.Tensor = rows, start: int = number * self.n_of_step) -> dict[str, torch.Tensor]:
                parts, size = rows.split(self.micro_batch_size), self.micro_batch_size
                batches = [self.minibatch(rollout, part, start + i * size) for i, part in enumerate(parts)]
                return self.accumulate(batches, [self.count(batch) for batch in batches])

            sums = self.within_memory(gradients)
            results.append(self.means({**sums, "grad_norm": self.updater.clip_gradients()}))
            grad_norm = results[-1].pop("grad_norm")
            if grad_norms and 0 < config.target_kl < results[-1]["policy/approxkl_avg"]:
                self.updater.discard()
                break
            self.updater.apply(lr, grad_norm, results[-1]["loss"])
            grad_norms.append(grad_norm)
        means = {name: sum(result[name] for result in results) / len(results) for name in results[0]}
        return {**means, "grad_norm": sum(grad_norms) / len(grad_norms), "lr": lr, "policy/updates": len(grad_norms)}

    def minibatch(self, rollout: Batch, rows: torch.Tensor, first: int) -> Batch:
        """The arguments of the model's `forward` for some rows of a rollout, before which a step has seen `first`."""
        return select(rollout, rows)

    def count(self, batch: Batch) -> int:
        """How many items the loss of a minibatch is the mean of: answer tokens."""
        return int(batch["answer_mask"].sum())

    # ----------------------------------------------------------------------------------------------------- evaluation

    def validation_rollouts(self) -> list[Batch]:
        """Answers to this rank's share of the held-out prompts, with the same random numbers every time."""
        self.parallel_model.eval()
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        indices, size = range(ranks.rank(), len(self.val_data), self.ranks), self.config.rollout_batch_size
        parts = [indices[start : start + size] for start in range(0, len(indices), size)]
        return [self.rollout(self.val_data, part, generator) for part in parts]

    def evaluate(self) -> dict[str, float]:
        """Means over answers to held-out prompts, of which a few are shown."""
        rollouts = self.validation_rollouts()
        self.show(rollouts)
        figures = {"val_reward": (r["scores"] for r in rollouts), "val_ended": (r["ended"].float() for r in rollouts)}
        if self.needs_reference:
            figures["val_kl"] = (rollout["kl"].sum(dim=1) for rollout in rollouts)
        return {name: self.mean(torch.cat(list(parts))) for name, parts in figures.items()}

    def is_better(self, metrics: dict[str, float], best: dict[str, float]) -> bool:
        """Whether an evaluation beats the best one so far."""
        return metrics[self.best_by] > best[self.best_by]

    def show(self, rollouts: Iterable[Batch]) -> None:
        """Print the answers to the first held-out prompts, and add them to `samples.jsonl`."""
        if not ranks.is_main():
            return
        samples = [
            {
                "step": self.step,
                "prompt": self.tokenizer.decode(ids[: -len(wrote)][seen[: -len(wrote)].bool()]).strip(),
                "answer": self.tokenizer.decode(ids[-len(wrote) :][wrote]).strip(),
                "score": round(float(score), 4),
                "ended": bool(ended),
            }
            for rollout in rollouts
            for ids, seen, wrote, score, ended in zip(
                *(rollout[name] for name in ("input_ids", "attention_mask", "answer_mask", "scores", "ended")),
                strict=True,
            )
        ][: self.config.n_samples]
        path = self.folder / "samples.jsonl"
        earlier = [
            sample for sample in read_metrics(path) if sample["step"] < self.step
        ]  # what a killed run wrote goes
        lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in earlier + samples)
        with replacing(path, "free some space") as file:
            file.write("".join(lines).encode())
        for sample in samples:
            prompt, answer = (" ".join(sample[name].split()) for name in ("prompt", "answer"))
            tqdm.write(f"  {sample['score']:+6.2f}  {prompt} → {answer}{'' if sample['ended'] else ' …'}")


def answer_token_log_probs(
    model: GPTModel, answers: Batch, temperature: float, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of answer tokens and the entropies there, (B, R) each; 0 behind the end of an answer.

    Args:
        answers: {"input_ids" (B, T), "attention_mask" (B, T), "answer_mask" (B, R)}; with "places", where in the mask
            the tokens are, no GPU has to be waited for.
    """
    first = answers["input_ids"].size(1) - answers["answer_mask"].size(1)
    return token_log_probs(
        model,
        answers["input_ids"],
        answers["attention_mask"],
        first=first,
        places=answers.get("places"),
        temperature=temperature,
        with_entropy=with_entropy,
    )


def policy_figures(
    old_log_probs: torch.Tensor, log_probs: torch.Tensor, entropy: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """How far the policy has moved from the one that wrote the answers, and how sure it is; all but the mask (B, R)."""
    return {
        # KL(old ‖ new): the tokens are the old policy's, http://joschu.net/blog/kl-approx.html, k3
        "policy/approxkl_avg": masked_mean(kl_terms(old_log_probs, log_probs, "k3"), mask),
        "policy/entropy_avg": masked_mean(entropy, mask),
        "val/ratio": masked_mean((log_probs - old_log_probs).exp(), mask),
    }


def select(batch: Batch, rows: torch.Tensor) -> Batch:
    """Some rows of every tensor of a batch."""
    return {name: value[rows] for name, value in batch.items()}
