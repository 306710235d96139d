"""The endpoints: a request's fields in, the API's JSON or a stream of it out. app.py handles the bytes."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from serving import fields as read
from serving.choice import Asked, News, named, token_logprob
from serving.errors import ApiError, refused
from serving.grammar import Constraint
from serving.jobs import embed, score, written
from serving.outlet import Outlet
from serving.service import Exchange, Service
from serving.wire import ChatChoice, Events, Head, TextChoice, event, usage

Answer = dict | Callable[[Outlet], Awaitable[None]]
"""A JSON object, or what writes the events of a stream."""
BACKLOG = 2048  # events that a client may leave unread; each may hold a row's alternatives
PING = 15.0  # seconds without an event after which a stream says that it lives: proxies cut what is silent


def _check_model(service: Service, model: str | None) -> None:
    if model not in (None, service.name):
        message = f"model: there is no {model!r:.80} here; this server has {service.name!r}"
        raise ApiError(404, message, "model", "model_not_found")


async def _aside(work: Callable[..., Any], *arguments: Any) -> Any:
    """What takes long without the model, on another thread: templates, tokenizing, grammars. ValueError is a 400."""
    try:
        return await asyncio.to_thread(work, *arguments)
    except ValueError as error:
        raise ApiError(400, str(error)) from None


# ---- POST /v1/chat/completions ----


async def chat_completions(service: Service, body: Any) -> Answer:
    given = read.read(body, read.CHAT)
    _check_model(service, given.model)
    if not service.chat.templates:
        raise ApiError(400, "this model has no chat template, as a base model; use /v1/completions")
    thinking = _thinking(service, given)
    ids = await _aside(_render, service, given, thinking)
    service.check_length(ids, "messages")
    if given.top_logprobs is not None and not given.logprobs:
        raise refused("top_logprobs", "needs logprobs: true")
    if given.stream_options is not None and not given.stream:
        raise refused("stream_options", "needs stream: true")
    if None not in (given.max_tokens, given.max_completion_tokens) and given.max_tokens != given.max_completion_tokens:
        raise refused("max_tokens", "differs from max_completion_tokens; keep one")
    offered = given.tools if given.tool_choice != "none" else None
    asked = Asked(
        service.params(given, thinking, given.max_completion_tokens or given.max_tokens),
        thinking_budget=given.thinking_budget,
        tools=offered,
        parallel=given.parallel_tool_calls is not False,
        logprobs=(given.top_logprobs or 0) if given.logprobs else None,
        bias=given.logit_bias or {},
    )
    constraints = await _constraints(service, given, ids, thinking)
    service.check_count(given.n or 1, "n")
    exchange = service.exchange([ids], asked, given.n or 1, constraints)
    choices = [ChatChoice(choice.index, bool(given.logprobs)) for choice in exchange.choices]
    return await _answer(exchange, choices, Head("chat.completion", service.name), given)


def _thinking(service: Service, given: Any) -> bool:
    """Whether the model is to think. A request that wants what the template can't do is refused."""
    asked = {"enable_thinking": given.enable_thinking}
    if given.chat_template_kwargs is not None:
        asked["chat_template_kwargs.enable_thinking"] = given.chat_template_kwargs.enable_thinking
    if given.reasoning_effort is not None:
        asked["reasoning_effort"] = False
    asked = {name: value for name, value in asked.items() if value is not None}
    if len(set(asked.values())) > 1:
        raise refused(next(iter(asked)), f"contradicts {list(asked)[1]}; keep one")
    name, wanted = next(iter(asked.items()), ("", None))
    if wanted is False and service.thinking == "always":
        raise refused(name, "this model thinks always")
    if wanted is True and service.thinking == "never":
        raise refused(name, "this model does not think")
    if given.thinking_budget is not None and (wanted is False or service.thinking == "never"):
        raise refused("thinking_budget", "there is no thinking that it could limit")
    return wanted is not False and service.thinking != "never"


def _render(service: Service, given: Any, thinking: bool = True) -> list[int]:
    """The prompt's ids. What a message says stays text, whatever it looks like."""
    if given.continue_final_message and given.add_generation_prompt:
        raise refused("add_generation_prompt", "contradicts continue_final_message; leave it out")
    if given.add_generation_prompt is False and not given.continue_final_message:
        raise refused("add_generation_prompt", "false is only honoured beside continue_final_message")
    if given.messages is None:
        raise refused("messages", "is missing")
    for message in given.messages:
        service.check_text(message.get("content"), "messages")
    begun = bool(given.continue_final_message)
    if begun and not (given.messages and given.messages[-1].get("role") == "assistant"):
        raise refused("continue_final_message", "the last message is not the assistant's")
    try:
        return service.chat.render(given.messages, thinking, given.tools, continue_final_message=begun, literal=True)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from None
    except RecursionError:  # arguments of a call, given as text
        raise refused("messages", "arguments of a call are nested too deeply") from None


async def _constraints(service: Service, given: Any, ids: list[int], thinking: bool) -> Callable[[], Constraint | None]:
    """Makes the constraint of each choice: what response_format and tool_choice rule out."""
    choice, tools, grammars = given.tool_choice or "auto", given.tools or [], service.grammars
    parallel, param = given.parallel_tool_calls is not False, "tool_choice"
    if not tools and choice not in ("auto", "none"):
        raise refused("tool_choice", "there are no tools")
    if isinstance(choice, dict):
        tools = [tool for tool in tools if tool["function"]["name"] == choice["name"]]
        if not tools:
            raise refused("tool_choice", f"{choice['name']!r:.80} is not among the tools")
        grammar = grammars.calls(tools, parallel=False)
    elif choice == "required":
        grammar = grammars.calls(tools, parallel)
    elif given.response_format is not None:
        param = "response_format"
        grammar = grammars.answer(given.response_format, tools if choice == "auto" else (), parallel)
    elif choice == "auto" and any(tool["function"].get("strict") for tool in tools):
        param = "tools"
        grammar = grammars.text_or_calls(tools)
    else:
        return lambda: None
    if given.continue_final_message:
        raise refused("continue_final_message", f"a begun answer can't be held to {param}")
    try:
        await grammars.examine(grammar)
        matcher = await asyncio.to_thread(grammars.matcher, grammar)
    except ValueError as error:
        raise refused(param, str(error)) from None
    opened = service.chat.opens_thinking(ids)
    return lambda: Constraint(grammars, matcher.deep_copy(), opened, thinking, param)


# ---- POST /v1/completions ----


async def completions(service: Service, body: Any) -> Answer:
    given = read.read(body, read.COMPLETION)
    _check_model(service, given.model)
    if given.prompt is None:
        raise refused("prompt", "is missing")
    if given.stream_options is not None and not given.stream:
        raise refused("stream_options", "needs stream: true")
    service.check_count(len(given.prompt) * (given.n or 1), "prompt" if len(given.prompt) > 1 else "n")
    prompts = await _aside(_encode, service, given.prompt, "prompt")
    most = 16 if given.max_tokens is None else given.max_tokens  # OpenAI's default
    if most == 0 and not given.echo:
        raise refused("max_tokens", "0 asks for nothing; it is for echo")
    wants, n = given.logprobs is not None, given.n or 1
    asked = Asked(
        service.params(given, False, most or 1), raw=True, logprobs=given.logprobs, bias=given.logit_bias or {}
    )
    exchange = service.exchange(prompts, asked, n, lambda: None)
    scores = [await _scores(service, ids, given.logprobs) if given.echo and wants else None for ids in prompts]
    echoes = [service.chat.decode(ids) if given.echo else "" for ids in prompts]
    choices = [
        TextChoice(choice.index, wants, service.chat, echoes[choice.index // n], scores[choice.index // n])
        for choice in exchange.choices
    ]
    if most == 0:
        exchange.choices.clear()  # nothing is generated: the echo is all
        for choice in choices:
            choice.finish = "length"
    return await _answer(exchange, choices, Head("text_completion", service.name), given)


def _encode(service: Service, prompts: list[str | list[int]], param: str, special: bool = False) -> list[list[int]]:
    """The ids of each prompt; `special`: with the tokens that the tokenizer puts around a text."""
    found, vocabulary = [], service.model.config.vocab_size
    for prompt in prompts:
        service.check_text(prompt, param)
        ids = prompt if isinstance(prompt, list) else service.chat.encode(prompt, special)
        if not ids:
            raise refused(param, "is empty; give at least one token")
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise refused(param, f"a token id is outside of the vocabulary of {vocabulary:,}")
        service.check_length(ids, param)
        found.append(ids)
    return found


async def _scores(service: Service, ids: list[int], most: int) -> list[dict]:
    """The probabilities of a prompt's tokens. The first has none."""
    chat = service.chat

    def entry(row, token):
        return token_logprob(lambda one: named(chat, one), row, token, most)

    found = await service.compute(score(service.model, ids, entry))
    return [{**named(chat, ids[0]), "logprob": None, "top_logprobs": []}, *found]


# ---- answers ----


async def _answer(exchange: Exchange, choices: list, head: Head, given: Any) -> Answer:
    if given.stream:
        include = bool(given.stream_options and given.stream_options.include_usage)
        return partial(_stream, exchange, choices, head, include)
    exchange.listen = lambda news: choices[news.choice.index].take(news)
    with exchange:
        await exchange.wait()
    used = usage(exchange.prompts, exchange.choices)
    return head([choice.whole() for choice in choices], usage=used)


async def _stream(exchange: Exchange, choices: list, head: Head, include_usage: bool, outlet: Outlet) -> None:
    """Writes the events of a stream. With `include_usage` the last one before [DONE] has it, and the others null."""
    events = Events(choices, head, **{"usage": None} if include_usage else {})

    def listen(news: News) -> None:
        if outlet.waiting > BACKLOG * len(choices):
            raise ApiError(408, "the stream was read too slowly")
        if data := events(news):
            outlet.write(data)

    for choice in choices:
        if (first := choice.first()) is not None:
            outlet.write(events.event([first]))
    exchange.listen = listen
    try:
        with exchange:
            while not await exchange.wait(PING):
                if time.monotonic() - outlet.latest >= PING:
                    outlet.write(b": waiting\n\n")
    except ApiError as error:
        return outlet.write(event(error.body()), last=True)
    used = events.event([], usage=usage(exchange.prompts, exchange.choices)) if include_usage else b""
    outlet.write(used + event("[DONE]"), last=True)


# ---- the others ----


async def embeddings(service: Service, body: Any) -> Answer:
    given = read.read(body, read.EMBEDDING)
    _check_model(service, given.model)
    if not service.pooling:
        message = f"{service.name} is no embedding model (it has no modules.json with last-token pooling)"
        raise ApiError(400, message, "model", "no_embeddings")
    if given.input is None:
        raise refused("input", "is missing")
    width = service.model.config.hidden_size
    if given.dimensions is not None and given.dimensions > width:
        raise refused("dimensions", f"{given.dimensions} are more than the model's {width:,}")
    prompts = await _aside(_encode, service, given.input, "input", True)
    vectors = await service.compute(embed(service.model, prompts, given.dimensions))
    encoding, tokens = given.encoding_format or "float", sum(map(len, prompts))
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": written(vector, encoding)}
            for index, vector in enumerate(vectors)
        ],
        "model": service.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


async def tokenize(service: Service, body: Any) -> Answer:
    """vLLM's: of a text, special tokens in it too, or of messages as they would be asked."""
    given = read.read(body, read.TOKENIZE)
    _check_model(service, given.model)
    if (given.prompt is None) == (given.messages is None):
        raise refused("prompt", "give a text, or messages")
    if given.prompt is not None:
        ids = await _aside(service.chat.encode, given.prompt, given.add_special_tokens is not False)
    else:
        kwargs = given.chat_template_kwargs
        thinking = kwargs is None or kwargs.enable_thinking is not False
        ids = await _aside(_render, service, given, thinking)
    strings = [named(service.chat, token)["token"] for token in ids] if given.return_token_strs else None
    return {"count": len(ids), "max_model_len": service.context, "tokens": ids, "token_strs": strings}


async def detokenize(service: Service, body: Any) -> Answer:
    given = read.read(body, read.DETOKENIZE)
    _check_model(service, given.model)
    if given.tokens is None:
        raise refused("tokens", "is missing")
    if any(not 0 <= token < service.model.config.vocab_size for token in given.tokens):
        raise refused("tokens", f"a token id is outside of the vocabulary of {service.model.config.vocab_size:,}")
    return {"prompt": await _aside(service.chat.decode, given.tokens)}


def tokenizer_info(service: Service) -> dict:
    """What lm-evaluation-harness asks for, so that it needs no tokenizer of its own."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    info = {name: service.chat.special_tokens.get(name) for name in names}
    return {**info, "chat_template": service.chat.templates.get("default"), "model_max_length": service.context}


POSTS = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/embeddings": embeddings,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
}
