"""The line between many clients and one model: bounded, served in batches by one computing thread.

A request is a prompt and its sampling settings. The queue knows neither HTTP nor the model, only a function that turns
a batch of prompts into texts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How to generate. Requests that agree in this may share a batch."""

    max_gen_len: int
    top_k: int
    temperature: float
    seed: int | None


@dataclass(eq=False)
class Job:
    """A request on its way to the model."""

    prompt: str
    sampling: Sampling
    answer: asyncio.Future[str]


class QueueFull(Exception):
    """As many requests wait as may wait."""


class RequestQueue:
    """Leads requests to the model: a bounded line, and one thread that computes batch after batch.

    Only `generate` runs in that thread. Everything else belongs to the event loop, so the line needs no lock. A job
    whose client leaves while it waits is taken out of the line and costs nothing.

    Args:
        generate: the texts that the model writes after some prompts; called in the computing thread.
        max_waiting: how many jobs may wait.
        max_batch: how many jobs may be generated together.
        num_threads: torch's threads for one operation.
    """

    def __init__(
        self,
        generate: Callable[[list[str], Sampling], list[str]],
        max_waiting: int,
        max_batch: int,
        num_threads: int,
    ) -> None:
        self.generate = generate
        self.max_waiting = max_waiting
        self.max_batch = max_batch
        self.thread = ThreadPoolExecutor(1, "model", initializer=torch.set_num_threads, initargs=(num_threads,))
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.arrival = asyncio.Event()

    async def answer(self, prompt: str, sampling: Sampling) -> str:
        """Wait in line and return what the model writes; cancelling this leaves the line.

        Raises:
            QueueFull: there is no place left in the line.
        """
        if len(self.waiting) >= self.max_waiting:
            raise QueueFull
        job = Job(prompt, sampling, asyncio.get_running_loop().create_future())
        self.waiting.append(job)
        self.arrival.set()
        try:
            return await job.answer
        finally:
            if job in self.waiting:
                self.waiting.remove(job)

    def next_batch(self) -> list[Job]:
        """Take the first job out of the line, and those behind it that may be generated together with it.

        A job with a seed stays alone: its draws must not depend on who else is there.
        """
        first = self.waiting[0]
        alike = [job for job in self.waiting if job.sampling == first.sampling]
        batch = [first] if first.sampling.seed is not None else alike[: self.max_batch]
        self.waiting = [job for job in self.waiting if job not in batch]
        return batch

    async def run(self) -> None:
        """Compute for ever; a batch that fails hands its exception to those who wait for it."""
        loop = asyncio.get_running_loop()
        while True:
            await self.arrival.wait()
            self.arrival.clear()
            while self.waiting:
                self.running = self.next_batch()
                prompts = [job.prompt for job in self.running]
                sampling = self.running[0].sampling
                try:
                    results = await loop.run_in_executor(self.thread, self.generate, prompts, sampling)
                except Exception as error:
                    results = [error] * len(prompts)
                for job, result in zip(self.running, results, strict=True):
                    if job.answer.done():  # cancelled, as the client has left
                        continue
                    if isinstance(result, Exception):
                        job.answer.set_exception(result)
                    else:
                        job.answer.set_result(result)
                self.running = []
