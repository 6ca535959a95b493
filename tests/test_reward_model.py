"""The reward model: a network of its own, read at the last token, that learns what is preferred."""

import json
import math

import pytest
import torch

import finetune
from alignment.reward_model import RewardModel, load_reward_model, pair_accuracy, split_pairs, train_reward_model
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_model, save_checkpoint
from command_line import UserError
from data_loader import PairDataset
from gpt_model import GPTConfig, GPTModel
from run_log import read_metrics

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
    model(ids, torch.ones_like(ids))["loss"].backward()
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


def test_with_a_head_of_zeros_the_loss_is_ln_2_and_otherwise_bradley_terrys(reward_model):
    """−log σ(r_chosen − r_rejected); the first half of the rows are the chosen ones."""
    ids = torch.randint(4, 64, (6, 5))
    mask = torch.ones_like(ids)
    output = reward_model(ids, mask)
    rewards = reward_model.rewards(ids, mask).tolist()
    margins = [rewards[k] - rewards[k + 3] for k in range(3)]
    assert output["margins"].tolist() == pytest.approx(margins, abs=1e-5)
    by_hand = sum(math.log1p(math.exp(-margin)) for margin in margins) / 3
    assert output["loss"].item() == pytest.approx(by_hand, abs=1e-5)
    assert output["accuracy"].item() == pytest.approx(sum(margin > 0 for margin in margins) / 3)
    torch.nn.init.zeros_(reward_model.reward_head.weight)
    assert reward_model(ids, mask)["loss"].item() == pytest.approx(math.log(2), abs=1e-6)


def test_pairs_become_rows_that_end_with_the_closing_token(tokenizer):
    """What the reward is read at is the answer's `</s>`."""
    pairs = [
        {"prompt": [{"role": "user", "content": "a"}], "chosen": {"role": "assistant", "content": chosen},
         "rejected": {"role": "assistant", "content": "no"}}
        for chosen in ("yes", "yes, of course")
    ]  # fmt: skip
    data = PairDataset(pairs, tokenizer, 64)
    batch = data.collate([data[0], data[1]])
    assert data.count(batch) == 2
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        assert ids[int(mask.sum()) - 1] == tokenizer.eos_token_id
    texts = [tokenizer.decode(ids.tolist()) for ids in batch["input_ids"]]
    assert [text.rsplit(":", 1)[1] for text in texts] == ["yes", "yes, of course", "no", "no"]


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
    _, held_out = split_pairs("pairs.json", "", 0.25)
    data = PairDataset(held_out, tokenizer, 48)
    assert pair_accuracy(model, data, torch.device("cpu"), batch_size=3) == 1.0
    with pytest.raises(UserError, match="reward_best.pth is a reward model, which writes no text"):
        load_model("reward/reward_best.pth")
    with pytest.raises(UserError, match="sft.pth is a sft model; give one that finetune.py --mode reward wrote"):
        load_reward_model("sft.pth")


def test_accuracy_counts_pairs_and_not_batches(folder, random_model, tokenizer):
    """12 pairs in batches of 5, 5 and 2."""
    torch.manual_seed(1)
    model = RewardModel(random_model("modern", vocab_size=len(tokenizer), max_seq_len=48))
    _, held_out = split_pairs("pairs.json", "", 0.25)
    data = PairDataset(held_out, tokenizer, 48)
    right = sum(bool(model.eval()(**data.collate([data[index]]))["margins"][0] > 0) for index in range(len(data)))
    assert pair_accuracy(model, data, torch.device("cpu"), batch_size=5) == right / len(data)


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
    with pytest.raises(UserError, match="one.json has too few pairs to set some aside; give --val_pairwise_data"):
        split_pairs("one.json", "", 0.05)
    assert [len(part) for part in split_pairs("one.json", "pairs.json", 0.0)] == [1, 40]
    pairs, _ = split_pairs("one.json", "pairs.json", 0.0)
    with pytest.raises(UserError, match="no preference pair fits into 5 tokens; raise --max_seq_len"):
        PairDataset(pairs, ByteLevelBPETokenizer(260), 5)
