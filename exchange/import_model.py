"""A model from elsewhere becomes a checkpoint of this project.

    python -m exchange.import_model --from SmolLM2-135M-Instruct/ --output_path models/smollm2/smollm2.pth

takes a Hugging Face folder, or a GGUF file, and writes a checkpoint with its tokenizer, chat template, end tokens and
sampling defaults. Every stage and the service then take it like one that was trained here. Matrices keep their type:
what is stored in 16 bits stays so on the disk and, for generation, in memory; training computes with 32. Adapters of
`peft` become adapters of ours (`--base_model`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from checkpoint import save_checkpoint
from command_line import UserError, option, parse_config, require_writable_folder, run_main
from exchange.gguf_files import open_gguf
from exchange.hugging_face import open_folder
from exchange.peft_adapters import import_adapters
from exchange.sources import WEIGHTS, Source, bytes_in_memory, require_room, take_in
from inference.request import recommended_sampling


@dataclass
class ImportConfig:
    """The command line of `python -m exchange.import_model`."""

    from_: str = option("", "a Hugging Face folder, a GGUF file, or a folder of peft's adapters")
    output_path: str = option("", "where to write the checkpoint, such as models/NAME/NAME.pth")
    weights: str = option("auto", "the type of the matrices; auto: as they come", choices=WEIGHTS)
    max_seq_len: int = option(0, "the context to take; 0: the model's own", at_least=0)
    base_model: str = option("", "of adapters (LoRA, from peft), the checkpoint that they belong to")
    tokenizer_dir: str = option("", "where the tokenizer is, if it is not with the model")
    ignore_fields: list[str] = option(list, "fields of config.json that are known to change nothing")

    def validate(self) -> list[str]:
        """What is missing, a sentence each."""
        complaints = [] if self.from_ else ["--from is missing; give a Hugging Face folder or a GGUF file"]
        return complaints + ([] if self.output_path else ["--output_path is missing; give models/NAME/NAME.pth"])


def open_source(config: ImportConfig) -> Source:
    """What `--from` names.

    Raises:
        UserError: it is nothing that can be taken in.
    """
    path = Path(config.from_)
    if path.is_dir():
        return open_folder(path, config.max_seq_len, tuple(config.ignore_fields), config.tokenizer_dir)
    if path.is_file():
        return open_gguf(path, config.max_seq_len, tuple(config.ignore_fields))
    raise UserError(f"{path} does not exist; give a Hugging Face folder or a GGUF file")


def import_model(config: ImportConfig) -> Path:
    """Write the checkpoint; returns its path.

    Raises:
        UserError: before any work, or with nothing written.
    """
    output = Path(config.output_path)
    if output.is_dir():
        raise UserError(f"--output_path {output} is a folder; give a file such as {output / 'model.pth'}")
    require_writable_folder(output.parent)
    if (Path(config.from_) / "adapter_config.json").is_file():
        if not config.base_model:
            raise UserError("--base_model is missing; name the checkpoint that these adapters belong to")
        return import_adapters(Path(config.from_), config.base_model, output)
    source = open_source(config)
    kind = source.kind if config.weights == "auto" else config.weights
    require_room(source, kind, output.parent)
    n_weights = sum(math.prod(shape) for shape in source.shapes.values())
    size = bytes_in_memory(source.shapes, kind)[0] / 2**20
    print(f"{source.architecture}, {n_weights / 1e6:.1f} million parameters, {size:.0f} MiB as {kind}")
    for note in source.notes:
        print(note)
    if recommended := recommended_sampling(source.tokenizer):
        listed = ", ".join(f"{name} {value:g}" for name, value in recommended.items())
        print(f"answers are sampled as its makers recommend, unless you say otherwise: {listed}")
    if not source.has_template:
        print("no chat template came with it: this project's own is used, once the model is fine-tuned with it")
    state = take_in(source, kind)
    return save_checkpoint(
        output,
        model_state=state,
        config=source.config,
        tokenizer=source.tokenizer,
        stage="sft" if source.has_template else "pretrain",
        imported={"from": source.path.name, "architecture": source.architecture},
        **({"quantization": kind} if kind.startswith("int") else {}),
    )


def main(argv: list[str] | None = None) -> None:
    """Import a model."""
    config = parse_config(ImportConfig, argv, description="Make a checkpoint of a model from elsewhere.")
    path = import_model(config)
    print(f"{path}: try python -m inference.kv_cache_infer --model_path {path} --prompt …")


if __name__ == "__main__":
    run_main(main)
