"""What fits into a GPU's memory: training, LoRA and serving of models of 124 million to 1.7 billion parameters.

    python -m machine.what_fits                # cards of 6, 8, 12, 16 and 24 GB
    python -m machine.what_fits --memory_gb 10 --context 2048

It is arithmetic, with which nothing is allocated, for weights in fp32 and matrix products in bf16 as the trainers have
them on a GPU. The letters: B rows of T tokens; L layers of width D, with H query and G key/value heads of K numbers and
an inner width F; V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from command_line import option, parse_config, run_main

CARDS_GB = (6, 8, 12, 16, 24)
RESERVED = 1.0  # GB that driver, libraries and the allocator's gaps take of a card
A_LOGIT = 10  # bytes: in bf16, in fp32, and its log-probability
CHUNK = 2**27  # logits of the loss that exist at once
MUON = 5 * 2**28  # bytes that Muon's step takes for a moment, when what the backward pass needed is gone
BATCHES = (32, 16, 8, 4, 2, 1)
LORA_RANK = 16
# Options that save memory, and what they are if nobody asks for them; the ways to set them, the one that changes least
# of what is learned and costs least time first
AS_IT_IS: dict[str, Any] = {"lora_rank": 0, "frozen_weights": "fp32", "recompute_activations": False}
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"frozen_weights": "int8"},
    {"recompute_activations": True},
    {"lora_rank": LORA_RANK},
    {"lora_rank": LORA_RANK, "frozen_weights": "int8"},
    {"frozen_weights": "int8", "recompute_activations": True},
    {"lora_rank": LORA_RANK, "frozen_weights": "int8", "recompute_activations": True},
)


@dataclass(frozen=True)
class Size:
    """The sizes of a model with tied embeddings."""

    name: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    is_gated: bool = True  # SwiGLU and RMSNorm with QK-norm; otherwise GPT-2's layer

    @property
    def matrices(self) -> int:
        """Numbers in the matrices of the layers."""
        attention = 2 * (self.n_heads + self.n_kv_heads) * self.head_dim * self.d_model
        return self.n_layers * (attention + (3 if self.is_gated else 2) * self.d_model * self.d_ff)

    @property
    def parameters(self) -> int:
        """All numbers but those of norms, biases and positions."""
        return self.matrices + self.vocab_size * self.d_model

    @property
    def adapters(self) -> int:
        """Numbers of LoRA adapters beside all matrices of the layers."""
        query, key = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        ends = 2 * (self.d_model + query) + 2 * (self.d_model + key)
        return self.n_layers * LORA_RANK * (ends + (3 if self.is_gated else 2) * (self.d_model + self.d_ff))


SIZES = (
    Size("gpt2 (124 M)", 50257, 768, 12, 12, 12, 64, 3072, is_gated=False),
    Size("SmolLM2-360M", 49152, 960, 32, 15, 5, 64, 2560),
    Size("Qwen3-0.6B", 151936, 1024, 28, 16, 8, 128, 3072),
    Size("SmolLM2-1.7B", 49152, 2048, 24, 32, 32, 64, 8192),
    Size("Qwen3-1.7B", 151936, 2048, 28, 16, 8, 128, 6144),
)


def size_of(config: Any) -> Size | None:
    """The sizes of a `GPTConfig`; None for models that this arithmetic does not know: experts, encoder–decoders."""
    if getattr(config, "n_experts", 1) or not config.tie_embeddings:
        return None
    names = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff")
    return Size("the model", *(getattr(config, name) for name in names), is_gated=config.activation == "swiglu")


def layer_bytes(size: Size) -> int:
    """What a layer keeps of a token for the backward pass, with flash attention."""
    query, key = size.n_heads * size.head_dim, size.n_kv_heads * size.head_dim
    norms = 2 * 4 * size.d_model  # their inputs, the residual stream, in fp32
    inputs = 2 * size.d_model * (5 if size.is_gated else 4)  # autocast rounds them for each first matrix anew
    heads = 2 * (query + 2 * key) + 2 * 2 * query  # queries, keys, values; what attention gives, and as the next input
    if size.is_gated:
        return norms + inputs + heads + 2 * (query + key) + 2 * 4 * size.d_ff  # inputs of the QK-norms; SwiGLU's four
    return norms + inputs + heads + 2 * 2 * size.d_ff


def state_bytes(size: Size, frozen: str = "", rank: int = LORA_RANK, optimizer: str = "muon") -> int:
    """Bytes of what stays from step to step, with the gradients.

    Args:
        frozen: of LoRA, what the frozen linear layers are held in, fp32 or int8; empty: all is trained.
        rank: of LoRA's adapters, which AdamW trains.
        optimizer: of what is trained otherwise, adamw or muon beside it.
    """
    head = size.vocab_size * size.d_model
    if not frozen:  # weights in fp32, and in bf16 as autocast keeps them; gradients, and two moments or Muon's one;
        # the loss computes the gradient of the head, which is the embedding's, too
        return 18 * size.parameters - 4 * size.matrices * (optimizer == "muon") + 4 * head
    largest = size.d_model * max(size.d_ff, size.n_heads * size.head_dim)  # expanded for a product, in fp32 and in bf16
    linear = 6 * size.matrices if frozen == "fp32" else size.matrices + 6 * largest
    return linear + 6 * head + 18 * size.adapters * rank // LORA_RANK


def training_bytes(
    size: Size,
    batch_size: int,
    context: int,
    recompute: bool,
    frozen: str = "",
    rank: int = LORA_RANK,
    optimizer: str = "muon",
) -> int:
    """Bytes of a training step at their height.

    Args:
        frozen, rank, optimizer: see `state_bytes`.
    """
    kept = 4 * size.d_model * size.n_layers + layer_bytes(size) if recompute else layer_bytes(size) * size.n_layers
    tokens = batch_size * context
    backward = tokens * kept + A_LOGIT * min(CHUNK, tokens * size.vocab_size)
    return state_bytes(size, frozen, rank, optimizer) + max(backward, 0 if frozen or optimizer != "muon" else MUON)


def serving_bytes(size: Size, bytes_a_weight: int) -> int:
    """Bytes of the weights in service."""
    return bytes_a_weight * size.parameters


def cache_bytes(size: Size) -> int:
    """Bytes of keys and values of one token in bf16."""
    return 2 * 2 * size.n_layers * size.n_kv_heads * size.head_dim


def first_that_fits(
    room: float, asked: dict[str, Any], is_open: Container[str], needed: Callable[[dict[str, Any]], float]
) -> dict[str, Any] | None:
    """Of `WAYS`, the options of the first that fits; {} changes nothing, and None means that none fits.

    Args:
        room: bytes.
        asked: what the options are that ways may change.
        is_open: the names of those that they may indeed.
        needed: the bytes that training takes with all options.
    """
    for way in WAYS:
        options = asked | way
        is_allowed = all(name in is_open for name in way) and (options["lora_rank"] or "frozen_weights" not in way)
        if is_allowed and needed(options) <= room:
            return way
    return None


def in_words(options: dict[str, Any]) -> str:
    """Options as they are given on a command line."""
    return " ".join(f"--{name} {str(value).lower()}" for name, value in options.items())


def fine_tuning(size: Size, memory_gb: float, context: int) -> str:
    """The command that trains the whole model or, where it does not fit, adapters; "–" if there is none."""

    def needed(options: dict[str, Any], batch_size: int = 1) -> int:
        frozen = options["frozen_weights"] if options["lora_rank"] else ""
        return training_bytes(size, batch_size, context, options["recompute_activations"], frozen)

    room = (memory_gb - RESERVED) * 1e9
    way = first_that_fits(room, AS_IT_IS, AS_IT_IS, needed)
    if way is None:
        return "–"
    batch_size = next(number for number in BATCHES if needed(AS_IT_IS | way, number) <= room)
    return f"python finetune.py --mode sft {in_words({'micro_batch_size': batch_size} | way)}"


def commands(cards_gb: tuple[float, ...], context: int) -> str:
    """For each model and card the command of `fine_tuning`; cards that have the same share a line."""
    lines = []
    for size in SIZES:
        lines.append(f"{size.name}:")
        by_command: dict[str, list[str]] = {}
        for card in cards_gb:
            by_command.setdefault(fine_tuning(size, card, context), []).append(f"{card:g}")
        lines += [f"  {', '.join(cards) + ' GB':12} {command}" for command, cards in by_command.items()]
    return "\n".join(lines)


def training_choice(size: Size, memory_gb: float, context: int, frozen: str = "") -> str:
    """The options of the fastest way to train that fits; "–" if there is none."""
    room = (memory_gb - RESERVED) * 1e9
    for recompute in (False, True):
        for batch_size in BATCHES:
            if training_bytes(size, batch_size, context, recompute, frozen) <= room:
                return f"{batch_size}{' recomputed' * recompute}"
    return "–"


def serving_choice(size: Size, memory_gb: float) -> str:
    """How the weights fit, and how many tokens of cache beside them; "–" if they do not."""
    room = (memory_gb - RESERVED) * 1e9
    for name, bytes_a_weight in (("BF16", 2), ("INT8", 1)):
        left = room - serving_bytes(size, bytes_a_weight)
        if left > 1024 * cache_bytes(size):
            return f"{name}, {left / cache_bytes(size) / 1000:,.0f}k"
    return "–"


def table(cards_gb: tuple[float, ...], context: int) -> str:
    """What fits where, as a table in Markdown."""
    head = " | ".join(f"{card:g} GB" for card in cards_gb)
    rows = [f"| model | | {head} |", "|---|---|" + "---|" * len(cards_gb)]
    for size in SIZES:
        ways = {
            "train": lambda card, size=size: training_choice(size, card, context),
            "LoRA": lambda card, size=size: training_choice(size, card, context, "fp32"),
            "LoRA, INT8": lambda card, size=size: training_choice(size, card, context, "int8"),
            "serve": lambda card, size=size: serving_choice(size, card),
        }
        for way, choose in ways.items():
            rows.append(f"| {size.name} | {way} | " + " | ".join(map(choose, cards_gb)) + " |")
    return "\n".join(rows)


@dataclass
class FitConfig:
    """What to reckon with."""

    memory_gb: float = option(0.0, "of one card; 0: of 6, 8, 12, 16 and 24 GB", at_least=0)
    context: int = option(1024, "tokens of a row in training", at_least=1)


def main(argv: list[str] | None = None) -> None:
    """Print the table, and how to read it."""
    config: FitConfig = parse_config(FitConfig, argv, description="What fits into a GPU's memory, by arithmetic.")
    cards_gb = (config.memory_gb,) if config.memory_gb else CARDS_GB
    print(table(cards_gb, config.context))
    print(
        f"\ntrain (with Muon), LoRA (rank {LORA_RANK}): the largest --micro_batch_size of rows of {config.context} "
        "tokens; recomputed: with --recompute_activations true; –: none fits"
        f"\nserve: the weights' type, and how many tokens of cache in BF16 fit beside them; {RESERVED:g} GB stays free"
        "\n\nWhat to give for SFT, or to leave: on a GPU the trainers choose the same by themselves, by what it has "
        "free.\nLines without LoRA are right for pretraining, too. Precision (bf16), the loss in chunks and --compile "
        "auto need no option.\n"
    )
    print(commands(cards_gb, config.context))


if __name__ == "__main__":
    run_main(main)
