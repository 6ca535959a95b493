"""The engine: many requests, one model, one forward pass a step (continuous batching, Orca, OSDI 2022).

    engine = Engine(model, tokenizer)
    generations = engine.run(["The capital of France", "2 + 3 ="], SamplingParams(temperature=0))
    with engine:  # a thread that computes in the background
        for piece in engine.submit("你好", chat=True).stream():
            print(piece, end="", flush=True)

Every step takes one token of each request that is being answered and a chunk of each prompt that is not yet computed.
All of them stand in one row, so that each linear layer reads its weights once. Requests join and leave between any two
steps. In a step, in this order:

    leave     cancelled requests and those past their deadline
    admit     from the line, first come first served, while there are a slot and memory
    plan      which tokens come next; where memory is short, the youngest request goes back to the head of the line
    draft     what may come after them, where there is a drafter and it pays (speculation.py)
    compute   forward pass, and one batched choice of tokens, each request with its own settings (model_step.py)
    deliver   tokens, text and ends to those who wait for them

A request's tokens depend on its prompt, parameters and seed, and not on the requests beside it, on preemption, on what
was found in the cache, or on what was drafted; except that sums in another order differ in their last digits, which may
turn a tie.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError
from gpt_model import GPTModel
from inference.engine_statistics import EngineStatistics
from inference.kernels.known_parts import refuse_other_forward
from inference.kernels.paged_attention import BLOCK_SIZE
from inference.model_step import Computed, ModelStep
from inference.request import Generation, Prompt, QueueFull, Request, RequestFailed, Span, checked_ids
from inference.sampling import SampledTokens, SamplingParams, TokenLogProb
from inference.speculation import Drafter, Speculation
from inference.tensor_parallel import RankLost, Ranks
from inference.text_stream import TextStream
from machine import is_device_lost

logger = logging.getLogger(__name__)

PREFILL_CHUNK, GPU_PREFILL_CHUNK = 256, 2048  # a GPU reads as many tokens in the time of some of the CPU's

NOT_FINITE = "the model's output is not finite (NaN or infinity): its weights may be damaged"

class Engine:
    """Answers requests with one model, many at a time. Its methods may be called from any thread.

    Args:
        model: in evaluation mode while it computes.
        tokenizer: of the model; None serves token ids alone.
        max_running: requests that are computed together.
        max_waiting: requests that may wait beyond those that can start at once.
        cache_tokens: cells of the key/value cache, at least the model's context; None: enough for `max_running`
            requests of `longest` tokens, but at most 1 GiB, on a GPU 80 % of its free memory.
        prefill_chunk: at most this many tokens of prompts a step, so that a long prompt does not stall running answers;
            None: 256, on a GPU 2,048.
        cache_dtype: of the cache: None for the model's own, torch.int8 for a quarter of the memory.
        reuse_prefixes: compute what prompts have in common at their beginning only once.
        drafter: proposes tokens, so that a pass may bring more than one of an answer; it is for this engine alone.
        longest: of the requests, prompt and answer together, as far as it is known; None: the model's context.
        gpu_step: whether to compute as on a GPU, see gpu_step.py; None: on a GPU.
        cuda_graphs: whether a GPU's steps are recorded.
        ranks: the processes that share the model, of which this is the first; see tensor_parallel.py.

    Raises:
        UserError: an impossible setting, or a model that computes its logits in another way than `GPTModel`.
    """

    def __init__(
        self,
        model: GPTModel,
        tokenizer: ByteLevelBPETokenizer | None,
        max_running: int = 16,
        max_waiting: int = 64,
        cache_tokens: int | None = None,
        prefill_chunk: int | None = None,
        cache_dtype: torch.dtype | None = None,
        reuse_prefixes: bool = True,
        drafter: Drafter | None = None,
        longest: int | None = None,
        gpu_step: bool | None = None,
        cuda_graphs: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        self.device = model.device
        if prefill_chunk is None:
            prefill_chunk = GPU_PREFILL_CHUNK if self.device.type == "cuda" else PREFILL_CHUNK
        for name, value in (("max_running", max_running), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        refuse_other_forward(model)
        if model.position_embedding.depends_on_length:
            # One request at a time, its prompt in one piece: what is computed with others would depend on these
            max_running, prefill_chunk, reuse_prefixes, drafter = 1, model.config.max_seq_len, False, None
        self.model, self.tokenizer = model, tokenizer
        self.end_token_ids = () if tokenizer is None else tokenizer.end_token_ids
        self.max_running, self.max_waiting, self.prefill_chunk = max_running, max_waiting, prefill_chunk
        self.model_step = ModelStep(
            model, max_running, cache_tokens, cache_dtype, reuse_prefixes, longest, gpu_step, cuda_graphs, ranks
        )
        self.cache = self.model_step.cache
        self.speculation = None if drafter is None else Speculation(drafter)
        self._has_new_requests = False
        self.running: list[Request] = []  # oldest first
        self.waiting: OrderedDict[Request, None] = OrderedDict()
        self._cancelled: list[Request] = []
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap
        self._n_deadlines = 64  # how long it was when finished requests were last taken out, or more
        self._arrivals = 0
        self._statistics = EngineStatistics(cache_tokens=self.cache.n_tokens)
        self._changed = threading.Condition()  # guards the line, and everything that others than the stepper touch
        self._stepping = threading.RLock()
        self._thread: threading.Thread | None = None
        self._closed = self._broken = False
        self.failure = ""  # why it is broken, a sentence
        if ranks:
            ranks.watch(self._break)

    # -- requests ------------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt | list[int],
        params: SamplingParams | None = None,
        chat: bool = False,
        deadline_s: float | None = None,
        on_piece: Callable[[str | None], None] | Sequence[Callable[[str | None], None]] | None = None,
    ) -> Request:
        """Put a request into the line.

        Args:
            prompt: a text, with `chat` also the messages of a conversation; or token ids.
            params: see `SamplingParams`; with n > 1 the first of `n` requests is returned, `samples` has them all.
            chat: put the prompt into the chat template, so that it is answered and not continued.
            deadline_s: seconds from now after which the request ends with what it has.
            on_piece: called with each piece of text, and with None after the last, in place of `Request.stream`; it
                runs in the thread that computes and must return at once. With n > 1, one for all or `n` of them.

        Raises:
            UserError: a prompt or parameters with which nothing can be computed.
            QueueFull: as many requests wait as may wait.
            RequestFailed: the engine is closed.
        """
        if deadline_s is not None and not deadline_s > 0:
            raise UserError(f"deadline_s must be above 0, not {deadline_s}")
        params = params or SamplingParams()
        ids = checked_ids(prompt, params, chat, self.tokenizer, self.model.config)
        return self._enter(self._requests(ids, params, deadline_s, on_piece, streamed=True), bounded=True)[0]

    def run(
        self,
        prompts: Sequence[Prompt | list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        chat: bool = False,
        on_finished: Callable[[], None] | None = None,
    ) -> list[Generation]:
        """Answer all prompts, in the caller's thread unless the engine has one, and return the answers in their order.

        Args:
            prompts: as in `submit`; the line's bound does not count here.
            params: for all prompts, or for each its own. Without a seed, each answer draws one from torch's generator.
            chat: see `submit`.
            on_finished: called after each answer is complete, in any order.

        Returns:
            the answers; with n > 1, the n answers to a prompt stand together.
        """
        settings = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        listener = None if on_finished is None else lambda piece: piece is None and on_finished()
        requests: list[Request] = []
        for prompt, setting in zip(prompts, settings, strict=True):
            ids = checked_ids(prompt, setting, chat, self.tokenizer, self.model.config)
            requests += self._requests(ids, setting, None, listener, streamed=False)
        was_training = self.model.training
        self.model.eval()
        try:
            self._enter(requests, bounded=False)
            return [request.result() for request in requests]
        except RequestFailed as failure:
            raise failure.__cause__ or failure from None
        finally:
            for request in requests:
                request.cancel()
            if was_training:
                self.model.train()

    def cancel(self, request: Request) -> None:
        """End a request in the next step, or now if it still waits."""
        with self._changed:
            if request in self.waiting:
                self._finish(request, "cancelled")
            else:
                self._cancelled.append(request)
                self._changed.notify_all()

    def _requests(
        self,
        ids: list[int],
        params: SamplingParams,
        deadline_s: float | None,
        on_piece: Callable[[str | None], None] | Sequence[Callable[[str | None], None]] | None,
        streamed: bool,
    ) -> list[Request]:
        """The `n` requests of one prompt."""
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        listeners = on_piece if isinstance(on_piece, Sequence) else [on_piece] * params.n
        samples = []
        for index, listener in enumerate(listeners):
            # Without a listener and stop strings, the text is decoded once, at the end
            follows = self.tokenizer is not None and (streamed or params.stop)
            text = TextStream(self.tokenizer, params.stop) if follows else None
            samples.append(Request(self, ids, params, index, deadline, text, listener))
        for request in samples:
            request.samples = samples
            self._slide(request)
        return samples

    def _enter(self, requests: list[Request], bounded: bool) -> list[Request]:
        with self._changed:
            if self._closed:
                raise RequestFailed("the engine is closed")
            if bounded and len(requests) > self.room:
                self._statistics.rejected += len(requests)
                raise QueueFull(f"{len(self.waiting)} requests wait already; try again later")
            for request in requests:
                self._arrivals += 1
                request.arrival = self._arrivals
                self.waiting[request] = None
                if request.deadline is not None:
                    heapq.heappush(self._deadlines, (request.deadline, request.arrival, request))
            if len(self._deadlines) > 2 * self._n_deadlines:  # or requests stay until their time is up, long finished
                self._deadlines = [entry for entry in self._deadlines if not entry[2].finished]
                heapq.heapify(self._deadlines)
                self._n_deadlines = max(64, len(self._deadlines))
            self._statistics.submitted += len(requests)
            self._has_new_requests = True
            self._changed.notify_all()
        return requests

    # -- the background thread -----------------------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        """Whether a thread of the engine's own computes."""
        return self._thread is not None

    @property
    def dead(self) -> bool:
        """Whether nothing can be computed any more: the engine's thread has ended because of a mistake in it, the GPU
        has failed, or a process that shares the model has ended."""
        return self._broken or (self._thread is not None and not self._thread.is_alive())

    @property
    def closed(self) -> bool:
        """Whether no request is taken any more."""
        return self._closed

    @property
    def room(self) -> int:
        """How many more requests the line takes."""
        return self.max_waiting + self.max_running - len(self.running) - len(self.waiting)

    def start(self) -> None:
        """Compute in a thread of the engine's own from now on."""
        if self._thread is None:
            self.model.eval()
            n_threads = torch.get_num_threads()  # a new thread would begin with the default
            self._thread = threading.Thread(target=self._serve, args=(n_threads,), name="engine", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Compute no more; requests that are not finished fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._fail_all("the engine was closed before the answer was complete")
        self.model_step.close()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, n_threads: int) -> None:
        torch.set_num_threads(n_threads)
        try:
            while True:
                with self._changed:
                    while not (self._closed or self.running or self.waiting or self._cancelled):
                        self._changed.wait()
                    if self._closed:
                        return
                self.step()
        except RankLost:  # all who wait have been told
            return
        except BaseException:  # a mistake in this file: nobody may be left waiting for ever
            self._closed = self._broken = True  # before anybody hears of it and asks
            self._fail_all("the engine has stopped because of an internal error")
            raise

    def _break(self, sentence: str) -> None:
        """Nothing can be computed any more; may be called while a step is stuck."""
        if self.started and not self.failure:  # otherwise the caller's step raises it
            logger.critical(sentence)
        with self._changed:
            self.failure = self.failure or sentence
            self._closed = self._broken = True
            self._changed.notify_all()

    def _fail_all(self, reason: str) -> None:
        with self._stepping, self._changed:
            for request in [*self.running, *self.waiting]:
                self._finish(request, "error", RequestFailed(reason))

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One forward pass for all who are there; nothing if nobody is. An exception fails those who took part; where
        the GPU has failed for good, it fails all and is raised."""
        with self._stepping:
            began, statistics = time.perf_counter(), self._statistics
            elsewhere, prefilled = statistics.seconds_elsewhere, statistics.tokens_prefilled
            by_token = statistics.sampling_seconds + statistics.drafting_seconds
            with self._changed:
                self._leave()
                self._admit()
            spans: list[Span] = []
            try:
                spans = self._plan()
                if spans:
                    if self.speculation is not None:
                        spans = self._draft(spans)
                    self._deliver(spans, self._compute(spans))
            except Exception as error:
                if not spans:  # a mistake in this file, which the next step would make again
                    raise
                statistics.failed_steps += 1
                is_rank_lost = isinstance(error, RankLost)
                if not is_rank_lost:
                    logger.exception("a step of the engine failed")
                if is_rank_lost or is_device_lost(error) or self.model_step.is_lost:
                    sentence = str(error) if is_rank_lost else f"the GPU has failed: {error}"
                    self._break(sentence)
                    self._fail_all(sentence)
                    raise
                failure = RequestFailed(f"the computation failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                for request, _ in spans:
                    if not request.finished:
                        self._fail(request, failure)
            if spans:
                statistics.steps += 1
                seconds = time.perf_counter() - began
                statistics.overhead_seconds += seconds - (statistics.seconds_elsewhere - elsewhere)
                if self.speculation is not None and statistics.tokens_prefilled == prefilled:
                    seconds -= statistics.sampling_seconds + statistics.drafting_seconds - by_token
                    self.speculation.passed(sum(n_new for _, n_new in spans), seconds)

    def _leave(self) -> None:
        for request in self._cancelled:
            if not request.finished:
                self._finish(request, "cancelled")
        self._cancelled.clear()
        with self._changed:
            while self._deadlines and self._deadlines[0][0] <= time.monotonic():
                request = heapq.heappop(self._deadlines)[2]
                if not request.finished:
                    self._finish(request, "deadline")

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_running:
            request = next(iter(self.waiting))
            known = request.findable
            if not self.cache.has_room(request.context, len(self.running), known) or self._is_being_computed(request):
                break
            del self.waiting[request]
            request.sequence = self.cache.open(request.context, known)
            self._statistics.tokens_reused += request.sequence.length
            self._statistics.tokens_looked_up += len(request.context)
            if request.admitted is None:
                request.admitted = time.monotonic()
                self._statistics.queued.add(request.admitted - request.submitted)
            self.running.append(request)
        self.running.sort(key=lambda request: request.arrival)  # one that was preempted takes its old place

    def _is_being_computed(self, request: Request) -> bool:
        """Whether waiting pays: a running request is about to store a further block of this one's prompt."""
        findable = request.findable
        n_shared = self.cache.known_length(findable) + BLOCK_SIZE
        if not self.cache.reuse_prefixes or len(findable) <= n_shared:
            return False
        beginning = findable[:n_shared]
        return any(
            other.sequence.length < n_shared < len(other.context) and other.context[:n_shared] == beginning
            for other in self.running
        )

    def _plan(self) -> list[Span]:
        """The tokens of this step: the next one of each answer; of prompts, the oldest first, up to `prefill_chunk`."""
        spans: list[Span] = []
        budget = self.prefill_chunk
        for request in self.running.copy():
            if request.sequence is None:  # an older one has just taken its memory
                continue
            n_new = len(request.context) - request.sequence.length
            if n_new > 1:  # a piece of a prompt; the next token of an answer is never held back
                n_new = min(n_new, budget)
                budget -= n_new
            if n_new and self._make_room(request, n_new):
                spans.append((request, n_new))
        spans.sort(key=lambda span: span[1])  # as the cache wants them: single tokens first
        return spans

    def _make_room(self, request: Request, n_new: int) -> bool:
        """Cells for the new tokens of a request, taken from younger ones if need be; False if it is the youngest."""
        while not self.cache.reserve(request.sequence, request.sequence.length + n_new):
            victim = self.running[-1]  # the plan has not come to it yet, or it is the request itself
            self._put_back(victim)
            self._statistics.preemptions += 1
            if victim is request:
                return False
        return True

    def _put_back(self, request: Request) -> None:
        """Back to the head of the line, without memory; what its tokens were computed from is there to go on with."""
        self._release(request)
        with self._changed:
            self.waiting[request] = None
            self.waiting.move_to_end(request, last=False)

    def _release(self, request: Request) -> None:
        if request.sequence is not None:
            self.running.remove(request)
            self.cache.close(request.sequence)
            request.sequence = None
            if self.speculation is not None:
                self.speculation.drop(request)

    def _draft(self, spans: list[Span]) -> list[Span]:
        began = time.perf_counter()
        spans = self.speculation.extended(spans, self.cache, len(self.running), self.end_token_ids)
        self._statistics.drafting_seconds += time.perf_counter() - began
        return spans

    def _compute(self, spans: list[Span]) -> Computed:
        statistics = self._statistics
        if self._has_new_requests:
            self.model_step.look_at_model()
            self._has_new_requests = False
        computed = self.model_step.compute(spans)
        statistics.model_seconds += computed.model_seconds
        statistics.sampling_seconds += computed.sampling_seconds
        statistics.tokens_prefilled += sum(n_new for request, n_new in spans if n_new > 1 and not request.draft)
        return computed

    def _deliver(self, spans: list[Span], computed: Computed) -> None:
        """What a step has brought, to those who wait for it."""
        n_finite, complete, sampled = computed.n_finite, computed.complete, computed.sampled
        for request, log_probs in computed.scored:
            request.prompt_log_probs += log_probs
        is_finite = [n >= n_new - len(request.draft) for (request, n_new), n in zip(spans, n_finite, strict=True)]
        for index, tokens in zip(complete, sampled, strict=True):
            is_finite[index] = is_finite[index] and tokens.finite[0]
        for index, (request, n_new) in enumerate(spans):
            if is_finite[index]:
                self.cache.stored(request.sequence, request.context, n_new - len(request.draft))
            else:
                self._fail(request, RequestFailed(NOT_FINITE))
        now = time.monotonic()
        for index, tokens in zip(complete, sampled, strict=True):
            request, n_new = spans[index]
            if is_finite[index]:
                self._go_on(request, tokens, now)
            if n_finite[index] < n_new and request.sequence is not None:  # in the wrong part of a draft
                self.cache.scrub(request.sequence)

    def _go_on(self, request: Request, tokens: SampledTokens, now: float) -> None:
        """Add the tokens of a step to an answer: those of its draft that were right, then the one after them."""
        n_drafted, n_right = len(request.draft), len(tokens.token_ids) - 1
        if n_drafted:
            self._statistics.drafts += 1
            self._statistics.tokens_drafted += n_drafted
            self._statistics.tokens_accepted += n_right
            self.speculation.verified(request, n_drafted, n_right)
        for number, (token_id, is_finite) in enumerate(zip(tokens.token_ids, tokens.finite, strict=True)):
            if number:  # the token before stood in the draft, so its key and value are there
                self.cache.stored(request.sequence, request.context, 1)
            if not is_finite:
                return self._fail(request, RequestFailed(NOT_FINITE))
            self._accept(request, token_id, tokens.log_probs[number], now)
            if request.finished:  # what was drafted beyond the end is not wanted
                return None
        return None

    def _accept(self, request: Request, token_id: int, log_prob: TokenLogProb | None, now: float) -> None:
        """Add a token to an answer, and end the answer where it ends."""
        statistics, params = self._statistics, request.params
        timing = statistics.between_tokens if request.token_ids else statistics.time_to_first_token
        timing.add(now - request.last_token)
        request.last_token = now
        statistics.tokens_generated += 1
        request.token_ids.append(token_id)
        request.context.append(token_id)
        if log_prob is not None:
            request.log_probs.append(log_prob)
        if token_id in params.stop_token_ids or (token_id in self.end_token_ids and not params.ignore_eos):
            return self._finish(request, "stop")
        if request.text is not None:
            piece = request.text.push(token_id)
            if piece:
                request.emit(piece)
            if request.text.stopped:
                return self._finish(request, "stop")
        if len(request.token_ids) >= params.max_gen_len:
            return self._finish(request, "length")
        if len(request.context) >= self.model.config.max_seq_len:
            if params.overflow != "slide":
                return self._finish(request, "length")
            self._slide(request)
        return None

    def _slide(self, request: Request) -> None:
        """Drop the older half of a full context; the rest is computed again, with new positions."""
        context = self.model.config.max_seq_len
        if len(request.context) >= context:
            request.context = request.context[-max(1, context // 2) :]
            if request.sequence is not None:
                self._put_back(request)

    def _fail(self, request: Request, failure: RequestFailed) -> None:
        if request.sequence is not None:
            self.cache.scrub(request.sequence)
        self._finish(request, "error", failure)

    def _finish(self, request: Request, reason: str, failure: RequestFailed | None = None) -> None:
        """Take a request out, free its cells and give it what it has so far."""
        self._release(request)
        with self._changed:
            self.waiting.pop(request, None)
        statistics = self._statistics
        statistics.finished[reason] += 1
        statistics.whole_request.add(time.monotonic() - request.submitted)
        statistics.prompt_tokens.add(len(request.prompt_ids))
        statistics.answer_tokens.add(len(request.token_ids))
        request.finish(reason, self.tokenizer, failure)

    # -- from outside --------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Reuse nothing that was computed so far: to be called when the model's weights have changed."""
        with self._stepping:
            self.cache.forget([request.sequence for request in self.running])

    def statistics(self) -> EngineStatistics:
        """The counts so far; they do not change any more, and `time_to_first_token` and `between_tokens` do."""
        snapshot = replace(self._statistics, finished=self._statistics.finished.copy())
        snapshot.running, snapshot.waiting = len(self.running), len(self.waiting)
        snapshot.cache_tokens_used = self.cache.n_used
        return snapshot
