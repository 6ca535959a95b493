"""The settings of the service: options of its command line, and environment variables of the same names in capitals."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from command_line import UserError, option, parse_config, require_file
from inference.draft_model import SpeculationOptions
from inference.tensor_parallel import Ranks
from machine import PRECISIONS, resolve_device

MARK_POLICIES = ("escape", "refuse", "keep")

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES_BEST_FIRST = (
    *("models/rlhf/ppo_best.pth", "models/grpo/grpo_best.pth", "models/dpo/dpo_best.pth", "models/kto/kto_best.pth"),
    *("models/sft/sft_best.pth", "models/pretrain/pretrain_best.pth"),
)
SECRET = ("api_key", "admin_key")
DESCRIPTION = """The generation service: one model behind HTTP. Every option is also an environment variable of the same
name in capitals (MODEL_PATH, NUM_THREADS, …; several values are separated by commas); an option given here wins."""


@dataclass
class ServiceSettings(SpeculationOptions):
    """How the service is run."""

    model_path: str | None = option(None, "the checkpoint; default: the best that training left under models/")
    served_model_name: list[str] = option(list, "what clients call the model, then aliases; default: the file's name")
    host: str = option("127.0.0.1", "the address to listen on; 0.0.0.0: all of the machine's")
    port: int = option(8000, "the port to listen on; 0: any free one", at_least=0, at_most=65535)
    workers: int = option(1, "processes that serve, with the weights in memory once", at_least=1, at_most=256)
    device: str = option("auto", "auto, cpu, cuda or mps")
    precision: str = option(
        "auto", "what to compute in; auto: bf16 on a GPU, fp16 on one before Ampere, otherwise fp32", choices=PRECISIONS
    )
    num_threads: int = option(0, "CPU threads; 0: all cores but one, left to the event loop", at_least=0, at_most=256)
    max_batch: int = option(8, "requests that are computed together", at_least=1, at_most=1024)
    max_queue: int = option(64, "requests that may wait; beyond that, clients are told to come back", at_least=1)
    max_tokens: int = option(4096, "the most new tokens that a request may ask for", at_least=1)
    request_timeout: float = option(300, "seconds after which an answer ends with what it has", above=0)
    api_key: list[str] = option(list, "keys of which clients must show one, as bearer; none: open to all")
    admin_key: str | None = option(None, "the key of POST /admin/reload; without one it is off")
    filters: list[str] = option(list, "files or folders of phrases that neither questions nor answers may have")
    classifier: str | None = option(None, "a checkpoint of finetune.py --mode classify, as a further filter")
    classifier_forbids: list[str] = option(list, "labels of --classifier that are blocked; default: all but the first")
    requests_per_minute: int = option(0, "of one key, or without keys of one address; 0: no limit", at_least=0)
    cors_origin: list[str] = option(list, "origins whose pages may call the service from a browser, such as https://a.b")
    max_body_bytes: int = option(1 << 20, "the largest body of a request", at_least=1024)
    header_timeout: float = option(10, "seconds for the head of a request to arrive", above=0)
    body_timeout: float = option(30, "seconds for the body of a request to arrive", above=0)
    idle_timeout: float = option(30, "seconds that a connection may be idle between two requests", above=0)
    write_timeout: float = option(30, "seconds for a client to take a part of its answer", above=0)
    max_connections: int = option(10_000, "open connections, as far as the limit of open files allows", at_least=1)
    shutdown_timeout: float = option(30, "seconds for running answers to end after SIGTERM", at_least=0)
    template_marks: str = option(
        "escape", "text that would open a turn in a prompt: break it, refuse it, or keep it", choices=MARK_POLICIES
    )
    log_format: str = option("text", "json: one object a line", choices=["text", "json"])
    metrics_folder: str | None = option(None, "where several workers leave their metrics for each other; set by them")
    log_texts: bool = option(False, "write prompts and answers into the log")

    def validate(self) -> list[str]:
        return self.speculation_complaints()

    def __post_init__(self) -> None:
        self.model_reason = "MODEL_PATH names it"  # why this model is served
        self.ranks: Ranks | None = None  # the processes that share the model, where it is on several devices

    @classmethod
    def read(cls, argv: Sequence[str] = (), environment: Mapping[str, str] = os.environ) -> ServiceSettings:
        """The settings of a command line and of the environment, with the model found.

        Raises:
            UserError: a value that is not allowed, or no model.
        """
        given = {name.partition("=")[0] for name in argv}
        from_environment = [
            f"--{field.name}={part.strip()}"
            for field in fields(cls)
            if f"--{field.name}" not in given and (value := environment.get(field.name.upper()))
            for part in (value.split(",") if field.default_factory is list else [value])
        ]
        try:
            settings = parse_config(cls, [*from_environment, *argv], description=DESCRIPTION)
        except UserError as error:
            names = "|".join(argument.partition("=")[0] for argument in from_environment) or "(?!)"
            message = re.sub(f"({names})\\b", lambda name: name.group()[2:].upper(), str(error))
            raise UserError(message.replace("argument ", "")) from None
        settings.model_path, settings.model_reason = model_to_serve(settings.model_path)
        settings.num_threads = settings.num_threads or max(1, available_cores() - 1)
        return settings

    def join_ranks(self) -> None:
        """Join the other processes, if torchrun has started several; unless they are chosen, threads are shared out.

        Raises:
            UserError: they cannot serve together.
        """
        self.ranks = Ranks.start(self.torch_device)
        if self.ranks:
            self.ranks.agreed(self._require_one_worker)
        if self.ranks and "num_threads" not in self.given:
            self.num_threads = self.ranks.n_threads

    def _require_one_worker(self) -> None:
        if self.workers > 1:
            raise UserError("--workers are engines of their own, and torchrun's processes share one; leave one out")

    @functools.cached_property
    def torch_device(self) -> torch.device:
        """The device to compute on."""
        return resolve_device(self.device)

    @property
    def model_names(self) -> list[str]:
        """What clients may call the model, its own name first."""
        return self.served_model_name or [Path(self.model_path).stem]

    def described(self) -> str:
        """All settings, a line each; keys are not shown."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = {name: "(set)" if value and name in SECRET else value for name, value in values.items()}
        return "\n".join(f"  {name:<20} {value!s}" for name, value in shown.items())


def available_cores() -> int:
    """The cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def model_to_serve(chosen: str | None, folder: Path = REPOSITORY) -> tuple[str, str]:
    """The checkpoint that the user has chosen, or the best of those that training leaves under `folder`; and why it.

    Within a stage, the INT8 version is preferred where the quantizer found that it pays.
    """
    if chosen:
        return str(require_file(chosen, "the model", "set MODEL_PATH to a checkpoint")), "it was chosen"
    for name in STAGES_BEST_FIRST:
        plain = folder / name
        small = plain.with_name(f"{plain.stem}_int8.pth")
        found = f"it is the last of the stages under {folder / 'models'}"
        if small.is_file():
            pays, verdict = what_the_quantizer_found(small)
            if pays or not plain.is_file():
                return str(small), f"{found}, and its INT8 version {verdict}"
            return str(plain), f"{found}; its INT8 version is not taken: it {verdict}"
        if plain.is_file():
            return str(plain), found
    raise UserError("there is no model to serve under models/; train one with run_training.sh, or set MODEL_PATH")


def what_the_quantizer_found(path: Path) -> tuple[bool, str]:
    """Whether a quantized checkpoint is faster than its original and as good, and the figures in words."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = content["quantizer"]
    except Exception:  # a damaged file is reported when it is loaded; an older one says nothing
        return False, "does not say whether it pays: make it anew with python -m inference.quantizer"
    rise = found["perplexity_rise"]
    quality = "its perplexity was not measured" if rise is None else f"its perplexity {rise:+.2%}"
    return found["pays"], f"decodes at {found['speedup']:.2f} times the speed, {quality}"


def end_process(sentence: str, status: int) -> None:
    """End the process at once with a sentence on standard error: what has no other way to reach the exit status."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(status)
