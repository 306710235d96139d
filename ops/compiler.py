"""The C++ compiler of this machine, for whatever is compiled when it is first used."""

import os
import shutil


def find_compiler() -> str | None:
    """The path of $CXX, or of the first of c++, g++ and clang++ that is installed; None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
