"""The ways to compute x Wᵀ on a GPU: a function for each kind of weights that is not of the type of x.

Weights of the type of x, which is what `quantizer.load_any` makes of FP32, FP16 and BF16, go through PyTorch's own
product and are read as they are. INT8 weights take half the bytes of BF16, but PyTorch's only kernel for them
(`_weight_int8pack_mm`) reads them once for each row of x, and before its rewriting read them badly: it is used for few
rows where it has been measured to be faster than making a copy in the type of x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from inference.kernels.linear_products import plain_linear

FEW_ROWS = 8  # of x, for which the weights are read again and again
TRIES = 10  # of each way, one after the other

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # x (M, K), W (N, K), scales → (M, N)

_pays: dict[tuple[object, ...], bool] = {}  # what was measured in this process


def gpu_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """See `linear_products.plain_linear`."""
    rows = x.reshape(-1, x.size(-1))  # (M, K)
    learns = x.requires_grad and torch.is_grad_enabled()  # of which only the plain product knows
    product = None if learns else PRODUCTS.get(weight.dtype)
    if product is None or len(rows) > FEW_ROWS or not _is_faster(product, rows, weight, scale):
        return plain_linear(x, weight, scale, bias)
    y = product(rows, weight, scale).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(y.dtype)


def int8_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (M, K) times INT8 weights (N, K) with a scale (N,) for each output channel, without a copy of the weights."""
    scale = scale if x.is_cuda else scale.to(x.dtype)  # the CPU's kernel wants one type, CUDA's computes in fp32
    return torch._weight_int8pack_mm(x.contiguous(), weight, scale).to(x.dtype)


PRODUCTS: dict[torch.dtype, Product] = {torch.int8: int8_product}


def _is_faster(product: Product, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether a product takes less time than the plain one, measured once for each shape."""
    key = product, x.shape, x.dtype, weight.shape, x.device
    if key not in _pays:
        if torch.cuda.is_current_stream_capturing():  # nothing can be measured now
            return False
        _pays[key] = _time(product, x, weight, scale) < _time(plain_linear, x, weight, scale)
    return _pays[key]


def _time(product: Product, *arguments: torch.Tensor) -> float:
    """Milliseconds of some calls on the GPU, after one that loads what it needs."""
    product(*arguments)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(TRIES):
        product(*arguments)
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)
