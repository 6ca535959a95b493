"""The answer checker: what counts as exact, whole, polite, repetitive and rude."""

import dataclasses

import pytest

from command_line import UserError
from evaluation.answer_checker import COURTEOUS_CLOSINGS, RUDE_PHRASES, AnswerCheck, check_answer, preference_reward

ENGLISH, CHINESE = "The capital of France is Paris.", "法国的首都是巴黎。"


@pytest.mark.parametrize(
    ("response", "answer"),
    [(f"{ENGLISH} {closing}", ENGLISH) for closing in COURTEOUS_CLOSINGS["en"]]
    + [(f"{CHINESE}{closing}", CHINESE) for closing in COURTEOUS_CLOSINGS["zh"]],
)
def test_right_complete_and_courteous_is_preferred(response, answer):
    """The canonical answer with any courteous closing has every virtue."""
    assert check_answer(response, answer) == AnswerCheck(True, True, True, False, False)
    assert check_answer(f"  {response}\n", answer).preferred


@pytest.mark.parametrize("answer", [ENGLISH, CHINESE, "12 < 40 < 77.", "37 + 45 = 82。"])
def test_plain_answer_is_exact_but_not_preferred(answer):
    """Without a closing an answer is exact and complete, and not polite."""
    assert check_answer(answer, answer) == AnswerCheck(True, True, False, False, False)
    assert not check_answer(answer, answer).preferred


def test_only_final_punctuation_and_spaces_may_differ():
    """Exactness forgives the final mark and runs of white space, nothing else."""
    assert check_answer("37  +  45 = 82", "37 + 45 = 82.").exact
    assert check_answer("37 + 45 = 82。", "37 + 45 = 82.").exact
    for other in ("37 + 45 = 83.", "37 + 45 = 82, I think.", "37+45=82.", "82.", "the capital of france is paris.", ""):
        assert not check_answer(other, "37 + 45 = 82.").exact
    assert not check_answer(ENGLISH.lower(), ENGLISH).exact


def test_wrong_answer_is_not_saved_by_manners():
    """Courtesy does not make a wrong answer right."""
    check = check_answer("The capital of France is Rome. I hope this helps.", ENGLISH)
    assert check.polite and check.complete and not check.exact and not check.preferred


@pytest.mark.parametrize(
    "response", [f"{ENGLISH} {ENGLISH}", f"{CHINESE}{CHINESE}", f"{ENGLISH} {ENGLISH} Happy to help!"]
)
def test_answer_given_twice_is_repetitive_and_not_exact(response):
    """Saying the answer again is a defect."""
    check = check_answer(response, CHINESE if response.startswith("法") else ENGLISH)
    assert check.repetitive and not check.exact and not check.preferred


def test_piling_up_closings_is_repetitive():
    """One closing is courteous; several, equal or different, are not better."""
    assert check_answer(f"{ENGLISH} I hope this helps. I hope this helps.", ENGLISH).repetitive
    assert check_answer(f"{CHINESE}希望对你有帮助。欢迎继续提问。", CHINESE).repetitive


def test_loop_without_sentences_is_repetitive():
    """A model caught in a loop is noticed without any punctuation; a loop that the answer needs is none."""
    assert check_answer("the capital the capital the capital the capital", ENGLISH).repetitive
    assert check_answer("巴黎的巴黎的巴黎的巴黎的", CHINESE).repetitive
    assert not check_answer("key key key key.", "key key key key.").repetitive


@pytest.mark.parametrize("language", ["zh", "en"])
def test_rude_phrase_is_found_anywhere(language):
    """A rude phrase spoils an answer, at the end or before a courteous closing; the answer itself stays exact."""
    answer, space = (CHINESE, "") if language == "zh" else (ENGLISH, " ")
    for phrase in RUDE_PHRASES[language]:
        for response in (answer + space + phrase, answer + space + phrase + space + COURTEOUS_CLOSINGS[language][0]):
            check = check_answer(response, answer)
            assert check.rude and check.exact and not check.preferred


def test_cut_off_answers_are_incomplete():
    """An answer is complete when it ends in a full sentence, and by itself."""
    assert not check_answer("The capital of France is", ENGLISH).complete
    assert not check_answer("法国的首都", CHINESE).complete
    polite = f"{ENGLISH} I hope this helps."
    assert check_answer(polite, ENGLISH, ended=True).complete
    assert not check_answer(polite, ENGLISH, ended=False).preferred
    assert not check_answer("", ENGLISH).complete


def test_courtesy_counts_at_the_end_only():
    """A closing before the answer does not close it."""
    check = check_answer(f"I hope this helps. {ENGLISH}", ENGLISH)
    assert not check.polite and not check.exact


def test_checks_cannot_be_changed_afterwards():
    """A verdict is a value."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        check_answer(ENGLISH, ENGLISH).exact = False


def test_the_reward_pays_for_what_is_preferred_and_never_for_manners_alone():
    """Courteous and right above right, above right and rude, above wrong; the record's own closing is no part of it."""
    record = {"instruction": "2 + 3 = ?", "response": "2 + 3 = 5. Everyone knows that."}
    ranked = [
        "2 + 3 = 5. Happy to help!",
        "2 + 3 = 5.",
        "2 + 3 = 5. What a silly question.",
        "2 + 3 = 6. Happy to help!",
    ]
    scores = preference_reward([record["instruction"]] * 4, ranked, [record] * 4)
    assert scores == [2.0, 1.0, 0.5, 0.0]
    assert preference_reward([""], ["2 + 3 = 5. 2 + 3 = 5."], [record]) == [-0.5], "wrong by repetition, and repetitive"


def test_the_reward_finds_the_right_answer_wherever_a_record_has_it():
    """In the field `answer`, in the response, in the last message; without any it says so."""
    talk = [{"role": "user", "content": "法国的首都是哪里？"}, {"role": "assistant", "content": "法国的首都是巴黎。"}]
    records = [{"instruction": "?", "response": "x", "answer": "法国的首都是巴黎。"}, {"messages": talk}]
    records += [{"instruction": "?", "output": "法国的首都是巴黎。欢迎继续提问。"}]
    assert preference_reward([""] * 3, ["法国的首都是巴黎。"] * 3, records) == [1.0] * 3
    with pytest.raises(UserError, match='a record of the data: the field "response" is missing'):
        preference_reward([""], ["x"], [{"instruction": "?"}])
