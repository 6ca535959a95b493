"""Ollama's Modelfile: the chat template in Go's terms, and where an answer ends.

Ollama does not run the Jinja template that lies in a GGUF file. It wants the same in Go's `text/template`; where the
two differ, the model reads prompts that it was not trained with. Any program cannot be translated into another, so the
Jinja template is looked at from outside: it renders conversations of known words, and what it puts around each message
is read off the result. The outcome is rendered again and compared, on conversations of all kinds; where it differs,
there is no Go template, and the reason is said.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError

Messages = list[dict[str, str]]
LONGEST_CONTEXT = 8192  # for which Ollama allocates memory at once
WORDS = {"system": "SYSTEMWORD", "user": "USERWORD", "assistant": "ANSWERWORD"}


@dataclass
class TurnTemplate:
    """A template that puts something before and after each message, by its role.

    Attributes:
        around: role → what stands before a message of this role and after it.
        opening: what stands before everything, such as the token that begins a text.
        default_system: what stands there in place of a system message.
        prompt: what invites an answer.
    """

    around: dict[str, tuple[str, str]]
    opening: str
    default_system: str
    prompt: str

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """What the Go template renders, see `in_go`."""
        has_system = any(message["role"] == "system" for message in messages)
        text = self.opening + ("" if has_system else self.default_system)
        for message in messages:
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + (self.prompt if add_generation_prompt else "")

    def in_go(self) -> str:
        """The same in Go's `text/template`; all text stands in quotes, so that no blank counts that is none of it."""
        parts = []  # the opening is llama.cpp's to add
        if self.default_system:
            parts.append("{{ if not .System }}" + _said(self.default_system) + "{{ end }}")
        parts.append("{{ range .Messages }}")
        for number, (role, (before, after)) in enumerate(self.around.items()):
            condition = f'{"else if" if number else "if"} eq .Role "{role}"'
            parts.append("{{ " + condition + " }}" + _said(before) + "{{ .Content }}" + _said(after))
        return "".join([*parts, "{{ end }}{{ end }}", _said(self.prompt)])


def _said(text: str) -> str:
    """A Go string, which has JSON's escapes."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def turn_template(tokenizer: ByteLevelBPETokenizer) -> TurnTemplate:
    """A tokenizer's chat template as one that treats each message by its role alone.

    Raises:
        UserError: it is none.
    """
    system, user, answer = ({"role": role, "content": content} for role, content in WORDS.items())
    render = tokenizer.render_chat
    try:
        before_first, after_user = render([user]).split(WORDS["user"])
        before, between, after_answer = _cut(render([user, answer]), WORDS["user"], WORDS["assistant"])
        before_second = _cut(render([user, answer, user]), WORDS["assistant"], WORDS["user"])[1]
        to_system, system_to_user, _ = _cut(render([system, user]), WORDS["system"], WORDS["user"])
    except ValueError:
        raise UserError("it does not put each message into a conversation as it is, and once") from None
    before_user = before_second.removeprefix(after_answer)
    opening = bos_string(tokenizer) if adds_bos(tokenizer, True) else ""
    found = TurnTemplate(
        around={
            "system": (to_system.removeprefix(opening), system_to_user.removesuffix(before_user)),
            "user": (before_user, after_user),
            "assistant": (between.removeprefix(after_user), after_answer),
        },
        opening=opening,
        default_system=before_first.removesuffix(before_user).removeprefix(opening),
        prompt=render([user], True).removeprefix(render([user])),
    )
    for messages in probes():
        for ask in (False, True):
            if found.render(messages, ask) != render(messages, ask):
                roles = ", ".join(message["role"] for message in messages)
                raise UserError(f"it does more than to put something around each message, as in one of {roles}")
    return found


def bos_string(tokenizer: ByteLevelBPETokenizer) -> str:
    """The token before a text, or nothing."""
    return "" if tokenizer.bos_token_id is None else tokenizer.decode([tokenizer.bos_token_id], False)


def _cut(text: str, first: str, second: str) -> tuple[str, str, str]:
    """What stands before, between and after two words."""
    before, _, rest = text.partition(first)
    between, found, after = rest.partition(second)
    if not found or second in after:
        raise ValueError("another number of words")
    return before, between, after


def probes(edge: str = "") -> list[Messages]:
    """Conversations to try a template with.

    Args:
        edge: what stands before and after each message's words.
    """
    words = ["Hello", "two\n\nlines", "{{ braces }} <b>'q\"</b>", "法国的首都是哪里？", "def f(x):\n    return x"]
    kinds = ["u", "ua", "uau", "uauau", "su", "sua", "suau", "suauau"]
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [
        [
            {"role": roles[letter], "content": edge + words[(place + start) % len(words)] + edge}
            for place, letter in enumerate(kind)
        ]
        for start, kind in enumerate(kinds)
    ]


def modelfile(
    gguf_name: str, tokenizer: ByteLevelBPETokenizer, context: int, is_chat_model: bool
) -> tuple[str, list[str]]:
    """The Modelfile of a GGUF file beside it; and what is to be said of it, a sentence each."""
    lines, notes = [f"FROM ./{gguf_name}"], []
    if is_chat_model:
        try:
            template = turn_template(tokenizer)
        except UserError as error:
            notes.append(
                f"the Modelfile has no TEMPLATE, because the chat template cannot be said in Ollama's terms: {error}; "
                "Ollama then takes one of its own, so compare its prompts, or use llama.cpp's server with --jinja"
            )
        else:
            lines.append(f'TEMPLATE """{template.in_go()}"""')
            if any(template.render(each) != tokenizer.render_chat(each) for each in probes(edge=" ")):
                notes.append("the chat template trims blanks around messages, which Ollama's cannot")
    else:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    for index in tokenizer.end_token_ids:
        lines.append(f"PARAMETER stop {json.dumps(tokenizer.decode([index], False), ensure_ascii=False)}")
    names = {"repetition_penalty": "repeat_penalty"}
    for name, value in tokenizer.generation_defaults.items():
        lines.append(f"PARAMETER {names.get(name, name)} {value:g}")
    lines.append(f"PARAMETER num_ctx {min(context, LONGEST_CONTEXT)}")
    return "\n".join(lines) + "\n", notes


def adds_bos(tokenizer: ByteLevelBPETokenizer, is_chat_model: bool) -> bool:
    """Whether llama.cpp is to put the first token before what it is given: if the tokenizer does so with a text, and a
    conversation begins with it, too; the Modelfile then leaves it out."""
    if not is_chat_model or not tokenizer.prefix_ids:
        return bool(tokenizer.prefix_ids)
    return tokenizer.render_chat([{"role": "user", "content": WORDS["user"]}]).startswith(bos_string(tokenizer))
