"""What of an evaluation is done already: an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class KeptWork:
    """Results of pieces of work, a line each in a file that is there only while the work lasts.

    Args:
        path: the file; None keeps nothing.
        depends_on: whatever the results depend on (weights, questions, settings); what was kept under anything else is
            not used.
    """

    def __init__(self, path: Path | None = None, depends_on: Any = None) -> None:
        self.path, self._results = path, {}
        self._key = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the last one, when it was interrupted
                continue
            if entry["key"] == self._key:
                self._results[entry["name"]] = entry["result"]
        self.found = len(self._results)
        if path and lines and not self.found:
            path.unlink()  # of another evaluation

    def of(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of one piece, which is JSON: kept before, or computed now and kept."""
        if name not in self._results:
            self._results[name] = compute()
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                entry = {"key": self._key, "name": name, "result": self._results[name]}
                with self.path.open("a", encoding="utf-8", errors="replace") as file:
                    file.write(json.dumps(entry) + "\n")
        return self._results[name]

    def finish(self) -> None:
        """All results have found their place: the file goes."""
        if self.path:
            self.path.unlink(missing_ok=True)
