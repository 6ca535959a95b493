"""What a model that goes out is made of, whatever it becomes: a checkpoint's weights and what it says of itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import config_of, load_checkpoint, load_model, tokenizer_of
from command_line import UserError, require_writable_folder
from gpt_model import GPTConfig


@dataclass
class Outgoing:
    """A language model of a checkpoint.

    Attributes:
        path: of the checkpoint.
        state: the weights, mapped from the file; adapters are merged into them.
        content: the rest of the checkpoint.
    """

    path: Path
    state: dict[str, torch.Tensor]
    config: GPTConfig
    tokenizer: ByteLevelBPETokenizer
    content: dict[str, Any]

    @property
    def is_chat_model(self) -> bool:
        """Whether it was trained with its chat template."""
        return self.content["stage"] != "pretrain"


def open_checkpoint(path: str | Path, quantized: str = "") -> Outgoing:
    """The model of a checkpoint.

    Args:
        quantized: the kind of quantized weights that can be exported as they are.

    Raises:
        UserError: no such checkpoint, or it cannot be exported.
    """
    content = load_checkpoint(path)
    if content.get("quantization") not in (None, quantized):
        raise UserError(f"{path} is quantized ({content['quantization']}); export the checkpoint it was made from")
    if content["stage"] == "reward":
        raise UserError(f"{path} is a reward model, which writes no text; export a pretrained, sft or aligned model")
    if "lora" in content:
        _, _, content = load_model(path)
    return Outgoing(Path(path), content["model"], config_of(content, path), tokenizer_of(content), content)


@contextlib.contextmanager
def filled_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into; its files move to `folder`, over older ones of the same names, once all are whole.

    Raises:
        UserError: `folder` cannot be written.
    """
    folder = Path(folder)
    require_writable_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".export.", dir=folder))
    try:
        yield temporary
        for path in sorted(temporary.iterdir()):
            path.chmod(0o666 & ~_umask())
            path.replace(folder / path.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}); free some space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
