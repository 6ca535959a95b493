"""The ways to compute x Wᵀ on a GPU: a function for each kind of weights that is not of the type of x.

Weights of the type of x, which is what `quantizer.load_any` makes of FP32, FP16 and BF16, go through PyTorch's own
product and are read as they are. INT8 and INT4 weights take half and a quarter of the bytes of BF16, but PyTorch's
kernels for them read them again and again: `_weight_int8pack_mm` once for each row of x (and before its rewriting
badly), `_weight_int4pack_mm` once for each 16 rows. So they are used for few rows, where they have been measured to be
faster than making a copy in the type of x; what was chosen goes to the log, and `choices` has it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from inference.kernels.int4_tiles import int4_product
from inference.kernels.linear_products import is_tiled, kind_of, n_inputs, plain_linear

logger = logging.getLogger(__name__)

PASSES = 8  # over the weights, at most
TRIES = 10  # of each way, one after the other
TOLERANCE = 0.02  # relative difference of the results, several times that of rounding to bf16

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # x (M, K), W, scales → (M, N)


@dataclass
class Choice:
    """How a product is computed, for weights of one shape and some number of rows.

    Attributes:
        kind: of weights, a key of `linear_products.DTYPES`.
        shape: (N, K).
        n_rows: of x; others that need as many passes over the weights are computed alike.
        milliseconds: with the kernel for this kind, and with a copy of the weights in the type of x.
        agrees: whether both give the same.
    """

    kind: str
    shape: tuple[int, int]
    n_rows: int
    milliseconds: tuple[float, float]
    agrees: bool

    @property
    def reads_directly(self) -> bool:
        """Whether the weights are read as they are."""
        return self.agrees and self.milliseconds[0] < self.milliseconds[1]

    def __str__(self) -> str:
        direct, expanded = (f"{time:.3f} ms" for time in self.milliseconds)
        way = "read as they are" if self.reads_directly else "expanded at every call"
        doubt = "" if self.agrees else "; the results differ, so this kernel is not used here"
        what = f"{self.kind} weights {self.shape[1]} → {self.shape[0]}, {self.n_rows} rows"
        return f"{what}: {way} ({direct} directly, {expanded} expanded{doubt})"


_choices: dict[tuple[object, ...], Choice] = {}  # what was measured in this process


def choices() -> list[Choice]:
    """All that was measured in this process."""
    return list(_choices.values())


def gpu_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    minimum: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `linear_products.plain_linear`."""
    rows = x.reshape(-1, x.size(-1))  # (M, K)
    learns = x.requires_grad and torch.is_grad_enabled()  # of which only the plain product knows
    product, rows_a_pass = product_for(weight, x.dtype)
    passes = -(-len(rows) // rows_a_pass)
    if learns or product is None or passes > PASSES or not _is_faster(product, passes, rows, weight, scale):
        return plain_linear(x, weight, scale, bias, minimum)
    y = product(rows, weight, scale).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(y.dtype)


def product_for(weight: torch.Tensor, dtype: torch.dtype) -> tuple[Product | None, int]:
    """The kernel for weights of a kind and inputs of a type, if there is one; the rows that a pass over W computes."""
    if weight.dtype == torch.int8:
        return int8_product, 1
    return int4_product if is_tiled(weight) and dtype == torch.bfloat16 else None, 16


def int8_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (M, K) times INT8 weights (N, K) with a scale (N,) for each output channel, without a copy of the weights."""
    scale = scale if x.is_cuda else scale.to(x.dtype)  # the CPU's kernel wants one type, CUDA's computes in fp32
    return torch._weight_int8pack_mm(x.contiguous(), weight, scale).to(x.dtype)


def _is_faster(product: Product, passes: int, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether a product takes less time than the plain one, measured once for each shape and number of passes over W.

    A kernel whose results differ from the plain ones is not used: PyTorch calls these operators its own affair.
    """
    key = product, passes, x.dtype, weight.shape, x.device
    if key not in _choices:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():  # nothing can be measured now
            return False
        generator = torch.Generator(x.device).manual_seed(0)
        trial = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        found, expected = product(trial, weight, scale), plain_linear(trial, weight, scale)
        agrees = bool((found - expected).norm() <= TOLERANCE * expected.norm())
        times = _time(product, trial, weight, scale), _time(plain_linear, trial, weight, scale)
        choice = Choice(kind_of(weight), (expected.size(1), n_inputs(weight)), len(x), times, agrees)
        _choices[key] = choice
        logger.log(logging.INFO if agrees else logging.WARNING, "%s", choice)
    return _choices[key].reads_directly


def _time(product: Product, *arguments: torch.Tensor) -> float:
    """Milliseconds of a call on the GPU, the mean of some after one that loads what it needs."""
    product(*arguments)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(TRIES):
        product(*arguments)
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / TRIES
