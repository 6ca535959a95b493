"""Attention of tokens to keys and values that lie in blocks of cells: the Python face of paged_attention.c."""

from __future__ import annotations

import ctypes
from array import array
from pathlib import Path

import torch

from machine.native_code import check_layout, load_native

SOURCE = Path(__file__).with_suffix(".c")
BLOCK_SIZE = 16  # cells; the C file knows this number, too

Sizes = tuple[int, int, int, int, int]  # n_layers, H, G, K and max_seq_len of the models that a cache is for


class NativeCache(ctypes.Structure):
    """A cache as the C file sees it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales", "table")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "blocks", "head_dim", "blocks_per_slot")),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("head_stride", ctypes.c_int64), ("token_stride", ctypes.c_int64)]

    @classmethod
    def of(cls, x: torch.Tensor) -> _Rows:
        return cls(x.data_ptr(), x.stride(1), x.stride(2))


class PagedAttention:
    """The compiled attention to one cache; `PagedAttention.of` makes one where that is possible.

    Attributes:
        cache: its cells, as the C file sees them.
        tensors: the same; kept alive here.
        sizes: see `Sizes`.
    """

    @classmethod
    def of(cls, sizes: Sizes, keys: torch.Tensor, *others: torch.Tensor | None) -> PagedAttention | None:
        """None if the memory or the machine is not one that the compiled code knows.

        Args:
            keys, others: values, scales of both and table, as `PagedCache` describes them.
        """
        if keys.device.type != "cpu" or keys.dtype not in (torch.float32, torch.int8):
            return None
        library = load_native(SOURCE)
        if library is None:
            return None
        check_layout(library, Cache=NativeCache, Rows=_Rows)
        if ctypes.c_int64.in_dll(library, "cells_of_a_block").value != BLOCK_SIZE:
            raise RuntimeError(f"a block has {BLOCK_SIZE} cells here, and not in {SOURCE.name}; change both together")
        return cls(library, sizes, keys, *others)

    def __init__(self, library: ctypes.CDLL, sizes: Sizes, *tensors: torch.Tensor | None) -> None:
        _, n_heads, n_kv_heads, head_dim, _ = self.sizes = sizes
        n_blocks, blocks_per_slot = tensors[0].size(2), tensors[-1].size(1)
        self.tensors = tensors
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        self.cache = NativeCache(*addresses, n_heads, n_kv_heads, n_blocks, head_dim, blocks_per_slot)
        self._function = library.paged_attention
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._function.argtypes = [ctypes.POINTER(NativeCache), number, _Rows, _Rows, _Rows, pointer, pointer, pointer,
                                   number, ctypes.c_int]  # fmt: skip
        self._function.restype = None

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        slots: array[int],
        positions: array[int],
        n_threads: int,
    ) -> None:
        """Store key and value (1, G, N, K) of N tokens, and write into `out` (N, H, K) what query (1, H, N, K) finds;
        all fp32, with heads in one piece.

        Args:
            slots, positions: of the tokens, 64-bit integers; those of one slot stand together, in order.
        """
        self._function(
            *(self.cache, layer, _Rows.of(query), _Rows.of(key), _Rows.of(value), out.data_ptr()),
            *(slots.buffer_info()[0], positions.buffer_info()[0], len(positions), n_threads),
        )
