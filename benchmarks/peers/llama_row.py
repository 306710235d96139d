"""bench.py's measurements of llama.cpp, by its own llama-bench and llama-batched-bench."""

import json
import resource
import signal
import subprocess
import sys
from typing import Any

import console
from benchmarks.common import llama_program
from benchmarks.speed import SHORT, Job

crashed: list[str] = []  # programs that ran without their repacked products
AS_THEY_ARE = {"llama-bench": ("--repack", "0"), "llama-batched-bench": ("--no-repack",)}


def run(program: str, job: Job, *options: object) -> str:
    """What the program prints. Where its repacked products are no instructions of this processor, without those."""
    flags = ["-m", job.model, "-t", str(job.threads), "-ngl", "0" if job.device == "cpu" else "99"]
    command = [llama_program(program), *flags, *map(str, options)]
    for more in ((), AS_THEY_ARE[program]):
        result = subprocess.run(
            [*command, *more], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if result.returncode not in (-signal.SIGILL, -signal.SIGSEGV):
            break
        crashed.append(program)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        sys.exit(f"{program} ended with status {result.returncode}: {lines[-1]}")
    return result.stdout


def speed(job: Job, *options: object) -> dict[str, Any]:
    return json.loads(run("llama-bench", job, *options, "-r", 1, "-o", "json"))[0]


def measure(job: Job) -> dict[str, float]:
    prefill = speed(job, "-p", job.prefill, "-n", 0)
    measured = {"prefill": prefill["avg_ts"]}
    measured["decode"] = speed(job, "-p", 0, "-n", job.tokens, "-d", SHORT)["avg_ts"]
    measured["peak_bytes"] = console.peak_bytes(resource.getrusage(resource.RUSAGE_CHILDREN))
    cache = ("-ctk", "q8_0", "-ctv", "q8_0") if job.kv == "int8" else ()
    if job.batches and llama_program("llama-batched-bench"):
        sizes, room = ",".join(map(str, job.batches)), max(job.batches) * (SHORT + job.tokens)
        options = ("-npp", SHORT, "-ntg", job.tokens, "-npl", sizes, "-c", room, "--output-format", "jsonl")
        for line in run("llama-batched-bench", job, *options, *cache).splitlines():
            if line.startswith("{"):
                found = json.loads(line)
                measured[f"decode_batch_{found['pl']}"] = found["speed_tg"]
    if job.deep:
        measured["decode_deep"] = speed(job, "-p", 0, "-n", job.tokens, "-d", job.deep, "-fa", 1, *cache)["avg_ts"]
    measured["repacked"] = float(not crashed)
    return measured | {"bytes_per_weight": prefill["model_size"] / prefill["model_n_params"]}


if __name__ == "__main__":
    print(json.dumps(measure(Job(**json.loads(sys.argv[2])))))
