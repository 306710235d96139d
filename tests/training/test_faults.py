"""What ends a run, and what may change when it is resumed."""

import errno
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from runs import CONFIG, Fault, in_child, in_processes, metrics, run, send, settings
from safetensors import SafetensorError
from safetensors.torch import load_file

import console
import train
import training.run
from data.corpus.tokenizer import TINY
from data.documents import read_records
from formats.tokenizer_files import load_tokenizer
from model import Qwen3
from ops import cross_entropy
from training.processes import Processes, Stop, one_line_failures
from training.run import disk_errors

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture
def answers(tmp_path) -> Path:
    """From the bundled model, on eight rows that serve sft, dpo and grpo."""
    rows = [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(1, 9)]
    rows = [row | {"prompt": row["question"], "chosen": f"{n + n}", "rejected": "No."} for n, row in enumerate(rows, 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = {"train": CONFIG["train"] | {"steps": 2, "save_every": 2}, "optimizer": {"name": "adamw", "lr": 3e-3}}
    changed |= {"data": {"source": "rows", "train": str(tmp_path / "rows.jsonl")}}
    changed |= {"model": {"init": str(TINY), "tokenizer": str(TINY)}}
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(CONFIG | changed))
    return path


# --- signals ---


def run_on_a_slow_disk(config: Path) -> None:
    """Each process writes down when it ends, and what it said."""
    rank, save = os.environ["RANK"], training.run.save_file

    def slow(*arguments) -> None:
        time.sleep(1.5)
        save(*arguments)

    training.run.save_file = slow
    with (config.parent / f"said-{rank}").open("w") as sys.stderr:
        try:
            run(config, "train.parallel=ddp", "train.steps=4")
        finally:
            (config.parent / f"ended-{rank}").write_text(str(time.time()))


def stop_rank_one(number: int) -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), number)
        time.sleep(0.05)


def test_all_processes_leave_after_the_save_and_one_speaks(answers):
    fault = Fault(2, stop_rank_one, (signal.SIGTERM,))
    assert in_processes(2, run_on_a_slow_disk, answers, fault=fault) == [143, 143]
    latest = answers.parent / "run" / "latest"
    assert latest.resolve().name == "step-00000002"
    assert float((answers.parent / "ended-1").read_text()) > latest.lstat().st_mtime
    assert "saved" in (answers.parent / "said-0").read_text()
    assert (answers.parent / "said-1").read_text() == ""


def interrupted_in_a_long_operation(said: Path) -> None:
    """What is said must be there when the operation ends: Python calls no handler before."""
    sys.stderr = said.open("w")
    size = 500
    while True:
        x, start = torch.randn(size, size), time.perf_counter()
        torch.mm(x, x)
        if time.perf_counter() - start > 0.4:
            break
        size = int(size * 1.5)
    sent = []

    def interrupt() -> None:
        time.sleep(0.05)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    torch.mm(x, x)
    if "SIGINT: finishing step 3, then saving; Ctrl-C again ends now" not in said.read_text():
        os._exit(9)


def test_ctrl_c_is_acknowledged_at_once(config):
    fault = Fault(3, interrupted_in_a_long_operation, (config.parent / "said",))
    assert in_child(run, config, fault=fault) == 130
    assert (config.parent / "run" / "latest").resolve().name == "step-00000003"


@pytest.fixture
def told_while_saving(monkeypatch):
    save = training.run.save_file

    def told(*arguments) -> None:
        save(*arguments)
        send(signal.SIGTERM)

    monkeypatch.setattr(training.run, "save_file", told)


@pytest.mark.usefixtures("told_while_saving")
def test_a_signal_during_a_save_ends_the_run_with_that_save(config):
    """One step more, and its save, might take longer than torchrun waits. The last save ends a finished run."""
    with pytest.raises(SystemExit, match="143"):
        run(config, "train.steps=2", "train.save_every=1")
    assert [record["step"] for record in metrics(config.parent / "run")] == [1]
    assert (config.parent / "run" / "latest").resolve().name == "step-00000001"
    assert len(run(config, "train.steps=2", "train.save_every=1", resume=True)) == 2
    assert (config.parent / "run" / "loss.png").exists()


def test_ctrl_c_after_any_signal_ends_at_once():
    for first in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with Stop(Processes("none", "cpu")) as stop:
            send(first)
            assert stop.signal == first and stop.asked()
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop(Processes("none", "cpu")) as stop:
            send(signal.SIGHUP)
            assert stop.signal == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- memory, and other processes ---


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore about it")


def run_and_say(config: Path, *words: str) -> None:
    """Ends with 7 if the error holds the words that this process should say."""
    try:
        run(config, "train.parallel=ddp")
    except ValueError as error:
        sys.exit(7 if words[int(os.environ["RANK"])] in str(error) else 8)


def test_out_of_memory_is_told_from_the_end_of_another_process(config):
    words = ("out of memory on cpu (CUDA out of memory. Tried to allocate 20.00 GiB.); cut", "another process")
    assert in_processes(2, run_and_say, config, *words, fault=Fault(2, out_of_memory, rank=0)) == [7, 7]


@pytest.mark.parametrize(
    ("changed", "advice"),
    [
        ([], "train.accumulate=4 (now 2)"),
        (["train.accumulate=4"], "train.checkpoint_activations=true"),
        (["train.accumulate=4", "train.checkpoint_activations=true"], "shorten train.sequence"),
    ],
)
def test_out_of_memory_has_advice(config, changed, advice):
    processes = SimpleNamespace(count=1, device="cpu")
    in_one_line = one_line_failures(settings(config, *changed), processes, Path("latest"))
    with pytest.raises(ValueError, match="out of memory") as caught, in_one_line:
        torch.empty(1 << 60, dtype=torch.int8)
    assert advice in str(caught.value) and "--resume" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "stage", "advice"),
    [
        ("train.begin", "sft", "take a smaller model or adapters (lora.rank) in a new run"),
        ("train.Optimizers", "sft", "take a smaller model"),
        ("training.stages.answer_logprobs", "dpo", "train.accumulate=4 (now 2), then --resume"),
        ("train.Trainer.validation", "sft", "train.accumulate=4 (now 2), then --resume"),
        ("training.stages.generate_batch", "grpo", "train.accumulate=4 (now 2), then --resume"),
    ],
)
def test_out_of_memory_is_one_line_wherever_it_happens(answers, monkeypatch, where, stage, advice):
    def full(*_, **__):
        raise MemoryError("not enough memory for 64 tokens")

    monkeypatch.setattr(where, full)
    chosen = [f"stage={stage}", "train.steps=1", "grpo.group=2", "grpo.max_new_tokens=8", "train.validate_batches=1"]
    with pytest.raises(ValueError, match=r"out of memory on cpu \(not enough memory for 64 tokens\)") as caught:
        run(answers, *chosen)
    assert advice in str(caught.value)


def test_out_of_memory_is_not_blamed_on_files(monkeypatch, capsys, tmp_path):
    """What fails for want of memory in a reader, and where nothing wraps it, is one line that says so."""

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr("formats.tokenizer_files.Tokenizer", SimpleNamespace(from_buffer=full))
    with pytest.raises(MemoryError):
        load_tokenizer("here", b"{}")
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", full)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MemoryError):
        list(read_records(str(tmp_path / "a.parquet"), "train", None))
    for failure, said in (
        (MemoryError(), "out of memory (in Python)"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "out of memory (Def",
        ),
        (RuntimeError("can't start new thread"), "the system allows no more threads (ulimit -u)"),
    ):
        with pytest.raises(SystemExit, match="2"):
            console.run(partial(raise_, failure))
        assert said in capsys.readouterr().err


def raise_(error: Exception) -> None:
    raise error


def test_too_many_processes_for_a_step_are_refused_before_anything_is_loaded(answers):
    chosen = settings(answers, "stage=grpo", "train.batch=8", "grpo.group=4")
    train.check_combinations(chosen, processes=2)
    with pytest.raises(ValueError, match=r"batch 8, 2 questions, is too small for 3 processes .* raise it to 12"):
        train.check_combinations(chosen, processes=3)
    for changed in (["train.accumulate=8"], ["train.accumulate=1", "train.batch=1"]):
        with pytest.raises(ValueError, match="too small for 2 processes"):
            train.check_combinations(settings(answers, *changed), processes=2)


@pytest.mark.parametrize("prompt", ["''", "word " * 1100], ids=["empty", "too long"])
def test_a_sample_prompt_that_the_model_cannot_take_is_refused_before_the_first_step(config, prompt):
    chosen = ["stage=pretrain", "train.sample_every=1", f"train.sample_prompts=[{prompt}]"]
    with pytest.raises(ValueError, match=r"train\.sample_prompts: .* the prompt"):
        train.Trainer(settings(config, *chosen), resume=False)


def test_a_defect_of_ours_keeps_its_traceback(config):
    processes = SimpleNamespace(count=2, device="cpu")
    in_one_line = one_line_failures(settings(config), processes, Path("latest"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), in_one_line:
        torch.zeros(2, 3) @ torch.zeros(2, 3)


# --- what may change on resume ---


def test_more_steps_in_smaller_pieces_and_all_that_changes_no_mathematics(config, capsys):
    run(config, "train.steps=4")
    changes = ["train.accumulate=4", "train.save_every=1", "train.keep=1", "train.checkpoint_activations=true"]
    changes += ["train.validate_every=3", "train.validate_batches=1", "train.kernels=torch", "train.threads=2"]
    records = run(config, "train.steps=6", *changes, resume=True)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert "train.steps 4 -> 6: from here on the schedule is that of 6 steps; step 5 has" in capsys.readouterr().err
    assert yaml.safe_load((config.parent / "run" / "config.yaml").read_text())["train"]["steps"] == 6
    with pytest.raises(ValueError, match=r"train\.steps 5 is less than the 6 of"):
        run(config, "train.steps=5", *changes, resume=True)


def test_smaller_pieces_give_the_same_losses(config):
    alone = run(config)
    (config.parent / "run").rename(config.parent / "alone")
    run(config, "train.steps=12", "train.save_every=6")
    for line in (config.parent / "run" / "checkpoints").iterdir():
        assert line.name in ("step-00000006", "step-00000012")
    (config.parent / "run" / "latest").unlink()
    (config.parent / "run" / "latest").symlink_to("checkpoints/step-00000006")
    resumed = run(config, "train.accumulate=4", "train.checkpoint_activations=true", resume=True)
    assert [r["loss"] for r in resumed] == pytest.approx([r["loss"] for r in alone], rel=1e-5)
    assert [r["tokens"] for r in resumed] == [r["tokens"] for r in alone]


def test_what_changes_the_mathematics_is_refused_with_what_would_happen(config):
    short = ("train.steps=1", "train.save_every=1", "train.validate_batches=1")
    run(config, *short)
    for change, why in (
        ("optimizer.lr=0.1", r"optimizer\.lr: 0\.006 -> 0\.1\): its remaining updates would not be those"),
        ("train.batch=8", r"train\.batch: 4 -> 8\): its remaining steps would take other rows"),
        ("train.dtype=bfloat16", r"train\.dtype"),
        ("data.seed=1", r"data\.seed: 0 -> 1\): its remaining steps would take other rows"),
        ("model.config.head_dim=16", r"model\.config\.head_dim: 8 -> 16\): its checkpoints hold the weights"),
        ("schedule.decay=0.1", r"schedule\.decay"),
        ("train.router_aux_loss_coef=0.1", r"router_aux_loss_coef: None -> 0\.1"),
    ):
        with pytest.raises(ValueError, match=why):
            run(config, *short, change, resume=True)


def test_another_tokenizer_is_refused(config):
    """The corpus has no file of rows, but its ids depend on the tokenizer and its template."""
    short, tokenizer = ("train.steps=1", "train.save_every=1", "train.validate_batches=1"), config.parent / "tokenizer"
    shutil.copytree(TINY, tokenizer)
    run(config, *short, f"model.tokenizer={tokenizer}")
    stated = json.loads((tokenizer / "tokenizer_config.json").read_text())
    stated["chat_template"] = stated["chat_template"].replace("user", "User")
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=r"data\.fingerprint: .* would take other rows"):
        run(config, *short, f"model.tokenizer={tokenizer}", resume=True)


def test_what_is_no_run_is_left_alone(config):
    out = config.parent / "run"
    out.write_text("a file")
    with pytest.raises(ValueError, match=r"train\.out .*run can't be a folder \(File exists\)"):
        run(config)
    out.unlink()
    out.mkdir()
    (out / "metrics.jsonl").write_text("somebody's")
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"metrics\.jsonl is not of a run .* \(no config\.yaml\)"):
            run(config, resume=resume)
    assert (out / "metrics.jsonl").read_text() == "somebody's"


def test_a_run_of_an_older_version_lacks_new_keys(config):
    short = ("train.steps=1", "train.save_every=1", "train.validate_batches=1")
    run(config, *short)
    path = config.parent / "run" / "config.yaml"
    saved = yaml.safe_load(path.read_text())
    del saved["train"]["router_aux_loss_coef"], saved["data"]["fingerprint"]
    path.write_text(yaml.safe_dump(saved))
    assert len(run(config, *short, resume=True)) == 1


def test_rows_may_be_moved_but_not_changed(answers):
    short = ("train.steps=1", "train.save_every=1")
    run(answers, *short)
    rows, other = answers.parent / "rows.jsonl", answers.parent / "moved.jsonl"
    rows.rename(other)
    assert len(run(answers, "train.steps=2", f"data.train={other}", "data.limit=8", resume=True)) == 2
    other.write_text("".join(other.read_text().splitlines(keepends=True)[::-1]))
    with pytest.raises(ValueError, match=r"data\.fingerprint: .* would take other rows"):
        run(answers, "train.steps=3", f"data.train={other}", "data.limit=8", resume=True)
    with pytest.raises(ValueError, match=r"data\.turns: 'all' -> 'last'"):
        run(answers, "train.steps=3", f"data.train={other}", "data.turns=last", resume=True)


def test_damaged_files_of_a_run_are_named_and_nothing_is_lost(config):
    """Each in one line that names it; the run continues once the file is whole again."""
    short = ("train.save_every=1", "train.validate_batches=1")
    run(config, *short, "train.steps=1")
    out = config.parent / "run"
    log = out / "metrics.jsonl"
    counters, tensors = out / "latest" / "trainer.json", out / "latest" / "trainer.safetensors"
    model = out / "latest" / "model.safetensors"
    damages = [(counters, text.encode()) for text in ("", "{", "{}", "[]", '{"step": "x", "tokens": 1}')]
    damages += [(tensors, b""), (tensors, tensors.read_bytes()[:900]), (log, b"{}\n"), (log, b"nonsense\n"), (log, b"")]
    damages += [(log, b"\xff\n"), (log, log.read_bytes().replace(b'"step": 1', b'"step": 2')), (model, b"cut")]
    for path, content in damages:
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(path.name)) as caught:
            run(config, *short, "train.steps=2", resume=True)
        assert "\n" not in str(caught.value) and path.read_bytes() == content
        path.write_bytes(whole)
    target = (out / "latest").readlink()
    (out / "latest").unlink()
    (out / "latest").symlink_to("checkpoints/gone")
    before = log.read_bytes()
    with pytest.raises(ValueError, match=r"latest: links to checkpoints/gone, which is not there; link another folder"):
        run(config, *short, "train.steps=2", resume=True)
    assert log.read_bytes() == before
    (out / "latest").unlink()
    (out / "latest").symlink_to(target)
    assert len(run(config, *short, "train.steps=2", resume=True)) == 2


def test_a_run_that_continues_from_an_earlier_checkpoint_keeps_its_own(config):
    """Of fewer checkpoints than before, the later ones that it does not continue from must not count."""
    run(config, "train.steps=3", "train.save_every=1", "train.keep=3")
    out = config.parent / "run"
    (out / "latest").unlink()
    (out / "latest").symlink_to("checkpoints/step-00000001")
    run(config, "train.steps=2", "train.save_every=1", "train.keep=1", resume=True)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    assert (out / "latest").resolve().name == "step-00000002"
    assert len(run(config, "train.steps=3", "train.save_every=1", "train.keep=1", resume=True)) == 3
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_full_disk_is_named_with_the_file(tmp_path):
    """An OSError has the paths of temporary files, safetensors a class of its own."""
    for error in (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "from", None, ".tmp"), SafetensorError(FULL)):
        with (
            pytest.raises(
                OSError, match=r"^out can't be written \(No space left on device\); make room, then"
            ) as caught,
            disk_errors(Path("out")),
        ):
            raise error
        assert "tmp" not in str(caught.value)
    with pytest.raises(OSError, match=r"out can't be written \(.*gone.*\); continue with"), disk_errors(Path("out")):
        Path("gone").stat()


FULL = 'Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'


@pytest.mark.parametrize("lora", [[], ["lora.rank=2"]], ids=["all weights", "lora"])
def test_dpo_of_more_steps_computes_the_missing_references(answers, lora):
    """Under the starting weights, so that they are those of a run that was as long from the beginning."""
    chosen = ["stage=dpo", "train.validate_batches=1", *lora]
    run(answers, *chosen, "train.steps=1", "train.save_every=1")
    run(answers, *chosen, "train.steps=2", "train.save_every=1", resume=True)
    saved = reference(answers.parent / "run")
    (answers.parent / "run").rename(answers.parent / "short")
    run(answers, *chosen, "train.steps=2")
    whole = reference(answers.parent / "run")
    assert saved.keys() == whole.keys() and len(whole) == 8
    for key, logprobs in whole.items():
        torch.testing.assert_close(saved[key], logprobs, rtol=1e-4, atol=1e-4)


def reference(out: Path) -> dict[bytes, torch.Tensor]:
    saved = load_file(out / "reference.safetensors")
    return dict(zip(map(bytes, saved["pairs"].numpy()), saved["logprobs"], strict=True))


# --- shares of the work ---


def test_grpo_takes_a_questions_replies_as_rows_and_writes_the_same_in_any_number_of_processes(answers):
    """Two questions of four replies are eight rows, enough for eight micro-batches."""
    chosen = ["stage=grpo", "train.batch=16", "grpo.group=4", "grpo.max_new_tokens=12", "grpo.thinking=false"]
    chosen += ["train.accumulate=16", "grpo.kl=0", "optimizer.lr=1e-4"]
    alone = run(answers, *chosen)
    (answers.parent / "run").rename(answers.parent / "alone")
    assert in_processes(2, run, answers, *chosen, "train.parallel=ddp") == [0, 0]
    for record, expected in zip(metrics(answers.parent / "run"), alone, strict=True):
        for name in ("reward", "length", "tokens", "format_errors"):
            assert record[name] == pytest.approx(expected[name], rel=1e-6)


def test_validation_is_shared_and_computes_no_gradients(config, monkeypatch):
    trainer = train.Trainer(settings(config), resume=False)
    whole = trainer.stage.validation_batches(0)
    rows = []
    for rank in range(3):
        trainer.stage.processes = SimpleNamespace(count=3, rank=rank, share=slice(rank, None, 3))
        shared = trainer.stage.validation_batches(0)
        assert len(shared) == 1  # as many as in the others, although one of them has two rows of the four
        rows += [len(batch.ids) for batch in shared]
    assert sum(rows) == sum(len(batch.ids) for batch in whole) == 4
    trainer.stage.processes = SimpleNamespace(count=5, rank=4, share=slice(4, None, 5))
    assert [len(batch.ids) for batch in trainer.stage.validation_batches(0)] == [4]  # fewer rows than processes

    needed, chunks = [], cross_entropy._in_chunks
    monkeypatch.setattr(cross_entropy, "_in_chunks", lambda *given: needed.append(given[4]) or chunks(*given))
    trainer.stage.processes = trainer.processes
    assert "validation_loss" in trainer.validation()
    assert set(needed) == {(False, False)}


# --- adapters over quantised weights ---


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantized(request, tmp_path_factory) -> Path:
    import convert

    out = tmp_path_factory.mktemp("quantized") / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert.py", "--model", str(TINY), "--to", request.param, "--out", str(out)])
        convert.main()
    return out


def test_adapters_over_quantised_weights(answers, quantized):
    """They learn, are merged into bfloat16, and a run that was killed ends with the same weights."""
    chosen = [
        "data.validation=null",
        "lora.rank=4",
        f"model.init={quantized}",
        "optimizer.lr=0.01",
        "train.dtype=bfloat16",
    ]
    whole = run(answers, *chosen, "train.steps=6")
    assert whole[-1]["loss"] < whole[0]["loss"]
    (answers.parent / "run").rename(answers.parent / "whole")
    fault = Fault(4, os._exit, (5,))
    assert in_child(run, answers, *chosen, "train.steps=6", fault=fault) == 5
    assert [r["loss"] for r in run(answers, *chosen, "train.steps=6", resume=True)] == [r["loss"] for r in whole]
    merged, base = Qwen3.from_pretrained(answers.parent / "run" / "latest"), Qwen3.from_pretrained(quantized)
    assert merged.config.quantization_config is None and merged.config.dtype == "bfloat16"
    name = "model.layers.0.mlp.down_proj"
    before, after = base.get_submodule(name).dequantize(), merged.get_submodule(name).weight
    factors = load_file(answers.parent / "run" / "latest" / "adapter" / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    assert torch.equal(after, (before + b @ a * (32 / 4)).bfloat16())
    other = Qwen3.from_pretrained(answers.parent / "whole" / "latest").state_dict()
    assert all(torch.equal(tensor, other[key]) for key, tensor in merged.state_dict().items())


def test_quantised_weights_are_not_trained_themselves(answers, quantized):
    with pytest.raises(ValueError, match=r"has quantised weights, .* \(lora\.rank=16\)"):
        run(answers, f"model.init={quantized}")
