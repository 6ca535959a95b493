"""GGUF's blocks of 4-bit weights as INT4 (inference/kernels/int4_weights.py), and back.

Q4_0 has w = d · (q − 8) and Q4_1 w = d · q + m for 32 weights, with d and m in fp16, as INT4 has it: they come and go
as they are. Q4_K has scales and minima of 6 bits for every 32 weights, to be multiplied with fp16 numbers of 256
weights: the products are rounded to fp16.
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

import gguf
import numpy as np
import torch

from inference.kernels.int4_weights import GROUP, pack_int4, unpack_int4

KINDS = gguf.GGMLQuantizationType
INT4_KINDS = (KINDS.Q4_0, KINDS.Q4_1, KINDS.Q4_K)
BYTES = {KINDS.Q4_0: 18, KINDS.Q4_1: 20, KINDS.Q4_K: 144}  # of a block


def int4_from(data: np.ndarray, kind: KINDS) -> tuple[torch.Tensor, ...]:
    """A matrix of a file, (N, bytes of a row) uint8, of one of `INT4_KINDS`: packed weights (N, K/2) uint8, scales and,
    but for Q4_0, minima (N, K/32) fp16."""
    blocks = np.asarray(data).view(np.uint8).reshape(len(data), -1, BYTES[kind])  # (N, blocks, bytes)
    halves = 1 if kind == KINDS.Q4_0 else 2
    factors = np.ascontiguousarray(blocks[..., : 2 * halves]).view(np.float16)  # (N, blocks, halves)
    if kind == KINDS.Q4_K:
        scale, minimum = gguf.quants.Q4_K.get_scale_min(np.ascontiguousarray(blocks[..., 4:16]).reshape(-1, 12))
        factors = factors.astype(np.float32)
        scale = (factors[..., :1] * scale.reshape(*blocks.shape[:2], 8)).reshape(len(data), -1).astype(np.float16)
        minimum = (-factors[..., 1:] * minimum.reshape(*blocks.shape[:2], 8)).reshape(len(data), -1).astype(np.float16)
        both, scales = blocks[..., 16:].reshape(len(data), -1, GROUP), (scale, minimum)
        numbers = np.stack((both & 15, both >> 4), axis=-2)  # (N, pairs, 2, 32): a group in each half
    else:
        both, scales = blocks[..., 2 * halves :], tuple(factors[..., half] for half in range(halves))
        numbers = np.concatenate((both & 15, both >> 4), axis=-1)  # (N, groups, 32)
    packed = pack_int4(torch.from_numpy(np.ascontiguousarray(numbers)).reshape(len(data), -1))
    return packed, *(torch.from_numpy(np.ascontiguousarray(each)) for each in scales)


def int4_blocks(packed: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None = None) -> np.ndarray:
    """INT4 weights as Q4_0's blocks, or Q4_1's if they have minima: (N, bytes of a row) uint8."""
    numbers = unpack_int4(packed).unflatten(-1, (-1, GROUP)).numpy()  # (N, groups, 32)
    both = numbers[..., : GROUP // 2] | numbers[..., GROUP // 2 :] << 4
    factors = [each.numpy()[..., None].view(np.uint8) for each in (scale, minimum) if each is not None]
    return np.concatenate((*factors, both), axis=-1).reshape(len(packed), -1)
