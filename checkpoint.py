"""The one checkpoint format: a file that describes itself, is written atomically and is verified when read.

A checkpoint is a dict that `torch.load(weights_only=True, mmap=True)` accepts:

    format          "gpt-checkpoint/1"
    stage           "pretrain" | "sft" | "reward" | "ppo" | …
    step            optimiser steps made
    config          the fields of GPTConfig
    model           the state dict; with LoRA, only what was trained
    tokenizer       {"fingerprint": sha256, "files": {name: text}}; no later stage asks for the tokenizer again
    metrics         the scores at that step
    command, versions
    training_state  optimiser, random states, … ; only in the checkpoints that training continues from
    lora            with LoRA: its settings, where the base model is, and the fingerprint of its weights
    data            after pretraining: records read, left out and why, cut, by data set; see text/account.py
    made_from       of quantized weights, the fingerprint of the original
    …               what a stage adds, such as "quantization"

PyTorch writes a zip archive with a CRC-32 of every tensor, so a damaged file is recognised without a second file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError, existing_parent, replacing, require_file
from gpt_model import GPTConfig, GPTModel
from inference.kernels.int8_weights import round_to_int8
from lora import LoRAOptions, attach_lora, detach_lora, lora_state, merge_lora
from transformer_components import shapes_only

FORMAT = "gpt-checkpoint/1"


def save_checkpoint(
    path: str | Path,
    *,
    model_state: dict[str, torch.Tensor],
    config: GPTConfig,
    tokenizer: ByteLevelBPETokenizer,
    stage: str,
    step: int = 0,
    metrics: dict[str, Any] | None = None,
    training_state: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    **extra: Any,
) -> Path:
    """Write a checkpoint. A kill or a full disk at any moment leaves the old file, or none, but never half a file.

    Args:
        lora: of adapters, their settings with "base" and "base_fingerprint", see `find_base`.

    Raises:
        UserError: the disk is full or the folder cannot be written; what was there before is still there.
    """
    content = {
        "format": FORMAT,
        "stage": stage,
        "step": step,
        "config": asdict(config),
        "model": model_state,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "files": tokenizer.to_files()},
        "metrics": metrics or {},
        "command": " ".join(sys.argv),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        **extra,
    }
    if training_state is not None:
        content["training_state"] = training_state
    if lora:
        content["lora"] = {**lora, "base_relative": os.path.relpath(lora["base"], Path(path).parent)}
    return atomic_save(content, path)


def atomic_save(content: dict[str, Any], path: str | Path) -> Path:
    """`torch.save` that leaves a whole file or the old one."""
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot save {path}: {_reason(error)}; free some space or choose another --output_dir (older checkpoints "
            "are kept)"
        ) from error
    return Path(path)


def _reason(error: BaseException) -> str:
    """Why a file could not be written. PyTorch reports a failed write as a RuntimeError in the wake of the OSError."""
    first: BaseException | None = error
    while first is not None and not isinstance(first, OSError):
        first = first.__cause__ or first.__context__
    if first is None:
        return str(error).partition("\n")[0]
    return "the disk is full" if first.errno == errno.ENOSPC else str(first.strerror or first)


def require_disk_space(folder: str | Path, n_bytes: int) -> None:
    """Refuse a run before any work if the disk of `folder` cannot take `n_bytes`."""
    free = shutil.disk_usage(existing_parent(Path(folder) / "x")).free
    if free < n_bytes:
        raise UserError(
            f"{folder} has {free / 2**20:.0f} MiB of free disk and this run needs about {n_bytes / 2**20:.0f} MiB; "
            "free some space, choose another --output_dir or lower --keep_checkpoints"
        )


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read and verify a checkpoint; its tensors stay on the disk (memory-mapped) until they are used.

    Raises:
        UserError: no such file, damaged, or not a checkpoint of this project.
    """
    path = require_file(path, "the checkpoint")
    damaged = f"the checkpoint {path} is damaged; use another one, or train it again"
    try:
        with zipfile.ZipFile(path) as archive:
            # Compares the CRC-32 of every record: mapped tensors are read later, when nothing would check them
            broken = archive.testzip()
    except Exception as error:  # a damaged archive makes zipfile stumble in a dozen ways
        raise UserError(damaged) from error
    if broken is not None:
        raise UserError(damaged)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load has no exception type of its own for foreign content
        raise UserError(f"{path} is not a checkpoint of this project; give one that its trainers wrote") from error
    if isinstance(content, dict) and "model_state_dict" in content:
        raise UserError(
            f'{path} holds a "model_state_dict" and not a whole checkpoint; docs/from_the_articles.md shows how its '
            "weights become one"
        )
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project; give one that its trainers wrote")
    return content


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    base: str | Path | None = None,
    load_base: Callable[..., tuple[GPTModel, ByteLevelBPETokenizer, dict]] | None = None,
    mapped: bool = False,
) -> tuple[GPTModel, ByteLevelBPETokenizer, dict]:
    """The model (in eval mode), its tokenizer and the checkpoint's dict. Adapters (LoRA) come merged into their base.

    Args:
        path: a checkpoint.
        device: where to put the model.
        base, load_base, mapped: see `restore_model`.

    Raises:
        UserError: as `load_checkpoint` and `restore_model`; or it is not a language model in full precision.
    """
    content = load_checkpoint(path)
    require_tokenizer(content, path)
    if content.get("quantization"):
        raise UserError(f"{path} is quantized ({content['quantization']}); give the checkpoint it was made from")
    require_language_model(content, path)
    model = restore_model(content, path, base=base, load_base=load_base, mapped=mapped)
    if "lora" in content:  # what is returned is a plain model
        content |= {"made_from": weight_fingerprint(content), "model": model.state_dict()}
        del content["lora"]
    return model.to(device).eval(), tokenizer_of(content), content


def restore_model(
    content: dict[str, Any],
    path: str | Path,
    wrap: Callable[[GPTModel], nn.Module] = lambda model: model,
    base: str | Path | None = None,
    load_base: Callable[..., tuple[GPTModel, ByteLevelBPETokenizer, dict]] | None = None,
    mapped: bool = False,
) -> nn.Module:
    """The model of a checkpoint in full precision, trained as a whole or with LoRA.

    Args:
        content, path: the checkpoint, and where it was read.
        wrap: turns a GPT into the kind of model that the checkpoint holds, such as `RewardModel`.
        base: of adapters, the checkpoint that they belong to; None takes the recorded one.
        load_base: what loads it, `load_model` unless given. Beside a quantized base, adapters stay unmerged.
        mapped: leave the weights of a whole model in the file, which must not be written into, and map them into memory
            as they are used; for a model that is only read.

    Raises:
        UserError: another architecture; or the base is missing or has changed.
    """
    if "lora" not in content:
        with shapes_only():  # the weights of the file take their place
            model = wrap(GPTModel.from_config(config_of(content, path)))
        state = content["model"] if mapped else {name: tensor.clone() for name, tensor in content["model"].items()}
        load_weights(model, state, path, assign=True)
        for part in model.modules():
            if isinstance(part, GPTModel) and part.config.tie_embeddings and isinstance(part.lm_head, nn.Linear):
                part.lm_head.weight = part.token_embedding.weight
        return model.float()
    base_model, _, base_content = (load_base or load_model)(find_base(content, path, base))
    model = wrap(base_model)
    lora = content["lora"]
    options = LoRAOptions(**{field.name: lora[field.name] for field in fields(LoRAOptions) if field.name in lora})
    if options.frozen_weights == "int8":  # a base in full precision becomes what the adapters were trained beside
        round_to_int8(base_model)
    attach_lora(model, options)
    # Loading is strict, so that a missing adapter shows: what was not trained loads from the base itself
    untrained = {name: value for name, value in model.state_dict().items() if name not in lora_state(model)}
    load_weights(model, {**untrained, **content["model"]}, path)
    if not base_content.get("quantization"):
        merge_lora(model)
        detach_lora(model)
    return model


def find_base(content: dict[str, Any], path: str | Path, base: str | Path | None = None) -> Path:
    """The checkpoint that adapters belong to: `base`, or what is found at its place seen from the adapters' folder or
    from the working folder. It has to have the weights that the adapters were trained with.

    Raises:
        UserError: it is not there, or its weights have changed.
    """
    lora = content["lora"]
    wanted = [Path(base)] if base else [Path(path).parent / lora["base_relative"], Path(lora["base"])]
    found = [place for place in wanted if place.is_file()]
    for place in found:
        if weight_fingerprint(load_checkpoint(place)) == lora["base_fingerprint"]:
            return place
    what = f"{found[0]}, whose weights have changed" if found else f"{wanted[-1]}, which is not there"
    raise UserError(
        f"{path} holds adapters (LoRA) for {what}; bring that model back, or say where it is and merge the two: "
        f"python -m alignment.lora_export --adapter {path} --base_model PATH --output_path MERGED"
    )


def weight_fingerprint(content: dict[str, Any]) -> str:
    """SHA-256 of a checkpoint's weights; of adapters, together with their base's; of INT8 weights, the original's.

    Adapters recognise by it the model that they were trained with.
    """
    if "made_from" in content:
        return content["made_from"]
    lora = content.get("lora", {})  # not where the base is, but what it is
    settings = {name: value for name, value in lora.items() if name not in ("base", "base_relative")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(content["model"].items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())  # equal bytes may be other matrices
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def config_of(content: dict[str, Any], path: str | Path) -> GPTConfig:
    """The model configuration that a checkpoint carries."""
    known = {field.name for field in fields(GPTConfig)}
    unknown = set(content["config"]) - known
    if unknown:
        raise UserError(
            f"{path} needs a newer version of this project (unknown settings: {', '.join(sorted(unknown))})"
        )
    return GPTConfig(**content["config"])


def require_tokenizer(content: dict[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint that brings no tokenizer, or not a whole one."""
    files = (content.get("tokenizer") or {}).get("files") if isinstance(content.get("tokenizer"), dict) else None
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path} holds no tokenizer; train or quantize it anew")


def require_language_model(content: dict[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint of a model that does not continue texts."""
    if content["stage"] == "reward":
        raise UserError(f"{path} is a reward model, which writes no text; give a pretrained, sft or ppo checkpoint")
    if content["stage"] == "translate":
        raise UserError(f"{path} is an encoder–decoder; python -m inference.translate reads it")


def tokenizer_of(content: dict[str, Any]) -> ByteLevelBPETokenizer:
    """The tokenizer that a checkpoint carries."""
    return ByteLevelBPETokenizer.from_files(content["tokenizer"]["files"])


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], path: str | Path, assign: bool = False) -> None:
    """Copy a state dict into a model of the same names and shapes; `assign` takes the very tensors instead.

    Raises:
        UserError: other names or shapes, or weights that are not finite numbers.
    """
    for name, tensor in state.items():  # a sum is not finite if one number is not, and needs no memory
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            raise UserError(f"{path} is damaged: {name} holds NaN or infinity; use another checkpoint")
    try:
        model.load_state_dict(state, strict=True, assign=assign)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(
            f"{path} holds another architecture than expected ({first}); check which model it is"
        ) from error


def require_same_model(
    content: dict[str, Any], config: GPTConfig, tokenizer: ByteLevelBPETokenizer, path: Path
) -> None:
    """Refuse to continue from a checkpoint of another architecture or tokenizer, naming the differences."""
    ours = asdict(config)
    theirs = {field.name: field.default for field in fields(config)} | content["config"]  # what came later: as it was
    differing = [name for name in theirs if theirs[name] != ours.get(name) and name != "dropout"]
    if differing:
        listed = ", ".join(f"{name} {theirs[name]} there, {ours.get(name)} here" for name in differing)
        raise UserError(f"{path} is of another architecture ({listed}); use the same settings or another --output_dir")
    if content["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        same_ids = content["tokenizer"]["files"]["tokenizer.json"] == tokenizer.to_files()["tokenizer.json"]
        what = "chat template" if same_ids else "tokenizer"
        raise UserError(f"{path} was trained with another {what}; use that one or another --output_dir")
