"""What a data file will be to a model, before anything is trained.

    python -m text.inspect data/sft/sft_data.json
    python -m text.inspect my_pairs.jsonl --model_path models/sft/sft_best.pth
    python -m text.inspect questions.csv --columns instruction=query,response=reply --max_seq_len 256

It says what the file was taken for, shows a few examples as the model will see them, with the tokens that it learns in
colour (or, where there is no terminal, between ⟦ and ⟧), draws the lengths, and says what would be left out and cut.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import config_of, load_checkpoint, tokenizer_of
from command_line import UserError, option, parse_config, run_main
from data_loader import GPTSFTDataset, PreferenceDataset, RecordData, UnpairedDataset
from gpt_model import IGNORED_LABEL
from text.account import Account
from text.conversation_data import (
    RecordOptions,
    load_conversations,
    load_preferences,
    load_unpaired,
    parse_columns,
    shape_of,
    with_columns,
)
from text.text_files import ReadingOptions, holds_records, iter_documents, iter_records

TOKENIZER = "models/bpe_tokenizer"
NO_LIMIT = 1 << 30
N_BARS, BAR = 10, 40  # of the histogram, and the width of the longest one

# By kind: what reads it, the data set of it, and the stages that take it
KINDS = {
    "instructions": (load_conversations, GPTSFTDataset, "conversations", "--mode sft, distill, grpo; evaluator.py"),
    "preferences": (load_preferences, PreferenceDataset, "preferences", "--mode reward, rlhf, ppo, dpo, kto"),
    "unpaired": (load_unpaired, UnpairedDataset, "records", "--mode kto, and sft without the bad answers"),
}


@dataclass
class InspectConfig(RecordOptions, ReadingOptions):
    """Options of `python -m text.inspect`."""

    path: str = option("data/sft/sft_data.json", "the file or folder; may also stand first, without --path")
    model_path: str = option("", "a checkpoint, whose tokenizer and context count")
    tokenizer_dir: str = option("", f"or the folder of a tokenizer; empty: {TOKENIZER} or, without one, bytes")
    max_seq_len: int = option(0, "what is longer is too long; 0: the checkpoint's context, or no limit", at_least=0)
    examples: int = option(3, "how many examples are shown", at_least=0)

    def validate(self) -> list[str]:
        return super().validate() + self.reading_complaints()


def kind_of(
    path: str | Path, columns: dict[str, str] | None = None, reading: ReadingOptions | None = None
) -> tuple[str, Counter]:
    """What a data path holds, "text" or one of `KINDS`; and how many records of it have which shape.

    Raises:
        UserError: it cannot be read; or its first record has no shape that is known.
    """
    reading = reading or ReadingOptions()
    if not holds_records(path, reading.text_field, reading.encoding):
        return "text", Counter(documents=sum(1 for _ in iter_documents(path, reading)))
    records = iter_records(path, lambda error, text: None)  # what is malformed is said further on
    shapes = Counter(shape_of(with_columns(record, columns or {}, where)) for where, record in records)
    if not shapes:
        next(iter_records(path))  # says what is wrong
    (kind, _), _ = shapes.most_common(1)[0]
    if not kind:
        where, record = next(iter_records(path))
        raise UserError(
            f"{where} has none of the shapes that are known (it has {', '.join(record)}); name its fields, such as "
            "--columns instruction=NAME,response=NAME"
        )
    return kind, Counter({shape or "of no known shape": count for (_, shape), count in shapes.items()})


def find_tokenizer(config: InspectConfig) -> tuple[ByteLevelBPETokenizer, str, int]:
    """The tokenizer, what it is, and the context that limits lengths (0: none)."""
    if config.model_path:
        content = load_checkpoint(config.model_path)
        context = config_of(content, config.model_path).max_seq_len
        return tokenizer_of(content), f"that of {config.model_path}", config.max_seq_len or context
    folder = config.tokenizer_dir or (TOKENIZER if Path(TOKENIZER).is_dir() else "")
    if folder:
        return ByteLevelBPETokenizer.from_pretrained(folder), folder, config.max_seq_len
    name = "none yet: a token is a byte here, three to a Chinese character"
    return ByteLevelBPETokenizer(260), name, config.max_seq_len


def histogram(lengths: Sequence[int], limit: int = 0) -> str:
    """Lengths as bars of text; those beyond a limit are marked."""
    shortest, n_lengths = min(lengths), max(lengths) - min(lengths) + 1
    width = -(-n_lengths // N_BARS)
    counts = Counter((length - shortest) // width for length in lengths)
    highest = max(counts.values())
    lines = []
    for bar in range(-(-n_lengths // width)):
        first = shortest + bar * width
        beyond = "  beyond the limit" if limit and first > limit else ""
        filled = "█" * -(-BAR * counts[bar] // highest)
        lines.append(f"{first:>8,}–{first + width - 1:<8,} {filled:<{BAR}} {counts[bar]:,}{beyond}")
    return "\n".join(lines)


def shown(
    tokenizer: ByteLevelBPETokenizer, ids: Sequence[int], labels: Sequence[int], limit: int, coloured: bool
) -> str:
    """A sample as text: what is learned in green or between ⟦ and ⟧, and a mark where it would be cut."""
    before, after = ("\033[32m", "\033[0m") if coloured else ("⟦", "⟧")
    cuts = [0, *(i for i in range(1, len(ids)) if (labels[i] < 0) != (labels[i - 1] < 0) or i == limit), len(ids)]
    text = ""
    for start, end in zip(cuts, cuts[1:], strict=False):
        piece = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        text += "✂" * (limit > 0 and start == limit)
        text += before + piece + after if labels[start] != IGNORED_LABEL else piece
    return text


def rows_of(data: RecordData) -> list[list[tuple[Sequence[int], Sequence[int]]]]:
    """The (ids, labels) of each sample of a data set."""
    if isinstance(data, GPTSFTDataset):
        return [[sample] for sample in data.samples]
    if isinstance(data, PreferenceDataset):
        return [sample["answers"] for sample in data.samples]
    return [[answer["encoded"]] for answer in data.fitting]


def inspect_records(config: InspectConfig, kind: str) -> None:
    """Examples, lengths and losses of a file of records."""
    load, make, what, stages = KINDS[kind]
    tokenizer, name, limit = find_tokenizer(config)
    coloured = sys.stdout.isatty()
    print(f"for {stages}\ntokenizer: {name}")

    def read(room: int) -> RecordData | None:
        """The data set within some room; None where nothing fits."""
        account = Account(config.path, what, "a longer --max_seq_len in pretraining, or shorter records", True)
        records = load(config.path, account, columns=parse_columns(config.columns))
        try:
            return make(records, tokenizer, room, account)
        except UserError as error:
            print(error)
            return None

    whole = read(NO_LIMIT)
    if whole is None:
        return
    rows = rows_of(whole)
    for number, answers in enumerate(rows[: config.examples], start=1):
        print(f"\nexample {number} ({', '.join(f'{len(ids):,}' for ids, _ in answers)} tokens)")
        for place, (ids, labels) in enumerate(answers):
            head = "" if len(answers) == 1 else "better:\n" if place == 0 else "\nworse:\n"
            print(head + shown(tokenizer, ids, labels, limit, coloured))
    lengths = sorted(len(ids) for answers in rows for ids, _ in answers)
    half, most = (lengths[int(share * (len(lengths) - 1))] for share in (0.5, 0.95))
    print(f"\nlengths in tokens: half within {half:,}, 95 % within {most:,}, the longest {lengths[-1]:,}")
    print(histogram(lengths, limit) + "\n")
    fitting = read(limit) if limit else whole
    if fitting is not None:
        print(*([f"within {limit} tokens:"] if limit else []), *fitting.account.sentences(), sep="\n")
    if whole.account.bad.count:
        print("training stops at a malformed record, or leaves it out with --skip_bad_records")


def inspect_text(config: InspectConfig) -> None:
    """Examples and lengths of a file of documents."""
    tokenizer, name, _ = find_tokenizer(config)
    print(f"for byte_level_bpe.py and pretrain_trainer.py\ntokenizer: {name}")
    documents = list(islice(iter_documents(config.path, config), 10_000))
    for number, document in enumerate(documents[: config.examples], start=1):
        print(f"\nexample {number}\n{document[:400]}{' …' if len(document) > 400 else ''}")
    lengths = [len(ids) + 2 for ids in tokenizer.encode_batch(documents)]  # <s> and </s>
    print(f"\nlengths in tokens, of the first {len(documents):,} documents\n{histogram(lengths)}")


def main(argv: list[str] | None = None) -> None:
    """Say what a data file will be to a model."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--path")
    config = parse_config(InspectConfig, argv, description="Say what a data file will be to a model.")
    kind, shapes = kind_of(config.path, parse_columns(config.columns), config)
    print(f"{config.path}: {kind}: {', '.join(f'{count:,} × {shape}' for shape, count in shapes.most_common())}")
    if kind == "text":
        inspect_text(config)
    else:
        inspect_records(config, kind)


if __name__ == "__main__":
    run_main(main)
