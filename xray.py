"""Look at a data set before training on it: `python xray.py SRC`. What it is made of lives in inspection/xray/."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import console
from formats.source import BUNDLED_MODEL, DEFAULT_MODEL

if TYPE_CHECKING:
    from chat import Chat

GENERATED_ROWS = 1000  # of an endless source
EXAMPLES = """\
  python xray.py databricks/databricks-dolly-15k --limit 2000      a data set of the hub, streamed
  python xray.py rows.jsonl --out OUT                              also Parquet, CSV, text, shards, folders of them
  python xray.py rows.jsonl --against held_out.jsonl               leakage between two sets
  python xray.py rows.jsonl --model models/tiny                    bits per token of each row under a model
  python xray.py rows.jsonl --sql "SELECT _row, _tokens FROM data ORDER BY _tokens DESC LIMIT 5"
  python xray.py rows.jsonl --fix clean.jsonl                      the rows that pass, and a record of the others
  python xray.py configs/sft.yaml                                  the rows of a training run, as that run sees them

--sql sees the table `data`: the set's columns and ours (_row, from 0, _split, _prompt, _response, _text, _characters,
_tokens, _targets, _bits, _duplicate_of, _near_duplicate_of, _findings).

exit status:
  0  the set was read
  1  a finding named by --fail-on is there
  2  something can't be read, or the command was used wrongly
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = console.ArgumentParser(
        prog="xray.py",
        usage="xray.py SRC [options]",
        description="Look at a data set before training on it.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="hub id, file, folder, or the YAML of a training run")
    group = parser.add_argument_group("what is read")
    group.add_argument("--split", help="only this split (default: all)")
    group.add_argument(
        "--subset", metavar="NAME", help="which configuration of a hub's data set, or folder of a folder"
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    group = parser.add_argument_group("what is asked")
    group.add_argument("--against", metavar="SRC", help="another set: which rows share a run of eight words with it")
    group.add_argument("--model", metavar="SRC", help="a checkpoint: bits per learnt token of each row")
    group.add_argument("--sql", metavar="QUERY", help="print the result of a SELECT over the table data instead")
    group.add_argument(
        "--rules", type=Path, metavar="FILE", help="YAML of rules of your own, as inspection/xray/rubric.yaml"
    )
    group.add_argument(
        "--near", type=float, default=0.7, metavar="J", help="Jaccard similarity of near-duplicates (0.7)"
    )
    group.add_argument(
        "--near-rows", type=int, default=1_000_000, metavar="N", help="compare the first N rows (1,000,000; 0: none)"
    )
    group = parser.add_argument_group("what will be learnt")
    group.add_argument(
        "--tokenizer",
        metavar="SRC",
        help=f"and template (default: --model's, else {DEFAULT_MODEL}'s from the cache, else the bundled one's)",
    )
    group.add_argument("--sequence", type=int, metavar="N", help="longest training row in tokens (1024)")
    group.add_argument(
        "--mask-rows",
        type=int,
        default=10_000,
        metavar="N",
        help="make training rows of the first N rows (10,000; 0: of none)",
    )
    group = parser.add_argument_group("what is written")
    group.add_argument("--out", type=Path, metavar="DIR", help="xray.html, xray.md, xray.json and plots")
    group.add_argument(
        "--json", action="store_true", help="print xray.json instead of the summary; with --sql, JSON lines"
    )
    group.add_argument(
        "--fix", type=Path, metavar="OUT", help="the rows that pass: a .jsonl or .parquet file, or a folder"
    )
    group.add_argument("--croissant", type=Path, metavar="FILE", help="write a Croissant of local files")
    group.add_argument(
        "--fail-on",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="exit status 1 where such a finding is there (any: every finding)",
    )
    options = parser.parse_args(arguments)
    for flag, value, low, high in (
        ("--limit", options.limit, 1, sys.maxsize),
        ("--near", options.near, 0.3, 1),
        ("--near-rows", options.near_rows, 0, 1 << 31),
        ("--mask-rows", options.mask_rows, 0, sys.maxsize),
        ("--sequence", options.sequence, 8, 1 << 20),
    ):
        if value is not None and not low <= value <= high:
            raise ValueError(f"{flag} {value}: give a number from {low:,} to {high:,}")
    options.tokenizer_from = "--tokenizer"
    options.fail_on = [name for names in options.fail_on for name in names.split(",") if name]
    return options


def open_chat(options: argparse.Namespace) -> "Chat":
    """The tokenizer that counts, and its template; where none is named, no download is started for it."""
    from chat import Chat
    from formats import hub
    from formats.source import resolve

    if options.tokenizer or options.model:
        place = options.tokenizer_from if options.tokenizer else "--model"
        return Chat.from_pretrained(resolve(options.tokenizer or options.model, place, tokenizer_only=True))
    cached = hub.cached(DEFAULT_MODEL, None, tokenizer_only=True)
    if cached is None:
        console.notice(
            f"tokens are counted by the bundled model's tokenizer; --tokenizer {DEFAULT_MODEL} fetches Qwen3's"
        )
    return Chat.from_pretrained(cached or BUNDLED_MODEL)


def settings_of(options: argparse.Namespace):
    """-> (SRC, Settings): of the command line, or of the training YAML that SRC is."""
    from inspection.xray.examine import Settings

    settings = Settings(
        split=options.split,
        subset=options.subset,
        limit=options.limit,
        sequence=options.sequence or 1024,
        rules=options.rules,
        near=options.near,
        near_rows=options.near_rows,
        mask_rows=options.mask_rows,
        against=options.against,
        keep_rows=options.sql is not None,
    )
    if Path(options.src).suffix not in (".yaml", ".yml"):
        return options.src, settings
    from data.sources import matches
    from training import schema
    from training.sources import decide_source, row_limits

    run = schema.load(options.src)
    decide_source(run)
    if options.tokenizer is None:
        options.tokenizer, options.tokenizer_from = run.model.tokenizer, f"{options.src}: model.tokenizer"
    settings.batch, settings.sequence = row_limits(run)
    settings.parts, settings.seed, settings.turns = run.train.accumulate, run.train.seed, run.data.turns
    settings.stage, settings.pack, settings.thinking = run.stage, run.data.pack, run.grpo.thinking
    settings.limit, settings.subset = options.limit or run.data.limit, options.subset or run.data.subset
    if run.data.source == "corpus":
        from inspection.xray.generated import rows_of
        from training.sources import build_source

        chat = open_chat(options)
        settings.limit = options.limit or GENERATED_ROWS
        settings.generated = lambda limit: rows_of(build_source(run, chat), chat, limit)
        return options.src, settings
    if run.data.train is None:
        raise ValueError(f"{options.src}: data.train names no rows")
    if run.data.source == "rows" and not matches(run.data.train):  # of files all is read
        settings.split = options.split or run.data.split
    return run.data.train, settings


def print_rows(names: list[str], rows: Iterable[tuple], as_json: bool) -> None:
    """A query's result: JSON lines, or a table of plain text."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from data.inspection import printable

    if as_json:
        for row in rows:
            print(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, default=str))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(Text(printable(name)), overflow="fold")
    for number, row in enumerate(rows):
        if number == 1000:
            console.notice("the first 1,000 rows; --json prints all")
            break
        table.add_row(*(Text("" if value is None else printable(str(value))[:2000]) for value in row))
    Console(highlight=False).print(table)


def write(report: dict[str, Any], out: Path) -> None:
    from formats.files import write_text
    from inspection.xray import report as pages

    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "xray.json", to_json(report))
    write_text(out / "xray.md", pages.markdown(report))
    write_text(out / "xray.html", pages.html(report))
    pages.plots(report, out)
    console.notice(f"{out / 'xray.html'}, xray.md, xray.json and plots are written")


def to_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def main() -> None:
    options = parse()
    src, settings = settings_of(options)

    from inspection.xray import croissant, fix, reading, rubric
    from inspection.xray.examine import examine, query

    known = rubric.load(options.rules)
    if unknown := set(options.fail_on) - set(known) - {"any"}:
        near = console.did_you_mean(min(unknown), known)
        raise ValueError(f"--fail-on {min(unknown)}: no such rule{near} (there are {', '.join(known)})")
    if options.fix is not None:
        fix.checked(options.fix, reading.parts_of(src, settings.split, settings.subset))
    if options.croissant is not None:
        croissant.library()
        if not Path(src).exists():
            raise ValueError("--croissant is for local files; the hub has one of its own for each of its sets")
    chat = open_chat(options)
    if options.model is not None:
        from inspection.xray.bits import bits_under
        from model import Qwen3

        settings.bits = bits_under(Qwen3.from_pretrained(options.model), settings.sequence)
    examined = examine(src, settings, chat)
    try:
        report = examined.report
        if options.out is not None:
            write(report, options.out)
        if options.fix is not None:
            if examined.scan is None:
                raise ValueError("--fix is for rows; shards are made anew with data/shards.py tokenize")
            report["fix"] = fix.write(options.fix, examined.parts, settings.limit, examined.scan, examined.rules, src)
            done = report["fix"]
            console.notice(
                f"{', '.join(done['files'])}: {done['rows_kept']:,} rows kept, {done['rows_left_out']:,} left out; "
                f"{done['record']} says why"
            )
        if options.croissant is not None:
            croissant.write(options.croissant, report, [part.path for part in examined.parts])
            console.notice(f"{options.croissant} is written")
        if options.sql is not None:
            if examined.scan is None:
                raise ValueError("--sql is for rows; shards have none")
            print_rows(*query(examined.scan, options.sql), options.json)
        elif options.json:
            print(to_json(report), end="")
        else:
            from rich.console import Console

            from inspection.xray.report import terminal

            Console(highlight=False).print(terminal(report))
    finally:
        examined.close()
    if examined.interrupted:
        raise KeyboardInterrupt
    there = {finding["id"] for finding in report["findings"]}
    if broken := sorted(there if "any" in options.fail_on else there & set(options.fail_on)):
        console.notice(f"xray.py: --fail-on: {', '.join(broken)}")
        sys.stdout.flush()
        sys.exit(1)


if __name__ == "__main__":
    console.run(main)
