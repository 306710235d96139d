"""bench.py train and tokens on tiny shapes: that peers learn the same, and what the reports say; no clock."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import tokens as bench_tokens
from benchmarks import train as bench_train

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    """What benchmarks/train.py prepares, of a shape in which an optimizer step takes milliseconds."""
    folder = tmp_path_factory.mktemp("shape")
    facts = bench_train.prepare(str(folder), bench_train.Shape(1700, 4, 32, bench_train.NARROW | TINY), 1)
    assert facts["parameters"] < facts["operations_per_token"] / 6 < 1.2 * facts["parameters"]
    return str(folder / "config.yaml")


def run_peer(name: str, config: str, precision: str, **environment: str) -> dict:
    job = bench_train.Job(config, precision, threads=1, steps=bench_train.AGREEMENT, tokens=128)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        printed = bench_train.run_script(*bench_train.SCRIPTS[name], "--measure", json.dumps(vars(job)))
    return json.loads(printed)


@pytest.fixture(scope="module")
def runs(config) -> dict[tuple[str, str], dict]:
    rows = [("nanoqwen", "f32"), ("transformers", "f32"), ("nanogpt", "f32")]
    return {row: run_peer(row[0], config, row[1], NANOGPT="") for row in rows}


def test_twenty_steps_of_both_loops_have_the_same_losses(runs):
    ours, theirs = (runs[name, "f32"]["losses"] for name in ("nanoqwen", "transformers"))
    assert len(ours) == len(theirs) == 20
    assert ours[0] - ours[-1] > 0.1
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4


def test_the_second_peer_learns_too(runs):
    losses = runs["nanogpt", "f32"]["losses"]
    assert losses[0] == pytest.approx(torch.tensor(1700.0).log().item(), abs=0.1) and losses[0] - losses[-1] > 0.1


def test_the_second_peer_is_gpt_2(monkeypatch):
    """Its logits are those of transformers' GPT-2 with the same weights (whose biases are zero)."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peers"))
    import train_nanogpt

    torch.manual_seed(0)
    ours = train_nanogpt.GPT(vocabulary=50, context=16, width=24, layers=2, heads=3)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}
    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "activation_function": "gelu"}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off, bos_token_id=0, eos_token_id=0))
    names = {"norm_1": "ln_1", "norm_2": "ln_2", "qkv": "attn.c_attn", "out": "attn.c_proj"}
    names |= {"up": "mlp.c_fc", "down": "mlp.c_proj"}
    state = theirs.state_dict()
    with torch.no_grad():
        state["transformer.wte.weight"].copy_(ours.tokens.weight)
        state["transformer.wpe.weight"].copy_(ours.positions.weight)
        for index, block in enumerate(ours.blocks):
            for name, weight in block.named_parameters():
                weight.mul_(1.5)
                place = state[f"transformer.h.{index}.{names[name.split('.')[0]]}.weight"]
                place.copy_(weight.T if weight.ndim == 2 else weight)
        ids, targets = torch.randint(50, (2, 11)), torch.randint(50, (2, 11))
        logits = theirs(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ours(ids, targets), expected)


def row(shape: str, engine: str, precision: str, speeds: list[float], losses: tuple = (), failed=None) -> dict:
    runs = [{"tokens_per_second": speed, "peak_bytes": 1e6 * speed} for speed in speeds]
    found = {"shape": shape, "engine": engine, "precision": precision, "runs": runs, "losses": list(losses)}
    return {**found, "failed": failed, "summary": bench_train.summary(runs)}


def test_what_a_report_says():
    rows = [
        row("gpt2", "nanoqwen", "f32", [200.0, 300.0, 800.0], (3.0, 2.0, 1.0)),
        row("gpt2", "transformers", "f32", [100.0, 200.0, 100.0], (3.0, 2.0625)),
        row("gpt2", "nanogpt", "f32", [], failed="no memory"),
        row("qwen3", "transformers", "f32", [50.0], (9.0,)),
    ]
    (ratio,) = bench_train.ratios(rows)
    assert ratio["summary"]["tokens_per_second"] == {"median": 2.0, "min": 1.5, "max": 8.0}
    assert bench_train.agreement(rows) == [{"shape": "gpt2", "steps": 2, "largest_difference": 0.0625}]
    report = {"rows": rows, "ratios": [ratio], "agreement": bench_train.agreement(rows), "absent": [], "facts": {}}
    report["settings"] = {"repeats": 3, "threads": 1, "steps": 5, "compile": False}
    speed, compared = bench_train.tables(report).values()
    assert [line[0] for line in speed[1:]] == [
        "nanoqwen f32, gpt2",
        "transformers f32, gpt2",
        "transformers f32, qwen3",
    ]
    assert speed[1][1:] == ["300 (200–800)", "300 (200–800)"]  # noqa: RUF001
    assert compared[1] == ["f32, gpt2: nanoqwen / transformers", "2.00 (1.50–8.00)", "2.00 (1.50–8.00)"]  # noqa: RUF001
    notes = "\n".join(bench_train.notes_of(report))
    assert "the first 2 steps of nanoqwen and transformers differ by 6.2e-02" in notes
    assert "Failed: gpt2/nanogpt/f32 (no memory)." in notes


def test_tokens_to_a_loss():
    curve = [(100, 5.0), (200, 4.0), (300, 4.1), (400, 3.0)]
    assert [bench_tokens.reached(curve, mark) for mark in (6.0, 4.0, 3.5, 2.0)] == [100, 200, 400, None]
    assert bench_tokens.combinations({"a": [1, 2], "b": [3]}) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]


def test_tokens_on_a_text(tmp_path):
    """A whole comparison in small; what is on record is not run again."""
    text = tmp_path / "words.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and runs away again " * 400)
    out = tmp_path / "out"
    code = "import sys, console; from benchmarks import tokens as b; "
    code += f"b.FORMS['small'] = b.Form(4, 16, 8, 4, b.SIZES | {TINY}, {{}}, {{}}); "
    code += "console.run(lambda: b.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--corpus", str(text), "--tokenizer", str(ROOT / "models" / "tiny")]
    command += ["--small", "--seeds", "1", "--out", str(out)]
    result = subprocess.run(command, check=False, cwd=ROOT, env={**os.environ}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "tokens.json").read_text())
    ends = {name: [curve[-1][0] for curve in curves] for name, curves in report["curves"].items()}
    assert ends == {f"{engine}, {name}": [512] for engine in ("nanoqwen", "transformers") for name in ("Muon", "AdamW")}
    assert report["mark"] == max(curve[-1][1] for curve in report["curves"][bench_tokens.MARK])
    assert None not in report["tokens"][bench_tokens.MARK]
    said = (out / "tokens.md").read_text()
    assert f"is a validation loss of {report['mark']:.4f}" in said
    assert "4 x 16 tokens a step, 512 in all" in said and "over 8 steps" in said
    assert f"words.txt: SHA-256 {hashlib.sha256(text.read_bytes()).hexdigest()}." in said

    (config,) = out.glob("texts-*/config.yaml")
    name = "nanoqwen, Muon"
    side = bench_tokens.Side(lambda *arguments: pytest.fail("this run is on record"), {}, {})
    settings, curves = report["settings"][name], report["curves"][name]
    assert bench_tokens.recorded(name, side, config, 0, settings, out) == curves[0]
    with pytest.raises(pytest.fail.Exception):
        bench_tokens.recorded(name, side, config, 1, settings, out)


def test_both_sides_take_the_same_steps_with_muon(config, monkeypatch):
    """From the same weights on the same rows, by the same schedule: PyTorch's Muon and ours. The first step moves."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peers"))
    import train_transformers as peer
    from transformers import AutoModelForCausalLM

    from model import Qwen3
    from training.batches import Batch
    from training.objectives import next_token_loss
    from training.optimizers import Optimizers, learning_rate_factor
    from training.schema import Optimizer, Schedule

    rows = bench_train.PeerRows(config)
    start, schedule = rows.settings.model.init, Schedule(**bench_tokens.SCHEDULE)
    model = Qwen3.from_pretrained(start, dtype=torch.float32)
    chosen = Optimizer(name="muon", lr=0.02, embedding_lr=0.01, betas=[0.9, 0.99], weight_decay=0.1)
    ours = Optimizers(model, chosen, torch.float32)
    theirs = peer.Loop(
        peer.Qwen3(AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)),
        0.01,
        [0.9, 0.99],
        0.1,
        "f32",
        0.02,
    )
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    for number in range(1, 7):
        factor = learning_rate_factor(number, 6, schedule)
        ids, targets = rows.training(number)
        loss = next_token_loss(model, Batch(ids, targets)) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ours.step(factor)
        assert theirs.step(ids, targets, factor) == pytest.approx(loss.item(), abs=5e-3)
        if number == 1:
            first = loss.item()
            assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
    assert loss.item() < first - 0.05


@pytest.mark.parametrize(
    ("program", "arguments", "said"),
    [
        (bench_train, ["--repeats", "0"], "--repeats 0: give a number from 1"),
        (bench_train, ["--steps", "2"], "--steps 2: give a number from 3 to 20"),
        (bench_train, ["--rows", "gpt3/*"], "--rows gpt3/*: no such row; there are qwen3/nanoqwen/f32,"),
        (
            bench_tokens,
            ["--corpus", "no.txt", "--tokenizer", "models/tiny", "--jobs", "0"],
            "--jobs 0: give at least 1",
        ),
        (bench_tokens, ["--tokenizer", "models/tiny"], "--corpus"),
    ],
)
def test_bad_flags_are_one_line(program, arguments, said):
    with pytest.raises(ValueError) as error:
        program.main(arguments)
    assert said in str(error.value) and "\n" not in str(error.value)
