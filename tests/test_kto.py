"""KTO: the loss is the paper's and TRL's, the first loss is ½, good answers gain and bad ones lose."""

import json
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import finetune
from alignment.kto import KTOConfig, KTODataset, KTOLoop, KTOModel, kto, kto_loss
from checkpoint import load_model, save_checkpoint
from command_line import UserError, complaints_about
from data_loader import GPTSFTDataset, UnpairedDataset
from gpt_model import GPTConfig, GPTModel
from lora import apply_lora, lora_layers
from text.conversation_data import parse_unpaired
from training.run_log import read_metrics
from training.training_config import prepare_machine

COMMON = dict(device="cpu", precision="fp32", num_threads=1, log_interval=1)


def records(n=24):
    """Good answers about Paris and bad ones about Rome, of different lengths, to prompts of their own."""
    return [
        {"prompt": f"问 {k}", "completion": "是巴黎。" if k % 2 else "Rome!" * (1 + k % 3), "label": k % 2 == 1}
        for k in range(n)
    ]


def answers(items):
    return [parse_unpaired(item, "record") for item in items]


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    """A working folder with a small SFT model, unpaired records, pairs and instructions."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = dict(d_model=32, n_layers=2, n_heads=2, max_seq_len=64, dropout=0.1)
    config = GPTConfig.for_architecture("modern", vocab_size=len(tokenizer), **sizes)
    model = GPTModel.from_config(config)
    save_checkpoint("sft.pth", model_state=model.state_dict(), config=config, tokenizer=tokenizer, stage="sft")
    pairs = [{"instruction": f"问题 {k}", "chosen": "是巴黎。", "rejected": "是 Rome!"} for k in range(24)]
    instructions = [{"instruction": "x" * k, "response": "法国的首都是巴黎。"} for k in range(1, 10)]
    same = [{"prompt": "x", "completion": "y" * k, "label": True} for k in range(1, 10)]
    for name, content in (("data", records()), ("pairs", pairs), ("sft", instructions), ("same", same)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


@pytest.fixture
def policy(random_model, tokenizer):
    """A policy with large random weights, so that nothing hides."""
    return random_model("modern", vocab_size=len(tokenizer), max_seq_len=64)


def make_loop(folder, tokenizer, policy, **settings):
    usual = dict(output_dir=str(folder), max_seq_len=64, max_steps=4, eval_interval=4, lr=1e-2, schedule="constant")
    config = KTOConfig(**{**COMMON, **usual, "batch_size": 8, **settings})
    assert complaints_about(config) == []
    device = prepare_machine(config)
    data = [KTODataset(answers(part), tokenizer, 64) for part in (records(12), records(5))]
    messages = [[{"role": "user", "content": "x" * k}, {"role": "assistant", "content": "y" * k}] for k in range(1, 9)]
    return KTOLoop(config, policy, tokenizer, *data, device, GPTSFTDataset(messages, tokenizer, 64))


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    """A good and a bad answer on either side of the point of reference."""
    log_ratios, good = torch.tensor([3.0, -1.0, 3.0, -1.0]), torch.tensor([True, True, False, False])
    losses = kto_loss(log_ratios, good, torch.tensor(0.5), 0.2, (2.0, 3.0))
    sigmoids = [1 / (1 + 2.718281828459045**-x) for x in (0.5, -0.3, -0.5, 0.3)]
    weights = (2.0, 2.0, 3.0, 3.0)
    assert losses.tolist() == pytest.approx([w * (1 - s) for w, s in zip(weights, sigmoids, strict=True)])


@pytest.mark.parametrize("labels", [[True, False, False, True, False], [True] * 5, [False] * 5])
@pytest.mark.parametrize("shift", [8.0, -8.0])
def test_loss_and_figures_are_trls(labels, shift, tmp_path, tokenizer, policy):
    """TRL's KTOTrainer on the same random log-probabilities, with a divergence above and below 0."""
    trainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    loop = make_loop(tmp_path, tokenizer, policy, beta=0.3, desirable_weight=0.7, undesirable_weight=1.4)
    items = [{**item, "label": label} for item, label in zip(records(5), labels, strict=True)]
    data = KTODataset(answers(items), tokenizer, 64)
    data.ask_reference(policy, torch.device("cpu"), batch_size=2)
    generator = torch.Generator().manual_seed(0)
    for sample in data.samples:
        noise = torch.randn(2, generator=generator) * 3 - torch.tensor([0.0, shift])
        sample["reference_log_probs"] = [a + b for a, b in zip(sample["reference_log_probs"], noise, strict=True)]
    batch = data.collate(list(data))

    def network(**inputs):
        logits = policy(inputs["input_ids"], inputs["attention_mask"])["logits"][:, :-1]
        log_probs = logits.log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None]).squeeze(2)
        log_probs, zeros = log_probs * (inputs["labels"][:, 1:] != -100), torch.zeros_like(log_probs)
        return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros)

    metrics = {"train": defaultdict(list)}
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x)
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False, calculate_KL=True,
        precompute_ref_logps=True, loss_type="kto", beta=0.3, desirable_weight=0.7, undesirable_weight=1.4,
        _metrics=metrics, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    stand_in._compute_kl_logps = lambda *arguments: trainer._compute_kl_logps(stand_in, *arguments)
    theirs = trainer._compute_loss(
        stand_in,
        network,
        {
            **{name: batch[name] for name in ("input_ids", "attention_mask")},
            **{f"KL_{name}": batch[f"other_{name}"] for name in ("input_ids", "attention_mask")},
            "completion_mask": (batch["labels"] != -100).long(),
            "KL_completion_mask": (batch["other_labels"] != -100).long(),
            "label": batch["good"],
            "ref_logps": batch["reference_log_probs"],
            "ref_KL_logps": batch["other_reference_log_probs"],
        },
        return_outputs=False,
    )
    ours = loop.means(loop.accumulate([{**batch}], [5]))
    assert (ours["kl"] > 0) == (shift > 0)
    assert ours["loss/kto_avg"] == pytest.approx(theirs.item(), rel=1e-4)
    kinds = ("rewards", "logps", "kl")
    named = {name: values[0] for name, values in metrics["train"].items() if name.startswith(kinds)}
    assert len(named) == (6 if len(set(labels)) == 2 else 3)
    for name, value in named.items():
        assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert {name for name in ours if name.startswith(kinds[:2])} == named.keys() - {"kl"}


# -- the data ----------------------------------------------------------------------------------------------------------


def test_every_prompt_has_the_answer_to_another_one_beside_it(tokenizer):
    """Of pairs, too, whose answers share a prompt; nearly every answer stands beside one prompt."""
    pairs = [{"instruction": f"问题 {k}", "chosen": f"yes {k}", "rejected": f"no {k}"} for k in range(30)]
    data = UnpairedDataset(answers(pairs), tokenizer, 64)
    own, others = [], []
    for sample in data.samples:
        (ids, labels), (other_ids, other_labels) = sample["answers"]
        texts = [tokenizer.decode([x for x in row if x != -100]) for row in (labels, other_labels)]
        assert texts[0].split()[1] != texts[1].split()[1]
        assert sample["good"] == texts[0].startswith("yes")
        n_prompt = labels.count(-100)
        assert ids[:n_prompt] == other_ids[:n_prompt]
        own.append(texts[0])
        others.append(texts[1])
    assert len(set(own)) == 60
    assert len(set(others)) >= 55


# -- the step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_first_loss_is_a_half(lora_rank, folder):
    """Policy and reference are the same before the first step, dropout or not."""
    kto(
        pairwise_data="data.json", sft_model="sft.pth", output_dir="run", val_fraction=0.25, max_steps=1,
        batch_size=8, lora_rank=lora_rank, **COMMON,
    )  # fmt: skip
    first = read_metrics("run/metrics.jsonl")[0]
    assert first["loss"] == first["loss/kto_avg"] == pytest.approx(0.5, abs=1e-5)
    assert first["kl"] == pytest.approx(0.0, abs=1e-4)
    assert first["grad_norm"] > 0


@pytest.mark.parametrize("settings", [{"desirable_weight": 0.5}, {"recompute_activations": True}])
def test_micro_batches_give_the_step_of_the_whole_batch(settings, tmp_path, tokenizer, random_model):
    """8 × 1, 4 × 2 and 2 × 4: the divergence, too, is that of the whole batch."""
    results = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        model = random_model("modern", vocab_size=len(tokenizer), max_seq_len=64)
        loop = make_loop(tmp_path, tokenizer, model, batch_size=batch_size, grad_accum_steps=accumulation, **settings)
        for sample in loop.train_data.samples + loop.val_data.samples:
            sample["reference_log_probs"][1] -= 9.0  # so that the divergence is above 0
        loop.train_step()
        figures = {**loop.train_step(), **loop.evaluate()}
        results.append((figures, torch.cat([parameter.flatten() for parameter in loop.model.parameters()])))
    assert min(results[0][0]["kl"], results[0][0]["val_kl"]) > 0
    for figures, weights in results[1:]:
        for name, value in figures.items():
            assert value == pytest.approx(results[0][0][name], rel=1e-3, abs=1e-4), name
        assert torch.allclose(weights, results[0][1], atol=2e-4)


def test_lora_trains_adapters_and_leaves_every_other_weight_bit_for_bit(tmp_path, tokenizer, policy):
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    base = str(tmp_path / "sft.pth")
    save_checkpoint(base, model_state=before, config=policy.config, tokenizer=tokenizer, stage="sft")
    apply_lora(policy, KTOConfig(lora_rank=4), base)
    loop = make_loop(tmp_path, tokenizer, policy, lora_rank=4)
    for _ in range(2):
        loop.train_step()
    after = policy.state_dict()
    assert all(torch.equal(before[name.replace(".base.", ".")], x) for name, x in after.items() if "lora_" not in name)
    assert any(layer.lora_B.any() for layer in lora_layers(policy).values())


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"lora_rank": 8}, {"pairwise_data": "pairs.json"}, {"undesirable_weight": 0.5}]
)
def test_good_answers_gain_and_bad_ones_lose_that_it_has_not_seen(settings, folder, capsys):
    """The held-out margin rises and the loss falls; the file holds a plain model, which finds good answers likelier."""
    best = kto(
        **{"pairwise_data": "data.json", **settings}, sft_model="sft.pth", output_dir="kto", val_fraction=0.25,
        max_steps=20, batch_size=8, eval_interval=10, lr=5e-3, sft_data="sft.json", warmup_steps=0, **COMMON,
    )  # fmt: skip
    assert best["val_rewards/margins"] > 0.2
    assert best["val_loss"] < 0.5 * max(1.0, settings.get("undesirable_weight", 1.0))
    numbers = "17 good and 17 bad" if "pairwise_data" in settings else "9 good and 8 bad"
    assert f"KTO on {numbers} answers, 20 steps" in capsys.readouterr().out
    steps = [record for record in read_metrics("kto/metrics.jsonl") if "loss" in record]
    assert steps[-1]["loss/sft_avg"] < steps[0]["loss/sft_avg"]
    model, tokenizer, content = load_model("kto/kto_best.pth")
    assert content["stage"] == "kto"
    data = KTODataset(answers(records()), tokenizer, 64)
    data.ask_reference(load_model("sft.pth")[0], torch.device("cpu"), 8)
    with torch.no_grad():
        after = KTOModel(model.eval(), KTOConfig())(**data.collate(list(data)))
    assert after["rewards/chosen"] > after["rewards/rejected"], "what was saved is what was trained"


def test_an_interrupted_run_continues_exactly(folder):
    """Half, then `--resume auto`: the reference is still the SFT model, the others' answers are the same."""
    options = "--mode kto --pairwise_data data.json --sft_model sft.pth --sft_data sft.json --max_steps 6"
    options += " --batch_size 4 --eval_interval 2 --save_interval 3 --log_interval 1 --num_threads 1 --device cpu"
    options += " --precision fp32"
    for name in ("whole", "parts"):
        finetune.main([*options.split(), "--output_dir", name])
    (folder / "parts" / "checkpoints" / "step_00000006.pth").unlink()
    finetune.main([*options.split(), "--output_dir", "parts", "--resume", "auto"])
    runs = [read_metrics(f"{name}/metrics.jsonl") for name in ("whole", "parts")]
    for key in ("step", "loss", "kl", "rewards/margins", "loss/sft_avg", "val_loss", "val_kl", "grad_norm"):
        assert [record.get(key) for record in runs[0]] == [record.get(key) for record in runs[1]], key


def test_wrong_settings_are_named():
    config = KTOConfig(beta=0.0, desirable_weight=-1.0, undesirable_weight=float("nan"))
    assert complaints_about(config) == [
        "--beta must be above 0, not 0.0",
        "--desirable_weight must be at least 0, not -1.0",
        "--undesirable_weight must be at least 0, not nan",
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sft_model": "nowhere.pth"}, "the SFT model nowhere.pth does not exist; run finetune.py --mode sft first"),
        ({"max_seq_len": 5}, "none of the 24 records of data.json .* .24 longer than 5 tokens.; raise --max_seq_len"),
        ({"pairwise_data": "sft.json"}, 'record 1 of sft.json: the field "label" is missing'),
        ({"pairwise_data": "same.json"}, "all . answers of the training part of same.json are to the same prompt"),
        ({"val_fraction": 0.01}, "all 1 answers of the held-out part of data.json .* or a larger --val_fraction"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(settings, words, folder):
    with pytest.raises(UserError, match=words):
        kto(**{"pairwise_data": "data.json", "sft_model": "sft.pth", "val_fraction": 0.3, **settings, **COMMON})
