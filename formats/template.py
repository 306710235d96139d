"""A checkpoint's chat template, rendered in a process of its own.

A chat template is a Jinja program that renders a list of messages as one text, and it is untrusted code.
Jinja's sandbox isolates it from Python's internals, but nothing inside a process can stop `'a' * 10**10`,
`10**(10**10)` or the text of a list nested in itself a billion times: each is one call into C. A child process can be
stopped by the kernel (setrlimit(2)): a rendering gets one second of processor time and one gigabyte of memory, and
no file or socket can be opened. The child is started once, while the tokenizer loads, and then renders in less than a
millisecond. This file holds both sides: `TemplateSandbox`, and the child when it is run as a program.
"""

import errno
import json
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2  # at run time only in the child

CHARACTERS = 16 << 20  # of a request and of a rendered text; a context of 262,144 tokens has about 1 M
CPU_SECONDS, SECONDS = 1, 10  # processor time; wall-clock time, for a busy machine
MEMORY = 1 << 30  # bytes of address space, where the system enforces it (Linux does, macOS does not)


class TemplateSandbox:
    """Renders templates in a child process with limited time and memory and without files.

    The child's first line is a JSON text: why it can't render, or "". Then one JSON line goes to it, [template,
    variables], and one comes back, {"text"} or {"error"}. After an error or a death the next rendering has a new child.
    """

    def __init__(self):
        self._child: subprocess.Popen | None = None
        self._is_ready = False
        self._lock = threading.Lock()

    def start(self) -> subprocess.Popen:
        """The running child. It is outside the terminal's process group, so that Ctrl-C does not reach it."""
        if self._child is None or self._child.poll() is not None:  # also true in a fork of this process
            self._child = subprocess.Popen(
                [sys.executable, "-P", __file__, "--serve-templates"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._end, self._is_ready = weakref.finalize(self, _end_child, self._child), False
        return self._child

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The rendered text. A ValueError says what "the chat template" did; an OSError, that the child could not start
        or was killed, which is not the template's fault."""
        try:
            request = json.dumps([template, variables], ensure_ascii=False)
        except (RecursionError, ValueError, TypeError) as error:
            raise ValueError(f"can only be given messages and tools of plain JSON data ({error})") from None
        if len(request) > CHARACTERS:
            raise ValueError(f"can be given {CHARACTERS:,} characters, not {len(request):,}; shorten the messages")
        with self._lock:
            reply, failure, status = self._reply(request)
            if status == -signal.SIGALRM:  # no template can wait, but the machine may have stood still
                reply, failure, status = self._reply(request)
        if "text" in reply:
            return reply["text"]
        if failure:
            ended = f" (exit status {status})" if status != -signal.SIGKILL else ""
            raise OSError(f"the process that renders chat templates can't start: {failure}{ended}")
        if status == -signal.SIGKILL and not reply:
            raise OSError("the process that renders chat templates was killed, as systems do when memory is short")
        error = reply.get("error", f"ended its process (exit status {status})")
        if status in (-signal.SIGXCPU, -signal.SIGALRM) and not reply:
            error = f"ran for more than {CPU_SECONDS} s of processor time or {SECONDS} s in all"
        error = "".join(character if character.isprintable() else " " for character in error[:300])
        raise ValueError(f"{error}; fix the template or the messages, or use --raw")

    def _reply(self, request: str) -> tuple[dict[str, str], str, int]:
        """What the child answers, why it could not start, and how it ended if it gave no text."""
        child, reply, failure, status = self.start(), {}, "", 0
        try:
            failure = "" if self._is_ready else _failure_to_start(child)
            self._is_ready = not failure
            reply = {} if failure else _exchange(child, request)
        finally:
            if "text" not in reply:  # after Ctrl-C too: a late reply must not answer the next request
                status = self._stop()
        return reply, failure, status

    def _stop(self) -> int:
        """Ends the child and gives its exit status."""
        child, self._child = self._child, None
        self._end.detach()
        return _end_child(child)


def _end_child(child: subprocess.Popen) -> int:
    child.kill()
    for pipe in (child.stdin, child.stdout):
        with suppress(OSError):  # what a dead child did not read
            pipe.close()
    return child.wait()


def _failure_to_start(child: subprocess.Popen) -> str:
    try:
        return str(json.loads(_line(child, CHARACTERS)))[:200]
    except ValueError:
        return "it ended before it said why, perhaps for want of memory"


def _line(child: subprocess.Popen, most: int) -> bytes:
    """The child's next line; b"" when it has ended."""
    line = child.stdout.readline(most)
    if not line:
        with suppress(subprocess.TimeoutExpired):
            child.wait(1)  # so that its exit status is its own and not that of being ended here
    return line


def _exchange(child: subprocess.Popen, request: str) -> dict[str, str]:
    """The child's reply, or {} if it died. The reply is untrusted too: its size and form are checked."""
    try:
        child.stdin.write(request.encode("utf-8", "surrogatepass") + b"\n")
        child.stdin.flush()
        reply = json.loads(_line(child, 6 * CHARACTERS + 100))
    except (BrokenPipeError, ValueError, RecursionError):
        return {}
    return reply if isinstance(reply, dict) and all(isinstance(value, str) for value in reply.values()) else {}


def _serve_templates() -> None:
    """The child: sets its limits before it reads any untrusted input, then answers one request after another."""
    try:
        import resource

        compiled = lru_cache(maxsize=4)(_prepared().from_string)
        memory = _lowered("RLIMIT_AS", MEMORY)
        _lowered("RLIMIT_CORE", 0)
        _lowered("RLIMIT_NOFILE", 0)
        failure = ""
    except Exception as error:  # of memory, or of an installation
        full = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
        failure = "out of memory" if full else f"{type(error).__name__}: {error}"
    print(json.dumps(failure), flush=True)
    if failure:
        sys.exit(1)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for request in sys.stdin.buffer:
        seconds = int(time.process_time()) + 1 + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds if hard < 0 else min(seconds, hard), hard))
        signal.alarm(SECONDS)  # which ends the process
        try:
            template, variables = json.loads(request.decode("utf-8", "surrogatepass"))
            reply = {"text": _rendered(compiled(template), variables)}
        except MemoryError:
            reply = {"error": f"needs more than {memory >> 20} MiB of memory"}
        except Exception as error:
            reply = {"error": f"failed ({type(error).__name__}: {str(error)[:200]})"}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()
        signal.alarm(0)


def _prepared() -> "jinja2.Environment":
    """The environment, with all that is imported or read on first use, before files are blocked."""
    import jinja2

    environment = template_environment()
    with suppress(jinja2.TemplateError):
        environment.from_string("{{ raise_exception(strftime_now('%Z')) }}").render()
    return environment


def _lowered(kind: str, most: int) -> int:
    """Sets a limit of this process, which stays below one that it was started with; returns it."""
    import resource

    number = getattr(resource, kind)
    hard = resource.getrlimit(number)[1]
    most = most if hard < 0 else min(most, hard)  # -1 is no limit
    resource.setrlimit(number, (most, most))
    return most


def _rendered(template: "jinja2.Template", variables: dict[str, Any]) -> str:
    pieces, characters = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        characters += len(piece)
        if characters > CHARACTERS:
            raise ValueError(f"it prints more than {CHARACTERS:,} characters")
    return "".join(pieces)


def template_environment() -> "jinja2.Environment":
    """Jinja with the settings, functions and tags that chat templates are written for (those of transformers)."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(ext.Extension):
        """`{% generation %} ... {% endgeneration %}` marks what training learns from; here it is only its content."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        """Jinja's own `tojson` escapes characters for HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


if __name__ == "__main__":
    if sys.argv[1:] != ["--serve-templates"]:
        sys.exit("formats/template.py is started by chat.py; `python generate.py` is the chat")
    _serve_templates()
