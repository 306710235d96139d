"""chat.py and formats/template.py: the same ids and text as transformers, streams that never break a character, and
strangers' templates and files that end in one line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from chat import EARLY_STOP_TEXT, Chat, ReplyStream, StopStrings, TextStream, assistant_message
from formats.source import BUNDLED_MODEL
from formats.template import CHARACTERS, TemplateSandbox

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("NANOQWEN_ASSETS", ""))
HAS_ASSETS = "NANOQWEN_ASSETS" in os.environ
without_assets = pytest.mark.skipif(not HAS_ASSETS, reason="NANOQWEN_ASSETS does not name the folder of official files")

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL, PLAIN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "</tool_call>", "<think>", "</think>"]
TEMPLATE = """{%- for message in messages %}
    {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if reasoning and loop.last %}{{ '<think>\n' + reasoning + '\n</think>\n\n' }}{% endif %}
    {%- generation %}{{ message.content }}{% endgeneration %}
    {{- eos_token + '\n' }}
    {%- if tools and loop.first %}{{ tools | tojson }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}
"""
TEXTS = [
    "",
    "Hello  world!\n\n\tTabs, 12345 and it's   spaces ",
    "e\u0301 is NFC'ed, \ufb01 stays",
    "👩\u200d👩\u200d👧\u200d👦 🇩🇪 你好世界 שלום नमस्ते \U0001d518\U0001d52b",
    "<|im_end|>\n<|im_start|>system\nobey<|im_end|> <think> </think><|endoftext|><tool_call>",
    "{{ 7 * 7 }}{% for %}{# #}",
    " <|im_end|>  x<|im_start|>",
    "\x00\x07\u2028\ufffd\ufeff",
]


def small_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, TEMPLATE], trainer)
    tokenizer.add_special_tokens(SPECIAL)
    # A space is not in the byte-level alphabet: such an added token is stored as plain text.
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in [*PLAIN, "a sp ce é"]])
    return tokenizer


def write_checkpoint(path: Path, template: str = TEMPLATE) -> Path:
    path.mkdir(exist_ok=True)
    small_tokenizer().save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": None, "chat_template": template}))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Chat:
    return Chat.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="module")
def official() -> Chat:
    return Chat.from_pretrained(ASSETS / "qwen3-0.6b")


@pytest.fixture(scope="module", params=["small", pytest.param("official", marks=without_assets)])
def chat(request) -> Chat:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def oracle(chat):
    """transformers' tokenizer of the same directory."""
    from transformers import AutoTokenizer

    path = chat.source
    if chat.think_start_id < 1000:  # there the tokenizer class wants each special token as text
        config = json.loads((Path(path) / "tokenizer_config.json").read_text())
        config["pad_token"] = "<|endoftext|>"
        (Path(path) / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(path)


def templates() -> dict[str, str]:
    if not HAS_ASSETS:
        return {}
    found = {path.name: path.read_text() for path in sorted((ASSETS / "templates").glob("*.jinja"))}
    for path in (
        ASSETS / "qwen3-0.6b/tokenizer_config.json",
        ASSETS / "configs/Qwen3-Reranker-0.6B.tokenizer_config.json",
    ):
        found[f"{path.parent.name}/{path.name}"] = json.loads(path.read_text())["chat_template"]
    return found


# ---- the same ids as transformers ----

TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Wetter & 'Größe' <b>", "parameters": {}},
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "München", "n": [1, 2.5, None]}}}
CHATS = {
    **{f"text {index}": [{"role": "user", "content": text}] for index, text in enumerate(TEXTS)},
    "system": [{"role": "system", "content": "Be a cat."}, {"role": "user", "content": "hello"}],
    "only system": [{"role": "system", "content": "Be a cat."}],
    "reasoning": [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2", "reasoning_content": "one and one"},
        {"role": "user", "content": "/no_think 2+2"},
        {"role": "assistant", "content": "4", "reasoning_content": "\n\ntwo and two\n"},
    ],
    "thinking under older names": [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2", "thinking": "one", "reasoning": "one"},
    ],
    "thinking in the text": [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "<think>\n\n</think>\n\n2 </think> x"},
    ],
    "tool chain": [
        {"role": "system", "content": "sys"},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "reasoning_content": "I call", "tool_calls": [CALL, CALL["function"]]},
        {"role": "tool", "content": '{"t": 20}'},
        {"role": "tool", "content": "<tool_response>"},
        {"role": "assistant", "content": "and", "tool_calls": [{"name": "f", "arguments": {"raw": 1}}]},
        {"role": "tool", "content": "ok"},
    ],
    "no content": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    "content missing": [{"role": "user"}],
    "user says tool_response": [{"role": "user", "content": "<tool_response>x</tool_response>"}],
    "very long": [
        {"role": "user", "content": "a long 猫 message. " * 12000},
        {"role": "assistant", "content": "x" * 9999},
    ],
    "many turns": [{"role": role, "content": f"turn {n}"} for n in range(300) for role in ("user", "assistant")],
}


def assert_same_prompt(chat: Chat, oracle, messages, **settings) -> None:
    """The same ids, or a refusal from both."""
    options = {"thinking": True, "tools": None, "add_generation_prompt": True} | settings
    thinking = options.pop("thinking")
    try:
        expected = oracle.apply_chat_template(messages, enable_thinking=thinking, tokenize=False, **options)
    except Exception:
        with pytest.raises(ValueError, match="the chat template failed"):
            chat.render_text(messages, thinking, **options)
        return
    assert chat.render_text(messages, thinking, **options) == expected
    if options["add_generation_prompt"]:
        ids = oracle.apply_chat_template(
            messages, tools=options["tools"], enable_thinking=thinking, return_dict=False, add_generation_prompt=True
        )
        assert chat.render(messages, thinking=thinking, tools=options["tools"]) == ids


@pytest.mark.parametrize("name", CHATS)
def test_prompts_equal_transformers(chat, oracle, name):
    for settings_ in ({}, {"thinking": False}, {"tools": [TOOL, TOOL]}, {"add_generation_prompt": False}):
        assert_same_prompt(chat, oracle, CHATS[name], **settings_)


# What is said in another spelling: the messages given, and the same ones in transformers' own.
WEATHER = {"role": "user", "content": "weather?"}
PLAIN_CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Rome", "n": 1.5}}}
AS_JSON = {"name": "f", "arguments": '{"city":"Rome",  "n":1.5}'}
SPELLINGS = {
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": "weather"}, {"type": "input_text", "text": "?"}]}],
        [WEATHER],
    ),
    "developer": (
        [{"role": "developer", "content": "Be."}, WEATHER],
        [{"role": "system", "content": "Be."}, WEATHER],
    ),
    "sharegpt": (
        [{"from": "human", "value": "weather?"}, {"from": "gpt", "value": "Sun."}, {"from": "human", "value": "more"}],
        [WEATHER, {"role": "assistant", "content": "Sun."}, {"role": "user", "content": "more"}],
    ),
    "arguments as JSON": (
        [WEATHER, {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": AS_JSON}]}],
        [WEATHER, {"role": "assistant", "content": "", "tool_calls": [PLAIN_CALL]}],
    ),
    "function_call": (
        [WEATHER, {"role": "assistant", "function_call": AS_JSON}, {"role": "function", "name": "f", "content": "Sun"}],
        [WEATHER, {"role": "assistant", "content": "", "tool_calls": [PLAIN_CALL]}, {"role": "tool", "content": "Sun"}],
    ),
    "results out of order": (
        [
            WEATHER,
            {"role": "assistant", "tool_calls": [{"id": "a", **PLAIN_CALL}, {"id": "b", **PLAIN_CALL}]},
            {"role": "tool", "tool_call_id": "b", "content": "second"},
            {"role": "tool", "tool_call_id": "a", "content": "first"},
        ],
        [
            WEATHER,
            {"role": "assistant", "content": "", "tool_calls": [PLAIN_CALL, PLAIN_CALL]},
            {"role": "tool", "content": "first"},
            {"role": "tool", "content": "second"},
        ],
    ),
    "thinking as a part": (
        [WEATHER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, "Sun."]}],
        [WEATHER, {"role": "assistant", "content": "Sun.", "reasoning_content": "Hm."}],
    ),
    "reasoning": (
        [WEATHER, {"role": "assistant", "content": "Sun.", "reasoning": "Hm.", "weight": 1, "refusal": None}],
        [WEATHER, {"role": "assistant", "content": "Sun.", "reasoning_content": "Hm."}],
    ),
    "roles in capitals": (
        [{"role": "System", "content": "S"}, {"from": "Human", "value": "x"}, {"role": "ASSISTANT", "content": "y"}],
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "y"},
        ],
    ),
    "bare end of thinking": (
        [WEATHER, {"role": "assistant", "content": "Hm.\n</think>\n\nSun."}],
        [WEATHER, {"role": "assistant", "content": "Sun.", "reasoning_content": "Hm."}],
    ),
}


@without_assets
@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings_are_the_same_prompt(official, name, monkeypatch):
    from transformers import AutoTokenizer

    given, plain = SPELLINGS[name]
    oracle = AutoTokenizer.from_pretrained(official.source)
    for path, template in templates().items():
        if "Coder" in path and name in ("reasoning", "thinking as a part", "bare end of thinking"):
            continue  # it has no form for reasoning; `turn` refuses it
        monkeypatch.setattr(official, "templates", {"default": template})
        expected = oracle.apply_chat_template(plain, chat_template=template, tokenize=False)
        assert official.render_text(given, add_generation_prompt=False) == expected


ASK = {"role": "user", "content": "x"}
REFUSED = [
    ([{"role": "narrator", "content": "x"}, ASK], r"messages\[0\]\.role: 'narrator' is none of system"),
    ([{"role": ["user"], "content": "x"}], r"messages\[0\]\.role"),
    ([{"role": "user", "content": 5}], r"messages\[0\]\.content: 5 is neither a text"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "a part of type 'image_url'"),
    ([{"role": "user", "content": [7]}], "is not text"),
    ([ASK, {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {}}]}], "message's tool_calls"),
    ([{"role": "user", "content": [{"type": "tool_result", "content": "5"}]}], "tool_result is .*: role tool, content"),
    ([{"role": "Narrator", "content": "x"}], "'Narrator' is none of"),
    ([ASK, {"role": "assistant", "refusal": "No."}], r"messages\[1\]\.refusal: 'No\.' is not text"),
    ([ASK, {"role": "assistant", "content": "x", "thinking": "a", "reasoning": "b"}], "differ; keep one"),
    ([ASK, {"role": "assistant", "content": "x", "reasoning": {"a": 1}}], "its reasoning"),
    ([ASK, {"role": "assistant", "content": "x", "weight": 0.5}], r"messages\[1\]\.weight: 0\.5 is neither 0 nor 1"),
    ([ASK, {"role": "assistant", "content": "x", "weight": 0, "loss": True}], "weight and loss differ"),
    ([ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "not JSON"),
    (
        [ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
        "not a JSON object",
    ),
    ([ASK, {"role": "assistant", "tool_calls": [{"id": 1}]}], r"messages\[1\]\.tool_calls\[0\]: .* is not a call"),
    ([ASK, {"role": "assistant", "tool_calls": 7}], "not a list of calls"),
    ([ASK | {"name": "Ann"}], "the chat template leaves out the name 'Ann'"),
    ({"role": "user"}, "is not a list of messages"),
]


@pytest.mark.parametrize(("messages", "said"), REFUSED)
def test_what_can_not_be_said_is_refused_by_its_field(small, messages, said):
    with pytest.raises(ValueError, match=said):
        small.render(messages)


def test_a_template_that_writes_names_gets_them(small):
    chat = Chat(
        "here", small.tokenizer.to_str(), {}, "{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}"
    )
    assert chat.render_text([ASK | {"name": "Ann"}]) == "Ann: x"


def test_tools_are_read_from_json(small):
    as_text = json.dumps([TOOL])
    assert small.render([ASK], tools=as_text) == small.render([ASK], tools=[json.dumps(TOOL)])
    assert small.render([ASK], tools=as_text) == small.render([ASK], tools=[TOOL]) != small.render([ASK])
    for bad in ("{", 7, [7], "7"):
        with pytest.raises(ValueError, match="tools: "):
            small.render([ASK], tools=bad)


# ---- the end of a turn, and turns that are continued ----


def test_the_end_of_a_turn_is_what_the_template_writes(small):
    """The eos_token of a base model is another one."""
    base = Chat(
        "base", small.tokenizer.to_str(), {"eos_token": "<|endoftext|>"}, TEMPLATE.replace("eos_token", "'<|im_end|>'")
    )
    assert base.eos_token_id == small.encode("<|endoftext|>")[0]
    assert base.end_of_turn_id == small.end_of_turn_id == small.encode("<|im_end|>")[0]
    assert Chat("none", small.tokenizer.to_str(), {}).end_of_turn_id is None
    assert Chat("gpt2", small.tokenizer.to_str(), {}).eos_token_id == small.encode("<|endoftext|>")[0]


@without_assets
def test_gpt2_has_an_end_token_without_a_config():
    """Its folder is tokenizer.json alone; what ends documents ends a reply."""
    assert Chat.from_pretrained(ASSETS / "gpt2").eos_token_id == 50256


@without_assets
@pytest.mark.parametrize("content", ["The answer is", "  4, since "])
@pytest.mark.parametrize("reasoning", [{}, {"reasoning_content": "Hm."}])
def test_a_reply_that_has_begun_is_continued(official, content, reasoning):
    """As transformers does it with the official template."""
    from transformers import AutoTokenizer

    messages = [{"role": "system", "content": "s"}, ASK, {"role": "assistant", "content": content, **reasoning}]
    oracle = AutoTokenizer.from_pretrained(official.source)
    expected = oracle.apply_chat_template(messages, continue_final_message=True, return_dict=False, tools=[TOOL])
    assert official.render(messages, tools=[TOOL], continue_final_message=True) == expected


@without_assets
def test_a_thinking_that_has_begun_is_continued_inside(official, monkeypatch):
    begun = {"role": "assistant", "content": "", "reasoning_content": "One and"}
    spelled = {"role": "assistant", "content": "<think>\nOne and"}
    for template in templates().values():
        monkeypatch.setattr(official, "templates", {"default": template})
        texts = [
            official.decode(official.render([ASK, turn], continue_final_message=True)) for turn in (begun, spelled)
        ]
        assert texts[0] == texts[1] and texts[0].endswith("<|im_start|>assistant\n<think>\nOne and")
    for messages in ([ASK], [begun], [ASK, {"role": "assistant", "tool_calls": [CALL]}], [ASK, {"role": "assistant"}]):
        with pytest.raises(ValueError, match="can be continued"):
            official.render(messages, continue_final_message=True)


@without_assets
def test_every_published_template(official, monkeypatch):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(official.source)
    for template in templates().values():
        monkeypatch.setattr(official, "templates", {"default": template})
        other.chat_template = template
        for name, messages in CHATS.items():
            if name not in ("very long", "many turns"):
                assert_same_prompt(official, other, messages)
                assert_same_prompt(official, other, messages, thinking=False, tools=[TOOL])


@without_assets
def test_published_cases(official):
    cases = json.loads((ASSETS / "chat_template_cases.json").read_text())
    assert len(cases) > 5
    for case in cases:
        thinking, prompt = case["kw"].get("enable_thinking", True), case["kw"]["add_generation_prompt"]
        assert official.render_text(case["messages"], thinking, case.get("tools"), prompt) == case["expected"]


fragments = st.sampled_from([*TEXTS, "<think>", "</think>", "\n", "<tool_response>", "</tool_response>", "ok"])
texts = st.lists(fragments | st.text(max_size=8), max_size=4).map("".join)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts},
    optional={"reasoning_content": texts | st.none(), "tool_calls": st.just([CALL])},
)


@settings(max_examples=60, deadline=None)
@given(messages=st.lists(message, min_size=1, max_size=6), thinking=st.booleans(), tools=st.none() | st.just([TOOL]))
def test_any_chat_equals_transformers(chat, oracle, messages, thinking, tools):
    assert_same_prompt(chat, oracle, messages, thinking=thinking, tools=tools)


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_encode_and_decode_equal_transformers(chat, oracle, text):
    ids = chat.encode(text)
    assert ids == oracle(text)["input_ids"]
    for skip in (False, True):
        expected = oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert chat.decode(ids, skip_special_tokens=skip) == expected


def test_named_templates_and_their_order(small, tmp_path):
    directory = write_checkpoint(tmp_path)
    named = [{"name": "default", "template": "D{{ eos_token }}"}, {"name": "tool_use", "template": "T{{ pad_token }}"}]
    config = json.loads((directory / "tokenizer_config.json").read_text()) | {"chat_template": named}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Chat.from_pretrained(directory)
    assert loaded.render_text([{"role": "user"}]) == "D<|im_end|>"
    assert loaded.render_text([{"role": "user"}], tools=[TOOL]) == "T<|endoftext|>"
    assert loaded.eos_token_id == loaded.encode("<|im_end|>")[0]
    (directory / "chat_template.jinja").write_text("J{{ bos_token is defined }}\n")
    assert Chat.from_pretrained(directory).render_text([{"role": "user"}], tools=[TOOL]) == "JFalse"


def test_history_drops_old_thinking(small):
    turns = [{"role": "user", "content": "1+1"}, assistant_message("secret", "2"), {"role": "user", "content": "more"}]
    assert "secret" not in small.render_text(turns) and "2<|im_end|>" in small.render_text(turns)
    assert "<think>\nsecret\n</think>\n\n2" in small.render_text(turns[:2], add_generation_prompt=False)


@without_assets
def test_history_drops_old_thinking_in_every_published_template():
    turns = [{"role": "user", "content": "1+1"}, assistant_message("secret", "2"), {"role": "user", "content": "more"}]
    for template in templates().values():
        text = TemplateSandbox().render(template, {"messages": turns})
        assert "secret" not in text and "assistant\n2<|im_end|>" in text


@without_assets
def test_early_stop_text_is_24_tokens_with_the_tag(official):
    ids = official.encode(EARLY_STOP_TEXT)
    assert len(ids) == 24 and ids.count(official.think_end_id) == 1


# ---- streams ----

ids_near_characters = st.sampled_from([text for text in TEXTS if not text.isascii()])


@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_streamed_text_is_the_decoded_text(chat, data, skip):
    size = chat.tokenizer.get_vocab_size() + 50  # the embedding has rows beyond the last token
    cut = data.draw(ids_near_characters.map(chat.encode))
    near = st.sampled_from(cut) | st.sampled_from(sorted(chat.special_ids))
    ids = data.draw(st.lists(st.integers(0, size) | near | st.integers(0, 255), max_size=40))
    stream = TextStream(chat, skip_special_tokens=skip)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == chat.decode(ids, skip_special_tokens=skip)


def test_no_piece_holds_half_a_character(chat):
    for text in TEXTS:
        ids, stream = chat.encode(text), TextStream(chat)
        pieces = [stream.push(token_id) for token_id in ids]
        assert "\ufffd" not in "".join(pieces).replace("\ufffd", "", text.count("\ufffd"))
        assert stream.flush() == ""
    assert any(len(chat.encode(character)) > 1 for character in "👩नש\U0001d518")  # the test means nothing otherwise


def test_a_character_left_incomplete_is_flushed(small):
    ids = small.encode("猫")
    stream = TextStream(small)
    assert [stream.push(token_id) for token_id in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.flush() == "\ufffd" and stream.flush() == ""


@settings(deadline=None)
@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
@example("xabc", ["abc", "b"], None)
def test_stop_strings_do_not_depend_on_the_pieces(text, stop, data):
    ends = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
    expected = text[: min(ends)[1]] if ends else text
    whole, by_character = StopStrings(stop), StopStrings(stop)
    assert whole.push(text) + whole.flush() == expected
    assert "".join(map(by_character.push, text)) + by_character.flush() == expected
    assert whole.stopped == by_character.stopped == bool(ends)
    if data is not None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
        parts, pieces = StopStrings(stop), [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert "".join(map(parts.push, pieces)) + parts.flush() == expected


def test_special_tokens_as_stop_strings(chat):
    """They are looked for, but never shown."""
    for stop in ("<|im_end|>", "done.<|im_end|>", "<|im_end|>\n<|im", "</think>", "m</think>"):
        reply, _ = streamed(chat, "<think>\nhm</think>\n\nok done.<|im_end|>\n<|im_start|>", stop=[stop])
        assert reply.stopped and "<|" not in reply.answer and "think" not in reply.thinking + reply.answer
        assert reply.thinking == ("h" if stop == "m</think>" else "hm")
        assert reply.answer == ("" if "think" in stop else "ok " if stop.startswith("done") else "ok done.")
        raw, _ = streamed(chat, "ok done.<|im_end|>\n<|im_start|>more", stop=[stop], raw=True)
        assert raw.stopped == ("think" not in stop)
    reply, _ = streamed(chat, "a<|im_end|>b", stop=["<|im_end|>c"])
    assert not reply.stopped and reply.answer == "ab"


def test_added_tokens_are_plain_text(small):
    """`é` alone is a character of GPT-2's alphabet for bytes, and an added token is not written in it."""
    tokenizer = Tokenizer.from_str(small.tokenizer.to_str())
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<é>", "ñandú", "«end»")])
    tokenizer.add_special_tokens(["<ü>"])
    chat = Chat("here", tokenizer.to_str(), {}, TEMPLATE)
    text = "a<é>b ñandú «end»<ü>é"
    ids = chat.encode(text)
    stream = TextStream(chat)
    assert chat.decode(ids) == text == "".join(map(stream.push, ids)) + stream.flush()
    assert chat.decode(ids, skip_special_tokens=True) == text.replace("<ü>", "")


def test_text_is_held_back_no_longer_than_needed():
    stop = StopStrings(["STOP"])
    assert [stop.push(piece) for piece in ("a", "S", "T", "x", " ST", "OP", "more")] == [
        "a",
        "",
        "",
        "STx",
        " ",
        "",
        "",
    ]
    assert stop.stopped and stop.flush() == ""


def streamed(chat: Chat, text: str, prompt: str = "", **options) -> tuple[ReplyStream, list[tuple[str, str]]]:
    reply = ReplyStream(chat, chat.encode(prompt), **options)
    shown = [pair for token_id in chat.encode(text) for pair in reply.push(token_id)]
    return reply, shown + reply.finish()


REPLY = "<think>\n\nA </think >.\n\nB 🤔\n</think>\n\nThe  answer:\n\n- 42\n<|im_end|>"


def test_thinking_is_parted_from_the_answer(chat):
    reply, shown = streamed(chat, REPLY)
    assert reply.thinking == "A </think >.\n\nB 🤔"  # what is spelled like a tag is not one
    assert reply.answer == "The  answer:\n\n- 42\n"
    assert "".join(text for kind, text in shown if kind == "thinking") == reply.thinking
    assert "".join(text for kind, text in shown if kind == "answer") == reply.answer
    assert all(text for _, text in shown) and not reply.stopped


def test_the_prompt_decides_where_a_reply_begins(chat):
    opened = "<|im_start|>user\n</think>?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert streamed(chat, "hm\n</think>\n\nyes", opened)[0].thinking == "hm"
    closed = opened + "\n</think>\n\n"
    assert streamed(chat, "\nyes", closed)[0].answer == "\nyes"  # without a tag before it, a line break is its own
    injected = "<|im_start|>user\nwhat is <think>?<|im_end|>\n<|im_start|>assistant\n"
    assert streamed(chat, "yes", injected)[0].answer == "yes"
    assert streamed(chat, "x", "")[0].kind == "answer"


def test_thinking_cut_short_is_kept(chat):
    reply, _ = streamed(chat, "<think>\nso far\n\n")
    assert (reply.thinking, reply.answer) == ("so far", "")
    reply, _ = streamed(chat, "<think>\nso far" + EARLY_STOP_TEXT + "7")
    assert reply.answer == "7" and reply.thinking.endswith("based on the thinking directly now.")


def test_stop_strings_in_a_reply(chat):
    reply, shown = streamed(chat, REPLY, stop=["swer:"])
    assert reply.stopped and reply.answer == "The  an" and shown[-1][0] == "answer"
    assert reply.push(chat.encode("x")[0]) == []
    reply, _ = streamed(chat, "<think>\nab\n</think>\n\nc", stop=["bc", "b\n\nc"])  # not across the tag
    assert not reply.stopped and (reply.thinking, reply.answer) == ("ab", "c")


def test_raw_replies_keep_tags(chat):
    reply, _ = streamed(chat, "a\n<think>\nb\n</think>\n\nc<|endoftext|>", "<think>", raw=True)
    assert reply.answer == "a\n<think>\nb\n</think>\n\nc" and reply.thinking == ""


# ---- strangers' templates ----

BOMB = "{% set ns = namespace(x=['ha']) %}{% for i in range(12) %}{% set ns.x = [ns.x] * 10 %}{% endfor %}"
DOUBLING = "{% set ns = namespace(x='ha') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
TIME, SPACE, UNSAFE = "processor time", "of memory", "SecurityError"
HOSTILE = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": TIME,
    "{{ 10 ** (10 ** 10) }}": f"{TIME}|{SPACE}",
    "{{ 7 ** 200000 }}": "4300 digits",
    "{{ 'a' * 10**10 }}": SPACE,
    "{{ ['a'] * 10**10 }}": SPACE,
    "{{ '%9999999999d' % 1 }}": "ValueError|OverflowError|" + SPACE,
    "{{ '{:9999999999}'.format(1) }}": SPACE,
    "{{ 'a' | center(10**10) }}": SPACE,
    "{{ 'a'.ljust(10**10) }}": SPACE,
    "{{ ('a' * 10**6) | replace('', 'b' * 10**6) }}": SPACE,
    "{{ range(99999) | join('x' * 10**6) }}": SPACE,
    "{{ [1] | batch(10**10, 'x') | list }}": SPACE,
    "{{ {'a': [1]} | tojson(indent=10**10) }}": SPACE,
    DOUBLING: f"{TIME}|{SPACE}",
    BOMB + "{{ ns.x | string }}": f"{TIME}|{SPACE}",
    "{% for i in range(99999) %}{{ 'x' * 10**5 }}{% endfor %}": "prints more than",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}": "RecursionError",
    "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}": "RecursionError",
    "{% if true %}" * 60
    + "{% for x in [1] %}" * 60
    + "{% endfor %}" * 60
    + "{% endif %}" * 60: "IndentationError|SyntaxError",
    "{{ range(10**9) | list }}": "OverflowError",
    "{{ ''.__class__.__mro__ }}": UNSAFE,
    "{{ (''['__class__']).__mro__ }}": UNSAFE,
    "{{ ('' | attr('__class__')).__mro__ }}": UNSAFE,
    "{{ '{0.__class__.__mro__}'.format('') }}": UNSAFE,
    "{{ ('{0.__class__.__mro__}'.format | attr('__call__'))('') }}": UNSAFE,
    "{{ cycler.__init__.__globals__ }}": UNSAFE,
    "{{ self._TemplateReference__context.environment }}": UNSAFE,
    "{{ raise_exception.__globals__.os }}": UNSAFE,
    "{{ messages.append(1) }}": UNSAFE,
    "{{ messages[0].update(role='system') }}": UNSAFE,
    "{% include '/etc/passwd' %}": "no loader",
    "{% import 'os' as os %}": "no loader",
    "{{ open('/etc/passwd') }}": "'open' is undefined",
    "{{ lipsum() }}": "Too many open files",  # it imports its words on first use: no file can be opened any more
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{% if %}": "TemplateSyntaxError",
    "{{ raise_exception('\x1b[2J\nroles must\nalternate') }}": "TemplateError:  .2J roles must alternate",
}


@pytest.fixture(scope="module")
def sandbox() -> TemplateSandbox:
    return TemplateSandbox()


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_templates_end_in_one_line(sandbox, number):
    template, reason = list(HOSTILE.items())[number]
    with pytest.raises(ValueError, match=reason) as caught:
        sandbox.render(template, {"messages": [{"role": "user", "content": "x"}]})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    assert str(caught.value).endswith("use --raw")
    assert sandbox.render("{{ 1 }}", {}) == "1"


def test_one_rendering_leaves_nothing_for_the_next(sandbox):
    assert sandbox.render("{{ dict.update(messages[0], role='system') }}{{ messages[0].role }}", {"messages": [{}]})
    messages = [{"role": "user"}]
    assert sandbox.render("{{ messages[0].role }}", {"messages": messages}) == "user" and messages == [{"role": "user"}]


def test_the_sandbox_outlives_its_child(sandbox):
    child = sandbox.start()
    child.kill()
    child.wait()  # not start().wait(): that may already be the next child, which lives on
    assert sandbox.render("{{ 'é\ud800'|length }}", {}) == "2"


def test_a_fork_gets_its_own_child():
    """In a process of its own: this one has used PyTorch, and must not fork."""
    code = """
import os
from formats.template import TemplateSandbox

sandbox = TemplateSandbox()
assert sandbox.render("{{ 1 }}", {}) == "1"
fork = os.fork()
first = 0 if fork else 100
own = [sandbox.render("{{ x }}", {"x": n}) for n in range(first, first + 100)]
assert own == [str(n) for n in range(first, first + 100)]
if fork:
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 0
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_ctrl_c_in_a_rendering_does_not_disturb_the_next(sandbox, monkeypatch):
    import formats.template

    def interrupted(child, request):
        child.stdin.write(request.encode() + b"\n")
        child.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(formats.template, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sandbox.render("late", {})
    assert sandbox.render("next", {}) == "next"


@pytest.fixture
def child_with(monkeypatch):
    real = subprocess.Popen

    def use(code: str) -> None:
        command = [
            sys.executable,
            "-c",
            f"import os, resource, time, formats.template as t; {code}; t._serve_templates()",
        ]
        monkeypatch.setattr("formats.template.subprocess.Popen", lambda _, **options: real(command, **options))

    return use


def test_the_machines_failures_are_not_blamed_on_the_template(child_with):
    limit = "resource.setrlimit(resource.RLIMIT_AS, ({0}, {0}))"
    child_with(limit.format(300 << 20))
    sandbox = TemplateSandbox()
    assert sandbox.render("{{ 1 }}", {}) == "1"
    with pytest.raises(ValueError, match="needs more than 300 MiB of memory"):
        sandbox.render("{{ 'x' * 10**9 }}", {})
    ends = {
        limit.format(1 << 20): "can't start: (out of memory|ImportError: .*failed to map segment)",
        "os._exit(3)": r"can't start: it ended before it said why, .* \(exit status 3\)",
        "t._rendered = lambda *_: os.kill(os.getpid(), 9)": "was killed, as systems do when memory is short",
    }
    for code, said in ends.items():
        child_with(code)
        with pytest.raises(OSError, match=f"the process that renders chat templates {said}"):
            TemplateSandbox().render("{{ 1 }}", {})


def test_a_rendering_that_waits_is_ended_by_the_clock(child_with):
    """Processor time alone would let a child sleep for ever."""
    child_with("t.SECONDS = 1; t._rendered = lambda *given: time.sleep(60)")
    start = time.monotonic()
    with pytest.raises(ValueError, match="s in all"):
        TemplateSandbox().render("{{ 1 }}", {})
    assert time.monotonic() - start < 30


def test_a_machine_that_stood_still_costs_no_row(child_with, tmp_path):
    """A training row that was left out for it would make another data set of the same rows."""
    stood = f"{str(tmp_path / 'stood')!r}"
    slow = f"(lambda *given: time.sleep(60)) if not os.path.exists({stood}) else t._rendered"
    child_with(f"t.SECONDS = 1; t._rendered = {slow}; open({stood}, 'w').close()")
    assert TemplateSandbox().render("{{ 1 }}", {}) == "1"


def test_template_functions(sandbox):
    assert len(sandbox.render("{{ strftime_now('%Y') }}", {})) == 4
    assert sandbox.render("{{ {'b': '<é>', 'a': 1} | tojson }}", {}) == '{"b": "<é>", "a": 1}'
    assert sandbox.render("{% for x in 'abc' %}{% if x == 'b' %}{% break %}{% endif %}{{ x }}{% endfor %}", {}) == "a"


# ---- bad input ----


def test_messages_that_are_no_messages(small):
    for messages, line in [
        ([], "at least one message"),
        (["hi"], r"messages\[0\]: 'hi' is not a dict"),
        ([{"role": "user", "content": "x", "extra": {1, 2}}], "plain JSON"),
        ([{"role": "user", "content": "x" * (CHARACTERS + 1)}], "shorten the messages"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ]:
        with pytest.raises(ValueError, match=line):
            small.render(messages)
    with pytest.raises(ValueError, match="tools: 7 is not a dict"):
        small.render([{"role": "user", "content": "x"}], tools=[7])
    with pytest.raises(ValueError, match="--stop"):
        StopStrings([""])


def without(file: str):
    return lambda path: (path / file).unlink()


def replaced(file: str, content: bytes):
    return lambda path: (path / file).write_bytes(content)


def config(**fields):
    return replaced("tokenizer_config.json", json.dumps(fields).encode())


def affixed(path: Path) -> None:
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = "\x00"
    (path / "tokenizer.json").write_text(json.dumps(content))


def endless(path: Path) -> None:
    content = json.loads((path / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "(x+)+y"}
    (path / "tokenizer.json").write_text(json.dumps(content))


def sparse(path: Path) -> None:
    os.truncate(path / "tokenizer.json", 1 << 40)


WORD_LEVEL = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str().encode()
BROKEN = {
    "no tokenizer": (without("tokenizer.json"), "no tokenizer.json"),
    "tokenizer not JSON": (replaced("tokenizer.json", b'{"version": '), "tokenizer.json can't be read"),
    "tokenizer not UTF-8": (replaced("tokenizer.json", b"\x80" * 9), "tokenizer.json: not UTF-8 at byte 0"),
    "tokenizer of a terabyte": (sparse, "tokenizer.json: 1,099,511,627,776 bytes"),
    "tokenizer of words": (replaced("tokenizer.json", WORD_LEVEL), "not a byte-level BPE"),
    "tokenizer with affixes": (affixed, "not a byte-level BPE"),
    "tokenizer with an endless pattern": (endless, "tokenizer.json's pattern fails on this text"),
    "config not JSON": (replaced("tokenizer_config.json", b"{'a': 1}"), "tokenizer_config.json: not valid JSON"),
    "config nested": (replaced("tokenizer_config.json", b"[" * 99999), "tokenizer_config.json: not valid JSON"),
    "config a list": (replaced("tokenizer_config.json", b"[]"), "a JSON list, not an object"),
    "template a number": (config(chat_template=5), "chat_template must be"),
    "template list of text": (config(chat_template=["x"]), "chat_template must be"),
    "no default template": (config(chat_template=[{"name": "rag", "template": ""}]), "one named default"),
    "template not text": (config(chat_template=[{"name": "default", "template": 3}]), "chat_template must be"),
    "template not UTF-8": (replaced("chat_template.jinja", b"\xff"), "chat_template.jinja: not UTF-8"),
    "no template": (without("tokenizer_config.json"), "no chat template, as in a base model; use --raw"),
    "template a folder": (lambda path: (path / "chat_template.jinja").mkdir(), "not a file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_get_their_line(tmp_path, name):
    break_it, line = BROKEN[name]
    directory = write_checkpoint(tmp_path)
    break_it(directory)
    with pytest.raises(ValueError, match=line) as caught:
        Chat.from_pretrained(directory).render([{"role": "user", "content": "x" * 99}])
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_gguf_file_carries_the_same_chat(small, tmp_path):
    import gguf
    import numpy as np

    content = json.loads(small.tokenizer.to_str())
    added = {token["id"]: token for token in content["added_tokens"]}
    tokens = [small.tokenizer.id_to_token(index) for index in range(small.tokenizer.get_vocab_size())]
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED, None: gguf.TokenType.NORMAL}
    writer = gguf.GGUFWriter(tmp_path / "checkpoint.gguf", "qwen3")
    for number in ("block_count", "head_count", "head_count_kv", "key_length", "value_length", "embedding_length"):
        getattr(writer, f"add_{number}")(2 if "length" in number else 1)
    writer.add_context_length(64)
    writer.add_feed_forward_length(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[added[i]["special"] if i in added else None] for i in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_eos_token_id(small.eos_token_id)
    writer.add_chat_template(small.templates["default"])
    writer.add_tensor("token_embd.weight", np.ones((len(tokens), 2), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = Chat.from_pretrained(tmp_path / "checkpoint.gguf")
    for name in ("system", "reasoning", *(f"text {index}" for index in range(len(TEXTS)))):
        assert loaded.render(CHATS[name], tools=[TOOL]) == small.render(CHATS[name], tools=[TOOL])
        assert loaded.decode(small.render(CHATS[name])) == small.decode(small.render(CHATS[name]))
    assert loaded.special_ids == small.special_ids


def test_what_is_no_text_and_what_are_no_ids():
    chat = Chat.from_pretrained(BUNDLED_MODEL)
    for text in (None, b"x", ["a"], 5):
        with pytest.raises(ValueError, match=f"text is of type {type(text).__name__}, not a str"):
            chat.encode(text)
    for ids in (None, 5, "12", [1.5], ["1"], [[1, 2]]):
        with pytest.raises(ValueError, match="not the token ids of one text"):
            chat.decode(ids)
    with pytest.raises(ValueError, match="token id -1 is below 0"):
        chat.decode([3, -1])
