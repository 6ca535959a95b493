"""One document: what is broken is mended, what is no text is taken out, and the rest stays letter for letter.

Most documents need nothing. One automaton (an RE2 set) reads a document once and says which of the repairs below have
something to do in it; only those run.
"""

from __future__ import annotations

import functools
import html
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import re2
from ftfy import TextFixerConfig, fix_text
from ftfy.badness import is_bad

from command_line import UserError

PATTERN_FILE = Path(__file__).with_name("patterns.txt")
LONG_LINE = 200  # of a longer line, a pattern takes out the sentence and not the line

Removed = list[tuple[str, str]]  # (reason, piece)

# Only what cannot be right: quotation marks, full-width punctuation and ligatures are somebody's choice.
FTFY = TextFixerConfig(
    unescape_html=False, fix_latin_ligatures=False, fix_character_width=False, uncurl_quotes=False,
    normalization=None, explain=False,
)  # fmt: skip

TAGS = (
    "a|abbr|address|article|aside|b|big|blockquote|body|br|button|caption|center|cite|code|dd|del|div|dl|dt|em|embed|"
    "fieldset|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|kbd|label|legend|li|"
    "link|main|mark|meta|nav|noscript|object|ol|option|p|param|path|pre|q|s|samp|script|section|select|small|source|"
    "span|strike|strong|style|sub|sup|svg|table|tbody|td|textarea|tfoot|th|thead|time|title|tr|tt|u|ul|var|video|wbr"
)
TAG = rf"</?(?:{TAGS})(?:\s[^<>]*)?/?>|<!--|<!doctype\s[^<>]*>|<!\[CDATA\["
ENTITY = r"&(?:#[0-9]{1,7}|#x[0-9a-f]{1,6}|[a-z]{2,8}[0-9]{0,2});"
BLOCK = re.compile(
    r"</?(?:address|article|blockquote|br|dd|div|dl|dt|figure|footer|form|h[1-6]|header|hr|li|ol|p|pre|section|table|"
    r"tr|ul)\b[^<>]*>",
    re.IGNORECASE,
)
UNREAD = re.compile(
    r"<!--.*?(?:-->|$)|<(script|style|noscript|iframe|svg)\b[^<>]*>.*?(?:</\1\s*>|$)", re.IGNORECASE | re.DOTALL
)
ANY_TAG = re.compile(TAG, re.IGNORECASE)
FORUM_TAG = re.compile(
    r"\[/?(?:url|img|b|i|u|s|size|color|quote|code|align|font|media|attach|email|list|flash|table|tr|td)"
    r"(?:=[^\]\n]{0,200})?\]",
    re.IGNORECASE,
)
WIKI = re.compile(
    r"\[(?:edit|citation needed|clarification needed|编辑|來源請求|来源请求)\]"
    r"|(?<=[。，；！？、”.,;!?\"\u4e00-\u9fff])\[\d{1,3}\]",
    re.IGNORECASE,
)
LINK = re.compile(r"(?:https?://|ftp://|www\.)[\w\-./?%&=#:~+,;@!$*()]+", re.ASCII)
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\uffff"
    "\ue000-\uf8ff\U000e0000-\U0010ffff]"
)
# Joiners have work to do in emoji and in Indic and Arabic script, none beside Latin letters, Chinese or blanks
IDLE_JOINER = re.compile(
    r"(?<=[\s\w。，！？、.,!?])[\u200c\u200d](?=[\s0-9A-Za-z\u3000-\u30ff\u4e00-\u9fff]|$)|^[\u200c\u200d]"
)
ARABIC_OR_INDIC = re.compile("[\u0600-\u06ff\u0900-\u0dff\u1000-\u109f\u1780-\u17ff]")
# What UTF-8 becomes when it is read as GBK: 锛 is the beginning of ， and ？, 銆 of 。 and 、
READ_AS_GBK = re.compile(r"[^\x00-\x7f]{4,}")
REPLACED = re.compile("(?:锟斤拷|锟斤|斤拷|烫{3,}|屯{3,}|葺{3,}|ï¿½)+|\ufffd{1,}")
CHINESE = re.compile("[\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uff00-\uff5e]")
SENTENCE = re.compile(r"(?<=[。！？!?；])|(?<=\.)(?=\s)")
RULER = re.compile(r"\s*([-=_*#~.])\1*\s*")  # a line of one such character: Markdown, code and plain text draw so

TRIGGERS = {  # what a repair looks for, in RE2's syntax; (?-i): ſ and s are one letter otherwise
    "anything": "",  # an automaton that has run out of memory finds nothing, and this one is always there
    "unprintable": r"[\x00-\x08\x0b-\x1f\x7f-\x9f\x{ad}\x{200b}-\x{200f}\x{202a}-\x{202e}\x{2060}-\x{206f}\x{feff}"
    r"\x{fff9}-\x{ffff}\x{e000}-\x{f8ff}\x{e0000}-\x{10ffff}]",
    "latin": r"(?-i)[\x{80}-\x{b6}\x{b8}-\x{52f}\x{201a}\x{201e}\x{2020}-\x{2022}\x{2030}-\x{203a}\x{20a0}-\x{22ff}"
    r"\x{2500}-\x{25ff}\x{f8ff}\x{fb00}-\x{fb06}\x{fffd}]",
    "gbk": r"[锛銆鐨锟烫屯葺]",
    "markup": rf"(?i){TAG}|{ENTITY}",
    "forum": r"(?i)\[/?(url|img|b|i|u|s|size|color|quote|code|align|font|media|attach|email|list|flash|table|tr|td)"
    r"[=\]]|\[[0-9]{1,3}\]|\[(edit|citation needed|clarification needed|编辑|來源請求|来源请求)\]",
    "link": r"https?://|ftp://|www\.",
    "symbols": r"(?:[^\pL\pN\pM\s]\s?){8}",
}


@functools.cache
def read_patterns(path: str) -> list[tuple[str, str]]:
    """(group, pattern) of a list like patterns.txt.

    Raises:
        UserError: it cannot be read, or a pattern is none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list of patterns {path} cannot be read ({error}); check --patterns") from None
    patterns, group = [], "pattern"
    for number, line in enumerate(map(str.strip, lines), start=1):
        if heading := re.fullmatch(r"\[([\w\- ]+)\]", line):
            group = heading.group(1)
        elif line and not line.startswith("#"):
            line = line.replace(r"\W", r"[^\pL\pN_]").replace(r"\w", r"[\pL\pN_]")  # RE2's own know ASCII only
            try:
                re2.compile(line, _options())
            except re2.error as error:
                raise UserError(f"line {number} of {path} is no pattern of RE2's ({error}); mend it") from None
            patterns.append((group, line))
    return patterns


def _options() -> re2.Options:
    options = re2.Options()
    options.case_sensitive, options.log_errors = False, False
    options.max_mem = 256 << 20  # of the automaton's states; a set that runs out of it would find nothing
    return options


def _loosened(pattern: str) -> str:
    """A pattern that finds at least as much and has no counted stretches, each step of which is a state."""
    pattern = re.sub(r"\.\{\d+,\d*\}", ".*", pattern)
    return pattern.removesuffix(".*$").removeprefix("^.*")


class Repairer:
    """Mends documents, one at a time.

    Args:
        patterns: path of the list of lines to take out; empty for none.
        normalization: "nfc", "nfkc" or "none".
        han: "simplified" or "traditional" to convert Chinese, "as_is" to leave it.
        lower_case, strip_punctuation: as they say.

    Raises:
        UserError: the list of patterns is unusable, or a conversion needs a package that is missing.
    """

    def __init__(
        self,
        patterns: str = str(PATTERN_FILE),
        normalization: str = "nfc",
        han: str = "as_is",
        lower_case: bool = False,
        strip_punctuation: bool = False,
    ) -> None:
        named = read_patterns(patterns) if patterns else []
        options = _options()
        # (?m): ^ and $ are the ends of lines; the single line is then asked again
        self._automaton = re2.Set.SearchSet(options)
        self._triggers = list(TRIGGERS)
        for pattern in TRIGGERS.values():
            self._automaton.Add(pattern)
        for _, pattern in named:
            self._automaton.Add(f"(?m){_loosened(pattern)}")
        self._automaton.Compile()
        self._patterns = [(group, re2.compile(pattern, options)) for group, pattern in named]
        self._normalization = None if normalization == "none" else normalization.upper()
        self._last = _conversions(han, lower_case, strip_punctuation)

    def __call__(self, text: str) -> tuple[str, Removed]:
        """The mended text, and the pieces that were taken out with the reason; the text may come out empty."""
        removed: Removed = []
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        # A repair can bring to light what another one mends: an entity inside mojibake, a tag inside an entity
        for _ in range(3):
            try:
                found = self._automaton.Match(text)
            except UnicodeEncodeError:  # half of a surrogate pair
                text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
                found = self._automaton.Match(text)
            if found is None:  # not even `anything`
                raise UserError("the list of patterns is too large for RE2's automaton; shorten --patterns")
            if found == [0]:
                break
            names = {self._triggers[index] for index in found if index < len(self._triggers)}
            mended = _mend(text, names, removed)
            if mended == text:
                break
            text = mended
        if len(found) > 1:
            patterns = [self._patterns[index - len(TRIGGERS)] for index in found if index >= len(TRIGGERS)]
            text = self._lines(text, names, patterns, removed)
        if self._normalization and not unicodedata.is_normalized(self._normalization, text):
            text = unicodedata.normalize(self._normalization, text)
        for convert in self._last:
            text = convert(text)
        return text.strip("\n \t"), removed

    def _lines(self, text: str, names: set[str], patterns: list, removed: Removed) -> str:
        """The text without lines that are heaps of links or symbols, and without what a pattern finds."""
        check_links, check_symbols = "link" in names, "symbols" in names
        if not (patterns or check_links or check_symbols):
            return text
        kept = []
        for line in text.split("\n"):
            reason = None
            if check_links and ("http" in line or "www." in line or "ftp:" in line):
                linked = sum(map(len, LINK.findall(line)))
                reason = "link heap" if linked > 0.5 * len(line.strip()) else None
            if check_symbols and reason is None and _is_symbol_heap(line):
                reason = "symbol heap"
            if reason is None and patterns and line:
                line, reason = _without_pattern(line, patterns, removed)
            if reason:
                removed.append((reason, line))
            else:
                kept.append(line)
        return "\n".join(kept)


def _is_symbol_heap(line: str) -> bool:
    written = [character for character in line if not character.isspace()]
    if len(written) < 10 or RULER.fullmatch(line):
        return False
    return sum(c.isalnum() or unicodedata.category(c)[0] == "M" for c in written) < 0.2 * len(written)


def _without_pattern(line: str, patterns: list, removed: Removed) -> tuple[str, str | None]:
    """The line and no reason to drop it, or why it is to be dropped; a long line loses the sentence alone."""
    for group, pattern in patterns:
        if not pattern.search(line):
            continue
        if len(line) <= LONG_LINE:
            return line, group
        sentences = SENTENCE.split(line)
        found = [bool(pattern.search(sentence)) for sentence in sentences]
        removed += [(group, sentence) for sentence, out in zip(sentences, found, strict=True) if out]
        line = "".join(sentence for sentence, out in zip(sentences, found, strict=True) if not out)
        if not line.strip():
            return line, group
    return line, None


def _mend(text: str, names: set[str], removed: Removed) -> str:
    if "gbk" in names:
        text = READ_AS_GBK.sub(_as_read_before, text)
    if "latin" in names and is_bad(text):
        text = fix_text(text, FTFY)
    if "gbk" in names or "latin" in names:
        text = REPLACED.sub(lambda match: removed.append(("lost characters", match.group())) or "", text)
    if "unprintable" in names:
        text = UNPRINTABLE.sub("", text.replace("\x0b", "\n").replace("\x0c", "\n").replace("\x85", "\n"))
        if not ARABIC_OR_INDIC.search(text):
            text = IDLE_JOINER.sub("", text)
    if "markup" in names:
        text = _without_markup(text, removed)
    if "forum" in names:
        text = WIKI.sub("", FORUM_TAG.sub("", text))
    return text


def _as_read_before(match: re.Match[str]) -> str:
    """Chinese that was UTF-8 and was read as GBK, read rightly; anything else as it is."""
    wrong = match.group()
    # Windows reads the byte 0x80 as €; a byte that found no partner has become U+FFFD, and its character is lost
    encoded = b"\x80".join(piece.encode("gb18030", "ignore") for piece in wrong.replace("\ufffd", "").split("€"))
    right = encoded.decode("utf-8", "replace")
    n_lost, n_chinese = right.count("\ufffd"), len(CHINESE.findall(right))
    is_right = n_chinese >= 0.4 * len(wrong) and n_chinese > 4 * n_lost  # two characters of three bytes look like three
    return right if is_right else wrong


def _without_markup(text: str, removed: Removed) -> str:
    """HTML as the text that it shows. Entities alone, as in a text about HTML, become characters."""
    if ANY_TAG.search(text):
        text = UNREAD.sub(lambda match: removed.append(("script or comment", match.group())) or "\n", text)
        text = ANY_TAG.sub("", BLOCK.sub("\n", text))
        text = re.sub(r"[ \t]*\n[ \t]*(?:\n[ \t]*)+", "\n\n", text)
    return html.unescape(text).replace("\xa0", " ") if "&" in text else text


def _conversions(han: str, lower_case: bool, strip_punctuation: bool) -> list[Callable[[str], str]]:
    conversions: list[Callable[[str], str]] = []
    if han != "as_is":
        try:
            import opencc
        except ImportError:
            raise UserError("--han needs OpenCC; `pip install OpenCC` and try again") from None
        conversions.append(opencc.OpenCC("t2s" if han == "simplified" else "s2t").convert)
    if lower_case:
        conversions.append(str.lower)
    if strip_punctuation:
        conversions.append(_strip_punctuation)
    return conversions


def _strip_punctuation(text: str) -> str:
    return "".join(c for c in text if not unicodedata.category(c).startswith("P"))
