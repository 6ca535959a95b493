"""Tokenizer folders, ours and published ones, from their files to a working engine.

Published byte-level BPE tokenizers come in two layouts. The newer has everything in `tokenizer.json`. The older has
`vocab.json` and `merges.txt`, and leaves it to the class that loads it (GPT-2's or Qwen2's) how a text is cut into
pieces. Around both stand `tokenizer_config.json` and some smaller files, which name the special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from command_line import UserError
from text.chat_template import DEFAULT_CHAT_TEMPLATE

# What `save` writes, in this order: while tokenizer.json is missing, the folder does not load.
SAVED_FILES = ("tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.json")
KNOWN_FILES = (
    *SAVED_FILES, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json"
)  # fmt: skip
SPECIAL_STRINGS = ("text", "special")  # what the strings of special tokens are in the documents of a corpus
SPECIAL_ROLES = ("bos_token", "pad_token", "eos_token", "unk_token")

# Qwen2's: contractions, words with the mark or space before them, single digits, punctuation, line breaks, spaces
PRETOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass
class TokenizerParts:
    """What a tokenizer consists of.

    Attributes:
        engine: the Rust tokenizer.
        roles: the special token that plays each of `SPECIAL_ROLES`, or None.
        adds_bos: whether a text is encoded with `bos_token` before it.
        chat_template: a Jinja template.
        generation: what a `generation_config.json` says of the model's end tokens and of sampling; empty without one.
        special_strings: one of `SPECIAL_STRINGS`.
    """

    engine: Tokenizer
    roles: dict[str, str | None]
    adds_bos: bool
    chat_template: str
    generation: dict[str, Any] = field(default_factory=dict)
    special_strings: str = "text"


def byte_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Cuts a text by `PRETOKENIZER_PATTERN`, then writes each byte as one of GPT-2's 256 printable characters.

    Why this pattern: a word may take the mark before it along, which suits Chinese (a clause with its opening quotation
    mark) and code (a name with its dot or bracket). With 8,192 tokens, held-out Song verse takes 6 % fewer tokens than
    by GPT-2's pattern and Python 3 % fewer, as many as by GPT-4's (cl100k) to 1 %. Every digit is a piece, so that
    numbers are read place by place; text full of sums takes 10 % more tokens for it than by GPT-4's, which cuts after
    three digits. `benchmarks/bench_tokenizer.py` compares them.

    Who takes it: `tokenizers`, `rustbpe` and `tiktoken` take any; `gigatoken` and llama.cpp know published patterns,
    and this one as Qwen2's. `gigatoken` trains by GPT-2's only.
    """
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZER_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def read_tokenizer_files(files: Mapping[str, str]) -> TokenizerParts:
    """Put a tokenizer together from file names and contents.

    Raises:
        UserError: a file is missing or damaged, or this is not a byte-level BPE tokenizer.
    """
    try:
        return _read(files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"one of its files is damaged ({type(error).__name__}: {error})") from None


def _read(files: Mapping[str, str]) -> TokenizerParts:
    config = _parse_object(files, "tokenizer_config.json")
    tokenizer_class = config.get("tokenizer_class") or ""
    is_qwen = tokenizer_class.startswith("Qwen2")
    if "tokenizer.json" in files:
        engine = _engine_from_json(files)
    elif {"vocab.json", "merges.txt"} <= set(files) and (is_qwen or tokenizer_class in ("", "GPT2Tokenizer")):
        engine = _engine_from_vocab_and_merges(files, config, is_qwen)
    else:
        raise UserError("tokenizer.json is missing")

    known = engine.get_vocab(with_added_tokens=True)
    # GPT-2's own folder names no special token; Qwen's classes have none before a text.
    usual = "<|endoftext|>" if "<|endoftext|>" in known else None
    defaults = {"bos_token": None if is_qwen else usual, "eos_token": usual}
    named = {**defaults, **_parse_object(files, "special_tokens_map.json"), **config}
    roles = {role: _token_string(named.get(role)) for role in SPECIAL_ROLES}
    for role, token in roles.items():
        if token is not None and token not in known:
            raise UserError(f"its {role} {token!r} is not in the vocabulary")
    if roles["eos_token"] is None:
        raise UserError("tokenizer_config.json names no eos_token, without which no answer ends")
    engine.add_special_tokens([token for token in roles.values() if token is not None])

    template = files.get("chat_template.jinja") or config.get("chat_template") or DEFAULT_CHAT_TEMPLATE
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}["default"]
    if not isinstance(template, str):
        raise UserError(f"its chat_template must be a Jinja text, not {template!r}")
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:
        adds_bos = "tokenizer.json" not in files or puts_first(engine, roles["bos_token"])
    generation = _parse_object(files, "generation_config.json")
    adds_bos = bool(adds_bos) and roles["bos_token"] is not None
    special_strings = config.get("special_strings", "text")
    if special_strings not in SPECIAL_STRINGS:
        raise UserError(f'its special_strings must be "text" or "special", not {special_strings!r}')
    return TokenizerParts(engine, roles, adds_bos, template, generation, special_strings)


def puts_first(engine: Tokenizer, token: str | None) -> bool:
    """Whether an engine by itself begins each text with this token."""
    engine.no_padding()
    return token is not None and engine.encode("", add_special_tokens=True).tokens[:1] == [token]


def _parse_object(files: Mapping[str, str], name: str) -> dict:
    try:
        content = json.loads(files.get(name, "{}"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{name} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} is damaged (it is not a JSON object)")
    return content


def _token_string(value: str | dict | None) -> str | None:
    """A special token as configurations write it: a string, or an object with its flags."""
    return value["content"] if isinstance(value, dict) else value


def _engine_from_json(files: Mapping[str, str]) -> Tokenizer:
    content = _parse_object(files, "tokenizer.json")
    model = content.get("model") or {}
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps(content.get("decoder")):
        raise UserError(
            f"tokenizer.json is not a byte-level BPE tokenizer (its model is {model.get('type')}); GPT-2, Llama 3, "
            "SmolLM2, Qwen2 and Qwen3 have one, while Llama 1 and 2, TinyLlama and Mistral have SentencePiece's"
        )
    try:
        return Tokenizer.from_str(files["tokenizer.json"])
    except Exception as error:  # the Rust library raises nothing more precise
        raise UserError(f"tokenizer.json is damaged ({error})") from None


def _engine_from_vocab_and_merges(files: Mapping[str, str], config: dict, is_qwen: bool) -> Tokenizer:
    vocab = _parse_object(files, "vocab.json")
    lines = [line.rstrip("\r") for line in files["merges.txt"].split("\n")]
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    try:
        engine = Tokenizer(models.BPE(vocab, merges))
    except Exception as error:  # the Rust library raises nothing more precise
        raise UserError(f"vocab.json and merges.txt do not fit together ({error})") from None
    if is_qwen:
        engine.normalizer = normalizers.NFC()
        engine.pre_tokenizer = byte_pre_tokenizer()
    else:
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    engine.decoder = decoders.ByteLevel()

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    added = {
        int(index): AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry})
        for index, entry in config.get("added_tokens_decoder", {}).items()
    }
    for token, index in _parse_object(files, "added_tokens.json").items():
        added.setdefault(index, AddedToken(token, special=True))
    for index, token in sorted(added.items()):
        engine.add_tokens([token])
        if engine.token_to_id(token.content) != index:
            raise UserError(f"its added token {token.content!r} should have the id {index}, which does not follow")
    return engine
