"""From how few tokens a model learns, by train.py and by the usual loop, with Muon and with AdamW:

    python bench.py tokens --corpus TEXT... --tokenizer SRC
    python bench.py tokens --small --tune ...            about 25 minutes on two cores

Four sides: this project's trainer and transformers' Qwen3 in a plain loop (benchmarks/peers/train_transformers.py),
each with both optimizers, so that the effects of the trainer and of Muon can be separated. All have the same
model, rows, batch, steps, validation rows and schedule; weights and order of the rows by seed. The texts are tokenised,
the last tenth of each for validation; the report names them by their SHA-256.

The loss that all seeds of transformers with AdamW reach at the end is the mark, and a run's figure is how many tokens
it had seen when its validation loss first was as low. `--tune` first tries the grids below on another seed and takes
the best of each.

Every run leaves a record in OUT/runs, named after its settings, and is not done again: a command that was interrupted
continues with what is missing. Runs have one thread each; --jobs of them run at once.
"""

import hashlib
import itertools
import json
import os
import shutil
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import console
from benchmarks.common import ROOT, describe_machine, finish, header, run_script, start_worker
from benchmarks.report import number
from benchmarks.train import DTYPES, SCRIPTS
from data.shard_format import Shard, write_shard
from data.texts import load_tokenizer, vocabulary_of
from formats.files import sha256, write_text

VALIDATE_EVERY = 4  # steps
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
SMALL = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}


class Form(NamedTuple):
    batch: int
    sequence: int
    steps: int
    validation_rows: int
    sizes: dict[str, Any]
    muon: dict[str, list]
    """What `--tune` tries."""
    adamw: dict[str, list]


LRS = [0.01, 0.02]
ADAMW = {"lr": [0.002, 0.004, 0.008], "betas": [[0.9, 0.95], [0.9, 0.99]]}
FORMS = {
    "full": Form(16, 128, 128, 32, SIZES, {"lr": LRS, "embedding_lr": LRS}, ADAMW),
    "small": Form(8, 128, 64, 16, SIZES | SMALL, {"lr": LRS}, ADAMW | {"betas": ADAMW["betas"][1:]}),
}
SCHEDULE = {"name": "wsd", "warmup": 0.05, "decay": 0.95, "final": 0.0}  # up, then down in a line to nothing
TUNING_SEED = 1000

Curve = list[tuple[int, float]]  # tokens seen, validation loss


@dataclass
class Lesson:
    """One run of the peer: given to a child process as JSON."""

    config: str  # of train.py: the model, the rows and the schedule
    seed: int
    optimizer: str  # adamw, or muon for the hidden matrices beside it
    lr: float
    embedding_lr: float
    betas: list[float]
    weight_decay: float
    precision: str = "bf16"


class Side(NamedTuple):
    run: Callable[[Path, int, dict, Path], Curve]
    settings: dict[str, Any]
    grid: dict[str, list]


# --- the texts ---


def prepare(corpus: list[Path], tokenizer: Path, out: Path, form: Form) -> Path:
    """Shards of the texts, one of validation rows spread evenly over the last tenths, and the config of train.py."""
    vocabulary = vocabulary_of(load_tokenizer(tokenizer))
    tokenizer = tokenizer if tokenizer.is_dir() else tokenizer.parent
    contents = "".join(sha256(path) for path in [tokenizer / "tokenizer.json", *corpus])
    name = hashlib.sha256(f"{contents}{form.sequence} {form.validation_rows}".encode()).hexdigest()[:12]
    folder = out / f"texts-{name}"
    for index, path in enumerate(corpus):
        if not (folder / str(index)).exists():
            flags = ["--tokenizer", str(tokenizer), "--validation", "0.1", "--processes", "1"]
            run_script(ROOT / "data" / "shards.py", "tokenize", str(path), *flags, "--out", str(folder / str(index)))
    if not (folder / "validation.bin").exists():
        held_out = [Shard(path) for path in sorted(folder.glob("*/val_*.bin"))]
        rows = [
            shard.read(start, form.sequence, vocabulary)
            for shard in held_out
            for start in range(0, len(shard) - form.sequence, form.sequence)
        ]
        if len(rows) <= form.validation_rows:
            raise ValueError(f"--corpus: a tenth of it has {len(rows)} rows of {form.sequence} tokens; give more text")
        number = form.validation_rows + 1
        chosen = [rows[i * len(rows) // number] for i in range(number)]
        write_shard(folder / "validation.bin", list(itertools.chain.from_iterable(chosen)), vocabulary)
    train = {"out": "unused", "steps": form.steps, "save_every": form.steps, "threads": 1, "device": "cpu"}
    train |= {"dtype": DTYPES["bf16"], "batch": form.batch, "sequence": form.sequence, "validate_every": VALIDATE_EVERY}
    config = {
        "stage": "pretrain",
        "train": {**train, "validate_batches": form.validation_rows // form.batch},
        "model": {"config": {"vocab_size": vocabulary, **form.sizes}, "tokenizer": str(tokenizer)},
        "data": {
            "source": "shards",
            "train": str(folder / "*" / "train_*.bin"),
            "validation": str(folder / "validation.bin"),
        },
        "optimizer": {"lr": 0.01},
        "schedule": SCHEDULE,
    }
    write_text(folder / "config.yaml", yaml.safe_dump(config))
    return folder / "config.yaml"


# --- one run ---


def ours(config: Path, seed: int, settings: dict[str, Any], out: Path) -> Curve:
    """A whole run of train.py; an interrupted one continues."""
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
    lesson = Lesson(str(config), seed, **settings)
    return json.loads(run_script(*SCRIPTS["transformers"], "--learn", json.dumps(asdict(lesson))).splitlines()[-1])


PEERS_ADAMW = {"optimizer": "adamw", "lr": 0.004, "embedding_lr": 0.004, "betas": [0.9, 0.99], "weight_decay": 0.1}
OURS_ADAMW = {"name": "adamw", "lr": 0.004, "embedding_lr": 0.004, "betas": [0.9, 0.99], "weight_decay": 0.1}


def of_optimizer(settings: dict[str, Any]) -> dict[str, Any]:
    return {f"optimizer.{name}": value for name, value in settings.items()}


def sides_of(form: Form) -> dict[str, Side]:
    muon = {"lr": 0.01, "embedding_lr": 0.02}
    return {
        "nanoqwen, Muon": Side(ours, of_optimizer(OURS_ADAMW | {"name": "muon"} | muon), of_optimizer(form.muon)),
        "nanoqwen, AdamW": Side(ours, of_optimizer(OURS_ADAMW), of_optimizer(form.adamw)),
        "transformers, Muon": Side(peers, PEERS_ADAMW | {"optimizer": "muon"} | muon, form.muon),
        "transformers, AdamW": Side(peers, PEERS_ADAMW, form.adamw),
    }


MARK = "transformers, AdamW"  # whose loss at the end is the mark


def recorded(name: str, side: Side, config: Path, seed: int, settings: dict[str, Any], out: Path) -> Curve:
    """The curve of a run that is on record, else of one that is done now."""
    key = json.dumps([name, seed, settings, config.read_text(encoding="utf-8")], sort_keys=True)
    slug = name.lower().replace(", ", "-")
    path = out / "runs" / f"{slug}-{seed}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    record = path.with_suffix(".json")
    if not record.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        curve = side.run(config, seed, settings, path)
        write_text(record, json.dumps({"seed": seed, "settings": settings, "curve": curve}) + "\n")
    curve = json.loads(record.read_text(encoding="utf-8"))["curve"]
    console.notice(f"{name} {settings}, seed {seed}: {curve[-1][1]:.4f} after {curve[-1][0]:,} tokens")
    return curve


# --- what they say ---


def reached(curve: Curve, mark: float) -> int | None:
    """Tokens seen when the validation loss first was as low as `mark`."""
    return next((tokens for tokens, loss in curve if loss <= mark), None)


def combinations(grid: dict[str, list]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def tuned(name: str, side: Side, config: Path, out: Path, pool: ThreadPoolExecutor) -> dict[str, Any]:
    """The settings of a side's grid with the lowest loss at the end, on a seed that is not compared.

    AdamW has one learning rate for all weights: what its grid says of the hidden matrices holds for the others too.
    """
    tried = [side.settings | shared(chosen) for chosen in combinations(side.grid)]
    curves = pool.map(lambda settings: recorded(name, side, config, TUNING_SEED, settings, out), tried)
    loss, _, best = min((curve[-1][1], index, tried[index]) for index, curve in enumerate(curves))
    console.notice(f"the best of {len(tried)} for {name}: {best}, {loss:.4f}")
    return best


def shared(chosen: dict[str, Any]) -> dict[str, Any]:
    """Settings with the learning rate of the embeddings, that of the matrices where it has none of its own."""
    prefix = "optimizer." if any(name.startswith("optimizer.") for name in chosen) else ""
    return {f"{prefix}embedding_lr": chosen[f"{prefix}lr"]} | chosen


def main(arguments: list[str]) -> None:
    parser = console.ArgumentParser(prog="bench.py tokens", description="Tokens to a validation loss, beside AdamW.")
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, metavar="TEXT", help="text files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json or its folder")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each side (default: 3)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at once, a thread each (default: 2)")
    small = "a smaller model on fewer tokens: about 25 minutes on two cores, with --tune"
    parser.add_argument("--small", action="store_true", help=small)
    parser.add_argument("--tune", action="store_true", help="try the grids of both sides first (long)")
    parser.add_argument("--mark", type=float, metavar="LOSS", help="default: what all seeds of the peer reach")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-train"), metavar="DIR", help="for report and runs")
    options = parser.parse_args(arguments)
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: give at least 1")
    for path in options.corpus:
        if not path.is_file():
            raise ValueError(f"--corpus {path}: no such file")
    os.environ["OMP_NUM_THREADS"] = "1"
    with start_worker() as worker:
        machine = worker.submit(describe_machine, 1).result()
    form, out = FORMS["small" if options.small else "full"], options.out
    config, sides = prepare(options.corpus, options.tokenizer, out, form), sides_of(form)
    settings = {name: side.settings for name, side in sides.items()}
    with ThreadPoolExecutor(options.jobs) as pool:
        if options.tune:
            settings = {name: tuned(name, side, config, out, pool) for name, side in sides.items()}
        under_way = {
            name: [
                pool.submit(recorded, name, side, config, seed, settings[name], out) for seed in range(options.seeds)
            ]
            for name, side in sides.items()
        }
        curves = {name: [future.result() for future in futures] for name, futures in under_way.items()}
    mark = options.mark or max(curve[-1][1] for curve in curves[MARK])
    report = header(machine, "tokens", arguments) | {"mark": mark, "settings": settings, "curves": curves}
    report["form"] = form._asdict()
    report["texts"] = {path.name: sha256(path) for path in options.corpus}
    report["tokens"] = {name: [reached(curve, mark) for curve in found] for name, found in curves.items()}
    finish(report, out / "tokens", "Tokens to a validation loss", tables(report), notes_of(report))


def tables(report: dict[str, Any]) -> dict[str, list[list[str]]]:
    lines = [["", "tokens to the mark", "mean", "spread", "loss at the end"]]
    for name, tokens in report["tokens"].items():
        ends = [curve[-1][1] for curve in report["curves"][name]]
        cells = [", ".join("never" if count is None else f"{count:,}" for count in tokens), "", ""]
        if None not in tokens:
            cells[1:] = f"{statistics.mean(tokens):,.0f}", f"{min(tokens):,} to {max(tokens):,}"
        lines.append([name, *cells, f"{statistics.mean(ends):.4f} ({min(ends):.4f} to {max(ends):.4f})"])
    return {"Tokens": lines}


def notes_of(report: dict[str, Any]) -> list[str]:
    notes = [f"The mark, which all seeds of {MARK} reach, is a validation loss of {report['mark']:.4f} nats per token."]
    theirs = report["tokens"][MARK]
    for name, tokens in report["tokens"].items():
        if name != MARK and None not in tokens + theirs:
            notes.append(f"{name} / {MARK}: {number(statistics.mean(tokens) / statistics.mean(theirs))} of the tokens.")
    notes += [f"{name}: SHA-256 {digest}." for name, digest in report["texts"].items()]
    form = Form(**report["form"])
    tokens = form.batch * form.sequence
    notes.append(f"Schedule of all, over {form.steps} steps: {json.dumps(SCHEDULE)}.")
    notes += [f"Settings of {name}: {json.dumps(settings)}." for name, settings in report["settings"].items()]
    notes.append(
        f"{form.batch} x {form.sequence} tokens a step, {form.steps * tokens:,} in all, validation on "
        f"{form.validation_rows} rows every {VALIDATE_EVERY} steps; the model: {json.dumps(form.sizes)}."
    )
    return notes
