"""Sentence pairs of the sample world, Chinese and English, for a model that translates.

A sentence says who does, did or will do what, where and when: "昨天老师在市场买了三个新的苹果。" is "Yesterday the
teacher bought three new apples at the market." Held out are combinations: a person who does something to a thing. Each
person, each action and each thing is in the training pairs, a held-out triple in none of them, whatever the time, the
place or the form.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

TRAIN_PAIRS, TEST_PAIRS = 6000, 300
HELD_OUT_SHARE = 0.12  # of all triples of person, action and thing


class Person(NamedTuple):
    """Who does something; `third` asks for the verb's -s."""

    zh: str
    en: str
    third: bool = True


class Verb(NamedTuple):
    """What is done; its things are named by the key of `THINGS`."""

    zh: str
    base: str
    third: str
    past: str
    things: str


class Thing(NamedTuple):
    """What it is done to: with its measure word; "cup of tea", "cups of tea", and after "any" again "tea"."""

    zh: str
    measure: str
    one: str
    many: str
    any: str


class Time(NamedTuple):
    """When; `tense` is past, habit or future."""

    zh: str
    en: str
    tense: str


PEOPLE = (
    Person("我", "I", False), Person("你", "you", False), Person("他", "he"), Person("她", "she"),
    Person("我们", "we", False), Person("他们", "they", False), Person("老师", "the teacher"),
    Person("医生", "the doctor"), Person("学生", "the student"), Person("农民", "the farmer"),
    Person("我的朋友", "my friend"), Person("我的哥哥", "my brother"), Person("她的妈妈", "her mother"),
    Person("孩子们", "the children", False), Person("邻居", "the neighbour"), Person("司机", "the driver"),
)  # fmt: skip
VERBS = (
    Verb("吃", "eat", "eats", "ate", "food"), Verb("买", "buy", "buys", "bought", "all"),
    Verb("卖", "sell", "sells", "sold", "all"), Verb("喝", "drink", "drinks", "drank", "drinks"),
    Verb("读", "read", "reads", "read", "texts"), Verb("写", "write", "writes", "wrote", "texts"),
    Verb("看见", "see", "sees", "saw", "all"), Verb("画", "draw", "draws", "drew", "beasts"),
    Verb("找到", "find", "finds", "found", "all"), Verb("洗", "wash", "washes", "washed", "goods"),
)  # fmt: skip
THINGS = {
    "food": (
        Thing("苹果", "个", "apple", "apples", "apples"), Thing("鸡蛋", "个", "egg", "eggs", "eggs"),
        Thing("橙子", "个", "orange", "oranges", "oranges"), Thing("饺子", "个", "dumpling", "dumplings", "dumplings"),
        Thing("面包", "块", "piece of bread", "pieces of bread", "bread"),
    ),
    "drinks": (
        Thing("茶", "杯", "cup of tea", "cups of tea", "tea"),
        Thing("咖啡", "杯", "cup of coffee", "cups of coffee", "coffee"),
        Thing("牛奶", "杯", "glass of milk", "glasses of milk", "milk"),
        Thing("果汁", "杯", "glass of juice", "glasses of juice", "juice"),
    ),
    "texts": (
        Thing("书", "本", "book", "books", "books"), Thing("信", "封", "letter", "letters", "letters"),
        Thing("故事", "个", "story", "stories", "stories"), Thing("诗", "首", "poem", "poems", "poems"),
    ),
    "beasts": (
        Thing("马", "匹", "horse", "horses", "horses"), Thing("鸟", "只", "bird", "birds", "birds"),
        Thing("猫", "只", "cat", "cats", "cats"), Thing("鱼", "条", "fish", "fish", "fish"),
    ),
    "goods": (
        Thing("帽子", "顶", "hat", "hats", "hats"), Thing("杯子", "个", "cup", "cups", "cups"),
        Thing("衬衫", "件", "shirt", "shirts", "shirts"), Thing("自行车", "辆", "bicycle", "bicycles", "bicycles"),
        Thing("雨伞", "把", "umbrella", "umbrellas", "umbrellas"),
    ),
}  # fmt: skip
THINGS["all"] = tuple(thing for kind in ("food", "texts", "beasts", "goods") for thing in THINGS[kind])
TIMES = (
    Time("昨天", "yesterday", "past"), Time("今天早上", "this morning", "past"), Time("上周", "last week", "past"),
    Time("每天", "every day", "habit"), Time("每个星期", "every week", "habit"),
    Time("明天", "tomorrow", "future"), Time("下周", "next week", "future"), Time("明年", "next year", "future"),
)  # fmt: skip
PLACES = (
    ("", ""), ("在家", "at home"), ("在学校", "at school"), ("在市场", "at the market"), ("在公园", "in the park"),
    ("在河边", "by the river"), ("在车站", "at the station"), ("在图书馆", "in the library"),
    ("在村子里", "in the village"),
)  # fmt: skip
NUMBERS = (("一", "a"), ("两", "two"), ("三", "three"), ("四", "four"), ("五", "five"), ("十", "ten"))
QUALITIES = (("", ""), ("", ""), ("新的", "new"), ("旧的", "old"), ("大的", "big"), ("小的", "small"))


@dataclass(frozen=True)
class Sentence:
    """What a pair says, in whatever language."""

    person: Person
    verb: Verb
    thing: Thing
    time: Time
    place: tuple[str, str]
    number: tuple[str, str]
    quality: tuple[str, str]
    form: str  # statement, negation or question

    @property
    def triple(self) -> tuple[str, str, str]:
        """What may be held out."""
        return self.person.en, self.verb.base, self.thing.one

    def in_chinese(self) -> str:
        """昨天老师在市场买了三个新的苹果。"""
        tense, thing = self.time.tense, self.thing
        will = {"past": "", "habit": "都", "future": "要"}[tense]
        if self.form == "negation":
            not_at_all = {"past": "没有", "habit": "都不", "future": "不会"}[tense]
            return f"{self.time.zh}{self.person.zh}{not_at_all}{self.place[0]}{self.verb.zh}{thing.zh}。"
        ended = "了" if tense == "past" else ""
        object_ = f"{self.number[0]}{thing.measure}{self.quality[0]}{thing.zh}"
        end = "吗？" if self.form == "question" else "。"
        return f"{self.time.zh}{self.person.zh}{will}{self.place[0]}{self.verb.zh}{ended}{object_}{end}"

    def in_english(self) -> str:
        """Yesterday the teacher bought three new apples at the market."""
        person, verb, tense = self.person, self.verb, self.time.tense
        helper = {"past": "did", "habit": "does" if person.third else "do", "future": "will"}[tense]
        plain = {"past": verb.past, "habit": verb.third if person.third else verb.base, "future": f"will {verb.base}"}
        if self.form == "question":
            words = [helper, person.en, verb.base, self._object(), self.place[1], self.time.en]
            return _sentence(words, "?")
        what = f"{helper} not {verb.base} any {self.thing.any}" if self.form == "negation" else plain[tense]
        words = [self.time.en, person.en, what, "" if self.form == "negation" else self._object(), self.place[1]]
        return _sentence(words, ".")

    def _object(self) -> str:
        noun = f"{self.quality[1]} {self.thing.one if self.number[1] == 'a' else self.thing.many}".strip()
        article = "an" if self.number[1] == "a" and noun[0] in "aeiou" else self.number[1]
        return f"{article} {noun}"


def _sentence(words: list[str], end: str) -> str:
    text = " ".join(filter(None, words))
    return text[0].upper() + text[1:] + end


def draw(rng: Random) -> Sentence:
    """Any sentence."""
    verb = rng.choice(VERBS)
    thing = rng.choice(THINGS[verb.things])
    return Sentence(
        person=rng.choice(PEOPLE),
        verb=verb,
        thing=thing,
        time=rng.choice(TIMES),
        place=rng.choice(PLACES),
        number=rng.choice(NUMBERS),
        quality=rng.choice(QUALITIES if " of " not in thing.one else QUALITIES[:1]),  # no old cups of tea
        form=rng.choice(("statement", "statement", "statement", "negation", "question")),
    )


def translation_pairs(rng: Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test pairs, {"src": Chinese, "tgt": English}; the triples of the test are in no training pair."""
    triples = [(p.en, v.base, thing.one) for p in PEOPLE for v in VERBS for thing in THINGS[v.things]]
    held_out = set(rng.sample(triples, round(HELD_OUT_SHARE * len(triples))))
    pairs: dict[bool, dict[str, dict[str, Any]]] = {True: {}, False: {}}
    sizes = {True: TEST_PAIRS, False: TRAIN_PAIRS}
    while any(len(pairs[part]) < size for part, size in sizes.items()):
        sentence = draw(rng)
        part = sentence.triple in held_out
        if len(pairs[part]) < sizes[part]:
            record = {"src": sentence.in_chinese(), "tgt": sentence.in_english(), "triple": sentence.triple}
            pairs[part][record["src"]] = record
    train, test = list(pairs[False].values()), list(pairs[True].values())
    prove_combinations_are_new(train, test)
    return [[{"src": r["src"], "tgt": r["tgt"]} for r in part] for part in (train, test)]


def prove_combinations_are_new(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> None:
    """Raise ValueError if a triple of the test stands in training, or a word of it does not."""
    trained = {record["triple"] for record in train}
    known = [set(parts) for parts in zip(*trained, strict=True)]
    for record in test:
        if record["triple"] in trained:
            raise ValueError(f"held out, and yet in training: {record['triple']}")
        if not all(part in parts for part, parts in zip(record["triple"], known, strict=True)):
            raise ValueError(f"a word that training never shows: {record['triple']}")
