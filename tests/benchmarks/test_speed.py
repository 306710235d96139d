"""bench.py on a tiny model: the arithmetic of its figures and that the three forms of a report agree, never a clock."""

import json
import os
import stat
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from benchmarks import report as bench_report
from benchmarks import speed as bench
from chat import Chat
from model import Config, Qwen3
from ops import limits

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """What bench.py writes where no real weights are at hand, of a tiny shape."""
    folder = tmp_path_factory.mktemp("bench")
    shape = folder / "shape.json"
    shape.write_text(json.dumps({**SIZES, **HEADS, "max_position_embeddings": 256, "tie_word_embeddings": True}))
    code = f"from benchmarks import speed as bench; from pathlib import Path; bench.SHAPE = Path({str(shape)!r})"
    code += f"; bench.write_random_model({str(folder / 'random')!r})"
    code += "; assert bench.model_facts(bench.SHAPE.with_name('random'))['active_parameters'] > 100_000"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    return folder / "random"


def run(out: Path, *arguments: str, llama: Path | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XDG_CACHE_HOME": str(out.parent / "cache"), "NANOQWEN_LLAMA_CPP": str(llama or "")}
    environment["PATH"] = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    command = [sys.executable, "bench.py", "--out", str(out), "--repeats", "1", "--threads", "1", *arguments]
    return subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)


LLAMA_BENCH = """#!{python}
import json, os, signal, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--repack" not in flags:
    os.kill(os.getpid(), signal.SIGILL)
if "bf16" in flags["-m"]:
    sys.exit("first\\nno such type")
assert open(flags["-m"], "rb").read(4) == b"GGUF" and flags["-t"] == "1" and flags["-o"] == "json"
speed = {{("128", "0", None): 640.0, ("0", "32", "32"): 80.0, ("0", "32", "128"): 8.0}}
speed = speed[flags["-p"], flags["-n"], flags.get("-d")]
print(json.dumps([{{"avg_ts": speed, "model_size": 1000, "model_n_params": 500}}]))
"""
LLAMA_BATCHED_BENCH = """#!{python}
import json, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert int(flags["-c"]) == 32 * (int(flags["-npp"]) + int(flags["-ntg"]))
print("loading")
for rows in map(int, flags["-npl"].split(",")):
    print(json.dumps({{"pl": rows, "speed_tg": 10.0 * rows}}))
"""


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory) -> Path:
    """The folder of one whole run, with everything that can be asked for and a llama-bench that does as it is told."""
    out = tmp_path_factory.mktemp("report") / "out"
    program = out.parent / "llama" / "bin" / "llama-bench"
    program.parent.mkdir(parents=True)
    for name, text in {"llama-bench": LLAMA_BENCH, "llama-batched-bench": LLAMA_BATCHED_BENCH}.items():
        program.with_name(name).write_text(text.format(python=sys.executable))
        program.with_name(name).chmod(stat.S_IRWXU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOQWEN_STEP", "off")  # tests/ops/test_step.py compiles it; here a run must only be short
        rows = ("--rows", "*/bf16", "nanoqwen/int8", "llama.cpp/q8_0")
        converted = ("--converted", str(out.parent / "converted"))
        result = run(
            out, "--model", str(checkpoint), "--deep", "--batch", *converted, *rows, llama=out.parent / "llama"
        )
    assert result.returncode == 0, result.stderr
    assert "nanoqwen bf16" in result.stdout and "Speed" in result.stdout
    assert not [path for path in (out.parent / "cache").rglob("*") if path.name.startswith("converted-")]
    return out


def test_each_figure_follows_from_the_runs(finished, checkpoint):
    report = json.loads((finished / "report.json").read_text())
    rows = {f"{row['engine']} {row['precision']}": row for row in report["rows"]}
    assert list(rows)[:3] == ["nanoqwen bf16", "nanoqwen int8", "transformers bf16"]
    weights = sum(tensor.nbytes for tensor in Qwen3.from_pretrained(checkpoint).state_dict().values())
    for name in list(rows)[:3]:
        assert not rows[name]["failed"], rows[name]["failed"]
        (figures,) = rows[name]["runs"]
        assert all(value > 0 for value in figures.values())
        assert {"decode_deep", "decode_batch_4", "decode_batch_32", "load"} < figures.keys()
        assert figures["share"] * figures["read_bandwidth"] == pytest.approx(figures["weight_bandwidth"])
        assert figures["weight_bandwidth"] == pytest.approx(figures["decode"] * figures["bytes_per_token"])
        assert figures["peak_bytes"] > weights
    ours, quantized, peer = (rows[name]["runs"][0] for name in list(rows)[:3])
    assert [ours["bytes_per_token"], peer["bytes_per_token"]] == pytest.approx([weights, weights], rel=1e-3)
    assert quantized["bytes_per_token"] < 0.9 * weights
    facts = report["model"]
    prompt = facts["active_parameters"] - facts["head_parameters"] * (1 - 1 / report["settings"]["prefill"])
    for rows in (4, 32):
        name = f"decode_batch_{rows}"
        reading = ours["read_bandwidth"] / ours["bytes_per_token"]
        multiplying = ours["prefill"] * prompt / facts["active_parameters"]
        assert ours[f"{name}_share"] == pytest.approx(ours[name] / min(rows * reading, multiplying))
    ratio, other = report["ratios"]
    assert (ratio["ours"], ratio["peer"]) == ("nanoqwen bf16", "transformers bf16")
    assert (other["ours"], other["peer"]) == ("nanoqwen int8", "llama.cpp q8_0")
    assert ratio["summary"]["decode"]["median"] == pytest.approx(ours["decode"] / peer["decode"])
    assert ratio["summary"]["load"]["median"] == pytest.approx(peer["load"] / ours["load"])


def test_the_limit_of_a_batch_is_the_slower_one_of_reading_and_multiplying():
    run = {"bytes_per_token": 500, "read_bandwidth": 5000, "prefill": 300, "decode_batch_4": 30, "decode_batch_32": 150}
    shares = bench_report.batch_shares(run, 1.5)  # 10 readings a second; 200 tokens' multiplications
    assert shares == pytest.approx({"decode_batch_4_share": 30 / 40, "decode_batch_32_share": 150 / 200})


def test_markdown_and_picture_show_the_same_report(finished):
    report = json.loads((finished / "report.json").read_text())
    text = (finished / "report.md").read_text()
    assert text == bench_report.markdown(report)
    assert "## Batches, and % of their limit" in text and "The limit of a batch" in text
    speed = text.partition("## Speed")[2].partition("##")[0]
    assert "batch" not in speed  # or it would be too wide for a terminal
    for row in (row for row in report["rows"] if row["runs"]):
        (line,) = [line for line in speed.splitlines() if line.startswith(f"| {bench_report.title(row)} |")]
        assert f" {bench_report.number(row['summary']['prefill']['median'])} |" in line
        assert f" {bench_report.number(row['summary']['peak_bytes']['median'] / 1e6)} |" in line
    for table in text.split("## ")[1:]:
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    picture = (finished / "roofline.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_llama_cpp_runs_on_what_convert_writes_and_a_failure_stays_in_the_report(finished, checkpoint):
    report = json.loads((finished / "report.json").read_text())
    failed, measured = (row for row in report["rows"] if row["engine"] == "llama.cpp")
    assert measured["failed"] is None, measured["failed"]
    (figures,) = measured["runs"]
    assert [figures[name] for name in ("prefill", "decode", "decode_deep")] == [640.0, 80.0, 8.0]
    assert figures["repacked"] == 0
    assert "crashes here: llama.cpp q8_0." in (finished / "report.md").read_text()
    assert [figures[f"decode_batch_{rows}"] for rows in (4, 8, 16, 32)] == [40.0, 80.0, 160.0, 320.0]
    kept = (path.name for path in (finished.parent / "converted").glob("*/*"))
    assert {"bf16.gguf", "int8", "q8_0.gguf"} < set(kept)
    parameters = sum(tensor.numel() for tensor in Qwen3.from_pretrained(checkpoint).state_dict().values())
    assert figures["bytes_per_token"] == pytest.approx(2 * parameters, rel=1e-3)  # this file has 2 bytes a weight
    assert failed["failed"] == "llama-bench ended with status 1: no such type" and not failed["runs"]
    assert f"Failed: llama.cpp bf16 ({failed['failed']})." in (finished / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--repeats", "0"], "--repeats 0: give a number from 1"),
        (["--threads", "99999"], "--threads 99999: give a number from 1"),
        (["--rows", "nanoqwen/int3"], "--rows nanoqwen/int3: no such row; there are nanoqwen/f32,"),
        (["--rows", "llama.cpp/*"], "none of them can run here. Not installed"),
        (["--model", "no/such/place"], "--model no/such/place: no such directory"),
        (["--out", "bench.py/out"], "bench.py/out"),
        (["--batch", "5"], "5 is not one of 4, 8, 16, 32"),
        (["--isa", "avx3"], "'avx3' is not one of native, avx2, avx-vnni"),
        (["--speed", "high"], "there is no option --speed"),
    ],
)
def test_bad_flags_are_one_line(arguments, said, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.shutil, "which", lambda name, path=None: None)
    with pytest.raises((ValueError, OSError)) as error:
        bench.main(["--out", str(tmp_path), *arguments])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_command_ends_with_status_2(tmp_path):
    result = run(tmp_path, "--rows", "all")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_random_weights_have_the_official_shape_and_norms_around_one(checkpoint):
    official = Config.from_json(bench.SHAPE)
    assert (official.hidden_size, official.intermediate_size, official.num_hidden_layers) == (1024, 3072, 28)
    model = Qwen3.from_pretrained(checkpoint)
    norm = model.model.layers[0].input_layernorm.weight.float()
    assert model.model.norm.weight.dtype is torch.bfloat16
    assert 0.02 < norm.std() < 0.3 and 0.9 < norm.mean() < 1.1
    assert Chat.from_pretrained(checkpoint).render(bench.QUESTION)


def test_a_measured_process_holds_one_conversation(checkpoint):
    """Else its peak would be that of two caches, which no user has."""
    engine = bench.Nanoqwen(bench.Job(threads=1, prefill=8, tokens=1, model=str(checkpoint), precision="bf16"))
    engine.load()
    with torch.inference_mode():
        first = engine.new_cache(1, 8)
        engine.next([[5, 6]], first)
        first = weakref.ref(first.keys[0])
        assert first() is not None
        engine.new_cache(1, 8)
    assert first() is None


def test_figures_of_several_rounds():
    ours = {"engine": "nanoqwen", "precision": "int8", "device": "cpu", "runs": [{"decode": 6.0, "load": 1.0}]}
    ours["runs"] += [{"decode": 8.0, "load": 2.0}, {"decode": 100.0, "load": 2.0}]
    peer = {"engine": "llama.cpp", "precision": "q8_0", "device": "cpu", "runs": [{"decode": 3.0}, {"decode": 2.0}]}
    other = {**peer, "precision": "bf16"}
    (ratio,) = bench_report.ratios([peer, ours, other])
    assert ratio["ours"] == "nanoqwen int8" and ratio["peer"] == "llama.cpp q8_0"
    assert ratio["summary"] == {"decode": {"median": 3.0, "min": 2.0, "max": 4.0}}
    assert bench_report.summary(ours["runs"])["load"] == {"median": 2.0, "min": 1.0, "max": 2.0}
    assert bench_report.cell("share", {"median": 0.901, "min": 0.8, "max": 1.25}) == "90.1 (80.0–125)"  # noqa: RUF001
    assert bench_report.cell("peak_bytes", {"median": 1.5e9, "min": 1.5e9, "max": 1.5e9}) == "1,500"


def test_the_machine_is_measured_by_what_it_did(monkeypatch):
    """With a clock that says each run takes a quarter of a second, the rates are known."""
    ticks = iter(range(1000))
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(ticks) / 4)
    monkeypatch.setattr(limits, "MEASURED_BYTES", 1 << 12)
    monkeypatch.setattr(limits, "library", lambda: None)  # its readers have a clock of their own
    assert limits.read_bandwidth() == 4 * (1 << 12)
    assert limits.matrix_rate(torch.float32) == 4 * 2 * 1024**3


def test_limits_leave_the_threads_as_they_were(monkeypatch):
    monkeypatch.setattr(limits, "MEASURED_BYTES", 1 << 12)
    monkeypatch.setattr(limits, "matrix_rate", lambda dtype, device: float(torch.get_num_threads()))
    before = torch.get_num_threads()
    found = limits.limits(3)
    assert torch.get_num_threads() == before
    cpu = {name: limit["matrix_rate"]["bf16"] for name, limit in found.items() if limit["device"] == "cpu"}
    assert cpu == {"1 thread": 1, "2 threads": 2, "3 threads": 3}
