"""What every stage after pretraining has in common, so that its own file shows its idea alone: data, loss, metrics.

    policy, tokenizer, device = open_stage(config)
    train_data, val_data = load_parts(config, policy.config, load_preferences, lambda records, account: …)
    loop = …                                     # a model that has the stage's loss
    return run(loop, "DPO on 200 preferences", "aligned", lambda best: f"margin {best['val_rewards/margins']:.2f}")

A stage's settings inherit `StageConfig`, `LoRAOptions` where adapters make sense, and of the options below those that
it shares with others. Which checkpoint it starts from and which data it reads are among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_model
from command_line import UserError, option, require_file
from data_loader import Batch, BatchOrder, GPTSFTDataset, RecordData
from gpt_model import GPTConfig, GPTModel
from lora import apply_lora
from text.account import Account
from text.conversation_data import RecordOptions, load_conversations, parse_columns
from text.text_files import RECORD_ENDINGS, resolve_files
from training import ranks
from training.memory_options import fit_options
from training.training_config import TrainingConfig, prepare_machine
from training.training_loop import TrainingLoop

# ------------------------------------------------------------------------------------------------------------ settings


@dataclass
class StageConfig(RecordOptions, TrainingConfig):
    """Settings that all stages share."""

    data: ClassVar[str]  # the option that names the data; with `val_` before it, that of the held-out data
    start: ClassVar[tuple[str, str, str]] = ("sft_model", "the SFT model", "run finetune.py --mode sft first")

    val_fraction: float = option(0.05, "share of the data held out, if there is no held-out data", at_least=0, below=1)
    max_seq_len: int = option(0, "longest sample, in tokens; 0 means the model's context", at_least=0)
    batch_size: int = 32

    def validate(self) -> list[str]:
        """What does not fit together, a sentence each."""
        complaints = super().validate()
        if not self.val_fraction and not getattr(self, f"val_{self.data}"):
            complaints.append(f"--val_fraction must be above 0, unless --val_{self.data} is given")
        return complaints


@dataclass
class InstructionData:
    """Options of the stages that learn from answers, or answer questions."""

    data: ClassVar[str] = "data_path"
    data_path: str = option(
        "data/sft/sft_data.json", "instruction data, see the README for its shapes", reads="records"
    )
    val_data_path: str = option(
        "", "held-out data of the same kind; empty: --val_fraction of the training data", reads="records"
    )


@dataclass
class SFTStart:
    """The option of the stages that go on from SFT."""

    sft_model: str = option(
        "models/sft/sft_best.pth", "the checkpoint to start from, which is also the reference", reads="model"
    )


@dataclass
class PreferenceData(SFTStart):
    """Options of the stages that learn from preferences."""

    rows_of_sample: ClassVar[int] = 2

    data: ClassVar[str] = "pairwise_data"
    pairwise_data: str = option(
        "data/sft/rlhf_pairwise.json", "preference data, see the README for its shapes", reads="records"
    )
    val_pairwise_data: str = option(
        "", "held-out preferences; empty: --val_fraction of the training data", reads="records"
    )


@dataclass
class InstructionsMixedIn:
    """Options of the stages that may keep learning from instruction data, too."""

    sft_data: str = option(
        "", "instruction data to keep learning from, so that nothing is forgotten; empty: none", reads="records"
    )
    sft_coef: float = option(1.0, "weight of the supervised loss on --sft_data", at_least=0)


# ------------------------------------------------------------------------------------------------------------- opening


def open_stage(config: StageConfig) -> tuple[GPTModel, ByteLevelBPETokenizer, torch.device]:
    """The model to start from, with adapters if any are asked for; its tokenizer; and the device.

    Raises:
        UserError: something is missing, or unfit; before any work is done.
    """
    path = start_of(config)
    for name in (config.data, f"val_{config.data}", "sft_data"):
        if given := getattr(config, name, ""):
            resolve_files(given, RECORD_ENDINGS)
    device = prepare_machine(config)
    model, tokenizer, _ = load_model(path)
    fit_context(config, model)
    said = fit_options(config, model.config, device)
    if said and ranks.is_main():
        print(said, flush=True)
    apply_lora(model, config, path)
    return model, tokenizer, device


def start_of(config: StageConfig) -> str:
    """The path of the checkpoint that a stage starts from, which is there."""
    name, what, remedy = config.start
    path = getattr(config, name)
    require_file(path, what, f"{remedy}, or check the path")
    return path


def read_account(config: StageConfig, model: GPTConfig, path: str, kind: str, advice: str = "") -> Account:
    """An empty account of a data path, with the advice that fits these settings and this model."""
    return account_of(config, path, kind, advice or room_advice(config, model))


def account_of(config: Any, path: str, kind: str, advice: str) -> Account:
    """An empty account of a data path; malformed records that are skipped are kept in the run's folder.

    Args:
        config: settings that are `RecordOptions` and `TrainingConfig`.
    """
    bad_records = Path(config.output_dir) / f"left_out_of_{Path(path).stem}.jsonl" if ranks.is_main() else None
    return Account(path, kind, advice, config.skip_bad_records, bad_records)


def room_advice(config: StageConfig, model: GPTConfig) -> str:
    """What helps where records are too long for `max_seq_len`."""
    if config.max_seq_len < model.max_seq_len:
        return f"raise --max_seq_len (now {config.max_seq_len}; the model's context is {model.max_seq_len})"
    return (
        f"the model's context of {model.max_seq_len} tokens was fixed in pretraining: give shorter records, or "
        "pretrain with a larger --max_seq_len"
    )


def load_parts(
    config: StageConfig,
    model: GPTConfig,
    load: Callable[..., list],
    make: Callable[[list, Account], RecordData],
    kind: str,
    *,
    advice: str = "",
    quiet: bool = False,
) -> tuple[Any, Any]:
    """The data to train on and the held-out data: of a file of its own, or a share of what fits.

    Args:
        load: (path, account, columns) → records.
        make: records and their account → a data set.
        kind: what the records are called.
        advice: what helps where they are too long, in place of `room_advice`.
        quiet: say nothing of what was read.

    Raises:
        UserError: records that are malformed, or too few that fit.
    """

    def read(path: str) -> RecordData:
        account = read_account(config, model, path, kind, advice)
        return make(load(path, account, columns=parse_columns(config.columns)), account)

    data = read(getattr(config, config.data))
    if val_path := getattr(config, f"val_{config.data}"):
        parts = data, read(val_path)
    else:
        parts = data.split(config.val_fraction)
        if not all(map(len, parts)):
            account = data.account
            raise UserError(
                f"{account.source} has {account.read:,} {kind}, of which {len(data)} can be used, too few to set some "
                f"aside; give --val_{config.data} or more records{f'; {account.advice}' if account.left_out else ''}"
            )
    if not quiet:
        say_accounts(parts)
    return parts


def say_accounts(data_sets: Sequence[RecordData]) -> None:
    """Say what became of the records, once for each file."""
    if ranks.is_main():
        for account in {id(data.account): data.account for data in data_sets}.values():
            print(*account.sentences(), sep="\n", flush=True)


def fit_context(config: TrainingConfig, model: GPTModel) -> None:
    """Settle `max_seq_len`: what the model can take, unless the user asked for less."""
    limit = model.config.max_seq_len
    if config.max_seq_len > limit:
        raise UserError(
            f"--max_seq_len {config.max_seq_len} is beyond the model's context of {limit}, which was fixed in "
            "pretraining; lower it, or pretrain with a larger --max_seq_len"
        )
    config.max_seq_len = config.max_seq_len or limit


# ------------------------------------------------------------------------------------------------------------- closing


def run(loop: TrainingLoop, doing: str, done: str, figures: Callable[[dict[str, float]], str]) -> dict[str, float]:
    """Train, and say what is being done and what has been made; returns the metrics of the best model."""
    if ranks.is_main():
        print(doing)
    best = loop.train()
    if ranks.is_main():
        curves = loop.folder / "curves.png"
        print(f"{done}: {loop.best_path}, {figures(best)}, {loop.seconds:.0f} s; curves in {curves}")
    return best


# ---------------------------------------------------------------------------------------------- instructions mixed in


class Instructions:
    """Instruction data beside the data of a stage: which of it a step sees depends on the seed and the step alone."""

    def __init__(self, config: StageConfig, data: GPTSFTDataset, batch_size: int) -> None:
        self.data, self.order = data, BatchOrder(len(data), batch_size, config.seed, data.lengths)

    def batch(self, indices: Sequence[int]) -> Batch:
        """{"sft_input_ids", "sft_labels"}, which stand in a batch of the stage."""
        batch = self.data.collate([self.data[index] for index in indices])
        return {f"sft_{name}": value for name, value in batch.items()}


def mix_in(loop: TrainingLoop, data: GPTSFTDataset | None) -> Instructions | None:
    """The data of `--sft_data` for the steps of a loop, whose records then tell of it, too."""
    if data is None:
        return None
    loop.accounts["sft_data"] = data.account
    return Instructions(loop.config, data, loop.global_batch())


def load_instructions(
    config: StageConfig, tokenizer: ByteLevelBPETokenizer, model: GPTConfig
) -> GPTSFTDataset | None:
    """The data of `--sft_data`, if there is any."""
    if not config.sft_data:
        return None
    account = read_account(config, model, config.sft_data, "conversations")
    conversations = load_conversations(config.sft_data, account, columns=parse_columns(config.columns))
    data = GPTSFTDataset(conversations, tokenizer, config.max_seq_len, account)
    say_accounts([data])
    return data
