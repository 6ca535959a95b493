"""Build the sample data: a small world of facts and skills, in Chinese and English, that a small GPT can learn.

    python data/build_sample_data.py --output_dir data

Written are the pretraining text, instructions, preferences, and a test whose questions are held out in one of three
ways: by operands (numbers that were never seen together) or passage (who, where and what were never seen together), by
phrasing (the wording was never seen) or by combination (fact and phrasing were both seen, but never together).
`leak_proof.prove_no_leak` checks this before a file is written.
The same files come out on every machine, byte for byte.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command_line import option, parse_config, replacing, run_main
from data.leak_proof import HeldOutOperands, normalise, prove_no_leak
from data.sample_cases import LANGUAGES, Case, Relation
from data.sample_phrasings import RELATIONS
from data.sample_skills import PAIR_SKILLS, SKILLS, SORTING, SUMMARISING, SUMMARY_PARTS, Skill
from data.sample_translation import translation_pairs
from data.sample_world import WORDS
from evaluation.answer_checker import COURTEOUS_CLOSINGS, RUDE_PHRASES, check_answer

SEED = "sample world 1"
TESTS = 18  # questions a skill and language; half of them held out by phrasing (a third for skills that generalise)
PREFERENCE_TESTS = 9
PREFERENCES = 45  # pairs a skill and language
# Records a language for each skill that generalises
SKILL_INSTRUCTIONS = {
    "addition": 320, "subtraction": 320, "comparing": 240, "sorting": 240, "counting": 320, "summarising": 280,
}  # fmt: skip
LONG_ANSWER_INSTRUCTIONS = 3  # records for each explanation; for other facts 2, more where a relation has few
QUESTIONS_IN_TEXT = 3  # how often the pretraining text asks for each fact
CANONICAL_IN_TEXT = 2  # how often it states the fact in the canonical form, besides each other form once
PRACTICE = {  # examples in the pretraining text, a language
    "addition": 1600, "subtraction": 1600, "comparing": 1000, "sorting": 1200, "counting": 1000, "summarising": 480,
}  # fmt: skip
SPACE = {"zh": "", "en": " "}  # between sentences
DEFECTS = ("wrong", "cut_off", "repetitive", "rude", "plain")


def rng_for(purpose: str) -> Random:
    """A generator of its own for each part, so that a change in one part leaves the others as they are."""
    return Random(f"{SEED}/{purpose}")


Source = Relation | Skill


class World:
    """All that can be asked, and what is held out of the training data."""

    def __init__(self) -> None:
        self.facts = {language: [case for r in RELATIONS for case in r.cases(language)] for language in LANGUAGES}
        self.sources: dict[str, Source] = {r.name: r for r in RELATIONS} | {s.name: s for s in SKILLS}
        self.operands = HeldOutOperands()
        self.combinations: set[tuple[Case, str]] = set()
        self.tests: list[dict] = []
        self.preference_tests: list[tuple[Case, str]] = []
        for language in LANGUAGES:
            for skill in dict.fromkeys(r.skill for r in RELATIONS):
                self._hold_out_facts(skill, language)
        self._hold_out_operands()

    @property
    def fact_skills(self) -> list[str]:
        return list(dict.fromkeys(r.skill for r in RELATIONS))

    def may_ask(self, case: Case, template: str) -> bool:
        """Whether the training data may ask this."""
        return (case, template) not in self.combinations

    def _hold_out_facts(self, skill: str, language: str) -> None:
        rng = rng_for(f"held-out facts/{skill}/{language}")
        relations = [relation for relation in RELATIONS if relation.skill == skill]
        by_relation = [rng.sample(relation.cases(language), len(relation.cases(language))) for relation in relations]
        cases = [next(cases_of) for cases_of in _take_turns(by_relation, TESTS + PREFERENCE_TESTS)]
        for number, case in enumerate(cases):
            if number < TESTS // 2:
                template = case.wording.held_out_asks[number % len(case.wording.held_out_asks)]
                self.tests.append(_test_record(case, template, "phrasing"))
                continue
            template = rng.choice([t for t in case.wording.asks if self.may_ask(case, t) and _stands_alone(case, t)])
            self.combinations.add((case, template))
            if number < TESTS:
                self.tests.append(_test_record(case, template, "combination"))
            else:
                self.preference_tests.append((case, template))

    def _hold_out_operands(self) -> None:
        by_phrasing = TESTS // 3
        later: list[tuple[Skill, str, Random]] = []
        for skill in SKILLS:
            for language in LANGUAGES:
                rng = rng_for(f"held-out operands/{skill.name}/{language}")
                for number in range(TESTS - by_phrasing + PREFERENCE_TESTS):
                    case = skill.case(self._new_operands(skill, rng), language)
                    template = case.wording.asks[number % len(case.wording.asks)]
                    if number < TESTS - by_phrasing:
                        self.tests.append(_test_record(case, template, skill.held_out_by))
                    else:
                        self.preference_tests.append((case, template))
                later.append((skill, language, rng))
        for skill, language, rng in later:
            for number in range(by_phrasing):
                case = self.training_case(skill, language, rng)
                templates = case.wording.held_out_asks
                self.tests.append(_test_record(case, templates[number % len(templates)], "phrasing"))

    def _new_operands(self, skill: Skill, rng: Random) -> tuple:
        """Draw operands and hold them out, in every order and in both languages."""
        while True:
            operands = skill.draw(rng)
            if not self.shows_held_out(skill.case(operands, "en")) and len(set(operands)) == len(operands):
                break
        if skill in PAIR_SKILLS:
            self.operands.pairs.add(frozenset(operands[:2]))
        elif skill is SORTING:
            self.operands.lists.add(frozenset(operands))
        elif skill is SUMMARISING:
            self.operands.passages.update(zip(*operands[:SUMMARY_PARTS], strict=True))
        else:
            self.operands.counts.update((word, operands[1]) for word in WORDS[operands[0]])
        return operands

    def shows_held_out(self, case: Case) -> bool:
        """Whether operands that are held out stand in this case, asked or answered."""
        return self.operands.found_in(f"{case.fields.get('x', '')}。{case.answer}") is not None

    def training_case(self, skill: Skill, language: str, rng: Random) -> Case:
        """Draw operands that are not held out."""
        while self.shows_held_out(case := skill.case(skill.draw(rng), language)):
            pass
        return case

    def wrong_answer(self, case: Case, rng: Random) -> str:
        """A wrong answer that shows nothing held out, unless the case itself is held out."""
        held_out = self.shows_held_out(case)
        while True:
            wrong = self.sources[case.relation].wrong_answer(case, rng)
            if held_out or self.operands.found_in(wrong) is None:
                return wrong


def _take_turns(groups: list[list[Case]], count: int) -> Iterator[Iterator[Case]]:
    """Go around the groups, `count` turns in all; a group that is used up starts again."""
    endless = [cycle(group) for group in groups]
    for number in range(count):
        yield endless[number % len(endless)]


def _stands_alone(case: Case, template: str) -> bool:
    """Whether this question is not part of another question or statement about the same fact."""
    question = normalise(case.say(template))
    others = [t for t in (*case.wording.asks, *case.wording.says, case.wording.canonical) if t != template]
    return not any(question in normalise(case.say(other)) for other in others)


def _test_record(case: Case, template: str, held_out: str) -> dict:
    return {
        "instruction": case.say(template),
        "response": case.answer,
        "answer": case.answer,
        "skill": case.skill,
        "language": case.language,
        "held_out": held_out,
        "phrasing": template.replace("{topic}", case.wording.topic),
    }


# ---------------------------------------------------------------------------------------------------- pretraining text


def pretraining_documents(world: World) -> list[str]:
    """The passages of the pretraining text, one a line, shuffled."""
    documents = [line for language in LANGUAGES for line in _fact_passages(world, language)]
    documents += [line for skill in SKILLS for line in _practice(world, skill)]
    rng_for("order of documents").shuffle(documents)
    return documents


def _fact_passages(world: World, language: str) -> Iterator[str]:
    """Passages of several sentences; each round tells every fact once, in another wording."""
    rng = rng_for(f"passages/{language}")
    tellings = {case: _tellings(world, case, rng) for case in world.facts[language]}
    for turn in range(max(map(len, tellings.values()))):
        told = [(case, sentences[turn]) for case, sentences in tellings.items() if turn < len(sentences)]
        rng.shuffle(told)
        if turn % 2:  # every second round keeps to one subject in each passage
            told.sort(key=lambda pair: pair[0].skill)
        sentences = [sentence for _, sentence in told]
        yield from _join(sentences, SPACE[language], rng, 3, 6)


def _tellings(world: World, case: Case, rng: Random) -> list[str]:
    sentences = [case.say(template) for template in case.wording.says] + [case.answer] * CANONICAL_IN_TEXT
    askable = [template for template in case.wording.asks if world.may_ask(case, template)]
    sentences += [_dialogue(case, template) for template in rng.sample(askable, QUESTIONS_IN_TEXT)]
    rng.shuffle(sentences)
    return sentences


def _dialogue(case: Case, template: str) -> str:
    question, answer = {"zh": ("问：", "答："), "en": ("Q: ", "A: ")}[case.language]
    return f"{question}{case.say(template)} {answer}{case.answer}"


def _join(sentences: list[str], between: str, rng: Random, fewest: int, most: int) -> Iterator[str]:
    """Join sentences to passages of `fewest` to `most`."""
    start = 0
    while start < len(sentences):
        end = start + rng.randint(fewest, most)
        yield between.join(sentences[start:end])
        start = end


def _practice(world: World, skill: Skill) -> Iterator[str]:
    """Lines of worked examples, and lines that ask and answer."""
    for language in LANGUAGES:
        rng = rng_for(f"practice/{skill.name}/{language}")
        cases = _practice_cases(world, skill, language, rng)
        asked = cases[: len(cases) // 10]
        questions = [_dialogue(case, case.wording.asks[i % len(case.wording.asks)]) for i, case in enumerate(asked)]
        fewest, most = skill.examples_a_line
        yield from _join(questions, SPACE[language], rng, min(fewest, 2), min(most, 4))
        mark, stop = ("；", "。") if language == "zh" else ("; ", ".")
        examples = [case.say(case.wording.says[0]) for case in cases]
        yield from (line + stop for line in _join(examples, mark, rng, fewest, most))


def _practice_cases(world: World, skill: Skill, language: str, rng: Random) -> list[Case]:
    """The examples of a skill in one language; where all can be listed, each as often as any other, in random order."""
    count = PRACTICE[skill.name]
    if skill.all_operands is None:
        return [world.training_case(skill, language, rng) for _ in range(count)]
    cases = [skill.case(operands, language) for operands in skill.all_operands]
    cases = [case for case in cases if not world.shows_held_out(case)]
    rounds = [rng.sample(cases, len(cases)) for _ in range(-(-count // len(cases)))]
    return [case for cases_of_round in rounds for case in cases_of_round][:count]


# ------------------------------------------------------------------------------------------- instructions, preferences


def instruction_records(world: World) -> list[dict]:
    """The training instructions: right answers in mixed manners (plain, courteous, rude)."""
    rng = rng_for("instructions")
    asked: list[tuple[Case, str]] = []
    for language in LANGUAGES:
        for case in world.facts[language]:
            siblings = sum(other.relation == case.relation for other in world.facts[language])
            askable = [template for template in case.wording.asks if world.may_ask(case, template)]
            count = LONG_ANSWER_INSTRUCTIONS if case.skill == "explanations" else max(2, min(6, 50 // siblings))
            asked += [(case, template) for template in rng.sample(askable, count)]
        asked += _missing_phrasings(world, asked, language)
        for skill in SKILLS:
            for number in range(SKILL_INSTRUCTIONS[skill.name]):
                case = world.training_case(skill, language, rng)
                asked.append((case, case.wording.asks[number % len(case.wording.asks)]))
    rng.shuffle(asked)
    return [
        {
            "instruction": case.say(template),
            "response": _with_manner(case, rng.choices(("plain", "courteous", "rude"), (50, 35, 15))[0], rng),
            "skill": case.skill,
            "language": case.language,
        }
        for case, template in asked
    ]


def _missing_phrasings(world: World, asked: list[tuple[Case, str]], language: str) -> list[tuple[Case, str]]:
    """Questions that use each phrasing of a held-out combination which chance has left out, with another fact."""
    used = {(case.relation, template) for case, template in asked if case.language == language}
    wanted = {(case.relation, template) for case, template in world.combinations if case.language == language}
    facts = world.facts[language]
    return [
        next((c, template) for c in facts if c.relation == relation and world.may_ask(c, template))
        for relation, template in sorted(wanted - used)
    ]


def _with_manner(case: Case, manner: str, rng: Random, sentence: str | None = None) -> str:
    """The answer (or another sentence), plain or with a courteous or rude phrase after it."""
    sentence = case.answer if sentence is None else sentence
    phrases = {"plain": {}, "courteous": COURTEOUS_CLOSINGS, "rude": RUDE_PHRASES}[manner].get(case.language, ("",))
    return (sentence + SPACE[case.language] + rng.choice(phrases)).strip()


def preference_records(world: World) -> tuple[list[dict], list[dict]]:
    """Pairs for training, and pairs on held-out questions."""
    rng = rng_for("preferences")
    asked: list[tuple[Case, str]] = []
    for language in LANGUAGES:
        for skill in world.fact_skills:
            cases = [case for case in world.facts[language] if case.skill == skill]
            for case in (rng.choice(cases) for _ in range(PREFERENCES)):
                asked.append((case, rng.choice([t for t in case.wording.asks if world.may_ask(case, t)])))
        for skill in SKILLS:
            cases = [world.training_case(skill, language, rng) for _ in range(PREFERENCES)]
            asked += [(case, rng.choice(case.wording.asks)) for case in cases]
    rng.shuffle(asked)
    held_out = rng.sample(world.preference_tests, len(world.preference_tests))
    return _pairs(world, asked, rng), _pairs(world, held_out, rng)


def _pairs(world: World, asked: list[tuple[Case, str]], rng: Random) -> list[dict]:
    pairs = []
    for number, (case, template) in enumerate(asked):
        defect = DEFECTS[number % len(DEFECTS)]
        chosen, rejected = _with_manner(case, "courteous", rng), _defective(world, case, defect, rng)
        if not check_answer(chosen, case.answer).preferred or check_answer(rejected, case.answer).preferred:
            raise ValueError(f"not a preference: {chosen!r} over {rejected!r}")
        pairs.append({"instruction": case.say(template), "chosen": chosen, "rejected": rejected, "defect": defect})
    return pairs


def _defective(world: World, case: Case, defect: str, rng: Random) -> str:
    answer = case.answer
    if defect == "wrong":
        return _with_manner(case, "courteous", rng, world.wrong_answer(case, rng))
    if defect == "cut_off":
        return answer[: rng.randint(max(1, len(answer) * 2 // 5), len(answer) - 2)].rstrip()
    if defect == "repetitive":
        repeated = SPACE[case.language].join([answer] * rng.randint(2, 3))
        return _with_manner(case, rng.choice(("plain", "courteous")), rng, repeated)
    return _with_manner(case, defect, rng)


# --------------------------------------------------------------------------------------------------------- files, proof


def build() -> tuple[dict[str, list], str]:
    """Make all files in memory and prove them free of leaks.

    Returns:
        The lines or records of each file by its path inside the data folder, and a summary table to print.
    """
    world = World()
    documents = pretraining_documents(world)
    preferences, preference_tests = preference_records(world)
    pairs, pair_tests = translation_pairs(rng_for("translation"))
    files = {
        "pretrain/train.txt": [line for number, line in enumerate(documents) if number % 40],
        "pretrain/val.txt": documents[::40],
        "sft/sft_data.json": instruction_records(world),
        "sft/sft_test.json": world.tests,
        "sft/rlhf_pairwise.json": preferences,
        "sft/rlhf_pairwise_test.json": preference_tests,
        "translation/train.jsonl": pairs,
        "translation/test.jsonl": pair_tests,
    }
    training, instructions = training_texts(files)
    prove_no_leak(training, instructions, files["sft/sft_test.json"], world.operands, held_out_phrasings())
    return files, _summary(world, files)


def training_texts(files: dict[str, list]) -> tuple[dict[str, list[str]], list[str]]:
    """Every text that a training stage reads, by file, and the questions among them."""
    records = files["sft/sft_data.json"] + files["sft/rlhf_pairwise.json"]
    training = {name: list(files[name]) for name in ("pretrain/train.txt", "pretrain/val.txt")}
    for name in ("sft/sft_data.json", "sft/rlhf_pairwise.json"):
        keys = ("instruction", "response", "chosen", "rejected")
        training[name] = [record[key] for record in files[name] for key in keys if key in record]
    return training, [record["instruction"] for record in records]


def held_out_phrasings() -> list[str]:
    """Every template that only the test may use."""
    wordings = [r.wordings[language].complete(language) for r in RELATIONS for language in LANGUAGES]
    wordings += [skill.wordings[language] for skill in SKILLS for language in LANGUAGES]
    return sorted({t.replace("{topic}", w.topic) for w in wordings for t in w.held_out_asks})


def _text_of(name: str, content: list) -> str:
    if name.endswith(".txt"):
        return "".join(f"{line}\n" for line in content)
    if name.endswith(".jsonl"):
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in content) + "\n]\n"


def _summary(world: World, files: dict[str, list]) -> str:
    facts = Counter(case.skill for case in world.facts["en"])
    lines = [f"{'skill':<14}{'facts':>7}{'SFT':>7}{'test':>7}"]
    for skill in [*world.fact_skills, *(skill.name for skill in SKILLS)]:
        counts = [sum(r["skill"] == skill for r in files[f"sft/{name}.json"]) for name in ("sft_data", "sft_test")]
        lines.append(f"{skill:<14}{facts[skill] or 'rule':>7}{counts[0]:>7}{counts[1]:>7}")
    lines.append(f"{'all':<14}{sum(facts.values()):>7}")
    sizes = {name: len(_text_of(name, content).encode()) for name, content in files.items()}
    lines += [f"{name:<28}{len(content):>7} records {sizes[name] / 1e6:>6.2f} MB" for name, content in files.items()]
    total = sum(sizes.values()) / 1e6
    lines.append(f"{total:.2f} MB in all; 0 leaks over {len(files['sft/sft_test.json'])} test questions")
    return "\n".join(lines)


@dataclass
class SampleDataConfig:
    """The command line of the builder."""

    output_dir: str = option(str(Path(__file__).resolve().parent), "folder for the files")


def main(argv: list[str] | None = None) -> None:
    """Build the files and write them."""
    config = parse_config(SampleDataConfig, argv, description="Build the sample data.")
    files, summary = build()
    for name, content in files.items():
        with replacing(Path(config.output_dir, name), "free some space or choose another --output_dir") as file:
            file.write(_text_of(name, content).encode())
    print(summary)


if __name__ == "__main__":
    run_main(main)
