"""How many requests a minute each caller may send."""

from __future__ import annotations

from collections import OrderedDict

MAX_CALLERS = 10_000  # whose rates are remembered


class RateLimit:
    """So many requests a minute for each caller, as a bucket that fills evenly (token bucket).

    Args:
        per_minute: its size and what flows in within a minute; 0 is no limit.
    """

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # caller → what is left, and when

    def wait(self, caller: str, now: float) -> float:
        """Take one request; returns 0, or the seconds until there is one again."""
        if not self.per_minute:
            return 0.0
        left, before = self._buckets.pop(caller, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - before) * self.per_minute / 60)
        allowed = left >= 1
        self._buckets[caller] = (left - allowed, now)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - left) * 60 / self.per_minute
