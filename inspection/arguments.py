"""The arguments of audit.py. Needs no PyTorch, unlike the rest of the audit."""

import argparse
from pathlib import Path

import console

EXAMPLES = """\
  python audit.py Qwen/Qwen3-0.6B                     a hub repository, read by range requests
  python audit.py DIR --out OUT                       with a report, a manifest and a bill of materials
  python audit.py model.gguf --base Qwen/Qwen3-0.6B   was this made from that? every byte, or which tensors differ
  python audit.py DIR --verify OUT                    is it still what the manifest in OUT says?

exit status:
  0  everything listed was examined; no finding is of medium or high severity
  1  findings of medium or high severity
  2  something could not be examined, or the command was used wrongly
"""


def parse_arguments() -> argparse.Namespace:
    parser = console.ArgumentParser(
        prog="audit.py",
        description="Read a model before it is run, and keep what is verified apart from what is claimed.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="directory, hub id (org/name or org/name@revision) or .gguf file")
    add("--base", metavar="SRC", help="the model that it is said to be made from: weights and template are compared")
    add("--verify", type=Path, metavar="DIR", help="compare it with the model_context.json of an earlier --out DIR")
    add("--out", type=Path, metavar="DIR", help="write model_context.json, audit.md, audit.html and bom.cdx.json there")
    add(
        "--deep",
        action="store_true",
        help="download a hub repository whole; measure perplexity and speed of models of any size",
    )
    add("--json", action="store_true", help="print the manifest instead of the summary")
    options = parser.parse_args()
    if options.base and options.verify:
        parser.error("--base and --verify: one comparison at a time")
    return options
