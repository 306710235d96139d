"""The filters of sampling are transformers' own on random logits, and a draw depends on its arguments alone."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as oracle

from inference.params import SamplingParams, recommended
from inference.sampling import FEW, Said, distribution, draw, draw_kept, penalties, sample, top_logprobs
from ops.cpu import row as row_module
from ops.cpu.library import library
from ops.cpu.row import BLOCK, SUMS, Row

SETTINGS = list(itertools.product((0.3, 0.6, 1.7), (0, 1, 5, 20), (1.0, 0.95, 0.5, 0.0), (0.0, 0.05, 0.4)))


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), SETTINGS)
def test_filters_agree_with_transformers(temperature, top_k, top_p, min_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=1.3)
    chain = [oracle.RepetitionPenaltyLogitsProcessor(1.3), oracle.TemperatureLogitsWarper(temperature)]
    chain += [oracle.TopKLogitsWarper(top_k)] if top_k else []
    chain += [oracle.TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [oracle.MinPLogitsWarper(min_p)] if min_p else []
    for seed, size in enumerate((30, 1000, 20000)):
        generator = torch.Generator().manual_seed(seed)
        logits = 4 * torch.randn(size, generator=generator)
        seen = torch.randint(0, size, (40,), generator=generator)
        scores = logits[None].clone()
        for step in chain:
            scores = step(seen[None], scores)
        expected = scores[0].softmax(-1).numpy()
        found = probabilities(logits.numpy(), params, Said(seen[:20].tolist(), seen[20:].tolist()))
        assert np.array_equal(found > 0, expected > 0)
        assert np.allclose(found, expected, atol=1e-6)


class Given:
    """Random numbers that are always this one."""

    def __init__(self, number: float):
        self.number = number

    def next(self) -> float:
        return self.number


def row_of(weights: np.ndarray) -> Row:
    row = Row(len(weights))
    row.take(torch.from_numpy(weights.copy()))
    row.copy()
    row.add_up()
    return row


def penalized(logits: np.ndarray, params: SamplingParams, said: Said) -> np.ndarray:
    row = Row(len(logits))
    row.take(torch.from_numpy(logits), penalties(params, said))
    return row.copy()


def probabilities(logits: np.ndarray, params: SamplingParams, said: Said | None = None) -> np.ndarray:
    """Of all tokens: float32 [V]."""
    ids, weights = distribution(logits, params, said)
    found = np.zeros(len(logits), np.float32)
    found[slice(None) if ids is None else ids] = weights / weights.sum()
    return found


def nucleus(weights: np.ndarray, top_p: float, min_p: float = 0.0) -> np.ndarray:
    """The weights with 0 for what top-p and min-p drop."""
    row = row_of(weights)
    row.drop(top_p, min_p)
    return row.numbers


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.3, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("scale", [0.0, 0.01, 0.6, 2.0, 4.0, 20.0])
@pytest.mark.parametrize("shape", ["normal", "heavy", "in order"])
def test_the_nucleus_of_a_whole_vocabulary_is_that_of_sorting_it(top_p, scale, shape):
    """Also where all tokens are equally likely, or most of them underflow to 0: ties drop the lower ids first."""
    logits = scale * torch.randn(151936, generator=torch.Generator().manual_seed(1))
    if shape == "heavy":
        logits = logits.abs() * logits
    if shape == "in order":  # the sample that the bounds come from is as good as it can be, or as bad
        logits = logits.sort(descending=True).values
    logits[::3] = logits[1::3][:50646].mean()  # a third of them tie
    weights = logits.softmax(-1).numpy()
    order = weights.argsort(kind="stable")
    running = weights[order].cumsum(dtype=np.float64)
    kept = nucleus(weights, top_p)
    assert np.array_equal(kept[kept > 0], weights[kept > 0])
    count = np.count_nonzero(kept)
    assert set(np.flatnonzero(kept)) == set(order[-count:].tolist())
    # The order of a sum of 151,936 numbers moves its last bits, and with them the edge.
    edges = ((1 - top_p) * running[-1] + shift for shift in (2e-8, -2e-8))
    few, many = (max(1, np.count_nonzero(running > edge)) for edge in edges)
    assert few <= count <= min(many, np.count_nonzero(weights))


def test_the_nucleus_of_a_few():
    assert nucleus(np.float32([0.25, 0.25, 0.25, 0.25]), 0.5).tolist() == [0, 0, 0.25, 0.25]
    assert nucleus(np.float32([0.5, 0, 0.25, 0.25]), 0.0).tolist() == [0.5, 0, 0, 0]
    assert nucleus(np.float32([1.0]), 0.3).tolist() == [1.0]


@pytest.mark.parametrize("min_p", [0.0, 0.2])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.7, 1.0])
def test_a_token_that_is_dropped_is_never_drawn_and_each_other_one_is(top_p, min_p):
    """Ties too: of equal weights the lower ids are dropped first. `draw_kept` knows nothing of what `Row.drop` does."""
    weights = np.float32([0.25, 1, 0, 0.25, 0.1, 0.5, 0.25, 0.1, 1, 0.25])
    params = SamplingParams(top_p=top_p, min_p=min_p, seed=1)
    expected, uniforms = nucleus(weights, top_p, min_p), params.uniforms()
    drawn = [draw_kept(row_of(weights), params, uniforms) for _ in range(3000)]
    shares = np.bincount(drawn, minlength=len(weights)) / len(drawn)
    assert np.array_equal(shares > 0, expected > 0)
    assert np.allclose(shares, expected / expected.sum(), atol=0.04)


@pytest.mark.parametrize(
    "settings", [{"top_p": 0.9}, {"top_p": 0.05}, {"min_p": 0.3}, {"min_p": 0.9}, {"top_p": 0.9, "min_p": 0.3}]
)
def test_draws_from_many_tokens_follow_their_distribution(settings):
    logits = torch.zeros(4 * FEW)
    places = torch.tensor([3, FEW, 2 * FEW + 1, 4 * FEW - 1])
    logits[places] = torch.tensor([10.0, 9.5, 9.0, 8.0])
    logits[:: FEW // 100] = 7.0
    params = SamplingParams(seed=1, **settings)
    expected, uniforms = probabilities(logits.numpy(), params), params.uniforms()
    counts = np.bincount([sample(logits, params, uniforms) for _ in range(1500)], minlength=len(logits))
    assert not counts[expected == 0].any()
    assert np.allclose(counts[places] / 1500, expected[places], atol=0.05)


def test_a_draw_takes_every_token_with_a_weight_and_no_other():
    weights, uniforms = np.zeros(3 * BLOCK + 7, np.float32), SamplingParams(seed=0).uniforms()
    places = [0, BLOCK - 1, BLOCK, 2 * BLOCK + 5, 3 * BLOCK + 6]
    weights[places] = [1, 2, 3, 4, 5]
    row = row_of(weights)
    counts = np.bincount([draw(row, uniforms) for _ in range(6000)], minlength=len(weights))
    assert counts[places].sum() == 6000
    assert np.allclose(counts[places] / 6000, np.arange(1, 6) / 15, atol=0.025)

    weights[places[-1]] = 0
    assert draw(row_of(weights), Given(math.nextafter(1.0, 0))) == places[-2]
    assert draw(row_of(weights), Given(1.0)) == places[-2]  # rounding can put it there

    weights = np.zeros(3 * BLOCK, np.float32)
    weights[[BLOCK, BLOCK + SUMS, 2 * BLOCK]] = [1, 0.75 * 2**-23, 1]  # the second block's sum is rounded up
    between = (1 + 0.9 * 2**-23) / (2 + 2**-23)
    assert draw(row_of(weights), Given(between)) == BLOCK + SUMS  # the last of its block, not one of the next


def test_logits_are_read_where_they_are_unless_the_temperature_leaves_float32(monkeypatch):
    """A copy of 151,936 numbers for each token is what the passes in C++ are there to save."""
    copied = []
    monkeypatch.setattr(Row, "copy", lambda row: copied.append(row.size) or row.numbers)
    for temperature in (2.0, 0.6, 1e-30):
        params = SamplingParams(temperature=temperature, seed=1)
        sample(torch.tensor([1.0, 3.0, 2.9]), params, params.uniforms())
    assert not copied
    sample(torch.tensor([1.0, 3.0, 2.9]), replace(params, temperature=1e-38), params.uniforms())
    assert copied == [3]


def test_random_numbers_ahead_are_those_of_the_seed():
    uniforms, generator = SamplingParams(seed=7).uniforms(), torch.Generator().manual_seed(7)
    expected = [float(torch.rand((), generator=generator, dtype=torch.float64)) for _ in range(150)]
    assert [uniforms.next() for _ in range(70)] == expected[:70]
    twin = uniforms.copy()
    assert [twin.next() for _ in range(80)] == [uniforms.next() for _ in range(80)] == expected[70:]


@pytest.mark.skipif(library() is None, reason="no compiler")
@pytest.mark.parametrize("size", [1, BLOCK - 1, 5 * BLOCK + 3, 40000])
@pytest.mark.parametrize("scale", [0.6, 4.0, 60.0])
def test_the_passes_in_cpp_are_those_in_numpy_to_the_bit(size, scale, monkeypatch):
    generator = torch.Generator().manual_seed(size)
    logits = (scale * torch.randn(size, generator=generator)).bfloat16()
    logits[::3] = logits[0]
    logits[1::7] = -torch.inf
    said = torch.randint(0, size, (size // 9 + 1,), generator=generator).tolist()
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2)
    less = penalties(params, Said(said[::2], [0, size - 1, *said, *said[1::3]]))

    def passes(logits: torch.Tensor) -> list:
        row = Row(size)
        row.take(logits)
        (likeliest, largest), few = row.largest(), min(size, 5)
        found = [likeliest, largest, row.tops.copy(), row.narrow(few).copy(), row.numbers.copy()]
        row.take(logits)
        found += [row.copy().copy(), row.largest()[0], row.narrow(few).copy(), row.numbers.copy()]
        row.take(logits)
        row.weigh(np.float32(0.7), np.float32(largest))
        found += [row.all.copy(), row.sums.copy(), row.total()]
        found += [row.draw(share) for share in (0.0, 1e-9, 0.3, 0.5, math.nextafter(1.0, 0), 1.0)]
        for index in (likeliest, size // 2, 0):
            weight = row.all[index]
            found.append(row.below(weight, index))
            row.cut(weight, index)
            found += [row.all.copy(), row.sums.copy()]
        for top_p, min_p in ((1.0, 0.3), (0.9, 0.0), (0.5, 0.2), (0.0, 0.0)):
            row.take(logits)
            row.weigh(np.float32(0.7), np.float32(largest))
            row.drop(top_p, min_p)
            found += [row.numbers.copy(), row.total()]
        for least, most in ((0.3, size), (0.9, size), (1e-40, size), (0.0, size), (1.0, 1), (0.1, 2)):
            row.take(logits, less)
            factor, highest = np.float32(0.7), np.float32(row.largest()[1])
            places = row.weigh_likely(factor, highest, np.float32(least), most)
            found.append(row.copy().copy() if places is None else [*places, *row.numbers])
            row.take(logits, less)
            row.weigh(factor, highest)
            likely = np.flatnonzero(row.numbers >= np.float32(least))
            assert (len(likely) > most) == (places is None)
            assert places is None or found[-1] == [*likely, *row.numbers[likely]]
        row.take(logits, less)
        found += [*row.largest(), row.tops.copy(), row.narrow(few).copy(), row.numbers.copy()]
        return found

    compiled, exact = passes(logits), ((logits.double() - logits.max()) * np.float32(0.7)).exp().numpy()
    assert np.allclose(compiled[9][:size], exact, rtol=5e-5, atol=3e-45)  # at 300 a float32 has a last bit of 3e-5
    assert math.isclose(compiled[11], exact.sum(), rel_tol=5e-5)
    same = [compiled, passes(logits.float())]
    monkeypatch.setattr(row_module, "compiled", lambda: None)
    for other in (*same[1:], passes(logits), passes(logits.float()), passes(logits.double())):
        assert all(np.array_equal(a, b) for a, b in zip(compiled, other, strict=True))


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-46, 1e-40, 1e-38, 1e-30])
@pytest.mark.parametrize("logits", [[1.0, 3.0, 2.9, -1e30], [-5.0, -2.0, -2.1, -1e38], [0.0, 1e-20, -4.0, 0.0]])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_temperature_near_zero_is_greedy(temperature, logits, filters):
    params = SamplingParams(temperature=temperature, seed=1, **filters)
    assert sample(torch.tensor(logits), params, params.uniforms()) == 1


def test_presence_penalty_counts_a_token_of_the_reply_once_and_leaves_the_prompt_alone():
    logits = np.zeros(6, np.float32)
    out = penalized(logits, SamplingParams(presence_penalty=1.5), Said([0, 1], [2, 2, 4]))
    assert out.tolist() == [0, 0, -1.5, 0, -1.5, 0] and not logits.any()


def test_a_repetition_penalty_below_one_makes_what_was_said_likelier():
    out = penalized(np.float32([1, -1, 1]), SamplingParams(repetition_penalty=0.5), Said([0], [1]))
    assert out.tolist() == [2, -0.5, 1]


def test_penalties_count_as_the_reply_grows():
    logits = np.linspace(-2, 2, 9, dtype=np.float32)
    params = SamplingParams(presence_penalty=0.5, repetition_penalty=2)
    said = Said([0, 8, 8], [7])
    for token in (0, 7):
        said.add(token)
    expected = penalized(logits, params, Said([0, 8, 8], [7, 0, 7]))
    assert np.array_equal(expected, penalized(logits, params, said))
    assert expected.tolist() == [-4.5, -1.5, -1, -0.5, 0, 0.5, 1, 0.25, 1]
    frequency = penalized(logits, SamplingParams(frequency_penalty=0.5), said)
    assert frequency.tolist() == [-2.5, -1.5, -1, -0.5, 0, 0.5, 1, 0.5, 2]


def test_log_probabilities_are_those_of_softmax():
    logits = 3 * torch.randn(5000, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = logits.double().log_softmax(-1)
    value, pairs = top_logprobs(logits, 7, 20)
    assert abs(value - exact[7].item()) < 1e-6
    top = exact.topk(20)
    assert np.allclose([found for _, found in pairs], top.values.tolist(), atol=1e-6)
    assert all(abs(exact[index].item() - found) < 1e-6 for index, found in pairs) and len({i for i, _ in pairs}) == 20
    assert top_logprobs(torch.zeros(3), 1, 20) == (-math.log(3), [(i, -math.log(3)) for i in range(3)])
    assert top_logprobs(torch.zeros(3), 1, 0)[1] == []


def test_a_draw_follows_the_probabilities_and_its_seed_alone():
    logits, params = torch.tensor([0.0, 1.0, 2.0, -1.0]), SamplingParams(seed=3)
    uniforms = params.uniforms()
    draws = [sample(logits, params, uniforms) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(draws), minlength=4) / len(draws)
    assert torch.allclose(shares, logits.softmax(-1), atol=0.025)
    uniforms = params.uniforms()
    assert draws[:50] == [sample(logits + 1e-7, params, uniforms) for _ in range(50)]
    assert SamplingParams().uniforms().next() != SamplingParams().uniforms().next()


def test_greedy_is_the_argmax_after_the_penalties():
    params = SamplingParams(temperature=0, presence_penalty=2.0)
    assert sample(torch.tensor([1.0, 3.0, 2.0]), params, params.uniforms()) == 1
    assert sample(torch.tensor([1.0, 3.0, 2.0]), params, params.uniforms(), Said([], [1])) == 2


def test_logits_that_overflowed_are_an_error_that_names_the_fix():
    for bad, temperature in itertools.product((torch.nan, torch.inf), (0, 1e-40, 1.0)):
        params = SamplingParams(temperature=temperature)
        with pytest.raises(ValueError, match="--dtype float32"):
            sample(torch.tensor([0.0, bad]), params, params.uniforms())
    for bad, size in itertools.product((torch.nan, torch.inf, -torch.inf), (2, 50 * BLOCK)):  # NaN ended the process
        with pytest.raises(ValueError, match="--dtype float32"):
            top_logprobs(torch.full((size,), bad), 0, 5)


def test_numbers_of_numpy_are_numbers_and_other_kinds_are_named():
    given = {"temperature": np.float32(0.5), "top_k": np.int64(3), "seed": np.uint32(7), "max_new_tokens": np.int16(4)}
    params = SamplingParams(**given)
    assert params == SamplingParams(temperature=0.5, top_k=3, seed=7, max_new_tokens=4)
    assert all(type(getattr(params, name)) in (int, float) for name in given)
    for name, value in {"temperature": np.bool_(True), "top_k": np.float64(2), "top_p": "1", "seed": 1.0}.items():
        with pytest.raises(ValueError, match=f"{name} is .*, which is not a"):
            SamplingParams(**{name: value})


def test_one_stop_string_may_be_given_by_itself():
    assert SamplingParams(stop="text").stop == SamplingParams(stop=["text"]).stop == ("text",)


OFFICIAL = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]}
INSTRUCT = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8}


@pytest.mark.parametrize(
    ("stated", "thinking", "temperature", "top_p"),
    [
        (OFFICIAL, True, 0.6, 0.95),
        (OFFICIAL, False, 0.7, 0.8),  # the official file states the thinking values alone
        (INSTRUCT, True, 0.7, 0.8),
        (INSTRUCT, False, 0.7, 0.8),
        ({}, True, 0.6, 0.95),
        ({}, False, 0.7, 0.8),
        ({"do_sample": False}, True, 0.0, 0.95),
        ({"do_sample": False}, False, 0.0, 0.95),
    ],
)
def test_defaults_are_the_checkpoints_then_the_model_cards(stated, thinking, temperature, top_p):
    params = recommended(stated, thinking)
    assert (params.temperature, params.top_p, params.top_k) == (temperature, top_p, 20)
    chosen = recommended(stated, thinking, temperature=0.1, top_k=None, seed=5)
    assert (chosen.temperature, chosen.top_p, chosen.seed) == (0.1, top_p, 5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1}, {"temperature": "hot"}, {"temperature": float("nan")}, {"top_p": 1.1}, {"top_k": -2},
        {"top_k": 2.5}, {"min_p": True}, {"max_new_tokens": 0}, {"seed": -1}, {"stop": ("",)},
        {"repetition_penalty": 0}, {"seed": 1.5}, {"seed": True}, {"stop": 5}, {"stop": ("a", 1)},
    ],
)  # fmt: skip
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        SamplingParams(**wrong)
    if next(iter(wrong)) not in ("max_new_tokens", "seed", "stop"):
        with pytest.raises(ValueError, match=r"generation_config\.json"):
            recommended(wrong, thinking=True)


def test_top_k_minus_one_is_off_as_zero_is():
    logits = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    off, vllm = recommended({"top_k": 0}, True), recommended({"top_k": -1}, True)
    for one, other in zip(distribution(logits, off), distribution(logits, vllm), strict=True):
        assert np.array_equal(one, other)
    assert np.count_nonzero(distribution(logits, SamplingParams(top_k=-1))[1]) == 50
