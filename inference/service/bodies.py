"""From the bytes of a request's body to a checked request, at a cost that has a bound whatever a client sends.

Sizes come before items, and the first mistake ends the work: a body of a million bytes may hold a hundred thousand
mistakes, and to describe all of them would take seconds of the event loop.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from inference.service.errors import ApiError
from inference.service.settings import ServiceSettings

MAX_VALUES = 200_000  # in one body
MAX_CONTAINERS = 10_000  # of these, lists and objects
MAX_DEPTH = 64
LARGE_BODY = 16_384  # bytes; larger ones are parsed one at a time, so that other work comes between them
LONE_SURROGATE = re.compile("[\ud800-\udfff]")

Model = TypeVar("Model", bound=BaseModel)


class ClientLeft(Exception):
    """The connection was closed by the client."""


async def read_request(request: Request, model: type[Model], invalid: int = 400) -> Model:
    """The body of a request as `model`.

    Args:
        invalid: the status for JSON that is no such request.

    Raises:
        ApiError: 400 it is not JSON, 408 it arrives too slowly, 413 it is too large, 415 it says to be something else;
            or `invalid`.
        ClientLeft: the client closed the connection.
    """
    settings: ServiceSettings = request.state.service.settings
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"the body is sent as {kind[:80]}; send JSON, with Content-Type: application/json")
    body = await _read(request, settings)
    if len(body) <= LARGE_BODY:
        return _checked(body, model, invalid)
    async with request.state.service.parsing:
        return _checked(body, model, invalid)


async def _read(request: Request, settings: ServiceSettings) -> bytes:
    limit = settings.max_body_bytes
    too_large = ApiError(413, f"the request's body is larger than {limit} bytes")
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    chunks, size = [], 0

    async def read() -> None:
        nonlocal size
        more = True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > limit:
                raise too_large
            more = message.get("more_body", False)

    try:
        await asyncio.wait_for(read(), settings.body_timeout)
    except (TimeoutError, asyncio.TimeoutError):
        message = f"the request's body did not arrive within {settings.body_timeout:g} seconds"
        raise ApiError(408, message, headers={"Connection": "close"}) from None
    return b"".join(chunks)


def _checked(body: bytes, model: type[Model], invalid: int) -> Model:
    data = parse_json(body)
    if not isinstance(data, dict):
        raise ApiError(invalid, "the body must be a JSON object, like " + model.example())
    return validated(data, model, invalid)


def parse_json(body: bytes) -> Any:
    """JSON, strictly: UTF-8, no NaN or infinity, no half of a surrogate pair, no endless nesting.

    Raises:
        ApiError: 400.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        data = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ApiError(400, "the body is not valid JSON for this service: it is nested too deeply") from None
    except ValueError as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise ApiError(400, f"the body is not valid JSON: {str(error)[:200]}") from None
    _look_through(data)
    return data


def _look_through(data: Any) -> None:
    """Refuse what JSON in Python may hold and this service cannot take, level by level."""
    level, values, containers = [data], 0, 0
    for _ in range(MAX_DEPTH):
        inside: list[Any] = []
        for value in level:
            if isinstance(value, str):
                if not value.isascii() and LONE_SURROGATE.search(value):
                    raise ApiError(400, "the body is not valid JSON: a string holds half of a surrogate pair")
            elif isinstance(value, float):
                if math.isinf(value):
                    raise ApiError(400, "the body is not valid JSON for this service: a number is too large")
            elif isinstance(value, (list, dict)):
                containers += 1
                values += len(value)
                if values > MAX_VALUES or containers > MAX_CONTAINERS:
                    limit = f"{MAX_VALUES} values, or {MAX_CONTAINERS} lists and objects"
                    raise ApiError(400, f"the body is too complex: more than {limit}")
                inside += value
                if isinstance(value, dict):
                    inside += value.values()
        if not inside:
            return
        level = inside
    raise ApiError(400, f"the body is too complex: more than {MAX_DEPTH} levels deep")


def validated(data: dict[str, Any], model: type[Model], invalid: int = 400) -> Model:
    """A JSON object as `model`; `null` means that a field is absent.

    Raises:
        ApiError: with the first mistake.
    """
    unknown = next((name for name in data if name not in model.model_fields), None)
    if unknown is not None:
        raise ApiError(invalid, f"{unknown[:80]}: there is no such field; see /docs", unknown[:80])
    try:
        return model.model_validate({name: value for name, value in data.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(map(str, first["loc"]))[:80]
    message = first["msg"].removeprefix("Value error, ")
    raise ApiError(invalid, f"{field}: {message[0].lower()}{message[1:]}", field)
