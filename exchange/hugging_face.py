"""Hugging Face folders in: config.json → `GPTConfig`, weights under our names, the tokenizer.

What would change the model's function and is not known here is refused by name: a field of config.json counts as known
if it is read, if it has the one value with which nothing changes, or if it is about something else than the function.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from alignment.transformers_names import (
    MODELS,
    SIZES,
    SWITCHES,
    TRANSPOSED,
    architecture_of,
    column,
    parts_of,
    weights_from_transformers,
)
from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError
from exchange.sources import Source, check_tokenizer, expected_shapes, kind_of_all
from gpt_model import GPTConfig
from text.chat_template import DEFAULT_CHAT_TEMPLATE
from text.tokenizer_files import KNOWN_FILES

# Their classes, and which of our architectures each is; Mistral's, without its window, is Llama's
CLASSES = {name: architecture for architecture, name in MODELS.items()} | {"MistralForCausalLM": "llama"}
# What a class assumes where config.json says nothing; sizes must be said
DEFAULTS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": dict(n_inner=None, layer_norm_epsilon=1e-5, tie_word_embeddings=True),
    "LlamaForCausalLM": dict(num_key_value_heads=None, head_dim=None),
    "MistralForCausalLM": dict(head_dim=None),
    "Qwen2ForCausalLM": dict(head_dim=None),
    "Qwen3ForCausalLM": dict(head_dim=128),
    "Qwen3MoeForCausalLM": dict(head_dim=None, router_aux_loss_coef=0.001, norm_topk_prob=False),
}
ROPE_DEFAULTS = dict(rms_norm_eps=1e-6, tie_word_embeddings=False)

# Fields with which the function is the one that we know, if they have one of these values
MUST_BE: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "hidden_act": ("silu", "swish"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "norm_topk_prob": (True,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": (None, []),
}
# Fields about something else: training, what a library does with the model, where it comes from
ELSEWHERE = {
    "architectures", "attention_dropout", "attn_pdrop", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "do_sample", "dtype", "early_stopping", "embd_pdrop",
    "eos_token_id", "finetuning_task", "gradient_checkpointing", "hidden_dropout", "id2label", "initializer_range",
    "intermediate_size", "num_local_experts", "output_router_logits",  # of experts; of others the first is a size
    "is_decoder", "is_llama_config", "label2id", "length_penalty", "max_length", "max_window_layers", "min_length",
    "model_type", "n_ctx", "name_or_path", "num_beams", "output_attentions", "output_hidden_states", "pad_token_id",
    "prefix", "pretraining_tp", "problem_type", "pruned_heads", "reorder_and_upcast_attn", "repetition_penalty",
    "resid_pdrop", "return_dict", "sep_token_id", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed", "unsloth_version",
    "use_bfloat16", "use_cache",
}  # fmt: skip
ROPE_FIELDS = {"rope_theta", "rope_scaling", "rope_parameters"}
READ = {"attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "layer_types", *ROPE_FIELDS}


def open_folder(
    folder: Path, max_seq_len: int = 0, ignored: tuple[str, ...] = (), tokenizer_dir: str = ""
) -> Source:
    """A Hugging Face folder as a source.

    Args:
        max_seq_len: the context to take; 0: the model's own.
        ignored: fields of config.json of which the user knows that they change nothing.
        tokenizer_dir: where the tokenizer is, if not in the folder.

    Raises:
        UserError: something is missing, damaged or unknown.
    """
    content = read_json(folder / "config.json", "a Hugging Face folder has it beside the weights")
    try:
        config, architecture, notes = config_from(content, folder, max_seq_len, ignored)
    except (ValueError, TypeError, AttributeError) as error:  # something of another type than it should be
        raise UserError(f"config.json in {folder} makes no model: {error}") from None
    tokenizer = read_tokenizer(Path(tokenizer_dir or folder), folder)
    check_tokenizer(tokenizer, config)
    config.pad_token_id = tokenizer.pad_token_id
    files = WeightFiles(folder, config)
    shapes = files.checked_shapes()
    return Source(
        path=folder,
        architecture=architecture,
        config=config,
        tokenizer=tokenizer,
        weights=lambda kind: files.weights(),
        shapes=shapes,
        kind=files.kind(),
        has_template=tokenizer.chat_template != DEFAULT_CHAT_TEMPLATE,
        notes=notes,
    )


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        UserError: it is not there, or not one.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}; {remedy}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it is not a JSON object); fetch it again")
    return content


def read_tokenizer(folder: Path, model: Path) -> ByteLevelBPETokenizer:
    """The tokenizer of a folder, and what its `generation_config.json`, or the model's, says of the end of an answer.

    Raises:
        UserError: there is none, it is damaged, or of another kind.
    """
    files = {name: (folder / name) for name in KNOWN_FILES if (folder / name).is_file()}
    if (model / "generation_config.json").is_file():
        files["generation_config.json"] = model / "generation_config.json"
    if not files.keys() & {"tokenizer.json", "vocab.json"}:
        if (folder / "tokenizer.model").is_file():
            raise UserError(
                f"{folder} has a tokenizer of SentencePiece's kind (as Llama 1 and 2, TinyLlama and Mistral have), and "
                "this project reads byte-level BPE (GPT-2, Llama 3, SmolLM2, Qwen2, Qwen3); take a model of these"
            )
        raise UserError(f"{folder} has no tokenizer.json; say where the tokenizer is with --tokenizer_dir")
    try:
        return ByteLevelBPETokenizer.from_files({name: path.read_text("utf-8") for name, path in files.items()})
    except (UserError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"the tokenizer in {folder} cannot be used: {error}") from None


# -- config.json -------------------------------------------------------------------------------------------------------


def config_from(
    content: dict[str, Any], folder: Path, max_seq_len: int = 0, ignored: tuple[str, ...] = ()
) -> tuple[GPTConfig, str, list[str]]:
    """Our configuration, the name of their class, and what is to be said of it.

    Raises:
        UserError: another architecture, or a field that is not known.
        ValueError, TypeError, AttributeError: they make no model.
    """
    theirs = (content.get("architectures") or ["model of no named class"])[0]
    if theirs not in CLASSES:
        raise UserError(f"{folder} holds a {theirs}; the architectures that are known are {', '.join(CLASSES)}")
    architecture = CLASSES[theirs]
    if content.get("quantization_config"):
        method = str(content["quantization_config"].get("quant_method", "an unknown method")).upper()
        raise UserError(
            f"{folder} is quantized ({method}), and its weights would have to be unpacked as that program does; take "
            "the model that it was made from, or a GGUF file of it"
        )
    if "num_local_experts" in content:  # as newer versions of `transformers` write it
        content = {"num_experts": content["num_local_experts"], **content}
    sizes = column(SIZES, architecture)
    values = DEFAULTS[theirs] | ({} if architecture == "gpt2" else ROPE_DEFAULTS) | content
    refuse_unknown_fields(content, folder, {name for _, name in sizes}, ignored)
    missing = [name for _, name in sizes if name not in values]
    if missing:
        raise UserError(f"config.json in {folder} lacks {', '.join(missing)}; fetch it again")
    fields: dict[str, Any] = {**SWITCHES[architecture], **{ours: values[name] for ours, name in sizes}}
    notes = []
    if architecture == "gpt2":
        fields["bias"] = True
    else:
        fields |= biases_of(values, theirs)
        fields |= positions_of(values, folder)
    if max_seq_len:
        if architecture == "gpt2" and max_seq_len > fields["max_seq_len"]:
            raise UserError(
                f"--max_seq_len {max_seq_len} is beyond the {fields['max_seq_len']} positions that this model learned"
            )
        notes.append(f"the context is {max_seq_len} tokens, as asked, of {fields['max_seq_len']}")
        fields["max_seq_len"] = max_seq_len
    is_used = theirs == "MistralForCausalLM" or values.get("use_sliding_window")
    window = values.get("sliding_window") if is_used else None
    kinds = set(values.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"} and window is None:
        window = values.get("sliding_window")
    if kinds - {"full_attention", "sliding_attention"} or (window is not None and fields["max_seq_len"] > window):
        raise UserError(
            f"config.json in {folder} has sliding_window {window}: tokens see no further than that, which is not known "
            f"here; with --max_seq_len {window or 'WINDOW'} the window changes nothing, and the model can be taken in"
        )
    return GPTConfig(**{**fields, "pad_token_id": 0}), theirs, notes


def refuse_unknown_fields(content: dict[str, Any], folder: Path, sizes: set[str], ignored: tuple[str, ...]) -> None:
    """Name the fields that may change the function, and are not known here or have another value than is known.

    Raises:
        UserError: there are some.
    """
    unknown = []
    for name, value in content.items():
        if name in MUST_BE:
            if value not in MUST_BE[name]:
                unknown.append(f"{name} {value!r}")
        elif name not in sizes | READ | ELSEWHERE and not name.startswith("_") and value is not None:
            unknown.append(f"{name} {json.dumps(value)[:60]}")
    unknown = [field for field in unknown if field.partition(" ")[0] not in ignored]
    if unknown:
        raise UserError(
            f"config.json in {folder} has {', '.join(unknown)}, which may change what the model computes and is not "
            "known here; if you know that a field changes nothing, name it with --ignore_fields"
        )


def biases_of(values: dict[str, Any], theirs: str) -> dict[str, Any]:
    """Which layers have biases."""
    if theirs == "Qwen2ForCausalLM":
        return {"bias": False}
    of_attention = bool(values.get("attention_bias", False)) and theirs != "MistralForCausalLM"
    of_mlp = bool(values.get("mlp_bias", False)) and theirs == "LlamaForCausalLM"
    return {"bias": False, "qkv_bias": of_attention, "attention_output_bias": of_attention, "mlp_bias": of_mlp}


def positions_of(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Base and scaling of the rotary positions, and the context that they reach.

    Raises:
        UserError: a kind of scaling that is not known.
    """
    parameters = dict(values.get("rope_scaling") or {}) | dict(values.get("rope_parameters") or {})
    theta = parameters.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    kind = parameters.pop("rope_type", None) or parameters.get("type") or "default"
    parameters.pop("type", None)
    if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"config.json in {folder} has a partial_rotary_factor, which is not known here")
    context = values["max_position_embeddings"]
    if kind == "default":
        return {"rope_theta": theta, "max_seq_len": context}
    if kind == "linear":
        parameters.pop("original_max_position_embeddings", None)
    elif kind == "dynamic":  # there max_position_embeddings is what the model was trained with
        parameters["original_max_position_embeddings"] = context
    elif kind == "yarn":
        parameters.setdefault("original_max_position_embeddings", context)
        parameters.setdefault("factor", context / parameters["original_max_position_embeddings"])
    if kind in ("dynamic", "yarn") and isinstance(parameters.get("factor"), int | float):
        context = max(context, math.floor(parameters["factor"] * parameters["original_max_position_embeddings"]))
    given = {name: value for name, value in parameters.items() if value is not None}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **given}, "max_seq_len": context}


# -- weights -----------------------------------------------------------------------------------------------------------


class WeightFiles:
    """The tensors of a folder: safetensors, or what `torch.save` wrote; in one file, or in shards with an index.

    Raises:
        UserError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, config: GPTConfig) -> None:
        self.folder, self.config = folder, config
        self.file_of = self._find()  # name → file
        base = next(iter(parts_of(config))).split(".")[0] + "."  # "transformer." or "model."
        bare = not any(name.startswith(base) for name in self.file_of)
        self.prefix = base if bare else ""  # a folder of the class without a head leaves it out

    def _find(self) -> dict[str, Path]:
        for name in ("model.safetensors", "pytorch_model.bin"):
            index = self.folder / f"{name}.index.json"
            if index.is_file():
                shards = read_json(index, "").get("weight_map")
                if not isinstance(shards, dict):
                    raise UserError(f"{index} is damaged (it has no weight_map); fetch it again")
                files = {tensor: self.folder / Path(str(shard)).name for tensor, shard in shards.items()}
                missing = sorted({path.name for path in files.values() if not path.is_file()})
                if missing:
                    raise UserError(f"{self.folder} lacks {', '.join(missing)}, which {index.name} names; fetch it")
                for path in set(files.values()):
                    held = self._names(path)
                    absent = next((tensor for tensor, file in files.items() if file == path and tensor not in held), "")
                    if absent:
                        raise UserError(f"{path} lacks the tensor {absent}, which {index.name} names; fetch it again")
                return files
            if (self.folder / name).is_file():
                return dict.fromkeys(self._names(self.folder / name), self.folder / name)
        raise UserError(f"{self.folder} has neither model.safetensors nor pytorch_model.bin; fetch the weights")

    def _names(self, path: Path) -> list[str]:
        return list(_opened(path).keys())

    def _stored(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor by its name in `transformers`."""
        file = _opened(self.file_of[self._stored(name)])
        if isinstance(file, dict):
            return tuple(file[self._stored(name)].shape)
        return tuple(file.get_slice(self._stored(name)).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its name in `transformers`, mapped from the file where that can be done."""
        file = _opened(self.file_of[self._stored(name)])
        return file[self._stored(name)] if isinstance(file, dict) else file.get_tensor(self._stored(name))

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(our name, tensor) of all weights, of tensor after tensor."""
        for name, tensor in weights_from_transformers(self.config, self.read):
            yield name, tensor[: self.config.max_seq_len] if name == "position_embedding.weight" else tensor

    def kind(self) -> str:
        """In which type the matrices lose nothing and waste nothing."""
        return kind_of_all({self._dtype(name) for name in self.used if len(self.shape(name)) > 1})

    def _dtype(self, name: str) -> torch.dtype | str:
        """In which type a tensor is stored; a type that is not read here by its name."""
        file, stored = _opened(self.file_of[self._stored(name)]), self._stored(name)
        found = file[stored].dtype if isinstance(file, dict) else file.get_slice(stored).get_dtype()
        return FLOATS.get(found, found)

    def checked_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all weights by our names.

        Raises:
            UserError: a tensor is missing, of another shape, or not known.
        """
        expected, self.used = expected_shapes(self.config), []
        transposed = architecture_of(self.config) in TRANSPOSED
        for theirs, ours in parts_of(self.config).items():
            for kind in ("weight", "bias"):
                names = [f"{name}.{kind}" for name in ours if f"{name}.{kind}" in expected]
                if not names:
                    continue
                theirs_now = f"{theirs}.{kind}"
                if self._stored(theirs_now) not in self.file_of:
                    raise UserError(f"{self.folder} lacks the tensor {self._stored(theirs_now)}; fetch it again")
                self.used.append(theirs_now)
                shape = (sum(expected[name][0] for name in names), *expected[names[0]][1:])
                shape = shape[::-1] if transposed and ours[0].startswith("layers.") else shape
                found = self.shape(theirs_now)
                longer = names == ["position_embedding.weight"] and found[0] > shape[0] and found[1:] == shape[1:]
                if found != shape and not longer:
                    raise UserError(
                        f"{self._stored(theirs_now)} in {self.folder} has the shape {found}, and by config.json it "
                        f"should have {shape}"
                    )
                if (dtype := self._dtype(theirs_now)) not in FLOATS.values():
                    raise UserError(
                        f"{self._stored(theirs_now)} in {self.folder} is stored as {dtype}, which only the program "
                        "that made it can unpack; take the model with weights of 16 or 32 bits"
                    )
        head = {"lm_head.weight"} if self.config.tie_embeddings else set()  # written twice, or once
        known = {self._stored(name) for name in self.used} | head
        rest = [name for name in self.file_of if name not in known and not name.endswith(BUFFERS)]
        if rest:
            raise UserError(
                f"{self.folder} has tensors that a {MODELS[architecture_of(self.config)]} by its config.json does not "
                f"have: {', '.join(sorted(rest)[:3])}{' …' if len(rest) > 3 else ''}"
            )
        return expected


# What older versions of `transformers` saved although it follows from the configuration
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@functools.lru_cache(maxsize=64)
def _open_once(path: Path, changed: int) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, "pt")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut off ({error}); fetch it again") from None
    except Exception as error:  # torch.load has no exception type of its own for foreign content
        raise UserError(
            f"{path} cannot be read as weights alone, and nothing else in it is executed ({str(error)[:80]}); take a "
            "safetensors file"
        ) from None
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        raise UserError(f"{path} holds something else than weights; take a safetensors file")
    return content


def _opened(path: Path) -> Any:
    """A file of weights, opened: a safetensors handle, or a dictionary of tensors."""
    return _open_once(path, path.stat().st_mtime_ns)
