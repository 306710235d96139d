"""What this machine can do at most: the figures that a measured speed is held against."""

import time

import torch

MEASURED_BYTES = 1 << 28  # far above any cache, small enough for a laptop


def read_bandwidth(device: str | torch.device = "cpu", repeats: int = 5) -> float:
    """Bytes per second that this machine reads from memory with torch's threads: the best of a few sums of 256 MB."""
    x = torch.ones(MEASURED_BYTES // 4, device=device)
    best = 0.0
    for _ in range(repeats + 1):  # the first one warms up
        synchronize(device)
        start = time.perf_counter()
        x.sum()
        synchronize(device)
        best = max(best, MEASURED_BYTES / (time.perf_counter() - start))
    return best


def synchronize(device: str | torch.device) -> None:
    """Waits for a GPU's queue, so that a clock read afterwards includes the work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
