"""Reads a model before it is run, and keeps what is verified apart from what is claimed: `python audit.py SRC`.

Nothing of the repository is run: pickles and code are read, templates are rendered in the sandbox, weights are data.
Arguments and exit statuses are in inspection/arguments.py.
"""

import sys
from pathlib import Path
from typing import Any

import console
from inspection.arguments import parse_arguments

if __name__ == "__main__":
    console.answer_early(parse_arguments)  # --help and a wrong flag need no PyTorch

from formats import record
from formats.files import write_text
from formats.source import resolve
from inspection import auditing, bom, lineage, manifest, report


def write_reports(out: Path, audit: auditing.Audit, found: dict[str, Any]) -> None:
    """All files of --out DIR, each whole or not at all."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; give a directory")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "audit.md", report.markdown(found, audit.lines))
    write_text(out / "audit.html", report.page(found, audit.lines, audit.diffs))
    if bom.available():
        write_text(out / "bom.cdx.json", bom.to_json(found))
    else:
        console.notice("bom.cdx.json needs cyclonedx-python-lib: pip install -e '.[audit]'")
    if results := record.results(out / manifest.NAME):
        found = {**found, "results": results}  # what convert.py or train.py wrote there stays
    write_text(out / manifest.NAME, lineage.dump(found))


def main() -> None:
    options = parse_arguments()
    with auditing.scratch() as scratch, console.byte_progress() as progress:
        tree = auditing.find_tree(options.src, options.deep, Path(scratch))
        size = sum(entry.size for entry in tree.entries)
        task = progress.add_task("auditing", total=2 * size)
        audit = auditing.Audit(tree, deep=options.deep, progress=lambda size: progress.update(task, advance=size))
        if options.base:
            audit.compare(resolve(options.base, "--base"))
        if options.verify:
            audit.verify(options.verify)
        found = audit.finish()
    print(lineage.dump(found) if options.json else report.terminal(found, audit.lines))
    if options.out:
        write_reports(options.out, audit, found)
    sys.stdout.flush()
    sys.exit(found["status"])


if __name__ == "__main__":
    console.run(main)
