"""Was this made from that, and is it still what was written down?

A GGUF of ours is determined by its base, byte for byte: the writer is run again, its bytes are compared with the
file's as they are written, and nothing is stored; inspection/requantize.py does so for int8 and int4. Other copies are
compared tensor by tensor.
"""

import io
import json
from pathlib import Path
from typing import Any

import torch

from formats import record
from formats.gguf import names, writer
from formats.gguf.reader import GGUF
from formats.json_file import read_json
from inspection import requantize, weights
from inspection.findings import Ledger
from inspection.manifest import CLAIMED, NAME, SCHEMA, VERIFIED
from ops.encode import gguf_packer

TYPES = {number: type for type, number in names.FILE_TYPES.items()}


class _Compare(io.RawIOBase):
    """Takes a GGUF's bytes from the writer, and counts for each tensor how many of them differ from the file's."""

    def __init__(self, file: GGUF):
        self._file, self._last, self._written = file, b"", 0
        self._stream = file.path.open("rb")
        self._at: dict[str, int] = {}
        self.different: dict[str, tuple[int, int]] = {}  # tensor -> (bytes that differ, the first of them)

    def close(self) -> None:
        self._stream.close()
        super().close()

    def tell(self) -> int:
        return self._written

    def write(self, data: Any) -> int:
        self._last = memoryview(data).cast("B")
        self._written += len(self._last)
        return len(self._last)

    def on_tensor(self, name: str, size: int) -> None:
        """The last write was this tensor's next bytes."""
        within = self._at.get(name, 0)
        self._at[name] = within + size
        stored = self._file.stored.get(name)
        if stored is None or within + size > stored.size:
            return
        ours = torch.frombuffer(bytearray(self._last), dtype=torch.uint8)
        self._stream.seek(stored.start + within)
        theirs = torch.frombuffer(bytearray(self._stream.read(size)), dtype=torch.uint8)
        if not torch.equal(ours, theirs):
            wrong = (ours != theirs).nonzero()
            count, first = self.different.get(name, (0, within + int(wrong[0])))
            self.different[name] = (count + len(wrong), first)


def compare_gguf(ledger: Ledger, path: Path, base: Path) -> list[str]:
    """Makes a .gguf again from its base, in memory, and holds the file against it. Returns the lines that say how."""
    file, checkpoint = GGUF(path), weights.open_weights(base)
    number = file.metadata.get("general.file_type")
    type = TYPES.get(number)
    if type is None:
        raise ValueError(
            f"{path}: general.file_type is {str(number)[:20]}; only {', '.join(writer.TYPES)} can be rebuilt"
        )
    planned = {tensor.name: tensor for tensor in writer.plan(checkpoint, type)}
    where, lines = path.name, []
    for name, tensor in planned.items():
        stored = file.stored.get(name)
        if stored is None:
            ledger.find("base-differs", where, f"tensor {name} is missing")
        elif stored.format.name != tensor.format.name or tuple(stored.shape) != tuple(tensor.shape):
            is_, gives = f"{stored.format.name} {list(stored.shape)}", f"{tensor.format.name} {list(tensor.shape)}"
            ledger.find("base-differs", where, f"tensor {name} is {is_}, the base gives {gives}")
    for name in file.stored:
        if name not in planned:
            ledger.find("base-differs", where, f"tensor {name} is not in the base")
    with _Compare(file) as compare:
        writer.write_to(compare, checkpoint, type, compare.on_tensor, gguf_packer(planned.values()))
    for name, (count, first) in compare.different.items():
        ledger.find(
            "base-differs",
            where,
            f"tensor {name}: {count:,} bytes differ, the first at {file.stored[name].start + first:,}",
        )
    keys = _different_keys(file, checkpoint, type, planned)
    for key in keys:
        ledger.find("base-metadata", where, f"{key} differs from what the base gives")
    wrong = [one for one in ledger.findings if one.id == "base-differs"]
    same = sum(name not in compare.different and name in file.stored for name in planned)
    if not wrong and not keys:
        lines.append(f"{where}: rebuilt from {base} as {type}: byte-identical ({path.stat().st_size:,} bytes)")
    else:
        lines.append(f"{where}: rebuilt from {base} as {type}: {same:,} of {len(planned):,} tensors are byte-identical")
    relation = f"converted to {type}" if type in ("f32", "f16", "bf16") else f"quantized to {type}"
    _add_lineage(ledger, relation, base, CLAIMED if wrong else VERIFIED)
    return lines


def _add_lineage(ledger: Ledger, relation: str, base: Path, status: str) -> None:
    entry = {"relation": relation, "repo": base.resolve().name, "revision": None, "status": status}
    ledger.facts.setdefault("lineage", []).append(entry)


def _different_keys(file: GGUF, checkpoint: Any, type: str, planned: dict[str, Any]) -> list[str]:
    pairs = writer.pairs(checkpoint, type, list(planned.values()))
    ours = {key: value.value for key, value in pairs.items()}
    found = [key for key in {**ours, **file.metadata} if not _same(ours.get(key), file.metadata.get(key))]
    return found or ([] if list(ours) == list(file.metadata) else ["the order of the keys"])


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return torch.tensor(ours, dtype=torch.float32).item() == torch.tensor(theirs, dtype=torch.float32).item()
    return ours == theirs


def compare_checkpoints(ledger: Ledger, path: Path, base: Path) -> list[str]:
    """Tensor by tensor: equal, equal after a cast, or changed and by how much; int8 and int4 are rebuilt."""
    if (scheme := requantize.scheme_of(path)) and not requantize.scheme_of(base):
        lines, kind = requantize.compare(ledger, path, base, scheme)
        _add_lineage(ledger, f"quantized to {kind}" if kind else "quantized from", base, VERIFIED if kind else CLAIMED)
        return lines
    ours, theirs = weights.open_weights(path), weights.open_weights(base)
    equal, cast, changed = 0, 0, []
    for name in ours.tensors:
        if name not in theirs.tensors:
            if name != "lm_head.weight":
                ledger.find("base-differs", None, f"tensor {name} is not in the base")
            continue
        mine, base_values = ours.read(name), theirs.read(name)
        if mine.shape != base_values.shape:
            ledger.find(
                "base-differs", None, f"tensor {name} is {list(mine.shape)}, the base's {list(base_values.shape)}"
            )
        elif mine.dtype == base_values.dtype and torch.equal(mine, base_values):
            equal += 1
        elif torch.equal(mine, base_values.to(mine.dtype)):
            cast += 1
        else:
            furthest = (mine.float() - base_values.float()).abs().max().item()
            changed.append((name, furthest))
        ours.release(name)
        theirs.release(name)
    for name in theirs.tensors:
        if name not in ours.tensors and name != "lm_head.weight":
            ledger.find("base-differs", None, f"tensor {name} of the base is missing")
    for name, furthest in changed:
        ledger.find("base-differs", None, f"tensor {name} differs by up to {furthest:.4g}")
    wrong = any(one.id == "base-differs" for one in ledger.findings)
    relation = "changed from" if wrong else "cast from" if cast else "copy of"
    _add_lineage(ledger, relation, base, CLAIMED if wrong else VERIFIED)
    return [f"against {base}: {equal:,} tensors byte-identical, {cast:,} equal after a cast, {len(changed):,} changed"]


# ---- what was written down -------------------------------------------------------------------------------------------


def read_manifest(directory: Path) -> dict[str, Any]:
    """An earlier audit's manifest, or the record of a conversion or a run. ValueError where it is neither."""
    path = directory / NAME if directory.is_dir() else directory
    if not path.is_file():
        raise ValueError(f"--verify {directory}: there is no {NAME}; `audit.py SRC --out {directory}` writes one")
    manifest = read_json(path)
    files = manifest.get("files", [])
    if manifest.get("schema") != SCHEMA or not isinstance(files, list) or not (files or manifest.get("results")):
        raise ValueError(f"{path}: not a manifest of an audit ({SCHEMA}); audit with --out first")
    for file in files:
        if not (isinstance(file, dict) and isinstance(file.get("path"), str) and type(file.get("bytes")) is int):
            raise ValueError(f"{path}: an entry of files has no path or size; audit with --out again")
    return manifest


def verify(ledger: Ledger, manifest: dict[str, Any], ignored: tuple[str, ...] = ()) -> list[str]:
    """Holds the examined files against a manifest; a changed tensor is named."""
    before = {file["path"]: file for file in manifest["files"]}
    now = {file.path: file for file in ledger.files if file.path not in ignored}
    tensors = {
        entry["name"]: entry
        for entry in manifest.get("tensors", [])
        if isinstance(entry, dict) and isinstance(entry.get("name"), str)
    }
    found = {entry["name"]: entry for entry in ledger.facts.get("tensors", [])}
    same = 0
    for path, file in before.items():
        if path in ignored:
            continue
        if path not in now:
            ledger.find("removed", path, "in the manifest, not in the repository")
        elif now[path].sha256 is None or file.get("sha256") is None:
            if now[path].bytes != file["bytes"]:
                ledger.find("changed", path, f"{now[path].bytes:,} bytes instead of {file['bytes']:,}")
            else:
                now[path].examined = False
                now[path].note = "no hash to compare"
        elif now[path].sha256 != file["sha256"]:
            changed = [
                name
                for name, entry in tensors.items()
                if entry.get("file") == path and found.get(name, {}).get("sha256") != entry.get("sha256")
            ]
            what = f"tensor {', '.join(changed[:4])}" if changed and found else "its bytes"
            size = (
                f"; {now[path].bytes:,} bytes instead of {file['bytes']:,}" if now[path].bytes != file["bytes"] else ""
            )
            ledger.find("changed", path, f"{what} changed{size}")
        else:
            same += 1
    for path in now:
        if path not in before:
            ledger.find("added", path, "in the repository, not in the manifest")
    return [f"{same:,} of {len(before):,} files are byte-identical to the manifest"]


def verify_record(ledger: Ledger, root: Path) -> list[str]:
    """The same against the record that convert.py or train.py wrote beside its result."""
    try:
        entry = record.verify(root)
    except ValueError as error:
        ledger.find("changed", None, str(error))
        return [f"{root.name} is not what its record says"]
    return [f"{len(entry['files']):,} files are byte-identical to the record"]


def examine_record(ledger: Ledger, root: Path) -> None:
    """What convert.py or train.py wrote down: the bytes of the result, and of the source where it is here."""
    folder, name = (root, ".") if root.is_dir() else (root.parent, root.name)
    try:
        entry = record.read(folder, name)
    except (ValueError, OSError) as error:
        ledger.find("lineage-broken", record.NAME, str(error))
        return
    if entry is None:
        return
    status, source = CLAIMED, entry.get("source") if isinstance(entry.get("source"), dict) else {}
    try:
        record.verify(root)
        status = _check_source(ledger, source)
    except (ValueError, OSError) as error:
        ledger.find("lineage-broken", record.NAME, str(error))
    relation = "trained from" if entry.get("stage") else "converted from"
    details = {
        key: entry[key]
        for key in ("tool", "commit", "stage", "data", "steps", "to", "type", "for", "group_size")
        if key in entry
    }
    lineage = {
        "relation": relation,
        "repo": str(source.get("model") or "random weights")[:200],
        "revision": source.get("revision"),
        "status": status,
    }
    ledger.facts.setdefault("lineage", []).append({**lineage, "record": details})


def _check_source(ledger: Ledger, source: dict[str, Any]) -> str:
    """Verified where the source's files are on this machine with the hashes that the record names."""
    place, files = source.get("path"), source.get("files")
    if not isinstance(place, str) or not isinstance(files, dict) or not files or not Path(place).exists():
        return CLAIMED
    folder = Path(place) if Path(place).is_dir() else Path(place).parent
    for name, file in files.items():
        path = folder / Path(str(name)).name
        if not path.is_file() or not isinstance(file, dict) or path.stat().st_size != file.get("bytes"):
            ledger.find("lineage-broken", record.NAME, f"the source's {name} is not what it was made from")
            return CLAIMED
        if record.sha256(path) != file.get("sha256"):
            ledger.find("lineage-broken", record.NAME, f"the source's {name} is not what it was made from")
            return CLAIMED
    return VERIFIED


def dump(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, default=str) + "\n"
