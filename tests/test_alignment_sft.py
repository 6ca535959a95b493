"""Supervised fine-tuning: what is trained, that it learns to answer, and that its answers end."""

import copy
import json
from functools import partial

import pytest
import torch

import finetune
from alignment import stage
from alignment.sft import SFTConfig, add_embedding_noise, sft_finetune
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, load_model, save_checkpoint
from command_line import UserError, complaints_about
from data_loader import GPTSFTDataset
from gpt_model import IGNORED_LABEL, GPTConfig, GPTModel
from inference.text_generation import generate_texts
from machine.what_fits import size_of, training_bytes
from text.text_files import iter_records
from training.memory_options import fit_options
from training.micro_batches import RESERVE
from training.run_log import read_metrics
from training.saved_run import newest_sound

QUESTIONS = {"法国的首都": "巴黎", "意大利的首都": "罗马", "Two plus two?": "four", "Three plus three?": "six",
             "日本的首都": "东京", "埃及的首都": "开罗", "One plus one?": "two", "Capital of Peru?": "Lima.",
             "Say something.": "the quick fox", "再见": "再见！"}  # fmt: skip
COMMON = dict(device="cpu", precision="fp32", num_threads=1, batch_size=4, log_interval=1)


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    """A working folder with a freshly initialised base model and ten questions with their answers."""
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
    short = tokenizer.encode("一", add_special_tokens=False)["input_ids"]
    assert batch["labels"][1].tolist()[-5:] == [*short, 2, IGNORED_LABEL]
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


def test_a_batch_with_padding_is_each_conversation_alone(architecture, random_model):
    """Loss and gradients of conversations of many lengths in one batch are the token-weighted means of theirs alone."""
    tokenizer = ByteLevelBPETokenizer(260)
    model = random_model(architecture, vocab_size=260, max_seq_len=64)
    data = GPTSFTDataset([talk("q" * n, "一" * (6 - n)) for n in range(1, 6)], tokenizer, 64)
    assert len(set(data.lengths)) == 5
    batch = data.collate(data.samples)
    loss = model(**batch)["loss"]
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    alone = [data.collate([sample]) for sample in data.samples]
    weighted = sum(model(**one)["loss"] * data.count(one) for one in alone) / data.count(batch)
    torch.testing.assert_close(loss, weighted)
    for one, other in zip(gradients, torch.autograd.grad(weighted, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


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
    assert data.account.n_left_out == 1
    assert data.lengths == [n_prompt + 5, n_prompt + 2]
    assert data[0][1][-5:] == tokenizer.encode("xyzxy", add_special_tokens=False)["input_ids"]
    with pytest.raises(UserError, match="can be used .[0-9]+ no answer within 8 tokens.; raise --max_seq_len"):
        GPTSFTDataset([talk("a", "x")], tokenizer, 8)


# -- that it learns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 8], ids=["full", "lora"])
def test_it_learns_to_answer_and_to_end(folder, capsys, rank):
    """After 60 steps on ten questions it answers each exactly and ends by itself, alone or in a batch.

    LoRA starts from a model that has learned all the wrong answers.
    """
    settings = dict(max_steps=60, lr=1e-2, eval_interval=60, batch_size=10)
    if rank:
        wrong = zip(QUESTIONS, reversed(QUESTIONS.values()), strict=True)
        records = [{"instruction": question, "response": answer} for question, answer in wrong]
        (folder / "wrong.json").write_text(json.dumps(records), encoding="utf-8")
        sft(data_path="wrong.json", output_dir="wrong", **settings)
        settings |= dict(pretrained_model="wrong/sft_best.pth", lora_rank=rank, lr=3e-3)
    best = sft(**settings)
    assert best["val_loss"] < 0.1
    model, tokenizer, content = load_model("sft/sft_best.pth")
    assert content["stage"] == "sft"
    for batch_size in (1, 10):
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
    assert content["step"] <= 12
    assert "fine-tuning base.pth on 7 conversations, 12 steps" in capsys.readouterr().out


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
    with pytest.raises(UserError, match="one.json has 1 .* can be used, too few .*; give --val_data_path"):
        sft(data_path="one.json", val_data_path="", max_steps=1)
    assert len(list(iter_records("data.json"))) == len(QUESTIONS)


def test_a_longer_context_than_the_models_is_refused(folder):
    with pytest.raises(UserError, match="64 is beyond the model's context of 48, which was fixed in pretraining"):
        sft(max_seq_len=64)


def test_settings_that_make_no_sense_are_refused():
    assert complaints_about(SFTConfig(val_fraction=0.0)) == [
        "--val_fraction must be above 0, unless --val_data_path is given"
    ]
    assert complaints_about(SFTConfig(val_fraction=0.0, val_data_path="x")) == []


# -- a step is a step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_micro_batches_of_1_2_and_4_make_the_same_steps(folder, rank):
    """However a step is cut, its loss and gradient are means over its tokens; so are the weights that come out."""
    runs = []
    for size in (4, 2, 1):
        output = f"micro{size}"
        sft(output_dir=output, batch_size=size, grad_accum_steps=4 // size, max_steps=4, lora_rank=rank, lr=1e-3)
        records = [record for record in read_metrics(folder / output / "metrics.jsonl") if "loss" in record]
        weights = load_checkpoint(f"{output}/checkpoints/step_00000004.pth")["model"]
        runs.append(([(record["loss"], record["grad_norm"]) for record in records], weights))
    (course, weights), *others = runs
    assert len(course) == 4
    for other_course, other_weights in others:
        torch.testing.assert_close(torch.tensor(course), torch.tensor(other_course), atol=1e-5, rtol=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, atol=1e-4, rtol=1e-3)


# -- LoRA --------------------------------------------------------------------------------------------------------------


def test_lora_trains_and_saves_adapters_only(folder, capsys):
    """The file is small, records its base, and together with it gives the validation loss of training."""
    best = sft(max_steps=30, lora_rank=2, lora_dropout=0.1, lr=2e-3)
    out = capsys.readouterr().out
    whole, adapters = load_checkpoint("base.pth"), load_checkpoint("sft/sft_best.pth")
    assert all(name.endswith(("lora_A", "lora_B")) for name in adapters["model"])
    own = {name: value for name, value in adapters["model"].items() if "head" not in name}  # which is the embedding's
    n_trained = sum(value.numel() for value in own.values())
    n_all = sum(parameter.numel() for parameter in load_model("base.pth")[0].parameters()) + n_trained
    assert f"LoRA beside base.pth: training {n_trained:,} weights, {n_trained / n_all:.2%} of the parameters" in out
    assert adapters["lora"]["base"] == "base.pth"
    assert (adapters["lora"]["lora_rank"], adapters["lora"]["lora_dropout"]) == (2, 0.1)
    step = load_checkpoint(newest_sound(folder / "sft" / "checkpoints")[1])
    assert step["model"].keys() == adapters["model"].keys()
    assert step["training_state"]["optimizer"].keys() == own.keys()

    model, tokenizer, _ = load_model("sft/sft_best.pth")
    data = GPTSFTDataset([talk(question, answer) for question, answer in QUESTIONS.items()], tokenizer, 48)
    with torch.no_grad():
        assert model(**data.collate(data.samples))["loss"].item() == pytest.approx(best["val_loss"], abs=1e-5)
    assert model.state_dict().keys() == whole["model"].keys()
    untouched = [name for name in whole["model"] if "norm" in name]
    assert all(torch.equal(model.state_dict()[name], whole["model"][name]) for name in untouched)


@pytest.mark.parametrize("frozen_weights", ["fp32", "int8"])
def test_an_interrupted_lora_run_continues_exactly(frozen_weights, folder):
    """Adapters, their optimiser and the dropout's random numbers; with activations recomputed in the backward pass.
    What is loaded afterwards has the loss of training, also where the frozen layers were held in 8 bits."""
    settings = dict(max_steps=6, batch_size=2, save_interval=3, lora_rank=2, lora_dropout=0.2, grad_accum_steps=2)
    settings["frozen_weights"] = frozen_weights
    sft(output_dir="whole", **settings)
    sft(output_dir="parts", **settings, recompute_activations=True)
    (folder / "parts" / "checkpoints" / "step_00000006.pth").unlink()
    best = sft(output_dir="parts", **settings, resume="auto", recompute_activations=True)
    states = [load_checkpoint(f"{name}/checkpoints/step_00000006.pth")["model"] for name in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(name.endswith(("lora_A", "lora_B")) for name in states[0])
    model, tokenizer, _ = load_model("parts/sft_best.pth")
    data = GPTSFTDataset([talk(question, answer) for question, answer in QUESTIONS.items()], tokenizer, 48)
    with torch.no_grad():
        assert model(**data.collate(data.samples))["loss"].item() == pytest.approx(best["val_loss"], abs=1e-5)


def test_where_memory_is_small_a_run_saves_some_by_itself_and_says_how(folder, monkeypatch, capsys):
    """Here as much is there as LoRA beside INT8 takes with activations recomputed, and not a byte more."""
    size = size_of(load_model("base.pth")[0].config)
    needed = training_bytes(size, 1, 48, recompute=True, frozen="int8", rank=2)
    monkeypatch.setattr(stage, "fit_options", partial(fit_options, limit=(needed + 1) / (1 - RESERVE)))
    sft(max_steps=2, lora_rank=2, max_seq_len=48)
    out = capsys.readouterr().out
    assert ", by arithmetic: taking --frozen_weights int8 --recompute_activations true, for 0.0 GiB\n" in out
    assert "LoRA beside base.pth held in INT8: training" in out
    assert load_checkpoint("sft/sft_best.pth")["lora"]["frozen_weights"] == "int8"


def test_a_lora_run_is_not_continued_with_other_adapters_or_without(folder):
    sft(max_steps=2, lora_rank=2)
    for rank in (4, 0):
        with pytest.raises(UserError, match=f"lora_rank 2 there, {rank} here"):
            sft(max_steps=4, lora_rank=rank, resume="auto")


def test_lora_settings_that_make_no_sense_are_refused():
    assert complaints_about(SFTConfig(lora_rank=-1)) == ["--lora_rank must be at least 0, not -1"]
    assert complaints_about(SFTConfig(lora_rank=4, parallel="ddp")) == []
    [complaint] = complaints_about(SFTConfig(lora_rank=4, parallel="fsdp"))
    assert complaint == "--lora_rank works with --parallel ddp, not fsdp; there is little left to cut up"


# -- NEFTune -----------------------------------------------------------------------------------------------------------


def test_neftune_adds_the_noise_of_the_paper_in_training_only(random_model):
    """U(−1, 1) · α / √(L · D), L without padding; nothing in evaluation."""
    model = copy.deepcopy(random_model("modern", vocab_size=260, d_model=48, n_heads=2, max_seq_len=64))
    ids = torch.full((2, 50), 5)
    ids[1, 12:] = model.config.pad_token_id
    clean = model.token_embedding(ids)
    add_embedding_noise(model, 7.0)
    assert torch.equal(model.token_embedding(ids), clean)
    model.train()
    torch.manual_seed(0)
    noise = model.token_embedding(ids) - clean
    for row, length in ((noise[0], 50), (noise[1, :12], 12)):
        limit = 7.0 / (length * 48) ** 0.5
        assert 0.98 * limit < row.abs().max() <= limit * 1.0001
        assert row.mean().abs() < 0.1 * limit
        assert row.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)  # of a uniform distribution


def test_neftune_is_off_by_default_and_reaches_training(folder):
    """With it, training losses change and validation is without noise; a negative α is refused."""
    sft(output_dir="plain", max_steps=2)
    sft(output_dir="noisy", max_steps=2, neftune_alpha=50.0)
    plain, noisy = ([r["loss"] for r in read_metrics(folder / run / "metrics.jsonl") if "loss" in r]
                    for run in ("plain", "noisy"))  # fmt: skip
    assert abs(plain[0] - noisy[0]) > 1e-3
    assert complaints_about(SFTConfig(neftune_alpha=-1.0)) == ["--neftune_alpha must be at least 0, not -1.0"]
