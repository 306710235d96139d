"""Writes a stream's bytes to its client, bypassing the event loop as long as the socket takes them.

A token that goes from the engine's thread through the event loop costs a millisecond of processor time on a busy
machine: it wakes a thread that waits for the GIL, then asyncio, uvicorn and h11, all of whose code and data the
model's weights have pushed out of the processor's caches. The engine's thread itself needs a twentieth of that.
"""

import asyncio
import threading
import time


class Outlet:
    """The body of one response, written by any thread; in HTTP/1.1's `chunked` form, or up to the connection's end.

    What the socket does not take at once waits here, and the event loop sends it. A client that takes nothing for
    `patience` seconds is cut off. Nothing else may write to the connection before `close`.
    """

    def __init__(self, transport: asyncio.Transport, chunked: bool, patience: float):
        self.transport, self.chunked, self.patience = transport, chunked, patience
        self.loop = asyncio.get_running_loop()
        self.written = 0  # bytes of the body
        self.waiting = 0  # writes since the socket last took all of them
        self.latest = time.monotonic()  # when something was written
        # A descriptor of its own: that of the transport may be another connection's by the time a thread writes to it.
        self._socket = transport.get_extra_info("socket").dup()
        self._lock = threading.Lock()
        self._rest = bytearray()
        self._ended = False
        self._timer: asyncio.TimerHandle | None = None
        self._empty: asyncio.Event | None = None

    def write(self, data: bytes, last: bool = False) -> None:
        """`last`: what other threads write after it is dropped."""
        frame = b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data
        with self._lock:
            if self._ended:
                return
            self._ended = last
            self.written += len(data)
            self.latest = time.monotonic()
            if self._rest:
                self._rest += frame
                self.waiting += 1
                return
            if (sent := self._send(frame)) < len(frame):
                self._rest += frame[sent:]
                self.waiting = 1
                self.loop.call_soon_threadsafe(self._go_on)

    async def drain(self) -> None:
        """Until the socket has taken everything; nothing is written meanwhile."""
        with self._lock:
            self._empty = asyncio.Event()
            if not self._rest:
                return
        await self._empty.wait()

    def close(self) -> None:
        """On the event loop; what is written later is dropped."""
        with self._lock:
            self._ended = True
            self._rest.clear()
            self._wait_for_client()
            self._socket.close()

    def _send(self, data: bytes | bytearray) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:  # the client has gone
            self._ended = True
            self.loop.call_soon_threadsafe(self.transport.abort)
            return len(data)

    # ---- on the event loop, while the client is slow ----

    def _go_on(self) -> None:
        with self._lock:
            if self._rest:
                del self._rest[: self._send(self._rest)]
            self._wait_for_client()

    def _wait_for_client(self) -> None:
        """For as long as something is left to send."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._rest:
            self._timer = self.loop.call_later(self.patience, self.transport.abort)
            self.loop.add_writer(self._socket, self._go_on)
            return
        self.loop.remove_writer(self._socket)
        self.waiting = 0
        if self._empty is not None:
            self._empty.set()
