"""The folder of a training run: resolved config, a line of metrics a step, checkpoints that are whole or absent.

    config.yaml      the resolved settings; --resume accepts changes that leave the mathematics as it is
    metrics.jsonl    one object a step
    checkpoints/     the last ones: the official layout, trainer.safetensors and trainer.json
    latest           a link to the last of them

A kill at any moment leaves at most a temporary folder, half a line, or metrics of steps after the last checkpoint;
--resume removes them.
"""

import errno
import json
import operator
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import console
from formats import record
from formats.files import atomic_directory, fsync, write_text
from formats.gguf.reader import GGUF
from formats.source import resolve
from training import schema
from training.schema import Settings

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TRAINER_FILES = ("trainer.json", "trainer.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PLACES = ("data.train", "data.split", "data.subset", "data.limit")  # may change where the rows are the same
CONSEQUENCES = {  # of a change in the middle of a run, by the key's first part
    "stage": "its weights and optimizer state would continue under another objective",
    "train": "its remaining steps would take other rows or other updates",
    "model": "its checkpoints hold the weights of the model that it began with",
    "data": "its remaining steps would take other rows, some a second time and some never",
    "lora": "its saved adapters would not fit",
    "dpo": "its loss would change in the middle",
    "grpo": "its loss would change in the middle",
    "optimizer": "its remaining updates would not be those it was planned with",
    "schedule": "its remaining updates would not be those it was planned with",
}


class Run:
    """One run, new or resumed.

    `step` is that of its last checkpoint, 0 if there is none; `changed` holds the keys that were changed on resume,
    each with its old and new value.
    """

    def __init__(self, settings: Settings, resume: bool):
        """Reads how far the run is; ValueError if it can't be continued with these settings."""
        self.path, self.keep = Path(settings.train.out), settings.train.keep
        self.latest, self.metrics, self.config = (self.path / n for n in ("latest", "metrics.jsonl", "config.yaml"))
        if self.latest.is_symlink() and not self.latest.exists():
            raise ValueError(f"{self.latest}: links to {self.latest.readlink()}, which is not there; {self._another()}")
        self.exists = self.config.exists()
        foreign = next((path for path in (self.latest, self.metrics) if path.exists()), None)
        if foreign and not self.exists:
            raise ValueError(
                f"{foreign} is not of a run that can be resumed (no config.yaml); choose another train.out"
            )
        self.step = self._trainer_json()["step"] if self.latest.exists() else 0
        self.changed: dict[str, tuple[Any, Any]] = {}
        if self.exists and not resume:
            raise ValueError(f"train.out {self.path} already holds a run; add --resume or choose another folder")
        if self.exists:
            self._check_changes(settings)

    def open(self, settings: Settings, resume: bool) -> None:
        """Prepares the folder for the next step. One process calls this, once all have read the folder."""
        if resume and not self.exists:
            console.notice(f"{self.path} holds no run yet; starting from the beginning")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"train.out {self.path} can't be a folder ({error.strerror}); choose another") from None
        write_text(self.config, schema.as_yaml(settings))
        self._forget_after(self.step)
        self.log_file = self.metrics.open("a", encoding="utf-8")
        self.origin, files = origin(settings, is_resumed=self.step > 0)
        self._source_hashes = record.HashThread(files)

    def _check_changes(self, settings: Settings) -> None:
        """ValueError for what would change the mathematics of the rest of the run."""
        saved = schema.load(self.config)  # keys that are newer than the run have their defaults
        if settings.model.fingerprint is None:
            settings.model.fingerprint = saved.model.fingerprint
        if saved.data.fingerprint is None:  # a run on the corpus, of a version that had none for it
            saved.data.fingerprint = settings.data.fingerprint
        self.changed = differences(schema.resolved(saved), schema.resolved(settings))
        same_data = settings.data.fingerprint is not None and "data.fingerprint" not in self.changed
        allowed = schema.may_change() | (set(PLACES) if same_data else set())
        refused = [name for name in self.changed if name not in allowed]
        if refused:
            said = "; ".join(f"{name}: {self.changed[name][0]!r} -> {self.changed[name][1]!r}" for name in refused)
            why = "; ".join(dict.fromkeys(CONSEQUENCES[name.partition(".")[0]] for name in refused))
            raise ValueError(
                f"--resume: {self.config} has other settings ({said}): {why}; use those or a new train.out"
            )
        if settings.train.steps < self.step:
            raise ValueError(
                f"--resume: train.steps {settings.train.steps} is less than the {self.step} of {self.latest}"
            )

    def _trainer_json(self) -> dict[str, int]:
        path = self.latest / "trainer.json"
        with self._damage(path):
            found = json.loads(path.read_text(encoding="utf-8"))
            return {name: operator.index(found[name]) for name in ("step", "tokens")}

    @contextmanager
    def _damage(self, path: Path) -> Iterator[None]:
        """Errors from a damaged file of the last checkpoint, as a ValueError that says what to do."""
        try:
            yield
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: can't be read ({error}); {self._another()}") from None

    def _another(self) -> str:
        return f"link another folder of {self.path / 'checkpoints'} as {self.latest}, or begin a new train.out"

    def _forget_after(self, step: int) -> None:
        """Steps that were logged but not saved will be done again; a line cut by a kill goes with them."""
        with self._damage(self.metrics):
            text = self.metrics.read_text(encoding="utf-8") if self.metrics.exists() else ""
            kept = text.splitlines(keepends=True)[:step]
            steps = [json.loads(line)["step"] for line in kept]
        if steps != list(range(1, step + 1)):
            raise ValueError(f"{self.metrics}: lacks steps that {self.latest} has; this run can't be resumed")
        write_text(self.metrics, "".join(kept))
        for leftover in self.path.glob("checkpoints/.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def log(self, record: dict[str, Any]) -> None:
        with disk_errors(self.metrics):
            self.log_file.write(json.dumps(record) + "\n")
            self.log_file.flush()

    def save(
        self, write_model: Callable[[Path], None], state: dict[str, Tensor], step: int, tokens: int, tokenizer: Path
    ) -> None:
        """Writes a checkpoint: the model (by `write_model`), the tokenizer's files, the trainer's tensors and counters,
        and a record of its origin."""
        directory = self.path / "checkpoints" / f"step-{step:08d}"
        with disk_errors(directory):
            os.fsync(self.log_file.fileno())  # a checkpoint never knows more steps than the metrics
            with atomic_directory(directory) as temporary:
                write_model(temporary)
                copy_tokenizer(tokenizer, temporary)
                state = {name: tensor.contiguous() for name, tensor in state.items()} | random_state()
                save_file(state, temporary / "trainer.safetensors")
                counters = json.dumps({"step": step, "tokens": tokens})
                (temporary / "trainer.json").write_text(counters + "\n", encoding="utf-8")
                about = {**self.origin, "source": {**self.origin["source"], "files": self._source_hashes.result()}}
                record.write_directory(temporary, {**about, "steps": step, "tokens": tokens}, TRAINER_FILES)
            link = self.path / ".latest.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(directory.relative_to(self.path))
            link.replace(self.latest)
            fsync(self.path)
        # Of the steps up to this one: later checkpoints are there if an earlier one was linked as `latest`.
        made = sorted(path for path in directory.parent.glob("step-*") if path.name <= directory.name)
        for old in made[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def load_state(self) -> tuple[dict[str, Tensor], int]:
        """Sets the random state; returns the trainer's tensors and the tokens seen."""
        path = self.latest / "trainer.safetensors"
        with self._damage(path):
            state = load_file(path)
            torch.set_rng_state(state.pop("random.cpu"))
        if (cuda := state.pop("random.cuda", None)) is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda)
        return state, self._trainer_json()["tokens"]


def origin(settings: Settings, is_resumed: bool) -> tuple[dict[str, Any], dict[str, Path]]:
    """What the record of each checkpoint says about the run, and the files that the run starts from; a resumed one may
    no longer have them."""
    init = settings.model.init
    try:
        path = None if init is None else resolve(init, "model.init").resolve()
    except ValueError:
        if not is_resumed:
            raise
        path = None
    beside = [] if path is None else [path] if path.is_file() else [path / "config.json", *path.glob("*.safetensors")]
    files = {file.name: file for file in beside if file.is_file() and file.name not in TRAINER_FILES}
    source = {"model": init, "path": path and str(path), "revision": snapshot_commit(path)}
    about = {"stage": settings.stage, "data": schema.resolved(settings)["data"], "seed": settings.train.seed}
    return {**about, "source": source}, files


def snapshot_commit(path: Path | None) -> str | None:
    """The commit of a snapshot in the hub's cache."""
    return path.name if path is not None and path.parent.name == "snapshots" else None


def random_state() -> dict[str, Tensor]:
    state = {"random.cpu": torch.get_rng_state()}
    return state | ({"random.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def differences(old: dict[str, Any], new: dict[str, Any], place: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys with different values, dotted: (old, new)."""
    changed = {}
    for name in dict.fromkeys([*old, *new]):
        before, after, where = old.get(name), new.get(name), f"{place}{name}"
        if isinstance(before, dict) and isinstance(after, dict):
            changed |= differences(before, after, where + ".")
        elif before != after:
            changed[where] = (before, after)
    return changed


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What keeps `path` from being written, as an OSError that names it. For a full disk, which safetensors reports by
    an error class of its own, the line says no more than that."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        full = [os.strerror(number) for number in FULL_DISK if os.strerror(number) in str(error)]
        reason, fix = (full[0], "make room, then continue") if full else (error, "continue")
        raise OSError(f"{path} can't be written ({reason}); {fix} with --resume") from None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files and the chat template, from a folder or out of a .gguf file."""
    if source.is_file():
        for name, content in zip(TOKENIZER_FILES, GGUF(source).tokenizer(), strict=False):
            write_text(target / name, json.dumps(content, ensure_ascii=False))
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
