"""The engine under load: many streams at once against one after another, delays, and the engine's own share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from byte_level_bpe import ByteLevelBPETokenizer
from gpt_model import GPTModel
from inference.engine import Engine
from inference.sampling import SamplingParams

Prompts = Sequence[list[int]]


class Load:
    """Requests of random token ids that all ask for the same number of tokens, greedily.

    Args:
        prompts: token ids, one list a request.
        n_tokens: new tokens of each request.
    """

    def __init__(self, model: GPTModel, tokenizer: ByteLevelBPETokenizer, prompts: Prompts, n_tokens: int) -> None:
        self.model, self.tokenizer, self.prompts = model, tokenizer, list(prompts)
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

    def through(self, generate_all: Callable[[Prompts, int], Prompts]) -> None:
        """All requests together, through another program's (prompts, n_tokens) → tokens."""
        self._check_lengths(generate_all(self.prompts, self.n_tokens))

    def _check(self, generations: Sequence[Any]) -> None:
        self._check_lengths([generation.token_ids for generation in generations])

    def _check_lengths(self, answers: Prompts) -> None:
        lengths = {len(answer) for answer in answers}
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
