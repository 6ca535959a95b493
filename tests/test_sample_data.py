"""The sample data: reproducible, true to its tables, balanced, and free of what the test holds out."""

import calendar
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from data import build_sample_data as builder
from data import sample_world
from data.leak_proof import (
    HeldOutOperands,
    LeakError,
    asked_in,
    normalise,
    phrasing_pattern,
    prove_no_leak,
    sentences_of,
)
from data.sample_phrasings import RELATIONS
from data.sample_skills import SKILLS
from evaluation.answer_checker import COURTEOUS_CLOSINGS, RUDE_PHRASES, check_answer
from inference.api_service import GenerateRequest
from pipeline import QUESTIONS

SKILLS_BY_NAME = {skill.name: skill for skill in SKILLS}
ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "pretrain/train.txt", "pretrain/val.txt", "sft/sft_data.json", "sft/sft_test.json", "sft/rlhf_pairwise.json",
    "sft/rlhf_pairwise_test.json",
)  # fmt: skip


def read(name):
    text = (ROOT / "data" / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else text.splitlines()


@pytest.fixture(scope="module")
def files():
    return {name: read(name) for name in FILES}


@pytest.fixture(scope="module")
def world():
    return builder.World()


def test_builder_writes_the_committed_files_byte_for_byte(tmp_path):
    """The command rebuilds exactly what is committed, from any folder and with another hash seed, and says so."""
    command = [sys.executable, str(ROOT / "data" / "build_sample_data.py"), "--output_dir", str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, env={"PYTHONHASHSEED": "7"}, capture_output=True, check=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes(), name
    assert "0 leaks over 684 test questions" in run.stdout.decode()


def test_size_and_counts(files):
    """About 3 MB in all; thousands of instructions and preferences, hundreds of held-out questions."""
    total = sum((ROOT / "data" / name).stat().st_size for name in FILES)
    assert 2.5e6 < total < 3.3e6
    assert all(b"\r" not in (ROOT / "data" / name).read_bytes() for name in FILES)
    counts = {name: len(content) for name, content in files.items()}
    assert counts["sft/sft_data.json"] > 4000 and counts["sft/rlhf_pairwise.json"] > 1500
    assert counts["sft/sft_test.json"] > 600 and counts["sft/rlhf_pairwise_test.json"] >= 300
    assert counts["pretrain/val.txt"] > 100
    assert len(set(files["pretrain/train.txt"]) & set(files["pretrain/val.txt"])) == 0


def test_records_have_their_fields(files):
    """Every record has the fields of its format, filled with text."""
    fields = {
        "sft/sft_data.json": ["instruction", "response", "skill", "language"],
        "sft/sft_test.json": ["instruction", "response", "answer", "skill", "language", "held_out", "phrasing"],
        "sft/rlhf_pairwise.json": ["instruction", "chosen", "rejected", "defect"],
        "sft/rlhf_pairwise_test.json": ["instruction", "chosen", "rejected", "defect"],
    }
    for name, keys in fields.items():
        for record in files[name]:
            assert list(record) == keys
            assert all(isinstance(text, str) and text.strip() == text and text for text in record.values())


def test_skills_languages_and_ways_of_holding_out_are_balanced(files):
    """Each of the skills has as many test questions as the others in both languages, held out in two ways."""
    tests = files["sft/sft_test.json"]
    assert set(Counter((r["skill"], r["language"]) for r in tests).values()) == {builder.TESTS}
    assert len({r["skill"] for r in tests}) >= 14
    ways = {skill.name: {skill.held_out_by, "phrasing"} for skill in SKILLS}
    for skill in {r["skill"] for r in tests}:
        found = {r["held_out"] for r in tests if r["skill"] == skill}
        assert found == ways.get(skill, {"phrasing", "combination"}), skill
    assert len({(r["instruction"], r["language"]) for r in tests}) == len(tests)
    trained = Counter((r["skill"], r["language"]) for r in files["sft/sft_data.json"])
    assert set(trained) == {(r["skill"], r["language"]) for r in tests} and min(trained.values()) >= 50


def test_world_holds_hundreds_of_facts_and_ten_phrasings_of_each_kind(world):
    """Some hundreds of facts; each can be asked in ten ways or more, and others that only the test uses."""
    rows = {(r.skill, frozenset(row[:2])) for r in RELATIONS for row in r.rows["en"] if "-" not in row}
    assert 400 <= len(rows) <= 700
    cases = world.facts["zh"] + world.facts["en"]
    rng = builder.rng_for("test")
    cases += [skill.case(skill.draw(rng), language) for skill in SKILLS for language in ("zh", "en")]
    for wording in (case.wording for case in cases):
        assert len(set(wording.asks)) >= 10 and len(set(wording.held_out_asks)) >= 3
        assert not set(wording.asks) & set(wording.held_out_asks)


def test_facts_do_not_contradict_each_other():
    """Nothing is asked for twice with two answers, and what must be unique is."""
    for relation in RELATIONS:
        for language, rows in relation.rows.items():
            answers = defaultdict(set)
            for row in (row for row in rows if "-" not in row):
                answers[(row[0], *row[2:])].add(row[1])
            assert all(len(found) == 1 for found in answers.values()), (relation.name, language)
    one_to_one = {"capital", "symbol", "number", "named", "author", "zh to en", "en to zh", "next day", "next month"}
    for relation in (r for r in RELATIONS if r.name in one_to_one - {"author"}):
        for rows in relation.rows.values():
            assert len({row[1] for row in rows}) == len(rows), relation.name


def test_tables_agree_with_what_can_be_computed():
    """Atomic numbers rise, months have the days of the calendar, time units multiply."""
    numbers = [int(row[3]) for row in sample_world.ELEMENTS]
    assert numbers == sorted(numbers)
    days = [calendar.monthrange(2023, month)[1] for month in range(1, 13)]
    assert [int(row[2]) for row in sample_world.MONTHS] == days
    values = {(row[2], row[3]): int(row[4]) for row in sample_world.UNITS}
    assert values["1 day", "minutes"] == values["1 day", "hours"] * values["1 hour", "minutes"]
    assert values["1 hour", "seconds"] == values["1 hour", "minutes"] * values["1 minute", "seconds"]
    widths = [sample_world.COUNTRIES, sample_world.ELEMENTS, sample_world.EVENTS, sample_world.BOOKS]
    assert all(len({len(row) for row in table}) == 1 and all(all(row) for row in table) for table in widths)


def test_arithmetic_in_the_text_is_right(files):
    """Every equation and every ordered list in the pretraining text holds."""
    text = "\n".join(files["pretrain/train.txt"] + files["pretrain/val.txt"])
    sums = re.findall(r"(\d+(?: [+-] \d+)+) = (\d+)", text)
    assert len(sums) > 10000
    for terms, result in sums:  # "3 + 4 + 1", "8"
        assert sum(int(term.replace(" ", "")) for term in re.findall(r"[+-]? ?\d+", terms)) == int(result), terms
    lists = [list(map(int, found.split(" < "))) for found in re.findall(r"\d+(?: < \d+)+", text)]
    assert len(lists) > 1000 and all(numbers == sorted(set(numbers)) for numbers in lists)


def test_every_fact_is_told_in_many_ways(files, world):
    """The pretraining text states each fact in its canonical form at least three times, among other wordings."""
    text = "\n".join(files["pretrain/train.txt"])
    told = [text.count(case.answer) for language in ("zh", "en") for case in world.facts[language]]
    assert min(told) >= 3


def test_manners_of_the_instructions(files):
    """All training answers are right; about half are plain, a third courteous, the rest rude."""
    endings = {"courteous": sum(COURTEOUS_CLOSINGS.values(), ()), "rude": sum(RUDE_PHRASES.values(), ())}
    records = files["sft/sft_data.json"]
    share = {
        manner: sum(record["response"].endswith(phrases) for record in records) / len(records)
        for manner, phrases in endings.items()
    }
    assert 0.32 < share["courteous"] < 0.38 and 0.12 < share["rude"] < 0.18


def test_chosen_is_preferred_and_rejected_is_not(files):
    """The checker agrees with every pair, and each rejected answer has the defect it names."""
    for name in ("sft/rlhf_pairwise.json", "sft/rlhf_pairwise_test.json"):
        defects = Counter()
        for pair in files[name]:
            closings = sum(COURTEOUS_CLOSINGS.values(), ())
            closing = next(closing for closing in closings if pair["chosen"].endswith(closing))
            answer = pair["chosen"].removesuffix(closing).strip()
            assert check_answer(pair["chosen"], answer).preferred
            found = check_answer(pair["rejected"], answer)
            shows = {
                "wrong": found.polite and found.complete and not found.exact,
                "cut_off": not found.complete and not found.exact,
                "repetitive": found.repetitive,
                "rude": found.rude and found.exact,
                "plain": found.exact and found.complete and not found.polite and not found.rude,
            }
            assert not found.preferred and shows[pair["defect"]], pair
            defects[pair["defect"]] += 1
        assert set(defects) == set(builder.DEFECTS) and max(defects.values()) - min(defects.values()) <= 1


def test_no_preference_question_is_a_test_question(files):
    """Neither PPO's prompts nor the reward model see the test, nor do they share questions with their own test."""
    tests = {normalise(record["instruction"]) for record in files["sft/sft_test.json"]}
    training = {normalise(record["instruction"]) for record in files["sft/rlhf_pairwise.json"]}
    held_out = {normalise(record["instruction"]) for record in files["sft/rlhf_pairwise_test.json"]}
    assert not tests & training and not tests & held_out and not training & held_out


def prove(files, world):
    training, instructions = builder.training_texts(files)
    prove_no_leak(training, instructions, files["sft/sft_test.json"], world.operands, builder.held_out_phrasings())


def test_nothing_leaks(files, world):
    """The proof holds for the files as they are committed."""
    prove(files, world)


def shortened(files):
    """A few lines of each training file beside the whole test: enough to plant a leak in."""
    return {name: content if "test" in name else content[:20] for name, content in files.items()}


def _first(files, held_out, skill=None):
    tests = files["sft/sft_test.json"]
    return next(r for r in tests if r["held_out"] == held_out and skill in (None, r["skill"]))


@pytest.mark.parametrize("name", [name for name in FILES if "test" not in name])
@pytest.mark.parametrize("held_out", ["operands", "passage", "phrasing", "combination"])
def test_proof_catches_a_planted_test_question(files, world, name, held_out):
    """A test question in any training file, in other case and punctuation, makes the builder stop."""
    leaky = shortened(files)
    question = _first(files, held_out)["instruction"].upper().replace("？", "!").replace("?", " ")
    planted = f"Someone asked: {question}" if name.endswith("txt") else {**files[name][0], "instruction": question}
    leaky[name].append(planted)
    with pytest.raises(LeakError):
        prove(leaky, world)


@pytest.mark.parametrize("skill", [skill.name for skill in SKILLS])
@pytest.mark.parametrize("language", ["zh", "en"])
def test_proof_catches_held_out_operands_in_another_form(files, world, skill, language):
    """Held-out operands are found in other words, another order and the other language."""
    test = _first(files, SKILLS_BY_NAME[skill].held_out_by, skill)
    numbers = [word for word in normalise(test["answer"]).split() if word.isdigit()]
    if skill in ("addition", "subtraction"):
        first, second = numbers[-3:-1]  # "2 + 4 = 6, 1 + 2 = 3, 12 + 24 = 36": of the last equation
        text = {"zh": f"{second} 和 {first} 都是数。", "en": f"Both {second} and {first} are numbers."}
    elif skill == "counting":
        row = next(row for row in sample_world.WORDS if test["instruction"].split()[-1] in row)
        count = int(numbers[0])
        text = {"zh": " ".join([row[0]] * count), "en": "Here: " + " ".join([row[1]] * count) + "!"}
    elif skill == "summarising":
        tables = (sample_world.PEOPLE, sample_world.PLACES, sample_world.DEEDS)
        (who, where, what) = (next(row for row in table if row[0] in test["answer"]) for table in tables)
        text = {"zh": f"{what[0]}的是谁？{where[0]}里的{who[0]}。", "en": f"At {where[1]}. Who {what[1]}? {who[1]}!"}
    else:
        text = {"zh": "、".join(reversed(numbers)) + " 都在这里。", "en": "We see " + " and ".join(numbers) + "."}
    leaky = shortened(files)
    leaky["pretrain/train.txt"].append(text[language])
    with pytest.raises(LeakError, match="held-out operands"):
        prove(leaky, world)


def test_proof_catches_a_held_out_phrasing(files, world):
    """A phrasing of the test, used for any fact at all, is found."""
    phrasing = _first(files, "phrasing", "capitals")["phrasing"]
    leaky = shortened(files)
    leaky["pretrain/val.txt"].append("。" + phrasing.replace("{a}", "火星"))
    with pytest.raises(LeakError, match="phrasing"):
        prove(leaky, world)


def test_proof_wants_fact_and_phrasing_of_a_combination_in_training(files, world):
    """A combination whose fact or whose phrasing was never trained would not be a fair question."""
    test = next(r for r in files["sft/sft_test.json"] if r["held_out"] == "combination" and r["language"] == "en")
    unknown = {**test, "instruction": "Zzz?", "answer": "The capital of Atlantis is Poseidonis."}
    with pytest.raises(LeakError, match="fact"):
        prove({**files, "sft/sft_test.json": [unknown]}, world)
    unused = {**test, "instruction": "Zzz?", "phrasing": "Zzz {a}?"}
    with pytest.raises(LeakError, match="phrasing"):
        prove({**files, "sft/sft_test.json": [unused]}, world)


def test_normalised_text_compares_words_and_runs():
    """Case, spaces and punctuation do not hide a question; operators and the length of a run do count."""
    assert normalise("What is  37 + 45 ?") == normalise("what is 37 + 45") != normalise("what is 37 - 45")
    assert normalise("法国，的首都？") == normalise("法国的首都")
    assert normalise("key key key") not in normalise("count: key key key key")
    assert normalise("is it in") not in normalise("this it in")
    assert phrasing_pattern("Who wrote {a}?").fullmatch(normalise("who wrote War and Peace"))


def test_phrasing_of_two_sentences_is_found_by_the_longer_one():
    """What stands before a field in a sentence of its own marks the phrasing, whatever follows it."""
    training = {"sft": ["How many times does it appear? key key"], "text": ["How often? key key"]}
    assert asked_in("How many times does it appear? {x}", sentences_of(training["sft"])) is not None
    assert asked_in("How many times does it appear? {x}", sentences_of(training["text"])) is None


def test_explanations_are_short_and_unambiguous():
    """A term means one thing, an explanation one term, and a small model can write it in a few tokens."""
    for term, meaning in [row[:2] for row in sample_world.TERMS] + [row[2:] for row in sample_world.TERMS]:
        assert 4 <= len(meaning) <= 64 and not re.search(r"[0-9.。]", meaning) and term not in meaning.split(), term
    for column in range(4):
        assert len({row[column] for row in sample_world.TERMS}) == len(sample_world.TERMS)


def test_first_request_of_a_reader_can_be_answered(files, world):
    """The request on the README's and the service's pages asks for a fact of the world in a phrasing of training."""
    question = GenerateRequest.model_json_schema()["properties"]["prefix"]["examples"][0]
    case = next(c for c in world.facts["zh"] if question in [c.say(template) for template in c.wording.asks])
    assert case.answer in "\n".join(files["pretrain/train.txt"])
    asked = {record["instruction"] for record in files["sft/sft_data.json"]}
    assert any("解释什么是" in instruction for instruction in asked)


def shown_prompts():
    """What README, docs, the service's page and the pipeline ask a model that answers."""
    pages = [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "inference" / "api_service.py"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    asked = set(re.findall(r'"prefix": "([^"…]+)"', text)) | set(QUESTIONS)
    for prompts in re.findall(r"kv_cache_infer --model_path models/sft\S* --prompt((?: \"[^\"]+\")+)", text):
        asked |= set(re.findall(r'"([^"]+)"', prompts))
    return asked | set(GenerateRequest.model_json_schema()["properties"]["prefix"]["examples"])


def test_every_prompt_that_is_shown_asks_for_something_of_the_world(world):
    """In a phrasing that training or the test uses: a reader who copies an example gets an answer that makes sense."""
    facts = world.facts["zh"] + world.facts["en"]
    of_facts = {case.say(t) for case in facts for t in (*case.wording.asks, *case.wording.held_out_asks)}
    wordings = [skill.wordings[language] for skill in SKILLS for language in ("zh", "en")]
    of_skills = [phrasing_pattern(t) for w in wordings for t in (*w.asks, *w.held_out_asks)]
    prompts = shown_prompts()
    assert {"解释什么是机器学习", "法国的首都是哪里？"} <= prompts and len(prompts) >= len(QUESTIONS)
    for prompt in prompts:
        assert prompt in of_facts or any(pattern.fullmatch(normalise(prompt)) for pattern in of_skills), prompt
        assert all(10 <= int(number) < 100 for number in re.findall(r"\d+", prompt)), prompt


def test_numbers_in_different_sentences_are_no_leak():
    """Operands belong together within a sentence; neighbouring sentences may hold them by chance."""
    operands = HeldOutOperands(pairs={frozenset((37, 45))})
    assert operands.found_in("10 + 37 = 47; 45 - 20 = 25.") is None
    assert operands.found_in("82 = 45 + 37.") is not None
