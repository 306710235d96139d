"""A server as a process on a free port of this machine, for as long as it is measured."""

import http.client
import signal
import socket
import subprocess
import tempfile
import time

WAIT = 300.0  # seconds for a server to load


class Server:
    """A server as a process on a free port. A context manager; `say` is what it printed, for an error."""

    def __init__(self, command: list[str], ready: str):
        self.port = free_port()
        self.command, self.ready = [part.format(port=self.port) for part in command], ready
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lasts as long as the server)

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + WAIT
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                self.log.seek(0)
                last = (self.log.read().strip().splitlines() or ["it printed nothing"])[-1]
                raise ValueError(f"{self.command[0]} did not start: {last}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _answers(self) -> bool:
        try:
            return self.get(self.ready)[0] == 200
        except OSError:
            return False

    def get(self, path: str, seconds: float = 10) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
