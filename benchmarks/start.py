"""Seconds from the command to its first token, and where they go: `python bench.py start`.

    generate.py's phases, as it measures them itself -> what is left of the time that a watch outside sees
    python -c "import torch"     what PyTorch costs whoever uses it
    llama-completion             the same model as GGUF (bf16), if it is installed (NANOQWEN_LLAMA_CPP or PATH), with a
                                 context of 512 positions and no warm-up: it would take memory for the whole context

The goal is to need no longer than the last two together. All take turns, after one run of each that
reads the files into memory; each figure is the median of --repeats. A first token is there when its first byte comes
out of the process.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import console
from benchmarks.common import ROOT, cache_directory, llama_program, run_script, start_worker
from benchmarks.speed import find_model
from formats.source import BUNDLED_MODEL

PROMPT = "Which is larger, 9.11 or 9.9?"
IMPORT = "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)"


def first_byte(command: list[str]) -> tuple[float, str]:
    """-> seconds until a process writes its first byte to standard output, and all that it writes there."""
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        first = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - start
        output = (first + process.communicate()[0]).decode("utf-8", "replace")
        if process.returncode or not first:
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace").strip().splitlines() or ["it wrote nothing"]
            raise ValueError(f"{Path(command[0]).name} failed: {said[-1]}")
    return seconds, output


def generate_command(model: Path) -> list[str]:
    settings = ["--temperature", "0", "--max-new-tokens", "1", "--thinking", "off", "--json"]
    return [sys.executable, str(ROOT / "generate.py"), "--model", str(model), *settings, PROMPT]


def phases(model: Path) -> dict[str, float]:
    """Of one run of generate.py; `all` is the time that was measured outside."""
    seconds, output = first_byte(generate_command(model))
    found = json.loads(output)["stats"]["start_seconds"]
    return {**found, "what is left": seconds - sum(found.values()), "all": seconds}


def llama_command(program: str, gguf: Path, threads: int | None) -> list[str]:
    command = [program, "-m", str(gguf), "-p", PROMPT, "-n", "1", "--temp", "0", "-c", "512"]
    command += ["--no-warmup", "-no-cnv", "--no-display-prompt"]
    return command + (["-t", str(threads)] if threads else [])


def main(arguments: list[str]) -> None:
    parser = console.ArgumentParser(prog="bench.py start", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", metavar="SRC", help="a directory (default: Qwen3-0.6B or its shape)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each (default: 5)")
    parser.add_argument("--threads", type=int, metavar="N", help="of llama-completion (default: its own choice)")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        raise ValueError(f"--repeats {options.repeats}: give at least 1")
    with start_worker() as worker:
        model, name = find_model(options.model, worker)
    program = llama_program("llama-completion")
    with tempfile.TemporaryDirectory(dir=cache_directory(), prefix="start-") as folder:
        gguf = Path(folder) / "model.gguf"
        if program:
            run_script(ROOT / "convert.py", "--to", "gguf", "--type", "bf16", "--model", str(model), "--out", str(gguf))
        ours, bundled, torch, llama = [], [], [], []
        for _ in range(options.repeats + 1):
            ours.append(phases(model))
            bundled.append(phases(BUNDLED_MODEL))
            torch.append(float(first_byte([sys.executable, "-c", IMPORT])[1]))
            if program:
                llama.append(first_byte(llama_command(program, gguf, options.threads))[0])
    table = {"phase": [name, "the bundled model"]}
    for phase in ours[0]:
        table[phase] = [f"{statistics.median(run[phase] for run in runs[1:]):.3f}" for runs in (ours, bundled)]
    table["import torch, alone"] = 2 * [f"{statistics.median(torch[1:]):.3f}"]
    if program:
        table["llama-completion"] = [f"{statistics.median(llama[1:]):.3f}", ""]
        goal = [a + b for a, b in zip(torch[1:], llama[1:], strict=True)]
        shares = [run["all"] / most for run, most in zip(ours[1:], goal, strict=True)]
        table["all / (llama-completion + import torch)"] = [f"{statistics.median(shares):.2f}", ""]
    for number, (phase, cells) in enumerate(table.items()):
        print(f"| {phase} | {' | '.join(cells)} |", flush=True)
        if number == 0:
            print(f"|---|{'--:|' * len(cells)}")
