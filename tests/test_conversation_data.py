"""Every shape of instruction and preference data becomes the same messages; a wrong record is named with its field."""

import json
import math
import re
from pathlib import Path

import pytest
import record_shapes

from command_line import UserError
from text.account import CALLED_BAD, MALFORMED, Account
from text.conversation_data import (
    load_conversations,
    load_preferences,
    parse_columns,
    parse_conversation,
    parse_preference,
    parse_prompt,
    parse_unpaired,
    with_columns,
)

ROOT = Path(__file__).resolve().parent.parent
USER, ASSISTANT = {"role": "user", "content": "法国的首都?"}, {"role": "assistant", "content": "巴黎。"}
SYSTEM = {"role": "system", "content": "Be brief."}
MULTI_TURN = [
    SYSTEM,
    USER,
    ASSISTANT,
    {"role": "user", "content": "And Italy?"},
    {"role": "assistant", "content": "Rome."},
]


def sharegpt(messages):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


# ------------------------------------------------------------------------------------------------------- instructions


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "法国的首都?", "response": "巴黎。"},
        {"instruction": "法国的首都?", "output": "巴黎。"},
        {"instruction": "法国的首都?", "input": "", "output": "巴黎。", "history": []},
        {"instruction": "法国的首都?", "input": None, "response": "巴黎。", "skill": "countries"},
        {"instruction": "法国的首都?", "system": "", "response": "巴黎。"},
        {"messages": [USER, ASSISTANT]},
        {"conversations": [USER, ASSISTANT]},
        {"conversations": sharegpt([USER, ASSISTANT])},
        {"messages": sharegpt([USER, ASSISTANT])},
        {"messages": [USER], "response": "巴黎。"},
        {"conversations": [USER], "output": "巴黎。"},
        {"conversations": [USER, {"from": "bot", "value": "巴黎。"}], "id": 7},
    ],
)
def test_every_shape_of_instruction_is_the_same_conversation(record):
    assert parse_conversation(record, "record 1") == [USER, ASSISTANT]


def test_an_input_stands_below_its_instruction():
    record = {"instruction": "Sort these.", "input": "3, 1, 2", "output": "1, 2, 3"}
    assert parse_conversation(record, "record 1")[0] == {"role": "user", "content": "Sort these.\n3, 1, 2"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": MULTI_TURN},
        {"conversations": sharegpt(MULTI_TURN)},
        {"conversations": sharegpt(MULTI_TURN[1:]), "system": "Be brief."},
    ],
)
def test_turns_and_system_messages_are_kept(record):
    assert parse_conversation(record, "record 1") == MULTI_TURN


def test_a_system_field_goes_with_an_instruction():
    record = {"system": "Be brief.", "instruction": "法国的首都?", "response": "巴黎。"}
    assert parse_conversation(record, "record 1") == [SYSTEM, USER, ASSISTANT]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({}, 'the field "instruction" is missing'),
        ({"text": "x", "reply": "y"}, 'the field "instruction" is missing; it has text, reply; if one of them is the'),
        ({"instruction": "x"}, 'the field "response" is missing'),
        ({"instruction": "x", "response": ""}, 'the field "response" is empty'),
        ({"instruction": " \n", "response": "y"}, 'the field "instruction" is empty'),
        ({"instruction": "x", "output": None}, 'the field "output" is not a text'),
        ({"instruction": 3, "response": "y"}, 'the field "instruction" is not a text'),
        ({"instruction": "x", "input": 3, "response": "y"}, 'the field "input" is not a text'),
        ({"instruction": "x", "system": ["be brief"], "response": "y"}, 'the field "system" is not a text'),
        ({"messages": []}, 'the field "messages" must be a list of at least one turn'),
        ({"conversations": "hello"}, 'the field "conversations" must be a list of at least one turn'),
        ({"messages": [USER]}, "RECORD ends with the user's turn; add the assistant's answer"),
        ({"messages": [USER, "Paris"]}, "turn 2 of RECORD is not an object"),
        ({"messages": [{"role": "teacher", "content": "x"}, ASSISTANT]}, "turn 1 of RECORD has the role 'teacher'"),
        ({"messages": [{"role": ["user"], "content": "x"}, ASSISTANT]}, "turn 1 of RECORD has the role"),
        ({"messages": [{"content": "x"}, ASSISTANT]}, "turn 1 of RECORD has the role None"),
        ({"messages": [USER, {"role": "assistant"}]}, 'turn 2 of RECORD: the field "content" is missing'),
        ({"conversations": [{"from": "human", "value": 3}]}, 'turn 1 of RECORD: the field "value" is not a text'),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, 'turn 2 of RECORD: the field "content" is empty'),
        ({"messages": [USER, ASSISTANT, SYSTEM]}, "RECORD ends with a system message"),
    ],
)
def test_a_wrong_instruction_names_record_and_field(record, complaint):
    with pytest.raises(UserError) as caught:
        parse_conversation(record, "RECORD")
    assert "RECORD" in str(caught.value)
    assert complaint in str(caught.value)


# -------------------------------------------------------------------------------------------------------- preferences


GOOD, BAD = ASSISTANT, {"role": "assistant", "content": "不知道。"}


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "法国的首都?", "chosen": "巴黎。", "rejected": "不知道。"},
        {"instruction": "法国的首都?", "input": "", "chosen": GOOD, "rejected": BAD},
        {"conversations": sharegpt([USER]), "chosen": sharegpt([GOOD])[0], "rejected": sharegpt([BAD])[0]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"instruction": "法国的首都?", "responses": ["巴黎。", "不知道。"]},
        {"messages": [USER], "responses": [GOOD, BAD]},
    ],
)
def test_every_shape_of_preference_is_the_same_pair(record):
    assert parse_preference(record, "record 1") == {"prompt": [USER], "answers": [GOOD, BAD], "margin": 0.0}


def test_a_conversation_before_the_two_answers_is_their_prompt():
    record = {"system": "Be brief.", "conversations": sharegpt(MULTI_TURN[1:4]), "chosen": "Rome.", "rejected": "No."}
    assert parse_preference(record, "record 1")["prompt"] == MULTI_TURN[:4]


def test_a_ranking_keeps_its_order_and_a_pair_its_margin():
    ranking = parse_preference({"instruction": "x", "responses": ["best", "good", "poor", "worst"]}, "record 1")
    assert [answer["content"] for answer in ranking["answers"]] == ["best", "good", "poor", "worst"]
    pair = parse_preference({"instruction": "x", "chosen": "a", "rejected": "b", "margin": 2}, "record 1")
    assert pair["margin"] == 2.0


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"chosen": "a", "rejected": "b"}, 'the field "instruction" is missing'),
        ({"instruction": "x", "rejected": "b"}, 'the field "chosen" is missing'),
        ({"instruction": "x", "chosen": "a"}, 'the field "rejected" is missing'),
        ({"instruction": "x", "chosen": "a", "rejected": ""}, 'the field "rejected" of RECORD'),
        ({"instruction": "x", "chosen": ["a"], "rejected": "b"}, 'the field "chosen" of RECORD'),
        ({"instruction": "x", "chosen": USER, "rejected": BAD}, 'the field "chosen" of RECORD is a user message'),
        ({"messages": [USER, GOOD], "chosen": GOOD, "rejected": BAD}, "RECORD ends with an assistant message"),
        ({"messages": [], "chosen": GOOD, "rejected": BAD}, 'the field "messages" must be a list'),
        ({"instruction": "x", "responses": ["only one"]}, 'the field "responses" must list at least two answers'),
        ({"instruction": "x", "responses": "abc"}, 'the field "responses" must list at least two answers'),
        ({"instruction": "x", "responses": ["a", 3]}, 'answer 2 in "responses" of RECORD'),
        ({"instruction": "x", "chosen": "a", "rejected": "b", "margin": "big"}, 'RECORD: the field "margin" must be'),
        ({"instruction": "x", "chosen": "a", "rejected": "b", "margin": math.inf}, 'the field "margin" must be'),
        ({"instruction": "x", "responses": ["a", "b"], "margin": 1}, 'a "margin" is for "chosen" and "rejected"'),
    ],
)
def test_a_wrong_preference_names_record_and_field(record, complaint):
    with pytest.raises(UserError) as caught:
        parse_preference(record, "RECORD")
    assert "RECORD" in str(caught.value)
    assert complaint in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_files_of_mixed_shapes_are_read_in_order(ending, tmp_path):
    records = [
        {"instruction": "法国的首都?", "response": "巴黎。"},
        {"messages": MULTI_TURN},
        {"instruction": "法国的首都?", "output": "巴黎。"},
    ]
    path = tmp_path / f"data.{ending}"
    path.write_text(json.dumps(records) if ending == "json" else "\n".join(map(json.dumps, records)))
    assert load_conversations(path) == [[USER, ASSISTANT], MULTI_TURN, [USER, ASSISTANT]]


def test_a_mistake_in_a_file_is_named_by_record_and_file(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(
        json.dumps([{"instruction": "x", "response": "y", "chosen": "y", "rejected": "z"}] * 2 + [{"instruction": "x"}])
    )
    with pytest.raises(UserError, match=r'record 3 of .*data\.json: the field "response" is missing'):
        load_conversations(path)
    with pytest.raises(UserError, match=r'record 3 of .*data\.json: the field "chosen" is missing'):
        load_preferences(path)


def test_the_committed_sample_data_is_in_order():
    """What comes with the project reads without a complaint, and every conversation is a question and an answer."""
    for name in ("sft_data", "sft_test"):
        conversations = load_conversations(ROOT / "data" / "sft" / f"{name}.json")
        assert len(conversations) >= 100
        assert all([m["role"] for m in c] == ["user", "assistant"] for c in conversations)
    preferences = load_preferences(ROOT / "data" / "sft" / "rlhf_pairwise.json")
    assert all(chosen != rejected for chosen, rejected in (preference["answers"] for preference in preferences))


# ------------------------------------------------------------------------------------------------- published shapes


QUESTION, RIGHT, WRONG = next(record_shapes.facts(1))


@pytest.mark.parametrize("shape", record_shapes.INSTRUCTIONS)
def test_every_published_shape_of_instruction_is_read(shape):
    """Question and answer are found, earlier turns and system messages are there, and nothing else is."""
    messages = parse_conversation(record_shapes.records(shape, 1)[0], "record 1")
    roles = [message["role"] for message in messages]
    asks = {"alpaca": f"Answer.\n{QUESTION}", "dolly": f"{QUESTION}\nCapitals."}.get(shape, QUESTION)
    answers = f"It is {RIGHT}\n#### {RIGHT}" if shape == "gsm8k" else RIGHT
    assert asks in [message["content"] for message in messages if message["role"] == "user"]
    assert messages[-1] == {"role": "assistant", "content": answers}
    expected = {
        "alpaca": ["user", "assistant"] * 2,
        "sharegpt": ["system", *["user", "assistant"] * 2],
        "orca": ["system", "user", "assistant"],
        "weighted": ["user", "assistant"] * 2,
        **dict.fromkeys(("sharegpt_tools", "openai_tools"), ["system", *["user", "assistant"] * 2]),
    }
    assert roles == expected.get(shape, ["user", "assistant"])


@pytest.mark.parametrize("shape", ["sharegpt_tools", "openai_tools"])
def test_tools_are_said_in_text(shape):
    """The signatures end the system message; a call is the assistant's, its result the user's, as Hermes has it."""
    system, _, call, result, _ = parse_conversation(record_shapes.records(shape, 1)[0], "record 1")
    assert re.search(r'<tools>\n.*"name": "weather".*\n</tools>', system["content"])
    expected = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert call == {"role": "assistant", "content": expected}
    assert result == {"role": "user", "content": "<tool_response>\n18 °C\n</tool_response>"}


def test_results_of_several_tools_are_one_turn():
    messages = [USER, {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, ASSISTANT]
    _, results, _ = parse_conversation({"messages": messages}, "record 1")
    assert results["content"].count("<tool_response>") == 2


@pytest.mark.parametrize("shape", record_shapes.PREFERENCES)
def test_every_published_shape_of_preference_is_read(shape):
    preference = parse_preference(record_shapes.records(shape, 1)[0], "record 1")
    assert preference["prompt"][-1] == {"role": "user", "content": QUESTION}
    assert len(preference["prompt"]) == (3 if shape == "hh_rlhf" else 1)
    assert preference["answers"][0]["content"] == RIGHT
    assert WRONG in [answer["content"] for answer in preference["answers"][1:]]
    assert preference.get("scores") == {"scored": [9.0, 2.0, 2.0], "ultrafeedback": [9.0, 3.5]}.get(shape)
    good, bad = parse_unpaired(record_shapes.records(shape, 1)[0], "record 1")
    assert (good["good"], bad["good"], good["answer"]["content"]) == (True, False, RIGHT)
    assert parse_prompt(record_shapes.records(shape, 1)[0], "record 1") == preference["prompt"]


@pytest.mark.parametrize("shape", record_shapes.UNPAIRED)
def test_an_answer_that_is_called_bad_is_not_imitated(shape, tmp_path):
    """With an account it is left out and counted, without one it is refused by its number."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps(record_shapes.records(shape, 4)))
    account = Account(str(path))
    assert len(load_conversations(path, account)) == 2
    assert (account.read, account.left_out) == (4, {CALLED_BAD: 2})
    with pytest.raises(UserError, match="record 2 of .* has an answer that is called bad"):
        load_conversations(path)


def test_fields_of_other_names_are_read_as_they_are_called():
    record = {"query": "法国的首都?", "reply": "巴黎。", "instruction": "an id", "n": 1}
    columns = parse_columns("instruction=query,response=reply")
    assert parse_conversation(with_columns(record, columns, "record 1"), "record 1") == [USER, ASSISTANT]
    for wrong in ("instruction", "answers=reply", "response="):
        with pytest.raises(UserError, match="--columns"):
            parse_columns(wrong)
    with pytest.raises(UserError, match="record 1 has none of the fields q, a of --columns; it has query, reply"):
        with_columns(record, {"instruction": "q", "response": "a"}, "record 1")


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"instruction": "x", "output": "y", "history": [["a"]]}, 'RECORD: pair 1 of "history" must be two texts'),
        ({"instruction": "x", "output": "y", "history": "a"}, 'RECORD: the field "history" must be a list of pairs'),
        ({"instruction": "<image>What is it?", "output": "y"}, "RECORD stands beside an image"),
        ({"instruction": "x", "output": "y", "images": ["a.png"]}, 'RECORD has "images", which a model of text cannot'),
        ({"messages": [USER, ASSISTANT], "videos": ["a.mp4"]}, 'RECORD has "videos"'),
        ({"conversations": [{"from": "human", "value": "Look.\n<audio>"}, ASSISTANT]}, "turn 1 of RECORD stands"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]}, "has a part of type image"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, 'turn 2 of RECORD: the field "weight" is 0.5'),
        ({"messages": [USER, ASSISTANT], "tools": "{"}, 'the field "tools" of RECORD is not valid JSON'),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "turn 2 of RECORD has a tool call without"),
        ({"instruction": "x", "chosen": "y", "rejected": "z"}, "RECORD is a preference, not an instruction"),
    ],
)
def test_fields_that_cannot_be_honoured_are_refused(record, complaint):
    with pytest.raises(UserError) as caught:
        parse_conversation(record, "RECORD")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"instruction": "x", "images": ["a.png"], "chosen": "a", "rejected": "b"}, 'RECORD has "images"'),
        ({"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: ho\n\nAssistant: b"}, "differ before"),
        ({"chosen": "\n\nHuman: hi\n\nAssistant: ", "rejected": "\n\nHuman: hi\n\nAssistant: b"}, "without words"),
        ({"instruction": "x", "responses": ["a", "b"], "scores": [1]}, 'the field "scores" must list a number'),
        ({"instruction": "x", "completions": [{"response": "a"}, {"response": "b"}]}, "the score of an answer must be"),
    ],
)
def test_preferences_that_cannot_be_honoured_are_refused(record, complaint):
    with pytest.raises(UserError) as caught:
        parse_preference(record, "RECORD")
    assert complaint in str(caught.value)


def test_a_text_about_a_tag_is_no_picture():
    record = {"instruction": "What does the <image> element of SVG do?", "output": "It shows <image> files."}
    assert len(parse_conversation(record, "record 1")) == 2


def test_malformed_records_are_left_out_on_request(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"instruction": "x", "output": "y"}\n{"instruction": ""}\n{"messages": []}\n')
    account = Account(str(path), skips_bad_records=True, bad_records_file=tmp_path / "bad.jsonl")
    assert len(load_conversations(path, account)) == 1
    assert account.left_out == {MALFORMED: 2} and "record 2 of" in account.sentences()[1]
    kept = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [json.loads(record["text"]) for record in kept] == [{"instruction": ""}, {"messages": []}]
    assert "must be a list of at least one turn" in kept[1]["why"]


def test_lines_that_are_no_records_are_left_out_on_request_too(tmp_path):
    good = json.dumps({"instruction": "问", "response": "答"}).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good, b"broken", b"[1]", b'{"instruction": "a\xff", "response": "b"}', good]))
    account = Account("a", skips_bad_records=True, bad_records_file=tmp_path / "bad.jsonl")
    assert len(load_conversations(path, account)) == 2
    assert account.read == 5 and account.left_out == {MALFORMED: 3}
    kept = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [entry["text"][:6] for entry in kept] == ["broken", '{"inst', "[1]"]
    assert "record 4 of" in kept[1]["why"] and "is not UTF-8" in kept[1]["why"]
    with pytest.raises(UserError, match="is not UTF-8 text .*byte 0xff at place 19 in line 4"):
        load_conversations(path)


def test_files_of_all_shapes_and_kinds_are_read(tmp_path):
    """Lists, JSONL under either name, CSV and parquet."""
    record_shapes.write_all(tmp_path, 4)
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, record_shapes.records("plain", 4))))
    paths = sorted(path for path in tmp_path.iterdir() if path.suffix != ".txt")
    assert {path.suffix for path in paths} == {".json", ".jsonl", ".csv", ".parquet"}
    for path in paths:
        load = load_preferences if path.stem in record_shapes.PREFERENCES else load_conversations
        assert len(load(path, Account(str(path)))) == (2 if path.stem in record_shapes.UNPAIRED else 4), path.name


# ----------------------------------------------------------------------------------------------------------- unpaired


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "法国的首都?", "completion": "巴黎。", "label": ...},
        {"prompt": [USER], "completion": [ASSISTANT], "label": ...},
        {"messages": [USER, ASSISTANT], "label": ...},
        {"messages": [USER, ASSISTANT], "kto_tag": ...},
        {"conversations": sharegpt([USER, ASSISTANT]), "kto_tag": ...},
        {"instruction": "法国的首都?", "input": "", "output": "巴黎。", "kto_tag": ...},
    ],
)
def test_every_shape_of_unpaired_record_is_the_same_answer(record, good):
    record = {name: good if value is ... else value for name, value in record.items()}
    assert parse_unpaired(record, "record 1") == [{"prompt": [USER], "answer": ASSISTANT, "good": good}]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "法国的首都?", "chosen": "巴黎。", "rejected": "不知道。"},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"instruction": "法国的首都?", "responses": ["巴黎。", "Paris?", "不知道。"]},
    ],
)
def test_a_preference_is_a_good_and_a_bad_answer(record):
    good, bad = parse_unpaired(record, "record 1")
    assert good == {"prompt": [USER], "answer": GOOD, "good": True}
    assert bad == {"prompt": [USER], "answer": BAD, "good": False}


def test_earlier_turns_are_the_prompt():
    record = {"prompt": MULTI_TURN[:-1], "completion": MULTI_TURN[-1:], "label": True}
    assert parse_unpaired(record, "record 1") == parse_unpaired({"messages": MULTI_TURN, "label": True}, "record 1")
    assert parse_unpaired(record, "record 1")[0]["prompt"] == MULTI_TURN[:-1]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"prompt": "x", "completion": "y"}, 'the field "label" is missing; it says whether the answer is good'),
        ({"prompt": "x", "completion": "y", "label": "yes"}, "the field \"label\" must be true or false, not 'yes'"),
        ({"prompt": "x", "completion": "y", "kto_tag": 1}, 'the field "kto_tag" must be true or false, not 1'),
        ({"prompt": "x", "completion": "", "label": True}, 'the field "completion" is empty'),
        ({"completion": "y", "label": True}, 'the field "instruction" is missing'),
        ({"prompt": [USER], "completion": [USER], "label": True}, "RECORD"),
        ({"prompt": [{"role": "x"}], "completion": "y", "label": True}, "of RECORD has the role 'x'"),
        ({"messages": [ASSISTANT], "label": True}, "RECORD is an answer alone; a prompt must stand before it"),
    ],
)
def test_a_wrong_unpaired_record_names_record_and_field(record, complaint):
    with pytest.raises(UserError) as caught:
        parse_unpaired(record, "RECORD")
    assert "RECORD" in str(caught.value)
    assert complaint in str(caught.value)
