"""x Wᵀ for inference, as fast as the machine can.

`InferenceLinear` replaces `nn.Linear`. Its weights are FP32, FP16, BF16 or INT8 (W ≈ scale · Q with Q in −127 … 127 and
one scale for each output channel); inputs and results are FP32, so that the rounding of the weights is the only error.
On a CPU the ways to compute the product are

    native     the project's own C kernels (linear_kernels.c), for every kind of weights: one row of x takes as long as
               reading W, and a row gives the same to the last bit alone and in a batch
    plain      `F.linear`, with other weights than FP32 expanded block by block; it works everywhere

and, only where native is missing, for want of a compiler, these, which keep a second, packed copy of the weights:

    prepacked  FP32 in oneDNN's order;  FP16 in fbgemm's
    integers   INT8, with and without INT8 inputs, by integer arithmetic (fbgemm), see `integer_linear`
    expanded   FP32, for an INT8 layer that a core's cache can hold: reading it costs nothing anyway

INT8 inputs are the same integers on every processor and are multiplied exactly, so that they give the same numbers.

Which one is used is measured at the first call, for each shape and number of rows, and remembered in the user's cache,
so that the next process computes in the same way. A way that fails, or whose result differs from `plain`, is out.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import math
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from command_line import replacing
from inference.native_code import cache_folder, check_layout, load_native, processor

DTYPES = {  # in the order of the types in linear_kernels.c
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "int8_dynamic": torch.int8,
}
ROW_BUCKETS = (1, 4, 16, 64)  # measured are 1, 2–4, 5–16, 17–64 and more rows of x
TOLERANCE = 1e-5  # relative error of a product that counts as the same
ADVANTAGE = 0.75  # a way that stands later in the list has to take less than this share of the time
MEASURE_SECONDS = 1e-3  # all ways together
SINGLE_THREAD = 1 << 17  # below so many multiplications, waking a second thread takes longer than they do
TINY_LAYER = 1 << 18  # so many weights take 1 MiB when expanded
BLOCK = 1 << 20  # so many weights are expanded at once: they stay in the cache until they are used
ROUGH = 127  # an input of 8 bits is a whole number of −ROUGH … ROUGH and the scale of its row
PRECISE = 127 << 16  # one of 24 bits, as many as fp32 has

Product = Callable[[torch.Tensor], torch.Tensor]  # x (…, K) fp32, contiguous → x Wᵀ + bias (…, N) fp32


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 with one scale a row: (N, K) float → integers (N, K) int8 in −127 … 127 and scales (N,) fp32."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127  # (N,)
    return (weight / scale.unsqueeze(1)).round().clamp_(-127, 127).to(torch.int8), scale


def kind_of(weight: torch.Tensor) -> str:
    """The name of a weight's type, the first such key of `DTYPES`."""
    return next(name for name, dtype in DTYPES.items() if dtype == weight.dtype)


class InferenceLinear(nn.Module):
    """A linear layer for inference, (…, K) → (…, N), with weights of any of `DTYPES`.

    Gradients pass through to its input (adapters can be trained beside it), but its own weights do not learn.

    Args:
        weight: (N, K) fp32, fp16, bf16 or int8; kept, not copied.
        scale: (N,) fp32 with int8 weights, one for each output channel; otherwise None.
        bias: (N,) fp32 or None.
        int8_inputs: whether inputs are rounded, too, to 8 bits a number with one scale a row: less exact, and the
            fastest way where many rows are computed at once. INT8 weights only.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        int8_inputs: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = _constant(weight)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", None if bias is None else _constant(bias))
        self.int8_inputs = int8_inputs
        self._forget_products()

    @classmethod
    def from_linear(cls, linear: nn.Linear, weights: str) -> InferenceLinear:
        """A linear layer's counterpart with weights of one of `DTYPES`; what needs no other type is shared."""
        weight, scale = linear.weight.detach(), None
        if DTYPES[weights] == torch.int8:
            weight, scale = quantize_rows(weight)
        return cls(weight.to(DTYPES[weights]), scale, linear.bias, weights == "int8_dynamic")

    @property
    def weights(self) -> str:
        """The name of its kind of weights, a key of `DTYPES`."""
        return "int8_dynamic" if self.int8_inputs else kind_of(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, K) → (…, N), in the type of x."""
        if not x.is_cpu or (x.requires_grad and torch.is_grad_enabled()):
            inputs = round_inputs(x) if self.int8_inputs else x
            return plain_linear(inputs, self.weight, self.scale, self.bias)
        # Nothing more than needed: of a small model's step, a fifth would go into views and conversions to what x is
        rows = x if x.dtype == torch.float32 else x.float()
        rows = rows if rows.is_contiguous() else rows.contiguous()
        n_rows = rows.numel() // self.in_features
        bucket = (n_rows > 1) + (n_rows > 4) + (n_rows > 16) + (n_rows > 64)
        product = self._products[bucket]
        if product is None:
            product = self._products[bucket] = self._choose(bucket)
        y = product(rows)  # (…, N)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def _choose(self, bucket: int) -> Product:
        ways = self._ways()
        name = next(iter(ways)) if len(ways) == 1 else fastest_way(ways, self, bucket)
        if name not in self._prepared:
            self._prepared[name] = ways[name]()
        return self._prepared[name]

    def _ways(self) -> dict[str, Callable[[], Product]]:
        """What can compute this layer on a CPU: name → a function that prepares it. `plain` is always there."""
        weight, scale, bias = self.weight, self.scale, self.bias
        native = native_knows(self.weights, self.in_features)
        if self.int8_inputs:
            if native:
                return {"native": lambda: native_product(weight, scale, bias, self.weights)}
            if integer_kernel_limit():
                return {"integers": lambda: integer_product(weight, scale, bias, ROUGH)}
            return {"plain": lambda: lambda x: plain_linear(round_inputs(x), weight, scale, bias)}
        ways: dict[str, Callable[[], Product]] = {}
        if native:
            ways["native"] = lambda: native_product(weight, scale, bias, self.weights)
        elif weight.dtype == torch.float32:
            ways["prepacked"] = lambda: onednn_product(weight, bias)
        elif weight.dtype == torch.float16:
            ways["prepacked"] = lambda: fbgemm_fp16_product(weight, bias)
        elif weight.dtype == torch.int8:
            if weight.numel() <= TINY_LAYER:
                ways["expanded"] = lambda: functools.partial(F.linear, weight=weight * scale.unsqueeze(1), bias=bias)
            if integer_kernel_limit():
                ways["integers"] = lambda: integer_product(weight, scale, bias, PRECISE)
        ways["plain"] = lambda: functools.partial(plain_linear, weight=weight, scale=scale, bias=bias)
        return ways

    def _forget_products(self) -> None:
        self._products: list[Product | None] = [None] * (len(ROW_BUCKETS) + 1)  # by bucket of rows
        self._prepared: dict[str, Product] = {}  # by name, as a packed copy serves several buckets

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._forget_products()  # other weights are coming
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args, **kwargs) -> nn.Module:
        self._forget_products()  # the weights go to another device or type
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_products": [None] * len(self._products), "_prepared": {}}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, weights={self.weights}"


class InferenceEmbedding(nn.Module):
    """An embedding table (V, D) of any of `DTYPES`, with an fp32 scale a row if INT8; only rows looked up are expanded.

    Args:
        weight, scale: the table; tied to the output layer, the very tensors of that layer.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = _constant(weight)
        self.register_buffer("scale", scale)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) int64 → (B, T, D) fp32."""
        rows = F.embedding(input_ids, self.weight).float()
        return rows if self.scale is None else rows * self.scale[input_ids].unsqueeze(-1)


def _constant(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter that does not learn; `tensor` itself if it is one, so that what is tied stays tied."""
    tied = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    return tensor if tied else nn.Parameter(tensor.detach(), requires_grad=False)


# -- ways to compute the product ---------------------------------------------------------------------------------------


def plain_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (…, K) times weights (N, K) of any type, scaled, plus bias, as (…, N) in the type of x; differentiable in x.

    On a CPU weights are expanded block by block; on a GPU at once, which `torch.compile` fuses into the product.
    """
    if weight.dtype == x.dtype and scale is None:
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    n_rows = max(1, BLOCK // weight.size(1)) if x.device.type == "cpu" else len(weight)
    y = torch.cat([F.linear(x, block.to(x.dtype)) for block in weight.split(n_rows)], dim=-1)
    y = y if scale is None else y * scale.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


class NativeLinear(ctypes.Structure):
    """A layer as linear_kernels.c sees it. It keeps the tensors alive whose addresses it holds; a structure that it is
    copied into does not.

    Args:
        weight, scale, bias: those of `InferenceLinear`, on a CPU.
        weights: the kind of weights, one of `DTYPES`.
    """

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("n_out", "n_in", "type")),
    ]

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, weights: str
    ) -> None:
        bias = None if bias is None else bias.float()
        self.tensors = weight.detach().contiguous(), scale, bias
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in self.tensors)
        super().__init__(*addresses, *weight.shape, list(DTYPES).index(weights))


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
    weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, weights: str
) -> Product:
    """The compiled kernel; it reads the weights where they are."""
    library, layer = native_library(), NativeLinear(weight, scale, bias, weights)
    function, reference = library.linear, ctypes.byref(layer)
    n_out, n_in = weight.shape
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


@functools.cache
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


# -- which one is the fastest ------------------------------------------------------------------------------------------

_lock = threading.Lock()


def fastest_way(ways: dict[str, Callable[[], Product]], layer: InferenceLinear, bucket: int) -> str:
    """The name of the fastest of `ways` for layers of this shape and this bucket of rows: remembered, or measured now.

    Where two are about as fast it is the one that stands first. Weights that are not finite prove nothing: `plain`.
    """
    shape = f"{layer.weights} {layer.in_features}x{layer.out_features}"
    key = f"{shape}, rows {bucket}, {torch.get_num_threads()} threads, of {' '.join(ways)}"
    with _lock:
        name = _remembered().get(key)
        if name not in ways:
            name = _measure(ways, layer, ROW_BUCKETS[bucket] if bucket < len(ROW_BUCKETS) else 2 * ROW_BUCKETS[-1])
            if name is None:
                return "plain"
            _remember(key, name)
        return name


@torch.no_grad()
def _measure(ways: dict[str, Callable[[], Product]], layer: InferenceLinear, n_rows: int) -> str | None:
    x = torch.randn(n_rows, layer.in_features, generator=torch.Generator().manual_seed(0))
    reference = plain_linear(x, layer.weight, layer.scale, layer.bias)
    if not bool(reference.isfinite().all()):
        return None
    products = {}
    for name, prepare in ways.items():
        try:
            product = prepare()
            error = (product(x) - reference).norm() / reference.norm().clamp_min(1e-30)
        except (RuntimeError, AttributeError, NotImplementedError):
            continue  # this PyTorch lacks the operator
        if error <= TOLERANCE:
            products[name] = product
    times = dict.fromkeys(products, math.inf)
    end = time.perf_counter() + MEASURE_SECONDS
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:  # in turn, so that other work on the machine disturbs all alike
        for name, product in products.items():
            if rounds == 0 or times[name] < 3 * min(times.values()):
                start = time.perf_counter()
                product(x)
                times[name] = min(times[name], time.perf_counter() - start)
        rounds += 1
    best = next(iter(times))
    for name in times:
        best = name if times[name] < ADVANTAGE * times[best] else best
    return best


def _memory() -> Path:
    return cache_folder() / "linear_kernels.json"


def _machine() -> str:
    sources = [Path(__file__).with_suffix(ending).read_bytes() for ending in (".py", ".c")]
    return hashlib.sha256(repr((processor(), torch.__version__, sources)).encode()).hexdigest()[:16]


def _remembered(path: Path | None = None) -> dict[str, str]:
    """What was measured on this machine with this version, by shape; empty if the file is missing or damaged."""
    try:
        known = json.loads((path or _memory()).read_text())
        return known["choices"] if known["machine"] == _machine() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _remember(key: str, name: str) -> None:
    content = {"machine": _machine(), "choices": {**_remembered(), key: name}}
    try:
        path = _memory()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(content, indent=1).encode())
    except OSError:
        return  # no home, or one that cannot be written to: the next process measures again
