"""Everything that comes after pretraining, by `--mode`.

    python finetune.py --mode sft    --pretrained_model models/pretrain/pretrain_best.pth
    python finetune.py --mode reward --pairwise_data data/sft/rlhf_pairwise.json --sft_model models/sft/sft_best.pth
    python finetune.py --mode ppo    --reward_model models/reward/reward_best.pth
    python finetune.py --mode dpo    --pairwise_data data/sft/rlhf_pairwise.json --sft_model models/sft/sft_best.pth
    python finetune.py --mode kto    --pairwise_data data/sft/rlhf_pairwise.json --sft_model models/sft/sft_best.pth
    python finetune.py --mode distill --teacher_model models/sft/sft_best.pth
    python finetune.py --mode classify --data_path labelled.json --sft_model models/sft/sft_best.pth
    python finetune.py --mode rlhf   # the reward model, then PPO
    python finetune.py --mode grpo   --reward evaluation/answer_checker.py:preference_reward

`python finetune.py --mode sft --help` lists the options of a mode. Where the data is preferences, `--data_path` is
another name of `--pairwise_data`.
"""

from __future__ import annotations

import sys

from alignment.classify import ClassifyConfig, classify
from alignment.distillation import DistillationConfig, distill
from alignment.dpo import DPOConfig, dpo
from alignment.grpo import GRPOConfig, train_grpo
from alignment.kto import KTOConfig, kto
from alignment.ppo import PPOConfig, rlhf_ppo
from alignment.reward_model import RewardConfig, RewardModel, train_reward_model
from alignment.sft import SFTConfig, sft_finetune
from command_line import UserError, parse_config, run_main
from training import ranks

__all__ = ["RewardModel", "rlhf_ppo", "sft_finetune", "train_reward_model"]

MODES = {
    "sft": (SFTConfig, sft_finetune, "Supervised fine-tuning on instruction data."),
    "reward": (RewardConfig, train_reward_model, "Train a reward model on preference pairs."),
    "ppo": (PPOConfig, rlhf_ppo, "Align with preferences by PPO, given a reward model."),
    "dpo": (DPOConfig, dpo, "Align with preferences by DPO, without a reward model."),
    "kto": (KTOConfig, kto, "Align with answers that are called good or bad, by KTO."),
    "classify": (ClassifyConfig, classify, "Train a classifier of texts, which can serve as a filter."),
    "distill": (DistillationConfig, distill, "Teach a small model what a larger one knows."),
    "rlhf": (PPOConfig, rlhf_ppo, "Train a reward model, then align with preferences by PPO."),
    "grpo": (GRPOConfig, train_grpo, "Learn from a reward function of your own by GRPO."),
}


def split_mode(argv: list[str]) -> tuple[str, list[str]]:
    """Take `--mode NAME` (or `--mode=NAME`) out of the arguments."""
    modes = f"one of {', '.join(MODES)}"
    for index, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name == "--mode":
            rest = argv[:index] + argv[index + (1 if equals else 2) :]
            value = value if equals else "".join(argv[index + 1 : index + 2])
            if value not in MODES:
                raise UserError(f"--mode {value or '(empty)'} is not known; it must be {modes}")
            return value, rest
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        sys.exit(0)
    raise UserError(f"--mode is missing; it must be {modes}")


def name_preferences(config_class: type, argv: list[str]) -> list[str]:
    """The arguments with `--data_path` (and `--val_data_path`) called what the stage calls its data.

    Raises:
        UserError: both names are used.
    """
    renamed = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        own_name = {"--data_path": f"--{config_class.data}", "--val_data_path": f"--val_{config_class.data}"}.get(name)
        if own_name not in (None, name) and any(other.partition("=")[0] == own_name for other in argv):
            raise UserError(f"{name} and {own_name} are two names of one thing here; give one of them")
        renamed.append(f"{own_name or name}{equals}{value}")
    return renamed


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    mode, rest = split_mode(sys.argv[1:] if argv is None else argv)
    config_class, run, description = MODES[mode]
    config = parse_config(config_class, name_preferences(config_class, rest), description=description)
    if mode == "ppo" and not config.reward_model:
        raise UserError("--mode ppo needs --reward_model PATH; --mode rlhf trains one first")
    run(config)
    ranks.stop()


if __name__ == "__main__":
    run_main(main)
