"""Several processes behind one port: one event loop and one engine each, their weights in the same memory.

The processes map the checkpoint's file, so its weights are in memory once. They take connections from one listening
socket. The first process only watches: it starts a worker anew that has ended by itself, and hands on SIGTERM.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from inference.service.settings import ServiceSettings, available_cores

logger = logging.getLogger("service")

RESTART_SECONDS = 1.0  # a worker that ends at once is not started more often than this
SHARE_SECONDS = 2.0  # how often a worker writes down its metrics for the others

Worker = Callable[[ServiceSettings, socket.socket], None]


class Workers:
    """Runs `settings.workers` processes until a signal comes.

    Args:
        work: what a process does; a function that can be named, as the processes begin from nothing.
        settings: of the service; CPU threads are shared out unless they were chosen.
        listener: the socket that all of them listen on.
    """

    def __init__(self, work: Worker, settings: ServiceSettings, listener: socket.socket) -> None:
        self.work, self.listener = work, listener
        threads = max(1, available_cores() // settings.workers)
        if "num_threads" not in settings.given:
            settings = replace_settings(settings, num_threads=min(settings.num_threads, threads))
        self.settings = settings
        self.context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
        self.processes: list[BaseProcess] = []
        self.is_stopping = False

    def run(self) -> int:
        """Until all have ended; returns the exit status: 0 after a signal, 2 where no worker can start."""
        with tempfile.TemporaryDirectory(prefix="own-gpt-metrics-") as folder:
            self.settings = replace_settings(self.settings, metrics_folder=folder)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._stop)
            self.processes = [self._started() for _ in range(self.settings.workers)]
            status = 0
            while self.processes:
                wait([process.sentinel for process in self.processes])
                for ended in [process for process in self.processes if not process.is_alive()]:
                    self.processes.remove(ended)
                    Path(folder, f"{ended.pid}.prom").unlink(missing_ok=True)
                    if self.is_stopping:
                        continue
                    if ended.exitcode == 2:  # a mistake in the settings or the model, which would come again
                        status = 2
                        self._stop()
                    else:
                        logger.error("worker %d has ended (%s) and is started anew", ended.pid, ended.exitcode)
                        time.sleep(RESTART_SECONDS)
                        self.processes.append(self._started())
            return status

    def _started(self) -> BaseProcess:
        process = self.context.Process(target=self.work, args=(self.settings, self.listener))
        process.start()
        return process

    def _stop(self, *_: object) -> None:
        self.is_stopping = True
        for process in self.processes:
            process.terminate()


def replace_settings(settings: ServiceSettings, **changes: object) -> ServiceSettings:
    """A copy with other values, that still knows what was given and why the model was chosen."""
    changed = replace(settings, **changes)
    changed.given, changed.model_reason = settings.given, settings.model_reason
    return changed


def merged_expositions(texts: list[str]) -> str:
    """Several processes' metrics in Prometheus' text format as one: all samples of a name stand together."""
    families: dict[str, list[str]] = {}
    for text in texts:
        lines: list[str] = []
        for line in text.splitlines():
            if line.startswith("# HELP "):
                lines = families.setdefault(line.split()[2], [])
            if not (line.startswith("#") and line in lines):
                lines.append(line)
    return "".join(f"{line}\n" for lines in families.values() for line in lines)
