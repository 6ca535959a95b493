"""Filters of what goes into the model and of what it says: lists of phrases and patterns, written by operators.

    filters = Filters.load([Path("filters/")])
    filters.check("…")                        # a Finding, or None
    guard = filters.stream()                  # an answer while it is written
    for piece in pieces:
        send(guard.feed(piece))               # what may leave now
    send(guard.finish())                      # the rest; guard.finding says whether the answer was cut

A list is a text file, `*.txt`; its lines are

    a phrase      found however it is written (folding.py); a word is found as a whole word only
    /a pattern/   a regular expression (of the `regex` library), searched in lower case and simplified Chinese
    !an exception a longer phrase in which a forbidden one may stand: !舞台独白 beside 台独
    # a remark

and of a folder, all of its lists are read. A file with the name message.txt holds what people are told when something
is blocked. `reload_if_changed` reads the files anew after an edit.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import regex
from ahocorasick_rs import AhoCorasick

from command_line import UserError
from inference.service import folding

MESSAGE_FILE = "message.txt"
DEFAULT_MESSAGE = "This cannot be answered here. 此处无法回答该内容。"
MAX_PATTERN_SECONDS = 0.1  # for one pattern and one text; beyond, the text counts as found
CONTEXT = 32  # characters that have left already, which a pattern may look back to

Classifier = Callable[[str], str | None]  # the forbidden label of a text, or None

logger = logging.getLogger("service")


@dataclass(frozen=True)
class Finding:
    """What was found, for the operators' log: never a word of the text itself.

    Attributes:
        entry: the phrase or pattern as it stands in the list; of a classifier, the label.
        source: file and line.
    """

    entry: str
    source: str


# ---------------------------------------------------------------------------------------------------------------- lists


@dataclass
class Rules:
    """Compiled lists; immutable, so that an answer keeps to those that it began with."""

    phrases: list[Finding] = field(default_factory=list)
    patterns: list[tuple[regex.Pattern, Finding]] = field(default_factory=list)
    message: str = DEFAULT_MESSAGE
    n_exceptions: int = 0

    def compile(self, exceptions: list[Finding]) -> Rules:
        """Build the automata: exceptions stand behind the phrases in the list that their indices count."""
        entries = [*self.phrases, *exceptions]
        written = [(form, index) for index, entry in enumerate(entries) for form in forms_of(entry)]
        spelled = {
            letters: index
            for form, index in written
            if index < len(self.phrases) and len(letters := form.replace(" ", "")) >= folding.MIN_SPELLED
        }
        self.n_exceptions = len(exceptions)
        self._entry_of = [index for _, index in written]
        self._automaton = AhoCorasick([form for form, _ in written])
        self._entry_of_spelled = list(spelled.values())
        self._spelled_automaton = AhoCorasick(list(spelled))
        self.skeletons = sorted({folding.skeleton(form) for form, _ in written})
        self.exception_skeletons = sorted(
            {folding.skeleton(form) for form, index in written if index >= len(self.phrases)}
        )
        return self

    def search_phrases(self, folded: str, ended: bool = True) -> Finding | None:
        """The first phrase in a folded text that stands in no exception; unless it has `ended`, the last word waits."""
        for reading in folding.readings(folded, ended):
            found = self._automaton.find_matches_as_indexes(reading, overlapping=True)
            found = [(self._entry_of[index], start, stop) for index, start, stop in found]
            allowed = sorted((start, stop) for index, start, stop in found if index >= len(self.phrases))
            starts, reach = [start for start, _ in allowed], list(accumulate((stop for _, stop in allowed), max))
            for index, start, stop in found:
                n_before = bisect_right(starts, start)  # exceptions that begin here or earlier, and how far they reach
                if index < len(self.phrases) and not (n_before and reach[n_before - 1] >= stop):
                    return self.phrases[index]
        for reading in folding.spelled_readings(folded, ended):
            for index, _, _ in self._spelled_automaton.find_matches_as_indexes(reading):
                return self.phrases[self._entry_of_spelled[index]]
        return None

    def search_patterns(self, text: str, start: int = 0, ended: bool = True) -> tuple[Finding | None, int]:
        """The first pattern in a text that `fold_in_place` has prepared, and up to where nothing can become one.

        Args:
            start: where to begin; patterns may look back to what stands before.
            ended: whether the text is over; otherwise a match at its end may still change.
        """
        clean = len(text)
        for pattern, finding in self.patterns:
            try:
                match = pattern.search(text, start, timeout=MAX_PATTERN_SECONDS)
                if match and (ended or match.end() < len(text)):
                    return finding, match.start()
                if not ended:
                    match = match or pattern.search(text, start, partial=True, timeout=MAX_PATTERN_SECONDS)
                    clean = min(clean, match.start()) if match else clean
            except TimeoutError:
                logger.error("the pattern in %s takes too long; what it was tried on is blocked", finding.source)
                return finding, start
        return None, clean


def forms_of(entry: Finding) -> set[str]:
    """How a phrase stands in a text's readings: as one word, or as several where it has signs inside.

    Raises:
        UserError: a phrase of fewer than two letters, which would be in every text.
    """
    folded = folding.fold(entry.entry)
    readings = set(folding.readings(folded, leet=any(sign in folded for sign in folding.LETTER_SIGNS)))
    readings |= {" ".join(reading.replace(folding.CLAUSE, " ").split()) for reading in readings}
    n_letters = {reading: sum(map(str.isalnum, reading)) for reading in readings}
    most = max(n_letters.values())
    if most < 2:
        raise UserError(f"{entry.source}: {entry.entry!r} has fewer than two letters; write a longer phrase")
    return {folding.bounded(reading) for reading, n in n_letters.items() if n == most}


def read_rules(files: Iterable[Path]) -> Rules:
    """Compile the lists in some files.

    Raises:
        UserError: a file cannot be read, or a line is no phrase and no pattern; with file and line.
    """
    rules, exceptions = Rules(), []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the filter list {path} cannot be read as UTF-8 text ({error})") from None
        if path.name == MESSAGE_FILE:
            rules.message = text.strip() or DEFAULT_MESSAGE
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            line, source = line.strip(), f"{path}:{number}"
            if not line or line.startswith("#"):
                continue
            if len(line) > 2 and line[0] == line[-1] == "/":
                rules.patterns.append((compile_pattern(line[1:-1], source), Finding(line, source)))
            elif line.startswith("!"):
                exceptions.append(Finding(line[1:].strip(), source))
            else:
                rules.phrases.append(Finding(line, source))
    return rules.compile(exceptions)


def compile_pattern(pattern: str, source: str) -> regex.Pattern:
    """A pattern of a list; one that is found in an empty text would be found in every text.

    Raises:
        UserError: the pattern is none, or matches nothing at all.
    """
    try:
        compiled = regex.compile(pattern, regex.IGNORECASE | regex.VERSION1)
    except regex.error as error:
        raise UserError(f"{source}: {pattern!r} is no regular expression ({error})") from None
    if compiled.search(""):
        raise UserError(f"{source}: {pattern!r} matches the empty text, and so every text; ask for something")
    return compiled


# -------------------------------------------------------------------------------------------------------------- filters


class Filters:
    """All lists, and optionally a classifier, which judges whole texts."""

    def __init__(self, paths: list[Path], classifier: Classifier | None = None) -> None:
        self.paths, self.classifier = paths, classifier
        self.blocked: Counter[str] = Counter()  # "question" or "answer" → how many
        self._state = self._look()
        self.rules = read_rules(self._state)

    @classmethod
    def load(cls, paths: list[Path], classifier: Classifier | None = None) -> Filters:
        """Read lists, which are files or folders of `*.txt`.

        Raises:
            UserError: see `read_rules`; or a path is missing.
        """
        return cls(paths, classifier)

    @property
    def message(self) -> str:
        """What people are told when something is blocked."""
        return self.rules.message

    @property
    def n_entries(self) -> int:
        """How many phrases, patterns and exceptions there are."""
        return len(self.rules.phrases) + len(self.rules.patterns) + self.rules.n_exceptions

    def _look(self) -> dict[Path, tuple[int, int]]:
        """The files, each with its time and size."""
        for path in self.paths:
            if not path.exists():
                raise UserError(f"the filter list {path} does not exist; give a text file, or a folder of them")
        files = [file for path in self.paths for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
        return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in files}

    def reload_if_changed(self) -> bool:
        """Read the lists again if any was edited; answers under way keep the old ones.

        Raises:
            UserError: see `load`; the old lists stay in force.
        """
        state = self._look()
        if state == self._state:
            return False
        self._state = state  # also where it is faulty, so that a fault is told once
        self.rules = read_rules(state)
        return True

    def block(self, part: str, finding: Finding) -> str:
        """Count and log what is blocked, a "question" or an "answer"; returns what people are told."""
        self.blocked[part] += 1
        logger.info("%s is blocked by %s in %s", part, finding.entry, finding.source)
        return self.message

    def check(self, text: str) -> Finding | None:
        """What is forbidden in a whole text, if anything."""
        finding = self.rules.search_phrases(folding.fold(text))
        if finding is None and self.rules.patterns:
            finding, _ = self.rules.search_patterns(folding.fold_in_place(text))
        if finding is None and self.classifier is not None and (label := self.classifier(text)):
            finding = Finding(label, "classifier")
        return finding

    def stream(self) -> Guard | WholeGuard:
        """A guard for one answer; with a classifier nothing leaves before the end, as it judges whole texts."""
        return WholeGuard(self) if self.classifier else Guard(self.rules)


class Guard:
    """Lets an answer out as it is written, without what could still become a forbidden phrase.

    Kept back is the text from the first place on where a phrase has begun and may go on. `_begun` holds these places,
    each with the skeletons that its text may have (signs can be read in two ways) and the length of the gap it ends in.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._context, self._held = "", ""
        self._before = ""  # the last visible character of the context
        self._previous = ""  # the last visible character of all
        self._begun: list[tuple[int, set[str], int]] = []
        self.finding: Finding | None = None

    def feed(self, piece: str) -> str:
        """Take more of the answer; return what may leave now."""
        if self.finding is not None:
            return ""
        for character in piece:
            self._advance(character)
        return self._release(ended=False)

    def finish(self) -> str:
        """The rest, at the end of the answer."""
        return "" if self.finding is not None else self._release(ended=True)

    def _advance(self, character: str) -> None:
        self._held += character
        steps = folding.steps(character)
        if not steps:
            return
        begun = self._begun
        if any(steps) and folding.begins_word(character, self._previous):
            begun.append((len(self._held) - 1, {""}, 0))
        self._begun, self._previous = [], character
        is_gap = "" in steps
        for start, skeletons, gap in begun:
            gap = gap + 1 if is_gap else 0
            grown = {folding.grow(old, step) for old in skeletons for step in steps} - {""}
            grown = {skeleton for skeleton in grown if _is_prefix(self._rules.skeletons, skeleton)}
            if grown and gap <= folding.MAX_GAP:
                self._begun.append((start, grown, gap))

    def _release(self, ended: bool) -> str:
        rules = self._rules
        if not self._held:
            return ""
        folded = folding.fold(self._before + self._held)
        found = rules.search_phrases(folded, ended)
        if found and not ended and self._may_be_exception():
            return ""
        clean = len(self._held) if ended or not self._begun else self._begun[0][0]
        if not found and rules.patterns:
            text = folding.fold_in_place(self._context + self._held)
            found, until = rules.search_patterns(text, len(self._context), ended)
            clean = min(clean, until - len(self._context))
        if found:
            self.finding, self._held = found, ""
            return ""
        leaving, self._held = self._held[:clean], self._held[clean:]
        self._context = (self._context + leaving)[-CONTEXT:]
        self._before = next((character for character in reversed(leaving) if folding.steps(character)), self._before)
        self._begun = [(start - clean, skeletons, gap) for start, skeletons, gap in self._begun]
        return leaving

    def _may_be_exception(self) -> bool:
        return any(
            _is_prefix(self._rules.exception_skeletons, skeleton) for _, begun, _ in self._begun for skeleton in begun
        )


class WholeGuard:
    """As `Guard`, for filters that can judge a whole answer only."""

    def __init__(self, filters: Filters) -> None:
        self._filters, self._text = filters, ""
        self.finding: Finding | None = None

    def feed(self, piece: str) -> str:
        """Take more of the answer; nothing may leave yet."""
        self._text += piece
        return ""

    def finish(self) -> str:
        """All of it, or nothing."""
        self.finding = self._filters.check(self._text)
        return "" if self.finding else self._text


def _is_prefix(skeletons: list[str], beginning: str) -> bool:
    """Whether any of the sorted skeletons begins like this."""
    place = bisect_left(skeletons, beginning)
    return place < len(skeletons) and skeletons[place].startswith(beginning)
