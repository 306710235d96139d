"""Rows of other people's data: their shapes, what of them is learnt, and bad ones."""

import contextlib
import gzip
import json
import os
from pathlib import Path

import pytest

import data.documents
from chat import Chat
from data.conversations import (
    ABOUT,
    ANSWERED,
    ASKED,
    DIALOGUES,
    TRANSCRIPTS,
    conversation,
    preference,
    prompt,
    question,
)
from data.last_number import last_number, true_number
from data.sources import IGNORED, Listed, Pair, Row, WrittenRows, read_items, records
from formats.messages import REASONING

ROOT = Path(__file__).parent.parent.parent
BESIDE = ("system", "system_prompt", "tools", "functions", "chat_template_kwargs", "enable_thinking", "history")
FIELDS = {*DIALOGUES, *TRANSCRIPTS, *ASKED, *ABOUT, *ANSWERED, *BESIDE, *REASONING}
FIELDS |= {"chosen", "rejected", "label", "weight", "answers"}
ASK, TELL = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
BE = {"role": "system", "content": "Be."}
AGAIN, BYE = {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Goodbye!"}


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat.from_pretrained(ROOT / "models" / "tiny")


# --- shapes ---


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [ASK, TELL], "prompt_id": "x"}, [ASK, TELL]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}, [ASK, TELL]),
        ({"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}]}, [ASK, TELL]),
        ({"messages": None, "conversations": [ASK, TELL], "system": "Be."}, [BE, ASK, TELL]),
        ({"system_prompt": "Be.", "question": "Hi", "response": "Hello!"}, [BE, ASK, TELL]),
        ({"prompt": [ASK], "completion": [TELL]}, [ASK, TELL]),
        ({"messages": [ASK], "completion": "Hello!"}, [ASK, TELL]),
        ({"conversations": [ASK, TELL, AGAIN], "response": BYE}, [ASK, TELL | {"weight": 0}, AGAIN, BYE]),
        ({"messages": [ASK, TELL], "question": "Why?", "answer": "So."}, [ASK, TELL]),
        ({"conversations": ["Hi", "Hello!", "Bye"], "source": "x"}, [ASK, TELL]),  # LIMA
        (  # XTuner's
            {
                "conversation": [
                    {"system": "Be.", "input": "Hi", "output": "Hello!", "output_with_loss": False},
                    {"input": "Bye", "output": "Goodbye!"},
                ]
            },
            [BE, ASK, TELL | {"weight": 0}, AGAIN, BYE],
        ),
        ({"messages": json.dumps([ASK, TELL])}, [ASK, TELL]),
        ({"messages": [ASK, TELL, AGAIN, BYE | {"masked": True}]}, [ASK, TELL]),
        ({"messages": [ASK, TELL | {"masked": False}]}, [ASK, TELL | {"weight": 1}]),
        ({"messages": [ASK, TELL | {"learn": 0}]}, None),
        ({"prompt": ASK, "completion": TELL}, [ASK, TELL]),
        ({"prompt": [ASK, TELL, AGAIN], "completion": [BYE]}, [ASK, TELL | {"weight": 0}, AGAIN, BYE]),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " Hello!"}, [ASK, TELL]),
        ({"prompt": "Be.\n\nHuman: Hi\n\nAssistant:", "completion": "Hello!"}, [BE, ASK, TELL]),
        ({"prompt": "Human: Hi\n\nAssistant: Hello!"}, [ASK, TELL]),
        ({"text": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye"}, [ASK, TELL]),
        (
            {"instruction": "Bye", "input": "", "output": "Goodbye!", "history": [["Hi", "Hello!"]]},
            [ASK, TELL | {"weight": 0}, AGAIN, BYE],
        ),
        ({"question": "Hi", "context": "there", "answer": "Hello!"}, [ASK | {"content": "Hi\n\nthere"}, TELL]),
        ({"messages": [ASK, TELL, AGAIN, BYE | {"weight": 0}]}, [ASK, TELL]),
        ({"messages": [ASK, TELL | {"weight": 0}]}, None),
        ({"messages": [ASK, TELL, AGAIN, {"role": "assistant", "content": ""}]}, [ASK, TELL]),
        ({"messages": [ASK, TELL, AGAIN]}, [ASK, TELL]),
        ({"instruction": "Hi", "context": "", "response": "Hello!", "category": "x"}, [ASK, TELL]),
        ({"instruction": "Hi", "input": None, "output": "Hello!", "text": "x"}, [ASK, TELL]),
        ({"instruction": "Hi", "input": "there", "output": "Hello!"}, [ASK | {"content": "Hi\n\nthere"}, TELL]),
        ({"prompt": "Hi", "completion": "Hello!"}, [ASK, TELL]),
        ({"instruction": "", "input": "Hi", "output": "Hello!"}, [ASK, TELL]),
        ({"messages": [ASK | {"from": "human"}, TELL | {"from": "GPT", "value": "Hello!"}]}, [ASK, TELL]),
        ({"instruction": "Hi", "input": "", "output": ""}, None),
    ],
)
def test_conversations(record, expected):
    found = conversation(record)
    assert (found and found.messages) == expected


WHAT = TELL | {"content": "What?"}
HH = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant: {}"


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}, [ASK]),
        ({"prompt": [ASK], "chosen": [TELL], "rejected": [TELL | {"content": "What?"}]}, [ASK]),
        ({"prompt": "Hi", "chosen": [ASK, TELL], "rejected": [ASK, TELL | {"content": "What?"}]}, [ASK]),
        ({"chosen": [ASK, TELL], "rejected": [ASK, TELL | {"content": "What?"}]}, [ASK]),
        ({"chosen": HH.format("Hello!"), "rejected": HH.format("What?")}, [ASK, TELL, AGAIN]),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello!", "rejected": " What?"}, [ASK]),
        ({"prompt": [ASK, TELL, AGAIN], "chosen": "Hello!", "rejected": "What?"}, [ASK, TELL, AGAIN]),
        ({"prompt": [ASK], "chosen": TELL, "rejected": TELL | {"content": "What?"}}, [ASK]),
        ({"system": "Be.", "question": "Hi", "chosen": "Hello!", "rejected": "What?"}, [BE, ASK]),
        ({"prompt": "Hi", "system": "Be.", "chosen": [ASK, TELL], "rejected": [ASK, WHAT]}, [BE, ASK]),
        ({"prompt": "Hi", "chosen": [BE, ASK, TELL], "rejected": [BE, ASK, WHAT]}, [BE, ASK]),
        ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": TELL, "rejected": WHAT}, [ASK]),
    ],
)
def test_preferences(record, asked):
    found = preference(record)
    assert (found.asked.messages, found.chosen, found.rejected) == (asked, TELL, TELL | {"content": "What?"})


def test_pairs_that_differ_in_more_than_the_last_answer_are_no_pairs():
    other = HH.replace("Hi", "Hey").format("What?")
    assert preference({"chosen": HH.format("x"), "rejected": other}) is None
    assert preference({"chosen": HH.format("x"), "rejected": HH.format("x")}) is None


def test_questions():
    asked, is_right = question({"question": "Hi", "answer": "2+3=<<2+3=5>>5 ... so 1000+5\n#### 1,005"})
    assert asked.messages == [ASK]
    assert is_right("It is 1005.") and is_right("5, no: $1,005.00") and not is_right("1005 or 5") and not is_right("")


def test_the_value_of_an_answer():
    values = {
        "\\$1,234.50": "1234.50",
        "\\boxed{45^\\circ}": "45",
        "12 \\text{ cm}": "12",
        "2 + 3 = 5": "5",
        "6 m/s": "6",
    }
    values |= {"\\left(7\\right)": "7", "so 3 and 4 make 7.": "7", "答案是 5": "5", "8 (eight)": "8", "99\\%": "99"}
    assert {text: str(true_number(text)) for text in values} == values
    several = [
        "(1, 2)",
        "10:30",
        "2024-05-06",
        "1 000",
        "#### 3, 5",
        "so \\boxed{[2,5]}",
        "1.234,5",
        "10,\\!000",
        "7 or 8",
    ]
    for text in [*several, "5!", "\\pm 3", "3\\pi", "x^2+3", "1101_2"]:
        with pytest.raises(ValueError, match="write it as one"):
            true_number(text)


def test_a_switch_of_reasoning_is_no_reasoning():
    """Llama-Nemotron-Post-Training-Dataset's `reasoning`."""
    row = {"input": [ASK], "output": "Hello!", "reasoning": "off", "system_prompt": "Be."}
    assert conversation(row) == ([BE, ASK, TELL], None, False)
    row |= {"output": "<think>\nHm.\n</think>\nHello!", "reasoning": "on"}
    assert conversation(row)[1:] == (None, True) and "reasoning_content" not in conversation(row).messages[-1]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[
            ("-7", "-7"),
            ("5-3", "3"),
            ("10-12=-2", "-2"),
            ("9.11 > 9.9.", "9.9"),
            ("x3y 4", "4"),
            ("1,234,567", "1234567"),
        ],
        *[("It is \u22125.", "-5"), ("x = .5", "0.5"), ("-.25", "-0.25"), ("and so on ...7", "7"), ("a.5", "5")],
    ],
)
def test_last_number(text, number):
    assert str(last_number(text)) == number


CALLED = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}


@pytest.mark.parametrize(
    ("read", "record", "said"),
    [
        (conversation, 5, "is 5, not an object"),
        (conversation, {"text": "x"}, "has the fields text, but a conversation is messages, or one of prompt"),
        (conversation, {"messages": "x"}, "messages: 'x' is not a list"),
        (
            conversation,
            {"messages": [{"role": "bot", "content": "x"}]},
            r"messages\[0\]\.role: 'bot' is none of system",
        ),
        (conversation, {"messages": [{"role": "user", "content": 3}]}, r"messages\[0\]\.content: 3 is neither a text"),
        (conversation, {"messages": [{"role": "user"}, TELL]}, "the message of user has no content"),
        (conversation, {"messages": [ASK]}, "no turn of the assistant"),
        (conversation, {"messages": [TELL]}, "no turn of the assistant after"),
        (conversation, {"messages": [ASK | {"weight": 1}, TELL]}, "message 0 has weight 1, but is the user's"),
        (conversation, {"messages": [ASK, TELL], "images": ["x.png"]}, "has images, and only text"),
        (
            conversation,
            {"messages": [ASK, TELL], "documents": [{"text": "x"}]},
            "has documents, which is not supported",
        ),
        (conversation, {"messages": [ASK, TELL], "loss_masks": [0, 1]}, "has loss_masks, which is not supported"),
        (conversation, {"prompt": "a", "completion": "b", "sample_weight": 0}, "has sample_weight"),
        (conversation, {"prompt": "a", "completion": "b", "label": "False"}, "label is false"),
        (conversation, {"messages": [ASK | {"tools": [{"name": "f"}]}, TELL]}, r"messages\[0\]\.tools: .* beside the"),
        (conversation, {"messages": [ASK, TELL | {"function_calls": "f()"}]}, "function_calls: .* tool_calls"),
        (conversation, {"messages": [ASK, TELL | {"masked": True, "weight": 1}]}, "masked differ|weight and masked"),
        (conversation, {"messages": [ASK, TELL], "tools": "{"}, "tools: '{' is not JSON"),
        (
            conversation,
            {"messages": [ASK, TELL | {"channel": "analysis"}]},
            "channel: 'analysis': reasoning belongs in",
        ),
        (conversation, {"instruction": "a", "output": "x", "kto_tag": False}, "kto_tag is false: this would teach"),
        (conversation, {"prompt": "a", "completion": "x", "label": -1}, "label is -1: this would teach"),
        (conversation, {"messages": [ASK | {"from": "gpt"}, TELL]}, r"messages\[0\]: role and from differ"),
        (conversation, {"messages": [ASK | {"value": "x"}, TELL]}, r"messages\[0\]: content and value differ"),
        (conversation, {"question": "a", "answer": "x", "image_path": "x.jpg"}, "has image_path, and only text"),
        (
            conversation,
            {"prompt": "a", "response": "<think>b</think>c", "reasoning": "off", "enable_thinking": True},
            "enable_thinking, that of chat_template_kwargs, and reasoning differ",
        ),
        (conversation, {"conversation": [{"input": "", "output": "x"}]}, r"conversation\[0\]: has no input"),
        (conversation, {"conversation": [{"input": "a", "output": "x", "sep": "."}]}, r"\[0\]\.sep: beside input and"),
        (conversation, {"question": "a", "answers": {"text": ["x"]}}, "has the fields question, answers"),
        (conversation, {"query": "a", "answers": '["x"]'}, "has the fields query, answers"),
        (conversation, {"messages": [ASK, TELL], "tools": [{}], "functions": [{}]}, "has tools and functions"),
        (conversation, {"messages": [ASK, TELL], "chat_template_kwargs": {"x": 1}}, "only enable_thinking is known"),
        (conversation, {"messages": [BE, ASK, TELL], "system": "Do."}, "a system message in system and another one"),
        (conversation, {"prompt": "Hi", "completion": "Bad.", "label": False}, "label is false"),
        (conversation, {"prompt": "Hi", "completion": "Bad.", "label": 0}, "label is 0: this would teach an unwanted"),
        (conversation, {"instruction": " ", "output": "x"}, "instruction is ' ', not a text"),
        (conversation, {"prompt": "Hi", "completion": 7}, "completion is 7, neither a text nor a list"),
        (conversation, {"prompt": "Hi"}, "has the fields prompt"),
        (preference, {"prompt": "Hi", "chosen": "x"}, "a preference has chosen and rejected"),
        (preference, {"chosen": "x", "rejected": "y"}, "has no prompt"),
        (preference, {"prompt": "Bye", "chosen": [ASK, TELL], "rejected": "y"}, "chosen begins with other turns"),
        (preference, {"chosen": [], "rejected": "y"}, "chosen: an empty list"),
        (question, {"question": "Hi", "answer": "none"}, "answer has no number"),
        (question, {"problem": "Hi", "answer": "3"}, "a question has question and answer"),
        (question, {"question": "Hi", "answer": "1/2"}, "'1/2' ends in a fraction"),
        (question, {"question": "Hi", "answer": "so \\boxed{\\frac{14}{3}}"}, "ends in a fraction, a root or a power"),
        (question, {"question": "Hi", "answer": "2\\sqrt{5}"}, "ends in a fraction"),
        (question, {"question": "Hi", "answer": "10^{-3}"}, "ends in a fraction"),
        (question, {"question": "Hi", "answer": "1e5"}, "ends in a fraction"),
        (preference, {"prompt": "Hi", "chosen": "x", "rejected": "y", "label": False}, "label is false"),
        (preference, {"prompt": "Hi", "chosen": "x", "rejected": "y", "weight": 0.3}, r"weight is 0\.3"),
        (preference, {"prompt": "Hi", "chosen": [TELL | {"weight": 0}], "rejected": "y"}, "chosen has weight 0"),
        (prompt, {"prompt": "Hi", "temperature": 0}, "temperature is a setting"),
        (prompt, {"text": "Hi"}, "has the fields text, but a prompt is"),
    ],
)
def test_bad_rows(read, record, said):
    with pytest.raises(ValueError, match=said):
        read(record)


def test_whatever_a_row_holds_it_is_read_or_refused():
    """No shape of a stranger's row ends in another exception."""
    values = [
        None,
        5,
        True,
        "",
        "x",
        [],
        {},
        [5],
        [[]],
        [{}],
        {"a": 1},
        [{"role": []}],
        [{"role": "user"}],
        [{"output": 3}],
        [{"name": []}],
        [ASK],
        [ASK, TELL],
    ]
    for name in sorted(FIELDS):
        for value in values:
            for other in (
                {},
                {"prompt": "Hi", "completion": "x"},
                {"messages": [ASK, TELL]},
                {"prompt": "Hi", "answer": 3},
            ):
                for record in (other | {name: value}, {"chosen": [ASK, TELL], "rejected": "x"} | {name: value}):
                    for read in (conversation, preference, question, prompt):
                        with contextlib.suppress(ValueError):
                            read(record)
    for field in (
        "role",
        "from",
        "content",
        "value",
        "reasoning",
        "tool_calls",
        "function_call",
        "weight",
        "name",
        "refusal",
    ):
        for value in values:
            for role in ("assistant", "function_call", "tool"):
                with contextlib.suppress(ValueError):
                    conversation({"messages": [ASK, {"role": role, "content": "x"} | {field: value}, AGAIN, BYE]})


ULTRAFEEDBACK = {  # HuggingFaceH4/ultrafeedback_binarized: the messages are the prompt and the chosen answer
    "prompt": "Hi",
    "prompt_id": "a",
    "chosen": [ASK, TELL],
    "rejected": [ASK, BYE],
    "messages": [ASK, TELL],
    "score_chosen": 8.0,
    "score_rejected": 3.0,
}


def test_messages_that_hold_the_answer_are_no_prompt():
    for record in (ULTRAFEEDBACK, {name: ULTRAFEEDBACK[name] for name in ("messages", "chosen", "rejected")}):
        found = preference(record)
        assert found.asked.messages == [ASK] and (found.chosen, found.rejected) == (TELL, BYE)


@pytest.mark.parametrize(
    ("make", "record", "unread"),
    [
        ("conversation", {"question": "a", "answer": "4", "response": "b", "id": 1, "extra": None}, {"answer", "id"}),
        ("conversation", {"prompt": "a", "instruction": "b", "input": "c", "output": "d"}, {"instruction", "input"}),
        ("conversation", {"instruction": "b", "input": "c", "output": "d", "text": "bcd"}, {"text"}),
        ("conversation", {"messages": [ASK, TELL], "prompt": "a", "completion": "b"}, {"prompt", "completion"}),
        ("conversation", {"messages": [ASK], "response": "b", "reasoning": "c", "tools": []}, set()),
        ("preference", ULTRAFEEDBACK, {"prompt_id", "score_chosen", "score_rejected"}),
        ("question", {"question": "a", "prompt": "b", "answer": "5", "solution": "c"}, {"prompt", "solution"}),
    ],
)
def test_every_field_that_was_not_read_is_named(chat, capsys, make, record, unread):
    read_items("rows", iter([("line 1", record)]), getattr(WrittenRows(chat), make), 999)
    said = capsys.readouterr().err
    assert said.rstrip().rpartition("not read: ")[2] == ", ".join(sorted(unread)) if unread else "not read" not in said


# --- what is learnt ---


def test_two_turns_of_the_assistant_in_a_row_are_called_that(chat):
    """Qwen3's template begins the second one otherwise than a reply to the first would begin."""
    with pytest.raises(ValueError, match="two turns of the assistant follow each other; join them"):
        WrittenRows(chat).conversation({"messages": [ASK, TELL, TELL]})


def test_thinking_that_a_row_contradicts_or_does_not_end_is_refused(chat):
    """Behind a closed thinking, or cut short, it would teach what no reply should be."""
    rows, thought = WrittenRows(chat), TELL | {"reasoning": "Hm."}
    for record in (
        {"messages": [ASK, thought], "enable_thinking": False},
        {"messages": [ASK, TELL | {"content": "<think>Hm.</think>Hello!"}], "enable_thinking": False},
    ):
        with pytest.raises(ValueError, match="enable_thinking is false, but this turn of the assistant thinks"):
            rows.conversation(record)
    for cut in ("<think>\nHm, and", "\n<think>Hm"):
        with pytest.raises(ValueError, match="opens <think> and does not close it"):
            rows.conversation({"prompt": "Hi", "completion": cut})
        with pytest.raises(ValueError, match="opens <think> and does not close it"):
            rows.preference({"prompt": "Hi", "chosen": "x", "rejected": cut})
    (row,) = rows.conversation({"prompt": "Hi", "completion": "A <think> begins it.", "enable_thinking": True})
    assert texts(chat, row)[1] == ["A <think> begins it.<|im_end|>"]


def test_options_of_a_template_that_are_empty_change_nothing(chat):
    """SmolTalk2's rows have them all."""
    given = {"custom_instructions": "", "enable_thinking": False, "python_tools": [], "xml_tools": []}
    found = conversation({"messages": [ASK, TELL], "chat_template_kwargs": given, "tools": {}})
    assert found.thinking is False and found.tools is None
    assert [message["role"] for message in prompt([ASK, TELL]).messages] == ["user", "assistant"]
    for role in ("chatgpt", "Bard", "bing"):
        assert conversation({"conversations": [ASK, {"from": role, "value": "x"}]}).messages[1]["role"] == "assistant"


def texts(chat: Chat, row: Row) -> tuple[str, list[str]]:
    """All of a row, and each stretch of it that is learnt."""
    learnt, before = [], IGNORED
    for target in row.targets:
        if target != IGNORED:
            learnt = [*learnt, []] if before == IGNORED else learnt
            learnt[-1].append(int(target))
        before = target
    whole = [*map(int, row.ids), int(row.targets[-1])]
    return chat.decode(whole), [chat.decode(ids) for ids in learnt]


def test_each_turn_is_learnt_behind_the_prompt_that_it_is_written_for(chat):
    """Qwen3's template writes the empty thinking before the last turn alone, so two turns need two rows."""
    rows = WrittenRows(chat).conversation({"messages": [ASK, TELL, AGAIN, BYE]})
    (last, learnt_last), (first, learnt_first) = (texts(chat, row) for row in rows)
    assert last == chat.render_text([ASK, TELL, AGAIN], thinking=False) + "Goodbye!<|im_end|>"
    assert first == chat.render_text([ASK], thinking=False) + "Hello!<|im_end|>"
    assert learnt_last == ["Goodbye!<|im_end|>"] and learnt_first == ["Hello!<|im_end|>"]
    (only,) = WrittenRows(chat, turns="last").conversation({"messages": [ASK, TELL, AGAIN, BYE]})
    assert texts(chat, only) == (last, learnt_last)


def test_thinking_is_learnt_with_the_answer(chat):
    (row,) = WrittenRows(chat).conversation({"messages": [ASK, TELL | {"reasoning_content": "Hm."}]})
    assert texts(chat, row)[1] == ["<think>\nHm.\n</think>\n\nHello!<|im_end|>"]
    (same,) = WrittenRows(chat).conversation(
        {"messages": [ASK, TELL | {"content": "<think>\nHm.\n</think>\n\nHello!"}]}
    )
    assert texts(chat, same) == texts(chat, row)


def test_turns_share_a_row_where_the_template_lets_them():
    tokenizer = (ROOT / "models" / "tiny" / "tokenizer.json").read_text()
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    chat = Chat("here", tokenizer, {"eos_token": "<|im_end|>"}, template)
    (row,) = WrittenRows(chat).conversation({"messages": [ASK, TELL, AGAIN, BYE]})
    whole, learnt = texts(chat, row)
    assert whole + "\n" == chat.render_text([ASK, TELL, AGAIN, BYE], add_generation_prompt=False)
    assert learnt == ["Hello!<|im_end|>", "Goodbye!<|im_end|>"]


def test_both_answers_of_a_pair_have_one_prompt(chat):
    record = {"chosen": [ASK, TELL | {"reasoning_content": "Hm."}], "rejected": [ASK, TELL]}
    (pair,) = WrittenRows(chat).preference(record)
    assert texts(chat, pair.chosen)[1] == ["<think>\nHm.\n</think>\n\nHello!<|im_end|>"]
    assert texts(chat, pair.rejected)[1] == ["Hello!<|im_end|>"]  # the row says no thinking, so none is taught
    assert texts(chat, pair.rejected)[0] == chat.render_text([ASK]) + "Hello!<|im_end|>"


THINKING = TELL | {"content": "Hm.\n</think>\n\nHello!"}
TOOLS = [{"type": "function", "function": {"name": "lookup", "description": "d", "parameters": {}}}]
LOOK = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "lookup", "arguments": '{"a":1}'}}]}


def test_a_turn_of_weight_0_is_read_but_not_learnt(chat):
    rows = WrittenRows(chat).conversation({"messages": [ASK, TELL | {"weight": 0}, AGAIN, BYE]})
    assert [texts(chat, row)[1] for row in rows] == [["Goodbye!<|im_end|>"]]
    rows = WrittenRows(chat).conversation({"prompt": [ASK, TELL, AGAIN], "completion": [BYE]})
    assert [texts(chat, row)[1] for row in rows] == [["Goodbye!<|im_end|>"]]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_are_in_the_prompt_and_calls_are_learnt(chat, tools):
    record = {"messages": [ASK, LOOK, {"role": "tool", "content": "42"}, TELL], "tools": tools}
    last, first = WrittenRows(chat).conversation(record)
    assert texts(chat, first)[0].startswith(chat.decode(chat.render([ASK], thinking=False, tools=TOOLS)))
    assert texts(chat, first)[1] == ['<tool_call>\n{"name": "lookup", "arguments": {"a": 1}}\n</tool_call><|im_end|>']
    assert "lookup" in texts(chat, last)[0] and "<tool_response>\n42" in texts(chat, last)[0]
    (pair,) = WrittenRows(chat).preference({"prompt": "Hi", "chosen": "a", "rejected": "b", "tools": tools})
    assert all("lookup" in texts(chat, row)[0] for row in pair)
    (asked,) = WrittenRows(chat).question({"question": "Hi", "answer": "1", "functions": [TOOLS[0]["function"]]})
    assert asked.prompt == chat.render([ASK], tools=TOOLS)


def test_calls_under_answers_are_learnt(chat):
    """Salesforce/xlam-function-calling-60k: query, and as JSON texts the tools and the calls that answer it."""
    tools = [{"name": "lookup", "description": "d", "parameters": {"a": {"type": "int, optional", "default": "0"}}}]
    record = {
        "id": 3,
        "query": "Hi",
        "answers": '[{"name": "lookup", "arguments": {"a": 1}}]',
        "tools": json.dumps(tools),
    }
    (row,) = WrittenRows(chat).conversation(record)
    (same,) = WrittenRows(chat).conversation({"messages": [ASK, LOOK], "tools": tools})
    assert texts(chat, row) == texts(chat, same) and '"a": 1}}\n</tool_call><|im_end|>' in texts(chat, row)[1][0]
    assert WrittenRows(chat).conversation(record | {"answers": "[]"}) == []


def test_results_that_a_row_has_wrapped_are_not_wrapped_twice(chat):
    """NousResearch/hermes-function-calling-v1."""
    wrapped = "<tool_response>\n42\n</tool_response>\n<tool_response>\n43\n</tool_response>\n"
    turns = [("human", "Hi"), ("gpt", "Wait."), ("tool", wrapped), ("gpt", "Hello!")]
    found = conversation({"conversations": [{"from": who, "value": said} for who, said in turns]})
    results = [{"role": "tool", "content": number} for number in ("42", "43")]
    assert found.messages == [ASK, TELL | {"content": "Wait."}, *results, TELL]
    assert "<tool_response>\n42\n</tool_response>\n<tool_response>\n43\n</tool_response><|im_end|>" in chat.render_text(
        found.messages
    )
    kept = {"role": "tool", "content": "See <tool_response>42</tool_response>"}
    assert conversation({"messages": [ASK, TELL, kept, TELL]}).messages[2] == kept


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", None])
def test_reasoning_under_any_name_is_learnt(chat, name):
    turn = THINKING if name is None else TELL | {name: "Hm."}
    (row,) = WrittenRows(chat).conversation({"messages": [ASK, turn]})
    assert texts(chat, row) == (
        chat.render_text([ASK]) + "<think>\nHm.\n</think>\n\nHello!<|im_end|>",
        ["<think>\nHm.\n</think>\n\nHello!<|im_end|>"],
    )


def test_the_row_may_say_whether_it_thinks(chat):
    (row,) = WrittenRows(chat).conversation(
        {"messages": [ASK, TELL], "chat_template_kwargs": {"enable_thinking": True}}
    )
    assert texts(chat, row)[0] == chat.render_text([ASK], thinking=True) + "Hello!<|im_end|>"
    (asked,) = WrittenRows(chat).question(
        {"question": "Hi", "answer": 1, "chat_template_kwargs": {"enable_thinking": False}}
    )
    assert not asked.thinking and asked.prompt == chat.render([ASK], thinking=False)


def published(name: str) -> Chat:
    if "NANOQWEN_ASSETS" not in os.environ:
        pytest.skip("NANOQWEN_ASSETS does not name the folder of official files")
    assets = Path(os.environ["NANOQWEN_ASSETS"])
    (template,) = (assets / "templates").glob(f"{name}*.jinja")
    tokenizer = (assets / "qwen3-0.6b" / "tokenizer.json").read_text()
    return Chat(name, tokenizer, {"eos_token": "<|endoftext|>"}, template.read_text())


def test_what_a_template_adds_is_not_taught():
    """Instruct-2507 writes an empty thinking into a turn that its generation prompt does not begin."""
    (row,) = WrittenRows(instruct := published("Qwen3-Instruct-2507")).conversation(
        {"messages": [ASK, TELL, AGAIN, BYE]}
    )
    assert texts(instruct, row)[1] == ["Hello!<|im_end|>", "Goodbye!<|im_end|>"]
    assert texts(instruct, row)[0] == instruct.render_text([ASK, TELL, AGAIN]) + "Goodbye!<|im_end|>"
    for name in ("Qwen3-Thinking-2507", "Qwen3.5-4B"):
        (row,) = WrittenRows(other := published(name)).conversation({"messages": [ASK, TELL]})
        whole, learnt = texts(other, row)
        assert learnt == ["Hello!<|im_end|>"] and whole.endswith("<think>\n\n</think>\n\nHello!<|im_end|>")
        (row,) = WrittenRows(other).conversation({"messages": [ASK, TELL | {"reasoning": "Hm."}]})
        assert texts(other, row)[1] == ["Hm.\n</think>\n\nHello!<|im_end|>"]


def test_what_a_template_leaves_out_is_refused():
    coder = WrittenRows(published("Qwen3-Coder"))
    (row,) = coder.conversation({"messages": [ASK, LOOK], "tools": TOOLS})
    assert texts(coder.chat, row)[1] == [
        "<tool_call>\n<function=lookup>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call><|im_end|>"
    ]
    with pytest.raises(ValueError, match=r"leaves out the answer 'Hm\.'"):
        coder.conversation({"messages": [ASK, TELL | {"reasoning": "Hm."}]})
    instruct = WrittenRows(published("Qwen3-Instruct-2507"))
    with pytest.raises(ValueError, match="leaves out the answer ' b '"):
        instruct.conversation({"messages": [ASK, TELL | {"content": "<think>a</think> b </think>c"}]})
    with pytest.raises(ValueError, match=r"leaves out the user's reasoning 'Hm\.'"):
        instruct.conversation({"messages": [ASK | {"reasoning": "Hm."}, TELL]})
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    tokenizer = (ROOT / "models" / "tiny" / "tokenizer.json").read_text()
    with pytest.raises(ValueError, match="leaves out the tool 'lookup'"):
        WrittenRows(Chat("plain", tokenizer, {}, plain[: -len("assistant: ")])).conversation(
            {"messages": [ASK, TELL], "tools": TOOLS}
        )


# --- files ---


def read(path, chat: Chat, kind: str = "conversation", longest: int = 99, share: float = 0.0, **options):
    chosen = {"split": "train", "subset": None, "limit": None, "out": Path("nowhere")} | options
    return read_items(str(path), records(str(path), **chosen), getattr(WrittenRows(chat), kind), longest, share)


def write_lines(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


DOLLY = [{"instruction": f"Say {n}", "context": "", "response": str(n)} for n in range(7)]


def test_the_same_rows_in_every_kind_of_file(tmp_path, chat, capsys):
    import pyarrow
    import pyarrow.parquet

    write_lines(tmp_path / "a.jsonl", *DOLLY)
    (tmp_path / "a.json").write_text(json.dumps(DOLLY))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(DOLLY), tmp_path / "a.parquet")
    digests = {read(tmp_path / f"a.{kind}", chat)[1] for kind in ("jsonl", "json", "parquet")}
    assert len(digests) == 1
    assert "a.jsonl: 7 rows, 7 to learn from\n" in capsys.readouterr().err
    assert read(tmp_path / "a.jsonl", chat, limit=6)[1] not in digests


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n'.encode("utf-16"), "is UTF-16; convert it"),
        ("a.ndjson", '{"prompt": "a", "completion": "b"}\n'.encode("utf-16-le"), "is UTF-16-LE; convert it"),
        ("a.JSONL", gzip.compress(b"{}\n"), r"compressed by gzip; unpack it \(gunzip\)"),
        ("a.json", b"<!DOCTYPE html><html>", "is a web page, not the file"),
        ("a.jsonl", bytes(100), "is all zeros"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x", "is a pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid x", "is a pointer"),
        ("a.parquet", b"Not Found, sorry", "is a text .* perhaps a server's message"),
        ("a.json", b'{"data": []}', "a list of records is expected; save that alone"),
        ("a.csv", b"prompt,completion\n", "kinds of files are .* convert it, or rename it"),
    ],
)
def test_what_a_file_is_is_said(tmp_path, chat, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: .*{said}"):
        read(tmp_path / name, chat, share=1.0)


def test_rows_that_are_too_long_are_counted(tmp_path, chat, capsys):
    path = write_lines(tmp_path / "a.jsonl", *DOLLY, {"prompt": "x" * 500, "completion": "y"})
    assert len(read(path, chat)[0]) == 7
    assert "8 rows, 7 to learn from; left out: 1 longer than 99 tokens" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nothing to learn from"):
        read(path, chat, longest=3)


def test_an_odd_row_is_left_out_and_named(tmp_path, chat, capsys):
    path = write_lines(tmp_path / "a.jsonl", *DOLLY, {"instruction": 4, "response": "x"})
    assert len(read(path, chat, share=0.05)[0]) == 7
    said = capsys.readouterr().err
    assert "8 rows, 7 to learn from; left out: 1 of another form" in said
    assert "a.jsonl: line 8: instruction is 4, neither a text nor a list" in said and said.count("\n") == 1
    with pytest.raises(ValueError, match=r"a\.jsonl: line 8: .*1 of 8 rows .* data\.skip_share allows 0\.0"):
        read(path, chat)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"instruction": "x"', "", *lines[1:]]))
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2: is not JSON .*2 of 9 rows"):
        read(path, chat, share=0.2)
    assert read(path, chat, share=0.25)[1] == read(write_lines(tmp_path / "b.jsonl", *DOLLY), chat)[1]
    write_lines(path, {"text": "x"})
    with pytest.raises(ValueError, match=r"a\.jsonl: line 1: has the fields text"):
        read(path, chat, share=1.0)
    with pytest.raises(ValueError, match=r"no file matches .*; give JSON lines"):
        read(tmp_path / "absent.jsonl", chat)


def test_fields_that_are_not_read_are_named(tmp_path, chat, capsys):
    read(write_lines(tmp_path / "a.jsonl", *(row | {"category": "x", "id": 3} for row in DOLLY)), chat)
    assert capsys.readouterr().err.endswith("7 rows, 7 to learn from; fields that are not read: category, id\n")


def test_the_nulls_of_arrow_are_no_parameters(tmp_path, chat):
    import pyarrow
    import pyarrow.parquet

    tools = [{"name": name, "parameters": {name: {"type": "string"}}} for name in ("first", "second")]
    rows = [{"messages": [ASK, TELL], "tools": tools}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert (
        read(tmp_path / "a.parquet", chat, longest=999)[1]
        == read(write_lines(tmp_path / "a.jsonl", *rows), chat, longest=999)[1]
    )


def test_pairs_that_teach_nothing_are_counted(tmp_path, chat, capsys):
    pairs = [{"prompt": "Hi", "chosen": "a", "rejected": "b"}, {"prompt": "Hi", "chosen": "a", "rejected": "a"}]
    items, _ = read(write_lines(tmp_path / "a.jsonl", *pairs), chat, "preference")
    assert len(items) == 1 and isinstance(items[0], Pair)
    assert "2 rows, 1 to learn from; left out: 1 without an answer or a difference" in capsys.readouterr().err


def test_a_stream_is_copied_into_the_run(tmp_path, chat, monkeypatch):
    """So that going on needs no hub."""
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", *DOLLY)
    first = read(tmp_path / "set", chat, limit=5, out=tmp_path / "run")
    assert len(first[0]) == 5 and len(list((tmp_path / "run").glob("rows-*.jsonl"))) == 1
    monkeypatch.setattr(data.documents, "_data_set", None)
    assert read(tmp_path / "set", chat, limit=5, out=tmp_path / "run")[1] == first[1]


def test_without_the_hub_one_line(tmp_path, chat, monkeypatch):
    import socket

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(socket, "create_connection", lambda *given, **named: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(ValueError, match=r"owner/name: .*hub"):
        read("owner/name", chat, out=tmp_path)


def test_other_answers_to_the_same_questions_are_other_rows(chat):
    """A run that is resumed on them is refused by this hash."""

    def digest(*answers: object) -> str:
        rows = [("1", {"question": "What is 2 + 2?", "answer": answer}) for answer in answers]
        return read_items("rows", iter(rows), WrittenRows(chat).question, 99)[1]

    assert digest("4", 4) == digest("2 + 2 = 4\n#### 4", "4.") != digest("4", 5)


def test_every_item_comes_once_an_epoch():
    source = Listed(list(range(10)), [], 4, seed=3)
    seen = [item for step in range(10) for item in source.rows(step)]
    assert [sorted(seen[start : start + 10]) for start in range(0, 40, 10)] == 4 * [list(range(10))]
    assert seen[:10] != seen[10:20]
    assert Listed(list(range(10)), [], 4, seed=3).rows(7) == source.rows(7)


def test_reasoning_in_a_column_of_its_own_belongs_to_the_answer():
    for name in ("reasoning", "reasoning_content", "thinking", "thought", "cot"):
        row = {"prompt": "2 + 3?", "response": "5", name: "Count on from 2."}
        answer = conversation(row).messages[-1]
        assert (answer["content"], answer["reasoning_content"]) == ("5", "Count on from 2.")
    said = {"prompt": "2 + 3?", "response": "<think>\nAdd.\n</think>\n\n5", "reasoning": "Count on from 2."}
    assert "reasoning_content" not in conversation(said).messages[-1]


def test_arguments_of_a_call_under_other_names():
    for name in ("arguments", "parameters", "input", "args"):
        call = {"name": "add", name: {"a": 2}}
        row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]}
        (found,) = conversation(row).messages[-1]["tool_calls"]
        assert found["function"]["arguments"] == {"a": 2}
    call["arguments"] = {"a": 3}
    with pytest.raises(ValueError, match="has arguments and args; keep one"):
        conversation(row)


def test_what_is_learnt_of_a_row_by_other_names():
    def row(**beside):
        return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", **beside}]}

    for name in ("trainable", "train_on_turn"):
        assert conversation(row(**{name: False})) is None
    for name in ("loss_mask", "train_detail", "loss_scale"):
        with pytest.raises(ValueError, match=rf"messages\[1\]\.{name}: a turn is learnt whole"):
            conversation(row(**{name: [1]}))
    with pytest.raises(ValueError, match=r"weight is 0\.5, but rows have no weights"):
        conversation(row() | {"weight": 0.5})
    assert conversation(row() | {"enable_thinking": False}).thinking is False
    with pytest.raises(ValueError, match="enable_thinking, that of chat_template_kwargs, and reasoning differ"):
        conversation(row() | {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}})
