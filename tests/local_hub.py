"""A stand-in for the Hugging Face hub on this machine, for whoever asks one: a model, and data sets."""

import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import constants

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(ThreadingHTTPServer):
    """Serves one model, org/name, and data sets, {id: {file name: bytes}}, and writes down each request."""

    def __init__(self, files: dict[str, bytes] | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files or {}
        self.sets: dict[str, dict[str, bytes]] = {}
        self.cards: dict[str, dict] = {}  # of data sets
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
        return [entry(name, content) for name, content in self.files.items()]

    def tree_of_set(self, repo: str, folder: str) -> list[dict]:
        """All files below a folder of a data set, and the folders."""
        inside = [name for name in self.sets[repo] if name.startswith(folder)]
        folders = {str(parent) for name in inside for parent in Path(name).parents if str(parent) not in (".", folder)}
        made = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]
        return made + [entry(name, self.sets[repo][name]) for name in inside]

    def listing_of_set(self, repo: str) -> dict:
        siblings = [{"rfilename": name, "size": len(content)} for name, content in self.sets[repo].items()]
        told = {"id": repo, "sha": COMMITS["main"], "tags": [], "private": False}
        return told | {"siblings": siblings, "cardData": self.cards.get(repo, {})}

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
        if re.match(r"/(api/)?datasets/", self.path):
            return self.data_set(unquote(self.path))
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
        self.file(name, self.server.files[name])

    do_HEAD = do_POST = do_GET

    def data_set(self, path: str) -> None:
        match = re.match(r"/(?:api/)?datasets/([^/]+/[^/?]+)", path)
        repo, rest = match[1], path[match.end() :]
        if repo not in self.server.sets or rest.startswith("/croissant"):
            return self.refuse("RepoNotFound")
        files = self.server.sets[repo]
        if match := re.match(r"/tree/[^/?]+/?([^?]*)", rest):
            return self.send(200, json.dumps(self.server.tree_of_set(repo, match[1])).encode())
        if rest.startswith("/paths-info/"):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            wanted = json.loads(body)["paths"] if body.startswith("{") else re.findall(r"paths=([^&]+)", unquote(body))
            return self.send(200, json.dumps([entry(name, files[name]) for name in wanted if name in files]).encode())
        if match := re.match(r"/resolve/[^/]+/([^?]*)", rest):
            return self.file(match[1], files[match[1]]) if match[1] in files else self.refuse("EntryNotFound")
        return self.send(200, json.dumps(self.server.listing_of_set(repo)).encode())

    def file(self, name: str, content: bytes) -> None:
        """A file, or the range of it that is asked for."""
        start, end = 0, len(content)
        total = end
        if self.headers["Range"] and self.server.ranges:
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"])
            start, end = int(match[1]), min(total, int(match[2] or total - 1) + 1)
        cuts = self.server.cuts.get(name)
        cut = cuts.pop(0) if cuts else None
        self.send(
            206 if (start, end) != (0, total) else 200, content[start:end], cut, f"bytes {start}-{end - 1}/{total}"
        )
        if cut is not None and self.server.stalls:
            self.server.stalled.set()
            self.server.released.wait(60)

    def send(self, status: int, body: bytes, cut: int | None = None, part: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", part)
        if "/resolve/" in self.path:
            self.send_header("ETag", f'"{git_sha1(body)}"')
            revision = re.search(r"/resolve/([^/]+)", self.path)[1]
            self.send_header("X-Repo-Commit", COMMITS.get(revision, revision))
        self.end_headers()
        if self.command != "HEAD":
            self.server.sent += len(body[:cut])
            self.wfile.write(body[:cut])

    def refuse(self, reason: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def entry(name: str, content: bytes) -> dict:
    """A file in the listing of a folder."""
    return {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def use(url: str, tmp_path: Path, monkeypatch) -> None:
    """Makes this process and those that it starts use a hub and an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "home" / "harnesses"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    if "datasets" in sys.modules:  # it copied the settings when it was imported
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_ENDPOINT", url)
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
