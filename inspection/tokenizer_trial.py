"""A tokenizer tried out in a process of its own: whether it stays within time and memory on short texts.

tokenizer.json holds regular expressions and replacements. A pattern like `(a+)+$` takes exponential time, four
replacements of one letter by a thousand make a terabyte of a page, and neither can be stopped inside a process. This
file holds both sides: `problem_of`, and the child when it is run as a program.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CPU_SECONDS, SECONDS = 5, 60  # processor time; wall-clock time, for a busy machine
MEMORY = 900 << 20  # bytes of address space, where the system enforces it
PASSAGE = Path(__file__).resolve().parent.parent / "data" / "passage.txt"
LETTERS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
KNOWN = {  # Qwen's and GPT-2's, Llama 3's, GPT-4's
    LETTERS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    LETTERS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    LETTERS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


def patterns(tokenizer: dict[str, Any]) -> Iterator[str]:
    """Its regular expressions, and "" for each replacement that makes a text longer."""
    pending = [tokenizer.get(part) for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor")]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            if isinstance(pattern := value.get("Regex"), str):
                yield pattern
            content = value.get("content") if value.get("type") == "Replace" else value.get("prepend")
            if isinstance(content, str) and len(content) > 8:
                yield ""
            pending += value.values()


def problem_of(tokenizer: dict[str, Any], content: bytes) -> str | None:
    """What happens where a tokenizer.json, parsed and as bytes, is used; None where nothing does, or where its
    patterns are those of the published families."""
    try:
        own = set(patterns(tokenizer)) - KNOWN
    except RecursionError:
        return None
    if not own:
        return None
    with TemporaryDirectory(prefix="nanoqwen-audit-") as folder:
        (file := Path(folder) / "tokenizer.json").write_bytes(content)
        (probes := Path(folder) / "probes").write_text("".join(sorted(set("".join(own)))), "utf-8", "replace")
        command = [sys.executable, "-P", __file__, str(file), str(probes)]
        try:
            status = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False).returncode
        except subprocess.TimeoutExpired:
            return f"takes more than {SECONDS} s for a page of text"
    if status < 0:  # a signal: the kernel's, for time, or the library's own, for memory
        return f"takes more than {CPU_SECONDS} s or {MEMORY:,} bytes for a page of text"
    return None


def main(file: str, probes: str) -> None:
    """Encodes a page, and the runs that make patterns backtrack: of each character that stands in one."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = MEMORY if hard < 0 else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(file)
    characters = dict.fromkeys("a1 .\n" + Path(probes).read_text("utf-8"))
    for text in (PASSAGE.read_text("utf-8"), *(2000 * letter + end for letter in characters for end in ("", "\0"))):
        tokenizer.encode(text, add_special_tokens=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
