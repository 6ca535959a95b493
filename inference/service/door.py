"""The door before the connections: takes those who come, and lets in who has said something that may be answered.

In a burst of thousands, whoever asks for `/health` waits for all who came before. To go through asyncio's transports,
uvicorn and all layers costs a millisecond; to come to the door and be told that the line is full costs a twentieth of
that, which is less than it costs a client to ask. Each turn of the event loop does some of this work, so that those
inside are never kept waiting.
"""

from __future__ import annotations

import asyncio
import functools
import re
import select
import socket
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Protocol

from inference.service.gate import GENERATING
from inference.service.model_server import Service

TAKEN_AT_ONCE = 64  # clients in one turn of the event loop
HEARD_AT_ONCE = 16  # which is more work
NEWEST = 8  # newcomers that are heard before all others
ENTERING = 4  # clients that are let in at once, as each costs as much as twenty refusals
FULL_SECONDS = 0.2  # until the door is opened again when no more files can be
LOOKED_AT = 16_384  # bytes of a request
QUESTIONS = tuple(f"POST {path} HTTP/1.1\r\n".encode() for path in GENERATING)
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)")


class Connection(Protocol):
    """A connection, as the door sees it; it is an `asyncio.Protocol`, too."""

    def asked(self, asks: bool) -> None:
        """Count it among those that wait for an answer of the model, or no longer."""


def refusal(service: Service, data: bytes) -> tuple[bytes, bool] | None:
    """What to say to a whole question that would find the line full, and whether its client stays; None: let it in."""
    if service.served is None or service.has_room:
        return None
    head, _, body = data.partition(b"\r\n\r\n")
    head = head.lower()
    if CONTENT_LENGTH.findall(head) != [str(len(body)).encode()] or b"transfer-encoding" in head:
        return None  # not the whole of one simple request
    service.rejected["queue_full"] += 1
    service.statuses[data.split(b" ", 2)[1].decode(), 429] += 1
    stays = b"connection: close" not in head
    return queue_full(service, "keep-alive" if stays else "close"), stays


@functools.cache
def queue_full(service: Service, connection: str) -> bytes:
    """The response, made once."""
    return service.queue_full().raw(connection)


class Door:
    """Takes connections from a listening socket. For systems with epoll.

    Args:
        listener: the socket.
        service: what the clients want.
        inside: the connections that there are.
        new_connection: makes the protocol of one that is let in.
    """

    def __init__(
        self, listener: socket.socket, service: Service, inside: set, new_connection: Callable[[], Connection]
    ) -> None:
        self.listener, self.service, self.inside, self.new_connection = listener, service, inside, new_connection
        self.loop = asyncio.get_running_loop()
        self.silent: dict[int, tuple[socket.socket, asyncio.TimerHandle]] = {}  # by file descriptor, oldest first
        self.admitted: deque[tuple[Connection, socket.socket]] = deque()
        self.entering: dict[asyncio.Task, tuple[Connection, socket.socket]] = {}
        self.ears = select.epoll()  # hears all silent ones, and is one socket to the event loop
        self.loop.add_reader(self.ears.fileno(), self._listen)
        listener.setblocking(False)
        self._open()

    def close(self) -> None:
        """Let nobody in any more, and send those away who have said nothing."""
        self.loop.remove_reader(self.listener)
        self.loop.remove_reader(self.ears.fileno())
        for number in list(self.silent):
            self._leave(number)
        for connection, client in self.admitted:
            connection.asked(False)
            client.close()
        self.ears.close()

    def _open(self) -> None:
        if not self.ears.closed:
            self.loop.add_reader(self.listener, self._accept)

    def _accept(self) -> None:
        for _ in range(TAKEN_AT_ONCE):
            try:
                client, _ = self.listener.accept()
            except (BlockingIOError, ConnectionError):  # nobody is there, or has left already
                return None
            except OSError:  # no file or memory for one more: somebody has to leave first
                self.loop.remove_reader(self.listener)
                self.loop.call_later(FULL_SECONDS, self._open)
                return self._make_room()
            client.setblocking(False)
            there = sum(map(len, (self.silent, self.admitted, self.entering, self.inside)))
            if there >= self.service.max_connections and not self.silent:
                self._let_in(client)  # an idle one inside makes room, or it is told that there is none
                continue
            if there >= self.service.max_connections:
                self._make_room()
            self._await(client, self.service.settings.header_timeout)
            self._hear(client.fileno())  # most have spoken already
        return None

    def _make_room(self) -> None:
        """Who has been silent for longest leaves."""
        if self.silent:
            self._leave(next(iter(self.silent)))

    def _await(self, client: socket.socket, seconds: float) -> None:
        """Listen to a client until it speaks, or has been silent for too long."""
        number = client.fileno()
        self.silent[number] = client, self.loop.call_later(seconds, self._leave, number)
        self.ears.register(number, select.EPOLLIN)

    def _forget(self, number: int) -> socket.socket:
        client, timer = self.silent.pop(number)
        timer.cancel()
        self.ears.unregister(number)
        return client

    def _leave(self, number: int) -> None:
        self._forget(number).close()

    def _listen(self) -> None:
        newest = list(islice(reversed(self.silent), NEWEST))  # who need not wait for a crowd that came before
        for number in (*newest, *(number for number, _ in self.ears.poll(0, HEARD_AT_ONCE))):
            if number in self.silent:
                self._hear(number)

    def _hear(self, number: int) -> None:
        """A client may have said something, or may have left."""
        client, _ = self.silent[number]
        refused, stays = None, False
        try:
            data = client.recv(LOOKED_AT, socket.MSG_PEEK)
            asks = data.startswith(QUESTIONS)
            if asks and (refused := refusal(self.service, data)):
                answer, stays = refused
                client.recv(len(data))
                stays = client.send(answer) == len(answer) and stays
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if stays:
            self._await(self._forget(number), self.service.settings.idle_timeout)
        elif refused or not data:
            self._leave(number)
        else:
            self._let_in(self._forget(number), asks)

    def _let_in(self, client: socket.socket, asks: bool = False) -> None:
        """Give it a connection, which reads what it has said; a question counts from here on, and waits for others."""
        connection = self.new_connection()
        connection.asked(asks)
        put = self.admitted.append if asks else self.admitted.appendleft
        put((connection, client))
        self._go_on()

    def _go_on(self) -> None:
        while self.admitted and len(self.entering) < ENTERING:
            connection, client = self.admitted.popleft()
            task = self.loop.create_task(self.loop.connect_accepted_socket(lambda it=connection: it, client))
            self.entering[task] = connection, client
            task.add_done_callback(self._entered)

    def _entered(self, task: asyncio.Task) -> None:
        connection, client = self.entering.pop(task)
        if task.cancelled() or task.exception():
            connection.asked(False)
            client.close()
        self._go_on()
