"""Compiles the kernels for an H200 (sm_90) without one, and looks at what the assembler says of them.

Run by tests/ops/test_kernels.py in a process of its own: Triton believes here that it has a GPU, and nothing is
launched. Shapes are those of Qwen3-0.6B. The interpreter takes what the compiler refuses; and a kernel that spills
registers, or loads its weights by single bytes, is right and slow. Prints the names of the kernels.
"""

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from formats.compressed_tensors import Scheme
from model import RMSNorm
from ops.gpu import kernels, token_kernels
from ops.quant import QuantizedLinear

compiled, compile_and_launch = {}, JITFunction.run


def compile_only(function, *args, grid, warmup, **options):
    kernel = compile_and_launch(function, *args, grid=grid, warmup=True, **options)
    compiled[id(kernel)] = kernel
    return kernel


def layer(columns: int, rows: int, bits: int) -> torch.nn.Module:
    if bits == 16:
        return torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
    return QuantizedLinear(columns, rows, Scheme(bits, 32 if bits == 4 else None))


def call_all() -> None:
    def bf16(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)

    norm, head_norm = RMSNorm(1024, 1e-6).bfloat16(), RMSNorm(128, 1e-6).bfloat16()
    with torch.no_grad():
        for bits in (16, 8, 4):
            for tokens in (1, 8) if bits != 8 else (1,):
                x, wide = bf16(tokens, 1024), bf16(tokens, 3072)
                token_kernels.linear(x, [layer(1024, rows, bits) for rows in (2048, 1024, 1024)], norm)
                token_kernels.linear(x, [layer(1024, 3072, bits)] * 2, norm, gated=True)
                token_kernels.linear(wide, [layer(3072, 1024, bits)], residual=x)
        attention, tables = SimpleNamespace(q_norm=head_norm, k_norm=head_norm), (bf16(512, 128), bf16(512, 128))
        caches = bf16(1, 8, 512, 128), bf16(1, 8, 512, 128)
        for window in (128, 512):
            position = torch.zeros(1, dtype=torch.long)
            token_kernels.attend(bf16(1, 4096), attention, *tables, position, *caches, window)
        for shares in (None, torch.zeros(2)):
            kernels.cross_entropy_errors(bf16(2, 151936), torch.zeros(2, dtype=torch.long), shares)
    y, h = kernels.rms_norm(bf16(4, 1024), norm.weight, 1e-6, bf16(4, 1024))
    (y + h).sum().backward()
    kernels.rms_norm(bf16(4, 1024), norm.weight, 1e-6).sum().backward()
    table = torch.zeros(1, 1, 4, 128, dtype=torch.bfloat16)
    kernels.norm_rotate(bf16(1, 4, 16, 128), head_norm.weight, table, table, 1e-6).sum().backward()
    kernels.swiglu(bf16(4, 3072), bf16(4, 3072)).sum().backward()


def main() -> None:
    device = {"get_current_device": lambda: 0, "get_current_stream": lambda _: 0}
    driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), **device))
    JITFunction.run = compile_only
    call_all()
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with TemporaryDirectory() as directory:
        source = Path(directory) / "kernel.ptx"
        for kernel in compiled.values():
            source.write_text(kernel.asm["ptx"])
            command = [assembler, "-v", "-arch=sm_90a", source, "-o", source.with_suffix(".cubin")]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
            registers, spilled = (int(re.search(p, said)[1]) for p in (r"Used (\d+) reg", r"(\d+) bytes spill stores"))
            by_bytes = len(re.findall(r"ld\.global[.\w:]*\.b8\b", kernel.asm["ptx"]))
            print(kernel.metadata.name, registers, "registers", kernel.metadata.shared, "bytes shared")
            if spilled or by_bytes or kernel.metadata.shared > 99 << 10:
                sys.exit(f"{kernel.metadata.name}: {spilled} bytes spilled, {by_bytes} loads of a byte")


if __name__ == "__main__":
    main()
