"""GGUF files, as llama.cpp, Ollama and LM Studio read them: in and out.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes the format; the package `gguf` reads and writes it,
and unpacks quantized tensors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from alignment.transformers_names import SWITCHES, architecture_of
from command_line import UserError, replacing
from exchange.gguf_int4 import INT4_KINDS, int4_blocks, int4_from
from exchange.gguf_tokenizer import read_tokenizer, write_tokenizer
from exchange.outgoing import Outgoing
from exchange.sources import Source, check_tokenizer, expected_shapes, kind_of_all
from gpt_model import GPTConfig
from inference.kernels.linear_products import n_inputs
from text.chat_template import DEFAULT_CHAT_TEMPLATE
from transformer_components import rotary_frequencies

ARCHITECTURES = {"gpt2": "gpt2", "llama": "llama", "qwen2": "qwen2", "qwen3": "modern"}  # theirs → ours
# ours → theirs; # is the number of a layer
NAMES = {
    "token_embedding": "token_embd",
    "position_embedding": "position_embd",
    "layers.#.attention_norm": "blk.#.attn_norm",
    "layers.#.attention.query_proj": "blk.#.attn_q",
    "layers.#.attention.key_proj": "blk.#.attn_k",
    "layers.#.attention.value_proj": "blk.#.attn_v",
    "layers.#.attention.query_norm": "blk.#.attn_q_norm",
    "layers.#.attention.key_norm": "blk.#.attn_k_norm",
    "layers.#.attention.output_proj": "blk.#.attn_output",
    "layers.#.feed_forward_norm": "blk.#.ffn_norm",
    "layers.#.feed_forward.gate_proj": "blk.#.ffn_gate",
    "layers.#.feed_forward.up_proj": "blk.#.ffn_up",
    "layers.#.feed_forward.down_proj": "blk.#.ffn_down",
    "final_norm": "output_norm",
    "lm_head": "output",
}
FUSED = ("query_proj", "key_proj", "value_proj")  # GPT-2 has one tensor of the three
# Keys behind "llama." and the like: ours → theirs
SIZES = {
    "max_seq_len": "context_length",
    "d_model": "embedding_length",
    "d_ff": "feed_forward_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
}
READ = {
    *SIZES.values(), "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "rope.dimension_count", "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "rope.freq_base",
    "vocab_size",
}  # fmt: skip
YARN = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
ROPE = {
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "rope.scaling.yarn_attn_factor", "rope.scale_linear", *YARN.values(),
}  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"  # of Llama 3.1: by how much each wave is stretched
PRECISIONS = ("F32", "F16", "Q8_0", "Q4_0")
NUMBERS_AT_ONCE = 1 << 22
KINDS = gguf.GGMLQuantizationType
FLOATS = {KINDS.F32: torch.float32, KINDS.F16: torch.float16, KINDS.BF16: torch.bfloat16}


def theirs_of(ours: str, architecture: str) -> str:
    """The name of a weight in a GGUF file."""
    part, _, kind = ours.rpartition(".")
    words = part.split(".")
    if architecture == "gpt2" and words[-1] in FUSED:
        return f"blk.{words[1]}.attn_qkv.{kind}"
    number = words[1] if words[0] == "layers" else ""
    name = NAMES[".".join("#" if word.isdigit() else word for word in words)]
    return f"{name.replace('#', number)}.{kind}"


def permuted(weight: torch.Tensor, n_heads: int, back: bool = False) -> torch.Tensor:
    """The rows of Llama's queries and keys as GGUF has them: what rotates together stands side by side, while
    Hugging Face and we have the two halves of a head one after the other. With `back`, from there to here."""
    half = len(weight) // n_heads // 2
    shape = (n_heads, half, 2) if back else (n_heads, 2, half)
    return weight.reshape(*shape, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _heads_in_another_order(name: str, config: GPTConfig, architecture: str) -> int | None:
    """Of how many heads a weight is whose rows are to be `permuted`; None if they stand as here."""
    heads = {"query_proj": config.n_heads, "key_proj": config.n_kv_heads} if architecture == "llama" else {}
    return heads.get(name.split(".")[-2])


# -- in ----------------------------------------------------------------------------------------------------------------


def open_gguf(path: Path, max_seq_len: int = 0, ignored: tuple[str, ...] = ()) -> Source:
    """A GGUF file as a source.

    Args:
        max_seq_len: the context to take; 0: the model's own.
        ignored: keys of which the user knows that they change nothing.

    Raises:
        UserError: it is damaged, or something in it is not known.
    """
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # a damaged file makes the reader stumble in a dozen ways
        raise UserError(
            f"{path} is no GGUF file, or is damaged or cut off ({str(error)[:80]}); fetch it again"
        ) from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    theirs = metadata.get("general.architecture")
    if theirs not in ARCHITECTURES:
        raise UserError(f"{path} holds a {theirs}; the architectures that are known are {', '.join(ARCHITECTURES)}")
    try:
        config = _config_from(metadata, tensors, path, ignored)
    except KeyError as error:
        raise UserError(f"{path} lacks {error.args[0]}; fetch it again") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} makes no model: {error}") from None
    notes = []
    if max_seq_len:
        if config.position == "learned" and max_seq_len > config.max_seq_len:
            raise UserError(f"--max_seq_len {max_seq_len} is beyond the {config.max_seq_len} learned positions")
        notes.append(f"the context is {max_seq_len} tokens, as asked, of {config.max_seq_len}")
        config.max_seq_len = max_seq_len
    tokenizer = read_tokenizer(metadata, str(path))
    check_tokenizer(tokenizer, config)
    config.pad_token_id = tokenizer.pad_token_id
    shapes = _checked_shapes(config, tensors, theirs, path)
    kinds = {t.tensor_type for t in tensors.values() if len(t.shape) > 1}
    quantized = sorted(kind.name for kind in kinds if kind not in FLOATS)
    if quantized:
        notes.append(f"its {', '.join(quantized)} weights are unpacked; --weights int8 or int4 keeps them small")
    return Source(
        path=path,
        architecture=theirs,
        config=config,
        tokenizer=tokenizer,
        weights=lambda kind: _weights(config, tensors, theirs, kind),
        shapes=shapes,
        kind=kind_of_all({FLOATS.get(kind, torch.float32) for kind in kinds}),
        has_template=tokenizer.chat_template != DEFAULT_CHAT_TEMPLATE,
        notes=notes,
    )


def _short(number: float) -> float:
    """The shortest decimal of a 32-bit number: 1e-06, and not 9.99999997e-07."""
    return float(str(np.float32(number)))


def _config_from(
    metadata: dict[str, Any], tensors: dict[str, gguf.ReaderTensor], path: Path, ignored: tuple[str, ...]
) -> GPTConfig:
    theirs = metadata["general.architecture"]
    architecture = ARCHITECTURES[theirs]
    prefix = f"{theirs}."
    about = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    unknown = [name for name in about if name not in READ | ROPE and name not in ignored and about[name]]
    if unknown:
        raise UserError(
            f"{path} has {', '.join(f'{name} {str(about[name])[:40]}' for name in unknown)}, which may change what the "
            "model computes and is not known here; if you know that it changes nothing, name it with --ignore_fields"
        )
    fields: dict[str, Any] = {**SWITCHES[architecture], **{ours: about[name] for ours, name in SIZES.items()}}
    for name in ("n_heads", "d_ff"):
        if not isinstance(fields[name], int):
            raise UserError(f"{path} has layers of different sizes, which are not known here")
    fields["n_kv_heads"] = about.get("attention.head_count_kv", fields["n_heads"])
    head_dim = about.get("attention.key_length", fields["d_model"] // fields["n_heads"])
    if {about.get("attention.value_length", head_dim), about.get("rope.dimension_count", head_dim)} != {head_dim}:
        raise UserError(f"{path} has keys and values of different widths, or rotates only a part, which is not known")
    eps = "attention.layer_norm_epsilon" if architecture == "gpt2" else "attention.layer_norm_rms_epsilon"
    biases = {
        "qkv_bias": "blk.0.attn_qkv.bias" if architecture == "gpt2" else "blk.0.attn_q.bias",
        "attention_output_bias": "blk.0.attn_output.bias",
        "mlp_bias": "blk.0.ffn_up.bias",
    }
    fields |= {name: tensor in tensors for name, tensor in biases.items()}
    if architecture != "gpt2":
        fields["rope_theta"] = _short(about.get("rope.freq_base", 10000.0))
        fields["rope_scaling"] = _scaling_from(about, tensors, path, head_dim, fields["rope_theta"])
    return GPTConfig(
        **{
            **fields,
            "vocab_size": int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else 1,
            "head_dim": head_dim,
            "norm_eps": _short(about[eps]),
            "bias": architecture == "gpt2",
            "tie_embeddings": "output.weight" not in tensors,
            "pad_token_id": 0,
        }
    )


def _scaling_from(
    about: dict[str, Any], tensors: dict[str, gguf.ReaderTensor], path: Path, head_dim: int, theta: float
) -> dict[str, Any] | None:
    kind = about.get("rope.scaling.type", "none")
    if about.get("rope.scale_linear", 1.0) not in (0.0, 1.0):
        kind, about = "linear", {**about, "rope.scaling.factor": about["rope.scale_linear"]}
    if ROPE_FACTORS in tensors:
        return _llama3_from(np.array(tensors[ROPE_FACTORS].data, dtype=np.float32), path, head_dim, theta)
    factor = _short(about.get("rope.scaling.factor", 0.0))
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UserError(f"{path} has rope scaling of the type {kind!r}; known are linear, yarn, and Llama 3's")
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": about["rope.scaling.original_context_length"],
        **{ours: _short(about[name]) for ours, name in YARN.items() if name in about},
    }
    ratio = about.get("rope.scaling.yarn_attn_factor", 1.0)
    if ratio != 1.0:
        scaling["attention_factor"] = _short(ratio * rotary_frequencies(head_dim, theta, scaling)[1])
    return scaling


def _llama3_from(factors: np.ndarray, path: Path, head_dim: int, theta: float) -> dict[str, Any]:
    """Llama 3's parameters, of which a GGUF file has only the outcome: as they were published, or not at all."""
    for original in (8192, 4096, 16384, 32768, 2048, 1024, 512, 256, 128, 64, 32, 16):
        scaling = {
            "rope_type": "llama3",
            "factor": _short(factors.max()),
            "original_max_position_embeddings": original,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        if np.allclose(rope_factors(head_dim, theta, scaling), factors, rtol=1e-5):
            return scaling
    raise UserError(f"{path} stretches positions by {ROPE_FACTORS} in a way that is not Llama 3's, and not known")


def rope_factors(head_dim: int, theta: float, scaling: dict[str, Any]) -> np.ndarray:
    """By how much each wave is stretched, (K/2,) fp32."""
    plain, _ = rotary_frequencies(head_dim, theta)
    stretched, _ = rotary_frequencies(head_dim, theta, scaling)
    return (plain / stretched).numpy()


def _groups(config: GPTConfig, architecture: str) -> dict[str, list[str]]:
    """{theirs: ours} of all weights."""
    groups: dict[str, list[str]] = {}
    for name in expected_shapes(config):
        groups.setdefault(theirs_of(name, architecture), []).append(name)
    return groups


def _checked_shapes(
    config: GPTConfig, tensors: dict[str, gguf.ReaderTensor], architecture: str, path: Path
) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights by our names.

    Raises:
        UserError: a tensor is missing, of another shape or type, or not known.
    """
    expected, groups = expected_shapes(config), _groups(config, architecture)
    for theirs, ours in groups.items():
        if theirs not in tensors:
            raise UserError(f"{path} lacks the tensor {theirs}; fetch it again")
        shape = (sum(expected[name][0] for name in ours), *expected[ours[0]][1:])
        found = tuple(int(size) for size in reversed(tensors[theirs].shape))
        longer = ours == ["position_embedding.weight"] and found[0] > shape[0] and found[1:] == shape[1:]
        if found != shape and not longer:
            raise UserError(f"{theirs} in {path} has the shape {found}, and should have {shape}")
    rest = sorted(tensors.keys() - groups.keys() - {ROPE_FACTORS})
    if rest:
        raise UserError(f"{path} has tensors that a {architecture} does not have: {', '.join(rest[:3])}")
    for kind, tensor in {tensor.tensor_type: tensor for tensor in tensors.values()}.items():
        if kind not in FLOATS:
            try:
                gguf.dequantize(tensor.data[:1], kind)
            except NotImplementedError:
                raise UserError(f"{path} has weights of the type {kind.name}, which cannot be unpacked") from None
    return expected


def _weights(
    config: GPTConfig, tensors: dict[str, gguf.ReaderTensor], architecture: str, kind: str
) -> Iterator[tuple[str, torch.Tensor | tuple[torch.Tensor, ...]]]:
    expected = expected_shapes(config)
    for theirs, ours in _groups(config, architecture).items():
        tensor = tensors[theirs]
        is_int4 = kind == "int4" and tensor.tensor_type in INT4_KINDS
        whole = int4_from(tensor.data, tensor.tensor_type) if is_int4 else (read_tensor(tensor),)
        if ours == ["position_embedding.weight"]:
            whole = (whole[0][: config.max_seq_len],)
        sizes = [expected[name][0] for name in ours]
        for name, *parts in zip(ours, *(each.split(sizes) for each in whole), strict=True):
            if heads := _heads_in_another_order(name, config, architecture):
                parts = [permuted(part, heads, back=True) for part in parts]
            yield name, tuple(parts) if is_int4 else parts[0]
        del whole, parts


def read_tensor(tensor: gguf.ReaderTensor) -> torch.Tensor:
    """A tensor of a file: floats as they are, what is quantized as fp32, some rows at a time."""
    kind = tensor.tensor_type
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if kind == KINDS.BF16:
        return torch.from_numpy(np.array(tensor.data).view(np.int16)).view(torch.bfloat16).reshape(shape)
    if kind in FLOATS:
        return torch.from_numpy(np.array(tensor.data)).reshape(shape)
    out, rows = torch.empty(shape), max(1, NUMBERS_AT_ONCE // shape[-1])
    for start in range(0, shape[0], rows):
        piece = gguf.dequantize(tensor.data[start : start + rows], kind)
        out[start : start + rows] = torch.from_numpy(np.ascontiguousarray(piece))
    return out


# -- out ---------------------------------------------------------------------------------------------------------------


def architecture_in_gguf(config: GPTConfig) -> str:
    """The name of a model's architecture in llama.cpp.

    Raises:
        UserError: it cannot compute this model.
    """
    ours = architecture_of(config)
    if ours not in ARCHITECTURES.values():
        raise UserError("experts are not written to GGUF here; export without --gguf and use llama.cpp's converter")
    theirs = next(name for name, own in ARCHITECTURES.items() if own == ours)
    scaling = config.rope_scaling or {"rope_type": "none"}
    if scaling["rope_type"] == "dynamic" or (scaling["rope_type"] == "llama3" and theirs != "llama"):
        raise UserError(f"llama.cpp's {theirs} has no rope scaling of the type {scaling['rope_type']}")
    if scaling.get("truncate") is False or scaling.get("mscale"):
        raise UserError("llama.cpp's yarn has neither truncate: false nor mscale")
    if ours == "modern" and config.qkv_bias:
        raise UserError("llama.cpp's qwen3 has no biases")
    return theirs


def write_gguf(model: Outgoing, path: Path, precision: str, adds_bos: bool) -> int:
    """Write a GGUF file, tensor by tensor.

    Args:
        precision: of the matrices, one of `PRECISIONS`; vectors and positions stay F32.
        adds_bos: see `write_tokenizer`.

    Returns:
        How many matrices stay F16 because their rows are no multiple of 32 numbers, as Q8_0 and Q4_0 need.

    Raises:
        UserError: llama.cpp has no such model, or a number is too large for F16.
    """
    config = model.config
    theirs = architecture_in_gguf(config)
    with replacing(path, "free some space or choose another --output_dir") as file:
        writer = gguf.GGUFWriter(file.name, theirs)  # opens it by its name
        _write_config(writer, config, theirs, precision)
        writer.add_name(model.path.stem)
        write_tokenizer(writer, model.tokenizer, config.vocab_size, adds_bos)
        groups, left = _groups(config, theirs), 0
        plan: list[tuple[list[str], KINDS]] = []
        for name, ours in groups.items():
            first = model.state[ours[0]]
            is_int4 = first.dtype == torch.uint8
            n_rows = sum(len(model.state[each]) for each in ours)
            shape = (n_rows,) if first.ndim == 1 else (n_rows, n_inputs(first))
            kind = KINDS.F32 if len(shape) == 1 or ours == ["position_embedding.weight"] else KINDS[precision]
            if is_int4 and f"{ours[0].removesuffix('weight')}minimum" in model.state:
                kind = KINDS.Q4_1
            if kind in (KINDS.Q8_0, KINDS.Q4_0) and shape[-1] % 32:
                kind, left = KINDS.F16, left + 1
            block, size = gguf.GGML_QUANT_SIZES[kind]
            dtype = np.dtype({KINDS.F32: np.float32, KINDS.F16: np.float16}.get(kind, np.uint8))
            raw = gguf.quants.quant_shape_to_byte_shape(shape, kind) if kind not in FLOATS else shape
            writer.add_tensor_info(name, raw, dtype, math.prod(shape) // block * size, raw_dtype=kind)
            plan.append((ours, kind))
        scaling = config.rope_scaling or {}
        factors = None
        if scaling.get("rope_type") == "llama3":
            factors = rope_factors(config.head_dim, config.rope_theta, scaling)
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for ours, kind in plan:
            writer.write_tensor_data(_packed(model, ours, kind, theirs))
        if factors is not None:
            writer.write_tensor_data(factors)
        writer.close()
    return left


def _packed(model: Outgoing, ours: list[str], kind: KINDS, architecture: str) -> np.ndarray:
    parts = []
    if model.state[ours[0]].dtype == torch.uint8:
        return np.concatenate([_packed_int4(model, name, architecture) for name in ours])
    for name in ours:
        weight = model.state[name].float()
        heads = _heads_in_another_order(name, model.config, architecture)
        parts.append(permuted(weight, heads) if heads else weight)
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what overflows is looked at
        packed = gguf.quantize(np.ascontiguousarray(whole.numpy()), kind)
    if kind == KINDS.F16 and not np.isfinite(packed).all():
        raise UserError(f"{ours[0]} has numbers that are too large for F16; take --gguf F32")
    return packed


def _packed_int4(model: Outgoing, name: str, architecture: str) -> np.ndarray:
    parts = [model.state.get(name.removesuffix("weight") + part) for part in ("weight", "scale", "minimum")]
    if heads := _heads_in_another_order(name, model.config, architecture):
        parts = [part if part is None else permuted(part, heads) for part in parts]
    return int4_blocks(*parts)


def _write_config(writer: gguf.GGUFWriter, config: GPTConfig, architecture: str, precision: str) -> None:
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if precision == "F32" else f"MOSTLY_{precision}"])
    for ours, name in SIZES.items():
        writer.add_uint32(f"{architecture}.{name}", getattr(config, ours))
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count_kv(config.n_kv_heads)
    if architecture == "gpt2":
        return writer.add_layer_norm_eps(config.norm_eps)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        for ours, name in YARN.items():
            if ours in scaling:
                writer.add_float32(f"{architecture}.{name}", scaling[ours])
        if "attention_factor" in scaling:
            usual = {name: value for name, value in scaling.items() if name != "attention_factor"}
            ratio = scaling["attention_factor"] / rotary_frequencies(config.head_dim, config.rope_theta, usual)[1]
            writer.add_rope_scaling_yarn_attn_factor(ratio)
    return None
