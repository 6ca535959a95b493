"""Instruction and preference records in the shapes that people have, read into one shape.

Instruction data (JSON list or JSONL):

    {"instruction", "input"?, "response"}                              this project's own
    {"instruction", "input"?, "output"}                                Alpaca
    {"conversations" | "messages": [{"from" | "role", "value" | "content"}, …], "system"?}     ShareGPT / OpenAI

Preference data:

    {"instruction", "input"?, "chosen", "rejected", "margin"?}
    {"conversations" | "messages": […], "chosen": {…}, "rejected": {…}, "margin"?}     LLaMA-Factory
    {"instruction", "input"?, "responses": [best, …, worst]}

The one shape inside is a list of messages `{"role": "system" | "user" | "assistant", "content": str}`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from command_line import UserError
from text.chat_template import ROLES, Message
from text.text_files import iter_records

ROLE_OF = {**{role: role for role in ROLES}, "human": "user", "gpt": "assistant", "bot": "assistant"}


def _text(record: dict, field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        state = "is missing" if field not in record else "is empty" if isinstance(value, str) else "is not a text"
        raise UserError(f'{where}: the field "{field}" {state}; it must be a non-empty string')
    return value


def _optional_text(record: dict, field: str, where: str) -> str:
    value = record.get(field)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return _text(record, field, where)


def _message(turn: object, where: str, default_role: str | None = None) -> Message:
    if isinstance(turn, str) and default_role:
        turn = {"role": default_role, "content": turn}
    if not isinstance(turn, dict):
        raise UserError(f'{where} is not an object like {{"role": "user", "content": "…"}}; mend it')
    role = turn.get("role", turn.get("from", default_role))  # OpenAI's name of the field, or ShareGPT's
    if not isinstance(role, str) or role not in ROLE_OF:
        raise UserError(f"{where} has the role {role!r}; it must be one of {', '.join(ROLE_OF)}")
    return {"role": ROLE_OF[role], "content": _text(turn, "value" if "value" in turn else "content", where)}


def _answer(turn: object, where: str) -> Message:
    message = _message(turn, where, "assistant")
    if message["role"] != "assistant":
        raise UserError(f"{where} is a {message['role']} message; an answer is the assistant's")
    return message


def _prompt(record: dict, where: str) -> list[Message]:
    """The messages of a record, without the answer where the answer stands in a field of its own."""
    field = next((name for name in ("conversations", "messages") if name in record), None)
    messages: list[Message] = []
    if system := _optional_text(record, "system", where):
        messages.append({"role": "system", "content": system})
    if field is None:
        text = _text(record, "instruction", where)
        if addition := _optional_text(record, "input", where):
            text += "\n" + addition
        return [*messages, {"role": "user", "content": text}]
    if not isinstance(record[field], list) or not record[field]:
        raise UserError(f'{where}: the field "{field}" must be a list of at least one turn')
    turns = [_message(turn, f"turn {number} of {where}") for number, turn in enumerate(record[field], start=1)]
    return messages + turns


def parse_prompt(record: dict, where: str) -> list[Message]:
    """The messages of a record up to the user's last turn, without the answer that may follow it.

    Raises:
        UserError: which record, and which field is missing or wrong.
    """
    messages = _prompt(record, where)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where} has no user's turn to answer; a prompt must end with one")
    return messages


def parse_conversation(record: dict, where: str) -> list[Message]:
    """One instruction record as messages that end with an answer.

    Raises:
        UserError: which record, and which field is missing or wrong.
    """
    messages = _prompt(record, where)
    if messages[-1]["role"] == "user":
        field = "output" if "output" in record and "response" not in record else "response"
        messages.append({"role": "assistant", "content": _text(record, field, where)})
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where} ends with a {messages[-1]['role']} message; the last one must be the assistant's")
    return messages


def load_conversations(path: str | Path) -> list[list[Message]]:
    """All conversations of a file or folder.

    Raises:
        UserError: the file cannot be read, or a record is malformed.
    """
    return [parse_conversation(record, where) for where, record in iter_records(path)]


def parse_preference(record: dict, where: str) -> dict[str, Any]:
    """One preference record as `{"prompt": messages, "answers": [best, …, worst] messages, "margin": float}`.

    The margin says by how much the chosen answer is better, in units of the reward; 0 where the record does not say.

    Raises:
        UserError: which record, and which field is missing or wrong.
    """
    prompt = _prompt(record, where)
    if prompt[-1]["role"] == "assistant":
        raise UserError(f"{where} ends with an assistant message before its answers; it must end with the user's")
    margin = record.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise UserError(f'{where}: the field "margin" must be a number, not {margin!r}')
    if "responses" in record:
        turns = record["responses"]
        if not isinstance(turns, list) or len(turns) < 2:
            raise UserError(f'{where}: the field "responses" must list at least two answers, the best one first')
        if margin:
            raise UserError(f'{where}: a "margin" is for "chosen" and "rejected", not for a list of "responses"')
        answers = [_answer(turn, f'answer {number} in "responses" of {where}') for number, turn in enumerate(turns, 1)]
        return {"prompt": prompt, "answers": answers, "margin": 0.0}
    answers = []
    for side in ("chosen", "rejected"):
        if side not in record:
            raise UserError(f'{where}: the field "{side}" is missing; a preference has "chosen" and "rejected"')
        answers.append(_answer(record[side], f'the field "{side}" of {where}'))
    return {"prompt": prompt, "answers": answers, "margin": float(margin)}


def load_preferences(path: str | Path) -> list[dict[str, Any]]:
    """All preferences of a file or folder.

    Raises:
        UserError: the file cannot be read, or a record is malformed.
    """
    return [parse_preference(record, where) for where, record in iter_records(path)]
