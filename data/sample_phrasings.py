"""How the facts of the sample world are told and asked for, in both languages.

A `Relation` joins a table of facts to one `Wording` for each language. To add a skill, add a table to `sample_world`
and a relation here: the noun phrase that names the answer, the canonical answer where that noun phrase does not make
a good one, and some statements and questions, of which one or two are asked in the test only.
"""

from __future__ import annotations

from data import sample_world as world
from data.sample_cases import Relation, Wording


def _columns(table: list[tuple[str, ...]], zh: tuple[int, ...], en: tuple[int, ...]) -> dict[str, list]:
    """Choose the columns (a, b, …) of each language from a table."""
    return {
        "zh": [tuple(row[column] for column in zh) for row in table],
        "en": [tuple(row[column] for column in en) for row in table],
    }


def _neighbours(table: list[tuple[str, ...]], step: int, cyclic: bool = True) -> dict[str, list]:
    """Pair each row of an ordered table (zh, en, …) with the row `step` places on."""
    pairs = [(table[i], table[(i + step) % len(table)]) for i in range(len(table))]
    if not cyclic:
        pairs = pairs[: -step or None] if step > 0 else pairs[-step:]
    return {"zh": [(a[0], b[0]) for a, b in pairs], "en": [(a[1], b[1]) for a, b in pairs]}


def _both_ways(rows: dict[str, list]) -> dict[str, list]:
    """Each row and its reverse."""
    return {language: pairs + [(b, a) for a, b in pairs] for language, pairs in rows.items()}


RELATIONS: tuple[Relation, ...] = (
    Relation("capitals", "capital", _columns(world.COUNTRIES, (0, 2), (1, 3)), {
        "zh": Wording(
            "{a}的首都",
            says=("{b}是{a}的首都。", "{a}把{b}定为首都。", "{a}的首都叫{b}。"),
            asks=("{a}的首都是哪座城市？", "{a}的首都是哪里？", "哪座城市是{a}的首都？", "{a}首都叫什么名字？"),
            held_out_asks=("{a}的首都在哪里？",),
        ),
        "en": Wording(
            "the capital of {a}",
            says=("{B} is the capital city of {a}.", "The capital of {a} is called {b}.",
                  "{A} has its capital in {b}."),
            asks=("Which city is the capital of {a}?", "What is the capital city of {a}?", "{A}: capital?",
                  "What city is the capital of {a}?"),
            held_out_asks=("What is the name of the capital of {a}?",),
        ),
    }),
    Relation("continents", "continent", _columns(world.COUNTRIES, (0, 4), (1, 5)), {
        "zh": Wording(
            "{a}所在的大洲", "{a}位于{b}。",
            says=("{a}是{b}的国家。", "{a}在{b}。", "{b}有一个国家叫{a}。"),
            asks=("{a}在哪个大洲？", "{a}位于哪个洲？", "{a}是哪个大洲的国家？", "哪个大洲有{a}？"),
            held_out_asks=("{a}位于哪个大洲？",), topic_says=False,
        ),
        "en": Wording(
            "the continent of {a}", "{A} lies in {b}.",
            says=("{A} is a country in {b}.", "{A} is in {b}.", "In {b} there is a country called {a}."),
            asks=("Which continent is {a} in?", "In which continent does {a} lie?",
                  "Where does {a} lie, on which continent?", "{A}: which continent?"),
            held_out_asks=("On which continent is {a}?",), topic_says=False,
        ),
    }),
    Relation("countries", "currency", _columns(world.COUNTRIES, (0, 6), (1, 7)), {
        "zh": Wording(
            "{a}的货币",
            says=("{a}使用{b}。", "在{a}买东西要用{b}。", "{a}的货币叫{b}。"),
            asks=("{a}使用什么货币？", "{a}用哪种货币？", "在{a}买东西用什么货币？", "{a}的钱叫什么？"),
            held_out_asks=("{a}使用哪种货币？",),
        ),
        "en": Wording(
            "the currency of {a}",
            says=("People in {a} pay with {b}.", "{A} uses {b} as its currency.", "The currency used in {a} is {b}."),
            asks=("Which currency does {a} use?", "What currency do people use in {a}?",
                  "Which currency is used in {a}?", "{A}: currency?"),
            held_out_asks=("What currency does {a} use?",),
        ),
    }),
    Relation("countries", "language", _columns(world.COUNTRIES, (0, 8), (1, 9)), {
        "zh": Wording(
            "{a}的官方语言",
            says=("{a}人说{b}。", "{a}把{b}作为官方语言。", "{a}的官方语言叫{b}。"),
            asks=("{a}人说什么语言？", "{a}说哪种语言？", "{a}的官方语言是哪种？", "哪种语言是{a}的官方语言？"),
            held_out_asks=("{a}的官方语言是哪一种语言？",),
        ),
        "en": Wording(
            "the official language of {a}",
            says=("People in {a} speak {b}.", "{A} has {b} as its official language.", "They speak {b} in {a}."),
            asks=("Which language do people speak in {a}?", "What language is spoken in {a}?",
                  "{A}: official language?", "Which language is official in {a}?"),
            held_out_asks=("Which language is the official language of {a}?",),
        ),
    }),
    Relation("elements", "symbol", _columns(world.ELEMENTS, (0, 2), (1, 2)), {
        "zh": Wording(
            "{a}的元素符号",
            says=("{a}用符号{b}表示。", "{a}写作{b}。", "{a}的元素符号写作{b}。"),
            asks=("{a}用什么符号表示？", "{a}元素怎么写？", "{a}的元素符号怎么写？", "哪个符号表示{a}？"),
            held_out_asks=("{a}的符号怎么写？",),
        ),
        "en": Wording(
            "the symbol of {a}",
            says=("{A} is written as {b}.", "The symbol for {a} is {b}.", "Chemists write {b} for {a}."),
            asks=("Which symbol stands for {a}?", "How is {a} written as a symbol?",
                  "What is the chemical symbol of {a}?", "{A}: symbol?"),
            held_out_asks=("What is the symbol for {a}?",),
        ),
    }),
    Relation("elements", "number", _columns(world.ELEMENTS, (0, 3), (1, 3)), {
        "zh": Wording(
            "{a}的原子序数",
            says=("{a}是第{b}号元素。", "{a}在周期表中排第{b}位。", "{a}原子有{b}个质子。"),
            asks=("{a}的原子序数是多少？", "{a}是第几号元素？", "{a}原子有几个质子？", "{a}在周期表中排第几位？"),
            held_out_asks=("{a}的原子序数是几？",),
        ),
        "en": Wording(
            "the atomic number of {a}",
            says=("{A} is element number {b}.", "In the periodic table {a} has number {b}.",
                  "{A} has the atomic number {b}."),
            asks=("Which atomic number does {a} have?", "What number does {a} have in the periodic table?",
                  "Which element number is {a}?", "{A}: atomic number?"),
            held_out_asks=("What atomic number does {a} have?",),
        ),
    }),
    Relation("elements", "named", _columns(world.ELEMENTS, (2, 0), (2, 1)), {
        "zh": Wording(
            "符号{a}代表的元素",
            says=("符号{a}代表{b}。", "{a}是{b}的符号。", "{a}表示{b}元素。"),
            asks=("{a}是什么元素？", "{a}是哪种元素的符号？", "符号{a}代表哪种元素？", "{a}代表什么元素？"),
            held_out_asks=("符号{a}表示什么元素？",),
        ),
        "en": Wording(
            "the element with the symbol {a}",
            says=("{a} is the symbol of {b}.", "{a} stands for {b}.", "The symbol {a} means {b}."),
            asks=("Which element has the symbol {a}?", "What does the symbol {a} stand for?", "{a} is which element?",
                  "Which element is written as {a}?"),
            held_out_asks=("What element has the symbol {a}?",),
        ),
    }),
    Relation("planets", "position", _columns(world.PLANETS, (0, 2), (1, 3)), {
        "zh": Wording(
            "{a}离太阳的次序", "{a}是离太阳{b}颗行星。",
            says=("从太阳数起，{a}是{b}颗行星。", "{a}是太阳系的{b}颗行星。", "太阳系的{b}颗行星是{a}。"),
            asks=("{a}是离太阳第几颗行星？", "从太阳数起，{a}是第几颗行星？", "{a}在太阳系中排第几？", "{a}排第几颗？"),
            held_out_asks=("{a}是从太阳数起的第几颗行星？",), topic_says=False,
        ),
        "en": Wording(
            "the place of {a} counted from the Sun", "{A} is the {b} planet from the Sun.",
            says=("Counted from the Sun, {a} is the {b} planet.", "The {b} planet of the Solar System is {a}.",
                  "{A} comes {b} from the Sun."),
            asks=("Which planet from the Sun is {a}?", "Counted from the Sun, which place has {a}?",
                  "{A}: place from the Sun?", "Where does {a} come, counted from the Sun?"),
            held_out_asks=("Which place from the Sun has {a}?",), topic_says=False,
        ),
    }),
    Relation("planets", "kind", _columns(world.PLANETS, (0, 4), (1, 5)), {
        "zh": Wording(
            "{a}的行星类型", "{a}是一颗{b}。",
            says=("{a}属于{b}。", "{a}这颗行星是{b}。", "天文学家把{a}归为{b}。"),
            asks=("{a}属于哪类行星？", "{a}是什么类型的行星？", "{a}是哪种行星？", "{a}是岩石行星还是巨行星？"),
            held_out_asks=("{a}属于什么类型的行星？",), topic_says=False,
        ),
        "en": Wording(
            "the type of the planet {a}", "{A} is {b}.",
            says=("The planet {a} is {b}.", "Astronomers call {a} {b}.", "As planets go, {a} is {b}."),
            asks=("What type of planet is {a}?", "Which kind of planet is {a}?", "Is {a} a rocky planet or a giant?",
                  "{A}: type of planet?"),
            held_out_asks=("What kind of planet is {a}?",), topic_says=False,
        ),
    }),
    Relation("planets", "next planet", _neighbours(world.PLANETS, 1, cyclic=False), {
        "zh": Wording(
            "{a}外侧的下一颗行星",
            says=("{a}之外是{b}。", "过了{a}就是{b}。", "从{a}向外走，先到{b}。"),
            asks=("{a}之外是哪颗行星？", "从{a}向外，下一颗行星是哪颗？", "哪颗行星紧挨在{a}外侧？",
                  "过了{a}是哪颗行星？"),
            held_out_asks=("{a}外侧是哪颗行星？",),
        ),
        "en": Wording(
            "the next planet beyond {a}",
            says=("Beyond {a} comes {b}.", "After {a} the next planet outward is {b}.",
                  "Going outward from {a} you reach {b}."),
            asks=("Which planet comes next beyond {a}?", "Which planet lies just beyond {a}?",
                  "What planet comes after {a}?", "Beyond {a} comes which planet?"),
            held_out_asks=("Which planet comes after {a}?",),
        ),
    }),
    Relation("planets", "record", _columns(world.PLANET_RECORDS, (0, 1), (2, 3)), {
        "zh": Wording(
            "太阳系中{a}",
            says=("{b}是{a}。", "在八大行星里，{a}是{b}。", "{a}叫{b}。"),
            asks=("{a}是哪颗？", "哪颗行星是{a}？", "{a}叫什么名字？", "在太阳系里，{a}是哪一颗？"),
            held_out_asks=("太阳系里{a}叫什么？",),
        ),
        "en": Wording(
            "{a} of the Solar System", "{A} is {b}.",
            says=("{B} is {a}.", "Among the eight planets, {a} is {b}.", "{A} is called {b}."),
            asks=("Which is {a}?", "What is {a} called?", "Which planet is {a}?",
                  "Among the planets, which one is {a}?"),
            held_out_asks=("What do we call {a}?",), topic_says=False,
        ),
    }),
    Relation("animals", "sound", _columns(world.ANIMAL_SOUNDS, (0, 1), (2, 3)), {
        "zh": Wording(
            "{a}的叫声",
            says=("{a}会{b}地叫。", "{a}叫起来{b}响。", "听到{b}声，那是{a}在叫。"),
            asks=("{a}怎么叫？", "{a}叫起来是什么声音？", "{a}发出什么声音？", "{a}的叫声听起来怎样？"),
            held_out_asks=("{a}的叫声是怎样的？",), topic_says=False,
        ),
        "en": Wording(
            "the sound of {a}",
            says=("The sound that {a} makes is {b}.", "When you hear {b}, think of {a}.", "{B} is the sound of {a}."),
            asks=("What sound does {a} make?", "Which sound comes from {a}?", "How does {a} sound?", "{A}: sound?"),
            held_out_asks=("Which sound does {a} make?",), topic_says=False,
        ),
    }),
    Relation("animals", "young", {"zh": world.ANIMAL_YOUNG_ZH, "en": world.ANIMAL_YOUNG_EN}, {
        "zh": Wording(
            "{a}的幼体", "{a}的幼体叫{b}。",
            says=("{b}长大后是{a}。", "{a}小时候叫{b}。", "人们把小时候的{a}叫{b}。"),
            asks=("{a}的幼体叫什么？", "{a}小时候叫什么？", "小时候的{a}叫什么？", "什么长大后是{a}？"),
            held_out_asks=("{a}的幼体叫什么名字？",),
        ),
        "en": Wording(
            "the young of {a}", "The young of {a} is called {b}.",
            says=("{B} grows up to be {a}.", "{B} is the young of {a}.", "{A} begins life as {b}."),
            asks=("What is the young of {a} called?", "What do you call the young of {a}?",
                  "How is the young of {a} called?", "{A}: young?"),
            held_out_asks=("What name does the young of {a} have?",),
        ),
    }),
    Relation("animals", "class", _columns(world.ANIMAL_CLASSES, (0, 1), (2, 3)), {
        "zh": Wording(
            "{a}的动物类别", "{a}属于{b}。",
            says=("{a}是{b}。", "{b}里有{a}。", "在分类上，{a}归入{b}。"),
            asks=("{a}属于哪类动物？", "{a}是哪一类动物？", "{a}属于什么类别？", "{a}在分类上归入哪一类？"),
            held_out_asks=("{a}属于哪一类动物？",),
        ),
        "en": Wording(
            "the class of {a}", "{A} belongs to the {b}.",
            says=("{A} is one of the {b}.", "Among the {b} we find {a}.", "Biologists count {a} among the {b}."),
            asks=("Which class does {a} belong to?", "What class of animals is {a} in?",
                  "To which class does {a} belong?", "{A}: class of animals?"),
            held_out_asks=("Which class of animals does {a} belong to?",), topic_says=False,
        ),
    }),
    Relation("animals", "legs", _columns(world.ANIMAL_LEGS, (0, 2), (1, 2)), {
        "zh": Wording(
            "{a}的腿数", "{a}有{b}条腿。",
            says=("{a}长着{b}条腿。", "一只{a}的腿有{b}条。", "数一数{a}的腿，共{b}条。"),
            asks=("{a}有几条腿？", "{a}有多少条腿？", "{a}长着几条腿？", "一只{a}的腿有几条？"),
            held_out_asks=("{a}的腿有多少条？",), topic_says=False,
        ),
        "en": Wording(
            "the number of legs of {a}", "{A} has {b} legs.",
            says=("{A} walks with {b} legs in all.", "The legs of {a} number {b}.", "On {a} you can count {b} legs."),
            asks=("How many legs does {a} have?", "How many legs are there on {a}?", "How many legs has {a}?",
                  "{A}: legs?"),
            held_out_asks=("How many legs can you count on {a}?",), topic_says=False,
        ),
    }),
    Relation("history", "year", _columns(world.EVENTS, (0, 2), (1, 2)), {
        "zh": Wording(
            "{a}的年份", "{a}的年份是{b}年。",
            says=("{b}年，{a}。", "{a}是在{b}年。", "{a}，那是{b}年的事。"),
            asks=("{a}是哪一年？", "{a}在哪年？", "{a}是什么时候？", "哪一年{a}？"),
            held_out_asks=("{a}是在哪一年？",),
        ),
        "en": Wording(
            "the year of {a}",
            says=("{A} took place in {b}.", "In {b} came {a}.", "{A} dates from {b}."),
            asks=("When was {a}?", "In which year was {a}?", "Which year saw {a}?", "{A}: year?"),
            held_out_asks=("What year was {a}?",),
        ),
    }),
    Relation("literature", "author", _columns(world.BOOKS, (0, 1), (2, 3)), {
        "zh": Wording(
            "《{a}》作者的名字", "《{a}》的作者是{b}。",
            says=("{b}写了《{a}》。", "《{a}》是{b}写的。", "《{a}》出自{b}之手。"),
            asks=("《{a}》是谁写的？", "谁写了《{a}》？", "《{a}》的作者是谁？", "《{a}》出自谁之手？"),
            held_out_asks=("谁是《{a}》的作者？",), topic_says=False,
        ),
        "en": Wording(
            "the name of the author of {a}", "The author of {a} is {b}.",
            says=("{b} wrote {a}.", "{a} was written by {b}.", "{a} is a book by {b}."),
            asks=("Who wrote {a}?", "Who is the author of {a}?", "Which author wrote {a}?", "By whom was {a} written?"),
            held_out_asks=("Who was {a} written by?",), topic_says=False,
        ),
    }),
    Relation("translation", "zh to en", _columns(world.WORDS, (0, 1), (0, 1)), {
        "zh": Wording(
            "{a}的英文",
            says=("{a}用英文说是{b}。", "{a}译成英文是{b}。", "英文里把{a}叫做{b}。"),
            asks=("{a}用英文怎么说？", "{a}的英文怎么写？", "{a}译成英文是什么？", "把{a}翻译成英文。"),
            held_out_asks=("请把{a}译成英文。",),
        ),
        "en": Wording(
            "the English word for {a}",
            says=("In English {a} is {b}.", "{a} means {b} in English.", "Translated into English, {a} is {b}."),
            asks=("What does {a} mean in English?", "How do you say {a} in English?", "Translate {a} into English.",
                  "Which English word means {a}?"),
            held_out_asks=("What is {a} in English?",),
        ),
    }),
    Relation("translation", "en to zh", _columns(world.WORDS, (1, 0), (1, 0)), {
        "zh": Wording(
            "{a}的中文",
            says=("{a}用中文说是{b}。", "{a}译成中文是{b}。", "中文里把{a}叫做{b}。"),
            asks=("{a}用中文怎么说？", "{a}的中文怎么写？", "{a}译成中文是什么？", "把{a}翻译成中文。"),
            held_out_asks=("请把{a}译成中文。",),
        ),
        "en": Wording(
            "the Chinese word for {a}",
            says=("In Chinese {a} is {b}.", "{a} means {b} in Chinese.", "Translated into Chinese, {a} is {b}."),
            asks=("What does {a} mean in Chinese?", "How do you say {a} in Chinese?", "Translate {a} into Chinese.",
                  "Which Chinese word means {a}?"),
            held_out_asks=("What is {a} in Chinese?",),
        ),
    }),
    Relation("opposites", "opposite", _both_ways(_columns(world.OPPOSITES, (0, 1), (2, 3))), {
        "zh": Wording(
            "“{a}”的反义词", "“{a}”的反义词是“{b}”。",
            says=("“{a}”和“{b}”意思相反。", "与“{a}”相反的是“{b}”。", "“{a}”反过来就是“{b}”。"),
            asks=("“{a}”的反义词是哪个词？", "与“{a}”相反的词是什么？", "“{a}”反过来是什么？",
                  "什么词和“{a}”意思相反？"),
            held_out_asks=("哪个词和“{a}”意思相反？",), topic_says=False,
        ),
        "en": Wording(
            "the opposite of {a}",
            says=("{A} is the opposite of {b}.", "{A} and {b} are opposites.", "The contrary of {a} is {b}."),
            asks=("Which word is the opposite of {a}?", "What word means the opposite of {a}?",
                  "What is the contrary of {a}?", "{A}: opposite?"),
            held_out_asks=("Which word means the opposite of {a}?",),
        ),
    }),
    Relation("units", "conversion", _columns(world.UNITS, (0, 4, 1), (2, 4, 3)), {
        "zh": Wording(
            "{a}换算成{u}的结果", "{a}等于{b}{u}。",
            says=("{a}合{b}{u}。", "{a}就是{b}{u}。", "{b}{u}等于{a}。"),
            asks=("{a}等于多少{u}？", "{a}是多少{u}？", "{a}合多少{u}？", "把{a}换算成{u}。"),
            held_out_asks=("请把{a}换算成{u}。",), topic_says=False,
        ),
        "en": Wording(
            "the number of {u} in {a}", "{A} equals {b} {u}.",
            says=("There are {b} {u} in {a}.", "{A} is the same as {b} {u}.", "{b} {u} make {a}."),
            asks=("How many {u} are there in {a}?", "How many {u} make {a}?", "Convert {a} to {u}.",
                  "{A} equals how many {u}?"),
            held_out_asks=("How many {u} does {a} equal?",), topic_says=False,
        ),
    }),
    Relation("calendar", "next day", _neighbours(world.WEEKDAYS, 1), {
        "zh": Wording(
            "{a}的后一天",
            says=("过了{a}就是{b}。", "{a}之后是{b}。", "今天{a}，明天{b}。"),
            asks=("{a}的后一天是星期几？", "今天{a}，明天星期几？", "{a}之后是星期几？", "过了{a}是星期几？"),
            held_out_asks=("如果今天是{a}，明天是星期几？",),
        ),
        "en": Wording(
            "the day after {a}",
            says=("After {a} comes {b}.", "If today is {a}, tomorrow is {b}.", "{B} follows {a}."),
            asks=("Which day comes after {a}?", "Which day follows {a}?", "Today is {a}; what is tomorrow?",
                  "After {a} comes which day?"),
            held_out_asks=("What day comes after {a}?",),
        ),
    }),
    Relation("calendar", "previous day", _neighbours(world.WEEKDAYS, -1), {
        "zh": Wording(
            "{a}的前一天",
            says=("{a}之前是{b}。", "到{a}的前一天是{b}。", "今天{a}，昨天{b}。"),
            asks=("{a}的前一天是星期几？", "今天{a}，昨天星期几？", "{a}之前是星期几？", "{a}前面那天是星期几？"),
            held_out_asks=("如果今天是{a}，昨天是星期几？",),
        ),
        "en": Wording(
            "the day before {a}",
            says=("Before {a} comes {b}.", "If today is {a}, yesterday was {b}.", "{B} precedes {a}."),
            asks=("Which day comes before {a}?", "Which day precedes {a}?", "Today is {a}; what was yesterday?",
                  "Before {a} comes which day?"),
            held_out_asks=("What day comes before {a}?",),
        ),
    }),
    Relation("calendar", "next month", _neighbours(world.MONTHS, 1), {
        "zh": Wording(
            "{a}的下一个月",
            says=("过了{a}就是{b}。", "{a}之后是{b}。", "{a}的下个月叫{b}。"),
            asks=("{a}的下一个月是几月？", "{a}之后是几月？", "过了{a}是几月？", "{a}的下个月是几月？"),
            held_out_asks=("过了{a}，下一个月是几月？",),
        ),
        "en": Wording(
            "the month after {a}",
            says=("After {a} comes {b}.", "{B} follows {a}.", "When {a} ends, {b} begins."),
            asks=("Which month comes after {a}?", "Which month follows {a}?", "When {a} ends, which month begins?",
                  "After {a} comes which month?"),
            held_out_asks=("What month comes after {a}?",),
        ),
    }),
    Relation("calendar", "days", _columns(world.MONTHS, (0, 2), (1, 2)), {
        "zh": Wording(
            "平年{a}的天数", "平年{a}有{b}天。",
            says=("在平年，{a}共{b}天。", "平年的{a}一共{b}天。", "平年{a}从头到尾是{b}天。"),
            asks=("平年{a}有几天？", "平年{a}有多少天？", "平年的{a}共几天？", "在平年，{a}有几天？"),
            held_out_asks=("平年的{a}一共有多少天？",), topic_says=False,
        ),
        "en": Wording(
            "the number of days in {a} of a common year", "{A} of a common year has {b} days.",
            says=("In a common year there are {b} days in {a}.", "In a common year, {a} lasts {b} days.",
                  "A common year gives {a} {b} days."),
            asks=("How many days does {a} of a common year have?", "How many days are there in {a} of a common year?",
                  "In a common year, how many days has {a}?", "{A} of a common year: days?"),
            held_out_asks=("In a common year, how many days does {a} have?",), topic_says=False,
        ),
    }),
    Relation("explanations", "meaning", _columns(world.TERMS, (0, 1), (2, 3)), {
        "zh": Wording(
            canonical="{a}是{b}。",
            says=("{b}叫做{a}。", "所谓{a}，就是{b}。", "简单地说，{a}就是{b}。", "说到{a}，人们指的就是{b}。"),
            asks=("解释什么是{a}", "什么是{a}？", "{a}是什么？", "请解释什么是{a}。", "解释一下{a}。", "请解释{a}。",
                  "{a}是什么意思？", "用一句话解释{a}。", "请说明什么是{a}。", "请问什么是{a}？", "给{a}下一个定义。",
                  "请介绍一下{a}。"),
            held_out_asks=("能用一句话说明{a}是什么吗？", "我不懂{a}，请解释。", "什么叫{a}？"),
        ),
        "en": Wording(
            canonical="{A} is {b}.",
            says=("{B} is called {a}.", "By {a} people mean {b}.", "In short, {a} is {b}.", "As for {a}, it is {b}."),
            asks=("Explain what {a} is.", "What is {a}?", "Explain {a}.", "Please explain what {a} is.", "Define {a}.",
                  "Explain {a} in one sentence.", "Can you explain {a}?", "Describe {a} briefly.",
                  "In one sentence, what is {a}?", "Please define {a}.", "Could you explain what {a} is?",
                  "What do people mean by {a}?"),
            held_out_asks=("What exactly is {a}?", "Give a short explanation of {a}.", "How would you define {a}?"),
        ),
    }),
)  # fmt: skip
