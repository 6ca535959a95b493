"""Which cells of the cache belong to whom: blocks of tokens, shared where prompts begin alike.

A sequence (one running request) owns a list of blocks, each with the cells of BLOCK_SIZE tokens; they may lie anywhere,
so memory is never fragmented and never moved. A full block is remembered by its tokens and all those before them: a new
sequence that begins with the same tokens takes the block as it is and skips the computation. Blocks that nobody uses
keep their contents until they are needed; those used longest ago are taken first.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from inference.kernels.paged_attention import BLOCK_SIZE

BEGINNING = 0  # the prefix before the first block
NOWHERE = -1  # a prefix that no new sequence has


@dataclass(eq=False)
class CachedSequence:
    """The cells of one running request.

    Attributes:
        slot: its row in the table of blocks.
        blocks: in the order of the tokens.
        length: how many tokens' keys and values are stored.
        prefix: number of the prefix that its full blocks make, see `BlockPool`.
    """

    slot: int
    blocks: list[int] = field(default_factory=list)
    length: int = 0
    prefix: int = BEGINNING


class BlockPool:
    """Hands out blocks, counts their users and remembers the contents of full ones.

    A prefix is a number that stands for one run of tokens from the beginning. It is never used twice, so a block is
    found only after exactly the tokens that it was computed after.
    """

    def __init__(self, n_blocks: int) -> None:
        self.users = [0] * n_blocks
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(n_blocks))  # the next to be taken comes first
        self.known: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # (prefix, tokens) → block, longer prefix
        self.keys: dict[int, tuple[int, tuple[int, ...]]] = {}  # block → its key in `known`
        self.prefixes = itertools.count(BEGINNING + 1)

    def take(self) -> int | None:
        """A block whose old contents are forgotten; None if all are in use."""
        if not self.free:
            return None
        block, _ = self.free.popitem(last=False)
        self.known.pop(self.keys.pop(block, None), None)
        self.users[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """One user less of each block; the end of a sequence is forgotten before its beginning."""
        for block in reversed(blocks):
            self.users[block] -= 1
            if not self.users[block]:
                self.free[block] = None
                if block not in self.keys:
                    self.free.move_to_end(block, last=False)

    def find(self, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """The blocks that hold the beginning of these tokens, each with the prefix that it completes.

        The last token is always left: computing it gives the logits of the next one.
        """
        found, prefix = [], BEGINNING
        for start in range(0, len(tokens) - BLOCK_SIZE, BLOCK_SIZE):
            entry = self.known.get((prefix, tuple(tokens[start : start + BLOCK_SIZE])))
            if entry is None:
                break
            found.append(entry)
            prefix = entry[1]
        return found

    def share(self, sequence: CachedSequence, tokens: Sequence[int]) -> None:
        """Give a new sequence the blocks that are known to hold the beginning of its tokens."""
        for block, prefix in self.find(tokens):
            self.users[block] += 1
            self.free.pop(block, None)
            sequence.blocks.append(block)
            sequence.length, sequence.prefix = len(sequence.blocks) * BLOCK_SIZE, prefix

    def remember(self, sequence: CachedSequence, tokens: Sequence[int], n_new: int) -> None:
        """`n_new` more tokens are stored: the blocks that they fill can be shared from now on."""
        n_full = sequence.length // BLOCK_SIZE
        sequence.length += n_new
        for index in range(n_full, sequence.length // BLOCK_SIZE):
            key = sequence.prefix, tuple(tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
            if key not in self.known:  # otherwise another sequence was computing the same at the same time
                self.known[key] = sequence.blocks[index], next(self.prefixes)
                self.keys[sequence.blocks[index]] = key
            sequence.prefix = self.known[key][1]

    def forget(self) -> None:
        """Share nothing of what was stored so far, as after a change of the weights."""
        self.known.clear()
        self.keys.clear()
