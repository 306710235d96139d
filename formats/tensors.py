"""What the readers of every container share: how a stored tensor is described."""

from typing import NamedTuple

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,  # AMD's
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
OTHER_DTYPES = ("C64", "F4", "F6_E2M3", "F6_E3M2")  # the format knows these too, but no model here has them


# A tensor without elements in a checkpoint: known from DeepSpeed; downloading it again would not help.
SAVED_EMPTY = "saved empty, as DeepSpeed's ZeRO-3 does before it gathers them (its zero_to_fp32.py makes them whole)"


WHAT_NOW = "take the model's 16-bit version or its GGUF, FP8, AWQ or GPTQ form"  # where a form is not read here


class TensorInfo(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: a minimum and maximum show both and need no second tensor."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.itemsize == 1:  # PyTorch does not compute with float8 itself
        tensor = tensor.to(torch.bfloat16)
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
