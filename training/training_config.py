"""The settings that all trainers share, and what they mean for the machine."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import ClassVar

import torch

from checkpoint import require_writable_folder
from command_line import option
from machine import PRECISIONS, resolve_device
from training import ranks
from training.optimization import OPTIMIZERS, SCHEDULES
from training.parallel_model import check_parallel_option
from training.run_log import TRACKERS


@dataclass
class TrainingConfig:
    """Settings that all trainers share."""

    given: ClassVar[frozenset[str]] = frozenset()  # names of the options that the user gave, see `parse_config`

    output_dir: str = option("models/run", "folder for checkpoints, metrics and curves")
    epochs: float = option(1.0, "passes over the training data, if --max_steps is 0")
    max_steps: int = option(0, "optimiser steps; 0 means as many as --epochs needs")
    batch_size: int = option(16, "samples of one forward pass on one rank")
    grad_accum_steps: int = option(1, "forward passes for one optimiser step")
    max_seq_len: int = option(256, "longest sequence, in tokens")
    lr: float = option(1e-3, "peak learning rate")
    min_lr_ratio: float = option(0.1, "final learning rate as a share of the peak")
    optimizer: str = option("adamw", "adamw, or muon for hidden matrices beside adamw", choices=OPTIMIZERS)
    schedule: str = option("cosine", "course of the learning rate", choices=SCHEDULES)
    warmup_steps: int = option(-1, "steps of linear warm-up; -1 means 2 %% of all steps, at least 10")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices")
    max_grad_norm: float = option(1.0, "gradients are clipped to this global norm; 0 turns it off")
    max_skipped_steps: int = option(10, "stop after so many non-finite steps in a row")
    precision: str = option("auto", "auto takes what the hardware is fast in", choices=PRECISIONS)
    seed: int = option(0, "of initialisation, data order and dropout")
    device: str = option("auto", "cpu, cuda, cuda:1, mps or auto")
    num_threads: int = option(0, "CPU threads; 0 means one for each core")
    compile: str = option("auto", "torch.compile; auto: on a GPU", choices=("auto", "true", "false"))
    recompute_activations: bool = option(False, "activation checkpointing: less memory, about a third more time")
    parallel: str = option("ddp", "how torchrun's ranks share the work: ddp, fsdp, tp, pp, or such as fsdp:2+tp:2")
    eval_interval: int = option(0, "steps between evaluations; 0 means ten in a run")
    patience: int = option(0, "stop after so many evaluations without improvement; 0 never")
    save_interval: int = option(0, "steps between checkpoints; 0 means at every evaluation")
    keep_checkpoints: int = option(2, "how many of the last checkpoints to keep")
    log_interval: int = option(10, "steps between records of the metrics")
    resume: str = option("", "auto, or the path of a checkpoint to continue from")
    tensorboard: bool = option(False, "write TensorBoard events (pip install tensorboard)")
    tracker: str = option("none", "send metrics to a service", choices=TRACKERS)

    def validate(self) -> list[str]:
        """What is wrong with the settings, a sentence each."""
        complaints = [
            f"--{name} must be at least {least}, not {getattr(self, name)}"
            for name, least in (
                *((name, 1) for name in ("batch_size", "grad_accum_steps", "keep_checkpoints", "log_interval")),
                ("max_skipped_steps", 1),
                *((name, 0) for name in ("max_steps", "eval_interval", "save_interval", "patience", "num_threads")),
                *((name, 0) for name in ("max_seq_len", "weight_decay", "max_grad_norm")),
                ("warmup_steps", -1),
            )
            if not getattr(self, name) >= least  # and not `<`, which is false for nan
        ]
        if not 0 < self.epochs < math.inf and not self.max_steps:
            complaints.append(f"--epochs must be positive, not {self.epochs}")
        if not 0 <= self.seed < 1 << 31:
            complaints.append(f"--seed must be between 0 and 2^31 - 1, not {self.seed}")
        if not 0 < self.lr < 10:
            complaints.append(f"--lr must be between 0 and 10, not {self.lr}")
        if not 0 <= self.min_lr_ratio <= 1:
            complaints.append(f"--min_lr_ratio must be between 0 and 1, not {self.min_lr_ratio}")
        return complaints + check_parallel_option(self.parallel)


def prepare_machine(config: TrainingConfig) -> torch.device:
    """Join the other ranks, set threads, matrix precision and the seed; returns the device of this process.

    Raises:
        UserError: the device is not there, or `--output_dir` cannot be written to.
    """
    require_writable_folder(config.output_dir)
    device = ranks.start(resolve_device(config.device))
    cores = os.cpu_count() or 1
    torch.set_num_threads(config.num_threads or max(1, cores // ranks.processes_on_this_machine()))
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    return device
