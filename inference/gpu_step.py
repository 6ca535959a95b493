"""A step of the engine on a GPU: one copy there, one copy back, and no waiting between them.

A step started from Python is some hundreds of small kernels, and the GPU waits for the start of each. So where every
request has one token to compute, nearly always, the step is filled up to one of a few shapes and recorded as a CUDA
graph, which starts all its kernels at once: the forward pass, attention and the choice of the tokens. A graph reads and
writes the same addresses each time it is played, so it runs only while the weights lie where they lay, and only for the
parts of models that known_parts.py lists. Any other step does the same from Python.

The same code runs on a CPU, without graphs: that is how it is tested where there is no GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt_model import GPTModel
from inference.gpu_cache import GpuCache
from inference.gpu_sampling import Choice, choose, judge, numbers_of, told
from inference.kernels.known_parts import UnknownPart, facts_of
from inference.sampling import SampledTokens, TokenLogProb, TokenSampler
from transformer_components import MixtureOfExperts

logger = logging.getLogger(__name__)

PLAYED_BEFORE = 1  # how often a step of one shape runs from Python, which loads its kernels, before it is recorded

Numbers = Mapping[str, torch.Tensor]


@dataclass
class Asked:
    """What is wanted of a step.

    Attributes:
        ids: of its N tokens.
        wanted: those of them whose logits are needed.
        continued: those of `wanted` after which a token is chosen, each by one of `samplers`.
        samplers: see above.
        scored: for some of `wanted`, of prompts: which, the tokens that follow, how many of the likeliest to tell.
    """

    ids: list[int]
    wanted: list[int]
    continued: list[int]
    samplers: list[TokenSampler]
    scored: list[tuple[range, list[int], int]] = field(default_factory=list)


@dataclass
class Found:
    """What a step has found.

    Attributes:
        finite: for each of its tokens, whether the hidden state is; empty where the logits say it.
        sampled: the chosen tokens, one a row, of each of `Asked.samplers`.
        scored: how likely the tokens were that follow in prompts, a list for each of `Asked.scored`.
    """

    finite: list[bool]
    sampled: SampledTokens
    scored: list[list[TokenLogProb]]


class GpuStep:
    """The steps of one model over one cache.

    Args:
        graphs: whether steps of fixed shapes are recorded; on a CPU they never are.
    """

    def __init__(self, model: GPTModel, cache: GpuCache, graphs: bool = True) -> None:
        self.model, self.cache = model, cache
        self.records = self._graphs = graphs and cache.device.type == "cuda"
        self._recordings: dict[tuple, Recording] = {}
        self._facts: list[object] | None = None
        self._pool = torch.cuda.graph_pool_handle() if self.records else None

    def look_at_model(self) -> None:
        """To be called when the model may have changed: graphs are kept only while they are right."""
        if not self._graphs:
            return
        try:
            facts = facts_of(self.model)
            # Experts that are not stacked, see stacked_experts.py
            waits = [name for name, part in self.model.named_modules() if isinstance(part, MixtureOfExperts)]
            if waits or self.model.position_embedding.depends_on_length:
                raise UnknownPart(f"{waits[0] if waits else 'position_embedding'} waits for numbers of the GPU")
        except UnknownPart as unknown:
            facts = None
            if self.records:
                logger.info("steps are not recorded as CUDA graphs: %s", unknown)
        if facts is None or facts != self._facts:
            self._recordings.clear()
        self.records, self._facts = facts is not None, facts

    @torch.inference_mode()
    def __call__(self, asked: Asked) -> Found:
        """Compute the step that the cache has begun."""
        n, vocab_size = len(asked.ids), self.model.config.vocab_size
        samplers = asked.samplers
        # These need more than numbers: their scores are worked on one by one
        adjusted = [row for row, sampler in enumerate(samplers) if sampler.penalizes or sampler.bias or sampler.form]
        reporting = [row for row, sampler in enumerate(samplers) if sampler.params.logprobs is not None]
        choice = Choice.of(samplers, vocab_size)
        # Single tokens of answers, or of prompts that have one
        if len(asked.continued) == len(self.cache.spans) == n and not asked.scored:
            n_rows = bucket(n)
            arrays = {"ids": padded(asked.ids, n_rows), **self.cache.singles(n_rows)}
            arrays |= numbers_of(samplers, n_rows, vocab_size)
            if not adjusted and not reporting:
                chosen, _ = self._played(arrays, choice)
                ids, finite = download(chosen[:, :n])  # (n,) each
                return Found([], SampledTokens(ids.astype(int).tolist(), (finite > 0).tolist(), [None] * n), [])
            logits, entered = self._played(arrays, None)
            hidden, logits, entered = logits[:0], logits[:n], {name: tensor[:n] for name, tensor in entered.items()}
        else:
            followers = {f"followers {index}": np.array(ids) for index, (_, ids, _) in enumerate(asked.scored)}
            rows = {"wanted": np.array(asked.wanted, dtype=int), "continued": np.array(asked.continued, dtype=int)}
            arrays = {"ids": np.array(asked.ids), **self.cache.groups(), **rows, **followers}
            arrays |= numbers_of(samplers, len(samplers), vocab_size)
            entered = self.enter(arrays)
            hidden, logits = self._forward(entered)
        return self._chosen(asked, hidden, logits, entered, choice, adjusted, reporting)

    @torch.inference_mode()
    def forward(self, ids: Sequence[int], wanted: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (N, D) of the tokens of the step that the cache has begun; logits of those that are wanted."""
        rows = {"ids": np.array(ids), "wanted": np.array(wanted, dtype=int)}
        return self._forward(self.enter({**rows, **self.cache.groups()}))

    @torch.inference_mode()
    def repeat(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The forward pass of a step that another process has entered, see tensor_parallel.py."""
        self._forward(self.enter(arrays))

    def enter(self, arrays: Mapping[str, np.ndarray]) -> Numbers:
        """A step's numbers, on the GPU."""
        return upload(arrays, self.cache.device)

    def _forward(self, numbers: Numbers) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (N, D) of a step's tokens, and the logits (W, V) fp32 of those that are wanted."""
        self.cache.enter(numbers, self.model.dtype)
        with fused_attention(self.cache.device, self.model.config.head_dim):
            ids, positions = numbers["ids"].unsqueeze(0), numbers["positions"].unsqueeze(0)  # (1, N)
            hidden = self.model.hidden_states_at(ids, positions, cache=self.cache)[0]  # (N, D)
        rows = hidden[numbers["wanted"]] if "wanted" in numbers else hidden
        return hidden, self.model.lm_head(rows).float()

    def _played(self, arrays: Mapping[str, np.ndarray], choice: Choice | None) -> tuple[torch.Tensor, Numbers]:
        """The tokens of a step of fixed shapes and whether their scores are finite, (2, rows) fp64; without a choice
        its logits (rows, V). And the arrays, on the GPU."""

        def compute(numbers: Numbers) -> torch.Tensor:
            _, logits = self._forward(numbers)
            if choice is None:
                return logits
            return torch.stack([part.double() for part in choose(logits, numbers, choice)])

        if not self.records:
            numbers = self.enter(arrays)
            return compute(numbers), numbers
        key = choice, *(array.shape for array in arrays.values())
        if key not in self._recordings:
            self._recordings[key] = Recording(compute, arrays, self.cache.device, self._pool)
        return self._recordings[key](arrays), self._recordings[key].numbers

    def _chosen(
        self,
        asked: Asked,
        hidden: torch.Tensor,
        logits: torch.Tensor,
        numbers: Numbers,
        choice: Choice,
        adjusted: Sequence[int],
        reporting: Sequence[int],
    ) -> Found:
        """What follows from hidden states (N, D), or (0, D) where the logits tell enough, and from logits (W, V)."""
        samplers = asked.samplers
        results = [hidden.sum(dim=-1).isfinite()]  # a sum is not finite if one of its numbers is not
        for index, (rows, _, k) in enumerate(asked.scored):
            results.append(judge(logits[rows.start : rows.stop], numbers[f"followers {index}"], k))
        scores = logits[numbers["continued"]] if "continued" in numbers else logits  # (B, V)
        for row in adjusted:
            samplers[row].adjust(scores[row])
        results += choose(scores, numbers, choice) if samplers else scores.new_zeros(2, 0)
        if reporting:
            most = max(samplers[row].params.logprobs for row in reporting)
            # Of all rows, as picking some of them would take another copy
            results.append(judge(scores / numbers["temperature"].float().unsqueeze(1), results[-2], most))
        flat = download(torch.cat([part.double().flatten() for part in results]))
        ends = np.cumsum([part.numel() for part in results])
        parts = [piece.reshape(part.shape) for piece, part in zip(np.split(flat, ends[:-1]), results, strict=True)]
        scored = [told(part, ids, k) for part, (_, ids, k) in zip(parts[1:], asked.scored, strict=False)]
        ids, finite = parts[1 + len(scored) : 3 + len(scored)]
        token_ids = ids.astype(int).tolist()
        log_probs: list[TokenLogProb | None] = [None] * len(samplers)
        for row in reporting:
            k = samplers[row].params.logprobs
            (log_probs[row],) = told(parts[-1][row : row + 1], [token_ids[row]], k)
        for row in adjusted:
            samplers[row].record(token_ids[row])
        return Found((parts[0] > 0).tolist(), SampledTokens(token_ids, (finite > 0).tolist(), log_probs), scored)


class Recording:
    """A step of fixed shapes: first from Python, then as a CUDA graph.

    Attributes:
        numbers: what the step is computed of.

    Args:
        compute: the step, of numbers that always lie where they lie now.
        arrays: the first numbers, on the CPU.
        pool: where all graphs of a `GpuStep` have their memory, since only one is played at a time.
    """

    def __init__(
        self,
        compute: Callable[[Numbers], torch.Tensor],
        arrays: Mapping[str, np.ndarray],
        device: torch.device,
        pool: tuple[int, int] | None,
    ) -> None:
        self._compute, self._pool = compute, pool
        self._inputs = torch.empty(sum(array.size for array in arrays.values()), dtype=torch.int64, device=device)
        self.numbers = unpack(self._inputs, arrays)
        self._n_played, self._graph, self._output = 0, None, None

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> torch.Tensor:
        """The step with these numbers; the result is good until the next call."""
        self._inputs.copy_(packed(arrays, self._inputs.device), non_blocking=True)
        if self._n_played < PLAYED_BEFORE:
            self._n_played += 1
            return self._compute(self.numbers)
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile, such as a filter of the service
            with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
                self._output = self._compute(self.numbers)
        self._graph.replay()
        return self._output


def fused_attention(device: torch.device, head_dim: int) -> AbstractContextManager:
    """PyTorch's fused attention only: its plain one needs memory for all scores, and cuDNN's plans each new shape anew,
    for up to half a second. Heads whose width is no multiple of 8 the fused ones cannot take."""
    if device.type != "cuda":
        return nullcontext()
    plain = [SDPBackend.MATH] if head_dim % 8 else []
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, *plain])


def bucket(n: int) -> int:
    """The number of rows that a step of n is filled up to: a power of two."""
    return 1 << (n - 1).bit_length()


def padded(values: Sequence[int], n_rows: int) -> np.ndarray:
    """Whole numbers, filled up with zeros."""
    return np.pad(np.array(values, dtype=np.int64), (0, n_rows - len(values)))


def packed(arrays: Mapping[str, np.ndarray], device: torch.device) -> torch.Tensor:
    """Arrays of 64-bit numbers in a row; for a GPU in memory that it can read by itself."""
    flat = torch.from_numpy(np.concatenate([np.ascontiguousarray(a).ravel().view(np.int64) for a in arrays.values()]))
    return flat.pin_memory() if device.type == "cuda" else flat


def unpack(flat: torch.Tensor, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """`packed` arrays as views of tensors, by their names."""
    views, start = {}, 0
    for name, array in arrays.items():
        view = flat[start : start + array.size]
        views[name] = (view.view(torch.float64) if array.dtype == np.float64 else view).view(array.shape)
        start += array.size
    return views


def upload(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Arrays of 64-bit numbers on a device, in one copy that nobody waits for."""
    return unpack(packed(arrays, device).to(device, non_blocking=True), arrays)


def download(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's numbers: the only place of a step where the GPU is waited for."""
    return tensor.cpu().numpy()
