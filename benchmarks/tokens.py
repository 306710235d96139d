"""From how few tokens train.py learns, beside AdamW in the usual loop:

    python bench.py tokens --corpus TEXT... --tokenizer SRC

The texts are tokenised, the last tenth of each for validation. The peer (benchmarks/peers/train_transformers.py) trains
transformers' Qwen3 with a tuned AdamW; the loss that all of its seeds reach at the end is the mark, and a run's figure
is how many tokens it had seen when its validation loss first was as low. Same model, rows, batch and validation rows;
weights and order of the rows by seed. `--tune` first tries the grids below on other seeds and takes the best of each.

Every run leaves a record in OUT/runs, named after its settings, and is not done again: a command that was interrupted
goes on with what is missing. Runs have one thread each; --jobs of them go on at once.
"""

import hashlib
import itertools
import json
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

import console
from benchmarks.report import number
from benchmarks.speed import ROOT, describe_machine, run_script
from benchmarks.train import DTYPES, SCRIPTS, finish, header
from data.shard_format import Shard, write_shard
from data.texts import load_tokenizer, vocabulary_of
from formats.files import write_text

BATCH, SEQUENCE, STEPS = 16, 128, 128  # of the peer
VALIDATE_EVERY, VALIDATION_ROWS = 4, 32
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
TUNING_SEED = 1000


@dataclass
class Lesson:
    """One run of the peer: given to a child process as JSON."""

    config: str  # of train.py: the model and the rows
    seed: int
    steps: int
    lr: float
    betas: list[float]
    weight_decay: float
    warmup: float = 0.05
    precision: str = "bf16"


PEER = {"lr": 0.004, "betas": [0.9, 0.99], "weight_decay": 0.1}
PEER_GRID = {"lr": [0.002, 0.004, 0.008], "betas": [[0.9, 0.95], [0.9, 0.99]]}
OURS = {"train.steps": 80, "optimizer.lr": 0.01, "optimizer.embedding_lr": 0.02}
OURS_GRID = {"optimizer.lr": [0.01, 0.02], "optimizer.embedding_lr": [0.01, 0.02]}

Curve = list[tuple[int, float]]  # tokens seen, validation loss


# --- the texts ---


def prepare(corpus: list[Path], tokenizer: Path, out: Path) -> Path:
    """Shards of the texts, one of validation rows spread evenly over the last tenths, and the config of train.py."""
    vocabulary = vocabulary_of(load_tokenizer(tokenizer))
    tokenizer = tokenizer if tokenizer.is_dir() else tokenizer.parent
    name = hashlib.sha256("\0".join(str(path.resolve()) for path in [tokenizer, *corpus]).encode()).hexdigest()[:12]
    folder = out / f"texts-{name}"
    for index, path in enumerate(corpus):
        if not (folder / str(index)).exists():
            flags = ["--tokenizer", str(tokenizer), "--validation", "0.1", "--processes", "1"]
            run_script(ROOT / "data" / "shards.py", "tokenize", str(path), *flags, "--out", str(folder / str(index)))
    if not (folder / "validation.bin").exists():
        held_out = [Shard(path) for path in sorted(folder.glob("*/val_*.bin"))]
        rows = [
            shard.read(start, SEQUENCE, vocabulary)
            for shard in held_out
            for start in range(0, len(shard) - SEQUENCE, SEQUENCE)
        ]
        if len(rows) <= VALIDATION_ROWS:
            raise ValueError(f"--corpus: a tenth of it has {len(rows)} rows of {SEQUENCE} tokens; give more text")
        chosen = [rows[i * len(rows) // (VALIDATION_ROWS + 1)] for i in range(VALIDATION_ROWS + 1)]
        write_shard(folder / "validation.bin", list(itertools.chain.from_iterable(chosen)), vocabulary)
    train = {"out": "unused", "steps": STEPS, "save_every": STEPS, "threads": 1, "device": "cpu"}
    train |= {"dtype": DTYPES["bf16"], "batch": BATCH, "sequence": SEQUENCE, "validate_every": VALIDATE_EVERY}
    config = {
        "stage": "pretrain",
        "train": {**train, "validate_batches": VALIDATION_ROWS // BATCH},
        "model": {"config": {"vocab_size": vocabulary, **SIZES}, "tokenizer": str(tokenizer)},
        "data": {
            "source": "shards",
            "train": str(folder / "*" / "train_*.bin"),
            "validation": str(folder / "validation.bin"),
        },
        "optimizer": {"lr": 0.01},
    }
    write_text(folder / "config.yaml", yaml.safe_dump(config))
    return folder / "config.yaml"


# --- one run ---


def ours(config: Path, seed: int, settings: dict[str, Any], out: Path) -> Curve:
    """A whole run of train.py; one that was interrupted goes on."""
    overrides = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    run_script(
        ROOT / "train.py", str(config), "--resume", "--set", f"train.seed={seed}", f"train.out={out}", *overrides
    )
    records = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    curve = [(record["tokens"], record["validation_loss"]) for record in records if "validation_loss" in record]
    shutil.rmtree(out)
    return curve


def peers(config: Path, seed: int, settings: dict[str, Any], out: Path) -> Curve:
    """A whole run of the peer, from the beginning."""
    lesson = Lesson(str(config), seed, STEPS, **settings)
    return json.loads(run_script(*SCRIPTS["transformers"], "--learn", json.dumps(asdict(lesson))).splitlines()[-1])


def recorded(run: Callable, config: Path, seed: int, settings: dict[str, Any], out: Path) -> Curve:
    """The curve of a run that is on record, else of one that is done now."""
    key = json.dumps([run.__name__, seed, settings, config.read_text(encoding="utf-8")], sort_keys=True)
    path = out / "runs" / f"{run.__name__}-{seed}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    record = path.with_suffix(".json")
    if not record.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        curve = run(config, seed, settings, path)
        write_text(record, json.dumps({"seed": seed, "settings": settings, "curve": curve}) + "\n")
    curve = json.loads(record.read_text(encoding="utf-8"))["curve"]
    console.notice(f"{run.__name__} {settings}, seed {seed}: {curve[-1][1]:.4f} after {curve[-1][0]:,} tokens")
    return curve


# --- what they say ---


def reached(curve: Curve, mark: float) -> int | None:
    """Tokens seen when the validation loss first was as low as `mark`."""
    return next((tokens for tokens, loss in curve if loss <= mark), None)


def combinations(grid: dict[str, list]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def tuned(run: Callable, start: dict, grid: dict, config: Path, out: Path, pool: ThreadPoolExecutor) -> dict[str, Any]:
    """The settings of a grid with the lowest loss at the end, on a seed that is not compared."""
    tried = [start | chosen for chosen in combinations(grid)]
    curves = pool.map(lambda settings: recorded(run, config, TUNING_SEED, settings, out), tried)
    loss, _, best = min((curve[-1][1], index, tried[index]) for index, curve in enumerate(curves))
    console.notice(f"the best of {len(tried)} for {run.__name__}: {best}, {loss:.4f}")
    return best


def main(arguments: list[str]) -> None:
    parser = console.ArgumentParser(prog="bench.py tokens", description="Tokens to a validation loss, beside AdamW.")
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, metavar="TEXT", help="text files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json or its folder")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each side (default: 3)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at once, a thread each (default: 2)")
    parser.add_argument("--tune", action="store_true", help="try the grids of both sides first (long)")
    parser.add_argument("--mark", type=float, metavar="LOSS", help="default: what all seeds of the peer reach")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-train"), metavar="DIR", help="for report and runs")
    options = parser.parse_args(arguments)
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: give at least 1")
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(1, get_context("spawn")) as worker:
        machine = worker.submit(describe_machine, 1).result()
    config, sides = prepare(options.corpus, options.tokenizer, options.out), {ours: OURS, peers: PEER}
    with ThreadPoolExecutor(options.jobs) as pool:
        if options.tune:
            grids = {ours: OURS_GRID, peers: PEER_GRID}
            sides = {run: tuned(run, start, grids[run], config, options.out, pool) for run, start in sides.items()}
        under_way = {
            run: [pool.submit(recorded, run, config, seed, settings, options.out) for seed in range(options.seeds)]
            for run, settings in sides.items()
        }
        curves = {run.__name__: [future.result() for future in futures] for run, futures in under_way.items()}
    mark = options.mark or max(curve[-1][1] for curve in curves["peers"])
    settings = {run.__name__: settings for run, settings in sides.items()}
    report = header(machine) | {"mark": mark, "settings": settings, "curves": curves}
    report["tokens"] = {name: [reached(curve, mark) for curve in found] for name, found in curves.items()}
    finish(report, options.out / "tokens", "Tokens to a validation loss", tables(report), notes_of(report))


def tables(report: dict[str, Any]) -> dict[str, list[list[str]]]:
    lines = [["", "tokens to the mark", "mean", "spread", "loss at the end"]]
    for name, tokens in report["tokens"].items():
        ends = [curve[-1][1] for curve in report["curves"][name]]
        cells = [", ".join("never" if count is None else f"{count:,}" for count in tokens), "", ""]
        if None not in tokens:
            cells[1:] = f"{statistics.mean(tokens):,.0f}", f"{min(tokens):,} to {max(tokens):,}"
        title = {"ours": "nanoqwen", "peers": "transformers, AdamW"}[name]
        lines.append([title, *cells, f"{statistics.mean(ends):.4f} ({min(ends):.4f} to {max(ends):.4f})"])
    return {"Tokens": lines}


def notes_of(report: dict[str, Any]) -> list[str]:
    ours, peers = report["tokens"]["ours"], report["tokens"]["peers"]
    notes = [f"The mark is a validation loss of {report['mark']:.4f} nats per token."]
    if None not in ours + peers:
        notes.append(f"Ours / theirs: {number(statistics.mean(ours) / statistics.mean(peers))} of the tokens.")
    notes += [f"Settings of {name}: {json.dumps(settings)}." for name, settings in report["settings"].items()]
    return [*notes, f"{BATCH} x {SEQUENCE} tokens a step; the model: {json.dumps(SIZES)}."]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console.run(main)
