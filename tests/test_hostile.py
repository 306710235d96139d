"""Bad input, through the real command: each case ends in its line and exit status 2, leaves no file, runs no code.

A case is a change to a good checkpoint (or a list of flags) and the words that its line must have: what is wrong, where
it came from, and how to fix it where that is not plain. Most run in this process; a few also as a process of its own.
"""

import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import launch
import pytest
import torch
from safetensors.torch import load_file, save_file

import console
import convert
import generate
from ops.cpu.library import library

ROOT = Path(__file__).resolve().parent.parent
ADDRESS_SPACE = 6 << 30  # bytes that a process of its own may map: PyTorch alone takes most of a gigabyte
SECONDS = 120  # after which a command hangs; they take two or three on a quiet machine


# ---- how a case is run ----


def run_here(arguments: list, monkeypatch, capsys, stdin: bytes = b"") -> str:
    """The one line of an error of `python generate.py ARGUMENTS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
    return end_of(generate.main, capsys)


def end_of(main: Callable[[], None], capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        console.run(main)
    return the_line(ended.value.code, *capsys.readouterr())


def run_apart(arguments: list, stdin: bytes = b"") -> str:
    """The same in a process with bounded memory."""
    command = [*launch.COMMAND, "--memory", str(ADDRESS_SPACE), sys.executable, str(ROOT / "generate.py")]
    command += [a if isinstance(a, bytes) else str(a) for a in arguments]
    ended = subprocess.run(
        command,
        check=False,
        input=stdin,
        capture_output=True,
        timeout=SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    return the_line(ended.returncode, ended.stdout.decode(), ended.stderr.decode())


def the_line(code: int, out: str, err: str) -> str:
    assert code == 2, (code, out, err)
    assert out == "", out
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert re.match(r"(generate|convert)\.py: error: ", err), err
    assert err.rstrip("\n").isprintable() and len(err) < 1200, err
    return err


def assert_words(line: str, words: str) -> None:
    """`words`: parts of the line, in this order, with " ... " between them."""
    assert re.search(".*".join(map(re.escape, words.split(" ... "))), line), f"{line!r} lacks {words!r}"


def files_below(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*")}


@pytest.fixture(autouse=True, scope="module")
def compiled():
    """The C++ step, so that no case's line follows the notice that it is being compiled."""
    library()


@pytest.fixture(autouse=True)
def no_hang():
    """A case that hangs in this process fails instead (on a clock that only a hang reaches)."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the command hangs"))
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def untemplated(checkpoint) -> Path:
    """Without a chat template, so that no process is started for it; enough where the mistake lies elsewhere."""
    (checkpoint / "tokenizer_config.json").unlink()
    return checkpoint


def end_in_one_line(case, checkpoint: Path, monkeypatch, capsys) -> None:
    break_it, words = case
    break_it(checkpoint)
    before = files_below(checkpoint.parent)
    monkeypatch.chdir(checkpoint.parent)
    started = time.process_time()
    line = run_here(["--model", checkpoint, "--raw", "hi"], monkeypatch, capsys)
    assert time.process_time() - started < 5
    assert_words(line, words)
    assert str(checkpoint) in line or "generation_config.json: " in line
    assert files_below(checkpoint.parent) == before


# ---- what strangers' files can hold ----


class Mark:
    """An object whose unpickling makes a file: code that ran."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def replaced(file: str, content: bytes | str) -> Callable[[Path], None]:
    content = content.encode() if isinstance(content, str) else content
    return lambda path: (path / file).write_bytes(content)


def removed(file: str) -> Callable[[Path], None]:
    return lambda path: (path / file).unlink()


def edited(file: str, **fields) -> Callable[[Path], None]:
    """A JSON file with these fields; `...` takes one out."""

    def edit(path: Path) -> None:
        content = json.loads((path / file).read_text()) | fields
        content = {name: value for name, value in content.items() if value is not ...}
        (path / file).write_text(json.dumps(content))

    return edit


def config(**fields) -> Callable[[Path], None]:
    return edited("config.json", **fields)


def generation(**fields) -> Callable[[Path], None]:
    return edited("generation_config.json", **fields)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """model.safetensors with its tensors changed."""

    def rewrite(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return rewrite


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header(*entries: tuple[str, str, list, list], data: int = 64) -> Callable[[Path], None]:
    """A whole safetensors file whose header has these entries (name, dtype, shape, data_offsets)."""
    table = {name: {"dtype": dtype, "shape": shape, "data_offsets": at} for name, dtype, shape, at in entries}
    return replaced("model.safetensors", safetensors(table, bytes(data)))


def cut(file: str, size: int) -> Callable[[Path], None]:
    """A file of this size: of that many bytes, or of so many fewer if negative."""
    return lambda path: os.truncate(path / file, size if size >= 0 else (path / file).stat().st_size + size)


def appended(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / file).write_bytes((path / file).read_bytes() + content)


def in_place_of(file: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        (path / file).unlink()
        make(path / file)

    return replace


def linked(file: str, target: str) -> Callable[[Path], None]:
    return in_place_of(file, lambda path: path.symlink_to(target))


def pickled(file: str, remove: str = "model.safetensors") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / remove).unlink()
        (path / file).write_bytes(pickle.dumps(Mark(path / "code-ran")))

    return write


def pickled_by_torch(file: str, zipped: bool) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        torch.save({**tensors, "x": Mark(path / "code-ran")}, path / file, _use_new_zipfile_serialization=zipped)

    return write


def sharded(change: Callable[[dict[str, str], Path], object] = lambda weight_map, path: None) -> Callable[[Path], None]:
    """model.safetensors in two shards with an index, whose weight_map is then changed."""

    def write(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        weight_map = {name: shards[index % 2] for index, name in enumerate(sorted(tensors))}
        for shard in shards:
            save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, path / shard)
        change(weight_map, path)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return write


def shard_named(name: str) -> Callable[[Path], None]:
    return sharded(lambda weight_map, path: weight_map.update({"model.norm.weight": name}))


NORM = "model.norm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
FIRST, SECOND = ("a", "F32", [8], [0, 32]), ("b", "F32", [8], [32, 64])

WEIGHTS = {
    "no weights": (removed("model.safetensors"), "no weights ... model.safetensors"),
    "empty file": (replaced("model.safetensors", b""), "model.safetensors ... empty, so its download did not finish"),
    "seven bytes": (replaced("model.safetensors", b"\1\0\0\0\0\0\0"), "not a whole safetensors file"),
    "cut in the header": (cut("model.safetensors", 100), "not a whole safetensors file"),
    "cut in the data": (cut("model.safetensors", -100), "past the end of the file"),
    "bytes at the end": (appended("model.safetensors", b"\0"), "1 bytes belong to no tensor"),
    "header of 2^64 - 1 bytes": (replaced("model.safetensors", b"\xff" * 64), "header of 18,446,744,073,709,551,615"),
    "header longer than allowed": (
        lambda path: (
            replaced("model.safetensors", safetensors(b"{}", length=1 << 30))(path),
            cut("model.safetensors", 1 << 31)(path),
        ),
        "header of 1,073,741,824 bytes",
    ),
    "header not JSON": (replaced("model.safetensors", safetensors(b"{'a': 1}")), "header is not valid JSON"),
    "header not UTF-8": (replaced("model.safetensors", safetensors(b'{"\xff": 1}')), "header is not valid JSON"),
    "header a list": (replaced("model.safetensors", safetensors([])), "header is not a JSON object"),
    "header nested": (replaced("model.safetensors", safetensors(b"[" * 1_000_000)), "header is not valid JSON"),
    "header nested in an entry": (
        replaced("model.safetensors", safetensors(b'{"a":' + b'{"a":' * 500_000 + b"1" + b"}" * 500_001)),
        "header is not valid JSON",
    ),
    "header with a long number": (
        replaced("model.safetensors", safetensors(b'{"a": ' + b"9" * 10_000 + b"}")),
        "header is not valid JSON",
    ),
    "name twice": (
        replaced("model.safetensors", safetensors(b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}')),
        "a name occurs twice",
    ),
    "entry not an object": (replaced("model.safetensors", safetensors({"a": 5})), "tensor a lacks dtype"),
    "entry a list": (replaced("model.safetensors", safetensors({"a": []})), "tensor a lacks dtype"),
    "entry without offsets": (
        replaced("model.safetensors", safetensors({"a": {"dtype": "F32", "shape": [1]}})),
        "tensor a lacks dtype, shape or data_offsets",
    ),
    "three offsets": (header(("a", "F32", [8], [0, 32, 64])), "tensor a lacks"),
    "offsets a text": (header(("a", "F32", [8], "01")), "tensor a has an impossible shape or offset"),
    "negative offset": (header(("a", "F32", [8], [-32, 0])), "tensor a has an impossible shape or offset"),
    "float offset": (header(("a", "F32", [8], [0.0, 32.0])), "tensor a has an impossible shape or offset"),
    "boolean offset": (header(("a", "U8", [1], [False, True])), "tensor a has an impossible shape or offset"),
    "offset of 2^64": (header(("a", "F32", [8], [1 << 64, (1 << 64) + 32])), "an impossible shape or offset"),
    "offsets turned round": (header(("a", "F32", [8], [32, 0])), "tensor a of shape [8] needs 32 bytes but has -32"),
    "offset past the end": (header(("a", "F32", [32], [0, 128])), "tensor a ends 64 bytes past the end of the file"),
    "overlap": (header(FIRST, ("b", "F32", [16], [0, 64])), "tensor b overlaps"),
    "overlap in part": (header(FIRST, ("b", "F32", [12], [16, 64])), "tensor b overlaps"),
    "the same bytes twice": (header(("a", "F32", [16], [0, 64]), ("b", "F32", [16], [0, 64])), "tensor b overlaps"),
    "hole": (header(("a", "F32", [4], [0, 16]), SECOND), "tensor b leaves a hole"),
    "hole at the start": (header(SECOND), "tensor b leaves a hole"),
    "bytes of nobody": (header(FIRST), "32 bytes belong to no tensor"),
    "unknown dtype": (header(("a", "F7", [8], [0, 32])), "tensor a has dtype 'F7'"),
    "dtype a number": (header(("a", 5, [8], [0, 32])), "tensor a has dtype '5'"),
    "dtype a list": (header(("a", ["F32"], [8], [0, 32])), "tensor a has dtype \"['F32']\""),
    "shape a number": (header(("a", "F32", 8, [0, 32])), "tensor a has an impossible shape"),
    "negative shape": (header(("a", "F32", [-8], [0, 32])), "tensor a has an impossible shape"),
    "two negatives": (header(("a", "F32", [-2, -8], [0, 64])), "tensor a has an impossible shape"),
    "shape that overflows": (header(("a", "F32", [1 << 32, 1 << 32], [0, 64])), "tensor a of shape ... needs"),
    "shape that overflows to its size": (header(("a", "U8", [1 << 47, 1 << 17, 1], [0, 0])), "tensor a of shape"),
    "nothing times much": (header(FIRST, SECOND, ("c", "F32", [0, 1 << 47], [64, 64])), "missing"),
    "many dimensions": (header(("a", "F32", [1] * 5000, [0, 4])), "tensor a has an impossible shape"),
    "name of control characters": (header(("a\x1b[2J\n\x07", "F7", [8], [0, 32])), "impossible name 'a\\x1b[2J"),
    "name of a million letters": (header(("a" * 1_000_000, "F7", [8], [0, 32])), "impossible name 'aaa"),
    "missing tensor": (weights(lambda w: w.pop(NORM)), "missing: model.norm.weight"),
    "unexpected tensor": (weights(lambda w: w.update(extra=torch.ones(2))), "unexpected: extra"),
    "mis-shaped": (
        weights(lambda w: w.update({NORM: torch.ones(7)})),
        "mis-shaped: model.norm.weight [7] instead of [32]",
    ),
    "transposed": (
        weights(lambda w: w.update({Q: torch.ones(1, 32, 32)})),
        f"mis-shaped: {Q} [1, 32, 32] instead of [32, 32]",
    ),
    "NaN": (weights(lambda w: w[Q][3].fill_(torch.nan)), f"non-finite: {Q}"),
    "infinite": (weights(lambda w: w[NORM].fill_(-torch.inf)), "non-finite: model.norm.weight"),
    "whole numbers": (weights(lambda w: w.update({NORM: w[NORM].long()})), "mis-typed: model.norm.weight torch.int64"),
    "one in float64": (
        weights(lambda w: w.update({NORM: torch.full_like(w[NORM], 1e300, dtype=torch.float64)})),
        "non-finite: model.norm.weight as torch.float32",
    ),
    "all at once": (
        weights(
            lambda w: (
                w.pop(NORM),
                w.update(extra=torch.ones(2)),
                w[Q].fill_(torch.nan),
                w.update({"model.embed_tokens.weight": torch.ones(3, 3)}),
            )
        ),
        "missing: model.norm.weight; unexpected: extra; mis-shaped: model.embed_tokens",
    ),
    "another's head": (
        weights(lambda w: w.update({"lm_head.weight": torch.ones(500, 32)})),
        "mis-shaped: lm_head.weight [500, 32] instead of [512, 32]",
    ),
    "no tensor at all": (replaced("model.safetensors", safetensors({})), "holds only 0 tensors"),
    "weights are a folder": (in_place_of("model.safetensors", Path.mkdir), "model.safetensors: not a file"),
    "weights are a pipe": (in_place_of("model.safetensors", os.mkfifo), "model.safetensors: not a file"),
    "weights point nowhere": (linked("model.safetensors", "gone"), "model.safetensors: not a file, or a link"),
    "weights point at themselves": (linked("model.safetensors", "model.safetensors"), "model.safetensors: not a file"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, untemplated, monkeypatch, capsys):
    end_in_one_line(WEIGHTS[name], untemplated, monkeypatch, capsys)


INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "no config": (removed("config.json"), "config.json: no such file"),
    "config a folder": (in_place_of("config.json", Path.mkdir), "config.json: a directory, not a file of JSON"),
    "config a pipe": (in_place_of("config.json", os.mkfifo), "config.json: no such file"),
    "config points nowhere": (linked("config.json", "gone"), "config.json: no such file"),
    "config empty": (replaced("config.json", ""), "config.json: empty, so its download"),
    "config not JSON": (replaced("config.json", "{'vocab_size': 5}"), "config.json: not valid JSON"),
    "config not UTF-8": (replaced("config.json", b'{"a": "\xff"}'), "config.json: not valid JSON"),
    "config UTF-16": (replaced("config.json", '{"vocab_size": 5}'.encode("utf-16")), "config lacks hidden_size"),
    "config nested": (replaced("config.json", '{"a":' * 200_000), "config.json: not valid JSON"),
    "config with a long number": (replaced("config.json", '{"a": ' + "1" * 9999 + "}"), "config.json: not valid JSON"),
    "config a list": (replaced("config.json", "[1]"), "config.json: a JSON list, not an object"),
    "config null": (replaced("config.json", "null"), "config.json: a JSON NoneType, not an object"),
    "config of a terabyte": (cut("config.json", 1 << 40), "config.json: 1,099,511,627,776 bytes is too large"),
    "config {}": (replaced("config.json", "{}"), "config lacks vocab_size"),
    **{f"no {name}": (config(**{name: ...}), f"config lacks {name}; take config.json from") for name in INTEGERS[:5]},
    **{f"{name} null": (config(**{name: None}), f"config lacks {name}") for name in INTEGERS[:5]},
    **{
        f"{name} {value!r}"[:40]: (config(**{name: value}), f"config: {name} is {value!r}, which is not a whole number")
        for name in INTEGERS
        for value in (10**12, -1, "8", True, 8.0, [8], float("nan"), float("inf"))
    },
    **{
        f"{name} 10^12": (config(**MOE | {name: 10**12}), f"config: {name} is 1000000000000, which is not a whole")
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
    },
    "1e400 layers": (
        lambda path: replaced("config.json", (path / "config.json").read_text().replace(": 2,", ": 1e400,"))(path),
        "is inf, which is not a whole number",
    ),
    "zero layers": (config(num_hidden_layers=0), "num_hidden_layers is 0"),
    "a thousand layers": (config(num_hidden_layers=1000), "config asks for 1000 layers"),
    "the most of everything": (
        config(
            vocab_size=1 << 24,
            hidden_size=1 << 20,
            intermediate_size=1 << 22,
            num_attention_heads=4096,
            head_dim=1 << 14,
        ),
        "mis-shaped: model.embed_tokens.weight [512, 32] instead of [16777216, 1048576]",
    ),
    "heads not divisible": (config(num_key_value_heads=3), "num_attention_heads 4 is not a multiple of ... 3"),
    "odd head_dim": (config(head_dim=7), "head_dim 7 is odd"),
    "another head_dim": (config(head_dim=16), "mis-shaped: ... q_proj.weight [32, 32] instead of [64, 32]"),
    "another width": (config(hidden_size=16), "mis-shaped: model.embed_tokens.weight [512, 32] instead of [512, 16]"),
    "more heads": (config(num_attention_heads=8), "mis-shaped"),
    "untied": (config(tie_word_embeddings=False), "missing: lm_head.weight"),
    "another type": (config(model_type="qwen2"), "missing: ... bias ... unexpected: ... q_norm"),
    "attention bias": (config(attention_bias=True), "missing: model.layers.0.self_attn.q_proj.bias"),
    "tied a text": (config(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes', which is neither true nor false"),
    "bias a number": (config(attention_bias=1), "attention_bias is 1, which is neither"),
    "eps zero": (config(rms_norm_eps=0), "rms_norm_eps is 0, which is not a positive number"),
    "eps NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "eps a text": (config(rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6'"),
    "eps of a thousand digits": (config(rms_norm_eps=10**1000), "rms_norm_eps is"),
    "theta infinite": (config(rope_theta=float("inf")), "rope_theta is inf"),
    "theta one": (config(rope_theta=1), "rope_theta 1 is not above 1"),
    "theta of 400 digits": (config(rope_theta=10**400), "rope_theta is"),
    "unknown architecture": (config(model_type="llama"), "model_type 'llama' is not implemented; qwen3, qwen3_moe"),
    "architecture a list": (config(model_type=["qwen3"]), "model_type ['qwen3'] is not implemented"),
    "architecture an object": (config(model_type={}), "model_type {} is not implemented"),
    "unknown activation": (config(hidden_act="gelu"), "hidden_act 'gelu' is not implemented"),
    "activation a list": (config(hidden_act=[]), "hidden_act [] is not implemented"),
    "dtype unknown": (config(dtype="float8", torch_dtype=...), "dtype 'float8' is not one of"),
    "dtype a list": (config(torch_dtype=["float32"]), "dtype ['float32'] is not one of"),
    "rope a text": (config(rope_scaling="yarn"), "rope_scaling is 'yarn', which is neither null nor an object"),
    "rope type unknown": (config(rope_scaling={"rope_type": "llama3"}), "rope type 'llama3' is not implemented"),
    "rope type of old": (config(rope_scaling={"type": "linear", "factor": 2.0}), "rope type 'linear' is not"),
    "rope type a list": (config(rope_scaling={"rope_type": ["yarn"]}), "rope type ['yarn'] is not implemented"),
    "rope parameters a list": (
        config(rope_parameters=[]),
        "rope_parameters is [], which is neither null nor an object",
    ),
    "rope parameters unknown": (config(rope_parameters={"rope_type": "longrope"}), "rope type 'longrope' is not"),
    "yarn without factor": (config(rope_scaling=YARN | {"factor": None}), "rope_scaling factor is None"),
    "yarn factor negative": (config(rope_scaling=YARN | {"factor": -4}), "rope_scaling factor is -4"),
    "yarn factor infinite": (config(rope_scaling=YARN | {"factor": 10**400}), "rope_scaling factor is"),
    "yarn original a text": (
        config(rope_scaling=YARN | {"original_max_position_embeddings": "64"}),
        "rope_scaling original_max_position_embeddings is '64'",
    ),
    "yarn truncate a text": (config(rope_scaling=YARN | {"truncate": "no"}), "rope_scaling truncate is 'no'"),
    "yarn field unknown": (config(rope_scaling=YARN | {"mscale": 2.0}), "rope_scaling has mscale"),
    "yarn beta tiny": (config(rope_scaling=YARN | {"beta_fast": 5e-324}), "rope_scaling beta_fast is 5e-324"),
    "sliding window": (config(use_sliding_window=True, max_window_layers=0), "sliding-window attention is not"),
    "sliding layers": (config(layer_types=["sliding_attention"] * 2), "layer_types is ['sliding_attention', "),
    "layer types a number": (config(layer_types=5), "layer_types is 5; sliding-window attention is not implemented"),
    "window from a text": (config(use_sliding_window=True, max_window_layers="0"), "sliding-window attention is not"),
    "attention dropout": (config(attention_dropout=0.1), "attention_dropout is not implemented"),
    "more experts chosen than there are": (config(**MOE | {"num_experts_per_tok": 5}), "num_experts_per_tok 5 is more"),
    "no experts": (config(**MOE | {"num_experts": 0}), "num_experts_per_tok 2 is more than num_experts 0"),
    "experts without width": (config(**MOE | {"moe_intermediate_size": 0}), "lacks moe_intermediate_size"),
    "four thousand experts": (config(**MOE | {"num_experts": 4096}), "config asks for 2 layers and 4096 experts"),
    "experts that are not there": (config(**MOE), "missing: model.layers.0.mlp.gate.weight"),
    "dense layers a number": (config(mlp_only_layers=3), "mlp_only_layers is 3, not a list"),
    "quantised a list": (config(quantization_config=[1]), "quantization_config is not an object"),
    "end token a text": (config(eos_token_id="2"), "config: eos_token_id is '2', which is neither a token id nor"),
    "end tokens nested": (config(eos_token_id=[[2]]), "config: eos_token_id is [[2]], which is neither"),
    "end token negative": (config(eos_token_id=-1), "config: eos_token_id is -1, which is neither"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name, untemplated, monkeypatch, capsys):
    (untemplated / "generation_config.json").unlink()
    end_in_one_line(CONFIGS[name], untemplated, monkeypatch, capsys)


GENERATION = {
    "not JSON": (replaced("generation_config.json", "x"), "generation_config.json: not valid JSON"),
    "a list": (replaced("generation_config.json", "[]"), "generation_config.json: a JSON list"),
    "points nowhere": (linked("generation_config.json", "gone"), "generation_config.json: no such file"),
    "temperature a text": (generation(temperature="0.6"), "generation_config.json: temperature is '0.6'"),
    "temperature NaN": (generation(temperature=float("nan")), "generation_config.json: temperature is nan"),
    "temperature negative": (generation(temperature=-1), "generation_config.json: temperature is -1"),
    "top_k a fraction": (generation(top_k=2.5), "generation_config.json: top_k is 2.5"),
    "top_k true": (generation(top_k=True), "generation_config.json: top_k is True"),
    "top_k negative": (generation(top_k=-20), "generation_config.json: top_k is -20"),
    "top_p two": (generation(top_p=2), "generation_config.json: top_p is 2"),
    "min_p a list": (generation(min_p=[0]), "generation_config.json: min_p is [0]"),
    "repetition penalty zero": (generation(repetition_penalty=0), "generation_config.json: repetition_penalty is 0"),
    "end token a text": (generation(eos_token_id="2"), "generation_config: eos_token_id is '2'"),
    "end token true": (generation(eos_token_id=True), "generation_config: eos_token_id is True"),
    "end token a fraction": (generation(eos_token_id=2.0), "generation_config: eos_token_id is 2.0"),
    "end tokens nested": (generation(eos_token_id=[[2]]), "generation_config: eos_token_id is [[2]]"),
    "end tokens an object": (generation(eos_token_id={"a": 2}), "generation_config: eos_token_id is {'a': 2}"),
    "end token negative": (generation(eos_token_id=[2, -1]), "generation_config: eos_token_id is [2, -1]"),
}


@pytest.mark.parametrize("name", GENERATION)
def test_generation_config(name, untemplated, monkeypatch, capsys):
    end_in_one_line(GENERATION[name], untemplated, monkeypatch, capsys)


def same_shard(weight_map: dict[str, str], path: Path) -> None:
    """The index names, for one tensor, the shard in which it does not lie."""
    weight_map[NORM] = next(shard for shard in set(weight_map.values()) if shard != weight_map[NORM])


def twice(weight_map: dict[str, str], path: Path) -> None:
    """One tensor lies in both shards, with other values."""
    for number, shard in enumerate(sorted(set(weight_map.values()))):
        tensors = load_file(path / shard)
        save_file({**tensors, NORM: torch.full((32,), 1.0 + number)}, path / shard)


INDEX = "model.safetensors.index.json"
SHARDS = {
    "dots": (shard_named("../model.safetensors"), f"{INDEX}: shard '../model.safetensors' is not the plain name"),
    "only dots": (shard_named(".."), f"{INDEX}: shard '..' is not the plain name"),
    "dots inside": (shard_named("a/../../b.safetensors"), f"{INDEX}: shard 'a/../../b.safetensors' is not"),
    "absolute": (shard_named("/etc/passwd"), f"{INDEX}: shard '/etc/passwd' is not the plain name"),
    "absolute weights": (shard_named("/tmp/x.safetensors"), f"{INDEX}: shard '/tmp/x.safetensors' is not"),
    "home": (shard_named("~/x.safetensors"), f"{INDEX}: shard '~/x.safetensors' is not"),
    "backslashes": (shard_named("..\\x.safetensors"), f"{INDEX}: shard ... is not the plain name"),
    "a drive": (shard_named("C:x.safetensors"), f"{INDEX}: shard 'C:x.safetensors' is not the plain name"),
    "a zero byte": (shard_named("x\0.safetensors"), f"{INDEX}: shard"),
    "a long name": (shard_named("x" * 5000 + ".safetensors"), f"{INDEX}: shard"),
    "empty name": (shard_named(""), f"{INDEX}: shard '' is not the plain name"),
    "pickle": (shard_named("model-00001.bin"), f"{INDEX}: shard 'model-00001.bin' is not the plain name"),
    "a number": (shard_named(5), f"{INDEX}: shard"),
    "a list": (shard_named([]), f"{INDEX}: shard"),
    "absent": (shard_named("gone.safetensors"), f"{INDEX}: shard gone.safetensors is not there; download it"),
    "wrong shard": (sharded(same_shard), f"{INDEX}: tensor model.norm.weight is stated in"),
    "in two shards": (sharded(twice), "tensor model.norm.weight is also in model-00001-of-00002.safetensors"),
    "not in the index": (sharded(lambda m, path: m.pop(NORM)), "tensor model.norm.weight is stated in no file but"),
    "only in the index": (sharded(lambda m, path: m.update(x=m[NORM])), "tensor x is stated in ... but is in no file"),
    "a shard cut short": (
        sharded(lambda m, path: cut("model-00002-of-00002.safetensors", -8)(path)),
        "model-00002-of-00002.safetensors: tensor ... past the end",
    ),
    "a pickled shard": (
        sharded(lambda m, path: torch.save({}, path / "model-00002-of-00002.safetensors")),
        "model-00002-of-00002.safetensors: a pickle",
    ),
    "a shard is a folder": (
        sharded(lambda m, path: in_place_of("model-00002-of-00002.safetensors", Path.mkdir)(path)),
        "shard model-00002-of-00002.safetensors is not there",
    ),
    "index not JSON": (
        in_place_of("model.safetensors", lambda file: (file.parent / INDEX).write_text("{")),
        f"{INDEX}: not valid JSON",
    ),
    "index a list": (
        in_place_of("model.safetensors", lambda file: (file.parent / INDEX).write_text("[]")),
        f"{INDEX}: a JSON list",
    ),
    "index empty": (
        in_place_of("model.safetensors", lambda file: (file.parent / INDEX).write_text("{}")),
        f"{INDEX}: no weight_map",
    ),
    "map a list": (
        in_place_of("model.safetensors", lambda file: (file.parent / INDEX).write_text('{"weight_map": ["a"]}')),
        f"{INDEX}: no weight_map",
    ),
    "map empty": (
        in_place_of("model.safetensors", lambda file: (file.parent / INDEX).write_text('{"weight_map": {}}')),
        f"{INDEX}: no weight_map",
    ),
    "index points nowhere": (
        in_place_of("model.safetensors", lambda file: (file.parent / INDEX).symlink_to("gone")),
        f"{INDEX}: no such file",
    ),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards(name, untemplated, monkeypatch, capsys):
    end_in_one_line(SHARDS[name], untemplated, monkeypatch, capsys)


# ---- text: tokenizer and template ----


def template(text: str) -> Callable[[Path], None]:
    return edited("tokenizer_config.json", chat_template=text)


def rewritten(file: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A JSON file after a change of its content."""

    def rewrite(path: Path) -> None:
        content = json.loads((path / file).read_text())
        change(content)
        (path / file).write_text(json.dumps(content))

    return rewrite


def shift_ids(tokenizer: dict) -> None:
    tokenizer["model"]["vocab"] = {token: index + 5000 for token, index in tokenizer["model"]["vocab"].items()}


ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
TEXT = {
    "no tokenizer": (removed("tokenizer.json"), "no tokenizer.json; take it from the model"),
    "tokenizer points nowhere": (linked("tokenizer.json", "gone"), "tokenizer.json"),
    "tokenizer a pipe": (in_place_of("tokenizer.json", os.mkfifo), "tokenizer.json: not a file"),
    "tokenizer not JSON": (replaced("tokenizer.json", "{"), "tokenizer.json can't be read"),
    "tokenizer a list": (replaced("tokenizer.json", "[]"), "tokenizer.json can't be read"),
    "tokenizer nested": (replaced("tokenizer.json", '{"model":' * 200_000), "tokenizer.json can't be read"),
    "tokenizer of a terabyte": (cut("tokenizer.json", 1 << 40), "tokenizer.json: 1,099,511,627,776 bytes"),
    "tokenizer without model": (rewritten("tokenizer.json", lambda c: c.pop("model")), "tokenizer.json can't be read"),
    "tokenizer of words": (
        rewritten(
            "tokenizer.json", lambda c: c.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"})
        ),
        "tokenizer.json is not a byte-level BPE",
    ),
    "ids beyond the vocabulary": (
        rewritten("tokenizer.json", shift_ids),
        "is outside of the vocabulary of 512; is the tokenizer another's?",
    ),
    "template with a mistake": (template("{% if %}"), "the chat template failed (TemplateSyntaxError"),
    "template a list of numbers": (template([1]), "chat_template must be a text"),
    "template that escapes": (template(ESCAPE), "the chat template failed (SecurityError"),
    "template that opens a file": (template("{% include '/etc/passwd' %}"), "the chat template failed"),
    "template that runs a command": (
        template("{{ cycler.__init__.__globals__.os.system('mkdir code-ran') }}"),
        "the chat template failed (SecurityError",
    ),
    "template that loops": (
        template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        "ran for more than 1 s",
    ),
    "template that prints a gigabyte": (
        template("{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}"),
        "prints more than 16,777,216",
    ),
    "template that makes a gigabyte": (template("{{ 'x' * 10**10 }}"), "the chat template needs more than 1024 MiB"),
    "template that counts high": (template("{{ 10**(10**10) }}"), "the chat template ran for more than"),
    "template that is nothing": (template("{{ '' }}"), "the prompt is empty"),
}


@pytest.mark.parametrize("name", TEXT)
def test_text(name, checkpoint, monkeypatch, capsys):
    break_it, words = TEXT[name]
    break_it(checkpoint)
    before = files_below(checkpoint.parent)
    monkeypatch.chdir(checkpoint.parent)
    assert_words(run_here(["--model", checkpoint, "hi"], monkeypatch, capsys), words)
    assert files_below(checkpoint.parent) == before


# ---- the command: flags, prompts and standard input ----

COMMANDS = {
    "absent path": ("--model|{tmp}/gone|hi", "--model {tmp}/gone: no such directory or .gguf file"),
    "absent relative path": ("--model|./gone|hi", "--model ./gone: no such directory or .gguf file"),
    "a text": (f"--model|{__file__}|hi", "neither a directory nor a .gguf file; give the directory"),
    "a pickle": ("--model|{tmp}/weights.pt|hi", "weights.pt: a pickle"),
    "a checkpoint's pickle": ("--model|{tmp}/pytorch_model.bin|hi", "pytorch_model.bin: a pickle"),
    "an empty folder": ("--model|{tmp}|hi", "{tmp}: no tokenizer.json"),
    "a folder as .gguf": ("--model|{tmp}/folder.gguf|hi", "folder.gguf"),
    "a path of thousands of letters": ("--model|" + "x" * 5000 + "|hi", "--model xxx"),
    "a path with line breaks": ("--model|a\nb\x1b[2J|hi", "--model a b"),
    "empty model": ("--model||hi", "--model"),
    "no hub id": ("--model|a/b/c|hi", "--model a/b/c: no such directory or .gguf file, and not a hub id"),
    "hub id of dots": ("--model|../../etc|hi", "--model ../../etc: no such directory"),
    "unknown flag": ("--modle|x|hi", "there is no option --modle; did you mean --model?"),
    "shortened flag": ("--model|{model}|--temp|0|hi", "--temp"),
    "two prompts": ("--model|{model}|hi|there", "'there' is one argument too many"),
    "flag without value": ("hi|--model", "argument --model: expected one argument"),
    "thinking maybe": ("--model|{model}|--thinking=maybe|hi", "argument --thinking: 'maybe' is not one of "),
    "temperature a text": (
        "--model|{model}|--temperature|warm|hi",
        "argument --temperature: 'warm' is not a number",
    ),
    "temperature negative": ("--model|{model}|--temperature|-1|hi", "--temperature is -1.0"),
    "temperature NaN": ("--model|{model}|--temperature|nan|hi", "--temperature is nan"),
    "temperature infinite": ("--model|{model}|--temperature|inf|hi", "--temperature is inf"),
    "top-k negative": ("--model|{model}|--top-k|-2|hi", "--top-k is -2"),
    "top-k a fraction": ("--model|{model}|--top-k|1.5|hi", "argument --top-k: '1.5' is not a whole number"),
    "top-p above one": ("--model|{model}|--top-p|1.5|hi", "--top-p is 1.5"),
    "min-p negative": ("--model|{model}|--min-p|-0.1|hi", "--min-p is -0.1"),
    "presence penalty": ("--model|{model}|--presence-penalty|3|hi", "--presence-penalty is 3.0"),
    "repetition penalty": ("--model|{model}|--repetition-penalty|0|hi", "--repetition-penalty is 0.0"),
    "seed negative": ("--model|{model}|--seed|-1|hi", "--seed is -1"),
    "seed of 100 bits": (
        "--model|{model}|--seed|" + str(1 << 100) + "|hi",
        "--seed is 1267650600228229401496703205376",
    ),
    "no new tokens": ("--model|{model}|--max-new-tokens|0|hi", "--max-new-tokens is 0"),
    "a number of 5000 digits": ("--model|{model}|--max-new-tokens|" + "9" * 5000 + "|hi", "argument --max-new-tokens"),
    "empty stop string": ("--model|{model}|--stop||hi", "--stop"),
    "budget zero": ("--model|{model}|--thinking-budget|0|hi", "--thinking-budget 0: give at least 1"),
    "budget without thinking": (
        "--model|{model}|--thinking|off|--thinking-budget|9|hi",
        "--thinking-budget limits the thinking that --thinking off turns off",
    ),
    "raw thinking": ("--model|{model}|--raw|--thinking|on|hi", "--raw uses no chat template, so leave --thinking"),
    "raw system": ("--model|{model}|--raw|--system||hi", "--raw uses no chat template"),
    "raw turns": ("--model|{model}|--raw|--multi-turn|on|hi", "--raw continues one text; it has no turns"),
    "logprobs without json": ("--model|{model}|--logprobs|5|hi", "--logprobs goes into the JSON record; add --json"),
    "logprobs of everything": ("--model|{model}|--json|--logprobs|100000|hi", "--logprobs 100000: give a number from"),
    "unknown device": ("--model|{model}|--device|tpu|hi", "argument --device: 'tpu' is not one of "),
    "absent device": ("--model|{model}|--device|mps|hi", "--device mps: PyTorch finds no such device here"),
    "unknown dtype": ("--model|{model}|--dtype|float8|hi", "argument --dtype: 'float8' is not one of "),
    "unknown quantisation": ("--model|{model}|--quantize|int2|hi", "argument --quantize: 'int2' is not one of "),
    "empty prompt": ("--model|{model}|--raw|", "the prompt is empty; give"),
    "prompt beyond the context": (
        "--model|{model}|" + "hi there " * 500,
        "but this model's context is 256; shorten it",
    ),
    "raw prompt beyond the context": ("--model|{model}|--raw|" + "hi there " * 500, "this model's context is 256"),
    "half a character": ("--model|{model}|--raw|\udce9", "surrogate"),
    "half a character in a chat": ("--model|{model}|\udce9", "surrogate"),
    "half a character in the system": ("--model|{model}|--system|\udce9|hi", "surrogate"),
    "half a character in a path": ("--model|{tmp}/\udce9|hi", "--model"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    arguments, words = COMMANDS[name]
    for file in ("weights.pt", "pytorch_model.bin"):
        (tmp_path / file).write_bytes(pickle.dumps(Mark(tmp_path / "code-ran")))
    (tmp_path / "folder.gguf").mkdir()
    before = files_below(tmp_path)
    monkeypatch.chdir(tmp_path)
    places = {"{tmp}": str(tmp_path), "{model}": str(tiny_checkpoint)}
    for place, path in places.items():
        arguments, words = arguments.replace(place, path), words.replace(place, path)
    assert_words(run_here(arguments.split("|"), monkeypatch, capsys), words)
    assert files_below(tmp_path) == before


INPUTS = {
    "empty": (b"", [], "standard input is empty; give a prompt"),
    "only line breaks": (b"\n", [], "standard input is empty"),
    "empty lines": (b"\n\n \n", ["--multi-turn"], "standard input is empty"),
    "not UTF-8": (b"\xff\xfehi", [], "standard input"),
    "not UTF-8 in a chat": (b"\xff\n", ["--multi-turn", "on"], "standard input"),
    "beyond the context": (b"hi there " * 500, [], "this model's context is 256"),
    "twenty megabytes": (b"hi there " * 2_200_000, [], "shorten the messages"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_standard_input(name, tiny_checkpoint, monkeypatch, capsys):
    stdin, flags, words = INPUTS[name]
    assert_words(run_here(["--model", tiny_checkpoint, *flags], monkeypatch, capsys, stdin), words)


# ---- GGUF, whose reader has more tests of its own ----


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def gguf(
    pairs: list[bytes] = (),
    tensors: list[bytes] = (),
    data: int = 0,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
) -> bytes:
    """A GGUF file with these pairs and tensor entries, then padding to 32 and `data` zero bytes."""
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(pairs)))) + b"".join([*pairs, *tensors])
    return head + bytes(-len(head) % 32) + bytes(data)


def entry(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ARCHITECTURE = pair("general.architecture", 8, text("qwen3"))
GGUFS = {
    "empty": (b"", "the file is empty"),
    "three bytes": (b"GGU", "the first four bytes are"),
    "another magic": (gguf(magic=b"GGML"), "the first four bytes are b'GGML'"),
    "a pickle": (pickle.dumps([1, 2, 3] * 50), "the first four bytes are"),
    "version 1": (gguf(version=1), "version 1 is not supported"),
    "version 4": (gguf(version=4), "version 4 is not supported"),
    "big-endian": (gguf(version=3 << 24), "(a big-endian file)"),
    "cut in the head": (gguf()[:20], "the file ends at 20"),
    "2^63 tensors": (gguf(counts=(1 << 63, 0)), "9223372036854775808 tensors cannot be in"),
    "2^63 pairs": (gguf(counts=(0, 1 << 63)), "9223372036854775808 metadata pairs cannot be in"),
    "a string of 2^63 bytes": (gguf([struct.pack("<Q", 1 << 63)], data=64), "needs 9223372036854775808 bytes"),
    "an array of 2^40": (gguf([pair("a", 9, struct.pack("<IQ", 0, 1 << 40))], data=64), "values of a cannot be in"),
    "arrays in arrays": (gguf([pair("a", 9, struct.pack("<IQ", 9, 1) * 50)], data=64), "nests arrays more than 3 deep"),
    "unknown value type": (gguf([pair("a", 99, b"")]), "a has the unknown value type 99"),
    "a key twice": (gguf([pair("a", 0, b"x")] * 2), "the metadata key a occurs twice"),
    "alignment 0": (gguf([pair("general.alignment", 4, bytes(4))]), "general.alignment is 0, not a power of two"),
    "alignment 2^31": (
        gguf([pair("general.alignment", 4, struct.pack("<I", 1 << 31))]),
        "general.alignment is 2147483648",
    ),
    "alignment 33": (gguf([pair("general.alignment", 4, struct.pack("<I", 33))]), "general.alignment is 33"),
    "overlapping tensors": (
        gguf([ARCHITECTURE], [entry("a", [32]), entry("b", [32], offset=64)], data=256),
        "b at ... overlaps the tensor before it",
    ),
    "a gap": (gguf([ARCHITECTURE], [entry("a", [8]), entry("b", [8], offset=96)], data=256), "b at ... leaves a gap"),
    "an offset aslant": (gguf([ARCHITECTURE], [entry("a", [8], offset=4)], data=64), "offset 4 of a is not a multiple"),
    "an offset of 2^63": (gguf([ARCHITECTURE], [entry("a", [8], offset=1 << 63)], data=64), "a at 9223372036854775"),
    "a tensor past the end": (gguf([ARCHITECTURE], [entry("a", [1 << 30])], data=64), "a ends at 4294967"),
    "a shape that overflows": (gguf([ARCHITECTURE], [entry("a", [1 << 39, 1 << 39])], data=64), "a ends at"),
    "a shape of 2^63": (gguf([ARCHITECTURE], [entry("a", [1 << 63])], data=64), "a has the impossible shape"),
    "2^31 dimensions": (gguf([ARCHITECTURE], [text("a") + struct.pack("<I", 1 << 31)], data=64), "not 1 to 4"),
    "unknown tensor type": (gguf([ARCHITECTURE], [entry("a", [8], kind=77)], data=64), "a is of type number 77"),
    "bytes at the end": (gguf([ARCHITECTURE], [entry("a", [8])], data=999), "bytes follow the last tensor"),
    "no architecture": (gguf([], [entry("a", [8])], data=32), "general.architecture is missing"),
    "another architecture": (
        gguf([pair("general.architecture", 8, text("llama"))], [entry("a", [8])], data=32),
        "general.architecture is 'llama' (supported: qwen3",
    ),
    "no embedding": (gguf([ARCHITECTURE], [entry("a", [8])], data=32), "no token_embd.weight"),
}


@pytest.mark.parametrize("name", GGUFS)
def test_gguf(name, tmp_path, monkeypatch, capsys):
    content, words = GGUFS[name]
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    line = run_here(["--model", file, "hi"], monkeypatch, capsys)
    assert_words(line, words)
    assert str(file) in line and files_below(tmp_path) == {"model.gguf"}


def metadata(key: str, value: bytes) -> Callable[[bytes], bytes]:
    """The file with other bytes in the place of a metadata value."""

    def change(content: bytes) -> bytes:
        start = content.index(text(key)) + len(text(key)) + 4  # behind its type
        return content[:start] + value + content[start + len(value) :]

    return change


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def f32(value: float) -> bytes:
    return struct.pack("<f", value)


DAMAGED_GGUFS = {
    "cut short": (lambda content: content[:-100], "but the file has"),
    "longer": (lambda content: content + bytes(100), "100 bytes follow the last tensor"),
    "NaN": (lambda content: content[:-4] + f32(float("nan")), "non-finite: model."),
    "a context of 2^32": (metadata("qwen3.context_length", u32(2**32 - 1)), "max_position_embeddings is 4294967295"),
    "a billion blocks": (metadata("qwen3.block_count", u32(10**9)), "block_count is 1000000000, but the file has the"),
    "one block": (metadata("qwen3.block_count", u32(1)), "block_count is 1, but the file has the tensors of 2"),
    "no heads": (metadata("qwen3.attention.head_count", u32(0)), "qwen3.attention.head_count is 0"),
    "three key heads": (metadata("qwen3.attention.head_count_kv", u32(3)), "num_attention_heads 4 is not a multiple"),
    "key and value heads that differ": (metadata("qwen3.attention.key_length", u32(7)), "is not the key_length 7"),
    "another width": (metadata("qwen3.embedding_length", u32(64)), "mis-shaped: model.embed_tokens.weight"),
    "a width of 2^32": (metadata("qwen3.embedding_length", u32(2**32 - 1)), "hidden_size is 4294967295"),
    "eps NaN": (
        metadata("qwen3.attention.layer_norm_rms_epsilon", f32(float("nan"))),
        "rms_norm_eps is nan",
    ),
    "eps negative": (metadata("qwen3.attention.layer_norm_rms_epsilon", f32(-1)), "rms_norm_eps is -1.0"),
    "theta infinite": (metadata("qwen3.rope.freq_base", f32(float("inf"))), "rope_theta is inf"),
    "end token beyond": (metadata("tokenizer.ggml.eos_token_id", u32(99999)), "tokenizer.ggml.eos_token_id is 99999"),
    "another splitting": (metadata("tokenizer.ggml.pre", text("llama")), "tokenizer.ggml.pre is 'llama'"),
    "another tokenizer": (metadata("tokenizer.ggml.model", text("bert")), "tokenizer.ggml.model is 'bert'"),
}


@pytest.fixture(scope="module")
def good_gguf(tiny_checkpoint, tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    command = [sys.executable, "convert.py", "--to", "gguf", "--type", "f32", "--model", tiny_checkpoint, "--out", out]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out.read_bytes()


@pytest.mark.parametrize("name", DAMAGED_GGUFS)
def test_damaged_gguf(name, good_gguf, tmp_path, monkeypatch, capsys):
    change, words = DAMAGED_GGUFS[name]
    file = tmp_path / "model.gguf"
    file.write_bytes(change(good_gguf))
    line = run_here(["--model", file, "hi"], monkeypatch, capsys)
    assert_words(line, words)
    assert str(file) in line


# ---- a conversion of bad input writes nothing ----


@pytest.mark.parametrize("target", ["gguf", "bf16"])
@pytest.mark.parametrize("name", [name for name in (*WEIGHTS, *SHARDS) if name != "one in float64"])
def test_convert(name, target, untemplated, monkeypatch, capsys):
    break_it, _ = (WEIGHTS | SHARDS)[name]
    break_it(untemplated)
    before = files_below(untemplated.parent)
    out = untemplated.parent / ("out.gguf" if target == "gguf" else "out")
    arguments = ["convert.py", "--to", target, "--model", str(untemplated), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    line = end_of(convert.main, capsys)
    assert str(untemplated) in line and files_below(untemplated.parent) == before


# ---- the same in processes of their own, with bounded memory ----


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        pytest.param(*WEIGHTS["header of 2^64 - 1 bytes"], id="header of 2^64 - 1 bytes"),
        pytest.param(*WEIGHTS["shape that overflows"], id="shape that overflows"),
        pytest.param(*CONFIGS["the most of everything"], id="the most of everything"),
        pytest.param(*TEXT["template that makes a gigabyte"], id="template that makes a gigabyte"),
        pytest.param(*TEXT["template that runs a command"], id="template that runs a command"),
        pytest.param(
            pickled("pytorch_model.bin"), "only pickle weights (pytorch_model.bin), which can run", id="pickle"
        ),
        pytest.param(pickled_by_torch("model.safetensors", True), "model.safetensors: a pickle", id="torch.save"),
        pytest.param(pickled_by_torch("model.safetensors", False), "model.safetensors: a pickle", id="old torch.save"),
        pytest.param(pickled_by_torch("model.pth", True), "only pickle weights (model.pth), which can", id=".pth"),
    ],
)
def test_apart(break_it, words, checkpoint):
    break_it(checkpoint)
    before = files_below(checkpoint.parent)
    line = run_apart(["--model", checkpoint, "hi"])
    assert_words(line, words)
    assert str(checkpoint) in line and files_below(checkpoint.parent) == before


def test_apart_with_a_bad_command(tiny_checkpoint, tmp_path):
    assert_words(run_apart(["--model", tiny_checkpoint], stdin=b"\xff"), "is not utf-8 text (byte 0); convert it")
    assert_words(run_apart(["--model", tiny_checkpoint, b"\xff"]), "surrogate")
    assert_words(run_apart(["--model", tmp_path / "gone", "hi"]), "no such directory")
    assert not files_below(tmp_path)
