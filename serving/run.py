"""The server as a process: its socket, its protocol's patience, and how it ends."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from console import notice
from serving.errors import ApiError
from serving.wire import dumps

HEADER_SECONDS = 30.0  # for the head of a request to arrive, from the connection or the answer before it
LAST_SECONDS = 10  # that running replies have after SIGTERM
LOOK_AGAIN = (0.02, 1.0)  # seconds between two looks at a connection whose client sends no more: at first, at most


class Protocol(H11Protocol):
    """HTTP/1.1 for which a request that begins and does not go on ends, and a client may close its sending half.

    A request's state has its `transport`, and the `connections` of the server.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport, "connections": self.connections}
        self._patience: asyncio.TimerHandle | None = None
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def eof_received(self) -> bool:
        """The client sends no more. That it reads no more either is only told by the answer to what it is sent."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or self.scope["http_version"] != "1.1":
            return False
        cycle.keep_alive = False
        if (outlet := self.scope["state"].get("outlet")) is not None:
            outlet.write(b":\n\n")  # a comment
        elif not cycle.response_started:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # which clients skip (RFC 9110, 15.2)
        self._look_for_reset(LOOK_AGAIN[0])
        return True

    def _look_for_reset(self, seconds: float) -> None:
        def look() -> None:
            if self.transport.is_closing():
                return
            if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.transport.abort()
            else:
                self._look_for_reset(min(2 * seconds, LOOK_AGAIN[1]))

        self.loop.call_later(seconds, look)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an error in the API's form."""
        if self.cycle is None or not self.cycle.response_started:
            body = dumps(ApiError(400, "this is no HTTP request that the server can read").body()).encode()
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def _wait(self) -> None:
        self._stop_waiting()
        self._patience = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


class Server(uvicorn.Server):
    """uvicorn without its own handling of signals; `ready` is called once it listens."""

    def __init__(self, app: ASGIApp, ready: Callable[[], None] = lambda: None, last_seconds: int = LAST_SECONDS):
        settings = {"log_config": None, "log_level": "critical", "access_log": False, "server_header": False}
        settings |= {"http": Protocol, "ws": "none", "lifespan": "on", "proxy_headers": False}
        super().__init__(uvicorn.Config(app, **settings, timeout_graceful_shutdown=last_seconds))
        self.ready = ready

    @contextlib.contextmanager
    def capture_signals(self):
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address. OSError that says which, where it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise OSError(f"--host {host} --port {port}: {error.strerror or error}; is another server there?") from None
    return found


def run(app: ASGIApp, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Serves until SIGTERM or SIGINT; running replies then have `LAST_SECONDS`, after a second signal none."""

    async def serve() -> None:
        server, loop = Server(app, ready), asyncio.get_running_loop()

        def end() -> None:
            server.force_exit, server.should_exit = server.should_exit, True
            notice("serve.py: ending; no new requests" if not server.force_exit else "serve.py: ending now")

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        await server.serve([listening])

    asyncio.run(serve())
