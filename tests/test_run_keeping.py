"""A run that is continued, repeated or started twice stays what it was, or is refused with the difference named."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from test_training_loop import make_loop

import finetune
import pretrain_trainer
from alignment.distillation import DistillationConfig
from alignment.dpo import DPOConfig
from alignment.grpo import GRPOConfig
from alignment.kto import KTOConfig
from alignment.ppo import PPOConfig
from alignment.reward_model import RewardConfig
from alignment.sft import SFTConfig
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import save_checkpoint
from command_line import UserError, holding, inputs_of
from gpt_model import GPTConfig, GPTModel
from pretrain_trainer import PretrainConfig
from training import run_identity, run_log
from training.run_folder import set_earlier_run_aside
from training.run_identity import changed_settings, content_fingerprint

LEFT = {"pretrain_best.pth", "metrics.jsonl", "run.log", "curves.png", "checkpoints"}


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


# ------------------------------------------------------------------------------------------- the same folder once more


def test_earlier_runs_are_set_aside_whole_and_numbered(tmp_path, capsys):
    """Three runs into one folder: each is there, with its best model, its record and its checkpoints."""
    losses = []
    for seed in range(3):
        losses.append(make_loop(tmp_path, max_steps=2, seed=seed).train()["val_loss"])
    assert names(tmp_path) == LEFT | {"earlier"}
    assert names(tmp_path / "earlier") == {"1", "2"}
    for number, loss in enumerate(losses[:2], start=1):
        earlier = tmp_path / "earlier" / str(number)
        assert names(earlier) == LEFT
        assert f'"val_loss": {loss}' in (earlier / "metrics.jsonl").read_text()
        assert torch.load(earlier / "pretrain_best.pth")["metrics"]["val_loss"] == loss
        assert names(earlier / "checkpoints") == {"step_00000001.pth", "step_00000002.pth"}
    assert f"starting anew; the earlier run is now in {tmp_path}/earlier/2 (6 files, " in capsys.readouterr().out
    assert torch.load(tmp_path / "pretrain_best.pth")["metrics"]["val_loss"] == losses[2]


def test_a_run_that_was_killed_before_its_first_checkpoint_is_not_lost_either(tmp_path):
    """`--resume auto` finds nothing to continue from; what the first one recorded is kept."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    make_loop(tmp_path, max_steps=1, resume="auto").train()
    assert (tmp_path / "earlier" / "1" / "metrics.jsonl").read_text() == '{"step": 1, "loss": 5.0}\n'


def test_a_run_continued_in_another_folder_sets_aside_what_is_there(tmp_path):
    make_loop(tmp_path / "first", max_steps=2).train()
    make_loop(tmp_path / "second", max_steps=2).train()
    path = tmp_path / "first" / "checkpoints" / "step_00000002.pth"
    make_loop(tmp_path / "second", max_steps=3, resume=str(path)).train()
    assert names(tmp_path / "second" / "earlier" / "1") == LEFT
    assert torch.load(tmp_path / "second" / "pretrain_best.pth")["step"] == 3
    assert not (tmp_path / "first" / "earlier").exists()


def test_a_finished_run_whose_best_model_is_gone_leaves_one_again(tmp_path):
    """Deleted by hand, or left in another folder: what a stage promises is there when it ends."""
    make_loop(tmp_path, max_steps=2).train()
    (tmp_path / "pretrain_best.pth").unlink()
    best = make_loop(tmp_path, max_steps=2, resume="auto").train()
    assert torch.load(tmp_path / "pretrain_best.pth")["metrics"] == best
    assert best["step"] == 2


def test_what_is_not_of_a_run_stays_where_it_is(tmp_path):
    """Another stage's model in the same folder, a folder of the user's; what was made of the best model goes along."""
    for name in ("sft_best.pth", "dpo_best.pth", "dpo_best_int8.pth", "dpo_best_eval.json", "notes.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "reward").mkdir()
    set_earlier_run_aside(tmp_path, "dpo")
    assert names(tmp_path) == {"sft_best.pth", "notes.txt", "reward", "earlier"}
    assert names(tmp_path / "earlier" / "1") == {"dpo_best.pth", "dpo_best_int8.pth", "dpo_best_eval.json"}
    set_earlier_run_aside(tmp_path, "dpo")
    assert names(tmp_path / "earlier") == {"1"}, "nothing more to set aside"


def test_a_move_that_was_killed_is_completed(tmp_path):
    """Half of the files were moved: the other half joins them."""
    moving = tmp_path / "earlier" / "moving"
    moving.mkdir(parents=True)
    (moving / "metrics.jsonl").write_text("first half")
    (tmp_path / "sft_best.pth").write_text("second half")
    set_earlier_run_aside(tmp_path, "sft")
    assert names(tmp_path / "earlier") == {"1"}
    assert names(tmp_path / "earlier" / "1") == {"metrics.jsonl", "sft_best.pth"}


def test_a_second_run_into_a_folder_in_use_is_refused(tmp_path):
    """It would set the first one's files aside while that writes them."""
    with holding(tmp_path), pytest.raises(UserError, match=f"another process is training into {tmp_path}; wait"):
        make_loop(tmp_path, max_steps=1).train()
    make_loop(tmp_path, max_steps=1).train()


# ------------------------------------------------------------------------------------------------------ the same inputs


@pytest.mark.parametrize(
    "config",
    [PretrainConfig, SFTConfig, RewardConfig, PPOConfig, GRPOConfig, DPOConfig, KTOConfig, DistillationConfig],
)
def test_every_option_that_names_an_input_is_marked_as_one(config):
    """By what such options are called: a new one cannot be forgotten."""
    texts = [field.name for field in dataclasses.fields(config) if isinstance(field.default, str)]
    named = {name for name in texts if name.endswith(("_data", "_data_dir", "data_path", "_model"))}
    assert set(inputs_of(config(**dict.fromkeys(named, "x")))) == named


QUESTIONS = [{"instruction": f"问题 {k}", "response": f"{k} 是巴黎。"} for k in range(12)]
PAIRS = [{"instruction": f"问题 {k}", "chosen": f"{k} 是巴黎。", "rejected": f"{k} 是 Rome!"} for k in range(12)]
REWARD = "def reward(prompts, responses, records):\n    return [float({}) for response in responses]\n"

# What a stage reads besides its model: the options of a run, and each with something else in its place
RUNS = {
    "sft": "--pretrained_model a.pth --data_path q.json --val_data_path q.json",
    "reward": "--sft_model a.pth --pairwise_data p.json --val_pairwise_data p.json",
    "dpo": "--sft_model a.pth --pairwise_data p.json --val_pairwise_data p.json --sft_data q.json",
    "kto": "--sft_model a.pth --pairwise_data p.json --val_pairwise_data p.json --sft_data q.json",
    "ppo": "--sft_model a.pth --reward_model r.pth --pairwise_data p.json --val_pairwise_data p.json --sft_data q.json",
    "grpo": "--sft_model a.pth --data_path q.json --val_data_path q.json --reward r.py:reward",
    "distill": "--teacher_model a.pth --student_model b.pth --data_path q.json --val_data_path q.json",
}
OTHERS = {"a.pth": "c.pth", "b.pth": "c.pth", "r.pth": "s.pth", "q.json": "q2.json", "p.json": "p2.json"}
OTHERS |= {"r.py:reward": "s.py:reward"}
COMMON = "--max_steps 1 --eval_interval 1 --num_threads 1 --device cpu --precision fp32 --batch_size 2 --log_interval 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Three models of one kind, two reward models, two versions of each file of data."""
    folder = tmp_path_factory.mktemp("inputs")
    config = GPTConfig.for_architecture(
        "modern", vocab_size=len(tokenizer), d_model=16, n_layers=1, n_heads=2, max_seq_len=48
    )
    for seed, name in enumerate(("a", "b", "c")):
        torch.manual_seed(seed)
        state = GPTModel.from_config(config).state_dict()
        save_checkpoint(folder / f"{name}.pth", model_state=state, config=config, tokenizer=tokenizer, stage="sft")
    for name, records in (("q", QUESTIONS), ("p", PAIRS)):
        (folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
        changed = [*records[:-1], {**records[-1], "instruction": "another question"}]
        (folder / f"{name}2.json").write_text(json.dumps(changed), encoding="utf-8")
    for name, value in (("r", "len(response)"), ("s", "0.0")):
        (folder / f"{name}.py").write_text(REWARD.format(value))
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    """The folder is the working folder; nobody looks at the curves, which would take most of the time."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(run_log, "plot_metrics", lambda *_: None)


def run(mode, options, *more):
    settings = f"--mode {mode} {options} {COMMON} --output_dir {mode}"
    if mode in ("ppo", "grpo"):
        settings += " --rollout_batch_size 4 --max_gen_len 4" + (" --group_size 2" if mode == "grpo" else "")
    finetune.main([*settings.split(), *more])


@pytest.mark.parametrize("mode", RUNS)
def test_a_run_is_not_continued_with_other_inputs(here, mode):
    """Of all that it reads, one thing at a time is replaced; the sentence names the option."""
    if mode == "ppo":
        for seed, name in enumerate(("r", "s")):
            run("reward", RUNS["reward"], "--seed", str(seed))
            Path("reward/reward_best.pth").replace(f"{name}.pth")
    run(mode, RUNS[mode])
    words = RUNS[mode].split()
    for place in range(0, len(words), 2):
        option, value = words[place : place + 2]
        other = " ".join([*words[: place + 1], OTHERS[value], *words[place + 2 :]])
        with pytest.raises(UserError, match=f"another run .*{option}: {value} there, {OTHERS[value]} here.*use the"):
            run(mode, other, "--resume", "auto")
    run(mode, RUNS[mode], "--resume", "auto")
    assert not Path(mode, "earlier").exists()


def test_another_content_at_the_same_place_is_another_input(here):
    """The reward function was rewritten, the data corrected; the same content elsewhere is the same."""
    run("grpo", RUNS["grpo"], "--output_dir", "same_place")
    run("grpo", RUNS["grpo"].replace("q.json", "./q.json"), "--output_dir", "same_place", "--resume", "auto")
    original = Path("r.py").read_text()
    Path("r.py").write_text(REWARD.format("-len(response)"))
    with pytest.raises(UserError, match="--reward: another content than it had"):
        run("grpo", RUNS["grpo"], "--output_dir", "same_place", "--resume", "auto")
    Path("r.py").write_text(original)


def test_another_chat_template_is_another_run(here, tokenizer):
    """The same weights with a tokenizer that puts conversations in other words."""
    run("sft", RUNS["sft"], "--output_dir", "template")
    other = ByteLevelBPETokenizer.from_files(tokenizer.to_files())
    other.chat_template = tokenizer.chat_template.replace("指令", "问题")
    content = torch.load("a.pth")
    config = GPTConfig(**content["config"])
    save_checkpoint("t.pth", model_state=content["model"], config=config, tokenizer=other, stage="sft")
    with pytest.raises(UserError, match="was trained with another chat template; use that one"):
        run("sft", RUNS["sft"].replace("a.pth", "t.pth"), "--output_dir", "template", "--resume", "auto")


def test_pretraining_is_not_continued_with_another_text(tmp_path, tokenizer, monkeypatch):
    """A word in the middle, which none of the samples that are looked at need show, and a text for validation."""
    monkeypatch.chdir(tmp_path)
    tokenizer.save("tokenizer")
    lines = [f"{number} 的平方是 {number * number}。" for number in range(2000)]
    for name, text in (("a", lines), ("b", [*lines[:999], "999 的平方是 998003。", *lines[1000:]]), ("v", lines[:50])):
        Path(f"{name}.txt").write_text("\n".join(text), encoding="utf-8")
    options = "--d_model 16 --n_layers 1 --n_heads 2 --max_seq_len 16 --sample_tokens 0 --tokenizer_dir tokenizer"

    def pretrain(text, *more):
        pretrain_trainer.main([*options.split(), *COMMON.split(), "--train_data_dir", text, *more])

    pretrain("a.txt", "--val_data_dir", "v.txt")
    for text, val, words in (("b.txt", "v.txt", "--train_data_dir: a.txt there"), ("a.txt", "a.txt", "--val_data_dir")):
        with pytest.raises(UserError, match=words):
            pretrain(text, "--val_data_dir", val, "--resume", "auto")


def test_of_a_huge_file_blocks_from_all_over_are_read(tmp_path, monkeypatch):
    """Its size counts, too; what is small is read wholly."""
    monkeypatch.setattr(run_identity, "BLOCK", 4)
    path = tmp_path / "text"

    def fingerprint(content):
        path.write_bytes(content)
        return content_fingerprint([path])

    for content in (b"", b"abc", b"abcdefghij"):
        assert len({fingerprint(content), *(fingerprint(content[:k] + b"X" + content[k + 1 :])
                    for k in range(len(content)))}) == 1 + len(content)  # fmt: skip
    monkeypatch.setattr(run_identity, "MOST_BLOCKS", 3)
    long = bytes(range(100))
    for place in (0, 33, 67):
        assert fingerprint(long) != fingerprint(long[:place] + b"\xff" + long[place + 1 :])
    assert fingerprint(long) != fingerprint(long + b"x")


# ------------------------------------------------------------------------------------------------------- other settings


def test_what_changed_on_the_way_is_said_in_one_line(tmp_path, capsys):
    """Learning rate, schedule and decay may change, aloud; where nothing did, nothing is said."""
    make_loop(tmp_path, max_steps=2).train()
    capsys.readouterr()
    make_loop(tmp_path, max_steps=2, resume="auto").train()
    assert "settings" not in capsys.readouterr().out
    make_loop(tmp_path, max_steps=4, lr=3e-3, schedule="wsd", weight_decay=0.0, resume="auto").train()
    said = [line for line in capsys.readouterr().out.splitlines() if "settings" in line]
    changes = "--max_steps 2 → 4, --lr 0.01 → 0.003, --schedule cosine → wsd, --warmup_steps 1 → 2"
    changes += ", --weight_decay 0.1 → 0.0"
    assert said == [f"with other settings than before: {changes}"]
    assert said[0] in (tmp_path / "run.log").read_text(encoding="utf-8")


def test_settings_that_came_or_went_are_no_change():
    assert changed_settings({"lr": 1.0, "old": 1}, {"lr": 2.0, "new": 3}) == "--lr 1.0 → 2.0"
