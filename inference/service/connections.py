"""uvicorn's connections, with bounds: how long a client may take to say what it wants, and how many may be there.

uvicorn alone waits for ever for the first byte, does not read on where bytes follow a request that is being answered,
and so never sees that the client has left; and it takes connections until there are no files left. Here

- the head of a request has to arrive in time, and what comes after it is read while it is answered, up to a limit;
- at the limit of connections, the one that has been idle for longest makes room, and if none is idle, the new one is
  told so;
- SIGTERM ends the server within a bound, and its exit status is 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import signal
import socket
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import h11
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from inference.service.errors import ApiError, unavailable
from inference.service.gate import GENERATING
from inference.service.model_server import Service
from inference.service.settings import ServiceSettings

logger = logging.getLogger("service")

MAX_EARLY_BYTES = 65_536  # of further requests, while one is being answered
ACCEPTED_AT_ONCE = 16  # connections in one turn of the event loop
LISTEN_BACKLOG = 4096  # connections that the system keeps until then
FILES_KEPT_FREE = 32 + 4 * ACCEPTED_AT_ONCE  # besides those open at the start; accepted ones close some turns later
REFUSED_LINES = tuple(f"POST {path} HTTP/1.1\r\n".encode() for path in GENERATING)
CONTENT_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *([0-9]+)")
GRACE_SECONDS = 5.0  # for ended answers to reach their clients


def raw_response(error: ApiError, connection: str = "close") -> bytes:
    """An error as the bytes of a whole HTTP response, past all layers."""
    body = json.dumps(error.content).encode()
    reason = HTTPStatus(error.status).phrase
    head = f"HTTP/1.1 {error.status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    more = "".join(f"{name}: {value}\r\n" for name, value in error.headers.items())
    return f"{head}{more}Connection: {connection}\r\n\r\n".encode() + body


def possible_connections(wanted: int) -> int:
    """How many connections the limit of open files allows; the limit is raised as far as it may be."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_files = Path("/dev/fd")
    kept_free = FILES_KEPT_FREE + (len(list(open_files.iterdir())) if open_files.is_dir() else 0)
    needed = wanted + kept_free
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(wanted, soft - kept_free))


class _ReadingFlow(FlowControl):
    """Flow control that stops reading only while a body arrives faster than it is taken."""

    body_arrives = True

    def pause_reading(self) -> None:
        if self.body_arrives:
            super().pause_reading()


class Connection(H11Protocol):
    """One client's connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take it, if there is room."""
        super().connection_made(transport)
        service: Service = self.app_state["service"]
        self.settings: ServiceSettings = service.settings
        self.flow = _ReadingFlow(transport)
        self._early = bytearray()
        self._heard = False
        self._write_timer: asyncio.TimerHandle | None = None
        self._idle_since: float | None = time.monotonic()
        self._head_timer = self.loop.call_later(self.settings.header_timeout, self._too_slow)
        there = [other for other in self.connections if not other.transport.is_closing()]
        if len(there) > service.max_connections:
            idle = [other for other in there if other._idle_since is not None and other is not self]
            if idle:
                min(idle, key=lambda other: other._idle_since).transport.close()
            else:
                transport.write(raw_response(unavailable("too many connections are open; try again later")))
                transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, or was sent away."""
        self._head_timer.cancel()
        self.resume_writing()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Bytes of a request; or, while one is answered, of what comes after it."""
        if not self._heard and self._refuse_at_once(data):
            return
        self._heard = True
        if self._is_answering and not self.cycle.more_body:
            self._early += data
            if len(self._early) > MAX_EARLY_BYTES:
                self.transport.abort()
            return
        super().data_received(data)
        if self._is_answering:
            self._head_timer.cancel()
            self._idle_since = None
            self.flow.body_arrives = self.cycle.more_body

    def _refuse_at_once(self, data: bytes) -> bool:
        """Whether these bytes are a whole request that would find the line full, and were told so.

        It costs a tenth of what going through every layer costs: in a burst of thousands, who asks for `/health` waits
        for all who came before.
        """
        service: Service = self.app_state["service"]
        if not data.startswith(REFUSED_LINES) or service.served is None or service.served.engine.room > 0:
            return False
        head, _, body = data.partition(b"\r\n\r\n")
        length = CONTENT_LENGTH.findall(head)
        if length != [str(len(body)).encode()] or b"transfer-encoding" in head.lower():
            return False  # not the whole of one simple request
        self.transport.write(raw_response(service.queue_full(), "keep-alive"))
        service.rejected["queue_full"] += 1
        service.statuses[data.split(b" ", 2)[1].decode(), 429] += 1
        self._idle_since = time.monotonic()
        self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self.settings.idle_timeout, self._too_slow)
        return True

    def on_response_complete(self) -> None:
        """The next request may come."""
        self._heard = bool(self._early)
        self._idle_since = time.monotonic()
        self.flow.body_arrives = True
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if not self._is_answering:
            seconds = self.settings.idle_timeout + self.settings.header_timeout
            self._head_timer = self.loop.call_later(seconds, self._too_slow)
        early, self._early = bytes(self._early), bytearray()
        if early:
            self.data_received(early)

    def pause_writing(self) -> None:
        """The client takes nothing; it would keep its connection, and what waits to be sent, for ever."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.settings.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """It has taken something."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def _too_slow(self) -> None:
        if self.transport.is_closing():
            return
        if self._heard and self.conn.our_state is h11.IDLE:
            seconds = self.settings.header_timeout
            error = ApiError(408, f"the head of the request did not arrive within {seconds:g} seconds")
            self.transport.write(raw_response(error))
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self.transport.write(raw_response(ApiError(400, msg)))
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """The request is answered without the upgrade, which needs no line in the log."""


class Server(uvicorn.Server):
    """uvicorn's server; on SIGTERM or Ctrl-C it lets answers end within `shutdown_timeout`.

    Args:
        app: the ASGI application.
        settings: of the service.
    """

    def __init__(self, app: object, settings: ServiceSettings) -> None:
        self.settings = settings
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            backlog=ACCEPTED_AT_ONCE,
            timeout_keep_alive=settings.idle_timeout,
            timeout_graceful_shutdown=settings.shutdown_timeout + GRACE_SECONDS,
            access_log=False,
            log_config=None,
            server_header=False,
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # the service says itself what it does

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen; asyncio takes as many connections at once as wait, which is to stay a small number."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(LISTEN_BACKLOG)
            host, port = listener.getsockname()[:2]
            logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new work, wait for what runs, end what runs too long."""
        service: Service = self.lifespan.state["service"]
        service.drain()
        logger.info("stopping; running answers have %g seconds to end", self.settings.shutdown_timeout)
        timer = asyncio.get_running_loop().call_later(self.settings.shutdown_timeout, service.end_answers)
        await super().shutdown(sockets)
        timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at a signal, without raising it once more at the end: the exit status is 0."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound, and not yet listening.

    Raises:
        OSError: the address is taken or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener
