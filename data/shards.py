"""Shards of token ids: look into them, make them, download them.

python data/shards.py inspect FILE... [--tokenizer SRC]      header, counts, document lengths, decoded samples
python data/shards.py tokenize SOURCE... --tokenizer SRC --out DIR      texts to shards (data/texts.py)
python data/shards.py download NUMBER... [--out DIR]      FineWeb's shards (data/fineweb.py)
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import console
from data import fineweb, inspection, texts


def main() -> None:
    parser = console.ArgumentParser(description="Shards of token ids: look into them, make them, download them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (inspection, texts, fineweb):
        module.add_command(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    console.run(main)
