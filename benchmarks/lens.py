"""What a page of lens.py costs: `python bench.py lens`.

Seconds and peak memory of the whole command, its start included, each run a process of its own: the page of Qwen3-0.6B
(or random weights of its shape) with 64 tokens of prompt, 64 of reply and 16 parts taken out one by one; the bundled
model's page; and the architecture of Qwen3-235B-A22B from its config alone.
"""

import json
import sys
import tempfile
from pathlib import Path

import console
from benchmarks.common import ROOT, describe_machine, finish, header, start_worker
from benchmarks.convert import run
from benchmarks.report import cell, summary
from benchmarks.speed import find_model
from formats.source import BUNDLED_MODEL

TOKENS, PARTS = 64, ["go", "to", "it", "he", "me", "we", "us", "no", "do", "so", "up", "if", "or", "at", "by", "on"]
LARGEST = {
    **{"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288},
    **{"num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128},
    **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "dtype": "bfloat16"},
}


def prompt_of(model: str) -> str:
    """A prompt of 16 lines, which the model's template makes at least 64 tokens of."""
    from chat import Chat

    chat, lines = Chat.from_pretrained(model), [f"{word}." for word in PARTS]
    for at in range(4 * TOKENS):
        text = "\n".join(lines)
        if len(chat.render([{"role": "user", "content": text}], False)) >= TOKENS:
            break
        lines[at % len(lines)] = f"so {lines[at % len(lines)]}"
    return text


def commands(model: str, prompt: str, folder: Path) -> dict[str, list[str]]:
    """The arguments of lens.py for each page; a page's numbers go to PAGE.json."""
    config = folder / "config.json"
    config.write_text(json.dumps(LARGEST), encoding="utf-8")
    reply = ["--thinking", "off", "--max-new-tokens", str(TOKENS)]
    return {
        "the 0.6B shape": [prompt, "--model", model, *reply],
        "the bundled model": ["What is 47 * 8?", "--model", str(BUNDLED_MODEL)],
        "architecture of a 235B": ["--architecture", "--model", str(config)],
    }


def main(arguments: list[str]) -> None:
    parser = console.ArgumentParser(prog="bench.py lens", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", metavar="SRC", help="default: Qwen3-0.6B where it is cached, else random weights of its shape")
    add("--repeats", type=int, default=1, metavar="N", help="runs of each page (default: 1)")
    add("--out", type=Path, default=Path("runs/bench-lens"), metavar="PATH", help="default: runs/bench-lens")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        raise ValueError(f"--repeats {options.repeats}: give at least 1")
    rows, results = [], {}
    with start_worker() as worker, tempfile.TemporaryDirectory(prefix="bench-lens-") as folder:
        model, name = find_model(options.model, worker)
        machine = worker.submit(describe_machine).result()
        prompt = worker.submit(prompt_of, str(model)).result()
        for label, what in commands(str(model), prompt, Path(folder)).items():
            page, numbers, runs = Path(folder, "page.html"), Path(folder, "page.json"), []
            for _ in range(options.repeats):
                console.notice(f"{label}")
                command = [sys.executable, ROOT / "lens.py", *what, "--out", page, "--json", numbers]
                spent = run(command)
                runs.append({"wall": spent.wall, "processor": spent.processor, "peak_bytes": spent.peak})
            found = json.loads(numbers.read_text("utf-8"))
            begin, tokens = found.get("reply", 0), len(found.get("tokens", []))
            results[label] = {
                **{"runs": runs, "summary": summary(runs), "page_bytes": page.stat().st_size},
                **{"prompt": begin, "reply": tokens - begin, "parts": len(found.get("spans", []))},
            }
            of = results[label]
            figures = [cell(name, of["summary"][name]) for name in ("wall", "processor", "peak_bytes")]
            sizes = [str(of[name] or "") for name in ("prompt", "reply", "parts")]
            rows.append([label, *sizes, *figures, f"{of['page_bytes'] / 1e6:.2f}"])
    head = ["page of", "prompt", "reply", "parts", "seconds", "processor s", "peak MB", "page MB"]
    report = header(machine, "lens", arguments) | {"model": name, "results": results}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    finish(report, options.out, f"Pages of lens.py ({name})", {"Pages": [head, *rows]}, [])
