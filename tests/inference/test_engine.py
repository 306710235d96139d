"""inference/engine.py: every reply is the one that its request gets alone, whatever else runs, comes and goes."""

import random

import pytest
import torch

from inference.caches import ROOM, Pages, position_bytes
from inference.decode import PromptTooLong, Reply, generate
from inference.engine import Engine, Pace, generate_batch
from inference.params import SamplingParams
from model import Config, Qwen3
from ops.cpu.step import BLOCK
from ops.quant import quantize_

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS = {  # float64 is not served by the C++ step, so PyTorch computes it
    "float32": (torch.float32, None, {}),
    "bfloat16": (torch.bfloat16, None, {}),
    "int8": (torch.bfloat16, "int8", {}),
    "int4": (torch.float32, "int4", {}),
    "experts": (torch.bfloat16, None, EXPERTS),
    "PyTorch": (torch.float64, None, {}),
    "8-bit cache": (torch.bfloat16, None, {}),
    "8-bit cache in PyTorch": (torch.float64, None, {}),
}


def small_model(kind: str = "float32", context: int = 700) -> Qwen3:
    """Flat distributions, where another order of sums would soon choose another token."""
    dtype, scheme, fields = KINDS[kind]
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Config(vocab_size=60, max_position_embeddings=context, eos_token_id=1, **sizes, **heads, **fields)
    model = Qwen3(config).to(dtype).requires_grad_(False).eval()
    if scheme:
        quantize_(model, scheme)
    if kind.startswith("8-bit cache"):
        model.cache_dtype = torch.int8
    return model


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Some begin alike, some are equal, one is long."""
    chance = random.Random(seed)
    heads = [[chance.randrange(2, 60) for _ in range(n)] for n in (0, 0, 9, 40, 290)]
    ends = ([chance.randrange(2, 60) for _ in range(chance.randint(1, 12))] for _ in range(count))
    made = [chance.choice(heads) + end for end in ends]
    made[count // 3 : count // 3 + 3] = [made[count // 2]] * 3
    return made


def held_bytes(engine: Engine) -> int:
    """The memory of all tensors of an engine's caches; what the store says of it has to be right."""
    kept, running = ([one.cache for one in some if one.cache] for some in (engine.kept, engine.running))
    if isinstance(engine.store, Pages):
        pages = {page.data_ptr(): page.nbytes for cache in (*kept, *running) for page in cache.pages}
        assert engine.store.used() == sum(pages.values())
        return sum(pages.values())
    assert engine.store.used() == sum(cache.length for cache in (*kept, *running)) * position_bytes(engine.model)
    tensors = [*engine.store.batch.tensors, *(tensor for cache in kept for tensor in cache.kept.tensors)]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("kind, memory", [*((kind, None) for kind in KINDS), ("int8", 700), ("PyTorch", 1500)])
def test_64_requests_that_come_and_go_get_the_texts_that_they_get_alone(kind, memory):
    """Arriving at random, some cancelled, some sharing prefixes; `memory`: positions that all caches have together."""
    model, chance = small_model(kind), random.Random(kind)
    params = [SamplingParams(temperature=1, seed=n, max_new_tokens=chance.randint(1, 24)) for n in range(64)]
    asked = prompts(64)
    alone = [list(generate(model, ids, p)) for ids, p in zip(asked, params, strict=True)]
    bytes_each = 2 * 2 * 2 * 16 * model.dtype.itemsize
    engine = Engine(model, max_batch=chance.choice([5, 16]), cache_bytes=memory and memory * bytes_each)
    replies = [Reply(model, ids, p) for ids, p in zip(asked, params, strict=True)]
    heard = {id(reply): [] for reply in replies}
    waiting, cancelled, running = list(replies), [], []
    chance.shuffle(waiting)
    while waiting or running:
        for _ in range(chance.choice([0, 0, 1, 1, 2, 9])):
            if waiting:
                running.append(waiting.pop())
                engine.add(running[-1], lambda reply, news: heard[id(reply)].extend(news))
        engine.step()
        assert held_bytes(engine) <= (memory or 1 << 30) * bytes_each
        running = [reply for reply in running if not reply.ended]
        if running and chance.random() < 0.1:
            cancelled.append(running.pop(chance.randrange(len(running))))
            engine.cancel(cancelled[-1])
    assert len(cancelled) > 2 and not engine.step() and not engine.running and not engine.waiting
    for reply, expected in zip(replies, alone, strict=True):
        if reply in cancelled:
            assert reply.tokens == expected[: len(reply.tokens)] and not reply.ended
        else:
            assert reply.tokens == expected and reply.ended and reply.error is None
        assert [token for token, _ in heard[id(reply)]] == reply.tokens
    assert memory or sum(reply.cached for reply in replies) > 1000


@pytest.mark.parametrize("kind", ["float32", "PyTorch"])
def test_a_prompt_starts_from_the_longest_beginning_that_is_kept(kind):
    model, params = small_model(kind), SamplingParams(temperature=1, seed=1, max_new_tokens=6)
    model.config.eos_token_id = None
    engine = Engine(model, max_batch=2)
    start = [5 + i % 17 for i in range(300)]
    first = Reply(model, start, params)
    engine.add(first)
    engine.run()
    assert first.cached == 0
    followed = [*start, *first.tokens, 3, 4]  # a chat's next turn
    for ids, cached in ((followed, 305), ([*start[:40], 9, 9], 40), (start, 299), ([9, *start], 0), (followed, 307)):
        reply = Reply(model, ids, params)
        engine.add(reply)
        engine.run()
        assert reply.cached == cached
        assert reply.tokens == list(generate(model, ids, params))


@pytest.mark.parametrize("kind", ["float32", "PyTorch"])
def test_of_caches_that_cannot_be_cut_back_only_whole_ones_are_continued(kind, monkeypatch):
    """As recurrent states are: copied whole or not at all, and nobody waits for a beginning that is no whole cache."""
    model, params = small_model(kind), SamplingParams(temperature=1, seed=1, max_new_tokens=6)
    model.config.eos_token_id = None
    engine = Engine(model, max_batch=8)
    begin = engine.store.begin
    taken = []

    def begin_whole(source, shared):
        assert shared == (source.length if source else 0)
        taken.append(shared)
        return begin(source, shared)

    monkeypatch.setattr(engine.store, "cuts", False, raising=False)
    monkeypatch.setattr(engine.store, "begin", begin_whole)
    start = [5 + i % 17 for i in range(300)]
    engine.add(first := Reply(model, start, params))
    engine.run()
    followed = [*start, *first.tokens, 3, 4]
    for ids, cached in ((followed, 305), (start, 0), ([*start[:40], 9, 9], 0), ([*followed[:303], 8], 0)):
        engine.add(reply := Reply(model, ids, params))
        engine.run()
        assert reply.cached == cached and reply.tokens == list(generate(model, ids, params))
    replies = [Reply(model, [7] * 200, params) for _ in range(3)]
    for reply in replies:
        engine.add(reply)
    del taken[:]
    engine.step()
    assert taken == [0, 0, 0]
    engine.run()
    assert [reply.cached for reply in replies] == [0, 0, 0] and len({tuple(reply.tokens) for reply in replies}) == 1


def test_equal_prompts_of_a_batch_are_computed_once(monkeypatch):
    model, engine = small_model(), None
    engine, computed = Engine(model, max_batch=8), []
    forward = engine.store.forward
    monkeypatch.setattr(
        engine.store, "forward", lambda parts: (computed.extend(len(part.ids) for part in parts), forward(parts))[1]
    )
    replies = [Reply(model, [5] * 300, SamplingParams(seed=n, max_new_tokens=1)) for n in range(8)]
    for reply in replies:
        engine.add(reply)
    engine.run()
    assert sum(computed) == 300 + 7 and [reply.cached for reply in replies] == [0] + 7 * [299]


def test_running_replies_get_a_token_with_every_pass_while_a_long_prompt_is_read():
    model = small_model(context=4000)
    model.config.eos_token_id = None
    engine, heard = Engine(model), []
    short = Reply(model, [5, 6], SamplingParams(seed=0, max_new_tokens=100))
    engine.add(short, lambda *_: heard.append("short"))
    engine.step()
    engine.pace.measured = lambda *_: None
    engine.pace.per_token = 1.0  # a slow machine: the shortest pieces
    engine.add(Reply(model, [7] * 300, SamplingParams(seed=0, max_new_tokens=1)), lambda *_: heard.append("long"))
    while "long" not in heard:
        before = len(heard)
        assert engine.step() and "short" in heard[before:]
    assert len(heard) == 1 + 300 // 16 + 2


def test_a_piece_of_a_prompt_is_as_long_as_the_time_allows():
    def seconds(tokens):
        return 0.05 + 0.002 * tokens  # to read the weights, and for each token

    pace = Pace()
    assert (pace.piece(True), pace.piece(False)) == (16, 128)  # nothing is known yet
    pace.measured(128, seconds(128))
    assert pace.piece(True) <= 48  # all of the time may be that of the tokens
    for replies in (1, 1, 2, 8):
        pace.measured(replies, seconds(replies))
    assert pace.per_token == pytest.approx(0.002) and (pace.piece(True), pace.piece(False)) == (48, 240)
    for _ in range(200):
        pace.measured(8, seconds(8))  # tells nothing about prompts
    assert (pace.piece(True), pace.piece(False)) == (48, 240)
    pace.measured(8 + 48, 120)  # the machine was suspended
    for _ in range(60):
        pace.measured(8 + pace.piece(True), seconds(8 + pace.piece(True)))
        pace.measured(8, seconds(8))
    assert pace.piece(True) == 48
    for _ in range(60):  # it has become ten times as slow
        pace.measured(8 + pace.piece(True), 10 * seconds(8 + pace.piece(True)))
        pace.measured(8, 10 * seconds(8))
    assert pace.piece(True) == 16


def test_a_mask_rules_tokens_out_and_sees_the_reply():
    model, seen = small_model(), []

    def even(tokens, logits):
        seen.append(list(tokens))
        return logits.index_fill(0, torch.arange(1, 60, 2), -torch.inf)

    params = SamplingParams(temperature=1, seed=2, max_new_tokens=20)
    reply, given = Reply(model, [5, 7], params, mask=even), []
    engine = Engine(model)
    engine.add(reply, lambda _, news: given.extend(news))
    engine.run()
    assert len(reply.tokens) == 20 and not any(token % 2 for token in reply.tokens)
    assert seen == [reply.tokens[:n] for n in range(20)]
    assert all(logits.isfinite().all() for _, logits in given), "callbacks get the model's own logits"


def test_one_reply_that_fails_leaves_the_others_alone():
    model, params = small_model(), SamplingParams(temperature=1, seed=2, max_new_tokens=9)

    def broken(tokens, logits):
        if len(tokens) == 3:
            raise ValueError("the grammar has ended")
        return logits

    engine, heard = Engine(model), []
    bad, good = Reply(model, [5], params, mask=broken), Reply(model, [6], params)
    engine.add(bad, lambda reply, news: heard.append(news))
    engine.add(good)
    engine.run()
    assert "grammar" in str(bad.error) and bad.ended and len(bad.tokens) == 3 and heard[-1] == []
    assert good.tokens == list(generate(model, [6], params)) and good.error is None


def test_a_callback_that_raises_cancels_its_reply_only():
    model, params = small_model(), SamplingParams(temperature=1, seed=2, max_new_tokens=9)
    model.config.eos_token_id = None
    engine = Engine(model)
    bad, good = Reply(model, [5], params), Reply(model, [6], params)
    engine.add(bad, lambda *_: 1 / 0)
    engine.add(good, lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        engine.run()
    engine.run()
    assert len(bad.tokens) == 1 and good.tokens == list(generate(model, [6], params))


def test_a_reply_that_another_ones_callback_cancels_gets_nothing_more():
    model, params = small_model(), SamplingParams(temperature=1, seed=2, max_new_tokens=9)
    model.config.eos_token_id = None
    engine, told = Engine(model), []
    first, second = Reply(model, [5], params), Reply(model, [6], params)
    engine.add(first, lambda *_: engine.cancel(second))
    engine.add(second, lambda *_: told.append(1))
    engine.run()
    assert len(first.tokens) == 9 and not second.tokens and not told


def test_the_youngest_waits_where_memory_is_short():
    """Both outgrow their first page, and there are three."""
    model, params = small_model(), SamplingParams(temperature=1, seed=2, max_new_tokens=20)
    model.config.eos_token_id = None
    engine, told = Engine(model, cache_bytes=3 * BLOCK * position_bytes(model)), []
    for token in (5, 6):
        reply = Reply(model, [token] * (BLOCK - 10), params)
        engine.add(reply, lambda reply, _: told.append(reply.ids[0]))
    engine.run()
    assert told[:2] == [5, 6] and told[-8:] == [6] * 8  # they began together; the older one was never put back


def test_a_reply_that_had_to_wait_says_what_its_prompt_found_in_a_cache_not_what_came_later():
    model, params = small_model(), SamplingParams(temperature=1, seed=2, max_new_tokens=20)
    model.config.eos_token_id = None
    engine = Engine(model, cache_bytes=3 * BLOCK * position_bytes(model))
    replies = [Reply(model, [5] * (BLOCK - 10), params) for _ in range(2)]
    for reply in replies:
        engine.add(reply)
    engine.run()
    assert [reply.cached for reply in replies] == [0, BLOCK - 11] and replies[0].tokens == replies[1].tokens


def test_a_row_whose_reply_has_ended_does_not_grow_with_the_others():
    model = small_model("PyTorch")
    model.config.eos_token_id = None
    lengths = ((ROOM - 16, 3), (1, 40), (2, 40), (3, 40))
    replies = [Reply(model, [5] * n, SamplingParams(temperature=0, max_new_tokens=most)) for n, most in lengths]
    limit = 4 * 2 * ROOM * position_bytes(model)  # what the rows take: no cache of a finished reply fits beside them
    engine = Engine(model, 4, cache_bytes=limit)
    for reply in replies:
        engine.add(reply)
    while engine.step():
        assert held_bytes(engine) <= limit
    assert [len(reply.tokens) for reply in replies] == [most for _, most in lengths]
    assert max(engine.store.batch.lengths) == 3 + 39  # nobody attends over the row that has gone


def test_of_the_caches_that_are_kept_the_least_recently_used_goes_first():
    model, params = small_model(), SamplingParams(temperature=1, seed=2, max_new_tokens=20)
    model.config.eos_token_id = None
    engine = Engine(model, cache_bytes=4 * BLOCK * position_bytes(model))

    def cached(ids: list[int]) -> int:
        reply = Reply(model, ids, params)
        engine.add(reply)
        engine.run()
        return reply.cached

    first, second = [5] * 100, [6] * 100
    assert cached(first) == cached(second) == 0 and len(engine.kept) == 2
    assert cached(first[:50] + [7] * 450) == 50  # it grows to three pages, so the second one has to go
    assert cached(first) == 99


def test_a_chat_keeps_one_cache_not_one_of_each_turn():
    model, params, ids = small_model(), SamplingParams(temperature=0, max_new_tokens=5), [3, 1, 4]
    engine = Engine(model)
    for _ in range(3):
        engine.add(reply := Reply(model, ids, params))
        engine.run()
        ids = [*ids, *reply.tokens, 9]
    assert len(engine.kept) == 1 and reply.cached == len(reply.ids) - 2


def test_what_an_engine_refuses():
    model = small_model()
    reply = Reply(model, [5] * 20, SamplingParams(seed=0, max_new_tokens=50))
    with pytest.raises(PromptTooLong, match="20 tokens, but the context here is 19"):
        Engine(model, context=19).add(reply)
    engine = Engine(model, context=30)
    engine.add(reply)
    assert reply.limit == 11
    with pytest.raises(ValueError, match="running"):
        engine.add(reply)
    engine.run()
    assert len(reply.tokens) <= 11
    for wrong in ({"max_batch": 0}, {"context": 701}, {"cache_bytes": 10}):
        with pytest.raises(ValueError):
            Engine(model, **wrong)


def test_a_batch_of_prompts_raises_what_one_of_them_cannot_do():
    model = small_model()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="non-finite"):
        generate_batch(model, [[5], [6]], SamplingParams(max_new_tokens=3))


def test_tokens_drawn_in_threads_are_the_same():
    model, params = small_model("bfloat16"), SamplingParams(temperature=1, seed=2, max_new_tokens=9)
    expected = [list(generate(model, ids, params)) for ids in prompts(8)]
    torch.set_num_threads(2)  # the fixture sets them back
    engine = Engine(model, 8)
    assert generate_batch(model, prompts(8), params, engine=engine) == expected and engine.threads is not None
    assert generate_batch(model, prompts(8), params, engine=engine) == expected and len(engine.kept) > 2


def test_a_change_of_the_model_counts_from_the_next_reply_on():
    """Between two tokens nobody asks whether the model changed, and the weights of the reply's beginning are kept."""
    model = small_model()
    params = SamplingParams(temperature=0, max_new_tokens=12)
    before = list(generate(model, [3, 1, 4], params))
    engine, first, second = Engine(model), Reply(model, [3, 1, 4], params), Reply(model, [7, 2], params)
    old = list(generate(model, [7, 2], params))
    engine.add(first)
    for _ in range(4):
        engine.step()
    for weight in (model.model.embed_tokens, model.model.norm):  # the head is tied
        weight.weight = torch.nn.Parameter(weight.weight.detach().flip(0).clone())
    engine.run()
    assert first.tokens == before
    engine.add(second)
    engine.run()
    assert second.tokens == list(generate(model, [7, 2], params)) != old


def test_a_reply_that_has_begun_gets_its_next_pages_whatever_becomes_of_the_model():
    model = small_model()
    params = SamplingParams(temperature=0, max_new_tokens=300)  # more than a page of 256 positions
    before = list(generate(model, [3, 1, 4], params))
    engine, reply = Engine(model), Reply(model, [3, 1, 4], params)
    engine.add(reply)
    engine.step()
    hook = model.model.norm.register_forward_hook(lambda *_: None)
    engine.run()
    assert reply.tokens == before and len(before) == 300
    engine.add(Reply(model, [7, 2], params))
    with pytest.raises(ValueError, match="the model was changed"):
        engine.run()
    hook.remove()
