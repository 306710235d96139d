"""Code that a model wrote, in a process of its own: few seconds, little memory, an empty folder.

These are limits against accidents: endless loops, memory, files left behind. They do not stop an attacker, since the
process has the user's rights and network; run tasks with code in a container where that matters.
"""

import errno
import os
import subprocess
import sys
import tempfile
from contextlib import suppress

SECONDS, MEMORY, FILE = 10, 1 << 30, 1 << 24  # bytes
LIMITED = f"""
import resource
for kind, most in (("CPU", {SECONDS}), ("AS", {MEMORY}), ("FSIZE", {FILE}), ("CORE", 0)):
    number = getattr(resource, "RLIMIT_" + kind)
    hard = resource.getrlimit(number)[1]
    most = most if hard < 0 else min(most, hard)
    resource.setrlimit(number, (most, most))
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
        except ValueError:  # a null byte in the code
            return False
        except OSError as error:
            if error.errno != errno.E2BIG:  # the machine's failure, not the program's
                raise
            return False  # more code than an argument holds
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
