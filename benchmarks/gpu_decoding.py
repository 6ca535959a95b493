"""Decoding one stream on a GPU: step by step from Python, recorded as a CUDA graph, and compiled and recorded.

A step from Python starts some 150 small kernels, one after another, and the GPU waits for each start. A CUDA graph
starts them all at once, but it always reads and writes the same addresses: hence a cache of fixed size that is masked
beyond the current position, and a position that is a tensor on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gpt_model import GPTModel
from transformer_components import attend


class StaticCache:
    """Keys and values of one stream in `max_len` cells; every step attends to all cells, with a mask."""

    def __init__(self, model: GPTModel, max_len: int) -> None:
        cells = model.new_cache(1, max_len)
        self.keys, self.values = cells.keys, cells.values  # (n_layers, 1, G, S, K)
        self.position = torch.zeros(1, dtype=torch.int64, device=cells.keys.device)  # of the token that comes

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Store key and value (1, G, 1, K) at `position`; the attention of query (1, H, 1, K), of the same shape."""
        self.keys[layer].index_copy_(2, self.position, key.to(self.keys.dtype))
        self.values[layer].index_copy_(2, self.position, value.to(self.values.dtype))
        return attend(query, self.keys[layer].to(query.dtype), self.values[layer].to(query.dtype), mask)

    def advance(self, n_tokens: int) -> None:
        """One position on; on the GPU, so that a recorded step advances as well."""
        self.position += n_tokens


class StaticDecoder:
    """Greedy decoding in which each step does the same with the same memory.

    Args:
        max_len: tokens of prompt and continuation together.
        compiled: let `torch.compile` fuse the kernels of a step.
        recorded: record a step as a CUDA graph, and play it for every token; on a GPU only.
    """

    def __init__(self, model: GPTModel, max_len: int, *, compiled: bool = False, recorded: bool = False) -> None:
        self.model, self.cache = model, StaticCache(model, max_len)
        device = self.cache.position.device
        self.cells = torch.arange(max_len, device=device)  # (S,)
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        # With this option a product with one row is no matrix product, and INT8 weights are expanded as they are read
        options = {"coordinate_descent_tuning": True}
        self.likeliest = torch.compile(self._likeliest, dynamic=False, options=options) if compiled else self._likeliest
        self.play: Callable[[], None] = self._record() if recorded else self._step

    def _likeliest(self, token: torch.Tensor) -> torch.Tensor:
        mask = (self.cells <= self.cache.position).view(1, 1, 1, -1)  # (1, 1, 1, S)
        hidden = self.model.hidden_states_at(token, self.cache.position.view(1, 1), mask, self.cache)  # (1, 1, D)
        return self.model.lm_head(hidden[:, -1]).argmax(dim=-1, keepdim=True)  # (1, 1)

    @torch.inference_mode()
    def _step(self) -> None:
        self.token.copy_(self.likeliest(self.token))

    def _record(self) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are loaded and compiled before anything is recorded
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def generate(self, prompt: Sequence[int], n_tokens: int) -> list[int]:
        """The `n_tokens` likeliest tokens after a prompt, which is read token by token."""
        self.cache.position.zero_()
        for token in prompt:
            self.token.fill_(token)
            self.play()
        tokens = [self.token.clone()]
        while len(tokens) < n_tokens:
            self.play()
            tokens.append(self.token.clone())
        return torch.cat(tokens).flatten().tolist()  # the only time that the GPU is waited for
