"""The arguments of train.py, apart from the training: reading them needs no PyTorch."""

from argparse import Namespace
from pathlib import Path

import console
from training import schema

EXAMPLES = """\
  python train.py configs/toy.yaml                                             a first run
  python train.py configs/toy.yaml --set train.steps=200 train.out=runs/first  with other settings
  python train.py configs/toy.yaml --resume                                    continue after an interruption
  python train.py --keys                                                       what a config may say
"""


def parse_arguments() -> Namespace:
    """The command line. `--keys` is answered here, and ends the process."""
    parser = console.ArgumentParser(
        usage="train.py CONFIG.yaml [--set KEY=VALUE ...] [--resume]",
        description="Train a Qwen3 by a YAML config.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("config", nargs="?", type=Path, metavar="CONFIG.yaml", help="the settings; examples are in configs/")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys of the config")
    add("--resume", action="store_true", help="continue from OUT/latest (default: begin, and refuse a used folder)")
    add("--keys", action="store_true", help="list every key of a config with its default and its values, and exit")
    arguments = parser.parse_args()
    if arguments.keys:
        print(schema.table())
        parser.exit()
    if arguments.config is None:
        raise ValueError("no config given; python train.py configs/toy.yaml")
    return arguments
