"""A server for the page that says what a test has written down, token by token; and how tests use the page."""

import contextlib
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from serving.page import render

MODEL = {
    "id": "tiny",
    "context_length": 1024,
    "precision": "bf16",
    "parameters": 480_000,
    "thinking": "switch",
    "sampling": {
        "thinking": {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0, "presence_penalty": 0},
        "answer": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0, "presence_penalty": 0},
        "max_tokens": 512,
    },
}


class Error(Exception):
    """In a script: an answer with a status, or (status 0) an error in mid-stream."""

    def __init__(self, status: int, message: str, **headers: str):
        self.status, self.message, self.headers = status, message, headers


class Server(ThreadingHTTPServer):
    """Answers each chat with the next of `replies`: tokens, events to wait for, errors. `asked`: the requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.asked, self.key, self.model = [], [], None, MODEL
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def send(self, status: int, body: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body.encode("utf-8", "surrogatepass"))

    def fail(self, error: Error) -> None:
        body = json.dumps({"error": {"message": error.message}})
        self.send(error.status, body, Content_Type="application/json", **error.headers)

    def allowed(self) -> bool:
        return self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}"

    def do_GET(self):
        if self.path in ("/", "/behind/a/proxy/"):
            html, headers = render()
            return self.send(200, html, Content_Type="text/html; charset=utf-8", **headers)
        if not self.allowed():
            return self.fail(Error(401, "no such key"))
        self.send(200, json.dumps({"data": [self.server.model]}), Content_Type="application/json")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return self.fail(Error(401, "no such key"))
        self.server.asked.append(body)
        reply = self.server.replies.pop(0)
        if isinstance(reply, Error):
            return self.fail(reply)
        self.send(200, "", Content_Type="text/event-stream")
        with contextlib.suppress(OSError):  # the page has stopped it
            self.stream(reply, body)

    def stream(self, reply: list, body: dict) -> None:
        last = body["messages"][-1]
        kind = "reasoning_content" if body.get("continue_final_message") and not last["content"] else "content"
        tokens = thought = 0
        for at, item in enumerate(reply):
            if isinstance(item, threading.Event):
                item.wait(20)
                continue
            if isinstance(item, Error):
                return self.event({"error": {"message": item.message}})
            text, *_ = item
            tag = text in ("<think>", "</think>", "<|im_end|>")
            around = {one[0] for one in reply[max(0, at - 1) : at + 2] if isinstance(one, tuple)}
            hidden = tag or (not text.strip("\n") and around & {"<think>", "</think>"})
            kind = {"<think>": "reasoning_content", "</think>": "content"}.get(text, kind)
            tokens, thought = tokens + 1, thought + (kind != "content")
            delta = {} if hidden else {kind: text}
            logprobs = {"content": [entry(*item)]}
            self.event({"choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}]})
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        details = {"completion_tokens_details": {"reasoning_tokens": thought}, "total_tokens": 21 + tokens}
        details |= {"prompt_tokens_details": {"cached_tokens": 16}}
        self.event({"choices": [], "usage": {"prompt_tokens": 21, "completion_tokens": tokens, **details}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, value: dict) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()


def entry(text: str, p: float = 0.9, *others: tuple) -> dict:
    """A token in OpenAI's form; an alternative is (text, p) or (text, p, its bytes)."""

    def one(text, p, data=None):
        logprob = math.log(p) if p else -9999.0
        return {"token": text, "logprob": logprob, "bytes": data or list(text.encode("utf-8", "replace"))}

    return {**one(text, p), "top_logprobs": [one(text, p), *(one(*other) for other in others)] if p else []}


SUM = [
    *[("<think>", 1.0), ("\n", 1.0), ("17", 0.99), (" +", 0.97), (" 28", 0.6, (" 27", 0.3), ("</think>", 0.05))],
    *[("\n", 1.0), ("</think>", 1.0), ("\n\n", 1.0), ("It", 0.9), (" is", 0.9)],
    *[(" 45", 0.5, (" 44", 0.4), ("<|im_end|>", 0.02), ("<|im_start|>", 0.01), ("\ufffd", 0.01, [0xF0]))],
    *[(".", 0.9), ("<|im_end|>", 1.0)],
]


# ---- the page, as a person uses it ----


def ask(view, text: str = "What is 17 + 28?", wait: bool = True) -> None:
    view.fill("#ask", text)
    view.keyboard.press("Enter")
    if wait:
        done(view)


def done(view) -> None:
    view.wait_for_selector("body:not(.busy) .assistant:last-child")


def answer(view) -> str:
    return view.locator(".markdown").last.inner_text()


def pick(view, token: str, alternative: str) -> None:
    """A click on a token of the last reply, and one on an alternative."""
    view.locator(f".assistant:last-child .tok:visible:text-is('{token}')").first.click()
    view.locator("#card li button").filter(has_text=alternative).first.click()
