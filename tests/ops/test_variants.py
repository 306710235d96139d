"""Row products (ops/cpu/) against PyTorch in every variant; the choice for a machine, and weights in huge pages."""

import ctypes
import json
import mmap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from formats.compressed_tensors import Scheme
from model import KVCache
from ops.compiler import find_compiler
from ops.cpu import library as built
from ops.cpu import step as ops_step
from ops.cpu import variants
from ops.memory import HUGE_PAGE, HugePages
from ops.quant import QuantizedLinear, quantize_
from tests.ops.test_step import random_model

AHEAD = ((0, 0), (-1, 0), (1024, 4096), (4096, 0))
TUNINGS = [(rows, *ahead) for rows in (1, 2, 4) for ahead in AHEAD]


@pytest.fixture
def loaded(monkeypatch):
    monkeypatch.setenv("NANOQWEN_STEP_VARIANT", "default")
    built.library.cache_clear()
    if (found := built.library()) is None:
        pytest.skip("there is no C++ compiler here")
    yield found
    monkeypatch.undo()
    built.library.cache_clear()
    built.library()  # with this machine's own choice again


@pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler here")
def test_where_there_is_a_compiler_there_is_a_library():
    """Other tests skip without the library: this one says that it did not compile."""
    built.library.cache_clear()
    assert built.library() is not None, built.Unavailable.reason


def layer(kind: str, rows: int, columns: int) -> tuple[built.Linear, torch.Tensor, list]:
    """Weights as ops/cpu/ reads them, as float64, and what keeps them alive."""
    bits, group = variants.KINDS[kind]
    weight = torch.randn(rows, columns)
    w = built.Linear(rows=rows, columns=columns, bits=bits)
    if group == 0:
        weight = weight.to(torch.float32 if bits == 32 else torch.bfloat16)
        w.weight, w.row_bytes = weight.data_ptr(), columns * bits // 8
        return w, weight.double(), [weight]
    quantised = QuantizedLinear.from_linear(torch.nn.Linear(columns, rows, bias=False), Scheme(bits, group))
    w.weight, w.scale = quantised.weight_packed.data_ptr(), quantised.weight_scale.data_ptr()
    w.row_bytes, w.groups = 4 * quantised.weight_packed.shape[1], quantised.weight_scale.shape[1]
    return w, quantised.dequantize().double(), [quantised]


def product(loaded: ctypes.CDLL, w: built.Linear, x: torch.Tensor, threads: int = 1) -> torch.Tensor:
    y = torch.full((len(x), w.rows), torch.nan)
    assert loaded.product(w, x.data_ptr(), len(x), y.data_ptr(), threads) == 0
    return y


@pytest.mark.parametrize("columns", [32, 160, 1024, 1184])
@pytest.mark.parametrize("kind", variants.KINDS)
def test_products_are_pytorchs_and_the_same_bits_in_every_variant(kind, columns, loaded):
    torch.manual_seed(0)
    w, weight, _kept = layer(kind, 71, columns)
    x = torch.randn(43, columns)
    expected = x.double() @ weight.T
    for name, form in variants.BFLOAT16.items():
        if loaded.choose_bfloat16(form) or (kind != "bfloat16" and name != "floats"):
            continue
        found = product(loaded, w, x)
        assert (found - expected).abs().max() < expected.abs().max() * (4e-3 if name == "pairs" else 1e-4)
        for tuning in TUNINGS:
            loaded.choose_tuning(loaded.form_of_linear(w), *tuning)
            assert torch.equal(product(loaded, w, x[:1], threads=2), found[:1]), tuning
        for first in (2, variants.ALWAYS):
            loaded.choose_many(loaded.form_of_linear(w), first)
            for count in (2, 3, 5, 8, 9, 16, 17, 32, 33):
                assert torch.equal(product(loaded, w, x[:count]), found[:count]), (first, count)


@pytest.mark.parametrize("kind", variants.KINDS)
def test_more_tokens_than_meet_the_rows_together_get_the_same_bits(kind, loaded):
    torch.manual_seed(0)
    w, _weight, _kept = layer(kind, 35, 8192)
    x = torch.randn(161, 8192)  # 2.6 MB and more: see CACHED in products.h
    for form in variants.BFLOAT16.values():
        if not loaded.choose_bfloat16(form):
            few = [product(loaded, w, some) for some in x.split(23)]
            assert torch.equal(product(loaded, w, x), torch.cat(few))


@pytest.mark.parametrize("columns", [7, 40, 128])
def test_numbers_out_of_range_are_the_same_bits_alone_and_together(columns, loaded):
    torch.manual_seed(0)
    w, weight, _kept = layer("bfloat16", 19, columns)
    x = torch.randn(43, columns)
    x[3, 2], x[4, 5], x[5], x[6] = torch.inf, torch.nan, 1e-39, 3.4e38
    expected = x[7:].double() @ weight.T
    for name, form in variants.BFLOAT16.items():
        if not loaded.choose_bfloat16(form):
            found = product(loaded, w, x)
            assert (found[7:] - expected).abs().max() < expected.abs().max() * (4e-3 if name == "pairs" else 1e-4)
            assert not found[[3, 4]].isfinite().any() and found[7:].isfinite().all() and (found[5].abs() < 1e-36).all()
            for start, count in ((3, 1), (4, 1), (5, 1), (6, 1), (2, 7), (0, 16), (1, 32), (42, 1)):
                alone = product(loaded, w, x[start : start + count].contiguous())
                assert torch.equal(alone.view(torch.int32), found[start : start + count].view(torch.int32))


def test_a_choice_is_measured_once_and_kept(loaded, tmp_path, monkeypatch):
    monkeypatch.delenv("NANOQWEN_STEP_VARIANT")
    calls = []
    small = variants.measure

    def measure(*arguments):
        calls.append(arguments)
        return small(*arguments, size=4 * variants.MATRIX)

    monkeypatch.setattr(variants, "measure", measure)
    monkeypatch.setattr(variants, "TURNS", 1)
    library = tmp_path / "step-0.so"
    before = torch.get_rng_state()
    chosen = variants.apply(loaded, library, built.Linear)
    assert torch.equal(torch.get_rng_state(), before)  # a seed gives the same numbers in a machine's first run
    assert chosen == variants.apply(loaded, library, built.Linear) and len(calls) == 1
    assert set(chosen["tuning"]) == set(variants.ALL) and chosen["huge_page_gain"] > 0
    blocks_together = {rows for kind, (rows, *_) in chosen["tuning"].items() if kind[0] == "Q"}
    assert blocks_together == {1}  # they are read row by row, whatever was tried
    assert set(chosen["many"]) == set(variants.unpacked(chosen["bfloat16"]))
    said = variants.describe(chosen)
    assert ("ahead" in said or "no prefetch" in said) and f"from {chosen['many']['Q6_K']} tokens on" in said
    kept = library.with_suffix(".json")
    good = json.loads(kept.read_text())
    counts = [good | {"many": many} for many in ([], {}, *(good["many"] | {"int4": n} for n in (0, 7, 8.0, "8", None)))]
    damages = ("", "{}", json.dumps({"schema": variants.SCHEMA}), "[1]", "\x00", *map(json.dumps, counts))
    for count, damage in enumerate(damages, 2):
        kept.write_text(damage)
        variants.apply(loaded, library, built.Linear)
        assert len(calls) == count and json.loads(kept.read_text())["schema"] == variants.SCHEMA


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_logits_are_the_same_bits_from_however_many_tokens_rows_are_unpacked(scheme, loaded):
    model = random_model(torch.bfloat16, hidden_size=96, intermediate_size=160)
    if scheme:
        quantize_(model, scheme)
    ids = torch.arange(40)[None]
    for count in (3, 9, 16, 40):
        logits = []
        for first in (0, 2, variants.ALWAYS):
            for form in range(ctypes.c_int.in_dll(loaded, "form_count").value):
                loaded.choose_many(form, first)
            with torch.no_grad():
                logits.append(model(ids[:, :count], KVCache(model.config, 1, 40, dtype=torch.bfloat16)))
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_many_tokens_take_tiles_where_the_processor_has_them(loaded):
    def taken(work) -> int:
        before = loaded.count_tile_setups()
        work()
        return loaded.count_tile_setups() - before

    if loaded.choose_amx(1):
        pytest.skip("this processor has no AMX, or the system does not grant it")
    loaded.choose_bfloat16(variants.BFLOAT16["floats"])
    scales, x = torch.ones(16 * 64, dtype=torch.bfloat16), torch.randn(16, variants.COLUMNS)
    for kind in variants.ALL:
        weights = torch.zeros(16 * variants.row_bytes(kind), dtype=torch.uint8)
        w = variants._linear(built.Linear, kind, weights.data_ptr(), scales.data_ptr(), 16)
        by_tiles = kind not in ("float32", "bfloat16", "F16")
        assert (taken(lambda w=w: product(loaded, w, x)) > 0) == by_tiles, kind
        assert taken(lambda w=w: product(loaded, w, x[:1])) == 0, kind
        loaded.choose_amx(0)
        assert taken(lambda w=w: product(loaded, w, x)) == 0, kind
        loaded.choose_amx(1)
    model = random_model(torch.bfloat16, hidden_size=96, intermediate_size=160)
    quantize_(model, "int8")
    layers = sum(isinstance(module, QuantizedLinear) for module in model.modules())
    with torch.no_grad():  # so small a model has one thread, this one
        assert (
            taken(lambda: model(torch.arange(16)[None], KVCache(model.config, 1, 16, dtype=torch.bfloat16))) >= layers
        )


@pytest.mark.parametrize("asked", ["3/0", "fast", "1/-2", "pairs,1/0", "1/123456", "1/2/3/4", "tiles,vectors"])
def test_a_variant_that_there_is_none_of_is_a_mistake(asked):
    with pytest.raises(ValueError, match="NANOQWEN_STEP_VARIANT"):
        variants.by_hand(asked)


def test_a_variant_by_hand():
    assert variants.by_hand("2/1024,pairs")["tuning"]["int4"] == [2, 1024, 0] and variants.by_hand("measure") is None
    for asked in ("default", "pairs", "vectors", "4/-1,pairs,vectors", "tiles", "1/1024/4096,tiles"):
        expected = next((name for name in variants.BFLOAT16 if name in asked), "floats")
        assert variants.by_hand(asked)["bfloat16"] == expected


def huge_bytes(address: int, size: int) -> int:
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split()
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin < address + size and address < end
        elif inside and head == "AnonHugePages:":
            found += 1024 * int(rest[0])
    return found


@pytest.mark.parametrize("of_file", [True, False])
def test_memory_moves_into_huge_pages_where_it_lies(of_file, tmp_path):
    size = 4 * HUGE_PAGE
    numbers = torch.randint(0, 255, (size,), dtype=torch.uint8)
    if of_file:
        path = tmp_path / "numbers"
        path.write_bytes(numbers.numpy().tobytes())
        with path.open("rb") as file:
            memory = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    else:
        memory = torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
        memory[:] = numbers
    memory[5], numbers[5] = 77, 77  # a page that is no longer the file's
    pages = HugePages([(memory.data_ptr() + 4096, size - 8192)])
    while pages.move(HUGE_PAGE):
        assert torch.equal(memory, numbers)
    if pages.moved == 0:
        pytest.skip("the system has no huge pages for this")
    assert torch.equal(memory, numbers) and pages.moved >= 2 * HUGE_PAGE
    memory[size // 2], numbers[size // 2] = 3, 3
    assert torch.equal(memory, numbers)
    assert huge_bytes(memory.data_ptr(), size) > 0 or not of_file
    assert pages.move(HUGE_PAGE) == 0


def test_memory_of_two_mappings_side_by_side_moves_as_well():
    memory = mmap.mmap(-1, 9 * HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    numbers = torch.frombuffer(memory, dtype=torch.uint8)
    first = -numbers.data_ptr() % HUGE_PAGE
    memory.madvise(mmap.MADV_NOHUGEPAGE, first, 4 * HUGE_PAGE)
    numbers.fill_(3)
    pages = HugePages([(numbers.data_ptr(), numbers.nbytes)])
    (low, middle), (also_middle, high) = pages.left
    assert middle == also_middle == numbers.data_ptr() + first + 4 * HUGE_PAGE
    if pages.move(9 * HUGE_PAGE) == 0:
        pytest.skip("the system has no huge pages for this")
    assert pages.moved == high - low and not pages.left and (numbers == 3).all()


@pytest.mark.parametrize("a_second", [HUGE_PAGE / 0.005, HUGE_PAGE / 0.0002])
def test_a_pass_moves_no_more_than_its_share(a_second, monkeypatch):
    clock, spent = [0.0], []

    class Pages:
        left = True

        def move(self, size: int) -> int:
            spent.append(size / a_second)
            clock[0] += size / a_second
            return size

    bound = SimpleNamespace(passes=0, huge=None, credit=0.0, move_rate=0.0, places=[])
    monkeypatch.setattr(ops_step.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(ops_step, "HugePages", lambda places: Pages())
    monkeypatch.setattr(ops_step, "wants_huge_pages", lambda: True)
    for _ in range(ops_step.MOVE_AFTER + 199):
        before = sum(spent)
        ops_step.Bound._move_to_huge_pages(bound, 0.010)
        assert sum(spent) - before < 0.0051  # a page, or what was saved
    assert 0.9 < sum(spent) / (200 * 0.010 * ops_step.MOVE_SHARE) < 1.1


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_a_reply_is_the_same_bits_while_its_weights_move(scheme, loaded, monkeypatch, tmp_path):
    from model import Qwen3

    sizes = {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 32, "vocab_size": 4000}
    random_model(torch.bfloat16, **sizes).save_pretrained(tmp_path / "model")
    model = Qwen3.from_pretrained(str(tmp_path / "model"))
    if scheme:
        quantize_(model, scheme)
    ids = torch.arange(100)[None]
    with torch.no_grad():
        monkeypatch.setenv("NANOQWEN_HUGE_PAGES", "off")
        cache = KVCache(model.config, 1, 100, dtype=torch.bfloat16)
        expected = torch.cat([model(ids[:, i : i + 1], cache) for i in range(100)], 1)
        assert "huge" not in ops_step.variant(model)
        ops_step._bound.pop(model)
        monkeypatch.setenv("NANOQWEN_HUGE_PAGES", "on")
        cache = KVCache(model.config, 1, 100, dtype=torch.bfloat16)
        assert torch.equal(torch.cat([model(ids[:, i : i + 1], cache) for i in range(100)], 1), expected)
        bound = ops_step._bound[model]
        ops_step.settle(model)
        assert torch.equal(model(ids[:, :50], KVCache(model.config, 1, 50, dtype=torch.bfloat16)), expected[:, :50])
    assert not bound.huge.left and (not bound.huge.moved or "MB in huge pages" in ops_step.variant(model))
