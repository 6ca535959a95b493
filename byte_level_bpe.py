"""Text ⇄ token ids: byte-level byte-pair encoding.

A text is cut into words, digits and punctuation (`PRETOKENIZER_PATTERN`), each piece into its UTF-8 bytes, and then
neighbours are merged, always the pair that training found first (Sennrich et al. 2016, "Neural Machine Translation of
Rare Words with Subword Units", section 3.2; over bytes: Radford et al. 2019, "Language Models are Unsupervised
Multitask Learners", section 2.2). Every byte is a token, so no text is ever unknown and `decode(encode(text))` is the
text, whatever the script.

    python byte_level_bpe.py --input data/pretrain/train.txt --vocab_size 4096 --output_dir models/bpe_tokenizer

The work is done by Rust: `rustbpe` trains, `gigatoken` encodes, `tokenizers` does the rest and stands in where the
others cannot. The saved folder loads in `transformers` as well. Folders of GPT-2 and of Qwen load here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from command_line import UserError, option, parse_config, replacing, require_writable_folder, run_main
from progress import Progress, told_from_outside
from text.bpe_training import TextSample, byte_of_character, learn_merges, written
from text.chat_template import (
    CHATML_SPECIAL_TOKENS,
    CHATML_TEMPLATE,
    DEFAULT_CHAT_TEMPLATE,
    ROLES,
    TEMPLATES,
    ChatTemplate,
    Message,
    check_messages,
)
from text.fast_encoding import FastEncoder, fast_encoder, ids_of
from text.text_files import ReadingOptions, UnreadRecords
from text.tokenizer_files import (
    KNOWN_FILES,
    SAVED_FILES,
    SPECIAL_ROLES,
    SPECIAL_STRINGS,
    TokenizerParts,
    byte_pre_tokenizer,
    puts_first,
    read_tokenizer_files,
)
from text.tokenizer_report import SampledDocuments, examine, write_report

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # in the order of SPECIAL_ROLES
BYTE_COUNT = 256
SAMPLE_BYTES = 30_000_000  # of text to learn from: more changes hardly a token, and takes memory and time
IGNORED_LABEL = -100  # positions with this label count for nothing in the loss


class ByteLevelBPETokenizer:
    """A byte-level BPE tokenizer with its special tokens and its chat template.

    Before training it knows single bytes only, and already encodes every text.

    Args:
        vocab_size: how many tokens training aims at, special tokens and the 256 bytes included.
        special_tokens: their ids are 0, 1, 2, …; the first four are the beginning of a text, padding, the end of a
            text, and unknown.
        special_strings: what the strings of special tokens are in the documents of a corpus, see `encode_documents`.

    Raises:
        UserError: vocab_size leaves no room for the bytes, or the special tokens are unusable.
    """

    def __init__(
        self, vocab_size: int = 4096, special_tokens: Sequence[str] = SPECIAL_TOKENS, special_strings: str = "text"
    ):
        special_tokens = tuple(special_tokens)
        smallest = BYTE_COUNT + len(special_tokens)
        if vocab_size < smallest:
            raise UserError(
                f"vocab_size is {vocab_size}, but the {BYTE_COUNT} bytes and {len(special_tokens)} special tokens "
                f"already need {smallest}; choose a larger one"
            )
        _check_special_tokens(special_tokens)
        self._wanted_vocab_size: int | None = vocab_size
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        engine = Tokenizer(models.BPE({token: index for index, token in enumerate((*special_tokens, *alphabet))}, []))
        engine.pre_tokenizer = byte_pre_tokenizer()
        engine.decoder = decoders.ByteLevel()
        engine.add_special_tokens(list(special_tokens))
        # So that `transformers` puts <s> before a text as `encode` does.
        engine.post_processor = processors.TemplateProcessing(
            single=[special_tokens[0], "$A"], special_tokens=[(special_tokens[0], 0)]
        )
        roles = dict(zip(SPECIAL_ROLES, special_tokens, strict=False))
        self._adopt(TokenizerParts(engine, roles, True, DEFAULT_CHAT_TEMPLATE, special_strings=special_strings))

    def _adopt(self, parts: TokenizerParts) -> None:
        self._engine, self._roles, self._adds_bos = parts.engine, parts.roles, parts.adds_bos
        self._generation = parts.generation
        self._engine.encode_special_tokens = True  # its name misleads: their strings in a text are encoded as text
        self._engine.no_padding()
        self._engine.no_truncation()
        self.special_strings = parts.special_strings
        self._engine_of_documents: Tokenizer | None = None
        if parts.special_strings == "special":  # an engine of its own: a switch would reach other threads' prompts
            self._engine_of_documents = Tokenizer.from_str(self._engine.to_str())
        self._chat_template = ChatTemplate(parts.chat_template, parts.roles)
        added = self._engine.get_added_tokens_decoder().values()
        self._special_tokens = [token.content for token in added if token.special]
        self._vocab_size = max(self.vocab.values()) + 1
        self._bytes_of_tokens: dict[int, bytes] | None = None  # made when it is first asked for
        self._encoder: FastEncoder | None = None
        self._encoder_is_known = False  # it, too, is made when something is to be encoded

    @classmethod
    def with_template(
        cls, vocab_size: int, template: str, special_strings: str = "text"
    ) -> ByteLevelBPETokenizer:
        """An untrained tokenizer with the "plain" template, or with "chatml", whose marks are special tokens."""
        if template != "chatml":
            return cls(vocab_size, special_strings=special_strings)
        tokenizer = cls(vocab_size, CHATML_SPECIAL_TOKENS, special_strings)
        tokenizer.chat_template = CHATML_TEMPLATE
        return tokenizer

    # -- training ------------------------------------------------------------------------------------------------------

    def train(
        self,
        texts: Iterable[str],
        min_frequency: int = 2,
        *,
        sample_bytes: int | None = SAMPLE_BYTES,
        show_progress: bool = False,
    ) -> TextSample:
        """Learn merges from texts, which are read once, one after another.

        Fewer than `vocab_size` tokens come out when the texts are too small to yield more.

        Args:
            texts: documents, in any number.
            min_frequency: a merge must be made this often to give a token.
            sample_bytes: of more text than this, every second, fourth, … document is learned from; None: all.
            show_progress: say how far it is, see `progress.Progress`.

        Returns:
            How much was read, and how much of it was learned from.

        Raises:
            UserError: min_frequency below 1, no text at all, or a tokenizer that was loaded: its ids are in use.
        """
        if self._wanted_vocab_size is None:
            raise UserError("a loaded tokenizer cannot be trained again; make a new one and train that")
        if min_frequency < 1:
            raise UserError(f"min_frequency is {min_frequency}; it must be at least 1")
        sample = TextSample(sample_bytes)
        with Progress("reading text", unit="B", shown=show_progress) as progress:
            for text in texts:
                progress.update(sample.add(_replace_lone_surrogates(text)))
        if sample.n_bytes == 0:
            raise UserError("there is no text to train the tokenizer on; give at least one document")
        n_merges = self._wanted_vocab_size - BYTE_COUNT - len(self._special_tokens)
        with told_from_outside(f"learning merges from {sample.size / 1e6:,.1f} MB", show_progress):
            merges = learn_merges(sample, n_merges, min_frequency) if n_merges else []
        tokens = [written(left + right) for left, right in merges]
        content = json.loads(self._engine.to_str())
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        names = dict.fromkeys((*self._special_tokens, *alphabet, *tokens))  # two merges can give the same token
        content["model"]["vocab"] = {token: index for index, token in enumerate(names)}
        content["model"]["merges"] = [[written(left), written(right)] for left, right in merges]
        engine = Tokenizer.from_str(json.dumps(content))
        template, strings = self.chat_template, self.special_strings
        self._adopt(TokenizerParts(engine, self._roles, self._adds_bos, template, special_strings=strings))
        return sample

    # -- text and ids --------------------------------------------------------------------------------------------------

    def encode(
        self, text: str, max_seq_len: int | None = None, add_special_tokens: bool = True
    ) -> dict[str, list[int]]:
        """The ids of a text that may be continued: nothing follows it, neither `</s>` nor padding.

        The strings of special tokens inside `text` are ordinary text. Half of a surrogate pair, which has no UTF-8,
        counts as U+FFFD.

        Args:
            text: any string.
            max_seq_len: keep at most this many ids, from the beginning.
            add_special_tokens: put `<s>` before the text (where the tokenizer has such a token).

        Returns:
            `{"input_ids": [...], "attention_mask": [1, ...]}`, of equal length.
        """
        if max_seq_len is not None and max_seq_len < 1:
            raise UserError(f"max_seq_len is {max_seq_len}; it must be at least 1")
        text = _replace_lone_surrogates(text)
        encoder = self._fast_encoder()
        input_ids = encoder.encode(text) if encoder else ids_of(self._engine, [text])[0]
        if add_special_tokens and self._adds_bos:
            input_ids.insert(0, self.bos_token_id)
        input_ids = input_ids[:max_seq_len]
        return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids)}

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """The ids of many texts, encoded in parallel; see `encode`."""
        texts, encoder = [_replace_lone_surrogates(text) for text in texts], self._fast_encoder()
        ids = encoder.encode_batch(texts) if encoder else ids_of(self._engine, texts)
        return self._with_prefix(ids) if add_special_tokens else ids

    def encode_documents(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """The ids of documents of a corpus, as pretraining and its scores read them.

        As `encode_batch`, unless `special_strings` is "special": then `<unk>`, `</s>` and the others, where they stand
        in a document, are the special tokens, which is what some corpora mean by them (WikiText's rare words) and what
        `transformers` reads. Prompts and conversations never are read so: a user's words are text.
        """
        if self._engine_of_documents is None:
            return self.encode_batch(texts, add_special_tokens)
        ids = ids_of(self._engine_of_documents, [_replace_lone_surrogates(text) for text in texts])
        return self._with_prefix(ids) if add_special_tokens else ids

    def _with_prefix(self, ids: list[list[int]]) -> list[list[int]]:
        prefix = self.prefix_ids
        return [[*prefix, *one] for one in ids] if prefix else ids

    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of documents of a corpus (see `encode_documents`) as arrays; the fastest way to encode much.

        Returns:
            All ids, one text after another, (M,) uint32; where each text begins and the last one ends, (N + 1,) int64.
        """
        texts, encoder = [_replace_lone_surrogates(text) for text in texts], self._fast_encoder()
        if encoder and texts and self._engine_of_documents is None:
            return encoder.encode_arrays(texts)
        ids = ids_of(self._engine_of_documents or self._engine, texts)
        borders = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        return np.fromiter(chain.from_iterable(ids), np.uint32, borders[-1]), borders

    def _fast_encoder(self) -> FastEncoder | None:
        if not self._encoder_is_known:
            self._encoder, self._encoder_is_known = fast_encoder(self._engine), True
        return self._encoder

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids (a list, an array or a 1-D tensor). Bytes that are not UTF-8 become U+FFFD."""
        return self._engine.decode([int(index) for index in ids], skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, which may be part of a character; none for a special token."""
        if self._bytes_of_tokens is None:
            special = set(self._special_tokens)
            self._bytes_of_tokens = {
                index: b"" if token in special else _bytes_of_token(token) for token, index in self.vocab.items()
            }
        return self._bytes_of_tokens.get(token_id, b"")

    # -- conversations -------------------------------------------------------------------------------------------------

    @property
    def chat_template(self) -> str:
        """The Jinja template that turns messages into text."""
        return self._chat_template.source

    @chat_template.setter
    def chat_template(self, source: str) -> None:
        self._chat_template = ChatTemplate(source, self._roles)

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """A conversation as text, to be read by people; for ids use `encode_chat`, which keeps text and tokens apart.

        Raises:
            UserError: a message is malformed, or the template rejects the conversation.
        """
        check_messages(messages)
        return self._chat_template.render(messages, add_generation_prompt)

    @property
    def template_knows_tools(self) -> bool:
        """Whether the chat template takes tools, calls and results as they are; see `ChatTemplate.knows_tools`."""
        return self._chat_template.knows_tools

    @property
    def template_marks(self) -> list[str]:
        """The plain text with which a user would open a turn; see `ChatTemplate.marks`."""
        return self._chat_template.marks(self._special_tokens)

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, list[int]]:
        """The ids of a conversation and the labels to train on it.

        Nothing is added to what the template renders. With a template that knows tools, `tools`, messages of the role
        "tool" and `tool_calls` go into it as they are. The ids of a prompt (`add_generation_prompt=True`) are an exact
        prefix of the ids of the same conversation with its answer.

        Returns:
            `{"input_ids": [...], "labels": [...]}`, of equal length; a label is the id itself where the assistant
            speaks, through the token that closes the answer, and -100 elsewhere.

        Raises:
            UserError: a message is malformed, the template rejects the conversation, or it is not prefix-consistent.
        """
        check_messages(messages, (*ROLES, "tool") if self.template_knows_tools else ROLES)
        segments = self._chat_template.segments(messages, self._special_tokens, add_generation_prompt, tools)
        plain = [text for segment in segments for text, is_special in segment.pieces if not is_special]
        plain_ids = iter(self.encode_batch(plain))
        input_ids: list[int] = []
        labels: list[int] = []
        for segment in segments:
            ids, answer_length = [], 0
            for text, is_special in segment.pieces:
                ids += [self._engine.token_to_id(text)] if is_special else next(plain_ids)
                if is_special:
                    answer_length = len(ids)  # what follows the closing token, like ChatML's line break, is context
            if not segment.is_answer:
                answer_length = 0
            elif answer_length == 0:
                answer_length = len(ids)  # the template closes answers by text only
            input_ids += ids
            labels += ids[:answer_length] + [IGNORED_LABEL] * (len(ids) - answer_length)
        return {"input_ids": input_ids, "labels": labels}

    # -- what it consists of -------------------------------------------------------------------------------------------

    @property
    def vocab(self) -> dict[str, int]:
        """Tokens, in the byte alphabet of GPT-2 (`Ġ` is a space), and their ids."""
        return self._engine.get_vocab(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """The number of rows that an embedding for these ids needs."""
        return self._vocab_size

    def __len__(self) -> int:
        return self._vocab_size

    def _role_id(self, role: str) -> int | None:
        token = self._roles.get(role)
        return None if token is None else self._engine.token_to_id(token)

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token before a text; None where the tokenizer has none (Qwen)."""
        return self._role_id("bos_token")

    @property
    def eos_token_id(self) -> int:
        """The id of the token that ends a text or an answer."""
        return self._role_id("eos_token")

    @property
    def prefix_ids(self) -> list[int]:
        """What `encode` puts before a text: the id of `bos_token`, or nothing."""
        return [self.bos_token_id] if self._adds_bos else []

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The ids of all tokens that end an answer: `eos_token_id`, and what else the model that came with this
        tokenizer was trained to end with (`generation_config.json`)."""
        named = self._generation.get("eos_token_id")
        named = named if isinstance(named, list) else [named]
        others = (i for i in named if isinstance(i, int) and 0 <= i < self.vocab_size)
        return tuple(dict.fromkeys((self.eos_token_id, *others)))

    @property
    def generation_defaults(self) -> dict[str, float]:
        """The sampling settings that the model's makers recommend (`generation_config.json`), by the names of
        `SamplingParams`; empty where they say nothing."""
        if self._generation.get("do_sample") is False:
            return {"temperature": 0.0}
        if not self._generation.get("do_sample"):
            return {}
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {name: self._generation[name] for name in names if self._generation.get(name) is not None}

    @property
    def pad_token_id(self) -> int:
        """The id that fills up a batch; the end-of-text token where the tokenizer has none of its own (GPT-2)."""
        pad = self._role_id("pad_token")
        return self.eos_token_id if pad is None else pad

    @property
    def unk_token_id(self) -> int | None:
        """The id of the unknown token, which no text ever yields; None where the tokenizer has none."""
        return self._role_id("unk_token")

    @property
    def fingerprint(self) -> str:
        """The SHA-256, in hexadecimal, of all that decides about ids: vocabulary, merges, special tokens, template."""
        files = self.to_files()
        parts = [json.loads(files[name]) for name in ("tokenizer.json", "tokenizer_config.json")]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    # -- files ---------------------------------------------------------------------------------------------------------

    def to_files(self) -> dict[str, str]:
        """What `save` writes: file names and their contents."""
        content = self._engine.to_str(pretty=True)
        model = json.loads(content)["model"]
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,  # decoding must not "tidy" the text
            "chat_template": self.chat_template,
            **self._roles,  # null for a role that no token plays, so that no loader assumes one
        }
        if self.special_strings != "text":
            config["special_strings"] = self.special_strings
        if self.bos_token_id is not None and self._adds_bos != puts_first(self._engine, self._roles["bos_token"]):
            config["add_bos_token"] = self._adds_bos
        more = {"generation_config.json": json.dumps(self._generation, indent=2) + "\n"} if self._generation else {}
        return {
            **more,
            "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
            "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"]),
            "tokenizer.json": content,
        }

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's folder. Stopped half-way, it leaves a folder that does not load, never half of one.

        Raises:
            UserError: the folder cannot be written.
        """
        directory, files = Path(directory), self.to_files()
        try:
            with contextlib.ExitStack() as moves:  # made when all is written, in the order of SAVED_FILES
                for name in (*reversed(SAVED_FILES), *(files.keys() - set(SAVED_FILES))):
                    file = moves.enter_context(replacing(directory / name))
                    file.write(files[name].encode())
                    file.flush()  # a full disk shows here
                # No tokenizer.json, no tokenizer: the old one goes first and the new one comes last.
                (directory / "tokenizer.json").unlink(missing_ok=True)
        except OSError as error:
            remedy = "free some space or choose another folder"
            raise UserError(f"the tokenizer cannot be saved in {directory} ({error.strerror}); {remedy}") from None

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ByteLevelBPETokenizer:
        """Load a folder that `save` wrote, or one of GPT-2 or Qwen as it is published.

        The latter are used as they are: Qwen composes characters (NFC), so a decomposed one comes back composed.

        Raises:
            UserError: there is no such folder, or it does not hold a sound byte-level BPE tokenizer.
        """
        directory = Path(directory)
        remedy = f"train one with `python byte_level_bpe.py --input TEXT --output_dir {directory}`"
        if not directory.is_dir():
            raise UserError(f"there is no tokenizer folder {directory}; {remedy}")
        try:
            files = {
                name: (directory / name).read_text(encoding="utf-8")
                for name in KNOWN_FILES
                if (directory / name).is_file()
            }
            return cls.from_files(files)
        except (UserError, UnicodeDecodeError, OSError) as error:
            raise UserError(f"the tokenizer folder {directory} cannot be used: {error}; {remedy}") from None

    @classmethod
    def from_files(cls, files: Mapping[str, str]) -> ByteLevelBPETokenizer:
        """Load from file names and contents, as `to_files` returns them.

        Raises:
            UserError: a file is missing or damaged, or this is not a byte-level BPE tokenizer.
        """
        tokenizer = cls.__new__(cls)
        tokenizer._wanted_vocab_size = None
        tokenizer._adopt(read_tokenizer_files(files))
        return tokenizer

    def __reduce__(self) -> tuple:
        return ByteLevelBPETokenizer.from_files, (self.to_files(),)  # the engine's own pickle forgets its switches


def _check_special_tokens(special_tokens: tuple[str, ...]) -> None:
    if len(special_tokens) < len(SPECIAL_ROLES) or len(set(special_tokens)) < len(special_tokens):
        raise UserError(f"special_tokens needs {len(SPECIAL_ROLES)} or more different strings like {SPECIAL_TOKENS}")
    for token in special_tokens:
        # Merges stay inside one piece, so a token that is cut into several cannot be merged out of ordinary text.
        if len(byte_pre_tokenizer().pre_tokenize_str(token)) < 2:
            raise UserError(f"the special token {token!r} could arise from ordinary text; write it like '<{token}>'")


BYTE_OF_CHARACTER = byte_of_character()


def _bytes_of_token(token: str) -> bytes:
    if all(character in BYTE_OF_CHARACTER for character in token):
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    return token.encode()  # a token that was added as plain text


def _replace_lone_surrogates(text: str) -> str:
    if text.isascii():  # which is known without looking at it
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


# -- command line ------------------------------------------------------------------------------------------------------


@dataclass
class TokenizerTrainingConfig(ReadingOptions):
    """Options of `python byte_level_bpe.py`."""

    input: list[str] = option(list, "text files, folders of them, or names without ending; none: the sample data")
    vocab_size: int = option(
        4096, "how many tokens, the bytes and the special tokens included", at_least=BYTE_COUNT + len(SPECIAL_TOKENS)
    )
    min_frequency: int = option(2, "how often a pair must occur to become a token", at_least=1)
    chat_template: str = option(
        "plain", "how conversations are written; chatml: with marks that a user's text cannot hold", choices=TEMPLATES
    )
    sample_bytes: int = option(
        SAMPLE_BYTES, "of more text than this, every second, fourth, … document is learned from; 0: all", at_least=0
    )
    special_strings: str = option(
        "text",
        "what strings such as <unk> and </s> are in the documents of a corpus: text, or special tokens, as in WikiText",
        choices=SPECIAL_STRINGS,
    )
    output_dir: str = option("models/bpe_tokenizer", "where to save the tokenizer and a report on it")

    def validate(self) -> list[str]:
        complaints = self.reading_complaints()
        if Path(self.output_dir).is_file():
            complaints.append(f"--output_dir {self.output_dir} is a file; name a folder")
        return complaints


def main(argv: list[str] | None = None) -> None:
    """Train a tokenizer on text files and save it."""
    config = parse_config(TokenizerTrainingConfig, argv, description="Train a byte-level BPE tokenizer.")
    require_writable_folder(config.output_dir)
    unread = UnreadRecords(Path(config.output_dir) / "left_out.jsonl")
    documents = SampledDocuments(config.input or ["data/pretrain/train"], config, unread)
    tokenizer = ByteLevelBPETokenizer.with_template(config.vocab_size, config.chat_template, config.special_strings)
    sample = tokenizer.train(
        documents,
        config.min_frequency,
        sample_bytes=config.sample_bytes or None,
        show_progress=True,
    )
    tokenizer.save(config.output_dir)
    figures = examine(tokenizer, documents.sample)
    write_report(figures, Path(config.output_dir))
    if unread.count:
        print(unread)
    special = [text for text in documents.sample if any(token in text for token in SPECIAL_TOKENS)]
    if special and config.special_strings == "text":
        share = len(special) / len(documents.sample)
        print(
            f"{share:.1%} of the documents of a sample hold the string of a special token, such as <unk>, which is "
            "read as text; where the corpus means the token, add --special_strings special"
        )
    if sample.step > 1:
        print(
            f"learned from one in {sample.step} of {sample.n_texts:,} texts, {sample.size / 1e6:.1f} of "
            f"{sample.n_bytes / 1e6:.1f} MB (--sample_bytes {config.sample_bytes})"
        )
    scripts = ", ".join(f"{name} {value:.2f}" for name, value in figures["bytes_per_token"].items() if name != "all")
    print(
        f"tokenizer: {len(tokenizer)} tokens, {figures['bytes_per_token']['all']:.2f} bytes per token on a sample of "
        f"the input{f' ({scripts})' if scripts else ''}, {figures['unused']:.1%} of the tokens unused there, saved in "
        f"{config.output_dir} with report.json and report.png"
    )


if __name__ == "__main__":
    run_main(main)
