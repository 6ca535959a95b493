"""Encoding by `gigatoken`, many times as fast as by `tokenizers`, with the same ids.

It knows the split patterns of published tokenizers, ours among them, and no others. What it does not know, and a
platform that it has no wheel for, is left to `tokenizers`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

FRESH_AFTER = 64_000_000  # characters: it remembers each piece that it has met, up to 6 bytes for each byte of text

# What tokenizers disagree about, when they do: scripts, numbers, blanks, contractions, joined and composed characters
PROBES = (
    "",
    " ",
    "Hello, world! It's what we'll do — they'RE here; don't. 3.14159 and 1,234,567 or ½ and Ⅷ²",
    "  two  spaces\tand\ttabs \n\n  lines\r\n\r\nand a trailing blank ",
    "法国的首都是巴黎。“你好，世界！”他说：3月14日。　全角ＡＢＣ１２３",
    "日本語のテキストとカタカナ、한국어 문장입니다. Привет, мир! Γειά σου Κόσμε",
    "مرحبا بالعالم می‌خواهم שלום עולם हिन्दी में लिखा है ภาษาไทย தமிழ்",
    "cafe\u0301 naïve Å Å ﬁ ẛ̣ e\u0301\u0327",
    "👩‍👩‍👧 🎉🇫🇷 a\u200bb\ufeffc \x00\x01\x7f \u0085\u2028\u2029 \ue000 \U0002070e",
    "def f(x_a):\n\treturn {'k': [x_a+1, 0x1F]}  # комментарий\n<div class=\"a\">&amp;</div>",
    "<s></s><pad><unk><|endoftext|><|im_start|>user",
)


class FastEncoder:
    """Ids of texts, without special tokens.

    Its engine cannot serve two threads at once, so they take turns; inside, it uses all cores by itself.

    Args:
        content: a tokenizer.json whose special tokens are taken out: in a text, their strings are text.
    """

    def __init__(self, content: str) -> None:
        self._content, self._lock = content, threading.Lock()
        self._engine, self._characters = None, 0

    def _fresh(self, characters: int):  # noqa: ANN202 (a class of an optional package)
        self._characters += characters
        if self._engine is None or self._characters > FRESH_AFTER:
            import gigatoken

            self._engine, self._characters = gigatoken.Tokenizer.from_json(self._content), characters
        return self._engine

    def encode(self, text: str) -> list[int]:
        with self._lock:
            return self._fresh(len(text)).encode(text).tolist()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        with self._lock:
            return self._fresh(sum(map(len, texts))).encode_batch_list(texts)

    def encode_arrays(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts one after another, uint32; where each text begins and the last one ends, int64)."""
        with self._lock:
            layout = self._fresh(sum(map(len, texts))).encode_batch(texts).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], offsets - offsets[0]


def fast_encoder(engine: Tokenizer) -> FastEncoder | None:
    """An encoder with the same ids as `engine`, which takes special tokens in a text for text; or None."""
    content = json.loads(engine.to_str())
    if not all(token["special"] for token in content["added_tokens"]):
        return None  # such tokens are found in a text before anything else, by rules that differ
    content |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    try:
        encoder = FastEncoder(json.dumps(content))
        theirs = encoder.encode_batch(list(PROBES))
    except (ImportError, RuntimeError, ValueError):  # not installed, or a tokenizer of a kind that it does not know
        return None
    return encoder if theirs == ids_of(engine, PROBES) else None


def ids_of(engine: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids by `tokenizers` itself."""
    return [encoding.ids for encoding in engine.encode_batch_fast(list(texts), add_special_tokens=False)]
