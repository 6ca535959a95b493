"""A tokenizer in the metadata of a GGUF file, and out of it.

llama.cpp has no description of how a text is cut into pieces, but names for the ways that it knows (`PRE_TOKENIZERS`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError
from text.tokenizer_files import PRETOKENIZER_PATTERN, SPECIAL_ROLES

Keys = gguf.Keys.Tokenizer
ROLE_KEYS = dict(zip(SPECIAL_ROLES, (Keys.BOS_ID, Keys.PAD_ID, Keys.EOS_ID, Keys.UNK_ID), strict=True))
LLAMA3_PATTERN = PRETOKENIZER_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SAME = {"gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


def _by_pattern(pattern: str) -> pre_tokenizers.PreTokenizer:
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), as_bytes])


PRE_TOKENIZERS = {  # by llama.cpp's names
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": _by_pattern(LLAMA3_PATTERN),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": _by_pattern(PRETOKENIZER_PATTERN),
}


def read_tokenizer(metadata: Mapping[str, Any], name: str) -> ByteLevelBPETokenizer:
    """The tokenizer that a GGUF file describes.

    Args:
        metadata: its keys and values; `name` is that of the file, for messages.

    Raises:
        UserError: it has none, or one of another kind.
    """
    model, pre = metadata.get(Keys.MODEL), metadata.get(Keys.PRE, "default")
    if model != "gpt2":
        raise UserError(
            f"{name} has a tokenizer of the kind {model!r} (llama means SentencePiece: Llama 1 and 2, TinyLlama, "
            "Mistral), and this project reads byte-level BPE (GPT-2, Llama 3, SmolLM2, Qwen2, Qwen3)"
        )
    pre = SAME.get(pre, pre)
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{name} cuts texts as {pre!r} does, which is not known; known are {', '.join(PRE_TOKENIZERS)}"
        )
    tokens, kinds = list(metadata[Keys.LIST]), list(metadata[Keys.TOKEN_TYPE])
    while kinds and kinds[-1] == gguf.TokenType.UNUSED:  # they only fill up the embedding
        tokens.pop()
        kinds.pop()
    ids = {role: metadata.get(key, -1) for role, key in ROLE_KEYS.items()}
    roles = {role: tokens[index] for role, index in ids.items() if 0 <= index < len(tokens)}
    adds_bos = bool(metadata.get(Keys.ADD_BOS, pre == "llama-bpe")) and "bos_token" in roles
    config: dict[str, Any] = {**dict.fromkeys(SPECIAL_ROLES), **roles}
    if Keys.HF_JSON not in metadata:  # which says it of texts, and the key of conversations, too
        config["add_bos_token"] = adds_bos
    if metadata.get(Keys.CHAT_TEMPLATE):
        config["chat_template"] = metadata[Keys.CHAT_TEMPLATE]
    files = {"tokenizer_config.json": json.dumps(config)}
    ends = [metadata[key] for key in (Keys.EOS_ID, Keys.EOT_ID) if key in metadata]
    if len(ends) > 1:
        files["generation_config.json"] = json.dumps({"eos_token_id": list(dict.fromkeys(ends))})
    try:
        whole = metadata.get(Keys.HF_JSON) or _engine(tokens, kinds, metadata, pre, adds_bos, roles).to_str()
        files["tokenizer.json"] = whole
        return ByteLevelBPETokenizer.from_files(files)
    except Exception as error:  # the Rust library raises nothing more precise
        raise UserError(f"the tokenizer in {name} cannot be used: {error}") from None


def _engine(
    tokens: list[str], kinds: list[int], metadata: Mapping[str, Any], pre: str, adds_bos: bool, roles: dict[str, str]
) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata[Keys.MERGES]]
    engine = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    engine.pre_tokenizer, engine.decoder = PRE_TOKENIZERS[pre], decoders.ByteLevel()
    if pre == "qwen2":
        engine.normalizer = normalizers.NFC()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == gguf.TokenType.CONTROL:
            engine.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == gguf.TokenType.USER_DEFINED:
            engine.add_tokens([AddedToken(token, normalized=False, special=False)])
    if adds_bos:
        engine.post_processor = _beginning(roles["bos_token"], vocabulary[roles["bos_token"]])
    return engine


def _beginning(token: str, index: int) -> processors.PostProcessor:
    """What puts a token before each text."""
    return processors.TemplateProcessing(single=[token, "$A"], special_tokens=[(token, index)])


def _described(processor: processors.PostProcessor) -> dict[str, Any]:
    engine = Tokenizer(models.BPE())
    engine.post_processor = processor
    return json.loads(engine.to_str())["post_processor"]


def pre_tokenizer_name(tokenizer: ByteLevelBPETokenizer) -> str:
    """llama.cpp's name for how a tokenizer cuts texts.

    Raises:
        UserError: it has none.
    """
    own = json.loads(tokenizer.to_files()["tokenizer.json"])
    for name, known in PRE_TOKENIZERS.items():
        engine = Tokenizer(models.BPE())
        engine.pre_tokenizer = known
        if _essence(own["pre_tokenizer"]) == _essence(json.loads(engine.to_str())["pre_tokenizer"]):
            normalizer = (own.get("normalizer") or {}).get("type")
            if normalizer in (None, "NFC") and (normalizer is None or name == "qwen2"):
                return name
    raise UserError(
        "llama.cpp's name for how this tokenizer cuts texts is not known; known are "
        f"{', '.join(PRE_TOKENIZERS)}, so export a Hugging Face folder and use its converter"
    )


def _essence(pre_tokenizer: Any) -> Any:
    """A description without what changes no ids."""
    if isinstance(pre_tokenizer, list):
        return [_essence(part) for part in pre_tokenizer]
    if not isinstance(pre_tokenizer, dict):
        return pre_tokenizer
    return {name: _essence(value) for name, value in pre_tokenizer.items() if name != "trim_offsets"}


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: ByteLevelBPETokenizer, vocab_size: int, adds_bos: bool) -> None:
    """Put a tokenizer into the metadata of a GGUF file, and its tokenizer.json beside llama.cpp's own terms.

    Args:
        vocab_size: of the model; what the tokenizer does not fill is filled up.
        adds_bos: whether llama.cpp is to put the first token before each text, conversations included.

    Raises:
        UserError: llama.cpp has no name for how it cuts texts.
    """
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
    content = json.loads(tokenizer.to_files()["tokenizer.json"])
    names = {index: token for token, index in tokenizer.vocab.items()}
    tokens = [names.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    kinds = [gguf.TokenType.NORMAL if index in names else gguf.TokenType.UNUSED for index in range(vocab_size)]
    for added in content["added_tokens"]:
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    roles = json.loads(tokenizer.to_files()["tokenizer_config.json"])
    for role, key in ROLE_KEYS.items():
        if roles.get(role) is not None:
            writer.add_uint32(key, tokenizer.vocab[roles[role]])
    if len(tokenizer.end_token_ids) > 1:
        writer.add_eot_token_id(tokenizer.end_token_ids[1])
    writer.add_add_bos_token(adds_bos)
    writer.add_chat_template(tokenizer.chat_template)
    if "add_bos_token" in roles:  # said against what tokenizer.json does by itself
        first = tokenizer.decode(tokenizer.prefix_ids, False)
        content["post_processor"] = _described(_beginning(first, tokenizer.bos_token_id)) if first else None
    writer.add_string(Keys.HF_JSON, json.dumps(content, ensure_ascii=False, separators=(",", ":")))
