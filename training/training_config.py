"""The settings that all trainers share, and what they mean for the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from command_line import option, require_writable_folder
from machine import PRECISIONS, resolve_device, usable_cores
from training import ranks
from training.optimization import OPTIMIZERS, SCHEDULES
from training.parallel_model import check_parallel_option
from training.run_log import TRACKERS


@dataclass
class TrainingConfig:
    """Settings that all trainers share."""

    given: ClassVar[frozenset[str]] = frozenset()  # names of the options that the user gave, see `parse_config`
    # What training holds of a model's size: how many learn, and how many are asked beside them
    models_in_memory: ClassVar[tuple[int, int]] = (1, 0)
    rows_of_sample: ClassVar[int] = 1

    output_dir: str = option("models/run", "folder for checkpoints, metrics and curves")
    epochs: float = option(1.0, "passes over the training data, if --max_steps is 0", above=0)
    max_steps: int = option(0, "optimiser steps; 0 means as many as --epochs needs", at_least=0)
    batch_size: int = option(16, "samples of one forward pass on one rank", at_least=1)
    grad_accum_steps: int = option(1, "forward passes for one optimiser step", at_least=1)
    micro_batch_size: int = option(
        0,
        "samples that are computed at once, of the --batch_size times --grad_accum_steps of a step; 0: on a GPU the "
        "most that fit, elsewhere --batch_size",
        at_least=0,
    )
    max_seq_len: int = option(256, "longest sequence, in tokens", at_least=0)
    lr: float = option(1e-3, "peak learning rate", above=0, below=10)
    min_lr_ratio: float = option(0.1, "final learning rate as a share of the peak", at_least=0, at_most=1)
    optimizer: str = option("adamw", "adamw, or muon for hidden matrices beside adamw", choices=OPTIMIZERS)
    schedule: str = option("cosine", "course of the learning rate", choices=SCHEDULES)
    n_cycles: int = option(3, "cycles of cosine_restarts, which fill the run exactly if --T_0 is 0", at_least=1)
    T_0: int = option(0, "steps of the first cycle of cosine_restarts; 0: see --n_cycles", at_least=0)
    T_mult: float = option(1.0, "how much longer each cycle of cosine_restarts is than the one before it", at_least=1)
    warmup_steps: int = option(-1, "steps of linear warm-up; -1: 2 %% of all steps, but 10 or more", at_least=-1)
    weight_decay: float = option(0.1, "decoupled weight decay of matrices", at_least=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this global norm; 0 turns it off", at_least=0)
    max_skipped_steps: int = option(10, "stop after so many non-finite steps in a row", at_least=1)
    precision: str = option("auto", "auto takes what the hardware is fast in", choices=PRECISIONS)
    seed: int = option(0, "of initialisation, data order and dropout", at_least=0, below=1 << 31)
    device: str = option("auto", "cpu, cuda, cuda:1, mps or auto")
    num_threads: int = option(0, "CPU threads; 0 means one for each core", at_least=0)
    compile: str = option(
        "auto", "torch.compile; auto: on a GPU, if the run takes minutes", choices=("auto", "true", "false")
    )
    recompute_activations: bool = option(False, "activation checkpointing: less memory, about a third more time")
    parallel: str = option("ddp", "how torchrun's ranks share the work: ddp, fsdp, tp, pp, or such as fsdp:2+tp:2")
    eval_interval: int = option(0, "steps between evaluations; 0 means ten in a run", at_least=0)
    patience: int = option(0, "stop after so many evaluations without improvement; 0 never", at_least=0)
    save_interval: int = option(0, "steps between checkpoints; 0 means at every evaluation", at_least=0)
    keep_checkpoints: int = option(2, "how many of the last checkpoints to keep", at_least=1)
    log_interval: int = option(10, "steps between records of the metrics", at_least=1)
    resume: str = option("", "auto, or the path of a checkpoint to continue from")
    tensorboard: bool = option(False, "write TensorBoard events (pip install tensorboard)")
    tracker: str = option("none", "send metrics to a service", choices=TRACKERS)

    def validate(self) -> list[str]:
        """What does not fit together, a sentence each."""
        complaints, of_step = check_parallel_option(self.parallel), self.batch_size * self.grad_accum_steps
        if self.micro_batch_size and of_step % self.micro_batch_size:
            complaints.append(
                f"--micro_batch_size {self.micro_batch_size} must divide the {of_step} samples of --batch_size times "
                "--grad_accum_steps"
            )
        return complaints


def prepare_machine(config: TrainingConfig) -> torch.device:
    """Join the other ranks, set threads, matrix precision and the seed; returns the device of this process.

    Raises:
        UserError: the device is not there, or `--output_dir` cannot be written to.
    """
    require_writable_folder(config.output_dir)
    device = resolve_device(config.device)
    ranks.start(device)
    torch.set_num_threads(config.num_threads or max(1, usable_cores() // ranks.processes_on_this_machine()))
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    return device
