"""A checkpoint of this project becomes a model that other programs take.

    python -m exchange.export_model --model_path models/sft/sft_best.pth --output_dir exported/

writes a Hugging Face folder: weights, config.json, generation_config.json, the tokenizer with its chat template, and a
model card. `transformers`, vLLM and llama.cpp's converter read it.

    python -m exchange.export_model --model_path models/sft/sft_best.pth --output_dir exported/ --gguf Q8_0

writes a GGUF file for llama.cpp and LM Studio in place of that, and beside it a Modelfile for Ollama.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignment.transformers_names import MODELS, architecture_of, each_for_transformers, settings_for_transformers
from checkpoint import require_disk_space
from command_line import option, parse_config, run_main
from exchange.gguf_files import PRECISIONS, architecture_in_gguf, write_gguf
from exchange.model_card import model_card
from exchange.modelfile import adds_bos, modelfile
from exchange.outgoing import Outgoing, filled_folder, open_checkpoint
from inference.kernels.linear_products import DTYPES, kind_of

MODEL_TYPES = {"gpt2": "gpt2", "modern": "qwen3", "llama": "llama", "qwen2": "qwen2", "moe": "qwen3_moe"}
SAFETENSORS = {"fp32": ("F32", "float32"), "fp16": ("F16", "float16"), "bf16": ("BF16", "bfloat16")}
Tensor = tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]


@dataclass
class ExportConfig:
    """The command line of `python -m exchange.export_model`."""

    model_path: str = option("models/sft/sft_best.pth", "the checkpoint; adapters (LoRA) are merged into their model")
    output_dir: str = option("exported", "where to write")
    weights: str = option("auto", "the type of the weights; auto: as they are", choices=("auto", *SAFETENSORS))
    max_shard_mib: int = option(4096, "size of one file of weights", at_least=1)
    gguf: str = option("", "write a GGUF file of this type of weights", choices=("", *PRECISIONS))


def export_folder(model: Outgoing, folder: Path, weights: str = "auto", max_shard_mib: int = 4096) -> None:
    """Write a Hugging Face folder.

    Raises:
        UserError: `transformers` has no such model, or the folder cannot be written.
    """
    config, tokenizer = model.config, model.tokenizer
    architecture = architecture_of(config)
    kind = kind_of(model.state["token_embedding.weight"]) if weights == "auto" else weights
    tensors = [each for each in each_for_transformers(model.state, config) if not _is_tied(each[0], config)]
    require_disk_space(folder, sum(_bytes(shape, kind) for _, shape, _ in tensors) + (1 << 24))
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ids[0] if len(ids := list(tokenizer.end_token_ids)) == 1 else ids,
        "pad_token_id": tokenizer.pad_token_id,
    }
    about = {
        "architectures": [MODELS[architecture]],
        "model_type": MODEL_TYPES[architecture],
        "torch_dtype": SAFETENSORS[kind][1],
        **settings_for_transformers(config),
        **tokens,
    }
    defaults = tokenizer.generation_defaults
    sampling = {"do_sample": bool(defaults.get("temperature", 1.0)), **defaults} if defaults else {}
    with filled_folder(folder) as temporary:
        tokenizer.save(temporary)
        _write_weights(temporary, tensors, kind, max_shard_mib << 20)
        _write_json(temporary / "config.json", about)
        _write_json(temporary / "generation_config.json", {**tokens, **{k: v for k, v in sampling.items() if v}})
        (temporary / "README.md").write_text(model_card(model, MODELS[architecture], kind), encoding="utf-8")
        written = {path.name for path in temporary.iterdir()}
        for old in folder.glob("model*.safetensors*"):  # shards of an earlier export
            if old.name not in written:
                old.unlink()


def _is_tied(name: str, config: Any) -> bool:
    return config.tie_embeddings and name == "lm_head.weight"


def _bytes(shape: tuple[int, ...], kind: str) -> int:
    return torch.Size(shape).numel() * DTYPES[kind].itemsize


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(folder: Path, tensors: list[Tensor], kind: str, max_bytes: int) -> None:
    """One safetensors file, or several with an index."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        n_bytes = _bytes(tensor[1], kind)
        if shards[-1] and size + n_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += n_bytes
    if len(shards) == 1:
        return write_safetensors(folder / "model.safetensors", shards[0], kind)
    index = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, kind)
        index |= dict.fromkeys((tensor for tensor, _, _ in shard), name)
    total = sum(_bytes(shape, kind) for _, shape, _ in tensors)
    return _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index}
    )


def write_safetensors(path: Path, tensors: Iterable[Tensor], kind: str) -> None:
    """A safetensors file, written tensor by tensor: the library's own function wants all of them in memory.

    https://huggingface.co/docs/safetensors: the header's length (64 bits), the header in JSON, the numbers.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    tensors, offset = list(tensors), 0
    for name, shape, _ in tensors:
        end = offset + _bytes(shape, kind)
        header[name] = {"dtype": SAFETENSORS[kind][0], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, make in tensors:
            numbers = make().to(DTYPES[kind]).contiguous()
            numbers.view(torch.uint8).numpy().tofile(file)


def export_gguf(model: Outgoing, folder: Path, precision: str) -> tuple[Path, list[str]]:
    """Write a GGUF file and its Modelfile.

    Returns:
        its path; what is to be said of it, a sentence each.

    Raises:
        UserError: llama.cpp has no such model, or the folder cannot be written.
    """
    architecture_in_gguf(model.config)  # refuses what cannot be written before there is a folder
    require_disk_space(folder, sum(tensor.numel() for tensor in model.state.values()) * 4)
    name = f"{model.path.stem}-{precision}.gguf"
    text, notes = modelfile(name, model.tokenizer, model.config.max_seq_len, model.is_chat_model)
    with filled_folder(folder) as temporary:
        begins = adds_bos(model.tokenizer, model.is_chat_model)
        left = write_gguf(model, temporary / name, precision, begins)
        (temporary / "Modelfile").write_text(text, encoding="utf-8")
    if left:
        notes.append(f"{left} matrices stay F16: their rows are no multiple of 32 numbers, as {precision} needs")
    return folder / name, notes


def main(argv: list[str] | None = None) -> None:
    """Export a model."""
    config = parse_config(ExportConfig, argv, description="Make of a checkpoint what other programs take.")
    folder = Path(config.output_dir)
    model = open_checkpoint(config.model_path, "int4" if config.gguf == "Q4_0" else "")
    if config.gguf:
        path, notes = export_gguf(model, folder, config.gguf)
        print(*notes, f"{path}: for llama.cpp and LM Studio", sep="\n")
        print(f"{folder / 'Modelfile'}: for Ollama, with ollama create NAME -f {folder / 'Modelfile'}")
        return
    export_folder(model, folder, config.weights, config.max_shard_mib)
    print(f"{folder}: a {MODELS[architecture_of(model.config)]} for transformers, vLLM and llama.cpp's converter")


if __name__ == "__main__":
    run_main(main)
