"""The pages are kept true: their commands run as printed and print what is shown; what they name exists.

A block marked `bash` or `python` runs, in the order of its page, in a copy of the repository; a `text` block right
after it is what it prints, with … for what differs from run to run. A block marked `sh` needs what a test has not (the
network, GPUs, a second machine): its flags and settings are looked up.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest
import transformers.models.qwen3.modeling_qwen3 as dense
import transformers.models.qwen3_moe.modeling_qwen3_moe as sparse

import model
from inference import terminal
from training import schema

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
OTHERS = ["configs/README.md", "models/tiny/README.md"]  # without blocks that run


class Block(NamedTuple):
    language: str
    text: str
    printed: str | None
    """The `text` block right behind it."""


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    fences = list(re.finditer(r"^```([^\n]*)\n(.*?)^```\n", text, re.DOTALL | re.MULTILINE))
    found = []
    for fence, after in zip_longest(fences, fences[1:]):
        follows = after and after[1] == "text" and text[fence.end() : after.start()] == "\n"
        found.append(Block(fence[1], fence[2], after[2] if follows else None))
    return found


def run(code: str, cwd: Path) -> subprocess.CompletedProcess:
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": binaries, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        ["bash", "-c", code],
        check=False,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What a clone has, in a folder that may be written to."""
    leave = shutil.ignore_patterns(".*", "runs", "wandb", "__pycache__", "*.egg-info")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("pages") / "nanoqwen", ignore=leave)


@pytest.mark.parametrize("page", [page for page in PAGES if "```bash" in (ROOT / page).read_text()])
def test_a_page_does_what_it_says(page, checkout):
    """What has --resume runs a second time, as it has to work with and without an earlier result."""
    for block in blocks(page):
        if block.language not in ("bash", "python"):
            continue
        code = block.text if block.language == "bash" else f"python -c {shlex.quote(block.text)}"
        ended = run(f"set -euo pipefail\n{code}", checkout)
        assert ended.returncode == 0, f"{code}\n{ended.stderr}"
        assert "Traceback" not in ended.stderr
        if block.printed is not None:
            pattern = ".*".join(map(re.escape, block.printed.split("…")))
            assert re.fullmatch(pattern, ended.stdout, re.DOTALL), f"{code}prints\n{ended.stdout}"
        resumed = [line for line in code.replace("\\\n", " ").splitlines() if "--resume" in line]
        if resumed:
            again = run("set -euo pipefail\n" + "\n".join(resumed), checkout)
            assert again.returncode == 0 and "Traceback" not in again.stderr, f"{resumed}\n{again.stderr}"


def test_its_first_output_is_what_make_run_prints():
    question = re.search(r"^QUESTION \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert f"*{question}*" in README
    result = run(f"python generate.py --model models/tiny --thinking {shlex.quote(question)}", ROOT)
    assert next(block.text for block in blocks("README.md") if not block.language) == result.stdout


SUBJECTS = "speed|train|tokens|convert|quality|sampling|lens|serve|start|xray|tokenize|inspect|download"
SUBJECTS += "|run|rescore|compare|report|perplexity|export|tasks"
PROGRAM = rf"python ([\w/]+\.py(?: (?:{SUBJECTS})\b)?)"
TEXTS = {page: (ROOT / page).read_text().replace("\\\n", " ") for page in [*PAGES, *OTHERS]}


@pytest.mark.parametrize("command", sorted({found for text in TEXTS.values() for found in re.findall(PROGRAM, text)}))
def test_every_flag_that_is_named_exists(command):
    known = set(re.findall(r"--[a-z][a-z-]+", run(f"python {command} --help", ROOT).stdout))
    used = {
        flag
        for text in TEXTS.values()
        for line in text.splitlines()
        if command in re.findall(PROGRAM, line)
        for flag in re.findall(r"[ (`](--[a-z-]+)", line.partition(command)[2].partition("|")[0])
    }
    assert known and used <= known | {"--help"}, used - known


def test_settings_of_runs_that_a_test_cannot_do_exist():
    lines = [
        line
        for page in PAGES
        for block in blocks(page)
        if block.language == "sh"
        for line in block.text.replace("\\\n", " ").splitlines()
        if "train.py" in line
    ]
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line.partition("train.py")[2], comments=True)
        config, overrides = words[0], [word for word in words[1:] if not word.startswith("--")]
        schema.load(ROOT / config, overrides)


def test_troubleshooting_quotes_messages_of_the_code():
    table = README.partition("| what you see | what it means |")[2].partition("\n\n")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    rooms = [ROOT / "model.py", *(ROOT / "formats").glob("*.py"), *(ROOT / "inference").glob("*.py")]
    code = "\n".join(path.read_text() for path in rooms)
    assert len(quoted) >= 5
    for text in quoted:
        for part in re.split(r"\.\.\.|\. |: ", text):
            assert part.strip(" .") in code, part


def test_the_chat_s_page_shows_its_help():
    page = (ROOT / "docs" / "chat.md").read_text()
    for name, (parameters, text) in terminal.COMMANDS.items():
        assert re.search(rf"^{re.escape(f'{name} {parameters}'.strip())} +{re.escape(text)}$", page, re.MULTILINE), name
    for keys, text in terminal.KEYS.items():
        assert re.search(rf"^{re.escape(keys)} +{re.escape(text)}$", page, re.MULTILINE), keys


def rows() -> list[list[str]]:
    page = (ROOT / "docs" / "learning.md").read_text()
    table = page.partition("| concept | place in model.py |")[2].partition("\n\n")[0]
    return [re.findall(r"`([^`]+)`", line) for line in table.splitlines()[2:]]


def lookup(module, path: str) -> bool:
    """`Class.name` is there: as an attribute of the class, or one that its __init__ sets."""
    owner, _, name = path.partition(".")
    if not hasattr(module, owner):
        return False
    source = Path(module.__file__).read_text().partition(f"class {owner}(")[2]
    return not name or hasattr(getattr(module, owner), name) or f"self.{name} = " in source


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_the_places_of_the_two_languages_exist(row):
    ours, theirs = row[:2]
    assert lookup(model, ours), f"model.py has no {ours}"
    modules = [dense, sparse, importlib.import_module("transformers")]
    assert any(lookup(module, theirs) for module in modules), f"transformers has no {theirs}"


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_links_and_named_files_exist(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (folder / target).exists(), target
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for name in re.findall(r"`([\w./-]+\.py|(?!runs/|\.)[\w.-]+/[\w./-]+\.(?:md|yaml|json|txt|h|cpp|jinja))`", prose):
        assert (ROOT / name).exists() or (folder / name).exists(), name


def test_the_map_names_what_exists_and_all_of_it():
    table = README.partition("| room | what lives there |")[2].partition("\n\n")[0]
    named = {name.rstrip("/") for name in re.findall(r"`([\w/]+(?:\.py|/))`", table)}
    assert all((ROOT / name).exists() for name in named), named
    there = {path.name for path in ROOT.glob("*.py")}
    there |= {
        path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/*") if path.suffix in (".py", ".md", ".yaml")
    }
    there -= {name for name in there if name.startswith(".")} | {"models"}  # models/tiny is named
    assert there <= named, f"README's map lacks {there - named}"
