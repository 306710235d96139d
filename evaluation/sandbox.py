"""Code that a model wrote, in a process of its own: few seconds, little memory, an empty folder.

These are limits against accidents: endless loops, memory, files left behind. They do not stop an attacker, since the
process has the user's rights and network; run tasks with code in a container where that matters.
"""

import os
import subprocess
import sys
import tempfile
from contextlib import suppress

SECONDS, MEMORY, FILE = 10, 1 << 30, 1 << 24  # bytes
LIMITED = f"""
import resource
for kind, most in (("CPU", {SECONDS}), ("AS", {MEMORY}), ("FSIZE", {FILE}), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (most, most))
"""


def passes(code: str, seconds: float = SECONDS) -> bool:
    """Whether a Python program ends by itself, without an exception, in time."""
    with tempfile.TemporaryDirectory(prefix="nanoqwen-code-") as folder:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", f"{LIMITED}\nexec(compile({code!r}, 'answer.py', 'exec'), {{}})"],
                cwd=folder,
                env={"PATH": os.defpath},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except (OSError, ValueError):  # more code than an argument holds, or a null byte in it
            return False
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """The process and what it has started; a group that is gone already is no error."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, 9)
    process.wait()
