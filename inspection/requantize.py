"""A quantised directory held against its base: convert.py's int8 and int4 are rebuilt in memory, piece by piece.

What convert.py wrote is determined by its base, byte for byte. Another tool may round differently: where its weights
are within one step of the base's, they may be made from it, but that proves nothing.
"""

from pathlib import Path
from typing import Any

import torch

from formats.compressed_tensors import BITS, Scheme, read_quantization_config, unpack
from formats.safetensors_read import Checkpoint
from inspection import weights
from inspection.findings import Ledger
from model import HEAD
from ops.encode import Quantize

PIECE = 1 << 20  # values that are made at a time
STEP = 1.01  # of a scale's steps that rounding may move a weight by: half of one, and a scale's own rounding


def scheme_of(path: Path) -> Scheme | None:
    """How the weights of a directory are packed; None where they are not."""
    if not path.is_dir():
        return None
    try:
        return read_quantization_config(Checkpoint(path).config["quantization_config"])
    except (KeyError, ValueError, OSError):
        return None


def compare(ledger: Ledger, path: Path, base: Path, scheme: Scheme) -> tuple[list[str], str | None]:
    """Findings where `path` is not what the base gives. Returns the lines that say how they compare, and the kind
    ("int8" or "int4") where every tensor is byte-identical."""
    kind = next(name for name, bits in BITS.items() if bits == scheme.bits)
    stored, source = Checkpoint(path), weights.open_weights(base)
    tensors = dict(source.tensors)
    if source.config.get("tie_word_embeddings"):
        tensors.pop(HEAD, None)
    target = Quantize(tensors, kind, scheme.group_size)
    same, near, wrong, expected = 0, [], [], set()
    for name, info in tensors.items():
        outputs = target.outputs(name, info)
        expected |= set(outputs)
        missing = [output for output in outputs if output not in stored.tensors]
        misfit = [
            f"{output} is {stored.tensors[output].dtype} {list(stored.tensors[output].shape)}, "
            f"the base gives {of.dtype} {list(of.shape)}"
            for output, of in outputs.items()
            if output not in missing and stored.tensors[output] != of
        ]
        if missing or misfit:
            wrong += [f"tensor {output} is missing" for output in missing] + [f"tensor {text}" for text in misfit]
            continue
        equal, furthest = _hold(target, stored, source, name, outputs)
        for output in outputs:
            stored.release(output)
        source.release(name)
        if equal:
            same += 1
        elif furthest is not None and furthest <= STEP:
            near.append(name)
        else:
            by = "" if furthest is None else f", by up to {furthest:.3g} steps of its scale"
            wrong.append(f"tensor {name} is not what the base gives{by}")
    wrong += [f"tensor {name} is not in the base" for name in stored.tensors if name not in expected]
    for what in wrong:
        ledger.find("base-differs", None, what)
    for key in _different_keys(stored.config, source.config):
        ledger.find("base-metadata", "config.json", f"{key} differs from the base's")
    line = f"{path.name}: rebuilt from {base} as {kind}: "
    if not wrong and not near:
        return [f"{line}byte-identical ({same:,} tensors)"], kind
    rounded = f", {len(near):,} rounded differently but within one step of the base" if near else ""
    return [f"{line}{same:,} of {len(tensors):,} tensors are byte-identical{rounded}"], None


def _hold(target: Quantize, stored: Any, source: Any, name: str, outputs: dict[str, Any]) -> tuple[bool, float | None]:
    """(byte-identical, the largest distance in steps of the scale); no distance for what is not quantised."""
    values = source.read(name)
    ours = {output: stored.read(output) for output in outputs}
    shape, scale = ours.get(f"{name}_shape"), ours.get(f"{name}_scale")
    equal, furthest = shape is None or shape.tolist() == list(values.shape), None if scale is None else 0.0
    step = max(1, PIECE // max(1, values[0].numel())) if values.dim() > 1 else len(values)
    for row in range(0, len(values), step):
        piece, rows = values[row : row + step], slice(row, row + step)
        made, _ = target.encode(name, piece)
        if all(_same(ours[output][rows], part) for output, part in made.items()):
            continue
        equal = False
        if scale is not None:
            steps = scale[rows].float().repeat_interleave(piece.shape[1] // scale.shape[1], 1)
            codes = unpack(ours[f"{name}_packed"][rows], target.scheme.bits, piece.shape[1]).float()
            distance = ((codes * steps - piece.float()).abs() / steps.abs().clamp_min(1e-30)).max()
            furthest = max(furthest, float(distance.nan_to_num(float("inf"))))
    return equal, furthest


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _different_keys(config: dict[str, Any], base: dict[str, Any]) -> list[str]:
    free = {"quantization_config", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}
    return [key for key in {**base, **config} if key not in free and config.get(key) != base.get(key)]
