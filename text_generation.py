"""From prompts to texts: the one batched generation that evaluation, PPO and the command lines share.

Prompts are sorted by length, so that a batch needs little padding, padded on the left, continued together by
`GPTModel.generate`, and put back into the order in which they came.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from tqdm import tqdm

from byte_level_bpe import ByteLevelBPETokenizer
from gpt_model import GPTModel

Prompt = str | list[dict[str, str]]  # the user's words, or the messages of a conversation so far


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt.

    Attributes:
        text: the answer, without special tokens.
        ended: whether the model ended it by itself, with `</s>`; False if it was cut off at the length limit.
        token_ids: the ids it produced, the closing `</s>` included when it ended.
    """

    text: str
    ended: bool
    token_ids: list[int]


def encode_prompt(tokenizer: ByteLevelBPETokenizer, prompt: Prompt, chat: bool) -> list[int]:
    """Token ids of a prompt: a user's turn in the chat template, or `<s>` and plain text that is to be continued."""
    if not chat:
        # Where the tokenizer puts nothing before a text, an empty one begins after the end of another
        return tokenizer.encode(prompt, add_special_tokens=True)["input_ids"] or [tokenizer.eos_token_id]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.encode_chat(messages, add_generation_prompt=True)["input_ids"]


def left_pad(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one int64 tensor, padded on the left, and its mask (1 = token, 0 = padding), both (B, T)."""
    width = max(map(len, rows))
    input_ids = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in rows])  # (B, T)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])  # (B, T)
    return input_ids, mask


def _batches(lengths: Sequence[int], room: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts that are generated together: of similar length, and with the same room for an answer.

    A long prompt near the context's end leaves its whole batch little room; keeping such prompts among themselves is
    what makes a prompt's answer the same whichever prompts stand beside it.
    """
    order = sorted(range(len(lengths)), key=lambda index: (room[index], lengths[index]))
    for _, group in groupby(order, key=lambda index: room[index]):
        indices = list(group)
        yield from (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))


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
    """Continue every prompt, in batches; the results stand in the order of the prompts.

    Args:
        prompts: a string each, or with `chat` a list of messages that ends with the user's turn.
        chat: answer through the chat template; otherwise continue the text.
        max_gen_len: at most so many tokens an answer, and never more than the context holds. A prompt that would
            leave less room than this (or than half the context) keeps its end only.
        temperature: 0 is greedy, and the answers then do not depend on `batch_size`.
        top_k: sample among the k likeliest tokens; 0 means among all.
        batch_size: prompts that are generated together.
        seed: makes sampling repeatable; None takes torch's global generator.
        show_progress: show a progress bar.
    """
    context, device = model.config.max_seq_len, model.token_embedding.weight.device
    longest_prompt = context - max(1, min(max_gen_len, context // 2))
    rows = [encode_prompt(tokenizer, prompt, chat)[-longest_prompt:] for prompt in prompts]
    lengths = [len(row) for row in rows]
    room = [min(max_gen_len, context - length) for length in lengths]
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    results: list[Generation | None] = [None] * len(rows)
    with tqdm(total=len(rows), desc="generating", unit="prompt", disable=not show_progress) as progress:
        for indices in _batches(lengths, room, batch_size):
            input_ids, mask = left_pad([rows[index] for index in indices], tokenizer.pad_token_id)
            output = model.generate(
                input_ids.to(device),
                max_gen_len=max_gen_len,
                top_k=top_k,
                temperature=temperature,
                attention_mask=mask.to(device),
                eos_token_id=tokenizer.eos_token_id,
                generator=generator,
            )  # (B, T + n)
            for index, ids in zip(indices, output[:, input_ids.size(1) :].tolist(), strict=True):
                ended = tokenizer.eos_token_id in ids
                ids = ids[: ids.index(tokenizer.eos_token_id) + 1] if ended else ids
                results[index] = Generation(tokenizer.decode(ids), ended, ids)
            progress.update(len(indices))
    return results
