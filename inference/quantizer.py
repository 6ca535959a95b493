"""Models for inference: the fastest kernels, and weights that are a quarter or half of the size.

    python -m inference.quantizer --model_path models/sft/sft_best.pth --output_path models/sft/sft_best_int8.pth
    python -m inference.quantizer --model_path models/sft/sft_best.pth --weights int4

`prepare_for_inference` makes a copy of a model whose linear layers are `InferenceLinear` and whose token embedding is
an `InferenceEmbedding` (tied to the output layer, both read the same numbers). Kinds of weights:

    fp32           as they are, shared with the model
    fp16, bf16     half the size
    int8           a quarter; one scale for each output channel; activations keep full precision
    int8_dynamic   the same weights, and activations rounded to 8 bits, too: faster with many rows, less exact
    int4           a seventh; one scale for each 32 weights, activations of 8 bits; rounded so that the errors of a row
                   make up for each other (error_aware_rounding.py)

Norms, biases and scales stay in FP32; learned positions become FP16, so that the file is a quarter in all.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

if not __package__:  # run as a file: modules are imported from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.nn as nn

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import (
    FORMAT,
    atomic_save,
    config_of,
    load_checkpoint,
    load_model,
    load_weights,
    require_language_model,
    require_tokenizer,
    tokenizer_of,
    weight_fingerprint,
)
from command_line import UserError, option, parse_config, run_main
from data_loader import GPTSFTDataset, pad_samples
from gpt_model import IGNORED_LABEL, GPTModel, next_token_loss
from inference.engine import Engine
from inference.error_aware_rounding import rounded_layers
from inference.kernels.int4_weights import GROUP
from inference.kernels.linear_layers import InferenceEmbedding, InferenceLinear, rounded, tile_for_gpu
from inference.kernels.linear_products import DTYPES, is_tiled, kind_of
from inference.kernels.stacked_experts import StackedExperts, stack_experts
from inference.sampling import SamplingParams
from inference.tensor_parallel import Ranks, cut
from machine import inference_dtype
from seq2seq_model import Seq2SeqConfig, Transformer
from text.account import Account
from text.conversation_data import RecordOptions, load_conversations, parse_columns
from text.text_files import holds_records, iter_documents
from transformer_components import Positions, shapes_only

HALF = ("fp16", "bf16")
QUANTIZED = tuple(name for name in DTYPES if name != "fp32")
MAX_PERPLEXITY_RISE = dict.fromkeys(QUANTIZED, 0.005) | {"int4": 0.03}  # more is warned of
MIN_SPEEDUP = 1.05
BATCH_TOKENS = 1024  # of samples that are scored at once
ModelClass = TypeVar("ModelClass", GPTModel, Transformer)


# -- models ------------------------------------------------------------------------------------------------------------


def prepare_for_inference(
    model: ModelClass, weights: str = "fp32", made: Mapping[str, tuple[torch.Tensor, ...]] | None = None
) -> ModelClass:
    """A copy of a model for inference only, in eval mode; the model itself stays as it is.

    Args:
        weights: "fp32" shares all weights with the model and costs no memory; the others are explained above.
        made: {name of a linear layer: its weights and scales of that kind}, as `error_aware_rounding.rounded_layers`
            finds them; what is not there is rounded to the nearest.

    Raises:
        UserError: the model is quantized already, its weights are not finite numbers, or its rows do not consist of
            groups of 32, as int4 needs.
    """
    if quantization_of(model):
        raise UserError("the model is quantized already; give the model in full precision")
    memo: dict[int, Any] = {}  # deepcopy takes what its memo holds in place of copying
    if weights == "fp32":
        memo = {
            id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in model.parameters()
        }
    for name, part in model.named_modules():
        if isinstance(part, nn.Dropout):
            memo[id(part)] = nn.Identity()  # three calls a layer and step that do nothing
        if isinstance(part, nn.Linear | InferenceLinear):
            _require_finite(part.weight, name, "is damaged; use another checkpoint")
            exact = name.endswith(".router")  # small, and a choice that tips changes all that follows
            if weights == "int4" and not exact and part.in_features % GROUP:
                long = f"rows of {part.in_features} numbers, no multiple of {GROUP}"
                raise UserError(f"{name} has {long}; take int8 weights")
            kind = "fp32" if exact else weights
            memo[id(part)] = InferenceLinear.from_linear(part, kind, (made or {}).get(name))
            for numbers in (memo[id(part)].weight, memo[id(part)].scale):
                _require_finite(numbers, name, f"is too large for {weights}; use another kind of weights")
    head = memo[id(model.lm_head)]
    for embedding in (part for part in model.modules() if type(part) is nn.Embedding):
        if embedding.weight is model.lm_head.weight:
            table = head.weight, head.scale
        else:
            table = rounded(embedding.weight, weights)
        memo[id(embedding)] = InferenceEmbedding(*table)
    prepared = copy.deepcopy(model, memo).eval().requires_grad_(False)
    if weights != "fp32":
        for positions in (part for part in prepared.modules() if isinstance(part, Positions)):
            for weight in positions.parameters():
                weight.data = weight.data.half()
    return prepared


def _require_finite(weight: torch.Tensor | None, name: str, verdict: str) -> None:
    # A sum is not finite if one number is not, and needs no memory
    if weight is None or weight.is_meta or not weight.is_floating_point():
        return
    if not weight.sum(dtype=torch.float32).isfinite():
        raise UserError(f"a weight of {name} {verdict}")


def quantize_model_int8(model: GPTModel) -> GPTModel:
    """An INT8 copy of a model, see `prepare_for_inference`."""
    return prepare_for_inference(model, "int8")


def quantization_of(model: nn.Module) -> str | None:
    """A model's kind of weights, one of `QUANTIZED`; None in full precision."""
    kinds = (module.weights for module in model.modules() if isinstance(module, InferenceLinear))
    return next((kind for kind in kinds if kind in QUANTIZED), None)


# -- files -------------------------------------------------------------------------------------------------------------


def save_quantized_model(model: GPTModel, path: str | Path, checkpoint: dict[str, Any] | None = None) -> Path:
    """Write a quantized model as a checkpoint.

    Args:
        checkpoint: the checkpoint it was made from (the last value of `checkpoint.load_model`): its stage, step,
            metrics and tokenizer go into the file. Without it, the file holds the model only.

    Raises:
        UserError: the model is not quantized, or the file cannot be written.
    """
    kind = quantization_of(model)
    if kind is None:
        raise UserError("the model is not quantized; pass it through prepare_for_inference with int8 weights first")
    if any(is_tiled(tensor) for tensor in model.parameters()):
        raise UserError("the model's INT4 weights lie as a GPU reads them; save the model before it is placed there")
    if any(isinstance(part, StackedExperts) for part in model.modules()):
        raise UserError("the model's experts lie as a GPU reads them; save the model before it is placed there")
    inherited = {name: value for name, value in (checkpoint or {}).items() if name != "training_state"}
    content = {"stage": "pretrain", "step": 0, "metrics": {}, **inherited}
    own = {"format": FORMAT, "config": asdict(model.config), "model": model.state_dict(), "quantization": kind}
    if checkpoint:
        own["made_from"] = weight_fingerprint(checkpoint)  # adapters (LoRA) for the original fit this model, too
        own["tokenizer"] = _compact(checkpoint["tokenizer"])
    return atomic_save({**content, **own, "command": " ".join(sys.argv)}, path)


def _compact(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's tokenizer without what its other files repeat: beside a small model that is a twentieth."""
    files = {name: text for name, text in tokenizer["files"].items() if name not in ("vocab.json", "merges.txt")}
    whole = json.loads(files["tokenizer.json"])
    files["tokenizer.json"] = json.dumps(whole, ensure_ascii=False, separators=(",", ":"))
    return {**tokenizer, "files": files}


def load_quantized_model(path: str | Path, device: torch.device | str = "cpu") -> GPTModel:
    """The quantized model in a checkpoint, in eval mode. On a CPU its weights stay in the file and are mapped into
    memory as they are used; there is never a model in full precision.

    Raises:
        UserError: no such file, damaged, not quantized, or of another architecture.
    """
    return _quantized_model(load_checkpoint(path), path, device)


def _quantized_model(content: dict[str, Any], path: str | Path, device: torch.device | str) -> GPTModel:
    kind = content.get("quantization")
    require_language_model(content, path)
    if kind not in QUANTIZED:
        raise UserError(f"{path} is not quantized; run python -m inference.quantizer --model_path {path} first")
    return _mapped_model(content, path, kind, device)


def _mapped_model(content: dict[str, Any], path: str | Path, kind: str, device: torch.device | str) -> GPTModel:
    with shapes_only():
        model = prepare_for_inference(GPTModel.from_config(config_of(content, path)), kind)
    load_weights(model, content["model"], path, assign=True)
    if model.config.tie_embeddings:
        head = model.lm_head
        model.token_embedding = InferenceEmbedding(head.weight, head.scale, head.minimum)
    return model.to(device)


def load_any(
    path: str | Path,
    device: torch.device | str = "cpu",
    base: str | Path | None = None,
    precision: str = "auto",
    ranks: Ranks | None = None,
) -> tuple[GPTModel, ByteLevelBPETokenizer, dict[str, Any]]:
    """The model of a checkpoint, quantized or not, prepared for inference; its tokenizer; and the checkpoint's dict.

    On a CPU, weights that came in as FP16 or BF16 (`exchange.import_model`) stay so, in the file until they are used.
    On a GPU everything but INT8 and INT4 weights and their scales is of one type, see `place`.

    Args:
        precision: what to compute in, see `machine.inference_dtype`.
        base: of adapters (LoRA), the model that they belong to, in full precision or quantized; None takes the recorded
            one. Into full precision they are merged, beside quantized layers they are attached.
        ranks: the processes that share the model, all of which have to call this: each gets its share on its device.

    Raises:
        UserError: as `checkpoint.load_model`; or the model cannot be cut into shares.
    """
    device = torch.device(device)
    dtype = inference_dtype(precision, device)
    if device.type == "cuda" and dtype == torch.float32:
        torch.set_float32_matmul_precision("high")  # TF32, as in training

    def load() -> tuple[GPTModel, ByteLevelBPETokenizer, dict[str, Any]]:
        model, tokenizer, content = _load_on_cpu(path, base)
        model = cut(model, ranks.rank, ranks.n_ranks) if ranks else model
        return place(model, device, dtype), tokenizer, content

    return ranks.agreed(load) if ranks else load()


def place(model: GPTModel, device: torch.device, dtype: torch.dtype | None) -> GPTModel:
    """A model that is for inference on its device, in the type that it is to compute in (None: as it is); INT4 weights
    in the order that a GPU's kernel reads, where there is one: for bf16, from NVIDIA's Ampere on; and experts at one
    place (stacked_experts.py). What saves models refuses both."""
    model = model.to(device, dtype)
    if device.type == "cuda":
        stack_experts(model)
    is_nvidias = device.type == "cuda" and not torch.version.hip
    if is_nvidias and model.dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0):
        tile_for_gpu(model)
    return model


def _load_on_cpu(
    path: str | Path, base: str | Path | None
) -> tuple[GPTModel, ByteLevelBPETokenizer, dict[str, Any]]:
    content = load_checkpoint(path)
    kind = kind_of(content["model"].get("token_embedding.weight", torch.empty(0)))
    if kind in HALF and not content.get("quantization") and "lora" not in content and content["stage"] != "reward":
        content["quantization"] = kind  # so that adapters stay beside its weights, which would round a sum
        return _mapped_model(content, path, kind, "cpu"), tokenizer_of(content), content
    if not content.get("quantization"):
        model, tokenizer, content = load_model(path, "cpu", base, load_any, mapped=True)
        beside_quantized = quantization_of(model) is not None
        return model if beside_quantized else prepare_for_inference(model), tokenizer, content
    require_tokenizer(content, path)
    return _quantized_model(content, path, "cpu"), tokenizer_of(content), content


def load_translator(
    path: str | Path, device: torch.device | str = "cpu", weights: str = "fp32"
) -> tuple[Transformer, ByteLevelBPETokenizer, dict[str, Any]]:
    """The encoder–decoder of a checkpoint, quantized or not, prepared for inference; its tokenizer; and the
    checkpoint's dict.

    Args:
        weights: the kind of weights that a model in full precision gets.

    Raises:
        UserError: no such file, damaged, or another kind of model.
    """
    content = load_checkpoint(path)
    if content["stage"] != "translate":
        raise UserError(f"{path} is a {content['stage']} model, not an encoder–decoder; give one of seq2seq_trainer.py")
    return _translator(content, path, weights).to(device), tokenizer_of(content), content


def _translator(content: dict[str, Any], path: str | Path, weights: str) -> Transformer:
    config, kind = Seq2SeqConfig(**content["config"]), content.get("quantization")
    if kind:
        with shapes_only():
            model = prepare_for_inference(Transformer.from_config(config), kind)
        load_weights(model, content["model"], path, assign=True)
        return model
    model = Transformer.from_config(config)
    load_weights(model, content["model"], path)
    return prepare_for_inference(model, weights)


# -- what it costs and what it brings ----------------------------------------------------------------------------------


def weight_bytes(model: nn.Module) -> int:
    """The size of a model's weights; what is tied counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def decode_speed(model: GPTModel, batch_size: int = 1, n_tokens: int = 64, seconds: float = 1.0) -> float:
    """Tokens a second (over all rows) that the engine generates after one-token prompts: the best of several runs."""
    prompts = [[(model.config.pad_token_id + 1) % model.config.vocab_size]] * batch_size
    params = SamplingParams(min(n_tokens, model.config.max_seq_len - 1), temperature=0)
    engine = Engine(model, None, max_running=batch_size)
    engine.run(prompts, replace(params, max_gen_len=2))
    fastest, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        engine.run(prompts, params)
        fastest = min(fastest, time.perf_counter() - start)
    return batch_size * params.max_gen_len / fastest


def held_out_samples(
    path: str | Path,
    tokenizer: ByteLevelBPETokenizer,
    max_seq_len: int,
    max_tokens: int,
    account: Account | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of about `max_tokens` held-out tokens, in samples of at most `max_seq_len`.

    Of conversations the answers are scored; of text, all of it, a document a sample.

    Args:
        account, columns: see `conversation_data.load_records`.
    """
    if holds_records(path):
        account = account or Account(str(path), "conversations")
        conversations = load_conversations(path, account, columns=columns)
        samples: Iterable = GPTSFTDataset(conversations, tokenizer, max_seq_len, account).samples
    else:
        documents = (tokenizer.encode(text, max_seq_len)["input_ids"] for text in iter_documents(path))
        samples = ((ids, ids) for ids in documents)
    chosen, n_tokens = [], 0
    for ids, labels in samples:
        if n_tokens >= max_tokens:
            break
        chosen.append((ids, labels))
        n_tokens += len(ids)
    return chosen


def _batches(samples: Iterable[tuple[list[int], list[int]]]) -> Iterator[list[tuple[list[int], list[int]]]]:
    """As many samples at once as have at most `BATCH_TOKENS` tokens when they are padded, or one."""
    batch: list[tuple[list[int], list[int]]] = []
    for sample in samples:
        if batch and (len(batch) + 1) * max(len(ids) for ids, _ in (*batch, sample)) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


@torch.inference_mode()
def perplexity_and_choices(
    model: GPTModel, samples: Iterable[tuple[list[int], list[int]]]
) -> tuple[float, torch.Tensor]:
    """A model's perplexity on samples of token ids and labels, and the token it holds likeliest at each position."""
    nats, n_labels, choices = 0.0, 0, []
    for batch in _batches(samples):
        padded = pad_samples(batch, model.config.pad_token_id)
        logits = model(padded["input_ids"])["logits"]  # (B, T, V)
        count = sum(label != IGNORED_LABEL for _, labels in batch for label in labels[1:])
        nats += next_token_loss(logits, padded["labels"]).item() * count
        n_labels += count
        choices += [row[: len(ids)].argmax(dim=-1) for row, (ids, _) in zip(logits, batch, strict=True)]
    return math.exp(min(nats / max(1, n_labels), 700.0)), torch.cat(choices)


@dataclass
class QuantizerConfig(RecordOptions):
    """The command line of the quantizer."""

    model_path: str = option("models/sft/sft_best.pth", "the checkpoint to quantize")
    output_path: str | None = option(None, "where to write; default beside it, with the kind of weights in the name")
    weights: str = option("int8", "the kind of weights; int8_dynamic rounds activations, too", choices=QUANTIZED)
    text: str | None = option(
        None,
        "held-out text or conversations; default data/sft/sft_test.json, for pretraining data/pretrain/val",
    )
    text_tokens: int = option(16384, "held-out tokens that are scored", at_least=2)
    calibration: str | None = option(
        None,
        "of int4, what to round by; default data/sft/sft_data.json, for pretraining data/pretrain/train",
    )
    calibration_tokens: int = option(4096, "tokens of it", at_least=32)
    num_threads: int = option(0, "CPU threads of the speed measurement; 0 means as many as torch takes", at_least=0)

    def validate(self) -> list[str]:
        complaints = super().validate()
        output = Path(self.output_path or "x_int8.pth")
        same = output.resolve() == Path(self.model_path).resolve()
        if self.weights != "int4" and (unused := self.given & {"calibration", "calibration_tokens"}):
            complaints.append(f"--{min(unused)} is for --weights int4 only, which alone is rounded by a text")
        return complaints + [f"--output_path {output} is the model itself; choose another name"] * same


def main(argv: list[str] | None = None) -> None:
    """Quantize a checkpoint, and say what it cost and what it brought."""
    config = parse_config(QuantizerConfig, argv, description="Make a smaller version of a model, for inference.")
    torch.set_num_threads(config.num_threads or torch.get_num_threads())
    kind, source = config.weights, Path(config.model_path)
    output = Path(config.output_path or source.with_name(f"{source.stem}_{kind}{source.suffix}"))
    checkpoint = load_checkpoint(source)
    if checkpoint["stage"] == "translate":
        if checkpoint.get("quantization"):
            raise UserError(f"{source} is quantized already; give the checkpoint it was made from")
        texts = {"text", "text_tokens", "calibration", "calibration_tokens", "columns", "skip_bad_records"}
        if unused := config.given & texts:
            named = " and ".join(f"--{name}" for name in sorted(unused))
            raise UserError(f"{named}: an encoder–decoder is not scored here; translate a test with both models")
        plain, quantized = (_translator(checkpoint, source, weights) for weights in ("fp32", kind))
        save_quantized_model(quantized, output, checkpoint)
        print_change("weights", "MiB", weight_bytes(plain) / 2**20, weight_bytes(quantized) / 2**20)
        print_change("file", "MiB", source.stat().st_size / 2**20, output.stat().st_size / 2**20)
        print(f'{kind} model {output}; try: python -m inference.translate --text "…" --model_path {output}')
        return
    plain, tokenizer, checkpoint = load_model(source)
    model = prepare_for_inference(plain)
    of_pretraining = checkpoint["stage"] == "pretrain"
    text = config.text or ("data/pretrain/val" if of_pretraining else "data/sft/sft_test.json")
    samples = _samples(text, bool(config.text), config.text_tokens, tokenizer, plain, config)
    made = None
    if kind == "int4":
        source_text = config.calibration or ("data/pretrain/train" if of_pretraining else "data/sft/sft_data.json")
        chosen = _samples(source_text, bool(config.calibration), config.calibration_tokens, tokenizer, plain, config)
        if chosen:
            print(f"rounding by {sum(len(ids) for ids, _ in chosen)} tokens of {source_text}")
            made = rounded_layers(plain, [ids for ids, _ in chosen], show_progress=True)
        else:
            print(f"rounding to the nearest: there is no {source_text}; give a text with --calibration")
    save_quantized_model(prepare_for_inference(plain, kind, made), output, checkpoint)
    quantized = load_quantized_model(output)

    print_change("weights", "MiB", weight_bytes(model) / 2**20, weight_bytes(quantized) / 2**20)
    print_change("file", "MiB", source.stat().st_size / 2**20, output.stat().st_size / 2**20)
    speed = new_speed = 0.0
    for _ in range(3):  # in turn, so that other work on the machine disturbs both alike
        speed = max(speed, decode_speed(model, seconds=0.3))
        new_speed = max(new_speed, decode_speed(quantized, seconds=0.3))
    print_change("decoding", "tokens/s", speed, new_speed, note="batch 1, CPU")
    max_rise = MAX_PERPLEXITY_RISE[kind]
    if samples:
        before, choices = perplexity_and_choices(model, samples)
        after, new_choices = perplexity_and_choices(quantized, samples)
        print(f"perplexity {before:.4f} → {after:.4f} ({after / before - 1:+.2%}) on {len(choices)} tokens of {text}")
        if kind == "int8_dynamic":
            weights_only, _ = perplexity_and_choices(prepare_for_inference(plain, "int8"), samples)
            print(f"           of which {after / weights_only - 1:+.2%} for INT8 activations")
        print(f"greedy     the same likeliest token at {(choices == new_choices).float().mean():.1%} of the positions")
        if after > before * (1 + max_rise):
            better = "int8" if kind == "int4" else "fp16 or bf16"
            print(f"warning: perplexity rises by more than {max_rise:.1%}; consider --weights {better}")
    else:
        print(f"perplexity not measured: there is no {text}; give held-out text with --text")
    rise = after / before - 1 if samples else None
    is_faster, is_as_good = new_speed >= MIN_SPEEDUP * speed, rise is None or rise <= max_rise
    if not is_faster:
        print(f"warning: {kind} brings a smaller file here and no speed; full precision decodes as fast")
    # For the service, which chooses between the two
    found = {"pays": is_faster and is_as_good, "speedup": new_speed / speed, "perplexity_rise": rise}
    atomic_save({**load_checkpoint(output), "quantizer": found}, output)
    print(f"{kind} model {output}")


def _samples(
    text: str,
    is_asked_for: bool,
    n_tokens: int,
    tokenizer: ByteLevelBPETokenizer,
    model: GPTModel,
    config: QuantizerConfig,
) -> list[tuple[list[int], list[int]]]:
    """`held_out_samples` of a text; none if it is the usual one and not there."""
    account = Account(text, "conversations", skips_bad_records=config.skip_bad_records)
    try:
        columns = parse_columns(config.columns)
        return held_out_samples(text, tokenizer, model.config.max_seq_len, n_tokens, account, columns)
    except UserError:
        if is_asked_for:
            raise
        return []  # the sample data is not here


def print_change(what: str, unit: str, before: float, after: float, note: str = "") -> None:
    """One line: a figure before and after."""
    print(f"{what:<10} {before:.2f} → {after:.2f} {unit} ({after / before:.1%}{note and f'; {note}'})")


if __name__ == "__main__":
    run_main(main)
