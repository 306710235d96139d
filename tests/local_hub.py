"""A stand-in for the Hugging Face hub on this machine, for whoever asks one."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from huggingface_hub import constants

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(ThreadingHTTPServer):
    """A stand-in for the hub that serves one model, org/name, and writes down each request."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.requests: list[tuple[str, str | None]] = []  # (path, Range)
        self.cuts: dict[str, list[int]] = {}  # file -> the bytes after which each next transfer of it breaks
        self.ranges, self.renamed = True, {}  # whether Range is understood; answers with other digests
        self.sent = 0  # bytes of all answers
        self.pages: dict[str, bytes] = {}  # path -> what it answers, beside the repository
        self.stalls = False  # whether a cut transfer stands still instead
        self.stalled, self.released = threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def listing(self, revision: str) -> dict:
        siblings = []
        for name, content in self.files.items():
            entry = {"rfilename": name, "size": len(content), "blobId": git_sha1(content)}
            if name.endswith((".safetensors", ".gguf")):
                entry["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 1}
            siblings.append(entry | self.renamed.get(name, {}))
        return {"id": "org/name", "sha": COMMITS.get(revision, revision), "siblings": siblings}

    def tree(self) -> list[dict]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
            for name, content in self.files.items()
        ]

    def fetched(self) -> list[tuple[str, str | None]]:
        """Which files were asked for, with the byte ranges."""
        found = [(re.fullmatch(r"/org/name/resolve/[^/]+/(.+)", path), part) for path, part in self.requests]
        return [(match[1], part) for match, part in found if match]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, self.headers["Range"]))
        if self.path == "/api/agent-harnesses":  # huggingface_hub asks for it by itself
            return self.refuse("EntryNotFound")
        if (page := self.server.pages.get(self.path)) is not None:
            return self.send(200, page)
        if not re.match(r"/(api/models/)?org/name\b", self.path):
            return self.refuse("RepoNotFound")
        if match := re.match(r"/api/models/org/name(?:/revision/([^?]+))?(\?|$)", self.path):
            revision = match[1] or "main"
            if revision not in (*COMMITS, *COMMITS.values()):
                return self.refuse("RevisionNotFound")
            return self.send(200, json.dumps(self.server.listing(revision)).encode())
        if "/tree/" in self.path:
            return self.send(200, json.dumps(self.server.tree()).encode())
        name = re.sub(r"^/org/name/resolve/[^/]+/", "", self.path)
        content, start = self.server.files[name], 0
        end = total = len(content)
        if self.headers["Range"] and self.server.ranges:
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"])
            start, end = int(match[1]), int(match[2] or total - 1) + 1
        cuts = self.server.cuts.get(name)
        cut = cuts.pop(0) if cuts else None
        self.send(
            206 if (start, end) != (0, total) else 200, content[start:end], cut, f"bytes {start}-{end - 1}/{total}"
        )
        if cut is not None and self.server.stalls:
            self.server.stalled.set()
            self.server.released.wait(60)

    do_HEAD = do_GET

    def send(self, status: int, body: bytes, cut: int | None = None, part: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", part)
        if "/resolve/" in self.path:
            self.send_header("ETag", f'"{git_sha1(body)}"')
            self.send_header("X-Repo-Commit", COMMITS.get(self.path.split("/")[4], self.path.split("/")[4]))
        self.end_headers()
        if self.command == "GET":
            self.server.sent += len(body[:cut])
            self.wfile.write(body[:cut])

    def refuse(self, reason: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def use(url: str, tmp_path: Path, monkeypatch) -> None:
    """Makes this process and those that it starts use a hub and an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "home" / "harnesses"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
