"""The filters of sampling are transformers' own on random logits, and a draw depends on its arguments alone."""

import itertools

import pytest
import torch
from transformers.generation import logits_process as oracle

from inference.sampling import SamplingParams, candidates, penalized, recommended, sample

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
        left, expected = (scores[0] > -torch.inf).nonzero()[:, 0], scores[0].softmax(-1)
        ids, probabilities = candidates(penalized(logits, params, seen[:20].tolist(), seen[20:].tolist()), params)
        assert ids.tolist() == left.tolist()
        assert torch.allclose(probabilities, expected[ids], atol=1e-6)


def test_presence_penalty_counts_a_token_of_the_reply_once_and_leaves_the_prompt_alone():
    logits = torch.zeros(6)
    out = penalized(logits, SamplingParams(presence_penalty=1.5), prompt=[0, 1], reply=[2, 2, 4])
    assert out.tolist() == [0, 0, -1.5, 0, -1.5, 0] and not logits.any()


def test_a_draw_follows_the_probabilities_and_its_seed_alone():
    logits, params = torch.tensor([0.0, 1.0, 2.0, -1.0]), SamplingParams(seed=3)
    generator = params.generator()
    draws = [sample(logits, params, generator) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(draws), minlength=4) / len(draws)
    assert torch.allclose(shares, logits.softmax(-1), atol=0.025)
    generator = params.generator()
    assert draws[:50] == [sample(logits + 1e-7, params, generator) for _ in range(50)]
    assert SamplingParams().generator().initial_seed() != SamplingParams().generator().initial_seed()


def test_greedy_is_the_argmax_after_the_penalties():
    params = SamplingParams(temperature=0, presence_penalty=2.0)
    assert sample(torch.tensor([1.0, 3.0, 2.0]), params, params.generator()) == 1
    assert sample(torch.tensor([1.0, 3.0, 2.0]), params, params.generator(), [], [1]) == 2


def test_logits_that_overflowed_are_an_error_with_a_mend():
    params = SamplingParams()
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="--dtype float32"):
            sample(torch.tensor([0.0, bad]), params, params.generator())


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
        {"repetition_penalty": 0},
    ],
)  # fmt: skip
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        SamplingParams(**wrong)
    if next(iter(wrong)) not in ("max_new_tokens", "seed", "stop"):
        with pytest.raises(ValueError, match=r"generation_config\.json"):
            recommended(wrong, thinking=True)
