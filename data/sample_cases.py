"""What can be asked in the sample world, and how: cases, wordings, and the phrasings that all topics share.

In the templates ``{a}`` is what is asked about, ``{b}`` the answer, ``{u}`` a unit, and ``{topic}`` the noun phrase
that names the answer ("the capital of France"); a capital letter (``{A}``, ``{Topic}``) asks for the same text with a
capital at its beginning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from random import Random

LANGUAGES = ("zh", "en")

# Questions that fit every topic. Those in the second list are asked in the test only.
TOPIC_QUESTIONS = {
    "zh": (
        "{topic}是什么？", "请问{topic}是什么？", "请告诉我{topic}。", "我想知道{topic}。", "你知道{topic}吗？",
        "{topic}", "说出{topic}。", "能不能告诉我{topic}？", "帮我查一下{topic}。", "请写出{topic}，谢谢。",
    ),
    "en": (
        "What is {topic}?", "Tell me {topic}.", "Do you know {topic}?", "Please name {topic}.", "{Topic}?",
        "I would like to know {topic}.", "Could you tell me {topic}?", "Give me {topic}, please.",
        "Can you say what {topic} is?", "My question is about {topic}.",
    ),
}  # fmt: skip
HELD_OUT_TOPIC_QUESTIONS = {
    "zh": ("你能说出{topic}吗？", "我想问一下{topic}是什么。", "请帮我写出{topic}。"),
    "en": ("Please tell me what {topic} is.", "I want to know {topic}.", "Do you know what {topic} is?"),
}
# Statements that fit every topic, besides the canonical one.
TOPIC_STATEMENTS = {
    "zh": ("{b}就是{topic}。", "我们知道，{topic}是{b}。", "说到{topic}，答案是{b}。"),
    "en": ("{B} is {topic}.", "We know that {topic} is {b}.", "As for {topic}, the answer is {b}."),
}


@dataclass(frozen=True)
class Wording:
    """The phrasings of one relation in one language."""

    topic: str = ""
    canonical: str = ""  # the one form in which the question is answered; from the topic when empty
    says: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()
    held_out_asks: tuple[str, ...] = ()
    topic_says: bool = True  # whether the general statements about a topic read well here

    def complete(self, language: str) -> Wording:
        """Add what every topic shares to what is particular to this wording."""
        canonical = self.canonical or {"zh": "{topic}是{b}。", "en": "{Topic} is {b}."}[language]
        if not self.topic:
            return Wording("", canonical, self.says, self.asks, self.held_out_asks)
        says = self.says + (TOPIC_STATEMENTS[language] if self.topic_says else ())
        asks = self.asks + TOPIC_QUESTIONS[language]
        return Wording(self.topic, canonical, says, asks, self.held_out_asks + HELD_OUT_TOPIC_QUESTIONS[language])


@dataclass(frozen=True)
class Case:
    """One thing that can be asked in one language: a fact, or operands of a skill."""

    skill: str
    relation: str
    language: str
    key: tuple  # what is asked about; for operands the same in both languages
    fields: dict[str, str] = field(hash=False, compare=False)
    wording: Wording = field(hash=False, compare=False)

    @property
    def answer(self) -> str:
        """The canonical answer sentence."""
        return self.say(self.wording.canonical)

    def say(self, template: str, **other: str) -> str:
        """Fill a template in; `other` replaces fields, as a wrong answer's ``b=``."""
        fields = {**self.fields, **other}
        fields["topic"] = self.wording.topic.format(**fields)
        capitals = {name.capitalize(): text[:1].upper() + text[1:] for name, text in fields.items()}
        text = template.format(**fields, **capitals)
        return _space_chinese(text) if self.language == "zh" else text


def _space_chinese(text: str) -> str:
    """Put the customary space between Chinese characters and Latin letters or digits."""
    text = re.sub(r"(?<=[\u4e00-\u9fff])(?=[A-Za-z0-9])", " ", text)
    return re.sub(r"(?<=[A-Za-z0-9])(?=[\u4e00-\u9fff])", " ", text)


@dataclass(frozen=True)
class Relation:
    """Facts of one kind: for each language the rows (a, b) or (a, b, u), and how they are worded."""

    skill: str
    name: str
    rows: dict[str, list[tuple[str, ...]]]
    wordings: dict[str, Wording]

    def cases(self, language: str) -> list[Case]:
        """All facts of this relation, as cases in one language."""
        wording = self.wordings[language].complete(language)
        rows = [row for row in self.rows[language] if "-" not in row]
        return [
            Case(self.skill, self.name, language, (row[0], *row[2:]), dict(zip("abu", row, strict=False)), wording)
            for row in rows
        ]

    def wrong_answer(self, case: Case, rng: Random) -> str:
        """A plausible wrong answer: the canonical sentence with another fact's answer in it."""
        others = sorted({row[1] for row in self.rows[case.language]} - {case.fields["b"], case.fields["a"], "-"})
        return case.say(case.wording.canonical, b=rng.choice(others))
