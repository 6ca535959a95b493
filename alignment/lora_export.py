"""Adapters for use elsewhere: merged into a plain checkpoint, or in the format of Hugging Face's `peft`.

    python -m alignment.lora_export --adapter models/sft_lora/sft_best.pth --output_path models/sft_lora/merged.pth
    python -m alignment.lora_export --adapter models/sft_lora/sft_best.pth --peft_dir models/sft_lora/peft

In `peft`, the adapters fit the model as `transformers` implements it: GPT2LMHeadModel for the `gpt2` architecture,
Qwen3ForCausalLM for `modern`. GPT-2 has one layer c_attn in the place of our query, key and value layers; the adapters
of the three, of rank R, become one of rank 3 R, whose B is block-diagonal:

    c_attn x + s · [B_q 0 0; 0 B_k 0; 0 0 B_v] [A_q; A_k; A_v] x
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: modules are imported from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from safetensors.torch import save_file

from alignment.reward_model import RewardModel
from alignment.transformers_names import TRANSPOSED, architecture_of, parts_of
from checkpoint import config_of, find_base, load_checkpoint, restore_model, save_checkpoint, tokenizer_of
from command_line import UserError, option, parse_config, run_main
from gpt_model import GPTConfig


def peft_adapters(
    state: dict[str, torch.Tensor], config: GPTConfig
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Adapters by the names of the layers in `transformers`.

    Args:
        state: {"layers.0.attention.query_proj.lora_A": (R, K), "….lora_B": (N, R), …}

    Returns:
        {layer: (A, B)}.

    Raises:
        UserError: `transformers` has no such model.
    """
    if any(".experts." in name for name in state):
        raise UserError("peft has no adapters for single experts; merge them, or train with --lora_targets attention")
    adapters = {}
    for theirs, ours in parts_of(config).items():
        rank = next((state[f"{name}.lora_A"].size(0) for name in ours if f"{name}.lora_A" in state), 0)
        if not rank:
            continue
        nothing = {"A": torch.zeros(rank, config.d_model), "B": torch.zeros(config.d_model, rank)}
        a, b = ([state.get(f"{name}.lora_{letter}", nothing[letter]) for name in ours] for letter in "AB")
        adapters[theirs] = torch.cat(a), torch.block_diag(*b)  # of three: (3R, K), (3N, 3R)
    return adapters


def save_peft(content: dict[str, Any], path: str | Path, folder: str | Path) -> str:
    """Write `adapter_config.json` and `adapter_model.safetensors` for `peft.PeftModel.from_pretrained`.

    Args:
        content, path: a checkpoint of adapters, and where it was read.
        folder: where to write.

    Returns:
        what its user has to know, or nothing.

    Raises:
        UserError: `transformers` has no such model.
    """
    if content["stage"] == "reward":
        raise UserError(f"{path} is a reward model, which peft has no place for; merge with --output_path instead")
    config = config_of(content, path)
    adapters = peft_adapters(content["model"], config)
    lora = content["lora"]
    rank, alpha = lora["lora_rank"], lora["lora_alpha"]
    [embedding] = (theirs for theirs, ours in parts_of(config).items() if ours == ["token_embedding"])
    is_tied = embedding in adapters and config.tie_embeddings
    fused = {}
    if any(name.endswith("c_attn") for name in adapters):  # three times the rank, and yet the same scaling
        fused = {"rank_pattern": {"c_attn": 3 * rank}}
        fused["alpha_pattern"] = {"c_attn": alpha * (math.sqrt(3) if lora["lora_rslora"] else 3)}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": sorted(adapters),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": lora["lora_dropout"],
        "use_rslora": lora["lora_rslora"],
        "fan_in_fan_out": architecture_of(config) in TRANSPOSED,
        "bias": "none",
        **({"ensure_weight_tying": True} if is_tied else {}),
        **fused,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": matrix.contiguous()
        for name, matrices in adapters.items()
        for letter, matrix in zip("AB", matrices, strict=True)
        if name != embedding
    }
    if embedding in adapters:  # there it has A (R, V) and B (D, R), whose product is the transpose of ours
        for letter, matrix in zip("BA", adapters[embedding], strict=True):
            tensors[f"base_model.model.{embedding}.lora_embedding_{letter}"] = matrix.mT.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    # Seen with peft 0.21.2: embedding and head, one matrix, are each given the adapter that they share
    return "; merge_and_unload would add the embedding's adapter twice, merge with --output_path" if is_tied else ""


def merged_state(content: dict[str, Any], path: str | Path, base: str | Path) -> dict[str, torch.Tensor]:
    """The weights of the plain model, or reward model, that adapters and their base are together."""
    if content["stage"] != "reward":
        return restore_model(content, path, base=base).state_dict()
    return restore_model(content, path, RewardModel, base).state_dict()


@dataclass
class ExportConfig:
    """The command line of `python -m alignment.lora_export`."""

    adapter: str = option("models/sft_lora/sft_best.pth", "a checkpoint of adapters")
    base_model: str = option("", "the model that they belong to; empty: where it was in training")
    output_path: str = option("", "where to write a plain checkpoint with the adapters merged in")
    peft_dir: str = option("", "where to write the adapters for peft")

    def validate(self) -> list[str]:
        """What is wrong with the settings, a sentence each."""
        if self.output_path or self.peft_dir:
            return []
        return ["give --output_path for a plain checkpoint, or --peft_dir for peft's format"]


def main(argv: list[str] | None = None) -> None:
    """Export adapters. Beside a quantized base they cannot be merged: then the new file only points to that base."""
    config = parse_config(ExportConfig, argv, description="Merge adapters (LoRA) into their model, or export them.")
    path, content = config.adapter, load_checkpoint(config.adapter)
    if "lora" not in content:
        raise UserError(f"{path} holds no adapters (LoRA) but a whole model, which can be used as it is")
    if config.peft_dir:
        note = save_peft(content, path, config.peft_dir)
        print(f"for peft: {config.peft_dir}{note}")
    if not config.output_path:
        return
    base = find_base(content, path, config.base_model)
    if load_checkpoint(base).get("quantization"):
        state, lora = content["model"], {**content["lora"], "base": str(base)}
        done = f"adapters beside {base}"
    else:
        state, lora = merged_state(content, path, base), None
        done = f"merged with {base}"
        if content["lora"].get("frozen_weights") == "int8":
            done += ", in full precision, its linear layers rounded to INT8 first, as in training"
    save_checkpoint(
        config.output_path,
        model_state=state,
        config=config_of(content, path),
        tokenizer=tokenizer_of(content),
        stage=content["stage"],
        step=content["step"],
        metrics=content["metrics"],
        lora=lora,
    )
    print(f"{done}: {config.output_path}")


if __name__ == "__main__":
    run_main(main)
