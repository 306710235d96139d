"""One server with the bundled model for all tests here, in a thread of this process, on a free port."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from chat import Chat
from model import Qwen3
from serving.app import create_app
from serving.run import Server, bind
from serving.service import Service

NAME = "models/tiny"


class Running:
    """A server that listens at `url`; `service` is what it serves."""

    def __init__(self, service: Service, **guard):
        self.service, self.ready = service, threading.Event()
        self.socket = bind("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(create_app(service, **guard), self.ready.set, last_seconds=2)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self.socket])))

    def __enter__(self) -> "Running":
        self.thread.start()
        assert self.ready.wait(60)
        return self

    def __exit__(self, *_) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive() and not self.service.worker.thread.is_alive()


@pytest.fixture(scope="session")
def tiny() -> tuple[Qwen3, Chat]:
    """In float32, so that what is computed in another order is equal to five digits."""
    return Qwen3.from_pretrained("models/tiny", dtype=torch.float32), Chat.from_pretrained("models/tiny")


@pytest.fixture(scope="session")
def serving(tiny):
    """Makes servers: `with serving(max_batch=2, key="k") as running`."""

    @contextmanager
    def make(sampling=None, guard=None, model=tiny, name=NAME, **options) -> Iterator[Running]:
        with Running(Service(name, *model, sampling or {}, **options), **(guard or {})) as running:
            yield running

    return make


@pytest.fixture(scope="session")
def running(serving) -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture(scope="session")
def client(running):
    import openai

    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def http(running):
    """Plain requests, for what the client would not send."""
    import httpx

    with httpx.Client(base_url=running.url, timeout=60) as http:
        yield http


@pytest.fixture(autouse=True)
def said(request):
    """The server's line about a test's last request is written before the next test looks at standard error."""
    yield
    if "running" not in request.fixturenames:
        return

    async def turns() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    loop = request.getfixturevalue("running").service.worker.loop
    asyncio.run_coroutine_threadsafe(turns(), loop).result(10)


@pytest.fixture
def idle(running):
    """After the test no row is taken and nothing is queued."""
    yield
    wait_until_idle(running.service)


def wait_until_idle(service: Service, seconds: float = 10) -> None:
    import time

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not (service.accepted or service.worker.running or service.engine.running or service.engine.waiting):
            return
        time.sleep(0.01)
    raise AssertionError(f"{service.accepted} accepted, {len(service.engine.running)} running")
