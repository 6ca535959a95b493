"""Who takes part in bench_inference.py: ours in one process, each peer with each kind of weights in another.

Sharing a process, programs would slow each other down: OpenMP puts waiting threads to sleep at once where it counts
more threads than cores, and a token has a hundred such waits. Nobody's threads are awake in another's turn.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.model_files import LeftOut, ModelFiles
from benchmarks.peer_programs import PROGRAMS, Setting
from benchmarks.peers import BatchGenerator, Generator, Ours, Prompt, check_logits
from benchmarks.turns import seconds
from inference.kernels.linear_products import DTYPES
from inference.quantizer import prepare_for_inference

EXACT = 1e-3  # how far logits may be off with weights in floating point
# By the weights' bits, of peers, whose caches may be FP16, and of our integers; trained weights lose most
LIMITS = {32: 5e-3, 16: 5e-2, 8: 0.15, 4: 0.6}
OURS = {  # name: kind of weights, their bits, how far its logits may be off
    "FP32": ("fp32", 32, EXACT),
    "FP16": ("fp16", 16, EXACT),
    "INT8": ("int8", 8, LIMITS[8]),
    # Activations are rounded as well, as llama.cpp does with Q8_0; in trained models some are far larger than others
    "INT8 dynamic": ("int8_dynamic", 8, 2 * LIMITS[8]),
    "INT4": ("int4", 4, LIMITS[4]),
}
OURS = {name: kind for name, kind in OURS.items() if kind[0] in DTYPES}
PATIENCE = 1.0  # seconds that a process has, after an action, until its threads sleep
opened: dict[str, Generator] = {}  # of the process that this module is in, by name


class Process:
    """A process that starts anew, not as a copy of this one, calls functions for it, and ends with it.

    Args:
        n_threads: of PyTorch in it.
    """

    def __init__(self, n_threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.executor = ProcessPoolExecutor(1, context, _begin, (n_threads,))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of an importable module returns there.

        Raises:
            BrokenProcessPool: the process has ended.
        """
        return self.executor.submit(function, *arguments).result()

    def close(self) -> None:
        """End it."""
        self.executor.shutdown()


@dataclass(frozen=True)
class Contestant:
    """A generator in a process.

    Attributes:
        bits: of a weight of its large matrices.
        weight_bytes: how much of its weights it reads for a token.
        error: of its logits, relative; None if it does not show them.
        batches: whether it computes many streams in one pass.
        held: whether it keeps to CPU_LEVEL, as far as there is a way.
    """

    name: str
    process: Process
    bits: int
    weight_bytes: int
    error: float | None
    batches: bool
    held: bool = True

    def seconds(self, method: str, *arguments: Any) -> float:
        """How long a method of the generator takes."""
        return self.process.call(_timed, self.name, method, *arguments)

    @property
    def ours(self) -> bool:
        """Whether it is this project."""
        return self.name.startswith("ours ")


def our_contestants(files: ModelFiles, process: Process, prompt: Prompt, expected: np.ndarray) -> dict[str, Contestant]:
    """This project with each kind of weights; logits after `prompt` are to be those `expected`, (V,)."""
    facts = process.call(_open_ours, files.checkpoint, files.folder, prompt, expected)
    bits = {f"ours {name}": kind[1] for name, kind in OURS.items()}
    return {name: Contestant(name, process, bits[name], **fact) for name, fact in facts.items()}


def peer_contestants(
    files: ModelFiles, setting: Setting, prompt: Prompt, expected: np.ndarray, cleanup: ExitStack
) -> tuple[dict[str, Contestant], dict[str, dict[str, str]]]:
    """Every peer that works here, with the weights of `files`; and what is to be said of all, by name, such as why one
    was left out."""
    found, remarks = {}, {}
    for program in PROGRAMS:
        if not find_spec(program.module):
            remarks[program.name] = {"left_out": f"not installed: pip install {program.packages}"}
            continue
        for weights, bits in program.bits.items():
            name, process = f"{program.name} {weights}", Process(setting.n_threads)
            cleanup.callback(process.close)
            where = (files.checkpoint, files.folder)
            try:
                facts = process.call(_open_peer, name, program.name, weights, where, setting, prompt, expected)
            except (LeftOut, BrokenProcessPool) as error:
                ended = isinstance(error, BrokenProcessPool)
                remarks[name] = {"left_out": "its process ended" if ended else str(error)}
                continue
            instructions = facts.pop("instructions")
            remarks[program.name] = {"instructions": instructions}
            if weights.startswith("Q4"):
                remarks[name] = {"matrices": files.matrices(weights)}
            found[name] = Contestant(name, process, bits, held=not instructions.startswith("not held"), **facts)
    return found, remarks


def with_ours(function: Callable[..., Any], *arguments: Any) -> Any:
    """In the process of ours: a function's result, whose first argument is our generators by kind of weights."""
    return function({name: opened[f"ours {name}"] for name in OURS}, *arguments)


def _begin(n_threads: int) -> None:
    torch.set_num_threads(n_threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # killed, too, when nobody can tell this process to end
    os._exit(1)


def _open_ours(checkpoint: Path, folder: Path, prompt: Prompt, expected: np.ndarray) -> Mapping[str, dict[str, Any]]:
    files, facts = ModelFiles(checkpoint, folder), {}
    for name, (weights, _, limit) in OURS.items():
        ours = Ours(prepare_for_inference(files.model, weights), files.tokenizer)
        facts[f"ours {name}"] = _admit(f"ours {name}", ours, prompt, expected, limit)
    return facts


def _open_peer(
    name: str, program: str, weights: str, where: Sequence[Path], setting: Setting, prompt: Prompt, expected: np.ndarray
) -> dict[str, Any]:
    program = next(each for each in PROGRAMS if each.name == program)
    try:
        generator = program.open(ModelFiles(*where), weights, setting)
        facts = _admit(name, generator, prompt, expected, LIMITS[program.bits[weights]])
        return {"instructions": program.instructions(), **facts}
    except Exception as error:  # whatever another program stumbles over is no reason to measure none
        reason = str(error).strip() or type(error).__name__
        raise LeftOut(reason.splitlines()[-1][:200]) from None


def _admit(name: str, generator: Generator, prompt: Prompt, expected: np.ndarray, limit: float) -> dict[str, Any]:
    error = check_logits(name, generator, expected, prompt, limit)
    opened[name] = generator
    batches = isinstance(generator, BatchGenerator)
    return {"weight_bytes": generator.weight_bytes, "error": error, "batches": batches}


def _timed(name: str, method: str, *arguments: Any) -> float:
    """Seconds; it returns when the threads sleep, which wait awake for a while, those of Intel's OpenMP for 0.2 s."""
    duration = seconds(lambda: getattr(opened[name], method)(*arguments))
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        used = time.process_time()
        time.sleep(0.01)
        if time.process_time() - used < 0.002:
            break
    return duration
