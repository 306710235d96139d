"""Weights in the quantised forms that other tools publish, read as the numbers that they encode.

    fp8                 float8 weights, one scale a block of 128 x 128 (the official Qwen3-*-FP8)
    gptq, awq           integers with scales and zero points (the official Qwen3-*-GPTQ-Int8, -Int4 and -AWQ)
    compressed-tensors  float8 and int8 weights with scales (the model computes with its packed integers directly)
    MLX                 integers with scales and offsets (mlx-community's *-4bit, -6bit, -8bit)

A module's tensors (`qweight`, `scales`, …) become its one `weight`, float32 [rows, columns], when it is read: one at
a time, so memory does not grow with the model. Activations stay in the model's own precision.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from console import notice
from formats.compressed_tensors import PackQuantized, read_quantization_config
from formats.tensors import WHAT_NOW, TensorInfo
from formats.view import View

Parts = dict[str, torch.Tensor]  # last part of the name → tensor
OWNERS = {  # the last part of a name that only one method's tensors have
    "qweight": "GPTQ or AWQ",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_packed": "compressed-tensors",
    "weight_scale": "compressed-tensors or FP8",
    "weight_scale_inv": "FP8",
    "scale_weight": "ComfyUI's FP8",
}
ACTIVATION_SCALES = ("input_scale", "activation_scale", "k_scale", "v_scale")


def short_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Method(Protocol):
    """One way to quantise. `key` is the tensor that only quantised modules have, `leaves` are all that one can have."""

    key: str
    leaves: tuple[str, ...]

    def shape(self, infos: dict[str, TensorInfo], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
        """Rows and columns of a module's weight. ValueError where its tensors do not match."""

    def dequantize(self, parts: Parts) -> torch.Tensor:
        """float32 [rows, columns]."""


class Dequantized(View):
    """A checkpoint presented as an ordinary one: each quantised module has one `weight`, in float32."""

    def __init__(self, base: Any, method: Method):
        super().__init__(base)
        self.config = {key: value for key, value in base.config.items() if not key.startswith("quantization")}
        self._method, self._parts = method, {}
        modules = {name.rpartition(".")[0] for name in base.tensors if name.rpartition(".")[2] == method.key}
        self.tensors = {}
        for name, info in base.tensors.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and module not in modules and info.dtype.itemsize == 1:
                raise ValueError(
                    f"{self.path}: {name} is {short_dtype(info.dtype)}, but {module}.{method.key}, which says what it "
                    "stands for, is missing"
                )
            if module in modules and leaf in method.leaves:
                if f"{module}.weight" not in self.tensors:
                    self.tensors[f"{module}.weight"] = TensorInfo(torch.float32, self._shape(module))
            elif leaf not in ACTIVATION_SCALES and not (leaf == "bias" and module in modules and self._is_idle(module)):
                self.tensors[name] = info

    def _is_idle(self, module: str) -> bool:
        """Whether a module's bias is one that the model does not have: AutoGPTQ gave every layer one, of zeros."""
        layer, qwen2 = module.rpartition(".")[2], self.config.get("model_type") == "qwen2"
        has_bias = layer in ("q_proj", "k_proj", "v_proj") if qwen2 else self.config.get("attention_bias") is True
        return not has_bias and not self.base.read(f"{module}.bias").any()

    def _shape(self, module: str) -> tuple[int, int]:
        names = {leaf: f"{module}.{leaf}" for leaf in self._method.leaves if f"{module}.{leaf}" in self.base.tensors}
        self._parts[f"{module}.weight"] = names
        infos = {leaf: self.base.tensors[name] for leaf, name in names.items()}
        try:
            return self._method.shape(infos, lambda leaf: self.base.read(names[leaf]))
        except KeyError as absent:
            raise ValueError(
                f"{self.path}: {module}.{absent.args[0]} is missing beside {module}.{self._method.key}"
            ) from None
        except ValueError as error:
            stored = ", ".join(f"{leaf} {list(info.shape)}" for leaf, info in infos.items())
            raise ValueError(f"{self.path}: {module} ({stored}): {error}") from None

    def read(self, name: str) -> torch.Tensor:
        if name not in self._parts:
            return self.base.read(name)
        return self._method.dequantize({leaf: self.base.read(stored) for leaf, stored in self._parts[name].items()})

    def release(self, name: str) -> None:
        for stored in self._parts.get(name, {"": name}).values():
            self.base.release(stored)


class Plain(View):
    """A checkpoint of plain numbers whose config still says how they were once quantised, as a merge may leave it."""

    def __init__(self, base: Any):
        super().__init__(base)
        self.config = {key: value for key, value in base.config.items() if key != "quantization_config"}
        method = str(base.config["quantization_config"].get("quant_method"))[:40]
        notice(f"{self.path}: no weight is quantised, although config.json says so ({method}); read as they are")


def dequantized(checkpoint: Any) -> Any:
    """The checkpoint, with weights that can be loaded into a model. ValueError names an unsupported method."""
    infos = checkpoint.tensors.items()
    plain = all(info.dtype.itemsize > 1 and name.endswith((".weight", ".bias")) for name, info in infos)
    if plain and isinstance(checkpoint.config.get("quantization_config"), dict):
        return Plain(checkpoint)
    try:
        method = _method(checkpoint.config, checkpoint.tensors)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    return checkpoint if method is None else Dequantized(checkpoint, method)


def unpacked(checkpoint: Any) -> Any:
    """The same with compressed-tensors' packed integers dequantised too, for callers that need the values."""
    try:
        given = checkpoint.config.get("quantization_config")
        return checkpoint if given is None else Dequantized(checkpoint, PackQuantized(read_quantization_config(given)))
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {str(error).removeprefix(f'{checkpoint.path}: ')}") from None


def _method(config: dict[str, Any], names: Iterable[str]) -> Method | None:
    given, mlx = config.get("quantization_config"), config.get("quantization")
    if isinstance(mlx, dict) and "group_size" in mlx and not (isinstance(given, dict) and "quant_method" in given):
        return MLX(mlx)
    if not isinstance(given, dict):
        leaves = {name.rpartition(".")[2] for name in names}
        for leaf, owner in OWNERS.items():
            if leaf in leaves:
                raise ValueError(
                    f"config: the weights are quantised by {owner}, but there is no quantization_config to say how; "
                    "take config.json from where they come from"
                )
        return None
    name = given.get("quant_method")
    if name == "compressed-tensors":
        form = given.get("format")
        return _compressed(given) if form in ("float-quantized", "int-quantized", "naive-quantized") else None
    if name == "fp8":
        return _fp8(given, any(name.endswith(".weight_scale_inv") for name in names))
    methods = {"gptq": GPTQ, "awq": AWQ}
    if name not in methods:
        how = f"by {str(name)[:40]}" if name else "in a way that quantization_config does not name (no quant_method)"
        raise ValueError(f"config: weights quantised {how} are not read here; {WHAT_NOW}")
    return methods[name](given)


def _positive(config: dict[str, Any], name: str, *others: str) -> int:
    value = next((config[key] for key in (name, *others) if key in config), None)
    if type(value) is not int or not 1 <= value <= 1 << 20:
        raise ValueError(f"config: quantization_config.{name} is {value!r}, which is not a positive whole number")
    return value


# ---- one scale a block ----------------------------------------------------------------------------------------------


class Scaled:
    """float8 or int8 `weight` [rows, columns] times a scale for each block, row, group of columns, or for all of it."""

    def __init__(self, key: str, block: tuple[int, int] | None):
        self.key, self.leaves, self._block = key, ("weight", key), block

    def shape(self, infos: dict[str, TensorInfo], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
        dtype, shape = infos["weight"]
        if len(shape) != 2 or dtype.itemsize != 1:
            raise ValueError(f"the weight is {short_dtype(dtype)}, not a matrix of float8 or int8")
        self._blocks(shape, infos[self.key].shape)
        return shape

    def _blocks(self, shape: tuple[int, int], scales: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        rows, across = (*scales, 1, 1)[:2]
        if self._block and (rows, across) == tuple(
            -(-length // n) for length, n in zip(shape, self._block, strict=True)
        ):
            return self._block
        # Without a stated block only whole rows can be told from the counts: two scales for 200 rows may be blocks of
        # 128 and 72.
        if (
            len(scales) > 2
            or rows not in (1, shape[0])
            or not across
            or shape[1] % across
            or (self._block and across > 1)
        ):
            raise ValueError("the scales are not one for each block")
        return shape[0] // rows, shape[1] // across

    def dequantize(self, parts: Parts) -> torch.Tensor:
        weight, scale = parts["weight"].float(), parts[self.key]
        down, across = self._blocks(tuple(weight.shape), tuple(scale.shape))
        if scale.dtype == torch.uint8:  # a bare exponent (E8M0)
            scale = torch.ldexp(torch.ones(()), scale.int() - 127)
        for row, scales in enumerate(scale.float().reshape((*scale.shape, 1, 1)[:2])):
            weight[row * down : (row + 1) * down] *= scales.repeat_interleave(across)[: weight.shape[1]]
        return weight


def _fp8(config: dict[str, Any], inverse: bool) -> Scaled:
    """https://github.com/deepseek-ai/DeepSeek-V3 (inference/kernel.py, weight_dequant), which Qwen3-*-FP8 follows.

    Where a tensor has one scale, as AutoFP8 and vLLM store it, that is called weight_scale (not `inverse`).
    """
    block = _block("weight_block_size", config.get("weight_block_size"))
    return Scaled("weight_scale_inv" if inverse else "weight_scale", block)


def _compressed(config: dict[str, Any]) -> Scaled:
    """compressed-tensors' float8 and int8: the shape of a block stands in the scheme of each group of layers."""
    groups = config.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    schemes = [group.get("weights") for group in groups if isinstance(group, dict)]
    blocks = {
        _block("block_structure", scheme.get("block_structure")) for scheme in schemes if isinstance(scheme, dict)
    }
    if any(isinstance(scheme, dict) and scheme.get("symmetric") is False for scheme in schemes):
        raise ValueError(f"config: asymmetric weights of compressed-tensors are not read here; {WHAT_NOW}")
    if len(blocks) > 1:
        raise ValueError("config: quantization_config.config_groups have several block_structures; one is implemented")
    return Scaled("weight_scale", *(blocks or {None}))


def _block(name: str, block: Any) -> tuple[int, int] | None:
    if isinstance(block, str):  # "128x128", as compressed-tensors also writes it
        block = [int(n) if n.isdecimal() and n.isascii() else n for n in block.split("x")]
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 1 <= n <= 1 << 16 for n in block):
        raise ValueError(f"config: quantization_config.{name} is {block!r}, not two whole numbers")
    return block[0], block[1]


# ---- integers in int32 words -----------------------------------------------------------------------------------------


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, n] → the whole numbers in them, lowest bits first, int32 [rows, n * 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(1)


class GPTQ:
    """weight[out, in] = scales[g, out] · (q[in, out] - zeros[g, out]), g = g_idx[in] (https://arxiv.org/abs/2210.17323)

    `qweight` holds q packed along its rows, `qzeros` the zeros along its columns; the first format, "gptq", stores each
    zero less one, "gptq_v2" as it is. g_idx is where columns were quantised in another order (desc_act).
    """

    key, leaves = "qweight", ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, config: dict[str, Any]):
        form = config.get("checkpoint_format", config.get("format", "gptq"))
        if form not in ("gptq", "gptq_v2"):
            raise ValueError(f"config: GPTQ weights in the format {str(form)[:40]} are not read here; {WHAT_NOW}")
        self._bits, self._offset = _positive(config, "bits"), int(form == "gptq")
        if self._bits not in (2, 4, 8):
            raise ValueError(f"config: GPTQ weights of {self._bits} bits are not read here; {WHAT_NOW}")

    def shape(self, infos: dict[str, TensorInfo], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
        words, per_word = infos["qweight"].shape, 32 // self._bits
        groups, rows = infos["scales"].shape
        columns = words[0] * per_word
        if infos["qweight"].dtype != torch.int32 or infos["qzeros"].dtype != torch.int32 or len(words) != 2:
            raise ValueError("qweight and qzeros are not matrices of int32")
        if words[1] != rows or infos["qzeros"].shape != (groups, -(-rows // per_word)) or not groups:
            raise ValueError(f"these do not form one matrix of {self._bits} bits")
        if "g_idx" not in infos and columns % groups:
            raise ValueError(f"{groups} groups do not share {columns} columns")
        if "g_idx" in infos:
            if infos["g_idx"].shape != (columns,):
                raise ValueError(f"g_idx does not name the group of each of {columns} columns")
            index = read("g_idx")
            if index.min() < 0 or index.max() >= groups:
                raise ValueError(f"g_idx names a group beyond the {groups} that there are")
        return rows, columns

    def dequantize(self, parts: Parts) -> torch.Tensor:
        q = unpack_words(parts["qweight"].T, self._bits)
        scales = parts["scales"].T.float()
        zeros = unpack_words(parts["qzeros"], self._bits)[:, : len(q)].T + self._offset & (1 << self._bits) - 1
        index = parts.get("g_idx")
        if index is None:
            index = torch.arange(q.shape[1]) // (q.shape[1] // scales.shape[1])
        index = index.long()
        return (q - zeros[:, index]).float().mul_(scales[:, index])


class AWQ:
    """weight[out, in] = scales[g, out] · (q[in, out] - zeros[g, out]), g = in // group_size
    (https://arxiv.org/abs/2306.00978). q and zeros are packed along their columns, eight of 4 bits to a word, in the
    order that AutoAWQ's "gemm" kernel wants."""

    key, leaves = "qweight", ("qweight", "qzeros", "scales")
    ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the values 0 to 7 of a word are

    def __init__(self, config: dict[str, Any]):
        form, bits = config.get("version", config.get("format", "gemm")), _positive(config, "bits", "w_bit")
        if str(form).lower() != "gemm" or bits != 4 or config.get("zero_point") is False:
            raise ValueError(
                f"config: AWQ weights of the kind {str(form)[:40]}, {bits} bits, are not read here; {WHAT_NOW}"
            )

    def shape(self, infos: dict[str, TensorInfo], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
        words, (groups, rows) = infos["qweight"].shape, infos["scales"].shape
        if infos["qweight"].dtype != torch.int32 or infos["qzeros"].dtype != torch.int32 or len(words) != 2:
            raise ValueError("qweight and qzeros are not matrices of int32")
        if words[1] * 8 != rows or infos["qzeros"].shape != (groups, words[1]) or not groups or words[0] % groups:
            raise ValueError("these do not form one matrix of 4 bits")
        return rows, words[0]

    def dequantize(self, parts: Parts) -> torch.Tensor:
        q, zeros = (self._unpack(parts[leaf]) for leaf in ("qweight", "qzeros"))
        repeats = len(q) // len(zeros)
        weight = (q.unflatten(0, (-1, repeats)) - zeros[:, None]).float() * parts["scales"].float()[:, None]
        return weight.flatten(0, 1).T.contiguous()

    def _unpack(self, words: torch.Tensor) -> torch.Tensor:
        return unpack_words(words, 4).unflatten(1, (-1, 8))[..., self.ORDER].flatten(1)


class MLX:
    """weight = scales · q + biases for each group of columns; q is a stream of bits along each row, lowest first.

    https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html. The bits of a module follow
    from its shapes: mixed models use several.
    """

    key, leaves = "scales", ("weight", "scales", "biases")

    def __init__(self, config: dict[str, Any]):
        self._group = _positive(config, "group_size")
        if (mode := config.get("mode", "affine")) != "affine":
            raise ValueError(f"config: MLX weights of the mode {str(mode)[:40]} are not read here; {WHAT_NOW}")
        own = [layer for layer in config.values() if isinstance(layer, dict)]
        if any(layer.get("group_size", self._group) != self._group for layer in own):
            raise ValueError(f"config: MLX weights in groups of several sizes are not read here; {WHAT_NOW}")

    def shape(self, infos: dict[str, TensorInfo], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
        (dtype, words), scales = infos["weight"], infos["scales"].shape
        if infos["biases"].shape != scales or len(words) != 2 or len(scales) != 2 or words[0] != scales[0]:
            raise ValueError("these do not form one quantised matrix")
        columns = scales[1] * self._group
        bits, rest = divmod(words[1] * 32, columns) if columns else (0, 0)
        if dtype != torch.uint32 or rest or bits not in (2, 3, 4, 5, 6, 8):
            raise ValueError(f"groups of {self._group} and 2 to 8 bits do not give this shape")
        return words[0], columns

    def dequantize(self, parts: Parts) -> torch.Tensor:
        words, scales, biases = (parts[leaf] for leaf in self.leaves)
        columns = scales.shape[1] * self._group
        bits = words.shape[1] * 32 // columns
        stream = words.contiguous().view(torch.uint8).unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
        place = 1 << torch.arange(bits, dtype=torch.int32)
        q = (stream.view(len(words), -1, bits) * place).sum(-1, dtype=torch.int32).unflatten(1, (-1, self._group))
        return (q * scales.float().unsqueeze(-1) + biases.float().unsqueeze(-1)).flatten(1)
