"""How fast this machine runs Qwen3, and how fast it could: `python bench.py`.

    the machine's limits -> rows, alternated A B C A B C -> report.json -> report.md and roofline.png

A row is an engine with a precision: this project's, and the peers that are installed (transformers; llama.cpp, found
through NANOQWEN_LLAMA_CPP or PATH). Each run of a row is a fresh process, so that load time and peak memory are its
own. Before and after each run the read bandwidth is measured: a machine drifts, and a token at batch 1 costs one read
of every weight. This process itself stays small (no torch), because a child's peak memory counts from its parent's.
"""

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import console
from benchmarks.common import (
    PEERS,
    ROOT,
    cache_directory,
    describe_machine,
    header,
    llama_program,
    run_script,
    start_worker,
)
from benchmarks.report import BATCHES, batch_shares, draw, markdown, number, ratios, show, summary, tables, title
from formats.files import atomic_directory, sha256, write_text
from formats.source import BUNDLED_MODEL, DEFAULT_MODEL, HubUnreachable, resolve

SHAPE = ROOT / "configs" / "qwen3-0.6b.json"  # of the random weights used where the real ones are not cached
SCRIPTS = {
    "nanoqwen": (ROOT / "bench.py", "speed"),
    "transformers": (PEERS / "transformers_row.py",),
    "llama.cpp": (PEERS / "llama_row.py",),
}
QUESTION = [{"role": "user", "content": "Which is larger, 9.11 or 9.9?"}]
SHORT = 32
BYTES = {"f32": 4, "bf16": 2}
ISA = {  # what a child process is told, for PyTorch and its libraries too
    "avx2": {"NANOQWEN_STEP": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx-vnni": {"NANOQWEN_STEP": "avx-vnni", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"},
}


class Row(NamedTuple):
    engine: str
    precision: str
    device: str = "cpu"

    def __str__(self) -> str:
        return "/".join(self[: 2 if self.device == "cpu" else 3])


ROWS = [Row("nanoqwen", precision) for precision in ("f32", "bf16", "int8", "int8-32", "int4")]
GGUF_ROWS = ("q8_0", "q4_0", "q4_k_m")  # also this project's: the very file that llama.cpp runs
ROWS += [Row("nanoqwen", precision) for precision in GGUF_ROWS]
ROWS += [Row("transformers", precision) for precision in ("f32", "bf16")]
ROWS += [Row("llama.cpp", precision) for precision in ("f32", "bf16", "q8_0", "q4_0", "q4_k_m")]
ROWS += [Row("nanoqwen", precision, "cuda") for precision in ("bf16", "int8", "int4")]
ROWS += [Row("transformers", "bf16", "cuda"), Row("llama.cpp", "bf16", "cuda")]


@dataclass
class Job:
    """What one run measures: given to a child process as JSON."""

    threads: int
    prefill: int  # tokens
    tokens: int  # decoded in each measurement
    deep: int = 0  # positions before the deep decode, 0 for none
    kv: str = "auto"  # int8: keys and values in 8 bits
    batches: list[int] = field(default_factory=list)
    isa: str = "native"
    model: str = ""
    precision: str = ""
    device: str = "cpu"


# ---------------------------------------------------------------------------------------------------------------------
# In the child: the same measurements for every engine that is Python.


class Nanoqwen:
    """This project's model, called as generate.py calls it. Another engine has the same methods."""

    def __init__(self, job: Job):
        from chat import Chat
        from inference.params import SamplingParams
        from ops.memory import release_unused_memory

        self.job, self.greedy, self.cache, self.fast = job, SamplingParams(temperature=0), None, None
        self.chat = Chat.from_pretrained(job.model)  # kept, as a user's is: its memory counts
        self.prompt = self.chat.render(QUESTION)
        release_unused_memory()

    def load(self) -> None:
        import torch

        from formats.checkpoint import open_checkpoint
        from model import load
        from ops.devices import use_kernels
        from ops.memory import release_unused_memory

        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}.get(self.job.precision)  # else as it was converted
        self.model = load(open_checkpoint(Path(self.job.model)), self.job.device, dtype)
        use_kernels(self.model, "auto", "bench.py")
        if self.job.kv == "int8":
            self.model.cache_dtype = torch.int8
        release_unused_memory()

    def new_cache(self, rows: int, positions: int) -> Any:
        from generate import new_cache

        self.cache = self.fast = None  # never two conversations in memory, as in the commands
        return new_cache(self.model, positions, rows)

    def next(self, ids: list[list[int]], cache: Any) -> list[list[int]]:
        """Appends ids (a list for each row) to the cache; the likeliest next token of each row."""
        import torch

        from inference.decode import forward
        from inference.sampling import sample
        from ops.cpu.step import running

        if len(ids) > 1:
            logits = self.model(torch.tensor(ids, device=self.job.device), cache, last=True)[:, -1]
        else:
            if cache is not self.cache:
                self.cache, self.fast = cache, running(self.model, cache)
            logits = forward(self.model, ids[0], cache, fast=self.fast)
        return [[sample(row, self.greedy, None)] for row in logits]

    def settle(self) -> None:
        """What a long reply has behind it: its first some hundred tokens move the weights into huge pages."""
        from ops.cpu.step import settle

        settle(self.model)

    def sizes(self) -> dict[str, int]:
        from generate import weight_bytes_per_token

        return {"bytes_per_token": weight_bytes_per_token(self.model)}


def measure(engine_class: type, job: Job) -> dict[str, float]:
    """One run of a row. Speeds are tokens per second. (`bench.py start` measures the first token.)"""
    import torch

    torch.set_num_threads(job.threads)
    engine = engine_class(job)
    start = time.perf_counter()
    engine.load()
    run = {"load": time.perf_counter() - start}
    with torch.inference_mode():
        engine.next([engine.prompt], engine.new_cache(1, len(engine.prompt) + 1))
        _prefill(engine, job.prefill)  # warms up
        run["prefill"] = job.prefill / _prefill(engine, job.prefill)
        engine.settle()
        run["decode"] = _decode(engine, 1, SHORT, job.tokens)
        run["peak_bytes"] = console.peak_bytes()
        run |= {f"decode_batch_{rows}": _decode(engine, rows, SHORT, job.tokens) for rows in job.batches}
        if job.deep:
            run["decode_deep"] = _decode(engine, 1, job.deep, job.tokens)
    return run | engine.sizes()


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


def bandwidth_now(device: str, threads: int) -> float:
    import torch

    from ops.limits import read_bandwidth

    torch.set_num_threads(threads)
    return read_bandwidth(device)


def model_facts(path: str) -> dict[str, Any]:
    """Sizes of a checkpoint. Also compiles the token step and reads the weights once, so that no run is the first."""
    import torch

    from formats.checkpoint import open_checkpoint
    from generate import weight_bytes_per_token
    from model import Config, Qwen3
    from ops.cpu.library import library

    checkpoint = open_checkpoint(Path(path))
    config = Config.from_dict(checkpoint.config)
    with torch.device("meta"):
        model = Qwen3(config)
    library()
    for file in checkpoint.files:
        sha256(file)
    total = sum(parameter.numel() for parameter in model.parameters())
    # Those of a token: without the other rows of an untied embedding and without the idle experts.
    embedding = model.model.embed_tokens.weight
    found = {"parameters": total, "active_parameters": weight_bytes_per_token(model) // embedding.element_size()}
    found |= {"head_parameters": embedding.numel(), "context": config.context_length}
    return found | {"threads": torch.get_num_threads()}


def write_random_model(path: str) -> None:
    """The official 0.6B shape with random weights: as fast as the real ones. Norm weights vary around one."""
    import torch

    from model import Config, Qwen3

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # never all of them in float32 at once
    model = Qwen3(Config.from_json(SHAPE))
    torch.set_default_dtype(torch.float32)
    with torch.no_grad(), atomic_directory(path) as temporary:
        size, free = sum(weight.nbytes for weight in model.parameters()), shutil.disk_usage(temporary).free
        if free < 2 * size:
            raise ValueError(f"{path}: {free / 1e9:.1f} GB are free, {2 * size / 1e9:.1f} GB needed; give --model")
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.normal_(1.0, 0.1)
        model.save_pretrained(temporary)
        for name in ("tokenizer.json", "tokenizer_config.json"):  # its ids are few, but its text is read all the same
            shutil.copy(BUNDLED_MODEL / name, temporary)


# ---------------------------------------------------------------------------------------------------------------------
# Rows in fresh processes.


def convert(model: Path, row: Row, directory: Path) -> Path:
    """The checkpoint that a row runs on: the model itself, or what convert.py made of it in `directory`, or makes."""
    gguf = row.engine == "llama.cpp" or row.precision in GGUF_ROWS
    if not gguf and row.precision in BYTES:
        return model
    path = directory / (f"{row.precision}.gguf" if gguf else row.precision)
    if not path.exists():
        console.notice(f"converting the model to {path.name}")
        scheme, *group = row.precision.split("-")  # int8-32: in groups of 32, as llama.cpp's q8_0
        flags = ["--to", "gguf", "--type", row.precision] if gguf else ["--to", scheme]
        flags += ["--group-size", *group] if group else []
        run_script(ROOT / "convert.py", *flags, "--model", str(model), "--out", str(path))
    return path


def kept_directory(model: Path, directory: Path) -> Path:
    """Where in `directory` the converted forms of a model are kept: another place for other files."""
    files = sorted(model.iterdir()) if model.is_dir() else [model]
    states = [(str(file.resolve()), (state := file.stat()).st_size, state.st_mtime_ns) for file in files]
    path = directory / hashlib.sha256(repr(states).encode()).hexdigest()[:16]
    path.mkdir(parents=True, exist_ok=True)
    return path


def run_row(row: Row, model: Path, job: Job, facts: dict, worker: ProcessPoolExecutor) -> dict[str, float]:
    """One run of a row, and the better read bandwidth of before and after. `facts`: of `model_facts`."""
    job = replace(job, model=str(model.resolve()), precision=row.precision, device=row.device)
    before = worker.submit(bandwidth_now, row.device, job.threads).result()
    output = run_script(*SCRIPTS[row.engine], "--measure", json.dumps(asdict(job)), **ISA.get(job.isa, {}))
    run = json.loads(output.splitlines()[-1])
    weights, head = facts["active_parameters"], facts["head_parameters"]
    if "bytes_per_token" not in run:  # a peer reads the same weights in a type of its own
        run["bytes_per_token"] = weights * run.pop("bytes_per_weight", BYTES.get(row.precision))
    run["read_bandwidth"] = max(before, worker.submit(bandwidth_now, row.device, job.threads).result())
    run["weight_bandwidth"] = run["decode"] * run["bytes_per_token"]
    run["share"] = run["weight_bandwidth"] / run["read_bandwidth"]
    return run | batch_shares(run, weights / (weights - head + head / job.prefill))


def run_all(
    model: Path, rows: list[Row], job: Job, repeats: int, facts: dict, worker: Any, converted: Path | None
) -> list[dict]:
    """All rows, one round after another. A row that failed is not tried again."""
    results = [{**row._asdict(), "runs": [], "failed": None} for row in rows]
    with tempfile.TemporaryDirectory(dir=cache_directory(), prefix="converted-") as temporary:
        directory = kept_directory(model, converted) if converted else Path(temporary)
        for index in range(repeats * len(rows)):
            row, result = rows[index % len(rows)], results[index % len(rows)]
            if result["failed"]:
                continue
            try:
                run = run_row(row, convert(model, row, directory), job, facts, worker)
                result["runs"].append(run)
                said = f"prefill {number(run['prefill'])}, decode {number(run['decode'])} tokens/s"
                said += f", {run['share']:.0%} of the bandwidth"
            except (ValueError, OSError) as error:
                result["failed"] = said = str(error)
            console.notice(f"[{index + 1}/{repeats * len(rows)}] {row}: {said}")
    return [{**result, "summary": summary(result["runs"])} for result in results]


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def parse_arguments(arguments: list[str]) -> Any:
    parser = console.ArgumentParser(prog="bench.py speed", description="Measure this machine and this model on it.")
    add = parser.add_argument
    add("--model", metavar="SRC", help=f"directory, hub id or .gguf file (default: {DEFAULT_MODEL} or its shape)")
    add("--rows", nargs="+", metavar="ROW", help="such as nanoqwen/bf16 or '*/bf16' (default: all that can run)")
    add("--repeats", type=int, default=3, metavar="N", help="rounds over all rows (default: 3)")
    add("--threads", type=int, metavar="N", help="default: PyTorch's choice, one for each core")
    add("--deep", type=int, nargs="?", const=4096, metavar="N", help="also decode behind N positions (4096; slow)")
    add("--kv", choices=("auto", "int8"), default="auto", help="keys and values in 8 bits; llama.cpp's as q8_0")
    batches = ", ".join(map(str, BATCHES))
    add(
        "--batch",
        type=int,
        nargs="*",
        choices=BATCHES,
        metavar="N",
        help=f"also decode N sequences at once ({batches})",
    )
    add("--isa", choices=("native", *ISA), default="native", help="instruction set; llama.cpp has to be built for it")
    add(
        "--converted",
        type=Path,
        metavar="DIR",
        help="where converted models are kept for later runs (default: nowhere)",
    )
    add("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="where the report goes (runs/bench)")
    add("--measure", metavar="JSON", help=argparse.SUPPRESS)  # one run of a row, in a child process
    options = parser.parse_args(arguments)
    options.batch = options.batch if options.batch is None or options.batch else list(BATCHES)
    ranges = (("--repeats", 1000), ("--threads", os.cpu_count()), ("--deep", 1 << 20))
    for name, value, most in ((name, getattr(options, name[2:]), most) for name, most in ranges):
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


def find_model(src: str | None, worker: ProcessPoolExecutor) -> tuple[Path, str]:
    """Path and name of SRC; without one Qwen3-0.6B where it is cached, else random weights of its shape, kept."""
    if src is not None:
        return resolve(src), Path(src).name
    os.environ["HF_HUB_OFFLINE"] = "1"  # no download: random weights are as fast
    try:
        return resolve(DEFAULT_MODEL), DEFAULT_MODEL
    except HubUnreachable:
        path = cache_directory() / f"{SHAPE.stem}-random"
        if not path.exists():
            console.notice(f"{DEFAULT_MODEL} is not cached: writing random weights of its shape to {path}")
            worker.submit(write_random_model, str(path)).result()
        return path, f"{SHAPE.stem} (random weights)"


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    if options.measure:
        print(json.dumps(measure(Nanoqwen, Job(**json.loads(options.measure)))))
        return
    choose_rows(options.rows, cuda=True)  # a mistake is said before the first measurement
    options.out.mkdir(parents=True, exist_ok=True)
    with start_worker() as worker:
        model, name = find_model(options.model, worker)
        facts = worker.submit(model_facts, str(model)).result()
        room, threads = facts["context"] // 2, facts.pop("threads")
        job = Job(threads=options.threads or threads, prefill=min(512, room), tokens=min(32, max(1, room // 4)))
        job.deep, job.batches = min(options.deep or 0, room), options.batch or []
        job.kv, job.isa = options.kv, options.isa
        console.notice("measuring the machine")
        machine = worker.submit(describe_machine, job.threads).result()
        rows, absent = choose_rows(options.rows, cuda=bool(machine["gpu"]))
        results = run_all(model, rows, job, options.repeats, facts, worker, options.converted)
    report = header(machine, "speed", arguments) | {
        "model": {"name": name, **facts},
        "settings": {"repeats": options.repeats, "after": SHORT, **asdict(job)},
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
    show(tables(report))
    console.notice(f"written: report.json, report.md and roofline.png in {options.out}")
