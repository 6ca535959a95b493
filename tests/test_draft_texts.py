"""Drafts from texts: what mostly followed there, the same tokens as without, and any kind of file that texts are in."""

import json
from collections import Counter

import numpy as np
import pytest
from fixed_cost import speculating
from plain_generation import CONTEXT, GREEDY, PROMPTS, tokens_of

from checkpoint import save_checkpoint
from command_line import UserError, parse_config
from inference import draft_texts, kv_cache_infer
from inference.chat import ChatConfig
from inference.draft_model import SpeculationOptions
from inference.draft_texts import LONGEST, UNSURE, FollowerTable, TextLookup, read_texts
from inference.engine import Engine
from inference.quantizer import prepare_for_inference
from inference.service.settings import ServiceSettings


def counted(texts, ids):
    """What a table should say, by counting: the longest run that stands in the texts decides."""
    for length in range(min(LONGEST, len(ids)), 0, -1):
        run, followers = list(ids[-length:]), Counter()
        for text in texts:
            followers.update(text[at + length] for at in range(len(text) - length) if text[at : at + length] == run)
        if followers:
            token_id, count = followers.most_common(1)[0]
            return token_id if 2 * count > followers.total() else UNSURE
    return UNSURE


def test_the_longest_run_of_the_texts_decides():
    """Against counting, with few different tokens, so that runs of every length repeat; texts are not joined."""
    generator = np.random.default_rng(0)
    period = generator.integers(4, size=40).tolist()
    texts = [generator.integers(4, size=size).tolist() for size in (0, 1, 2, 30, 200)]
    texts += [period * 3, [60_000, 3, 60_000]]
    table = FollowerTable(texts)
    places = [text[: at + 1] for text in texts for at in range(len(text))]
    others = [generator.integers(5, size=size).tolist() for size in range(1, 40)]
    for ids in [*places, *others, [9], []]:
        assert table.next_token(ids) == counted(texts, ids), ids
    assert len({table.next_token(ids) for ids in places}) > 4  # sure and unsure


def test_runs_that_say_nothing_new_take_no_memory():
    assert len(FollowerTable([list(range(1000))]).follower) == 999  # each token alone says what follows
    assert not FollowerTable([]).follower and not FollowerTable([[], [7]]).follower


@pytest.mark.parametrize("weights", [None, "int8"])
def test_tokens_are_those_without_and_come_in_fewer_passes(random_model, weights):
    model = random_model("modern", max_seq_len=CONTEXT)
    model = prepare_for_inference(model, weights) if weights else model
    alone = Engine(model, None, max_running=3)
    expected = tokens_of(alone.run(PROMPTS, GREEDY))
    table = FollowerTable([[*prompt, *answer] for prompt, answer in zip(PROMPTS, expected, strict=True)])
    engine = speculating(model, TextLookup(table), max_running=3)
    assert tokens_of(engine.run(PROMPTS, GREEDY)) == expected
    statistics = engine.statistics()
    assert statistics.tokens_accepted > 0.8 * statistics.tokens_drafted > 0
    assert statistics.steps < 0.5 * alone.statistics().steps


def test_a_draft_ends_where_the_texts_know_no_more():
    request = type("Request", (), {"context": [1, 2, 3]})()
    lookup = TextLookup(FollowerTable([[1, 2, 3, 4, 5], [8, 9], [8, 7]]))
    assert lookup.propose([(request, 9), (request, 1)]) == [[4, 5], [4]]
    request.context = [8]
    assert lookup.propose([(request, 9)]) == [[]]


def test_texts_of_every_kind_are_read(tmp_path, tokenizer):
    (tmp_path / "lines.txt").write_text("one two\nthree\n")
    (tmp_path / "records.jsonl").write_text('{"text": "one two"}\n')
    conversation = {"instruction": "What is one?", "response": "one two"}
    (tmp_path / "talk.json").write_text(json.dumps([conversation]))
    lines = read_texts([str(tmp_path / "lines.txt")], tokenizer)
    assert [tokenizer.decode(ids) for ids in lines] == ["one two", "three"] and lines[0][-1] == tokenizer.eos_token_id
    assert read_texts([str(tmp_path / "records.jsonl")], tokenizer) == lines[:1]
    messages = [{"role": "user", "content": "What is one?"}, {"role": "assistant", "content": "one two"}]
    talk = read_texts([str(tmp_path / "talk.json"), str(tmp_path / "lines")], tokenizer)
    assert talk == [tokenizer.encode_chat(messages)["input_ids"], *lines]


def test_more_text_than_is_good_is_refused(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "lines.txt").write_text("one two\n" * 5)
    monkeypatch.setattr(draft_texts, "MOST_TOKENS", 10)
    with pytest.raises(UserError, match="lines.txt: of more than 10 tokens; give fewer texts"):
        read_texts([str(tmp_path / "lines.txt")], tokenizer)


@pytest.mark.parametrize(
    ("settings", "others", "complaint"),
    [
        (SpeculationOptions, ["--draft_model", "a.pth"], "--draft_texts and --draft_model do not go together"),
        (ServiceSettings, ["--speculate", "lookup"], "--speculate and --draft_texts do not go together"),
        (ChatConfig, ["--url", "http://localhost:1"], "--url and --draft_texts do not go together; the service"),
        (kv_cache_infer.GenerationConfig, ["--prompt", "a", "--num_beams", "2"], "num_beams and draft_texts do not go"),
    ],
)
def test_one_way_of_drafting_is_chosen(settings, others, complaint):
    with pytest.raises(UserError, match=complaint):
        parsed = parse_config(settings, ["--draft_texts", "a.txt", *others], description="")
        raise UserError("; ".join(parsed.speculation_complaints()))  # of options alone, which nothing else checks


def test_the_command_line_writes_the_same_with_drafts_from_texts(tmp_path, capsys, random_model, tokenizer):
    model = random_model("modern", vocab_size=len(tokenizer), max_seq_len=CONTEXT)
    path = str(tmp_path / "model.pth")
    save_checkpoint(path, model_state=model.state_dict(), config=model.config, tokenizer=tokenizer, stage="sft")
    options = ["--model_path", path, "--prompt", "abc", "--max_gen_len", "30", "--temperature", "0"]
    kv_cache_infer.main(options)
    answer = capsys.readouterr().out.splitlines()[0]
    (tmp_path / "texts.txt").write_text("abc\n")
    kv_cache_infer.main([*options, "--draft_texts", str(tmp_path / "texts.txt")])
    assert capsys.readouterr().out.splitlines()[0] == answer
    with pytest.raises(UserError, match="there is no data at .*missing"):
        kv_cache_infer.main([*options, "--draft_texts", str(tmp_path / "missing.txt")])
