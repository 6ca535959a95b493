"""From a prompt to a text, with a KV cache: for programs, and for the command line.

    from checkpoint import load_model
    model, tokenizer, checkpoint = load_model("models/sft/sft_best.pth")
    print(generate_with_kv_cache(model, tokenizer, "法国的首都是哪里?", chat=True))

    python -m inference.kv_cache_infer --model_path models/sft/sft_best.pth --prompt "法国的首都是哪里?"
    torchrun --nproc_per_node 2 -m inference.kv_cache_infer --model_path …  # a model on two GPUs, tensor_parallel.py

Sampling is the engine's work (engine.py), the search for the likeliest answer that of beam_search.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: modules are imported from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError, option, parse_config, run_main
from gpt_model import GPTModel
from inference.beam_search import BeamSettings, beam_search
from inference.draft_model import SpeculationOptions
from inference.engine import Engine
from inference.quantizer import load_any
from inference.request import Prompt, RequestFailed, encode_prompt, recommended_sampling
from inference.sampling import OVERFLOWS, SamplingParams
from inference.tensor_parallel import RankLost, Ranks
from machine import PRECISIONS, resolve_device
from transformer_components import KVCache

__all__ = ["KVCache", "generate_with_kv_cache"]

MAX_RUNNING = 16  # answers of the command line that are computed together
HEEDED_BY_BEAMS = ("max_gen_len", "temperature", "top_k", "top_p", "min_p", "stop_token_ids", "ignore_eos", "seed", "n")


def generate_with_kv_cache(
    model: GPTModel,
    tokenizer: ByteLevelBPETokenizer,
    prompt: Prompt | Sequence[Prompt],
    max_gen_len: int = 100,
    top_k: int = 50,
    temperature: float = 0.8,
    *,
    chat: bool = False,
    batch_size: int = 8,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    n: int = 1,
    overflow: str = "error",
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_beam_groups: int = 1,
    diversity_penalty: float = 0.0,
    **sampling: Any,
) -> str | list[str] | list[list[str]]:
    """What the model writes after a prompt: the new text only, without special tokens.

    Args:
        prompt: a text, or with `chat` the messages of a conversation; or several of them, of any lengths.
        max_gen_len: at most this many new tokens, fewer where the context ends.
        top_k: sample among the k likeliest tokens; 0 means among all.
        temperature: 0 always takes the likeliest token.
        chat: True puts the prompt into the chat template, as models after fine-tuning expect (any stage of a checkpoint
            but "pretrain"); False continues the text.
        batch_size: prompts that are answered together.
        seed: makes sampling repeatable, with other random numbers for each prompt; None takes torch's global generator.
        stop: one or several strings at which the text ends.
        n: how many answers to each prompt.
        overflow: "slide" goes on beyond the end of the context, seeing its newest part only.
        num_beams: more than 1 searches for the likeliest answer instead of sampling one; `length_penalty`,
            `early_stopping`, `num_beam_groups` and `diversity_penalty` are explained in `BeamSettings`.
        sampling: any other field of `SamplingParams`: top_p, min_p, repetition_penalty, logit_bias, …

    Returns:
        a string for one prompt and a list of them for several; with n > 1, a list of n strings in place of each string.

    Raises:
        UserError: a prompt or settings with which nothing can be computed, or a model whose weights are damaged.
    """
    alone = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], dict))
    prompts = [prompt] if alone else list(prompt)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    params = SamplingParams(max_gen_len, temperature, top_k, seed=seed, stop=stop, n=n, overflow=overflow, **sampling)
    if num_beams == 1:
        texts = _sampled(model, tokenizer, prompts, params, chat, batch_size)
    else:
        beams = BeamSettings(num_beams, length_penalty, early_stopping, num_beam_groups, diversity_penalty)
        texts = [text for each in prompts for text in _searched(model, tokenizer, each, params, beams, chat)]
    answers = texts if n == 1 else [texts[start : start + n] for start in range(0, len(texts), n)]
    return answers[0] if alone else answers


def _sampled(
    model: GPTModel,
    tokenizer: ByteLevelBPETokenizer,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    chat: bool,
    batch_size: int,
) -> list[str]:
    """The n answers to each prompt, in their order."""
    engine = Engine(model, tokenizer, max_running=batch_size)
    try:
        generations = engine.run(prompts, [_with_seed(params, index) for index in range(len(prompts))], chat)
    except RequestFailed as failure:
        raise UserError(f"{failure}; use another checkpoint") from None
    return [generation.text for generation in generations]


def _with_seed(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of one of several prompts; equal prompts are not to get equal answers."""
    return params if params.seed is None else replace(params, seed=params.seed + index)


def _searched(
    model: GPTModel,
    tokenizer: ByteLevelBPETokenizer,
    prompt: Prompt,
    params: SamplingParams,
    beams: BeamSettings,
    chat: bool,
) -> list[str]:
    """The n likeliest answers to a prompt that beam search finds, best first."""
    complaints = params.complaints(model.config.vocab_size) + unheeded(params)
    if complaints:
        raise UserError("; ".join(complaints))
    if not prompt:
        raise UserError("the prompt is empty; give at least one character to go on from")
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else tokenizer.end_token_ids)}
    found = beam_search(
        model,
        encode_prompt(tokenizer, prompt, chat),
        beams,
        max_gen_len=params.max_gen_len,
        end_token_ids=ends,
        n=params.n,
    )
    return [tokenizer.decode(hypothesis.token_ids[: -1 if hypothesis.ended else None]) for hypothesis in found]


def unheeded(params: SamplingParams) -> list[str]:
    """A complaint for each setting that beam search, which ranks answers by the model's own judgement, would ignore.

    Temperature and truncation are no such settings: nothing is drawn, so they have nothing to change.
    """
    plain = SamplingParams()
    changed = [name for name in vars(plain) if getattr(params, name) != getattr(plain, name)]
    return [
        f"num_beams and {name} do not go together; leave one out" for name in changed if name not in HEEDED_BY_BEAMS
    ]


@dataclass
class GenerationConfig(SpeculationOptions):
    """The command line of generation."""

    model_path: str = option("models/sft/sft_best.pth", "the checkpoint, quantized or not")
    prompt: list[str] = option(list, "the question, or for a model that was only pretrained the text to continue")
    chat: bool | None = option(None, "answer through the chat template; default: unless the model was only pretrained")
    max_gen_len: int = option(100, "at most this many new tokens")
    temperature: float = option(0.8, "0 always takes the likeliest token")
    top_k: int = option(50, "sample among the k likeliest tokens; 0 means among all")
    top_p: float = option(1.0, "sample from the smallest set of likeliest tokens that has this probability")
    min_p: float = option(0.0, "drop tokens less likely than this share of the likeliest one's probability")
    repetition_penalty: float = option(1.0, "above 1 makes tokens of the prompt and the answer less likely")
    presence_penalty: float = option(0.0, "subtracted once from the logit of a token that the answer has")
    frequency_penalty: float = option(0.0, "subtracted for each time that the answer has the token")
    stop: list[str] = option(list, "strings at which the answer ends; they are not shown")
    ignore_eos: bool = option(False, "go on after the token that ends an answer")
    seed: int | None = option(None, "makes sampling repeatable")
    n: int = option(1, "how many answers to each prompt")
    overflow: str = option("error", "slide: go on beyond the context's end, forgetting the oldest", choices=OVERFLOWS)
    num_beams: int = option(1, "more than 1 searches for the likeliest answer with this many beams")
    length_penalty: float = option(1.0, "of beam search: above 0 favours longer answers")
    num_beam_groups: int = option(1, "of beam search: groups that are kept apart by diversity_penalty")
    diversity_penalty: float = option(0.0, "of beam search: the price of a token that an earlier group has chosen")
    cache_dtype: str = option(
        "model", "of the key/value cache; int8 takes a quarter of the memory", choices=["model", "int8"]
    )
    device: str = option("auto", "auto, cpu, cuda or mps")
    precision: str = option(
        "auto", "what to compute in; auto: bf16 on a GPU, fp16 on one before Ampere, otherwise fp32", choices=PRECISIONS
    )
    num_threads: int = option(0, "CPU threads; 0 means as many as torch takes", at_least=0)

    @property
    def params(self) -> SamplingParams:
        """The sampling parameters among the options."""
        return SamplingParams(**{**self._options_of(SamplingParams()), "stop": tuple(self.stop)})

    @property
    def beams(self) -> BeamSettings:
        """The settings of beam search among the options."""
        return BeamSettings(**self._options_of(BeamSettings()))

    def _options_of(self, settings: object) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name in vars(settings)}

    def validate(self) -> list[str]:
        complaints = self.params.complaints()  # once more when the model, and so its vocabulary, is known
        if self.num_beams != 1:
            complaints += self.beams.complaints(self.n) + unheeded(self.params)
            if self.cache_dtype != GenerationConfig.cache_dtype:
                complaints.append("num_beams and cache_dtype do not go together; leave one out")
            for name in ("draft_model", "draft_texts"):
                if getattr(self, name):
                    complaints.append(f"num_beams and {name} do not go together; leave one out")
        return [
            *(["--prompt is missing; give a text"] if not self.prompt else []),
            *(["--prompt is empty; give at least one character"] if "" in self.prompt else []),
            *(f"--{complaint}" for complaint in complaints),
            *self.speculation_complaints(),
        ]


def take_defaults(config: GenerationConfig, tokenizer: ByteLevelBPETokenizer) -> None:
    """Of the settings that were not given, take those that came with the model, and say so; a search draws nothing."""
    taken = recommended_sampling(tokenizer, config.given) if config.num_beams == 1 else {}
    for name, value in taken.items():
        setattr(config, name, value)
    if taken:
        listed = ", ".join(f"--{name} {value:g}" for name, value in taken.items())
        print(f"as the model's makers recommend: {listed}", file=sys.stderr)


def require_sampling(config: GenerationConfig) -> None:
    """Refuse a search, which is no work of the engine, where several processes share the model."""
    if config.num_beams > 1:
        raise UserError("--num_beams is for one process; start it without torchrun")


def main(argv: list[str] | None = None) -> None:
    """Print the model's answers as they are made, and at the end how fast that was."""
    config = parse_config(GenerationConfig, argv, description="Let a model answer questions or continue texts.")
    device = resolve_device(config.device)
    ranks = Ranks.start(device)
    torch.set_num_threads(config.num_threads or (ranks.n_threads if ranks else torch.get_num_threads()))
    if ranks:
        ranks.agreed(lambda: require_sampling(config))
    try:
        model, tokenizer, checkpoint = load_any(config.model_path, device, precision=config.precision, ranks=ranks)
        if ranks and ranks.rank:
            ranks.follow(model)
        else:
            answer(config, model, tokenizer, checkpoint["stage"], ranks)
    except RankLost as lost:
        sys.exit(f"error: {lost}")
    finally:
        if ranks and not ranks.rank:
            ranks.end()
    if ranks:
        ranks.leave()


def answer(
    config: GenerationConfig, model: GPTModel, tokenizer: ByteLevelBPETokenizer, stage: str, ranks: Ranks | None
) -> None:
    """Print the answers of a model of this stage, and how fast they came."""
    take_defaults(config, tokenizer)
    chat = stage != "pretrain" if config.chat is None else config.chat
    if config.num_beams > 1:
        for prompt in config.prompt:
            print(*_searched(model, tokenizer, prompt, config.params, config.beams, chat), sep="\n")
        return
    n_answers = len(config.prompt) * config.n
    cache_dtype = torch.int8 if config.cache_dtype == "int8" else None
    drafter = config.drafter(model, tokenizer, MAX_RUNNING, config.precision)
    engine = Engine(
        model, tokenizer, MAX_RUNNING, max_waiting=n_answers, cache_dtype=cache_dtype, drafter=drafter, ranks=ranks
    )
    began = time.perf_counter()
    requests = [
        sample
        for index, prompt in enumerate(config.prompt)
        for sample in engine.submit(prompt, _with_seed(config.params, index), chat).samples
    ]
    try:
        for request in requests:
            for piece in request.stream():
                print(piece, end="", flush=True)
            print()
    except RequestFailed as failure:
        raise UserError(f"{config.model_path}: {failure}; use another checkpoint") from None
    seconds = time.perf_counter() - began
    n_tokens = sum(len(request.token_ids) for request in requests)
    statistics = engine.statistics()
    first = statistics.time_to_first_token.quantile(0) * 1000
    summary = f"{n_tokens} tokens in {seconds:.2f} s, {n_tokens / seconds:.0f} tokens/s, the first after {first:.0f} ms"
    if statistics.drafts:
        summary += f"; {statistics.tokens_accepted} of {statistics.tokens_drafted} drafted tokens were right"
    print(f"\n{summary}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
