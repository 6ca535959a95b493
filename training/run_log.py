"""What people see of a run: its progress, `metrics.jsonl`, TensorBoard, optional trackers, and curves as PNG."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from command_line import UserError, replacing
from progress import Progress, Transcript

TRACKERS = ("none", "swanlab", "wandb")


class RunLog:
    """The record of one training run.

    Every call of `log` appends one JSON object to `<output_dir>/metrics.jsonl` and sends the same numbers to the
    trackers. A resumed run cuts the records beyond the step it continues from, so the file tells one story. A file
    that cannot be written is a `UserError`.

    Args:
        output_dir: folder of the run.
        name: of the run, in plots and trackers.
        max_steps: optimiser steps of the whole run.
        start_step: steps already done.
        tensorboard: whether to write event files (needs the package `tensorboard`).
        tracker: "none", "swanlab" or "wandb".
        settings: recorded by the trackers.
        transcript: of what the program says, which goes to `<output_dir>/run.log` from here on.
    """

    def __init__(
        self,
        output_dir: str | Path,
        name: str,
        max_steps: int,
        start_step: int = 0,
        tensorboard: bool = False,
        tracker: str = "none",
        settings: dict[str, Any] | None = None,
        enabled: bool = True,
        transcript: Transcript | None = None,
    ) -> None:
        self.folder, self.name, self.enabled = Path(output_dir), name, enabled
        self.path = self.folder / "metrics.jsonl"
        self._sinks = []
        if not enabled:
            self.progress = Progress(name, shown=False)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        if tensorboard:
            self._sinks.append(_tensorboard(self.folder / "tensorboard", start_step))
        if tracker != "none":
            self._sinks.append(_tracker(tracker, name, settings or {}))
        if transcript is not None:
            try:
                transcript.move_to(self.folder / "run.log")
            except OSError as error:
                raise self._unwritable(error) from error
        # Steps that a killed run made after its last checkpoint are made, and recorded, again
        kept = [record for record in read_metrics(self.path) if record["step"] <= start_step] if start_step else []
        self._restart_file(kept)
        self.progress = Progress(name, max_steps, "step", start_step, leave=True)

    def advance(self, **shown: float) -> None:
        """One step is done; `shown` stands beside the count."""
        self.progress.update(**shown)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the values of one step. Non-finite numbers become null, so that every line is valid JSON."""
        if not self.enabled:
            return
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        except OSError as error:
            raise self._unwritable(error) from error
        for send in self._sinks:
            send(step, finite)

    def say(self, sentence: str) -> None:
        """Print a line without disturbing the progress bar."""
        if self.enabled:
            self.progress.say(sentence)

    def close(self) -> None:
        """End the progress and draw the curves."""
        self.progress.close()
        if self.enabled:
            image_path = self.folder / "curves.png"
            try:
                plot_metrics(self.path, image_path, self.name)
            except OSError as error:  # a full disk; whatever ended the run matters more
                print(f"warning: the curves are not drawn ({error}); they can be, from {self.path}", flush=True)

    def _restart_file(self, records: list[dict[str, Any]]) -> None:
        """Make `metrics.jsonl` consist of `records`, in one move: a kill never costs the history."""
        try:
            with replacing(self.path) as file:
                file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write to {self.folder} ({error.strerror}); free some space or choose another --output_dir"
        )


def _tensorboard(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard; `pip install tensorboard`") from None
    writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def send(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            if value is not None:
                writer.add_scalar(key, value, step)
        writer.flush()

    return send


def _tracker(kind: str, name: str, settings: dict[str, Any]) -> Any:
    try:
        tracker = __import__(kind)
    except ImportError:
        raise UserError(
            f"--tracker {kind} needs the package {kind}; `pip install {kind}`, or use --tracker none"
        ) from None
    run = tracker.init(project="gpt", config=settings, **{"experiment_name" if kind == "swanlab" else "name": name})
    return lambda step, values: run.log({k: v for k, v in values.items() if v is not None}, step=step)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    records = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def plot_metrics(metrics_path: str | Path, image_path: str | Path, title: str = "") -> Path | None:
    """Draw the curves of a run: one panel each for losses, learning rate, gradient norm and whatever else there is."""
    records = read_metrics(metrics_path)
    panels = [
        ("loss", ["loss", "val_loss", "loss/value_avg"]),
        ("accuracy", ["accuracy", "val_accuracy", "rewards/accuracies", "val_rewards/accuracies"]),
        ("share of tokens foreseen", ["token_accuracy", "val_token_accuracy"]),
        ("reward", ["objective/scores", "objective/rlhf_reward", "val_reward"]),
        ("KL to the reference, nats an answer", ["objective/kl", "val_kl"]),
        ("share of answers that ended", ["objective/ended", "val_ended"]),
        ("rewards of pairs", ["rewards/chosen", "rewards/rejected", "rewards/margins"]),
        ("log-probability of answers, nats", ["logps/chosen", "logps/rejected"]),
        ("KL to the teacher, nats a token", ["teacher_kl", "val_teacher_kl"]),
        ("policy loss", ["loss/policy_avg"]),
        ("entropy, nats a token", ["policy/entropy_avg"]),
        ("KL of a step's updates, nats a token", ["policy/approxkl_avg"]),
        ("share of ratios clipped", ["policy/clipfrac_avg", "val/clipfrac_avg"]),
        ("explained variance of returns", ["val/explained_variance"]),
        ("learning rate", ["lr"]),
        ("gradient norm", ["grad_norm"]),
        ("tokens a second", ["tokens_per_second"]),
    ]
    panels = [(label, keys) for label, keys in panels if any(r.get(key) is not None for r in records for key in keys)]
    if not panels:
        return None
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width, height = 4.6 * columns, 3.1 * rows
    figure = Figure(figsize=(width, height))
    # Margins in inches: a layout that measures every label takes as long as the drawing itself
    figure.subplots_adjust(
        left=0.65 / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - 0.7 / height, wspace=0.24, hspace=0.36
    )
    for number, (label, keys) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        for key in keys:
            points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(
                    steps, values, label=key, linewidth=1.2, marker="o" if len(points) < 30 else None, markersize=3
                )
        axes.set_title(label, fontsize=10, y=1)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        axes.yaxis.get_offset_text().set_fontsize(8)
        axes.grid(alpha=0.25)
        if len(axes.lines) > 1:
            axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    with replacing(image_path) as file:
        figure.savefig(file, dpi=110, format="png")
    return Path(image_path)


def training_flops_per_token(n_parameters: int, n_layers: int, d_attention: int, seq_len: int) -> float:
    """FLOP of training on one token: 6 a parameter and 12 · layers · width · length for attention.

    After PaLM's appendix B (arXiv:2204.02311).

    Args:
        n_parameters: weights that are multiplied with, tied ones once, without position embeddings.
        d_attention: n_heads · head_dim.
        seq_len: tokens of a window.
    """
    return 6 * n_parameters + 12 * n_layers * d_attention * seq_len
