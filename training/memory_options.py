"""Options that save memory, chosen where a model would not fit on a GPU and the user left them open."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from gpt_model import GPTConfig
from machine.what_fits import AS_IT_IS, first_that_fits, in_words, size_of, state_bytes, training_bytes
from training import ranks
from training.micro_batches import GIB, RESERVE, GpuMemory
from training.parallel_model import Layout, parse_layout
from training.training_config import TrainingConfig


def fit_options(config: TrainingConfig, model: GPTConfig, device: torch.device, limit: float | None = None) -> str:
    """Set what `machine.what_fits` takes for training with one sample at once to fit: LoRA, INT8 for what it freezes,
    activation checkpointing. What the user gave, or set, stays.

    Models that fsdp, tp or pp cut up, and those with experts, are left alone.

    Args:
        limit: bytes that there are; None: those of the device, and nothing is done where that is no GPU.

    Returns:
        a sentence that says what was set, and why; empty if nothing was.
    """
    if limit is None:
        if device.type != "cuda":
            return ""
        limit = GpuMemory(device).limit()
    size, layout = size_of(model), parse_layout(config.parallel, ranks.world_size())
    if size is None or layout != Layout(ddp=layout.ddp):
        return ""
    room = (1 - RESERVE) * min(ranks.gather_objects(limit))
    asked = {name: getattr(config, name, usual) for name, usual in AS_IT_IS.items()}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    is_open = {
        name for name, value in asked.items() if value == defaults.get(name, ...) and name not in config.given
    }
    n_trained, n_beside = config.models_in_memory

    def needed(options: dict[str, Any]) -> int:
        rank, frozen = options["lora_rank"], options["frozen_weights"] if options["lora_rank"] else ""
        kind, recompute = (frozen, rank, config.optimizer), options["recompute_activations"]
        in_step = training_bytes(size, config.rows_of_sample, config.max_seq_len, recompute, *kind)
        beside = 0 if frozen else 6 * size.parameters  # with LoRA it is the model without its adapters
        return in_step + (n_trained - 1) * state_bytes(size, *kind) + n_beside * beside

    way = first_that_fits(room, asked, is_open, needed)
    if way == {}:
        return ""
    need = f"training needs {needed(asked) / GIB:.1f} GiB and {room / GIB:.1f} are free to use"
    if way is None:
        return f"{need}, by arithmetic: it may run out of memory; lower --max_seq_len, or take a smaller model"
    for name, value in way.items():
        setattr(config, name, value)
    return f"{need}, by arithmetic: taking {in_words(way)}, for {needed(asked | way) / GIB:.1f} GiB"
