"""The compiled token step: builds ops/cpu/*.cpp for this machine, loads them, and mirrors their structs.

The library is compiled once for this machine, in some seconds, into $XDG_CACHE_HOME/nanoqwen (~/.cache/nanoqwen) with
$CXX or the first of c++, g++ and clang++. It is code, so it is loaded only where nobody else can have written it, and a
damaged one is compiled again. Without a compiler one notice says so. NANOQWEN_STEP=off keeps to PyTorch;
NANOQWEN_STEP=avx2 or avx-vnni compiles for no more than that.
"""

import ctypes
import hashlib
import os
import platform
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from console import is_out_of_memory, notice
from formats.files import atomic_file
from ops.compiler import find_compiler
from ops.cpu import variants

DIRECTORY = Path(__file__).parent
# The slowest to compile first.
NAMES = ("blocks.cpp", "codes.cpp", "step.cpp", "floats.cpp", "pack.cpp", "bytes.cpp", "row.cpp", "choice.cpp")
SOURCES = tuple(DIRECTORY / name for name in NAMES)
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
FLAGS += ("-fvisibility-inlines-hidden", "-fno-semantic-interposition", "-Wno-psabi")
TUNED = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",), ())  # the first that compiles
ISA = {"avx2": ("-march=haswell", "-fopenmp"), "avx-vnni": ("-march=haswell", "-mavxvnni", "-fopenmp")}
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
BLOCK = 256  # positions of a cache that lie side by side

# ---------------------------------------------------------------------------------------------------------------------
# Mirrors of the structs of the C++ (ctypes), field by field; `load` compares every size and offset.


class Linear(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("weight", "bias", "scale")]
    _fields_ += [(name, c_int64) for name in ("rows", "columns", "row_bytes", "bits", "groups", "blocks")]


class Attention(ctypes.Structure):
    _fields_ = [(name, Linear) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    _fields_ += [("q_norm", c_void_p), ("k_norm", c_void_p)]


class MLP(ctypes.Structure):
    _fields_ = [(name, Linear) for name in ("gate_proj", "up_proj", "down_proj")]


class Block(ctypes.Structure):
    _fields_ = [("input_layernorm", c_void_p), ("self_attn", Attention), ("post_attention_layernorm", c_void_p)]
    _fields_ += [("gate", Linear), ("experts", POINTER(MLP))]


class Qwen3(ctypes.Structure):
    SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    _fields_ = [(name, c_int64) for name in (*SIZES, "num_experts", "num_experts_per_tok", "norm_topk_prob")]
    _fields_ += [("rms_norm_eps", c_float), ("rope_factor", c_float)]
    _fields_ += [("rope_frequencies", c_void_p), ("embed_tokens", Linear), ("layers", POINTER(Block))]
    _fields_ += [("norm", c_void_p), ("lm_head", Linear)]


class KVCache(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales")]
    _fields_ += [("half", c_int64), ("blocks", c_int64)]
    _fields_ += [(name, c_void_p) for name in ("first", "strides", "lengths")]


class Tokens(ctypes.Structure):
    _fields_ = [("ids", c_void_p), ("starts", c_void_p), ("outputs", c_void_p), ("B", c_int64), ("logits", c_void_p)]


class Logits(ctypes.Structure):
    _fields_ = [("x", c_void_p), ("bits", c_int64), ("size", c_int64)]
    _fields_ += [("ids", c_void_p), ("times", c_void_p), ("count", c_int64)]
    _fields_ += [(name, c_float) for name in ("repetition", "presence", "frequency")]


ROW = {  # what the functions of row.cpp take
    "copy": (POINTER(Logits), c_void_p),
    "largest": (POINTER(Logits), c_void_p),
    "best": (POINTER(Logits), c_void_p, c_int64, c_void_p, c_void_p),
    "weigh": (POINTER(Logits), c_float, c_float, c_void_p, c_void_p),
    "likely": (POINTER(Logits), c_float, c_float, c_float, c_int64, c_void_p, c_void_p),
    "draw": (c_void_p, c_void_p, c_int64, c_double),
    "below": (c_void_p, c_int64, c_float, c_int64, c_void_p),
    "cut": (c_void_p, c_int64, c_float, c_int64, c_void_p),
    "drop": (c_void_p, c_int64, c_double, c_float),
}
MIRRORS = (Linear, Attention, MLP, Block, Qwen3, KVCache, Tokens, Logits)


def layout() -> list[int]:
    """Size of each mirror and the offsets of its fields, and the size of a block, as `layout` in step.cpp."""
    sizes = [n for m in MIRRORS for n in (ctypes.sizeof(m), *(getattr(m, name).offset for name, _ in m._fields_))]
    return [*sizes, BLOCK]


# ---------------------------------------------------------------------------------------------------------------------
# Building and loading.


class Unavailable:
    """Why there is no library."""

    reason: str | None = None


class Chosen:
    """The library, once something has asked for it, and which variant of the row products it runs: see variants.py."""

    library: ctypes.CDLL | None = None
    variant: dict[str, Any] | None = None


@cache
def library() -> ctypes.CDLL | None:
    """The compiled step.cpp; None, with one notice for the whole process, where it cannot be had.

    Raises ValueError where NANOQWEN_STEP, NANOQWEN_STEP_VARIANT or NANOQWEN_HUGE_PAGES is wrong.
    """
    Unavailable.reason = Chosen.library = None
    tuned()
    if (huge_pages := os.environ.get("NANOQWEN_HUGE_PAGES", "")) not in ("", "on", "off"):
        raise ValueError(f"NANOQWEN_HUGE_PAGES={huge_pages}: give on or off, or leave it out")
    if os.environ.get("NANOQWEN_STEP") == "off":
        Unavailable.reason = "NANOQWEN_STEP=off"
        return None
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoqwen"
    try:
        path = build(directory)
        try:
            loaded = load(path)
        except OSError as error:  # damaged, or from a machine that only looks like this one
            if is_out_of_memory(error):
                raise
            path.unlink(missing_ok=True)
            loaded = load(build(directory))
    except (OSError, RuntimeError, ValueError) as error:
        Unavailable.reason = str(error)
        notice(f"no compiled C++, so PyTorch computes instead and is slower: {error}")
        return None
    Chosen.variant = variants.apply(loaded, path, Linear)
    _after_fork()
    Chosen.library = loaded
    return loaded


@cache
def _after_fork() -> None:
    """A forked process has none of its parent's threads, and OpenMP would wait for them for ever: one thread there."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def load(path: Path) -> ctypes.CDLL:
    """Loads a compiled step.cpp. OSError where the file is no such library, or not one of these structs."""
    loaded = ctypes.CDLL(str(path))
    try:
        expected = layout()
        found = list((c_int64 * (len(expected) + 1)).in_dll(loaded, "layout"))
        functions = [getattr(loaded, kind + name) for name in DTYPES.values() for kind in ("step_", "quantize_")]
        packers = [getattr(loaded, f"pack_{name}") for name in (*DTYPES.values(), "float16")]
        passes = [(getattr(loaded, f"row_{name}"), kinds) for name, kinds in ROW.items()]
    except (ValueError, AttributeError) as error:
        raise OSError(f"{path}: {error}") from None
    if found != [*expected, -1]:
        raise OSError(f"{path}: its structs are others than those of {Path(__file__).name}")
    for function, kinds in zip(functions, 2 * ((Qwen3, KVCache, Tokens), (Linear,)), strict=True):
        first = () if len(kinds) > 1 else (c_void_p,)
        function.argtypes, function.restype = (*first, *map(POINTER, kinds), c_int), c_int
    for function in packers:
        function.argtypes, function.restype = (c_int, c_void_p, c_int64, c_void_p, c_void_p), c_int
    for function, kinds in passes:
        function.argtypes, function.restype = kinds, c_int64
    return loaded


def tuned() -> tuple[tuple[str, ...], ...]:
    """Flags for this machine's instructions, or for those that NANOQWEN_STEP names; the first that compile count."""
    name = os.environ.get("NANOQWEN_STEP", "")
    if name in ("", "off"):
        return TUNED
    if name not in ISA:
        raise ValueError(f"NANOQWEN_STEP={name}: give off, {' or '.join(ISA)}, or leave it out")
    if name.replace("-", "_") not in _processor().split():
        raise ValueError(f"NANOQWEN_STEP={name}: this processor has no such instructions")
    return (ISA[name],)


def build(directory: Path) -> Path:
    """Compiles the token step into `directory` unless it is there. ValueError or OSError where that is not possible."""
    compiler = find_compiler()
    if compiler is None:
        raise ValueError("no C++ compiler is installed (c++, g++ or clang++)")
    version = Path(compiler).resolve().stat()
    code = [path.read_bytes() for path in (*SOURCES, *sorted(DIRECTORY.glob("*.h")))]
    key = (code, FLAGS, tuned(), compiler, version.st_size, version.st_mtime_ns, _processor())
    path = directory / f"step-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode, others = stat.S_IMODE(directory.stat().st_mode), stat.S_IWGRP | stat.S_IWOTH
    if mode & others and hasattr(os, "getuid") and directory.stat().st_uid == os.getuid():
        directory.chmod(mode & ~others)
    _check_ownership(directory)
    if os.path.lexists(path):
        try:
            _check_ownership(path)
            if _is_whole(path):
                return path
            notice(f"{path} is damaged; compiling it again")
        except ValueError as error:
            notice(f"{error}; compiling it again")
        path.unlink()
    notice("compiling C++ for this machine, once")
    with atomic_file(path) as temporary:  # each process has its own; of several at once the last one stays
        _compile(compiler, temporary)
        with temporary.open("r+b") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            file.write(digest)  # behind the end that the loader sees
    path.chmod(0o600)  # whatever the umask is
    return path


def _compile(compiler: str, library: Path) -> None:
    """Compiles the sources side by side and links them. ValueError where the compiler refuses."""
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        objects = [Path(directory) / f"{source.stem}.o" for source in SOURCES]
        for flags in tuned():
            commands = [
                [compiler, *FLAGS, *flags, "-c", str(source), "-o", str(object_)]
                for source, object_ in zip(SOURCES, objects, strict=True)
            ]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                results = list(pool.map(_run, commands))
            results.append(_run([compiler, "-shared", *flags, *map(str, objects), "-o", str(library)]))
            failed = [result.stderr for result in results if result.returncode]
            if not failed:
                return
    raise ValueError(f"{compiler} does not compile {DIRECTORY.name}: {failed[0].strip()[:200]}")


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=False, capture_output=True, text=True)


def _is_whole(path: Path) -> bool:
    """Whether a library ends with the digest of all before it: one that was cut off would crash where it is loaded."""
    content = path.read_bytes()
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


def _check_ownership(path: Path) -> None:
    """ValueError where another user could have written a file or directory of code that is about to be loaded."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) and not path.is_dir():
        raise ValueError(f"{path} is a link")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path} is no file")  # to read a pipe would never end
    if hasattr(os, "getuid") and status.st_uid not in (os.getuid(), 0):
        raise ValueError(f"{path} belongs to another user (number {status.st_uid})")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):o}; chmod go-w)")


def _processor() -> str:
    """What -march=native depends on, as one home directory may be shared by different machines."""
    described = ("vendor_id", "model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return repr((platform.platform(), platform.processor(), sorted({x for x in lines if x.startswith(described)})))
