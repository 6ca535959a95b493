"""Answers of a given form: whatever a random model writes, it parses and is valid, also where room is short."""

import json
import random
import re

import jsonschema_rs
import pytest
import torch

from command_line import UserError
from inference.engine import Engine
from inference.sampling import SamplingParams
from inference.service.structured import MAX_FORM_CHARACTERS, form_tokenizer, grammar_form, json_form, regex_form

FRIEND = {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"of": {"$ref": "#/$defs/friend"}}}]}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["猫", "dog", 3, None]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        "friend": {"$ref": "#/$defs/friend"},
    },
    "required": ["name", "age", "kind", "friend"],
    "additionalProperties": False,
    "$defs": {"friend": FRIEND},
}
SCHEMAS = {
    "object": {"type": "object"},
    "person": PERSON,
    "list": {"type": "array", "items": PERSON, "minItems": 2, "$defs": {"friend": FRIEND}},
    "number": {"type": "number"},
    "text": {"type": "string"},
    "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]+$"},
    "anything": {},
}


@pytest.fixture(scope="module")
def engine(random_model, tokenizer):
    """An engine with a random model, which without a form writes nothing that has one."""
    model = random_model("modern", vocab_size=tokenizer.vocab_size + 5, max_seq_len=1024)
    return Engine(model, tokenizer, max_running=16)


def judge(schema, text):
    """Valid by another library; JSON has numbers that are beyond a float."""
    jsonschema_rs.validate(schema, json.loads(text, parse_float=lambda number: max(-1e300, min(1e300, float(number)))))


def answers(engine, form, max_tokens, n=6, **settings):
    params = SamplingParams(max_tokens, form=form, n=n, **{"seed": 3, **settings})
    return engine.run([[5, 6, 7]], params)


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("spare", [0, 3, 200])
def test_json_is_valid_however_short_the_room(engine, tokenizer, name, spare):
    form = json_form(tokenizer, SCHEMAS[name])
    room = len(form.shortest) + 1 + spare
    for answer in answers(engine, form, room):
        assert answer.finish_reason == "stop" and len(answer.token_ids) <= room
        judge(SCHEMAS[name], answer.text)
    with pytest.raises(UserError, match=f"at least {len(form.shortest) + 1} tokens"):
        form.require_room(len(form.shortest))


@pytest.mark.parametrize("regex", [r"[0-9]{4}-[0-9]{2}", r"(ja|nein)+!", r"[\u4e00-\u9fff]{3,}", r"a*b"])
def test_regular_expressions_are_matched_as_a_whole(engine, tokenizer, regex):
    for answer in answers(engine, regex_form(tokenizer, regex), 40):
        assert answer.finish_reason == "stop" and re.fullmatch(regex, answer.text)


def test_grammars_are_followed(engine, tokenizer):
    form = grammar_form(tokenizer, 'start: "(" start ")" | "x" ("+" "x")*')
    for answer in answers(engine, form, 60):
        assert re.fullmatch(r"\(*x(\+x)*\)*", answer.text) and answer.text.count("(") == answer.text.count(")")


def test_whoever_stands_beside_it_and_whatever_is_banned_changes_nothing(engine, tokenizer):
    form = json_form(tokenizer, PERSON)
    alone = answers(engine, form, 120)
    free = SamplingParams(30, seed=1)
    together = engine.run([[5, 6, 7], [8, 9]], [SamplingParams(120, form=form, n=6, seed=3), free])
    assert [answer.text for answer in together[:6]] == [answer.text for answer in alone]
    assert together[6].text == engine.run([[8, 9]], free)[0].text
    everything = tuple(range(tokenizer.vocab_size + 4))
    for answer in answers(engine, form, 120, banned_tokens=everything, temperature=0, n=1, repetition_penalty=2):
        judge(PERSON, answer.text)


def test_the_shortest_way_is_a_whole_answer(tokenizer):
    for schema in SCHEMAS.values():
        text = tokenizer.decode(json_form(tokenizer, schema).shortest)
        judge(schema, text)


@pytest.mark.parametrize(
    ("make", "form", "expected"),
    [
        (json_form, {"type": "nonsense"}, "not valid: Invalid type: nonsense"),
        (regex_form, "(ab|c[d", "not valid"),
        (regex_form, "x" * (MAX_FORM_CHARACTERS + 1), "at most"),
        (grammar_form, "start: nothing", "not valid"),
        (grammar_form, "", "not valid"),
    ],
)
def test_forms_that_are_none_are_refused_in_one_sentence(tokenizer, make, form, expected):
    with pytest.raises(UserError, match=expected) as refused:
        make(tokenizer, form)
    assert "\n" not in str(refused.value)


def test_the_masks_allow_what_parses_and_nothing_else(tokenizer):
    """Token by token along texts of the form; a random other token is refused by the parser, if it is masked."""
    form, rng = json_form(tokenizer, PERSON), random.Random(0)
    text = '{"name":"巴黎","age":42,"kind":"猫","friend":{"of":null}}'
    state = form.begin(1000)
    ids = tokenizer.encode(text, add_special_tokens=False)["input_ids"]
    for token in ids:
        scores = torch.zeros(tokenizer.vocab_size)
        state.restrict(scores)
        assert scores[token] == 0
        other = rng.randrange(tokenizer.vocab_size)
        taken = state.matcher.deep_copy().try_consume_tokens([other])
        assert taken == (scores[other] == 0) or other == tokenizer.eos_token_id
        state.accept(token)
    scores = torch.zeros(tokenizer.vocab_size)
    state.restrict(scores)
    assert scores.argmax() == tokenizer.eos_token_id
    assert form_tokenizer(tokenizer) is form.tokenizer
