"""Settings, objectives, and a run that is killed at the worst moments."""

import json
import math
import os
import shutil
import signal
import socket
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from runs import (
    CONFIG,
    ROOT,
    SAID,
    Fault,
    fill_disk,
    in_child,
    in_processes,
    kill,
    killed_while_saving,
    metrics,
    run,
    run_or_say,
    send,
    settings,
)
from torch import nn

import training.run
from data.sources import Corpus, Generated, row_of
from model import Config, Qwen3
from ops import cross_entropy
from training import optimizers, schema
from training.objectives import IGNORED, Batch, linear_cross_entropy, next_token_loss
from training.optimizers import Muon, Optimizers, learning_rate_factor, orthogonal
from training.prefetch import Prefetcher
from training.reporting import headline
from training.sources import decide_source


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> list[dict]:
    """The metrics of a run that never stopped."""
    path = tmp_path_factory.mktemp("unbroken") / "test.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return run(path)


def losses(records: list[dict]) -> list[tuple[int, float, int]]:
    return [(record["step"], record["loss"], record["tokens"]) for record in records]


# --- settings ---


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_loads(path):
    loaded = schema.load(path)
    assert training.run.differences(schema.resolved(loaded), schema.resolved(schema.load(path))) == {}
    if loaded.model.config:
        Config(vocab_size=1000, **{k: v for k, v in loaded.model.config.items() if k != "vocab_size"})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stpes=3", "did you mean train.steps?"),
        ("trian.steps=3", "did you mean train?"),
        ("train.steps=many", "train.steps is 'many', but must be a whole number"),
        ("train.steps=2.5", "must be a whole number"),
        ("train.steps=true", "must be a whole number"),
        ("train.steps=0", "must be at least 1"),
        ("optimizer.lr=.nan", "must be at least 0"),
        ("optimizer.lr=-1", "must be at least 0"),
        ("optimizer.name=adam", "did you mean adamw?"),
        ("schedule.decay=2", "from 0 to 1"),
        ("optimizer.lr=.inf", "optimizer.lr is inf, but must be at least 0"),
        ("optimizer.weight_decay=.inf", "must be at least 0"),
        ("optimizer.betas=[0.9, 2]", "optimizer.betas is [0.9, 2.0], but must be from 0 to 1"),
        ("optimizer.betas=[0.9, x]", "must be a list"),
        (
            "train.seed=99999999999999999999",
            "train.seed is 99999999999999999999, but must be from 0 to 9223372036854775807",
        ),
        ("train.threads=100000", "must be from 0 to 1024"),
        ("train.compile=1", "must be true or false"),
        ("train.sample_prompts=[1]", "must be a list"),
        ("train=5", "not a section"),
        ("train.steps.x=5", "train.steps.x=5: steps is a value, not a section"),
        ("train.steps", "has no '='"),
        ("train.steps=[", "not YAML"),
        ("train.keep=012", "must be a whole number"),
        ("train.keep=1:30", "train.keep is '1:30', but must be a whole number"),
        ("data.pack=yes", "must be true or false"),
        ("train.out=", "train.out is None, but must be a string"),
        ("train.out=''", "train.out is empty"),
        ("data=[]", "data is [], not a section"),
    ],
)
def test_bad_settings_are_refused_with_the_mend(config, override, said):
    with pytest.raises(ValueError) as caught:
        settings(config, override)
    assert said in " ".join(str(caught.value).split())


def test_a_required_key_must_be_given(config):
    config.write_text("stage: sft\n")
    with pytest.raises(ValueError, match=r"train\.out must be given"):
        schema.load(config)


def test_numbers_as_yaml_1_2_has_them(config):
    assert settings(config, "optimizer.lr=6e-3").optimizer.lr == 0.006
    assert settings(config, "optimizer.lr=1").optimizer.lr == 1.0
    assert settings(config, "optimizer.lr=.5E-3").optimizer.lr == 0.0005
    assert settings(config, "train.wandb=off").train.wandb == "off"


def test_texts_are_taken_as_they_stand(config):
    """In YAML these are aliases, comments, tags, dates and booleans."""
    for text in ("*.jsonl", "a #b", "!x", "@x", "&x", "a: b", "2024-01-01", "yes", "1e3", "a=b"):
        assert settings(config, f"data.train={text}").data.train == text
    assert settings(config, "data.train='1e3'").data.train == "1e3"
    assert settings(config, "data.train=null").data.train is None


def test_the_saved_settings_are_read_as_they_were(config):
    """A hash may look like a number: 12345678e1234567 once ended a run's resumption."""
    for text in ("12345678e1234567", "1e3", "012", "off", "1:30", "null", "2024-01-01", "0x1", ".inf", "{", "é\n"):
        given = settings(config, "train.clip=1e-5")
        given.data.fingerprint = text
        config.write_text(schema.as_yaml(given))
        assert schema.load(config) == given


def test_a_config_is_read_whole_or_refused(config):
    config.write_text(text := schema.as_yaml(settings(config)))
    config.write_text(text + "optimizer: {lr: 1}\n")
    with pytest.raises(ValueError, match="the key optimizer is given twice"):
        schema.load(config)
    config.write_bytes(text.encode() + b"# \xe9")
    with pytest.raises(ValueError, match=r"test\.yaml: not YAML"):
        schema.load(config)
    config.write_text(text, "utf-16")
    assert schema.load(config).optimizer.lr == CONFIG["optimizer"]["lr"]


def test_rows_that_the_corpus_would_not_read_are_refused(config):
    """configs/tiny-sft.yaml has data.source corpus: rows named beside it were once left out without a word."""
    with pytest.raises(ValueError, match=r"data\.train names rows\.jsonl, but data\.source corpus generates its rows"):
        decide_source(settings(config, "data.source=corpus", "data.train=rows.jsonl"))
    decide_source(settings(config, "data.source=rows", "data.train=rows.jsonl"))


def test_the_key_table_has_every_key():
    table = schema.table()
    assert "train.save_every* (a whole number from 1; required): steps between checkpoints" in table
    assert {line.split("*")[0].strip() for line in table.splitlines() if "* (" in line} == schema.may_change()
    assert table.endswith("* --resume accepts another value; every other key must keep the one that the run began with")
    assert "optimizer.embedding_lr (a number or null from 0; default null)" in table
    sections = schema.fields(schema.Settings)[1:]
    assert len(table.splitlines()) == 3 + sum(2 + len(schema.fields(section.type)) for section in sections)


# --- objectives ---


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_loss_and_gradients_are_those_of_the_whole(chunk):
    torch.manual_seed(0)
    x, weight = torch.randn(23, 12, dtype=torch.float64), torch.randn(50, 12, dtype=torch.float64)
    x, weight = x.float().requires_grad_(), weight.float().requires_grad_()
    targets = torch.randint(50, (23,))
    whole = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    expected = torch.autograd.grad(whole * 0.3, (x, weight))
    loss = linear_cross_entropy(x, weight, targets, chunk)
    found = torch.autograd.grad(loss * 0.3, (x, weight))
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(found, expected)


def test_chunked_loss_under_autocast_keeps_float32_sums():
    torch.manual_seed(0)
    x, weight, targets = torch.randn(9, 8).requires_grad_(), torch.randn(11, 8).requires_grad_(), torch.arange(9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(x @ weight.T, targets, reduction="sum"), rtol=2e-2, atol=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_taken_at_the_targets_alone(tied):
    torch.manual_seed(1)
    fields = CONFIG["model"]["config"] | {"tie_word_embeddings": tied}
    model = Qwen3(Config(vocab_size=31, **fields))
    ids, targets = torch.randint(31, (2, 6)), torch.full((2, 6), IGNORED)
    targets[0, 3], targets[1, 5] = 4, 9
    batch = Batch(ids, targets)
    loss = next_token_loss(model, batch)
    logits = model(ids)
    expected = F.cross_entropy(logits[0, 3:4], targets[0, 3:4]) + F.cross_entropy(logits[1, 5:6], targets[1, 5:6])
    assert batch.count == 2
    torch.testing.assert_close(loss, expected)


def test_an_answer_is_learnt_and_its_prompt_is_not():
    assert row_of([1, 2, 3], [4, 5]) == ([1, 2, 3, 4], [IGNORED, IGNORED, 4, 5])


# --- the loop's parts ---


def test_schedules():
    def factors(**given):
        return [learning_rate_factor(step, 100, schema.Schedule(**given)) for step in range(1, 101)]

    wsd = factors(warmup=0.1, decay=0.3, final=0.1)
    assert wsd[0] == 0.1 and wsd[9:70] == [1.0] * 61 and wsd[-1] == pytest.approx(0.1 + 0.9 / 30)
    assert all(a > b for a, b in pairwise(wsd[70:]))
    cosine = factors(name="cosine", warmup=0.1)
    assert cosine[9] == 1.0 and cosine[54] == pytest.approx(0.5) and cosine[-1] == pytest.approx(0.0)
    assert factors(warmup=0.0, decay=0.0) == [1.0] * 100


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_weight_is_trained_by_exactly_one_optimizer(config, name):
    model = Qwen3(Config(vocab_size=31, **CONFIG["model"]["config"] | {"tie_word_embeddings": False}))
    optimizers = Optimizers(model, schema.Optimizer(name=name, lr=0.1, embedding_lr=0.2), torch.float32)
    groups = [(kind, group) for kind, optimizer in optimizers.all.items() for group in optimizer.param_groups]
    owners = [id(p) for _, group in groups for p in group["params"]]
    assert sorted(owners) == sorted(id(p) for p in model.parameters())
    for kind, group in groups:
        names = {optimizers.names[id(p)] for p in group["params"]}
        norms = all("norm" in name for name in names)
        assert (group["weight_decay"] == 0) == norms
        assert (group["lr"] == 0.1) == all(".layers." in name and "norm" not in name for name in names)
        assert (kind == "muon") == (name == "muon" and group["lr"] == 0.1)


@pytest.mark.parametrize("changed", [{}, {"nesterov": False}, {"eps": 100.0}, {"ns_steps": 2}], ids=str)
@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_muon_steps_as_pytorch_does(monkeypatch, shape, changed):
    """Which does all in bfloat16. Also where a shape's matrices are not taken all at once, and one has no gradient."""
    monkeypatch.setattr(optimizers, "TOGETHER", 2 * shape[0] * shape[1])
    torch.manual_seed(0)
    given = [torch.randn(shape) for _ in range(4)]
    ours, theirs = ([nn.Parameter(p.clone()) for p in given] for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9} | changed
    exact = [nn.Parameter(p.clone()) for p in given]
    steppers = (
        (ours, Muon(ours, torch.bfloat16, **settings)),
        (exact, Muon(exact, torch.float32, **settings)),
        (theirs, torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)),
    )
    for _ in range(3):
        gradients = [torch.randn(shape) for _ in given[:3]]
        for weights, stepper in steppers:
            for p, gradient in zip(weights, gradients, strict=False):
                p.grad = gradient.clone()
            stepper.step()
    for own, precise, other in zip(ours, exact, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=2e-3)
        torch.testing.assert_close(precise, other, rtol=0, atol=1e-2)
    assert torch.equal(ours[3], given[3])


def test_muons_float32_products_keep_the_last_bit_of_a_gradient_small():
    torch.manual_seed(0)
    gradient = torch.randn(1, 48, 32)
    nudged = gradient * (1 + 1e-7 * torch.randn_like(gradient))
    coefficients = (3.4445, -4.7750, 2.0315)
    made, other = (orthogonal(x, coefficients, 5) for x in (gradient, nudged))
    assert (made - other).abs().max() < 2e-6
    singular = torch.linalg.svdvals(made)
    assert singular.min() > 0.6 and singular.max() < 1.25


def test_validation_rows_are_no_training_rows():
    class Chat:
        def render(self, messages, thinking):
            return list(str(messages).encode())

        def encode(self, text):
            return list(text.encode())

    source = Generated(Corpus(0, lambda word: [word], Chat()).conversation, 4, 999)
    trained = {str(row) for step in range(50) for row in source.rows(step) if len(row.ids) > 150}
    assert len(trained) > 20
    assert not trained & {str(row) for index in range(5) for row in source.validation_rows(index)}


# --- runs ---


def test_a_run_learns_and_leaves_a_checkpoint_that_transformers_opens(config):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records = run(config, "train.steps=30", "train.save_every=30", "train.validate_batches=1")
    assert [record["step"] for record in records] == list(range(1, 31))
    assert records[-1]["loss"] < 0.75 * records[0]["loss"]
    assert all(a["tokens"] < b["tokens"] for a, b in pairwise(records))
    assert math.isfinite(records[-1]["validation_loss"])
    out = config.parent / "run"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    theirs, ours = AutoModelForCausalLM.from_pretrained(out / "latest"), Qwen3.from_pretrained(out / "latest")
    ids = AutoTokenizer.from_pretrained(out / "latest")("How many r?", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_run_and_the_last_two_checkpoints_are_kept(config, unbroken):
    assert losses(run(config)) == losses(unbroken)
    out = config.parent / "run"
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    assert (out / "latest").resolve().name == "step-00000012"


def test_one_checkpoint_is_kept_if_asked_for(config):
    run(config, "train.keep=1", "train.steps=2", "train.save_every=1", "train.validate_batches=1")
    assert [path.name for path in (config.parent / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_killed_twice_and_resumed_is_bit_identical(config, unbroken):
    """After step 6 (two steps past a checkpoint), and while the checkpoint of step 8 is half written."""
    assert in_child(run, config, fault=Fault(7, kill)) == -signal.SIGKILL
    assert [record["step"] for record in metrics(config.parent / "run")] == list(range(1, 7))
    with (config.parent / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert in_child(run, config, resume=True, fault=killed_while_saving) == -signal.SIGKILL
    assert losses(run(config, resume=True)) == losses(unbroken)
    assert not list((config.parent / "run" / "checkpoints").glob(".*"))


def test_killed_before_the_first_checkpoint(config, unbroken):
    assert in_child(run, config, fault=killed_while_saving) == -signal.SIGKILL
    assert losses(run(config, resume=True)) == losses(unbroken)


def test_recomputed_activations_change_nothing(config, unbroken):
    assert losses(run(config, "train.checkpoint_activations=true")) == losses(unbroken)


def test_autocast_stays_near_float32(config, unbroken):
    records = run(config, "train.dtype=bfloat16")
    assert [record["loss"] for record in records] != [record["loss"] for record in unbroken]
    assert records[-1]["loss"] == pytest.approx(unbroken[-1]["loss"], rel=0.02)
    weights = Qwen3.from_pretrained(config.parent / "run" / "latest").state_dict().values()
    assert all(weight.dtype == torch.float32 for weight in weights)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_first(config, unbroken, number):
    assert in_child(run, config, fault=Fault(6, send, (number,))) == 128 + number
    assert (config.parent / "run" / "latest").resolve().name == "step-00000006"
    assert losses(run(config, resume=True)) == losses(unbroken)


def test_resuming_another_config_is_refused_with_the_difference(config):
    run(config, "train.steps=2", "train.save_every=2")
    with pytest.raises(ValueError, match=r"optimizer\.lr: 0\.006 -> 0\.1"):
        run(config, "train.steps=2", "train.save_every=2", "optimizer.lr=0.1", resume=True)
    with pytest.raises(ValueError, match="already holds a run"):
        run(config, "train.steps=2", "train.save_every=2")


def test_a_loss_that_is_no_number_ends_the_run_with_the_last_checkpoint_whole(config):
    with pytest.raises(ValueError, match=r"step \d+: the loss is .*last good checkpoint"):
        run(config, "optimizer.lr=1e30", "train.save_every=1", "train.clip=0", "schedule.warmup=0")
    Qwen3.from_pretrained(config.parent / "run" / "latest")


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(config, unbroken):
    assert in_child(run_or_say, config, OSError, str(config.parent), fault=Fault(6, fill_disk, (20_000,))) == SAID
    assert (config.parent / "run" / "latest").resolve().name == "step-00000004"
    assert losses(run(config, resume=True)) == losses(unbroken)


# --- many processes ---


@pytest.mark.parametrize(
    ("parallel", "optimizer"), [("ddp", "muon"), ("ddp", "adamw"), ("fsdp", "muon"), ("fsdp", "adamw")]
)
def test_two_processes_give_the_losses_of_one(config, tmp_path, parallel, optimizer):
    """Also when the first half was done by one process alone: checkpoints are whole, however the model was cut."""
    chosen = f"optimizer.name={optimizer}"
    alone = run(config, chosen)
    (tmp_path / "run").rename(tmp_path / "alone")

    assert in_child(run, config, chosen, fault=Fault(5, sys.exit, (5,))) == 5
    assert in_processes(2, run, config, chosen, f"train.parallel={parallel}", resume=True) == [0, 0]
    records = metrics(tmp_path / "run")
    assert [record["tokens"] for record in records] == [record["tokens"] for record in alone]
    for record, expected in zip(records, alone, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    Qwen3.from_pretrained(tmp_path / "run" / "latest")


def test_a_dead_process_ends_the_others_in_one_line(config):
    parallel, dies = "train.parallel=ddp", Fault(6, kill, rank=1)
    ends = in_processes(2, run_or_say, config, ValueError, "another process", parallel, fault=dies)
    assert ends == [SAID, -signal.SIGKILL]
    assert (config.parent / "run" / "latest").resolve().name == "step-00000004"


def test_processes_and_config_must_agree(config, monkeypatch):
    with pytest.raises(ValueError, match="start with torchrun"):
        run(config, "train.parallel=ddp")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"train\.parallel is none; set ddp or fsdp"):
        run(config)


def test_the_progress_line_keeps_the_validation_loss_and_shows_no_mfu_where_there_is_none():
    record = {"loss": 2.0, "reward": 0.5, "tokens_per_second": 1234.5}
    assert headline(record, 2.25) == "loss 2.0000  validation 2.2500  reward 0.500  1,234 tokens/s"
    assert headline(record | {"mfu": 0.4}, None) == "loss 2.0000  reward 0.500  1,234 tokens/s  MFU 40%"


# --- what a run may ask for besides ---


def run_without_network(config: Path) -> None:
    """With sockets that lead nowhere but to this machine."""
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            os._exit(9)
        return connect(self, address)

    socket.socket.connect = refuse
    os.environ |= {"WANDB_BASE_URL": "http://192.0.2.1", "WANDB_SILENT": "true"}
    run(config, "train.steps=3", "train.wandb=offline", "train.validate_batches=1")


def test_wandb_offline_gets_the_records_of_the_metrics_and_no_network(config):
    """wandb's own file is read back."""
    pytest.importorskip("wandb")
    assert in_child(run_without_network, config) == 0
    (file,) = (config.parent / "run" / "wandb").glob("offline-run-*/*.wandb")
    logged = wandb_history(file)
    assert [{**record, "step": index} for index, record in enumerate(logged, 1)] == metrics(config.parent / "run")


def wandb_history(path: Path) -> list[dict]:
    """What was logged to an offline run, without wandb's own keys.

    Its file is a LevelDB log behind 7 bytes of its own: blocks of 32 KB of pieces, each of checksum (4 bytes), length
    (2), kind (1; 1 a whole record, 2 to 4 its first, middle and last piece) and data.
    """
    from wandb.proto import wandb_internal_pb2

    data, at, found, record = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            message, record = wandb_internal_pb2.Record.FromString(record), b""
            if message.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in message.history.item}
                found.append({name: json.loads(value) for name, value in items.items() if not name.startswith("_")})
    return found


def run_and_look_for_wandb(config: Path) -> None:
    run(config, "train.steps=1")
    sys.exit("wandb" in sys.modules)


def test_wandb_off_imports_nothing(config):
    assert in_child(run_and_look_for_wandb, config) == 0


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile on a CPU needs a C++ compiler"
)
def test_compiled_blocks_train_alike_and_resume(config):
    """The same losses within rounding; resumed from a checkpoint, bit-identical to its own kind."""
    short = ("train.steps=4", "train.save_every=2", "model.config.num_hidden_layers=1", "train.validate_batches=1")
    eager, out = losses(run(config, *short)), config.parent / "run"
    shutil.rmtree(out)
    whole = losses(run(config, *short, "train.compile=true"))
    assert [loss for _, loss, _ in whole] == pytest.approx([loss for _, loss, _ in eager], rel=1e-4)
    Qwen3.from_pretrained(out / "latest")  # names without torch.compile's prefix
    (out / "latest").unlink()
    (out / "latest").symlink_to("checkpoints/step-00000002")
    assert losses(run(config, *short, "train.compile=true", resume=True)) == whole


def test_pieces_of_the_loss_are_small_and_give_the_whole(monkeypatch):
    """As with a large vocabulary, where a group of rows for the caches is a part of a chunk, and a last one shorter."""
    monkeypatch.setattr(cross_entropy, "CACHED", 3 * 50)
    torch.manual_seed(0)
    x, weight = torch.randn(23, 12).requires_grad_(), torch.randn(50, 12).requires_grad_()
    targets, shares = torch.randint(50, (23,)), torch.rand(23)
    expected = F.cross_entropy(x @ weight.T, targets, reduction="none")
    gradients = torch.autograd.grad((expected * shares).sum(), (x, weight))
    single = linear_cross_entropy(x, weight, targets, chunk=10, reduction="none")
    torch.testing.assert_close(single, expected)
    torch.testing.assert_close(torch.autograd.grad((single * shares).sum(), (x, weight)), gradients)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets, chunk=10)
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-2, atol=0.1)
    exact = torch.autograd.grad(F.cross_entropy(x @ weight.T, targets, reduction="sum"), (x, weight))
    torch.testing.assert_close(torch.autograd.grad(loss, (x, weight)), exact, rtol=0.05, atol=0.1)


def test_logits_far_apart_lose_nothing():
    """Softmax is 0 in float32 where the wanted logit is 200 below the highest; its loss is not infinite."""
    logits = torch.tensor([[0.0, 200.0, 1.0], [5.0, 5.0, 5.0]])
    targets = torch.tensor([0, 2])
    loss = linear_cross_entropy(logits, torch.eye(3), targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, reduction="sum"))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_several_batches_of_each_process_are_summed_before_they_are_shared(config, tmp_path, optimizer):
    chosen = "train.accumulate=4", f"optimizer.name={optimizer}"
    alone = run(config, *chosen)
    (tmp_path / "run").rename(tmp_path / "alone")
    assert in_processes(2, run, config, *chosen, "train.parallel=ddp") == [0, 0]
    for record, expected in zip(metrics(tmp_path / "run"), alone, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_rows_made_ahead_are_those_of_their_step():
    class Source:
        def __init__(self):
            self.asked = []

        def rows(self, step, share):
            self.asked.append(step)
            if step == 7:
                raise ValueError("a bad row")
            return [0, step][share]

        def validation_rows(self, index):
            return [-index]

    source = Source()
    ahead = Prefetcher(source, end=9, share=slice(1, None, 2))
    assert [ahead.rows(step) for step in (0, 1, 5, 6)] == [[0], [1], [5], [6]]  # a resumed run begins anywhere
    assert ahead.validation_rows(3) == [-3]
    assert source.asked == [0, 1, 2, 5, 6, 7]
    with pytest.raises(ValueError, match="a bad row"):
        ahead.rows(7)
    assert ahead.rows(8) == [8] and source.asked[-1] == 8  # there is no step 9
