"""What other tools say to the repositories of tests/repositories.py: makes the table of docs/audit-scanners.md.

    python -m venv /tmp/scanners && /tmp/scanners/bin/pip install picklescan==1.0.5 modelscan==0.8.8
    PYTHONPATH=.:tests python tests/scanners.py --scanners /tmp/scanners/bin > docs/audit-scanners.md

The two scanners get an environment of their own: modelscan wants an older `rich`. They see the whole corpus in one run
each; transformers' and safetensors' own loading is asked of each repository, never with trust_remote_code.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import safetensors
import torch
import transformers
from repositories import CASES, Case, build
from test_chat import write_checkpoint

from inspection import auditing, behaviour
from inspection.tree import local_tree
from model import Config, Qwen3

HEAD = """# The corpus of audit.py, and what other tools say to it

{count} pairs of small repositories that differ in one thing (tests/repositories.py). For each tool: what it says to the
bad one, and in brackets what it says to its harmless twin where that is not "nothing", or "loads". "Nothing" is no
fault where a tool never promised to look: picklescan and modelscan look for pickles, safetensors reads one kind of
container, transformers loads. `audit.py` found {found} of {count} under the name in the second column and accused
{accused} of the twins.

Made by the commands in the head of `tests/scanners.py`
with picklescan {picklescan}, modelscan {modelscan}, transformers {transformers} (never with
trust_remote_code) and safetensors {safetensors}. Found, or refused to load, of {count}: {totals}.

| bad repository | audit.py | picklescan | modelscan | transformers | safetensors |
|---|---|---|---|---|---|
"""


def make_checkpoint(path: Path) -> Path:
    """The small model of tests/conftest.py."""
    write_checkpoint(path)
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = Qwen3(Config(**sizes, **heads, max_position_embeddings=256, tie_word_embeddings=True))
    model.generation_config = {"eos_token_id": [2, 0]}
    model.save_pretrained(path)
    return path


def audit(path: Path, case: Case) -> tuple[str, bool]:
    """(what it says, whether it accuses)."""
    ledger = auditing.Audit(local_tree(path)).ledger
    accusations = {finding.id for finding in ledger.accusations()} - set(case.also_good)
    found = {finding.id for finding in ledger.findings}
    said = case.finding if case.finding in found else ", ".join(sorted(accusations)) or "nothing"
    return said, bool(accusations or list(ledger.unexamined()))


def repository_of(path: str, corpus: Path) -> str | None:
    match = re.search(rf"{re.escape(str(corpus))}/([\w-]+)", path)
    return match[1] if match else None


def picklescan(scanners: Path, corpus: Path) -> dict[str, str]:
    command = [scanners / "picklescan", "-p", corpus, "-l", "WARNING"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    said: dict[str, str] = {}
    for line in (result.stdout + result.stderr).splitlines():
        name = repository_of(line, corpus)
        if name and "FOUND" in line:
            said[name] = "dangerous" if "dangerous" in line else said.get(name, "suspicious")
        elif name and ("ERROR" in line or "rror" in line):
            said.setdefault(name, "error")
    return said


def modelscan(scanners: Path, corpus: Path) -> dict[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [scanners / "modelscan", "-p", corpus, "-r", "json", "-o", report.name]
        subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        found = json.loads(Path(report.name).read_text())
    said: dict[str, str] = {}
    for error in found.get("errors", []):
        if name := repository_of(f"{corpus}/{error.get('source', '')}", corpus):
            said[name] = "error"
    for issue in found.get("issues", []):
        if name := repository_of(f"{corpus}/{issue['source']}", corpus):
            said[name] = issue["severity"].lower()
    return said


def load(path: Path) -> str:
    """transformers: the tokenizer, the model and one rendered message."""
    try:
        options = {"trust_remote_code": False, "local_files_only": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        transformers.AutoModelForCausalLM.from_pretrained(path, **options)
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        return f"refuses ({type(error).__name__})"
    return "loads"


def open_safetensors(path: Path) -> str:
    for file in sorted(path.rglob("*.safetensors")):
        try:
            with safetensors.safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
                    opened.get_tensor(name)
        except Exception as error:
            return f"refuses ({type(error).__name__})"
    return "loads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scanners", type=Path, required=True, help="folder of the commands picklescan and modelscan")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    behaviour.measure = lambda path: {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        checkpoint = make_checkpoint(Path(folder) / "checkpoint")
        # Pipes and holes would stop the tools that open whatever they find.
        cases = [case for case in CASES if case.finding not in ("special-file", "sparse-file")]
        pairs = [(case, [build(corpus, case, bad, checkpoint) for bad in (True, False)]) for case in cases]
        scanned = picklescan(options.scanners, corpus), modelscan(options.scanners, corpus)
        rows, totals, found, accused = [], Counter(), 0, 0
        for case, (bad, good) in pairs:
            said, (_, accuses) = audit(bad, case)[0], audit(good, case)
            found, accused = found + (said == case.finding), accused + accuses
            cells = [case.name.replace("_", " "), f"`{said}`"]
            for tool, answers in zip(("picklescan", "modelscan"), scanned, strict=True):
                ours, twin = answers.get(bad.name, "nothing"), answers.get(good.name, "nothing")
                totals[tool] += ours not in ("nothing", "error")
                cells.append(ours if twin == "nothing" else f"{ours} ({twin})")
            for tool, ask in (("transformers", load), ("safetensors", open_safetensors)):
                ours, twin = ask(bad), ask(good)
                totals[tool] += ours != "loads"
                cells.append(ours if twin == "loads" else f"{ours} ({twin})")
            rows.append(f"| {' | '.join(cells)} |")
    versions = {name: version(name) for name in ("transformers", "safetensors")}
    for name in ("picklescan", "modelscan"):
        command = [
            options.scanners / "python",
            "-c",
            f"from importlib.metadata import version; print(version('{name}'))",
        ]
        versions[name] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    shown = ", ".join(f"{name} {totals[name]}" for name in ("picklescan", "modelscan", "transformers", "safetensors"))
    print(HEAD.format(count=len(rows), found=found, accused=accused, totals=shown, **versions) + "\n".join(rows))


if __name__ == "__main__":
    main()
