"""Files that are whole or absent, and mapped ones: names, modes, threads, sizes."""

import os
import stat
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from formats.files import atomic_directory, atomic_file, write_text
from formats.json_file import read_json
from formats.safetensors_read import SafetensorsFile
from formats.threads import map_in_threads
from model import Config, Qwen3


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_have_the_mode_that_the_umask_asks_for(tmp_path, umask):
    sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    Qwen3(Config(**sizes, num_attention_heads=1, head_dim=2)).save_pretrained(tmp_path / "model")
    with atomic_directory(tmp_path / "other") as directory:
        save_file({"x": torch.zeros(1)}, directory / "x.safetensors")
    for file in (*(tmp_path / "model").iterdir(), *(tmp_path / "other").iterdir()):
        assert mode(file) == 0o640, file.name
    assert mode(tmp_path / "other") == 0o750


def test_writers_of_one_name_at_once_never_share_a_temporary_file(tmp_path):
    path, names, both = tmp_path / "file", [], threading.Barrier(2)

    def write(text: str) -> None:
        with atomic_file(path) as temporary:
            both.wait(10)
            names.append(temporary.name)
            temporary.write_text(text * 10_000)
            both.wait(10)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 2 and path.read_text() in ("a" * 10_000, "b" * 10_000)
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("formats.files.secrets.token_hex", lambda _: "guessed")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".file.guessed.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "file", "theirs")
    assert victim.read_text() == "mine" and not (tmp_path / "file").exists()


def test_an_older_directory_stays_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    old = tmp_path / "run"
    old.mkdir()
    (old / "kept").write_text("1")

    rename = type(tmp_path).rename

    def fail(path, target):
        if path.suffix == ".tmp":
            raise OSError("the disk went away")
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", fail)
    with pytest.raises(OSError, match="went away"), atomic_directory(old) as directory:
        (directory / "new").write_text("2")
    assert [file.name for file in tmp_path.iterdir()] == ["run"] and (old / "kept").read_text() == "1"


def test_a_file_larger_than_the_memory_is_mapped(tmp_path):
    """Sparse, 1 TB: a reader that reserves memory for all of it fails in mmap."""
    header = b'{"x":{"dtype":"U8","shape":[1099511627776],"data_offsets":[0,1099511627776]}}'
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        try:
            file.truncate(8 + len(header) + 2**40)
        except OSError:
            pytest.skip("this file system has no sparse files of 1 TB")
        file.write(len(header).to_bytes(8, "little") + header)
    tensor = SafetensorsFile(path).read("x")
    tensor[5] = 7  # copied on write
    assert tensor.numel() == 2**40 and tensor[5] == 7
    del tensor
    assert not np.memmap(path, mode="r", offset=8 + len(header))[5]


@pytest.mark.parametrize("ending", ["whole", "stopped early", "raises", "two at once", "never closed"])
def test_threads_stay_as_they_were(ending):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inside = []

        def work(number: int) -> int:
            inside.append(torch.get_num_threads())
            if ending == "raises" and number == 4:
                raise OSError("read error")
            return number

        results = map_in_threads(work, range(9))
        if ending == "whole":
            assert list(results) == list(range(9))
        elif ending == "stopped early":
            next(results)
            results.close()
        elif ending == "raises":
            with pytest.raises(OSError):
                list(results)
        elif ending == "two at once":
            pairs = zip(results, map_in_threads(work, range(9)), strict=True)
            assert [a + b for a, b in pairs] == list(range(0, 18, 2))
        else:
            next(results)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 3 and seen == [3] and set(inside) == {1}
    finally:
        torch.set_num_threads(before)


def test_a_directory_is_not_called_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="a directory, not a file of JSON; give the file"):
        read_json(tmp_path)
