"""One model, what `--model` names or random weights, in the files that each peer reads."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import gguf

from alignment.transformers_names import architecture_of
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_model, save_checkpoint
from exchange.export_model import export_folder
from exchange.gguf_files import PRECISIONS, write_gguf
from exchange.import_model import ImportConfig, import_model
from exchange.outgoing import Outgoing, open_checkpoint
from gpt_model import GPTModel


class LeftOut(Exception):
    """A peer cannot be measured; the message says why."""


class ModelFiles:
    """A checkpoint, and what is made of it, once each, when a peer asks.

    Args:
        checkpoint: of a language model in full precision.
        folder: takes the files.

    Raises:
        UserError: no such checkpoint.
    """

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.checkpoint, self.folder = checkpoint, folder
        self.model, self.tokenizer, _ = load_model(checkpoint)
        self.model.requires_grad_(False)

    @classmethod
    def of(cls, path: str, folder: Path, max_seq_len: int) -> ModelFiles:
        """Of what a user names: a checkpoint of ours, or a GGUF file or Hugging Face folder, with that context.

        Raises:
            UserError: it is none of them.
        """
        if Path(path).suffix != ".gguf" and not Path(path).is_dir():
            return cls(Path(path), folder)
        output = str(folder / "model.pth")
        imported = ImportConfig(from_=path, output_path=output, weights="fp32", max_seq_len=max_seq_len)
        return cls(import_model(imported), folder)

    @classmethod
    def of_weights(cls, model: GPTModel, tokenizer: ByteLevelBPETokenizer, folder: Path) -> ModelFiles:
        """Of a model in memory."""
        state, config = model.state_dict(), model.config
        output = folder / "model.pth"
        return cls(
            save_checkpoint(output, model_state=state, config=config, tokenizer=tokenizer, stage="pretrain"), folder
        )

    @property
    def architecture(self) -> str:
        """A key of `alignment.transformers_names.MODELS`."""
        return architecture_of(self.model.config)

    @cached_property
    def outgoing(self) -> Outgoing:
        """The checkpoint as the exporters take it."""
        return open_checkpoint(self.checkpoint)

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        if not (path := self.folder / name).exists():
            make(path)
        return path

    def hugging_face(self) -> Path:
        """A Hugging Face folder in FP32."""
        return self._once("hugging_face", lambda path: export_folder(self.outgoing, path, "fp32"))

    def gguf(self, precision: str) -> Path:
        """A GGUF file.

        Args:
            precision: F32, F16 and Q8_0 are our exporter's; Q4_0 and Q4_K_M are what llama.cpp's quantizer makes of
                F32, with the matrices that it keeps at 6 or 8 bits.

        Raises:
            LeftOut: llama.cpp, which should quantize, is not installed, or refuses.
        """
        if precision in ("F32", "F16", "Q8_0"):
            assert precision in PRECISIONS
            return self._once(
                f"{precision}.gguf", lambda path: write_gguf(self.outgoing, path, precision, adds_bos=False)
            )
        return self._once(f"{precision}.gguf", lambda path: quantize_gguf(self.gguf("F32"), path, precision))

    def matrices(self, precision: str) -> str:
        """How many matrices of a GGUF file have which type: quantizers keep some at more bits."""
        tensors = gguf.GGUFReader(self.gguf(precision)).tensors
        counts = Counter(tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1)
        return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())

    def ctranslate2(self, quantization: str | None) -> Path:
        """A folder of CTranslate2; None quantizes nothing."""

        def convert(path: Path) -> None:
            from ctranslate2.converters import TransformersConverter

            with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
                TransformersConverter(str(self.hugging_face())).convert(str(path), quantization=quantization)
            settings = json.loads((path / "config.json").read_text())
            tokens = {name: settings["eos_token"] for name in settings if name.endswith("_token")}
            unset = {name: token for name, token in tokens.items() if settings[name] is None}  # which it cannot read
            (path / "config.json").write_text(json.dumps({**settings, **unset}))

        return self._once(f"ctranslate2_{quantization}", convert)

    def onnx(self, precision: str) -> Path:
        """A folder of onnxruntime-genai, by its own builder, whose prompts compute the logits of the last token only.

        Raises:
            LeftOut: the builder refuses.
        """

        def build(path: Path) -> None:
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(self.hugging_face())]
            command += ["-o", str(path), "-p", precision, "-e", "cpu", "-c", str(self.folder / "onnx_cache")]
            built = subprocess.run(
                [*command, "--extra_options", "prune_lm_head=true"], capture_output=True, text=True, errors="replace"
            )
            if built.returncode:
                raise LeftOut(f"its builder fails: {built.stderr.strip().splitlines()[-1]}")

        return self._once(f"onnx_{precision}", build)


def quantize_gguf(source: Path, path: Path, precision: str) -> None:
    """Quantize a GGUF file with llama.cpp's own function.

    Raises:
        LeftOut: it is not installed, or refuses.
    """
    try:
        import llama_cpp
    except ImportError:
        raise LeftOut(f"llama.cpp makes {precision} files, and is not here: pip install llama-cpp-python") from None
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{precision}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(settings)):
        raise LeftOut(f"llama.cpp's quantizer makes no {precision} of this model")


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(each.stat().st_size for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file())
