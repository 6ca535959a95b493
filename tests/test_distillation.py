"""Distillation: the loss is the paper's, the teacher stays as it is, the student comes to think like it."""

import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

import finetune
from alignment.distillation import DistillationConfig, DistillationLoop, DistillationModel, distill, student_of
from alignment.reward_model import RewardModel
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, load_model, save_checkpoint
from command_line import UserError, complaints_about
from data_loader import GPTSFTDataset
from gpt_model import IGNORED_LABEL, GPTConfig, GPTModel
from text.conversation_data import load_conversations
from training.run_log import read_metrics
from training.training_config import prepare_machine

COMMON = dict(device="cpu", precision="fp32", num_threads=1, log_interval=1)
CITIES = ["巴黎", "罗马", "Paris", "Rome"]


def save(path, model, tokenizer, stage="sft"):
    save_checkpoint(path, model_state=model.state_dict(), config=model.config, tokenizer=tokenizer, stage=stage)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """A folder with instructions, a text, and a teacher that has learned the instructions by heart."""
    path = tmp_path_factory.mktemp("models")
    records = [{"instruction": f"{k} {city}", "response": f"{city}: {k}。"} for k in range(10) for city in CITIES]
    (path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    (path / "text.txt").write_text(
        "".join(f"The capital number {k} is {city}.\n" for k in range(40) for city in CITIES)
    )
    torch.manual_seed(0)
    config = GPTConfig.for_architecture(
        "modern", vocab_size=len(tokenizer), d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=48
    )
    teacher = GPTModel.from_config(config)
    data = GPTSFTDataset(load_conversations(path / "data.json"), tokenizer, 48)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=5e-3)
    for step in range(60):
        batch = data.collate([data[(step * 7 + k) % len(data)] for k in range(20)])
        teacher(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    save(path / "teacher.pth", teacher, tokenizer)
    save(path / "reward.pth", RewardModel(teacher), tokenizer, "reward")
    short = GPTModel.from_config(GPTConfig(**{**asdict(config), "max_seq_len": 24}))
    save(path / "short.pth", short, tokenizer)
    other = ByteLevelBPETokenizer(vocab_size=300)
    other.train(["something else"] * 3)
    save(path / "other.pth", teacher, other)
    return path


@pytest.fixture
def folder(models, tmp_path, monkeypatch):
    """An empty working folder beside which the models lie, in `m/`."""
    (tmp_path / "m").symlink_to(models)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pair(random_model, tokenizer):
    """A student and a larger teacher with large random weights."""
    sizes = dict(vocab_size=len(tokenizer), max_seq_len=48)
    return random_model("modern", seed=1, **sizes), random_model("gpt2", seed=2, d_model=48, **sizes)


def batch_of(tokenizer, n=4):
    conversations = [
        [{"role": "user", "content": "x" * (1 + k)}, {"role": "assistant", "content": CITIES[k % 4] * (1 + k % 2)}]
        for k in range(n)
    ]
    data = GPTSFTDataset(conversations, tokenizer, 48)
    return data.collate(list(data))


def make_loop(folder, tokenizer, random_model, **settings):
    config = DistillationConfig(
        **{**COMMON, "output_dir": str(folder), "max_seq_len": 48, "max_steps": 4, "lr": 1e-3, "alpha": 0.5, **settings}
    )
    assert complaints_about(config) == []
    device = prepare_machine(config)
    student = random_model("modern", seed=1, vocab_size=len(tokenizer), max_seq_len=48)
    teacher = random_model("gpt2", seed=2, vocab_size=len(tokenizer), max_seq_len=48)
    conversations = [
        [{"role": "user", "content": "x" * k}, {"role": "assistant", "content": "y " * k}] for k in range(1, 13)
    ]
    data = GPTSFTDataset(conversations, tokenizer, 48)
    model = DistillationModel(student, teacher, config.alpha, config.temperature)
    return DistillationLoop(config, model, student.config, tokenizer, "distill", data, data, device)


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand_on_three_tokens(pair):
    """(1 − α) CE + α T² KL(teacher ‖ student), with sums over the vocabulary written out."""
    student, teacher = pair
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    labels = torch.tensor([[IGNORED_LABEL, IGNORED_LABEL, 7, 8, 9]])
    q1 = student(ids)["logits"][0].log_softmax(-1)
    q, p = ((model(ids)["logits"][0] / 2.5).log_softmax(-1) for model in (student, teacher))
    cross_entropy = -(q1[1, 7] + q1[2, 8] + q1[3, 9]).item() / 3
    kl = sum((p[t].exp() * (p[t] - q[t])).sum().item() for t in (1, 2, 3)) / 3
    output = DistillationModel(student, teacher, alpha=0.3, temperature=2.5)(ids, labels)
    assert output["cross_entropy"].item() == pytest.approx(cross_entropy, rel=1e-4)
    assert output["teacher_kl"].item() == pytest.approx(kl, rel=1e-4)
    assert output["loss"].item() == pytest.approx(0.7 * cross_entropy + 0.3 * 2.5**2 * kl, rel=1e-4)


def test_the_divergence_is_trls(pair, tokenizer):
    """TRL's GKDTrainer.generalized_jsd_loss with β = 0 is the same forward divergence, per token."""
    trainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    student, teacher = pair
    batch = batch_of(tokenizer)
    with torch.no_grad():
        logits = [model(batch["input_ids"])["logits"][:, :-1] for model in (student, teacher)]
    theirs = trainer.generalized_jsd_loss(*logits, batch["labels"][:, 1:], beta=0, temperature=2.0)
    ours = DistillationModel(student, teacher, 0.5, 2.0)(**batch)["teacher_kl"]
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)


def test_a_student_that_is_the_teacher_has_no_divergence_and_alone_it_learns_the_labels(pair, tokenizer):
    student, teacher = pair
    batch = batch_of(tokenizer)
    assert DistillationModel(teacher, teacher, 1.0, 2.0)(**batch)["loss"].item() == pytest.approx(0.0, abs=1e-5)
    alone = DistillationModel(student, None, 0.0, 2.0)(**batch)
    assert set(alone) == {"loss", "token_accuracy"}
    assert alone["loss"].item() == pytest.approx(student(**batch)["loss"].item(), rel=1e-5)


def test_chunks_change_neither_loss_nor_gradient(pair, tokenizer, monkeypatch):
    """Logits for seven tokens at a time, computed again in the backward pass."""
    student, teacher = pair
    batch, results = batch_of(tokenizer, 6), []
    for logits_at_once in (1 << 24, 7 * len(tokenizer)):
        monkeypatch.setattr("alignment.distillation.LOGITS_AT_ONCE", logits_at_once)
        student.zero_grad()
        loss = DistillationModel(student, teacher, 0.5, 2.0)(**batch)["loss"]
        loss.backward()
        results.append((loss.item(), torch.cat([parameter.grad.flatten() for parameter in student.parameters()])))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-4)


def test_padding_on_either_side_changes_no_loss(pair, tokenizer):
    student, teacher = pair
    model, batch = DistillationModel(student, teacher, 0.5, 2.0), batch_of(tokenizer)
    expected = {name: value.item() for name, value in model(**batch).items()}
    batch["attention_mask"] = (batch["input_ids"] != tokenizer.pad_token_id).long()
    fill = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED_LABEL}
    for sides in ((5, 0), (0, 5)):
        padded = {name: F.pad(value, sides, value=fill[name]) for name, value in batch.items()}
        for name, value in model(**padded).items():
            assert value.item() == pytest.approx(expected[name], rel=1e-4), (sides, name)


# -- the step ----------------------------------------------------------------------------------------------------------


def test_micro_batches_give_the_step_of_the_whole_batch(tmp_path, tokenizer, random_model):
    """8 × 1, 4 × 2 and 2 × 4: answers differ in length, and every token weighs the same."""
    results = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        loop = make_loop(tmp_path, tokenizer, random_model, batch_size=batch_size, grad_accum_steps=accumulation)
        loop.train_step()
        results.append(loop.train_step())
    for figures in results[1:]:
        for name, value in figures.items():
            assert value == pytest.approx(results[0][name], rel=1e-3, abs=1e-5), name


def test_the_teacher_stays_as_it_is_and_out_of_every_file(tmp_path, tokenizer, random_model):
    """Bit for bit; neither the best checkpoint nor those for resuming hold a second model."""
    loop = make_loop(tmp_path, tokenizer, random_model, batch_size=4)
    before = {name: value.clone() for name, value in loop.model.teacher.state_dict().items()}
    loop.train()
    assert all(torch.equal(before[name], value) for name, value in loop.model.teacher.state_dict().items())
    best = load_checkpoint(tmp_path / "distill_best.pth")["model"]
    resumable = load_checkpoint(next((tmp_path / "checkpoints").iterdir()))["model"]
    assert set(best) == set(loop.model.student.state_dict())
    assert set(resumable) == {f"student.{name}" for name in best}


# -- the run -----------------------------------------------------------------------------------------------------------


def settings_of(**settings):
    sizes = dict(n_layers=1, d_model=32, n_heads=2, batch_size=16, lr=8e-3)
    common = dict(teacher_model="m/teacher.pth", data_path="m/data.json", output_dir="out", val_fraction=0.2)
    return {**COMMON, **common, **sizes, **settings}


def test_the_student_comes_to_the_teachers_distribution(folder, capsys):
    """From its probabilities alone (α = 1) the divergence on unseen questions falls to a small part of what it was."""
    best = distill(**settings_of(alpha=1.0, temperature=1.0, max_steps=80, eval_interval=40))
    first = read_metrics("out/metrics.jsonl")[0]
    assert best["val_teacher_kl"] < 0.1 * first["teacher_kl"]
    assert best["val_loss"] == pytest.approx(best["val_teacher_kl"])
    assert "learns from m/teacher.pth" in capsys.readouterr().out
    student, _, content = load_model("out/distill_best.pth")
    assert (content["stage"], student.config.n_layers, student.config.d_model) == ("distill", 1, 32)


def test_a_checkpoint_can_be_the_student_and_text_the_data(folder, tokenizer, random_model):
    student = random_model("gpt2", vocab_size=len(tokenizer), max_seq_len=24)
    save("student.pth", student, tokenizer)
    sizes = dict(n_layers=0, d_model=0, n_heads=0, lr=1e-3)
    best = distill(
        **settings_of(**sizes, student_model="student.pth", text_data="m/text", shard_dir="shards", max_steps=12)
    )
    steps = [record for record in read_metrics("out/metrics.jsonl") if "teacher_kl" in record]
    assert steps[-1]["teacher_kl"] < steps[0]["teacher_kl"]
    assert math.isfinite(best["val_teacher_kl"])
    assert load_model("out/distill_best.pth")[0].config.position == "learned"


def test_from_text_the_student_learns_what_the_teacher_writes(folder):
    """The answers are kept in a file, a resumed run reads them from there, and nothing else is learned."""
    distill(**settings_of(from_text=True, max_steps=40, eval_interval=20))
    answers = load_conversations("out/teacher_answers.jsonl")
    questions = {messages[0]["content"]: messages[1]["content"] for messages in load_conversations("m/data.json")}
    assert 30 <= len(answers) <= 40
    assert all(messages[0]["content"] in questions for messages in answers)
    losses = [record["loss"] for record in read_metrics("out/metrics.jsonl") if "loss" in record]
    assert losses[-1] < 0.5 * losses[0]
    lines = (folder / "out" / "teacher_answers.jsonl").read_text().splitlines()
    (folder / "out" / "teacher_answers.jsonl").write_text("\n".join(lines[:25]))
    with pytest.raises(UserError, match="belongs to another run .samples"):
        distill(**settings_of(from_text=True, max_steps=60, eval_interval=20, resume="auto"))
    with pytest.raises(UserError, match="answers.jsonl was written with another --max_gen_len, --seed; use the"):
        distill(**settings_of(from_text=True, max_steps=60, max_gen_len=9, seed=3, resume="auto"))


def test_an_interrupted_run_continues_exactly(folder):
    options = "--mode distill --teacher_model m/teacher.pth --data_path m/data.json --max_steps 6 --batch_size 4"
    options += " --eval_interval 2 --save_interval 3 --log_interval 1 --num_threads 1 --device cpu --precision fp32"
    for name in ("whole", "parts"):
        finetune.main([*options.split(), "--output_dir", name])
    (folder / "parts" / "checkpoints" / "step_00000006.pth").unlink()
    finetune.main([*options.split(), "--output_dir", "parts", "--resume", "auto"])
    runs = [read_metrics(f"{name}/metrics.jsonl") for name in ("whole", "parts")]
    for key in ("step", "loss", "teacher_kl", "cross_entropy", "val_loss", "val_teacher_kl", "grad_norm"):
        assert [record.get(key) for record in runs[0]] == [record.get(key) for record in runs[1]], key


def test_a_new_student_has_half_the_teachers_sizes_unless_told_otherwise():
    teacher = GPTConfig.for_architecture("modern", vocab_size=64, d_model=64, n_layers=4, n_heads=4, n_kv_heads=2)
    half = student_of(teacher, DistillationConfig())
    assert (half.d_model, half.n_layers, half.n_heads, half.n_kv_heads, half.head_dim) == (32, 2, 2, 1, 16)
    told = student_of(teacher, DistillationConfig(d_model=96, n_layers=1, n_heads=3, n_kv_heads=3))
    assert (told.d_model, told.n_layers, told.n_heads, told.n_kv_heads) == (96, 1, 3, 3)
    assert (half.activation, half.vocab_size, half.max_seq_len) == ("swiglu", 64, teacher.max_seq_len)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 1.5}, "--alpha must be at least 0 and at most 1, not 1.5"),
        ({"temperature": 0.0}, "--temperature must be above 0, not 0.0"),
        ({"sampling_temperature": math.nan}, "--sampling_temperature must be at least 0, not nan"),
        ({"d_model": -1}, "--d_model must be at least 0, not -1"),
        ({"student_model": "s.pth", "d_model": 96}, "--student_model brings its own size; leave out --n_layers"),
        ({"from_text": True, "text_data": "x"}, "leave out --text_data"),
        ({"max_gen_len": 0}, "--max_gen_len must be at least 1, not 0"),
        ({"val_fraction": 0.0}, "--val_fraction must be above 0, unless --val_data_path is given"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    assert words in "; ".join(complaints_about(DistillationConfig(**settings)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher_model": "nowhere.pth"}, "the teacher nowhere.pth does not exist; train it first"),
        ({"teacher_model": "m/reward.pth"}, "m/reward.pth is a reward model, which writes no text"),
        ({"student_model": "m/other.pth"}, "m/other.pth and m/teacher.pth have different tokenizers"),
        ({"teacher_model": "m/short.pth", "student_model": "m/teacher.pth"}, "reads at most 24 tokens; use --max_seq_"),
        ({"max_seq_len": 49}, "--max_seq_len 49 is beyond the model's context of 48"),
        ({"n_heads": 5}, "no student has these sizes: d_model 32 must be a multiple of n_heads 5"),
        ({"from_text": True, "max_gen_len": 1}, "m/teacher.pth ended no answer by itself; raise --max_gen_len"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(settings, words, folder):
    if "student_model" in settings:
        settings = {**settings, "n_layers": 0, "d_model": 0, "n_heads": 0}
    with pytest.raises(UserError, match=words):
        distill(**settings_of(**settings, max_steps=1))
