"""The row products and the packed blocks of ops/cpu/ compiled for other instruction sets, run where this processor or
qemu can.

The suite takes what a laptop without AVX-512 has; `python tests/ops/cpu/test_instructions.py` (`make fuzz`) takes all.
"""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from golden.make_kquants import special

from ops.compiler import find_compiler
from ops.cpu.library import FLAGS

PRODUCTS, PACK = (Path(__file__).with_name(name) for name in ("products.cpp", "pack.cpp"))
GOLDEN = json.loads((Path(__file__).parent.parent.parent / "golden/kquants.json").read_text())
EXPECTED = b"".join(base64.b64decode(made["special"]) for made in GOLDEN.values())
MACHINES = {  # flags, and which of /proc/cpuinfo's flags a processor needs
    "SSE2": (("-march=x86-64",), {"sse2"}),
    "AVX2": (("-march=haswell",), {"avx2", "fma"}),
    "AVX2 and VNNI": (("-march=haswell", "-mavxvnni"), {"avx2", "fma", "avx_vnni"}),
    "AVX-512": (("-march=skylake-avx512",), {"avx512bw", "avx512vl"}),
    "AVX-512, VNNI": (("-march=icelake-client",), {"avx512_vnni", "avx512_vbmi2"}),
    "AVX-512, VNNI, BF16": (("-march=icelake-client", "-mavx512bf16"), {"avx512_vnni", "avx512_bf16"}),
    "AMX": (("-march=sapphirerapids",), {"amx_int8", "amx_bf16"}),
}


def compiled(compiler: str, directory: Path, source: Path, *flags: str) -> Path:
    program = directory / source.stem
    kept = [flag for flag in FLAGS if flag not in ("-O3", "-fPIC")]
    command = [compiler, "-O0", *kept, *flags, str(source), "-o", str(program)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if "unrecognized" in result.stderr or "bad value" in result.stderr:
        pytest.skip(f"{Path(compiler).name} does not know {' '.join(flags)}")
    assert result.returncode == 0, result.stderr[-3000:]
    return program


def for_machine(machine: str, directory: Path, source: Path) -> Path:
    """The program, where this processor can run it."""
    if (compiler := find_compiler()) is None:
        pytest.skip("there is no C++ compiler here")
    flags, needed = MACHINES[machine]
    here = set(Path("/proc/cpuinfo").read_text().split())
    if "sse2" not in here:
        pytest.skip("not an x86-64 processor")
    program = compiled(compiler, directory, source, *flags)
    if missing := needed - here:
        pytest.skip(f"compiled; this processor lacks {', '.join(sorted(missing))}")
    return program


@pytest.mark.parametrize("machine", ["AVX2 and VNNI"])
def test_row_products_are_right_with_each_instruction_set(machine, tmp_path):
    program = for_machine(machine, tmp_path, PRODUCTS)
    result = subprocess.run([program], check=False, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def test_row_products_compile_without_avx(tmp_path):
    if (compiler := find_compiler()) is None or "sse2" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("needs a C++ compiler for x86-64")
    compiled(compiler, tmp_path, PRODUCTS, *MACHINES["SSE2"][0], "-fsyntax-only")


def packed_by(*command: str | Path) -> bytes:
    return subprocess.run(command, input=special().tobytes(), check=True, capture_output=True, timeout=300).stdout


@pytest.mark.parametrize("machine", ["AVX2"])
def test_packed_blocks_are_llama_cpps_with_each_instruction_set(machine, tmp_path):
    assert packed_by(for_machine(machine, tmp_path, PACK)) == EXPECTED


def for_neon(directory: Path, source: Path) -> tuple[str, Path]:
    compiler, machine = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not machine:
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user")
    return machine, compiled(compiler, directory, source, "-static")


def test_row_products_are_right_with_neon(tmp_path):
    result = subprocess.run(for_neon(tmp_path, PRODUCTS), check=False, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def test_packed_blocks_are_llama_cpps_with_neon(tmp_path):
    assert packed_by(*for_neon(tmp_path, PACK)) == EXPECTED


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    for name in MACHINES:
        with TemporaryDirectory() as folder:
            try:
                test_row_products_are_right_with_each_instruction_set(name, Path(folder))
                test_packed_blocks_are_llama_cpps_with_each_instruction_set(name, Path(folder))
                print(f"{name}: right", flush=True)
            except pytest.skip.Exception as reason:
                print(f"{name}: {reason}", flush=True)
