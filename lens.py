"""What the model saw, on one page that opens offline: `python lens.py "Why is the sky blue?" --out lens.html`.

    prompt -> reply -> one watched pass, leave-one-out passes, gradients -> numbers -> one HTML file

What it is made of lives in inspection/lens/. The page's numbers are computed again by `--verify`.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import console

EXAMPLES = """\
  python lens.py "What is 47 * 8?" --out lens.html                 the bundled model where nothing else is at hand
  python lens.py --model SRC --answer "because ..." PROMPT         a text that somebody else wrote
  python lens.py --model SRC --architecture                        the model itself: headers are enough
  python lens.py --verify lens.html                                the page's numbers, computed again
"""


def parse_arguments(arguments: list[str]) -> Namespace:
    parser = console.ArgumentParser(
        prog="lens.py",
        usage="lens.py PROMPT [--model SRC] [--out FILE] [options]",
        description="Write one HTML page about a prompt, the model's reply, and what led to it.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="the question, or with --raw the beginning of a text")
    add("--model", metavar="SRC", help="directory, hub id, .gguf file; with --architecture also a config.json")
    add("--out", type=Path, metavar="FILE", help="the page (default: lens.html)")
    add("--json", type=Path, metavar="FILE", help="the same numbers for programs")
    add("--answer", metavar="TEXT", help="look at this reply instead of the model's own")
    add("--architecture", action="store_true", help="instead: a page about the model itself, from its headers alone")
    add("--verify", type=Path, metavar="FILE", help="instead: compute a page's numbers again and name what differs")
    add = parser.add_argument_group("the reply").add_argument
    add("--thinking", choices=("on", "off"), default="on", help="think before answering (default: on)")
    add("--system", metavar="TEXT", help="the system message")
    add("--raw", action="store_true", help="continue the text as it is, without a chat template (base models)")
    for name, kind in (("temperature", float), ("top_k", int), ("top_p", float), ("min_p", float)):
        add(f"--{name.replace('_', '-')}", type=kind, metavar="X", help="as in generate.py (default: greedy)")
    add("--seed", type=int, default=0, metavar="N", help="of a reply that is sampled (default: 0)")
    add("--max-new-tokens", type=int, default=200, metavar="N", help="at most N tokens (default: 200)")
    add = parser.add_argument_group("the numbers").add_argument
    spans = "which parts of the prompt are left out one by one (default: sentences)"
    add("--spans", choices=("sentences", "tokens"), default="sentences", help=spans)
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="float32", help="default: float32, in which --verify is exact")
    options = parser.parse_args(arguments)
    if sum(map(bool, (options.prompt is not None, options.architecture, options.verify))) != 1:
        raise ValueError('give a prompt, as in lens.py "Why is the sky blue?", or --architecture, or --verify FILE')
    if options.raw and options.system is not None:
        raise ValueError("--raw uses no chat template, so leave --system out")
    for name, file in (("--out", options.out), ("--json", options.json)):
        if file and file.is_dir():
            raise ValueError(f"{name} {file}: is a directory; give the name of a file in it")
    if options.json and options.out and options.json.resolve() == options.out.resolve():
        raise ValueError(f"--json {options.json}: is the file of --out too; give another name")
    from inference.params import sampling_flags

    options.sampling = {"temperature": 0.0, **sampling_flags(options)}
    return options


def write(options: Namespace, page: str, found: dict) -> None:
    from formats.files import write_text

    out = options.out or Path("lens.html")
    if options.json:
        write_text(options.json, json.dumps(found, ensure_ascii=False) + "\n")
    if options.out or not options.json:
        write_text(out, page)
    names = [str(file) for file in (options.json, out if options.out or not options.json else None) if file]
    console.notice(f"wrote {' and '.join(names)}" + (f"; open {out} in a browser" if page and out.exists() else ""))


def architecture(options: Namespace) -> None:
    from formats.source import BUNDLED_MODEL
    from inspection.lens.architecture import read_architecture
    from inspection.lens.pages import architecture_page

    found = {"schema": "nanoqwen/architecture/1", **read_architecture(options.model or str(BUNDLED_MODEL))}
    write(options, architecture_page(found), found)
    print(f"{found['parameters']:,} parameters in {found['blocks']} blocks, {found['bytes']:,} bytes")


def main() -> None:
    options = parse_arguments(sys.argv[1:])
    if options.architecture:
        architecture(options)
        return
    from inspection.lens.looking import look, verify

    if options.verify:
        if not verify(options.verify, options.model):
            sys.exit(1)
        return
    from inspection.lens.pages import lens_page

    found = look(options)
    write(options, lens_page(found), found)


if __name__ == "__main__":
    console.run(main)
