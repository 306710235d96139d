"""inference/prompts.py: a record for each line of a file, in its order, the one that the prompt gets alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import launch
import pytest
import torch

from chat import Chat
from inference.decode import generate
from inference.params import SamplingParams
from inference.prompts import WINDOW, answer_prompts, read_prompts
from inference.session import Session
from model import Qwen3

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def session(tiny_checkpoint) -> Session:
    model, chat = Qwen3.from_pretrained(tiny_checkpoint), Chat.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that replies differ from prompt to prompt
    return Session(model, chat, SamplingParams(temperature=0.9, seed=4, max_new_tokens=40, stop=("e",)), system="Be.")


def write(path: Path, *lines) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_every_form_of_a_line_is_read(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write(tmp_path / "in", '"one"', "", {"prompt": "two"}, " ", {"messages": messages})
    path.write_text(path.read_text() + '"last, without a line break, ü"')
    one, two, three, four = (asked.messages for asked in read_prompts(path))
    assert (one[0]["content"], two[0]["content"], three) == ("one", "two", messages)
    assert four == [{"role": "user", "content": "last, without a line break, ü"}]


USER = {"role": "user", "content": "u"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
ROWS = [
    ({"conversations": [{"from": "human", "value": "u"}]}, [USER]),
    ({"prompt": [USER], "completion": "what was learnt"}, [USER]),
    ({"prompt": "\n\nHuman: u\n\nAssistant:"}, [USER]),
    ({"instruction": "u", "input": "", "output": "x", "id": 7}, [USER]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}]}]}, [USER]),
    ({"question": "u", "system": "s"}, [{"role": "system", "content": "s"}, USER]),
]


@pytest.mark.parametrize(("row", "messages"), ROWS)
def test_rows_of_training_are_prompts(row, messages, tmp_path, session):
    (asked,) = read_prompts(write(tmp_path / "in", row | {"tools": json.dumps([TOOL])}))
    assert asked.messages == messages and asked.tools == [TOOL]
    (answer,) = answer_prompts(session, tmp_path / "in", 1)
    given = messages if messages[0]["role"] == "system" else [*session.system, *messages]
    assert answer.prompt_tokens == len(session.chat.render(given, tools=[TOOL]))


def test_a_reply_that_has_begun_is_continued(session, tmp_path):
    begun = [USER, {"role": "assistant", "content": "The answer"}]
    path = write(tmp_path / "in", {"messages": begun}, {"messages": [USER, {"role": "assistant", "content": ""}]})
    continued, refused = answer_prompts(session, path, 2)
    prompt = session.chat.render([*session.system, *begun], continue_final_message=True)
    assert session.chat.decode(prompt).endswith("The answer")
    ids = list(generate(session.model, prompt, session.params, chat=session.chat))
    assert continued.token_ids == ids and continued.prompt_tokens == len(prompt)
    assert "can be continued" in refused.error


@pytest.mark.parametrize(
    "line",
    [
        b"{", b"3", b"null", b"[]", b'{"prompt": 3}', b'{"text": "a"}', b'{"prompt": "a", "n": 2}', b'{"messages": []}',
        b'{"messages": "a"}', b'{"messages": ["a"]}', b'{"messages": [{"role": "user"}]}', b'"\xff"', b"[" * 100000,
        b'{"messages": [{"role": "user", "content": 7}]}', b'"a" "b"', b"1" * 5000,
    ],
)  # fmt: skip
def test_a_line_of_another_form_is_named_by_its_number(line, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'"first"\n\n' + line + b'\n"fourth"\n')
    lines = read_prompts(path)
    assert next(lines).messages[0]["content"] == "first"
    with pytest.raises(ValueError, match=r"in\.jsonl: line 3: ") as error:
        next(lines)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("budget", [None, 6])
def test_each_prompt_is_answered_as_it_is_alone(session, tmp_path, budget):
    session.thinking_budget = budget
    texts = ["a", "Hello there, how are you?", "b c", "What is 2 + 2?" * 3, "x", "y y", "z"]
    answers = list(answer_prompts(session, write(tmp_path / "in", *texts_as_json(texts)), 2))
    assert len(answers) == len(texts) and len({tuple(answer.token_ids) for answer in answers}) > 3
    for text, answer in zip(texts, answers, strict=True):
        session.reset()
        alone = session.ask(text)
        assert (answer.token_ids, answer.thinking, answer.answer) == (alone.token_ids, alone.thinking, alone.answer)
        assert (answer.finish_reason, answer.prompt_tokens) == (alone.finish_reason, alone.prompt_tokens)
    session.thinking_budget = None
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}


def texts_as_json(texts: list[str]) -> list[str]:
    return [json.dumps(text) for text in texts]


def test_a_prompt_that_cannot_be_asked_is_a_record_and_the_others_go_on(session, tmp_path):
    lines = ['"a"', json.dumps("word " * 300), '"\\ud800"', '"b"']
    answers = list(answer_prompts(session, write(tmp_path / "in", *lines), 4))
    assert [answer.finish_reason == "error" for answer in answers] == [False, True, True, False]
    assert "context is 256" in answers[1].error and json.loads(answers[1].to_json())["error"] == answers[1].error
    assert "surrogate" in answers[2].error
    assert "error" not in json.loads(answers[0].to_json())


def test_a_large_file_is_read_window_by_window(session, tmp_path):
    path = write(tmp_path / "in", *texts_as_json(list("abcdefghij" * 3)), "broken")
    answers = answer_prompts(session, path, 2)
    before = [next(answers) for _ in range(WINDOW * 2)]
    assert len(before) == 8
    with pytest.raises(ValueError, match="line 31"):
        before += list(answers)
    assert list(answers) == []
    path.write_text(path.read_text().replace("broken\n", ""))
    assert len(list(answer_prompts(session, path, 2))) == 30


# ---- the command ----

COMMAND = [sys.executable, "generate.py", "--model", "models/tiny"]


def test_the_command_writes_a_record_a_line(tmp_path):
    path = write(tmp_path / "in.jsonl", '"What is 2 + 2?"', {"prompt": "What is 40 + 2?"}, "oops")
    options = ("--prompts", path, "--temperature", "0", "--thinking", "--batch-size", "2", "--stats")
    result = subprocess.run([*COMMAND, *options], cwd=ROOT, check=False, capture_output=True, text=True)
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["answer"] == "2 + 2 = 4." and second["answer"] == "40 + 2 = 42."
    assert first["thinking"] and first["finish_reason"] == "stop" and first["tokens"] == len(first["token_ids"])
    assert result.returncode == 2 and "line 3: not JSON" in result.stderr and result.stderr.count("\n") == 1


def test_ctrl_c_leaves_whole_lines(tmp_path):
    path = write(tmp_path / "in.jsonl", *texts_as_json([f"What is {n} + {n}?" for n in range(4000)]))
    process = subprocess.Popen(
        [*launch.COMMAND, *COMMAND, "--prompts", path, "--thinking"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # or what is read behind the first line is lost to communicate
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in error
    lines = (first + rest).decode().split("\n")
    assert lines.pop() == "" and 0 < len(lines) < 4000
    assert all(json.loads(line)["answer"] for line in lines)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("hi",), "leave PROMPT out"), (("--multi-turn",), "leave --multi-turn out"), (("--draft", "x"), "--draft out"),
        (("--json", "--logprobs", "2"), "leave --logprobs out"), (("--batch-size", "0"), "--batch-size 0"),
        (("--prompt-lookup", "2"), "leave --prompt-lookup out"), ((), "no prompt in it"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(arguments, line, tmp_path, monkeypatch, capsys):
    import console
    import generate

    (tmp_path / "empty").write_text("\n")
    command = ["generate.py", "--model", str(ROOT / "models/tiny"), "--prompts", str(tmp_path / "empty"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        console.run(generate.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and line in error and error.count("\n") == 1
    for options in (["--batch-size", "2"], ["--prompts", "nowhere"], ["--prompts", str(tmp_path)]):
        monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(ROOT / "models/tiny"), *options])
        with pytest.raises(SystemExit) as end:
            console.run(generate.main)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
