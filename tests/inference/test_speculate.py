"""Speculation: whatever is guessed, the reply is the one without guesses; guesses are made where they pay."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from chat import Chat
from inference.decode import ThinkingBudget, generate, steps
from inference.engine import generate_batch
from inference.params import SamplingParams
from inference.sampling import Said, distribution
from inference.session import Session
from inference.speculate import DraftModel, PromptLookup, Speculation, common_prefix
from model import Config, KVCache, Qwen3
from ops.quant import quantize_

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = SamplingParams(temperature=0, max_new_tokens=60)
PENALIZED = {"presence_penalty": 0.7, "repetition_penalty": 1.1}


def small_model(seed: int, vocabulary: int = 40, context: int = 256, scale: float = 3, **sizes) -> Qwen3:
    """Random weights, sharpened so that greedy choices are far from ties and repeat themselves."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8} | sizes
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3(Config(vocab_size=vocabulary, max_position_embeddings=context, eos_token_id=1, **sizes, **heads))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model.eval()


class Eager(Speculation):
    """Guesses as much as it may at every pass, without looking at the clock."""

    def learn(self, *counts):
        super().learn(*counts)
        self.plain, self.account, self.length = 1.0, 1.0, self.most


class Wild:
    """Guesses that come from nowhere, sometimes right by chance."""

    def begin(self, prompt):
        self.random = torch.Generator().manual_seed(0)

    def propose(self, reply, most, params, generator):
        return torch.randint(0, 40, (most,), generator=self.random).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_greedy_replies_are_the_same_with_every_draft(seed):
    model, random = small_model(seed), torch.Generator().manual_seed(seed)
    drafts = [PromptLookup(), DraftModel(small_model(seed + 10, num_hidden_layers=1)), DraftModel(model), Wild()]
    accepted = Counter()
    for _ in range(6):
        piece = torch.randint(2, 40, (int(torch.randint(1, 9, (), generator=random)),), generator=random).tolist()
        ids = piece * int(torch.randint(1, 8, (), generator=random)) + piece[:3]
        plain = list(generate(model, ids, GREEDY))
        for draft, most in itertools.product(drafts, (1, 3, 7)):
            speculation = Eager(draft, most)
            assert list(generate(model, ids, GREEDY, speculation=speculation)) == plain
            assert speculation.passes + speculation.accepted - len(plain) in (0, 1)  # 1: the end itself was guessed
            accepted[type(draft).__name__] += speculation.accepted
    assert accepted["PromptLookup"] > 0 and accepted["DraftModel"] > 0


@pytest.mark.parametrize("rows", [40, 64, 33])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_draft_padded_to_another_size_guesses_within_both(rows, temperature):
    """One tokenizer, two paddings (Qwen3-0.6B has 151,936 rows, other sizes other numbers): the same text."""
    model, draft = small_model(3), small_model(3, vocabulary=rows)
    with torch.no_grad():  # the same model but for the padding, whose rows would otherwise win
        for (name, ours), (_, theirs) in zip(model.named_parameters(), draft.named_parameters(), strict=True):
            shared = min(len(ours), len(theirs))
            theirs[:shared] = ours[:shared]
            theirs[shared:] = 3 * ours[: len(theirs) - shared] if name.endswith("weight") else 0
    accepted = 0
    for seed in range(4):
        params = SamplingParams(temperature=temperature, seed=seed, max_new_tokens=60, repetition_penalty=1.2)
        ids = [5, 9, 30, 5, 9 + seed]
        speculation = Eager(DraftModel(draft, 40))
        assert list(generate(model, ids, params, speculation=speculation)) == list(generate(model, ids, params))
        accepted += speculation.accepted
    assert accepted > 0 or rows < 40  # there the reply may hold ids that the draft lacks
    smaller = DraftModel(small_model(3, vocabulary=20), 40)
    smaller.begin([5, 30])
    assert smaller.propose([], 3, params, params.uniforms()) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 10, "top_p": 0.9},
        {"temperature": 1.3, "min_p": 0.05},
        {"temperature": 0.9, **PENALIZED},
        {"temperature": 0.0, **PENALIZED},
    ],
)
def test_a_seed_gives_the_same_text_and_logits_with_every_draft(settings):
    model, ids = small_model(1), [5, 6, 7, 8] * 6
    for seed, draft in itertools.product(range(4), (PromptLookup(), DraftModel(model), Wild())):
        params = SamplingParams(**settings, seed=seed, max_new_tokens=40)
        plain = list(steps(model, ids, params))
        guessed = list(steps(model, ids, params, speculation=Eager(draft)))
        assert [token for token, _ in guessed] == [token for token, _ in plain]
        for (_, one), (_, other) in zip(plain, guessed, strict=True):
            assert torch.allclose(one, other, atol=1e-4)


@torch.inference_mode()
def exact_distribution(model: Qwen3, ids: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Every reply of `max_new_tokens` tokens and its probability, from whole passes without cache or draft."""
    found = {(): 1.0}
    for _ in range(params.max_new_tokens):
        longer = {}
        for reply, share in found.items():
            if reply and reply[-1] == 1:
                longer[reply] = share
                continue
            logits = model(torch.tensor([[*ids, *reply]]))[0, -1].float()
            _, weights = distribution(logits.detach().numpy(), params, Said(ids, reply))
            for token, weight in enumerate(weights):
                longer[(*reply, token)] = share * weight / weights.sum()
        found = longer
    return found


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.9, "top_p": 0.9, **PENALIZED}])
def test_the_distribution_of_replies_is_the_exact_one(settings):
    """Chi-square of 3,000 replies of 3 tokens, over all that are possible; rare ones count as one."""
    model, ids = small_model(3, vocabulary=5, scale=2.5, num_hidden_layers=1), [2, 3, 4, 2, 3, 4, 2, 3]
    exact = exact_distribution(model, ids, SamplingParams(**settings, max_new_tokens=3))
    assert abs(sum(exact.values()) - 1) < 1e-5 and len(exact) > 20
    draft, runs, seen, accepted, drafted = PromptLookup(), 3000, Counter(), 0, 0
    for seed in range(runs):
        speculation = Eager(draft, 2)
        params = SamplingParams(**settings, seed=seed, max_new_tokens=3)
        seen[tuple(generate(model, ids, params, speculation=speculation))] += 1
        accepted, drafted = accepted + speculation.accepted, drafted + speculation.drafted
    assert 0 < accepted < drafted and set(seen) <= set(exact)
    common = [reply for reply, share in exact.items() if share * runs >= 5]
    cells = [(seen[reply], exact[reply] * runs) for reply in common]
    rest = runs - sum(count for count, _ in cells), runs - sum(expected for _, expected in cells)
    cells += [rest] if rest[1] >= 1 else []
    chi_square = sum((count - expected) ** 2 / expected for count, expected in cells)
    freedom = len(cells) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5, (chi_square, freedom)


def test_a_certain_guess_is_accepted_with_its_probability():
    """The rule of Leviathan et al. for a draft that is certain: x passes with probability p(x)."""
    model, ids = small_model(3, vocabulary=5, scale=2.5, num_hidden_layers=1), [2, 3, 4]
    params = SamplingParams(max_new_tokens=3)
    exact = exact_distribution(model, ids, params)

    class Certain(Wild):
        def propose(self, reply, most, params, generator):
            return [3][:most]

    expected = sum(share for reply, share in exact.items() if reply[1:2] == (3,))
    accepted = 0
    for seed in range(2000):
        tokens = steps(model, ids, SamplingParams(max_new_tokens=3, seed=seed), speculation=(s := Eager(Certain(), 1)))
        next(tokens), next(tokens, None)
        accepted += s.accepted
    assert abs(accepted / 2000 - expected) < 0.04


def test_a_model_as_its_own_draft_is_always_right():
    model = small_model(2)
    for params in (GREEDY, SamplingParams(temperature=0.9, top_p=0.95, seed=5, max_new_tokens=60, **PENALIZED)):
        speculation = Eager(DraftModel(model))
        tokens = list(generate(model, [3, 4, 5], params, speculation=speculation))
        assert len(tokens) > 15 and speculation.accepted == speculation.drafted > len(tokens) / 2


def test_a_draft_model_keeps_its_cache_over_rejections_and_turns_and_ends_at_its_context():
    model, draft = small_model(4), DraftModel(small_model(5, context=32, num_hidden_layers=1))
    speculation, ids = Eager(draft, 4), [7, 8, 9]
    for _ in range(3):
        reply = list(generate(model, ids, GREEDY, speculation=speculation))
        assert reply == list(generate(model, ids, GREEDY))
        assert draft.cache.max_len <= 32
        fresh = KVCache(draft.model.config, 1, 32)
        held = draft.ids[: draft.cache.lengths[0]]
        with torch.inference_mode():
            draft.model(torch.tensor([held]), fresh)
        for kept, new in zip(draft.cache.keys, fresh.keys, strict=True):
            assert torch.allclose(kept[:, :, : len(held)], new[:, :, : len(held)], atol=1e-4)
        ids = [*ids, *reply[:4]]


def test_ends_inside_a_guess(tiny_checkpoint):
    """An end token, the length, the context, a stop string and a thinking budget, each where a guess runs past it."""
    model, ids = small_model(6), [5, 6, 7, 8, 9] * 4
    free = list(generate(model, ids, GREEDY))
    oracle = Oracle(free)
    for length in range(1, 12):
        params = SamplingParams(temperature=0, max_new_tokens=length)
        assert list(generate(model, ids, params, speculation=Eager(oracle))) == free[:length]
    for end in dict.fromkeys(free[1:]):
        model.generation_config = {"eos_token_id": end}
        assert list(generate(model, ids, GREEDY, speculation=Eager(oracle))) == free[: free.index(end) + 1]
    model.generation_config = {}
    short = small_model(6, context=30)
    cache = KVCache(short.config, 1, 30)
    assert list(generate(short, ids, GREEDY, cache=cache, speculation=Eager(oracle))) == free[:11]
    chat = Chat.from_pretrained(tiny_checkpoint)
    model = small_model(7, vocabulary=512)
    prompt = [*chat.encode("hi"), chat.think_start_id]
    free = list(generate(model, prompt, GREEDY))
    stop = chat.decode(free[4:6])
    params = SamplingParams(temperature=0, max_new_tokens=60, stop=(stop,))
    stopped = list(generate(model, prompt, params, chat=chat))
    assert list(generate(model, prompt, params, chat=chat, speculation=Eager(Oracle(free)))) == stopped
    for tokens in (1, 3, 5, 8):
        plain = list(generate(model, prompt, GREEDY, intervene=ThinkingBudget(chat, prompt, tokens)))
        budget, speculation = ThinkingBudget(chat, prompt, tokens), Eager(Oracle(plain))
        assert list(generate(model, prompt, GREEDY, intervene=budget, speculation=speculation)) == plain
        assert tokens < 3 or speculation.accepted > 0


class Oracle(Wild):
    """Knows the reply in advance, and goes on behind its end."""

    def __init__(self, reply: list[int]):
        self.known = [*reply, *reply[:20]]

    def propose(self, reply, most, params, generator):
        return self.known[len(reply) : len(reply) + most]


def test_the_cache_is_right_wherever_the_caller_leaves_off():
    model, ids = small_model(8), [5, 6, 7] * 5
    for left in range(1, 15):
        cache = KVCache(model.config, 1, 128)
        tokens = list(itertools.islice(generate(model, ids, GREEDY, cache=cache, speculation=Eager(Wild(), 3)), left))
        held = [*ids, *tokens][: cache.lengths[0]]
        fresh = KVCache(model.config, 1, 128)
        with torch.inference_mode():
            model(torch.tensor([held]), fresh)
        for kept, new in zip(cache.values, fresh.values, strict=True):
            assert torch.allclose(kept[:, :, : len(held)], new[:, :, : len(held)], atol=1e-4)


def test_a_chat_over_turns_says_the_same_and_counts_what_was_guessed(tiny_checkpoint):
    model, chat = small_model(9, vocabulary=512), Chat.from_pretrained(tiny_checkpoint)
    params = SamplingParams(temperature=0.7, seed=3, max_new_tokens=30)
    plain, guessing = Session(model, chat, params), Session(model, chat, params, speculation=Eager(PromptLookup()))
    for text in ("again and again and again", "and again and again"):
        one, other = plain.ask(text), guessing.ask(text)
        assert (one.token_ids, one.answer, one.finish_reason) == (other.token_ids, other.answer, other.finish_reason)
        stats = other.stats
        assert 0 <= stats["accepted_tokens"] <= stats["drafted_tokens"] and stats["tokens_per_pass"] >= 1
        assert stats["cached_tokens"] == one.stats["cached_tokens"]
        assert "drafted_tokens" not in one.stats


# ---- what is guessed, and how much ----


def test_prompt_lookup_finds_the_longest_and_latest_place():
    lookup = PromptLookup()

    def guesses(prompt: list[int], reply: list[int], most: int = 4) -> list[int]:
        lookup.begin(prompt)
        return lookup.propose(reply, most)

    assert guesses([1, 2, 3, 4, 5, 6, 7, 8], [2, 3]) == [4, 5, 6, 7]
    assert guesses([1, 2, 3, 4, 9, 2, 3, 5, 9], [1, 2, 3]) == [4, 9, 2, 3], "three tokens tell more than two"
    assert guesses([2, 3, 4, 9, 2, 3, 5, 9], [7, 2, 3]) == [5, 9, 7, 2], "the latest place"
    assert guesses([1, 2], [1, 2, 1, 2]) == [1, 2, 1, 2], "a guess goes on into itself"
    assert guesses([7, 7, 7], [7], 3) == [7, 7, 7]
    assert guesses([1, 2, 3], [4]) == guesses([], [4]) == guesses([1], []) == []
    lookup.begin([1, 2, 3])
    assert lookup.propose([1, 2], 2) == [3, 1] and lookup.propose([1, 2, 5, 2, 5], 2) == [2, 5]


def simulated(accept, costs: dict[int, float], tokens: int = 4000) -> tuple[float, int]:
    """Seconds that a made-up machine takes for so many tokens under the account's rule, and how many it guessed."""
    speculation = Speculation(Wild())
    now = 0.0
    speculation.clock = lambda: now
    speculation.begin([2])
    done, drafted = 0, 0
    while done < tokens:
        guesses = speculation.propose([2], 7, GREEDY, torch.Generator())
        right = min(accept(done), len(guesses))
        now += costs[1 + len(guesses)]
        done, drafted = done + 1 + right, drafted + len(guesses)
        speculation.learn(1, len(guesses), right)
    return now, drafted


def test_speculation_that_does_not_help_costs_little_and_one_that_helps_is_used():
    flat = {n: 1.0 + 0.05 * (n - 1) for n in range(1, 9)}  # one read of the weights for all
    steep = {n: 1.0 * n for n in range(1, 9)}  # nothing is shared
    for costs in (flat, steep):
        assert simulated(lambda done: 0, costs)[0] < 4000 * 1.03, "never right"
        assert simulated(lambda done: int(done % 7 == 0), costs)[0] < 4000 * 1.03, "seldom right"
    assert simulated(lambda done: 7, flat)[0] < 4000 / 4, "always right"
    assert simulated(lambda done: 7 * (done < 2000), flat)[0] < 2000 / 4 + 2000 * 1.05, "right only at first"
    half = {n: 1.0 + 0.4 * (n - 1) for n in range(1, 9)}
    gone = simulated(lambda done: 7 * (done < 2000), half)[0]
    assert gone < 2000 * half[8] / 8 + 2000 * 1.05, "what was gained excuses no guesses for ever"
    late, drafted = simulated(lambda done: 7 * (done > 2000), flat)
    assert late < 2000 * 1.05 + 2000 / 3 and drafted > 1000, "right only later"


def test_a_pass_over_what_a_thinking_budget_put_in_says_nothing_about_guesses():
    speculation, now = Speculation(Wild()), 0.0
    speculation.clock = lambda: now
    speculation.begin([2])
    for pending, seconds in ((9, 5.0), *[(1, 1.0)] * 4, (24, 20.0), (24, 0.1)):
        speculation.propose([2], 0, GREEDY, torch.Generator())
        now += seconds
        speculation.learn(pending, 0, 0)
    assert speculation.plain == 1.0 and speculation.account < 0.2


def test_common_prefix():
    assert common_prefix([], [1]) == 0 and common_prefix([1, 2], [1, 2, 3]) == 2 and common_prefix([1, 2], [1, 3]) == 1


# ---- the command ----


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "generate.py", "--model", "models/tiny", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


def test_the_command_guesses_and_prints_the_acceptance():
    question = ("What is 4412 + 4412?", "--thinking", "--temperature", "0", "--json", "--stats")
    plain, guessed = run(*question, "--prompt-lookup", "0"), run(*question, "--draft", "models/tiny")
    first, second = json.loads(plain.stdout), json.loads(guessed.stdout)
    assert first["token_ids"] == second["token_ids"] and "drafted_tokens" not in first["stats"]
    assert second["stats"]["accepted_tokens"] == second["stats"]["drafted_tokens"] > 0
    assert "accepted (100%)" in guessed.stderr and "guessed" not in plain.stderr


def test_a_draft_that_does_not_fit_is_one_clear_line(tiny_checkpoint):
    for arguments, line in (
        (("--draft", str(tiny_checkpoint)), "its tokenizer is another"),
        (("--draft", "nowhere"), "--draft nowhere: no such directory"),
        (("--draft", "models/tiny", "--prompt-lookup", "3"), "leave one of them out"),
        (("--prompt-lookup", "-1"), "--prompt-lookup -1"),
    ):
        result = run("hi", *arguments)
        assert result.returncode == 2 and line in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_a_batch_stops_at_strings_and_budgets_like_a_single_reply(tiny_checkpoint):
    model, chat = small_model(10, vocabulary=512, context=400), Chat.from_pretrained(tiny_checkpoint)
    prompts = [[*chat.encode(text), chat.think_start_id] for text in ("hi", "hello there", "a", "b c d")]
    free = list(generate(model, prompts[0], GREEDY))
    params = SamplingParams(temperature=0.8, seed=1, max_new_tokens=200, stop=(chat.decode(free[3:5]), "e"))
    alone = [
        list(generate(model, ids, params, chat=chat, intervene=ThinkingBudget(chat, ids, 5 + 3 * i)))
        for i, ids in enumerate(prompts)
    ]
    budgets = [ThinkingBudget(chat, ids, 5 + 3 * i) for i, ids in enumerate(prompts)]
    assert generate_batch(model, prompts, params, chat=chat, intervene=budgets) == alone
    long = SamplingParams(temperature=1, seed=2, max_new_tokens=390)  # outgrows the cache that a batch begins with
    assert generate_batch(model, prompts, long) == [list(generate(model, ids, long)) for ids in prompts]


class Recorder(Wild):
    """Guesses as many as it may, and remembers how many that was."""

    def begin(self, prompt):
        super().begin(prompt)
        self.asked = []

    def propose(self, reply, most, params, generator):
        self.asked.append((len(reply), most))
        return super().propose(reply, most, params, generator)


def test_guesses_never_reach_behind_the_last_token_of_a_reply():
    """A reply of n tokens, after m of them: the pass yields one token by itself, so n - m - 1 guesses are the most."""
    model, params = small_model(2), SamplingParams(temperature=0, max_new_tokens=9, stop=())
    model.config.eos_token_id = None
    draft = Recorder()
    assert len(list(generate(model, [5, 6, 7], params, speculation=Eager(draft)))) == 9
    assert draft.asked and all(most <= 9 - made - 1 for made, most in draft.asked)
    room = small_model(2, context=12)  # the last token may lie behind the context: 12 - 3 + 1 tokens
    room.config.eos_token_id = None
    params = SamplingParams(temperature=0, max_new_tokens=50)
    plain = list(generate(room, [5, 6, 7], params))
    assert len(plain) == 10
    assert list(generate(room, [5, 6, 7], params, speculation=Eager(draft))) == plain
    assert list(generate(room, [5, 6, 7], params, speculation=Eager(DraftModel(room)))) == plain
    wide = small_model(2)  # a draft of a shorter context guesses as far as that, and then no more
    wide.config.eos_token_id = None
    plain = list(generate(wide, [5, 6, 7], params))
    assert list(generate(wide, [5, 6, 7], params, speculation=Eager(DraftModel(room)))) == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_a_reply_is_the_same_with_many_guesses_and_in_a_batch(scheme, dtype):
    """Flat distributions, where another order of sums would soon choose another token."""
    model = small_model(6, scale=1, hidden_size=64, intermediate_size=96, head_dim=16)
    model.to(dtype).requires_grad_(False)
    if scheme:
        quantize_(model, scheme)
    prompts = [[2 + (i * i) % 37 for i in range(n)] for n in (3, 60, 17, 18, 60, 1)]
    params = [SamplingParams(temperature=1, seed=n, max_new_tokens=40) for n in range(len(prompts))]
    alone = [list(steps(model, ids, p)) for ids, p in zip(prompts, params, strict=True)]
    assert generate_batch(model, prompts, params) == [[token for token, _ in one] for one in alone]
    for ids, p, one in zip(prompts, params, alone, strict=True):
        for draft in (DraftModel(model), Wild()):
            guessed = list(steps(model, ids, p, speculation=Eager(draft, 40)))
            assert [token for token, _ in guessed] == [token for token, _ in one]
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(guessed, one, strict=True))
