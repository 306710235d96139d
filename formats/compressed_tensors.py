"""compressed-tensors, the layout in which vLLM and transformers read quantised weights.

https://github.com/vllm-project/compressed-tensors. Only its weight-only integer form is written and read here,
`pack-quantized`: symmetric, 4 or 8 bits, one scale for each group of columns or for a whole row ("channel"). It is
also the form in which vLLM takes weight-only int8; `int-quantized` is for models whose activations are quantised too.
A linear layer [out, in] is stored as

    weight_packed  int32 [out, ceil(in * bits / 32)]   the integers q + 2^(bits-1), lowest bits first
    weight_scale         [out, groups]                 weight = q * scale
    weight_shape   int64 [2]                           (out, in)

and `quantization_config` in config.json describes this and names the linear layers that are not quantised.
"""

import fnmatch
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

BITS = {"int8": 8, "int4": 4}


class Scheme(NamedTuple):
    """How the linear layers are quantised: bits 4 or 8, columns that share a scale (None: the row), names excluded."""

    bits: int
    group_size: int | None
    ignore: tuple[str, ...] = ()

    def ignores(self, name: str) -> bool:
        """Whether the linear layer of this module path stays unquantised."""
        return any(
            fnmatch.fnmatchcase(name, _glob(entry)) if entry.startswith("re:") else name == entry
            for entry in self.ignore
        )

    def groups(self, columns: int) -> int:
        """Scales in a row of `columns` weights. ValueError where groups do not divide it."""
        if self.group_size is None:
            return 1
        if columns % self.group_size:
            raise ValueError(f"quantization_config: groups of {self.group_size} do not fill rows of {columns} weights")
        return columns // self.group_size


def largest_group(*columns: int) -> int:
    """The largest group size up to 32 that divides all row lengths and fills whole int32 words."""
    for size in (32, 16, 8):
        if not any(count % size for count in columns):
            return size
    raise ValueError(
        f"int4 needs rows of a multiple of 8 weights, but there are rows of {max(columns, key=lambda c: c % 8)}"
    )


def packed_columns(columns: int, bits: int) -> int:
    """int32 words in a packed row of `columns` integers."""
    return -(-columns * bits // 32)


def pack(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 [rows, columns] from -2^(bits-1) to 2^(bits-1)-1 → int32 [rows, ceil(columns * bits / 32)]."""
    columns = integers.shape[1]
    codes = (integers + (1 << bits - 1)).view(torch.uint8)  # at 8 bits the sum wraps around to the right byte
    codes = torch.nn.functional.pad(codes, (0, packed_columns(columns, bits) * 32 // bits - columns))
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return codes.contiguous().view(torch.int32)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of `pack`: int8 [rows, columns]."""
    codes = packed.contiguous().view(torch.uint8)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
    return (codes - (1 << bits - 1)).view(torch.int8)[:, :columns]


def dequantize(
    packed: torch.Tensor, scale: torch.Tensor, bits: int, columns: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The weights [rows, columns] that packed rows encode, computed in `dtype`."""
    integers = unpack(packed, bits, columns).to(dtype)
    return (integers.unflatten(1, (scale.shape[1], -1)) * scale.to(dtype).unsqueeze(-1)).flatten(1)


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    """The entry of config.json from which vLLM, transformers and this project read the scheme."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(scheme.ignore),
        "kv_cache_scheme": None,
    }


def read_quantization_config(config: Any) -> Scheme:
    """The scheme of an untrusted `quantization_config`. ValueError names the first entry that is not implemented."""
    config = _table(config, "quantization_config")
    _require(config, "quantization_config", quant_method="compressed-tensors", format="pack-quantized")
    _require_absent(config, "quantization_config", "kv_cache_scheme", "sparsity_config", "transform_config")
    if config.get("quantization_status", "compressed") != "compressed":
        _refuse("quantization_config.quantization_status", config["quantization_status"], "compressed")
    groups = _table(config.get("config_groups"), "quantization_config.config_groups")
    if len(groups) != 1:
        raise ValueError(f"quantization_config: {len(groups)} config_groups; exactly one is implemented")
    name, group = next(iter(groups.items()))
    where = f"quantization_config.config_groups.{name}"
    _require(_table(group, where), where, targets=["Linear"])
    _require_absent(group, where, "input_activations", "output_activations")
    weights = _table(group.get("weights"), f"{where}.weights")
    _require(weights, f"{where}.weights", type="int", symmetric=True)
    _require_absent(weights, f"{where}.weights", "dynamic", "block_structure")
    if weights.get("actorder") not in (None, "weight", "static"):
        _refuse(f"{where}.weights.actorder", weights["actorder"], "null")
    ignore = config.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(entry, str) for entry in ignore):
        raise ValueError("quantization_config.ignore is not a list of module names")
    for entry in ignore:
        _glob(entry)
    return Scheme(_bits(weights, where), _group_size(weights, where), tuple(ignore))


def _bits(weights: dict, where: str) -> int:
    bits = weights.get("num_bits")
    if type(bits) is not int or bits not in BITS.values():
        _refuse(f"{where}.weights.num_bits", bits, "4 or 8")
    return bits


def _group_size(weights: dict, where: str) -> int | None:
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy == "channel" and size in (None, -1):
        return None
    if strategy != "group":
        _refuse(f"{where}.weights.strategy", strategy, "group, or channel without a group_size")
    if type(size) is not int or size < 8 or size > 1 << 20 or size % 8:
        _refuse(f"{where}.weights.group_size", size, "a multiple of 8")
    return size


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object {{...}}; take config.json from the checkpoint's own repository")
    return value


def _require(table: dict, where: str, **expected: Any) -> None:
    for key, value in expected.items():
        if table.get(key) != value:
            _refuse(f"{where}.{key}", table.get(key), repr(value))


def _require_absent(table: dict, where: str, *keys: str) -> None:
    for key in keys:
        if table.get(key):
            _refuse(f"{where}.{key}", table[key], "null")


def _refuse(where: str, value: Any, expected: str) -> None:
    raise ValueError(f"{where} is {str(value)[:60]!r}, which is not implemented; it must be {expected}")


def _glob(entry: str) -> str:
    """A "re:" entry as a shell pattern.

    An untrusted regular expression could run forever, so only `.*`, escaped dots and anchors are supported, which is
    what published checkpoints use.
    """
    pattern = entry.removeprefix("re:").removeprefix("^").removesuffix("$")
    literal = pattern.replace(".*", "").replace("\\.", "")
    if entry.startswith("re:") and not all(letter.isalnum() or letter in "_." for letter in literal):
        raise ValueError(
            f"quantization_config.ignore: {entry[:80]!r}; of regular expressions only .* and \\. are implemented"
        )
    return pattern.replace(".*", "*").replace("\\.", ".")


class PackQuantized:
    """The method of `pack-quantized` for formats/dequantize.py."""

    key, leaves = "weight_packed", ("weight_packed", "weight_scale", "weight_shape")

    def __init__(self, scheme: Scheme):
        self._scheme = scheme

    def shape(self, infos: dict[str, Any], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
        """The shape that a quantised layer states, after the shapes of its three tensors were checked against it."""
        packed, scale, shape = (infos[leaf] for leaf in self.leaves)
        if shape != (torch.int64, (2,)) or packed.dtype != torch.int32 or not scale.dtype.is_floating_point:
            raise ValueError("tensors of types or shapes that pack-quantized does not have")
        rows, columns = read("weight_shape").tolist()
        bits, group_size = self._scheme.bits, self._scheme.group_size
        groups = 1 if group_size is None else -(-columns // group_size)
        if packed.shape != (rows, packed_columns(columns, bits)) or scale.shape != (rows, groups) or columns % groups:
            raise ValueError(f"the stated shape is {[rows, columns]}")
        return rows, columns

    def dequantize(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        columns = int(parts["weight_shape"][1])
        return dequantize(parts["weight_packed"], parts["weight_scale"], self._scheme.bits, columns)
