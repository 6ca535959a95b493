"""`python -m text.inspect`: what a file is taken for, what of it is learned, and what would be lost."""

import json

import pytest
import record_shapes

from command_line import UserError
from text.inspect import histogram, kind_of, main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A file of every shape, and no tokenizer: lengths are in bytes."""
    monkeypatch.chdir(tmp_path)
    record_shapes.write_all(".", 4)
    return tmp_path


def test_every_shape_is_known_by_its_kind(folder):
    kinds = {**dict.fromkeys(record_shapes.INSTRUCTIONS, "instructions"), "text": "text", "table": "instructions",
             **dict.fromkeys(record_shapes.PREFERENCES, "preferences"), "questions": "instructions",
             **dict.fromkeys(record_shapes.UNPAIRED, "unpaired")}  # fmt: skip
    assert {path.stem: kind_of(path)[0] for path in folder.iterdir()} == kinds
    names = {path.stem: next(iter(kind_of(path)[1])) for path in folder.iterdir()}
    assert names["hh_rlhf"] == "HH-RLHF" and names["ultrafeedback"] == "UltraFeedback"
    assert names["openai_tools"] == "OpenAI with tools" and names["alpaca"] == "instruction, output with history"
    assert names["trl_implicit"] == "TRL, implicit prompt" and names["llama_factory"] == "LLaMA-Factory"


def test_examples_show_what_is_learned_and_where_it_is_cut(folder, capsys):
    main(["plain.json", "--max_seq_len", "34", "--examples", "1"])
    said = capsys.readouterr().out
    assert "plain.json: instructions: 4 × instruction, response\nfor --mode sft" in said
    assert "### 响应:⟦" in said and said.count("✂") == 1
    assert "within 34 tokens:\nplain.json: 4 conversations read; " in said
    assert "of the answers' 32 tokens lost" in said


def test_both_answers_of_a_preference_are_shown(folder, capsys):
    main(["hh_rlhf.json", "--examples", "1"])
    said = capsys.readouterr().out
    assert "better:" in said and "⟦巴黎.</s>⟧" in said and "⟦罗马.</s>⟧" in said
    assert said.count("⟦") == 2, "the earlier answer is not judged"


@pytest.mark.parametrize("name", ["kto.json", "text.txt", "table.csv", "questions.parquet"])
def test_other_kinds_of_files_are_shown_too(folder, name, capsys):
    main([name])
    assert "example 3" in capsys.readouterr().out


def test_an_unknown_shape_is_named_with_its_fields(folder):
    (folder / "x.json").write_text(json.dumps([{"query": "a", "reply": "b"}]))
    with pytest.raises(UserError, match="record 1 of x.json has none of the shapes .* .it has query, reply"):
        main(["x.json"])
    main(["x.json", "--columns", "instruction=query,response=reply"])


def test_bars_have_the_length_of_their_counts():
    lines = histogram([1, 1, 1, 1, 19, 20], limit=15).splitlines()
    assert lines[0].count("█") == 40 and lines[-1].count("█") == 20
    assert [line.endswith("beyond the limit") for line in (lines[0], lines[-1])] == [False, True]
