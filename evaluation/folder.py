"""The folder of one evaluation: everything that a number on a card needs to be checked, and to be recomputed.

    protocol.json    the task, its questions' hash, prompts, sampling, seeds, the model's files, machine, versions
    outputs.jsonl    one line an answer, appended as it comes: a killed run resumes where it stopped
    results.json     what `results.py` computes from the two, and nothing else does
    report.md        the same for people

Nothing here imports torch: scoring again takes no model.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from formats.files import write_text
from formats.json_file import read_json

PROTOCOL, RESULTS, OUTPUT = "nanoqwen/protocol/1", "nanoqwen/results/1", "nanoqwen/output/1"
FREE = ("started", "machine", "versions", "commit", "batch", "command")
"""Keys of a protocol that may differ between a run and its continuation: they change no answer."""
MOST_LINE = 64 << 20  # bytes of one output


class Folder:
    """One run's folder, to be filled (`begin`) or read."""

    def __init__(self, path: Path):
        self.path = path
        self.protocol_file, self.results_file = path / "protocol.json", path / "results.json"
        self.outputs_file, self.report_file = path / "outputs.jsonl", path / "report.md"

    def begin(self, protocol: dict[str, Any], resume: bool) -> set[str]:
        """Writes the protocol, or compares it with the existing one; the ids of the answers that are there.

        Raises ValueError where another run, or this one without `resume`, is there.
        """
        protocol = json.loads(json.dumps({"schema": PROTOCOL, **protocol}))  # as it will be read
        if not self.protocol_file.exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise ValueError(f"--out {self.path}: holds other files; give a new folder")
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.protocol_file, json.dumps(protocol, indent=2, ensure_ascii=False) + "\n")
            return set()
        if not resume:
            raise ValueError(f"--out {self.path}: already holds a run; continue it with --resume, or give a new folder")
        before = read_json(self.protocol_file)
        for key in dict.fromkeys([*before, *protocol]):
            if key not in FREE and before.get(key) != protocol.get(key):
                old, new = (json.dumps(one.get(key), ensure_ascii=False)[:120] for one in (before, protocol))
                raise ValueError(
                    f"--resume: the run in {self.path} has another {key} ({old}, now {new}); use a new folder"
                )
        self._cut_torn_line()
        return {output["id"] for output in self.outputs()}

    def _cut_torn_line(self) -> None:
        """A kill may have left half a line at the end."""
        if not self.outputs_file.exists():
            return
        with self.outputs_file.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            end = size
            while end > 0:
                start = max(0, end - (1 << 16))
                file.seek(start)
                if (place := file.read(end - start).rfind(b"\n")) >= 0:
                    end = start + place + 1
                    break
                end = start
            if end < size:
                file.truncate(end)

    def append(self, outputs: list[dict[str, Any]]) -> None:
        """Lines that are on the disk when this returns."""
        with self.outputs_file.open("a", encoding="utf-8") as file:
            file.writelines(line(output) for output in outputs)
            file.flush()
            os.fsync(file.fileno())

    def sort(self, order: list[str]) -> None:
        """The lines in the order of the questions, whatever batches, kills and continuations they came from."""
        place = {key: index for index, key in enumerate(order)}
        write_text(self.outputs_file, "".join(map(line, sorted(self.outputs(), key=lambda o: place[o["id"]]))))

    def protocol(self) -> dict[str, Any]:
        protocol = read_json(self.protocol_file)
        if protocol.get("schema") != PROTOCOL:
            raise ValueError(f"{self.protocol_file}: schema {str(protocol.get('schema'))[:60]!r} is not {PROTOCOL}")
        return protocol

    def outputs(self) -> Iterator[dict[str, Any]]:
        """ValueError names the line that is none."""
        seen = set()
        with self.outputs_file.open("rb") as file:
            for number, text in enumerate(iter(lambda: file.readline(MOST_LINE), b""), 1):
                place = f"{self.outputs_file}: line {number:,}"
                try:
                    output = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{place}: not JSON ({str(error)[:80]}); run the evaluation again") from None
                if not isinstance(output, dict) or not isinstance(output.get("id"), str):
                    raise ValueError(f"{place}: an object with an id is expected")
                if output["id"] in seen:
                    raise ValueError(f"{place}: the id {output['id'][:60]!r} occurs twice")
                seen.add(output["id"])
                yield output

    def results(self) -> dict[str, Any]:
        results = read_json(self.results_file)
        if results.get("schema") != RESULTS:
            raise ValueError(f"{self.results_file}: schema {str(results.get('schema'))[:60]!r} is not {RESULTS}")
        return results


def line(output: dict[str, Any]) -> str:
    return json.dumps(output, ensure_ascii=False, allow_nan=False) + "\n"


def open_folder(path: Path) -> Folder:
    """A folder that holds a run, at least a part of one."""
    folder = Folder(path)
    for file in (folder.protocol_file, folder.outputs_file):
        if not file.is_file():
            raise ValueError(f"{path}: no {file.name} in it; give the --out folder of `evaluate.py run`")
    return folder
