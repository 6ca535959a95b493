"""Filters: what is forbidden is found however it is written, clean text passes, and a stream never lets it out."""

import random
import unicodedata

import pytest

from command_line import UserError
from inference.service import folding
from inference.service.filters import DEFAULT_MESSAGE, Filters

LIST = """
# words, Chinese and English
bastard
ass
cheap pills
Viagra
penis
违禁词
台独
赌博
代开发票
加vx
!舞台独白
!舞台独奏
!Ass Monastery
/\\b1[3-9]\\d{9}\\b/
/卖(号|枪)/
"""

FORBIDDEN = {
    "en": [
        "You bastard!", "BASTARD", "b a s t a r d", "b.a.s.t.a.r.d", "bas-tard", "bas*tard", "b_a_s_t_a_r_d",
        "baaaastard", "ｂａｓｔａｒｄ", "b\u200bastard", "bas\u00adtard", "bаstаrd", "βastard", "𝓫𝓪𝓼𝓽𝓪𝓻𝓭",
        "🅱🅰🆂🆃🅰🆁🅳", "🇧🇦🇸🇹🇦🇷🇩", "ⓑⓐⓢⓣⓐⓡⓓ", "b@st@rd", "ba$tard", "b4st4rd", "bástärd", "what a bastard.", "a$$",
        "you @ss", "4ss", "pure ass-kicking", "asssss", "Buy cheap pills now", "cheap-pills", "CHEAP   PILLS",
        "c h e a p p i l l s", "v1agra", "V!AGRA", "v|agra", "vi​agra", "viagrа", "p e n i s", "p-e-n-i-s",
        "call 13812345678 today",
    ],
    "zh": [
        "这是违禁词", "這是違禁詞", "违 禁 词", "违*禁*词", "违-禁-词", "违，禁，词", "违。禁。词",
        "违\u200b禁\u200b词", "违\n禁\n词", "违　禁　词", "支持台独", "台　獨", "台-独", "舞台上有人喊台独",
        "网上赌博", "賭博", "賭 博", "赌@博", "赌🎲博", "代開發票", "代开-发票", "加VX好友", "加ｖｘ", "加 V X",
        "加Vχ", "他卖号", "他賣槍",
    ],
}  # fmt: skip
CLEAN = {
    "en": [
        "Scunthorpe has a bastardised spelling? No: bastardise is another word.",
        "class, assume, passage, bassist, embassy", "The pen is mightier than the sword.", "a SS officer",
        "as she said", "It costs as $5", "He has cheap tea. Pills are dear.",
        "cheap\n\n\n\n\n\n\n\n\n\n\npills", "I am a C S student", "Vi agrees", "via grand hotels", "peninsula",
        "the number 138123456789", "x = a[i]; s += s", "U S A and U K", "5 + 5 = 10!",
        "Ass Monastery is in Serbia", "hello class! Why?",
    ],
    "zh": [
        "舞台独白", "他在舞台獨奏", "他喜欢赌，博客写得好", "他说违约，禁止入内，词也不写", "开发票据系统",
        "代理开发，票价", "交通信号和卖菜", "台湾独特的风景", "电话 1381234567", "加v字领", "卖书号码牌",
        "一、二、三、四", "赌气。博物馆",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def filters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filters")
    (folder / "words.txt").write_text(LIST, encoding="utf-8")
    (folder / "message.txt").write_text("请换个话题。\n", encoding="utf-8")
    return Filters.load([folder])


def streamed(filters, pieces):
    """What leaves of an answer, piece by piece, and the finding."""
    guard = filters.stream()
    return "".join([*map(guard.feed, pieces), guard.finish()]), guard.finding


@pytest.mark.parametrize("text", [text for texts in FORBIDDEN.values() for text in texts])
def test_evasions_are_found(filters, text):
    """As a whole, and in a stream, of which nothing but what stands before leaves."""
    assert filters.check(text) is not None
    sent, finding = streamed(filters, text)
    assert finding is not None
    assert filters.check(sent) is None


@pytest.mark.parametrize("text", [text for texts in CLEAN.values() for text in texts])
def test_clean_text_passes(filters, text):
    assert filters.check(text) is None
    assert streamed(filters, text) == (text, None)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_precision_and_recall(filters, language):
    """On the set above, and on sentences that hold its texts: precision and recall of 1."""
    around = {"en": "Well, {} and so on.", "zh": "请问，{}，是这样吗？"}[language]
    found = [filters.check(around.format(text)) is not None for text in FORBIDDEN[language]]
    wrong = [filters.check(around.format(text)) is not None for text in CLEAN[language]]
    recall, precision = sum(found) / len(found), sum(found) / (sum(found) + sum(wrong))
    assert (precision, recall) == (1, 1), (found, wrong)


def test_streams_are_judged_like_whole_texts(filters):
    """Whatever the pieces: the same verdict as on the whole, all of a clean text leaves, and never a phrase."""
    chance = random.Random(0)
    parts = [
        "b", "a", "ass", "ba", "stard", "违", "禁", "词", "台独", "舞", "白", "cheap", "pills", "P", "enis",
        "加", "vx", "博", "赌", " ", " ", "-", "*", "，", ". ", "!", "$", "@", "1", "4", "\u200b", "\n", "😀",
        "x", "s", "  ", "13", "8123", "45678",
    ]  # fmt: skip
    verdicts = []
    for _ in range(1500):
        pieces = chance.choices(parts, k=chance.randint(1, 14))
        text = "".join(pieces)
        sent, finding = streamed(filters, pieces)
        assert (finding is None) == (filters.check(text) is None), pieces
        assert text.startswith(sent) and filters.check(sent) is None, pieces
        assert finding or sent == text
        verdicts.append(finding is not None)
    assert 0.1 < sum(verdicts) / len(verdicts) < 0.9


def test_only_what_may_become_a_phrase_waits(filters):
    """Everything else leaves at once; a beginning leaves as soon as it goes on differently."""
    guard = filters.stream()
    assert [guard.feed(piece) for piece in ("Hello, ", "ba", "sil", " as", "k 违", "反规定", "台")] == [
        "Hello, ", "", "basil", " ", "ask ", "违反规定", "",
    ]  # fmt: skip
    assert guard.finish() == "台"


def test_nothing_leaves_after_a_finding(filters):
    guard = filters.stream()
    assert [guard.feed(piece) for piece in ("so: ", "违禁", "词", " more")] == ["so: ", "", "", ""]
    assert guard.finish() == ""
    assert guard.finding.entry == "违禁词"
    assert guard.finding.source.endswith("words.txt:8")


def test_pattern_at_the_end_waits_for_what_follows(filters):
    """Eleven digits are a number of a telephone, twelve are none; what is incomplete waits."""
    assert streamed(filters, ["tel 1381", "2345678", "9 ok"]) == ("tel 13812345678" + "9 ok", None)
    assert streamed(filters, ["tel 1381", "2345678"])[0] == "tel "


def test_an_exception_covers_its_own_phrase_alone(filters):
    assert filters.check("舞台独白") is None
    assert filters.check("舞台独白与台独") is not None
    assert streamed(filters, list("舞台独唱"))[1] is not None  # no exception after all


def test_message_and_its_default(filters, tmp_path):
    assert filters.message == "请换个话题。"
    (tmp_path / "a.txt").write_text("word", encoding="utf-8")
    assert Filters.load([tmp_path / "a.txt"]).message == DEFAULT_MESSAGE


def test_edits_are_seen(tmp_path):
    """Answers under way keep their list; a faulty edit keeps the old list, and is told once."""
    path = tmp_path / "a.txt"
    path.write_text("first", encoding="utf-8")
    filters = Filters.load([tmp_path])
    guard = filters.stream()
    assert not filters.reload_if_changed()
    path.write_text("second entry", encoding="utf-8")
    (tmp_path / "b.txt").write_text("third", encoding="utf-8")
    assert filters.reload_if_changed()
    assert filters.check("first") is None
    assert filters.check("second entry") and filters.check("third")
    guard.feed("first ")
    assert guard.finding
    path.write_text("/(/", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.txt:1"):
        filters.reload_if_changed()
    assert not filters.reload_if_changed()
    assert filters.check("third")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"ok\n/(a/", r"a\.txt:2: '\(a' is no regular expression"),
        (b"/x*/", "matches the empty text"),
        (b"x", "fewer than two letters"),
        (b"!?", "fewer than two letters"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
    ],
)
def test_faulty_lists_are_told_in_a_sentence(tmp_path, content, complaint):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        Filters.load([tmp_path])
    with pytest.raises(UserError, match="does not exist"):
        Filters.load([tmp_path / "nowhere"])


def test_a_pattern_that_runs_away_is_stopped(tmp_path):
    """It blocks what it was tried on, and the log says which pattern it is."""
    (tmp_path / "a.txt").write_text("/(a|aa)+$/", encoding="utf-8")
    finding = Filters.load([tmp_path]).check("a" * 3000 + "b")
    assert finding is not None and finding.source.endswith(":1")


def test_hostile_text_costs_no_more_than_its_length(filters):
    """Time grows with the text, not with its square: counted in readings, which are at most 18."""
    texts = (
        "ab" * 9000,
        "a1" * 9000,
        "$a" * 9000,
        "a " * 9000,
        "a-" * 9000,
        "\u200b" * 9000,
        "aaa1-" * 3000,
        "舞台独白" * 8000,
    )
    for text in texts:
        assert len(list(folding.readings(folding.fold(text)))) <= 18
        filters.check(text)


def test_classifier_judges_what_the_lists_let_through(tmp_path):
    (tmp_path / "a.txt").write_text("word", encoding="utf-8")
    filters = Filters.load([tmp_path], classifier=lambda text: "rude" if text.isupper() else None)
    assert filters.check("fine") is None
    assert filters.check("SHOUT").entry == "rude"
    assert filters.check("WORD").source.endswith("a.txt:1")


def test_a_text_and_its_skeleton_agree():
    """Whatever has a reading in common has the same skeleton: else a stream would let a phrase out."""
    for text in [text for texts in FORBIDDEN.values() for text in texts]:
        folded = folding.fold(text)
        for reading in folding.readings(folded):
            letters = [folding.skeleton(reading)]
            ways = {""}
            for character in unicodedata.normalize("NFC", text):
                ways = {folding.grow(way, step) for way in ways for step in folding.steps(character) or ("",)}
            assert letters[0] in ways
