"""Training of an encoder–decoder on pairs of texts, by default translations between Chinese and English.

    python seq2seq_trainer.py                                              # the sample pairs, both directions
    python seq2seq_trainer.py --src train.zh --tgt train.en                # your own: a line of each is a pair
    python seq2seq_trainer.py --pairs pairs.jsonl --directions forward     # or records {"src": …, "tgt": …}

It leaves `translate_best.pth`, which `python -m inference.translate` reads, and `translations.json`: the test's
sources, references and translations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.stage import account_of, say_accounts
from byte_level_bpe import IGNORED_LABEL, ByteLevelBPETokenizer
from command_line import UserError, beyond_bounds, option, parse_config, replacing, require_file, run_main
from data_loader import Batch, RecordData, pad_rows
from evaluation.text_metrics import sacre_bleu
from inference.quantizer import load_translator
from inference.translate import translate
from seq2seq_model import ACTIVATIONS, Seq2SeqConfig, Transformer
from text.account import Account
from text.conversation_data import RecordOptions, load_records, parse_columns
from training import ranks
from training.interruptions import advice_if_out_of_memory
from training.training_config import TrainingConfig, prepare_machine
from training.training_loop import TrainingLoop

SAMPLE_PAIRS, SAMPLE_TEST = "data/translation/train.jsonl", "data/translation/test.jsonl"
Pair = tuple[str, str]


@dataclass
class Seq2SeqTrainingConfig(RecordOptions, TrainingConfig):
    """Settings of a training run of the encoder–decoder."""

    pairs: str = option(SAMPLE_PAIRS, 'training pairs: records {"src": …, "tgt": …}', reads="records")
    src: str = option("", "in place of --pairs: a text file whose lines are the sources", reads="text")
    tgt: str = option("", "and one whose lines are the targets", reads="text")
    test_pairs: str = option("", "pairs to score at the end, as --pairs; empty: the sample's own, or the validation's")
    val_fraction: float = option(0.03, "share of the pairs set aside for validation", above=0, below=1)
    directions: str = option("both", "translate both ways with one model, or forward only", choices=("both", "forward"))
    tokenizer_dir: str = option("models/seq2seq/bpe_tokenizer", "its tokenizer; trained on the pairs if not there")
    vocab_size: int = option(1024, "of a tokenizer that is trained here, both languages together", at_least=260)
    output_dir: str = option("models/seq2seq", "folder for checkpoints, metrics and curves")
    d_model: int = option(160, "width of the model", at_least=1)
    num_heads: int = option(4, "heads of each attention", at_least=1)
    num_encoder_layers: int = option(3, "layers of the encoder", at_least=1)
    num_decoder_layers: int = option(3, "layers of the decoder", at_least=1)
    d_ff: int = option(0, "inner width of the feed-forward networks; 0 means 4 × --d_model", at_least=0)
    position: str = option("sinusoidal", "kind of positions", choices=("sinusoidal", "learned"))
    norm_first: bool = option(True, "norms before each branch; false: after it, as in the paper")
    activation: str = option("relu", "of the feed-forward networks", choices=tuple(ACTIVATIONS))
    dropout: float = option(0.1, "dropout in training", at_least=0, below=1)
    label_smoothing: float = option(0.1, "share of the target's probability that all tokens get", at_least=0, below=1)
    schedule: str = option("noam", "course of the learning rate; noam is the paper's (5.3)")
    warmup_steps: int = option(200, "steps of linear warm-up; -1: 2 %% of all steps, but 10 or more", at_least=-1)
    max_seq_len: int = option(64, "longest source and longest target, in tokens", at_least=2)
    batch_size: int = option(64, "pairs of one forward pass on one rank")
    lr: float = option(2e-3, "peak learning rate")
    weight_decay: float = option(0.0, "decoupled weight decay of matrices", at_least=0)
    epochs: float = option(4.0, "passes over the pairs, if --max_steps is 0")
    num_beams: int = option(4, "beams of the test's translations; 1 is greedy", at_least=1, at_most=64)

    def validate(self) -> list[str]:
        """What is wrong with the settings, a sentence each."""
        complaints = super().validate()
        if bool(self.src) != bool(self.tgt):
            complaints.append("--src and --tgt belong together; give both")
        if self.parallel != "ddp":
            complaints.append(f"--parallel {self.parallel} is for decoder-only models; the encoder–decoder takes ddp")
        if not beyond_bounds(self):
            try:
                self.model_config(vocab_size=self.vocab_size, pad_token_id=1)
            except ValueError as error:
                complaints.append(str(error))
        return complaints

    def model_config(self, vocab_size: int, pad_token_id: int) -> Seq2SeqConfig:
        """The model that these settings describe."""
        own = {name: getattr(self, name) for name in Seq2SeqConfig.__dataclass_fields__ if hasattr(self, name)}
        own |= {"d_ff": self.d_ff or None, "src_vocab": vocab_size, "tgt_vocab": vocab_size}
        return Seq2SeqConfig(**own, pad_token_id=pad_token_id)


def parse_pair(record: dict, where: str) -> Pair:
    """(source, target) of a record; `where` names it in messages."""
    pair = record.get("src"), record.get("tgt")
    if not all(isinstance(text, str) and text.strip() for text in pair):
        raise UserError(f'{where}: "src" and "tgt" must be texts, the source and its translation')
    return pair


def read_parallel_lines(src: str, tgt: str, account: Account) -> list[Pair]:
    """The lines of two files, side by side; those with an empty side are left out.

    Raises:
        UserError: a file is not there, or they differ in their numbers of lines.
    """
    sides = [require_file(path, f"the file of {name}").read_text(encoding="utf-8").splitlines()
             for path, name in ((src, "--src"), (tgt, "--tgt"))]  # fmt: skip
    if len(sides[0]) != len(sides[1]):
        raise UserError(f"{src} has {len(sides[0]):,} lines and {tgt} {len(sides[1]):,}; a line of each must be a pair")
    pairs = [(source, target) for source, target in zip(*sides, strict=True) if source.strip() and target.strip()]
    account.read = len(sides[0])
    account.leave_out("nothing on one side", len(sides[0]) - len(pairs))
    account.require(len(pairs))
    return pairs


class PairDataset(RecordData):
    """Pairs as token ids: the source and its end; the target between its two marks.

    Args:
        pairs: sources and targets; those with a side of more than `max_seq_len` tokens are left out.
        both_ways: each pair is a sample of each direction, one after the other.
        account: see `RecordData`.

    Raises:
        UserError: no pair fits.
    """

    parallel = ("samples", "texts")

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokenizer: ByteLevelBPETokenizer,
        max_seq_len: int,
        both_ways: bool = False,
        account: Account | None = None,
    ) -> None:
        super().__init__(account, "pairs", pairs)
        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.ways = 2 if both_ways else 1
        self.samples: list[tuple[list[int], ...]] = []
        self.texts: list[Pair] = []
        for pair in pairs:
            encoded = tuple([*tokenizer.encode(text)["input_ids"], self.eos] for text in pair)
            if max(map(len, encoded)) > max_seq_len:
                self.account.leave_out("too long")
                continue
            self.samples += [encoded, encoded[::-1]][: self.ways]
            self.texts += [pair, pair[::-1]][: self.ways]
        self.account.require(len(self))

    def group(self, index: int) -> int:
        """Both directions of a pair stay on one side of a split."""
        return index // self.ways

    @property
    def lengths(self) -> list[int]:
        return [len(source) + len(target) for source, target in self.samples]

    def collate(self, samples: Sequence[tuple[list[int], list[int]]]) -> Batch:
        """ "input_ids": (B, S); "decoder_input_ids", "labels": (B, T), what is there and what follows; all int64."""
        sources, targets = zip(*samples, strict=True)
        return {
            "input_ids": pad_rows(sources, self.pad),
            "decoder_input_ids": pad_rows([[self.bos, *target[:-1]] for target in targets], self.pad),
            "labels": pad_rows(targets, IGNORED_LABEL),
        }

    def count(self, batch: Batch) -> int:
        """How many target tokens the batch has."""
        return int(batch["labels"].ne(IGNORED_LABEL).sum())


class Seq2SeqTrainer:
    """Trains a `Transformer` from a `Seq2SeqTrainingConfig`: pairs, tokenizer, model and loop put together."""

    def __init__(self, config: Seq2SeqTrainingConfig) -> None:
        self.config = config
        self.device = prepare_machine(config)
        account = self._account(f"{config.src} and {config.tgt}" if config.src else config.pairs)
        pairs = read_parallel_lines(config.src, config.tgt, account) if config.src else self._read(account)
        for turn_of_main in (True, False):  # the other ranks then find the tokenizer on the disk
            if ranks.is_main() == turn_of_main:
                self.tokenizer = self._load_or_train_tokenizer(pairs)
            ranks.barrier()
        data = self._dataset(pairs, account)
        parts = data.split(config.val_fraction)
        if not all(map(len, parts)):
            raise UserError(
                f"{len(data) // data.ways} of the pairs of {account.source} can be used, too few to set some aside for "
                f"validation; give more{f', or {account.advice}' if account.left_out else ''}"
            )
        is_sample = config.pairs == SAMPLE_PAIRS and not config.src
        test_path, test = config.test_pairs or (SAMPLE_TEST if is_sample else ""), parts[1]
        if test_path:
            test_account = self._account(test_path)
            test = self._dataset(self._read(test_account), test_account)
        self.test = test.texts
        say_accounts([*parts, test])
        model_config = config.model_config(len(self.tokenizer), self.tokenizer.pad_token_id)
        with advice_if_out_of_memory("for this model; lower --d_model, --num_encoder_layers or --num_decoder_layers"):
            self.model = Transformer.from_config(model_config)
            self.model.label_smoothing = config.label_smoothing
            self.loop = TrainingLoop(
                config, self.model, model_config, self.tokenizer, "translate", *parts, self.device, parts[0].lengths
            )

    def _account(self, source: str) -> Account:
        return account_of(self.config, source, "pairs", f"raise --max_seq_len (now {self.config.max_seq_len})")

    def _read(self, account: Account) -> list[Pair]:
        return load_records(account.source, parse_pair, account, parse_columns(self.config.columns))

    def _dataset(self, pairs: Sequence[Pair], account: Account) -> PairDataset:
        both_ways = self.config.directions == "both"
        return PairDataset(pairs, self.tokenizer, self.config.max_seq_len, both_ways, account)

    def _load_or_train_tokenizer(self, pairs: Sequence[Pair]) -> ByteLevelBPETokenizer:
        config = self.config
        if (Path(config.tokenizer_dir) / "tokenizer.json").is_file() or "tokenizer_dir" in config.given:
            return ByteLevelBPETokenizer.from_pretrained(config.tokenizer_dir)
        print(f"no tokenizer in {config.tokenizer_dir} yet: training one of {config.vocab_size} tokens on the pairs")
        tokenizer = ByteLevelBPETokenizer(vocab_size=config.vocab_size)
        tokenizer.train((text for pair in pairs for text in pair), min_frequency=2)
        tokenizer.save(config.tokenizer_dir)
        return tokenizer

    def train(self) -> dict[str, float]:
        """Train to the end and return the metrics of the best model."""
        return self.loop.train()

    def score_test(self) -> list[str]:
        """Translate the test with the best model, write `translations.json`; a sentence of figures for each way."""
        model, tokenizer, _ = load_translator(self.loop.best_path, self.device)
        found = translate(model, tokenizer, [source for source, _ in self.test], num_beams=self.config.num_beams)
        ways = 2 if self.config.directions == "both" else 1
        sentences, records = [], []
        for way in range(ways):
            sources, references = zip(*self.test[way::ways], strict=True)
            translations = found[way::ways]
            score, signature = sacre_bleu(translations, references)
            exact = sum(a == b for a, b in zip(translations, references, strict=True)) / len(references)
            name = ("forward", "backward")[way]
            sentences.append(f"{name}: BLEU {score:.1f}, exact {exact:.1%}, {len(references)} pairs ({signature})")
            records += [
                {"direction": name, "src": source, "reference": reference, "translation": translation}
                for source, reference, translation in zip(sources, references, translations, strict=True)
            ]
        with replacing(self.loop.folder / "translations.json", "free some space") as file:
            content = {"scores": sentences, "translations": records}
            file.write(json.dumps(content, ensure_ascii=False, indent=1).encode())
        return sentences


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config: Any = parse_config(Seq2SeqTrainingConfig, argv, description="Train an encoder–decoder on pairs of texts.")
    trainer = Seq2SeqTrainer(config)
    loop = trainer.loop
    if ranks.is_main():
        print(
            f"model: {config.num_encoder_layers} + {config.num_decoder_layers} layers, "
            f"{trainer.model.num_parameters() / 1e6:.2f} M parameters, {len(trainer.tokenizer)} tokens in the "
            f"vocabulary; data: {len(loop.train_data):,} samples; {loop.max_steps} steps of {loop.order.batch_size} on "
            f"{trainer.device} in {str(loop.precision).removeprefix('torch.')}",
            flush=True,
        )
    best = trainer.train()
    if ranks.is_main():
        print(
            f"trained: {loop.best_path}, validation loss {best['val_loss']:.4f} nats a token, {loop.seconds:.0f} s; "
            f"curves in {loop.folder / 'curves.png'}"
        )
        for sentence in trainer.score_test():
            print(sentence)
        print(f'translations in {loop.folder / "translations.json"}; try: python -m inference.translate --text "…"')
    ranks.stop()


if __name__ == "__main__":
    run_main(main)
