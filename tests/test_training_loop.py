"""The training loop survives what happens to long runs, and counts every token once."""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, load_model
from command_line import UserError, run_main
from data_loader import GPTPretrainDataset, GPTSFTDataset
from gpt_model import GPTConfig, GPTModel
from text.token_shards import TokenShards
from training.run_log import read_metrics
from training.training_config import TrainingConfig, prepare_machine
from training.training_loop import TrainingLoop

ROOT = Path(__file__).parent.parent
LINES = [f"{number} 的平方是 {number * number}; the cube is {number**3}." for number in range(3, 23)]
TIMES = ("tokens_per_second", "mfu", "memory_mib", "seconds")  # what no two runs have in common


def windows(lines, tokenizer, max_seq_len=16):
    """Lines as the trainer sees them: `<s>` line `</s>`, cut into windows."""
    ids = [id for ids in tokenizer.encode_batch(lines) for id in (0, *ids, 2)]
    n_bytes = sum(len(line.encode()) for line in lines)
    return GPTPretrainDataset(TokenShards([np.array(ids, dtype=np.uint16)], n_bytes, len(lines)), max_seq_len)


def make_loop(folder, loop_class=TrainingLoop, train_lines=LINES, val_lines=LINES[:6], d_model=16, stage="pretrain",
              **settings):  # fmt: skip
    """A tiny model with dropout and a loop around it that accumulates over two micro-batches."""
    usual = dict(device="cpu", precision="fp32", num_threads=1, batch_size=2, grad_accum_steps=2, max_seq_len=16)
    usual |= dict(max_steps=6, lr=1e-2, eval_interval=3, save_interval=1, log_interval=1)
    config = TrainingConfig(**{"output_dir": str(folder), **usual, **settings})
    device = prepare_machine(config)
    tokenizer = ByteLevelBPETokenizer(260)  # knows the bytes only
    gpt_config = GPTConfig.for_architecture(
        "modern", vocab_size=260, d_model=d_model, n_layers=2, n_heads=2, max_seq_len=16, dropout=0.2
    )
    model = GPTModel.from_config(gpt_config)
    data, val_data = windows(train_lines, tokenizer), windows(val_lines, tokenizer) if val_lines else None
    return loop_class(config, model, gpt_config, tokenizer, stage, data, val_data, device)


def story(folder):
    """The metrics of a run, without what depends on the clock."""
    return [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in read_metrics(Path(folder) / "metrics.jsonl")
    ]


def checkpoints(folder):
    return sorted(path.name for path in (Path(folder) / "checkpoints").iterdir())


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


class SignalledLoop(TrainingLoop):
    """Sends real signals to its own process while it works on step 3."""

    signals = (signal.SIGTERM,)

    def train_step(self):
        if self.step == 2:
            for number in self.signals:
                os.kill(os.getpid(), number)
        return super().train_step()


class UnhurriedLoop(TrainingLoop):
    """Waits before its eleventh step until it is killed, so that even a busy machine has the time to kill it."""

    def train_step(self):
        if self.step == 10:
            signal.pause()
        return super().train_step()


# -- killed, interrupted, continued ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_kill_9_and_resume_repeat_the_uninterrupted_run_bit_for_bit(tmp_path, optimizer):
    """Optimiser, schedule, random states (dropout), data position and metrics: nothing tells that there was a kill."""
    settings = dict(optimizer=optimizer, max_steps=30, eval_interval=7)
    victim = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.path[:0] = sys.argv[1:3]; import test_training_loop as t;"
         f"t.make_loop(sys.argv[3], t.UnhurriedLoop, **{settings}).train()", ROOT, ROOT / "tests", tmp_path / "killed"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wanted = tmp_path / "killed" / "checkpoints" / "step_00000004.pth"
    while not wanted.exists() and victim.poll() is None:
        time.sleep(0.001)
    victim.kill()  # at whatever it is doing then
    assert victim.wait() == -signal.SIGKILL, "the run was over before it could be killed"

    whole = make_loop(tmp_path / "whole", **settings)
    best = whole.train()
    resumed = make_loop(tmp_path / "killed", **settings, resume="auto")
    resumed_best = resumed.train()
    assert story(tmp_path / "killed") == story(tmp_path / "whole")
    assert len(story(tmp_path / "whole")) == 30 + 5  # every step and every evaluation once
    assert resumed_best == best
    assert_same_weights(resumed.model.state_dict(), whole.model.state_dict())
    assert not list((tmp_path / "killed").rglob("*.tmp")), "what the kill left half-written is cleared away"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_says_so_and_the_run_continues_exactly(tmp_path, capsys, number):
    """Ctrl-C and SIGTERM finish the step, save, and leave with one sentence and status 130."""
    settings = dict(save_interval=100, max_steps=6)
    whole = make_loop(tmp_path / "whole", **settings)
    whole.train()
    loop = make_loop(tmp_path / "stopped", SignalledLoop, **settings)
    loop.signals = (number,)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run_main(loop.train)
    assert exit.value.code == 130
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line == f"{number.name}: saved at step 3 of 6; continue with --resume auto"
    assert checkpoints(tmp_path / "stopped") == ["step_00000003.pth"]
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler), "the handlers are put back"

    resumed = make_loop(tmp_path / "stopped", resume="auto", **settings)
    resumed.train()
    assert f"continuing from {tmp_path}/stopped/checkpoints/step_00000003.pth, step 3 of 6" in capsys.readouterr().out
    assert story(tmp_path / "stopped") == story(tmp_path / "whole")
    assert_same_weights(resumed.model.state_dict(), whole.model.state_dict())


def test_resume_auto_takes_the_newest_sound_checkpoint_and_sets_damaged_ones_aside(tmp_path, capsys):
    """A flipped byte and a cut-off file are recognised, named and kept under another name."""
    make_loop(tmp_path, keep_checkpoints=3).train()
    folder = tmp_path / "checkpoints"
    assert checkpoints(tmp_path) == ["step_00000004.pth", "step_00000005.pth", "step_00000006.pth"]
    content = bytearray((folder / "step_00000006.pth").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / "step_00000006.pth").write_bytes(content)
    cut = (folder / "step_00000005.pth").read_bytes()[:-1000]
    (folder / "step_00000005.pth").write_bytes(cut)
    capsys.readouterr()

    loop = make_loop(tmp_path, resume="auto")
    loop.resume("auto")
    assert loop.step == 4
    out = capsys.readouterr().out
    for step in (5, 6):
        assert f"the checkpoint {folder}/step_0000000{step}.pth is damaged" in out
        assert f"set aside as {folder}/step_0000000{step}.damaged" in out
    assert f"continuing from {folder}/step_00000004.pth, step 4 of 6" in out
    assert checkpoints(tmp_path) == ["step_00000004.pth", "step_00000005.damaged", "step_00000006.damaged"]


def test_resume_auto_without_a_checkpoint_starts_from_0_and_says_so(tmp_path, capsys):
    make_loop(tmp_path, max_steps=2, resume="auto").train()
    assert f"no checkpoint in {tmp_path}/checkpoints, starting from step 0" in capsys.readouterr().out
    assert [record["step"] for record in story(tmp_path)] == [1, 2, 2]  # the last one is the evaluation


def test_a_finished_run_resumed_does_nothing_more(tmp_path):
    """The same command again gives the same result, at once."""
    best = make_loop(tmp_path).train()
    before = story(tmp_path)
    loop = make_loop(tmp_path, resume="auto")
    assert loop.train() == best
    assert loop.step == 6
    assert story(tmp_path) == before


def test_records_beyond_the_checkpoint_and_a_torn_line_are_cut(tmp_path):
    """metrics.jsonl tells one story, whatever a killed run wrote after its last checkpoint."""
    make_loop(tmp_path).train()
    whole = story(tmp_path)
    (tmp_path / "checkpoints" / "step_00000006.pth").unlink()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    make_loop(tmp_path, resume="auto").train()
    assert story(tmp_path) == whole


def test_only_the_last_checkpoints_are_kept(tmp_path):
    make_loop(tmp_path, keep_checkpoints=2).train()
    assert checkpoints(tmp_path) == ["step_00000005.pth", "step_00000006.pth"]


def test_every_pass_cuts_a_text_elsewhere(tmp_path):
    """What a step reads depends on nothing but its number, so a resumed run reads it, too."""
    loop = make_loop(tmp_path)
    steps = loop.order.steps_per_epoch

    def windows_of(epoch):
        batches = (batch for step in range(epoch * steps, (epoch + 1) * steps) for batch in loop.batches_of(step))
        return {tuple(ids) for batch in batches for ids in batch["input_ids"].tolist()}

    first, second = windows_of(0), windows_of(1)
    assert len(first) == len(second) == len(loop.train_data) and not first & second
    assert windows_of(0) == first


# -- resuming what does not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(d_model=32), "another architecture (d_model 16 there, 32 here"),
        (dict(train_lines=LINES[:10]), "another run (samples "),
        (dict(train_lines=[line.replace("cube", "CUBE") for line in LINES]), "another run (data "),
        (dict(seed=1), "another run (seed 0 there, 1 here)"),
        (dict(batch_size=4), "another run (global_batch 4 there, 8 here)"),
        (dict(optimizer="muon"), "another run (optimizer adamw there, muon here)"),
        (dict(stage="sft"), "a pretrain checkpoint"),
    ],
    ids=["architecture", "fewer samples", "other text", "seed", "batch", "optimizer", "stage"],
)
def test_a_checkpoint_of_another_run_is_refused(finished, change, named):
    """Resuming with something else than before is never silent: the sentence names the file and the difference."""
    path = finished / "checkpoints" / "step_00000002.pth"
    with pytest.raises(UserError) as error:
        make_loop(finished, **{"max_steps": 2, **change}).resume(str(path))
    assert str(path) in str(error.value)
    assert named in str(error.value)


def test_a_checkpoint_of_another_tokenizer_is_refused(finished):
    loop = make_loop(finished, max_steps=2)
    loop.tokenizer = ByteLevelBPETokenizer(260, ("<s>", "<pad>", "</s>", "<unknown>"))
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        loop.resume("auto")


def test_a_published_model_is_no_checkpoint_to_resume_from(finished):
    with pytest.raises(UserError, match="no training state.*resume from"):
        make_loop(finished, max_steps=2).resume(str(finished / "pretrain_best.pth"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short finished run."""
    folder = tmp_path_factory.mktemp("finished")
    make_loop(folder, max_steps=2, eval_interval=2).train()
    return folder


# -- numbers that are not finite ---------------------------------------------------------------------------------------


class PoisonedLoop(TrainingLoop):
    """One batch of real infinities: during step 3 an embedding is infinite."""

    def train_step(self):
        weight = self.model.token_embedding.weight
        clean = weight.detach().clone()
        if self.step == 2:
            weight.data[:] = math.inf
        record = super().train_step()
        if self.step == 3:
            weight.data.copy_(clean)
        return record


def test_a_step_with_a_non_finite_loss_is_skipped_counted_and_shown(tmp_path, capsys):
    """Neither weights nor optimiser take it up; the metrics stay valid JSON."""
    loop = make_loop(tmp_path, PoisonedLoop, optimizer="muon")
    states = []

    def remember(model, metrics):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return {}

    loop.score, loop.eval_interval = remember, 1
    loop.train()
    assert_same_weights(states[1], states[2])  # after steps 2 and 3
    assert not torch.equal(states[2]["final_norm.weight"], states[3]["final_norm.weight"])
    assert all(torch.isfinite(value).all() for value in loop.model.state_dict().values())
    assert "step 3: loss or gradient not finite, step skipped (1)" in capsys.readouterr().out
    records = [record for record in story(tmp_path) if "lr" in record]
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1, 1, 1]
    assert records[2]["loss"] is None
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_several_non_finite_steps_in_a_row_stop_the_run_with_advice(tmp_path):
    """The checkpoints from before the trouble are still there."""

    class Diverging(TrainingLoop):
        def train_step(self):
            if self.step == 2:
                self.model.final_norm.weight.data[0] = math.nan
            return super().train_step()

    loop = make_loop(tmp_path, Diverging, max_skipped_steps=3, save_interval=2, eval_interval=100)
    with pytest.raises(UserError, match="not finite 3 steps in a row; lower --lr") as error:
        loop.train()
    assert "--resume auto" in str(error.value)
    state = load_checkpoint(tmp_path / "checkpoints" / "step_00000002.pth")["model"]
    assert all(torch.isfinite(value).all() for value in state.values())


# -- memory and disk ---------------------------------------------------------------------------------------------------


class GreedyModel(GPTModel):
    """Asks for more memory than any machine has."""

    def forward(self, *args, **kwargs):
        torch.empty(1 << 60)
        return super().forward(*args, **kwargs)


def test_out_of_memory_names_the_settings_to_lower(tmp_path):
    loop = make_loop(tmp_path)
    loop.model.__class__ = GreedyModel
    advice = "out of memory with micro-batches of 1 and --max_seq_len 16; add --recompute_activations true, or lower"
    with pytest.raises(UserError, match=advice):
        loop.train()


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path):
    """A mistake in the program keeps its traceback."""

    class Wrong(TrainingLoop):
        def train_step(self):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        make_loop(tmp_path, Wrong).train()


@contextmanager
def files_of_at_most(n_bytes):
    """Every write beyond this size fails, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_keeps_the_old_checkpoints(tmp_path):
    """Writes fail in the middle of a checkpoint: one sentence, nothing half-written, and the old files load."""
    make_loop(tmp_path, max_steps=2).train()
    before = checkpoints(tmp_path)
    with files_of_at_most(20_000), pytest.raises(UserError, match=r"cannot save .*pth.*older checkpoints are kept"):
        make_loop(tmp_path, max_steps=4, resume="auto").train()
    assert checkpoints(tmp_path) == before
    assert not [path for path in tmp_path.rglob(".*")]
    loop = make_loop(tmp_path, max_steps=4, resume="auto")
    loop.train()
    assert loop.step == 4


def test_metrics_that_cannot_be_written_end_the_run_with_a_sentence(tmp_path, capsys):
    """A disk that is so full that not even a line fits."""
    make_loop(tmp_path, max_steps=2).train()
    before = story(tmp_path)
    with files_of_at_most(200), pytest.raises(UserError, match=f"cannot write to {tmp_path}"):
        make_loop(tmp_path, max_steps=4, resume="auto").train()
    assert story(tmp_path) == before


def test_an_output_folder_that_cannot_be_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file/run.*choose another --output_dir"):
        make_loop(tmp_path / "file" / "run")


# -- the right numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulated_micro_batches_give_the_losses_of_one_batch(tmp_path, optimizer):
    """8 × 1 = 4 × 2 = 1 × 8, although the samples differ in the number of their supervised tokens."""
    tokenizer = ByteLevelBPETokenizer(260)
    talks = [
        [{"role": "user", "content": line}, {"role": "assistant", "content": "一二三四五"[:n] * 3}]
        for line, n in zip(("a", "bcd", "e", "fg", "h", "ijk", "l", "m") * 2, range(16), strict=True)
        if n % 6
    ]
    losses = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        config = TrainingConfig(
            str(tmp_path), batch_size=batch_size, grad_accum_steps=accumulation, max_steps=5, lr=1e-3, warmup_steps=0,
            optimizer=optimizer, device="cpu", precision="fp32", num_threads=1, max_seq_len=64,
        )  # fmt: skip
        device = prepare_machine(config)
        gpt_config = GPTConfig.for_architecture(
            "modern", vocab_size=260, d_model=16, n_layers=2, n_heads=2, max_seq_len=64
        )
        data = GPTSFTDataset(talks, tokenizer, 64)
        assert len({data.count(data.collate([data[index]])) for index in range(len(data))}) > 2
        model = GPTModel.from_config(gpt_config)
        loop = TrainingLoop(config, model, gpt_config, tokenizer, "sft", data, None, device)
        losses.append([loop.train_step()["loss"] for _ in range(5)])
    assert losses[0][-1] < losses[0][0] - 1e-3
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-6)


def test_the_validation_loss_is_the_mean_over_every_token_once(tmp_path):
    """Also where windows do not fill the last batch and the last window reaches back over tokens counted already."""
    loop = make_loop(tmp_path, batch_size=4)
    ids = torch.from_numpy(loop.val_data.shards.arrays[0].astype(np.int64))
    assert len(loop.val_data) % 4 and (len(ids) - 1) % 15
    model, nats = loop.model.eval(), []
    for position in range(1, len(ids)):  # token by token, each in the window that begins at a multiple of 15
        start = min((position - 1) // 15 * 15, len(ids) - 16)
        with torch.no_grad():
            logits = model(ids[None, start:position])["logits"][0, -1]
        nats.append(-logits.log_softmax(-1)[ids[position]].item())
    assert loop.evaluate()["val_loss"] == pytest.approx(sum(nats) / len(nats), abs=1e-5)


def test_evaluation_leaves_no_trace_in_training(tmp_path):
    """The losses do not depend on how often the run is evaluated and saved."""
    make_loop(tmp_path / "a", eval_interval=100).train()
    make_loop(tmp_path / "b", eval_interval=1).train()
    losses = [[r["loss"] for r in story(tmp_path / name) if "loss" in r] for name in "ab"]
    assert losses[0] == losses[1]


def test_early_stopping_has_patience_and_the_best_model_is_kept(tmp_path, capsys):
    """Trained on lines that say nothing about the validation text, it gets worse there: the best one is published."""
    loop = make_loop(
        tmp_path, train_lines=["aaaaaaaaaaaaaaaaaaaaaaaa"] * 5, val_lines=["zyxwvutsrqponm"] * 3, max_steps=200,
        eval_interval=2, patience=3, lr=3e-2, warmup_steps=0,
    )  # fmt: skip
    best = loop.train()
    losses = {record["step"]: record["val_loss"] for record in story(tmp_path) if "val_loss" in record}
    assert loop.step < 200
    assert loop.step == best["step"] + 2 * 3
    assert f"no improvement in 3 evaluations, stopped at step {loop.step}" in capsys.readouterr().out
    assert best["val_loss"] == min(losses.values()) == losses[best["step"]]

    model, tokenizer, content = load_model(tmp_path / "pretrain_best.pth")
    assert (content["step"], content["stage"], len(tokenizer)) == (best["step"], "pretrain", 260)
    assert content["metrics"] == best
    loop.model.load_state_dict(model.state_dict())
    assert loop.evaluate()["val_loss"] == pytest.approx(best["val_loss"], abs=1e-6)

    again = make_loop(
        tmp_path, train_lines=["aaaaaaaaaaaaaaaaaaaaaaaa"] * 5, val_lines=["zyxwvutsrqponm"] * 3, max_steps=200,
        eval_interval=2, patience=3, resume="auto",
    )  # fmt: skip
    assert again.train() == best
    assert again.step == loop.step, "a run that patience ended is finished"


def test_a_tiny_model_overfits_20_lines(tmp_path):
    """Learning, not only running: it knows the lines by heart and continues them."""
    loop = make_loop(
        tmp_path, d_model=64, batch_size=16, grad_accum_steps=1, max_steps=120, eval_interval=60, save_interval=120,
        optimizer="muon", val_lines=LINES, log_interval=50,
    )  # fmt: skip
    for module in loop.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    first = loop.evaluate()["val_loss"]
    best = loop.train()
    assert first == pytest.approx(math.log(260), abs=0.2)
    assert best["val_loss"] < 0.35


def test_recomputing_activations_changes_no_loss(tmp_path):
    """Activation checkpointing repeats the forward pass with the same dropout."""
    plain, recomputed = make_loop(tmp_path), make_loop(tmp_path, recompute_activations=True)
    losses = []
    for loop in (plain, recomputed):
        torch.manual_seed(7)
        losses.append([loop.train_step()["loss"] for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_where_no_compiler_works_training_goes_on_with_one_warning(tmp_path, capsys, monkeypatch):
    """torch.compile really fails here: its C++ compiler does not exist."""
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("/nowhere/g++",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    torch._dynamo.reset()
    make_loop(tmp_path, max_steps=2, compile="true").train()
    assert capsys.readouterr().out.count("warning: torch.compile does not work here") == 1
    assert len(story(tmp_path)) == 3


def test_an_epoch_ends_with_a_line(tmp_path, capsys):
    """Its mean training loss, the validation loss, and minutes; the same figures are in the metrics."""
    loop = make_loop(tmp_path, max_steps=1, log_interval=3)
    per_epoch = loop.order.steps_per_epoch
    assert per_epoch > 4
    settings = dict(eval_interval=per_epoch - 1, log_interval=1, save_interval=1000)
    whole = make_loop(tmp_path, max_steps=2 * per_epoch, **settings)
    whole.train()
    records = story(tmp_path)
    losses = [record["loss"] for record in records if "loss" in record]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    validated = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
    for number, line in enumerate(said, start=1):
        mean = sum(losses[(number - 1) * per_epoch : number * per_epoch]) / per_epoch
        (record,) = (record for record in records if record.get("epoch") == number)
        assert (record["step"], record["epoch_loss"]) == (number * per_epoch, pytest.approx(mean))
        step = max(step for step in validated if step <= number * per_epoch)
        when = "" if step == number * per_epoch else f" (at step {step})"
        words = f"training loss {mean:.4f}, validation loss {validated[step]:.4f}{when}"
        assert re.fullmatch(re.escape(f"epoch {number} of 2: {words}, ") + r"\d+\.\d minutes", line)
    assert len(said) == 2


def test_short_epochs_share_a_line(tmp_path, capsys):
    """A step an epoch, and a record only every fourth step: so is the line, whose mean is over all of them."""
    make_loop(tmp_path, max_steps=8, batch_size=64, log_interval=4, eval_interval=8).train()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.partition(":")[0] for line in said] == ["epoch 4 of 8", "epoch 8 of 8"]


def test_evaluation_gives_perplexity_and_token_accuracy(tmp_path):
    """Counted token by token, over batches of different sizes."""
    loop = make_loop(tmp_path, batch_size=4)
    model, data = loop.model.eval(), loop.val_data
    right = total = 0
    for index in range(len(data)):
        sample = data[index]
        with torch.no_grad():
            likeliest = model(sample["input_ids"][None])["logits"][0].argmax(-1)
        for place in range(1, 16):
            if sample["labels"][place] >= 0:
                total += 1
                right += int(likeliest[place - 1] == sample["labels"][place])
    metrics = loop.evaluate()
    assert list(metrics) == ["val_loss", "val_perplexity", "val_token_accuracy"]
    assert metrics["val_token_accuracy"] == pytest.approx(right / total)
    assert metrics["val_perplexity"] == pytest.approx(math.exp(metrics["val_loss"]))


def test_a_first_validation_loss_that_is_not_a_number_can_be_beaten(tmp_path):
    loop = make_loop(tmp_path)
    assert loop.is_better({"val_loss": 2.0}, {"val_loss": math.nan})
    assert not loop.is_better({"val_loss": math.nan}, {"val_loss": 2.0})
