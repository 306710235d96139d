"""A source from its address to the finished report, as xray.json has it (schemas/xray.schema.json)."""

import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

import console
from chat import Chat
from data.conversations import ANSWERED
from data.sources import Row
from inspection.xray import card, croissant, figures, fix, reading, rubric, shards
from inspection.xray.leakage import Leakage
from inspection.xray.masks import LEARNT_SHAPES, Mask, Masks
from inspection.xray.prepare import prepared
from inspection.xray.reading import Batch, Unreadable, kind_of
from inspection.xray.scan import Options, Scan
from inspection.xray.tokens import TokenCounter
from inspection.xray.verdict import use_of, verdict
from inspection.xray.views import CHOICES, Shape, shape_of, view

SCHEMA = "nanoqwen/xray/1"


@dataclass
class Settings:
    split: str | None = None
    subset: str | None = None
    limit: int | None = None
    sequence: int = 1024
    stage: str | None = None  # of a training run; None: what the shape is for
    turns: str = "all"
    thinking: bool = True
    pack: bool = False
    batch: int = 32  # rows of a step, for the padding
    parts: int = 1
    seed: int = 0
    rules: Path | None = None
    near: float = 0.7
    near_rows: int = 1_000_000
    mask_rows: int = 10_000
    against: str | None = None
    keep_rows: bool = False
    bits: Callable[[Mask], float | None] | None = None
    compare_croissant: bool = True
    generated: Callable[[int], Iterator[tuple[dict, list[Row]]]] | None = None  # of a run on the generated corpus


@dataclass
class Examined:
    """The report, and the pass behind it where it read rows; `close` it."""

    report: dict[str, Any]
    rules: dict[str, rubric.Rule]
    parts: list[reading.Part]
    scan: Scan | None = None
    interrupted: bool = False

    def close(self) -> None:
        if self.scan is not None:
            self.scan.close()


def examine(src: str, settings: Settings, chat: Chat | None) -> Examined:
    """`chat`: the tokenizer and template; None: no tokens are counted, no masks made."""
    rules = rubric.load(settings.rules)
    if settings.generated is not None:
        parts = [reading.Part("train", records=lambda: (record for record, _ in settings.generated(settings.limit)))]
    else:
        parts = reading.parts_of(src, settings.split, settings.subset)
    if any(part.path is not None and kind_of(part.path) == ".bin" for part in parts):
        paths = [part.path for part in parts if part.path is not None and kind_of(part.path) == ".bin"]
        report = shards.examine(paths, chat, rules, settings.limit, settings.sequence)
        scan, interrupted = None, False
        to_drop = sum(finding["count"] for finding in report["findings"] if rules[finding["id"]].drops)
    else:
        leakage = _other(settings) if settings.against else None
        scan, interrupted = _scan(parts, settings, rules, chat, leakage)
        try:
            report = figures.finish(scan, settings.batch, settings.parts, settings.seed, settings.pack)
            to_drop = len(fix.dropping(scan, rules))
        except BaseException:
            scan.close()
            raise
        whole = reading.counted_rows(parts) if settings.limit is not None else None
        complete = (
            settings.generated is None
            and not interrupted
            and (settings.limit is None or scan.rows < settings.limit or whole == scan.rows)
        )
        if complete:
            whole = scan.rows
        report |= {"rows": whole, "complete": complete, "seconds": round(scan.seconds, 3)}
        report["rows_per_second"] = round(scan.rows / scan.seconds) if scan.seconds else None
        report["rules_skipped"] = scan.skipped_rules
    report = _about(src, parts, chat, settings) | report
    use = use_of(scan.shape if scan is not None else Shape("shards", ""), settings.stage)
    report |= {
        "intended_use": use.intended,
        "task": use.how,
        "intended_use_from": "from its columns" if settings.stage is None else f"stage: {settings.stage}",
    }
    report["croissant"] = _croissant(src, report, settings)
    report["verdict"] = verdict(report, rules, to_drop, use.task)
    return Examined(report, rules, parts, scan, interrupted)


def _about(src: str, parts: list[reading.Part], chat: Chat | None, settings: Settings) -> dict[str, Any]:
    path = Path(src).expanduser()
    local = parts[0].stream is None
    found = card.read_card(src) if path.exists() or not local else card.Card("none", {})
    return {
        "schema": SCHEMA,
        "name": path.name if local else src,
        "address": str(path.resolve()) if local else f"https://huggingface.co/datasets/{src.partition('@')[0]}",
        "files": len(parts) if local else None,
        "license": found.license,
        "commercial_use": found.commercial_use,
        "card": found.source,
        "tokenizer": chat.source if chat is not None else None,
        "limit": settings.limit,
        "against": settings.against,
    }


def _croissant(src: str, report: dict[str, Any], settings: Settings) -> dict[str, Any] | None:
    if not settings.compare_croissant or (found := croissant.find(src)) is None:
        return None
    try:
        return croissant.compared(found, report)
    except ValueError as error:  # the library is not installed
        return {"valid": None, "differences": [], "not_compared": str(error)}


# --- the pass ---


def _scan(
    parts: list[reading.Part],
    settings: Settings,
    rules: dict[str, rubric.Rule],
    chat: Chat | None,
    leakage: Leakage | None,
) -> tuple[Scan, bool]:
    def masks(shape: Shape, columns: pa.Schema) -> Masks | None:
        if chat is None or shape.name not in LEARNT_SHAPES or (not chat.templates and shape.name != "pretraining"):
            return None
        if shape.name in ("eval", "rag") and settings.stage is None:
            _, choices, answer = shape.fields
            if answer not in ANSWERED or choices in CHOICES or not pa.types.is_string(columns.field(answer).type):
                return None  # train.py reads no such rows
        made = settings.generated and (rows for _, rows in settings.generated(settings.limit))
        return Masks(chat, shape, settings.sequence, settings.turns, settings.thinking, settings.stage, made)

    options = Options(
        rules=rules,
        counter=TokenCounter(chat.tokenizer) if chat is not None else None,
        masks=masks,
        mask_rows=settings.mask_rows,
        bits=settings.bits,
        near=settings.near,
        near_rows=settings.near_rows,
        leakage=leakage,
        keep_rows=settings.keep_rows,
    )
    scan, start = Scan(options), time.monotonic()
    total = reading.counted_rows(parts)
    total = min(filter(None, (total, settings.limit)), default=None)
    try:
        with stoppable() as stopped, console.task_progress("rows", total) as show:
            for found in prepared(reading.batches(parts, settings.limit), options.counter):
                scan.add(found)
                show(scan.rows, f"{scan.rows / (time.monotonic() - start):,.0f} a second")
                if stopped():
                    break
            interrupted = stopped()
        scan.seconds = time.monotonic() - start
        if scan.shape is None:
            shown = [snippet for snippets in scan.snippets.values() for snippet in snippets]
            why = f" ({shown[0].where} {shown[0].why})" if shown else ""
            raise ValueError(f"{parts[0].path or parts[0].split}: no row could be read{why}")
    except BaseException:
        scan.close()
        raise
    return scan, interrupted


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks for an end after this batch; the second one is an interrupt as ever."""
    pressed = []

    def note(number, frame) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)
        console.notice(
            "stopping: the report will cover the rows read so far (Ctrl-C again: stop immediately, without a report)"
        )

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread
        yield lambda: False
        return
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


# --- the other set ---


def _other(settings: Settings) -> Leakage:
    leakage, shape = Leakage(), None
    for item in reading.batches(reading.parts_of(settings.against, None, None)):
        if isinstance(item, Unreadable):
            continue
        shape = shape or shape_of(item)
        leakage.add_other(item.rows, texts_of(shape, item))
    leakage.close()
    return leakage


def texts_of(shape: Shape, batch: Batch) -> pa.Array:
    return pc.fill_null(view(shape, batch)["_text"], "").combine_chunks()


# --- the SQL console ---


def query(scan: Scan, sql: str) -> tuple[list[str], Iterator[tuple]]:
    """The result of one SELECT over the table `data`: the set's columns, then ours."""
    totals = " + ".join(f"coalesce(t{place}, 0)" for place in range(len(scan.columns))) or "0"
    scan.sql.execute(
        "CREATE OR REPLACE VIEW data AS SELECT kept_rows.*, length(_text) AS _characters,"
        f" {totals} AS _tokens, exact.first AS _duplicate_of, near.first AS _near_duplicate_of,"
        " masks.targets AS _targets, masks.bits AS _bits, coalesce(broken, []) AS _findings"
        " FROM kept_rows JOIN rows ON rows.row = _row"
        " LEFT JOIN exact ON exact.row = _row LEFT JOIN near ON near.row = _row LEFT JOIN masks ON masks.row = _row"
        " LEFT JOIN (SELECT row, list_sort(list_distinct(list(rule))) AS broken FROM found GROUP BY row) AS f"
        " ON f.row = _row ORDER BY _row"
    )
    try:
        statements = duckdb.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise ValueError("--sql: give one SELECT over the table data")
        found = scan.sql.execute(sql)
    except duckdb.Error as error:
        raise ValueError(f"--sql: {str(error).strip().splitlines()[0]}") from None
    names = [column[0] for column in found.description]
    return names, itertools.chain.from_iterable(iter(lambda: found.fetchmany(1000), []))
