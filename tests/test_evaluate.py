"""The figures that evaluate.py prints, on the bundled model."""

import json

import pytest

import evaluate
from chat import Chat
from data.corpus.examples import hard_examples, outside_examples, training_example, unseen_examples
from data.corpus.talk import is_refusal
from data.corpus.tokenizer import TINY, pieces_of
from evaluate import Evaluation, replies
from inference.decode import ThinkingBudget, steps
from inference.params import SamplingParams
from model import Qwen3

PIECES = pieces_of(TINY)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Qwen3:
    return Qwen3.from_pretrained(TINY)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat.from_pretrained(TINY)


@pytest.mark.parametrize("budget", [8, 40])
def test_a_budget_is_what_the_chat_does(model, chat, budget):
    examples = list(unseen_examples(0, 8, PIECES))
    cut = 0
    for example, found in zip(examples, replies(model, chat, examples, True, budget), strict=True):
        prompt = chat.render(example.messages)
        intervene = ThinkingBudget(chat, prompt, budget)
        greedy = SamplingParams(temperature=0, max_new_tokens=evaluate.LONGEST)
        ids = [token for token, _ in steps(model, prompt, greedy, intervene=intervene)]
        assert found.answer == chat.decode(ids[ids.index(chat.think_end_id) + 1 : -1]).strip()
        cut += "limited time" in found.thinking
    assert cut == 8 if budget == 8 else 0 < cut < 8


def test_the_sets_are_apart():
    assert not any(is_refusal(example.answer) for example in unseen_examples(0, 50, PIECES))
    outside = {example.messages[-1]["content"] for example in outside_examples(0, 50)}
    hard = {example.messages[-1]["content"] for example in hard_examples(0, 50, PIECES)}
    trained = {training_example(0, index, PIECES).messages[-1]["content"] for index in range(2000)}
    assert not trained & (outside | hard) and len(hard) == 50 and len(outside) > 20


def test_tables_and_figures(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", str(TINY), "--count", "11", "--wrong", "1"])
    evaluate.main()
    shown = capsys.readouterr()
    rows = [line for line in shown.out.splitlines() if line.startswith("| ")]
    labels = [row.split(" | ")[0] for row in rows]
    assert labels == [f"| {label}" for label in ("family", *evaluate.FAMILIES, "all", "model", str(TINY))]
    assert "hard" in rows[-2] and "declined outside" in rows[-2] and "=>" in shown.err
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", str(TINY), "--count", "11", "--json"])
    evaluate.main()
    figures = json.loads(capsys.readouterr().out)
    assert figures["all"]["on"] > figures["all"]["off"] + 0.25 and figures["all"]["declined inside"] <= 0.02


def test_more_budget_more_right_answers(tmp_path):
    evaluation = Evaluation(str(TINY), 22, 0)
    curve = evaluation.by_budget([0, 8, 128])
    assert list(curve) == [0, 8, 128] and curve[128] > max(curve[0], curve[8]) + 0.3
    evaluate.plot({"tiny": curve}, tmp_path / "budget.svg")
    assert (tmp_path / "budget.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--count", "3"], "give at least 11"),
        (["--budgets", "-1"], "--budgets -1"),
        (["--plot-budget", "a.bmp"], "ends in .png"),
    ],
)
def test_bad_arguments(monkeypatch, arguments, said):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
    with pytest.raises(ValueError, match=said):
        evaluate.main()
