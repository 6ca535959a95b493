"""Translation with a trained encoder–decoder.

    python -m inference.translate --text "昨天老师在市场买了三个苹果。"
    python -m inference.translate --input sentences.txt --output translations.txt --num_beams 4
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: modules are imported from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError, option, parse_config, replacing, require_file, run_main
from data_loader import pad_rows
from inference.quantizer import load_translator
from machine import resolve_device
from seq2seq_model import Transformer


def translate(
    model: Transformer,
    tokenizer: ByteLevelBPETokenizer,
    texts: Sequence[str],
    num_beams: int = 4,
    length_penalty: float = 1.0,
    max_gen_len: int = 0,
    batch_size: int = 32,
) -> list[str]:
    """The translations of texts, in their order; those of like length share a batch.

    Raises:
        UserError: a text is empty, or longer than the model's context.
    """
    eos, context = tokenizer.eos_token_id, model.config.max_seq_len
    sources = [[*tokenizer.encode(text)["input_ids"], eos] for text in texts]
    for number, (text, ids) in enumerate(zip(texts, sources, strict=True), start=1):
        if not text.strip():
            raise UserError(f"text {number} is empty; there is nothing to translate")
        if len(ids) > context:
            raise UserError(f"text {number} has {len(ids)} tokens and the model takes {context}; cut it into sentences")
    order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
    found = [""] * len(sources)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad_rows([sources[index] for index in chosen], tokenizer.pad_token_id).to(model.device)
        rows = model.generate(batch, tokenizer.bos_token_id, eos, max_gen_len, num_beams, length_penalty)
        for index, row in zip(chosen, rows.tolist(), strict=True):
            found[index] = tokenizer.decode([token for token in row if token not in (eos, tokenizer.pad_token_id)])
    return found


@dataclass
class TranslateConfig:
    """The command line of translation."""

    model_path: str = option("models/seq2seq/translate_best.pth", "the encoder–decoder")
    text: str = option("", "what to translate")
    input: str = option("", "in place of --text, a file with a text a line")
    output: str = option("", "where to write the translations, a line each; empty: to the terminal")
    num_beams: int = option(4, "how many beginnings the search follows; 1 is greedy", at_least=1, at_most=64)
    length_penalty: float = option(1.0, "above 1 favours longer translations", at_least=0, at_most=10)
    max_gen_len: int = option(0, "at most so many tokens; 0 means what the context holds", at_least=0)
    batch_size: int = option(32, "texts at once", at_least=1)
    device: str = option("auto", "cpu, cuda, mps or auto")
    num_threads: int = option(0, "CPU threads; 0 means as many as torch takes", at_least=0)

    def validate(self) -> list[str]:
        """What does not fit together, a sentence each."""
        one = bool(self.text) != bool(self.input)
        return [] if one else ["give either --text or --input, what to translate or a file of it"]


def main(argv: list[str] | None = None) -> None:
    """Translate a text, or the lines of a file."""
    config = parse_config(TranslateConfig, argv, description=__doc__.splitlines()[0])
    texts = [config.text]
    if config.input:
        texts = require_file(config.input, "the file of texts").read_text(encoding="utf-8").splitlines()
    torch.set_num_threads(config.num_threads or torch.get_num_threads())
    model, tokenizer, _ = load_translator(config.model_path, resolve_device(config.device))
    settings = (config.num_beams, config.length_penalty, config.max_gen_len, config.batch_size)
    found = translate(model, tokenizer, texts, *settings)
    if not config.output:
        print("\n".join(found))
        return
    with replacing(config.output, "free some space or choose another --output") as file:
        file.write("".join(f"{text}\n" for text in found).encode())
    print(f"{len(found):,} translations in {config.output}")


if __name__ == "__main__":
    run_main(main)
