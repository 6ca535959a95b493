"""What the result of a run depends on, so that a run is continued as what it began as, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

from checkpoint import load_checkpoint, weight_fingerprint
from command_line import UserError, inputs_of
from text.text_files import RECORD_ENDINGS, TEXT_ENDINGS, parse_sources, resolve_files

BLOCK = 1 << 20
MOST_BLOCKS = 1024  # of a file, evenly spread: up to 1 GiB all of it, and no more of one that is larger

# Those of its kind come first where a name without an ending stands for several files
ENDINGS = {"records": RECORD_ENDINGS + TEXT_ENDINGS, "text": TEXT_ENDINGS + RECORD_ENDINGS}

# An input is the path that was given and what stood there
Inputs = dict[str, list[str]]


def fingerprints(config: Any) -> Inputs:
    """{option: [path, fingerprint]} of all that a run's settings say it reads, see `command_line.option`.

    Where nothing is at a path, a caller has brought model or data along.
    """
    inputs: Inputs = {}
    for name, kind in inputs_of(config).items():
        path = getattr(config, name)
        with contextlib.suppress(UserError):
            if kind == "model":
                inputs[name] = [path, weight_fingerprint(load_checkpoint(path))]
            else:
                files = [file for source, _ in parse_sources(path) for file in resolve_files(source, ENDINGS[kind])]
                inputs[name] = [path, content_fingerprint(files)]
    return inputs


def content_fingerprint(files: list[Path]) -> str:
    """SHA-256 of what is in files, whatever they are called."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        n_blocks = -(-size // BLOCK)
        digest.update(f"{size} ".encode())
        with path.open("rb") as file:
            for index in range(min(n_blocks, MOST_BLOCKS)):
                file.seek(index * n_blocks // min(n_blocks, MOST_BLOCKS) * BLOCK)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def differing_inputs(there: Inputs, here: Inputs) -> list[str]:
    """What a run read and what it would read now, a few words for each difference."""
    differing = []
    for name in sorted(there.keys() | here.keys()):
        (old, before), (new, now) = there.get(name, ["none", ""]), here.get(name, ["none", ""])
        if before != now:
            change = "another content than it had" if old == new else f"{old} there, {new} here"
            differing.append(f"--{name}: {change}")
    return differing


def changed_settings(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Settings that a resumed run may change, and has: `--lr 0.002 → 0.001`; empty if there are none."""
    changed = [name for name in here if name in there and there[name] != here[name]]
    return ", ".join(f"--{name} {there[name]} → {here[name]}" for name in changed)
