"""Measure nanoqwen on this machine, beside what people would use instead: `python bench.py [SUBJECT] [options]`.

    python bench.py [speed]     tokens a second and memory of a model, with the machine's limits beside them
    python bench.py train       training: tokens a second and memory, beside transformers and nanoGPT
    python bench.py tokens      training: tokens to a validation loss, beside AdamW
    python bench.py convert     seconds of a conversion to GGUF, beside llama.cpp's tools
    python bench.py quality     what fewer bits cost
    python bench.py sampling    what choosing a token costs
    python bench.py start       seconds from the command to its first token
    python bench.py lens        seconds of a page of lens.py, from the start of the command
    python bench.py serve       the server beside llama.cpp's; --soak MINUTES: whether it lasts
    python bench.py xray        rows a second of a look at a data set, beside duckdb, datasets and tokenizers

`python bench.py SUBJECT --help` lists a subject's options; options without a subject are those of speed. Each
subject is a file in benchmarks/. Every table with its command and machine is in docs/RESULTS.md.
"""

import signal
import sys
from importlib import import_module

import console

SUBJECTS = ("speed", "train", "tokens", "convert", "quality", "sampling", "start", "lens", "serve", "xray")


def main() -> None:
    subject, *options = sys.argv[1:] or ["speed"]
    if subject.startswith("-"):  # options alone are those of the speed table
        if {"-h", "--help"} & set(sys.argv):
            print(__doc__)
        subject, options = "speed", sys.argv[1:]
    if subject not in SUBJECTS:
        raise ValueError(
            f"no subject {subject!r} (there are {', '.join(SUBJECTS)}){console.did_you_mean(subject, SUBJECTS)}"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no child and no written weights are left behind
    import_module(f"benchmarks.{subject}").main(options)


if __name__ == "__main__":
    console.run(main)
