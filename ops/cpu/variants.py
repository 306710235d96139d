"""Which variant of each row product this machine runs: measured once, in half a second, and kept.

How many rows a token reads side by side and how far ahead it fetches changes its speed by half on one processor and
not at all on another, but no bit of a result; nor does from how many tokens on rows are unpacked once for all of them.
How bfloat16 weights meet activations does change results: in float32, as bfloat16 (vdpbf16ps) or as a sum of two
bfloat16 in the tiles of AMX, where there are such instructions. It is measured on many tokens, where it decides a
prompt's time; tiles, which are slower for a single token, have a bound for that.

What was chosen lies beside the compiled library as JSON. NANOQWEN_STEP_VARIANT sets it by hand: `measure` measures
again, `default` measures nothing, `2/3072/6144` reads two rows side by side and fetches 3,072 bytes ahead, and 6,144
into the second-level cache, in every kind, and `floats`, `pairs` or `tiles`, alone or behind a comma, says how bfloat16
weights are multiplied, and `vectors` behind the first two leaves AMX unused, which gives other weights the same bits
faster where there are many tokens.
"""

import ctypes
import itertools
import json
import mmap
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from ctypes import c_int, c_int64, c_void_p
from functools import partial
from pathlib import Path
from typing import Any

import torch

from formats.files import write_text
from formats.gguf.types import FORMATS

SCHEMA = "nanoqwen/variant/7"
KINDS = {  # name: bits, columns of a group (0: no scales, None: one for each row), as a Linear of ops/cpu/products.h
    "float32": (32, 0),
    "bfloat16": (16, 0),
    "int8": (8, None),
    "int8 in groups": (8, 32),
    "int4": (4, 32),
}
BFLOAT16 = {"floats": 1, "pairs": 2, "tiles": 3}  # how bfloat16 weights are multiplied: a Form in products.h
FORMS = {"F32": 0, "BF16": 1, "F16": 7, "Q8_0": 8, "Q4_0": 9, "Q4_1": 10, "Q5_0": 11, "Q5_1": 12}  # in products.h
FORMS |= {"Q4_K": 13, "Q5_K": 14, "Q6_K": 15}
BLOCKS = tuple(name for name, form in FORMS.items() if form > 1)  # types of a GGUF that have a form of their own
ALL = (*KINDS, *BLOCKS)
# Each a Tuning of products.h. Fetching nothing ahead, or only near, is fastest on some AMD processors. Of two rows
# side by side the second begins a row further on, so that what lies near is met too soon.
CANDIDATES = ((1, 0, 0), (1, 1024, 0), (1, 1024, 4096), (1, 2048, 4096), (2, 3072, 6144), (4, -1, 0))
DEFAULT = (1, 1024, 4096)
COUNTS = (2, 4, 6, 8, 12, 16, 24, 32)  # tokens for which it is measured whether to unpack rows once for all
ALWAYS = 33  # tokens for which it is always done: MANY in products.h
WORTH = 1.02  # a candidate has to be so much faster than the default
BFLOAT16_WORTH = 1.15  # times as fast with many tokens: float32 products are more exact
TILES_WORTH, TILES_LOSS = 1.5, 1.35  # as fast with many tokens, as long with one (a whole token loses a third of that)
HUGE_PAGES_WORTH = 1.1  # times as fast as pages of 4 KB, for weights to move there (ops/memory.py)
COLUMNS, TURNS, MANY = 1024, 5, 256
MATRIX = 4 << 20  # bytes that one token meets at once, as in a model: each matrix begins with nothing under way
FEW_BYTES = 1 << 18  # bytes that several tokens meet at once
MEMORY = 128 << 20  # bytes, more than what one thread gets of most processors' last-level cache
READERS = ((1, 0, 0), (1, 1024, 4096), (1, 2048, 4096), (1, 4096, 0), (2, 2048, 4096), (4, -1, 0))
READ_BYTES = 256 << 20  # far above the caches of all but the largest servers, small enough for a laptop
HUGE = 2 << 20  # bytes of a huge page on x86-64 and aarch64


def apply(loaded: ctypes.CDLL, path: Path, linear: type[ctypes.Structure]) -> dict[str, Any]:
    """Makes `loaded` run what was chosen for this machine and returns it. `path`: of the library; `linear`: its Linear.

    Raises ValueError where NANOQWEN_STEP_VARIANT is none of what it can be.
    """
    loaded.choose_tuning.argtypes = [c_int, c_int, c_int, c_int]
    loaded.choose_many.argtypes = [c_int, c_int]
    loaded.product.argtypes = [ctypes.POINTER(linear), c_void_p, c_int64, c_void_p, c_int]
    loaded.form_of_linear.argtypes = [ctypes.POINTER(linear)]
    asked = os.environ.get("NANOQWEN_STEP_VARIANT", "")
    kept = path.with_suffix(".json")
    chosen = by_hand(asked) or (None if asked == "measure" else read(kept))
    if chosen is None:
        chosen = measure(loaded, linear)
        with suppress(OSError):  # a full disk, a read-only folder: measured again the next time
            write_text(kept, json.dumps(chosen, indent=1) + "\n")
    if not choose(loaded, chosen, linear):
        raise ValueError(f"NANOQWEN_STEP_VARIANT={asked}: this processor has no such products of bfloat16 weights")
    vectors = asked.endswith("vectors")
    chosen["amx"] = not loaded.choose_amx(not vectors) and not vectors
    return chosen


def choose(loaded: ctypes.CDLL, chosen: dict[str, Any], linear: type[ctypes.Structure]) -> bool:
    """False where this processor has no such products of bfloat16 weights as are chosen. Puts into `chosen` how many
    rows each kind reads side by side, as not all can read so many."""
    if loaded.choose_bfloat16(BFLOAT16[chosen["bfloat16"]]):
        return False
    for name, (_, *ahead) in (tunings := chosen["tuning"]).items():
        tunings[name] = [loaded.choose_tuning(loaded.form_of_linear(_linear(linear, name)), *tunings[name]), *ahead]
    for name, tokens in chosen["many"].items():
        loaded.choose_many(loaded.form_of_linear(_linear(linear, name)), tokens)
    return True


def unpacked(bfloat16: str) -> list[str]:
    """The kinds of weights for which it is measured from how many tokens on rows are unpacked once for all."""
    others = ("float32", "F16", *(("bfloat16",) if bfloat16 == "pairs" else ()))  # as compiled, or never
    return [name for name in ALL if name not in others]


def by_hand(asked: str) -> dict[str, Any] | None:
    """What NANOQWEN_STEP_VARIANT says; None where something is to be measured or read."""
    if asked in ("", "measure"):
        return None
    tuning = r"default|[124]/(?:-1|\d{1,5})(?:/\d{1,5})?"
    match = re.fullmatch(rf"({tuning})?,?(?:(tiles)|(pairs|floats)?,?(vectors)?)", asked)
    if not match:
        raise ValueError(
            f"NANOQWEN_STEP_VARIANT={asked}: give measure, default, floats, pairs, tiles, vectors, "
            "or rows/bytes ahead[/further]: 1/1024/4096"
        )
    tuning = list(map(int, match[1].split("/"))) if match[1] and match[1] != "default" else list(DEFAULT)
    tuning += [0] * (3 - len(tuning))
    bfloat16 = match[2] or match[3] or "floats"
    chosen = {"schema": SCHEMA, "bfloat16": bfloat16, "tuning": dict.fromkeys(ALL, tuning), "by_hand": asked}
    return chosen | {"many": dict.fromkeys(unpacked(bfloat16), 0)}  # as compiled


def read(path: Path) -> dict[str, Any] | None:
    """What was chosen before; None where there is nothing, or nothing whole."""
    try:
        chosen = json.loads(path.read_text())
        good = chosen["schema"] == SCHEMA and set(chosen["tuning"]) == set(ALL) and chosen["bfloat16"] in BFLOAT16
        good = good and all((*map(int, tuning),) in CANDIDATES for tuning in chosen["tuning"].values())
        good = good and set(chosen["many"]) == set(unpacked(chosen["bfloat16"]))
        good = good and all(type(tokens) is int and tokens in (*COUNTS, ALWAYS) for tokens in chosen["many"].values())
        return chosen if good and float(chosen["huge_page_gain"]) > 0 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def describe(chosen: dict[str, Any]) -> str:
    """For --stats and bench.py: `2 rows, 2,048 B ahead: bfloat16; unpacked once from 8 tokens on: int4; …`."""
    words: dict[str, list[str]] = {}
    for name, (together, ahead, further) in chosen["tuning"].items():
        if (name, chosen["bfloat16"]) == ("bfloat16", "tiles"):  # which have no such variants
            continue
        fetched = "no prefetch" if not ahead else "next rows ahead" if ahead < 0 else f"{ahead:,} B ahead"
        fetched = f"{ahead:,} and {further:,} B ahead" if further else fetched
        words.setdefault(f"{together} row{'s' * (together > 1)}, {fetched}", []).append(name)
    said = "; ".join(f"{', '.join(names)}: {variant}" for variant, names in words.items())
    said += "" if chosen["bfloat16"] == "floats" else f"; bfloat16: {chosen['bfloat16']}"
    counts: dict[int, list[str]] = {}
    for name, tokens in chosen["many"].items():
        counts.setdefault(tokens, []).append(name)
    for tokens, names in sorted(counts.items()):
        said += f"; unpacked once from {tokens} tokens on: {', '.join(names)}" if tokens else ""
    return said + ("; AMX" if chosen.get("amx") else "")


# ---------------------------------------------------------------------------------------------------------------------


def _linear(linear: type[ctypes.Structure], kind: str, weight: int = 0, scale: int = 8, rows: int = 0) -> Any:
    if kind in BLOCKS:
        return linear(weight=weight, rows=rows, columns=COLUMNS, row_bytes=row_bytes(kind), blocks=FORMS[kind])
    bits, group = KINDS[kind]
    groups = 0 if group == 0 else COLUMNS // group if group else 1
    sizes = {"rows": rows, "columns": COLUMNS, "row_bytes": row_bytes(kind), "bits": bits, "groups": groups}
    return linear(weight=weight, scale=scale if groups else None, **sizes)


def row_bytes(kind: str) -> int:
    """Of a row of COLUMNS weights."""
    return FORMATS[kind].bytes((COLUMNS,)) if kind in BLOCKS else COLUMNS * KINDS[kind][0] // 8


def _random(*shape: int) -> torch.Tensor:
    """Normally distributed, with a generator of its own: to measure must not change what a program draws."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def fill(size: int, huge: bool) -> torch.Tensor:
    """`size` bytes (a multiple of 1 MB) of bfloat16 numbers around zero, in huge pages or, where possible, in none."""
    memory = mmap.mmap(-1, size + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has no huge pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    numbers = torch.frombuffer(memory, dtype=torch.uint8)
    numbers = numbers[-numbers.data_ptr() % HUGE :][:size]
    numbers.view(-1, 1 << 20)[:] = (_random(1 << 19) * 0.02).bfloat16().view(torch.uint8)
    return numbers


def pieces(memory: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Pieces of `size` bytes for ever, always the one read longest ago. One of 2^n is left out: else, by turns, each
    case would meet a few of them again and again, and one is faster than another."""
    return itertools.cycle(memory.split(size)[:-1])


def by_turns(seconds: Callable[[Any], float], cases: Iterable[Any], turns: int | None = None) -> dict[Any, float]:
    """The median of each case's times, all cases by turns. (The least is what a cache happened to hold.)"""
    times: dict[Any, list[float]] = {case: [] for case in cases}
    for _ in range(turns or TURNS):
        for case, found in times.items():
            found.append(seconds(case))
    return {case: statistics.median(found) for case, found in times.items()}


def measure(loaded: ctypes.CDLL, linear: type[ctypes.Structure], size: int = MEMORY) -> dict[str, Any]:
    """Times what there is to choose, on `size` bytes of which the next ones are always those read longest ago.

    One thread and its own processor time, so that other programs on the same cores disturb it as little as possible;
    all threads only for a token by tiles beside one in float32, as these differ where one thread waits for memory.
    """
    loaded.choose_bfloat16(BFLOAT16["floats"])
    x, y = _random(MANY, COLUMNS), torch.empty(max(MATRIX // 512, MANY * FEW_BYTES // 2 // COLUMNS))
    scales = torch.full((MATRIX // 16,), 0.01, dtype=torch.bfloat16)
    memory = fill(size, huge=True)
    matrices, parts = pieces(memory, MATRIX), pieces(memory, FEW_BYTES)

    def seconds(kind: str, tuning: Iterable[int], weights: torch.Tensor, count: int = 1, threads: int = 1) -> float:
        layer = _linear(linear, kind, weights.data_ptr(), scales.data_ptr(), len(weights) // row_bytes(kind))
        loaded.choose_tuning(loaded.form_of_linear(layer), *tuning)
        clock = time.thread_time if threads == 1 else time.perf_counter
        start = clock()
        if loaded.product(layer, x.data_ptr(), count, y.data_ptr(), threads):
            raise MemoryError("not enough memory to measure the row products")
        return clock() - start

    def huge_page_gain() -> float:  # of the kind that gains most, each page size with what suits it
        pages = {"small": pieces(fill(size // 2, huge=False), MATRIX), "huge": matrices}

        def gain(kind: str) -> float:
            cases = itertools.product(pages, (DEFAULT, (1, 0, 0)))
            times = by_turns(lambda case: seconds(kind, case[1], next(pages[case[0]])), cases)
            small, huge = (min(found for case, found in times.items() if case[0] == place) for place in pages)
            return small / huge

        return max(map(gain, ("bfloat16", "int8")))

    def best_tunings() -> dict[str, list[int]]:  # all kinds by turns, so that what disturbs some turns spoils no median
        times = by_turns(lambda case: seconds(*case, next(matrices)), itertools.product(ALL, CANDIDATES))

        def best(kind: str) -> list[int]:
            first = min(CANDIDATES, key=lambda tuning: times[kind, tuning])
            return list(first if times[kind, first] * WORTH < times[kind, DEFAULT] else DEFAULT)

        return {kind: best(kind) for kind in ALL}

    def best_bfloat16() -> str:
        def one_token(name: str) -> float:
            loaded.choose_bfloat16(BFLOAT16[name])
            return seconds("bfloat16", tuning["bfloat16"], next(matrices), threads=torch.get_num_threads())

        def many_tokens(name: str) -> float:
            loaded.choose_bfloat16(BFLOAT16[name])
            return seconds("bfloat16", DEFAULT, memory[:FEW_BYTES], MANY)

        many = by_turns(many_tokens, [name for name, form in BFLOAT16.items() if not loaded.choose_bfloat16(form)])
        if "tiles" in many:
            one = by_turns(one_token, ("floats", "tiles"), 12 * TURNS)
            if one["tiles"] > TILES_LOSS * one["floats"] or many["tiles"] * TILES_WORTH > many["floats"]:
                del many["tiles"]
        fastest = min(many, key=many.__getitem__)
        return fastest if many[fastest] * BFLOAT16_WORTH < many["floats"] else "floats"

    def unpacked_from(kinds: list[str]) -> dict[str, int]:  # tokens with which least time is lost over all COUNTS
        def some_tokens(case: tuple[str, int, int]) -> float:
            kind, count, first = case
            loaded.choose_many(loaded.form_of_linear(_linear(linear, kind)), first)
            return seconds(kind, tuning[kind], next(parts), count)

        times = by_turns(some_tokens, itertools.product(kinds, COUNTS, (2, ALWAYS)))

        def lost(kind: str, first: int) -> float:
            return sum(
                times[kind, count, 2 if count >= first else ALWAYS]
                / min(times[kind, count, 2], times[kind, count, ALWAYS])
                for count in COUNTS
            )

        return {kind: min((*COUNTS, ALWAYS), key=partial(lost, kind)) for kind in kinds}

    gain = huge_page_gain()
    tuning = best_tunings()
    bfloat16 = best_bfloat16()
    loaded.choose_bfloat16(BFLOAT16[bfloat16])
    many = unpacked_from(unpacked(bfloat16))
    return {"schema": SCHEMA, "bfloat16": bfloat16, "tuning": tuning, "many": many, "huge_page_gain": round(gain, 3)}


def read_rate(loaded: ctypes.CDLL, linear: type[ctypes.Structure], threads: int, seconds: float) -> float:
    """Bytes per second of the fastest reader that there is: row products, in any variant, of memory in huge pages.

    It changes what was chosen: `choose` again afterwards.
    """
    memory, x = fill(READ_BYTES, huge=True), _random(COLUMNS)
    y, best, end = torch.empty(READ_BYTES // COLUMNS), 0.0, time.perf_counter() + seconds
    turns = itertools.cycle(itertools.product(("float32", "bfloat16", "int8"), READERS))
    scale = torch.full((len(y),), 0.01, dtype=torch.bfloat16)
    for count, (kind, tuning) in enumerate(turns):
        rows = READ_BYTES // row_bytes(kind)
        layer = _linear(linear, kind, memory.data_ptr(), scale.data_ptr(), rows)
        loaded.choose_tuning(loaded.form_of_linear(layer), *tuning)
        start = time.perf_counter()
        loaded.product(layer, x.data_ptr(), 1, y.data_ptr(), threads)
        now = time.perf_counter()
        best = max(best, READ_BYTES / (now - start))
        if now > end and count >= 3 * len(READERS):
            return best
