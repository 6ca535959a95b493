"""The record of a run: valid JSON lines that tell one story, curves that show it, and optional trackers."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import UserError
from machine import PEAK_TFLOPS, card_name, peak_flops, peak_memory_bytes
from training.run_log import RunLog, plot_metrics, read_metrics, training_flops_per_token


def strict_records(path):
    """The records by a parser that accepts no NaN or Infinity, as other languages' parsers do not."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def record_run(folder, steps, start_step=0, figure="samples_seen"):
    """A run that logs one figure a step; for the default there is no curve, which saves the drawing."""
    log = RunLog(folder, "test", 10, start_step)
    for step in steps:
        log.log(step, {figure: 1.0 / step})
    log.close()
    return log.path


# -------------------------------------------------------------------------------------------------------------- records


def test_every_line_is_valid_json_whatever_the_numbers(tmp_path):
    """NaN and infinities become null; they are no JSON."""
    log = RunLog(tmp_path / "new" / "run", "test", 3)
    log.log(1, {"loss": math.nan, "grad_norm": math.inf, "mfu": 0.25, "skipped_steps": 4})
    log.log(2, {"loss": -math.inf, "note": "läuft 好"})
    assert strict_records(log.path) == [  # on the disk at once, not only at the end
        {"step": 1, "loss": None, "grad_norm": None, "mfu": 0.25, "skipped_steps": 4},
        {"step": 2, "loss": None, "note": "läuft 好"},
    ]
    log.close()


def test_a_resumed_run_cuts_what_lies_beyond_its_step(tmp_path):
    """So the file tells one story; what was recorded up to that step, several lines a step, stays."""
    path = record_run(tmp_path, [1, 2, 2, 3, 4, 5])
    record_run(tmp_path, [3, 4], start_step=2)
    assert [record["step"] for record in strict_records(path)] == [1, 2, 2, 3, 4]


def test_a_new_run_starts_a_new_file(tmp_path):
    record_run(tmp_path, [1, 2, 3])
    path = record_run(tmp_path, [1])
    assert [record["step"] for record in strict_records(path)] == [1]


@pytest.mark.parametrize("cut", range(1, 26, 3))
def test_a_last_line_that_a_kill_cut_short_is_left_out(cut, tmp_path):
    """Wherever it was cut; a resumed run then goes on with whole lines."""
    path = record_run(tmp_path, [1, 2, 3])
    content = path.read_bytes()
    assert len(content.splitlines(keepends=True)[-1]) > 25
    path.write_bytes(content[:-cut])
    kept = 3 if cut == 1 else 2  # without its line end alone, the line is still whole
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3][:kept]
    record_run(tmp_path, [4], start_step=3)
    assert [record["step"] for record in strict_records(path)] == [*[1, 2, 3][:kept], 4]


def test_a_missing_file_has_no_records(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = RunLog(tmp_path / "run", "test", 3, enabled=False)
    log.log(1, {"loss": 1.0})
    log.say("hello")
    log.advance(loss=1.0)
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file.*; free some space or choose another --output_dir"):
        RunLog(tmp_path / "file", "test", 3)


# --------------------------------------------------------------------------------------------------------------- curves


def pixels(path):
    image = pytest.importorskip("matplotlib.image")
    return (image.imread(path)[..., :3] * 255).astype(int)


def coloured(image):
    """How many pixels are neither grey, black nor white: the lines of the curves."""
    return int((image.max(axis=-1) - image.min(axis=-1) > 40).sum())


def test_curves_are_drawn(tmp_path):
    """An image of a sensible size, with coloured lines in it, one panel for each kind of figure."""
    log = RunLog(tmp_path, "a run", 20)
    for step in range(1, 21):
        log.log(step, {"loss": 5.0 / step, "lr": 1e-3 * step, "grad_norm": math.nan if step == 7 else 1.0})
        if step % 5 == 0:
            log.log(step, {"val_loss": 5.5 / step})
    log.close()
    three_panels = pixels(tmp_path / "curves.png")
    assert three_panels.shape[0] > 200
    assert three_panels.shape[1] > 1000
    assert coloured(three_panels) > 1000
    assert coloured(three_panels[:, : three_panels.shape[1] // 3]) > 300
    assert coloured(three_panels[:, -three_panels.shape[1] // 3 :]) > 300


def test_a_curve_shows_its_values(tmp_path):
    """A falling loss is high on the left of its panel and low on the right."""
    path = record_run(tmp_path, range(1, 60), figure="loss")
    assert plot_metrics(path, tmp_path / "again.png", "title") == tmp_path / "again.png"
    image = pixels(tmp_path / "again.png")
    line = np.argwhere(image.max(axis=-1) - image.min(axis=-1) > 40)  # (pixels, (row, column)), row 0 on top
    height = {}
    for row, column in line:
        height.setdefault(column, []).append(row)
    columns = sorted(height)
    first, last = np.mean(height[columns[2]]), np.mean(height[columns[-3]])
    assert first < last - 100


def test_without_figures_there_is_no_picture(tmp_path):
    """Nothing logged, nothing finite logged, or nothing that has a panel."""
    assert plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "none.png") is None
    log = RunLog(tmp_path, "test", 3)
    log.log(1, {"loss": math.nan, "samples": 3})
    log.close()
    assert not list(tmp_path.glob("*.png"))


def test_drawing_needs_no_display_and_keeps_no_figure_alive(tmp_path, monkeypatch):
    """Pyplot would open a window, and hold every figure until the end of a long run."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MPLBACKEND", "tkagg")
    record_run(tmp_path, [1, 2, 3], figure="loss")
    assert (tmp_path / "curves.png").is_file()
    assert pyplot.get_fignums() == []


# ------------------------------------------------------------------------------------------------------------- trackers


def test_tensorboard_gets_the_same_numbers(tmp_path):
    """NaN is left out; a resumed run purges what lies beyond its step."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, "test", 5, tensorboard=True)
    for step, loss in ((1, 2.5), (2, math.nan), (3, 1.5)):
        log.log(step, {"loss": loss})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (3, 1.5)]


@pytest.mark.parametrize(
    ("settings", "package"),
    [({"tensorboard": True}, "tensorboard"), ({"tracker": "wandb"}, "wandb"), ({"tracker": "swanlab"}, "swanlab")],
)
def test_a_tracker_that_is_not_installed_is_one_sentence(settings, package, tmp_path, monkeypatch):
    """And it costs nothing of an earlier run's record."""
    path = record_run(tmp_path, [1, 2, 3])
    for name in [*sys.modules]:
        if name.split(".")[0] == package or name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # an import of it now fails, as where it is not installed
    with pytest.raises(UserError, match=f"needs the package {package}; `pip install {package}`"):
        RunLog(tmp_path, "test", 5, **settings)
    assert len(read_metrics(path)) == 3


# -------------------------------------------------------------------------------------------------------------- figures


def test_flops_of_a_token_by_hand():
    """6 for each weight (2 forward, 4 backward), and for attention 12 · layers · width · length."""
    assert training_flops_per_token(124_000_000, 12, 768, 1024) == 6 * 124_000_000 + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("device_name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A40", 150), ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70), ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA L4", 121), ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-32GB", 112), ("NVIDIA RTX A6000", 155),
        ("NVIDIA RTX 6000 Ada Generation", 364), ("NVIDIA GeForce RTX 5090", 210), ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4080 SUPER", 104), ("NVIDIA GeForce RTX 4070 Ti", 80), ("NVIDIA GeForce RTX 4070", 58),
        ("NVIDIA GeForce RTX 3060", 25), ("NVIDIA GeForce RTX 3060 Ti", 32), ("NVIDIA B200", 2250),
    ],
)  # fmt: skip
def test_a_gpus_peak_is_that_of_its_exact_model(device_name, tflops):
    assert PEAK_TFLOPS[card_name(device_name)] == tflops


@pytest.mark.parametrize(
    "device_name",
    [
        "NVIDIA RTX A1000", "NVIDIA RTX A2000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA T400 4GB", "NVIDIA T1000",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA L40G", "NVIDIA A16", "NVIDIA A2",
        "NVIDIA GeForce GTX 1080", "NVIDIA RTX 4000 Ada Generation", "Quadro RTX 4000", "NVIDIA PG506-232",
    ],
)  # fmt: skip
def test_a_gpu_that_is_not_in_the_table_is_no_other_one(device_name):
    """It is measured instead."""
    assert card_name(device_name) not in PEAK_TFLOPS


def test_the_machine_is_measured():
    cpu = torch.device("cpu")
    assert 1e8 < peak_flops(cpu, torch.float32) < 1e15
    before = peak_memory_bytes(cpu)
    block = torch.ones(40 << 20)  # 160 MiB
    assert peak_memory_bytes(cpu) >= max(before, block.numel() * 4)
    assert peak_memory_bytes(cpu) < 1 << 40
