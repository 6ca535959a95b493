"""A conversation in the terminal, with a model on this machine or with a running service.

    python -m inference.chat --model_path models/rlhf/ppo_best.pth
    python -m inference.chat --url http://localhost:8000

Ctrl-C stops the answer, Ctrl-D leaves. The arrow keys bring back earlier lines. A pasted text of several lines is one
message; so is what stands between two lines of three quotes (\"\"\"). An API key is taken from the variable API_KEY.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

if not __package__:  # run as a file: modules are imported from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from command_line import UserError, option, parse_config, replacing, run_main
from inference.draft_model import SpeculationOptions
from inference.engine import Engine
from inference.quantizer import load_any
from inference.request import RequestFailed, encode_prompt, recommended_sampling
from inference.sampling import SamplingParams
from machine import PRECISIONS, resolve_device
from machine.native_code import cache_folder
from text.chat_template import Message

COMMANDS = """\
/system TEXT  set the system message; without TEXT, show it       /again      answer the last question once more
/reset        begin a new conversation                            /save PATH  write the conversation as JSON
/help         show this                                           /quit       leave"""
QUOTES = '"""'
HISTORY_LINES = 1000
PASTE_SECONDS = 0.02  # lines that follow each other sooner than a person types are one message
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}  # nothing for a terminal


@dataclass
class ChatConfig(SpeculationOptions):
    """The command line of the conversation."""

    model_path: str = option("models/sft/sft_best.pth", "the checkpoint, quantized or not")
    url: str = option("", "the address of a running service, instead of a checkpoint")
    system: str = option("", "the system message")
    temperature: float = option(0.8, "0 always takes the likeliest token", at_least=0, at_most=2)
    top_p: float = option(1.0, "sample from the likeliest tokens that have this probability", above=0, at_most=1)
    max_tokens: int = option(0, "longest answer; 0 means to the end of the model's context", at_least=0)
    seed: int | None = option(None, "makes sampling repeatable", at_least=0)
    device: str = option("auto", "auto, cpu, cuda or mps")
    precision: str = option(
        "auto", "what to compute in; auto: bf16 on a GPU, fp16 on one before Ampere, otherwise fp32", choices=PRECISIONS
    )
    num_threads: int = option(0, "CPU threads; 0 means as many as torch takes", at_least=0)

    def validate(self) -> list[str]:
        complaints = self.speculation_complaints()
        if self.url and not self.url.startswith(("http://", "https://")):
            complaints.append(f"--url must begin with http:// or https://, not {self.url!r}")
        for name in ("draft_model", "draft_texts"):
            if self.url and getattr(self, name):
                complaints.append(f"--url and --{name} do not go together; the service has an option of its own")
        return complaints


class ContextFull(Exception):
    """The conversation is longer than the model's context."""


class Partner(Protocol):
    """Whoever answers."""

    name: str
    recommended: dict[str, float]  # by the model's makers, of the sampling settings that were not given

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """The answer, piece by piece; closing the iterator ends it.

        Raises:
            ContextFull: there is no room for it.
            RequestFailed: why there is none.
        """


class LocalModel:
    """A model on this machine; its engine computes in a thread of its own, which Ctrl-C leaves alone."""

    def __init__(self, config: ChatConfig) -> None:
        torch.set_num_threads(config.num_threads or torch.get_num_threads())
        self.model, self.tokenizer, checkpoint = load_any(
            config.model_path, resolve_device(config.device), precision=config.precision
        )
        if checkpoint["stage"] == "pretrain":
            raise UserError(f"{config.model_path} was only pretrained and cannot converse; give one after --mode sft")
        self.config, self.name = config, config.model_path
        self.recommended = recommended_sampling(self.tokenizer, config.given)
        drafter = config.drafter(self.model, self.tokenizer, 1, config.precision)
        self.engine = Engine(self.model, self.tokenizer, max_running=1, drafter=drafter)
        self.engine.start()

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """See `Partner.answer`."""
        try:
            ids = encode_prompt(self.tokenizer, messages, chat=True)
        except UserError as error:
            raise RequestFailed(str(error)) from None
        room = self.model.config.max_seq_len - len(ids)
        if room < 1:
            raise ContextFull
        config = self.config
        settings = {"temperature": config.temperature, "top_p": config.top_p, **self.recommended, "seed": config.seed}
        params = SamplingParams(config.max_tokens or room, **settings)
        yield from self.engine.submit(ids, params).stream()


class Service:
    """A running service, by its chat API."""

    def __init__(self, config: ChatConfig) -> None:
        self.config = config
        try:
            with self._open("/v1/models") as reply:
                served = json.load(reply)["data"][0]
            self.name = served["id"]
            self.recommended = {k: v for k, v in served.get("sampling", {}).items() if k not in config.given}
        except RequestFailed as failure:
            raise UserError(f"--url {config.url}: {failure}") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"--url {config.url} is no service of this kind: it names no model") from None

    def _open(self, path: str, body: dict | None = None):  # noqa: ANN202 (a response)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.config.url.rstrip("/") + path, data, headers)
            return urllib.request.urlopen(request, timeout=300)
        except urllib.error.HTTPError as error:
            raise self._failure(error.code, error.read()) from None
        except (OSError, ValueError) as error:
            raise RequestFailed(f"the service cannot be reached ({getattr(error, 'reason', error)})") from None

    @staticmethod
    def _failure(status: int, content: bytes) -> Exception:
        try:
            error = json.loads(content)["error"]
            return ContextFull() if error.get("code") == "context_length_exceeded" else RequestFailed(error["message"])
        except (ValueError, LookupError, TypeError, AttributeError):
            return RequestFailed(f"the service answered with status {status}")

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """See `Partner.answer`."""
        config = self.config
        limits = {"max_tokens": config.max_tokens or None, "seed": config.seed}
        settings = {"temperature": config.temperature, "top_p": config.top_p, **self.recommended}
        body = {"model": self.name, "messages": messages, **settings, **limits, "stream": True}
        with self._open("/v1/chat/completions", body) as reply:
            for line in reply:
                data = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or data == b"[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise RequestFailed(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""
                    if choice.get("finish_reason") == "content_filter":
                        print("\n(withheld by a filter)", file=sys.stderr)


class Conversation:
    """What was said so far, and the commands that change it."""

    def __init__(self, partner: Partner, system: str) -> None:
        self.partner, self.system = partner, system
        self.messages: list[Message] = []

    @property
    def whole(self) -> list[Message]:
        """With the system message, if there is one."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def ask(self, text: str) -> None:
        """Show the answer to a question as it is written. Ctrl-C ends it; what there is of it stays."""
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        began = first = time.perf_counter()
        try:
            while True:
                try:
                    for piece in self.partner.answer(self.whole):
                        first = first if pieces else time.perf_counter()
                        pieces.append(piece)
                        print(piece.translate(CONTROL), end="", flush=True)
                    break
                except ContextFull:
                    self._forget_oldest()
        except KeyboardInterrupt:
            print(" …", end="")
        except RequestFailed as failure:
            print(f"error: {failure}", file=sys.stderr)
        print()
        if not pieces:
            self.messages.pop()  # so that the question can be asked again
            return
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        seconds = time.perf_counter() - first
        rate = f", {(len(pieces) - 1) / seconds:.0f} pieces/s" if len(pieces) > 1 else ""
        _say(f"first after {(first - began) * 1000:.0f} ms{rate}")

    def _forget_oldest(self) -> None:
        """Leave out the oldest question and its answer."""
        later = [n for n, message in enumerate(self.messages) if message["role"] == "user"][1:]
        if not later:
            raise RequestFailed("the message is longer than the model's context; shorten it")
        del self.messages[: later[0]]
        _say("the model's context is full: the oldest question and its answer are forgotten")

    def obey(self, line: str) -> None:
        """Carry out a command; `/quit` raises EOFError.

        Raises:
            UserError: there is no such command, or it cannot be carried out.
        """
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command == "/system":
            self.system = rest or self.system
            _say(f"system message: {self.system or '(none)'}")
        elif command == "/reset":
            self.messages.clear()
            _say("a new conversation")
        elif command == "/again":
            if not self.messages:
                raise UserError("there is no question yet")
            while self.messages[-1]["role"] != "user":
                self.messages.pop()
            self.ask(self.messages.pop()["content"])
        elif command == "/save":
            if not rest:
                raise UserError("/save needs a path, such as /save conversation.json")
            with replacing(Path(rest), remedy="give another path") as file:
                file.write(json.dumps([{"messages": self.whole}], ensure_ascii=False, indent=2).encode())
            _say(f"{len(self.messages)} messages are in {rest}, in the shape that training reads")
        elif command == "/quit":
            raise EOFError
        elif command == "/help":
            _say(COMMANDS)
        else:
            raise UserError(f"there is no command {command}; /help lists them")


def _say(text: str) -> None:
    """Something that is not the model's."""
    print(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr)


def read_message() -> str:
    """One message from the keyboard; several lines where they were pasted, or stand between lines of three quotes."""
    lines = [input("> ")]
    if lines[0].strip() == QUOTES:
        lines = []
        while (line := input("… ")).strip() != QUOTES:
            lines.append(line)
    elif sys.stdin.isatty():
        while select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
            lines.append(input())
    return "\n".join(lines).strip()


@contextlib.contextmanager
def line_history() -> Iterator[None]:
    """Earlier lines by the arrow keys, also those of earlier conversations; the file is this user's alone."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    path = cache_folder() / "chat_history"
    with contextlib.suppress(OSError):  # the first time, there is none
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
        except OSError as error:
            _say(f"the lines typed are not kept: {error}")


def main(argv: list[str] | None = None) -> None:
    """Read, answer, until the end of the input."""
    config = parse_config(ChatConfig, argv, description="Talk with a model in the terminal.")
    partner = Service(config) if config.url else LocalModel(config)
    conversation = Conversation(partner, config.system)
    if partner.recommended:
        _say("as the model's makers recommend: " + ", ".join(f"{k} {v}" for k, v in partner.recommended.items()))
    _say(f"{partner.name}; /help lists the commands, Ctrl-D leaves")
    with line_history():
        while True:
            try:
                message = read_message()
                if message.startswith("/"):
                    conversation.obey(message)
                elif message:
                    conversation.ask(message)
            except EOFError:
                print()
                break
            except KeyboardInterrupt:
                print()
                _say("Ctrl-D or /quit leaves")
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
    if isinstance(partner, LocalModel):
        partner.engine.close()


if __name__ == "__main__":
    run_main(main)
