"""What the engine has done so far, in numbers: for metrics, logs and benchmarks."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

WINDOW = 4096  # the newest observations, of which quantiles are taken


class Observations:
    """How long something took, in seconds: count and sum of all, quantiles of the newest."""

    def __init__(self) -> None:
        self.count, self.sum = 0, 0.0
        self.newest: deque[float] = deque(maxlen=WINDOW)

    def add(self, seconds: float) -> None:
        """Take one more observation."""
        self.count += 1
        self.sum += seconds
        self.newest.append(seconds)

    def quantile(self, share: float) -> float:
        """The value that this share of the newest observations does not exceed; NaN without any."""
        ordered = sorted(self.newest.copy())  # the engine's thread may add one meanwhile
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


@dataclass
class EngineStatistics:
    """Counts since the engine was made, and its present state.

    Attributes:
        submitted, rejected: requests that were taken, and those that found the line full.
        finished: how many requests ended for which reason: "stop", "length", "cancelled", "deadline", "error".
        running, waiting: requests right now.
        cache_tokens, cache_tokens_used: cells of the cache, and those of running requests.
        tokens_prefilled: tokens of prompts that were computed (again after a preemption or a slide).
        tokens_reused: tokens of prompts whose keys and values were there already.
        tokens_generated: new tokens.
        preemptions: how often a request gave its memory to an older one.
        steps, failed_steps: forward passes, and those that raised an exception.
        model_seconds, sampling_seconds, overhead_seconds: the time of all steps in the model, in choosing tokens, and
            everything else: the engine's own share.
        time_to_first_token: from `submit` on; between_tokens: of one request.
    """

    submitted: int = 0
    rejected: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    running: int = 0
    waiting: int = 0
    cache_tokens: int = 0
    cache_tokens_used: int = 0
    tokens_prefilled: int = 0
    tokens_reused: int = 0
    tokens_generated: int = 0
    preemptions: int = 0
    steps: int = 0
    failed_steps: int = 0
    model_seconds: float = 0.0
    sampling_seconds: float = 0.0
    overhead_seconds: float = 0.0
    time_to_first_token: Observations = field(default_factory=Observations)
    between_tokens: Observations = field(default_factory=Observations)
