"""What bench_inference.py measures: generators, ours and that of `transformers`; the others are in peer_programs.py.

Every contestant is a `Generator`: it reads a prompt and gives the logits of the next token, and it continues a prompt
greedily. `check_logits` refuses one whose logits are not those of our model: the speed of a wrong model means nothing.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from itertools import islice, product
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel

from alignment.transformers_names import in_transformers
from byte_level_bpe import ByteLevelBPETokenizer
from exchange import gguf_files
from exchange.outgoing import Outgoing
from gpt_model import GPTModel
from inference.engine import Engine
from inference.quantizer import weight_bytes
from inference.sampling import SamplingParams

Prompt = Sequence[int]
END_OF_TEXT = "<|endoftext|>"
LETTERS = string.ascii_lowercase + string.digits + "-"


class Generator(Protocol):
    """One stream of tokens from one program.

    Attributes:
        weight_bytes: how much of its weights it reads for a token.
    """

    weight_bytes: int

    def prefill(self, prompt: Prompt) -> np.ndarray | int:
        """Read a prompt into an empty cache; the logits of the token after it, (V,) fp32, or the likeliest token of a
        program that shows no logits."""

    def generate(self, prompt: Prompt, n_tokens: int) -> list[int]:
        """The `n_tokens` likeliest tokens after a prompt, each after the one before."""


class BatchGenerator:
    """A generator that computes many streams in one pass."""

    def generate_all(self, prompts: Sequence[Prompt], n_tokens: int) -> list[list[int]]:
        """What `generate` gives, of prompts of one length."""
        answers = self._generate_all(prompts, n_tokens)
        lengths = {len(answer) for answer in answers}
        assert lengths == {n_tokens}, f"requests for {n_tokens} tokens got {sorted(lengths)}"
        return answers

    def _generate_all(self, prompts: Sequence[Prompt], n_tokens: int) -> list[list[int]]:
        raise NotImplementedError

    def generate(self, prompt: Prompt, n_tokens: int) -> list[int]:
        return self.generate_all([prompt], n_tokens)[0]


def position_bytes(model: GPTModel) -> int:
    """Bytes of the table of learned positions, of which a token reads a row."""
    return sum(parameter.nbytes for parameter in model.position_embedding.parameters())


def bytes_read(model: GPTModel) -> int:
    """Bytes of weights that a token reads."""
    return weight_bytes(model) - position_bytes(model)


class Ours(BatchGenerator):
    """This project's engine, with a model in whatever precision its layers have; it notes the logits of each step."""

    def __init__(self, model: GPTModel, tokenizer: ByteLevelBPETokenizer | None = None) -> None:
        self.model, self.tokenizer, self.weight_bytes = model, tokenizer, bytes_read(model)
        self.engines: dict[int, Engine] = {}  # by the number of streams

    def _engine(self, n_streams: int) -> Engine:
        if n_streams not in self.engines:
            engine = Engine(self.model, self.tokenizer, max_running=n_streams, reuse_prefixes=False)
            compute = engine.model_step.forward

            def forward(ids: list[int], last: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
                hidden, self.logits = compute(ids, last)
                return hidden, self.logits

            engine.model_step.forward = forward
            self.engines[n_streams] = engine
        return self.engines[n_streams]

    def prefill(self, prompt: Prompt) -> np.ndarray:
        self.generate(prompt, 1)
        return self.logits[0].float().cpu().numpy()  # (V,)

    def _generate_all(self, prompts: Sequence[Prompt], n_tokens: int) -> list[list[int]]:
        params = SamplingParams(n_tokens, temperature=0, ignore_eos=True)
        generations = self._engine(len(prompts)).run([list(prompt) for prompt in prompts], params)
        return [generation.token_ids for generation in generations]


class Transformers:
    """`GPT2LMHeadModel` of Hugging Face `transformers`, with our weights and its own `generate`."""

    def __init__(self, model: GPTModel) -> None:
        self.weight_bytes = bytes_read(model)
        self.model = in_transformers(model, bos_token_id=None, eos_token_id=None)

    @torch.inference_mode()
    def prefill(self, prompt: Prompt) -> np.ndarray:
        return self.model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1).logits[0, -1].numpy()  # (V,)

    def generate(self, prompt: Prompt, n_tokens: int, use_cache: bool = True) -> list[int]:
        ids = torch.tensor([prompt])
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=0,
        )
        return output[0, len(prompt) :].tolist()

    def generate_without_cache(self, prompt: Prompt, n_tokens: int) -> list[int]:
        """The same tokens, each of which reads the whole text again."""
        return self.generate(prompt, n_tokens, use_cache=False)


def write_gguf(model: GPTModel, path: Path, precision: str) -> Path:
    """The weights of a model as a GGUF file, with the tokenizer that random weights get here.

    Args:
        precision: one of `gguf_files.PRECISIONS`, such as Q8_0: matrices in blocks of 32 with an FP16 scale each.
    """
    tokenizer = synthetic_tokenizer(model.config.vocab_size)
    outgoing = Outgoing(path, model.state_dict(), model.config, tokenizer, {"stage": "pretrain"})
    gguf_files.write_gguf(outgoing, path, precision, adds_bos=False)
    return path


def synthetic_vocabulary(vocab_size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """A byte-level BPE vocabulary of any size up to 52,279: tokens in the order of their ids, and merges.

    The end of a text, the 256 bytes, then all pairs and triples of letters.
    """
    alphabet = sorted(ByteLevel.alphabet())
    letters = [(letter,) for letter in LETTERS]
    pairs = [(a, b) for (a,), (b,) in product(letters, letters)]
    triples = ((a + b, c) for (a, b), (c,) in product(pairs, letters))
    merges = list(islice((*pairs, *triples), vocab_size - len(alphabet) - 1))
    return [END_OF_TEXT, *alphabet, *map("".join, merges)], merges


def synthetic_tokenizer(vocab_size: int) -> ByteLevelBPETokenizer:
    """Our tokenizer over `synthetic_vocabulary`, so that random weights have something to say."""
    tokens, merges = synthetic_vocabulary(vocab_size)
    return ByteLevelBPETokenizer.from_files(
        {
            "vocab.json": json.dumps({token: index for index, token in enumerate(tokens)}),
            "merges.txt": "\n".join(" ".join(pair) for pair in merges),
            "tokenizer_config.json": json.dumps({"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}),
        }
    )


def check_logits(name: str, contestant: Generator, expected: np.ndarray, prompt: Prompt, limit: float) -> float | None:
    """The relative error ‖difference‖ / ‖logits‖ of a contestant's logits after a prompt.

    Of one that shows its likeliest token only, that token is looked at, and the error is not known (None): by our
    logits (V,) it is as good as the best one, but for the errors that one logit of such a size can have, five times
    the usual one either way.

    Raises:
        AssertionError: it is above `limit`; the contestant computes something else.
    """
    found = contestant.prefill(prompt)
    if isinstance(found, int):
        behind = float(expected.max() - expected[found])
        if not behind <= 10 * limit * float(np.sqrt(np.square(expected).mean())):
            raise AssertionError(f"{name} computes another model: its token is by {behind:.2f} less likely than ours")
        return None
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not error <= limit:
        raise AssertionError(f"{name} computes another model: its logits differ by {error:.2%}, {limit:.2%} is allowed")
    return error
