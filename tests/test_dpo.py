"""DPO: the loss is the paper's and TRL's, only answers count, the first loss is ln 2, preferences are learned."""

import json
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import finetune
from alignment.dpo import DPOConfig, DPODataset, DPOLoop, DPOModel, dpo, dpo_loss, ipo_loss
from alignment.log_probabilities import answer_log_probs
from checkpoint import load_checkpoint, load_model, save_checkpoint
from command_line import UserError, complaints_about
from data_loader import GPTSFTDataset
from gpt_model import IGNORED_LABEL, GPTConfig, GPTModel
from lora import adapters_disabled, apply_lora, lora_layers
from text.conversation_data import load_preferences, parse_preference
from training.run_log import read_metrics
from training.training_config import prepare_machine

COMMON = dict(device="cpu", precision="fp32", num_threads=1, log_interval=1)
LN_2 = math.log(2)
RANKING = {"instruction": "二加三", "responses": ["五。", "It is five, of course.", "六", "x"]}


def records(n=24):
    """Preferences for Paris over Rome, of different lengths."""
    return [
        {"instruction": f"问题 {k}" * (1 + k % 3), "chosen": f"{k} 是巴黎。", "rejected": f"{k} 是 Rome!" * (1 + k % 2)}
        for k in range(n)
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    """A working folder with a small SFT model, preferences and instructions."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = dict(d_model=32, n_layers=2, n_heads=2, max_seq_len=64, dropout=0.1)
    config = GPTConfig.for_architecture("modern", vocab_size=len(tokenizer), **sizes)
    model = GPTModel.from_config(config)
    save_checkpoint("sft.pth", model_state=model.state_dict(), config=config, tokenizer=tokenizer, stage="sft")
    (tmp_path / "pairs.json").write_text(json.dumps([*records(), RANKING]), encoding="utf-8")
    instructions = [{"instruction": "x" * k, "response": "法国的首都是巴黎。"} for k in range(1, 10)]
    (tmp_path / "sft.json").write_text(json.dumps(instructions), encoding="utf-8")
    return tmp_path


@pytest.fixture
def policy(random_model, tokenizer):
    """A policy with large random weights, so that nothing hides."""
    return random_model("modern", vocab_size=len(tokenizer), max_seq_len=64)


def make_data(tokenizer, policy, items=None):
    """Preferences whose reference log-probabilities differ from the policy's by known noise."""
    items = [*records(6), RANKING] if items is None else items
    data = DPODataset([parse_preference(item, "record") for item in items], tokenizer, 64)
    data.ask_reference(policy, torch.device("cpu"), batch_size=4)
    generator = torch.Generator().manual_seed(0)
    for sample in data.samples:
        noise = torch.randn(len(sample["answers"]), generator=generator) * 3
        sample["reference_log_probs"] = [a + b for a, b in zip(sample["reference_log_probs"], noise, strict=True)]
    return data


def make_loop(folder, tokenizer, policy, **settings):
    usual = dict(output_dir=str(folder), max_seq_len=64, max_steps=4, eval_interval=4, lr=1e-2, schedule="constant")
    config = DPOConfig(**{**COMMON, **usual, "batch_size": 8, **settings})
    assert complaints_about(config) == []
    device = prepare_machine(config)
    preferences = [parse_preference(item, "record") for item in [*records(12), RANKING]]
    data = [DPODataset(part, tokenizer, 64) for part in (preferences, preferences[-4:])]
    messages = [[{"role": "user", "content": "x" * k}, {"role": "assistant", "content": "y" * k}] for k in range(1, 9)]
    return DPOLoop(config, policy, tokenizer, *data, device, GPTSFTDataset(messages, tokenizer, 64))


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_log_probabilities_are_of_the_answers_tokens_and_of_nothing_else(policy):
    """Three tokens by hand; changing the prompt's labels or adding padding changes nothing."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 2]])
    labels = torch.tensor([[IGNORED_LABEL] * 3 + [8, 9, 2]])
    log_probs = policy(ids)["logits"][0].log_softmax(-1)
    by_hand = log_probs[2, 8] + log_probs[3, 9] + log_probs[4, 2]
    total, n_tokens = answer_log_probs(policy, ids, labels, torch.ones_like(ids))
    assert total.item() == pytest.approx(by_hand.item(), abs=1e-4)
    assert n_tokens.tolist() == [3]


def test_the_losses_by_hand():
    """Three margins; sigmoid without and with label smoothing, IPO."""
    margins = [1.5, -0.5, 4.0]
    x = torch.tensor(margins)

    def log_sigmoid(value):
        return -math.log1p(math.exp(-value))

    assert dpo_loss(x, 0.2).tolist() == pytest.approx([-log_sigmoid(0.2 * m) for m in margins])
    smoothed = [-0.9 * log_sigmoid(0.2 * m) - 0.1 * log_sigmoid(-0.2 * m) for m in margins]
    assert dpo_loss(x, 0.2, 0.1).tolist() == pytest.approx(smoothed)
    assert ipo_loss(x, 0.25).tolist() == pytest.approx([(m - 2.0) ** 2 for m in margins])


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sft"])
def test_loss_and_figures_are_trls(loss, policy, tokenizer):
    """TRL's DPOTrainer on the same log-probabilities: the losses and every figure of the same name.

    Its loss "sft" is a mean over the tokens of the batch, so it is compared on a single pair.
    """
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    data = make_data(tokenizer, policy, records(1 if loss == "sft" else 6))
    batch = data.collate(list(data))
    chosen, rejected = batch["pairs"].unbind(1)
    order = torch.cat((chosen, rejected))  # TRL's batches have the chosen answers first

    def network(**inputs):
        logits = policy(inputs["input_ids"], inputs["attention_mask"])["logits"][:, :-1]
        log_probs = logits.log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None]).squeeze(2)
        zeros = torch.zeros_like(log_probs)
        answer = inputs["labels"][:, 1:] != IGNORED_LABEL
        return SimpleNamespace(log_probs=log_probs * answer, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    metrics = {"train": defaultdict(list)}
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )  # fmt: skip
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[loss], loss_weights=[1.0], beta=0.3,
        label_smoothing=0.0, use_weighting=False, _metrics=metrics, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    theirs = trainer._compute_loss(
        stand_in,
        network,
        {
            "input_ids": batch["input_ids"][order],
            "attention_mask": batch["attention_mask"][order],
            "completion_mask": (batch["labels"][order] != IGNORED_LABEL).long(),
            "ref_chosen_logps": batch["reference_log_probs"][chosen],
            "ref_rejected_logps": batch["reference_log_probs"][rejected],
        },
        return_outputs=False,
    )
    config = DPOConfig(beta=0.3, rpo_alpha=1.0, loss="ipo" if loss == "ipo" else "sigmoid")
    with torch.no_grad():
        ours = DPOModel(policy, config)(**batch)
    value = ours["loss"] - ours["loss/dpo_avg"] if loss == "sft" else ours["loss/dpo_avg"]
    assert value.item() == pytest.approx(theirs.item(), rel=1e-4)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"):
        assert ours[name].item() == pytest.approx(metrics["train"][name][0], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_padding_on_either_side_changes_no_loss(loss, policy, tokenizer):
    """Five more columns on the left or on the right."""
    data = make_data(tokenizer, policy)
    batch = data.collate(list(data))
    model = DPOModel(policy, DPOConfig(loss=loss, rpo_alpha=0.5))
    expected = {name: value.item() for name, value in model(**batch).items()}
    for sides in ((5, 0), (0, 5)):
        padded = dict(batch)
        for name, value in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0), ("labels", IGNORED_LABEL)):
            padded[name] = F.pad(batch[name], sides, value=value)
        for name, value in model(**padded).items():
            assert value.item() == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (sides, name)


def test_a_ranking_weighs_as_much_as_a_pair(policy, tokenizer):
    """The loss of both together is the mean of the loss of each."""
    data = make_data(tokenizer, policy, [records(1)[0], RANKING])
    model = DPOModel(policy, DPOConfig())
    alone = [model(**data.collate([data[index]]))["loss"].item() for index in (0, 1)]
    assert model(**data.collate([data[0], data[1]]))["loss"].item() == pytest.approx(sum(alone) / 2, rel=1e-5)


# -- the step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_first_loss_is_ln_2(lora_rank, folder):
    """Policy and reference are the same before the first step, dropout or not; with IPO it is 1 / (2β)²."""
    for loss, expected in (("sigmoid", LN_2), ("ipo", 25.0)):
        dpo(
            pairwise_data="pairs.json", sft_model="sft.pth", output_dir=loss, val_fraction=0.25, max_steps=1, loss=loss,
            batch_size=8, lora_rank=lora_rank, rpo_alpha=0.0, **COMMON,
        )  # fmt: skip
        first = read_metrics(f"{loss}/metrics.jsonl")[0]
        assert first["loss"] == first["loss/dpo_avg"] == pytest.approx(expected, abs=1e-5)
        assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
        assert first["grad_norm"] > 0


@pytest.mark.parametrize("settings", [{"rpo_alpha": 0.0}, {"recompute_activations": True}])
def test_micro_batches_give_the_step_of_the_whole_batch(settings, tmp_path, tokenizer, random_model):
    """8 × 1, 4 × 2 and 2 × 4, instructions mixed in: the same figures and the same weights."""
    results = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        model = random_model("modern", vocab_size=len(tokenizer), max_seq_len=64)
        sizes = dict(batch_size=batch_size, grad_accum_steps=accumulation, **settings)
        loop = make_loop(tmp_path, tokenizer, model, **sizes)
        loop.train_step()
        figures = loop.train_step()
        weights = torch.cat([parameter.flatten() for parameter in loop.model.parameters()])
        results.append((figures, weights))
    for figures, weights in results[1:]:
        for name, value in figures.items():
            assert value == pytest.approx(results[0][0][name], rel=1e-3, abs=1e-5), name
        assert torch.allclose(weights, results[0][1], atol=2e-4)


def test_lora_trains_adapters_and_leaves_every_other_weight_bit_for_bit(tmp_path, tokenizer, policy):
    """Adapters at zero compute what the base does; after training, switched off, they still do."""
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    ids = torch.arange(4, 24)[None]
    logits = policy(ids)["logits"]
    base = str(tmp_path / "sft.pth")
    save_checkpoint(base, model_state=before, config=policy.config, tokenizer=tokenizer, stage="sft")
    config = DPOConfig(lora_rank=4)
    apply_lora(policy, config, base)
    assert torch.equal(policy(ids)["logits"], logits)
    loop = make_loop(tmp_path, tokenizer, policy, lora_rank=4)
    for _ in range(2):
        loop.train_step()
    after = {name.replace(".base.", "."): value for name, value in policy.state_dict().items() if "lora_" not in name}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    policy.eval()
    assert not torch.allclose(policy(ids)["logits"], logits, atol=1e-3)
    with adapters_disabled(policy):
        assert torch.equal(policy(ids)["logits"], logits)


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"loss": "ipo"}, {"label_smoothing": 0.1}, {"lora_rank": 8}])
def test_it_learns_preferences_that_it_has_not_seen(settings, folder, capsys):
    """The held-out margin rises, every better answer becomes the likelier one; the file holds a plain model."""
    best = dpo(
        pairwise_data="pairs.json", sft_model="sft.pth", output_dir="dpo", val_fraction=0.25, max_steps=20,
        batch_size=8, eval_interval=10, lr=5e-3, sft_data="sft.json", rpo_alpha=0.1, warmup_steps=0, **settings,
        **COMMON,
    )  # fmt: skip
    assert best["val_rewards/accuracies"] > 0.9
    assert best["val_rewards/margins"] > 0.2
    assert best["val_logps/chosen"] > best["val_logps/rejected"]
    assert "prefers the better answer in" in capsys.readouterr().out
    steps = [record for record in read_metrics("dpo/metrics.jsonl") if "loss" in record]
    assert steps[-1]["loss/sft_avg"] < steps[0]["loss/sft_avg"]
    model, _, content = load_model("dpo/dpo_best.pth")
    assert content["stage"] == "dpo"
    assert not lora_layers(model)
    data = DPODataset(load_preferences("pairs.json"), load_model("sft.pth")[1], 64)
    data.ask_reference(load_model("sft.pth")[0], torch.device("cpu"), 8)
    after = DPOModel(model, DPOConfig())(**data.collate(list(data)))
    assert after["rewards/accuracies"] > 0.9, "what was saved is what was trained"


def test_an_interrupted_run_continues_exactly(folder):
    """Half, then `--resume auto`: the reference is still the SFT model, and the instructions go on where they were."""
    options = "--mode dpo --pairwise_data pairs.json --sft_model sft.pth --sft_data sft.json --max_steps 6"
    options += " --batch_size 4 --eval_interval 2 --save_interval 3 --log_interval 1 --num_threads 1 --device cpu"
    options += " --precision fp32"
    for name in ("whole", "parts"):
        finetune.main([*options.split(), "--output_dir", name])
    (folder / "parts" / "checkpoints" / "step_00000006.pth").unlink()
    finetune.main([*options.split(), "--output_dir", "parts", "--resume", "auto"])
    runs = [read_metrics(f"{name}/metrics.jsonl") for name in ("whole", "parts")]
    for key in ("step", "loss", "rewards/margins", "loss/sft_avg", "val_loss", "val_logps/chosen", "grad_norm"):
        assert [record.get(key) for record in runs[0]] == [record.get(key) for record in runs[1]], key


def test_the_reference_is_asked_once(folder, monkeypatch):
    """Its log-probabilities do not follow the policy."""
    loop = make_loop(folder, load_model("sft.pth")[1], load_model("sft.pth")[0])
    before = [list(sample["reference_log_probs"]) for sample in loop.train_data.samples]
    loop.train()
    assert [sample["reference_log_probs"] for sample in loop.train_data.samples] == before
    assert loop.evaluate()["val_rewards/margins"] != 0
    assert "policy.lm_head.weight" not in load_checkpoint(folder / "dpo_best.pth")["model"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0.0}, "--beta must be above 0, not 0.0"),
        ({"label_smoothing": 0.5}, "--label_smoothing must be at least 0 and below 0.5, not 0.5"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "--label_smoothing is for --loss sigmoid, not ipo"),
        ({"rpo_alpha": -1.0}, "--rpo_alpha must be at least 0"),
        ({"sft_coef": math.nan}, "--sft_coef must be at least 0, not nan"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    assert words in "; ".join(complaints_about(DPOConfig(**settings)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sft_model": "nowhere.pth"}, "the SFT model nowhere.pth does not exist; run finetune.py --mode sft first"),
        ({"max_seq_len": 5}, "longer than 5 tokens.; raise --max_seq_len .now 5; the model's context is 64"),
        ({"max_seq_len": 65}, "65 is beyond the model's context of 64, which was fixed in pretraining; lower"),
        ({"pairwise_data": "sft.json"}, 'record 1 of sft.json: the field "chosen" is missing'),
    ],
)
def test_what_cannot_be_used_is_one_sentence(settings, words, folder):
    with pytest.raises(UserError, match=words):
        dpo(**{"pairwise_data": "pairs.json", "sft_model": "sft.pth", **settings, **COMMON})
