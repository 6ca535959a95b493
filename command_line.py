"""From a documented dataclass to a command line, and from a user's mistake to one helpful sentence.

Every script of the repository describes its settings as a dataclass whose fields are made with `option(...)`. The
command line, its `--help` and its error messages are derived from that one description:

    @dataclass
    class Config:
        presets: ClassVar[dict] = {"tiny": {"lr": 1e-3}}
        lr: float = option(2e-4, "peak learning rate", above=0)

    config = parse_config(Config, argv, description="train a model")

A class that inherits a field and writes `lr: float = 1e-3` changes its default; what `option` said of it still holds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import operator
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

from progress import listening

Config = TypeVar("Config")


class UserError(Exception):
    """A mistake that the user can mend: one sentence that names the thing and the remedy. The exit status is 2."""


class Interrupted(Exception):
    """A run stopped on request (Ctrl-C, SIGTERM) after saving its state. The exit status is 130."""


BOUNDS = {  # of a number: how it is compared, and how that is said
    "above": (operator.gt, "above"),
    "at_least": (operator.ge, "at least"),
    "below": (operator.lt, "below"),
    "at_most": (operator.le, "at most"),
}


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[str] | None = None,
    reads: str = "",
    joined: bool = False,
    **bounds: float,
) -> Any:
    """A dataclass field with a default, a sentence of help and, where it applies, the values that are allowed.

    `default` may also be the word `list` for a field that takes several values and is empty by default. A number may
    have bounds, by the names in `BOUNDS`; it is then never infinite or NaN. What the result of a run depends on is
    marked by `reads`: a path, if it is not empty, of a "model" (a checkpoint), "records" or "text". A `joined` text is
    made of all the words that the user gives, with line ends between them.
    """
    if bounds.keys() - BOUNDS.keys():
        raise TypeError(f"option() takes the bounds {', '.join(BOUNDS)}, not {', '.join(bounds)}")
    metadata = {"help": help, "choices": choices, "reads": reads, "joined": joined, "bounds": bounds}
    if default is list:
        return dataclasses.field(default_factory=list, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports mistakes as `UserError` and accepts no abbreviated options."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists the options")


class _Joined(argparse.Action):
    """Keeps several words as the lines of one text."""

    def __call__(self, parser: Any, namespace: Any, values: Sequence[str], option_string: str | None = None) -> None:
        setattr(namespace, self.dest, "\n".join(values))


def _boolean(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return words[text.lower()]


def _value_type(annotation: Any) -> tuple[Callable[[str], Any], bool]:
    """The function that reads one value of a field from text, and whether the field takes several values."""
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):  # `int | None` is read as an int
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return (_boolean if annotation is bool else annotation), False


def _said_of(config_class: type, name: str) -> dict[str, Any]:
    """What `option` said of a field: help, choices and bounds, each from the nearest class that says it."""
    said = {"choices": None, "reads": "", "joined": False, "bounds": {}}
    for base in reversed(config_class.__mro__):
        if field := vars(base).get("__dataclass_fields__", {}).get(name):
            said |= {key: value for key, value in field.metadata.items() if value}
    return said


def inputs_of(config: Any) -> dict[str, str]:
    """{name: kind} of the options that name something to read, and do; see `option`."""
    kinds = {field.name: _said_of(type(config), field.name)["reads"] for field in dataclasses.fields(config)}
    return {name: kind for name, kind in kinds.items() if kind and getattr(config, name)}


def _range(bounds: dict[str, float]) -> str:
    """Bounds in words; empty if there are none."""
    return " and ".join(f"{BOUNDS[name][1]} {bound}" for name, bound in bounds.items())


def beyond_bounds(config: Any, prefix: str = "--") -> list[str]:
    """A sentence for each value of a config that its field does not allow; None is always allowed.

    Args:
        prefix: stands before the names of fields; empty for a config that is no command line.
    """
    complaints = []
    for field in dataclasses.fields(config):
        value, said = getattr(config, field.name), _said_of(type(config), field.name)
        if value is None:
            continue
        within = (BOUNDS[name][0](value, bound) for name, bound in said["bounds"].items())
        if said["bounds"] and not (math.isfinite(value) and all(within)):
            complaints.append(f"{prefix}{field.name} must be {_range(said['bounds'])}, not {value}")
        if said["choices"] and value not in said["choices"]:
            complaints.append(f"{prefix}{field.name} must be one of {', '.join(said['choices'])}, not {value!r}")
    return complaints


def complaints_about(config: Any) -> list[str]:
    """What is `beyond_bounds`, and what a config's `validate() -> list[str]`, if there is one, has to say of how the
    fields fit together; a sentence each."""
    return beyond_bounds(config) + (config.validate() if hasattr(config, "validate") else [])


def parse_config(config_class: type[Config], argv: Sequence[str] | None = None, *, description: str) -> Config:
    """Build a config from command-line arguments.

    A class attribute `presets: ClassVar[dict[str, dict]]` adds `--preset NAME`, which sets several fields at once;
    options given explicitly win over the preset. All `complaints_about` the config are reported together. The names of
    the options that the user gave are left in `config.given`.

    Raises:
        UserError: an unknown option, a value of the wrong type, or complaints.
    """
    parser = _Parser(
        description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    presets = getattr(config_class, "presets", {})
    if presets:
        parser.add_argument("--preset", choices=list(presets), default=None, help="set several options at once")
    hints = typing.get_type_hints(config_class)
    defaults = {}
    for field in dataclasses.fields(config_class):
        read, several = _value_type(hints[field.name])
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        defaults[field.name] = default
        said = _said_of(config_class, field.name)
        allowed, choices = _range(said["bounds"]), said["choices"]
        parser.add_argument(
            f"--{field.name.rstrip('_')}",  # from_ is --from, which Python has taken as a name
            dest=field.name,
            type=read,
            choices=choices,
            default=argparse.SUPPRESS,  # so that an option given by the user can be told from a default
            help=f"{said['help']} ({allowed + '; ' if allowed else ''}default: {default})",
            **({"action": "extend", "nargs": "*" if default == [] else "+"} if several else {}),
            **({"action": _Joined, "nargs": "+"} if said["joined"] else {}),
            **({"nargs": "?", "const": True} if read is _boolean else {}),  # `--flag` alone means true
            **({} if choices else {"metavar": getattr(read, "__name__", "value").strip("_").upper()}),
        )
    given = vars(parser.parse_args(argv))
    names = {name for name, value in given.items() if value is not None}
    preset = presets.get(given.pop("preset", None), {})
    config = config_class(**{**defaults, **preset, **given})
    config.given = frozenset(names)
    if complaints := complaints_about(config):
        raise UserError("; ".join(complaints))
    return config


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and turn its end into an exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    status = 0
    with listening():
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        except Interrupted as interruption:
            print(interruption, file=sys.stderr)
            status = 130
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            status = 130
    sys.exit(status)


def require_file(path: str | Path, what: str, remedy: str = "check the path") -> Path:
    """The path, if it is an existing file; otherwise a `UserError` that says what was expected there."""
    path = Path(path)
    if not path.is_file():
        found = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"{what} {path} {found}; {remedy}")
    return path


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def require_writable_folder(folder: str | Path, option_name: str = "--output_dir") -> None:
    """Refuse a run before any work if `folder` is not, and cannot become, a folder that can be written to."""
    existing = existing_parent(Path(folder) / "x")
    if not existing.is_dir():
        raise UserError(f"{folder} cannot be a folder, because {existing} is a file; choose another {option_name}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} cannot be written to; choose another {option_name} or mend its permissions")


@contextlib.contextmanager
def holding(folder: str | Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder, which is made where it is missing; until the end of the context or of the process.

    Args:
        wait: for another process that holds it.

    Yields:
        whether this process holds it; not where the system (Windows) or the disk knows no such locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            raise
        except OSError:  # a disk without locks
            held = False
        yield held
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: str | Path, remedy: str = "") -> Iterator[BinaryIO]:
    """A file to write into, which takes the place of `path` in one move once it is whole and on the disk.

    A kill, a full disk or an exception at any moment leaves the old file, or none, but never half a file; of processes
    that write at the same time, the last one wins. The folder is made where it is missing.

    Raises:
        UserError: it cannot be written, if there is a `remedy` to name; without one, the OSError itself.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if remedy and isinstance(error, OSError):
            raise UserError(f"{path} cannot be written ({error.strerror or error}); {remedy}") from error
        raise
    try:
        folder = os.open(path.parent, os.O_RDONLY)  # the move itself must reach the disk, too
    except PermissionError:  # Windows opens no folder
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
