"""From prompts to texts: what evaluation, training and the command lines ask of the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError
from gpt_model import GPTConfig, GPTModel
from inference.engine import Engine
from inference.request import Generation, Prompt, RequestFailed, encode_prompt
from inference.sampling import SamplingParams
from progress import Progress


def longest_prompt(config: GPTConfig, max_gen_len: int) -> int:
    """How many tokens of a prompt are read: what leaves room for `max_gen_len`, or for half the context."""
    return config.max_seq_len - max(1, min(max_gen_len, config.max_seq_len // 2))


def generate_texts(
    model: GPTModel,
    tokenizer: ByteLevelBPETokenizer,
    prompts: Sequence[Prompt],
    *,
    chat: bool,
    max_gen_len: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    batch_size: int = 64,
    seed: int | None = None,
    show_progress: bool = False,
) -> list[Generation]:
    """Continue every prompt, many at a time; the results stand in the order of the prompts.

    Args:
        prompts: a string each, or with `chat` a list of messages that ends with the user's turn.
        chat: answer through the chat template; otherwise continue the text.
        max_gen_len: at most this many tokens an answer, and never more than the context holds. A prompt that would
            leave less room than this (or than half the context) keeps its end only.
        temperature: 0 is greedy.
        top_k: sample among the k likeliest tokens; 0 means among all.
        batch_size: prompts that are computed together; the answers do not depend on it.
        seed: makes sampling repeatable; None takes torch's global generator.
        show_progress: say how far it is, see `progress.Progress`.

    Raises:
        UserError: the model's output is not finite.
    """
    config = model.config
    rows = [encode_prompt(tokenizer, prompt, chat)[-longest_prompt(config, max_gen_len) :] for prompt in prompts]
    generator = torch.default_generator if seed is None else torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (len(rows),), generator=generator).tolist() if temperature else [0] * len(rows)
    top_k = min(top_k, config.vocab_size)
    settings = [SamplingParams(max_gen_len, temperature, top_k, seed=its_own) for its_own in seeds]
    with Progress("generating", len(rows), "prompt", shown=show_progress) as progress:
        try:
            longest = max(map(len, rows), default=0) + max_gen_len
            engine = Engine(model, tokenizer, max_running=batch_size, longest=longest)
            return engine.run(rows, settings, on_finished=progress.update)
        except RequestFailed as failure:
            raise UserError(str(failure)) from None
