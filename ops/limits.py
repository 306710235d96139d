"""The limits of this machine: the figures that a measured speed is compared with."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ops.cpu import variants
from ops.cpu.library import Chosen, Linear, library
from ops.devices import synchronize

MEASURED_BYTES = variants.READ_BYTES


def read_bandwidth(device: str | torch.device = "cpu", seconds: float = 0.2) -> float:
    """Bytes per second that this machine reads from memory with torch's threads: the best of some passes over 256 MB.

    On a CPU these are the row products of the token step in all their variants, on memory in huge pages, so that
    nothing that is compared with the limit reads faster than what measured it; without the step it is torch's sum. The
    best one counts, as everything that disturbs a pass makes it slower. A GPU would be done with 256 MB as soon as it
    had begun: it reads 4 GB.
    """
    if torch.device(device).type == "cpu" and (loaded := library()) is not None:
        try:
            return variants.read_rate(loaded, Linear, torch.get_num_threads(), seconds)
        finally:
            variants.choose(loaded, Chosen.variant, Linear)
    count = MEASURED_BYTES * (16 if torch.device(device).type == "cuda" else 1)
    x = torch.ones(count // 4, device=device)  # written once: unwritten pages are not memory yet
    return count / best_time(x.sum, device, seconds)


def matrix_rate(dtype: torch.dtype, device: str | torch.device = "cpu", seconds: float = 0.1) -> float | None:
    """Operations per second of a matrix product with torch's threads, a multiplication and an addition being two.

    int8 is the product with int32 sums; None where this build of PyTorch has none for the device.
    """
    size = 8192 if torch.device(device).type == "cuda" else 1024
    if dtype is torch.int8:
        x, weight = (torch.randint(-128, 128, (size, size), dtype=dtype, device=device) for _ in range(2))
    else:
        x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = (lambda: torch._int_mm(x, weight.T)) if dtype is torch.int8 else (lambda: F.linear(x, weight))
    try:
        return 2 * size**3 / best_time(product, device, seconds)
    except (RuntimeError, NotImplementedError, AttributeError):
        return None


def limits(threads: int) -> dict[str, dict[str, Any]]:
    """Read bandwidth and matrix rates for 1, 2, 4 … `threads` threads, and of the GPU where there is one."""
    dtypes = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    before, found = torch.get_num_threads(), {}

    def measure(device: str) -> dict[str, Any]:
        rates = {name: matrix_rate(dtype, device) for name, dtype in dtypes.items()}
        return {"device": device, "read_bandwidth": read_bandwidth(device), "matrix_rate": rates}

    for count in sorted({*(1 << i for i in range(threads.bit_length())), threads}):
        torch.set_num_threads(count)
        found[f"{count} thread{'s' * (count > 1)}"] = measure("cpu")
    torch.set_num_threads(before)
    if torch.cuda.is_available():
        found["GPU"] = measure("cuda")
    return found


def best_time(run: Callable[[], Any], device: str | torch.device, seconds: float, least: int = 4) -> float:
    """The shortest of as many runs as fit into `seconds`, of at least `least`; the first one warms up."""
    best, end = float("inf"), time.perf_counter() + seconds
    while least > 0 or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
        least -= 1
    return best


def describe() -> dict[str, Any]:
    """The machine in words: processor, cores that this process may use, memory in bytes, GPU and its memory."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "cpu": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpu and gpu.name,
        "gpu_memory": gpu and gpu.total_memory,
        "system": f"{platform.system()} {platform.release()}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
