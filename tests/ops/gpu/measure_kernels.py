"""Times each fused operation beside its twin on the GPU, at Qwen3-0.6B's sizes.

    python tests/ops/gpu/measure_kernels.py


Prints a Markdown table: milliseconds of the twin and of the kernel, and the bytes that have to be moved per second.
Forward and backward together where there is a backward. Those of one token are replayed from a CUDA graph, as they are
when a model decodes.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from formats.compressed_tensors import Scheme
from model import Linear, RMSNorm, rotate
from ops.cross_entropy import linear_cross_entropy
from ops.gpu import graphs, kernels, token_kernels
from ops.limits import best_time, read_bandwidth
from ops.quant import QuantizedLinear

C, WIDE, H, K, D, V, EPS = 1024, 3072, 16, 8, 128, 151936, 1e-6
TOKENS, LAYERS = 16384, 64  # of one token: so many matrices in turn that the L2 cache does not hold them


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def both_ways(run: Callable, *inputs: Tensor) -> Callable[[], None]:
    def outputs() -> tuple[Tensor, ...]:
        out = run(*inputs)
        return out if isinstance(out, tuple) else (out,)

    grads = [torch.ones_like(part) for part in outputs()]
    return lambda: torch.autograd.grad(outputs(), inputs, grads)


def recorded(run: Callable[[], Any]) -> Callable[[], None]:
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def training() -> dict[str, tuple[Callable, Callable, int]]:
    """Name → twin, fused, bytes that must be moved, at least."""
    x, residual, weight = randn(TOKENS, C), randn(TOKENS, C), randn(C)
    q, gain, gate, up = randn(8, TOKENS // 8, H, D), randn(D), randn(TOKENS, WIDE), randn(TOKENS, WIDE)
    table = torch.randn(1, 1, TOKENS // 8, D, device="cuda", dtype=torch.bfloat16)
    head, targets = randn(V, C), torch.randint(V, (TOKENS // 4,), device="cuda")
    hidden = randn(TOKENS // 4, C)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * F.rms_norm(x, weight.shape, None, EPS)

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x + residual, weight), x + residual

    def loss(kernels: str) -> Callable:
        return both_ways(lambda x, w: linear_cross_entropy(x, w, targets, kernels=kernels), hidden, head)

    return {
        "residual + RMSNorm": (
            both_ways(add_norm, x, residual, weight),
            both_ways(lambda x, r, w: kernels.rms_norm(x, w, EPS, r), x, residual, weight),
            8 * x.nbytes,
        ),
        "q-norm + RoPE": (
            both_ways(lambda q, gain: rotate(norm(q, gain).transpose(1, 2), table, table), q, gain),
            both_ways(lambda q, gain: kernels.norm_rotate(q, gain, table, table, EPS), q, gain),
            5 * q.nbytes,
        ),
        "SwiGLU": (
            both_ways(lambda g, u: F.silu(g) * u, gate, up),
            both_ways(kernels.swiglu, gate, up),
            8 * gate.nbytes,
        ),
        "linear cross-entropy": (loss("torch"), loss("triton"), 8 * V * len(targets)),
    }


@torch.no_grad()
def one_token() -> dict[str, tuple[Callable, Callable, int]]:
    found = {}
    norm, x, wide = RMSNorm(C, EPS).to("cuda", torch.bfloat16), randn(1, C), randn(1, WIDE)
    for kind, scheme in (("bf16", None), ("int8", Scheme(8, None)), ("int4", Scheme(4, 32))):

        def layer(columns: int, rows: int, scheme: Scheme | None = scheme) -> torch.nn.Module:
            linear = Linear(columns, rows, bias=False).to("cuda", torch.bfloat16)
            linear.weight.normal_()
            return linear if scheme is None else QuantizedLinear.from_linear(linear, scheme)

        def in_turn(linear: Callable, groups: list[list], x: Tensor, **options: Any) -> Callable[[], None]:
            return recorded(lambda: [linear(x, group, **options) for group in groups])

        for name, columns, rows, given, options in (
            ("norm + q, k, v", C, (H * D, K * D, K * D), x, {"norm": norm}),
            ("norm + gate, up + silu", C, (WIDE, WIDE), x, {"norm": norm, "gated": True}),
            ("down + residual", WIDE, (C,), wide, {"residual": x}),
        ):
            groups = [[layer(columns, count) for count in rows] for _ in range(LAYERS)]
            parts = [(*m.parameters(), *m.buffers()) for group in groups for m in group]
            size = sum(tensor.nbytes for part in parts for tensor in part)
            twin, fused = (in_turn(f, groups, given, **options) for f in (graphs.linear, token_kernels.linear))
            found[f"{LAYERS} x {name}, {kind}"] = (twin, fused, size)
    attention = SimpleNamespace(q_norm=RMSNorm(D, EPS).to("cuda", torch.bfloat16))
    attention.k_norm = attention.q_norm
    attention.norm_rotate = lambda q, k, step: tuple(
        rotate(attention.q_norm(part).transpose(1, 2), step.cos, step.sin) for part in (q, k)
    )
    for length in (100, 1000, 8000):
        caches = [[torch.randn_like(randn(1, K, length + 1, D)) for _ in range(2)] for _ in range(LAYERS)]
        qkv, table, at = randn(1, (H + 2 * K) * D), randn(length + 1, D), torch.tensor([length], device="cuda")

        def attend(f: Callable, caches=caches, given=(qkv, attention, table, table, at), window=length + 1) -> Callable:
            return recorded(lambda: [f(*given, *pair, window) for pair in caches])

        size = LAYERS * 2 * caches[0][0].nbytes
        found[f"{LAYERS} x attention after {length}"] = (attend(graphs.attend), attend(token_kernels.attend), size)
    return found


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("measure_kernels.py: there is no CUDA device here")
    bandwidth = read_bandwidth("cuda")
    print(f"{torch.cuda.get_device_name()}, {bandwidth / 1e12:.2f} TB/s read\n")
    print("| operation | PyTorch, ms | fused, ms | times | TB/s | of the bandwidth |\n|---|---|---|---|---|---|")
    for operations in (training, one_token):
        for name, (twin, fused, size) in operations().items():
            slow, fast = (best_time(run, "cuda", 0.3) for run in (twin, fused))
            reached = size / fast
            print(f"| {name} | {slow * 1e3:.3f} | {fast * 1e3:.3f} | {slow / fast:.2f} | {reached / 1e12:.2f} ", end="")
            print(f"| {reached / bandwidth:.0%} |", flush=True)


if __name__ == "__main__":
    main()
