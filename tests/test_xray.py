"""xray.py at the terminal: what it prints and writes, and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from xray_sets import make, write_rows

import xray

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "models" / "tiny")


@pytest.fixture
def rows(tmp_path) -> Path:
    made = [make("dolly", i) for i in range(40)]
    made[3]["response"], made[5] = "ok", made[4]
    write_rows(tmp_path / "rows.jsonl", made)
    return tmp_path / "rows.jsonl"


@pytest.fixture
def run(monkeypatch, capsys):
    """run("rows.jsonl", "--json") -> exit status, standard output, standard error."""

    def run(*arguments):
        tokenizer = [] if "--tokenizer" in arguments else ["--tokenizer", TINY]
        monkeypatch.setattr(sys, "argv", ["xray.py", *map(str, arguments), *tokenizer])
        status = 0
        try:
            xray.main()
        except SystemExit as error:
            status = error.code
        return (status, *capsys.readouterr())

    return run


def test_the_summary(run, rows):
    status, out, _ = run(rows, "--mask-rows", 10)
    assert status == 0
    for said in ("40, all counted", "licence", "not stated", "short_response", "duplicate", "Train on it after fixes"):
        assert said in out


def test_what_is_written(run, rows, tmp_path):
    status, out, _ = run(rows, "--mask-rows", 10, "--out", tmp_path / "out", "--json")
    written = tmp_path / "out"
    assert status == 0
    assert json.loads(out) == json.loads((written / "xray.json").read_text())
    assert (written / "xray.html").read_text().startswith("<!doctype html>")
    assert (written / "xray.md").read_text().startswith("# X-ray of rows.jsonl")
    assert (written / "lengths-0.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("names", "status"),
    [(["duplicate"], 1), (["leakage"], 0), (["leakage,short_response"], 1), (["any"], 1), (["orphan", "duplicate"], 1)],
)
def test_fail_on(run, rows, names, status):
    found, out, said = run(rows, "--mask-rows", 0, "--near-rows", 0, "--fail-on", *names)
    assert found == status and "X-ray of" in out
    assert ("--fail-on" in said) == bool(status)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.jsonl"], "neither a file, nor a folder"),
        (["ROWS", "--split", "test"], "has the splits train"),
        (["ROWS", "--fail-on", "no_such_rule"], "no such rule"),
        (["ROWS", "--limit", "0"], "--limit 0"),
        (["ROWS", "--near", "2"], "--near 2"),
        (["ROWS", "--rules", "nowhere.yaml"], "no such file"),
        (["ROWS", "--fix", "rows.csv"], "give a folder, or a file"),
        (["ROWS", "--fix", "ROWS"], "is there already"),
        (["ROWS", "--sql", "DELETE FROM data"], "one SELECT"),
        (["ROWS", "--against", "nowhere.jsonl"], "neither a file"),
        (["ROWS", "--no-such-flag"], "no option --no-such-flag"),
        (["ROWS", "--model", "nowhere/at/all"], "^--model nowhere"),
        (["ROWS", "--tokenizer", "nowhere/at/all"], "^--tokenizer nowhere"),
    ],
)
def test_mistakes_are_one_line(run, rows, arguments, said):
    with pytest.raises(ValueError, match=said) as error:
        run(*(str(rows) if argument == "ROWS" else argument for argument in arguments))
    assert "\n" not in str(error.value)


def test_the_sql_console(run, rows):
    status, out, _ = run(rows, "--sql", "SELECT _row, _findings FROM data WHERE _duplicate_of = 4", "--json")
    assert (status, [json.loads(line) for line in out.splitlines()]) == (0, [{"_row": 5, "_findings": ["duplicate"]}])
    _, out, _ = run(rows, "--sql", "SELECT category, count(*) AS n FROM data GROUP BY category")
    assert [line.split() for line in out.splitlines()] == [["category", "n"], ["open_qa", "40"]]


def test_bits_under_a_model(run, rows):
    import math

    import torch

    from chat import Chat
    from data.sources import IGNORED, WrittenRows
    from inspection.xray.bits import bits_under
    from inspection.xray.masks import Mask
    from model import Qwen3

    _, out, _ = run(rows, "--model", TINY, "--limit", 4, "--sql", "SELECT _bits FROM data ORDER BY _row", "--json")
    found = [json.loads(line)["_bits"] for line in out.splitlines()]
    model, written = Qwen3.from_pretrained(TINY, dtype=torch.float32), WrittenRows(Chat.from_pretrained(TINY))
    measure = bits_under(model, 1024)
    for bits, line in zip(found, rows.read_text().splitlines(), strict=False):
        (row,) = written.conversation(json.loads(line))
        targets = torch.as_tensor(row.targets).long()
        with torch.inference_mode():
            logits = model(torch.as_tensor(row.ids).long()[None])[0]
        loss = float(torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED)) / math.log(2)
        assert measure(Mask([row])) == pytest.approx(loss, rel=1e-4)
        assert bits == pytest.approx(loss, rel=2e-2)  # the command computes in the checkpoint's bfloat16


def test_the_rows_of_a_training_run(run, rows, tmp_path):
    """A run's YAML gives its rows, limit, turns and sequence; the figures are those of what the run would learn."""
    from chat import Chat
    from training import schema
    from training.sources import build_source

    config = tmp_path / "run.yaml"
    config.write_text(
        f"stage: sft\ntrain: {{out: {tmp_path}/run, steps: 1, save_every: 1, batch: 4, accumulate: 2, sequence: 230}}\n"
        f"model: {{init: {TINY}, tokenizer: {TINY}}}\noptimizer: {{lr: 0.001}}\n"
        f"data: {{source: rows, train: '{tmp_path}/ro*.jsonl', limit: 30, pack: true}}\n"
    )
    status, out, _ = run(config, "--json")
    found = json.loads(out)
    assert (status, found["rows_read"], found["mask"]["sequence"]) == (0, 30, 230)
    settings = schema.load(config)
    source = build_source(settings, Chat.from_pretrained(TINY))
    assert found["mask"]["training_rows"] == len(source.items) > 0
    assert found["mask"]["target_tokens"] == sum(int((row.targets != -100).sum()) for row in source.items)
    assert found["mask"]["truncated_rows"] == 30 - len(source.items) > 0


def test_the_shards_of_a_training_run(run, tmp_path):
    """A YAML over .bin files: the run's pattern, its tokenizer and the rows that it cuts the files into."""
    import numpy as np

    from chat import Chat
    from data.shard_format import END_OF_TEXT, write_shard
    from training import schema
    from training.sources import build_source

    chat = Chat.from_pretrained(TINY)
    end, documents = chat.encode(END_OF_TEXT), [chat.encode(make("pretraining", i)["text"]) for i in range(9)]
    tokens = np.array([token for document in documents for token in (*end, *document)])
    write_shard(tmp_path / "part_0.bin", tokens[:200], 1024)  # a document goes on in the second file
    write_shard(tmp_path / "part_1.bin", tokens[200:], 1024)
    write_shard(tmp_path / "other.bin", tokens[:60], 1024)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"stage: pretrain\ntrain: {{out: {tmp_path}/run, steps: 1, save_every: 1, batch: 2, sequence: 48}}\n"
        f"model: {{init: {TINY}, tokenizer: {TINY}}}\noptimizer: {{lr: 0.001}}\n"
        f"data: {{source: shards, train: '{tmp_path}/part_*.bin'}}\n"
    )
    status, out, _ = run(config, "--json")
    found = json.loads(out)
    source = build_source(schema.load(config), chat)
    assert (status, found["shape"], found["rows"], found["intended_use"]) == (0, "shards", 9, "Texts for pretraining.")
    assert found["shards"]["tokens"] == source.tokens == len(tokens)
    assert (found["shards"]["sequence"], found["shards"]["training_rows"]) == (48, len(source.train))
    assert found["lengths"]["ids"]["tokens"]["total"] == sum(map(len, documents))


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo", "grpo"])
def test_a_run_on_the_generated_corpus(run, stage):
    from chat import Chat
    from training import schema
    from training.sources import build_source

    path = ROOT / "configs" / f"tiny-{stage}.yaml"
    status, out, _ = run(path, "--json", "--limit", 64, "--near-rows", 0)
    found = json.loads(out)
    shape = {"sft": "sft", "dpo": "preference", "grpo": "eval"}.get(stage, "pretraining")
    use, task = {
        "pretrain": ("pretraining", "pretraining"),
        "sft": ("supervised fine-tuning", "sft"),
        "dpo": ("preferences", "dpo"),
        "grpo": ("reinforcement learning", "grpo"),
    }[stage]
    assert use in found["intended_use"] and found["verdict"]["task"] == task
    assert (status, found["shape"], found["rows"], found["rows_read"]) == (0, shape, None, 64)
    assert not {finding["id"] for finding in found["findings"]} & {"zero_target", "missing_end", "special_tokens"}
    if stage == "sft":
        source = build_source(schema.load(path), Chat.from_pretrained(TINY))
        items = [item for step in range(64) for item in source.rows(step)][:64]
        assert found["mask"]["target_tokens"] == sum(sum(target != -100 for target in row.targets) for row in items)


def test_ctrl_c_gives_the_report_of_what_was_read(tmp_path):
    write_rows(tmp_path / "some.jsonl", [make("pretraining", i) for i in range(9000)])
    slow = "\n".join(
        [
            "import os, signal, sys, runpy",
            "sys.argv = ['xray.py', *sys.argv[1:]]",
            "from inspection.xray import reading",
            "whole = reading._part_batches",
            "def interrupted(*arguments):",
            "    for number, batch in enumerate(whole(*arguments)):",
            "        if number == 1: os.kill(os.getpid(), signal.SIGINT)",
            "        yield batch",
            "reading._part_batches = interrupted",
            "reading.BATCH_ROWS = 1000",
            "runpy.run_path('xray.py', run_name='__main__')",
        ]
    )
    flags = ["--json", "--near-rows", "0", "--mask-rows", "0", "--tokenizer", TINY]
    command = [sys.executable, "-c", slow, str(tmp_path / "some.jsonl"), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 130, done.stderr
    found = json.loads(done.stdout)
    assert (found["rows"], found["complete"]) == (None, False)
    assert found["rows_read"] in range(1000, 9000, 1000)  # the batches after it were being read already
    assert "the report will cover the rows read so far" in done.stderr
