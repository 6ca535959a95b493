"""Multiple choice: every published shape is read, and what is chosen is what lm-evaluation-harness defines."""

import json

import pytest
import torch

from checkpoint import save_checkpoint
from command_line import UserError
from evaluation.multiple_choice import (
    ask,
    context_of,
    encode_pairs,
    grade_choice,
    load_choices,
    log_likelihoods,
    main,
    parse_choice,
    report_choices,
)

CEVAL = 'id,question,A,B,C,D,answer,explanation\n0,"法国的首都是____。",巴黎,罗马,柏林,"马德里, 是吗",A,1.\n'
CMMLU = ',Question,A,B,C,D,Answer\n0,"二加三等于？",四,五,六,七,B\n'
MMLU = '"What is 3, plus 4?",7,7,8,9,A\n"Largest, of planets?",Mars,Jupiter,Venus,Earth,B\n'
ARC = [
    {"id": "a", "question": {"stem": "Ice is?", "choices": [{"text": "cold water", "label": "1"},
     {"text": "fire", "label": "2"}, {"text": "a kind of stone", "label": "3"}]}, "answerKey": "1"},
    {"id": "b", "question": "Fire is?", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}, "answerKey": "A"},
]  # fmt: skip
OWN = [
    {"question": "1 + 1?", "choices": ["1", "2"], "answer": 1, "subject": "sums"},  # MMLU on Hugging Face
    {"question": "1 + 2?", "choices": ["3", "2"], "answer": "A"},
    {"question": "1 + 3?", "choices": ["3", "four"], "answer": "four"},
]


@pytest.fixture
def folder(tmp_path):
    """One file of each shape, named as they are published."""
    for name, content in (("law_val.csv", CEVAL), ("sums.csv", CMMLU), ("astronomy_test.csv", MMLU)):
        (tmp_path / name).write_text(content, encoding="utf-8")
    for name, records in (("arc_easy.jsonl", ARC), ("own.jsonl", OWN)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return tmp_path


# -- what is read ------------------------------------------------------------------------------------------------------


def test_every_published_shape_is_read(folder):
    choices = load_choices(folder)
    assert [(each.subject, each.question, each.choices[each.right], each.style) for each in choices] == [
        ("arc_easy", "Ice is?", "cold water", "texts"),
        ("arc_easy", "Fire is?", "hot", "texts"),
        ("astronomy", "What is 3, plus 4?", "7", "letters"),
        ("astronomy", "Largest, of planets?", "Jupiter", "letters"),
        ("law", "法国的首都是____。", "巴黎", "letters"),
        ("sums", "1 + 1?", "2", "letters"),
        ("own", "1 + 2?", "3", "letters"),
        ("own", "1 + 3?", "four", "letters"),
        ("sums", "二加三等于？", "五", "letters"),
    ]
    assert choices[2].right == 0, "of two equal answers, the letter says which"


def test_secret_answers_are_counted_and_malformed_questions_named(tmp_path):
    account = {}
    (tmp_path / "law_test.csv").write_text("id,question,A,B,C,D,answer\n0,x,1,2,3,4,\n1,y,1,2,3,4,C\n")
    assert len(load_choices(tmp_path, account)) == 1
    assert account == {"read": 2, "without an answer": 1}
    with pytest.raises(UserError, match="the answer 'E' is none of the 2 choices"):
        parse_choice({"question": "x", "choices": ["a", "b"], "answer": "E"}, "here", "s")
    with pytest.raises(UserError, match="here is no multiple-choice question; .* .it has text"):
        parse_choice({"text": "x"}, "here", "s")
    (tmp_path / "law_test.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="question 1 of .*law_test.csv has 2 fields and not six"):
        load_choices(tmp_path)


def test_questions_are_put_as_in_the_harness(folder):
    """The very texts that lm_eval 0.4.9 makes of these questions."""
    ice, fire, sums, planets, france, *_ = load_choices(folder)
    assert context_of(fire, [ice], None) == "Question: Ice is?\nAnswer: cold water\n\nQuestion: Fire is?\nAnswer:"
    assert context_of(planets, [sums], None) == (
        "The following are multiple choice questions (with answers) about astronomy.\n\n"
        "What is 3, plus 4?\nA. 7\nB. 7\nC. 8\nD. 9\nAnswer: A\n\n"
        "Largest, of planets?\nA. Mars\nB. Jupiter\nC. Venus\nD. Earth\nAnswer:"
    )
    assert context_of(france, [], "以下是关于{subject}的题。") == (
        "以下是关于law的题。\n\n法国的首都是____。\nA. 巴黎\nB. 罗马\nC. 柏林\nD. 马德里, 是吗\n答案："
    )


# -- what is computed --------------------------------------------------------------------------------------------------


def by_the_harness(model, tokenizer, choice, context):
    """log p of each answer, and the two choices, by the definition: one token after another, no batch, no cache."""
    answers = list(choice.choices) if choice.style == "texts" else ["A", "B", "C", "D"][: len(choice.choices)]
    nats = []
    for answer in answers:
        whole = tokenizer.encode(f"{context} {answer}")["input_ids"]
        start = len(tokenizer.encode(context)["input_ids"])
        ids = whole[-(model.config.max_seq_len + 1) :]
        total = 0.0
        for end in range(len(ids) - (len(whole) - start), len(ids)):
            logits = model(torch.tensor([ids[:end]]))["logits"][0, -1].double()
            total += float(logits[ids[end]] - logits.logsumexp(dim=-1))
        nats.append(total)
    normed = [value / len(answer) for value, answer in zip(nats, answers, strict=True)]
    return nats, nats.index(max(nats)) == choice.right, normed.index(max(normed)) == choice.right


@pytest.mark.parametrize("max_seq_len", [256, 24])
def test_choices_are_those_of_the_definition(folder, tokenizer, random_model, architecture, max_seq_len):
    """Also where only the end of a question fits into the context."""
    model = random_model(architecture, vocab_size=tokenizer.vocab_size, max_seq_len=max_seq_len)
    choices = load_choices(folder)
    graded, too_long = ask(model, tokenizer, choices, batch_size=3)
    assert (too_long > 0) == (max_seq_len == 24)
    with torch.no_grad():
        for choice, row in zip(choices, graded, strict=True):
            nats, acc, acc_norm = by_the_harness(model, tokenizer, choice, context_of(choice, [], None))
            assert row["log_likelihoods"] == pytest.approx(nats, rel=1e-4)
            assert (row["acc"], row["acc_norm"]) == (acc, acc_norm)


def test_normalising_by_length_changes_the_choice(folder):
    ice = load_choices(folder)[0]  # "cold water", "fire", "a kind of stone"
    graded = grade_choice(ice, [-5.0, -4.0, -9.0])
    assert (graded["chosen"], graded["acc"], graded["acc_norm"]) == ("fire", False, True)
    assert graded["p_chosen"] + graded["p_right"] == pytest.approx(1 - graded["p_right"] * 2.718281828**-4)


def test_answers_behind_a_chat_template(tokenizer, random_model):
    (before, answer), *_ = encode_pairs(tokenizer, "1 + 1?", ["A", "B"], chat=True)
    prompt = [{"role": "user", "content": "1 + 1?"}]
    assert before == tokenizer.encode_chat(prompt, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(answer) == "A"
    with pytest.raises(UserError, match="has an empty answer"):
        encode_pairs(tokenizer, "1 + 1?", ["A", " "], chat=False)


def test_answers_of_one_token_share_a_pass(tokenizer, random_model, monkeypatch):
    model = random_model("modern", vocab_size=tokenizer.vocab_size)
    pairs = [([5, 6, 7], [answer]) for answer in (10, 11, 12)]
    seen, compute = [], model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda *args: (seen.append(tuple(args[0].shape)), compute(*args))[1])
    log_probs = model(torch.tensor([[5, 6, 7]]))["logits"][0, -1].log_softmax(dim=-1)
    seen.clear()
    assert log_likelihoods(model, pairs, 1) == pytest.approx(log_probs[10:13].tolist(), rel=1e-5)
    assert seen == [(1, 3)]


def test_report_adds_up():
    rows = [("a", True, True)] * 3 + [("a", False, True)] + [("b", False, False)] * 2
    graded = [
        {"subject": s, "acc": acc, "acc_norm": norm, "p_chosen": 0.5, "p_right": 0.5 * acc} for s, acc, norm in rows
    ]
    report = report_choices(graded, seed=0)
    scores, intervals = report["scores"], report["intervals"]
    assert (scores["acc"], scores["acc_norm"], scores["acc_by_subject"]) == (3 / 6, 4 / 6, (3 / 4 + 0) / 2)
    assert scores["calibration_error"] == 0
    assert report["by_subject"]["a"]["acc"] == 3 / 4 and report["by_subject"]["b"]["count"] == 2
    for name, (low, high) in intervals.items():
        assert low <= scores[name] <= high and low >= 0 and high <= 1, name
    assert report == report_choices(graded, seed=0)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_path(random_model, tokenizer, tmp_path):
    model = random_model("modern", vocab_size=tokenizer.vocab_size, max_seq_len=256)
    about = dict(config=model.config, tokenizer=tokenizer, stage="sft")
    return save_checkpoint(tmp_path / "models" / "sft_best.pth", model_state=model.state_dict(), **about)


def test_command_asks_and_writes(folder, model_path, capsys):
    main(["--model_path", str(model_path), "--data_path", str(folder), "--shots_path", str(folder), "--shots", "1"])
    said = capsys.readouterr().out
    assert "astronomy" in said and "9 questions read, 9 asked" in said and "95 % interval of acc" in said
    report = json.loads(model_path.with_name("sft_best_choice.json").read_text(encoding="utf-8"))
    assert report["scores"]["count"] == len(report["predictions"]) == 9
    page = model_path.with_name("sft_best_choice.html").read_text(encoding="utf-8")
    assert "Accuracy by subject" in page and "<script" not in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--data_path gone", "there is no data at gone"),
        ("--shots_path other.csv", "has questions of none of the subjects"),
        ("--shots -1", "--shots must be at least 0"),
    ],
)
def test_mistakes_are_said_before_any_work(folder, model_path, arguments, said, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "other.csv").write_text(MMLU)
    with pytest.raises(UserError, match=said):
        main(["--model_path", str(model_path), "--data_path", "law_val.csv", *arguments.split()])
    assert not model_path.with_name("sft_best_choice.json").exists()
