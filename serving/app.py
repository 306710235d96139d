"""The HTTP side: routes, who may ask, how large and how slow a request may be, and errors in the API's form.

Of a request only its endpoint, status, sizes and times are logged.
"""

import asyncio
import hmac
import json
import math
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from console import notice
from formats.messages import short
from serving.endpoints import POSTS, tokenizer_info
from serving.errors import ApiError, refused
from serving.outlet import Outlet
from serving.page import render
from serving.service import Service
from serving.wire import dumps

BODY_BYTES = 8 << 20
MOST_LEVELS = 100  # of lists and objects in each other
BODY_SECONDS = 30.0  # for a whole body to arrive
SEND_SECONDS = 30.0  # for a client to take a piece of a stream
MOST_CONNECTIONS = 1000
OPEN = ("/", "/health")  # need no key
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Gone(Exception):
    """The client has closed the connection."""


def create_app(service: Service, key: str | None = None, hosts: frozenset[str] | None = LOOPBACK) -> ASGIApp:
    """`key`: what clients must send; None: nothing. `hosts`: the names that a Host header may have; None: any. They
    keep out a web page whose own name was made to point to this machine."""

    @asynccontextmanager
    async def lifespan(app):
        service.start()
        try:
            yield
        finally:
            service.stop()

    async def models(request: Request) -> Response:
        return answer({"object": "list", "data": [service.describe()]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != service.name:
            raise ApiError(404, f"there is no model {name!r:.80}", "model", "model_not_found")
        return answer(service.describe())

    async def health(request: Request) -> Response:
        alive = service.worker is not None and service.worker.thread.is_alive()
        return answer({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def info(request: Request) -> Response:
        return answer(tokenizer_info(service))

    routes = [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/tokenizer_info", info),
        *(Route(path, Post(service, work), methods=["POST"]) for path, work in POSTS.items()),
    ]
    routes += page_routes()
    handlers = {ApiError: api_error, HTTPException: http_error, Exception: defect}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    return Gate(app, service, key, hosts)


def page_routes() -> list[Route]:
    html, headers = render()

    async def page(request: Request) -> Response:
        return Response(html, media_type="text/html", headers=headers)

    return [Route("/", page)]


async def api_error(request: Request, error: ApiError) -> Response:
    return failure(error)


async def defect(request: Request, error: Exception) -> Response:
    where = "".join(traceback.format_tb(error.__traceback__))
    notice(f"serve.py: a defect: {type(error).__name__} at\n{where}")  # its message may quote the request
    return failure(ApiError(500, "a defect of the server; its log says where"))


async def http_error(request: Request, error: HTTPException) -> Response:
    """Starlette's own: no such path, no such method."""
    what = {404: f"there is nothing at {request.scope['path']!r:.80}", 405: f"{request.method} is not for this path"}
    return failure(ApiError(error.status_code, what.get(error.status_code, error.detail), **(error.headers or {})))


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, "application/json")


def failure(error: ApiError) -> Response:
    return answer(error.body(), error.status, error.headers)


class Gate:
    """In front of all routes: host, key and origin; behind them: errors, the log line and the count of requests."""

    def __init__(self, app: ASGIApp, service: Service, key: str | None, hosts: frozenset[str] | None):
        self.app, self.service, self.hosts = app, service, hosts
        self.key = key and key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})
        request, begun, status, sent = Request(scope), time.perf_counter(), 0, 0

        async def count(message: Message) -> None:
            nonlocal status, sent
            status = message.get("status", status)
            sent += len(message.get("body", b""))
            await send(message)

        try:
            if len(scope["state"].get("connections", ())) > MOST_CONNECTIONS:
                message = f"more than {MOST_CONNECTIONS:,} connections are open; try again"
                raise ApiError(503, message, code="too_many_connections", retry_after="1", connection="close")
            self.check(request)
            await self.app(scope, receive, count)
        except ApiError as error:
            await failure(error)(scope, receive, count)
        except Exception:  # `defect` has answered and told of it
            pass
        finally:
            path, state = getattr(scope.get("route"), "path", "other"), scope["state"]
            status = "gone" if state.get("gone") else status
            self.service.metrics.requests.labels(path, str(status)).inc()
            seconds, taken, sent = (
                time.perf_counter() - begun,
                state.get("body_bytes", 0),
                sent + state.get("streamed", 0),
            )
            notice(f"{path} {status}, {taken:,} bytes in, {sent:,} out, {seconds:.3f} s")

    def check(self, request: Request) -> None:
        host = request.headers.get("host")  # HTTP/1.0 may leave it out; every browser sends it
        if self.hosts is not None and host is not None and hostname(host) not in self.hosts:
            raise ApiError(403, "this server is only asked as localhost; start it with --host to change that")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "a page of another origin asks; this server answers only its own")
        if self.key is not None and request.scope["path"] not in OPEN:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self.key) and scheme.lower() == "bearer"
            if not right:
                message = "the key is missing or wrong; send Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key", www_authenticate="Bearer")


def hostname(host: str) -> str:
    """Of a Host header, without the port."""
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower()


class Post:
    """An endpoint that takes JSON and returns JSON or a stream of events; cancelled if the client leaves."""

    def __init__(self, service: Service, work: Callable[[Service, Any], Awaitable[Any]]):
        self.service, self.work = service, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.answer(Request(scope, receive), send)
        except (Gone, ClientDisconnect):
            scope["state"]["gone"] = True

    async def answer(self, request: Request, send: Send) -> None:
        body = parse(request, await read_body(request))
        found = await unless_gone(self.work(self.service, body), request.receive)
        if isinstance(found, dict):
            await answer(found)(request.scope, request.receive, send)
            return
        await unless_gone(send_events(found, request.scope, send), request.receive)  # cancelled, it frees the rows


async def read_body(request: Request) -> bytes:
    length = request.headers.get("content-length", "0")
    too_large = ApiError(
        413, f"the body is larger than {BODY_BYTES:,} bytes", code="body_too_large", connection="close"
    )
    if not length.isdigit() or int(length) > BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} s", connection="close") from None
    request.state.body_bytes = len(body)
    return bytes(body)


def parse(request: Request, body: bytes) -> Any:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the Content-Type has to be application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "the body has to be sent as it is, without a Content-Encoding")
    try:
        hooks = {"object_pairs_hook": _object, "parse_float": _finite, "parse_constant": _no_constant}
        found = json.loads(body.decode("utf-8"), **hooks)
        _check_depth(found)
        if rb"\ud" in body.lower() and isinstance(found, dict):
            _check_characters(found)
        return found
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None


def _check_depth(value: Any) -> None:
    """Code further on recurses once or more for each level."""
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        values = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [each for some in values for each in some if isinstance(each, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")


def _check_characters(fields: dict) -> None:
    for name, given in fields.items():
        try:
            json.dumps([name, given], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise refused(name[:64], "holds half a surrogate pair, which is no character; remove it") from None


def _object(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{short(name)} is there twice in one object")
    return found


def _finite(number: str) -> float:
    if math.isinf(value := float(number)):
        raise ValueError(f"{number:.40} is too large for a number")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


async def unless_gone(work: Awaitable[Any], receive: Receive) -> Any:
    """The result of `work`, which is cancelled where the client closes the connection first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await one


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_events(stream: Callable[[Outlet], Awaitable[None]], scope: Scope, send: Send) -> None:
    """A stream of server-sent events. An error in it is its last event; a client that takes nothing is cut off."""
    headers = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    transport = scope["state"]["transport"]
    await send({"type": "http.response.start", "status": 200, "headers": pairs})
    try:
        async with asyncio.timeout(SEND_SECONDS):
            while transport.get_write_buffer_size():  # of answers before this one, to a client that did not wait
                await asyncio.sleep(0.01)
    except TimeoutError:
        transport.abort()
        raise Gone from None
    outlet = scope["state"]["outlet"] = Outlet(transport, scope["http_version"] == "1.1", SEND_SECONDS)
    try:
        await stream(outlet)
        await outlet.drain()
    finally:
        outlet.close()
        scope["state"]["streamed"] = outlet.written
    await send({"type": "http.response.body", "body": b"", "more_body": False})
