"""Small training runs for the tests: in this process, or in processes of their own that a fault can end.

A process that has used PyTorch must not fork: its threads and locks do not survive that, and the CUDA build refuses to
train there. So children come from multiprocessing's fork server, a process that has imported `train` and nothing more,
which spares each of them the seconds that the import takes. A fault is called in the child before its work.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import train
import training.run
from training import schema

ROOT = Path(__file__).parent.parent
CONFIG = {
    "stage": "sft",
    "train": {
        "steps": 12,
        "save_every": 4,
        "batch": 4,
        "accumulate": 2,
        "sequence": 256,
        "threads": 1,
        "device": "cpu",
    },
    "model": {
        "tokenizer": str(ROOT / "models" / "tiny"),
        "config": {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        },
    },
    "optimizer": {"lr": 0.006},
}


def settings(config: Path, *overrides: str) -> schema.Settings:
    return schema.load(config, [f"train.out={config.parent / 'run'}", *overrides])


def run(config: Path, *overrides: str, resume: bool = False) -> list[dict]:
    """A whole run in this process, in the folder `run` beside its config; the metrics."""
    train.Trainer(settings(config, *overrides), resume).train()
    return metrics(config.parent / "run")


def run_with_equal_weights(config: Path, *overrides: str) -> None:
    """A run of two processes, which end with the same weights."""
    trainer = train.Trainer(settings(config, *overrides), resume=False)
    trainer.train()
    total = float(sum(p.abs().sum() for p in trainer.model.parameters()))
    assert trainer.processes.sum(total) / 2 == total


SAID = 7  # how run_or_say ends when the error came and said what it should


def run_or_say(config: Path, error: type[Exception], words: str, *overrides: str) -> None:
    """A run that should end with `error`, and `words` in its message."""
    try:
        run(config, *overrides)
    except error as caught:
        sys.exit(SAID if words in str(caught) else 8)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- faults ---


class Fault(NamedTuple):
    """`act(*arguments)` happens when step `step` begins; with `rank`, in that process alone."""

    step: int
    act: Callable[..., Any]
    arguments: tuple = ()
    rank: int | None = None

    def __call__(self) -> None:
        step = train.Trainer.step
        if self.rank is not None and self.rank != int(os.environ["RANK"]):
            return

        def faulty(trainer: train.Trainer, number: int) -> dict[str, Any]:
            if number == self.step:
                self.act(*self.arguments)
            return step(trainer, number)

        train.Trainer.step = faulty


def killed_while_saving() -> None:
    """The process is killed when the checkpoint's trainer.safetensors is half written."""

    def save_half(tensors: dict, path: Path) -> None:
        Path(path).write_bytes(b"half")
        kill()

    training.run.save_file = save_half


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def send(number: int) -> None:
    """The signal, and the time that its handler needs."""
    os.kill(os.getpid(), number)
    time.sleep(0.05)


def fill_disk(size: int) -> None:
    """No file can grow beyond `size` bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# --- processes ---


def in_child(work: Callable, *arguments: Any, fault=None, **named: Any) -> int:
    """Runs `work`, a function of a module, in another process; its exit status, or minus the signal that ended it."""
    (status,) = _in_children([{}], work, arguments, named, fault)
    return status


def in_processes(count: int, work: Callable, *arguments: Any, fault=None, **named: Any) -> list[int]:
    """Runs `work` in `count` processes with the environment that torchrun would give them; how each of them ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return _in_children(ranks, work, arguments, named, fault)


def _in_children(environments: list[dict], work: Callable, arguments: tuple, named: dict, fault) -> list[int]:
    children = [
        _start_method().Process(target=_child, args=(environment, fault, work, arguments, named))
        for environment in environments
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


def _start_method():
    """The fork server: running, with this module imported and no thread but its own."""
    method = get_context("forkserver")
    method.set_forkserver_preload(["pytest", "runs"])
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, PYTHONPATH=path, OPENBLAS_NUM_THREADS="1"):
        forkserver.ensure_running()
    return method


def _child(environment: dict[str, str], fault, work: Callable, arguments: tuple, named: dict) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    if fault is not None:
        fault()
    work(*arguments, **named)
