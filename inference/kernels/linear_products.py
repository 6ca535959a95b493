"""The ways to compute x Wᵀ on a CPU; linear_layers.py says what the weights W are.

    native     the project's own C kernels (linear_products.c), for every kind of weights: one row of x takes as long as
               reading W, and a row gives the same to the last bit alone and in a batch
    plain      `F.linear`, with other weights than FP32 expanded block by block; it works everywhere

and, only where native is missing, for want of a compiler, these, which keep a second, packed copy of the weights:

    prepacked  FP32 in oneDNN's order;  FP16 in fbgemm's
    integers   INT8, with and without INT8 inputs, by integer arithmetic (fbgemm), see `integer_linear`
    expanded   FP32, for an INT8 layer that a core's cache can hold: reading it costs nothing anyway

INT8 inputs are the same integers on every processor and are multiplied exactly, so that they give the same numbers.
INT4 weights meet inputs of 8 bits with a scale for each group of 32, multiplied exactly, too.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

from inference.kernels.int4_tiles import TILE_COLUMNS, expand_tiles
from inference.kernels.int4_weights import expand_int4
from machine.native_code import check_layout, load_native

DTYPES = {  # in the order of the types in linear_products.c
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "int8_dynamic": torch.int8,
    "int4": torch.uint8,  # two weights a byte, see int4_weights.py
}
SINGLE_THREAD = 1 << 17  # below this many multiplications, waking a second thread takes longer than they do
TINY_LAYER = 1 << 18  # this many weights take 1 MiB when expanded
EXPANDED_AT_ONCE = 1 << 20  # weights: they stay in the cache until they are used
ROUGH = 127  # an input of 8 bits is a whole number of −ROUGH … ROUGH and the scale of its row
PRECISE = 127 << 16  # one of 24 bits, as many as fp32 has

Product = Callable[[torch.Tensor], torch.Tensor]  # x (…, K) fp32, contiguous → x Wᵀ + bias (…, N) fp32


def kind_of(weight: torch.Tensor) -> str:
    """The name of a weight's type, the first such key of `DTYPES`."""
    return "int4" if is_tiled(weight) else next(name for name, dtype in DTYPES.items() if dtype == weight.dtype)


def is_tiled(weight: torch.Tensor) -> bool:
    """Whether INT4 weights lie as a GPU reads them, see int4_tiles.py."""
    return weight.dtype == torch.int32


def n_inputs(weight: torch.Tensor) -> int:
    """K of weights (N, K), (N, K/2) with two a byte, or in tiles."""
    if is_tiled(weight):
        return weight.size(1) * weight.size(3) * 2 * TILE_COLUMNS
    return weight.size(1) * (2 if weight.dtype == torch.uint8 else 1)


def ways_to_multiply(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    weights: str,
    minimum: torch.Tensor | None = None,
) -> dict[str, Callable[[], Product]]:
    """What can compute a layer on this machine: name → a function that prepares it.

    There is one way, or several of which `plain` is the last.

    Args:
        weight, scale, bias, minimum: those of `InferenceLinear`, on a CPU.
        weights: the kind of weights, one of `DTYPES`.
    """
    plain = partial(plain_linear, weight=weight, scale=scale, bias=bias, minimum=minimum)
    ways: dict[str, Callable[[], Product]] = {}
    if native_knows(weights, n_inputs(weight)):
        ways["native"] = lambda: native_product(weight, scale, bias, weights, minimum)
        if weights == "int4":
            return ways
    elif weights == "fp32":
        ways["prepacked"] = lambda: onednn_product(weight, bias)
    elif weights == "fp16":
        ways["prepacked"] = lambda: fbgemm_fp16_product(weight, bias)
    elif weights == "int8" and weight.numel() <= TINY_LAYER:
        ways["expanded"] = lambda: partial(F.linear, weight=weight * scale.unsqueeze(1), bias=bias)
    if weights.startswith("int8") and "native" not in ways and integer_kernel_limit():
        ways["integers"] = lambda: integer_product(weight, scale, bias, PRECISE if weights == "int8" else ROUGH)
    if weights != "int8_dynamic":
        ways["plain"] = lambda: plain
    elif not ways:
        ways["plain"] = lambda: lambda x: plain(round_inputs(x))
    return ways


def plain_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    minimum: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (…, K) times weights (N, K) of any type, scaled, plus bias, as (…, N) in the type of x; differentiable in x.

    On a CPU weights are expanded block by block; on a GPU at once, which `torch.compile` fuses into the product.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if weight.dtype == x.dtype and scale is None:
        return F.linear(x, weight, bias)
    n_rows = max(1, EXPANDED_AT_ONCE // x.size(-1)) if x.device.type == "cpu" else len(weight)
    if is_tiled(weight):
        blocks, scale = iter([expand_tiles(weight, scale)]), None
    elif weight.dtype == torch.uint8:
        parts = (None if part is None else part.split(n_rows) for part in (weight, scale, minimum))
        packed, scales, minima = ([None] * -(-len(weight) // n_rows) if part is None else part for part in parts)
        blocks = map(expand_int4, packed, scales, minima)
        scale = None
    else:
        blocks = iter(weight.split(n_rows))
    y = torch.cat([F.linear(x, block.to(x.dtype)) for block in blocks], dim=-1)
    y = y if scale is None else y * scale.to(x.dtype)
    return y if bias is None else y + bias


class NativeLinear(ctypes.Structure):
    """A layer as linear_products.c sees it. It keeps the tensors alive whose addresses it holds; a structure that it is
    copied into does not.

    Args:
        weight, scale, bias, minimum: those of `InferenceLinear`, on a CPU.
        weights: the kind of weights, one of `DTYPES`.
    """

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "minimum", "bias")),
        *((name, ctypes.c_int64) for name in ("n_out", "n_in", "type")),
    ]

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        weights: str,
        minimum: torch.Tensor | None = None,
    ) -> None:
        bias = None if bias is None else bias.float()
        self.tensors = weight.detach().contiguous(), scale, minimum, bias
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in self.tensors)
        super().__init__(*addresses, len(weight), n_inputs(weight), list(DTYPES).index(weights))


def native_library() -> ctypes.CDLL | None:
    """The compiled kernels; None where this machine has none."""
    library = load_native(Path(__file__).with_suffix(".c"))
    if library is not None and not library.linear.argtypes:
        check_layout(library, Linear=NativeLinear)
        pointer, number = ctypes.c_void_p, ctypes.c_long
        library.linear.argtypes = [ctypes.POINTER(NativeLinear), pointer, pointer, pointer, number, ctypes.c_int]
        library.linear.restype = None
        library.linear_knows.argtypes = library.linear_digit_bytes.argtypes = [ctypes.c_int64, number]
        library.linear_digit_bytes.restype = number
    return library


def native_knows(weights: str, n_in: int) -> bool:
    """Whether the compiled kernels are there and compute with a kind of weights, one of `DTYPES`, in rows of `n_in`."""
    library = native_library()
    return library is not None and bool(library.linear_knows(list(DTYPES).index(weights), n_in))


def native_product(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    weights: str,
    minimum: torch.Tensor | None = None,
) -> Product:
    """The compiled kernel; it reads the weights where they are."""
    library, layer = native_library(), NativeLinear(weight, scale, bias, weights, minimum)
    function, reference = library.linear, ctypes.byref(layer)
    n_out, n_in = len(weight), n_inputs(weight)
    digit_bytes = library.linear_digit_bytes(layer.type, n_in)

    def product(x: torch.Tensor, keep_alive: object = layer) -> torch.Tensor:
        y = torch.empty(*x.shape[:-1], n_out)
        n_rows = x.numel() // n_in
        digits = torch.empty(n_rows * digit_bytes, dtype=torch.uint8)
        threads = torch.get_num_threads() if n_rows * n_out * n_in > SINGLE_THREAD else 1
        function(reference, x.data_ptr(), digits.data_ptr(), y.data_ptr(), n_rows, threads)
        return y

    return product


def in_rows(product: Product) -> Product:
    """A way for x (…, K) of one that takes x (M, K) only."""
    return lambda x: product(x.view(-1, x.size(-1))).view(*x.shape[:-1], -1)


def onednn_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """FP32 weights in oneDNN's own order."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return in_rows(lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""))


def fbgemm_fp16_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """FP16 weights in fbgemm's own order; inputs and sums are FP32."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
    return in_rows(lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed))


def integer_product(
    weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, most: int, limit: int | None = None
) -> Product:
    """INT8 weights packed for `integer_linear`."""
    packed, limit = pack_weights(weight, scale), limit or integer_kernel_limit()

    def product(x: torch.Tensor) -> torch.Tensor:
        y = integer_linear(x, packed, most, limit)  # (M, N)
        return y if bias is None else y.add_(bias)

    return in_rows(product)


def pack_weights(weight: torch.Tensor, scale: torch.Tensor) -> torch.ScriptObject:
    """Weights (N, K) int8 and scales (N,) in the memory order of the integer kernel, about N · K bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates this way of making a quantized tensor and has no other yet
        zero_points = torch.zeros(len(scale), dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(weight.detach(), scale.double(), zero_points, 0)
    return torch.ops.quantized.linear_prepack(quantized, None)


def input_scale(x: torch.Tensor, most: int) -> torch.Tensor:
    """The scale of each row of x (…, K) by which it becomes −most … most, (…, 1)."""
    return x.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / most


def round_inputs(x: torch.Tensor) -> torch.Tensor:
    """x (…, K) as 8-bit integers would give it back."""
    scale = input_scale(x.detach(), ROUGH)
    return x + ((x.detach() / scale).round() * scale - x.detach())  # the gradient passes as if nothing were rounded


def integer_linear(x: torch.Tensor, packed: torch.ScriptObject, most: int, limit: int) -> torch.Tensor:
    """x (M, K) fp32 times packed INT8 weights by integer arithmetic, as (M, N) fp32; each row as if it were alone.

    An input is rounded to a whole number of −most … most, `ROUGH` or `PRECISE`, and a scale: the only error, at most
    half a unit for each. The kernel multiplies 8 bits at most, so the numbers pass it digit by digit, each as a row.

    Args:
        limit: the largest digit that the kernel takes, see `integer_kernel_limit`; the smallest is −limit − 1.
    """
    base, scale = 2 * (limit + 1), input_scale(x, most)  # (M, 1)
    rows, left, digits = (x / scale).round(), most, []  # whole numbers, which fp32 and divisions by powers of two keep
    while left > limit:
        higher = ((rows + base // 2) / base).floor()
        digits.append(rows - base * higher)
        rows, left = higher, (left + base // 2) // base
    products = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        torch.cat((*digits, rows)), 1.0, limit + 1, packed
    ).chunk(len(digits) + 1)  # (M, N) each, the lowest digit first
    y = products[-1]
    for lower in reversed(products[:-1]):
        y = torch.add(lower, y, alpha=base)
    return y.mul_(scale)


@cache
def integer_kernel_limit() -> int:
    """The largest digit whose products this PyTorch sums up exactly on this processor: 127, 63, or 0 for none.

    Processors without VNNI sum two products of 8-bit numbers up in 16 bits and silently cut off what overflows; with
    7-bit digits nothing can. It is tried on the largest sums that there can be.
    """
    weight = torch.full((32, 256), 127, dtype=torch.int8)
    weight[1::2] = -127
    x = torch.ones(3, 256) * torch.tensor([[1.0], [-1.0], [0.5]])
    for limit in (127, 63):
        try:
            product = integer_product(weight, torch.ones(32), None, PRECISE, limit)(x)
        except (RuntimeError, AttributeError, NotImplementedError):
            return 0  # another kind of processor, or a PyTorch that no longer has these operators
        if torch.allclose(product, x @ weight.float().T, rtol=1e-6):
            return limit
    return 0
