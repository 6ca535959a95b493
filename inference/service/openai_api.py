"""The routes under /v1, as OpenAI's API has them: its clients work with this service."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from byte_level_bpe import ByteLevelBPETokenizer
from inference.service.answers import (
    EventStream,
    Written,
    chat_log_probs,
    completion_log_probs,
    pieces_of,
    shown_tokens,
    usage,
    whole,
)
from inference.service.bodies import read_request
from inference.service.conversations import CallParser, Conversation, Spoken, call_grammar
from inference.service.documentation import described
from inference.service.errors import ApiError
from inference.service.model_server import ServedModel, Service
from inference.service.requests import ChatRequest, CompletionRequest, Tool, ToolChoice
from inference.service.structured import AnswerForm, grammar_form, json_form

router = APIRouter(prefix="/v1", tags=["OpenAI"])


def _head(kind: str, prefix: str, service: Service) -> dict[str, Any]:
    """What all parts of one answer have in common."""
    model = service.settings.model_names[0]
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _entry(name: str, served: ServedModel) -> dict[str, Any]:
    """A model as OpenAI's API lists it; its context and the sampling that its makers recommend are extensions."""
    extensions = {"max_model_len": served.context, "sampling": served.recommended}
    return {"id": name, "object": "model", "created": served.created, "owned_by": "own", **extensions}


@router.get("/models", **described())
async def models(request: Request) -> JSONResponse:
    """The model that is served, by all of its names."""
    service: Service = request.state.service
    served = service.ready()
    return JSONResponse({"object": "list", "data": [_entry(name, served) for name in service.settings.model_names]})


@router.get("/models/{model}", **described(404))
async def model(model: str, request: Request) -> JSONResponse:
    """One model by its name."""
    service: Service = request.state.service
    served = service.named(model)
    return JSONResponse(_entry(model, served))


# -- texts -------------------------------------------------------------------------------------------------------------


@router.post("/completions", **described(404, body=CompletionRequest, streams=True))
async def completions(request: Request) -> Response:
    """Continue a text."""
    service: Service = request.state.service
    body = await read_request(request, CompletionRequest)
    served = service.named(body.model)
    scored = body.logprobs if body.scores_prompt else None
    params = body.openai_params(served.recommended, body.max_tokens, body.logprobs, prompt_logprobs=scored)
    answer = await service.answer(body.prompt, params, chat=False, streamed=body.stream)
    head = _head("text_completion", "cmpl", service)
    echoes = [""] * answer.n_answers
    if body.echo:
        texts = [prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt) for prompt in body.prompt]
        echoes = [text for text in texts for _ in range(body.n)]

    def choice(written: Written, text: str, offset: int = 0) -> dict[str, Any]:
        log_probs = None
        if written.log_probs is not None:
            shown = shown_tokens(served, written.log_probs)
            if body.scores_prompt:  # an entry for each token, also for the one that ends the answer
                shown = answer.prompt_log_probs(written.index, body.n) + written.log_probs
            log_probs = completion_log_probs(served, shown, offset)
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

    def choices() -> list[dict[str, Any]]:
        return [choice(written, echoes[written.index] + written.text) for written in texts]

    # In a thread, as prompts may have a hundred thousand tokens
    made = await service.in_thread(choices) if body.scores_prompt else choices()
    return JSONResponse({**head, "choices": made, "usage": usage(answer, body.n)})


# -- conversations -----------------------------------------------------------------------------------------------------


def called_tools(body: ChatRequest) -> list[Tool]:
    """The tools that the model may call, or has to.

    Raises:
        ApiError: 400, a tool is chosen that there is not.
    """
    choice = body.tool_choice
    if choice == "none":
        return []
    if not isinstance(choice, ToolChoice):
        return body.tools
    chosen = [tool for tool in body.tools if tool.function.name == choice.function.name]
    if not chosen:
        raise ApiError(400, f"tool_choice: there is no tool {choice.function.name!r}", "tool_choice")
    return chosen


def form_of(body: ChatRequest, tools: list[Tool]) -> Callable[[ByteLevelBPETokenizer], AnswerForm] | None:
    """What makes the form that the answer is to have: JSON, or a call that has to be made."""
    wanted = body.response_format
    if body.tool_choice not in (None, "none", "auto"):
        if wanted is not None and wanted.type != "text":
            raise ApiError(400, "response_format and a tool that has to be called do not go together", "tool_choice")
        return lambda tokenizer: grammar_form(tokenizer, call_grammar(tools))
    if wanted is None or wanted.type == "text":
        return None
    schema = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.json_schema
    return lambda tokenizer: json_form(tokenizer, schema)


@router.post("/chat/completions", **described(404, body=ChatRequest, streams=True))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.state.service
    body = await read_request(request, ChatRequest)
    served = service.named(body.model)
    tools = called_tools(body)
    max_tokens = body.max_completion_tokens or body.max_tokens or service.settings.max_tokens
    log_probs_wanted = (body.top_logprobs or 0) if body.logprobs else None
    params = body.openai_params(served.recommended, max_tokens, log_probs_wanted)
    conversation = Conversation(body.messages, tools)
    form = form_of(body, tools)
    answer = await service.answer([conversation], params, chat=True, streamed=body.stream, form=form)
    head = _head("chat.completion.chunk" if body.stream else "chat.completion", "chatcmpl", service)
    names = [tool.function.name for tool in tools]
    parsers = [CallParser(names, body.parallel_tool_calls is False) if tools else None for _ in range(body.n)]

    def log_probs(written: Written) -> dict[str, Any] | None:
        return None if written.log_probs is None else chat_log_probs(served, written.log_probs)

    def reason(written: Written) -> str:
        parser = parsers[written.index]
        called = parser and parser.n_calls and written.finish_reason != "content_filter"
        return "tool_calls" if called else written.finish_reason

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        def chunk(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
            return {**head, "choices": [choice]}

        n_calls = [0] * body.n
        for index in range(body.n):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for written in pieces_of(answer):
            index, parser = written.index, parsers[written.index]
            if parser is None:
                spoken = [] if written.finish_reason else [Spoken(written.text)]
            else:
                spoken = parser.finish() if written.finish_reason else parser.feed(written.text)
            probabilities = log_probs(written)
            for part in spoken:
                delta: dict[str, Any] = {"content": part.text}
                if part.call:
                    delta = {"tool_calls": [{"index": n_calls[index], **part.call}]}
                    n_calls[index] += 1
                yield chunk(index, delta, logprobs=probabilities)
                probabilities = None
            if written.finish_reason:
                yield chunk(index, {}, logprobs=probabilities, finish_reason=reason(written))
            elif probabilities:
                yield chunk(index, {}, logprobs=probabilities)
        if body.include_usage:
            yield {**head, "choices": [], "usage": usage(answer, body.n)}

    if body.stream:
        return EventStream(service, answer, chunks())
    choices = []
    for written in await whole(request, service, answer):
        parser, message = parsers[written.index], {"role": "assistant", "content": written.text, "refusal": None}
        if parser is not None:
            spoken = parser.feed(written.text) + parser.finish()
            if calls := [part.call for part in spoken if part.call]:
                message |= {"content": "".join(part.text for part in spoken) or None, "tool_calls": calls}
        choices.append(
            {
                "index": written.index,
                "message": message,
                "logprobs": log_probs(written),
                "finish_reason": reason(written),
            }
        )
    return JSONResponse({**head, "choices": choices, "usage": usage(answer, body.n)})
