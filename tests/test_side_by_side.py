"""Two models side by side: judges, both orders, ties, and how certain the win rate is."""

import json

import pytest
import torch

from alignment.reward_model import RewardModel
from checkpoint import save_checkpoint
from command_line import UserError
from evaluation.answer_report import Question
from evaluation.side_by_side import main, outcome_of, program_judge, report_outcomes, reward_judge, verdict

QUESTIONS = [Question([{"role": "user", "content": text}], text, {"answer": text}) for text in ("巴黎。", "Rome.")]
JUDGES = """
def longer(question, first, second, record): return len(first) - len(second)
def first_one(question, first, second, record): return 1
def reads_the_record(question, first, second, record): return (first == record["answer"]) - (second == record["answer"])
def fails(question, first, second, record): return 1 / 0
def says_nan(question, first, second, record): return float("nan")
"""


@pytest.fixture
def judge(tmp_path):
    (tmp_path / "judges.py").write_text(JUDGES, encoding="utf-8")
    return lambda name: program_judge(f"{tmp_path}/judges.py:{name}")


def test_a_program_is_asked_in_both_orders(judge):
    ours, theirs = ["巴黎。", "R"], ["罗马", "Rome."]
    assert judge("longer")(QUESTIONS, ours, theirs) == [(1, 1), (-4, -4)]
    assert judge("reads_the_record")(QUESTIONS, ours, theirs) == [(1, 1), (-1, -1)]
    one_sided = judge("first_one")(QUESTIONS, ours, theirs)
    assert [outcome_of(margins) for margins in one_sided] == [0.5, 0.5], "who favours the first one favours nobody"


@pytest.mark.parametrize(
    ("name", "said"),
    [("fails", "failed: ZeroDivisionError.*judges.py, line 5"), ("says_nan", "said nan"), ("gone", "has no function")],
)
def test_broken_judges_are_named(judge, name, said):
    with pytest.raises(UserError, match=said):
        judge(name)(QUESTIONS, ["a", "b"], ["c", "d"])


def test_ties():
    assert [outcome_of(margins, 0.5) for margins in ((0.4, 0.4), (0.6, 0.6), (-0.6, -0.6), (0.6, 0.4))] == [
        0.5, 1, 0, 0.5,
    ]  # fmt: skip
    assert outcome_of((0.0, 0.0)) == 0.5


def test_a_reward_model_judges_whole_conversations(random_model, tokenizer):
    """Its margin is the difference of the rewards of the two conversations, each computed alone."""
    torch.manual_seed(0)
    model = RewardModel(random_model("modern", vocab_size=tokenizer.vocab_size, max_seq_len=64)).eval()
    ours, theirs = ["巴黎。", "It is Rome."], ["罗马", "Paris"]

    def reward(question, answer):
        ids = tokenizer.encode_chat([*question.prompt, {"role": "assistant", "content": answer}])["input_ids"]
        return model.rewards(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)).item()

    expected = [reward(q, our) - reward(q, their) for q, our, their in zip(QUESTIONS, ours, theirs, strict=True)]
    found = reward_judge(model, tokenizer)(QUESTIONS, ours, theirs)
    assert [first for first, _ in found] == pytest.approx(expected, abs=1e-5)
    assert all(first == second for first, second in found)


def test_report_counts_halves_for_ties():
    outcomes = [1] * 30 + [0.5] * 6 + [0] * 4
    rows = [{"earned": earned, "orders_agree": earned != 0.5, "skill": "a"} for earned in outcomes]
    report = report_outcomes(rows, seed=0)
    scores = report["scores"]
    assert (scores["win_rate"], scores["wins"], scores["ties"], scores["losses"]) == (33 / 40, 0.75, 0.15, 0.1)
    assert scores["orders_differ"] == 0.15 and report["by_skill"]["a"]["win_rate"] == 33 / 40
    low, high = report["intervals"]["win_rate"]
    assert 0.5 < low < 33 / 40 < high and verdict(report) == "the model is better"
    swapped = [{**row, "earned": 1 - row["earned"]} for row in rows]
    assert verdict(report_outcomes(swapped)) == "the other model is better"
    assert verdict(report_outcomes(rows[:1] + rows[-1:])) == "no difference is shown"


@pytest.fixture
def paths(random_model, tokenizer, tmp_path):
    """Two models and a reward model in one folder, and questions."""
    models = {f"{name}.pth": random_model("modern", seed, vocab_size=tokenizer.vocab_size, max_seq_len=64)
              for seed, name in enumerate(("ours", "theirs"))}  # fmt: skip
    models["reward.pth"] = RewardModel(models["ours.pth"])
    for name, model in models.items():
        about = dict(config=model.config, tokenizer=tokenizer, stage="reward" if name == "reward.pth" else "sft")
        save_checkpoint(tmp_path / name, model_state=model.state_dict(), **about)
    records = [{"instruction": f"{a} + 1?", "response": f"{a + 1}", "skill": "sums"} for a in range(6)]
    (tmp_path / "questions.json").write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "judges.py").write_text(JUDGES, encoding="utf-8")
    return tmp_path


ARGUMENTS = ["--model_path", "ours.pth", "--data_path", "questions.json", "--max_gen_len", "8", "--temperature", "1"]


@pytest.mark.parametrize("judged_by", ["judges.py:longer", "reward.pth"])
def test_command_compares_and_repeats(paths, judged_by, monkeypatch, capsys):
    monkeypatch.chdir(paths)
    for output in ("one.json", "two.json"):
        main([*ARGUMENTS, "--other_model", "theirs.pth", "--judge", judged_by, "--output_path", output])
    said = capsys.readouterr().out
    assert "win rate" in said and "6 questions read" in said and "sums" in said
    one, two = (json.loads((paths / name).read_text(encoding="utf-8")) for name in ("one.json", "two.json"))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert len(one["predictions"]) == 6 and one["judge"] == judged_by
    assert "Lost by most" in (paths / "one.html").read_text() or one["scores"]["losses"] == 0


def test_a_model_ties_with_itself(paths, monkeypatch, capsys):
    monkeypatch.chdir(paths)
    main([*ARGUMENTS, "--other_model", "ours.pth", "--judge", "judges.py:longer"])
    assert "win rate 50.0% (50.0% … 50.0%), no difference is shown" in capsys.readouterr().out
    assert (paths / "ours_beside_ours.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--judge gone.py:f", "the file of --judge gone.py does not exist"),
        ("--judge reward", "--judge reward must be a file and a function in it"),
        ("--judge ours.pth", "ours.pth is a sft model"),
        ("--other_model gone.pth", "gone.pth does not exist"),
        ("--other_model reward.pth", "reward.pth is a reward model"),
    ],
)
def test_mistakes_are_said_before_any_work(paths, arguments, said, monkeypatch):
    monkeypatch.chdir(paths)
    monkeypatch.delattr("evaluation.side_by_side.generate_texts")
    with pytest.raises(UserError, match=said):
        main([*ARGUMENTS, "--other_model", "theirs.pth", *arguments.split()])
    assert not list(paths.glob("*_beside_*"))
