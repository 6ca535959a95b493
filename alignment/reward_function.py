"""The reward function of GRPO: a Python file of the user's, loaded, called, and held to what it promises.

    def reward(prompts: list[str], responses: list[str], records: list[dict]) -> list[float]: ...
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from command_line import UserError, require_file

RewardFunction = Callable[[list[str], list[str], list[dict]], Sequence[float]]
SAMPLE_REWARD = "evaluation/answer_checker.py:preference_reward"  # of the sample data's world


def parse_place(place: str, given_as: str = "--reward") -> tuple[Path, str]:
    """The file and the function that `PATH.py:FUNCTION` names; the path is seen from the working folder or this
    project's.

    Raises:
        UserError: no such file.
    """
    file, colon, name = place.rpartition(":")
    if not (colon and file and name.isidentifier()):
        raise UserError(f"{given_as} {place} must be a file and a function in it, such as my_rewards.py:reward")
    path = Path(file) if Path(file).exists() else Path(__file__).parent.parent / file
    remedy = f"give PATH.py:FUNCTION, such as {SAMPLE_REWARD}"
    return require_file(path if path.exists() else file, f"the file of {given_as}", remedy), name


def load_reward(place: str, given_as: str = "--reward") -> Callable:
    """The function that `PATH.py:FUNCTION` names; `given_as` is the option that names it.

    Raises:
        UserError: no such file or function, or the file cannot be imported.
    """
    path, name = parse_place(place, given_as)
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if spec is None:
        raise UserError(f"{given_as} {place}: {path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of the file look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody else's code raises
        raise UserError(f"{path} cannot be imported: {described(error)}; mend it") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(
            key for key, value in vars(module).items() if callable(value) and value.__module__ == spec.name
        )
        raise UserError(f"{path} has no function {name}; it has {known or 'none'}")
    return function


def call_reward(function: RewardFunction, prompts: list[str], responses: list[str], records: list[dict]) -> list[float]:
    """One finite number for each response.

    Raises:
        UserError: the function raised an exception, or returned something else.
    """
    name = getattr(function, "__name__", "reward")
    try:
        scores = function(prompts, responses, records)
    except UserError:
        raise
    except Exception as error:  # whatever somebody else's code raises
        raise UserError(f"the reward function {name} failed: {described(error)}; mend it") from error
    try:
        scores = [float(score) for score in scores]
    except (TypeError, ValueError):
        raise UserError(f"the reward function {name} must return a list of numbers, not {scores!r:.100}") from None
    if len(scores) != len(responses):
        raise UserError(f"the reward function {name} returned {len(scores)} scores for {len(responses)} responses")
    for score, response in zip(scores, responses, strict=True):
        if not math.isfinite(score):
            raise UserError(
                f"the reward function {name} gave {score} to the response {response!r:.100}; it must be finite"
            )
    return scores


def described(error: Exception) -> str:
    """What went wrong in somebody's code and in which line, on one line."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error}"  # says where by itself
    line = error.__traceback__
    while line.tb_next is not None:
        line = line.tb_next
    what = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {what} ({Path(line.tb_frame.f_code.co_filename).name}, line {line.tb_lineno})"
