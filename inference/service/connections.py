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
import functools
import logging
import select
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import h11
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from inference.service.door import QUESTIONS, Door, refusal
from inference.service.errors import ApiError, unavailable
from inference.service.model_server import Service
from inference.service.settings import ServiceSettings

logger = logging.getLogger("service")

MAX_EARLY_BYTES = 65_536  # of further requests, while one is being answered
LISTEN_BACKLOG = 4096  # connections that the system keeps until then
FILES_KEPT_FREE = 64  # besides those open at the start
GRACE_SECONDS = 5.0  # for ended answers to reach their clients


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

    _asks = False  # for an answer of the model, and has none yet

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
        if len(self.connections) > service.max_connections:
            self._make_room(service.max_connections)

    def _make_room(self, limit: int) -> None:
        """The connection that has been idle for longest gives its place away; where none is idle, this one leaves."""
        there = [other for other in self.connections if not other.transport.is_closing()]
        if len(there) <= limit:
            return
        idle = [other for other in there if other._idle_since is not None and other is not self]
        if idle:
            min(idle, key=lambda other: other._idle_since).transport.close()
        else:
            self.transport.write(unavailable("too many connections are open; try again later").raw())
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, or was sent away."""
        self._head_timer.cancel()
        self.asked(False)
        self.resume_writing()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Bytes of a request; or, while one is answered, of what comes after it."""
        if not self._heard and not self._asks and data.startswith(QUESTIONS):
            if self._refuse_at_once(data):
                return
            self.asked(True)
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
        """Whether a question is refused past all layers, as at the door."""
        refused = refusal(self.app_state["service"], data)
        if not refused:
            return False
        answer, stays = refused
        self.transport.write(answer)
        if not stays:
            self.transport.close()
        self._idle_since = time.monotonic()
        self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self.settings.idle_timeout, self._too_slow)
        return True

    def asked(self, asks: bool) -> None:
        """Count those whose questions are on their way through the layers; the engine knows only of those behind."""
        service: Service = self.app_state["service"]
        service.asking += asks - self._asks
        self._asks = asks

    def on_response_complete(self) -> None:
        """The next request may come."""
        self.asked(False)
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
            self.transport.write(error.raw())
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self.transport.write(ApiError(400, msg).raw())
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
        self.doors: list[Door] = []
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            backlog=LISTEN_BACKLOG,
            timeout_keep_alive=settings.idle_timeout,
            timeout_graceful_shutdown=settings.shutdown_timeout + GRACE_SECONDS,
            access_log=False,
            log_config=None,
            server_header=False,
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # the service says itself what it does

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        has_door = hasattr(select, "epoll")  # on Linux
        await super().startup([] if has_door else sockets)
        new_connection = functools.partial(
            Connection, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        for listener in sockets or []:
            if has_door:
                listener.listen(LISTEN_BACKLOG)
                service = self.lifespan.state["service"]
                self.doors.append(Door(listener, service, self.server_state.connections, new_connection))
            host, port = listener.getsockname()[:2]
            logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new work, wait for what runs, end what runs too long."""
        service: Service = self.lifespan.state["service"]
        service.drain()
        logger.info("stopping; running answers have %g seconds to end", self.settings.shutdown_timeout)
        for door in self.doors:
            door.close()
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
