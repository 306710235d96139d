"""How fast train.py trains beside the usual loops, and how much memory it takes: `python bench.py train`.

    the machine's limits -> rows, alternated A B C A B C -> speed.json and speed.md

A row is a shape with an engine and a precision. Every run is a fresh process, on the same rows of the same shard, from
the same weights where the model is the same: then the losses have to agree as well. Peers are scripts under
benchmarks/peers (transformers' Qwen3, nanoGPT's model), so that the product never imports transformers.
benchmarks/tokens.py measures from how few tokens a model learns.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import console
from benchmarks.common import (
    PEERS,
    ROOT,
    cache_directory,
    describe_machine,
    finish,
    header,
    run_script,
    start_worker,
)
from benchmarks.report import summary, table
from formats.files import write_text
from formats.source import BUNDLED_MODEL

SCRIPTS = {
    "nanoqwen": (ROOT / "bench.py", "train"),
    "transformers": (PEERS / "train_transformers.py",),
    "nanogpt": (PEERS / "train_nanogpt.py",),
}
DTYPES = {"f32": "float32", "bf16": "bfloat16"}
# nanoGPT's model of a shape has the same width, layers, heads and vocabulary, and an MLP of four times the width.
NARROW = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
GPT2_SMALL = NARROW | {  # that of configs/qwen3-124m.yaml
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
}
WARM_UP = 2  # steps that are not counted
AGREEMENT = 20  # steps whose losses are compared


class Shape(NamedTuple):
    vocabulary: int
    batch: int
    sequence: int
    sizes: dict[str, Any]  # of config.json


# The first two take a minute, but most of their work is the head's; the third has a size that people train.
SHAPES = {
    "qwen3": Shape(151_936, 4, 512, NARROW),
    "gpt2": Shape(50_304, 8, 256, NARROW),
    "124m": Shape(50_304, 4, 512, GPT2_SMALL),
}


class Row(NamedTuple):
    shape: str
    engine: str
    precision: str

    def __str__(self) -> str:
        return "/".join(self)


ROWS = [Row(s, e, p) for s in SHAPES for e in SCRIPTS for p in DTYPES if (s, e) != ("qwen3", "nanogpt")]


@dataclass
class Job:
    """What one run of a row measures: given to a child process as JSON."""

    config: str  # of train.py
    precision: str
    threads: int
    steps: int
    tokens: int  # in a step
    compile: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# In the child: the same measurement for every engine. An engine is called with the Job and has step(number) -> loss.


class Nanoqwen:
    """train.py's own steps."""

    def __init__(self, job: Job):
        from train import Trainer
        from training import schema

        out = Path(job.config).with_suffix(f".{os.getpid()}")
        changes = {"dtype": DTYPES[job.precision], "out": out, "compile": str(job.compile).lower()}
        settings = schema.load(job.config, [f"train.{name}={value}" for name, value in changes.items()])
        self.trainer = Trainer(settings, resume=False)

    def step(self, number: int) -> float:
        return self.trainer.step(number)["loss"]


class PeerRows:
    """The rows that train.py would have for a config, for the peers: LongTensors ids, targets [B, T]."""

    def __init__(self, config: str, seed: int | None = None):
        from data.sources import Shards
        from training import schema

        self.settings = schema.load(config)
        train, data = self.settings.train, self.settings.data
        seed = train.seed if seed is None else seed
        self.source = Shards(data.train, data.validation, seed, train.batch, train.sequence, 1 << 32)

    def training(self, number: int) -> tuple:
        """Those of step `number`; the first is 1."""
        return self._tensors(self.source.rows(number - 1))

    def validation(self) -> list[tuple]:
        return [self._tensors(self.source.validation_rows(i)) for i in range(self.settings.train.validate_batches)]

    def _tensors(self, rows: list) -> tuple:
        import numpy as np
        import torch

        return tuple(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))


def measure(engine: Any, job: Job) -> dict[str, Any]:
    import torch

    torch.set_num_threads(job.threads)
    trained, losses, seconds = engine(job), [], []
    for number in range(1, job.steps + 1):
        start = time.perf_counter()
        losses.append(trained.step(number))
        seconds.append(time.perf_counter() - start)
    speed = job.tokens / statistics.median(seconds[WARM_UP:])
    peak = console.peak_bytes()
    return {"tokens_per_second": speed, "peak_bytes": peak, "losses": losses}


# ---------------------------------------------------------------------------------------------------------------------
# In a worker process that has torch and stays.


def prepare(folder: str, shape: Shape, threads: int) -> dict[str, Any]:
    """Writes random weights, a shard of random tokens and the config of a shape; facts about it."""
    import numpy as np
    import torch

    from chat import Chat
    from data.shard_format import write_shard
    from model import Config, Qwen3
    from training.reporting import flops_per_token

    path = Path(folder)
    torch.manual_seed(0)
    model = Qwen3(Config(vocab_size=shape.vocabulary, **shape.sizes))
    model.save_pretrained(path / "initial")
    vocabulary = Chat.from_pretrained(str(BUNDLED_MODEL)).tokenizer.get_vocab_size()
    tokens = shape.batch * shape.sequence
    # Some tokens far more often than others, as in a text: there is something to learn.
    ids = (np.random.default_rng(0).random(AGREEMENT * tokens + 1) ** 4 * vocabulary).astype(np.int64)
    write_shard(path / "train.bin", ids, vocabulary)
    train = {"out": "unused", "steps": AGREEMENT, "save_every": AGREEMENT, "threads": threads, "device": "cpu"}
    config = {
        "stage": "pretrain",
        "train": {**train, "batch": shape.batch, "sequence": shape.sequence},
        "model": {"init": str(path / "initial"), "tokenizer": str(BUNDLED_MODEL)},
        "data": {"source": "shards", "train": str(path / "train.bin")},
        "optimizer": {"name": "adamw", "lr": 0.001},
        "schedule": {"warmup": 0, "decay": 0},
    }
    write_text(path / "config.yaml", yaml.safe_dump(config))
    weights, attention = flops_per_token(model)
    return {
        "sizes": shape.sizes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "operations_per_token": weights + attention * shape.sequence / 2,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The speed.


def run_all(rows: list[Row], options: Any, threads: int, facts: dict, rates: dict, folder: Path) -> list[dict]:
    """All rows, one round after another; the first round is long enough to compare losses in float32."""
    results = [{**row._asdict(), "runs": [], "losses": [], "failed": None} for row in rows]
    for index in range(options.repeats * len(rows)):
        row, result = rows[index % len(rows)], results[index % len(rows)]
        if result["failed"]:
            continue
        shape = SHAPES[row.shape]
        compared = index < len(rows) and row.precision == "f32" and row.shape == "gpt2"
        count = max(options.steps, AGREEMENT if compared else 0)
        config = str(folder / row.shape / "config.yaml")
        job = Job(config, row.precision, threads, count, shape.batch * shape.sequence, options.compile)
        try:
            printed = run_script(*SCRIPTS[row.engine], "--measure", json.dumps(asdict(job)))
            run = json.loads(printed.splitlines()[-1])
            result["losses"] = max(result["losses"], run.pop("losses"), key=len)
            if row.engine != "nanogpt":  # whose operations are others
                operations = run["tokens_per_second"] * facts[row.shape]["operations_per_token"]
                run["share"] = operations / rates[row.precision]
            result["runs"].append(run)
            said = f"{run['tokens_per_second']:,.0f} tokens/s, {run['peak_bytes'] / 1e6:,.0f} MB"
        except (ValueError, OSError) as error:
            result["failed"] = said = str(error)
        console.notice(f"[{index + 1}/{options.repeats * len(rows)}] {row}: {said}")
    return [{**result, "summary": summary(result["runs"])} for result in results]


def pairs(results: list[dict]) -> list[tuple[dict, dict]]:
    """Each row of ours with each peer's of the same shape and precision."""
    ours = [row for row in results if row["engine"] == "nanoqwen"]
    peers = [row for row in results if row["engine"] != "nanoqwen"]
    alike = ("shape", "precision")
    return [(a, b) for a in ours for b in peers if all(a[name] == b[name] for name in alike)]


def ratios(results: list[dict]) -> list[dict]:
    """Ours as multiples of the peers' in the same round."""
    found = []
    for ours, peer in pairs(results):
        rounds = [
            {name: a[name] / b[name] for name in ("tokens_per_second", "peak_bytes")}
            for a, b in zip(ours["runs"], peer["runs"], strict=False)
        ]
        if rounds:
            about = {"shape": ours["shape"], "precision": ours["precision"], "peer": peer["engine"]}
            found.append({**about, "summary": summary(rounds)})
    return found


def agreement(results: list[dict]) -> list[dict]:
    """How far the losses of our float32 steps are from those of transformers, from the same weights and rows."""
    return [
        {
            "shape": ours["shape"],
            "steps": min(len(ours["losses"]), len(peer["losses"])),
            "largest_difference": max(abs(a - b) for a, b in zip(ours["losses"], peer["losses"], strict=False)),
        }
        for ours, peer in pairs(results)
        if peer["engine"] == "transformers" and ours["precision"] == "f32" and ours["losses"] and peer["losses"]
    ]


def tables(report: dict[str, Any]) -> dict[str, list[list[str]]]:
    headings = {"tokens_per_second": "tokens/s", "share": "% of the matrix rate", "peak_bytes": "peak MB"}
    rows = [(f"{row['engine']} {row['precision']}, {row['shape']}", row["summary"]) for row in report["rows"]]
    found = {"Speed": table([row for row in rows if row[1]], headings, {})}
    if report["ratios"]:
        # report.py shows peak_bytes in MB; a quotient of two of them is a plain number
        compared = [
            (
                f"{ratio['precision']}, {ratio['shape']}: nanoqwen / {ratio['peer']}",
                {"speed": ratio["summary"]["tokens_per_second"], "peak": ratio["summary"]["peak_bytes"]},
            )
            for ratio in report["ratios"]
        ]
        found["Ours / theirs"] = table(compared, {"speed": "tokens/s", "peak": "peak memory"}, {})
    return found


def notes_of(report: dict[str, Any]) -> list[str]:
    settings = report["settings"]
    notes = [
        f"{name}: a vocabulary of {SHAPES[name].vocabulary:,}, {SHAPES[name].batch} x {SHAPES[name].sequence} tokens a "
        f"step; {facts['parameters'] / 1e6:.1f} million parameters, {facts['operations_per_token'] / 1e6:,.0f} million "
        "operations a token."
        for name, facts in report["facts"].items()
    ]
    notes += [
        f"Median (minimum and maximum) of {settings['repeats']} alternated runs in processes of their own with "
        f"{settings['threads']} thread{'s' * (settings['threads'] > 1)}; a run's speed is that of its median step of "
        f"{settings['steps']}, the first {WARM_UP} not counted. AdamW (fused) in every row"
        f"{', and torch.compile' * settings['compile']}."
    ]
    notes += [
        f"Losses in float32, {found['shape']}: the first {found['steps']} steps of nanoqwen and transformers differ by "
        f"{found['largest_difference']:.1e} at most."
        for found in report["agreement"]
    ]
    notes += [
        f"Failed: {Row(*map(row.get, Row._fields))} ({row['failed']})." for row in report["rows"] if row["failed"]
    ]
    return notes + report["absent"]


def choose_rows(patterns: list[str] | None) -> tuple[list[Row], list[str]]:
    """The rows that are asked for and can run here, and why the others can't."""
    for pattern in patterns or ():
        if not any(fnmatch(str(row), pattern) for row in ROWS):
            raise ValueError(f"--rows {pattern}: no such row; there are {', '.join(map(str, ROWS))}")
    rows = [row for row in ROWS if patterns is None or any(fnmatch(str(row), pattern) for pattern in patterns)]
    if find_spec("transformers"):
        return rows, []
    absent = [str(row) for row in rows if row.engine != "nanoqwen"]
    return [row for row in rows if row.engine == "nanoqwen"], [f"Not installed: transformers ({', '.join(absent)})."]


def parse_arguments(arguments: list[str]) -> Any:
    parser = console.ArgumentParser(prog="bench.py train", description="Measure training on this machine.")
    add = parser.add_argument
    add("--rows", nargs="+", metavar="ROW", help="such as gpt2/nanogpt/bf16 or 'qwen3/*' (default: all that can run)")
    add("--repeats", type=int, default=3, metavar="N", help="rounds over all rows (default: 3)")
    add("--steps", type=int, default=8, metavar="N", help="optimizer steps of a run (default: 8)")
    add("--compile", action="store_true", help="torch.compile in every row, ours and theirs")
    add("--threads", type=int, metavar="N", help="default: one for each core")
    add("--out", type=Path, default=Path("runs/bench-train"), metavar="DIR", help="for the report (runs/bench-train)")
    add("--measure", metavar="JSON", help=argparse.SUPPRESS)  # one run of a row, in a child process
    options = parser.parse_args(arguments)
    limits = {"repeats": (1, 1000), "steps": (WARM_UP + 1, AGREEMENT), "threads": (1, os.cpu_count())}
    for name, (low, high) in limits.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} {value}: give a number from {low} to {high}")
    return options


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    if options.measure:
        print(json.dumps(measure(Nanoqwen, Job(**json.loads(options.measure)))))
        return
    rows, absent = choose_rows(options.rows)
    options.out.mkdir(parents=True, exist_ok=True)
    threads = options.threads or os.cpu_count()
    with (
        tempfile.TemporaryDirectory(dir=cache_directory(), prefix="bench-train-") as folder,
        start_worker() as worker,
    ):
        console.notice("measuring the machine")
        machine = worker.submit(describe_machine, threads).result()
        rates = [limit["matrix_rate"] for limit in machine["limits"].values() if limit["device"] == "cpu"][-1]
        shapes = {name: SHAPES[name] for name in dict.fromkeys(row.shape for row in rows)}
        facts = {n: worker.submit(prepare, f"{folder}/{n}", s, threads).result() for n, s in shapes.items()}
        results = run_all(rows, options, threads, facts, rates, Path(folder))
    names = ("repeats", "steps", "compile")
    settings = {"threads": threads} | {name: getattr(options, name) for name in names}
    report = header(machine, "train", arguments) | {
        "settings": settings,
        "facts": facts,
        "rows": results,
        "absent": absent,
    }
    report |= {"ratios": ratios(results), "agreement": agreement(results)}
    finish(report, options.out / "speed", "Speed of training", tables(report), notes_of(report))
