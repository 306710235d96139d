"""How fast the X-ray reads: rows a second for the columns' figures, megabytes a second for tokens and near-duplicates,
beside what duckdb, datasets and tokenizers reach on the same rows: `python bench.py xray`.

The rows are generated: instructions, contexts and answers of words drawn from a text (--text) or from 20,000 made-up
ones by Zipf's law, as Parquet and as JSON lines. Each figure is the best of --repeats, in this process, on --threads.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import console

COLUMNS = ("instruction", "context", "response", "category")


def words_of(text: Path | None) -> np.ndarray:
    if text is not None:
        return np.array(text.read_text(encoding="utf-8").split())
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwyp"))
    made = np.array(["".join(random.choice(letters, size)) for size in random.integers(2, 10, 20_000)])
    return made[np.minimum(random.zipf(1.2, 1_000_000) - 1, len(made) - 1)]


def write_rows(folder: Path, rows: int, words: np.ndarray) -> tuple[Path, Path, int]:
    """-> Parquet, JSON lines, bytes of text."""
    random = np.random.default_rng(1)

    def said(low: int, high: int) -> str:
        size = int(random.integers(low, high))
        start = int(random.integers(0, len(words) - size))
        return " ".join(words[start : start + size])

    made = [
        {
            "instruction": f"{said(6, 20)} {number}?",
            "context": said(20, 60) if number % 4 == 0 else "",
            "response": f"{said(15, 120)}.",
            "category": ("open_qa", "brainstorming", "closed_qa")[number % 3],
        }
        for number in range(rows)
    ]
    pq.write_table(pa.Table.from_pylist(made), folder / "rows.parquet", row_group_size=50_000)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    size = sum(len(text.encode()) for row in made for text in row.values())
    return folder / "rows.parquet", folder / "rows.jsonl", size


def best(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """-> least seconds on the clock, and of the processor."""
    found = []
    for _ in range(repeats):
        clock, processor = time.perf_counter(), time.process_time()
        work()
        found.append((time.perf_counter() - clock, time.process_time() - processor))
    return min(wall for wall, _ in found), min(spent for _, spent in found)


def xray(path: Path, chat=None, near_rows: int = 0) -> None:
    from inspection.xray.examine import Settings, examine

    examine(str(path), Settings(mask_rows=0, near_rows=near_rows), chat).close()


def duckdb_lengths(path: Path, threads: int) -> None:
    """Median, 95 % and maximum of each column's characters, and the distinct rows: less than the X-ray does."""
    import duckdb

    kind = "read_parquet" if path.suffix == ".parquet" else "read_json"
    spreads = ", ".join(f"quantile_cont(length({name}), [0.5, 0.95]), max(length({name}))" for name in COLUMNS)
    with duckdb.connect() as connection:
        connection.execute(f"SET threads = {threads}")
        query = f"SELECT {spreads}, count(DISTINCT lower({COLUMNS[0]} || {COLUMNS[2]})) FROM {kind}('{path}')"
        connection.execute(query).fetchall()


def datasets_rows(path: Path) -> None:
    """One pass over the rows with each text's length."""
    import datasets

    kind = "parquet" if path.suffix == ".parquet" else "json"
    rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    for row in rows:
        for text in row.values():
            len(text)


def main(arguments: list[str]) -> None:
    parser = console.ArgumentParser(prog="bench.py xray", description=" ".join(__doc__.partition("\n\n")[0].split()))
    parser.add_argument("--rows", type=int, default=200_000, metavar="N", help="default: 200,000")
    parser.add_argument("--text", type=Path, help="a text to take the words from")
    parser.add_argument("--tokenizer", default="models/tiny", metavar="SRC", help="default: models/tiny")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of duckdb and tokenizers (default: 2)")
    options = parser.parse_args(arguments)
    if min(options.rows, options.repeats, options.threads) < 1:
        raise ValueError("--rows, --repeats and --threads: give at least 1")
    os.environ["RAYON_NUM_THREADS"] = str(options.threads)  # before tokenizers starts its threads

    from chat import Chat
    from inspection.xray.tokens import TokenCounter
    from ops.limits import describe

    chat = Chat.from_pretrained(options.tokenizer)
    with tempfile.TemporaryDirectory(prefix="bench-xray-") as folder:
        parquet, lines, size = write_rows(Path(folder), options.rows, words_of(options.text))
        texts = [text for row in map(json.loads, lines.open(encoding="utf-8")) for text in row.values()]
        column = pa.array(texts)
        library = chat.tokenizer.encode_batch_fast
        measured = {
            "columns, Parquet": (lambda: xray(parquet), "rows"),
            "columns, JSON lines": (lambda: xray(lines), "rows"),
            "columns and tokens, Parquet": (lambda: xray(parquet, chat), "rows"),
            "columns and near-duplicates, Parquet": (lambda: xray(parquet, near_rows=options.rows), "rows"),
            "lengths alone: duckdb, Parquet": (lambda: duckdb_lengths(parquet, options.threads), "rows"),
            "lengths alone: duckdb, JSON lines": (lambda: duckdb_lengths(lines, options.threads), "rows"),
            "lengths alone: datasets, Parquet": (lambda: datasets_rows(parquet), "rows"),
            "lengths alone: datasets, JSON lines": (lambda: datasets_rows(lines), "rows"),
            "tokens": (lambda: TokenCounter(chat.tokenizer).counts(column), "bytes"),
            "tokens: tokenizers": (lambda: [len(e) for e in library(texts, add_special_tokens=False)], "bytes"),
        }
        machine = describe()["cpu"]
        print(f"{options.rows:,} rows, {size / 1e6:,.0f} MB of text; {machine}, load {os.getloadavg()[0]:.1f}\n")
        print("| what | rows/s | MB/s | MB/s of processor time |\n|---|---|---|---|")
        for name, (work, unit) in measured.items():
            wall, spent = best(work, options.repeats)
            rate = f"{options.rows / wall:,.0f}" if unit == "rows" else ""
            print(f"| {name} | {rate} | {size / 1e6 / wall:,.1f} | {size / 1e6 / spent:,.1f} |", flush=True)
