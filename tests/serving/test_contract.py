"""The contract: the same request with the same seed gets the same text, alone or beside any others."""

import random
import threading

import openai
import pytest
import torch

from chat import Chat
from model import Qwen3

NAME = "models/tiny"
WORDS = ["12 + 30", "47 * 8", "9.11 or 9.9", "strawberry", "a story about é and 日本", "473 + 89"]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{2,5}$"},
        "kind": {"enum": ["a", 3, None]},
        "list": {"type": "array", "items": {"type": "integer", "maximum": 9}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "kind", "list"],
    "additionalProperties": False,
}
ADD = {"type": "object", "properties": {"a": {"enum": [7, 19]}, "b": {"enum": [1, 2]}}, "required": ["a", "b"]}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": ADD | {"additionalProperties": False}}}]


def requests(count: int) -> list[dict]:
    """Of many kinds: greedy and hot, thinking or not, begun alike, with a budget, a grammar, a bias."""
    found = []
    for number in range(count):
        rng = random.Random(number)
        messages = [{"role": "user", "content": f"What is {rng.choice(WORDS)}?" + " Please." * rng.randrange(30)}]
        if number % 3 == 0:
            messages.insert(0, {"role": "system", "content": "You are a careful helper. " * 8})
        extra = {"chat_template_kwargs": {"enable_thinking": number % 2 == 0}}
        fields = {"seed": number, "temperature": rng.choice([0, 0.7, 1.5]), "max_tokens": rng.randrange(5, 60)}
        if number % 5 == 1:
            fields["presence_penalty"] = 1.0
        if number % 5 == 2:
            fields |= {"frequency_penalty": -0.5, "top_p": 0.9}
            extra |= {"repetition_penalty": 1.2, "min_p": 0.01, "top_k": 30}
        if number % 7 == 2:
            schema = {"name": "x", "schema": SCHEMA}
            fields["response_format"] = rng.choice(
                ({"type": "json_object"}, {"type": "json_schema", "json_schema": schema})
            )
        elif number % 7 == 3:
            fields |= {"tools": TOOLS, "tool_choice": rng.choice(("auto", "required")), "max_tokens": 70}
            fields["parallel_tool_calls"] = rng.random() < 0.5
        elif number % 7 == 4:
            messages.append({"role": "assistant", "content": rng.choice(("It is", "12 +", "<think>\nFirst"))})
            extra["continue_final_message"] = True
        elif number % 7 == 5:
            fields["logit_bias"] = {str(rng.randrange(700)): rng.choice((-100, -3.5, 4)) for _ in range(9)}
        if number % 4 == 0:
            extra["thinking_budget"] = 9
        if number % 6 == 1:
            fields["n"] = 3
        if number % 4 == 3:
            fields |= {"logprobs": True, "top_logprobs": number % 3}
        if number % 9 == 4:
            fields["stop"] = ["4", "is ", "e,\n"]
        found.append({"messages": messages, "extra_body": extra, **fields})
    return found


def answer(client, request, stream=False) -> list:
    """All that a reply says but its names: texts, calls, why it ended, and its probabilities, to the bit."""
    reply = client.chat.completions.create(model=NAME, stream=stream, **request)
    found = [["", "", {}, [], None] for _ in range(request.get("n", 1))]
    for choice in (one for chunk in reply for one in chunk.choices) if stream else reply.choices:
        said, of = choice.delta if stream else choice.message, found[choice.index]
        of[0] += getattr(said, "reasoning", None) or ""
        of[1] += said.content or ""
        for place, call in enumerate(said.tool_calls or []):
            known = of[2].setdefault(call.index if stream else place, ["", ""])
            known[0] += call.function.name or ""
            known[1] += call.function.arguments
        of[3] += [entry.model_dump() for entry in choice.logprobs.content] if choice.logprobs else []
        of[4] = choice.finish_reason
    return found


@pytest.mark.parametrize("precision", ("float32", "bfloat16", "int8"))
def test_64_requests_at_random_are_each_as_alone(serving, precision):
    """Arriving at random, some cancelled, some by prefix, in rows that are too few for all, in the shortest pieces."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    model = Qwen3.from_pretrained("models/tiny", dtype=dtype)
    if precision == "int8":
        from ops.quant import quantize_

        quantize_(model, "int8")
    asked, found = requests(64), {}
    chat = Chat.from_pretrained("models/tiny")
    with (
        serving(model=(model, chat), max_batch=8) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0, timeout=120) as client,
    ):
        alone = [answer(client, request) for request in asked]
        ends = {end for choices in alone for *_, end in choices}
        assert ends == {"stop", "length", "tool_calls"} and sum(len(choices) for choices in alone) > 80
        running.service.engine.pace.per_token = 1.0
        running.service.engine.pace.measured = lambda *_: None
        barrier, rng = threading.Barrier(16), random.Random(1)
        order = list(enumerate(asked))
        rng.shuffle(order)

        def work(mine):
            barrier.wait(60)
            for number, request in mine:
                if number % 6 == 5:  # one more of it goes away in the middle
                    stream = client.chat.completions.create(model=NAME, stream=True, **request)
                    next(iter(stream))
                    stream.close()
                found[number] = answer(client, request, stream=number % 2 == 0)

        threads = [threading.Thread(target=work, args=(order[i::16],)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert [found[number] for number in range(64)] == alone
