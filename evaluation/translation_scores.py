"""BLEU of translations, by sacreBLEU, whose signature says exactly what was computed (arXiv:1804.08771)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sacrebleu.metrics import BLEU

_HAN = re.compile(r"[\u4e00-\u9fff]")


def sacre_bleu(translations: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Corpus BLEU, 0 … 100, and its signature. Where references have Chinese characters, these are cut as words.

    Raises:
        ValueError: the two differ in number, or there are none.
    """
    if len(translations) != len(references) or not references:
        raise ValueError(f"{len(translations)} translations and {len(references)} references cannot be compared")
    chinese = sum(bool(_HAN.search(text)) for text in references) * 2 > len(references)
    metric = BLEU(tokenize="zh" if chinese else "13a")
    return metric.corpus_score(list(translations), [list(references)]).score, str(metric.get_signature())
