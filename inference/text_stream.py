"""Token by token from ids to text that may be shown: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from byte_level_bpe import ByteLevelBPETokenizer


class TextStream:
    """Turns the tokens of one answer into pieces of text, each safe to show at once.

    A character whose bytes are spread over several tokens is held back until it is whole, and left out if the answer
    ends before that; other bytes that are no UTF-8 become U+FFFD, as in `tokenizer.decode`. Text that could be the
    beginning of a stop string is held back until it is decided. The pieces together are the whole text up to the first
    place where a stop string begins, wherever the boundaries of the tokens lie.

    Args:
        tokenizer: special tokens of it add nothing to the text.
        stop: strings that end the text.

    Attributes:
        text: all pieces so far.
        stopped: whether a stop string was found; nothing follows it.
    """

    def __init__(self, tokenizer: ByteLevelBPETokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.text = ""
        self.stopped = False
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # whole characters that a stop string may yet claim

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is safe to show now, often none."""
        return self._release(self._characters.decode(self.tokenizer.token_bytes(token_id)), final=False)

    def flush(self) -> str:
        """The rest of the text, after the last token."""
        return self._release("", final=True)

    def _release(self, characters: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += characters
        safe = len(self._held)
        if self.stop:
            found = min((at for text in self.stop if (at := self._held.find(text)) >= 0), default=safe)
            undecided = safe if final else self._first_beginning()
            # A stop string that may begin further left would cut the text there: it must be decided first
            self.stopped = found < safe and found <= undecided
            safe = min(found, undecided)
        piece, self._held = self._held[:safe], self._held[safe:]
        self.text += piece
        return piece

    def _first_beginning(self) -> int:
        """Where the held text may begin a stop string without yet holding it whole; its length if nowhere."""
        longest = max(map(len, self.stop))
        for start in range(max(0, len(self._held) - longest + 1), len(self._held)):
            if any(text.startswith(self._held[start:]) and text != self._held[start:] for text in self.stop):
                return start
        return len(self._held)


def whole_characters(tokenizer: ByteLevelBPETokenizer, token_ids: Sequence[int]) -> str:
    """What a `TextStream` without stop strings makes of these tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return decoder.decode(b"".join(map(tokenizer.token_bytes, token_ids)))
