"""Small PPO and GRPO loops for the tests, and what each of two ranks does with them."""

import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from conftest import CORPUS, TINY, randomize  # noqa: E402

from alignment.grpo import GRPOConfig, GRPOLoop, RecordDataset  # noqa: E402
from alignment.ppo import PPOConfig, PPOLoop  # noqa: E402
from alignment.reward_model import RewardModel  # noqa: E402
from alignment.rollouts import select  # noqa: E402
from byte_level_bpe import ByteLevelBPETokenizer  # noqa: E402
from checkpoint import save_checkpoint  # noqa: E402
from command_line import complaints_about  # noqa: E402
from data_loader import GPTPPODataset  # noqa: E402
from gpt_model import GPTConfig, GPTModel  # noqa: E402
from lora import apply_lora  # noqa: E402
from text.conversation_data import parse_task  # noqa: E402
from training import ranks  # noqa: E402
from training.training_config import prepare_machine  # noqa: E402

PROMPTS = ["a", "法国的首都", "What is the capital of France?", "二加三", "The quick brown fox jumps", "hi there"]
COMMON = dict(device="cpu", precision="fp32", num_threads=1, log_interval=1)
ALGORITHMS = ("ppo", "grpo")


def make_tokenizer():
    """That of conftest.py, for processes of their own."""
    tokenizer = ByteLevelBPETokenizer(vocab_size=320)
    tokenizer.train(CORPUS)
    return tokenizer


def make_policy(tokenizer, seed=0):
    """A random policy that is not too sure of anything, and ends some of its answers early."""
    sizes = {**TINY, "vocab_size": len(tokenizer), "max_seq_len": 48, "n_kv_heads": 2}
    policy = GPTModel.from_config(GPTConfig.for_architecture("modern", **sizes))
    randomize(policy, seed)
    policy.lm_head.weight.data.mul_(0.5)
    policy.lm_head.weight.data[tokenizer.eos_token_id] *= 4
    return policy.eval()


def make_reward_model(tokenizer, kind=RewardModel):
    sizes = {**TINY, "vocab_size": len(tokenizer), "max_seq_len": 48}
    backbone = GPTModel.from_config(GPTConfig.for_architecture("gpt2", **sizes))
    randomize(backbone, 1)
    torch.manual_seed(1)
    return kind(backbone.eval())


def letters(prompts, responses, records):
    """A reward function: how many letters e there are, and ASCII characters at all."""
    return [text.count("e") + sum(0.1 for character in text if character.isascii()) for text in responses]


def make_loop(algorithm, folder, tokenizer, reward=None, **settings):
    """PPO or GRPO on a random policy that writes answers of up to 6 tokens after prompts of different lengths.

    `reward` is a class of reward models for PPO and a function for GRPO.
    """
    usual = dict(max_gen_len=6, rollout_batch_size=8, batch_size=4, max_steps=2, eval_interval=2, max_seq_len=48)
    usual |= dict(schedule="constant", sft_model=str(Path(folder) / "sft.pth"), output_dir=str(folder))
    if algorithm == "ppo":
        usual |= dict(ppo_epochs=2, critic_warmup_steps=0, critic_lr_scale=1.0, gae_lambda=0.95)
    else:
        usual |= dict(grpo_epochs=2, group_size=4)
    config = {"ppo": PPOConfig, "grpo": GRPOConfig}[algorithm](**{**COMMON, **usual, **settings})
    assert complaints_about(config) == []
    device = prepare_machine(config)
    policy = make_policy(tokenizer)
    if config.lora_rank:
        state = policy.state_dict()
        save_checkpoint(config.sft_model, model_state=state, config=policy.config, tokenizer=tokenizer, stage="sft")
        apply_lora(policy, config, config.sft_model)
    if algorithm == "grpo":
        data = RecordDataset([parse_task({"instruction": text}, text) for text in PROMPTS], tokenizer, 42)
        return GRPOLoop(config, policy, tokenizer, reward or letters, data, data, device)
    prompts = GPTPPODataset([[{"role": "user", "content": text}] for text in PROMPTS], tokenizer, 42)
    reward_model = make_reward_model(tokenizer, reward or RewardModel)
    return PPOLoop(config, policy, reward_model, tokenizer, prompts, prompts, device)


def fixed_rollout(loop, seed=3, repeat=4):
    """Two groups of answers, the same whatever has been drawn before."""
    loop.parallel_model.eval()
    generator = torch.Generator().manual_seed(seed)
    return loop.rollout(loop.train_data, [index for index in (0, 2) for _ in range(repeat)], generator)


def two_steps(algorithm, folder, tokenizer, n_ranks):
    """The figures of two steps on eight answers, all of them here or half of them on this rank."""
    loop = make_loop(
        algorithm, folder, tokenizer, rollout_batch_size=8 // n_ranks, batch_size=2, grad_accum_steps=4 // n_ranks,
        lr=3e-3, warmup_steps=0,
    )  # fmt: skip
    mine = torch.arange(8).view(n_ranks, -1)[ranks.rank()]
    figures = [loop.learn_from(select(fixed_rollout(loop, seed), mine)) for seed in (3, 4)]
    return [{name: value for name, value in step.items() if name != "tokens"} for step in figures]


def work_as_a_rank(folder):
    """Two steps of each algorithm; rank 0 leaves their figures in `folder/results.json`."""
    folder = Path(folder)
    results = {name: two_steps(name, folder / name, make_tokenizer(), 2) for name in ALGORITHMS}
    if ranks.is_main():
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    ranks.barrier()  # who leaves first must not take the connection with it
    ranks.stop()
