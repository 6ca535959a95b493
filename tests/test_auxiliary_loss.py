"""What layers want minimised of their own reaches every trainer's gradients exactly once, and no evaluation.

That two ranks count it once, too, and that pipelines refuse it, is tested with the other trainers on ranks.
"""

import json
import shlex

import pytest
import torch
from conftest import CORPUS, randomize
from test_distributed import RaggedData, make_loop

import finetune
import pretrain_trainer
import transformer_components
from alignment.reward_model import RewardModel
from checkpoint import save_checkpoint
from gpt_model import GPTConfig, GPTModel
from training.run_log import read_metrics
from training.training_loop import TrainingLoop
from transformer_components import AuxiliaryLoss, FeedForwardNetwork, auxiliary_losses


class SmallWeights(AuxiliaryLoss, FeedForwardNetwork):
    """Wants its weights to be small: c ‖W‖², whose gradient is 2 c W whatever the batch."""

    factor = 0.0

    def forward(self, x):
        self.add_auxiliary_loss(self.factor * self.up_proj.weight.square().sum())
        return super().forward(x)


class SmallInputs(AuxiliaryLoss, FeedForwardNetwork):
    """Wants its inputs to be small: another loss for each batch."""

    def forward(self, x):
        self.add_auxiliary_loss(0.3 * x.square().mean())
        return super().forward(x)


# ------------------------------------------------------------------------------------------------------- all trainers

COMMON = "--device cpu --precision fp32 --num_threads 1 --log_interval 1 --max_steps 1 --output_dir out"
PREFERENCES = "--pairwise_data pairs.json --sft_model sft.pth --val_fraction 0.3 --batch_size 4"
TRAINERS = {
    "pretrain": "--train_data_dir text.txt --val_data_dir text.txt --tokenizer_dir bpe --shard_dir shards --d_model 32 "
    "--n_layers 2 --n_heads 4 --max_seq_len 16 --batch_size 2 --grad_accum_steps 2 --sample_tokens 0",
    "sft": "--data_path sft.json --pretrained_model sft.pth --val_fraction 0.3 --batch_size 2 --grad_accum_steps 2",
    "reward": PREFERENCES,
    "ppo": f"{PREFERENCES} --reward_model reward.pth --max_gen_len 4 --rollout_batch_size 4",
    "grpo": "--data_path sft.json --sft_model sft.pth --val_fraction 0.3 --max_gen_len 4 --rollout_batch_size 4 "
    "--batch_size 2 --group_size 2 --grad_accum_steps 2",
    "dpo": PREFERENCES,
    "distill": "--data_path sft.json --teacher_model sft.pth --val_fraction 0.3 --batch_size 2 --grad_accum_steps 2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Data, and the models that trainers start from."""
    path = tmp_path_factory.mktemp("world")
    tokenizer.save(path / "bpe")
    (path / "text.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    talks = [{"instruction": "q" * (1 + k), "response": "a " * (1 + k % 4)} for k in range(12)]
    (path / "sft.json").write_text(json.dumps(talks))
    pairs = [{"instruction": f"x{k}", "chosen": "yes, " * (1 + k % 3), "rejected": "no"} for k in range(12)]
    (path / "pairs.json").write_text(json.dumps(pairs))
    config = GPTConfig.for_architecture("modern", vocab_size=320, d_model=32, n_layers=2, n_heads=4, max_seq_len=48)
    model = GPTModel.from_config(config)
    randomize(model, seed=4)
    for name, part, stage in (("sft", model, "sft"), ("reward", RewardModel(model), "reward")):
        state = part.state_dict()
        save_checkpoint(path / f"{name}.pth", model_state=state, config=config, tokenizer=tokenizer, stage=stage)
    return path


def first_update(trainer, factor, monkeypatch):
    """Train one step; its first update's figures, the gradients, and the weights that were trained."""
    monkeypatch.setattr(transformer_components, "FeedForwardNetwork", SmallWeights)
    monkeypatch.setattr(SmallWeights, "factor", factor)
    usual, seen = TrainingLoop.accumulate, []

    def accumulate(loop, batches, counts):
        means = usual(loop, batches, counts)
        trained = {name: p for name, p in loop.model.named_parameters() if p.grad is not None}
        gradients = {name: parameter.grad.clone() for name, parameter in trained.items()}
        seen.append((means, gradients, {name: parameter.detach().clone() for name, parameter in trained.items()}))
        return means

    monkeypatch.setattr(TrainingLoop, "accumulate", accumulate)
    options = shlex.split(f"{TRAINERS[trainer]} {COMMON}")
    pretrain_trainer.main(options) if trainer == "pretrain" else finetune.main(["--mode", trainer, *options])
    return seen[0]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainer_minimises_it_exactly_once(trainer, folder, monkeypatch):
    """Over accumulation, in every network that is trained (PPO has two), not in references and teachers."""
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patched:
        means, gradients, weights = first_update(trainer, 0.5, patched)
    (record, *_) = read_metrics("out/metrics.jsonl")
    with monkeypatch.context() as patched:
        plain_means, plain_gradients, _ = first_update(trainer, 0.0, patched)
    chosen = [name for name in weights if name.endswith("feed_forward.up_proj.weight")]
    assert len(chosen) == {"ppo": 4, "distill": 1}.get(trainer, 2)
    for name, gradient in gradients.items():
        expected = plain_gradients[name] + (weights[name] if name in chosen else 0)  # 2 · 0.5 · W
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4, msg=name)
    expected = sum(0.5 * weights[name].square().sum().item() for name in chosen)
    assert means["aux_loss"] == pytest.approx(expected, rel=1e-5)
    assert means["loss"] - plain_means["loss"] == pytest.approx(expected, rel=1e-4)
    assert record["aux_loss"] > 0
    assert plain_means["aux_loss"] == 0


# -------------------------------------------------------------------------------------------------------- the one loop


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """A function → a loop whose model's layers have losses of their own, and which vary from batch to batch."""

    def make(part=SmallInputs, **settings):
        monkeypatch.setattr(transformer_components, "FeedForwardNetwork", part)
        return make_loop("modern", tmp_path, rows=2, micro_batches=3, **settings)

    return make


def batches_of(loop):
    data = RaggedData(6, 320, seed=3)
    batches = [data.collate([data[2 * k], data[2 * k + 1]]) for k in range(3)]
    return batches, [data.count(batch) for batch in batches]


@pytest.mark.parametrize("recompute", [False, True])
def test_micro_batches_are_weighted_by_their_tokens(recompute, loop):
    """Also where the forward pass of a layer is computed once more in the backward pass."""
    trained = loop(recompute_activations=recompute)
    batches, counts = batches_of(trained)
    assert len(set(counts)) == 3
    means = trained.means(trained.accumulate(batches, counts))
    weights = list(trained.model.parameters())
    gradients = [parameter.grad.clone() for parameter in weights]
    inputs, total, own = [], 0.0, 0.0
    for layer in trained.model.layers:
        layer.feed_forward.register_forward_pre_hook(lambda part, x: inputs.append(x[0]))
    for batch, count in zip(batches, counts, strict=True):
        inputs.clear()
        loss = trained.model(**batch)["loss"]
        auxiliary = sum(0.3 * x.square().mean() for x in inputs[:3])
        total, own = total + (loss + auxiliary) * count / sum(counts), own + auxiliary.item() * count / sum(counts)
    for ours, expected in zip(gradients, torch.autograd.grad(total, weights), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
    assert means["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert means["aux_loss"] == pytest.approx(own, rel=1e-5)


def test_evaluations_do_not_contain_it(loop):
    with_losses, without = loop().evaluate(), loop(FeedForwardNetwork).evaluate()
    assert with_losses == without
    assert "val_aux_loss" not in with_losses


def test_models_without_report_none(loop):
    trained = loop(FeedForwardNetwork)
    assert trained.accumulate(*batches_of(trained)).keys() == {"loss"}


def test_only_what_is_differentiated_is_collected(loop):
    model, ids = loop().model, torch.arange(4, 14)[None]
    model(ids)  # nobody collects
    with auxiliary_losses() as collected:
        with torch.no_grad():
            model(ids)
        assert collected == []
        model(ids)
        model(ids)
    assert len(collected) == 2 * len(model.layers)
    model(ids)
    assert len(collected) == 2 * len(model.layers)
