"""The arguments of audit.py. Needs no PyTorch, unlike the rest of the audit."""

import argparse
from pathlib import Path

import console


def parse_arguments() -> argparse.Namespace:
    parser = console.ArgumentParser(
        description="Reads a model before it is run, and keeps what is verified apart from what is claimed."
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="directory, hub id (org/name or org/name@revision) or .gguf file")
    add("--base", metavar="SRC", help="what it is said to be made from: weights and template are compared")
    add("--verify", type=Path, metavar="DIR", help="hold it against the model_context.json of an earlier --out DIR")
    add("--out", type=Path, metavar="DIR", help="write the manifest, the reports and the bill of materials")
    add("--deep", action="store_true", help="read a hub repository whole, and run models of any size")
    add("--json", action="store_true", help="print the manifest")
    options = parser.parse_args()
    if options.base and options.verify:
        parser.error("--base and --verify: one comparison at a time")
    return options
