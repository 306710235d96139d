"""bench.py's measurements of llama.cpp, by its own llama-bench; the first token is a whole run of llama-completion."""

import json
import resource
import subprocess
import sys
import time
from typing import Any

import console
from benchmarks.common import llama_program
from benchmarks.speed import QUESTION, SHORT, Job


def run(program: str, job: Job, *options: object) -> str:
    flags = ["-m", job.model, "-t", str(job.threads), "-ngl", "0" if job.device == "cpu" else "99"]
    command = [llama_program(program), *flags, *map(str, options)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        sys.exit(f"{program} ended with status {result.returncode}: {lines[-1]}")
    return result.stdout


def speed(job: Job, *options: object) -> dict[str, Any]:
    return json.loads(run("llama-bench", job, *options, "-r", 1, "-o", "json"))[0]


def measure(job: Job) -> dict[str, float]:
    measured = {}
    if llama_program("llama-completion"):
        start = time.perf_counter()
        run("llama-completion", job, "-no-cnv", "--no-warmup", "-c", 512, "-n", 1, "-p", QUESTION[0]["content"])
        measured["first_token"] = time.perf_counter() - start
    prefill = speed(job, "-p", job.prefill, "-n", 0)
    measured["prefill"] = prefill["avg_ts"]
    measured["decode"] = speed(job, "-p", 0, "-n", job.tokens, "-d", SHORT)["avg_ts"]
    measured["peak_bytes"] = console.peak_bytes(resource.getrusage(resource.RUSAGE_CHILDREN))
    if job.deep:
        cache = ("-ctk", "q8_0", "-ctv", "q8_0") if job.kv == "int8" else ()
        measured["decode_deep"] = speed(job, "-p", 0, "-n", job.tokens, "-d", job.deep, "-fa", 1, *cache)["avg_ts"]
    return measured | {"bytes_per_weight": prefill["model_size"] / prefill["model_n_params"]}


if __name__ == "__main__":
    print(json.dumps(measure(Job(**json.loads(sys.argv[2])))))
