"""Makes kquants.json: the bytes that llama.cpp's reference quantisers give for fixed inputs.

    python tests/golden/make_kquants.py path/to/libggml-base.so > tests/golden/kquants.json

The inputs follow from integers alone (`special`, `ordinary`), so that no generator's version can change them.
"""

import base64
import ctypes
import hashlib
import json
import sys

import numpy as np

SIZES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}


def ordinary(count: int, seed: int = 1) -> np.ndarray:
    """`count` values around zero, of the size that weights have: float32, exactly representable."""
    index = np.arange(count, dtype=np.int64)
    mixed = (index * index * 31 + index * 7919 + seed * 104729) % 20011 + (index * 48271) % 10007
    return ((mixed - 15000) / 2.0**18).astype(np.float32)


def special() -> np.ndarray:
    """15 blocks of 256 values that are unlike a weight matrix, each for a branch of a quantiser."""
    base = ordinary(256)
    sign = np.where(np.arange(256) % 2, -1, 1)
    group = np.arange(256) // 32
    blocks = [
        np.zeros(256),
        np.full(256, 0.25),
        np.full(256, -0.25),
        np.where(np.arange(256) == 77, -3.0, 0.0),
        sign * 0.5,  # ties between the largest magnitudes
        base * 2.0**-20,  # scales that are subnormal in float16
        base * 2.0**-40,  # scales that are 0 in float16
        np.where(group % 3 == 0, base, 0.0),
        np.where(group == 0, base * 64, base * 2.0**-10),  # groups whose 6-bit scale is 0
        np.abs(base) + 0.01,
        -np.abs(base) - 0.01,
        base * (1.0 + group * 4),
        base * 2.0**-128,  # steps whose reciprocal is infinite in float32
        np.full(256, -0.0),
        np.where(group % 2, 0.0, base) * sign,  # groups of 0 and -0
    ]
    return np.concatenate(blocks).astype(np.float32)


def reference(library: ctypes.CDLL, name: str, values: np.ndarray) -> bytes:
    block = 256 if name.endswith("_K") else 32
    out = np.zeros(len(values) // block * SIZES[name], np.uint8)
    function = library[f"quantize_row_{name[:-1].lower()}{name[-1]}_ref"]
    function(values.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(len(values)))
    return out.tobytes()


def golden(library: ctypes.CDLL) -> dict:
    """{type: {"special": base64 of the bytes, "ordinary": sha256 of the bytes of 2^18 values}}"""
    return {
        name: {
            "special": base64.b64encode(reference(library, name, special())).decode(),
            "ordinary": hashlib.sha256(reference(library, name, ordinary(1 << 18))).hexdigest(),
        }
        for name in SIZES
    }


if __name__ == "__main__":
    print(json.dumps(golden(ctypes.CDLL(sys.argv[1])), indent=1))
