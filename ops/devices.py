"""Which device and which kernels a model is computed with."""

import os
import shutil
from importlib.util import find_spec

import torch


def pick_device(name: str, place: str) -> str:
    """`auto` is the first of CUDA, Apple's GPU and the CPU that is there. `place` is where the name came from."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, is_there in there.items() if is_there)
    if not there[name]:
        raise ValueError(f"{place} {name}: PyTorch finds no such device here; use auto")
    return name


def check_device(device: str | torch.device) -> None:
    """ValueError where PyTorch can't put a tensor on a device: a misspelled one, or one that this machine lacks."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, ImportError) as error:  # each backend raises its own
        why = str(error).splitlines()[0][:80]
        raise ValueError(f"device is {device!r}, which can't be used here ({why}); give cpu, cuda or mps") from None


def pick_kernels(name: str, device: str | torch.device, place: str) -> str:
    """`auto` is triton on CUDA where Triton and a C compiler are installed, with which it builds its launchers, else
    torch. `place` is where the name came from."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    installed, cuda = find_spec("triton") is not None and compiler, torch.device(device).type == "cuda"
    if name == "auto":
        return "triton" if cuda and installed else "torch"
    if name == "triton" and not installed:
        raise ValueError(f"{place} triton: Triton (pip install triton) or gcc is not installed here; use auto")
    if name == "triton" and not cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{place} triton: Triton's kernels run on CUDA, but the device is {device}; use auto")
    return name


def use_kernels(model: torch.nn.Module, name: str, place: str) -> None:
    """Gives a Qwen3 the kernels that `pick_kernels` says, in place: for its layers, its token step and its loss."""
    model.kernels = pick_kernels(name, model.device, place)
    if model.kernels == "triton":
        from ops.gpu.kernels import use  # imports Triton

        use(model)


def synchronize(device: str | torch.device) -> None:
    """Waits for a GPU's queue, so that a clock read afterwards includes the work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
