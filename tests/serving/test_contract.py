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
        if number % 7 == 2:
            fields["response_format"] = {"type": "json_object"}
        if number % 4 == 0:
            extra["thinking_budget"] = 9
        found.append({"messages": messages, "extra_body": extra, **fields})
    return found


def text(client, request, stream=False) -> str:
    reply = client.chat.completions.create(model=NAME, stream=stream, **request)
    if stream:
        deltas = [chunk.choices[0].delta for chunk in reply if chunk.choices]
        names = ("reasoning", "content")
        return "|".join("".join(getattr(delta, name, None) or "" for delta in deltas) for name in names)
    message = reply.choices[0].message
    return f"{getattr(message, 'reasoning', '')}|{message.content}"


@pytest.mark.parametrize("precision", ("float32", "bfloat16", "int8"))
def test_64_requests_at_random_are_each_as_alone(serving, precision):
    """Arriving at random, some cancelled, some by prefix, in rows that are too few for all."""
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
        alone = [text(client, request) for request in asked]
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
                found[number] = text(client, request, stream=number % 2 == 0)

        threads = [threading.Thread(target=work, args=(order[i::16],)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert [found[number] for number in range(64)] == alone
