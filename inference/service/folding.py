"""What a text says, however it is written: the form in which word lists are compared with texts.

    Ｆｒｅｅ   V​1agra  → free viagra        違，禁，詞 → 违禁词        f r e e → free

Folded are case, width and fonts (NFKC), accents, invisible characters, look-alikes of other scripts, traditional
Chinese (OpenCC, character by character), digits and signs that stand for letters, letters that are repeated, and gaps
inside a word. Some signs can be read in two ways (`1` as i or l; `a-b` as one word or two), so a text has several
readings; a phrase is in the text if it is in any of them.

In a reading, words stand between single spaces, so that a word of a list matches whole words alone: "Scunthorpe" holds
none but itself. Scripts that write without spaces have no such bounds. The end of a clause is a word of its own, as
otherwise 喜欢赌，博客 would hold 赌博; it counts for nothing between letters that each stand alone.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator

import opencc

GAP, JOINT, CLAUSE, END = " ", "\0", "\1", "\2"  # space; sign inside a word, or between two; end of a clause; far apart
LETTER_SIGNS = "@$!|"  # which may stand for letters
MAX_GAP = 8  # characters between two letters of a phrase; further apart they are no phrase
MIN_SPELLED = 3  # letters that stand alone before they are read as a word

_CLAUSE_ENDS = frozenset(".,;:?…\n\r\u2028\u2029。，、；：？！｡､")
_LOOK_ALIKES = dict(  # Cyrillic, Greek and phonetic letters
    zip(
        "авекмнорстухіјѕԁԛԝһӏьꓐαβεηικνορτυχωɑɡıƒøłđħɩʏᴀʙᴄᴅᴇɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡᴢ",
        "abekmhopctyxijsdqwhlbbabenikvoptuxwagifoldhiyabcdeghijklmnoprstuvwz",
        strict=True,
    )
)
_UNSPACED = (  # Thai to Burmese, Khmer, kana, Han, Hangul
    "\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\U00020000-\U0003ffff"
)
_LEET = dict(zip("03457@$", "oeastas", strict=True))
LEET_READINGS = [str.maketrans({**_LEET, **dict.fromkeys("1!|", letter)}) for letter in "il"]

_SIGNS = re.escape(LETTER_SIGNS)
_FAR = re.compile(rf"[{GAP}{JOINT}{CLAUSE}{_SIGNS}]{{{MAX_GAP + 1},}}")
_REPEATED = re.compile(r"([^\W\d_])\1{2,}")
_LEET_WORD = re.compile(  # anchored, so that a long word without any digit is gone through once
    rf"(?<![a-z\d{_SIGNS}])(?=[\d{_SIGNS}]*[a-z])[a-z]*[\d{_SIGNS}](?:[a-z\d{_SIGNS}]*[a-z\d@$])?"
)
_GAP_INSIDE = re.compile(rf"(?<=[{_UNSPACED}]) +(?=[{_UNSPACED}])")
_BETWEEN = rf"[{GAP}{JOINT}{CLAUSE}{_SIGNS}]+"
_ALONE = rf"[^\W_{_UNSPACED}]"
_LONE = rf"(?:[{_UNSPACED}]|(?<!{_ALONE}){_ALONE}(?!{_ALONE}))"
_SPELLED = re.compile(rf"{_LONE}(?:{_BETWEEN}{_LONE}){{{MIN_SPELLED - 1},}}")
_SCRIPT_CHANGES = re.compile(rf"(?<=[{_UNSPACED}])(?={_ALONE})|(?<={_ALONE})(?=[{_UNSPACED}])")
_is_alone = re.compile(_ALONE).match
_is_unspaced = re.compile(f"[{_UNSPACED}]").match


@functools.cache
def _simplified() -> dict[str, str]:
    """Traditional characters, those of Taiwan and Hong Kong too, each with its simplified one."""
    blocks = ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0x20000, 0x323B0))
    characters = [chr(code) for start, stop in blocks for code in range(start, stop)]
    table = {}
    for conversion in ("hk2s", "tw2s", "t2s"):  # the last one wins
        converted = opencc.OpenCC(conversion).convert("\n".join(characters)).split("\n")
        table.update((old, new) for old, new in zip(characters, converted, strict=True) if old != new)
    return table


def _fold_character(character: str) -> str:
    """Letters and digits in their plain form, GAP, JOINT, CLAUSE or a sign that may be a letter; "" if invisible."""
    if character in LETTER_SIGNS:
        return character
    category = unicodedata.category(character)
    name = unicodedata.name(character, "")
    if category == "So" and re.search(r"LATIN .*LETTER .$|REGIONAL INDICATOR SYMBOL LETTER .$", name):
        return name[-1].lower()  # squares, flags
    if category in ("Cf", "Mn", "Me"):
        return ""
    plain = unicodedata.normalize("NFKC", character).casefold()
    plain = "".join(c for c in unicodedata.normalize("NFD", plain) if unicodedata.category(c) != "Mn")
    plain = unicodedata.normalize("NFC", plain)
    plain = "".join(_LOOK_ALIKES.get(c) or _simplified().get(c, c) for c in plain)
    if letters := "".join(c for c in plain if c.isalnum() or _is_unspaced(c)):
        return letters
    if plain in LETTER_SIGNS and plain:
        return plain
    if character in _CLAUSE_ENDS or plain in _CLAUSE_ENDS:
        return CLAUSE
    return GAP if category.startswith("Z") or category == "Cc" else JOINT


class _Folding(dict):
    """A table for `str.translate` that learns each character when it first sees it."""

    def __missing__(self, code: int) -> str:
        self[code] = folded = _fold_character(chr(code))
        return folded


_FOLDING = _Folding()


class _SameLength(dict):
    """Case, width and traditional Chinese alone; what would change a text's length stays."""

    def __missing__(self, code: int) -> str:
        plain = unicodedata.normalize("NFKC", chr(code)).lower()
        plain = _simplified().get(plain, plain)
        self[code] = kept = plain if len(plain) == 1 else chr(code)
        return kept


_SAME_LENGTH = _SameLength()


def fold_in_place(text: str) -> str:
    """A text of the same length, in simplified Chinese and in lower case: what patterns are searched in."""
    return text.translate(_SAME_LENGTH)


def fold(text: str) -> str:
    """A text's letters, digits and kinds of gaps: what its readings are made from."""
    return _FAR.sub(END, text.translate(_FOLDING))


def readings(folded: str, ended: bool = True, leet: bool = True) -> Iterator[str]:
    """The ways to read a text, each once: words between single spaces, the plainest first.

    Args:
        ended: otherwise the last word may go on, and is left out.
        leet: also with digits and signs as the letters that they may stand for.
    """
    seen = set()
    for plain in _ways(_SCRIPT_CHANGES.sub(GAP, folded)):
        for joined in (plain.replace(JOINT, ""), plain.replace(JOINT, GAP)) if JOINT in plain else (plain,):
            for way in _unleet(joined, ended, leet):
                apart = way.replace(CLAUSE, f" {CLAUSE} ").replace(END, f" {END} ")
                reading = _GAP_INSIDE.sub("", f" {' '.join(apart.split())} ")
                if reading not in seen:
                    seen.add(reading)
                    yield reading


def bounded(reading: str) -> str:
    """A phrase's reading as it stands in those of texts: with a space beside a letter of a script that writes them."""
    phrase = reading.strip(f" {CLAUSE}{END}")
    return " " * (not _is_unspaced(phrase[0])) + phrase + " " * (not _is_unspaced(phrase[-1]))


def spelled_readings(folded: str, ended: bool = True) -> Iterator[str]:
    """The letters that stand alone, joined to words: one a line, without any bounds."""
    for plain in _ways(_SCRIPT_CHANGES.sub(GAP, folded)):
        whole = plain if ended else _without_last_word(plain)
        runs = [re.sub(_BETWEEN, "", run[0]) for run in _SPELLED.finditer(whole)]
        if runs:
            yield from _unleet("\n".join(runs))


def _ways(folded: str) -> Iterator[str]:
    """A text as it is; and with letters that stand three times in a row or more as one, and as two."""
    yield folded
    if _REPEATED.search(folded):
        yield _REPEATED.sub(r"\1", folded)
        yield _REPEATED.sub(r"\1\1", folded)


def _unleet(text: str, ended: bool = True, leet: bool = True) -> Iterator[str]:
    """With digits and signs beside letters as what they are, and as what they may stand for."""
    yield _without_signs(text if ended else _without_last_word(text))
    text = text if ended else _without_last_word(text, LETTER_SIGNS)
    if leet and _LEET_WORD.search(text):
        for table in LEET_READINGS:
            yield _without_signs(_LEET_WORD.sub(lambda word, table=table: word[0].translate(table), text))


def _without_last_word(text: str, signs: str = "") -> str:
    """Without the letters, and `signs`, at the end."""
    length = len(text)
    while length and (_is_alone(text, length - 1) or text[length - 1] in signs):
        length -= 1
    return text[:length]


def _without_signs(text: str) -> str:
    """With the signs that stand for no letter as the gaps that they are."""
    return text.replace("!", CLAUSE).replace("@", GAP).replace("$", GAP).replace("|", GAP)


# ------------------------------------------------------------------------------------------------------------ streaming

_ONE_OF_A_KIND = str.maketrans({**_LEET, **dict.fromkeys("1!|l", "i")})


def skeleton(folded: str) -> str:
    """Letters alone, those that may stand for each other as one: equal for all texts that can be read as one phrase."""
    letters = re.sub(rf"[{GAP}{JOINT}{CLAUSE}{END}]", "", folded).translate(_ONE_OF_A_KIND)
    return re.sub(r"(.)\1+", r"\1", letters)


def steps(character: str) -> tuple[str, ...]:
    """How one more character may go on in a skeleton: what it adds, for each way to read it; none if invisible."""
    folded = character.translate(_FOLDING)
    if not folded:
        return ()
    if folded in LETTER_SIGNS:
        return (folded.translate(_ONE_OF_A_KIND), "")
    return (folded.translate(_ONE_OF_A_KIND) if folded not in (GAP, JOINT, CLAUSE) else "",)


def grow(skeleton: str, step: str) -> str:
    """A skeleton with more letters; a letter that repeats the last one adds nothing."""
    for letter in step:
        skeleton += letter if not skeleton.endswith(letter) else ""
    return skeleton


def begins_word(character: str, previous: str) -> bool:
    """Whether a phrase may begin with a character that stands after `previous` ("" at the beginning)."""
    before = previous.translate(_FOLDING)[-1:]
    now = character.translate(_FOLDING)
    return now[:1] in LETTER_SIGNS or bool(_is_unspaced(now)) or not _is_alone(before)
