"""The chat template: how messages become one text, and which stretches of it the model has to learn.

This is the only place where a prompt is built. The template is a Jinja program in the dialect of Hugging Face, so one
saved here renders the same in `transformers`, and a template that came with a public checkpoint renders here. Such a
template is somebody else's program: it runs in Jinja's sandbox, without a way to Python's internals.

A message is `{"role": "system" | "user" | "assistant", "content": str}`; an assistant's with `"weight": 0` is not to be
learned.

Tools are text here, in the words of Hermes and Qwen: their list ends the system message, a call is
`<tool_call>…</tool_call>` in the assistant's words, and a result `<tool_response>…</tool_response>` in the user's. So
every template can say them, and a model learns to write calls like any other answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from command_line import UserError

Message = Mapping[str, Any]  # "role" and "content"
ROLES = ("system", "user", "assistant")

# The assistant's turn brings its own heading, so that a prompt (the turns so far + the heading) is a prefix of the
# conversation in which the answer has been given.
DEFAULT_CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- message['content'] + '\\n' -}}
    {%- elif message['role'] == 'user' -%}
        {{- '### 指令:' + message['content'] + '\\n' -}}
    {%- else -%}
        {{- '### 响应:' + message['content'] + eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '### 响应:' -}}
{%- endif -%}
"""


# Marks of turns that are special tokens, which no text of a user can write; the format of Qwen and many others
CHATML_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
CHATML_SPECIAL_TOKENS = ("<s>", "<pad>", "<|im_end|>", "<unk>", "<|im_start|>")  # the third one ends texts and answers
TEMPLATES = ("plain", "chatml")

TOOLS_TEXT = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def tools_text(tools: Sequence[object]) -> str:
    """What the system message says of tools: their JSON signatures, one a line, and how to call one."""
    return TOOLS_TEXT.format(signatures="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


def tool_call_text(name: str, arguments: object) -> str:
    """What the assistant writes to call a tool."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def tool_response_text(content: str) -> str:
    """What a tool returned, as the user's turn says it."""
    return f"<tool_response>\n{content}\n</tool_response>"


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered conversation.

    Attributes:
        pieces: `(text, is_special)` in order; a special piece is a special token that the template put there, text
            that merely looks like one (in a message) is an ordinary piece.
        is_answer: whether the assistant wrote it and a model is to learn to produce it.
    """

    pieces: list[tuple[str, bool]]
    is_answer: bool


def check_messages(messages: Sequence[Message], roles: Sequence[str] = ROLES) -> None:
    """Raise a `UserError` unless `messages` is a list of at least one well-formed message of these roles."""
    if not messages:
        raise UserError("the conversation is empty; give at least one message")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise UserError(f'message {number} has no text; it must be like {{"role": "user", "content": "…"}}')
        if message.get("role") not in roles:
            raise UserError(f"message {number} has the role {message.get('role')!r}; it must be {', '.join(roles)}")


class ChatTemplate:
    """A compiled Jinja chat template.

    Args:
        source: the template.
        variables: what it may use besides `messages` and `add_generation_prompt`, e.g. `{"eos_token": "</s>"}`.

    Raises:
        UserError: the template is not valid Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, str | None]):
        self.source = source
        self._variables = {name: value for name, value in variables.items() if value is not None}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{self} is not valid Jinja ({error}); mend it in the tokenizer's folder") from None

    def __str__(self) -> str:
        return f"the chat template {self.source.strip()[:60]!r}…"

    @property
    def knows_tools(self) -> bool:
        """Whether the template itself says tools, calls and results; to others they are text, see above."""
        return re.search(r"\btools\b", self.source) is not None

    def marks(self, special_tokens: Sequence[str]) -> list[str]:
        """The plain text with which turns begin, where no special token stands between one turn and the next.

        A user who writes it opens a turn; marks that have special tokens cannot be written.
        """
        contents = [f"\ue000{number}\ue001" for number in range(4)]
        roles = ("system", "user", "assistant", "user")
        try:
            text = self.render([{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)], True)
        except UserError:  # no system message, or something else that a foreign template does not take
            text = self.render([{"role": r, "content": c} for r, c in zip(roles[1:], contents[1:], strict=True)], True)
        between = re.split("\ue000[0-9]\ue001", text)
        special = _any_of(special_tokens)
        found = {piece.strip(): None for piece in between if piece.strip() and not special.search(piece)}
        return list(found)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as one text; with `add_generation_prompt`, up to where the assistant's answer begins.

        Args:
            tools: for a template that `knows_tools`.

        Raises:
            UserError: the template rejects the messages, fails, or reaches for what the sandbox forbids.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                documents=None,
                **self._variables,
            )
        except Exception as error:  # a template is a foreign program: whatever it raises is the template's mistake
            raise UserError(f"{self} cannot render these messages ({error}); change the messages or it") from None

    def segments(
        self,
        messages: Sequence[Message],
        special_tokens: Sequence[str],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Segment]:
        """The rendered conversation, cut where an answer begins and where it ends.

        Tokenizing each segment by itself makes the ids of a prompt an exact prefix of the ids of the conversation
        that goes on from it: no token can straddle the border.

        Raises:
            UserError: the template renders earlier turns differently once later ones follow, so that no prefix can be
                found to learn an answer from. A prompt needs none, and is then a single segment.
        """
        (messages, tools), restore = _guard_special_text((messages, tools), special_tokens, self.source)
        end = self.render(messages, add_generation_prompt, tools)
        texts, done = [], ""
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self.render(messages[:index], True, tools)
                turn = self.render(messages[: index + 1], False, tools)
                if not (prompt.startswith(done) and turn.startswith(prompt) and end.startswith(turn)):
                    if add_generation_prompt:
                        texts, done = [], ""
                        break
                    raise UserError(
                        f"{self} is not prefix-consistent: message {index + 1} renders differently at the end of a "
                        "conversation and inside it; train on one answer a conversation or use another template"
                    )
                texts += [(prompt[len(done) :], False), (turn[len(prompt) :], message.get("weight") != 0)]
                done = turn
        texts.append((end[len(done) :], False))

        special = _any_of(special_tokens)
        segments = []
        for text, is_answer in texts:
            pieces, position = [], 0
            for match in special.finditer(text):
                pieces += [(restore(text[position : match.start()]), False), (match.group(), True)]
                position = match.end()
            pieces.append((restore(text[position:]), False))
            segments.append(Segment([piece for piece in pieces if piece[0]], is_answer))
        return segments


def _any_of(strings: Sequence[str]) -> re.Pattern[str]:
    """Finds each of the strings, the longest one where several begin; of none of them, nothing."""
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or r"(?!)")


def _guard_special_text(
    content: Any, special_tokens: Sequence[str], template: str
) -> tuple[Any, Callable[[str], str]]:
    """Replace special-token strings inside all strings of messages and tools by placeholders, and return the function
    that puts them back.

    After rendering, a special-token string can then only be one that the template itself wrote.
    """
    taken = set(template)
    _each_string(content, taken.update)
    mark = next(char for char in map(chr, range(0xE000, 0xF900)) if char not in taken)  # of the private-use area
    names, special = list(special_tokens), _any_of(special_tokens)

    def guard(text: str) -> str:
        return special.sub(lambda match: f"{mark}{names.index(match.group())}{mark}", text)

    def restore(text: str) -> str:
        return re.sub(f"{mark}([0-9]+){mark}", lambda match: names[int(match.group(1))], text)

    return _each_string(content, guard), restore


def _each_string(value: Any, change: Callable[[str], Any]) -> Any:
    """The same value, with `change` made to every string in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _each_string(item, change) for key, item in value.items()}
    return [_each_string(item, change) for item in value] if isinstance(value, (list, tuple)) else value


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, with which some templates mark answers; here it only passes through."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as Hugging Face sets it up for chat templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: object) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)  # Jinja's own escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
