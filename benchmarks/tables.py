"""Tables for the terminal and for Markdown, and the facts about a machine that belong beside any figure."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

from evaluation.answer_report import format_table


@dataclass
class Table:
    """A titled table; the first column is text, the others are figures.

    Attributes:
        note: how the figures were obtained, a sentence or two under the title.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def plain(self) -> str:
        """For a terminal: columns aligned."""
        return "\n".join((f"\n{self.title}", self.note, format_table(self.header, self.rows)))

    def markdown(self) -> str:
        """For a page."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = (f"| {' | '.join(row)} |" for row in (self.header, rule, *self.rows))
        return "\n".join((f"### {self.title}", "", self.note, "", *lines))


def processor() -> str:
    """The name of the CPU, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def about(*packages: str) -> dict[str, object]:
    """Machine, versions and date; packages that are not installed are None."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "date": date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # other programs disturb
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", *packages)}},
    }


def in_a_sentence(facts: dict[str, object]) -> str:
    """What `about` found, for people."""
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in facts["versions"].items())
    where = f"{facts['processor']} with {facts['capability']}, {facts['cores']} cores, {facts['gpu'] or 'no GPU'}"
    return f"{facts['date']}, {where}; {facts['threads']} threads, load {facts['load']} at the start; {versions}."


def write_section(path: Path, name: str, markdown: str) -> None:
    """Put a section into a Markdown file, in place of the one of that name that an earlier run left there."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = f"{begin}\n{markdown}\n{end}\n"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    written, found = re.subn(f"{re.escape(begin)}.*{re.escape(end)}\n", lambda _: section, text, flags=re.DOTALL)
    path.write_text(written if found else "\n".join(filter(None, (text, section))), encoding="utf-8")
