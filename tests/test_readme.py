"""The README is kept true: its commands are run, its table of places is looked up, its links lead somewhere."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import transformers.models.qwen3.modeling_qwen3 as dense
import transformers.models.qwen3_moe.modeling_qwen3_moe as sparse

import model

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", README, re.DOTALL | re.MULTILINE)


def shell(command: str, tmp_path: Path) -> subprocess.CompletedProcess:
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": binaries, "HF_HUB_OFFLINE": "1"}
    command = command.replace("OUT/", f"{tmp_path}/")
    return subprocess.run(
        command,
        shell=True,
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_its_commands_run_in_their_order(tmp_path):
    commands = [line for block in blocks("bash") for line in block.splitlines() if line]
    assert len(commands) > 5
    for command in commands:
        result = shell(command, tmp_path)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        assert "Traceback" not in result.stderr


def test_its_python_runs_and_answers(tmp_path):
    for block in blocks("python"):
        code = "\n".join(line.removeprefix("  ") for line in block.splitlines())
        result = shell(f"python -c {shlex.quote(code)}", tmp_path)
        assert result.returncode == 0 and "562" in result.stdout, result.stderr


def test_its_first_output_is_what_make_run_prints(tmp_path):
    question = re.search(r"^QUESTION \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    result = shell(f"python generate.py --model models/tiny --thinking {shlex.quote(question)}", tmp_path)
    assert blocks("")[0] == result.stdout


PROGRAM = r"python (\w+\.py(?: (?:speed|train|tokens|convert|quality)\b)?)"


@pytest.mark.parametrize("command", sorted(set(re.findall(PROGRAM, README))))
def test_every_flag_it_names_exists(command, tmp_path):
    known = set(re.findall(r"--[a-z][a-z-]+", shell(f"python {command} --help", tmp_path).stdout))
    used = {
        flag
        for line in README.splitlines()
        if command in re.findall(PROGRAM, line)
        for flag in re.findall(r"[ (`](--[a-z-]+)", line.partition(command)[2])
    }
    assert known and used <= known | {"--help"}, used - known


def rows() -> list[list[str]]:
    table = README.partition("| concept | place in model.py |")[2].partition("\n\n")[0]
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


def test_its_links_and_rooms_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    rooms = README.partition("| room | what lives there |")[2].partition("\n\n")[0]
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", rooms):
        assert (ROOT / name).exists(), name
