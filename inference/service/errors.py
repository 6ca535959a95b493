"""Errors as every client sees them: `{"error": {"message", "type", "param", "code"}}`, the shape of OpenAI's API."""

from __future__ import annotations

import json
from http import HTTPStatus

from fastapi.responses import JSONResponse
from pydantic import BaseModel

RETRY_AFTER_SECONDS = 2
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """What was wrong.

    Attributes:
        message: a sentence.
        type: the kind of error.
        param: the field that is meant, where it is one.
        code: a word for programs, where there is one.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The one shape of every error."""

    error: ErrorDetail


class ApiError(Exception):
    """An error that a client is told.

    Args:
        status: the HTTP status.
        message: a sentence that says what was wrong.
        param: the field that is meant.
        code: a word for programs.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))

    @property
    def content(self) -> dict[str, object]:
        """The error as JSON; it may quote what a client sent, so it is made valid UTF-8."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message, param = (text and text.encode("utf-8", "replace").decode() for text in (self.message, self.param))
        return ErrorResponse(error=ErrorDetail(message=message, type=kind, param=param, code=self.code)).model_dump()

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.content, self.status, self.headers)

    def raw(self, connection: str = "close") -> bytes:
        """The whole answer as bytes, past all layers."""
        body = json.dumps(self.content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": len(body), **self.headers}
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in {**headers, "Connection": connection}.items()]
        return "\r\n".join([*lines, "", ""]).encode() + body


def unavailable(reason: str) -> ApiError:
    """The service cannot answer now: 503 with Retry-After."""
    return ApiError(503, reason, code="service_unavailable")
