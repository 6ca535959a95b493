"""Which way to compute a product is the fastest: measured at its first call, and remembered in the user's cache.

For each shape and number of rows, so that the next process computes in the same way. A way that fails, or whose result
differs from `plain`, is out.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from command_line import replacing
from inference.kernels.linear_products import Product
from machine.native_code import cache_folder, cpu_fingerprint

ROW_BUCKETS = (1, 4, 16, 64)  # measured are 1, 2–4, 5–16, 17–64 and more rows of x
TOLERANCE = 1e-5  # relative error of a product that counts as the same
ADVANTAGE = 0.75  # a way that stands later in the list has to take less than this share of the time
MEASURE_SECONDS = 1e-3  # all ways together
KERNELS = "linear_products.c", "int4_products.h", "amx_products.h", "../../machine/vectors.h"
SOURCES = ("fastest_way.py", "linear_products.py", *KERNELS)  # a change of one of them makes times void
SOURCES = tuple(Path(__file__).parent / name for name in SOURCES)

_lock = threading.Lock()
_chosen: dict[tuple[Path | None, str], str] = {}  # in this process, which keeps to it whatever others measure


def fastest_way(ways: dict[str, Callable[[], Product]], weights: str, shape: tuple[int, int], bucket: int) -> str:
    """The name of the fastest of `ways` for layers of this shape and this bucket of rows: remembered, or measured now.

    Where two are about as fast it is the one that stands first. Weights that are not finite prove nothing: `plain`.

    Args:
        ways: of `linear_products.ways_to_multiply`, with `plain` among them.
        weights: the kind of weights, one of `DTYPES`.
        shape: (N, K), that of the weights.
        bucket: an index into `ROW_BUCKETS`, or one beyond the last.
    """
    n_out, n_in = shape
    key = f"{weights} {n_in}x{n_out}, rows {bucket}, {torch.get_num_threads()} threads, of {' '.join(ways)}"
    with _lock:
        path = _memory()
        name = _chosen.get((path, key)) or _remembered(path, key)
        if name not in ways:
            name = _measure(ways, n_in, ROW_BUCKETS[bucket] if bucket < len(ROW_BUCKETS) else 2 * ROW_BUCKETS[-1])
            if name is None:
                return "plain"
            earlier = _remembered(path, key)  # of another process, which measured at the same time
            if earlier in ways:
                name = earlier
            else:
                _remember(path, key, name)
        _chosen[path, key] = name
        return name


@torch.no_grad()
def _measure(ways: dict[str, Callable[[], Product]], n_in: int, n_rows: int) -> str | None:
    x = torch.randn(n_rows, n_in, generator=torch.Generator().manual_seed(0))  # (M, K)
    reference = ways["plain"]()(x)  # (M, N)
    if not bool(reference.isfinite().all()):
        return None
    products = {}
    for name, prepare in ways.items():
        try:
            product = prepare()
            error = (product(x) - reference).norm() / reference.norm().clamp_min(1e-30)
        except (RuntimeError, AttributeError, NotImplementedError):
            continue  # this PyTorch lacks the operator
        if error <= TOLERANCE:
            products[name] = product
    times = dict.fromkeys(products, math.inf)
    end = time.perf_counter() + MEASURE_SECONDS
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:  # in turn, so that other work on the machine disturbs all alike
        for name, product in products.items():
            if rounds == 0 or times[name] < 3 * min(times.values()):
                start = time.perf_counter()
                product(x)
                times[name] = min(times[name], time.perf_counter() - start)
        rounds += 1
    best = next(iter(times))
    for name in times:
        best = name if times[name] < ADVANTAGE * times[best] else best
    return best


def _memory() -> Path | None:
    """The folder of what was measured on this machine with this version; None for a user without a home."""
    sources = [path.read_bytes() for path in SOURCES]
    machine = hashlib.sha256(repr((cpu_fingerprint(), torch.__version__, sources)).encode()).hexdigest()[:16]
    try:
        return cache_folder() / f"linear_kernels-{machine}"
    except OSError:
        return None


def _file_of(path: Path, key: str) -> Path:
    """A file for each key, so that processes that measure different ones at the same time lose nothing."""
    return path / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _remembered(path: Path | None, key: str) -> str | None:
    """The fastest way; None if it is not known, or its file is damaged."""
    try:
        return json.loads(_file_of(path, key).read_text())[key] if path else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(path: Path | None, key: str, name: str) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(_file_of(path, key)) as file:
            file.write(json.dumps({key: name}).encode())
    except OSError:
        return  # a home that cannot be written to: the next process measures again
