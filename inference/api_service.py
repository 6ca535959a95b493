"""The generation service: one model behind HTTP.

    python inference/api_service.py --model_path models/sft/sft_best.pth
    uvicorn inference.api_service:app --host 0.0.0.0 --port 8000
    torchrun --nproc_per_node 2 -m inference.api_service  # a model on two GPUs, tensor_parallel.py

    curl -X POST http://localhost:8000/generate -H "Content-Type: application/json" \\
         -d '{"prefix": "解释什么是机器学习", "max_gen_len": 100, "top_k": 50, "temperature": 0.8}'

    POST /generate               prefix (required), max_gen_len, top_k, temperature, and more (/docs)
                                 →  prefix, generated_text, finish_reason
    POST /v1/chat/completions    OpenAI's API: its clients work with this service
    POST /v1/completions         GET /v1/models
    POST /tokenize, /detokenize  text ⇄ token ids
    GET  /health, /ready         whether the process is sound, and whether it can answer now
    GET  /metrics                for Prometheus
    POST /admin/reload           another model, without dropping a request
    GET  /                       the chat page
    GET  /docs                   all of this, as a page to try it on

Every error is `{"error": {"message", "type", "param", "code"}}` with a sentence that says what was wrong.

The first command has all bounds: on connections, their number and their pace. The second leaves these to uvicorn, and
with its defaults a client that says nothing keeps its connection for ever. Settings: `--help`, or environment variables
of the same names in capitals.

This file assembles; the parts are in inference/service/. The engine computes in a thread of its own, so the event loop
stays free and `/health` is quick at any time. Requests join the running batch and leave it at every step, each with
settings of its own. When a client leaves, its request gives its place away within one step.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

if not __package__:  # run as a file: modules are imported from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError, run_main
from inference.quantizer import load_any
from inference.service import documentation, metrics, openai_api
from inference.service.answers import EventStream, pieces_of, whole
from inference.service.bodies import read_request
from inference.service.connections import Server, listening_socket, possible_connections
from inference.service.conversations import Conversation
from inference.service.documentation import described
from inference.service.errors import ApiError, unavailable
from inference.service.gate import Gate, http_error
from inference.service.logs import install
from inference.service.model_server import FAILED, LOADED, Service
from inference.service.requests import DetokenizeRequest, GenerateRequest, ReloadRequest, TokenizeRequest
from inference.service.settings import ServiceSettings, end_process
from inference.service.static_page import add_page
from inference.service.structured import AnswerForm, grammar_form, json_form, regex_form
from inference.service.workers import Workers

__all__ = ["GenerateRequest", "app"]


class GenerateResponse(BaseModel):
    """The prompt, what the model wrote after it, and why that ended: "stop", or "length" if it was cut."""

    prefix: str
    generated_text: str
    finish_reason: str


class HealthResponse(BaseModel):
    """What is being served and how busy it is; the model's own entries are null until it is loaded."""

    status: str
    model_status: str
    model: str
    model_path: str
    stage: str | None = None
    quantization: str | None = None
    parameters: int | None = None
    max_seq_len: int | None = None
    device: str
    num_threads: int
    running: int = 0
    waiting: int = 0
    uptime_seconds: float


@asynccontextmanager
async def lifespan(application: FastAPI) -> AsyncIterator[dict[str, Service]]:
    """Hand the service to the requests, and load its model meanwhile; at the end, stop the engine."""
    try:
        settings = application.state.settings or ServiceSettings.read()
        service = Service(settings)
    except UserError as error:
        end_process(str(error), 2)
    install(settings.log_format)
    service.max_connections = possible_connections(settings.max_connections)
    service.start()
    service.background(metrics.share(service))
    try:
        yield {"service": service}
    finally:
        await service.close()


class CrossOrigin:
    """Lets pages of the origins that are named in the settings call the service; all others stay out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        origins = scope["state"]["service"].settings.cors_origin if scope["type"] == "http" else []
        if origins:
            methods, headers = ["GET", "POST"], ["Authorization", "Content-Type"]
            app = CORSMiddleware(self.app, allow_origins=origins, allow_methods=methods, allow_headers=headers)
            return await app(scope, receive, send)
        return await self.app(scope, receive, send)


app = FastAPI(
    title="GPT generation service",
    description="Text generation with a model of one's own. Sampling settings that a request leaves out are those that "
    "came with the model, where its makers recommend any (/v1/models shows them), and otherwise the defaults here.",
    lifespan=lifespan,
    docs_url=None,  # FastAPI's pages load scripts from other hosts
    redoc_url=None,
)
app.state.settings = None
app.openapi = lambda: documentation.openapi(app)
app.add_middleware(Gate)
app.add_middleware(CrossOrigin)
for part in (openai_api, metrics, documentation):
    app.include_router(part.router)
add_page(app)


@app.exception_handler(HTTPException)
async def known_error(request: Request, error: HTTPException) -> JSONResponse:
    """Unknown paths and methods."""
    return http_error(request.method, request.url.path, error).response()


def form_of(body: GenerateRequest) -> Callable[[ByteLevelBPETokenizer], AnswerForm] | None:
    """What makes the form that the answer is to have."""
    for kind, wanted in ((json_form, body.json_schema), (regex_form, body.regex), (grammar_form, body.grammar)):
        if wanted is not None:
            return lambda tokenizer: kind(tokenizer, wanted)  # noqa: B023  the loop ends here
    return None


@app.post("/generate", response_model=GenerateResponse, **described(422, body=GenerateRequest, streams=True))
async def generate(request: Request) -> Response:
    """Answer a question (or continue a text, if the model was only pretrained)."""
    service: Service = request.state.service
    body = await read_request(request, GenerateRequest, invalid=422)
    served = service.ready()
    params, form = body.params(served.recommended), form_of(body)
    answer = await service.answer(
        [body.prefix], params, chat=served.chat, streamed=body.stream, invalid=422, form=form
    )

    def complete(text: str, reason: str) -> dict[str, str]:
        return {"prefix": body.prefix, "generated_text": text, "finish_reason": reason}

    async def pieces() -> AsyncIterator[dict[str, str]]:
        async for written in pieces_of(answer):
            if written.finish_reason:
                yield complete(written.text, written.finish_reason)
            elif written.text:
                yield {"text": written.text}

    if body.stream:
        return EventStream(service, answer, pieces())
    (written,) = await whole(request, service, answer)
    return JSONResponse(complete(written.text, written.finish_reason))


@app.post("/tokenize", **described(404, body=TokenizeRequest))
async def tokenize(request: Request) -> JSONResponse:
    """The token ids of a text, or of a conversation in the chat template."""
    service: Service = request.state.service
    body = await read_request(request, TokenizeRequest)
    served = service.named(body.model)
    try:
        if body.messages is None:
            tokens = await service.in_thread(served.tokens, body.prompt, body.add_special_tokens)
        else:
            tokens = await service.in_thread(served.encode, Conversation(body.messages, body.tools), True)
    except UserError as error:
        raise ApiError(400, str(error)) from None
    return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": served.context})


@app.post("/detokenize", **described(404, body=DetokenizeRequest))
async def detokenize(request: Request) -> JSONResponse:
    """The text of token ids."""
    service: Service = request.state.service
    body = await read_request(request, DetokenizeRequest)
    served = service.named(body.model)
    outside = next((token for token in body.tokens if token >= served.model.config.vocab_size), None)
    if outside is not None:
        size = served.model.config.vocab_size
        raise ApiError(400, f"tokens: {outside} is no token id of a vocabulary of {size}", "tokens")
    return JSONResponse({"prompt": await service.in_thread(served.tokenizer.decode, body.tokens, False)})


@app.post("/admin/reload", **described(409, body=ReloadRequest))
async def reload(request: Request) -> JSONResponse:
    """Serve another model, or the same file anew; what is being answered ends with the old one. Needs the admin key."""
    service: Service = request.state.service
    body = await read_request(request, ReloadRequest)
    served = await service.reload(body.model_path)
    return JSONResponse({"model_path": served.path, "stage": served.stage, "parameters": served.parameters})


@app.get("/health", response_model=HealthResponse, **described())
async def health(request: Request) -> HealthResponse:
    """Whether the process is sound, also while the model is being loaded; what is served, and how busy it is."""
    service: Service = request.state.service
    if service.health.name == FAILED.name:
        raise unavailable(service.health.sentence)
    settings, served = service.settings, service.served
    about = HealthResponse(
        status="healthy",
        model_status="loaded" if served else "loading",
        model=settings.model_names[0],
        model_path=settings.model_path,
        device=str(settings.torch_device),
        num_threads=settings.num_threads,
        uptime_seconds=round(time.monotonic() - service.started, 1),
    )
    if served:
        about.stage, about.quantization = served.stage, served.quantization
        about.parameters, about.max_seq_len = served.parameters, served.context
        about.running, about.waiting = len(served.engine.running), len(served.engine.waiting)
    return about


@app.get("/ready", **described())
async def ready(request: Request) -> JSONResponse:
    """Whether requests are answered now: what a balancer asks."""
    service: Service = request.state.service
    if service.health is not LOADED:
        raise unavailable(service.health.sentence)
    return JSONResponse({"status": "ready"})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the service until Ctrl-C or SIGTERM."""
    settings = ServiceSettings.read(sys.argv[1:] if argv is None else argv)
    settings.join_ranks()  # refuses a device that is not there
    install(settings.log_format)
    if settings.ranks and settings.ranks.rank:
        follow(settings)
        return
    print(f"settings:\n{settings.described()}", flush=True)
    try:
        listener = listening_socket(settings.host, settings.port)
    except OSError as error:
        raise UserError(
            f"the service cannot listen on {settings.host}, port {settings.port}: {error.strerror or error}; choose "
            "another --port or --host"
        ) from None
    if settings.workers > 1:
        sys.exit(Workers(serve, settings, listener).run())
    serve(settings, listener)
    if settings.ranks:
        settings.ranks.leave()


def follow(settings: ServiceSettings) -> None:
    """Compute a share of the model for the process that answers, until that one ends."""
    torch.set_num_threads(settings.num_threads)
    device, ranks = settings.torch_device, settings.ranks
    model, _, _ = load_any(settings.model_path, device, precision=settings.precision, ranks=ranks)
    ranks.follow(model)
    ranks.leave()


def serve(settings: ServiceSettings, listener: socket.socket) -> None:
    """Answer those who come to this socket until Ctrl-C or SIGTERM."""
    install(settings.log_format)
    app.state.settings = settings
    Server(app, settings).run(sockets=[listener])


if __name__ == "__main__":
    run_main(main)
