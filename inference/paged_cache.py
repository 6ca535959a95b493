"""The engine's cache: keys and values of many requests in one preallocated memory, and attention to them.

All tokens of one step of the engine stand in one row, whichever requests they belong to: linear layers see one matrix.
Attention alone looks at the requests separately. It stores the new keys and values in their cells, and then

    kernels/paged_attention.c  compiled for this machine, reads each cell where it lies
    PyTorch's attention        (on a GPU, in other precisions, without a compiler) gathers the cells of a request, or of
                               single tokens of requests of similar length together

With INT8 cells a key or value of one head is 8-bit integers and one scale.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from command_line import UserError
from gpt_model import GPTConfig
from inference.cache_blocks import NOWHERE, BlockPool, CachedSequence
from inference.kernels.paged_attention import BLOCK_SIZE, PagedAttention
from transformer_components import attend

WORTH_THREADS = 1 << 17  # multiplications with keys in one layer

# Rows (n, T), blocks (n, S / BLOCK_SIZE) and which cells are visible (n, 1, T, S)
Gathered = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class PagedCache:
    """Keys and values of all layers in cells of fixed number; what a model is given as its `cache`.

    Args:
        config: of the model.
        n_tokens: how many cells; rounded up to whole blocks.
        n_slots: how many sequences may be open at once.
        dtype: of the cells, a floating type or torch.int8.
        device: of the cells.
        reuse_prefixes: whether sequences that begin alike share blocks.

    Attributes:
        keys: (n_layers, G, blocks, K, BLOCK_SIZE), transposed for the C function.
        values: (n_layers, G, blocks, BLOCK_SIZE, K). Both are zeros at first: what is masked must still be finite.
        key_scales, value_scales: (n_layers, G, blocks, BLOCK_SIZE) fp32 for INT8 cells, otherwise None.
        table: (n_slots, blocks of the longest sequence) int32, on the CPU: the blocks of each sequence.
        slots, positions: of each token of the present step, arrays of 64-bit integers.
        sizes: n_layers, H, G, K and max_seq_len of the model that it is for.
    """

    def __init__(
        self,
        config: GPTConfig,
        n_tokens: int,
        n_slots: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        reuse_prefixes: bool = True,
    ) -> None:
        self.config, self.device, self.reuse_prefixes = config, torch.device(device), reuse_prefixes
        n_blocks, blocks_per_slot = -(-n_tokens // BLOCK_SIZE), -(-config.max_seq_len // BLOCK_SIZE)
        self.pool = BlockPool(n_blocks)
        self.sizes = (config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim, config.max_seq_len)
        self.table = torch.zeros(n_slots, blocks_per_slot, dtype=torch.int32)
        self.free_slots = list(reversed(range(n_slots)))
        self._allocate(n_blocks, dtype)

    def _allocate(self, n_blocks: int, dtype: torch.dtype) -> None:
        """The cells."""
        config = self.config
        shape = (config.n_layers, config.n_kv_heads, n_blocks)
        self.keys = _zeros((*shape, config.head_dim, BLOCK_SIZE), dtype, self.device)
        self.values = _zeros((*shape, BLOCK_SIZE, config.head_dim), dtype, self.device)
        self.key_scales = self.value_scales = None
        if dtype == torch.int8:
            self.key_scales = _zeros((*shape, BLOCK_SIZE), torch.float32, self.device)
            self.value_scales = _zeros((*shape, BLOCK_SIZE), torch.float32, self.device)
        tensors = (self.keys, self.values, self.key_scales, self.value_scales, self.table)
        self.native = PagedAttention.of(self.sizes, *tensors)

    # -- sequences -----------------------------------------------------------------------------------------------------

    @property
    def n_tokens(self) -> int:
        """How many cells there are."""
        return len(self.pool.users) * BLOCK_SIZE

    @property
    def n_used(self) -> int:
        """How many cells belong to open sequences, in whole blocks."""
        return self.n_tokens - len(self.pool.free) * BLOCK_SIZE

    def has_room(self, tokens: Sequence[int], spare: int, findable: Sequence[int] | None = None) -> bool:
        """Whether a sequence of these tokens can be opened (see `open`) so that `spare` blocks are left."""
        shared = [block for block, _ in self.pool.find(tokens if findable is None else findable)]
        n_free = len(self.pool.free) - sum(self.pool.users[block] == 0 for block in shared)
        return -(-len(tokens) // BLOCK_SIZE) - len(shared) + spare <= n_free

    def known_length(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens a new sequence would find stored."""
        return len(self.pool.find(tokens)) * BLOCK_SIZE

    def open(self, tokens: Sequence[int], findable: Sequence[int] | None = None) -> CachedSequence:
        """A sequence with cells for these tokens, whose `length` first ones are stored already.

        There must be a free slot, and `has_room`.

        Args:
            findable: the beginning of the tokens of which all but the last may be stored already; None: all of them.
        """
        sequence = CachedSequence(self.free_slots.pop())
        self.pool.share(sequence, tokens if findable is None else findable)
        self.table[sequence.slot, : len(sequence.blocks)] = torch.tensor(sequence.blocks, dtype=torch.int32)
        self.reserve(sequence, len(tokens))
        return sequence

    def reserve(self, sequence: CachedSequence, length: int) -> bool:
        """Give a sequence cells for `length` tokens in all; False if there is no room (it keeps what it has got)."""
        while len(sequence.blocks) * BLOCK_SIZE < length:
            block = self.pool.take()
            if block is None:
                return False
            self.table[sequence.slot, len(sequence.blocks)] = block
            sequence.blocks.append(block)
        return True

    def stretch(self, sequence: CachedSequence, n_new: int, spare: int) -> int:
        """Give a sequence cells for `n_new` more tokens as long as more than `spare` blocks stay free; how many of them
        it can store then."""
        while (n_cells := len(sequence.blocks) * BLOCK_SIZE - sequence.length) < n_new:
            if len(self.pool.free) <= spare + 1 or not self.reserve(sequence, sequence.length + n_cells + 1):
                return n_cells
        return n_new

    def stored(self, sequence: CachedSequence, tokens: Sequence[int], n_new: int) -> None:
        """Count the tokens of a step that succeeded; `tokens` are all of the sequence's."""
        if self.reuse_prefixes:
            self.pool.remember(sequence, tokens, n_new)
        else:
            sequence.length += n_new

    def forget(self, running: Sequence[CachedSequence]) -> None:
        """Share nothing of what is stored so far, nor of what the open sequences add to it."""
        self.pool.forget()
        for sequence in running:
            sequence.prefix = NOWHERE

    def close(self, sequence: CachedSequence) -> None:
        """Take back the cells of a sequence; their contents can be shared until they are needed."""
        self.pool.release(sequence.blocks)
        self.free_slots.append(sequence.slot)

    def scrub(self, sequence: CachedSequence) -> None:
        """Write zeros over what is not known to be good: NaN in a cell would leak through a mask."""
        n_full, n_good = divmod(sequence.length, BLOCK_SIZE)
        for block in sequence.blocks[n_full:]:
            self.keys[:, :, block, :, n_good:] = 0
            self.values[:, :, block, n_good:] = 0
            for scales in (self.key_scales, self.value_scales):
                if scales is not None:
                    scales[:, :, block, n_good:] = 0
            n_good = 0

    # -- one step ------------------------------------------------------------------------------------------------------

    def begin_step(self, spans: Sequence[tuple[CachedSequence, int]]) -> None:
        """Say which tokens come next: this many new ones of each sequence, in this order, those with fewest first."""
        self.slots, self.positions = array("q"), array("q")
        for sequence, n_new in spans:
            self.slots.extend([sequence.slot] * n_new)
            self.positions.extend(range(sequence.length, sequence.length + n_new))
        if self.native is not None:  # waking threads takes longer than a few short pasts
            work = sum(self.positions) * self.config.n_heads * self.config.head_dim
            self._n_threads = torch.get_num_threads() if work > WORTH_THREADS else 1
        else:
            first_rows: dict[tuple[int, int], list[int]] = defaultdict(list)  # tokens, class of length → first rows
            row = 0
            for sequence, n_new in spans:
                # Single tokens are gathered together if their lengths are within a factor of 2
                first_rows[n_new, sequence.length.bit_length() if n_new == 1 else -row].append(row)
                row += n_new
            slots, positions = torch.tensor(self.slots), torch.tensor(self.positions)  # (N,)
            self._gathered = [self._gather(slots, positions, n_new, rows) for (n_new, _), rows in first_rows.items()]
            self._blocks = self.table[slots, positions // BLOCK_SIZE].to(self.device)  # (N,)
            self._offsets = (positions % BLOCK_SIZE).to(self.device)  # (N,)

    def _gather(self, slots: torch.Tensor, positions: torch.Tensor, n_new: int, first_rows: list[int]) -> Gathered:
        rows = torch.tensor(first_rows).unsqueeze(1) + torch.arange(n_new)  # (n, T)
        positions = positions[rows].unsqueeze(2)  # (n, T, 1)
        n_blocks = int(positions.max()) // BLOCK_SIZE + 1
        blocks = self.table[slots[rows[:, 0]], :n_blocks]  # (n, S / BLOCK_SIZE)
        visible = (torch.arange(n_blocks * BLOCK_SIZE) <= positions).unsqueeze(1)  # (n, 1, T, S)
        return rows.to(self.device), blocks.to(self.device), visible.to(self.device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Store key and value (1, G, N, K) and attend from query (1, H, N, K) to each token's own past.

        Raises:
            UserError: a layer asks for attention of another kind or size.
        """
        n_tokens, n_heads, head_dim = len(self.positions), query.size(1), query.size(3)
        self._check(n_tokens, query, key, value, mask)
        if self.native is not None:  # made for fp32 and for heads in one piece, which they nearly always are
            query, key, value = (x.float() if x.stride(3) == 1 else x.float().contiguous() for x in (query, key, value))
            attended = torch.empty(n_tokens, n_heads, head_dim)  # (N, H, K)
            self.native(layer, query, key, value, attended, self.slots, self.positions, self._n_threads)
        else:
            self._store(layer, key[0], value[0])
            attended = query.new_empty(n_tokens, n_heads, head_dim)  # (N, H, K)
            for rows, blocks, visible in self._gathered:
                queries = query[0][:, rows].transpose(0, 1)  # (n, H, T, K)
                keys, values = (  # (n, G, S, K)
                    _load(cells, scales, blocks, query.dtype) for cells, scales in self._cells_of(layer)
                )
                attended[rows] = attend(queries, keys, values, visible).transpose(1, 2)  # (n, T, H, K)
        return attended.transpose(0, 1).unsqueeze(0)  # (1, H, N, K)

    def _check(
        self,
        n_tokens: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> None:
        """Refuse what a layer of another kind or size gives to `attend` in a step of `n_tokens`."""
        if mask is not None:
            raise UserError("the engine's attention takes no mask; use GPTModel.generate for a model that needs one")
        _, n_heads, n_kv_heads, head_dim, _ = self.sizes
        queries, keys = (1, n_heads, n_tokens, head_dim), (1, n_kv_heads, n_tokens, head_dim)
        if query.shape != queries or key.shape != keys or value.shape != keys:
            found = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise UserError(
                f"the cache takes queries {queries} and keys and values {keys} from this model's configuration, and a"
                f" layer gives it {found}; use GPTModel.generate"
            )

    def advance(self, n_tokens: int) -> None:
        """Nothing: the engine counts the tokens of a sequence when it knows that the step has succeeded."""

    def _cells_of(self, layer: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """The keys' and the values' cells of a layer, (G, blocks, BLOCK_SIZE, K), each with its scales or None."""
        pairs = ((self.keys[layer].transpose(-1, -2), self.key_scales), (self.values[layer], self.value_scales))
        return [(cells, None if scales is None else scales[layer]) for cells, scales in pairs]

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write keys and values (G, N, K) into the cells of the step."""
        for new, (cells, scales) in zip((key, value), self._cells_of(layer), strict=True):
            if scales is not None:
                scale = new.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-30 * 127) / 127  # (G, N, 1)
                scales[:, self._blocks, self._offsets] = scale.squeeze(-1)
                new = (new / scale).round()
            cells[:, self._blocks, self._offsets] = new.to(cells.dtype)


def _load(cells: torch.Tensor, scales: torch.Tensor | None, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The contents (n, G, S, K) of blocks (n, S / BLOCK_SIZE)."""
    found = cells[:, blocks].to(dtype)  # (G, n, S / BLOCK_SIZE, BLOCK_SIZE, K)
    if scales is not None:
        found = found * scales[:, blocks].unsqueeze(-1).to(dtype)
    return found.flatten(2, 3).transpose(0, 1)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Unlike torch.zeros, this takes memory from the system only when a cell is first written
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(n_bytes, dtype=np.uint8)).view(dtype).view(shape)
