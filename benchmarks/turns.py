"""Contestants take turns, so that a drift of the machine hits all of them; tables, figures and goals come out."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import Table, in_a_sentence, write_section

Result = dict[str, Any]
READ = "memory read"  # an action among those that are timed


def seconds(action: Callable[[], object]) -> float:
    """How long an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


Times = dict[str, list[float]]  # of each action in seconds, a number for each round


def take_turns(
    actions: Mapping[str, Callable[[], Any]], rounds: int, measure: Callable[[Callable[[], Any]], float] = seconds
) -> Times:
    """How long each action takes, by `measure`, in turn, once in each round."""
    of_rounds = [{name: measure(action) for name, action in actions.items()} for _ in range(rounds)]
    return {name: [of_round[name] for of_round in of_rounds] for name in actions}


def rates(times: Times, n_items: int) -> dict[str, float]:
    """Items a second of each action, by its median time."""
    return {name: n_items / statistics.median(durations) for name, durations in times.items()}


def speedup(times: Times, ours: str, theirs: str) -> float | None:
    """How many times as fast; None if one of them was left out.

    The median of the ratios within each round: a machine that slows down for a while slows both.
    """
    if ours not in times or theirs not in times:
        return None
    return statistics.median(their / our for our, their in zip(times[ours], times[theirs], strict=True))


def memory_reader(device: torch.device, quick: bool) -> tuple[Callable[[], float], int]:
    """An action that reads memory with all threads, the sum of an FP32 tensor far larger than any cache; and how many
    bytes it reads."""
    numbers = torch.ones((1 << 24 if quick else 1 << 28) * (4 if device.type == "cuda" else 1), device=device)
    return lambda: numbers.sum().item(), numbers.nbytes


class Report:
    """Collects tables, figures and goals; prints each table as soon as it is there."""

    def __init__(self, facts: Result, benchmark: str = "inference") -> None:
        self.figures: Result = {"benchmark": benchmark, **facts}
        self.setting = f"{facts['model']}: {in_a_sentence(facts)}"
        self.tables: list[Table] = []
        self.goals: list[Result] = []
        print(self.setting, flush=True)

    def add(self, name: str, table: Table, figures: object) -> None:
        """A table and the figures in it."""
        self.figures[name] = figures
        self.tables.append(table)
        print(table.plain(), flush=True)

    def goal(self, name: str, measured: float | None, at_least: float) -> None:
        """What was to be reached; `measured` is None where the peer is missing."""
        met = None if measured is None else measured >= at_least
        self.goals.append({"goal": name, "measured": measured and round(measured, 3), "at_least": at_least, "met": met})

    def finish(self, page: str, name: str, title: str) -> None:
        """The table of goals, if there are any; all tables into the section `name` of a Markdown page, if one is named;
        the line of JSON."""
        words = {True: "yes", False: "no", None: "left out"}
        rows = [
            [goal["goal"], "" if goal["met"] is None else f"{goal['measured']:.2f}", f"{goal['at_least']:.2f}"]
            + [words[goal["met"]]]
            for goal in self.goals
        ]
        if rows:
            header = ["", "measured", "at least", "met"]
            self.add("goals", Table("Goals", "Medians of the ratios within each round.", header, rows), self.goals)
        if page:
            tables = "\n\n".join(table.markdown() for table in self.tables)
            write_section(Path(page), name, f"## {title}\n\n{self.setting}\n\n{tables}")
        print(json.dumps(self.figures))
