"""The generation service: one model behind HTTP.

    uvicorn inference.api_service:app --host 0.0.0.0 --port 8000
    python inference/api_service.py                                   # the same

    curl -X POST http://localhost:8000/generate -H "Content-Type: application/json" \\
         -d '{"prefix": "解释什么是机器学习", "max_gen_len": 100, "top_k": 50, "temperature": 0.8}'

    POST /generate   prefix (required), max_gen_len, top_k, temperature, and more (`GenerateRequest`, /docs)
                     →  prefix, generated_text
    GET  /health     what is being served, on which device, how many requests run and wait
    GET  /docs       the same, as a page to try it on

Every error is `{"error": {"message": …}}` with a sentence that says what was wrong.

The engine computes in a thread of its own, so the event loop stays free and `/health` is quick at any time. Requests
join the running batch and leave it at every step, each with settings of its own; beyond MAX_BATCH they wait in a
bounded line. When a client leaves, its request gives its place away within one step.

Environment variables:
    MODEL_PATH    the checkpoint to serve; by default the best one that training has left under models/
    DEVICE        auto (default), cpu, cuda or mps
    NUM_THREADS   threads for one operation on the CPU; by default all cores but one, which is left to the event loop
    MAX_QUEUE     requests that may wait (64); beyond that the answer is 503 with Retry-After
    MAX_BATCH     requests that are computed together (8)

Run a single uvicorn worker, the default: every further worker would load a model of its own and compete for the same
cores. Ctrl-C or SIGTERM lets the accepted requests finish first; uvicorn's `--timeout-graceful-shutdown` limits that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

if not __package__:  # run as a file: modules are imported from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from command_line import UserError, option, parse_config, require_file, run_main
from gpt_model import GPTModel
from inference.engine import Engine
from inference.quantizer import load_any
from inference.request import QueueFull, RequestFailed, encode_prompt
from inference.sampling import SamplingParams
from machine import resolve_device

REPOSITORY = Path(__file__).resolve().parent.parent
MODELS_BEST_FIRST = (
    "models/rlhf/ppo_best.pth",
    "models/grpo/grpo_best.pth",
    "models/dpo/dpo_best.pth",
    "models/kto/kto_best.pth",
    "models/sft/sft_best.pth",
    "models/sft/sft_best_int8.pth",
    "models/pretrain/pretrain_best.pth",
)
MAX_BODY_BYTES = 1 << 20
MAX_PREFIX_CHARACTERS = 32_768
MAX_NEW_TOKENS = 4096
RETRY_AFTER_SECONDS = 2
MAX_STOP_STRINGS = 16
MAX_LISTED_TOKENS = 1024

logger = logging.getLogger("uvicorn.error")  # the log that uvicorn shows


TokenId = Annotated[int, Field(ge=0, le=2**31)]
TokenIdAsKey = Annotated[str, Field(pattern=r"^\d{1,10}$")]  # JSON's keys are strings
StopString = Annotated[str, Field(min_length=1, max_length=256)]
StopStrings = Annotated[
    list[StopString],
    Field(max_length=MAX_STOP_STRINGS),
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop, json_schema_input_type=str | list[str]),
]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class GenerateRequest(BaseModel):
    """What to generate. Types are strict, and a misspelt field is an error instead of being ignored."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prefix: str = Field(
        min_length=1,
        max_length=MAX_PREFIX_CHARACTERS,
        description="The question, or for a model that was only pretrained the text to continue.",
        examples=["解释什么是机器学习"],
    )
    max_gen_len: int = Field(100, ge=1, le=MAX_NEW_TOKENS, description="At most this many new tokens.")
    top_k: int = Field(50, ge=0, le=2**31, description="Sample among the k likeliest tokens; 0 means all.")
    temperature: float = Field(0.8, ge=0, le=2, allow_inf_nan=False, description="0 takes the likeliest token.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="Makes sampling repeatable.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that have this probability.")
    min_p: float = Field(0.0, ge=0, le=1, description="Drop tokens less likely than this share of the likeliest one.")
    repetition_penalty: float = Field(
        1.0, gt=0, le=10, description="Above 1, tokens of the prefix and the answer become less likely."
    )
    presence_penalty: Penalty = Field(0.0, description="Subtracted from the logit of a token that the answer has.")
    frequency_penalty: Penalty = Field(0.0, description="Subtracted for each time that the answer has the token.")
    logit_bias: dict[TokenIdAsKey, Bias] = Field(
        {}, max_length=MAX_LISTED_TOKENS, description="Token id → what is added to its logit."
    )
    banned_tokens: list[TokenId] = Field([], max_length=MAX_LISTED_TOKENS, description="Ids that are never produced.")
    stop: StopStrings = Field([], description="One or several strings that end the answer and are not part of it.")
    stop_token_ids: list[TokenId] = Field([], max_length=MAX_LISTED_TOKENS, description="Ids that end the answer.")
    ignore_eos: bool = Field(False, description="Go on after the token that ends an answer.")
    overflow: Literal["error", "slide"] = Field(
        "error", description="`slide` goes on beyond the model's context, forgetting the oldest tokens."
    )

    def params(self) -> SamplingParams:
        """The fields but the prefix, as the engine takes them."""
        fields = self.model_dump(exclude={"prefix"})
        fields["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return SamplingParams(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        )


class GenerateResponse(BaseModel):
    """The prompt and what the model wrote after it."""

    prefix: str
    generated_text: str


class HealthResponse(BaseModel):
    """What is being served and how busy it is."""

    status: str
    model_path: str
    stage: str
    quantization: str | None
    parameters: int
    max_seq_len: int
    device: str
    num_threads: int
    running: int
    waiting: int
    uptime_seconds: float


class ErrorDetail(BaseModel):
    """A sentence that says what was wrong."""

    message: str


class ErrorResponse(BaseModel):
    """The one shape of every error."""

    error: ErrorDetail


@dataclass(frozen=True)
class ServiceSettings:
    """The settings of the service; the module's docstring explains them."""

    model_path: Path
    device: torch.device
    num_threads: int
    max_queue: int
    max_batch: int

    @classmethod
    def from_environment(cls) -> ServiceSettings:
        """Read the environment variables.

        Raises:
            UserError: a number is not a number, or there is no model.
        """
        return cls(
            model_path=model_to_serve(os.environ.get("MODEL_PATH")),
            device=resolve_device(os.environ.get("DEVICE") or "auto"),
            num_threads=_positive_number("NUM_THREADS", max(1, available_cores() - 1)),
            max_queue=_positive_number("MAX_QUEUE", 64),
            max_batch=_positive_number("MAX_BATCH", 8),
        )


def available_cores() -> int:
    """The cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _positive_number(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"the environment variable {variable} must be a whole number from 1 on, not {text!r}")
    return int(text)


def model_to_serve(chosen: str | None, folder: Path = REPOSITORY) -> Path:
    """The checkpoint that the user has chosen, or the best of those that training leaves under `folder`."""
    if chosen:
        return require_file(chosen, "the model of MODEL_PATH", "set MODEL_PATH to a checkpoint")
    for path in MODELS_BEST_FIRST:
        if (folder / path).is_file():
            return folder / path
    raise UserError("there is no model to serve under models/; train one with run_training.sh, or set MODEL_PATH")


class Service:
    """A loaded model and the engine that answers requests with it."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        self.started = time.monotonic()
        torch.set_num_threads(settings.num_threads)  # the engine's thread will have as many
        self.model, self.tokenizer, checkpoint = load_any(settings.model_path, settings.device)
        self.stage: str = checkpoint["stage"]
        self.quantization: str | None = checkpoint.get("quantization")
        with torch.device("meta"):  # counted from the configuration, as quantized weights are no parameters
            self.parameters = GPTModel.from_config(self.model.config).num_parameters()
        self.engine = Engine(self.model, self.tokenizer, max_running=settings.max_batch, max_waiting=settings.max_queue)

    @property
    def chat(self) -> bool:
        """Whether the model answers questions; one that was only pretrained continues texts."""
        return self.stage != "pretrain"

    async def answer(self, request: GenerateRequest) -> str:
        """What the model writes after the request's prefix; cancelling this takes the request out of the engine.

        Raises:
            HTTPException: 422 if the request is not one for this model, 503 if too many requests wait already, 500 if
                the computation failed.
        """
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def on_piece(piece: str | None) -> None:  # called in the engine's thread
            if piece is None:
                loop.call_soon_threadsafe(done.set)

        try:
            # In a thread, as a long prefix takes a while; what follows is quick
            prompt_ids = await asyncio.to_thread(encode_prompt, self.tokenizer, request.prefix, self.chat)
            running = self.engine.submit(prompt_ids, request.params(), on_piece=on_piece)
        except UserError as error:
            raise HTTPException(422, str(error)) from None
        except QueueFull:
            message = f"the service is busy and {self.settings.max_queue} requests wait already: try again later"
            raise HTTPException(503, message, {"Retry-After": str(RETRY_AFTER_SECONDS)}) from None
        try:
            await done.wait()
        finally:
            running.cancel()  # which does nothing to a finished one
        try:
            return running.result().text
        except RequestFailed as failure:
            raise HTTPException(500, str(failure)) from None


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Service]]:
    """Load the model before the port is opened and hand it to the requests; at the end, stop the engine."""
    settings = ServiceSettings.from_environment()
    logger.info("loading %s", settings.model_path)
    service = Service(settings)
    torch.seed()  # without it, every start would answer the same questions in the same words
    service.engine.start()
    try:
        try:  # a model that cannot generate fails here
            await service.answer(GenerateRequest(prefix="?", max_gen_len=2))
        except HTTPException as error:
            raise UserError(f"{settings.model_path} cannot be served: {error.detail}") from None
        size = f"{service.parameters / 1e6:.1f} million parameters"
        logger.info("serving %s (stage %s, %s) on %s", settings.model_path, service.stage, size, settings.device)
        yield {"service": service}
    finally:
        await asyncio.to_thread(service.engine.close)


class StartupErrorInOneSentence:
    """Reports a user's mistake at the start as its sentence, where Starlette would report a traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_sentence(message: Message) -> None:
            error = sys.exc_info()[1]  # Starlette sends the report while it handles the exception
            if message["type"] == "lifespan.startup.failed" and isinstance(error, UserError):
                message = {**message, "message": str(error)}
            await send(message)

        await self.app(scope, receive, send_sentence if scope["type"] == "lifespan" else send)


class BodyLimit:
    """Ends the reading of a request's body with 413 as soon as it grows beyond `MAX_BODY_BYTES`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise HTTPException(413, f"the request's body is larger than {MAX_BODY_BYTES} bytes")
            return message

        await self.app(scope, receive_limited if scope["type"] == "http" else receive, send)


app = FastAPI(
    title="GPT generation service", description="Text generation with a model of one's own.", lifespan=lifespan
)
app.add_middleware(BodyLimit)
app.add_middleware(StartupErrorInOneSentence)


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error in the service's one shape; a sentence may quote what a client sent, so it is made valid UTF-8."""
    message = message.encode("utf-8", "replace").decode()
    return JSONResponse({"error": {"message": message}}, status, headers)


@app.exception_handler(AnyHTTPException)
async def http_error(request: Request, error: AnyHTTPException) -> JSONResponse:
    """Errors that the service or the framework raises on purpose, unknown paths and methods included."""
    unknown = error.status_code in (404, 405)
    message = f"there is no {request.method} {request.url.path}: see /docs" if unknown else error.detail
    return error_response(error.status_code, message, error.headers)


@app.exception_handler(RequestValidationError)
async def invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
    """A body that is not JSON (400), or JSON that is not a `GenerateRequest` (422)."""
    complaints = []
    for detail in error.errors():
        if detail["type"] == "json_invalid":
            return error_response(400, f"the body is not valid JSON: {detail['ctx']['error']}")
        field = ".".join(map(str, detail["loc"][1:]))[:80]
        complaint = detail["msg"][0].lower() + detail["msg"][1:]
        complaints.append(f"{field}: {complaint}" if field else 'the body must be a JSON object like {"prefix": "…"}')
    return error_response(422, "; ".join(complaints[:8]))


@app.exception_handler(Exception)
async def internal_error(_: Request, error: Exception) -> JSONResponse:
    """A fault of the service; uvicorn's log has the traceback."""
    return error_response(500, f"the service failed with {type(error).__name__}: see its log")


async def client_left(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


@app.post(
    "/generate",
    responses={
        400: {"model": ErrorResponse, "description": "The body is not JSON."},
        413: {"model": ErrorResponse, "description": "The body is too large."},
        422: {"model": ErrorResponse, "description": "The body is JSON, but not a valid request."},
        503: {"model": ErrorResponse, "description": "Too many requests wait; Retry-After says when to come back."},
    },
)
async def generate(body: GenerateRequest, request: Request) -> GenerateResponse:
    """Answer a question (or continue a text, if the model was only pretrained)."""
    service: Service = request.state.service
    answer = asyncio.create_task(service.answer(body))
    departure = asyncio.create_task(client_left(request))
    departure.add_done_callback(lambda _: answer.cancel())
    try:
        return GenerateResponse(prefix=body.prefix, generated_text=await answer)
    except asyncio.CancelledError:
        if departure.done():
            raise HTTPException(499, "the client has closed the connection") from None
        raise
    finally:
        departure.cancel()


@app.get("/health")
async def health(request: Request) -> HealthResponse:
    """What is being served, on which device, and how many requests run and wait."""
    service: Service = request.state.service
    statistics = service.engine.statistics()
    return HealthResponse(
        status="ok",
        model_path=str(service.settings.model_path),
        stage=service.stage,
        quantization=service.quantization,
        parameters=service.parameters,
        max_seq_len=service.model.config.max_seq_len,
        device=str(service.settings.device),
        num_threads=service.settings.num_threads,
        running=statistics.running,
        waiting=statistics.waiting,
        uptime_seconds=round(time.monotonic() - service.started, 1),
    )


@dataclass
class ServerConfig:
    """Where the service listens, when it is run as a file; everything else comes from environment variables."""

    host: str = option("0.0.0.0", "address to listen at; 127.0.0.1: this machine alone")
    port: int = option(8000, "port to listen at", at_least=1, at_most=65535)


def main(argv: list[str] | None = None) -> None:
    """Serve, as `uvicorn inference.api_service:app` does."""
    config = parse_config(ServerConfig, argv, description="Serve a model over HTTP.")
    uvicorn.run(app, host=config.host, port=config.port)


if __name__ == "__main__":
    run_main(main)
