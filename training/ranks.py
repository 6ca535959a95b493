"""Which process this is, of how many; started without `torchrun`, the only one: every function is the identity."""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist


def start(device: torch.device) -> None:
    """Join the process group if torchrun started this process; `device` is this rank's, see `resolve_device`."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    # fsdp with tp gathers a tensor in two steps, which PyTorch finds worth a warning for each layer
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    # Beside NCCL, gloo carries what lives on the CPU: checkpoints on their way to rank 0, random states, signals
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def processes_on_this_machine() -> int:
    """How many of them share this machine's cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this process is the one that prints and writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(*values: float) -> list[float]:
    """The sums of numbers over all ranks, in double precision; between CPUs, so that no GPU is waited for."""
    if world_size() == 1:
        return list(values)
    return tensor_over_ranks(torch.tensor(values, dtype=torch.float64)).tolist()


def tensor_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, which takes its place where it is."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: object) -> list:
    """The value of every rank, in their order."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
