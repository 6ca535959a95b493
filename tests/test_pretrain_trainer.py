"""Pretraining from the command line: real runs of `main`, on the sample data and on twenty lines."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pretrain_trainer
from checkpoint import load_checkpoint, load_model
from command_line import UserError, parse_config
from gpt_model import GPTModel
from pretrain_trainer import GPTTrainer, PretrainConfig, turn_depth_dial
from text.text_files import iter_documents
from text.token_shards import in_validation_part
from training.run_log import read_metrics

ROOT = Path(__file__).parent.parent
COLOURS = ("red", "orange", "yellow", "green", "blue", "indigo", "violet")
LINES = [f"{number} 的平方是 {number * number}；the cube is {number**3}." for number in range(20)]
SMALL = ["--d_model", "16", "--n_layers", "1", "--n_heads", "2", "--max_seq_len", "16", "--batch_size", "4"]
SMALL += ["--max_steps", "4", "--eval_interval", "2", "--log_interval", "1", "--num_threads", "1", "--device", "cpu"]
SMALL += ["--precision", "fp32", "--sample_tokens", "4"]


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    """A working folder as a user has it: text, a tokenizer, and nothing trained yet."""
    monkeypatch.chdir(tmp_path)
    Path("lines.txt").write_text("\n".join(LINES), encoding="utf-8")
    Path("val.txt").write_text("\n".join(LINES[:5]), encoding="utf-8")
    tokenizer.save("models/bpe_tokenizer")
    return tmp_path


def pretrain(*options):
    pretrain_trainer.main([*SMALL, "--train_data_dir", "lines.txt", "--val_data_dir", "val.txt", *map(str, options)])


def losses(folder):
    return [record["loss"] for record in read_metrics(Path(folder) / "metrics.jsonl") if "loss" in record]


def test_without_arguments_it_trains_on_the_sample_data(tmp_path, monkeypatch, capsys):
    """Tokenizer, shards, model, curves, samples and checkpoints arise at their usual places."""
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(ROOT / "data")
    pretrain_trainer.main(["--max_steps", "2", "--eval_interval", "2", "--num_threads", "1"])
    out = capsys.readouterr().out
    assert "no tokenizer in models/bpe_tokenizer yet: training one of 4096 tokens on data/pretrain/train" in out
    assert "pretrained: models/pretrain/pretrain_best.pth, validation loss" in out
    names = {path.name for path in Path("models/pretrain").rglob("*") if path.is_file()}
    assert names == {"pretrain_best.pth", "step_00000002.pth", "metrics.jsonl", "curves.png", "samples.txt", "run.log"}
    record = read_metrics("models/pretrain/metrics.jsonl")[-1]
    n_bytes = sum(len(line.encode()) for line in iter_documents("data/pretrain/val"))
    model, tokenizer, content = load_model("models/pretrain/pretrain_best.pth")
    n_tokens = sum(len(ids) + 2 for ids in tokenizer.encode_batch(list(iter_documents("data/pretrain/val"))))
    assert record["val_bpb"] == pytest.approx(record["val_loss"] * (n_tokens - 1) / math.log(2) / n_bytes)
    assert (content["stage"], content["step"], len(tokenizer)) == ("pretrain", 2, 4096)
    assert model.generate(torch.tensor([[0]]), 3).shape == (1, 4)
    assert len(Path("models/pretrain/samples.txt").read_text(encoding="utf-8").split("\n")) == 5


def test_a_run_started_again_reuses_the_tokenized_text_and_repeats_itself(folder):
    """The same command gives the same losses, and tokenizes once."""
    pretrain()
    first = losses("models/pretrain")
    before = {path: path.stat().st_mtime_ns for path in Path("models/token_shards").rglob("*.bin")}
    assert len(before) == 2
    pretrain("--output_dir", "again")
    assert losses("again") == first
    assert {path: path.stat().st_mtime_ns for path in Path("models/token_shards").rglob("*.bin")} == before


def test_samples_are_of_documents_from_all_over_and_of_each_evaluation_once(folder):
    """Their beginnings are those of lines far apart; what a killed run had written already is not there twice."""
    lines = [f"{word} is the name of a colour" for word in COLOURS]
    Path("val.txt").write_text("\n".join(lines), encoding="utf-8")
    pretrain()
    samples = Path("models/pretrain/samples.txt").read_text(encoding="utf-8")
    blocks = samples.split("--- step ")[1:]
    assert [block.splitlines()[0] for block in blocks] == ["2", "4"]
    for block in blocks:
        prompts = [line.split(" → ")[0] for line in block.splitlines()[1:]]
        numbers = [next(n for n, line in enumerate(lines) if line.startswith(prompt)) for prompt in prompts]
        assert len(numbers) == 3 and numbers[0] == 0 and numbers[1] in (2, 3) and numbers[2] in (4, 5)
    Path("models/pretrain/checkpoints/step_00000004.pth").unlink()
    pretrain("--resume", "auto")
    assert Path("models/pretrain/samples.txt").read_text(encoding="utf-8") == samples


def test_sigterm_ends_the_process_with_130_and_the_same_command_continues(folder):
    """As a machine that is switched off does it: the real process, a real signal, and `--resume auto`."""
    options = ["--optimizer", "muon", "--dropout", "0.1", "--grad_accum_steps", "2", "--max_steps", "3000"]
    options += ["--eval_interval", "1500", "--save_interval", "1500", "--resume", "auto"]
    command = [*SMALL, "--train_data_dir", "lines.txt", "--val_data_dir", "val.txt", *options]
    process = subprocess.Popen(
        [sys.executable, ROOT / "pretrain_trainer.py", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics, deadline = Path("models/pretrain/metrics.jsonl"), time.monotonic() + 60
    while not (metrics.exists() and len(read_metrics(metrics)) > 5) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "no checkpoint in models/pretrain/checkpoints, starting from step 0" in out
    (checkpoint,) = Path("models/pretrain/checkpoints").iterdir()
    step = load_checkpoint(checkpoint)["step"]
    assert err.strip().splitlines()[-1] == f"SIGTERM: saved at step {step} of 3000; continue with --resume auto"
    assert "Traceback" not in err

    trainer = GPTTrainer(parse_config(PretrainConfig, command, description=""))
    trainer.loop.resume("auto")
    continued = [trainer.loop.train_step()["loss"] for _ in range(3)]
    trainer = GPTTrainer(parse_config(PretrainConfig, command, description=""))
    assert [trainer.loop.train_step()["loss"] for _ in range(step + 3)][-3:] == continued


def test_documents_set_aside_for_validation_are_trained_on_by_nobody(folder, capsys):
    """--val_fraction parts the documents, wholly and without overlap; without it a twentieth is set aside, aloud."""
    pretrain_trainer.main([*SMALL, "--train_data_dir", "lines.txt", "--val_fraction", "0.25"])
    shards = {path.name.split("-")[1]: path for path in Path("models/token_shards").iterdir()}
    assert set(shards) == {"train", "val"}
    config = parse_config(PretrainConfig, [*SMALL, "--train_data_dir", "lines.txt", "--val_fraction", "0.25"],
                          description="")  # fmt: skip
    trainer = GPTTrainer(config)
    documents = []
    for part in (trainer.train_shards, trainer.val_shards):
        text = trainer.tokenizer.decode(part.slice(0, part.n_tokens).tolist(), skip_special_tokens=False)
        documents.append([line.removesuffix("</s>") for line in text.split("<s>")[1:]])
    assert sorted(documents[0] + documents[1]) == sorted(LINES)
    assert documents[1] == [line for index, line in enumerate(LINES) if in_validation_part(index, 0.25)]
    assert 4 <= len(documents[1]) <= 6
    capsys.readouterr()
    pretrain_trainer.main([*SMALL, "--train_data_dir", "lines.txt", "--output_dir", "other"])
    assert "no validation text given: 5% of the documents are set aside" in capsys.readouterr().out


def test_a_missing_validation_text_is_named_before_any_work(folder):
    with pytest.raises(UserError, match="there is no data at nothing"):
        pretrain("--val_data_dir", "nothing", "--tokenizer_dir", "models/bpe_tokenizer")
    assert not Path("models/token_shards").exists()
    assert not Path("models/pretrain").exists()


def test_the_depth_dial_sets_everything_that_follows_and_says_so(folder, capsys):
    """One number gives a whole run; what the user says wins, aloud."""
    config = parse_config(PretrainConfig, ["--depth", "4"], description="")
    sentence = turn_depth_dial(config)
    sizes = (config.n_layers, config.d_model, config.n_heads, config.n_kv_heads, config.max_seq_len)
    assert sizes == (4, 256, 4, 2, 256)
    assert config.lr == pytest.approx(4e-3 * math.sqrt(192 / 256), rel=0.05)
    tokens = config.max_steps * config.batch_size * config.grad_accum_steps * config.max_seq_len
    assert tokens == pytest.approx(20 * 12 * 4 * 256**2, rel=0.01), "20 tokens a parameter"
    assert sentence.startswith("depth 4: n_layers 4, d_model 256, ")
    assert "as you said" not in sentence

    pretrain("--depth", "2", "--epochs", "0.5")
    out = capsys.readouterr().out
    assert "depth 2: n_kv_heads 1, lr 0.0049, grad_accum_steps 8; as you said: n_layers 1, d_model 16," in out
    content = load_checkpoint("models/pretrain/pretrain_best.pth")
    assert (content["config"]["n_layers"], content["config"]["d_model"], content["step"]) == (1, 16, 4)


@pytest.mark.parametrize("depth", range(1, 25))
def test_every_depth_gives_a_model(depth):
    config = parse_config(PretrainConfig, ["--depth", str(depth)], description="")
    turn_depth_dial(config)
    assert config.validate() == []
    with torch.device("meta"):
        assert GPTModel.from_config(config.model_config(4096, 1)).num_parameters() > depth * 10_000


def test_every_preset_gives_a_model():
    for preset in PretrainConfig.presets:
        config = parse_config(PretrainConfig, ["--preset", preset], description="")
        with torch.device("meta"):
            n_parameters = GPTModel.from_config(config.model_config(50257, 1)).num_parameters()
        if preset == "gpt2":
            assert n_parameters == 124_439_808  # the published model's


def test_the_trainer_saves_loads_and_resumes_as_a_library(folder):
    """`GPTTrainer` with `train(resume_from)`, `save_model` and `load_checkpoint`."""
    options = [*SMALL, "--train_data_dir", "lines.txt", "--val_data_dir", "val.txt"]

    def trainer(*more):
        return GPTTrainer(parse_config(PretrainConfig, [*options, *more], description=""))

    first = trainer()
    best = first.train()
    first.save_model("copy.pth")
    second = trainer("--seed", "5")
    assert not torch.equal(second.model.token_embedding.weight, first.model.token_embedding.weight)
    second.load_checkpoint("copy.pth")
    assert all(map(torch.equal, second.model.state_dict().values(), first.model.state_dict().values()))
    longer = trainer("--max_steps", "6")
    longer.train(resume_from="auto")
    assert longer.loop.step == 6
    assert longer.loop.best["val_loss"] < best["val_loss"]
    with pytest.raises(UserError, match="another architecture .*n_layers 1 there, 2 here"):
        trainer("--n_layers", "2").load_checkpoint("copy.pth")


def test_a_model_or_batch_that_no_memory_holds_is_refused_with_advice(folder):
    """Really asked for: petabytes."""
    with pytest.raises(UserError, match="out of memory for a model of --d_model 100000000 and --n_layers 1; lower"):
        pretrain("--d_model", 10**8)
    with pytest.raises(UserError, match="of memory with micro-batches of 1000000000000 and --max_seq_len 16; lower"):
        pretrain("--batch_size", 10**12)


def test_learned_lines_are_continued(folder, corpus):
    """Text in, text out: a model that has read a few lines continues their beginnings as they do, and ends there."""
    Path("lines.txt").write_text("\n".join(corpus), encoding="utf-8")
    pretrain("--d_model", 64, "--max_steps", 120, "--batch_size", 16, "--eval_interval", 120, "--lr", "1e-2",
             "--max_seq_len", 32, "--val_data_dir", "lines.txt")  # fmt: skip
    model, tokenizer, _ = load_model("models/pretrain/pretrain_best.pth")
    for beginning, line in (("法国", "法国的首都是巴黎。"), ("The capital", "The capital of France is Paris.")):
        prompt = tokenizer.encode(beginning)["input_ids"]
        output = model.generate(torch.tensor([prompt]), 24, temperature=0, eos_token_id=tokenizer.eos_token_id)[0]
        assert tokenizer.decode(output.tolist()) == line
        assert int(output[-1]) == tokenizer.eos_token_id
    assert Path("models/pretrain/curves.png").stat().st_size > 1000


def test_sources_are_mixed_and_documents_kept_apart(folder, capsys):
    """The smaller source is repeated."""
    lines = Path("lines.txt").read_text(encoding="utf-8").splitlines()
    Path("few.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:40]), encoding="utf-8")
    options = [*SMALL, "--train_data_dir", "lines.txt:0.5", "few.jsonl:0.5", "--val_data_dir", "val.txt"]
    pretrain_trainer.main([*options, "--separate_documents", "--output_dir", "mixed"])
    assert "mixed by weight: a pass is" in capsys.readouterr().out
    assert Path("mixed/pretrain_best.pth").is_file()
