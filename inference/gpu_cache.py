"""The engine's cache on a GPU: its cells lie as a GPU reads them best, and attention looks at many requests at once.

The bookkeeping is that of `PagedCache`. A step's tokens are divided into groups, each of which goes through PyTorch's
fused attention in one call:

    singles   tokens that come alone, one of each answer: all in one group, over the blocks of the longest
    fresh     prompts from their first token on: their new keys and values are all there is, and no mask is needed
    pieces    of prompts whose beginning is stored, those of similar length together

What a group is filled up with is computed and thrown away. Query heads that share a key/value head are put in a row, as
if they were further tokens, so that fused kernels take them with a mask and no head is copied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from inference.cache_blocks import CachedSequence
from inference.kernels.paged_attention import BLOCK_SIZE
from inference.paged_cache import PagedCache
from transformer_components import attend

FEWEST_BLOCKS = 16  # of a step of fixed shapes; they double from there
SINGLES, FRESH, PIECES = range(3)


@dataclass
class Group:
    """Tokens that attend together, n rows of T.

    Attributes:
        rows: (n, T), which of the step's tokens they are; None for all of them, in their order.
        table: (n, S / BLOCK_SIZE), the blocks of each row's request; None where the new keys are all there is.
        mask: (n, 1, T · H / G, S) added to the scores; None with `table`.
    """

    rows: torch.Tensor | None
    table: torch.Tensor | None
    mask: torch.Tensor | None


class GpuCache(PagedCache):
    """A `PagedCache` for a GPU; it computes the same on a CPU.

    Attributes:
        keys, values: (n_layers, blocks + 1, BLOCK_SIZE, G, K). The last block belongs to nobody: what a step is filled
            up with is written there.
        key_scales, value_scales: (n_layers, blocks + 1, BLOCK_SIZE, G) fp32 for INT8 cells, otherwise None.
    """

    def _allocate(self, n_blocks: int, dtype: torch.dtype) -> None:
        config = self.config
        shape = (config.n_layers, n_blocks + 1, BLOCK_SIZE, config.n_kv_heads)
        self.keys = torch.zeros((*shape, config.head_dim), dtype=dtype, device=self.device)
        self.values = torch.zeros_like(self.keys)
        self.key_scales = self.value_scales = self.native = None
        if dtype == torch.int8:
            self.key_scales = torch.zeros(shape, device=self.device)
            self.value_scales = torch.zeros_like(self.key_scales)
        self._no_block = n_blocks

    def scrub(self, sequence: CachedSequence) -> None:
        """See `PagedCache.scrub`."""
        self.clear(sequence.blocks[sequence.length // BLOCK_SIZE :])

    def clear(self, blocks: Sequence[int]) -> None:
        """Write zeros into blocks."""
        for cells in (self.keys, self.values, self.key_scales, self.value_scales):
            if cells is not None:
                cells[:, blocks] = 0

    # -- what the GPU is told of a step: numbers only ------------------------------------------------------------------

    def begin_step(self, spans: Sequence[tuple[CachedSequence, int]]) -> None:
        """See `PagedCache.begin_step`."""
        n_new = [count for _, count in spans]
        self.spans = spans
        self.slots = np.repeat([sequence.slot for sequence, _ in spans], n_new)  # (N,)
        self.positions = np.concatenate([np.arange(each.length, each.length + count) for each, count in spans])  # (N,)
        self._table = self.table.numpy()  # the same memory

    def singles(self, n_rows: int) -> dict[str, np.ndarray]:
        """The arrays of a step of single tokens, filled up to `n_rows` and to a number of blocks of which there are
        few, so that few steps differ in their shapes."""
        n, n_blocks = len(self.slots), FEWEST_BLOCKS
        while n_blocks * BLOCK_SIZE <= self.positions.max():
            n_blocks *= 2
        n_blocks = min(n_blocks, self._table.shape[1])
        positions = np.zeros(n_rows, dtype=np.int64)
        positions[:n] = self.positions
        table = np.full((n_rows, n_blocks), self._no_block, dtype=np.int64)
        table[:n] = self._table[self.slots, :n_blocks]
        cells = table[np.arange(n_rows), positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        return {"positions": positions, "cells": cells, f"{SINGLES} table": table, f"{SINGLES} at": positions[:, None]}

    def groups(self) -> dict[str, np.ndarray]:
        """The arrays of any step. Their names begin with the number of the group and tell its kind."""
        blocks = self._table[self.slots, self.positions // BLOCK_SIZE].astype(np.int64)  # (N,)
        arrays = {"positions": self.positions, "cells": blocks * BLOCK_SIZE + self.positions % BLOCK_SIZE}
        first = np.cumsum([0, *(count for _, count in self.spans)])  # the row of each span's first token
        classes: dict[tuple[int, int], list[int]] = defaultdict(list)  # kind, class of size → spans
        is_exact = self.key_scales is None  # otherwise a prompt is to find what later tokens will find
        for index, (sequence, n_new) in enumerate(self.spans):
            kind = SINGLES if n_new == 1 else FRESH if is_exact and not sequence.length else PIECES
            classes[kind, n_new.bit_length()].append(index)
        place, n_places = np.empty(len(self.slots), dtype=np.int64), 0  # of each token's result among the groups'
        for (kind, _), members in sorted(classes.items()):
            n_new = np.array([self.spans[index][1] for index in members])[:, None]  # (n, 1)
            within = np.arange(n_new.max())[None]  # (1, T)
            rows = first[members][:, None] + np.minimum(within, n_new - 1)  # (n, T): the last token stands in for more
            place[rows[within < n_new]] = (n_places + np.arange(rows.size).reshape(rows.shape))[within < n_new]
            name = f"{kind} {len(arrays)}"
            arrays[f"{name} rows"] = rows
            if kind != FRESH:
                at = self.positions[rows]
                n_blocks = int(at.max()) // BLOCK_SIZE + 1
                arrays[f"{name} at"] = at
                arrays[f"{name} table"] = self._table[self.slots[rows[:, 0]], :n_blocks].astype(np.int64)
            n_places += rows.size
        return {**arrays, "place": place}

    # -- on the GPU ----------------------------------------------------------------------------------------------------

    def enter(self, numbers: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Take the arrays of a step, on the GPU by now, before the model's forward pass.

        Args:
            dtype: of the queries that will come.
        """
        self._cells, self._place = numbers["cells"], numbers.get("place")
        n_shared = self.config.n_heads // self.config.n_kv_heads
        groups: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, tensor in numbers.items():
            if name[0].isdigit():
                group, _, part = name.rpartition(" ")
                groups[group][part] = tensor
        self._groups = []
        for parts in groups.values():
            mask, table = None, parts.get("table")
            if table is not None:
                cells = torch.arange(table.size(1) * BLOCK_SIZE, device=table.device)  # (S,)
                hidden = cells > parts["at"].unsqueeze(-1)  # (n, T, S)
                mask = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)
                mask = mask.repeat(1, n_shared, 1).unsqueeze(1)  # (n, 1, T · H / G, S)
            self._groups.append(Group(parts.get("rows"), table, mask))

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """See `PagedCache.attend`."""
        self._check(len(self._cells), query, key, value, mask)
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H or G, K)
        self._store(self.keys[layer], None if self.key_scales is None else self.key_scales[layer], key)
        self._store(self.values[layer], None if self.value_scales is None else self.value_scales[layer], value)
        results = []
        for group in self._groups:
            rows = group.rows
            queries = query.unsqueeze(1) if rows is None else query[rows]  # (n, T, H, K)
            if group.table is None:
                attended = attend(*(x[rows].transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
            else:
                keys = self._load(self.keys, self.key_scales, layer, group.table, query.dtype)  # (n, G, S, K)
                values = self._load(self.values, self.value_scales, layer, group.table, query.dtype)
                attended = attend_in_groups(queries, keys, values, group.mask)
            results.append(attended.flatten(0, 1))  # (n · T, H, K)
        attended = results[0] if len(results) == 1 else torch.cat(results)
        attended = attended if self._place is None else attended[self._place]  # (N, H, K)
        return attended.transpose(0, 1).unsqueeze(0)  # (1, H, N, K)

    def _store(self, cells: torch.Tensor, scales: torch.Tensor | None, new: torch.Tensor) -> None:
        """Write keys or values (N, G, K) of a layer into the cells of the step."""
        if scales is not None:
            scale = new.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-30 * 127) / 127  # (N, G, 1)
            scales.flatten(0, 1).index_copy_(0, self._cells, scale.squeeze(-1))
            new = (new.float() / scale).round()
        cells.flatten(0, 1).index_copy_(0, self._cells, new.to(cells.dtype))

    def _load(
        self,
        cells: torch.Tensor,
        scales: torch.Tensor | None,
        layer: int,
        table: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The contents (n, G, S, K) of a layer's blocks (n, S / BLOCK_SIZE)."""
        n, (_, _, _, n_heads, head_dim) = len(table), cells.shape
        found = cells[layer].flatten(1).index_select(0, table.flatten()).view(n, -1, n_heads, head_dim)  # (n, S, G, K)
        if scales is not None:
            found_scales = scales[layer].flatten(1).index_select(0, table.flatten()).view(n, -1, n_heads, 1)
            found = (found * found_scales).to(dtype)
        return found.to(dtype).transpose(1, 2)


def attend_in_groups(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Attention of queries (n, T, H, K) to keys and values (n, G, S, K), as (n, T, H, K).

    The query heads of a key/value head are its H / G · T queries: with fewer key/value heads than query heads, only
    PyTorch's slow kernel takes a mask.

    Args:
        mask: (n, 1, H / G · T, S), added to the scores.
    """
    n_groups, n_tokens = keys.size(1), query.size(1)
    folded = query.unflatten(2, (n_groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (n, G, H / G · T, K)
    attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
    return attended.unflatten(2, (-1, n_tokens)).permute(0, 3, 1, 2, 4).flatten(2, 3)
