"""`--fix OUT`: the rows that pass, written as they were read, and a record of what was left out and why."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from formats.files import atomic_directory, atomic_file, write_text
from inspection.xray.reading import Batch, Part, batches
from inspection.xray.rubric import Rule
from inspection.xray.scan import Scan

KINDS = (".jsonl", ".parquet")


def checked(out: Path, parts: list[Part]) -> None:
    """ValueError for a place that can't be written to, before the reading begins."""
    if out.suffix and out.suffix not in KINDS:
        raise ValueError(f"--fix {out}: give a folder, or a file that ends in {' or '.join(KINDS)}")
    if out.suffix and len({part.split for part in parts}) > 1:
        raise ValueError(f"--fix {out}: the set has several splits; give a folder, which gets a file for each")
    if out.exists() and ((out.is_dir() and any(out.iterdir())) or out.is_file()):
        raise ValueError(f"--fix {out}: is there already; give another name")


def dropping(scan: Scan, rules: dict[str, Rule]) -> np.ndarray:
    """The numbers of the rows to leave out, ascending."""
    names = [name for name, rule in rules.items() if rule.drops]
    scan.sql.execute(
        "CREATE OR REPLACE TEMP TABLE dropped AS SELECT DISTINCT row FROM found WHERE list_contains(?, rule)", [names]
    )
    return scan.sql.execute("SELECT row FROM dropped ORDER BY row").fetchnumpy()["row"].astype(np.int64)


def write(
    out: Path, parts: list[Part], limit: int | None, scan: Scan, rules: dict[str, Rule], source: str
) -> dict[str, Any]:
    """Reads the source a second time. Returns the record's summary, with the names of the files."""
    left_out = dropping(scan, rules)
    with ExitStack() as stack:
        if out.suffix:
            out.parent.mkdir(parents=True, exist_ok=True)
            target, record = stack.enter_context(atomic_file(out)), out.with_name(f"{out.stem}.record.json")
            places = {part.split: target for part in parts}
        else:
            folder = stack.enter_context(atomic_directory(out))
            record = folder / "record.json"
            places = {part.split: folder / f"{part.split}.jsonl" for part in parts}
        kept = _copy(parts, limit, left_out, places, out.suffix or ".jsonl", scan.rows)
        counts = scan.sql.execute(
            "SELECT rule, count(DISTINCT row) FROM found JOIN dropped USING (row) GROUP BY rule ORDER BY 2 DESC, 1"
        ).fetchall()
        summary = {
            "schema": "nanoqwen/xray-fix/1",
            "source": source,
            "rows_read": scan.rows,
            "rows_kept": kept,
            "rows_left_out": scan.rows - kept,
            "rules": {
                name: {"rows": count, "reason": rules[name].reason, "condition": rules[name].condition}
                for name, count in counts
                if rules[name].drops
            },
        }
        write_text(record, "".join(_record(summary, scan, [name for name in rules if rules[name].drops])))
    files = [out] if out.suffix else sorted(out.glob("*.jsonl"))
    return summary | {
        "files": [str(file) for file in files],
        "record": str(record if out.suffix else out / "record.json"),
    }


def _copy(
    parts: list[Part], limit: int | None, left_out: np.ndarray, places: dict[str, Path], suffix: str, rows: int
) -> int:
    kept, writers = 0, {}
    with ExitStack() as stack:
        for path in {} if suffix == ".parquet" else dict.fromkeys(places.values()):
            writers[path] = stack.enter_context(path.open("w", encoding="utf-8"))
        for item in batches(parts, limit):
            if not isinstance(item, Batch) or item.rows[0] >= rows:  # an interrupted pass has read no further
                continue
            chosen = np.flatnonzero(~np.isin(item.rows, left_out) & (item.rows < rows))
            kept += len(chosen)
            path = places[item.split]
            if suffix == ".parquet":
                table = item.table.take(pa.array(chosen))
                if path not in writers:
                    writers[path] = stack.enter_context(pq.ParquetWriter(path, table.schema))
                writers[path].write_table(
                    table.cast(writers[path].schema) if table.schema != writers[path].schema else table
                )
            else:
                records = item.records()
                writers[path].writelines(_line(records[place]) for place in chosen)
    if suffix == ".parquet" and not writers:
        raise ValueError("--fix: no row is left to write")
    return kept


def _line(record: dict) -> str:
    line = json.dumps(record, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair can only be spelt out
        line = json.dumps(record, default=str)
    return line + "\n"


def _record(summary: dict[str, Any], scan: Scan, names: list[str]) -> Iterator[str]:
    yield json.dumps(summary, indent=1, ensure_ascii=False)[:-2] + ',\n "left_out": ['
    rows = scan.sql.execute(
        "SELECT row, list_sort(list_distinct(list(rule))) FROM found JOIN dropped USING (row)"
        " WHERE list_contains(?, rule) GROUP BY row ORDER BY row",
        [names],
    )
    separator = "\n  "
    while some := rows.fetchmany(10_000):
        for row, rules in some:
            yield separator + json.dumps({"row": row, "rules": rules})
            separator = ",\n  "
    yield "\n ]\n}\n"
