"""What can end a run before its time, and how it ends well: signals, and memory that runs out."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import torch

from command_line import UserError

# What asks a run to stop: Ctrl-C, `kill` and, on Windows alone, Ctrl-Break
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]


class StopSignal:
    """Notes Ctrl-C and its like, so that the loop can finish its step, save and leave. A second one leaves at once."""

    def __enter__(self) -> StopSignal:
        self.received: str | None = None
        self._previous = {}
        for number in STOP_SIGNALS:
            with contextlib.suppress(ValueError):  # only the main thread can set handlers
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def advice_if_out_of_memory(advice: str | Callable[[], str]) -> Iterator[None]:
    """Turn a lack of memory into one sentence: "out of memory" and what to do, which may be made when it is needed."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory {advice if isinstance(advice, str) else advice()}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch (on any device) or Python ran out of memory."""
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        phrase in words for phrase in ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # CPU, MPS, cuBLAS
    )
