"""Drafting from texts in whose words answers are likely: training data, documentation, earlier answers.

    texts = read_texts(["data/sft/sft_data.json"], tokenizer)
    engine = Engine(model, tokenizer, drafter=TextLookup(FollowerTable(texts)))

As in REST (arXiv:2311.08252), what followed in the texts is proposed; here token by token, as long as most of the
places agree, which a table of runs of tokens answers at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError
from inference.request import Request
from inference.speculation import Wanted
from text.conversation_data import load_conversations
from text.text_files import RECORD_ENDINGS, TEXT_ENDINGS, holds_records, iter_documents, resolve_files

LONGEST = 12  # tokens of a run
MOST_TOKENS = 10_000_000  # of all texts
FACTOR = 0x9E3779B97F4A7C15  # odd, and its bits look random
MASK = (1 << 64) - 1
UNSURE = -1  # in place of a token


class FollowerTable:
    """Which token followed each run of 1 to `LONGEST` tokens in texts, in more than half of its places.

    A run stands there as a hash of 64 bits: where two share one, which is rare, a draft is wrong. A run that is
    followed as the run without its first token is, is left out, so that most long runs take no memory.

    Args:
        texts: token ids; no run crosses from one text into the next.
    """

    def __init__(self, texts: Iterable[Sequence[int]]) -> None:
        rows = [np.asarray(text, dtype=np.uint64) for text in texts if len(text)]
        ids = np.concatenate(rows or [np.zeros(0, dtype=np.uint64)])  # (N,)
        place = np.concatenate([np.arange(len(row)) for row in rows] or [ids])  # of each token in its text, (N,)
        hashes = np.zeros_like(ids)  # of the run before each token, (N,)
        by_shorter = np.full(len(ids), UNSURE)  # what follows the run that is shorter by a token, (N,)
        self.follower: dict[int, int] = {}  # hash of a run → token
        for length in range(1, LONGEST + 1):
            hashes = hashes * np.uint64(FACTOR) + np.roll(ids, length) + np.uint64(1)
            has_run = np.flatnonzero(place >= length)
            if not len(has_run):
                break
            order = has_run[np.lexsort((ids[has_run], hashes[has_run]))]  # equal runs side by side, by their followers
            starts = np.flatnonzero(np.r_[True, np.diff(hashes[order]) > 0])
            sizes = np.diff(starts, append=len(order))
            middle = order[starts + sizes // 2]  # what more than half of the places have stands in the middle
            n_same = np.add.reduceat(ids[order] == np.repeat(ids[middle], sizes), starts, dtype=np.int64)
            followers = np.where(2 * n_same > sizes, ids[middle].astype(np.int64), UNSURE)
            differs = followers != by_shorter[middle]
            self.follower.update(zip(hashes[middle[differs]].tolist(), followers[differs].tolist(), strict=True))
            by_shorter[order] = np.repeat(followers, sizes)

    def next_token(self, ids: Sequence[int]) -> int:
        """What followed the longest run that ends `ids` and stood in the texts, or `UNSURE`."""
        found, run = UNSURE, 0
        for token_id in ids[: -LONGEST - 1 : -1]:
            run = (run * FACTOR + token_id + 1) & MASK
            found = self.follower.get(run, found)
        return found


class TextLookup:
    """Proposes what mostly followed in texts; one table may serve many engines."""

    def __init__(self, table: FollowerTable) -> None:
        self.table = table

    def propose(self, wanted: Wanted) -> list[list[int]]:
        """See `Drafter.propose`."""
        return [self._continuation(request.context[-LONGEST:], most) for request, most in wanted]

    def drop(self, request: Request) -> None:
        """See `Drafter.drop`; nothing is kept of a request."""

    def _continuation(self, ids: list[int], n_tokens: int) -> list[int]:
        n_given = len(ids)
        while len(ids) < n_given + n_tokens and (token_id := self.table.next_token(ids)) != UNSURE:
            ids.append(token_id)
        return ids[n_given:]


def read_texts(paths: Sequence[str], tokenizer: ByteLevelBPETokenizer) -> list[list[int]]:
    """Token ids of the texts and conversations in files and folders, as a model sees them in training.

    Raises:
        UserError: a path cannot be read, or there are more than `MOST_TOKENS`.
    """
    texts, n_tokens = [], 0
    for path in paths:
        for text in _encoded(path, tokenizer):
            texts.append(text)
            n_tokens += len(text)
            if n_tokens > MOST_TOKENS:
                raise UserError(f"--draft_texts {path}: of more than {MOST_TOKENS:,} tokens; give fewer texts")
    return texts


def _encoded(path: str, tokenizer: ByteLevelBPETokenizer) -> Iterator[list[int]]:
    """A file of records without "text" holds conversations; whatever else there is, documents."""
    for file in resolve_files(path, tuple(dict.fromkeys(TEXT_ENDINGS + RECORD_ENDINGS))):
        if holds_records(file):
            yield from (tokenizer.encode_chat(each)["input_ids"] for each in load_conversations(file))
            continue
        documents = iter_documents(file)
        while some := list(islice(documents, 1000)):
            encoded = tokenizer.encode_documents(some, add_special_tokens=True)
            yield from ([*ids, tokenizer.eos_token_id] for ids in encoded)
