"""Reward model, DPO, KTO and distillation on two ranks take the steps of one process.

One pair of processes over gloo runs all three; what one process does is run here, in the test's own.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from conftest import CORPUS, randomize  # noqa: E402
from on_ranks import run_on_ranks  # noqa: E402

import finetune  # noqa: E402
import transformer_components  # noqa: E402
from byte_level_bpe import ByteLevelBPETokenizer  # noqa: E402
from checkpoint import load_model, save_checkpoint  # noqa: E402
from command_line import parse_config  # noqa: E402
from gpt_model import GPTConfig, GPTModel  # noqa: E402
from training import ranks  # noqa: E402
from training.run_log import read_metrics  # noqa: E402
from transformer_components import AuxiliaryLoss, FeedForwardNetwork  # noqa: E402

STEPS = 3
COMMON = "--device cpu --precision fp32 --num_threads 1 --log_interval 1 --eval_interval 3 --val_fraction 0.3"
RUNS = {
    "reward": "--mode reward --pairwise_data pairs.json --sft_model sft.pth --center_rewards_coefficient 0.1",
    "dpo": "--mode dpo --pairwise_data pairs.json --sft_model sft.pth --sft_data sft.json --lr 3e-3",
    "dpo with losses of layers": "--mode dpo --pairwise_data pairs.json --sft_model sft.pth --lr 3e-3",
    "dpo with lora": "--mode dpo --pairwise_data pairs.json --sft_model sft.pth --lora_rank 2 --lr 3e-3",
    "kto": "--mode kto --pairwise_data pairs.json --sft_model sft.pth --sft_data sft.json --lr 3e-3",
    "distill": "--mode distill --teacher_model sft.pth --data_path sft.json --n_layers 1",
    "distill from text": "--mode distill --teacher_model sft.pth --data_path sft.json --n_layers 1 --from_text",
}


class SmallWeights(AuxiliaryLoss, FeedForwardNetwork):
    """A part with a loss of its own, beside that of the predictions."""

    def forward(self, x):
        self.add_auxiliary_loss(1e-3 * self.up_proj.weight.square().sum())
        return super().forward(x)


def run_all(n_ranks):
    """All trainers in the current folder, with 4 samples a step on every number of ranks."""
    torch.set_num_threads(1)
    for name, options in RUNS.items():
        transformer_components.FeedForwardNetwork = SmallWeights if "of layers" in name else FeedForwardNetwork
        batch = f"--batch_size {2 // n_ranks} --grad_accum_steps 2 --max_steps {STEPS}"
        mode, arguments = finetune.split_mode(
            [*f"{options} {batch} {COMMON}".split(), "--output_dir", f"{name} on {n_ranks}"]
        )
        config_class, train, _ = finetune.MODES[mode]
        train(parse_config(config_class, arguments, description=""))


def work_as_a_rank():
    run_all(2)
    ranks.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which one process and two ranks have trained."""
    path = tmp_path_factory.mktemp("ranks")
    tokenizer = ByteLevelBPETokenizer(vocab_size=320)
    tokenizer.train(CORPUS)
    config = GPTConfig.for_architecture("modern", vocab_size=320, d_model=32, n_layers=2, n_heads=4, max_seq_len=48)
    model = GPTModel.from_config(config)
    randomize(model, seed=4)
    model.lm_head.weight.data[tokenizer.eos_token_id] += 1.0  # so that answers end
    save_checkpoint(path / "sft.pth", model_state=model.state_dict(), config=config, tokenizer=tokenizer, stage="sft")
    pairs = [
        {"instruction": f"x{k}", "responses": ["yes, " * (1 + k % 3), "no", "maybe"][: 2 + k % 2]} for k in range(20)
    ]
    (path / "pairs.json").write_text(json.dumps(pairs))
    conversations = [{"instruction": "q" * (1 + k), "response": "a " * (1 + k % 4)} for k in range(20)]
    (path / "sft.json").write_text(json.dumps(conversations))
    before = Path.cwd()
    os.chdir(path)
    try:
        run_all(1)
    finally:
        os.chdir(before)
    run_on_ranks(2, "test_alignment_on_ranks", cwd=path)
    return path


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_give_the_figures_of_one(name, folder):
    """Losses, gradient norms, every figure of the step and of the evaluation."""
    one, two = (read_metrics(folder / f"{name} on {n_ranks}" / "metrics.jsonl") for n_ranks in (1, 2))
    assert len(one) == len(two) >= STEPS + 1
    for ours, expected in zip(two, one, strict=True):
        assert ours.keys() == expected.keys()
        assert ("aux_loss" in ours) == ("of layers" in name and "loss" in ours)
        untold = {"tokens_per_second", "mfu", "memory_mib", "seconds"}
        if ours["step"] == 1:
            untold.add("rewards/accuracies")  # policy and reference are equal: which is ahead is rounding
        for key in ours.keys() - untold:
            assert ours[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("name", [name for name in RUNS if name != "reward"])
def test_two_ranks_leave_the_model_of_one(name, folder):
    one, two = (next((folder / f"{name} on {n_ranks}").glob("*_best.pth")) for n_ranks in (1, 2))
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        logits = [load_model(path)[0](ids)["logits"] for path in (one, two)]
    assert torch.allclose(*logits, atol=1e-3)
