"""Fields and turns of published records, checked and read: each turn becomes a message, see chat_template.py.

ShareGPT's {"from", "value"} and OpenAI's {"role", "content"}, with tool calls and what tools returned, with reasoning
and with a weight; HH-RLHF's whole conversation in one text. What a model of text cannot take in is refused.
"""

from __future__ import annotations

import json
import re
from typing import Any

from command_line import UserError
from text.account import LeftOut
from text.chat_template import ROLES, Message, tool_call_text, tool_response_text

ROLE_OF = {
    **{role: role for role in ROLES},
    **{"developer": "system", "human": "user", "gpt": "assistant", "bot": "assistant", "function_call": "assistant"},
    **dict.fromkeys(("tool", "function", "observation"), "user"),  # what a tool returned
}
TOOL_ROLES = ("tool", "function", "observation")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
PLACEHOLDER = re.compile(r"\A\s*<(image|video|audio)>|<(image|video|audio)>\s*\Z")  # not one that a text is about
SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


# ------------------------------------------------------------------------------------------------------------- fields


def what_it_has(record: dict) -> str:
    """What fields a record has, for messages."""
    return f"it has {', '.join(map(str, record)) or 'no field at all'}"


def required_text(record: dict, field: str, where: str, remedy: str = "") -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        state = "is missing" if field not in record else "is empty" if isinstance(value, str) else "is not a text"
        raise UserError(f'{where}: the field "{field}" {state}; {remedy or "it must be a non-empty string"}')
    return value


def optional_text(record: dict, fields: tuple[str, ...], where: str) -> str:
    for field in fields:
        value = record.get(field)
        if value is not None and not (isinstance(value, str) and not value.strip()):
            return required_text(record, field, where)
    return ""


def first_of(fields: tuple[str, ...], record: dict) -> str | None:
    """The first of the fields that the record has a value in, or else the first that it has at all."""
    there = [field for field in fields if field in record]
    return next((field for field in there if record[field] not in (None, "")), there[0] if there else None)


def refuse_media(record: dict, where: str) -> None:
    for field in MEDIA:
        if record.get(field):
            raise UserError(f'{where} has "{field}", which a model of text cannot take in; leave such records out')


def parsed_json(value: object, what: str) -> object:
    """A value that may be JSON in a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise UserError(f"{what} is not valid JSON; mend it") from None


# -------------------------------------------------------------------------------------------------------------- turns


def content_of(turn: dict, field: str, where: str) -> str:
    """The text of a turn; OpenAI's list of parts is joined where all of them are text."""
    value = turn.get(field)
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.get("type", "text") != "text":
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise UserError(f"{where} has a part of type {kind}, not text; leave such records out")
        turn = {field: "".join(required_text(part, "text", where) for part in value)}
    text = required_text(turn, field, where)
    if match := PLACEHOLDER.search(text):
        kind = match[1] or match[2]
        raise UserError(
            f"{where} stands beside an {kind} (<{kind}>), which a model of text cannot take in; leave such records out"
        )
    return text


def _calls(turn: dict, where: str) -> list[str]:
    """The tool calls of a turn as text: OpenAI's "tool_calls" or older "function_call"."""
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if not isinstance(calls, list):
        raise UserError(f'{where}: "tool_calls" must be a list')
    return [_call(call, where) for call in calls]


def _call(call: object, where: str) -> str:
    call = parsed_json(call, f"the tool call of {where}")
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UserError(f'{where} has a tool call without a name; it must be like {{"name": "…", "arguments": {{…}}}}')
    arguments = parsed_json(call.get("arguments") or {}, f"the arguments of a tool call of {where}")
    return tool_call_text(call["name"], arguments)


def message_of(turn: object, where: str, default_role: str | None = None) -> dict[str, Any]:
    if isinstance(turn, str) and default_role:
        turn = {"role": default_role, "content": turn}
    if not isinstance(turn, dict):
        raise UserError(f'{where} is not an object like {{"role": "user", "content": "…"}}; mend it')
    refuse_media(turn, where)
    role = turn.get("role", turn.get("from", default_role))  # OpenAI's name of the field, or ShareGPT's
    if not isinstance(role, str) or role not in ROLE_OF:
        raise UserError(f"{where} has the role {role!r}; it must be one of {', '.join(ROLE_OF)}")
    field = "value" if "value" in turn else "content"
    calls = _calls(turn, where)
    if role == "function_call":  # ShareGPT with tools: the turn is one call, or a list of them, in JSON
        made = parsed_json(turn.get(field), f"the tool call of {where}")
        content = "\n".join(_call(call, where) for call in (made if isinstance(made, list) else [made]))
    elif calls:
        said = [content_of(turn, field, where)] if turn.get(field) else []
        content = "\n".join([*said, *calls])
    else:
        content = content_of(turn, field, where)
    if role in TOOL_ROLES:
        content = tool_response_text(content)
    if thoughts := optional_text(turn, ("reasoning_content",), where):  # as Qwen3 and DeepSeek-R1 write them
        content = f"<think>\n{thoughts.strip()}\n</think>\n\n{content}"
    message = {"role": ROLE_OF[role], "content": content}
    if _weight(turn, where) == 0 and message["role"] == "assistant":
        message["weight"] = 0
    return message


def _weight(turn: dict, where: str) -> int:
    """Whether a turn is to be learned, 1 or 0: OpenAI's "weight", or ms-swift's "loss"."""
    field = "weight" if "weight" in turn else "loss"
    weight = turn.get(field)
    if weight not in (None, 0, 1):
        raise UserError(f'{where}: the field "{field}" is {weight!r}; an answer counts (1) or does not (0)')
    return 1 if weight is None else int(weight)


def messages_of(value: object, what: str, where: str, default_role: str | None = None) -> list[dict[str, Any]]:
    """The messages of a list of turns; what several tools returned, one after another, is one turn, as Qwen has it."""
    if not isinstance(value, list) or not value:
        raise UserError(f'{where}: the field "{what}" must be a list of at least one turn')
    messages: list[dict[str, Any]] = []
    from_tool = False
    for number, turn in enumerate(value, start=1):
        message = message_of(turn, f"turn {number} of {where}", default_role if isinstance(turn, dict) else None)
        is_tool = isinstance(turn, dict) and turn.get("role", turn.get("from")) in TOOL_ROLES
        if is_tool and from_tool:
            messages[-1]["content"] += "\n" + message["content"]
        else:
            messages.append(message)
        from_tool = is_tool
    return messages


def messages_of_transcript(text: str, where: str) -> list[Message]:
    """HH-RLHF's "\\n\\nHuman: …\\n\\nAssistant: …" as messages."""
    starts = [match for match in SPEAKER.finditer(text) if match.start() == 0 or match.group().startswith("\n\n")]
    if not starts or starts[0].start() != 0:
        raise UserError(f'{where} does not begin with "Human: "; it must be like "\\n\\nHuman: …\\n\\nAssistant: …"')
    messages = []
    for match, following in zip(starts, [*starts[1:], None], strict=True):
        content = text[match.end() : following.start() if following else len(text)].strip()
        if not content:
            raise LeftOut(f"{where} has a turn without words; leave it out", "a turn without words")
        messages.append({"role": "user" if match[1] == "Human" else "assistant", "content": content})
    return messages


def is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.lstrip("\n").startswith("Human:") and "\n\nAssistant:" in value
