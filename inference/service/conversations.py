"""From a client's messages and tools to what the chat template takes, and from what a model writes to calls of tools.

A template that knows tools (Qwen's, Llama's) gets them as they are. To every other one they are text, in the words of
Hermes (text/chat_template.py). Calls are recognised in both formats that public models write: Hermes' and Qwen's
`<tool_call>{"name": …, "arguments": …}</tool_call>`, anywhere in an answer; and Llama 3's, where the whole answer is
`{"name": …, "parameters": …}`, or several with `;` between them.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError
from inference.service.requests import ChatMessage, Tool
from text.chat_template import tool_call_text, tool_response_text, tools_text

BEGIN, END = "<tool_call>", "</tool_call>"
WHOLE_ANSWER_CALL = re.compile(r"\s*(<\|python_tag\|>|\{)")  # how Llama 3 begins one
MAY_BECOME_ONE = re.compile(r"\s*(<(\|(p(y(t(h(o(n(_(t(a(g(\|)?)?)?)?)?)?)?)?)?)?)?)?)?$")


@dataclass(frozen=True)
class Conversation:
    """What a client sent: its messages, and the tools that the model may call."""

    messages: list[ChatMessage]
    tools: list[Tool] = field(default_factory=list)

    def ids(self, tokenizer: ByteLevelBPETokenizer, marks: str) -> list[int]:
        """The prompt's token ids, up to where the assistant's answer begins.

        Args:
            marks: the setting `template_marks`: what becomes of text with which a client would open a turn.

        Raises:
            UserError: the template does not take this conversation, or a text holds a mark.
        """
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools]
        if tokenizer.template_knows_tools:
            messages = [_as_it_is(message) for message in self.messages]
        else:
            messages, tools = _as_text(self.messages, tools), None
        for message in messages:
            message["content"] = guarded(message["content"], tokenizer.template_marks, marks)
        return tokenizer.encode_chat(messages, True, tools or None)["input_ids"]


def _as_it_is(message: ChatMessage) -> dict[str, Any]:
    """A message for a template that knows tools; arguments become objects, as templates expect."""
    role = "system" if message.role == "developer" else message.role
    content: dict[str, Any] = {"role": role, "content": message.content or ""}
    if message.tool_calls:
        content["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": _arguments(call)}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        content["tool_call_id"] = message.tool_call_id
    if message.name:
        content["name"] = message.name
    return content


def _as_text(messages: Sequence[ChatMessage], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of the three roles that every template knows."""
    found: list[dict[str, Any]] = []
    for message in messages:
        role, content = message.role, message.content or ""
        if role == "developer":
            role = "system"
        elif role == "tool":
            role, content = "user", tool_response_text(content)
            if found and found[-1].get("results"):  # results of calls that were made together stand together
                found[-1]["content"] += "\n" + content
                continue
        calls = [tool_call_text(call.function.name, _arguments(call)) for call in message.tool_calls or []]
        content = "\n".join(part for part in (content, *calls) if part)
        found.append({"role": role, "content": content, "results": message.role == "tool"})
    if tools:
        said = tools_text(tools)
        if found and found[0]["role"] == "system":
            found[0]["content"] += "\n\n" + said
        else:
            found.insert(0, {"role": "system", "content": said})
    return [{"role": message["role"], "content": message["content"]} for message in found]


def _arguments(call: Any) -> Any:
    try:
        return json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        raise UserError(f"the arguments of the call of {call.function.name} are not JSON") from None


def guarded(text: str, marks: Sequence[str], policy: str) -> str:
    """A client's text, so that it opens no turn of its own.

    Args:
        marks: the plain text with which turns begin.
        policy: the setting `template_marks`.

    Raises:
        UserError: it holds a mark, and the policy is to refuse it.
    """
    for mark in marks:
        if policy != "keep" and mark in text:
            if policy == "refuse":
                raise UserError(f"the text holds {mark!r}, with which the model's template begins a turn; leave it out")
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


# -- calls -------------------------------------------------------------------------------------------------------------


@dataclass
class Spoken:
    """A stretch of an answer: words, or a call as OpenAI's API has it."""

    text: str = ""
    call: dict[str, Any] | None = None


class CallParser:
    """Finds calls in an answer that comes in pieces; words that may be the beginning of a call are held back.

    Args:
        names: of the tools; a call of another one is words.
        at_most_one: leave out further calls.
    """

    def __init__(self, names: Sequence[str], at_most_one: bool = False) -> None:
        self.names, self.at_most_one = set(names), at_most_one
        self.n_calls = 0
        self._held = ""
        self._is_begun = False  # whether anything was let through

    def feed(self, piece: str) -> list[Spoken]:
        """A further piece; returns what is certain now."""
        self._held += piece
        if not self._is_begun and (WHOLE_ANSWER_CALL.match(self._held) or MAY_BECOME_ONE.fullmatch(self._held)):
            return []
        found: list[Spoken] = []
        while (begin := self._held.find(BEGIN)) >= 0 and (end := self._held.find(END, begin)) >= 0:
            end += len(END)
            words, text, self._held = self._held[:begin], self._held[begin:end], self._held[end:]
            call = self._call(text[len(BEGIN) : -len(END)])
            found += self._words(words + text) if call is None else [*self._words(words.rstrip()), *call]
        safe = len(self._held[:begin].rstrip()) if begin >= 0 else len(self._held) - self._undecided()
        found += self._words(self._held[:safe])
        self._held = self._held[safe:]
        return found

    def finish(self) -> list[Spoken]:
        """What was held back at the end of the answer."""
        text, self._held = self._held, ""
        if not self._is_begun and WHOLE_ANSWER_CALL.match(text) and (calls := self._whole_answer(text)):
            return calls
        return self._words(text)

    def _undecided(self) -> int:
        """How many characters at the end may be the beginning of a call, or space before one."""
        stripped = self._held.rstrip()
        for length in range(min(len(BEGIN) - 1, len(stripped)), 0, -1):
            if BEGIN.startswith(stripped[-length:]):
                return len(self._held) - len(stripped[:-length].rstrip())
        return len(self._held) - len(stripped)

    def _words(self, text: str) -> list[Spoken]:
        if not text or (self.n_calls and not text.strip()):
            return []
        self._is_begun = True
        return [Spoken(text)]

    def _call(self, text: str) -> list[Spoken] | None:
        """A call, or nothing where it is one too many; None if it is no call."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return None
        arguments = content.get("arguments", content.get("parameters")) if isinstance(content, dict) else None
        if not isinstance(arguments, dict) or content.get("name") not in self.names:
            return None
        self._is_begun = True
        self.n_calls += 1
        if self.at_most_one and self.n_calls > 1:
            return []
        function = {"name": content["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
        return [Spoken(call={"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function})]

    def _whole_answer(self, text: str) -> list[Spoken] | None:
        text, decoder, found = text.strip().removeprefix("<|python_tag|>").strip(), json.JSONDecoder(), []
        while text:
            try:
                _, end = decoder.raw_decode(text)
            except (ValueError, RecursionError):
                return None
            call = self._call(text[:end])
            if call is None:
                return None
            found += call
            text = text[end:].strip().removeprefix(";").strip()
        return found


def call_grammar(tools: Sequence[Tool]) -> str:
    """A grammar of answers that are one call of one of these tools, in Hermes' format."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": tool.function.parameters or {}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    for call in calls:  # the arguments are an object, also where the schema leaves that open
        call["properties"]["arguments"] = {"type": "object", **call["properties"]["arguments"]}
    schema = json.dumps({"anyOf": calls, "x-guidance": {"whitespace_flexible": False}})
    return f'start: "{BEGIN}\\n" call "\\n{END}"\ncall: %json {schema}\n'
