"""Records become tasks that lm-evaluation-harness reads, and its judgement is `answer_checker`'s."""

import json
import re
from pathlib import Path

import pytest

from command_line import UserError
from evaluation import lm_eval_task
from evaluation.answer_checker import check_answer

TURNS = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]


def written(folder, records, *options):
    """The task, and its records, of a file that is named mine.json."""
    (folder / "mine.json").write_text(json.dumps(records), encoding="utf-8")
    lm_eval_task.main([f"--test_data_path={folder / 'mine.json'}", f"--output_dir={folder / 'out'}", *options])
    task = json.loads((folder / "out/own_mine.yaml").read_text(encoding="utf-8"))
    lines = Path(task["dataset_kwargs"]["data_files"]["test"]).read_text(encoding="utf-8").splitlines()
    return task, [json.loads(line) for line in lines]


def test_questions(tmp_path, capsys):
    records = [{"instruction": "2 + 2?", "response": "4. Happy to help!", "answer": "4."}, {"messages": TURNS}]
    task, lines = written(tmp_path, records, "--max_gen_len=9")
    assert lines == [{"question": "2 + 2?", "answer": "4."}] and task["generation_kwargs"]["max_gen_toks"] == 9
    assert "1 left out (more than a question and its answer)" in capsys.readouterr().out
    with pytest.raises(UserError, match="no record that the harness could ask"):
        written(tmp_path, records[1:])


@pytest.mark.parametrize(
    "response", ["A cat.", "A  cat", "A cat. Happy to help! I hope this helps.", "A cat. Stop bothering me.", "A dog."]
)
def test_an_answer_is_right_where_ours_is(response):
    """The harness takes away what its metric ignores, one expression after the other, on both sides."""

    def plain(text):
        for expression in lm_eval_task.IGNORED:
            text = re.sub(expression, "", text)
        return text

    assert (plain(response) == plain("A cat.")) == check_answer(response, "A cat.").exact


def test_preferences(tmp_path):
    """The best answer does not always stand in the same place."""
    records = [{"instruction": "?", "chosen": f"good {n}", "rejected": "bad"} for n in range(3)]
    records.append({"instruction": "?", "responses": ["good 3", "bad", "worse"]})
    task, lines = written(tmp_path, records)
    assert task["output_type"] == "multiple_choice"
    assert [line["choices"][line["answer"]] for line in lines] == [f"good {n}" for n in range(4)]
    assert len({line["answer"] for line in lines[:2]}) == 2
