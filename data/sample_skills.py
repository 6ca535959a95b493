"""The skills of the sample world that generalise: addition, subtraction, comparing, sorting, counting, summarising.

A `Skill` turns operands into a `Case`. To add one, write how operands become the fields of its templates and how a
wrong result looks, and give it a `Wording` for each language.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from data import sample_world as world
from data.sample_cases import LANGUAGES, Case, Wording
from data.sample_world import WORDS

# of numbers; of a word's row in WORDS and a count for counting; of rows and the order of sentences for summarising
Operands = tuple
NUMBERS = range(10, 100)
MOST_REPEATS = 9


@dataclass(frozen=True)
class Skill:
    """A skill whose answers follow from a rule instead of being facts to remember."""

    name: str
    draw: Callable[[Random], Operands]
    fields: Callable[[Operands, str], dict[str, str]]  # operands, language → what the templates need
    # a wrong result, as it stands in field {b}, or several fields, each a text or a row of texts by language
    wrong: Callable[[Operands, Random], str | dict[str, str | tuple[str, ...]]]
    wordings: dict[str, Wording]
    all_operands: tuple[Operands, ...] | None = None  # None where there are too many to list
    held_out_by: str = "operands"  # what a test question of operands that were never seen together is held out by
    examples_a_line: tuple[int, int] = (5, 9)  # worked examples in a line of the pretraining text: fewest, most

    def case(self, operands: Operands, language: str) -> Case:
        """The case of these operands in one language."""
        return Case(self.name, self.name, language, operands, self.fields(operands, language), self.wordings[language])

    def wrong_answer(self, case: Case, rng: Random) -> str:
        """A plausible wrong answer: the canonical sentence with a wrong result in it."""
        wrong = self.wrong(case.key, rng)
        fields = wrong if isinstance(wrong, dict) else {"b": wrong}
        in_language = {n: v if isinstance(v, str) else v[LANGUAGES.index(case.language)] for n, v in fields.items()}
        return case.say(case.wording.canonical, **in_language)


def _two_numbers(rng: Random) -> Operands:
    return rng.choice(NUMBERS), rng.choice(NUMBERS)


def _slip(result: int, rng: Random) -> str:
    """A result with a slip of one, two, ten or twenty; never negative."""
    return str(rng.choice([wrong for slip in (1, 2, 10, 20) for wrong in (result - slip, result + slip) if wrong >= 0]))


def _sum_fields(pair: Operands, _: str) -> dict[str, str]:
    """The sum place by place, as on paper: 37 + 45 by {u} "7 + 5 = 12" and {t} "3 + 4 + 1 = 8"."""
    x, y = pair
    ones, carry = x % 10 + y % 10, (x % 10 + y % 10) // 10
    tens = f"{x // 10} + {y // 10}" + " + 1" * carry
    return {
        "x": str(x), "y": str(y), "b": str(x + y),
        "u": f"{x % 10} + {y % 10} = {ones}", "t": f"{tens} = {x // 10 + y // 10 + carry}",
    }  # fmt: skip


def _difference_fields(pair: Operands, _: str) -> dict[str, str]:
    """The difference place by place, as on paper: 52 - 37 by {u} "12 - 7 = 5" and {t} "5 - 3 - 1 = 1"."""
    x, y = pair
    borrow = int(x % 10 < y % 10)
    ones = x % 10 + 10 * borrow
    tens = f"{x // 10} - {y // 10}" + " - 1" * borrow
    return {
        "x": str(x), "y": str(y), "b": str(x - y),
        "u": f"{ones} - {y % 10} = {ones - y % 10}", "t": f"{tens} = {x // 10 - y // 10 - borrow}",
    }  # fmt: skip


ADDITION = Skill(
    "addition",
    draw=_two_numbers,
    fields=_sum_fields,
    wrong=lambda pair, rng: _slip(pair[0] + pair[1], rng),
    all_operands=tuple((x, y) for x in NUMBERS for y in NUMBERS),
    wordings={
        "zh": Wording(
            canonical="{u}，{t}，{x} + {y} = {b}。", says=("{u}，{t}，{x} + {y} = {b}",),
            asks=("{x} + {y} = ？", "{x}加{y}等于多少？", "计算 {x} + {y}。", "求{x}与{y}的和。",
                  "请问 {x} + {y} 等于几？", "{x} + {y} 是多少？", "把{x}和{y}加起来。", "帮我算一下 {x} + {y}。",
                  "{x}和{y}相加得多少？", "我有{x}元，又得到{y}元，一共多少元？", "请告诉我 {x} + {y} 的结果。"),
            held_out_asks=("{x}与{y}的和是多少？", "请计算{x}加{y}。", "你能算出 {x} + {y} 吗？"),
        ),
        "en": Wording(
            canonical="{u}, {t}, {x} + {y} = {b}.", says=("{u}, {t}, {x} + {y} = {b}",),
            asks=("{x} + {y} = ?", "What is {x} + {y}?", "Calculate {x} + {y}.", "Add {x} and {y}.",
                  "How much is {x} plus {y}?", "{x} plus {y} is what?", "Find the sum of {x} and {y}.",
                  "Please work out {x} + {y}.", "Could you add {x} and {y} for me?",
                  "I have {x} coins and get {y} more; how many in all?", "Tell me the result of {x} + {y}."),
            held_out_asks=("What is the sum of {x} and {y}?", "What is {x} plus {y}?", "Can you work out {x} + {y}?"),
        ),
    },
)  # fmt: skip

SUBTRACTION = Skill(
    "subtraction",
    draw=lambda rng: tuple(sorted(_two_numbers(rng), reverse=True)),
    fields=_difference_fields,
    wrong=lambda pair, rng: _slip(pair[0] - pair[1], rng),
    all_operands=tuple((x, y) for x in NUMBERS for y in NUMBERS if x >= y),
    wordings={
        "zh": Wording(
            canonical="{u}，{t}，{x} - {y} = {b}。", says=("{u}，{t}，{x} - {y} = {b}",),
            asks=("{x} - {y} = ？", "{x}减{y}等于多少？", "计算 {x} - {y}。", "求{x}与{y}的差。",
                  "请问 {x} - {y} 等于几？", "{x} - {y} 是多少？", "从{x}里减去{y}。", "帮我算一下 {x} - {y}。",
                  "{x}减去{y}得多少？", "我有{x}元，花掉{y}元，还剩多少元？", "请告诉我 {x} - {y} 的结果。"),
            held_out_asks=("{x}与{y}的差是多少？", "请计算{x}减{y}。", "你能算出 {x} - {y} 吗？"),
        ),
        "en": Wording(
            canonical="{u}, {t}, {x} - {y} = {b}.", says=("{u}, {t}, {x} - {y} = {b}",),
            asks=("{x} - {y} = ?", "What is {x} - {y}?", "Calculate {x} - {y}.", "From {x} take away {y}.",
                  "How much is {x} minus {y}?", "{x} minus {y} is what?", "Find the difference of {x} and {y}.",
                  "Please work out {x} - {y}.", "Could you take {y} from {x} for me?",
                  "I had {x} coins and spent {y}; how many are left?", "Tell me the result of {x} - {y}."),
            held_out_asks=("What is the difference of {x} and {y}?", "What is {x} minus {y}?",
                           "Can you work out {x} - {y}?"),
        ),
    },
)  # fmt: skip

_COMPARED = {"zh": {"larger": "大", "smaller": "小"}, "en": {"larger": "larger", "smaller": "smaller"}}


def _draw_comparison(rng: Random) -> Operands:
    first, second = rng.sample(NUMBERS, 2)
    return first, second, rng.choice(("larger", "smaller"))


def _comparison_fields(operands: Operands, language: str) -> dict[str, str]:
    x, y, which = operands
    first, second = (max(x, y), min(x, y)) if which == "larger" else (min(x, y), max(x, y))
    return {"x": str(x), "y": str(y), "w": _COMPARED[language][which], "b": str(first), "c": str(second)}


COMPARING = Skill(
    "comparing",
    draw=_draw_comparison,
    fields=_comparison_fields,
    wrong=lambda operands, rng: {  # the two numbers exchanged
        "b": _comparison_fields(operands, "en")["c"],
        "c": _comparison_fields(operands, "en")["b"],
    },
    wordings={
        "zh": Wording(
            canonical="{b}比{c}{w}。", says=("{b}比{c}{w}",),
            asks=("{x}和{y}哪个{w}？", "{x}和{y}，哪个更{w}？", "{x}与{y}谁{w}？", "比较{x}和{y}，找出{w}的数。",
                  "请问{x}和{y}中哪个数{w}？", "{x}、{y}，哪个数更{w}？", "在{x}和{y}里选出更{w}的数。",
                  "请告诉我{x}和{y}哪个比较{w}。", "哪个数更{w}，{x}还是{y}？", "{x}还是{y}{w}？"),
            held_out_asks=("{x}与{y}相比，哪个{w}？", "我想知道{x}和{y}哪个数{w}。", "你知道{x}和{y}哪个更{w}吗？"),
        ),
        "en": Wording(
            canonical="{b} is {w} than {c}.", says=("{b} is {w} than {c}",),
            asks=("Which is {w}, {x} or {y}?", "Which number is {w}: {x} or {y}?", "{x} or {y}: which is {w}?",
                  "Compare {x} and {y}; name the {w} one.", "Of {x} and {y}, which is the {w} number?",
                  "Name the {w} of {x} and {y}.", "Please pick the {w} number from {x} and {y}.",
                  "Tell me which is {w}, {x} or {y}.", "Is {x} or {y} the {w} number?",
                  "The {w} of {x} and {y}, please."),
            held_out_asks=("Which one is {w}, {x} or {y}?", "Pick the {w} one of {x} and {y}.",
                           "Which of {x} and {y} is the {w} number?"),
        ),
    },
)  # fmt: skip


def _draw_list(rng: Random) -> Operands:
    return tuple(rng.sample(NUMBERS, rng.choice((3, 4))))


def _wrong_order(numbers: Operands, rng: Random) -> str:
    ordered = sorted(numbers)
    place = rng.randrange(len(ordered) - 1)
    ordered[place], ordered[place + 1] = ordered[place + 1], ordered[place]
    return " < ".join(map(str, ordered))


SORTING = Skill(
    "sorting",
    draw=_draw_list,
    fields=lambda numbers, language: {
        "x": ("、" if language == "zh" else ", ").join(map(str, numbers)),
        "b": " < ".join(map(str, sorted(numbers))),
    },
    wrong=_wrong_order,
    wordings={
        "zh": Wording(
            canonical="{b}。", says=("{x}从小到大是 {b}",),
            asks=("把{x}从小到大排列。", "请将{x}按从小到大排序。", "{x}从小到大怎么排？", "给{x}排序。",
                  "{x}，从小到大排一排。", "请帮我把这些数从小到大排好：{x}", "从小到大排列：{x}",
                  "将{x}由小到大排序。", "排序：{x}", "能不能把{x}从小到大排好？"),
            held_out_asks=("请把{x}从小到大排列。", "将这些数从小到大排序：{x}", "请给{x}从小到大排序。"),
        ),
        "en": Wording(
            canonical="{b}.", says=("{x} in order: {b}",),
            asks=("Sort {x}.", "Sort {x} from small to large.", "Put {x} in order.", "Arrange {x} from small to large.",
                  "What is {x} in ascending order?", "Please order {x} from small to large.",
                  "Order these numbers: {x}", "From small to large, please: {x}", "Could you sort {x} for me?",
                  "Sort these numbers: {x}"),
            held_out_asks=("Please sort {x}.", "Arrange these numbers from small to large: {x}",
                           "Could you put {x} in order?"),
        ),
    },
)  # fmt: skip

COUNTING = Skill(
    "counting",
    draw=lambda rng: (rng.randrange(len(WORDS)), rng.randint(2, MOST_REPEATS)),
    fields=lambda operands, language: {
        "a": (word := WORDS[operands[0]][0 if language == "zh" else 1]),
        "x": " ".join([word] * operands[1]),
        "b": str(operands[1]),
    },
    wrong=lambda operands, rng: str(rng.choice([n for n in range(2, MOST_REPEATS + 1) if n != operands[1]])),
    all_operands=tuple((word, count) for word in range(len(WORDS)) for count in range(2, MOST_REPEATS + 1)),
    wordings={
        "zh": Wording(
            canonical="{a}出现了{b}次。", says=("{x}：{a}出现了{b}次",),
            asks=("数一数： {x}", "下面的词出现了几次？ {x}", "请数一数这个词出现了几次： {x}", "几次？ {x}",
                  "请数出次数： {x}", "这里有几个词？ {x}", "帮我数一下： {x}", "一共有几个？ {x}", "数数看： {x}",
                  "这个词重复了多少次？ {x}"),
            held_out_asks=("请数一下有几个： {x}", "这个词出现了多少次？ {x}", "请帮我数一数几次： {x}"),
        ),
        "en": Wording(
            canonical="The word {a} appears {b} times.", says=("{x}: the word {a} appears {b} times",),
            asks=("Count: {x}", "Count the words: {x}", "How many times does the word appear? {x}", "How many? {x}",
                  "Please count: {x}", "How many words are here? {x}", "How often does it appear: {x}",
                  "Count these for me: {x}", "Tell me how many times the word appears: {x}",
                  "Could you count this? {x}"),
            held_out_asks=("Please count these words: {x}", "How many times does it appear? {x}",
                           "How many words do you count? {x}"),
        ),
    },
)  # fmt: skip

_PASSAGES = {  # the event in the first or the second of three sentences; {t} when, {e} around it, {f} afterwards
    "zh": ("{t}，{s}在{p}{d}。{e}{f}", "{e}{t}，{s}在{p}{d}。{f}"),
    "en": ("{t} {s} {d} at {p}. {e} {f}", "{e} {t} {s} {d} at {p}. {f}"),
}
_PARTS = {
    "s": world.PEOPLE, "p": world.PLACES, "d": world.DEEDS,
    "t": world.TIMES, "e": world.SURROUNDINGS, "f": world.AFTERWARDS,
}  # fmt: skip
SUMMARY_PARTS = 3  # the first parts are what a summary keeps, and what no two passages of training and test share


def _passage_fields(operands: Operands, language: str) -> dict[str, str]:
    *rows, order = operands
    parts = {name: row[LANGUAGES.index(language)] for name, row in zip(_PARTS, rows, strict=True)}
    passage = _PASSAGES[language][order].format(**parts)
    return {"x": passage, **{name: parts[name] for name in list(_PARTS)[:SUMMARY_PARTS]}}


def _wrong_summary(operands: Operands, rng: Random) -> dict[str, tuple[str, str]]:
    """Who, where or what is another one."""
    name, row = rng.choice(list(zip(_PARTS, operands, strict=False))[:SUMMARY_PARTS])
    return {name: rng.choice([other for other in _PARTS[name] if other != row])}


SUMMARISING = Skill(
    "summarising",
    draw=lambda rng: (*(rng.choice(table) for table in _PARTS.values()), rng.randrange(2)),
    fields=_passage_fields,
    wrong=_wrong_summary,
    held_out_by="passage",
    examples_a_line=(1, 1),
    wordings={
        "zh": Wording(
            canonical="{s}在{p}{d}。", says=("{x}总之，{s}在{p}{d}",),
            asks=("用一句话概括：{x}", "概括下面的短文：{x}", "总结：{x}", "请概括这段话：{x}", "请用一句话总结：{x}",
                  "{x}请概括这段话。", "{x}用一句话总结。", "这段话讲了什么？{x}", "写出下文的大意：{x}",
                  "帮我概括一下：{x}"),
            held_out_asks=("请用一句话概括下文：{x}", "下面这段话讲了什么？{x}", "请写出这段话的大意：{x}"),
        ),
        "en": Wording(
            canonical="{s} {d} at {p}.", says=("{x} In short, {s} {d} at {p}",),
            asks=("Summarise in one sentence: {x}", "Summarise this passage: {x}", "Sum up: {x}",
                  "Please summarise: {x}", "Give a summary in one sentence: {x}", "{x} Summarise this.",
                  "{x} Sum this up in one sentence.", "What is this passage about? {x}", "Write a short summary: {x}",
                  "Summarise the following text: {x}"),
            held_out_asks=("Please summarise this passage in one sentence: {x}", "What happens in this text? {x}",
                           "Sum this text up in one sentence: {x}"),
        ),
    },
)  # fmt: skip

SKILLS: tuple[Skill, ...] = (ADDITION, SUBTRACTION, COMPARING, SORTING, COUNTING, SUMMARISING)
PAIR_SKILLS = (ADDITION, SUBTRACTION, COMPARING)
