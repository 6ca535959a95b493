"""What the engine computes in a step: the forward pass of some tokens of some requests, and the tokens after them.

Which tokens these are is up to the engine (engine.py), which knows the requests. A step here is a row of tokens, whose
cells in the cache the engine has reserved; from it come the next tokens of those whose context is then complete, how
likely the tokens of prompts were, and what is not finite. Three ways lead there, with the same result:

    compiled   decoder_step.py, for a model of known parts on a CPU
    GPU        gpu_step.py, one copy there and one back; of a model that several processes share, on CPUs, too
    PyTorch    whatever the model's own `forward` is
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from command_line import UserError
from gpt_model import GPTConfig, GPTModel
from inference.gpu_cache import GpuCache
from inference.gpu_step import Asked, GpuStep
from inference.kernels.decoder_step import DecoderStep
from inference.kernels.known_parts import refuse_other_forward
from inference.kernels.paged_attention import BLOCK_SIZE
from inference.paged_cache import PagedCache
from inference.request import Request, Span
from inference.sampling import SampledTokens, TokenLogProb, log_probs_of
from inference.speculation import one_a_row, right_tokens, verify
from inference.tensor_parallel import Ranks, SharedCache, SharedStep
from machine import free_gpu_bytes

# The cache of an engine that is told no size has at most
CACHE_BYTES = 1 << 30  # so many bytes; on a CPU, only what is used is taken
GPU_SHARE = 0.8  # this share of a GPU's free memory, which is taken at once; the rest is for activations


@dataclass
class Computed:
    """What a step has brought.

    Attributes:
        n_finite: how many hidden states of each span are finite before one is not.
        complete: the indices of the spans that are continued; `sampled`: their tokens.
        scored: requests, and how likely the tokens of their prompts were that this step has reached.
        model_seconds, sampling_seconds: the time of the forward pass, and of choosing the tokens.
    """

    n_finite: list[int]
    complete: list[int]
    sampled: list[SampledTokens]
    scored: list[tuple[Request, list[TokenLogProb]]]
    model_seconds: float
    sampling_seconds: float


class ModelStep:
    """The steps of one model, and the cache that they go on from.

    Args:
        model: in evaluation mode while it computes.
        max_running: sequences that the cache holds at once.
        cache_tokens, cache_dtype, reuse_prefixes, longest, gpu_step, cuda_graphs, ranks: those of `Engine`.

    Raises:
        UserError: the cache is too small.
    """

    def __init__(
        self,
        model: GPTModel,
        max_running: int,
        cache_tokens: int | None = None,
        cache_dtype: torch.dtype | None = None,
        reuse_prefixes: bool = True,
        longest: int | None = None,
        gpu_step: bool | None = None,
        cuda_graphs: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.device, self._ranks = model, model.device, ranks
        config, dtype = model.config, cache_dtype or model.dtype
        if cache_tokens is None:
            free_bytes = ranks.free_bytes if ranks else None
            cache_tokens = default_cache_tokens(config, dtype, self.device, max_running, longest, free_bytes)
        if cache_tokens < config.max_seq_len:
            context = config.max_seq_len
            raise UserError(f"cache_tokens is {cache_tokens}; one request may need the model's context, {context}")
        gpu_step = self.device.type == "cuda" if gpu_step is None else gpu_step
        sizes = config, cache_tokens, max_running, dtype, self.device, reuse_prefixes
        self.gpu_step: GpuStep | None = None
        self.decoder_step: DecoderStep | None = None
        if ranks:
            self.cache = SharedCache(ranks, *sizes)
            self.gpu_step = SharedStep(model, self.cache)
        elif gpu_step:
            self.cache = GpuCache(*sizes)
            self.gpu_step = GpuStep(model, self.cache, cuda_graphs)
        else:
            self.cache = PagedCache(*sizes)

    def look_at_model(self) -> None:
        """Weights may have moved between two requests, and layers may have been replaced or gained adapters."""
        refuse_other_forward(self.model)
        if self.gpu_step is not None:
            self.gpu_step.look_at_model()
        else:
            self.decoder_step = DecoderStep.of(self.model, self.cache.native, self.decoder_step)

    @property
    def is_lost(self) -> bool:
        """Whether nothing can be computed any more, as the processes that share the model are out of step."""
        return self._ranks is not None and self._ranks.is_split

    def close(self) -> None:
        """Compute no more; the processes that share the model end."""
        if self._ranks:
            self._ranks.end()

    @torch.inference_mode()
    def compute(self, spans: Sequence[Span]) -> Computed:
        """The forward pass of all spans, and the next tokens of those whose context is then complete."""
        ids, ends, complete = [], [], []  # N tokens in one row; where each span ends in it; which spans are continued
        wanted: list[int] = []  # those of the tokens whose logits are needed
        continued: list[int] = []  # which of these are continued; the others belong to prompts that are scored
        scored: list[tuple[Request, range, range]] = []  # the others' positions in the prompt, and in `wanted`
        for index, (request, n_new) in enumerate(spans):
            start = request.sequence.length
            row = len(ids) - start  # of position 0
            ids += request.context[start : start + n_new] + request.draft
            ends.append(len(ids))
            unscored = request.unscored
            if positions := range(max(start, unscored.start), min(start + n_new, unscored.stop)):
                scored.append((request, positions, range(len(wanted), len(wanted) + len(positions))))
                wanted += range(row + positions.start, row + positions.stop)
            if start + n_new == len(request.context) + len(request.draft):
                complete.append(index)
                rows_of_draft = range(len(ids) - 1 - len(request.draft), len(ids))
                continued += range(len(wanted), len(wanted) + len(rows_of_draft))
                wanted += rows_of_draft
        self.cache.begin_step([(request.sequence, n_new) for request, n_new in spans])
        before_model = time.perf_counter()
        requests = [spans[index][0] for index in complete]
        samplers, drafts = [each.sampler for each in requests], [each.draft for each in requests]
        judged = [
            (rows, request.prompt_ids[positions.start + 1 : positions.stop + 1], request.params.prompt_logprobs)
            for request, positions, rows in scored
        ]
        n_finite, rows_finite = [n_new for _, n_new in spans], []
        # What reaches the logits is looked at there. The other tokens leave keys and values that would spoil what comes
        # after them. A sum is not finite if one of its numbers is not
        is_one_choice = not any(draft and sampler.looks_back for sampler, draft in zip(samplers, drafts, strict=True))
        if self.gpu_step is not None and is_one_choice:
            found = self.gpu_step(Asked(ids, wanted, continued, one_a_row(samplers, drafts), judged))
            rows_finite, sampled, log_probs = found.finite, right_tokens(found.sampled, drafts), found.scored
            for sampler, draft, tokens in zip(samplers, drafts, sampled, strict=True):
                for _ in tokens.token_ids if draft else ():
                    sampler.uniform()  # as many as the copies' draws have counted
            before_sampling = time.perf_counter()
        else:
            hidden, logits = self.forward(ids, wanted)  # (N, D), (W, V)
            if len(ids) > len(complete):
                sums = hidden.float().sum(dim=-1).cpu().numpy()  # (N,); NumPy is quicker with a few numbers
                rows_finite = np.isfinite(sums).tolist()
            before_sampling = time.perf_counter()
            log_probs = [log_probs_of(logits[rows.start : rows.stop], followers, k) for rows, followers, k in judged]
            of_answers = logits[continued] if scored else logits  # (R, V)
            sampled = verify(of_answers, samplers, drafts) if samplers else []
        if rows_finite:
            rows_finite = [*rows_finite, False]  # (N + 1,)
            n_finite = [
                min(n_new, rows_finite.index(False, end - n_new) - (end - n_new))
                for end, (_, n_new) in zip(ends, spans, strict=True)
            ]
        done = time.perf_counter()
        of_prompts = [(request, found) for (request, _, _), found in zip(scored, log_probs, strict=True)]
        return Computed(
            n_finite, complete, sampled, of_prompts, before_sampling - before_model, done - before_sampling
        )

    def forward(self, ids: list[int], last: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The forward pass of the tokens of the cache's present step.

        Args:
            ids: of the N tokens.
            last: those of them whose logits are wanted.

        Returns:
            the final, normed hidden states (N, D); logits (len(last), V).
        """
        if self.gpu_step is not None:
            return self.gpu_step.forward(ids, last)
        if self.decoder_step is not None:
            return self.decoder_step(ids, self.cache.slots, self.cache.positions, last)
        input_ids, positions = torch.tensor([ids], device=self.device), torch.tensor([self.cache.positions])  # (1, N)
        hidden = self.model.hidden_states_at(input_ids, positions.to(self.device), cache=self.cache)[0]  # (N, D)
        # Only what is continued goes through the output layer, the largest of a small model; (B, D)
        rows = hidden if len(last) == len(ids) else hidden[torch.tensor(last, dtype=torch.int64)]
        return hidden, self.model.lm_head(rows)  # (N, D), (B, V)


def default_cache_tokens(
    config: GPTConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_running: int,
    longest: int | None = None,
    free_bytes: int | None = None,
) -> int:
    """How many cells a cache needs, as far as there is memory for them; for a whole context in any case.

    Args: those of `Engine`; the `dtype` is the cells', and `free_bytes` a GPU's, if its own do not count.
    """
    token_bytes = 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize
    n_bytes = CACHE_BYTES if device.type != "cuda" else int(GPU_SHARE * (free_bytes or free_gpu_bytes(device)))
    longest = min(longest or config.max_seq_len, config.max_seq_len)
    needed = max_running * (-(-longest // BLOCK_SIZE) + 1) * BLOCK_SIZE  # a block is kept free for each that runs
    return max(config.max_seq_len, min(needed, n_bytes // token_bytes))
