"""How long a conversion to GGUF takes, beside llama.cpp's own tools: `python bench.py convert --model SRC`.

NANOQWEN_LLAMA_CPP names llama.cpp's folder: convert_hf_to_gguf.py in it writes f16, bf16 and q8_0, its llama-quantize
makes the others out of a bf16 file. The two take turns; wall time, processor time and peak memory are the operating
system's own figures of each whole process, and the two results are compared byte for byte.
"""

import filecmp
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import console
from benchmarks.common import ROOT, cache_directory, llama_program
from formats.source import resolve_default

CONVERTER_TYPES = ("f32", "f16", "bf16", "q8_0")
DEFAULT_TYPES = ("bf16", "f16", "q8_0", "q4_0", "q4_k_m", "q6_k")


class Run(NamedTuple):
    wall: float  # seconds
    processor: float  # seconds of all threads
    peak: float  # bytes of the largest process, mapped files included


def run(command: list[str | Path]) -> Run:
    """One process from start to end. ValueError with its last line if it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            lines = output.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise ValueError(f"{Path(command[0]).name} ended with status {process.returncode}: {lines[-1]}")
    return Run(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, console.peak_bytes(usage))


def commands(model: Path, type: str, folder: Path) -> dict[str, list]:
    """What makes the same file with each of the two programs, by the name of the program."""
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    found = {"nanoqwen": [sys.executable, ROOT / "convert.py", "--to", "gguf", "--type", type, "--model", model]}
    found["nanoqwen"] += ["--out", ours, "--force"]
    if type in CONVERTER_TYPES:
        script = Path(os.environ.get("NANOQWEN_LLAMA_CPP", ""), "convert_hf_to_gguf.py")
        if script.is_file():
            found["llama.cpp"] = [sys.executable, script, model, "--outtype", type, "--outfile", theirs]
    elif program := llama_program("llama-quantize"):
        source = folder / "bf16.gguf"
        if not source.exists():
            convert = [sys.executable, ROOT / "convert.py", "--to", "gguf", "--type", "bf16", "--model", model]
            run([*convert, "--out", source])
        found["llama.cpp"] = [program, source, theirs, type.upper(), str(os.cpu_count())]
    return found


def measure(model: Path, type: str, repeats: int, folder: Path) -> list[str]:
    """The table's lines of one type."""
    programs, runs = commands(model, type, folder), {}
    for _ in range(repeats):
        for name, command in programs.items():
            runs.setdefault(name, []).append(run(command))
            console.notice(f"{type} {name}: {runs[name][-1].wall:.1f} s")
    lines = []
    for name, found in runs.items():
        wall, processor, memory = (statistics.median(column) for column in zip(*found, strict=True))
        spread = f"{min(found).wall:.1f} to {max(found).wall:.1f}"
        lines.append(f"| {type} | {name} | {wall:.1f} ({spread}) | {processor:.1f} | {memory / 1e6:,.0f} |")
    if len(runs) == 2:
        same = filecmp.cmp(folder / "ours.gguf", folder / "theirs.gguf", shallow=False)
        ratio = statistics.median(a.wall / b.wall for a, b in zip(*runs.values(), strict=True))
        lines[0] += f" {ratio:.2f} | {'identical' if same else 'different'} |"
        lines[1] += " | |"
    else:
        lines[0] += " | no llama.cpp here |"
    return lines


def main(arguments: list[str]) -> None:
    parser = console.ArgumentParser(prog="bench.py convert", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", metavar="SRC", help="directory or hub id (default: Qwen/Qwen3-0.6B)")
    parser.add_argument("--types", nargs="+", default=DEFAULT_TYPES, metavar="TYPE", help="as of convert.py")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds of the two in turn (default: 3)")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        raise ValueError(f"--repeats {options.repeats}: give at least 1")
    model = resolve_default(options.model)
    with tempfile.TemporaryDirectory(dir=cache_directory(), prefix="bench-convert-") as folder:
        size = sum(file.stat().st_size for file in model.iterdir())
        if (free := shutil.disk_usage(folder).free) < 6 * size:
            raise ValueError(f"{folder}: {free / 1e9:.1f} GB are free, but {6 * size / 1e9:.1f} GB may be needed")
        print("| type | program | wall s (min to max) | processor s | peak MB | ours / theirs | files |")
        print("|---|---|---|---|---|---|---|")
        for type in options.types:
            print("\n".join(measure(model, type, options.repeats, Path(folder))), flush=True)
