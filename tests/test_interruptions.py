"""How a run ends before its time."""

import os
import signal

import pytest
import torch

from training.interruptions import StopSignal, is_out_of_memory


def test_a_second_signal_leaves_at_once():
    """Who presses Ctrl-C twice does not want to wait for the step."""
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)


def test_running_out_of_memory_is_recognised_on_every_device():
    """The words of the CPU's allocator, of CUDA and of MPS; and nothing else."""
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    ):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("size mismatch"))
