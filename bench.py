"""How fast this machine runs Qwen3, and how fast it could: `python bench.py`.

    the machine's limits -> rows, alternated A B C A B C -> report.json -> report.md and roofline.png

A row is an engine with a precision: this project's, and the peers that are installed (transformers; llama.cpp, found
through NANOQWEN_LLAMA_CPP or PATH). Each run of a row is a fresh process, so that load time and peak memory are its
own. Just before each run the read bandwidth is measured: a machine drifts, and a token at batch 1 costs one read of
every weight. This process itself stays small (no torch), because a child's peak memory counts from its parent's.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import console
from bench_report import draw, markdown, number, ratios, show, summary, title
from formats.files import atomic_directory, sha256, write_text
from formats.source import BUNDLED_MODEL, DEFAULT_MODEL, HubUnreachable, resolve

ROOT = Path(__file__).resolve().parent
SHAPE = ROOT / "configs" / "qwen3-0.6b.json"  # of the random weights that stand in where the real ones are not at hand
PEER = ROOT / "tests" / "peers" / "transformers_row.py"
QUESTION = [{"role": "user", "content": "Which is larger, 9.11 or 9.9?"}]
SHORT, BATCHES = 32, (4, 16)
BYTES = {"f32": 4, "bf16": 2}


class Row(NamedTuple):
    engine: str
    precision: str
    device: str = "cpu"

    def __str__(self) -> str:
        return "/".join(self[: 2 if self.device == "cpu" else 3])


ROWS = [Row("nanoqwen", precision) for precision in ("f32", "bf16", "int8", "int4")]
ROWS += [Row("transformers", precision) for precision in ("f32", "bf16")]
ROWS += [Row("llama.cpp", precision) for precision in ("f32", "bf16", "q8_0", "q4_0", "q4_k_m")]
ROWS += [Row("nanoqwen", precision, "cuda") for precision in ("bf16", "int8", "int4")]
ROWS += [Row("transformers", "bf16", "cuda"), Row("llama.cpp", "bf16", "cuda")]


@dataclass
class Job:
    """What one run measures: given to a child process as JSON."""

    model: str
    precision: str
    device: str
    threads: int
    prefill: int  # tokens
    deep: int  # positions before the deep decode, 0 for none
    batches: list[int]
    tokens: int = 32  # decoded in each measurement
    started: float = 0.0  # time.time() just before the process began


# ---------------------------------------------------------------------------------------------------------------------
# In the child: the same measurements for every engine that is Python.


class Nanoqwen:
    """This project's model, called as generate.py calls it. Another engine has the same methods."""

    def __init__(self, job: Job):
        from chat import Chat

        self.job = job
        self.prompt = Chat.from_pretrained(job.model).render(QUESTION)

    def load(self) -> None:
        import torch

        from formats.checkpoint import open_checkpoint
        from model import load

        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}.get(self.job.precision)  # else as it was converted
        self.model = load(open_checkpoint(Path(self.job.model)), self.job.device, dtype)

    def new_cache(self, rows: int, positions: int) -> Any:
        from generate import new_cache

        return new_cache(self.model, positions, rows)

    def next(self, ids: list[list[int]], cache: Any) -> list[list[int]]:
        """Appends ids (a list for each row) to the cache; the likeliest next token of each row."""
        import torch

        return self.model(torch.tensor(ids, device=self.job.device), cache, last=True).argmax(-1).tolist()

    def sizes(self) -> dict[str, int]:
        from generate import weight_bytes_per_token

        return {"bytes_per_token": weight_bytes_per_token(self.model)}


def measure(engine_class: type, job: Job) -> dict[str, float]:
    """One run of a row. Speeds are tokens per second, `first_token` is seconds since the process began."""
    import resource

    import torch

    torch.set_num_threads(job.threads)
    with torch.inference_mode():
        engine = engine_class(job)
        start = time.perf_counter()
        engine.load()
        run = {"load": time.perf_counter() - start}
        engine.next([engine.prompt], engine.new_cache(1, len(engine.prompt) + 1))
        run["first_token"] = time.time() - job.started
        run |= engine.sizes()
        _prefill(engine, job.prefill)  # warms up
        run["prefill"] = job.prefill / _prefill(engine, job.prefill)
        run["decode"] = _decode(engine, 1, SHORT, job.tokens)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run["peak_bytes"] = peak * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes
        for rows in job.batches:
            run[f"decode_batch_{rows}"] = _decode(engine, rows, SHORT, job.tokens)
        if job.deep:
            run["decode_deep"] = _decode(engine, 1, job.deep, job.tokens)
    return run


def _ids(count: int) -> list[int]:
    return [7 + 31 * i % 211 for i in range(count)]  # any small ids: the arithmetic does not depend on them


def _prefill(engine: Any, count: int) -> float:
    cache = engine.new_cache(1, count)
    start = time.perf_counter()
    engine.next([_ids(count)], cache)
    return time.perf_counter() - start


def _decode(engine: Any, rows: int, depth: int, count: int) -> float:
    cache = engine.new_cache(rows, depth + count + 1)
    ids = engine.next([_ids(depth)] * rows, cache)
    ids = engine.next(ids, cache)  # the first step warms up
    start = time.perf_counter()
    for _ in range(count):
        ids = engine.next(ids, cache)
    return rows * count / (time.perf_counter() - start)


# ---------------------------------------------------------------------------------------------------------------------
# In a worker process that has torch and stays: the machine, and facts about the model.


def machine(threads: int) -> dict[str, Any]:
    from ops.machine import describe, limits

    return {**describe(), "load_average": os.getloadavg()[0], "limits": limits(threads)}


def bandwidth_now(device: str, threads: int) -> float:
    import torch

    from ops.machine import read_bandwidth

    torch.set_num_threads(threads)
    return read_bandwidth(device)


def model_facts(path: str) -> dict[str, Any]:
    """Sizes of a checkpoint. Also compiles the token step and reads the weights once, so that no run is the first."""
    import torch

    from formats.checkpoint import open_checkpoint
    from generate import weight_bytes_per_token
    from model import Config, Qwen3
    from ops.step import library

    checkpoint = open_checkpoint(Path(path))
    config = Config(**checkpoint.config)
    with torch.device("meta"):
        model = Qwen3(config)
    library()
    for file in checkpoint.files:
        sha256(file)
    total = sum(parameter.numel() for parameter in model.parameters())
    active = weight_bytes_per_token(model) // 4  # of a token; not the embedding's other rows, not the idle experts
    context, threads = config.max_position_embeddings, torch.get_num_threads()
    return {"parameters": total, "active_parameters": active, "context": context, "threads": threads}


def write_random_model(path: str) -> None:
    """The official 0.6B shape with random weights: as fast as the real ones. Norm weights vary around one."""
    import torch

    from model import Config, Qwen3

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.no_grad(), atomic_directory(path) as temporary:
        model = Qwen3(Config.from_json(SHAPE))
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.normal_(1.0, 0.1)
        model.save_pretrained(temporary)
        for name in ("tokenizer.json", "tokenizer_config.json"):  # its ids are few, but its text is read all the same
            shutil.copy(BUNDLED_MODEL / name, temporary)


# ---------------------------------------------------------------------------------------------------------------------
# Rows in fresh processes.


def process(command: list[str], threads: int) -> tuple[str, float, int]:
    """Runs a program → (its standard output, seconds, peak bytes). ValueError with its last line if it fails."""
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        for file in (out, err):
            file.seek(0)
        if child.returncode:
            lines = err.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise ValueError(f"{Path(command[0]).name} ended with status {child.returncode}: {lines[-1]}")
        return out.read().decode(), seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_python(script: Path, job: Job) -> dict[str, float]:
    job = replace(job, started=time.time())
    out, _, _ = process([sys.executable, str(script), "--measure", json.dumps(asdict(job))], job.threads)
    return json.loads(out.splitlines()[-1])


def run_llama(job: Job) -> dict[str, float]:
    """The same measurements by llama-bench, on a GGUF; the first token is a whole run of llama-completion."""
    flags = ["-m", job.model, "-t", str(job.threads), "-ngl", "0" if job.device == "cpu" else "99"]

    def bench(*options: object) -> tuple[dict[str, Any], int]:
        command = [llama_program("llama-bench"), *flags, *map(str, options), "-r", "1", "-o", "json"]
        out, _, peak = process(command, job.threads)
        return json.loads(out)[0], peak

    run = {}
    if completion := llama_program("llama-completion"):
        options = ["-no-cnv", "--no-warmup", "-n", "1", "-p", QUESTION[0]["content"]]
        run["first_token"] = process([completion, *flags, *options], job.threads)[1]
    found, peak = bench("-p", job.prefill, "-n", 0)
    run["prefill"] = found["avg_ts"]
    run["file_bytes"], run["file_parameters"] = found["model_size"], found["model_n_params"]
    found, other_peak = bench("-p", 0, "-n", job.tokens, "-d", SHORT)
    run["decode"], run["peak_bytes"] = found["avg_ts"], max(peak, other_peak)
    if job.deep:
        run["decode_deep"] = bench("-p", 0, "-n", job.tokens, "-d", job.deep)[0]["avg_ts"]
    return run


def llama_program(name: str) -> str | None:
    folder = os.environ.get("NANOQWEN_LLAMA_CPP")
    places = [folder, str(Path(folder) / "bin"), str(Path(folder) / "build" / "bin")] if folder else [None]
    return next(filter(None, (shutil.which(name, path=place) for place in places)), None)


def convert(model: Path, row: Row, directory: Path, threads: int) -> Path:
    """The checkpoint that a row runs on: the model itself, or what convert.py makes of it in `directory`."""
    gguf = row.engine == "llama.cpp"
    if not gguf and row.precision in BYTES:
        return model
    path = directory / (f"{row.precision}.gguf" if gguf else row.precision)
    if not path.exists():
        console.notice(f"converting the model to {path.name}")
        flags = ["--to", "gguf", "--type", row.precision] if gguf else ["--to", row.precision]
        command = [sys.executable, str(ROOT / "convert.py"), *flags, "--model", str(model), "--out", str(path)]
        process(command, threads)
    return path


def run_all(
    model: Path, rows: list[Row], options: Any, facts: dict, worker: ProcessPoolExecutor
) -> tuple[dict, list[dict]]:
    """All rows, a round of each after another, and with each run the read bandwidth just before it."""
    room = facts["context"] // 2
    job = Job("", "", "cpu", options.threads, min(512, room), 0, [], min(32, max(1, room // 4)))
    job.deep, job.batches = min(4096, room) if options.deep else 0, list(BATCHES) if options.batch else []
    results = [{**row._asdict(), "runs": [], "failed": None} for row in rows]
    with tempfile.TemporaryDirectory(dir=cache_directory(), prefix="converted-") as directory:
        for index in range(options.repeats * len(rows)):
            place = index % len(rows)
            row, result = rows[place], results[place]
            if result["failed"]:
                continue
            try:
                path = str(convert(model, row, Path(directory), options.threads).resolve())
                bandwidth = worker.submit(bandwidth_now, row.device, options.threads).result()
                run = run_row(row, replace(job, model=path, precision=row.precision, device=row.device))
            except (ValueError, OSError) as error:
                result["failed"] = str(error)
                console.notice(f"{row}: {error}")
                continue
            if "bytes_per_token" not in run:  # a peer reads the same weights in its own type
                share = facts["active_parameters"] / run.pop("file_parameters", facts["parameters"])
                size = run.pop("file_bytes", facts["parameters"] * BYTES.get(row.precision, 0))
                run["bytes_per_token"] = share * size
            run["read_bandwidth"] = bandwidth
            run["weight_bandwidth"] = run["decode"] * run["bytes_per_token"]
            run["share"] = run["weight_bandwidth"] / bandwidth
            result["runs"].append(run)
            line = f"{row}: prefill {number(run['prefill'])}, decode {number(run['decode'])} tok/s"
            console.notice(f"[{index + 1}/{options.repeats * len(rows)}] {line}, {run['share']:.0%} of the bandwidth")
    for result in results:
        result["summary"] = summary(result["runs"])
    settings = {name: getattr(job, name) for name in ("threads", "prefill", "deep", "batches", "tokens")}
    return {"repeats": options.repeats, "after": SHORT, **settings}, results


def run_row(row: Row, job: Job) -> dict[str, float]:
    if row.engine == "llama.cpp":
        return run_llama(job)
    return run_python(PEER if row.engine == "transformers" else Path(__file__), job)


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def parse_arguments(arguments: list[str]) -> Any:
    parser = console.ArgumentParser(prog="bench.py", description="Measure this machine and this model on it.")
    add = parser.add_argument
    add("--model", metavar="SRC", help=f"directory, hub id or .gguf file (default: {DEFAULT_MODEL} or its shape)")
    add("--rows", nargs="+", metavar="ROW", help="such as nanoqwen/bf16 or '*/bf16' (default: all that can run)")
    add("--repeats", type=int, default=3, metavar="N", help="rounds over all rows (default: 3)")
    add("--threads", type=int, metavar="N", help="default: PyTorch's choice, one for each core")
    add("--deep", action="store_true", help="also decode behind 4096 positions (slow)")
    add("--batch", action="store_true", help="also decode 4 and 16 sequences at once")
    add("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="where the report goes (runs/bench)")
    add("--measure", metavar="JSON", help=argparse.SUPPRESS)  # one run of a row, in a child process
    options = parser.parse_args(arguments)
    for name, value, most in (("--repeats", options.repeats, 1000), ("--threads", options.threads, os.cpu_count())):
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{name} {value}: give a number from 1 to {most}")
    return options


def choose_rows(patterns: list[str] | None, cuda: bool) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows that are asked for and can run here, and the names of the others under the reason why they can't."""
    chosen = [row for row in ROWS if patterns is None or any(fnmatch(str(row), pattern) for pattern in patterns)]
    for pattern in patterns or ():
        if not any(fnmatch(str(row), pattern) for row in ROWS):
            raise ValueError(f"--rows {pattern}: no such row; there are {', '.join(map(str, ROWS))}")
    missing = {}
    if not find_spec("transformers"):
        missing["transformers"] = "Not installed (`make test` installs it)"
    if not llama_program("llama-bench"):
        missing["llama.cpp"] = "Not installed (NANOQWEN_LLAMA_CPP names the folder of llama-bench)"
    rows, absent = [], {}
    for row in chosen:
        reason = missing.get(row.engine)
        if row.device == "cuda" and not cuda:
            reason = "Not yet measured (no CUDA device here)"
        if reason:
            absent.setdefault(reason, []).append(f"`{row}`")
        else:
            rows.append(row)
    if not rows:
        raise ValueError(f"--rows {' '.join(patterns)}: none of them can run here. {'; '.join(absent)}")
    return rows, absent


def cache_directory() -> Path:
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoqwen"
    path.mkdir(parents=True, exist_ok=True)
    return path


def find_model(src: str | None, worker: ProcessPoolExecutor) -> tuple[Path, str]:
    """Path and name of SRC; without one Qwen3-0.6B where it is at hand, else random weights of its shape, kept."""
    if src is not None:
        return resolve(src), Path(src).name
    os.environ["HF_HUB_OFFLINE"] = "1"  # no download: random weights are as fast
    try:
        return resolve(DEFAULT_MODEL), DEFAULT_MODEL
    except HubUnreachable:
        path = cache_directory() / f"{SHAPE.stem}-random"
        if not path.exists():
            console.notice(f"{DEFAULT_MODEL} is not at hand: writing random weights of its shape to {path}")
            worker.submit(write_random_model, str(path)).result()
        return path, f"{SHAPE.stem} (random weights)"


def commit() -> str:
    """The checkout's commit, with a plus where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if changed.stdout else "")


def versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("torch", "transformers"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def main() -> None:
    options = parse_arguments(sys.argv[1:])
    if options.measure:
        print(json.dumps(measure(Nanoqwen, Job(**json.loads(options.measure)))))
        return
    choose_rows(options.rows, cuda=True)  # a mistake is said before the first measurement
    options.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as worker:
        model, name = find_model(options.model, worker)
        facts = worker.submit(model_facts, str(model)).result()
        options.threads = options.threads or facts.pop("threads")
        console.notice("measuring the machine")
        found = worker.submit(machine, options.threads).result()
        rows, absent = choose_rows(options.rows, cuda=bool(found["gpu"]))
        settings, results = run_all(model, rows, options, facts, worker)
    report = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join(["python", "bench.py", *sys.argv[1:]]),
        "machine": found,
        "versions": versions(),
        "model": {"name": name, **facts},
        "settings": settings,
        "rows": results,
        "ratios": ratios(results),
        "absent": absent,
    }
    for result in results:
        if result["failed"]:
            absent.setdefault("Failed", []).append(f"{title(result)} ({result['failed']})")
    write_text(options.out / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(options.out / "report.md", markdown(report))
    draw(report, options.out / "roofline.png")
    show(report)
    console.notice(f"written: report.json, report.md and roofline.png in {options.out}")


if __name__ == "__main__":
    console.run(main)
