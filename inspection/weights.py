"""What is verified from the bytes of the weights: parameters, dtypes, and values that no trained model should have.

Headers are read by inspection/contents.py; here they are held against config.json, and where the weights lie on this
machine each tensor is read once, one in memory at a time, hashed and looked at.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

import model
from formats.checkpoint import open_checkpoint
from formats.dequantize import unpacked
from formats.gguf.reader import GGUF
from formats.safetensors_read import Checkpoint, SafetensorsFile
from formats.shards import INDEX, NOT_MODELS, SINGLE, weight_files
from inspection.findings import Ledger
from inspection.tree import Tree

NORM_RANGE = 1e3  # a bound of our own: a weight that amplifies a normed value more than a thousand times
NORM_OUTLIER = 100  # times the median of the same norm in all layers
FAMILY = ("qwen3", "qwen3_moe", "qwen2")
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
UNREADABLE = {
    *("weights-malformed", "weights-overlap", "weights-gap", "weights-duplicate-key", "weights-trailing-bytes"),
    *("truncated", "pointer-file"),
}
SMALL = 64  # values below which equal tensors are a coincidence


def parameters_of_config(config: model.Config) -> tuple[int, int]:
    """(parameters, those that one token uses) of the model that a config describes; a tied head counts once."""
    hidden, head = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    bias = config.attention_bias or config.model_type == "qwen2"
    attention = 2 * hidden * q + 2 * hidden * kv + (q + 2 * kv) * bias + (hidden * config.attention_bias)
    attention += 2 * hidden + (2 * head if config.model_type != "qwen2" else 0)
    total = active = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2) + hidden
    for layer in range(config.num_hidden_layers):
        if config.is_sparse(layer):
            expert, router = 3 * hidden * config.moe_intermediate_size, hidden * config.num_experts
            total += attention + router + config.num_experts * expert
            active += attention + router + config.num_experts_per_tok * expert
        else:
            mlp = 3 * hidden * config.intermediate_size
            total += attention + mlp
            active += attention + mlp
    return total, active


def examine_index(ledger: Ledger, where: str, index: Any, names: Collection[str]) -> None:
    """An index of shards (*.index.json) against the files beside it, `names`, and the headers of those that were read.

    Loaders choose by the names of files which of several sets of weights they open, so an index counts whether or not
    a whole file lies beside it.
    """
    stated = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(stated, dict) or not all(isinstance(shard, str) for shard in stated.values()):
        ledger.find("weights-index", where, "has no weight_map that names the shard of each tensor")
        return
    folder, shards = where.rpartition("/")[0], sorted(set(stated.values()))
    path = {shard: f"{folder}/{shard}" if folder else shard for shard in shards}
    if missing := [shard for shard in shards if path[shard] not in names]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        which = f"{', '.join(shard[:80] for shard in missing[:3])}{more}"
        ledger.find("weights-index", where, f"names {which}, which {'is' if len(missing) == 1 else 'are'} not there")
        return
    headers = ledger.facts.get("safetensors", {})
    if not shards or not all(path[shard] in headers for shard in shards):
        return
    actual = {name: shard for shard in shards for name in headers[path[shard]][0]}
    wrong = [name for name in {**stated, **actual} if stated.get(name) != actual.get(name)]
    if wrong:
        places = f"tensor {wrong[0][:80]} is stated in {stated.get(wrong[0])} but is in {actual.get(wrong[0])}"
        ledger.find("weights-index", where, f"{places} ({len(wrong):,} such tensors)")


def examine_headers(ledger: Ledger, config: dict[str, Any] | None) -> None:
    """Parameters and dtypes from the containers' headers, and config.json held against them."""
    counts, dtypes, formats = Counter(), Counter(), []
    shapes: dict[str, tuple[int, ...]] = {}
    found = {
        where: of
        for where, of in ledger.facts.get("safetensors", {}).items()
        if "/" not in where and where not in NOT_MODELS
    }
    loaded = {
        where: of for where, of in found.items() if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", where)
    } or found
    for where, (tensors, _) in loaded.items():
        formats.append("safetensors")
        for name, info in tensors.items():
            if name in shapes:
                ledger.find("weights-index", where, f"tensor {name[:80]} is in two shards")
            shapes[name] = info.shape
            counts[name] = math.prod(info.shape)
            dtypes[DTYPES.get(str(info.dtype).removeprefix("torch."), str(info.dtype).removeprefix("torch."))] += (
                counts[name]
            )
    for where, head in ledger.facts.get("gguf", {}).items():
        if "/" in where:
            continue
        formats.append("gguf")
        if len(ledger.facts["gguf"]) == 1 and not shapes:
            for name, tensor in head.tensors.items():
                counts[name] = math.prod(tensor.shape)
                dtypes[tensor.format.name] += counts[name]
    pickled = [file.path for file in ledger.files if file.format.startswith(("pickle", "pytorch"))]
    formats += ["pickle"] * bool(pickled)
    facts = ledger.facts
    facts["weight_formats"] = sorted(set(formats))
    if not counts:
        if not formats:
            ledger.find("weights-none", None, "no safetensors, GGUF or pickle")
        return
    tied = bool(config and config.get("tie_word_embeddings"))
    stored = sum(counts.values())
    redundant = counts.get(model.HEAD, 0) if tied and model.EMBEDDING in counts else 0
    facts["stored_values"], facts["dtypes"] = stored, dict(dtypes.most_common())
    is_packed = bool(config and any(key.startswith("quantization") for key in config))
    if not is_packed:
        facts["parameter_count"] = stored - redundant
    facts["embedding_rows"] = next(
        (shape[0] for name, shape in shapes.items() if name.endswith("embed_tokens.weight") and len(shape) == 2), None
    )
    if config and shapes:
        _hold_config(ledger, config, shapes, dtypes, is_packed)


def _hold_config(
    ledger: Ledger, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], dtypes: Counter, is_packed: bool
) -> None:
    stated = config.get("torch_dtype") or config.get("dtype")
    if isinstance(stated, str) and stated in DTYPES and not is_packed:
        floats = Counter({name: count for name, count in dtypes.items() if name in DTYPES.values()})
        if floats and DTYPES[stated] != floats.most_common(1)[0][0]:
            ledger.find(
                "dtype-mismatch", "config.json", f"says {stated}, the weights are {floats.most_common(1)[0][0]}"
            )
    if config.get("model_type") not in FAMILY:
        return
    try:
        parsed = model.Config.from_dict(config)
    except (ValueError, TypeError):
        return  # consistency.examine_config reports it
    ledger.facts["parameters_of_config"] = parameters_of_config(parsed)[0]
    if is_packed:
        return
    rows = shapes.get(model.EMBEDDING)
    if rows and rows[0] != parsed.vocab_size:
        ledger.find(
            "weights-mismatch",
            "config.json",
            f"vocab_size {parsed.vocab_size:,}, but the embedding has {rows[0]:,} rows",
        )
    facts = ledger.facts
    if facts["parameter_count"] != facts["parameters_of_config"]:
        ledger.find(
            "weights-mismatch",
            "config.json",
            f"describes {facts['parameters_of_config']:,} parameters, the weights have {facts['parameter_count']:,}",
        )


# ---- values ----------------------------------------------------------------------------------------------------------


def open_weights(path: Path) -> Any:
    """A local checkpoint, its quantised layers as their values."""
    return unpacked(open_checkpoint(path))


def examine_values(ledger: Ledger, tree: Tree, progress: Callable[[int], None] = lambda size: None) -> None:
    """Reads every tensor on this machine once: its hash, and values that no trained model should have."""
    if tree.root is None or any(finding.id in UNREADABLE for finding in ledger.findings):
        return
    config = _open_model(ledger, tree)
    tensors: list[dict[str, Any]] = []
    models: dict[str, _Values] = {}  # the shards of one model together
    for file, path in _containers(ledger, tree):
        try:
            container = GGUF(path) if ledger.facts.get("gguf", {}).get(file) else SafetensorsFile(path)
            of = models.setdefault(re.sub(r"-\d{5}-of-\d{5}\b", "", file), _Values())
            tensors += _examine_container(ledger, file, container, of, progress)
        except (ValueError, OSError):  # a GGUF of another architecture, or with a part missing
            ledger.facts.setdefault("values_unread", []).append(file)
    for of in models.values():
        _check_norms(ledger, of.norms)
        head, embedding = of.digests.get(model.HEAD), of.digests.get(model.EMBEDDING)
        if config.get("tie_word_embeddings") and head and embedding and head != embedding:
            what = f"{model.HEAD} is not the embedding, though config.json ties them"
            ledger.find("weights-head-differs", None, what)
    ledger.facts["tensors"] = tensors
    ledger.facts["values_read"] = bool(tensors) and "values_problem" not in ledger.facts


def _open_model(ledger: Ledger, tree: Tree) -> dict[str, Any]:
    """Opens the repository as the one model that it is, if it is one; `facts["model_path"]` is then what runs. Returns
    its configuration, {} where there is none."""
    path, ggufs = tree.root, [where for where in ledger.facts.get("gguf", {}) if tree.get(where)]
    if path.is_dir() and not _holds_a_model(tree):
        if len(ggufs) != 1 or ledger.facts.get("safetensors"):
            return {}
        path = tree.get(ggufs[0]).local
    try:
        config = (GGUF(path) if path.is_file() else Checkpoint(path)).config
    except (ValueError, OSError) as error:
        ledger.facts["values_problem"] = str(error).partition(": ")[2]
        return {}
    _check_names(ledger, path, config)
    ledger.facts["model_path"] = path
    return config


class _Values:
    """What is remembered of one model's tensors."""

    def __init__(self):
        self.digests: dict[str, str] = {}  # name -> SHA-256
        self.names: dict[str, str] = {}  # SHA-256 -> the first tensor that has it
        self.norms: dict[str, dict[str, tuple[float, str]]] = {}  # kind -> {name: (largest value, file)}


def _containers(ledger: Ledger, tree: Tree) -> Iterator[tuple[str, Path]]:
    """Each file of weights on this machine, whether or not it belongs to the model: adapters, copies in another
    precision, the parts of a pipeline."""
    for where in (*ledger.facts.get("safetensors", {}), *ledger.facts.get("gguf", {})):
        part = re.search(r"-(\d{5})-of-\d{5}\.gguf$", where)
        if (entry := tree.get(where)) and entry.local and (part is None or int(part[1]) == 1):
            yield where, entry.local


def _examine_container(
    ledger: Ledger, file: str, container: Any, of: _Values, progress: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Every tensor of one file: the entries of the manifest."""
    tensors: list[dict[str, Any]] = []
    for name, info in container.tensors.items():
        values = container.read(name)
        digest = hashlib.sha256(memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())).hexdigest()
        _check_values(ledger, file, name, values)
        if "norm" in name and values.dim() == 1 and values.numel():
            kind = re.sub(r"\d+", "N", name)
            of.norms.setdefault(kind, {})[name] = (values.float().abs().max().item(), file)
        first = of.names.setdefault(digest, name)
        if values.numel() >= SMALL and first != name and not _may_be_double(name, first, values):
            ledger.find("weights-duplicated", file, f"{name} holds the values of {first}")
        of.digests[name] = digest
        tensors.append(
            {
                "name": name,
                "file": file,
                "dtype": str(info.dtype).removeprefix("torch."),
                "shape": list(info.shape),
                "sha256": digest,
            }
        )
        progress(values.numel() * values.element_size())
        del values
        container.release(name)
    return tensors


def _may_be_double(name: str, other: str, values: torch.Tensor) -> bool:
    """A tied head; and constants, which untrained norms and biases are."""
    if {name, other} == {model.HEAD, model.EMBEDDING}:
        return True
    flat = values.reshape(-1)
    return bool((flat == flat[0]).all())


def _holds_a_model(tree: Tree) -> bool:
    if tree.get(SINGLE) or tree.get(INDEX):
        return True
    try:
        return tree.get("config.json") is not None and bool(weight_files(entry.path for entry in tree.entries))
    except ValueError:  # a missing shard, several models: opening it says so
        return True


def _check_names(ledger: Ledger, path: Path, config: dict[str, Any]) -> None:
    """The tensors, whatever tool stored them, against those that the config's model has."""
    if config.get("model_type") not in FAMILY:
        return
    try:
        _, defects = model.skeleton(open_checkpoint(path))
    except ValueError as error:
        ledger.find("config-invalid", "config.json", str(error).partition(": ")[2])
        return
    for kind, names in defects.items():
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            ledger.find("weights-mismatch", None, f"{kind}: {', '.join(names[:4])}{more}")


def _check_values(ledger: Ledger, file: str, name: str, values: torch.Tensor) -> None:
    if not values.is_floating_point() or not values.numel():
        return
    low, high = (value.item() for value in torch.aminmax(values))
    if not (math.isfinite(low) and math.isfinite(high)):
        count = int((~torch.isfinite(values)).sum())
        ledger.find("weights-nonfinite", file, f"{name}: {count:,} of {values.numel():,} values are NaN or infinite")
        return
    if low == high == 0 and not name.endswith(".bias"):
        ledger.find("weights-dead", file, f"{name} is zero throughout")
    elif values.dim() == 2 and "embed" not in name and name != model.HEAD:
        dead = int((values == 0).all(1).sum())
        if dead:
            ledger.find(
                "weights-dead" if dead * 4 > len(values) else "weights-dead-rows",
                file,
                f"{name}: {dead:,} of {len(values):,} rows are zero",
            )


def _check_norms(ledger: Ledger, norms: dict[str, dict[str, tuple[float, str]]]) -> None:
    """The largest weight of each norm, against a bound and against the same norm of the other layers."""
    for kind, of in norms.items():
        sizes = sorted(largest for largest, _ in of.values() if math.isfinite(largest))
        if not sizes:
            continue
        ledger.facts.setdefault("norms", {})[kind] = [sizes[0], sizes[-1]]
        middle = sizes[len(sizes) // 2]
        for name, (largest, file) in of.items():
            if math.isfinite(largest) and (
                largest > NORM_RANGE or (len(of) > 2 and largest > NORM_OUTLIER * middle > 0)
            ):
                ledger.find(
                    "weights-norm-range", file, f"{name} reaches {largest:.3g}; the median of its kind is {middle:.3g}"
                )


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def gguf_config(path: Path) -> dict[str, Any] | None:
    """The fields of config.json that a .gguf file of the family stands for."""
    try:
        return GGUF(path).config
    except (ValueError, OSError):
        return None
