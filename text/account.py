"""What became of the records of a data set: read, left out and why, cut, and what that costs.

Whoever reads records and whoever makes samples of them fill in the same account, so that every stage says the same
before it trains, and writes the same numbers into its metrics and its checkpoint.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from command_line import UserError
from text.text_files import UnreadRecords

WARNED_SHARE = 0.05  # of records left out, or of answers' tokens lost, above which a warning is given
REPEATED = "the same prompt as an earlier record"
CALLED_BAD = "called bad by their label"
MALFORMED = "malformed"
INTENDED = (REPEATED, CALLED_BAD)  # reasons that are no loss


class LeftOut(UserError):
    """A sound record that this stage has no use for. Who keeps an account leaves it out and counts it.

    Args:
        sentence: for those who refuse it: which record, what it is and what to do.
        reason: for those who count it, such as "called bad by their label".
    """

    def __init__(self, sentence: str, reason: str) -> None:
        super().__init__(sentence)
        self.reason = reason


@dataclass
class Account:
    """The account of one data set.

    Attributes:
        source: the path, or another name for it.
        kind: what its records are, such as "conversations".
        advice: what helps where records are too long.
        skips_bad_records: whether malformed records are left out and counted, in place of being refused.
        bad_records_file: where they are then kept, with what is wrong with each; none by default.
        read: records in the files.
        left_out: how many of them were left out, by reason.
        cut: how many samples lost a part (a conversation its end, a ranking an answer, a question its beginning).
        answer_tokens, answer_tokens_lost: of the answers that were read, and how many of these tokens are lost with
            what was cut and left out.
        held_out: samples of the validation part, where that is a share of this data.
        bad: takes the malformed records.
    """

    source: str
    kind: str = "records"
    advice: str = "raise --max_seq_len"
    skips_bad_records: bool = False
    bad_records_file: Path | None = None
    read: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    answer_tokens: int = 0
    answer_tokens_lost: int = 0
    held_out: int = 0

    def __post_init__(self) -> None:
        self.bad = UnreadRecords(self.bad_records_file)

    def leave_out(self, reason: str, count: int = 1) -> None:
        """Count records that are left out."""
        if count:
            self.left_out[reason] = self.left_out.get(reason, 0) + count

    @property
    def n_left_out(self) -> int:
        """How many records were left out, whatever the reason."""
        return sum(self.left_out.values())

    @property
    def lost_share(self) -> float:
        """The share of the answers' tokens that is lost, or of the records, whichever is larger; 0 … 1."""
        unintended = sum(count for reason, count in self.left_out.items() if reason not in INTENDED)
        if not self.answer_tokens:  # questions and prompts: a part of them is all that can be lost
            unintended += self.cut
        return max(self.answer_tokens_lost / max(1, self.answer_tokens), unintended / max(1, self.read))

    def sentences(self) -> list[str]:
        """The account for people; where more than 5 % is lost, with a warning."""
        parts = [f"{self.source}: {self.read:,} {self.kind} read"]
        parts += [f"{count:,} left out ({reason})" for reason, count in self.left_out.items()]
        parts += [f"{self.cut:,} cut"] * bool(self.cut)
        if self.answer_tokens_lost:
            share = self.answer_tokens_lost / self.answer_tokens
            parts.append(f"{share:.1%} of the answers' {self.answer_tokens:,} tokens lost")
        parts += [f"{self.held_out:,} held out for validation"] * bool(self.held_out)
        said = ["; ".join(parts)]
        if self.bad.count:
            said.append(f"{self.source}: {self.bad}; the first: {self.bad.first}")
        if self.lost_share > WARNED_SHARE:
            teaches = self.cut and self.kind == "conversations"
            consequence = ", and an answer that is cut does not teach where to stop" if teaches else ""
            said.append(f"warning: {self.lost_share:.1%} of {self.source} is lost{consequence}; {self.advice}")
        return said

    def figures(self, prefix: str = "data/") -> dict[str, int]:
        """The account in numbers, for `metrics.jsonl`."""
        names = ("read", "cut", "answer_tokens", "answer_tokens_lost", *["held_out"] * bool(self.held_out))
        return {f"{prefix}{name}": getattr(self, name) for name in names} | {f"{prefix}left_out": self.n_left_out}

    def as_dict(self) -> dict[str, Any]:
        """The account for a checkpoint or a report, reasons included."""
        settings = ("advice", "skips_bad_records", "bad_records_file")
        return {name: value for name, value in asdict(self).items() if name not in settings}

    def require(self, kept: int) -> None:
        """Refuse data of which nothing is left.

        Args:
            kept: how many samples there are.

        Raises:
            UserError: none; with the reasons and what helps.
        """
        if kept == 0:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
            raise UserError(
                f"none of the {self.read:,} {self.kind} of {self.source} can be used ({reasons}); {self.advice}"
            )
