"""The model that is served: loading it in the background, asking it, exchanging it, and its end."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import config_of
from command_line import UserError
from gpt_model import GPTModel
from inference.engine import Engine
from inference.engine_statistics import EngineStatistics
from inference.quantizer import load_any
from inference.request import Generation, QueueFull, Request, RequestFailed, encode_prompt, recommended_sampling
from inference.sampling import SamplingParams, TokenLogProb
from inference.service.conversations import Conversation, guarded
from inference.service.errors import ApiError, unavailable
from inference.service.filters import Filters, Finding
from inference.service.logs import request_id
from inference.service.rate_limit import RateLimit
from inference.service.settings import ServiceSettings, end_process
from inference.service.structured import AnswerForm
from inference.service.text_classifier import load_filter_classifier
from transformer_components import shapes_only

logger = logging.getLogger("service")

# The event loop gives Python's lock away at every read and write, and the engine's thread keeps it for this long: with
# Python's own 5 ms, a hundred requests that come at once would wait for seconds
SWITCH_SECONDS = 0.0005
SHORT_PROMPT = 1000  # characters, which are encoded faster than a thread is asked to
WATCH_SECONDS = 0.5  # how often the engine's thread is looked at
EDIT_SECONDS = 2.0  # how often the filters' files are looked at


class ServedModel:
    """A loaded model, its tokenizer, and the engine that answers with it."""

    def __init__(self, path: str, settings: ServiceSettings) -> None:
        self.path, self.created, self.marks = path, int(time.time()), settings.template_marks
        self.model, self.tokenizer, checkpoint = load_any(
            path, settings.torch_device, precision=settings.precision, ranks=settings.ranks
        )
        self.stage: str = checkpoint["stage"]
        self.quantization: str | None = checkpoint.get("quantization")
        self.recommended = recommended_sampling(self.tokenizer)  # what requests leave out
        with shapes_only():  # counted from the configuration, as quantized weights are no parameters
            self.parameters = GPTModel.from_config(config_of(checkpoint, path)).num_parameters()
        torch.set_num_threads(settings.num_threads)  # the engine's thread will have as many
        self.engine = Engine(
            self.model,
            self.tokenizer,
            max_running=settings.max_batch,
            max_waiting=settings.max_queue,
            drafter=settings.drafter(self.model, self.tokenizer, settings.max_batch, settings.precision),
            ranks=settings.ranks,
        )
        self.engine.start()
        try:  # a model that cannot generate fails here
            self.engine.submit([self.tokenizer.eos_token_id], SamplingParams(2, seed=0)).result()
        except (UserError, RequestFailed) as error:
            self.engine.close()
            raise UserError(f"{path} cannot be served: {error}") from None

    @property
    def chat(self) -> bool:
        """Whether the model answers questions; one that was only pretrained continues texts."""
        return self.stage != "pretrain"

    @property
    def context(self) -> int:
        """How many tokens the model sees, prompt and answer together."""
        return self.model.config.max_seq_len

    def encode(self, prompt: Any, chat: bool) -> list[int]:
        """The ids of a prompt; those of a list of ids are itself."""
        if isinstance(prompt, Conversation):
            return prompt.ids(self.tokenizer, self.marks)
        if isinstance(prompt, str):
            if chat:
                prompt = guarded(prompt, self.tokenizer.template_marks, self.marks)
            return encode_prompt(self.tokenizer, prompt, chat)
        return prompt

    def tokens(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)["input_ids"]

    def close_when_idle(self) -> None:
        """Wait for the last request, then end the engine; runs in a thread of its own."""
        while self.engine.running or self.engine.waiting:
            time.sleep(WATCH_SECONDS)
        self.engine.close()


class Answer:
    """The answers to one HTTP request in the making, as the event loop sees them: n to each of its prompts.

    Args:
        served: what computes them.
        streamed: whether pieces of text are wanted before the end.
        n_answers: how many they are.
        filters: what none of them may have.

    Attributes:
        requests: the engine's requests, those of the first prompt first; none if the question is blocked.
        blocked: what is said instead of all answers.
    """

    def __init__(self, served: ServedModel, streamed: bool, n_answers: int, filters: Filters | None) -> None:
        self.served, self.streamed, self.n_answers, self.filters = served, streamed, n_answers, filters
        self.blocked: str | None = None
        self.requests: list[Request] = []
        self.request_id = request_id.get()
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        self._pieces: deque[tuple[int, str | None]] = deque()
        self._is_woken = False

    def submit(self, prompt_ids: list[int], params: SamplingParams, deadline_s: float) -> None:
        """Put a prompt into the engine's line; the errors are those of `Engine.submit`."""
        listeners = [self._listener(len(self.requests) + index) for index in range(params.n)]
        first = self.served.engine.submit(prompt_ids, params, deadline_s=deadline_s, on_piece=listeners)
        self.requests += first.samples

    def _listener(self, index: int) -> Callable[[str | None], None]:
        def on_piece(piece: str | None) -> None:  # called in the engine's thread
            if self.streamed or piece is None:
                self._pieces.append((index, piece))
                if not self._is_woken:
                    self._is_woken = True
                    self._loop.call_soon_threadsafe(self._event.set)

        return on_piece

    async def pieces(self) -> AsyncIterator[tuple[int, str | None]]:
        """(which of the answers, a piece of it or None for its end), until all have ended."""
        unfinished = len(self.requests)
        while unfinished:
            await self._event.wait()
            self._event.clear()
            self._is_woken = False  # from here on, a new piece wakes this loop again
            while self._pieces:
                index, piece = self._pieces.popleft()
                unfinished -= piece is None
                yield index, piece

    def generation(self, index: int) -> Generation:
        """A finished answer.

        Raises:
            ApiError: 503 if it was ended by the service, 500 if the computation failed.
        """
        try:
            generation = self.requests[index].result()
        except RequestFailed as failure:
            if self.served.engine.closed:
                raise unavailable(str(failure)) from None
            raise ApiError(500, str(failure), code="computation_failed") from None
        if generation.finish_reason == "cancelled":
            raise unavailable("the service is stopping and has ended this answer; ask again")
        return generation

    def prompt_log_probs(self, index: int, n: int) -> list[TokenLogProb]:
        """How likely the tokens of an answer's prompt are; of n answers to one, the first has computed them.

        Raises:
            ApiError: 503, time was up before they were computed.
        """
        request = self.requests[index - index % n]
        if request.unscored:
            raise unavailable("time was up before the prompt's log-probabilities were computed; send shorter ones")
        return request.prompt_log_probs

    async def check(self, text: str) -> Finding | None:
        """What is forbidden in a whole answer; in a thread, as a long one takes a while."""
        return await asyncio.to_thread(self.filters.check, text) if self.filters else None

    def cancel(self) -> None:
        """Take the answers out of the engine; what has ended stays as it is."""
        for request in self.requests:
            request.cancel()


def spare_collections() -> None:
    """What is there by now stays: the garbage collector need not look through it again, which holds every thread."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Health:
    """A state of the service and a sentence for those who ask in vain."""

    name: str
    sentence: str = ""


LOADING = Health("loading", "the model is still being loaded; try again in a moment")
LOADED = Health("loaded")
DRAINING = Health("draining", "the service is stopping; ask another one, or try again in a moment")
FAILED = Health("failed", "the engine or its GPU has failed and has stopped; the service will start anew")


class Service:
    """What all requests share: the settings, the model, and how things stand.

    Attributes:
        served: the model, once it is loaded.
        retired: what the engines of earlier models had counted when they were exchanged.
        filters: what questions and answers may not have; None if nothing is forbidden.

    Raises:
        UserError: a filter cannot be read.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        self.started = time.monotonic()
        self.served: ServedModel | None = None
        self.retired: list[EngineStatistics] = []
        self.parsing = asyncio.Lock()  # held while a large body is parsed
        self.max_connections = settings.max_connections
        self.asking = 0  # connections that wait for an answer of the model
        self.rates = RateLimit(settings.requests_per_minute)
        classifier = None
        if settings.classifier:
            classifier = load_filter_classifier(settings.classifier, settings.classifier_forbids)
        lists = [Path(path) for path in settings.filters]
        self.filters = Filters.load(lists, classifier) if lists or classifier else None
        self.statuses: Counter[tuple[str, int]] = Counter()  # (route, status) → requests
        self.rejected: Counter[str] = Counter()  # why → requests
        self._is_draining = False
        self._answers: set[Answer] = set()
        self._tasks: set[asyncio.Task] = set()
        self._reloading = asyncio.Lock()

    # -- its life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the model in a thread, so that the port is open meanwhile."""
        sys.setswitchinterval(SWITCH_SECONDS)
        self.background(self._load())
        self.background(self._watch())
        if self.filters:
            self.background(self._read_edits())

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Work that goes on until the service ends."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self) -> None:
        settings = self.settings
        logger.info("loading %s: %s", settings.model_path, settings.model_reason)
        try:
            served = await asyncio.to_thread(ServedModel, settings.model_path, settings)
        except UserError as error:
            end_process(str(error), 2)
        except Exception as error:  # memory that ran out, a driver's fault: nobody would be told otherwise
            logger.exception("the model could not be loaded")
            end_process(f"{settings.model_path} could not be loaded: {type(error).__name__}: {error}", 1)
        torch.seed()  # without it, every start would answer the same questions in the same words
        self.served = served
        spare_collections()
        size = f"{served.parameters / 1e6:.1f} million parameters"
        logger.info("serving %s (stage %s, %s) on %s", served.path, served.stage, size, settings.torch_device)
        self._say_recommended(served)

    def _say_recommended(self, served: ServedModel) -> None:
        if served.recommended:
            listed = ", ".join(f"{name} {value:g}" for name, value in served.recommended.items())
            logger.info("where a request leaves it open, as the model's makers recommend: %s", listed)

    async def _watch(self) -> None:
        """End the process when the engine is dead, so that a supervisor starts it anew."""
        while not (self.served and self.served.engine.dead):
            await asyncio.sleep(WATCH_SECONDS)
        logger.critical(self.health.sentence)
        await asyncio.sleep(2 * WATCH_SECONDS)  # those who wait are told first
        end_process(self.health.sentence, 1)

    async def _read_edits(self) -> None:
        """Take over what operators edit in the filters' files."""
        while True:
            await asyncio.sleep(EDIT_SECONDS)
            try:
                if await asyncio.to_thread(self.filters.reload_if_changed):
                    logger.info("the filters were edited and are in force: %d entries", self.filters.n_entries)
            except UserError as error:
                logger.error("the filters were edited, but the old ones stay in force: %s", error)

    def drain(self) -> None:
        """Take no new requests from now on."""
        self._is_draining = True

    def end_answers(self) -> None:
        """End what still runs: those who wait are told to ask elsewhere."""
        if self._answers:
            logger.warning("%d answers are not complete and are ended, as the service stops", len(self._answers))
        for answer in list(self._answers):
            answer.cancel()

    async def close(self) -> None:
        """End the engine."""
        self.drain()
        for task in self._tasks:
            task.cancel()
        if self.served:
            await asyncio.to_thread(self.served.engine.close)

    @property
    def health(self) -> Health:
        """How things stand."""
        if self.served and self.served.engine.dead:
            why = self.served.engine.failure
            return replace(FAILED, sentence=f"{FAILED.sentence} ({why})") if why else FAILED
        if self._is_draining:
            return DRAINING
        return LOADED if self.served else LOADING

    def ready(self) -> ServedModel:
        """The model to ask now.

        Raises:
            ApiError: 503, there is none.
        """
        if self.health is not LOADED:
            raise unavailable(self.health.sentence)
        return self.served

    @property
    def has_room(self) -> bool:
        """Whether one more question may come in."""
        return self.served.engine.room > 0 and self.asking < self.settings.max_batch + self.settings.max_queue

    def queue_full(self) -> ApiError:
        """What a request is told that does not fit into the line any more."""
        message = f"the service is busy and {self.settings.max_queue} requests wait already: try again later"
        return ApiError(429, message, code="queue_full")

    def named(self, model: str | None) -> ServedModel:
        """The model that a client calls by this name; None is the one there is.

        Raises:
            ApiError: 404, there is no such model.
        """
        names = self.settings.model_names
        if model is not None and model not in names:
            message = f"the model {model!r} does not exist; this service serves {', '.join(names)}"
            raise ApiError(404, message, "model", "model_not_found")
        return self.ready()

    async def in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What may take a while, without holding the event loop."""
        return await asyncio.to_thread(work, *arguments)

    # -- asking --------------------------------------------------------------------------------------------------------

    async def answer(
        self,
        prompts: list[Any],
        params: SamplingParams,
        *,
        chat: bool,
        streamed: bool = False,
        invalid: int = 400,
        form: Callable[[ByteLevelBPETokenizer], AnswerForm] | None = None,
    ) -> Answer:
        """Submit a request; `done` must be called when nobody waits for it any more.

        Args:
            prompts: texts, conversations, or lists of token ids.
            params: how to continue all of them.
            chat: whether a text is a user's turn.
            streamed: whether pieces are wanted before the end.
            invalid: the status for a request that is not one for this model.
            form: makes what the answers have to look like.

        Raises:
            ApiError: `invalid`, 429 where too many wait, or 503.
        """
        served = self.ready()
        if params.max_gen_len > self.settings.max_tokens:
            limit = f"a request may ask for {self.settings.max_tokens} new tokens at most, not {params.max_gen_len}"
            raise ApiError(invalid, limit, code="too_many_tokens")
        answer = Answer(served, streamed, len(prompts) * params.n, self.filters)
        self._answers.add(answer)
        try:
            for prompt in prompts if self.filters else ():
                if finding := await asyncio.to_thread(self._check_question, served, prompt):
                    answer.blocked = self.filters.block("question", finding)
                    return answer
            # In threads, as long prompts and large forms take a while; what follows is quick
            made = form and await asyncio.to_thread(form, served.tokenizer)
            for prompt in prompts:
                if isinstance(prompt, str) and len(prompt) <= SHORT_PROMPT:
                    prompt_ids = served.encode(prompt, chat)
                else:
                    prompt_ids = await asyncio.to_thread(served.encode, prompt, chat)
                if made:
                    room = max(1, min(params.max_gen_len, served.context - len(prompt_ids)))
                    made.require_room(room)
                    params = replace(params, max_gen_len=room, form=made)
                answer.submit(prompt_ids, params, self.settings.request_timeout)
        except BaseException as error:
            self.done(answer)
            if isinstance(error, UserError):
                code = "context_length_exceeded" if "the model's context only" in str(error) else None
                raise ApiError(invalid, str(error), code=code) from None
            if isinstance(error, QueueFull):
                raise self.queue_full() from None
            if isinstance(error, RequestFailed):
                raise unavailable(str(error)) from None
            raise
        return answer

    def _check_question(self, served: ServedModel, prompt: Any) -> Finding | None:
        """What is forbidden in a text, in what others than the assistant say, or in the text of token ids."""
        if isinstance(prompt, str):
            texts = [prompt]
        elif isinstance(prompt, Conversation):
            texts = [message.content or "" for message in prompt.messages if message.role != "assistant"]
        else:
            texts = [served.tokenizer.decode(prompt)]
        return next(filter(None, map(self.filters.check, texts)), None)

    def done(self, answer: Answer) -> None:
        """Nobody waits for this answer any more: it is taken out if it has not ended."""
        answer.cancel()
        self._answers.discard(answer)
        if self.settings.log_texts:
            for request in answer.requests:
                text = request.generation.text if request.generation else None
                prompt = answer.served.tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
                fields = {"request_id": answer.request_id, "prompt": prompt, "answer": text}
                logger.info("texts", extra={"fields": fields})

    # -- another model -------------------------------------------------------------------------------------------------

    async def reload(self, path: str | None) -> ServedModel:
        """Load a model beside the present one, then let new requests go to it; the old one ends what it has.

        Raises:
            ApiError: 400 it cannot be served, 409 a reload is going on, or several processes share the model.
        """
        if self.settings.ranks:
            raise ApiError(409, "several processes share the model and cannot exchange it; start them anew instead")
        if self._reloading.locked():
            raise ApiError(409, "another reload is going on; wait for it")
        async with self._reloading:
            old = self.ready()
            path = path or self.settings.model_path
            try:
                new = await asyncio.to_thread(ServedModel, path, self.settings)
            except UserError as error:
                raise ApiError(400, str(error), "model_path") from None
            self.settings.model_path, self.served = path, new
            logger.info("serving %s from now on; %s answers what it has taken", path, old.path)
            self._say_recommended(new)
            self.background(self._retire(old))
            return new

    async def _retire(self, old: ServedModel) -> None:
        await asyncio.to_thread(old.close_when_idle)
        self.retired.append(old.engine.statistics())
        del old
        spare_collections()

    def statistics(self) -> list[EngineStatistics]:
        """Of the present engine first, then of earlier ones."""
        return [*([self.served.engine.statistics()] if self.served else []), *self.retired]
