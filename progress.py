"""What people see while they wait, and what is kept of it.

On a terminal, work that takes long has a bar. Elsewhere (a log file, a container, a cluster's output) it has a line
every half minute, whatever it is doing then:

    with Progress("tokenizing", unit="B") as progress:
        …
        progress.update(n_bytes)

`listening` keeps what a program says, each line with its time, and writes it into a file once there is one.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

LINE_SECONDS = 30.0  # between lines, where there is no terminal


class Progress:
    """How far some work is: a bar on a terminal, elsewhere a line every half minute; both on standard error.

    Args:
        doing: what is being done, in a word or two.
        total: how much there is to do; None if nobody knows.
        unit: what is counted, such as "step"; "B" for bytes; empty if nothing can be counted.
        done: how much was done before.
        leave: whether the finished bar stays on the terminal.
        shown: False shows nothing.
    """

    def __init__(
        self,
        doing: str,
        total: int | None = None,
        unit: str = "step",
        done: int = 0,
        leave: bool = False,
        shown: bool = True,
    ) -> None:
        self.doing, self.total, self.unit = doing, total, unit
        self.done = self._done_before = done
        self.beside = ""  # what stands behind the count
        self._start = time.monotonic()
        on_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=doing,
            unit=unit,
            unit_scale=unit == "B",
            leave=leave,
            dynamic_ncols=True,
            mininterval=0.5,
            bar_format=None if unit else "{desc}: {elapsed}",
            disable=not on_terminal,
        )
        self._over = threading.Event()
        self._thread = None
        if shown:  # a thread, so that a single step that takes long is not silent either
            show, seconds = (self._bar.refresh, 1.0) if on_terminal else (self._write_line, LINE_SECONDS)
            self._thread = threading.Thread(target=self._show_every, args=(seconds, show), daemon=True)
            self._thread.start()

    def update(self, n: int = 1, **figures: float) -> None:
        """`n` more are done; `figures` stand beside the count."""
        self.done += n
        if figures:
            self.beside = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            self._bar.set_postfix_str(self.beside, refresh=False)
        self._bar.update(n)

    def go_on_with(self, doing: str) -> None:
        """What is being done is something else from here on; the count goes on."""
        self.doing = doing
        self._bar.set_description(doing)

    def say(self, sentence: str) -> None:
        """Print a line to standard output without disturbing the bar."""
        self._bar.clear()
        print(sentence, flush=True)
        if not self._bar.disable:
            self._bar.refresh()

    def line(self) -> str:
        """How far the work is, in words."""
        seconds = time.monotonic() - self._start
        in_bytes = self.unit == "B"
        done, total = (tqdm.format_sizeof(n, "B") if in_bytes else f"{n:,}" for n in (self.done, self.total or 0))
        count = f"{done} of {total}" if self.total else done
        if not in_bytes:
            count = f"{self.unit} {count}" if self.total else f"{count} {self.unit}s"
        to_go = ""
        if self.total and self.done > self._done_before:
            to_go = f"{clock(seconds / (self.done - self._done_before) * (self.total - self.done))} to go"
        parts = (count if self.unit else "", f"{clock(seconds)} so far", to_go, self.beside)
        return f"{self.doing}: {', '.join(filter(None, parts))}"

    def _write_line(self) -> None:
        sys.stderr.write(f"{self.line()}\n")  # at once: other threads print, too
        sys.stderr.flush()

    def _show_every(self, seconds: float, show: Callable[[], object]) -> None:
        while not self._over.wait(seconds):
            show()

    def close(self) -> None:
        """The work is over, or given up."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def tracked(items: Sequence[Item], doing: str, unit: str = "step", shown: bool = True) -> Iterator[Item]:
    """The items one after another, with a `Progress` that counts them."""
    with Progress(doing, len(items), unit, shown=shown) as progress:
        for item in items:
            yield item
            progress.update()


@contextlib.contextmanager
def told_from_outside(doing: str, shown: bool = True) -> Iterator[None]:
    """A `Progress` without a count in a process of its own: for a library that lets no other thread of this one run."""
    if not shown:
        yield
        return
    teller = subprocess.Popen([sys.executable, __file__, doing, str(LINE_SECONDS)], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        teller.communicate()  # the end of its input is its end, also where this process is killed


def clock(seconds: float) -> str:
    """Minutes and seconds, such as 3:07; with hours from the first one on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# ------------------------------------------------------------------------------------------------------- the transcript


class Transcript:
    """Whole lines with their times: in memory until there is a file, and from then on there."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=10_000)
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()  # lines of progress come from another thread

    def add(self, line: str) -> None:
        """A line was said."""
        stamped = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n"
        with self._lock:
            if self._file is None:
                self._lines.append(stamped)
            else:
                with contextlib.suppress(OSError):  # a full disk ends the run where it saves, with a sentence
                    self._file.write(stamped.encode(errors="replace"))

    def move_to(self, path: Path | None) -> None:
        """Append to this file from here on, and what was said while there was none; None ends that.

        Raises:
            OSError: the file cannot be written.
        """
        with self._lock:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()
            # Without a buffer of its own: what cannot be written is not tried again when the file is closed
            self._file = None if path is None else path.open("ab", buffering=0)
            if self._file is not None:
                self._file.write("".join(self._lines).encode(errors="replace"))
                self._lines.clear()


class _Copied:
    """A stream whose lines go to a transcript, too; of a bar, which is drawn over and over, its last state."""

    def __init__(self, stream: TextIO, transcript: Transcript) -> None:
        self.stream, self.transcript, self._begun = stream, transcript, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line := line.rstrip().rpartition("\r")[2]:
                self.transcript.add(line)
        self._begun = self._begun.rpartition("\r")[2]
        return self.stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@contextlib.contextmanager
def listening() -> Iterator[Transcript]:
    """Remember what the program says, so that `Transcript.move_to` can keep it; an outer `listening` goes on."""
    if isinstance(sys.stdout, _Copied):
        yield sys.stdout.transcript
        return
    transcript, streams = Transcript(), (sys.stdout, sys.stderr)
    transcript.add(f"$ {shlex.join(sys.argv)}")
    sys.stdout, sys.stderr = (_Copied(stream, transcript) for stream in streams)
    try:
        yield transcript
    finally:
        sys.stdout, sys.stderr = streams
        transcript.move_to(None)


if __name__ == "__main__":  # the process of `told_from_outside`
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    LINE_SECONDS = float(sys.argv[2])
    with Progress(sys.argv[1], unit=""):
        sys.stdin.read()
