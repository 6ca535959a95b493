"""An n-gram model on the same tokens, the baseline that a neural model has to beat.

It counts which token follows which few tokens, and so shows how much of a test can be solved by copying phrases:

    python -m evaluation.ngram_baseline --order 5
    python -m evaluation.ngram_baseline --tokenizer_dir models/bpe_tokenizer --output_path models/ngram_eval.json

It learns from the same text and conversations and answers the same questions before the same checker as `evaluator.py`,
twice: in the same chat template, where a short context holds nothing but the heading of the answer, and without
headings, where it holds the end of the question. The better of the two is the baseline.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: modules are imported from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import option, parse_config, run_main
from evaluation.answer_report import (
    answers_summary,
    answers_table,
    check_writable,
    load_questions,
    report_answers,
    write_json,
)
from inference.request import Generation
from progress import tracked
from text.account import Account
from text.chat_template import Message
from text.conversation_data import RecordOptions, load_conversations, parse_columns
from text.text_files import iter_documents


class NGramModel:
    """An interpolated n-gram model with Witten–Bell smoothing (Chen and Goodman, 1999, section 2.5).

    The n-grams form a tree: a node of level k is a sequence of k tokens that was seen, its children are the sequences
    with one more token. A level is two sorted arrays: `keys` (the parent's number × vocabulary size + last token) and
    `counts`; a node's number is its place in them, and its children stand side by side on the next level.

    Args:
        order: n; a token is predicted from the n − 1 tokens before it.
        vocab_size: token ids are 0 … vocab_size − 1.
    """

    def __init__(self, order: int = 5, vocab_size: int = 4096) -> None:
        if order < 1 or vocab_size < 1:
            raise ValueError(f"order and vocab_size must be at least 1, not {order} and {vocab_size}")
        self.order, self.vocab_size = order, vocab_size
        self.keys: list[np.ndarray] = []  # by level − 1; int64, sorted
        self.counts: list[np.ndarray] = []  # by level − 1; int64
        self._likeliest: dict[tuple[int, ...], int] = {}  # what `next_token` found, by context

    def fit(self, token_sequences: Iterable[Sequence[int]]) -> NGramModel:
        """Count the n-grams of all orders, none of which crosses from one sequence into the next."""
        sequences = [np.asarray(sequence, dtype=np.int64) for sequence in token_sequences if len(sequence)]
        tokens = np.concatenate(sequences) if sequences else np.zeros(0, dtype=np.int64)  # (N,)
        place = np.concatenate([np.arange(len(sequence)) for sequence in sequences] or [tokens])  # (N,)
        self.keys, self.counts, self._likeliest = [], [], {}
        nodes = np.zeros_like(tokens)  # the node of the n-gram that ends at each token; at first the root, (N,)
        for level in range(1, self.order + 1):
            parents = np.roll(nodes, 1) if level > 1 else nodes  # the shorter n-gram ends one token earlier
            complete = place >= level - 1
            keys, inverse, counts = np.unique(
                parents[complete] * self.vocab_size + tokens[complete], return_inverse=True, return_counts=True
            )
            nodes = np.zeros_like(tokens)
            nodes[complete] = inverse
            self.keys.append(keys)
            self.counts.append(counts)
        return self

    def _children(self, context: Sequence[int]) -> slice | None:
        """Where the continuations of a context stand on their level; None if there are none."""
        node, children = 0, slice(0, len(self.keys[0]))
        for level, token in enumerate(context):
            place = int(np.searchsorted(self.keys[level], node * self.vocab_size + token))
            if place == len(self.keys[level]) or self.keys[level][place] != node * self.vocab_size + token:
                return None
            node = place
            first, last = np.searchsorted(self.keys[level + 1], (node * self.vocab_size, (node + 1) * self.vocab_size))
            children = slice(int(first), int(last))
        return children if children.start < children.stop else None

    def probabilities(self, context: Sequence[int]) -> np.ndarray:
        """p(next token | the last order − 1 tokens of the context), (vocab_size,), sums to 1.

        p(w | h) = (count(hw) + T(h) · p(w | h′)) / (count(h) + T(h)), where h′ is h without its first token and T(h)
        is how many different tokens follow h; below the unigrams stands the uniform distribution.
        """
        p = np.full(self.vocab_size, 1.0 / self.vocab_size)
        for length in range(min(self.order - 1, len(context)) + 1):
            children = self._children(context[len(context) - length :])
            if children is None:
                break  # a longer context has not been seen either
            counts = self.counts[length][children]
            p *= len(counts) / (counts.sum() + len(counts))
            p[self.keys[length][children] % self.vocab_size] += counts / (counts.sum() + len(counts))
        return p

    def next_token(self, context: Sequence[int]) -> int:
        """The likeliest next token; of equally likely ones the smallest id."""
        known = tuple(context[max(0, len(context) - self.order + 1) :])  # most contexts come again and again
        if known not in self._likeliest:
            self._likeliest[known] = int(self.probabilities(known).argmax())
        return self._likeliest[known]

    def generate(self, prompt_ids: Sequence[int], eos: int, max_len: int = 64) -> list[int]:
        """The greedy continuation, at most max_len tokens; `eos` ends it and is its last token."""
        ids = list(prompt_ids)
        while len(ids) < len(prompt_ids) + max_len:
            ids.append(self.next_token(ids[max(0, len(ids) - self.order + 1) :]))
            if ids[-1] == eos:
                break
        return ids[len(prompt_ids) :]


@dataclass
class BaselineConfig(RecordOptions):
    """Settings of the n-gram baseline."""

    order: int = option(5, "n: a token is predicted from the n − 1 tokens before it", at_least=1)
    tokenizer_dir: str = option("models/bpe_tokenizer", "folder of the tokenizer")
    train_data_dir: str = option("data/pretrain/train", "pretraining text")
    sft_data_path: str = option("data/sft/sft_data.json", "conversations to learn from")
    test_data_path: str = option("data/sft/sft_test.json", "questions to answer")
    max_samples: int | None = option(None, "answer at most this many questions, evenly spread", at_least=1)
    max_gen_len: int = option(64, "longest answer, in tokens", at_least=1)
    output_path: str | None = option(None, "JSON file for all results; none by default")


def encode_conversation(
    tokenizer: ByteLevelBPETokenizer, messages: Sequence[Message], headings: bool, is_prompt: bool = False
) -> list[int]:
    """Token ids of a conversation in the chat template, or of its texts alone, each answer closed by `</s>`."""
    if headings:
        return tokenizer.encode_chat(messages, add_generation_prompt=is_prompt)["input_ids"]
    ids = tokenizer.encode("")["input_ids"]  # <s>, where the tokenizer has it
    for message, text_ids in zip(messages, tokenizer.encode_batch([m["content"] for m in messages]), strict=True):
        ids += text_ids + [tokenizer.eos_token_id] * (message["role"] == "assistant")
    return ids


def main(argv: list[str] | None = None) -> None:
    """Train and score the baseline from the command line."""
    config = parse_config(BaselineConfig, argv, description="Score an n-gram model on the test questions.")
    output_path = check_writable(config.output_path) if config.output_path else None
    started = time.perf_counter()
    tokenizer = ByteLevelBPETokenizer.from_pretrained(config.tokenizer_dir)
    eos = tokenizer.eos_token_id
    columns = parse_columns(config.columns)
    accounts = [
        Account(path, kind, skips_bad_records=config.skip_bad_records)
        for path, kind in ((config.test_data_path, "questions"), (config.sft_data_path, "conversations"))
    ]
    questions = load_questions(config.test_data_path, config.max_samples, accounts[0], columns)
    conversations = load_conversations(config.sft_data_path, accounts[1], columns=columns)
    for account in accounts:
        print(*account.sentences(), sep="\n", flush=True)
    texts = tokenizer.encode_documents(list(iter_documents(config.train_data_dir)), add_special_tokens=True)
    documents = [ids + [eos] for ids in texts]

    reports = {}
    for form, headings in (("chat template", True), ("no headings", False)):
        chats = [encode_conversation(tokenizer, messages, headings) for messages in conversations]
        model = NGramModel(config.order, tokenizer.vocab_size).fit([*documents, *chats])
        generations = []
        for question in tracked(questions, f"{config.order}-gram, {form}", "question"):
            prompt_ids = encode_conversation(tokenizer, question.prompt, headings, is_prompt=True)
            ids = model.generate(prompt_ids, eos, config.max_gen_len)
            generations.append(Generation(tokenizer.decode(ids), ids[-1] == eos, ids))
        train_tokens = int(model.counts[0].sum())
        reports[form] = {"form": form, "train_tokens": train_tokens, **report_answers(questions, generations)}

    best = max(reports.values(), key=lambda report: report["scores"]["exact"])
    exact_by_form = {form: report["scores"]["exact"] for form, report in reports.items()}
    if output_path is not None:
        about = {
            "order": config.order,
            "exact_by_form": exact_by_form,
            "test_data_path": config.test_data_path,
            "seconds": round(time.perf_counter() - started, 2),
        }
        write_json({**about, **best}, output_path)
    print(answers_table(best))
    shares = ", ".join(f"{form} {share:.1%}" for form, share in exact_by_form.items())
    print(
        f"the {config.order}-gram baseline, of {best['train_tokens']:,} tokens, answers {best['scores']['exact']:.1%} "
        f"exactly ({shares}): {answers_summary(best)}" + (f"; written to {output_path}" if output_path else "")
    )


if __name__ == "__main__":
    run_main(main)
