"""What a run keeps on the disk: the best model, and checkpoints from which training goes on exactly where it was."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_checkpoint, require_same_model, save_checkpoint
from command_line import UserError
from data_loader import Batch, BatchOrder
from gpt_model import GPTConfig
from text.account import Account
from training import ranks
from training.optimization import Updater
from training.parallel_model import ParallelModel
from training.run_identity import Inputs, changed_settings, differing_inputs, fingerprints
from training.training_config import TrainingConfig


class TrainingData(Protocol):
    """What the loop needs of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def collate(self, samples: list) -> Batch: ...

    def count(self, batch: Batch) -> int: ...


class SavedRun:
    """The part of `TrainingLoop` that saves and resumes."""

    config: TrainingConfig
    gpt_config: GPTConfig
    tokenizer: ByteLevelBPETokenizer
    stage: str
    train_data: TrainingData
    val_data: TrainingData | None
    device: torch.device
    folder: Path
    best_path: Path
    checkpoint_folder: Path
    accounts: dict[str, Account]
    lora: dict[str, Any] | None
    order: BatchOrder
    parallel_model: ParallelModel
    optimizers: list[torch.optim.Optimizer]
    updater: Updater
    max_steps: int
    extra: dict[str, Any] = {}  # what else every checkpoint says
    published = ""  # the part of the model that the best checkpoint consists of; empty: all of it

    def save_model(self, path: Path) -> None:
        """Write the model alone, in the checkpoint format."""
        state = self.published_state()
        if ranks.is_main():
            self._write(path, state, None)
        ranks.barrier()

    def published_state(self) -> dict[str, torch.Tensor]:
        """The weights that the best checkpoint consists of; those of a part go by their names in the part."""
        prefix, state = self.published and f"{self.published}.", self.parallel_model.model_state()
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def save(self) -> None:
        """Write everything that exact resuming needs and drop the oldest checkpoints."""
        state = self.parallel_model.model_state()
        training_state = {
            "optimizer": self.parallel_model.optimizer_state(self.optimizers),
            "updater": self.updater.state_dict(),
            "random": ranks.gather_objects(random_state(self.device)),
            "best": self.best,
            "evaluations_without_improvement": self.evaluations_without_improvement,
            "seconds": self.seconds,
            "latest": self.latest,
            "epoch": self.epoch,
            "run": self._run_identity(),
            "inputs": self._inputs,
            "settings": self._settings(),
        }
        if ranks.is_main():
            self._write(self.checkpoint_folder / f"step_{self.step:08d}.pth", state, training_state)
            for old in checkpoints_by_age(self.checkpoint_folder)[self.config.keep_checkpoints :]:
                with contextlib.suppress(PermissionError):  # Windows keeps a file that is still mapped; next time
                    old.unlink()
        ranks.barrier()

    def _write(self, path: Path, state: dict, training_state: dict | None) -> None:
        save_checkpoint(
            path,
            model_state=state,
            config=self.gpt_config,
            tokenizer=self.tokenizer,
            stage=self.stage,
            step=self.step,
            metrics=self.best,
            training_state=training_state,
            lora=self.lora,
            **({"data": {name: account.as_dict() for name, account in self.accounts.items()}} if self.accounts else {}),
            **self.extra,
        )

    def inputs(self) -> Inputs:
        """What the result depends on, by the options that name it; see `run_identity`."""
        return fingerprints(self.config)

    @functools.cached_property
    def _inputs(self) -> Inputs:
        return ranks.gather_objects(self.inputs() if ranks.is_main() else None)[0]

    def _settings(self) -> dict[str, Any]:
        """Settings that a resumed run may change, as they came out; a change is said."""
        derived = ("max_steps", "warmup_steps", "eval_interval", "save_interval")
        settled = {name: getattr(self, name) for name in derived}
        settled |= {"device": str(self.device), "precision": str(self.precision).removeprefix("torch.")}
        settings = {**asdict(self.config), **settled}
        return {name: value for name, value in settings.items() if name not in ("resume", "output_dir", *self._inputs)}

    def _run_identity(self) -> dict[str, Any]:
        """Settings that the meaning of a step depends on; a resumed run has to agree in them."""
        config = self.config
        return {
            "samples": len(self.train_data),
            "data": data_fingerprint(self.train_data),
            "validation data": data_fingerprint(self.val_data) if self.val_data else "none",
            "global_batch": self.order.batch_size,
            "max_seq_len": config.max_seq_len,
            "seed": config.seed,
            "optimizer": config.optimizer,
            "lora_rank": 0,
            **{name: value for name, value in (self.lora or {}).items() if name != "base"},
        }

    def _remove_leftovers(self) -> None:
        """Clear away what an earlier run was writing when it was killed."""
        for folder, name in ((self.folder, self.best_path.name), (self.checkpoint_folder, "step_*.pth")):
            for leftover in folder.glob(f".{name}.*.tmp"):
                leftover.unlink(missing_ok=True)

    def resume(self, source: str) -> Path | None:
        """Continue from a checkpoint: a path, or `auto` for the newest sound one in the output folder, if any.

        Returns:
            the checkpoint's path; None if there is none.

        Raises:
            UserError: it is damaged or of another run; the difference is named.
        """
        content, path = (newest_sound(self.checkpoint_folder) if source == "auto" else
                         (load_checkpoint(source), Path(source)))  # fmt: skip
        if content is None:
            if ranks.is_main():
                print(f"no checkpoint in {self.checkpoint_folder}, starting from step 0", flush=True)
            return None
        if content["stage"] != self.stage:
            theirs, ours = content["stage"], self.stage
            raise UserError(f"{path} is a {theirs} checkpoint; give a {ours} one, or leave out --resume")
        require_same_model(content, self.gpt_config, self.tokenizer, path)
        state = content.get("training_state")
        if state is None:
            place = self.checkpoint_folder
            raise UserError(f"{path} holds a model only, no training state; resume from one in {place}")
        differing, theirs = differing_inputs(state.get("inputs", {}), self._inputs), state["run"]
        if theirs.get("lora_rank"):
            theirs = {"frozen_weights": "fp32"} | theirs  # as in runs of before there was a choice
        differing += [
            f"{name} {theirs.get(name)} there, {value} here"
            for name, value in self._run_identity().items()
            if theirs.get(name) != value
        ]
        if differing:
            raise UserError(f"{path} belongs to another run ({'; '.join(differing)}); use the same settings and data")
        if content["step"] > self.max_steps:
            raise UserError(
                f"{path} has made {content['step']} steps and this run is to end after {self.max_steps}; raise "
                "--max_steps or --epochs, or leave out --resume to start anew"
            )
        self.parallel_model.load_model_state(content["model"])
        self.parallel_model.load_optimizer_state(self.optimizers, state["optimizer"])
        self.updater.load_state_dict(state["updater"])
        if len(state["random"]) == ranks.world_size():  # among other ranks, the same numbers would mean nothing
            set_random_state(state["random"][ranks.rank()], self.device)
        self.step, self.best, self.seconds = content["step"], state["best"], state["seconds"]
        self.latest, self.epoch = state["latest"], state["epoch"]
        self.evaluations_without_improvement = state["evaluations_without_improvement"]
        if ranks.is_main():
            print(f"continuing from {path}, step {self.step} of {self.max_steps}", flush=True)
            if changed := changed_settings(state["settings"], self._settings()):
                print(f"with other settings than before: {changed}", flush=True)
        return path


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of PyTorch's random generators."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Take up the states that `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def data_fingerprint(data: TrainingData) -> str:
    """Of up to 64 samples, evenly spread: ids and labels as the model reads them, so that template and tokenizer count,
    too. What is computed from them, in floating point, does not."""
    samples = [data[index] for index in range(0, len(data), -(-len(data) // 64))]
    digest = hashlib.sha256()
    for name, tensor in sorted(data.collate(samples).items()):
        if not tensor.is_floating_point():
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


def checkpoints_by_age(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted(folder.glob("step_*.pth"), key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def newest_sound(folder: Path) -> tuple[dict | None, Path]:
    """The newest checkpoint that can be read; damaged ones are set aside as `*.damaged`, and named."""
    for path in checkpoints_by_age(folder):
        try:
            return load_checkpoint(path), path
        except UserError as error:
            if ranks.is_main():
                aside = path.with_suffix(".damaged")
                path.replace(aside)
                print(f"warning: {error}; set aside as {aside}", flush=True)
    return None, folder
