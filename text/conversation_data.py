"""Instruction and preference records in the shapes that people have, read into one shape.

Instruction data (JSON list or JSONL):

    {"instruction", "input"?, "response"}                              this project's own
    {"instruction", "input"?, "output", "history"?}                    Alpaca; Dolly has "context" for "input"
    {"conversations" | "messages": [{"from" | "role", "value" | "content"}, …], "system"?, "tools"?}    ShareGPT, OpenAI
    {"prompt": text or […], "completion": text or […]}                 TRL
    {"question", "answer"}                                             GSM8K; OpenOrca has "system_prompt", "response"

Preference data:

    {"instruction", "input"?, "chosen", "rejected", "margin"?}
    {"conversations" | "messages": […], "chosen": {…}, "rejected": {…}, "margin"?}     LLaMA-Factory
    {"prompt": text or […], "chosen": text or […], "rejected": text or […]}            TRL
    {"chosen": […], "rejected": […]}                                   TRL, implicit prompt: the turns that both share
    {"chosen": "\\n\\nHuman: … \\n\\nAssistant: …", "rejected": …}         HH-RLHF
    {"instruction", "input"?, "responses": [best, …, worst]}, or with "scores": [number, …] in any order
    {"instruction", "completions": [{"response", "overall_score"}, …]}                 UltraFeedback

Unpaired data, answers that are good or bad:

    any shape of instruction data with "label" (TRL) or "kto_tag" (LLaMA-Factory): true | false
    any preference: its best answer is good, its worst one bad

Records with fields of other names are read with `columns`, such as `instruction=query,response=reply`. Fields that
change what a record means are honoured or refused, never ignored: earlier turns, tools, a label "bad", a weight of 0;
images, videos and sounds, which a model of text cannot take in, are refused.

The one shape inside is a list of messages, see chat_template.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from command_line import UserError, option
from text.account import CALLED_BAD, MALFORMED, Account, LeftOut
from text.chat_template import Message, tools_text
from text.text_files import iter_records
from text.turns import (
    content_of,
    first_of,
    is_transcript,
    message_of,
    messages_of,
    messages_of_transcript,
    optional_text,
    parsed_json,
    refuse_media,
    required_text,
    what_it_has,
)

Parsed = TypeVar("Parsed")

CONVERSATION = ("conversations", "messages", "conversation")
QUESTION = ("instruction", "prompt", "question")
ADDITION = ("input", "context")
ANSWER = ("response", "output", "completion", "answer")
SYSTEM = ("system", "system_prompt")
COLUMNS = (*QUESTION, *ADDITION, *ANSWER, *SYSTEM, *CONVERSATION, "history", "tools", "chosen", "rejected", "margin",
           "responses", "scores", "label", "src", "tgt")  # fmt: skip


@dataclass
class RecordOptions:
    """Options of whatever reads records."""

    columns: str = option("", "fields of other names, such as instruction=question,response=answer")
    skip_bad_records: bool = option(
        False, "leave out malformed records and count them; training and evaluation keep them in a file"
    )

    def validate(self) -> list[str]:
        """What is wrong with the settings, a sentence each."""
        others = getattr(super(), "validate", list)  # of the settings that these are a part of
        complaints = others()
        try:
            parse_columns(self.columns)
        except UserError as error:
            complaints.append(str(error))
        return complaints


def parse_columns(text: str) -> dict[str, str]:
    """`--columns` as {our name of a field: its name in the file}.

    Raises:
        UserError: not in that form, or a field that is not read.
    """
    columns = {}
    for pair in filter(None, text.split(",")):
        ours, _, theirs = (part.strip() for part in pair.partition("="))
        if ours not in COLUMNS or not theirs:
            raise UserError(
                f"--columns {pair} must be like instruction=question, with one of {', '.join(COLUMNS)} on the left"
            )
        columns[ours] = theirs
    return columns


def with_columns(record: dict, columns: Mapping[str, str], where: str) -> dict:
    """The record under the names that are read here.

    Raises:
        UserError: none of the columns is in the record.
    """
    found = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
    if columns and not found:
        raise UserError(
            f"{where} has none of the fields {', '.join(columns.values())} of --columns; {what_it_has(record)}"
        )
    # A field that was given a name is that alone, and what stood under this name before is not meant
    return {name: value for name, value in record.items() if name not in columns.values()} | found


# ----------------------------------------------------------------------------------------------------------- the prompt


def _before(record: dict, where: str) -> list[Message]:
    """What stands before a record's question: a system message, with the list of tools, and earlier turns (Alpaca)."""
    system = optional_text(record, SYSTEM, where)
    if listed := record.get("tools") or record.get("functions"):
        tools = parsed_json(listed, f'the field "tools" of {where}')
        if not isinstance(tools, list):
            raise UserError(f'{where}: the field "tools" must be a list of function signatures')
        if tools:
            system = "\n\n".join(filter(None, (system, tools_text(tools))))
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise UserError(f'{where}: the field "history" must be a list of pairs [question, answer]')
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(x, str) and x.strip() for x in pair):
            raise UserError(f'{where}: pair {number} of "history" must be two texts, [question, answer]')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _prompt(record: dict, where: str) -> list[Message]:
    """The messages of a record, without the answer where the answer stands in a field of its own."""
    refuse_media(record, where)
    before = _before(record, where)
    if (field := first_of(CONVERSATION, record)) is not None:
        return _joined(before, messages_of(record[field], field, where))
    field = first_of(QUESTION, record)
    if field is not None and isinstance(record[field], list):  # TRL
        return _joined(before, messages_of(record[field], field, where, "user"))
    addition = optional_text(record, ADDITION, where)
    if field is not None and addition and record[field] in ("", None):
        return [*before, {"role": "user", "content": addition}]
    remedy = "" if field else f"{what_it_has(record)}; if one of them is the question, say --columns instruction=NAME"
    text = content_of(record, field, where) if field else required_text(record, "instruction", where, remedy)
    return [*before, {"role": "user", "content": f"{text}\n{addition}" if addition else text}]


def _joined(before: list[Message], turns: list[Message]) -> list[Message]:
    """One conversation, with one system message at most at its beginning."""
    if before and before[0]["role"] == turns[0]["role"] == "system":
        first = {"role": "system", "content": f"{turns[0]['content']}\n\n{before[0]['content']}"}
        return [first, *before[1:], *turns[1:]]
    if turns[0]["role"] == "system":
        return [turns[0], *before, *turns[1:]]
    return before + turns


# -------------------------------------------------------------------------------------------------------- instructions


def parse_prompt(record: dict, where: str) -> list[Message]:
    """The messages of a record up to the user's last turn, without the answer that may follow it.

    Raises:
        UserError: which record, and which field is missing or wrong.
    """
    if {"chosen", "rejected"} <= record.keys():
        return parse_preference(record, where)["prompt"]
    messages = _prompt(record, where)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where} has no user's turn to answer; a prompt must end with one")
    return messages


def parse_task(record: dict, where: str) -> tuple[list[Message], dict]:
    """A prompt, and the record that a reward function may need."""
    return parse_prompt(record, where), record


def parse_conversation(record: dict, where: str) -> list[Message]:
    """One instruction record as messages that end with an answer.

    Raises:
        LeftOut: its answer is called bad, and not to be imitated.
        UserError: which record, and which field is missing or wrong.
    """
    if record.get("label") is False or record.get("kto_tag") is False:
        sentence = f"{where} has an answer that is called bad, which is nothing to imitate; leave it out, or use KTO"
        raise LeftOut(sentence, CALLED_BAD)
    return _conversation(record, where)


def _conversation(record: dict, where: str) -> list[Message]:
    messages = _prompt(record, where)
    if messages[-1]["role"] == "user":
        messages += _answer_field(record, where)
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where} ends with a {messages[-1]['role']} message; the last one must be the assistant's")
    return messages


def _answer_field(record: dict, where: str) -> list[Message]:
    """The answer that stands in a field of its own."""
    field = first_of(ANSWER, record)
    if field is None:
        if {"chosen", "rejected"} & record.keys() or "completions" in record or "responses" in record:
            raise UserError(f"{where} is a preference, not an instruction with one answer; use it with --mode reward, "
                            "ppo, dpo or kto")  # fmt: skip
        if first_of(CONVERSATION, record):
            raise UserError(f"{where} ends with the user's turn; add the assistant's answer, or leave that turn out")
        remedy = f"{what_it_has(record)}; if one of them is the answer, say --columns response=NAME"
        raise UserError(f'{where}: the field "response" is missing; {remedy}')
    if isinstance(record[field], list):
        return messages_of(record[field], field, where, "assistant")
    return [{"role": "assistant", "content": required_text(record, field, where)}]


# --------------------------------------------------------------------------------------------------------- preferences


def _answer(turn: object, where: str) -> Message:
    message = message_of(turn, where, "assistant")
    if message["role"] != "assistant":
        raise UserError(f"{where} is a {message['role']} message; an answer is the assistant's")
    return message


def parse_preference(record: dict, where: str) -> dict[str, Any]:
    """One preference record as `{"prompt": messages, "answers": [best, …, worst] messages, "margin": float}`.

    The margin says by how much the chosen answer is better, in units of the reward; 0 where the record does not say.
    Answers that were scored stand beside `"scores"`, from the highest down; those of one score are not compared.

    Raises:
        LeftOut: the two conversations of the record differ before their last answers.
        UserError: which record, and which field is missing or wrong.
    """
    margin = record.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise UserError(f'{where}: the field "margin" must be a number, not {margin!r}')
    listed = "responses" if "responses" in record else "completions"
    if listed in record:
        if margin:
            raise UserError(f'{where}: a "margin" is for "chosen" and "rejected", not for a list of "{listed}"')
        return _ranking(record, listed, where)
    sides = []
    for side in ("chosen", "rejected"):
        if side not in record:
            raise UserError(f'{where}: the field "{side}" is missing; a preference has "chosen" and "rejected"')
        sides.append(_side(record, side, where))
    (before, chosen), (other_before, rejected) = sides
    if before != other_before:
        raise LeftOut(
            f"{where} has two conversations that differ before their last answers; leave it out",
            "the two conversations differ before their last answers",
        )
    # Beside whole conversations, what the record has besides (the prompt once more) stands in them already
    prompt = _question(record, where) if before is None else _joined(_before(record, where), before)
    return {"prompt": prompt, "answers": [chosen, rejected], "margin": float(margin)}


def _question(record: dict, where: str) -> list[Message]:
    prompt = _prompt(record, where)
    if prompt[-1]["role"] == "assistant":
        raise UserError(f"{where} ends with an assistant message before its answers; it must end with the user's")
    return prompt


def _side(record: dict, side: str, where: str) -> tuple[list[Message] | None, Message]:
    """The answer of one side of a preference and, where the side is a whole conversation, what stands before it."""
    value, place = record[side], f'the field "{side}" of {where}'
    if is_transcript(value) and first_of((*QUESTION, *CONVERSATION), record) is None:
        turns = messages_of_transcript(value, place)
    elif isinstance(value, list):
        refuse_media(record, where)
        turns = messages_of(value, side, place, "assistant")
    else:
        return None, _answer(value, place)
    if turns[-1]["role"] != "assistant":
        raise UserError(f"{place} ends with a {turns[-1]['role']} message; an answer is the assistant's")
    if len(turns) == 1:
        return None, turns[0]
    if turns[0]["role"] == "assistant":
        raise UserError(f"{place} has {len(turns)} messages; an answer is one message")
    return turns[:-1], turns[-1]


def _ranking(record: dict, field: str, where: str) -> dict[str, Any]:
    """Several answers to one question: the best one first, or with scores."""
    turns = record[field]
    if not isinstance(turns, list) or len(turns) < 2:
        raise UserError(f'{where}: the field "{field}" must list at least two answers, the best one first')
    answers, scores = [], record.get("scores")
    for number, turn in enumerate(turns, 1):
        place = f'answer {number} in "{field}" of {where}'
        if field == "completions":  # UltraFeedback
            if not isinstance(turn, dict):
                raise UserError(f'{place} must be an object like {{"response": "…", "overall_score": 7}}')
            name = first_of((*ANSWER, "content", "text"), turn) or "response"
            turn = {"role": "assistant", "content": required_text(turn, name, place)}
        answers.append(_answer(turn, place))
    if field == "completions" and scores is None:
        score = first_of(("overall_score", "score", "rating"), turns[0]) or "overall_score"
        scores = [turn.get(score) for turn in turns]
    if scores is None:
        return {"prompt": _question(record, where), "answers": answers, "margin": 0.0}
    if not isinstance(scores, list) or len(scores) != len(answers):
        raise UserError(f'{where}: the field "scores" must list a number for each of the {len(answers)} answers')
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise UserError(f"{where}: the score of an answer must be a number, not {score!r}")
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return {
        "prompt": _question(record, where),
        "answers": [answers[index] for index in order],
        "margin": 0.0,
        "scores": [float(scores[index]) for index in order],
    }


# ------------------------------------------------------------------------------------------------------------ unpaired


def parse_unpaired(record: dict, where: str) -> list[dict[str, Any]]:
    """The answers of one record as `{"prompt": messages, "answer": message, "good": bool}`.

    Of a preference these are the best answer, which is good, and the worst one, which is bad; what those between them
    are, a ranking does not say.

    Raises:
        LeftOut: all its answers have the same score; or see `parse_preference`.
        UserError: which record, and which field is missing or wrong.
    """
    field = "kto_tag" if "kto_tag" in record else "label"
    if field not in record:
        if not {"chosen", "rejected", "responses", "completions"} & record.keys():
            raise UserError(f'{where}: the field "label" is missing; it says whether the answer is good, true or false')
        preference = parse_preference(record, where)
        scores = preference.get("scores")
        if scores and scores[0] == scores[-1]:
            raise LeftOut(f"{where} has answers of the same score only; leave it out", "all answers of the same score")
        sides = ((preference["answers"][0], True), (preference["answers"][-1], False))
        return [{"prompt": preference["prompt"], "answer": answer, "good": good} for answer, good in sides]
    if not isinstance(record[field], bool):
        raise UserError(f'{where}: the field "{field}" must be true or false, not {record[field]!r}')
    *prompt, answer = _conversation(record, where)
    if not prompt:
        raise UserError(f"{where} is an answer alone; a prompt must stand before it")
    return [{"prompt": prompt, "answer": answer, "good": record[field]}]


# --------------------------------------------------------------------------------------------------------------- files


def shape_of(record: dict) -> tuple[str, str]:
    """What a record is, "instructions", "preferences", "unpaired" or "" (unknown), and the name of its shape."""
    conversation, question, answer = (first_of(names, record) for names in (CONVERSATION, QUESTION, ANSWER))
    turns = record[conversation] if conversation else None
    first = turns[0] if isinstance(turns, list) and turns else None
    talk = "ShareGPT" if isinstance(first, dict) and "from" in first else "OpenAI"
    if "completions" in record or "responses" in record:
        return "preferences", "UltraFeedback" if "completions" in record else "ranking"
    if {"chosen", "rejected"} <= record.keys():
        if is_transcript(record["chosen"]) and not (question or conversation):
            return "preferences", "HH-RLHF"
        if isinstance(record["chosen"], list):
            return "preferences", "TRL" if question else "TRL, implicit prompt"
        if conversation:
            return "preferences", "LLaMA-Factory"
        return ("preferences", f"{question}, chosen, rejected") if question else ("", "")
    if isinstance(record.get("label"), bool) or isinstance(record.get("kto_tag"), bool):
        return "unpaired", "TRL with label" if "label" in record else "LLaMA-Factory with kto_tag"
    if conversation:
        return "instructions", f"{talk} with tools" if record.get("tools") else talk
    if question and answer:
        return "instructions", f"{question}, {answer}" + (" with history" if record.get("history") else "")
    return "", ""


def load_records(
    path: str | Path,
    parse: Callable[[dict, str], Parsed],
    account: Account | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Parsed]:
    """All records of a file or folder.

    Args:
        parse: one of `parse_…` above.
        account: where records that are left out are counted; without one they are refused.
        columns: see `parse_columns`.

    Raises:
        UserError: the file cannot be read, or a record is malformed.
    """
    parsed = []

    def leave_out(error: UserError, text: str) -> None:
        account.leave_out(MALFORMED)
        account.bad.add(str(error), text)

    def unread(error: UserError, text: str) -> None:
        account.read += 1
        leave_out(error, text)

    skips = account is not None and account.skips_bad_records
    for where, record in iter_records(path, unread if skips else None):
        if account is not None:
            account.read += 1
        try:
            parsed.append(parse(with_columns(record, columns or {}, where), where))
        except LeftOut as left_out:
            if account is None:
                raise
            account.leave_out(left_out.reason)
        except UserError as error:
            if not skips:
                raise
            leave_out(error, json.dumps(record, ensure_ascii=False))
    return parsed


def load_conversations(path: str | Path, account: Account | None = None, **how: Any) -> list[list[Message]]:
    """All conversations of a file or folder, see `load_records`."""
    return load_records(path, parse_conversation, account, **how)


def load_tasks(path: str | Path, account: Account | None = None, **how: Any) -> list[tuple[list[Message], dict]]:
    """All prompts of a file or folder beside their records, see `load_records`."""
    return load_records(path, parse_task, account, **how)


def load_preferences(path: str | Path, account: Account | None = None, **how: Any) -> list[dict[str, Any]]:
    """All preferences of a file or folder, see `load_records`."""
    return load_records(path, parse_preference, account, **how)


def load_unpaired(path: str | Path, account: Account | None = None, **how: Any) -> list[list[dict[str, Any]]]:
    """The answers of each record of a file or folder, see `load_records`."""
    return load_records(path, parse_unpaired, account, **how)
