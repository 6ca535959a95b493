"""INT4 weights: four bits a number, in groups of 32 that share a scale.

A weight is q of 0 … 15 in a group with a scale s, w = s · (q − 8), or, where the group has a minimum m, w = s · q + m:
what GGUF calls Q4_0 and Q4_1. Scales and minima are fp16, so that a weight takes 4.5 or 5 bits.

Two numbers share a byte, in the order in which int4_products.h multiplies them: a row is cut into blocks of 16 groups
(the last may be shorter); a block has four parts, a part four bytes of each group; byte b of part p holds weight
8p + b of the group in its lower half and 8p + 4 + b in its upper half.
"""

from __future__ import annotations

import torch

GROUP = 32  # weights that share a scale
BLOCK = 16 * GROUP
LEVELS = 16
SMALLEST = torch.finfo(torch.float16).tiny  # of scales; what is smaller becomes zeros


def pack_int4(numbers: torch.Tensor) -> torch.Tensor:
    """Whole numbers (…, K) of 0 … 15 as bytes (…, K/2) uint8; K is a multiple of `GROUP`."""
    blocks = []
    for block in numbers.to(torch.uint8).split(BLOCK, dim=-1):
        parts = block.unflatten(-1, (-1, 4, 2, 4))  # (…, group, part, half, byte)
        both = parts[..., 0, :] | parts[..., 1, :] << 4  # (…, group, part, byte)
        blocks.append(both.transpose(-3, -2).flatten(-3))  # (…, part · group · byte)
    return torch.cat(blocks, dim=-1)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The reverse of `pack_int4`: (…, K/2) uint8 → (…, K) uint8 of 0 … 15."""
    blocks = []
    for block in packed.split(BLOCK // 2, dim=-1):
        both = block.unflatten(-1, (4, -1, 4)).transpose(-3, -2)  # (…, group, part, byte)
        blocks.append(torch.stack((both & 15, both >> 4), dim=-2).flatten(-4))  # (…, group · part · half · byte)
    return torch.cat(blocks, dim=-1)


def expand_int4(packed: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None = None) -> torch.Tensor:
    """The weights (…, K) fp32 of packed ones (…, K/2), with scales and, if they have them, minima (…, K/32) fp16."""
    numbers, scale = unpack_int4(packed).float().unflatten(-1, (-1, GROUP)), scale.float().unsqueeze(-1)
    offset = -8 * scale if minimum is None else minimum.float().unsqueeze(-1)
    return (numbers * scale + offset).flatten(-2)


def scales_int4(weight: torch.Tensor) -> torch.Tensor:
    """The scales (…, K/32) fp16 of weights (…, K): a group's number of the largest magnitude becomes q = 0.

    As that is −8 scales, and the other end 7, no number is cut off that is smaller.
    """
    groups = weight.float().unflatten(-1, (-1, GROUP))
    extreme = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)  # (…, K/32)
    scale = (extreme / -8).half()
    return torch.where(scale.abs() < SMALLEST, torch.zeros_like(scale), scale)


def nearest_int4(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The numbers q (…,) of 0 … 15, as floats, whose weights come nearest; `scale` (…,) is that of each weight."""
    scale = scale.to(weight.dtype)
    steps = weight / torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.where(scale == 0, torch.zeros_like(steps), steps).round().clamp(-8, 7) + 8


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (…, K) float, each rounded to the nearest: packed (…, K/2) uint8 and scales (…, K/32) fp16."""
    weight = weight.detach().float()
    scale = scales_int4(weight)
    return pack_int4(nearest_int4(weight, scale.repeat_interleave(GROUP, dim=-1))), scale
