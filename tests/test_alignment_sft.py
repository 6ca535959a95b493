"""Supervised fine-tuning: what is trained, that it learns to answer, and that its answers end."""

import json

import pytest
import torch

import finetune
from alignment.sft import SFTConfig, sft_finetune
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, load_model, save_checkpoint
from command_line import UserError
from data_loader import GPTSFTDataset
from gpt_model import IGNORED_LABEL, GPTConfig, GPTModel
from run_log import read_metrics
from text_files import iter_records
from text_generation import generate_texts

QUESTIONS = {"法国的首都": "巴黎", "意大利的首都": "罗马", "Two plus two?": "four", "Three plus three?": "six"}
COMMON = dict(device="cpu", precision="fp32", num_threads=1, batch_size=4, log_interval=1)


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    """A working folder with a freshly initialised base model and four questions with their answers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = GPTConfig.for_architecture(
        "modern", vocab_size=len(tokenizer), d_model=48, n_layers=2, n_heads=2, max_seq_len=48
    )
    model = GPTModel.from_config(config)
    save_checkpoint("base.pth", model_state=model.state_dict(), config=config, tokenizer=tokenizer, stage="pretrain")
    records = [{"instruction": question, "response": answer} for question, answer in QUESTIONS.items()]
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return tmp_path


def sft(**settings):
    usual = dict(data_path="data.json", val_data_path="data.json", pretrained_model="base.pth", output_dir="sft")
    return sft_finetune(**{**COMMON, **usual, **settings})


# -- what is trained ---------------------------------------------------------------------------------------------------


def test_every_answer_token_and_its_end_are_trained_and_nothing_of_the_prompt():
    """The first answer token and `</s>` carry a label; the prompt, its template and the padding carry none."""
    tokenizer = ByteLevelBPETokenizer(260)  # a token is a byte
    data = GPTSFTDataset([talk("ab", "xyz"), talk("c", "一")], tokenizer, 64)
    batch = data.collate([data[0], data[1]])
    prompt = tokenizer.encode("### 指令:ab\n### 响应:", add_special_tokens=False)["input_ids"]
    answer = tokenizer.encode("xyz", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert batch["input_ids"][0].tolist() == prompt + answer
    assert batch["labels"][0].tolist() == [IGNORED_LABEL] * len(prompt) + answer
    assert batch["labels"][1].tolist()[-5:] == [*tokenizer.encode("一", add_special_tokens=False)["input_ids"], 2, -100]
    assert data.count(batch) == len(answer) + 4


def test_the_gradient_knows_only_the_answers(random_model):
    """By hand: the loss is the mean of −log p over answer tokens, each predicted from the token before it."""
    tokenizer = ByteLevelBPETokenizer(260)
    model = random_model("modern", vocab_size=260, max_seq_len=64)
    data = GPTSFTDataset([talk("ab", "xyz"), talk("question", "一二")], tokenizer, 64)
    nats = []
    for ids, labels in data.samples:
        log_probs = model(torch.tensor([ids]))["logits"][0].log_softmax(-1)
        nats += [-log_probs[t - 1, ids[t]].item() for t in range(1, len(ids)) if labels[t] != IGNORED_LABEL]
    loss = model(**data.collate(data.samples))["loss"]
    assert len(nats) == 4 + 7
    assert loss.item() == pytest.approx(sum(nats) / len(nats), abs=1e-5)


def test_in_a_conversation_of_several_turns_every_answer_is_trained():
    tokenizer = ByteLevelBPETokenizer(260)
    data = GPTSFTDataset([talk("a", "xy") + talk("b", "z")], tokenizer, 96)
    _, labels = data[0]
    trained = [label for label in labels if label != IGNORED_LABEL]
    assert tokenizer.decode(trained, skip_special_tokens=False) == "xy</s>z</s>"


def test_conversations_that_are_too_long_are_cut_or_left_out_and_counted():
    """Cut behind the beginning of an answer it still teaches; one without any answer left does not."""
    tokenizer = ByteLevelBPETokenizer(260)
    n_prompt = len(tokenizer.encode_chat(talk("a", "x")[:1], add_generation_prompt=True)["input_ids"])
    data = GPTSFTDataset([talk("a", "xyz" * 20), talk("b" * 100, "x"), talk("c", "d")], tokenizer, n_prompt + 5)
    assert len(data) == 2
    assert data.n_dropped == 1
    assert data.lengths == [n_prompt + 5, n_prompt + 2]
    assert data[0][1][-5:] == tokenizer.encode("xyzxy", add_special_tokens=False)["input_ids"]
    with pytest.raises(UserError, match="no conversation fits into 8 tokens; raise --max_seq_len"):
        GPTSFTDataset([talk("a", "x")], tokenizer, 8)


# -- that it learns ----------------------------------------------------------------------------------------------------


def test_it_learns_to_answer_and_to_end(folder, capsys):
    """After 60 steps on four questions it answers each exactly and ends by itself, alone or in a batch."""
    best = sft(max_steps=60, lr=1e-2, eval_interval=60, batch_size=4)
    assert best["val_loss"] < 0.1
    model, tokenizer, content = load_model("sft/sft_best.pth")
    assert content["stage"] == "sft"
    for batch_size in (1, 4):
        answers = generate_texts(model, tokenizer, list(QUESTIONS), chat=True, max_gen_len=12, batch_size=batch_size)
        assert [answer.text for answer in answers] == list(QUESTIONS.values())
        assert all(answer.ended for answer in answers)
    assert "fine-tuned: sft/sft_best.pth, validation loss" in capsys.readouterr().out


def test_the_command_line_of_the_readme(folder, capsys):
    """`finetune.py --mode sft` with the options of the documentation; the context is the base model's."""
    options = "--mode sft --data_path data.json --pretrained_model base.pth --output_dir out --epochs 3 --lr 3e-5"
    finetune.main([*options.split(), "--val_fraction", "0.3", "--num_threads", "1", "--batch_size", "2"])
    content = load_checkpoint("out/sft_best.pth")
    assert content["config"]["max_seq_len"] == 48
    assert content["step"] <= 3
    assert "fine-tuning base.pth on 2 conversations, 3 steps" in capsys.readouterr().out


def test_an_interrupted_run_continues_exactly(folder):
    """With batches of similar length and accumulation, half and half give the whole."""
    settings = dict(max_steps=6, grad_accum_steps=2, batch_size=1, eval_interval=2, save_interval=3, optimizer="muon")
    sft(output_dir="whole", **settings)
    sft(output_dir="parts", **{**settings, "keep_checkpoints": 2})
    (folder / "parts" / "checkpoints" / "step_00000006.pth").unlink()
    sft(output_dir="parts", **settings, resume="auto")
    runs = [read_metrics(folder / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert len(runs[0]) == len(runs[1]) == 6 + 3
    for key in ("loss", "val_loss", "grad_norm", "lr"):
        assert [record.get(key) for record in runs[0]] == [record.get(key) for record in runs[1]]
    states = [load_checkpoint(f"{name}/sft_best.pth")["model"] for name in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_validation_records_are_not_trained_on(folder):
    """--val_fraction parts the records; a single one cannot be parted."""
    (folder / "one.json").write_text('[{"instruction": "a", "response": "b"}]')
    with pytest.raises(UserError, match="one.json has too few records to set some aside; give --val_data_path"):
        sft(data_path="one.json", val_data_path="", max_steps=1)
    assert len(list(iter_records("data.json"))) == 4


def test_a_longer_context_than_the_models_is_refused(folder):
    with pytest.raises(UserError, match="--max_seq_len 64 is beyond the model's context of 48; lower it"):
        sft(max_seq_len=64)


def test_settings_that_make_no_sense_are_refused():
    assert SFTConfig(val_fraction=0.0).validate() == ["--val_fraction must be between 0 and 1, not 0.0"]
    assert SFTConfig(val_fraction=0.0, val_data_path="x").validate() == []
