"""The service's log: a line an event, with fields; nothing that a client sends can begin a line of its own."""

from __future__ import annotations

import json
import logging
import time
from contextvars import ContextVar
from typing import Any

request_id: ContextVar[str] = ContextVar("request_id", default="")  # of the request that is being answered
NEVER_ASCII_ONLY = {"ensure_ascii": False, "default": str}


class LineFormatter(logging.Formatter):
    """Time, level, message and the record's `fields` as one line, either to be read or as a JSON object."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line; a traceback follows indented, or within the object."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        message, fields = one_line(record.getMessage()), getattr(record, "fields", {})
        traceback = self.formatException(record.exc_info) if record.exc_info else ""
        if self.as_json:
            content = {"time": moment, "level": record.levelname, "logger": record.name, "message": message, **fields}
            if traceback:
                content["exception"] = traceback
            return one_line(json.dumps(content, **NEVER_ASCII_ONLY))
        shown = "".join(f" {name}={_shown(value)}" for name, value in fields.items())
        below = "".join(f"\n    {one_line(line)}" for line in traceback.splitlines())
        return f"{moment} {record.levelname} {message}{shown}{below}"


def one_line(text: str) -> str:
    """A text whose control characters, line breaks of every script among them, are written as escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    as_json = json.dumps(character)[1:-1]
    return as_json if as_json != character else f"\\u{ord(character):04x}"


def _shown(value: Any) -> str:
    plain = isinstance(value, str) and value.isprintable() and not set(value) & set(' "=')
    return value if plain and value else one_line(json.dumps(value, **NEVER_ASCII_ONLY))


def install(log_format: str) -> None:
    """Write the log to standard error, unless the program that runs the service has a log of its own."""
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(LineFormatter(log_format == "json"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
