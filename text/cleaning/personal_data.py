"""Masking of what identifies a person: e-mail addresses, telephone, identity-card and bank-card numbers.

A number that carries check digits is masked only if they are right, so that an order number stays.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import date

KINDS = ("email", "phone", "id_card", "bank_card")
MAYBE = re.compile(r"@|[0-9０-９](?:[ \-.]?[0-9Xx]){6}", re.ASCII)

EMAIL = re.compile(r"(?<![\w.+\-])[A-Za-z0-9_.+\-]{1,64}@(?:[A-Za-z0-9\-]{1,63}\.)+[A-Za-z]{2,24}(?![\w\-])", re.ASCII)
ID_CARD = re.compile(r"(?<![0-9A-Za-z])[1-9][0-9]{16}[0-9Xx](?![0-9A-Za-z])")
BANK_CARD = re.compile(r"(?<![0-9A-Za-z.])[2-69][0-9]{3}(?:[ \-]?[0-9]{4}){2}[ \-]?[0-9]{1,7}(?![0-9A-Za-z])")
PHONE = re.compile(
    r"(?<![0-9A-Za-z.\-])(?:"
    r"(?:\+?86[ \-]?)?1[3-9][0-9][ \-]?[0-9]{4}[ \-]?[0-9]{4}"  # Chinese mobile
    r"|(?:\+?86[ \-]?|\()?0[1-9][0-9]{1,2}\)?[ \-][2-9][0-9]{2,3}[ \-]?[0-9]{4}"  # Chinese land line
    r"|[48]00[ \-][0-9]{3}[ \-]?[0-9]{4}"
    r"|(?:\+?1[ \-.]?)?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[\-.])[2-9][0-9]{2}[\-.][0-9]{4}"  # North America
    r"|\+[1-9][0-9]{0,2}(?:[ \-][0-9]{2,4}){2,5}"  # international
    r")(?![0-9A-Za-z\-])"
)
WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def is_id_card(number: str) -> bool:
    """Whether 18 characters are a Chinese identity number: date of birth and check digit (GB 11643-1999)."""
    try:
        born = date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    rest = sum(weight * int(digit) for weight, digit in zip(WEIGHTS, number[:17], strict=True)) % 11
    return 1850 <= born.year <= 2100 and "10X98765432"[rest] == number[17].upper()


def is_bank_card(number: str) -> bool:
    """Whether the digits are a card number: 13 to 19 of them, the last by Luhn's formula (ISO/IEC 7812-1)."""
    digits = [int(character) for character in number if character.isdigit()]
    doubled = sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (doubled + sum(digits[-1::-2])) % 10 == 0


def mask_personal_data(text: str, wanted: Collection[str] = KINDS) -> tuple[str, dict[str, int]]:
    """The text with `[EMAIL]`, `[PHONE]`, `[ID_CARD]`, `[BANK_CARD]` in place of such data, and how many of each."""
    if not MAYBE.search(text):
        return text, {}
    counts: dict[str, int] = {}
    for kind, pattern, is_right in (
        ("email", EMAIL, None),
        ("id_card", ID_CARD, is_id_card),
        ("bank_card", BANK_CARD, is_bank_card),
        ("phone", PHONE, None),
    ):
        if kind not in wanted:
            continue

        def mask(match: re.Match[str], kind: str = kind, is_right=is_right) -> str:  # noqa: ANN001
            if is_right and not is_right(match.group()):
                return match.group()
            counts[kind] = counts.get(kind, 0) + 1
            return f"[{kind.upper()}]"

        text = pattern.sub(mask, text)
    return text, counts
