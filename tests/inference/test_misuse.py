"""What a script can get wrong in calling the model: one ValueError that says what, and nothing has changed."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from chat import Chat
from formats.checkpoint import open_checkpoint
from generate import SamplingParams, generate, generate_batch
from inference.decode import Reply
from inference.engine import Engine
from inference.speculate import DraftModel, PromptLookup, Speculation
from model import Config, KVCache, Qwen3

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "models" / "tiny"
SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}


@pytest.fixture(scope="module")
def model() -> Qwen3:
    torch.manual_seed(0)
    return Qwen3(Config(**SIZES)).eval()


IDS = {
    "text": ("hello", "Chat.encode"),
    "list": ([[1, 2]], "is a list"),
    "one dimension": (torch.tensor([1, 2]), r"ids\[None\]"),
    "three dimensions": (torch.ones(1, 2, 3, dtype=torch.long), r"\[1, 2, 3\]"),
    "floats": (torch.ones(1, 2), "torch.float32"),
    "bool": (torch.ones(1, 2, dtype=torch.bool), "torch.bool"),
    "no tokens": (torch.ones(1, 0, dtype=torch.long), "no token"),
    "no rows": (torch.ones(0, 3, dtype=torch.long), "no token"),
    "too large": (torch.tensor([[1, 50]]), "token id 50 is not from 0 to 49"),
    "negative": (torch.tensor([[1, -1]]), "token id -1"),
    "too long": (torch.ones(1, 33, dtype=torch.long), "33 positions, but the model's context is 32"),
    "another device": (torch.ones(1, 2, dtype=torch.long, device="meta"), "on meta"),
}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("cached", [False, True])
def test_ids_that_are_none(model, name, cached):
    wrong, said = IDS[name]
    cache = KVCache(model.config, 1, 32) if cached else None
    if cached and name == "too long":
        said = "cache of 32 positions"
    with pytest.raises(ValueError, match=said):
        model(wrong, cache)
    assert cache is None or cache.lengths == [0]
    assert model(torch.tensor([[1, 2]], dtype=torch.int32)).shape == (1, 2, 50)


def test_caches_for_something_else(model):
    ids = torch.tensor([[1, 2]])
    other = Config(**SIZES | {"num_key_value_heads": 4})
    deeper = Config(**SIZES | {"num_hidden_layers": 3})
    for cache, said in (
        (KVCache(model.config, 2, 32), "the cache has 2 rows, but ids has 1"),
        (KVCache(model.config, 1, 32, dtype=torch.bfloat16), "dtype torch.bfloat16"),
        (KVCache(model.config, 1, 32, device="meta"), "the cache is on meta"),
        (KVCache(other, 1, 32), "another shape"),
        (KVCache(deeper, 1, 32), "another shape"),
    ):
        for call in (lambda c: model(ids, c), lambda c: list(generate(model, [1, 2], cache=c))):
            with pytest.raises(ValueError, match=said):
                call(cache)
        assert set(cache.lengths) == {0}
    for rows, positions in ((0, 5), (-1, 5), (1.5, 5), (1, 2.5), (1, 0), (1, 33)):
        with pytest.raises(ValueError, match="cache of"):
            KVCache(model.config, rows, positions)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("hello", "Chat.encode"),
        (torch.tensor([[1, 2]]), r"\[1, 2\]"),
        (torch.tensor(1), r"\[\]"),
        (torch.tensor([1.0, 2.0]), "whole numbers"),
        ([[1, 2]], "whole numbers"),
        ([1, None], "whole numbers"),
        (5, "whole numbers"),
        ([], "empty"),
        (torch.ones(0, dtype=torch.long), "empty"),
        ([1, 50], "token id 50"),
        ([-7, 60], "token id -7"),
        ([1] * 33, "33 tokens, but this model's context is 32"),
    ],
)
def test_prompts_that_are_none(model, prompt, said):
    with pytest.raises(ValueError, match=said):
        list(generate(model, prompt))
    with pytest.raises(ValueError, match=said):
        generate_batch(model, [prompt, [1, 2]])


def test_prompts_of_every_kind_of_number_are_one(model):
    params = SamplingParams(temperature=0, max_new_tokens=4)
    expected = list(generate(model, [1, 2, 3], params))
    for prompt in (torch.tensor([1, 2, 3]), np.array([1, 2, 3]), (1, 2, 3), range(1, 4)):
        assert list(generate(model, prompt, params)) == expected
        assert generate_batch(model, [prompt], params) == [expected]
    for wrong in (torch.tensor([[1, 2]]), "hello"):
        with pytest.raises(ValueError, match="list of prompts"):
            generate_batch(model, wrong, params)
    cache = KVCache(model.config, 1, 32)
    model(torch.tensor([[1, 2, 3]]), cache)
    with pytest.raises(ValueError, match="the cache holds 3 positions"):
        list(generate(model, [1, 2, 3], params, cache=cache))


def test_arguments_of_another_kind(model):
    for ids in ([True, False], {1: 2}, {1, 2}):
        with pytest.raises(ValueError, match="not a list of token ids"):
            list(generate(model, ids))
    with pytest.raises(ValueError, match="params is a dict; give SamplingParams"):
        list(generate(model, [1, 2], {"temperature": 0}))
    with pytest.raises(ValueError, match="is a NoneType; give a directory"):
        Qwen3.from_pretrained(None)


def test_configs_caches_and_chats_of_another_kind(model):
    """Each is one ValueError, and the cache stays as it was."""
    for call in (
        lambda: Qwen3("models/tiny"),
        lambda: Qwen3({"vocab_size": 5}),
        lambda: KVCache(model),
        lambda: KVCache(model.config, dtype="float32"),
        lambda: Config.from_json({"vocab_size": 5}),
        lambda: model(torch.tensor([[1]]), "cache"),
        lambda: model(torch.tensor([[1]]), [(torch.zeros(1), torch.zeros(1))]),
        lambda: list(generate(model, [1], cache=[])),
    ):
        with pytest.raises(ValueError, match=r"is a \w+, not |dtype is 'float32'|path is .* give a path"):
            call()
    cache = KVCache(model.config, 2, 16)
    model(torch.tensor([[1, 2, 3], [4, 5, 6]]), cache)
    for change in (4, -1, [1], [1, 2, 3], [1, 4]):
        with pytest.raises(ValueError, match=r"rows have \[3, 3\] positions"):
            cache.truncate(change)
    for size in (2, -1, "9", 4.0):
        with pytest.raises(ValueError, match="3 are used"):
            cache.grow(size)
    assert cache.lengths == [3, 3] and cache.max_len == 16
    chat = Chat.from_pretrained(TINY)
    for thinking in ("off", 1, None):
        with pytest.raises(ValueError, match="neither True nor False"):
            chat.render([{"role": "user", "content": "Hi"}], thinking=thinking)
    with pytest.raises(ValueError, match="beyond every vocabulary"):
        chat.decode([1 << 40])


GREEDY = SamplingParams(temperature=0, max_new_tokens=4)
STOPPED = SamplingParams(stop="x", max_new_tokens=4)
WRONG = {  # a call, and what its one line has to say
    "model a text": (lambda m: list(generate("models/tiny", [1])), "model is a str, not a Qwen3"),
    "model of another kind": (lambda m: list(generate(torch.nn.Linear(1, 1), [1])), "model is a Linear"),
    "model wrapped": (lambda m: list(generate(torch.nn.DataParallel(m), [1])), "model is a DataParallel"),
    "model of a batch": (lambda m: generate_batch(None, [[1]]), "model is a NoneType"),
    "draft of no model": (lambda m: DraftModel("models/tiny"), "model is a str"),
    "chat": (lambda m: list(generate(m, [1], STOPPED, chat="models/tiny")), "chat is a str; give Chat"),
    "intervene": (lambda m: list(generate(m, [1], GREEDY, intervene=5)), "intervene is a int, not a function"),
    "until": (lambda m: generate_batch(m, [[1]], GREEDY, until=["x"]), "until is a str, not a function"),
    "mask": (lambda m: Reply(m, [1], mask=5), "mask is a int, not a function"),
    "speculation": (lambda m: list(generate(m, [1], speculation="x")), "speculation is a str; give Speculation"),
    "a draft alone": (lambda m: list(generate(m, [1], speculation=PromptLookup())), "speculation is a PromptLookup"),
    "a model as its draft": (Speculation, "draft is a Qwen3; give PromptLookup"),
    "guesses": (lambda m: Speculation(PromptLookup(), "7"), "most is '7', which is not a whole number"),
    "inserted nothing": (
        lambda m: list(generate(m, [1], GREEDY, intervene=lambda r: None)),
        "intervene returned is not",
    ),
    "inserted a text": (
        lambda m: list(generate(m, [1], GREEDY, intervene=lambda r: "ab")),
        "intervene returned is not",
    ),
    "inserted floats": (
        lambda m: list(generate(m, [1], GREEDY, intervene=lambda r: [1.5])),
        "intervene returned is not",
    ),
    "too few params": (lambda m: generate_batch(m, [[1], [2]], [GREEDY]), "params has 1 entries for 2 prompts"),
    "too many params": (lambda m: generate_batch(m, [[1]], [GREEDY] * 2), "params has 2 entries for 1 prompts"),
    "params a number": (lambda m: generate_batch(m, [[1]], 5), "params is a int; give a list of them"),
    "one function": (
        lambda m: generate_batch(m, [[1]], GREEDY, until=len),
        "until is a builtin_function_or_method; give",
    ),
    "prompts a number": (lambda m: generate_batch(m, 5), "prompts is a int; give a list of prompts"),
    "no prompts": (lambda m: generate_batch(m, None), "prompts is a NoneType"),
    "prompts a dict": (lambda m: generate_batch(m, {"a": [1]}), "prompts is a dict"),
    "engine": (lambda m: generate_batch(m, [[1]], engine=5), "engine is a int; give Engine"),
    "engine's context": (lambda m: Engine(m, context="x"), "context is 'x', which is not a whole number"),
    "engine's memory": (lambda m: Engine(m, cache_bytes="8GB"), "cache_bytes is '8GB', which is not a whole number"),
    "save nowhere": (lambda m: m.save_pretrained(None), "directory is None; give a path"),
    "save to an empty name": (lambda m: m.save_pretrained(""), "directory is ''; give a path"),
    "save to bytes": (lambda m: m.save_pretrained(b"x"), "directory is b'x'; give a path"),
    "cache on no device": (lambda m: KVCache(m.config, device="gpu"), "device is 'gpu', which can't be used here"),
    "cache on a number": (lambda m: KVCache(m.config, device=True), "device is True"),
    "cache of bools": (lambda m: KVCache(m.config, dtype=torch.bool), "dtype is torch.bool; give torch.float32"),
    "load to no device": (lambda m: Qwen3.from_pretrained(TINY, device="hpu"), "device is 'hpu', which can't be used"),
    "load to None": (lambda m: Qwen3.from_pretrained(TINY, device=None), "device is None"),
    "load as a module": (lambda m: Qwen3.from_pretrained(TINY, dtype="cuda"), "dtype is 'cuda'; the model computes"),
    "an adapter of no kind": (lambda m: Qwen3.from_pretrained(TINY, adapter=[]), "adapter is a list; give a directory"),
    "an empty adapter": (lambda m: Qwen3.from_pretrained(TINY, adapter=""), "adapter is empty; give a directory"),
    "fields": (lambda m: Config.from_dict(None), "config is a NoneType, not a dict"),
    "checkpoint": (lambda m: open_checkpoint(None), "path is None; give a path"),
    "continue": (
        lambda m: Chat.from_pretrained(TINY).render([], continue_final_message="off"),
        "neither True nor False",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_one_line(model, name):
    call, said = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(said)) as found:
        call(model)
    assert "\n" not in str(found.value)


def test_prompts_and_inserts_of_every_container(model):
    """Whatever gives whole numbers in order: generators, arrays, NumPy's numbers."""
    expected = generate_batch(model, [[1, 2], [3, 4]], GREEDY)
    assert list(generate(model, (token for token in [1, 2]), GREEDY)) == expected[0]
    for prompts in ((row for row in [[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]]), ([1, 2], range(3, 5))):
        assert generate_batch(model, prompts, (params for params in (GREEDY, GREEDY))) == expected
    inserted = [
        list(generate(model, [1], GREEDY, intervene=lambda r, f=form: f if len(r) == 1 else []))
        for form in ([7, 8], (7, 8), np.array([7, 8]), torch.tensor([7, 8]))
    ]
    assert all(reply == inserted[0] and set(map(type, reply)) == {int} for reply in inserted)
    cache = KVCache(model.config, 1, 16)
    model(torch.tensor([[1, 2, 3]]), cache)
    for wrong in (None, [None], 1.5, [1.5], ["1"], "ab"):
        with pytest.raises(ValueError, match=r"rows have \[3\] positions"):
            cache.truncate(wrong)
    for length in (np.int64(2), torch.tensor([1])):
        cache.truncate(length)
    assert cache.lengths == [1] and type(cache.lengths[0]) is int


def test_what_is_computed_in_float64_can_be_saved_and_opened(model, tmp_path):
    twice = Qwen3(Config(**SIZES)).double()
    twice.load_state_dict(model.state_dict())
    twice.save_pretrained(tmp_path)
    again, ids = Qwen3.from_pretrained(tmp_path), torch.tensor([[1, 2, 3]])
    assert again.dtype == torch.float64 and torch.equal(again(ids), twice.eval()(ids))
    assert list(generate(again, [1, 2, 3], GREEDY)) == list(generate(model, [1, 2, 3], GREEDY))
