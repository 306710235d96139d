"""What the subjects of bench.py share: scripts in fresh processes, machine and checkout in words, the report.

Runs are processes of their own, so that load time and peak memory belong to one run. The process that starts them stays
small (no torch), because a child's peak memory counts from its parent's; what needs torch is done in a worker.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import console
from benchmarks.report import hardware, markdown_table, show
from formats.files import write_text
from formats.record import commit

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"  # no part of the product, so that it never imports transformers


# --- processes ---


def start_worker() -> ProcessPoolExecutor:
    """One process that may import torch and stays; Ctrl-C is for the process that asked it."""
    return ProcessPoolExecutor(1, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))


def run_script(script: Path, *arguments: str, **environment: str) -> str:
    """What a Python script of this checkout prints; ValueError with its last line if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    if PEERS in script.parents and console.OUR_SPIN_BOUND:  # a peer's threads wait as they do for its users
        del environment["GOMP_SPINCOUNT"]
    command = [sys.executable, str(script), *arguments]
    result = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"{script.name} ended with status {result.returncode}"]
        raise ValueError(lines[-1])
    return result.stdout


def llama_program(name: str) -> str | None:
    folder = os.environ.get("NANOQWEN_LLAMA_CPP")
    places = [folder, str(Path(folder) / "bin"), str(Path(folder) / "build" / "bin")] if folder else [None]
    return next(filter(None, (shutil.which(name, path=place) for place in places)), None)


def cache_directory() -> Path:
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoqwen"
    path.mkdir(parents=True, exist_ok=True)
    return path


# --- this machine and this checkout ---


def describe_machine(threads: int = 0) -> dict[str, Any]:
    """The machine, and with `threads` its measured limits."""
    from ops.cpu import variants
    from ops.cpu.library import Chosen, library
    from ops.limits import describe, limits

    library()
    products = variants.describe(Chosen.variant) if Chosen.variant else None
    found = {**describe(), "load_average": os.getloadavg()[0], "row_products": products}
    return found | {"limits": limits(threads)} if threads else found


def versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("torch", "transformers"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


# --- the report ---


def header(machine: dict[str, Any], subject: str, arguments: list[str]) -> dict[str, Any]:
    """What every report begins with."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(digits=8) or "unknown",
        "command": shlex.join(["python", "bench.py", subject, *arguments]),
        "machine": machine,
        "versions": versions(),
    }


def finish(report: dict, path: Path, name: str, found: dict[str, list[list[str]]], notes: list[str]) -> None:
    """Writes PATH.json and PATH.md, and shows the tables."""
    programs = ", ".join(f"{program} {version}" for program, version in report["versions"].items())
    lines = [f"# {name}", "", f"`{report['command']}`, {report['date']}, commit {report['commit']}."]
    lines += [f"{hardware(report['machine'])}; {programs}."]
    for title, (head, *body) in found.items():
        lines += ["", f"## {title}", "", *markdown_table(head, body)]
    write_text(path.with_suffix(".md"), "\n".join([*lines, "", *notes]) + "\n")
    write_text(path.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    show(found)
    print("\n".join(notes))
    console.notice(f"written: {path}.json and {path}.md")
