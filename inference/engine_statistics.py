"""What the engine has done so far, in numbers: for metrics, logs and benchmarks."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field

WINDOW = 4096  # the newest observations, of which quantiles are taken

# Upper bounds of the buckets of a histogram, in seconds: those of vLLM's metrics, so that its dashboards fit
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
WHOLE_REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
    *(1920.0, 7680.0),
)
COUNT_BUCKETS = tuple(float(digit * 10**power) for power in range(5) for digit in (1, 2, 5))  # of tokens a request


class Observations:
    """How long something took, in seconds, or how many there were: count, sum and histogram of all, quantiles of the
    newest.

    Args:
        bounds: the upper bounds of the histogram's buckets, in order.

    Attributes:
        buckets: how many observations are in each bucket, and in the last place those above all bounds.
    """

    def __init__(self, bounds: tuple[float, ...] = ()) -> None:
        self.count, self.sum = 0, 0.0
        self.bounds, self.buckets = bounds, [0] * (len(bounds) + 1)
        self.newest: deque[float] = deque(maxlen=WINDOW)

    def add(self, value: float) -> None:
        """Take one more observation."""
        self.count += 1
        self.sum += value
        self.buckets[bisect_left(self.bounds, value)] += 1
        self.newest.append(value)

    def quantile(self, share: float) -> float:
        """The value that this share of the newest observations does not exceed; NaN without any."""
        ordered = sorted(self.newest.copy())  # the engine's thread may add one meanwhile
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def _observed(bounds: tuple[float, ...]) -> Observations:
    return field(default_factory=lambda: Observations(bounds))


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
        tokens_looked_up: tokens of prompts for which they were looked for.
        tokens_generated: new tokens.
        drafts: how often tokens of an answer were drafted (speculative decoding).
        tokens_drafted, tokens_accepted: how many they were, and how many of them were right.
        preemptions: how often a request gave its memory to an older one.
        steps, failed_steps: forward passes, and those that raised an exception.
        model_seconds, sampling_seconds, drafting_seconds, overhead_seconds: the time of all steps in the model, in
            choosing tokens, in drafting them, and everything else: the engine's own share.
        time_to_first_token: from `submit` on; between_tokens: of one request; queued: from `submit` until it is first
            computed; whole_request: from `submit` to its end.
        prompt_tokens, answer_tokens: of the requests that have ended.
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
    tokens_looked_up: int = 0
    tokens_generated: int = 0
    drafts: int = 0
    tokens_drafted: int = 0
    tokens_accepted: int = 0
    preemptions: int = 0
    steps: int = 0
    failed_steps: int = 0
    model_seconds: float = 0.0
    sampling_seconds: float = 0.0
    drafting_seconds: float = 0.0
    overhead_seconds: float = 0.0
    time_to_first_token: Observations = _observed(FIRST_TOKEN_BUCKETS)
    between_tokens: Observations = _observed(BETWEEN_TOKENS_BUCKETS)
    queued: Observations = _observed(WHOLE_REQUEST_BUCKETS)
    whole_request: Observations = _observed(WHOLE_REQUEST_BUCKETS)
    prompt_tokens: Observations = _observed(COUNT_BUCKETS)
    answer_tokens: Observations = _observed(COUNT_BUCKETS)

    @property
    def seconds_elsewhere(self) -> float:
        """The time of all steps but for the engine's own share."""
        return self.model_seconds + self.sampling_seconds + self.drafting_seconds
