"""INT4 weights in the order in which PyTorch's kernel for GPUs, `_weight_int4pack_mm`, multiplies them.

The kernel gives each thread of a warp what it holds of a tile of 8 rows and 16 columns of W, an operand of the tensor
cores' instruction m16n8k16. Up to 8 tiles that follow each other in a row lie together, so that a thread reads its
share at once: (N/8, K/(16 · tiles), 32 threads, tiles/2) int32, eight weights a number. Thread 4r + c has of row r the
columns 2c, 2c + 1, 2c + 8 and 2c + 9 of each tile; of two tiles, the even columns stand in a number's lower half and
the odd ones in its upper half.

A weight is s · (q − 8) + z, with s and z in bf16 for each group of 32, side by side in (K/32, N, 2): z = 0 where the
groups have no minimum m, and otherwise z = 8 s + m. Rows are filled up with zeros to a multiple of 8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from inference.kernels.int4_weights import GROUP, unpack_int4

TILE_ROWS, TILE_COLUMNS = 8, 16
TOGETHER = (8, 4, 2)  # how many tiles may lie together


def tile_int4(
    packed: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed weights (N, K/2), scales and minima (N, K/32) of int4_weights.py as tiles int32, and (K/32, N, 2) bf16."""
    numbers, more_rows = unpack_int4(packed), (0, 0, 0, -len(packed) % TILE_ROWS)
    numbers = F.pad(numbers, more_rows)
    n_together = next(n for n in TOGETHER if numbers.size(1) % (n * TILE_COLUMNS) == 0)
    # (tile of rows, row, tiles together, pair of them, eighth of the pair, thread, even or odd)
    parts = numbers.view(-1, TILE_ROWS, numbers.size(1) // (n_together * TILE_COLUMNS), n_together // 2, 4, 4, 2)
    digits = parts.permute(0, 2, 1, 5, 3, 6, 4).flatten(-2).unflatten(-1, (4, 2))
    tiles = (digits[..., 0] | digits[..., 1] << 4).contiguous().view(torch.int32).squeeze(-1).flatten(2, 3)
    offset = torch.zeros_like(scale) if minimum is None else 8 * scale.float() + minimum.float()
    scales_and_zeros = F.pad(torch.stack((scale.float(), offset.float())), more_rows).bfloat16()  # (2, N, K/32)
    return tiles.contiguous(), scales_and_zeros.permute(2, 1, 0).contiguous()


def expand_tiles(tiles: torch.Tensor, scales_and_zeros: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The weights (N, K) bf16 that the kernel computes with; of certain `rows` (…,) int64 alone, (…, K)."""
    n_row_tiles, n_outer, _, n_pairs = tiles.shape
    if rows is None:
        rows = torch.arange(n_row_tiles * TILE_ROWS, device=tiles.device)
    by_row = tiles.view(torch.uint8).view(n_row_tiles, n_outer, TILE_ROWS, 4, n_pairs, 4)
    both = by_row[rows // TILE_ROWS, :, rows % TILE_ROWS]  # (…, tiles together, thread, pair, byte)
    digits = torch.stack((both & 15, both >> 4), dim=-1).flatten(-2).unflatten(-1, (2, 4))  # (…, even or odd, eighth)
    numbers = digits.movedim((-4, -3, -2, -1), (-2, -4, -1, -3)).flatten(-5).unflatten(-1, (-1, GROUP))  # (…, K/32, 32)
    scale, zero = scales_and_zeros[:, rows].movedim(0, -2).unsqueeze(-2).unbind(-1)  # (…, K/32, 1) each
    return torch.addcmul(zero, numbers.bfloat16() - 8, scale).flatten(-2)


def int4_product(x: torch.Tensor, tiles: torch.Tensor, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    """x (M, K) bf16 times tiled weights, as (M, N), without a copy of the weights."""
    return torch.ops.aten._weight_int4pack_mm(x.contiguous(), tiles, GROUP, scales_and_zeros)
