"""Which small errors would the suite not notice? A seeded sample of mutants, each held against the tests of its file.

    python tests/mutation/mutate.py inference/sampling.py            all of its mutants
    python tests/mutation/mutate.py --sample 40 --workers 2          40 of each file below
    python tests/mutation/mutate.py --report runs/mutants.jsonl      the table, and the mutants that survived

cosmic-ray (https://cosmic-ray.readthedocs.io) makes the mutants: an operator, a number, a comparison, a condition or a
loop is changed, one at a time. Each worker has a copy of the checkout of its own. Results are appended as they come, so
that a sample can be continued. A mutant that ends the tests by an error or by their limit counts as noticed; the limit
is one of processor time, so that a busy machine makes no mutant look noticed.
"""

import argparse
import difflib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 300  # of processor time for the tests of one mutant
PATIENCE = 3600  # seconds of waiting, for one that sleeps
TESTS = {  # the tests that hold a file; what they leave unnoticed, others might notice, but should not have to
    "model.py": "tests/test_model.py tests/ops/test_step.py tests/test_hostile.py",
    "chat.py": "tests/test_chat.py",
    "inference/sampling.py": "tests/inference/test_sampling.py",
    "inference/params.py": "tests/inference/test_sampling.py tests/test_generate.py",
    "inference/decode.py": "tests/test_generate.py tests/inference tests/ops/test_step.py",
    "inference/speculate.py": "tests/inference/test_speculate.py",
    "inference/session.py": "tests/test_generate.py tests/inference",
    "training/objectives.py": "tests/training/test_objectives.py",
    "training/batches.py": "tests/training/test_objectives.py tests/data/test_shards.py",
    "training/balance.py": "tests/training/test_experts.py",
    "training/optimizers.py": "tests/test_train.py",
    "ops/cross_entropy.py": "tests/training/test_objectives.py tests/test_train.py",
    "data/packing.py": "tests/data/test_packing.py",
    "data/shard_format.py": "tests/data/test_shards.py",
    "data/sources.py": "tests/data/test_conversations.py tests/data/test_shards.py tests/training/test_stages.py",
    "formats/safetensors_read.py": "tests/test_hostile.py tests/test_model.py tests/test_convert.py",
    "formats/compressed_tensors.py": "tests/ops/test_quant.py tests/test_convert.py",
    "formats/download.py": "tests/formats/test_source.py",
    "formats/template.py": "tests/test_chat.py",
    "formats/gguf/reader.py": "tests/formats/test_gguf.py tests/test_hostile.py",
    "formats/gguf/kquants.py": "tests/formats/test_kquants.py",
}
# Type annotations (X | None) are no code that could be wrong, and cosmic-ray would change their operators.
SKIPPED = ("core/NoOp", "core/RemoveDecorator", "core/VariableReplacer", "core/VariableInserter")


def positions(file: str) -> list[tuple[str, int]]:
    """(operator, occurrence) of all mutants of a file."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    nodes, found = list(ast_nodes(get_ast((ROOT / file).read_text(encoding="utf-8")))), []
    for name in operator_names():
        if name not in SKIPPED and not get_operator(name).arguments():
            operator = get_operator(name)()
            count = sum(1 for node in nodes for _ in operator.mutation_positions(node))
            found += [(name, occurrence) for occurrence in range(count)]
    return found


def mutant(file: str, name: str, occurrence: int) -> tuple[str, str] | None:
    """(mutated source, changed lines), or None for what is no other program: an annotation, a syntax error."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (ROOT / file).read_text(encoding="utf-8")
    changed = mutate_code(source, get_operator(name)(), occurrence)
    if changed is None or changed == source:
        return None
    lines = [
        line
        for line in difflib.unified_diff(source.splitlines(), changed.splitlines(), n=0)
        if line[:3] not in ("---", "+++", "@@ ")
    ]
    if any("| None" in line or "->" in line or ("isinstance(" in line and " | " in line) for line in lines):
        return None
    try:
        compile(changed, file, "exec")
    except SyntaxError:
        return None
    return changed, "\n".join(lines)


def copy_checkout(folder: Path) -> None:
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def tested(folder: Path, file: str, source: str) -> str:
    """ "survived", "killed" or "timeout" of the tests with a file of other source."""
    (folder / file).write_text(source, encoding="utf-8")
    limited = [sys.executable, "-IS", ROOT / "tests" / "launch.py", "--processor", str(SECONDS)]
    command = [*limited, sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS[file].split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        status = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, timeout=PATIENCE, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        shutil.copy(ROOT / file, folder / file)
    return {0: "survived", -signal.SIGXCPU: "timeout", -signal.SIGKILL: "timeout"}.get(status, "killed")


def run(files: list[str], sample: int | None, seed: int, workers: int, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["file"], r["operator"], r["occurrence"]) for r in results(out)}
    chosen = []
    for file in files:
        found = positions(file)
        random.Random(f"{seed} {file}").shuffle(found)
        chosen += [(file, *one) for one in found[:sample] if (file, *one) not in done]
    print(f"{len(chosen):,} mutants of {len(files)} files", file=sys.stderr)
    folders: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(workers) as pool, out.open("a") as log:
        for worker in range(workers):
            folder = Path(scratch) / f"checkout-{worker}"
            copy_checkout(folder)
            folders.put(folder)

        for file in dict.fromkeys(file for file, *_ in chosen):
            if tested(folder, file, (ROOT / file).read_text(encoding="utf-8")) != "survived":
                sys.exit(f"{file}: its tests fail without a mutant: {TESTS[file]}")

        def one(place: tuple[str, str, int]) -> dict:
            file, operator, occurrence = place
            record = {"file": file, "operator": operator, "occurrence": occurrence}
            if (made := mutant(*place)) is None:
                return record | {"outcome": "none"}
            folder = folders.get()
            try:
                return record | {"outcome": tested(folder, file, made[0]), "lines": made[1]}
            finally:
                folders.put(folder)

        for record in pool.map(one, chosen):
            log.write(json.dumps(record) + "\n")
            log.flush()
            if record["outcome"] == "survived":
                print(f"survived: {record['file']}\n{record['lines']}", file=sys.stderr)


def results(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def report(out: Path) -> None:
    counts: dict[str, Counter] = {}
    for record in results(out):
        if record["outcome"] == "none":
            continue
        counts.setdefault(record["file"], Counter())[record["outcome"]] += 1
    print("| file | mutants tried | noticed | share |\n|---|--:|--:|--:|")
    for file, found in sorted(counts.items()):
        total, noticed = found.total(), found.total() - found["survived"]
        print(f"| `{file}` | {total} | {noticed} | {noticed / total:.0%} |")
    everything = sum(counts.values(), Counter())
    noticed = everything.total() - everything["survived"]
    print(f"| all | {everything.total()} | {noticed} | {noticed / max(1, everything.total()):.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"default: {', '.join(TESTS)}")
    parser.add_argument("--sample", type=int, metavar="N", help="mutants of each file (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/mutants.jsonl"))
    parser.add_argument("--report", type=Path, metavar="FILE", help="the table of a run")
    options = parser.parse_args()
    if options.report:
        report(options.report)
        return
    if unknown := [file for file in options.files if file not in TESTS]:
        sys.exit(f"{unknown[0]}: no tests are named for it; add them to TESTS")
    run(options.files or list(TESTS), options.sample, options.seed, options.workers, options.out)
    report(options.out)


if __name__ == "__main__":
    main()
