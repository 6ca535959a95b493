"""From the engine's answers to what is sent: whole, or as server-sent events while they are written."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from inference.sampling import TokenLogProb
from inference.service.bodies import ClientLeft
from inference.service.errors import ApiError
from inference.service.filters import Filters
from inference.service.model_server import Answer, ServedModel, Service

LOWEST_LOG_PROB = -9999.0  # JSON has no minus infinity
FINISH_REASONS = {"stop": "stop", "length": "length", "deadline": "length"}  # the engine's → OpenAI's


@dataclass
class Written:
    """What was written of one answer: a piece of it, or its end.

    Attributes:
        index: which of the answers.
        text: the piece, or at the end the whole text.
        finish_reason: at the end, why it ended; None before.
        log_probs: of the tokens since the last piece, where they were asked for.
    """

    index: int
    text: str
    finish_reason: str | None = None
    log_probs: list[TokenLogProb] | None = None


async def pieces_of(answer: Answer) -> AsyncIterator[Written]:
    """The pieces of all answers as they come; each one's end has its whole text.

    Where answers are filtered, pieces are held back as long as they may become something forbidden, log-probabilities
    come with an answer's end, and a blocked answer ends with the operators' message.

    Raises:
        ApiError: an answer could not be completed.
    """
    if answer.blocked is not None:
        for index in range(answer.n_answers):
            yield Written(index, answer.blocked)
            yield Written(index, answer.blocked, "content_filter")
        return
    if answer.filters:
        async for written in filtered_pieces_of(answer, answer.filters):
            yield written
        return
    reported = [0] * len(answer.requests)  # log-probabilities that were sent already
    async for index, piece in answer.pieces():
        request = answer.requests[index]
        log_probs = None
        if request.params.logprobs is not None:
            log_probs = request.log_probs[reported[index] :]
            reported[index] += len(log_probs)
        if piece is None:
            generation = answer.generation(index)
            yield Written(index, generation.text, FINISH_REASONS[generation.finish_reason], log_probs)
        else:
            yield Written(index, piece, None, log_probs)


async def filtered_pieces_of(answer: Answer, filters: Filters) -> AsyncIterator[Written]:
    """As `pieces_of`; an answer that is blocked gives its place to others at once."""
    guards = [filters.stream() for _ in answer.requests]
    sent, ended = [""] * len(guards), [False] * len(guards)
    async for index, piece in answer.pieces():
        if ended[index]:
            continue
        guard, request = guards[index], answer.requests[index]
        finding = None
        if piece is not None:
            leaving = guard.feed(piece)
        elif answer.streamed:
            leaving = await asyncio.to_thread(guard.finish)
        else:
            leaving, finding = "", await answer.check(answer.generation(index).text)
        finding = finding or guard.finding
        if leaving:
            sent[index] += leaving
            yield Written(index, leaving)
        if finding:
            ended[index] = True
            request.cancel()
            message = filters.block("answer", finding)
            yield Written(index, f"\n\n{message}" if sent[index] else message)
            yield Written(index, message, "content_filter")
        elif piece is None:
            generation = answer.generation(index)
            log_probs = None if request.params.logprobs is None else request.log_probs
            yield Written(index, generation.text, FINISH_REASONS[generation.finish_reason], log_probs)


async def whole(request: Request, service: Service, answer: Answer) -> list[Written]:
    """Wait for all answers; a client that leaves meanwhile gives their places to others.

    Raises:
        ApiError: an answer could not be completed.
        ClientLeft: nobody waits any more.
    """

    async def collect() -> list[Written]:
        return [written async for written in pieces_of(answer) if written.finish_reason]

    ends, departure = asyncio.create_task(collect()), asyncio.create_task(client_left(request))
    try:
        await asyncio.wait({ends, departure}, return_when=asyncio.FIRST_COMPLETED)
        if not ends.done():
            raise ClientLeft
        return sorted(ends.result(), key=lambda written: written.index)
    finally:
        ends.cancel()
        departure.cancel()
        service.done(answer)


async def client_left(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


class EventStream(StreamingResponse):
    """Objects as server-sent events, `[DONE]` at the end; the answer is taken out when the client leaves.

    An error in the middle is the last event, in the one shape of errors.
    """

    def __init__(self, service: Service, answer: Answer, objects: AsyncIterator[dict[str, Any]]) -> None:
        async def events() -> AsyncIterator[str]:
            try:
                async for content in objects:
                    yield as_event(content)
                yield "data: [DONE]\n\n"
            except ApiError as error:
                yield as_event(error.content)

        # Proxies are asked not to hold the pieces back
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events(), headers=headers, media_type="text/event-stream")
        self._end = lambda: service.done(answer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


def as_event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage(answer: Answer, n: int) -> dict[str, Any]:
    """How many tokens were read and written; the prompt of n answers counts once."""
    read = sum(len(request.prompt_ids) for request in answer.requests[::n])
    written = sum(len(request.token_ids) for request in answer.requests)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def shown_tokens(served: ServedModel, log_probs: list[TokenLogProb]) -> list[TokenLogProb]:
    """Those of an answer's tokens that make its text; the one that ends it has none."""
    return [entry for entry in log_probs if entry.token_id not in served.tokenizer.end_token_ids]


def chat_log_probs(served: ServedModel, log_probs: list[TokenLogProb]) -> dict[str, Any]:
    """Log-probabilities as chats report them."""

    def entry(token_id: int, log_prob: float) -> dict[str, Any]:
        content = served.tokenizer.token_bytes(token_id)
        return {
            "token": token_text(served, token_id),
            "logprob": max(log_prob, LOWEST_LOG_PROB),
            "bytes": list(content),
        }

    content = [
        {**entry(token.token_id, token.log_prob), "top_logprobs": [entry(*top) for top in token.likeliest.items()]}
        for token in shown_tokens(served, log_probs)
    ]
    return {"content": content, "refusal": None}


def completion_log_probs(served: ServedModel, tokens: list[TokenLogProb], offset: int) -> dict[str, Any]:
    """Log-probabilities as completions report them; of a prompt's first token they are null.

    Args:
        offset: where in the text the first of the tokens begins.
    """
    text_of = functools.cache(functools.partial(token_text, served))
    offsets, log_probs, likeliest = [], [], []
    for token in tokens:
        offsets.append(offset)
        offset += len(text_of(token.token_id)) if served.tokenizer.token_bytes(token.token_id) else 0
        log_probs.append(None if token.log_prob is None else max(token.log_prob, LOWEST_LOG_PROB))
        best_last = reversed(token.likeliest.items())  # of two with one text, such as U+FFFD, the likelier one stays
        alternatives = {text_of(token_id): max(value, LOWEST_LOG_PROB) for token_id, value in best_last}
        likeliest.append(None if token.log_prob is None else dict(reversed(alternatives.items())))
    return {
        "tokens": [text_of(token.token_id) for token in tokens],
        "token_logprobs": log_probs,
        "top_logprobs": likeliest,
        "text_offset": offsets,
    }


def token_text(served: ServedModel, token_id: int) -> str:
    """A token as text; part of a character is U+FFFD."""
    return served.tokenizer.decode([token_id], skip_special_tokens=False)

