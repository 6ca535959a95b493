"""The engine under load: many streams at once against one after another, delays, and the engine's own share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.peers import Ours
from benchmarks.turns import Times, take_turns
from inference.engine import Engine
from inference.sampling import SamplingParams

Prompts = Sequence[list[int]]


class Load:
    """Requests of random token ids that all ask for the same number of tokens, greedily.

    Args:
        prompts: token ids, one list a request.
        n_tokens: new tokens of each request.
    """

    def __init__(self, ours: Ours, prompts: Prompts, n_tokens: int) -> None:
        self.model, self.tokenizer, self.prompts = ours.model, ours.tokenizer, list(prompts)
        self.params = SamplingParams(max_gen_len=n_tokens, temperature=0, ignore_eos=True)
        self.n_tokens = n_tokens

    def engine(self, n_streams: int) -> Engine:
        """An engine with room for `n_streams`, which recomputes every prompt."""
        return Engine(
            self.model, self.tokenizer, max_running=n_streams, max_waiting=len(self.prompts), reuse_prefixes=False
        )

    def at_once(self, engine: Engine) -> None:
        """All requests together."""
        self._check(engine.run(self.prompts, self.params))

    def one_after_another(self, engine: Engine) -> None:
        """Each request when the one before has its answer."""
        self._check([engine.run([prompt], self.params)[0] for prompt in self.prompts])

    def _check(self, generations: Sequence[Any]) -> None:
        lengths = {len(generation.token_ids) for generation in generations}
        assert lengths == {self.n_tokens}, f"requests for {self.n_tokens} tokens got {sorted(lengths)}"

    def delays(self, n_streams: int) -> dict[str, float]:
        """Streams that are read by a thread each, as in a service, all submitted together; times in seconds.

        Small numbers of streams are repeated until as many requests as there are prompts have been answered.
        """
        with self.engine(n_streams) as engine, ThreadPoolExecutor(n_streams) as readers:
            start = time.perf_counter()
            for first in range(0, len(self.prompts), n_streams):
                batch = self.prompts[first : first + n_streams]
                requests = [engine.submit(prompt, self.params) for prompt in batch]
                list(readers.map(lambda request: list(request.stream()), requests))
            seconds = time.perf_counter() - start
            statistics = engine.statistics()
        return {
            "streams": n_streams,
            "tokens_per_second": len(self.prompts) * self.n_tokens / seconds,
            "first_token_median": statistics.time_to_first_token.quantile(0.5),
            "first_token_p99": statistics.time_to_first_token.quantile(0.99),
            "between_tokens_median": statistics.between_tokens.quantile(0.5),
            "between_tokens_p99": statistics.between_tokens.quantile(0.99),
        }

    def step_costs(self, n_streams: int) -> dict[str, float]:
        """Where the time of a step goes, in seconds: the model, choosing tokens, all that the engine does besides."""
        engine = self.engine(n_streams)
        start = time.perf_counter()
        engine.run(self.prompts[:n_streams], self.params)
        seconds = time.perf_counter() - start
        statistics = engine.statistics()
        model, sampling = statistics.model_seconds, statistics.sampling_seconds
        return {
            "streams": n_streams,
            "steps": statistics.steps,
            "model": model / statistics.steps,
            "sampling": sampling / statistics.steps,
            "engine": (seconds - model - sampling) / statistics.steps,
        }


@torch.inference_mode()
def cache_times(ours: Mapping[str, Ours], token: int, n_tokens: int, n_samples: int, rounds: int) -> Times:
    """Of `n_tokens` steps with the KV cache, and of `n_samples` of them without it, evenly spaced; FP32 by PyTorch, not
    in the engine's compiled code."""
    model = ours["FP32"].model
    lengths = [round((index + 0.5) * n_tokens / n_samples) for index in range(n_samples)]
    texts = [torch.full((1, length), token) for length in lengths]

    def steps_without_cache() -> None:
        for text in texts:
            model.lm_head(model.hidden_states(text)[:, -1]).argmax().item()

    def steps_with_cache() -> None:
        model.generate(torch.full((1, 1), token), max_gen_len=n_tokens, temperature=0)

    return take_turns({"with": steps_with_cache, "without": steps_without_cache}, rounds)


def stream_times(ours: Mapping[str, Ours], prompts: Prompts, n_tokens: int, rounds: int) -> Times:
    """Of all prompts at once and of one after another, FP32 and INT8."""
    actions = {}
    for kind in ("FP32", "INT8"):
        load = Load(ours[kind], prompts, n_tokens)
        engine = load.engine(len(prompts))
        load.at_once(engine)  # warm up
        actions[f"{kind}, one after another"] = lambda load=load, engine=engine: load.one_after_another(engine)
        actions[f"{kind}, at once"] = lambda load=load, engine=engine: load.at_once(engine)
    return take_turns(actions, rounds)


def delays_and_costs(
    ours: Mapping[str, Ours], prompts: Prompts, n_tokens: int, counts: Sequence[int]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """`Load.delays` and `Load.step_costs` for each number of streams, INT8."""
    load = Load(ours["INT8"], prompts, n_tokens)
    return [load.delays(count) for count in counts], [load.step_costs(count) for count in counts]
