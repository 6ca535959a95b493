"""From a prompt to a text, with a KV cache: what a program that uses the model calls.

    from checkpoint import load_model
    model, tokenizer, checkpoint = load_model("models/sft/sft_best.pth")
    print(generate_with_kv_cache(model, tokenizer, "法国的首都是哪里?", chat=True))

The cache is an argument of attention (`KVCache`), the loop is `GPTModel.generate`, and `generate_texts` makes batches;
what a caller needs of them is importable from here.
"""

from __future__ import annotations

from collections.abc import Sequence

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError
from gpt_model import GPTModel
from text_generation import Generation, encode_prompt, generate_texts
from transformer_components import KVCache

__all__ = ["Generation", "KVCache", "generate_texts", "generate_with_kv_cache"]


def generate_with_kv_cache(
    model: GPTModel,
    tokenizer: ByteLevelBPETokenizer,
    prompt: str | Sequence[str],
    max_gen_len: int = 100,
    top_k: int = 50,
    temperature: float = 0.8,
    *,
    chat: bool = False,
    batch_size: int = 8,
    seed: int | None = None,
) -> str | list[str]:
    """What the model writes after a prompt, or after each of several: the new text only, without special tokens.

    Args:
        max_gen_len: at most so many new tokens, fewer where the context ends.
        top_k: sample among the k likeliest tokens; 0 means among all.
        temperature: 0 always takes the likeliest token.
        chat: True puts the prompt into the chat template, as models after fine-tuning expect (any stage of a checkpoint
            but "pretrain"); False continues the text.
        batch_size: prompts that are generated together.
        seed: makes sampling repeatable; None takes torch's global generator.

    Raises:
        UserError: a prompt that is so long that the context has no room for an answer.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    context = model.config.max_seq_len
    for text in prompts:
        length = len(encode_prompt(tokenizer, text, chat))
        if length >= context:
            raise UserError(
                f"the prompt {text[:20]!r}… has {length} tokens and the model's context only {context}; shorten it"
            )
    generations = generate_texts(
        model,
        tokenizer,
        prompts,
        chat=chat,
        max_gen_len=max_gen_len,
        temperature=temperature,
        top_k=top_k,
        batch_size=batch_size,
        seed=seed,
    )
    texts = [generation.text for generation in generations]
    return texts[0] if isinstance(prompt, str) else texts
