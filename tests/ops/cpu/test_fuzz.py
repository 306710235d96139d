"""ops/cpu/step.cpp under the address and undefined-behaviour sanitizers: `make fuzz`, and for seconds in the suite."""

import subprocess
import sys
from pathlib import Path

import pytest

from ops.compiler import find_compiler
from ops.cpu.library import FLAGS
from tests.ops.cpu.test_instructions import EXPECTED, PACK, compiled, packed_by

SOURCE = Path(__file__).with_name("fuzz.cpp")
SANITIZED = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp")
MACHINES = {  # all of them run on a processor with AVX-512; where one does not, its programs end at once
    "this": ("-march=native",),
    "AVX2": ("-march=haswell",),
    "SSE2": ("-march=x86-64",),
}


def fuzz(directory: Path, machine: str, first: int, count: int) -> subprocess.CompletedProcess | None:
    """None where the compiler has no sanitizers or cannot compile for the machine."""
    program = directory / "fuzz"
    flags = [flag for flag in FLAGS if flag not in ("-O3", "-fPIC")]
    command = [find_compiler() or "c++", *flags, *SANITIZED, *MACHINES[machine], str(SOURCE), "-o", str(program)]
    try:
        built = subprocess.run(command, check=False, capture_output=True, text=True)
        assert "error: " not in built.stderr or ".cpp:" not in built.stderr, built.stderr[-3000:]  # of the code itself
        if built.returncode:
            known = any(word in built.stderr for word in ("asan", "sanitize", "march"))
            assert known, built.stderr[-3000:]  # such as of a compiler that was killed
            return None
    except OSError:
        return None
    return subprocess.run([program, str(first), str(count)], check=False, capture_output=True, text=True)


def test_random_models_stay_within_their_memory_and_have_the_same_bits_in_every_batch(tmp_path):
    result = fuzz(tmp_path, "this", 0, 6)
    if result is None:
        pytest.skip("the C++ compiler here has no address sanitizer")
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


def main(count: int, directory: Path) -> None:
    for number, machine in enumerate(MACHINES):
        result = fuzz(directory, machine, 1000 * number, count)
        said = "can't be compiled here" if result is None else (result.stdout + result.stderr)[-3000:].strip()
        print(f"{machine}: {said}", flush=True)
        if result is not None and result.returncode:
            sys.exit(1)
        if result is not None:
            program = compiled(find_compiler(), directory, PACK, *SANITIZED, *MACHINES[machine])
            assert packed_by(program) == EXPECTED
            print(f"{machine}: packed blocks", flush=True)


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        main(int(sys.argv[1]), Path(folder))
