"""What a model that comes in is made of, whatever file it is in, and how it becomes a checkpoint of ours.

hugging_face.py and gguf_files.py each make a `Source`; `take_in` turns one into a checkpoint's weights, a tensor at a
time: at no moment is there more in memory than the result so far and one tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import require_disk_space
from command_line import UserError
from gpt_model import GPTConfig, GPTModel
from inference.kernels.int4_weights import GROUP
from inference.kernels.linear_layers import rounded
from inference.kernels.linear_products import DTYPES
from inference.quantizer import prepare_for_inference
from transformer_components import shapes_only

WEIGHTS = ("auto", "fp32", "fp16", "bf16", "int8", "int8_dynamic", "int4")
ROWS_AT_ONCE = 1 << 20  # numbers that are quantized at once


@dataclass
class Source:
    """A model from outside.

    Attributes:
        path: where it is.
        architecture: its name there, such as "LlamaForCausalLM".
        config, tokenizer: in our terms.
        weights: of a kind of `WEIGHTS` that is wanted, gives (our name, tensor) of all weights, what is tied once, one
            tensor of the file after another; for "int4", what is INT4 there as it is, (packed, scales[, minima]).
        shapes: of all weights, by our names, as the file says.
        kind: of the matrices, a key of `DTYPES`: in which type nothing is lost and nothing wasted.
        has_template: whether a chat template came along.
        notes: what was chosen or left out, a sentence each, to be shown.
    """

    path: Path
    architecture: str
    config: GPTConfig
    tokenizer: ByteLevelBPETokenizer
    weights: Callable[[str], Iterator[tuple[str, torch.Tensor | tuple[torch.Tensor, ...]]]]
    shapes: dict[str, tuple[int, ...]]
    kind: str
    has_template: bool
    notes: list[str]


def expected_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's weights by name; what is tied has one name."""
    with shapes_only():
        shapes = {name: tuple(tensor.shape) for name, tensor in GPTModel.from_config(config).state_dict().items()}
    if config.tie_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def kind_of_all(dtypes: set[torch.dtype]) -> str:
    """The kind of weights for matrices of these types: half precision if all have it, and otherwise fp32."""
    kinds = {kind for kind in ("fp16", "bf16") if DTYPES[kind] in dtypes}
    return kinds.pop() if len(dtypes) == len(kinds) == 1 else "fp32"


def check_tokenizer(tokenizer: ByteLevelBPETokenizer, config: GPTConfig) -> None:
    """That a model knows all ids of its tokenizer.

    Raises:
        UserError: it does not.
    """
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size}; they do not belong together"
        )


def bytes_in_memory(shapes: dict[str, tuple[int, ...]], kind: str) -> tuple[int, int]:
    """How much the result takes, and the largest tensor in full precision."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    matrices = sum(torch.Size(shape).numel() for shape in shapes.values() if len(shape) > 1)
    bits = {"int4": 5}.get(kind, 8 * DTYPES[kind].itemsize)  # with scales and minima
    return matrices * bits // 8 + 4 * (sum(sizes) - matrices), 4 * max(sizes)


def require_room(source: Source, kind: str, folder: Path) -> None:
    """Refuse before the work if memory or disk do not suffice.

    Raises:
        UserError: they do not.
    """
    result, largest = bytes_in_memory(source.shapes, kind)
    free = available_memory()
    if free is not None and free < result + largest:
        raise UserError(
            f"{source.path} needs {(result + largest) / 2**20:.0f} MiB of memory as {kind}, and {free / 2**20:.0f} are "
            "free; close other programs, or take --weights int8"
        )
    require_disk_space(folder, result + (1 << 24))  # and the tokenizer


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def take_in(source: Source, kind: str) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint: matrices as one of `DTYPES`; norms, biases and routers in full precision.

    Raises:
        UserError: a tensor is not finite.
    """
    state: dict[str, torch.Tensor] = {}
    position = "position_embedding.weight"
    for name, tensor in source.weights(kind):
        whole = name.removesuffix("weight")
        if isinstance(tensor, tuple):
            made = dict(zip((name, f"{whole}scale", f"{whole}minimum"), tensor, strict=False))
            state |= {part: copied(numbers, numbers.dtype) for part, numbers in made.items()}
            tensor = torch.cat([each.flatten() for each in tensor[1:]])
        if not tensor.sum(dtype=torch.float32).isfinite():  # it is not finite if one number is not
            raise UserError(f"{source.path} is damaged: its {name} holds NaN or infinity; fetch it again")
        if name in state:
            continue
        if tensor.ndim == 1 or name.endswith(".router.weight"):  # a choice that tips changes all that follows
            state[name] = copied(tensor, torch.float32)
        elif kind.startswith("int") and name != position:
            if kind == "int4" and tensor.size(1) % GROUP:
                long = f"rows of {tensor.size(1)} numbers, no multiple of {GROUP}"
                raise UserError(f"{name} of {source.path} has {long}; take --weights int8")
            state[name], state[f"{whole}scale"] = quantized(tensor, kind)
        else:
            state[name] = copied(tensor, torch.float16 if kind.startswith("int") else DTYPES[kind])
            if not state[name].sum(dtype=torch.float32).isfinite():
                raise UserError(f"{name} of {source.path} is too large for {kind}; take --weights bf16 or fp32")
        del tensor
    if source.config.tie_embeddings:
        for part in ("weight", "scale", "minimum"):
            if (name := f"token_embedding.{part}") in state:
                state[f"lm_head.{part}"] = state[name]
    with shapes_only():
        model = GPTModel.from_config(source.config)
        names = (prepare_for_inference(model, kind) if kind.startswith("int") else model).state_dict().keys()
    rest = [name for name in state if name not in names]  # minima
    return {name: state[name] for name in (*names, *rest)}


def copied(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy in memory of its own, whose numbers stand row by row."""
    return torch.empty(tensor.shape, dtype=dtype).copy_(tensor)


def quantized(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`rounded`, some rows at a time."""
    step = max(1, ROWS_AT_ONCE // weight.size(1))
    integers, scales = (each.new_empty(len(weight), *each.shape[1:]) for each in rounded(weight[:1], kind))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        integers[rows], scales[rows] = rounded(weight[rows], kind)
    return integers, scales
