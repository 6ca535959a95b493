"""The routes under /v1, as OpenAI's API has them: its clients work with this service."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from inference.service.answers import (
    EventStream,
    Written,
    chat_log_probs,
    completion_log_probs,
    pieces_of,
    usage,
    whole,
)
from inference.service.bodies import read_request
from inference.service.documentation import described
from inference.service.model_server import Service
from inference.service.requests import ChatMessage, ChatRequest, CompletionRequest

router = APIRouter(prefix="/v1", tags=["OpenAI"])


def _head(kind: str, prefix: str, service: Service) -> dict[str, Any]:
    """What all parts of one answer have in common."""
    model = service.settings.model_names[0]
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


@router.get("/models", **described())
async def models(request: Request) -> JSONResponse:
    """The model that is served, by all of its names."""
    service: Service = request.state.service
    served = service.ready()
    entries = [
        {"id": name, "object": "model", "created": served.created, "owned_by": "own", "max_model_len": served.context}
        for name in service.settings.model_names
    ]
    return JSONResponse({"object": "list", "data": entries})


@router.get("/models/{model}", **described(404))
async def model(model: str, request: Request) -> JSONResponse:
    """One model by its name."""
    service: Service = request.state.service
    served = service.named(model)
    return JSONResponse(
        {"id": model, "object": "model", "created": served.created, "owned_by": "own", "max_model_len": served.context}
    )


# -- texts -------------------------------------------------------------------------------------------------------------


@router.post("/completions", **described(404, body=CompletionRequest, streams=True))
async def completions(request: Request) -> Response:
    """Continue a text."""
    service: Service = request.state.service
    body = await read_request(request, CompletionRequest)
    served = service.named(body.model)
    params = body.openai_params(body.max_tokens, body.logprobs)
    answer = await service.answer(body.prompt, params, chat=False, streamed=body.stream)
    head = _head("text_completion", "cmpl", service)
    echoes = [""] * answer.n_answers
    if body.echo:
        texts = [prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt) for prompt in body.prompt]
        echoes = [text for text in texts for _ in range(body.n)]

    def choice(written: Written, text: str, offset: int = 0) -> dict[str, Any]:
        log_probs = None
        if written.log_probs is not None:
            log_probs = completion_log_probs(served, written.log_probs, offset)
        return {"index": written.index, "text": text, "logprobs": log_probs, "finish_reason": written.finish_reason}

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        offsets = [0] * answer.n_answers
        for index, echo in enumerate(echoes):
            if echo:
                yield {**head, "choices": [choice(Written(index, echo), echo)]}
        async for written in pieces_of(answer):
            text = "" if written.finish_reason else written.text
            yield {**head, "choices": [choice(written, text, offsets[written.index])]}
            offsets[written.index] += len(text)
        if body.include_usage:
            yield {**head, "choices": [], "usage": usage(answer, body.n)}

    if body.stream:
        return EventStream(service, answer, chunks())
    texts = await whole(request, service, answer)
    choices = [choice(written, echoes[written.index] + written.text) for written in texts]
    return JSONResponse({**head, "choices": choices, "usage": usage(answer, body.n)})


# -- conversations -----------------------------------------------------------------------------------------------------


def messages_for_template(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as the chat template takes them."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.content or ""}
        for message in messages
    ]


@router.post("/chat/completions", **described(404, body=ChatRequest, streams=True))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.state.service
    body = await read_request(request, ChatRequest)
    served = service.named(body.model)
    max_tokens = body.max_completion_tokens or body.max_tokens or service.settings.max_tokens
    params = body.openai_params(max_tokens, (body.top_logprobs or 0) if body.logprobs else None)
    answer = await service.answer([messages_for_template(body.messages)], params, chat=True, streamed=body.stream)
    head = _head("chat.completion.chunk" if body.stream else "chat.completion", "chatcmpl", service)

    def log_probs(written: Written) -> dict[str, Any] | None:
        return None if written.log_probs is None else chat_log_probs(served, written.log_probs)

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        def chunk(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
            return {**head, "choices": [choice]}

        for index in range(body.n):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for written in pieces_of(answer):
            if written.finish_reason is None:
                yield chunk(written.index, {"content": written.text}, logprobs=log_probs(written))
            else:
                yield chunk(written.index, {}, logprobs=log_probs(written), finish_reason=written.finish_reason)
        if body.include_usage:
            yield {**head, "choices": [], "usage": usage(answer, body.n)}

    if body.stream:
        return EventStream(service, answer, chunks())
    choices = [
        {
            "index": written.index,
            "message": {"role": "assistant", "content": written.text, "refusal": None},
            "logprobs": log_probs(written),
            "finish_reason": written.finish_reason,
        }
        for written in await whole(request, service, answer)
    ]
    return JSONResponse({**head, "choices": choices, "usage": usage(answer, body.n)})
