"""The unmodified openai client against a server with the bundled model: every endpoint and field."""

import json
import math

import openai
import pytest

from generate import SamplingParams, generate

SUM = [{"role": "user", "content": "What is 12 + 30?"}]
ANSWER = "12 + 30 = 42."
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": [1, 2]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
OTHER = {"type": "function", "function": {"name": "other"}}
OFF = {"chat_template_kwargs": {"enable_thinking": False}}
NAME = "models/tiny"


@pytest.fixture
def chat(client):
    """A chat completion; `extra` are fields that the client has no name for."""

    def ask(messages=SUM, extra=None, **fields):
        return client.chat.completions.create(model=NAME, messages=messages, extra_body=extra, **fields)

    return ask


@pytest.fixture
def refused(chat):
    """The error that a chat completion gets; it has to name the field."""

    def ask(field, **fields):
        with pytest.raises(openai.BadRequestError) as found:
            chat(**fields)
        assert found.value.param == field and found.value.type == "invalid_request_error"
        return found.value.body["message"]

    return ask


def alone(tiny, messages, thinking=True, **sampling):
    """The reply of generate.py's loop, as (all text, number of tokens)."""
    model, chat = tiny
    ids = chat.render(messages, thinking)
    reply = list(generate(model, ids, SamplingParams(**{"temperature": 0, "max_new_tokens": 200, **sampling})))
    return chat.decode(reply, skip_special_tokens=True), len(reply), len(ids)


# ---- chat completions ----


def test_the_answer_is_that_of_generate(chat, tiny):
    text, tokens, prompt = alone(tiny, SUM)
    reply = chat()
    message = reply.choices[0].message
    assert message.content == ANSWER and message.role == "assistant" and reply.choices[0].finish_reason == "stop"
    assert message.reasoning_content == message.reasoning
    assert text == f"<think>\n{message.reasoning}\n</think>\n\n{message.content}"
    used = reply.usage
    assert (used.prompt_tokens, used.completion_tokens, used.total_tokens) == (prompt, tokens, prompt + tokens)
    answer = len(tiny[1].encode(ANSWER)) + 1
    assert used.completion_tokens_details.reasoning_tokens + answer in (tokens, tokens - 1)  # a line break between them
    assert (reply.object, reply.model, reply.choices[0].index) == ("chat.completion", NAME, 0)


def test_a_stream_is_the_same_answer_in_pieces(chat):
    whole, chunks = chat(), list(chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == ANSWER
    thought = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert "".join(thought) == whole.choices[0].message.reasoning_content
    assert thought == [getattr(delta, "reasoning", None) or "" for delta in deltas]
    assert sum(map(bool, thought)) > 10  # it came token by token
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    ours, theirs = chunks[-1].usage, whole.usage
    assert (ours.prompt_tokens, ours.completion_tokens) == (theirs.prompt_tokens, theirs.completion_tokens)
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].object == "chat.completion.chunk"
    assert all(chunk.usage is None for chunk in chat(stream=True))  # none without include_usage


@pytest.mark.parametrize(
    "extra",
    ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}, {"reasoning_effort": "none"}),
)
def test_thinking_is_turned_off(chat, tiny, extra):
    reply = chat(extra=extra)
    assert reply.choices[0].message.content == alone(tiny, SUM, thinking=False)[0]
    assert not hasattr(reply.choices[0].message, "reasoning_content")
    assert reply.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_thinking_budget_ends_the_thinking(chat, refused):
    reply = chat(extra={"thinking_budget": 5}, logprobs=True)
    assert reply.choices[0].message.reasoning.endswith("based on the thinking directly now.")
    inserted = [entry for entry in reply.choices[0].logprobs.content if entry.logprob == -9999.0]
    assert len(inserted) > 5 and len(reply.choices[0].logprobs.content) == reply.usage.completion_tokens
    refused("thinking_budget", extra={"thinking_budget": 5, **OFF})
    refused("thinking_budget", extra={"thinking_budget": 0})


def test_stop_strings_are_no_part_of_the_answer(chat):
    assert chat(stop=" = ").choices[0].message.content == "12 + 30"
    reply = chat(stop=["never", "42"], extra=OFF | {"enable_thinking": False})
    assert "42" not in reply.choices[0].message.content
    pieces = [chunk.choices[0] for chunk in chat(stop=" = ", stream=True)]
    assert "".join(piece.delta.content or "" for piece in pieces) == "12 + 30"
    assert pieces[-1].finish_reason == "stop"


@pytest.mark.parametrize("name", ("max_tokens", "max_completion_tokens"))
def test_a_reply_has_at_most_max_tokens(chat, name):
    reply = chat(**{name: 7})
    assert reply.usage.completion_tokens == 7 and reply.choices[0].finish_reason == "length"
    assert not reply.choices[0].message.content


def test_n_choices_each_have_their_own_seed(chat):
    hot = {"temperature": 1.5, "seed": 5, "max_tokens": 12, "extra": OFF}
    reply = chat(n=3, **hot)
    texts = [choice.message.content for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts == [chat(**{**hot, "seed": 5 + i}).choices[0].message.content for i in range(3)]
    assert reply.usage.completion_tokens > 12  # of all three
    streamed = ["", "", ""]
    for chunk in chat(n=3, stream=True, **hot):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_sampling_fields_are_those_of_generate(chat, tiny):
    for number, sampling in enumerate(
        (
            {"temperature": 1.3},
            {"temperature": 1.0, "top_p": 0.5},
            {"temperature": 1.2, "presence_penalty": 1.5},
            {"temperature": 1.2, "frequency_penalty": 1.5},
        )
    ):
        extra = {"top_k": 11, "min_p": 0.01, "repetition_penalty": 1.2}
        reply = chat(seed=number, max_tokens=25, extra=extra | OFF, **sampling)
        defaults = {"top_p": 0.95, **extra, **sampling, "max_new_tokens": 25, "seed": number}
        assert reply.choices[0].message.content == alone(tiny, SUM, thinking=False, **defaults)[0].rstrip("\ufffd")


def test_the_same_seed_is_the_same_text_and_no_seed_another(chat):
    hot = {"temperature": 2.0, "max_tokens": 30, "extra": OFF}
    texts = [chat(seed=-3, **hot).choices[0].message.content for _ in range(2)]
    assert texts[0] == texts[1]
    assert len({chat(**hot).choices[0].message.content for _ in range(3)}) > 1


def test_logprobs_are_the_models_own(chat, tiny):
    import torch

    model, tokenizer = tiny
    reply = chat(logprobs=True, top_logprobs=3, extra=OFF | {"temperature": 1.0, "seed": 1, "repetition_penalty": 1.3})
    entries = reply.choices[0].logprobs.content
    prompt = tokenizer.render(SUM, thinking=False)
    text = b"".join(bytes(entry.bytes) for entry in entries)
    assert text.decode().removesuffix("<|im_end|>") == reply.choices[0].message.content
    assert len(entries) == reply.usage.completion_tokens
    ids = [next(i for i in range(758) if list(tokenizer.token_bytes(i)) == entry.bytes) for entry in entries]
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *ids]]))[0].float().log_softmax(-1)
    for place, (entry, token) in enumerate(zip(entries, ids, strict=True), len(prompt) - 1):
        assert entry.logprob == pytest.approx(logits[place, token].item(), abs=1e-3)
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(logits[place].max().item(), abs=1e-3)
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob >= entry.top_logprobs[2].logprob
    streamed = [
        entry
        for chunk in chat(
            stream=True, logprobs=True, top_logprobs=3, temperature=1.0, seed=1, extra=OFF | {"repetition_penalty": 1.3}
        )
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [(entry.token, entry.logprob) for entry in streamed] == [(entry.token, entry.logprob) for entry in entries]


def test_logit_bias_rules_out_and_forces(chat, tiny):
    forty = tiny[1].encode("4")[0]
    assert "4" not in chat(logit_bias={str(forty): -100}, max_tokens=60, extra=OFF).choices[0].message.content
    reply = chat(logit_bias={str(forty): 100}, max_tokens=5, extra=OFF)
    assert reply.choices[0].message.content == "44444"
    reply = chat(logit_bias={str(forty): -100}, max_tokens=5, logprobs=True, top_logprobs=20, extra=OFF)
    assert all(entry.logprob > -50 for entry in reply.choices[0].logprobs.content)  # the model's own, not the biased


def test_a_begun_answer_is_continued(chat):
    whole = chat().choices[0].message
    begun = {"role": "assistant", "content": "12 + 30 =", "reasoning_content": whole.reasoning_content}
    rest = chat(messages=[*SUM, begun], extra={"continue_final_message": True, "add_generation_prompt": False})
    assert rest.choices[0].message.content == " 42." and not hasattr(rest.choices[0].message, "reasoning")
    cut = whole.reasoning.index("\ntens")
    begun = {"role": "assistant", "content": "", "reasoning": whole.reasoning[:cut]}
    rest = chat(messages=[*SUM, begun], extra={"continue_final_message": True}).choices[0].message
    assert (rest.reasoning, rest.content) == (whole.reasoning[cut:], ANSWER)
    closed = {"role": "assistant", "content": f"<think>\n{whole.reasoning}\n</think>\n\n"}
    rest = chat(messages=[*SUM, closed], extra={"continue_final_message": True}).choices[0].message
    assert rest.content == ANSWER and not hasattr(rest, "reasoning")


def test_both_names_of_the_reasoning_are_read_in_history(client, running):
    def ids(**message):
        messages = [*SUM, {"role": "assistant", "content": "x", **message}]
        return running.service.chat.render(messages, continue_final_message=True, literal=True)

    assert ids(reasoning="abc") == ids(reasoning_content="abc") != ids()


def test_messages_may_be_of_parts(chat, refused):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "12 + 30?"}]
    assert chat(messages=[{"role": "user", "content": parts}]).choices[0].message.content == ANSWER
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    assert "only text" in refused("messages", messages=[{"role": "user", "content": [image]}])


def test_a_second_turn_computes_only_what_is_new(chat):
    first = [{"role": "user", "content": "What is 17 + 25? Please."}]
    reply = chat(messages=first, extra=OFF)
    again = chat(messages=[*first, reply.choices[0].message, {"role": "user", "content": "And 1 + 1?"}], extra=OFF)
    assert again.usage.prompt_tokens_details.cached_tokens >= reply.usage.prompt_tokens - 8


# ---- JSON and tools ----


def test_response_format_is_followed(chat, refused):
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer", "maximum": 9999}, "unit": {"enum": ["m", "s"]}},
        "required": ["sum", "unit"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema, "strict": True}}
    for extra in (OFF, None):  # the thinking is free
        for heat in (0.0, 1.5):
            reply = chat(response_format=form, temperature=heat, seed=3, extra=extra)
            found = json.loads(reply.choices[0].message.content)
            assert type(found["sum"]) is int and found["unit"] in ("m", "s") and len(found) == 2
            assert reply.choices[0].finish_reason == "stop"
            assert (extra is None) == hasattr(reply.choices[0].message, "reasoning")
    reply = chat(response_format={"type": "json_object"}, max_tokens=300, extra=OFF, temperature=0.7, seed=4)
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(reply.choices[0].message.content), dict)
    assert reply.choices[0].message.content.startswith("{")
    assert chat(response_format={"type": "text"}).choices[0].message.content == ANSWER
    refused("response_format", response_format={"type": "xml"})
    refused("response_format", response_format={"type": "json_object", "schema": {}})
    refused("response_format", response_format={"type": "json_schema", "json_schema": {"schema": {}, "kind": "x"}})
    large = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [f"w{i}" for i in range(20_000)]}}}
    assert "at most" in refused("response_format", response_format=large)
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "not": {"type": "null"}}}}
    assert "not" in refused("response_format", response_format=bad)


@pytest.mark.parametrize("choice", ("required", {"type": "function", "function": {"name": "add"}}))
def test_tool_choice_makes_a_call(chat, choice):
    for extra in (OFF, None):
        reply = chat(tools=[ADD], tool_choice=choice, parallel_tool_calls=False, extra=extra).choices[0]
        (call,) = reply.message.tool_calls
        found = json.loads(call.function.arguments)
        assert call.function.name == "add" and set(found) == {"a", "b"} and found["b"] in (1, 2)
        assert reply.finish_reason == "tool_calls" and reply.message.content is None and call.id.startswith("call_")


def test_a_call_is_streamed_as_openais_deltas(chat):
    calls, finish = {}, None
    for chunk in chat(tools=[ADD, OTHER], tool_choice="required", parallel_tool_calls=False, stream=True, extra=OFF):
        choice = chunk.choices[0]
        finish = choice.finish_reason or finish
        for delta in choice.delta.tool_calls or []:
            call = calls.setdefault(delta.index, {"name": "", "arguments": ""})
            call["name"] += delta.function.name or ""
            call["arguments"] += delta.function.arguments or ""
    assert finish == "tool_calls" and list(calls) == [0] and calls[0]["name"] in ("add", "other")
    assert isinstance(json.loads(calls[0]["arguments"]), dict)


def test_a_conversation_with_tools_goes_on(chat):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    messages = [
        *SUM,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    assert chat(messages=messages, tools=[ADD], max_tokens=5).usage.prompt_tokens > 100
    assert chat(tools=[ADD], tool_choice="none").choices[0].message.tool_calls is None


def test_wrong_tools_are_refused(refused):
    refused("tools", tools=[ADD, ADD])
    refused("tools", tools=[{"type": "function", "function": {"name": "a b"}}])
    refused("tools", tools=[{"type": "custom"}])
    refused("tool_choice", tools=[ADD], tool_choice={"type": "function", "function": {"name": "sub"}})
    refused("tool_choice", tool_choice="required")
    refused("tool_choice", tools=[ADD], tool_choice="any")
    named = {"type": "function", "function": {"name": "add"}}
    refused("tool_choice", tools=[ADD], tool_choice={**named, "mode": "x"})


@pytest.mark.parametrize(
    "field, fields",
    [
        ("temperature", {"temperature": -1}),
        ("top_p", {"top_p": 1.5}),
        ("n", {"n": 0}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 5, "max_completion_tokens": 6}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("logit_bias", {"logit_bias": {"a": 1}}),
        ("logit_bias", {"logit_bias": {"99999": 1}}),
        ("stop", {"stop": ""}),
        ("reasoning_effort", {"reasoning_effort": "high"}),
        ("service_tier", {"service_tier": "priority"}),
        ("store", {"store": True}),
        ("functions", {"functions": [{"name": "f"}]}),
        ("metadata", {"metadata": {"a": "b"}}),
        ("audio", {"audio": {"voice": "alloy", "format": "wav"}}),
        ("beam_width", {"extra": {"beam_width": 4}}),
        ("chat_template_kwargs.preserve", {"extra": {"chat_template_kwargs": {"preserve": True}}}),
        ("enable_thinking", {"extra": {"enable_thinking": True, "reasoning_effort": "none"}}),
        ("messages", {"messages": []}),
        ("messages", {"messages": [{"role": "wizard", "content": "x"}]}),
        ("messages", {"messages": [{"role": "user", "content": "x", "cache_control": {}}]}),
        ("continue_final_message", {"messages": SUM, "extra": {"continue_final_message": True}}),
        ("add_generation_prompt", {"extra": {"add_generation_prompt": False}}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(refused, field, fields):
    assert field.partition(".")[0] in refused(field, **fields)


def test_fields_without_effect_are_taken(chat):
    reply = chat(
        user="me", store=False, service_tier="auto", modalities=["text"], safety_identifier="x", temperature=None
    )
    assert reply.choices[0].message.content == ANSWER


# ---- the other endpoints ----


def test_completions_continue_a_text(client, tiny):
    model, chat = tiny
    prompt = chat.render(SUM)
    reply = client.completions.create(model=NAME, prompt=prompt, max_tokens=100)
    expected = chat.decode(generate(model, prompt, SamplingParams(temperature=0, max_new_tokens=100)), True)
    assert reply.choices[0].text == expected and reply.object == "text_completion"
    assert reply.choices[0].finish_reason == "stop" and reply.usage.prompt_tokens == len(prompt)
    text = client.completions.create(
        model=NAME, prompt=chat.decode(prompt), max_tokens=100
    )  # special tokens are tokens
    assert text.choices[0].text == expected
    streamed = client.completions.create(model=NAME, prompt=prompt, max_tokens=100, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected


def test_completions_echo_with_probabilities(client, tiny):
    import torch

    model, chat = tiny
    ids = chat.encode("What is 2 + 2? é")
    reply = client.completions.create(model=NAME, prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0)
    found = reply.choices[0].logprobs
    assert len(found.tokens) == len(ids) + 1 and found.token_logprobs[0] is None and found.top_logprobs[0] is None
    with torch.inference_mode():
        rows = model(torch.tensor([ids]))[0].float().log_softmax(-1)
    for place, token in enumerate(ids[1:]):
        assert found.token_logprobs[place + 1] == pytest.approx(rows[place, token].item(), abs=1e-3)
        assert max(found.top_logprobs[place + 1].values()) == pytest.approx(rows[place].max().item(), abs=1e-3)
    assert reply.choices[0].text.startswith("What is 2 + 2? é")
    assert found.text_offset[:3] == [0, len(found.tokens[0]), len(found.tokens[0]) + len(found.tokens[1])]
    scored = client.completions.create(model=NAME, prompt=ids, max_tokens=0, echo=True, logprobs=1)
    assert len(scored.choices[0].logprobs.tokens) == len(ids) and scored.usage.completion_tokens == 0
    (only,) = client.completions.create(model=NAME, prompt=ids, max_tokens=0, echo=True, logprobs=1, stream=True)
    assert only.choices[0].finish_reason == "length" and only.choices[0].text == scored.choices[0].text
    assert only.choices[0].logprobs == scored.choices[0].logprobs
    plain = client.completions.create(model=NAME, prompt="ab", max_tokens=3, echo=True)
    assert plain.choices[0].text.startswith("ab") and plain.choices[0].logprobs is None


def test_completions_of_many_prompts(client):
    reply = client.completions.create(model=NAME, prompt=["What", "Who is"], max_tokens=4, n=2, temperature=1, seed=1)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    each = client.completions.create(model=NAME, prompt="Who is", max_tokens=4, n=2, temperature=1, seed=1)
    assert [choice.text for choice in reply.choices[2:]] == [choice.text for choice in each.choices]
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model=NAME, prompt="x", suffix="y")
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model=NAME, prompt="x", best_of=3)
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model=NAME, prompt=[1, 99999])


def test_models_say_what_the_page_needs(client, http):
    (model,) = client.models.list().data
    assert model.id == NAME and model.context_length == 1024 and model.precision == "f32" and model.thinking == "switch"
    assert model.sampling["thinking"]["temperature"] == 0 and client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_an_unknown_model_is_a_404(client):
    with pytest.raises(openai.NotFoundError) as found:
        client.chat.completions.create(model="gpt-4o", messages=SUM)
    assert found.value.code == "model_not_found" and found.value.param == "model"


def test_a_prompt_beyond_the_context_is_a_400(chat, client):
    with pytest.raises(openai.BadRequestError) as found:
        chat(messages=[{"role": "user", "content": "word " * 3000}])
    assert found.value.code == "context_length_exceeded"
    reply = client.completions.create(
        model=NAME, prompt=[5] * 1000, max_tokens=500, logit_bias={"734": -100, "732": -100}
    )
    assert reply.choices[0].finish_reason == "length" and reply.usage.total_tokens == 1025


def test_tokenize_and_back(http, tiny):
    chat = tiny[1]
    found = http.post("/tokenize", json={"prompt": "What is 2?<|im_end|>", "return_token_strs": True}).json()
    assert found["tokens"] == chat.encode("What is 2?<|im_end|>") and found["count"] == len(found["tokens"])
    assert found["token_strs"][-1] == "<|im_end|>" and found["max_model_len"] == 1024
    assert http.post("/tokenize", json={"messages": SUM}).json()["tokens"] == chat.render(SUM)
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "What is 2?<|im_end|>"}
    assert http.post("/detokenize", json={"tokens": [-1]}).status_code == 400
    assert http.post("/tokenize", json={}).status_code == 400


def test_embeddings_of_a_chat_model_are_a_400(client):
    with pytest.raises(openai.BadRequestError, match="no embedding model"):
        client.embeddings.create(model=NAME, input="x")


def test_the_page_is_served_with_its_headers(http):
    reply = http.get("/")
    assert (
        reply.headers["content-type"].startswith("text/html")
        and "default-src 'none'" in reply.headers["content-security-policy"]
    )
    assert "<!doctype html>" in reply.text.lower()


def test_health_and_metrics(http, chat):
    chat()
    assert http.get("/health").json() == {"status": "ok"}
    lines = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if not line.startswith("#"))
    for name in ("generated_tokens_total", "prompt_tokens_total", "time_to_first_token_seconds_count"):
        assert float(lines[f"nanoqwen_{name}"]) > 0
    assert float(lines["nanoqwen_batch"]) == 0 and "nanoqwen_cached_tokens_total" in lines
    assert math.isfinite(float(lines["nanoqwen_time_between_tokens_seconds_sum"]))


# ---- lm-evaluation-harness ----


def test_lm_evaluation_harness_scores_and_generates(running, tiny):
    """Its own client, with the tokenizer that the server lends it, gives what evaluate.py's likelihoods are."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from inference.likelihood import Scorer

    api = LocalCompletionsAPI(
        model=NAME, base_url=f"{running.url}/v1/completions", tokenizer_backend="remote", batch_size=2
    )
    pairs = [("What is 2 + 2?", " 4"), ("12 + 30 =", " 42."), ("Who", " are you?")]
    instances = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    scorer, chat = Scorer(tiny[0]), tiny[1]
    for (context, continuation), (found, greedy) in zip(
        pairs, api.loglikelihood(instances, disable_tqdm=True), strict=True
    ):
        ids = chat.encode(context), chat.encode(context + continuation)[len(chat.encode(context)) :]
        scored = scorer.scored(*ids)
        assert found == pytest.approx(sum(value for value, _ in scored), abs=1e-4)
        assert greedy == all(best for _, best in scored)
    until = {"until": ["."], "max_gen_toks": 20}
    (text,) = api.generate_until([Instance("generate_until", {}, ("12 + 30 =", until), 0)], disable_tqdm=True)
    assert text and "." not in text
