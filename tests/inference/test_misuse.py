"""What a script can get wrong in calling the model: one ValueError that says what, and nothing has changed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from chat import Chat
from generate import SamplingParams, generate, generate_batch
from model import Config, KVCache, Qwen3

ROOT = Path(__file__).parent.parent.parent
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
        with pytest.raises(ValueError, match=r"is a \w+, not |dtype is 'float32'"):
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
    chat = Chat.from_pretrained(ROOT / "models" / "tiny")
    for thinking in ("off", 1, None):
        with pytest.raises(ValueError, match="neither True nor False"):
            chat.render([{"role": "user", "content": "Hi"}], thinking=thinking)
    with pytest.raises(ValueError, match="beyond every vocabulary"):
        chat.decode([1 << 40])
