"""Pretraining: a language model from raw text.

    python pretrain_trainer.py                                   # sample data, a size that suits the machine
    python pretrain_trainer.py --train_data_dir my_texts/ --val_fraction 0.02 --preset small
    torchrun --nproc_per_node=2 pretrain_trainer.py --parallel fsdp …     # several processes, see docs/distributed.md
"""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_model, require_same_model
from command_line import UserError, beyond_bounds, complaints_about, holding, option, parse_config, replacing, run_main
from data_loader import GPTPretrainDataset, MixedDataset
from gpt_model import ARCHITECTURES, GPTConfig, GPTModel
from inference.text_generation import generate_texts
from machine import resolve_device
from text.text_files import ReadingOptions, iter_documents, parse_sources, resolve_files
from text.token_shards import TokenShards, joined_shards, tokenize_to_shards
from training import ranks
from training.interruptions import advice_if_out_of_memory
from training.memory_options import fit_options
from training.training_config import TrainingConfig, prepare_machine
from training.training_loop import TrainingLoop

SAMPLE_TRAIN, SAMPLE_VAL = "data/pretrain/train", "data/pretrain/val"
DEFAULT_VAL_FRACTION = 0.05
STEP = re.compile(r"--- step (\d+)$")  # heads the samples of an evaluation


@dataclass
class PretrainConfig(TrainingConfig, ReadingOptions):
    """Settings of a pretraining run."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": dict(d_model=192, n_layers=4, n_heads=4, n_kv_heads=2, max_seq_len=128, batch_size=32, lr=4e-3),
        "moe": dict(
            architecture="moe", d_model=192, n_layers=4, n_heads=4, n_kv_heads=2, max_seq_len=128, batch_size=32,
            lr=4e-3,
        ),
        "small": dict(d_model=512, n_layers=8, n_heads=8, n_kv_heads=4, max_seq_len=512, batch_size=32, lr=2e-3),
        "gpt2": dict(
            architecture="gpt2", d_model=768, n_layers=12, n_heads=12, n_kv_heads=12, max_seq_len=1024, batch_size=8,
            grad_accum_steps=60, lr=6e-4, optimizer="adamw",
        ),
        "medium": dict(
            d_model=1024, n_layers=24, n_heads=16, n_kv_heads=8, max_seq_len=1024, batch_size=8, grad_accum_steps=60,
            lr=1e-3,
        ),
    }  # fmt: skip

    train_data_dir: str = option(
        SAMPLE_TRAIN,
        "training text: files, folders, or names without ending; with weights, such as a.txt:0.7 b.jsonl:0.3, mixed",
        reads="text",
        joined=True,
    )
    val_data_dir: str = option(
        "", "validation text; empty: the sample's own, or --val_fraction of the training text", reads="text"
    )
    val_fraction: float = option(
        0.0, "share of the training documents set aside, if there is no validation text", at_least=0, below=1
    )
    tokenizer_dir: str = option("models/bpe_tokenizer", "folder of the tokenizer")
    output_dir: str = option("models/pretrain", "folder for checkpoints, metrics and curves")
    shard_dir: str = option("models/token_shards", "folder for the tokenized text, which is made once and reused")
    architecture: str = option("modern", "modern (Qwen3-like), moe (its experts) or gpt2", choices=tuple(ARCHITECTURES))
    depth: int = option(0, "one dial: layers; sets width, heads, learning rate, batch and steps to match", at_least=0)
    d_model: int = option(192, "width of the model", at_least=1)
    n_layers: int = option(4, "number of layers", at_least=1)
    n_heads: int = option(4, "attention heads", at_least=1)
    n_kv_heads: int = option(0, "key/value heads; 0 means as many as --n_heads", at_least=0)
    d_ff: int = option(0, "inner width of the feed-forward network; 0 means the architecture's usual one", at_least=0)
    n_experts: int = option(0, "experts of each layer (architecture moe); 0 means the architecture's own", at_least=0)
    experts_per_token: int = option(2, "how many of them a token passes", at_least=1)
    dropout: float = option(0.0, "dropout in training", at_least=0, below=1)
    position: str = option("", "learned, rotary or sinusoidal; empty: the architecture's own")
    optimizer: str = option("muon", "adamw, or muon for hidden matrices beside adamw", choices=("adamw", "muon"))
    max_seq_len: int = option(128, "context length, in tokens: at least one and the next", at_least=2)
    batch_size: int = option(32, "windows of one forward pass on one rank")
    lr: float = option(4e-3, "peak learning rate")
    epochs: float = option(5.0, "passes over the training text, if --max_steps is 0")
    separate_documents: bool = option(False, "documents that share a window do not see each other")
    sample_tokens: int = option(48, "tokens of the samples written at every evaluation; 0: none", at_least=0)

    def validate(self) -> list[str]:
        """What is wrong with the settings, a sentence each."""
        complaints = super().validate() + self.reading_complaints()
        if self.separate_documents and "pp" in self.parallel:
            complaints.append("--separate_documents does not go with --parallel pp; drop one")
        if not beyond_bounds(self):
            try:
                self.model_config(vocab_size=4096, pad_token_id=1)
            except ValueError as error:
                complaints.append(str(error))
        return complaints

    def model_config(self, vocab_size: int, pad_token_id: int) -> GPTConfig:
        """The model that these settings describe."""
        return GPTConfig.for_architecture(
            self.architecture,
            vocab_size=vocab_size,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads or None,
            d_ff=self.d_ff or None,
            max_seq_len=self.max_seq_len,
            dropout=self.dropout,
            pad_token_id=pad_token_id,
            experts_per_token=self.experts_per_token,
            **{name: getattr(self, name) for name in ("position", "n_experts") if getattr(self, name)},
        )


def turn_depth_dial(config: PretrainConfig) -> str:
    """Set what follows from `--depth`, except what the user gave; returns a sentence that says all of it.

    Width is 64 a layer with heads of 64; the learning rate falls with the square root of the width; the batch holds
    about 2^14 tokens on a CPU-sized model and grows with the parameters; training reads 20 tokens a parameter
    (Chinchilla, arXiv:2203.15556).
    """
    depth = config.depth
    seq_len = config.max_seq_len if "max_seq_len" in config.given else min(2048, 128 * max(1, depth // 2))
    body = 12 * depth * (64 * depth) ** 2  # parameters of the layers, nearly
    batch_tokens = 2 ** round(math.log2(min(2**19, max(2**12, body**0.5 * 4))))
    micro_batch = max(1, min(32, batch_tokens // seq_len))
    derived = dict(
        n_layers=depth,
        d_model=64 * depth,
        n_heads=depth,
        n_kv_heads=depth // 2 if depth % 2 == 0 else depth,
        max_seq_len=seq_len,
        lr=float(f"{4e-3 * (192 / (64 * depth)) ** 0.5:.2g}"),
        batch_size=micro_batch,
        grad_accum_steps=max(1, batch_tokens // (micro_batch * seq_len)),
        max_steps=0 if "epochs" in config.given else max(100, 20 * body // batch_tokens),
    )
    overridden = [f"{name} {getattr(config, name)}" for name in derived if name in config.given]
    for name, value in derived.items():
        if name not in config.given:
            setattr(config, name, value)
    chosen = ", ".join(f"{name} {getattr(config, name)}" for name in derived if name not in config.given)
    return f"depth {depth}: {chosen}" + (f"; as you said: {', '.join(overridden)}" if overridden else "")


def fit_machine(config: PretrainConfig) -> str:
    """Where the user chose no size, take one that suits the machine: `small` on a GPU, `tiny` elsewhere.

    Returns:
        a sentence that says so; empty if the user chose.
    """
    if config.given & {"preset", "depth", "architecture", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff"}:
        return ""
    preset = "small" if resolve_device(config.device).type == "cuda" else "tiny"
    for name, value in config.presets[preset].items():
        if name not in config.given:
            setattr(config, name, value)
    return f"no size was given: taking --preset {preset}, which suits this machine"


class GPTTrainer:
    """Pretrains a GPT from a `PretrainConfig`: tokenizer, data, model and loop put together.

    Raises:
        TypeError: something else was given, such as a model.
    """

    def __init__(self, config: PretrainConfig) -> None:
        if not isinstance(config, PretrainConfig):
            raise TypeError(
                f"GPTTrainer takes a PretrainConfig, from which it makes the model, not a {type(config).__name__}; "
                "docs/from_the_articles.md shows how"
            )
        self.config = config
        self.device = prepare_machine(config)
        self.val_path = config.val_data_dir or (SAMPLE_VAL if config.train_data_dir == SAMPLE_TRAIN else "")
        self.sources = parse_sources(config.train_data_dir)
        for path in filter(None, (*(path for path, _ in self.sources), self.val_path)):
            resolve_files(path)  # before the long work of tokenizing
        for turn_of_main in (True, False):  # the other ranks then find tokenizer and shards on the disk
            if ranks.is_main() == turn_of_main:
                self.tokenizer = load_or_train_tokenizer(config)
                train_shards, self.val_shards = self._tokenize()
            ranks.barrier()
        gpt_config = config.model_config(len(self.tokenizer), self.tokenizer.pad_token_id)
        said = fit_options(config, gpt_config, self.device)
        if said and ranks.is_main():
            print(said, flush=True)
        end = self.tokenizer.eos_token_id if config.separate_documents else None
        weights = [weight for _, weight in self.sources]
        if weights[0] is None or len(weights) == 1:
            name = " and ".join(path for path, _ in self.sources)
            train_data = GPTPretrainDataset(joined_shards(train_shards), config.max_seq_len, name, end)
        else:
            named = zip(train_shards, self.sources, strict=True)
            windows = [GPTPretrainDataset(shards, config.max_seq_len, path, end) for shards, (path, _) in named]
            train_data = MixedDataset(windows, weights)
            print(f"mixed by weight: {train_data}", flush=True)
        self.train_shards = joined_shards(train_shards)
        self.val_data = val_data = GPTPretrainDataset(self.val_shards, config.max_seq_len, "the validation text", end)
        size = f"--d_model {config.d_model} and --n_layers {config.n_layers}"
        with advice_if_out_of_memory(f"for a model of {size}; lower them, or take a smaller --preset or --depth"):
            self.model = GPTModel.from_config(gpt_config)
            self.loop = TrainingLoop(
                config,
                self.model,
                gpt_config,
                self.tokenizer,
                "pretrain",
                train_data,
                val_data,
                self.device,
                score=self._score,
            )

    def _tokenize(self) -> tuple[list[TokenShards], TokenShards]:
        """The shards of each source to train on, and of the validation text."""
        config = self.config
        if not self.val_path and not config.val_fraction:
            config.val_fraction = DEFAULT_VAL_FRACTION
            print(f"no validation text given: {config.val_fraction:.0%} of the documents are set aside", flush=True)

        def shards(part: str) -> list[TokenShards]:
            options = {} if self.val_path else {"part": part, "val_fraction": config.val_fraction}
            return [
                tokenize_to_shards(path, self.tokenizer, config.shard_dir, reading=config, **options)
                for path, _ in self.sources
            ]

        if self.val_path:
            val_shards = tokenize_to_shards(self.val_path, self.tokenizer, config.shard_dir, reading=config)
            return shards("all"), val_shards
        return shards("train"), joined_shards(shards("val"))

    def _score(self, model: GPTModel, metrics: dict[str, float]) -> dict[str, float]:
        """Bits per byte of the raw text, which compares models of different tokenizers; and samples, to be read."""
        bits_per_byte = metrics["val_loss"] * self.val_data.n_predicted / math.log(2) / self.val_shards.n_bytes
        if self.config.sample_tokens:
            whole_model = self.loop.parallel_model.whole_model()
            if whole_model is not None:
                self._write_samples(whole_model)
        return {"val_bpb": bits_per_byte}

    def _write_samples(self, model: GPTModel, n_samples: int = 3, n_prompt: int = 8) -> None:
        """Continue the beginnings of validation documents, spread over the whole text, into `samples.txt`."""
        length = min(n_prompt, self.config.max_seq_len // 2)
        starts = self.val_shards.spread_documents(n_samples, self.tokenizer.eos_token_id)
        beginnings = [self.val_shards.slice(start, start + length).tolist() for start in starts]
        prompts = [self.tokenizer.decode(ids).rstrip("\ufffd") for ids in beginnings]  # a character may be cut in two
        settings = {"max_gen_len": self.config.sample_tokens, "temperature": 0.8, "top_k": 50, "seed": self.config.seed}
        texts = generate_texts(model, self.tokenizer, prompts, chat=False, **settings)
        path = Path(self.config.output_dir) / "samples.txt"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        # What a killed run wrote after the checkpoint that this one continues from is written again
        later = (place for place, line in enumerate(lines) if int((STEP.match(line) or "00")[1]) >= self.loop.step)
        lines = lines[: next(later, None)] + [f"--- step {self.loop.step}"]
        lines += [" ".join(f"{prompt} → {text.text}".split()) for prompt, text in zip(prompts, texts, strict=True)]
        with replacing(path, "free some space or choose another --output_dir") as file:
            file.write("".join(f"{line}\n" for line in lines).encode())

    def train(self, resume_from: str | None = None) -> dict[str, float]:
        """Train to the end and return the metrics of the best model.

        Args:
            resume_from: "auto" or a checkpoint to continue from; None takes what the configuration says.
        """
        if resume_from is not None:
            self.config.resume = resume_from
        return self.loop.train()

    def save_model(self, path: str | Path) -> None:
        """Write the model as it is now."""
        self.loop.save_model(Path(path))

    def load_checkpoint(self, path: str | Path) -> None:
        """Take the weights of a checkpoint of the same architecture and tokenizer; training starts from them."""
        model, _, content = load_model(path)
        require_same_model(content, self.loop.gpt_config, self.tokenizer, Path(path))
        self.loop.parallel_model.load_model_state(model.state_dict())


def load_or_train_tokenizer(config: PretrainConfig) -> ByteLevelBPETokenizer:
    """The tokenizer of `--tokenizer_dir`. The default folder is filled from the training text if it is not there."""
    place, sources = config.tokenizer_dir, [path for path, _ in parse_sources(config.train_data_dir)]
    if "tokenizer_dir" not in config.given:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(holding(place))  # of two runs that start together one trains, the other loads
            except OSError as error:
                raise UserError(
                    f"{place} cannot be written to ({error.strerror}); name another --tokenizer_dir"
                ) from error
            if not (Path(place) / "tokenizer.json").is_file():
                name = " and ".join(sources)
                print(f"no tokenizer in {place} yet: training one of 4096 tokens on {name}", flush=True)
                tokenizer = ByteLevelBPETokenizer(vocab_size=4096)
                documents = (document for path in sources for document in iter_documents(path, config))
                tokenizer.train(documents, min_frequency=2, show_progress=True)
                tokenizer.save(place)
    return ByteLevelBPETokenizer.from_pretrained(place)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config = parse_config(PretrainConfig, argv, description="Pretrain a GPT on raw text.")
    choice = fit_machine(config)
    if config.depth:
        choice = turn_depth_dial(config)
        complaints = complaints_about(config)
        if complaints:
            raise UserError("; ".join(complaints))
    trainer = GPTTrainer(config)
    loop = trainer.loop
    if ranks.is_main():
        if choice:
            print(choice)
        n_active = trainer.model.num_active_parameters()
        active = f" ({n_active / 1e6:.2f} M a token)" if config.architecture == "moe" else ""
        print(
            f"model: {config.architecture}, {trainer.model.num_parameters() / 1e6:.2f} M parameters{active}, "
            f"{len(trainer.tokenizer)} tokens in the vocabulary; data: {trainer.train_shards.n_tokens:,} tokens; "
            f"{loop.max_steps} steps of {loop.order.batch_size * config.max_seq_len:,} tokens on {trainer.device} "
            f"in {str(loop.precision).removeprefix('torch.')}",
            flush=True,
        )
    best = trainer.train()
    if ranks.is_main():
        print(
            f"pretrained: {loop.best_path}, validation loss {best['val_loss']:.4f} nats a token, "
            f"{best['val_bpb']:.4f} bits a byte, {loop.seconds:.0f} s; curves in {loop.folder / 'curves.png'}"
        )
    ranks.stop()


if __name__ == "__main__":
    run_main(main)
