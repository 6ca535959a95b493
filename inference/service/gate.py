"""The gate before every route: who may come in and how often, what a request is called, what it took, how it failed."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference.service.bodies import ClientLeft
from inference.service.errors import ApiError, unavailable
from inference.service.logs import request_id
from inference.service.model_server import Service

logger = logging.getLogger("service")

GENERATING = ("/generate", "/v1/completions", "/v1/chat/completions")
SAFE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
REJECTIONS = ("queue_full", "rate_limit_exceeded", "service_unavailable")  # codes of errors that are counted
CLIENT_LEFT = 499  # in the log; nobody is there to read it
QUIET = ("/health", "/ready", "/metrics")  # asked every few seconds by machines


class Gate:
    """ASGI middleware: lets requests in, names, counts and logs them, and turns every failure into the one shape.

    What gives or takes text, or changes the service, needs a key where keys are set; pages, health and metrics do not.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        service: Service = scope["state"]["service"]
        began, started, status, ended = time.monotonic(), False, CLIENT_LEFT, False
        headers = dict(scope["headers"])
        name = headers.get(b"x-request-id", b"").decode("latin-1")
        name = name if SAFE_REQUEST_ID.fullmatch(name) else uuid.uuid4().hex
        fields = {"request_id": name}
        request_id.set(name)

        async def send_named(message: Message) -> None:
            nonlocal started, status, ended
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                more = [(b"x-request-id", name.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message["headers"], *more]}
            ended = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        async def fail(error: ApiError) -> None:
            if error.code in REJECTIONS:
                service.rejected[error.code] += 1
            if not started:
                await error.response()(scope, receive, send_named)

        try:
            self._let_in(scope, headers, service)
            await self.app(scope, receive, send_named)
        except ApiError as error:
            await fail(error)
        except ClientLeft:
            await fail(ApiError(CLIENT_LEFT, "the client has closed the connection"))
        except asyncio.CancelledError:  # the server's own end is near
            await fail(unavailable("the service is stopping and has ended this answer; ask again"))
        except Exception as error:
            logger.exception("a request failed", extra={"fields": fields})
            await fail(ApiError(500, f"the service failed with {type(error).__name__}: see its log for {name}"))
        finally:
            route = getattr(scope.get("route"), "path", None) or "unknown"
            service.statuses[route, status] += 1
            quiet = route in QUIET and status == 200
            more = {} if ended else {"complete": False}
            logger.log(
                logging.DEBUG if quiet else logging.INFO,
                "request",
                extra={
                    "fields": {
                        **fields,
                        "method": scope["method"],
                        "path": scope["path"][:200],
                        "status": status,
                        "seconds": round(time.monotonic() - began, 4),
                        **more,
                    }
                },
            )

    def _let_in(self, scope: Scope, headers: dict[bytes, bytes], service: Service) -> None:
        """Refuse at once what would be refused later at a higher price.

        Raises:
            ApiError: 401, 429 or 503.
        """
        path, settings = scope["path"], service.settings
        is_question = scope["method"] == "POST"
        if not is_question and not path.startswith("/v1"):
            return
        caller = (scope.get("client") or ("unknown",))[0]
        shown = headers.get(b"authorization", b"")
        shown = shown[7:].strip() if shown[:7].lower() == b"bearer " else b""
        if path.startswith("/admin/"):
            self._refuse_stranger(shown, [settings.admin_key or ""], "admin key")
        elif settings.api_key:
            self._refuse_stranger(shown, settings.api_key, "API key")
            caller = hashlib.sha256(shown).hexdigest()
        if is_question and (wait := service.rates.wait(caller, time.monotonic())):
            message = f"more than {settings.requests_per_minute} requests a minute; come back in {wait:.0f} s"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(int(wait) + 1)})
        if is_question and path in GENERATING and service.ready().engine.room < 1:
            raise service.queue_full()

    @staticmethod
    def _refuse_stranger(shown: bytes, keys: list[str], kind: str) -> None:
        known = [hmac.compare_digest(shown, key.encode()) for key in keys if key]  # each in the same time
        if not any(known):
            message = f"this needs the service's {kind}; send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def http_error(method: str, path: str, error: HTTPException) -> ApiError:
    """Unknown paths and methods, which the framework notices, in the one shape."""
    if error.status_code in (404, 405):
        return ApiError(error.status_code, f"there is no {method} {path[:200]}: see /docs", headers=error.headers)
    return ApiError(error.status_code, str(error.detail), headers=error.headers)
