"""INT8 weights: a quarter of the file, and faster on a CPU.

    python -m inference.quantizer --model_path models/sft/sft_best.pth --output_path models/sft/sft_best_int8.pth

Every linear layer becomes an `Int8Linear`: W ≈ scale · Q with Q in −127 … 127 and one scale for each output channel.
The token embedding becomes an `Int8Embedding`; where it is tied to the output layer, both read the same integers.
Norms, biases, scales and learned positions stay in FP32.

How a layer computes x Wᵀ is decided at its first call:

    tiny layers   on a CPU, a layer that a core's cache can hold is expanded once: reading it costs nothing anyway
    x86 CPUs      integer arithmetic (fbgemm), tried once on the hardest case; the weights are packed for it
    elsewhere     Q is converted to x's type for the product (CUDA fuses this under `torch.compile`)

Integer arithmetic needs integer activations, too. One 8-bit number for an activation loses more than the weights do,
far more where one feature is an outlier; and on processors without VNNI the sum of two products of 8-bit numbers
overflows 16 bits and is silently cut off. So an activation is written with two 7-bit digits, which pass the kernel as
two rows: nothing can overflow, the rounding of the weights is the only error left, and the second row is cheap, for it
is reading the weights that takes the time. Every row has a scale of its own: a batch gives what its rows give alone.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import (
    FORMAT,
    atomic_save,
    config_of,
    load_checkpoint,
    load_model,
    load_weights,
    tokenizer_of,
    weight_fingerprint,
)
from command_line import UserError, option, parse_config, run_main
from gpt_model import GPTModel

DIGIT = 63  # a 7-bit digit is −63 … 63; two products of it, made unsigned, with INT8 weights sum up within 16 bits
ZERO_POINT = 64  # makes a digit unsigned, as the kernel wants it
TINY_LAYER = 1 << 18  # so many weights take 1 MiB when expanded; writing a row in digits takes as long as their product


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 with one scale a row: (N, K) float → integers (N, K) int8 in −127 … 127 and scales (N,) fp32."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127  # (N,)
    return (weight / scale.unsqueeze(1)).round().clamp_(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer with INT8 weights, (…, K) → (…, N), for inference.

    Attributes:
        weight: (N, K) int8.
        scale: (N,) fp32, one for each output channel.
        bias: (N,) fp32 or None.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize_rows(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float().clone())
        self._product: Callable[[torch.Tensor], torch.Tensor] | None = None  # on a CPU, the kernel with its weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, K) → (…, N), in the type of x."""
        if x.device.type == "cpu":
            if self._product is None:
                self._product = choose_product(self.weight, self.scale)
            product = self._product(x.float())  # (…, N)
        else:
            product = expanding_linear(x, self.weight, self.scale)
        return (product if self.bias is None else product + self.bias).to(x.dtype)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._product = None  # other weights are coming
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int8Embedding(nn.Module):
    """An embedding table (V, D) in INT8 rows with an fp32 scale each; only the rows looked up are expanded."""

    def __init__(self, rows: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)  # (V, D) int8
        self.register_buffer("scale", scale)  # (V,) fp32

    @property
    def weight(self) -> torch.Tensor:
        """Tells the model on which device and in which type embeddings come out; the table itself is `rows`."""
        return self.scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) int64 → (B, T, D) fp32."""
        return self.rows[input_ids] * self.scale[input_ids].unsqueeze(-1)


def choose_product(weight: torch.Tensor, scale: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function x (…, K) fp32 → (…, N) that is right and fast on this CPU, for weight (N, K) int8 and scale (N,)."""
    if weight.numel() <= TINY_LAYER:
        return functools.partial(F.linear, weight=weight * scale.unsqueeze(1))
    if integer_kernel_works():
        return functools.partial(integer_linear, packed=pack_weights(weight, scale))
    return functools.partial(expanding_linear, weight=weight, scale=scale)


def expanding_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The product that works everywhere: x (…, K) times int8 weights (N, K), expanded at each call, as (…, N)."""
    return F.linear(x, weight.to(x.dtype)) * scale


def pack_weights(weight: torch.Tensor, scale: torch.Tensor) -> torch.ScriptObject:
    """Weights (N, K) int8 and scales (N,) in the memory order of the integer kernel, about N · K bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates this way of making a quantized tensor and has no other yet
        zero_points = torch.zeros(len(scale), dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(weight, scale.double(), zero_points, 0)
    return torch.ops.quantized.linear_prepack(quantized, None)


def integer_linear(x: torch.Tensor, packed: torch.ScriptObject) -> torch.Tensor:
    """x (…, K) fp32 times packed weights, as (…, N) fp32; each row of x as if it were alone."""
    rows = x.reshape(-1, x.size(-1))  # (M, K)
    scale = rows.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / DIGIT  # (M, 1)
    rows = rows / scale  # −63 … 63
    high = rows.round()
    low = (rows - high) * (2 * DIGIT)  # −63 … 63; the kernel rounds it
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    high, low = multiply(torch.cat((high, low)), 1.0, ZERO_POINT, packed).chunk(2)  # (M, N) each
    return torch.add(high, low, alpha=1 / (2 * DIGIT)).mul_(scale).view(*x.shape[:-1], -1)


@functools.cache
def integer_kernel_works() -> bool:
    """Whether this PyTorch, on this processor, multiplies integers exactly; tried on the largest sums there can be."""
    weight = torch.full((32, 256), 127, dtype=torch.int8)
    weight[1::2] = -127
    x = torch.ones(3, 256) * torch.tensor([[1.0], [-1.0], [0.5]])
    try:
        product = integer_linear(x, pack_weights(weight, torch.ones(32)))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False  # another kind of processor, or a PyTorch that no longer has these operators
    return torch.allclose(product, x @ weight.float().T, rtol=1e-3)


def quantize_model_int8(model: GPTModel) -> GPTModel:
    """An INT8 copy of a model, in eval mode; the model itself stays as it is.

    Raises:
        UserError: the model is quantized already.
    """
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise UserError("the model is quantized already; give the model in full precision")
    # deepcopy takes what its memo holds in place of copying: the float weights are never copied
    memo: dict[int, Any] = {id(part): Int8Linear(part) for part in model.modules() if isinstance(part, nn.Linear)}
    head, embedding = memo[id(model.lm_head)], model.token_embedding
    tied = embedding.weight is model.lm_head.weight
    rows, scale = (head.weight, head.scale) if tied else quantize_rows(embedding.weight)
    memo[id(embedding)] = Int8Embedding(rows, scale)
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


def save_quantized_model(model: GPTModel, path: str | Path, checkpoint: dict[str, Any] | None = None) -> Path:
    """Write a quantized model as a checkpoint.

    Args:
        checkpoint: the checkpoint it was made from (the last value of `checkpoint.load_model`): its stage, step,
            metrics and tokenizer go into the file. Without it, the file holds the model only.

    Raises:
        UserError: the model is not quantized, or the file cannot be written.
    """
    if not any(isinstance(module, Int8Linear) for module in model.modules()):
        raise UserError("the model is not quantized; pass it through quantize_model_int8 first")
    inherited = {name: value for name, value in (checkpoint or {}).items() if name != "training_state"}
    content = {"stage": "pretrain", "step": 0, "metrics": {}, **inherited}
    own = {"format": FORMAT, "config": asdict(model.config), "model": model.state_dict(), "quantization": "int8"}
    if checkpoint:
        own["made_from"] = weight_fingerprint(checkpoint)  # adapters (LoRA) for the original fit this model, too
    return atomic_save({**content, **own, "command": " ".join(sys.argv)}, path)


def load_quantized_model(path: str | Path, device: torch.device | str = "cpu") -> GPTModel:
    """The quantized model in a checkpoint, in eval mode.

    Raises:
        UserError: no such file, damaged, not quantized, or of another architecture.
    """
    return _quantized_model(load_checkpoint(path), path, device)


def _quantized_model(content: dict[str, Any], path: str | Path, device: torch.device | str) -> GPTModel:
    if content.get("quantization") != "int8":
        raise UserError(f"{path} is not quantized; run python -m inference.quantizer --model_path {path} first")
    model = quantize_model_int8(GPTModel.from_config(config_of(content, path)))
    load_weights(model, content["model"], path)
    return model.to(device)


def load_any(
    path: str | Path, device: torch.device | str = "cpu", base: str | Path | None = None
) -> tuple[GPTModel, ByteLevelBPETokenizer, dict[str, Any]]:
    """The model of a checkpoint, quantized or not, in eval mode; its tokenizer; and the checkpoint's dict.

    Args:
        base: of adapters (LoRA), the model that they belong to, in full precision or quantized; None takes the recorded
            one. Into full precision they are merged, beside quantized layers they are attached.

    Raises:
        UserError: as `checkpoint.load_model`.
    """
    content = load_checkpoint(path)
    if not content.get("quantization"):
        return load_model(path, device, base, load_any)
    if "tokenizer" not in content:
        raise UserError(f"{path} holds no tokenizer; quantize the model again with python -m inference.quantizer")
    return _quantized_model(content, path, device), tokenizer_of(content), content


@dataclass
class QuantizerConfig:
    """The command line of the quantizer."""

    model_path: str = option("models/sft/sft_best.pth", "the checkpoint to quantize")
    output_path: str | None = option(None, "where to write; default beside it, with _int8 added to the name")
    num_threads: int = option(0, "CPU threads of the speed measurement; 0 means as many as torch takes")

    def validate(self) -> list[str]:
        output = Path(self.output_path or "x_int8.pth")
        same = output.resolve() == Path(self.model_path).resolve()
        return [
            *(["num_threads must be 0 or more"] if self.num_threads < 0 else []),
            *([f"output_path {output} is the model itself; choose another name"] if same else []),
        ]


def weight_bytes(model: nn.Module) -> int:
    """The size of a model's weights; what is tied counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def decode_speed(model: GPTModel, batch_size: int = 1, n_tokens: int = 64, seconds: float = 1.0) -> float:
    """Tokens a second (over all rows) when generating from one-token prompts: the best of several runs."""
    prompt = torch.full((batch_size, 1), (model.config.pad_token_id + 1) % model.config.vocab_size)
    n_tokens = min(n_tokens, model.config.max_seq_len - 1)
    model.generate(prompt, max_gen_len=2, temperature=0)
    fastest, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        model.generate(prompt, max_gen_len=n_tokens, temperature=0)
        fastest = min(fastest, time.perf_counter() - start)
    return batch_size * n_tokens / fastest


@torch.inference_mode()
def compare_logits(model: GPTModel, quantized: GPTModel, input_ids: torch.Tensor) -> tuple[float, float]:
    """How far the quantized logits are from the model's: relative error ‖difference‖ / ‖logits‖, and the share of
    positions where both have the same likeliest token.

    Args:
        input_ids: (B, T) int64.
    """
    reference, logits = model(input_ids)["logits"], quantized(input_ids)["logits"]  # (B, T, V)
    error = (logits - reference).norm() / reference.norm()
    return error.item(), (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()


def main(argv: list[str] | None = None) -> None:
    """Quantize a checkpoint, and say what it cost and what it brought."""
    config = parse_config(QuantizerConfig, argv, description="Make an INT8 version of a model.")
    torch.set_num_threads(config.num_threads or torch.get_num_threads())
    source = Path(config.model_path)
    output = Path(config.output_path or source.with_name(f"{source.stem}_int8{source.suffix}"))
    model, tokenizer, checkpoint = load_model(source)
    save_quantized_model(quantize_model_int8(model), output, checkpoint)
    quantized = load_quantized_model(output)

    start, generator = torch.full((8, 1), tokenizer.bos_token_id), torch.Generator().manual_seed(0)
    sample = model.generate(start, max_gen_len=64, generator=generator)  # (8, T), what the model itself writes
    error, agreement = compare_logits(model, quantized, sample)
    speed, int8_speed = decode_speed(model), decode_speed(quantized)
    for what, before, after in (
        ("weights", weight_bytes(model), weight_bytes(quantized)),
        ("file", source.stat().st_size, output.stat().st_size),
    ):
        print(f"{what:<10} {before / 2**20:.2f} → {after / 2**20:.2f} MiB ({after / before:.0%})")
    print(f"logits     relative error {error:.2%}, same likeliest token at {agreement:.1%} of the positions")
    print(f"decoding   {speed:.0f} → {int8_speed:.0f} tokens/s ({int8_speed / speed:.2f}×, batch 1, CPU)")
    print(f"INT8 model {output}")


if __name__ == "__main__":
    run_main(main)
