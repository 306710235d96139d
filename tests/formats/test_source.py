"""formats/source.py and formats/hub.py against a hub of our own: what is asked for, what is kept, what is said."""

import hashlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants
from local_hub import COMMITS, Handler, Hub, use

from chat import Chat
from formats import download, hub, source
from formats.checkpoint import open_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
FORBIDDEN = {
    "evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"\x80\x02",
    "x.pkl": b"\x80\x02",
    "a/config.json": b"{}",
}


@pytest.fixture
def server(tiny_checkpoint, tmp_path, monkeypatch) -> Hub:
    server = Hub({file.name: file.read_bytes() for file in tiny_checkpoint.iterdir()} | FORBIDDEN)
    use(server.url, tmp_path, monkeypatch)
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_same(path: Path, server: Hub) -> None:
    wanted = {name: content for name, content in server.files.items() if name not in FORBIDDEN}
    assert {file.name: file.read_bytes() for file in path.iterdir()} == wanted


def test_data_files_alone_are_downloaded(server):
    path = source.resolve("org/name")
    assert_same(path, server)
    assert path.parent.parent.name == "models--org--name" and path.name == COMMITS["main"]
    assert sorted(server.fetched()) == sorted((name, None) for name in server.files if name not in FORBIDDEN)
    assert server.fetched()[-1][0] == "model.safetensors"  # once it is there, everything is


def test_a_tokenizer_alone_needs_no_weights(server):
    chat = Chat.from_pretrained("org/name")
    names = [name for name, _ in server.fetched()]
    assert "tokenizer.json" in names and not any(name.endswith((".safetensors", ".index.json")) for name in names)
    server.requests.clear()
    assert Chat.from_pretrained("org/name").source == chat.source and not server.requests
    assert_same(source.resolve("org/name"), server)  # what is lacking comes when the model is asked for
    assert not {name for name, _ in server.fetched()} & set(names)
    del server.files["tokenizer.json"]
    with pytest.raises(ValueError, match=r"no tokenizer\.json on the hub"):
        Chat.from_pretrained("org/name@v1")


def test_a_model_in_the_cache_needs_no_hub(server):
    path = source.resolve("org/name")
    server.requests.clear()
    assert source.resolve("org/name") == path and not server.requests
    assert source.resolve("org/name@" + COMMITS["main"]) == path and not server.requests


def test_the_cache_is_that_of_huggingface_hub(server):
    from huggingface_hub import hf_hub_download, snapshot_download

    path = source.resolve("org/name")
    server.requests.clear()
    assert snapshot_download("org/name", local_files_only=True) == str(path) and not server.requests
    snapshot_download("org/name", revision="v1", allow_patterns=hub.DATA_FILES)
    server.requests.clear()
    assert_same(source.resolve("org/name@v1"), server)
    assert not server.requests
    assert Path(hf_hub_download("org/name", "config.json")).parent == path


def test_revisions(server):
    assert source.resolve("org/name@v1").name == COMMITS["v1"]
    server.requests.clear()
    assert source.resolve("org/name@v1").name == COMMITS["v1"] and not server.requests
    before = len(server.fetched())
    assert source.resolve("org/name").name == COMMITS["main"]
    assert len(server.fetched()) == before  # the same contents are not downloaded twice


def test_a_broken_transfer_goes_on_where_it_stopped(server):
    server.cuts["model.safetensors"] = [30_000, 5_000, 0]
    assert_same(source.resolve("org/name"), server)
    parts = [part for name, part in server.fetched() if name == "model.safetensors"]
    assert parts == [None, "bytes=30000-", "bytes=35000-", "bytes=35000-"]


def test_a_later_run_goes_on_where_this_one_stopped(server):
    server.cuts["model.safetensors"] = [40_000, *[0] * hub.ATTEMPTS]
    with pytest.raises(hub.HubUnreachable, match=r"the download stopped .* run the command again to resume"):
        source.resolve("org/name")
    assert hub.cached("org/name", None) is None
    server.requests.clear()
    server.cuts.clear()
    assert_same(source.resolve("org/name"), server)
    assert server.fetched() == [("model.safetensors", "bytes=40000-")]


def test_a_hub_without_ranges_sends_the_file_again(server):
    server.ranges, server.cuts["model.safetensors"] = False, [30_000]
    assert_same(source.resolve("org/name"), server)


def test_an_incomplete_cache_is_completed(server):
    path = source.resolve("org/name")
    for name in ("tokenizer.json", "model.safetensors"):
        (path / name).resolve().unlink()  # the link stays and points nowhere
    server.requests.clear()
    assert_same(source.resolve("org/name"), server)
    assert [name for name, _ in server.fetched()] == ["tokenizer.json", "model.safetensors"]


def test_shards(server):
    weights = server.files.pop("model.safetensors")
    server.files["model-00001-of-00002.safetensors"], server.files["model-00002-of-00002.safetensors"] = weights, b"x"
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    server.files["model.safetensors.index.json"] = json.dumps(index).encode()
    path = source.resolve("org/name")
    assert_same(path, server)
    (path / "model-00002-of-00002.safetensors").resolve().unlink()
    assert hub.cached("org/name", None) is None
    assert_same(source.resolve("org/name"), server)


QUANTISATIONS = {"Qwen3-Q4_K_M.gguf": b"four", "Qwen3-Q8_0.gguf": b"eight", "Qwen3-UD-IQ2_M.gguf": b"two"}


def test_weights_without_an_index_or_of_another_name(server):
    weights = server.files.pop("model.safetensors")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    server.files |= {shards[0]: weights, shards[1]: b"x"}
    path = source.resolve("org/name")
    assert_same(path, server)
    server.requests.clear()
    assert source.resolve("org/name") == path and not server.requests
    (path / shards[1]).unlink()
    assert hub.cached("org/name", None) is None
    for name in shards:
        del server.files[name]
    server.files["qwen3-fp16.safetensors"] = weights
    assert (hub.download("org/name", "v1") / "qwen3-fp16.safetensors").read_bytes() == weights
    server.files["qwen3-bf16.safetensors"] = weights
    with pytest.raises(ValueError, match=r"2 models in it \(qwen3-bf16\.safetensors, qwen3-fp16\.safetensors\)"):
        hub.download("org/name", "v1")


SPLIT = {f"BF16/Qwen3-BF16-{i:05d}-of-00003.gguf": b"part %d" % i for i in (1, 2, 3)}
BESIDE = {"config.json": b"{}", "README.md": b"", "mmproj-F16.gguf": b"eyes", "../evil-Q4_0.gguf": b"out"}


def test_a_repository_of_ggufs_alone(server):
    server.files = QUANTISATIONS | SPLIT | BESIDE
    with pytest.raises(ValueError) as error:
        source.resolve("org/name")
    for name in (*QUANTISATIONS, "BF16/Qwen3-BF16-00001-of-00003.gguf", ":Q4_K_M"):
        assert name in str(error.value)
    assert "mmproj" not in str(error.value) and "evil" not in str(error.value) and not server.fetched()
    path = source.resolve("org/name:q4_k_m")
    assert path.name == "Qwen3-Q4_K_M.gguf" and path.read_bytes() == b"four"
    assert server.fetched() == [("Qwen3-Q4_K_M.gguf", None)]  # and nothing else
    assert source.resolve("org/name/Qwen3-Q8_0.gguf@main").read_bytes() == b"eight"
    server.requests.clear()
    assert source.resolve("org/name:Q4_K_M") == path and not server.requests
    assert source.resolve("org/name@main:BF16").read_bytes() == b"part 1"
    assert sorted(server.fetched()) == [(name, None) for name in SPLIT]
    assert (path.parent / "BF16/Qwen3-BF16-00003-of-00003.gguf").read_bytes() == b"part 3"


@pytest.mark.parametrize(
    ("src", "line"),
    [
        ("org/name:Q4_K", "no .gguf file is called Q4_K; there are Qwen3-Q4_K_M.gguf"),
        ("org/name:Qwen3", "3 models in .gguf files"),
        ("org/name/Other.gguf", "no .gguf file is called Other.gguf"),
        ("org/name:../x", "not a hub id"),
    ],
)
def test_a_tag_that_names_no_model_or_several(server, src, line):
    server.files = QUANTISATIONS | BESIDE
    with pytest.raises(ValueError) as error:
        source.resolve(src)
    assert line in str(error.value) and not server.fetched()


def test_the_only_gguf_needs_no_tag(server):
    server.files = {"Qwen3-Q8_0.gguf": b"eight"} | BESIDE
    assert source.resolve("org/name").read_bytes() == b"eight"
    del server.files["Qwen3-Q8_0.gguf"]
    with pytest.raises(ValueError, match=r"no \.gguf file|there are none"):
        source.resolve("org/name@v1:Q8_0")


def test_a_part_that_the_hub_lacks_is_named(server):
    server.files = {name: content for name, content in SPLIT.items() if "00002-of" not in name}
    with pytest.raises(ValueError, match="lacks a part of this model: BF16/Qwen3-BF16-00002-of-00003"):
        source.resolve("org/name")


def test_a_folder_of_ggufs(tmp_path):
    folder = tmp_path / "ggufs"
    for name, content in (QUANTISATIONS | SPLIT).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"4 models in \.gguf files"):
        source.resolve(folder)
    assert source.resolve(f"{folder}:Q8_0") == folder / "Qwen3-Q8_0.gguf"
    assert source.resolve(f"{folder}:bf16") == folder / "BF16/Qwen3-BF16-00001-of-00003.gguf"
    (folder / "model.safetensors").touch()
    assert source.resolve(folder) == folder
    with pytest.raises(ValueError, match=r"no \.gguf file is called Q5_0"):
        source.resolve(f"{folder}:Q5_0")


def test_a_hub_that_sends_another_part_is_found_out(server, monkeypatch):
    """Range is answered from a place that was not asked for: the bytes would land at the wrong one."""
    server.cuts["model.safetensors"] = [1000]
    monkeypatch.setattr(hub, "ATTEMPTS", 1)
    with pytest.raises(ValueError, match="the download stopped"):
        source.resolve("org/name")
    honest = Handler.send

    def shifted(self, status, body, cut=None, part=""):
        honest(self, status, body, cut, part.replace("bytes 1000-", "bytes 900-"))

    monkeypatch.setattr(Handler, "send", shifted)
    with pytest.raises(ValueError, match="the server sends another range than the one requested"):
        source.resolve("org/name")
    monkeypatch.setattr(Handler, "send", honest)
    assert_same(source.resolve("org/name"), server)


def test_a_damaged_file_is_not_kept(server):
    server.renamed["model.safetensors"] = {"lfs": {"size": 1, "sha256": "c" * 64, "pointerSize": 1}}
    with pytest.raises(ValueError, match=r"model\.safetensors arrived damaged from the hub"):
        source.resolve("org/name")
    server.renamed = {"config.json": {"blobId": "c" * 40}}
    with pytest.raises(ValueError, match=r"config\.json arrived damaged"):
        source.resolve("org/name")
    server.renamed = {}
    assert_same(source.resolve("org/name"), server)


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ({"blobId": "../../../../tmp/x"}, "'../../../../tmp/x' where a hash is expected"),
        ({"blobId": None}, "'None' where a hash is expected"),
        ({"size": -1}, "a file of impossible size"),
        ({"size": None}, "a file of impossible size"),
        ({"size": 1 << 60}, "a file of impossible size"),
    ],
)
def test_a_lying_hub(server, tmp_path, answer, line):
    server.renamed["config.json"] = answer
    with pytest.raises(ValueError, match=re.escape(line)):
        source.resolve("org/name")
    assert not server.fetched()


def test_pickles_are_never_asked_for(server):
    del server.files["model.safetensors"]
    with pytest.raises(ValueError, match=r"no model.safetensors on the hub; pickle weights \(\.bin\) can run code"):
        source.resolve("org/name")
    assert not server.fetched()


@pytest.mark.parametrize(
    ("src", "line"),
    [
        ("org/other", "--model org/other is not a directory here; as a hub model: the hub has no such model"),
        ("org/name@v9", "--model org/name@v9 is not a directory here; as a hub model: the hub has no revision v9"),
        ("org/name@", "--model org/name@: no such directory or .gguf file, and not a hub id like Qwen/Qwen3-0.6B"),
        ("org/name@../x", "not a hub id"),
        ("org/a--b", "not a hub id"),
        ("org/..", "not a hub id"),
        ("org/näme", "not a hub id"),
        ("name", "not a hub id"),
        ("https://example.org/org/name", "not a hub id"),
    ],
)
def test_unknown_models(server, src, line):
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        source.resolve(src)
    assert "\n" not in str(caught.value) and not server.fetched()


def test_offline(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.HubUnreachable, match="not in the cache, and HF_HUB_OFFLINE forbids asking the hub"):
        source.resolve("org/name")
    assert not server.requests


def test_local_paths_come_first(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "x.gguf").touch()
    assert source.resolve("org/name") == Path("org/name") and source.resolve("x.gguf") == Path("x.gguf")
    assert not server.requests


# ---- without --model ----


@pytest.fixture
def black_hole():
    """A port that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def bundled(tiny_checkpoint, monkeypatch) -> Path:
    monkeypatch.setattr(source, "BUNDLED_MODEL", tiny_checkpoint)
    return tiny_checkpoint


def test_the_bundled_model_answers_where_the_hub_is_down(bundled, tmp_path, monkeypatch, capsys):
    use(f"http://127.0.0.1:{unused_port()}", tmp_path, monkeypatch)
    assert source.resolve_default(None) == bundled
    expected = "Qwen/Qwen3-0.6B: not in the cache, and the hub can't be reached. Using the bundled tiny model.\n"
    assert capsys.readouterr() == ("", expected)
    with pytest.raises(
        hub.HubUnreachable, match="--model org/name is not a directory here; as a hub model: not in the"
    ):
        source.resolve_default("org/name")


def test_a_silent_hub_is_given_up(bundled, black_hole, tmp_path, monkeypatch, capsys):
    use(black_hole, tmp_path, monkeypatch)
    monkeypatch.setattr(download, "REACH_SECONDS", 0.5)
    assert source.resolve_default(None) == bundled
    assert "the hub can't be reached. Using the bundled" in capsys.readouterr().err


def test_a_silent_name_server_is_given_up(bundled, tmp_path, monkeypatch, capsys):
    """getaddrinfo knows no time-out."""
    use("http://hub.invalid", tmp_path, monkeypatch)
    monkeypatch.setattr(download, "REACH_SECONDS", 0.5)
    stop = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: stop.wait(60))
    assert source.resolve_default(None) == bundled
    stop.set()
    assert "the hub can't be reached. Using the bundled" in capsys.readouterr().err


def test_a_download_that_stops_is_said(server, bundled, monkeypatch, capsys):
    monkeypatch.setattr(source, "DEFAULT_MODEL", "org/name")
    server.cuts["model.safetensors"] = [0] * hub.ATTEMPTS
    assert source.resolve_default(None) == bundled
    assert re.fullmatch(r"org/name: the download stopped .*\n", capsys.readouterr().err)


def test_the_default_is_taken_from_the_hub(server, bundled, monkeypatch, capsys):
    monkeypatch.setattr(source, "DEFAULT_MODEL", "org/name")
    assert_same(source.resolve_default(None), server)
    assert capsys.readouterr() == ("", "")


def command(*arguments: str) -> list[str]:
    """`generate.py` with the stand-in as the default model, in a process of its own."""
    patch = "import sys, runpy, formats.source as s; s.DEFAULT_MODEL = 'org/name'; sys.argv = sys.argv[1:]; "
    return [
        sys.executable,
        "-c",
        patch + "runpy.run_path('generate.py', run_name='__main__')",
        "generate.py",
        *arguments,
    ]


SHORT = ("--max-new-tokens", "3", "--temperature", "0", "hi")


def test_the_command_downloads_quietly_and_answers(server):
    ended = subprocess.run(command(*SHORT), cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and ended.stdout and "org/name" not in ended.stderr
    assert "model.safetensors" in dict(server.fetched())


def test_an_interrupted_download_goes_on_in_the_next_run(server, tmp_path):
    server.stalls, server.cuts["model.safetensors"] = True, [40_000]
    with subprocess.Popen(command(*SHORT), cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert server.stalled.wait(60)
        while not any(part.stat().st_size for part in (tmp_path / "home").rglob("blobs/*.nanoqwen")):
            server.released.wait(0.05)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "generate.py: interrupted\n"
    assert process.returncode == 130
    server.requests.clear()
    [part] = (tmp_path / "home").rglob("blobs/*.nanoqwen")
    size = part.stat().st_size
    assert_same(source.resolve("org/name"), server)
    assert server.fetched() == [("model.safetensors", f"bytes={size}-")]


def test_a_terminal_shows_a_bar(server):
    ours, theirs = pty.openpty()
    with subprocess.Popen(command(*SHORT), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs, stdin=theirs) as process:
        os.close(theirs)
        shown = b""
        while b"Stopped" not in shown:
            try:
                shown += os.read(ours, 4096)
            except OSError:
                break
    os.close(ours)
    assert process.returncode == 0
    assert b"org/name" in shown and re.search(rb"\d+/\d+ .?B|\d+(\.\d+)? .?B", shown)


def test_the_command_answers_though_the_hub_is_silent(black_hole, tmp_path, monkeypatch):
    if not source.BUNDLED_MODEL.joinpath("model.safetensors").exists():
        pytest.skip("models/tiny is not in this checkout")
    use(black_hole, tmp_path, monkeypatch)
    ended = subprocess.run(command(*SHORT), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0 and ended.stdout
    first = ended.stderr.splitlines()[0]
    assert first == "org/name: not in the cache, and the hub can't be reached. Using the bundled tiny model."


def test_the_folder_of_a_run_is_its_last_checkpoint(tmp_path):
    run = tmp_path / "run"
    (run / "latest").mkdir(parents=True)
    from formats.source import resolve

    assert resolve(run) == run, "neither is a checkpoint, which its reader will say"
    (run / "config.yaml").write_text("train: {}")
    (run / "latest" / "config.json").write_text("{}")
    assert resolve(run) == run / "latest" and resolve(run / "latest") == run / "latest"
    (run / "config.json").write_text("{}")
    assert resolve(run) == run, "a checkpoint of its own"


def test_a_folder_around_the_model_means_the_model(tmp_path):
    """A Trainer's output, and a model's folder in the hub's cache."""

    def model(folder: Path) -> Path:
        folder.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (folder / name).touch()
        return folder

    trained = model(tmp_path / "out" / "checkpoint-500")
    (tmp_path / "out" / "runs").mkdir()
    assert source.resolve(tmp_path / "out") == trained
    cached = model(tmp_path / "models--org--name" / "snapshots" / COMMITS["main"])
    assert source.resolve(tmp_path / "models--org--name") == cached
    model(tmp_path / "out" / "checkpoint-1000")
    with pytest.raises(ValueError, match="no model itself, but there are checkpoint-1000, checkpoint-500 in it; give"):
        source.resolve(tmp_path / "out")
    (tmp_path / "out" / "adapter_config.json").touch()  # a model of its own, whatever is below
    assert source.resolve(tmp_path / "out") == tmp_path / "out"
    (tmp_path / "broken" / "1_Pooling").mkdir(parents=True)
    (tmp_path / "broken" / "1_Pooling" / "config.json").touch()
    assert source.resolve(tmp_path / "broken") == tmp_path / "broken"


@pytest.mark.parametrize(
    ("address", "meant"),
    [
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/", "Qwen/Qwen3-0.6B"),
        ("hf.co/Qwen/Qwen3-0.6B/tree/v1?not-for-all-audiences=true", "Qwen/Qwen3-0.6B@v1"),
        ("hf.co/Qwen/Qwen3-0.6B-GGUF:Q8_0", "Qwen/Qwen3-0.6B-GGUF:Q8_0"),
        ("https://hf.co/a/b/resolve/main/sub/x-Q8_0.gguf?download=true", "a/b/sub/x-Q8_0.gguf@main"),
        ("https://huggingface.co/a/b/blob/main/config.json", "a/b@main"),
        ("https://huggingface.co/a/b/resolve/refs%2Fpr%2F1/model.safetensors?download=true", "a/b@refs/pr/1"),
        ("https://huggingface.co/a/b/commit/" + "c" * 40, "a/b@" + "c" * 40),
        ("https://huggingface.co/a/b.git", "a/b"),
        ("git@hf.co:a/b.git", "a/b"),
        ("hf://a/b@v1", "a/b@v1"),
        ("hf://models/a/b", "a/b"),
        (" a/b/\n", "a/b"),
        ("https://huggingface.co/datasets/a/b", None),
        ("https://huggingface.co/Qwen", None),
        ("https://example.org/Qwen/Qwen3-0.6B", None),
    ],
)
def test_the_address_of_a_page_is_a_hub_id(monkeypatch, address, meant):
    asked = []
    monkeypatch.setattr(source, "_from_hub", lambda *given: asked.append(given[:3]) or Path())
    if meant is None:
        with pytest.raises(ValueError, match="not a hub id"):
            source.resolve(address)
    else:
        source.resolve(address)
        source.resolve(meant)
        assert asked[0] == asked[1]


def test_a_mirrors_address_is_followed_where_the_hub_is_that_mirror(monkeypatch):
    monkeypatch.setattr(source, "_from_hub", lambda *asked: asked)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    with pytest.raises(
        ValueError, match=r"no address of a model's page there; .*for a mirror of the hub set HF_ENDPOINT"
    ):
        source.resolve("https://hf-mirror.com/a/b/tree/main")
    monkeypatch.setenv("HF_ENDPOINT", "https://hf-mirror.com/")
    assert source.resolve("https://hf-mirror.com/a/b/tree/v1")[:2] == ("a/b", "v1")


@pytest.mark.parametrize("name", ["qwen3:0.6b", "Qwen3-0.6B", "library/nothing/qwen3:0.6b", "hf:Qwen/Qwen3-0.6B"])
def test_a_name_without_its_organisation_is_answered_with_the_whole(name):
    with pytest.raises(ValueError, match=r"did you mean Qwen/Qwen3-0\.6B\?"):
        source.resolve(name)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "https://huggingface.co/datasets/a/b", "s3://a/b", "\0"])
def test_what_can_be_no_model_is_one_line(name):
    with pytest.raises(ValueError, match="not a hub id"):
        source.resolve(name)


def test_a_file_of_a_directory_means_the_directory(tiny_checkpoint, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert source.resolve(tiny_checkpoint / name) == tiny_checkpoint
    assert source.resolve(f"file://{tiny_checkpoint}") == tiny_checkpoint
    alone = tmp_path / "model.safetensors"
    alone.write_bytes((tiny_checkpoint / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"without the config\.json that belongs beside it"):
        source.resolve(alone)


@pytest.fixture
def ollama(tmp_path) -> tuple[Path, Path]:
    """Ollama's folder with one model, and that model's manifest."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m", "qwen3")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    content = (tmp_path / "m").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    root = tmp_path / "ollama" / "models"
    manifest = root / "manifests/registry.ollama.ai/library/qwen3/0.6b"
    for folder in (root / "blobs", manifest.parent):
        folder.mkdir(parents=True)
    (root / "blobs" / f"sha256-{digest}").write_bytes(content)
    kinds = {"license": "a" * 64, "model": digest, "params": "b" * 64}
    prefix = "application/vnd.ollama.image."
    layers = [{"mediaType": prefix + kind, "digest": f"sha256:{value}"} for kind, value in kinds.items()]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return root.parent, manifest


def test_ollamas_models_are_ggufs_without_a_suffix(ollama, tmp_path):
    folder, manifest = ollama
    blob = next((folder / "models" / "blobs").iterdir())
    assert source.resolve(blob) == source.resolve(manifest) == blob
    for place in (folder, folder / "models", folder / "models" / "blobs"):
        with pytest.raises(ValueError, match=rf"Ollama's models; give the manifest of one: .*{manifest.name}"):
            source.resolve(place)
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text(f'# a comment\n\nFROM "{blob}"\nPARAMETER temperature 0.6\n')
    with pytest.raises(ValueError, match=f"a Modelfile of Ollama; give what its FROM names, {blob}$"):
        source.resolve(modelfile)
    for name in ("model", "pytorch_model.bin", "X.GGUF"):
        (tmp_path / name).write_bytes(blob.read_bytes())
        assert source.resolve(tmp_path / name) == tmp_path / name
        with pytest.raises(ValueError, match=r"no token_embd\.weight"):  # it was read as a GGUF
            open_checkpoint(tmp_path / name)
    manifest.write_text("{}")
    (tmp_path / "x.llamafile").write_bytes(b"MZqFpD=" + bytes(99))
    for path, line in ((manifest, "neither a directory nor"), (tmp_path / "x.llamafile", "a llamafile, a program")):
        with pytest.raises(ValueError, match=line):
            source.resolve(path)


def test_looking_for_ggufs_goes_four_folders_deep(tmp_path):
    for place in ("a/b/c/d", "a/b/c/d/e", ".hidden"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "m.gguf").touch()
    assert hub.ggufs(tmp_path) == ["a/b/c/d/m.gguf"]


REFUSALS = {  # status, X-Error-Code -> what is said, and whether a later try may succeed
    (401, None): ("401 Unauthorized; `hf auth login` with a token", False),
    (403, "GatedRepo"): ("403 Forbidden: accept the model's terms on its page, then `hf auth login`", False),
    (404, None): ("404 Not Found; check the address, and HF_ENDPOINT", False),
    (429, None): ("429 Too Many Requests; try later", True),
    (503, None): ("503 Service Unavailable; try later", True),
}


@pytest.mark.parametrize("refused", REFUSALS)
@pytest.mark.parametrize("part", ["/api/", "/resolve/"])
def test_a_hub_that_answers_with_an_error_is_not_called_out_of_reach(server, monkeypatch, part, refused):
    (status, code), (said, later) = refused, REFUSALS[refused]
    honest, asked = Handler.do_GET, []

    def refuse(self):
        if part not in self.path:
            return honest(self)
        asked.append(self.path)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()

    monkeypatch.setattr(Handler, "do_GET", refuse)
    with pytest.raises(ValueError) as error:
        source.resolve("org/name")
    assert said in str(error.value) and "can't be reached" not in str(error.value)
    assert isinstance(error.value, hub.HubUnreachable) == later
    assert len(asked) == (hub.ATTEMPTS if later and part == "/resolve/" else 1)


@pytest.mark.parametrize("page", [b"<!doctype html><html>Sign in to this network</html>", b"[]", b"{}", b'"x"'])
def test_an_answer_that_is_no_description_of_a_model(server, monkeypatch, page):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send(200, page))
    with pytest.raises(ValueError, match="the hub's answer is no description of a model; check HF_ENDPOINT"):
        source.resolve("org/name")
