"""The reward model: a network of its own, read at the last token, that learns what is preferred."""

import json
import math
from collections import defaultdict
from contextlib import nullcontext
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

import finetune
from alignment.reward_model import (
    RewardConfig,
    RewardModel,
    calibration_error,
    compare,
    load_reward_model,
    preference_figures,
    train_reward_model,
)
from alignment.stage import load_parts
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, load_model, save_checkpoint
from command_line import UserError
from data_loader import PreferenceDataset
from gpt_model import GPTConfig, GPTModel
from text.conversation_data import load_preferences, parse_preference
from training.run_log import read_metrics

PAIR = dict(margins=torch.zeros(2), weights=torch.ones(2), pairs=torch.tensor([[0, 2], [1, 3]]))
COMMON = dict(device="cpu", precision="fp32", num_threads=1, log_interval=1)


@pytest.fixture
def reward_model(random_model, architecture):
    """A reward model on a random backbone, with a head of visible size."""
    torch.manual_seed(0)
    return RewardModel(random_model(architecture)).eval()


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    """A working folder with an SFT model and preferences for Paris over Rome."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = GPTConfig.for_architecture(
        "modern", vocab_size=len(tokenizer), d_model=32, n_layers=2, n_heads=2, max_seq_len=48
    )
    model = GPTModel.from_config(config)
    save_checkpoint("sft.pth", model_state=model.state_dict(), config=config, tokenizer=tokenizer, stage="sft")
    records = [
        {"instruction": f"问题 {number}", "chosen": f"{number} 是巴黎。", "rejected": f"{number} 是 Rome!"}
        for number in range(40)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(records), encoding="utf-8")
    return tmp_path


def test_the_backbone_is_a_copy_that_shares_nothing_with_the_policy(random_model, architecture):
    """Training either leaves the other as it was."""
    policy = random_model(architecture)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    model = RewardModel(policy)
    assert not {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in model.parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ids = torch.randint(4, 64, (4, 8))
    model(ids, torch.ones_like(ids), **PAIR)["loss"].backward()
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    assert policy(ids)["logits"].shape == (4, 8, 64), "the policy still has its vocabulary head"


def test_the_head_reads_hidden_states_and_not_logits(reward_model):
    """A number a token from d_model features; by hand."""
    ids = torch.randint(4, 64, (2, 7))
    mask = torch.ones_like(ids)
    assert reward_model.reward_head.in_features == reward_model.config.d_model
    hidden = reward_model.backbone.hidden_states(ids, mask)  # (2, 7, 32)
    by_hand = (hidden * reward_model.reward_head.weight[0]).sum(-1) + reward_model.reward_head.bias
    assert torch.allclose(reward_model.token_values(ids, mask), by_hand, atol=1e-5)


def test_the_reward_is_read_at_the_last_token_wherever_the_padding_stands(reward_model):
    """Alone, padded on the left, padded on the right, in a batch of other lengths: the same reward."""
    rows = [torch.randint(4, 64, (n,)) for n in (3, 9, 6, 1)]
    alone = [reward_model.rewards(row[None], torch.ones(1, len(row), dtype=torch.long))[0] for row in rows]
    assert max(alone) - min(alone) > 0.1
    for on_the_left in (False, True):
        ids, mask = torch.ones(4, 11, dtype=torch.long), torch.zeros(4, 11, dtype=torch.long)
        for number, row in enumerate(rows):
            where = slice(11 - len(row), 11) if on_the_left else slice(0, len(row))
            ids[number, where], mask[number, where] = row, 1
        assert torch.allclose(reward_model.rewards(ids, mask), torch.stack(alone), atol=1e-5)


def test_the_reward_is_read_at_the_closing_token(tokenizer):
    """A row ends with the answer's `</s>`."""
    record = {"instruction": "a", "responses": ["yes", "yes, of course", "no"]}
    data = PreferenceDataset([parse_preference(record, "record")], tokenizer, 64)
    batch = data.collate([data[0]])
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        assert ids[int(mask.sum()) - 1] == tokenizer.eos_token_id


def test_with_a_head_of_zeros_the_loss_is_ln_2_and_otherwise_bradley_terrys(reward_model):
    """−log σ(r_chosen − r_rejected − margin) + c (r_chosen + r_rejected)², by hand for three pairs."""
    ids = torch.randint(4, 64, (4, 5))
    mask = torch.ones_like(ids)
    pairs = [(0, 1), (0, 2), (3, 1)]
    batch = dict(pairs=torch.tensor(pairs), margins=torch.tensor([0.0, 0.3, 2.0]), weights=torch.tensor([0.5, 0.5, 1]))
    rewards = reward_model.rewards(ids, mask).tolist()
    for centring in (0.0, 0.1):
        reward_model.centring = centring
        output = reward_model(ids, mask, **batch)
        found = [rewards[better] - rewards[worse] for better, worse in pairs]
        assert output["margins"].tolist() == pytest.approx(found, abs=1e-5)
        losses = [
            math.log1p(math.exp(-(r - margin))) + centring * (rewards[better] + rewards[worse]) ** 2
            for r, margin, (better, worse) in zip(found, (0.0, 0.3, 2.0), pairs, strict=True)
        ]
        weighted = (0.5 * losses[0] + 0.5 * losses[1] + losses[2]) / 2
        assert output["loss"].item() == pytest.approx(weighted, abs=1e-5)
        right = [float(r > 0) for r in found]
        assert output["accuracy"].item() == pytest.approx((0.5 * right[0] + 0.5 * right[1] + right[2]) / 2)
    torch.nn.init.zeros_(reward_model.reward_head.weight)
    batch["margins"] = torch.zeros(3)
    assert reward_model(ids, mask, **batch)["loss"].item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("coefficient", [None, 0.05])
def test_the_loss_is_trls(reward_model, coefficient):
    """TRL's RewardTrainer, on our rewards, with margins and centring."""
    trainer = pytest.importorskip("trl.trainer.reward_trainer").RewardTrainer
    ids = torch.randint(4, 64, (4, 5))
    mask = torch.ones_like(ids)
    margins = torch.tensor([0.3, 1.0])
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    metrics = {"train": defaultdict(list)}
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=same, _metrics=metrics, _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(center_rewards_coefficient=coefficient), maybe_activation_offload_context=nullcontext(),
    )  # fmt: skip

    def network(**inputs):
        return SimpleNamespace(logits=reward_model.rewards(inputs["input_ids"], inputs["attention_mask"])[:, None])

    theirs = trainer.compute_loss(stand_in, network, dict(input_ids=ids, attention_mask=mask, margin=margins))
    reward_model.centring = coefficient or 0.0
    ours = reward_model(ids, mask, **{**PAIR, "margins": margins})
    assert ours["loss"].item() == pytest.approx(theirs.item(), abs=1e-6)
    assert [ours["margin"].item(), ours["accuracy"].item()] == pytest.approx(
        [metrics["train"]["margin"][0], metrics["train"]["accuracy"][0]], abs=1e-6
    )


def test_a_ranking_counts_as_one_prompt_and_its_pairs_alike(tokenizer, random_model):
    """The loss of [ranking of 4, pair] is the mean of (mean over 6 pairs) and (the pair), however they are batched."""
    model = RewardModel(random_model("modern", vocab_size=len(tokenizer), max_seq_len=64)).eval()
    records = [
        {"instruction": "x", "responses": ["best one", "good", "not so good", "bad"]},
        {"instruction": "法国的首都?", "chosen": "巴黎。", "rejected": "Rome", "margin": 0.5},
    ]
    data = PreferenceDataset([parse_preference(record, "record") for record in records], tokenizer, 64)
    together = model(**data.collate([data[0], data[1]]))["loss"].item()
    alone = [model(**data.collate([data[index]]))["loss"].item() for index in (0, 1)]
    assert together == pytest.approx(sum(alone) / 2, abs=1e-5)
    ranked = [
        PreferenceDataset([parse_preference({"instruction": "x", "chosen": a, "rejected": b}, "")], tokenizer, 64)
        for a, b in combinations(records[0]["responses"], 2)
    ]
    pairs = [model(**single.collate([single[0]]))["loss"].item() for single in ranked]
    assert alone[0] == pytest.approx(sum(pairs) / 6, abs=1e-5)


def test_calibration_compares_confidence_with_the_share_that_is_right():
    """By hand: two bins, one too sure of itself, one too modest; and 0 where it is right as often as it says."""
    at = {confidence: math.log(confidence / (1 - confidence)) for confidence in (0.62, 0.64, 0.91, 0.93)}
    margins = torch.tensor([at[0.62], at[0.64], -at[0.91], at[0.93], -at[0.91]]).double()
    by_hand = (abs(2 - 0.62 - 0.64) + abs(1 - 0.91 - 0.93 - 0.91)) / 5
    assert calibration_error(margins, torch.full((5,), 0.2).double()) == pytest.approx(by_hand)
    assert math.isnan(calibration_error(torch.tensor([math.nan, 1.0]).double(), torch.tensor([0.5, 0.5]).double()))
    honest = torch.tensor([1.0] * 3 + [-1.0]).double() * math.log(3)  # 75 % sure, right in three of four
    assert calibration_error(honest, torch.full((4,), 0.25).double()) == pytest.approx(0.0, abs=1e-12)


def test_the_figures_are_weighted_means():
    figures = preference_figures(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, 1.0]))
    losses = [math.log1p(math.exp(-margin)) for margin in (1.0, -2.0, 3.0)]
    assert figures["loss"] == pytest.approx((losses[0] + losses[1] + 2 * losses[2]) / 4)
    assert figures["accuracy"] == pytest.approx(0.75)
    assert figures["margin"] == pytest.approx((1 - 2 + 6) / 4)


def parts_of(path, **settings):
    """The preferences that a run trains on, and those that it sets aside."""
    config = RewardConfig(pairwise_data=path, val_fraction=0.25, max_seq_len=48, **settings)
    model, tokenizer, _ = load_model("sft.pth")
    return load_parts(
        config,
        model.config,
        load_preferences,
        lambda preferences, account: PreferenceDataset(preferences, tokenizer, config.max_seq_len, account),
        "preferences",
    )


def test_it_learns_a_preference_and_is_right_on_held_out_pairs(folder, capsys):
    """Loss far below ln 2, all held-out pairs right; the file holds a reward model and no language model."""
    best = train_reward_model(
        pairwise_data="pairs.json", sft_model="sft.pth", output_dir="reward", val_fraction=0.25, max_steps=25,
        batch_size=8, eval_interval=25, lr=3e-3, **COMMON,
    )  # fmt: skip
    assert best["val_accuracy"] == 1.0
    assert best["val_loss"] < 0.1
    assert "right on 100.0% of 12 held-out pairs" in capsys.readouterr().out
    first = read_metrics("reward/metrics.jsonl")[0]
    assert 0.3 < first["loss"] < 1.2, "an untrained reward model knows nothing"

    model, tokenizer = load_reward_model("reward/reward_best.pth")
    data = parts_of("pairs.json")[1]
    margins, weights = compare(model, data, range(len(data)), batch_size=3)
    assert preference_figures(margins, weights)["margin"] == pytest.approx(best["val_margin"], abs=1e-4)
    assert best["val_calibration_error"] < 0.1
    with pytest.raises(UserError, match="reward_best.pth is a reward model, which writes no text"):
        load_model("reward/reward_best.pth")
    with pytest.raises(UserError, match="sft.pth is a sft model; give one that finetune.py --mode reward wrote"):
        load_reward_model("sft.pth")


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_with_lora_adapters_and_head_are_trained_and_nothing_else(lora_rank, folder, tokenizer):
    """What is loaded is what was evaluated; without LoRA the same run changes the backbone."""
    best = train_reward_model(
        pairwise_data="pairs.json", sft_model="sft.pth", output_dir="reward", val_fraction=0.25, max_steps=25,
        batch_size=8, eval_interval=25, lr=2e-3, lora_rank=lora_rank, **COMMON,
    )  # fmt: skip
    assert best["val_accuracy"] > 0.8
    content = load_checkpoint("reward/reward_best.pth")
    if lora_rank:
        assert {name.rpartition(".")[2] for name in content["model"]} == {"lora_A", "lora_B", "weight", "bias"}
        others = {name for name in content["model"] if "lora_" not in name}
        assert others == {"reward_head.weight", "reward_head.bias"}
    model, _ = load_reward_model("reward/reward_best.pth")
    backbone, sft = model.backbone.state_dict(), load_model("sft.pth")[0].state_dict()
    assert torch.equal(backbone["token_embedding.weight"], sft["token_embedding.weight"]) == bool(lora_rank)
    data = parts_of("pairs.json")[1]
    figures = preference_figures(*compare(model, data, range(len(data))))
    assert figures["loss"] == pytest.approx(best["val_loss"], abs=1e-4)


def test_micro_batches_give_the_step_of_the_whole_batch(folder):
    """8 × 1, 4 × 2 and 2 × 4 rankings of different lengths: the same losses and gradients."""
    records = [
        {"instruction": f"x {k}", "responses": [f"{k} good", "fair " * (1 + k % 3), "bad"][: 2 + k % 2]}
        for k in range(20)
    ]
    (folder / "rankings.json").write_text(json.dumps(records))
    runs = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        train_reward_model(
            pairwise_data="rankings.json", sft_model="sft.pth", output_dir=f"{batch_size}", val_fraction=0.2,
            max_steps=3, batch_size=batch_size, grad_accum_steps=accumulation, center_rewards_coefficient=0.1,
            recompute_activations=batch_size == 2, **COMMON,
        )  # fmt: skip
        runs.append([record for record in read_metrics(f"{batch_size}/metrics.jsonl") if "loss" in record])
    for run in runs[1:]:
        for ours, expected in zip(run, runs[0], strict=True):
            for name in ("loss", "accuracy", "margin", "grad_norm"):
                assert ours[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


def test_comparisons_do_not_depend_on_the_batch(folder, random_model, tokenizer):
    """12 pairs in batches of 5, 5 and 2, and one by one."""
    torch.manual_seed(1)
    model = RewardModel(random_model("modern", vocab_size=len(tokenizer), max_seq_len=48))
    data = parts_of("pairs.json")[1]
    singly = [model.eval()(**data.collate([data[index]]))["margins"].item() for index in range(len(data))]
    margins, weights = compare(model, data, range(len(data)), batch_size=5)
    assert margins.tolist() == pytest.approx(singly, abs=1e-4)
    assert weights.tolist() == [1.0] * 12


def test_an_interrupted_run_continues_exactly(folder):
    """Via the command line: half, then `--resume auto`."""
    options = "--mode reward --pairwise_data pairs.json --sft_model sft.pth --max_steps 6 --batch_size 4"
    options += " --eval_interval 2 --save_interval 3 --log_interval 1 --num_threads 1 --device cpu --precision fp32"
    for name in ("whole", "parts"):
        finetune.main([*options.split(), "--output_dir", name])
    (folder / "parts" / "checkpoints" / "step_00000006.pth").unlink()
    finetune.main([*options.split(), "--output_dir", "parts", "--resume", "auto"])
    runs = [read_metrics(f"{name}/metrics.jsonl") for name in ("whole", "parts")]
    for key in ("step", "loss", "accuracy", "val_loss", "val_accuracy", "grad_norm"):
        assert [record.get(key) for record in runs[0]] == [record.get(key) for record in runs[1]]


def test_too_few_or_too_long_pairs_are_refused(folder):
    (folder / "one.json").write_text('[{"instruction": "a", "chosen": "b", "rejected": "c"}]')
    with pytest.raises(UserError, match="one.json has 1 .* can be used, too few .*; give --val_pairwise_data"):
        parts_of("one.json")
    assert [len(part) for part in parts_of("one.json", val_pairwise_data="pairs.json")] == [1, 40]
    with pytest.raises(UserError, match="can be used .1 longer than 5 tokens.; raise --max_seq_len"):
        PreferenceDataset(load_preferences("one.json"), ByteLevelBPETokenizer(260), 5)
