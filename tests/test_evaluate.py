"""evaluate.py on the bundled model: what a run keeps, that kills lose nothing, that no answer depends on its batch."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import evaluate
from chat import Chat
from data.corpus.examples import hard_examples, outside_examples, training_example, unseen_examples
from data.corpus.talk import is_refusal
from data.corpus.tokenizer import TINY, pieces_of
from evaluation import run as evaluation_run
from evaluation import tasks
from evaluation.folder import Folder
from evaluation.perplexity import perplexity, windows
from inference.decode import ThinkingBudget, steps
from inference.likelihood import Scorer
from inference.params import SamplingParams
from model import Qwen3

ROOT = Path(__file__).resolve().parent.parent
PIECES = pieces_of(TINY)
TIMES = ("seconds", "first_token_seconds", "peak_bytes")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Qwen3:
    return Qwen3.from_pretrained(TINY)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat.from_pretrained(TINY)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs evaluate.py in this process and returns what it prints."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
        evaluate.main()
        return capsys.readouterr().out

    return run


def outputs(folder: Path) -> list[dict]:
    """A run's outputs without what a clock says."""
    found = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    return [{key: value for key, value in output.items() if key not in TIMES} for output in found]


def rows(path: Path, found: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


SUMS = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in ((12, 30), (7, 8), (41, 9), (100, 23))]
CHOICES = [
    {"question": "What is 7 + 8?", "choices": ["15", "14", "25", "16"], "label": 0},
    {"question": "What is 9 - 4?", "choices": ["6", "5"], "label": "B"},
    {"question": "What is 3 * 3?", "choices": ["9", "19", "33"], "label": "9"},
]


# --- what a run is ---


def test_the_families(command, tmp_path):
    command("run", "families", "--limit", 11, "--out", tmp_path / "a", "--batch-size", 7)
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    groups = results["groups"]
    assert results["value"] == groups["on"]["value"] > groups["off"]["value"] + 0.25 and results["n"] == 11
    assert results["low"] <= results["value"] <= results["high"]
    assert groups["declined outside"]["refusals"] == 11 and groups["on"]["refusals"] == 0
    assert groups["off"]["thinking_tokens"] == 0 < groups["on"]["thinking_tokens"] < groups["on"]["tokens"]
    assert sum(groups[f"on: {name}"]["n"] for name in evaluation_run.families.FAMILIES) == 11
    report = (tmp_path / "a" / "report.md").read_text()
    assert f"| on: sum | 1 | {groups['on: sum']['value']:.1%}" in report and "## Protocol" in report
    table = command("report", tmp_path / "a", "--groups", "off", "hard")
    assert f"{groups['off']['value']:.1%}" in table.splitlines()[-1]


def test_an_output_holds_what_was_asked_and_said(command, tmp_path, model, chat):
    data = rows(tmp_path / "sums.jsonl", SUMS)
    printed = command("run", "sums", "--data", data, "--out", tmp_path / "run", "--json", "--price-per-hour", 3.6)
    results, found = json.loads(printed), outputs(tmp_path / "run")
    assert results["metric"] == "accuracy" and results["scorer"] == "numeric" and results["n"] == 4
    assert results["cost_per_100_prompts"] == pytest.approx(results["seconds_per_100_prompts"] / 1000)
    greedy = SamplingParams(temperature=0, max_new_tokens=4096)
    for row, output in zip(SUMS, found, strict=True):
        prompt = chat.render([{"role": "user", "content": row["question"]}])
        assert output["prompt_ids"] == prompt and output["prompt"] == chat.decode(prompt)
        said = list(steps(model, prompt, greedy))
        assert output["token_ids"] == [token for token, _ in said] and output["finish_reason"] == "stop"
        expected = [float(logits.float().log_softmax(-1)[token]) for token, logits in said]
        assert output["logprobs"] == pytest.approx(expected, abs=0.02)  # one by one, and all at once in bfloat16
        assert output["reference"] == row["answer"] and output["score"] == float(output["read"] == row["answer"])
        assert output["thinking"] and output["thinking_tokens"] == output["token_ids"].index(chat.think_end_id)
    protocol = json.loads((tmp_path / "run" / "protocol.json").read_text())
    assert protocol["sampling"]["temperature"] == 0 and len(protocol["data"]["sha256"]) == 64
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= protocol["model"]["files"].keys()
    assert results["value"] == sum(o["score"] for o in found) / 4 >= 0.5


def test_its_files_have_the_forms_of_their_schemas(command, tmp_path):
    from jsonschema import Draft202012Validator as Validator

    data = rows(tmp_path / "choices.jsonl", CHOICES)
    command("run", "choices", "--data", data, "--out", tmp_path / "a")
    command("run", "families", "--limit", 11, "--max-new-tokens", 60, "--out", tmp_path / "b")
    schemas = {path.name.split(".")[0]: json.loads(path.read_text()) for path in (ROOT / "schemas").glob("*.json")}
    for folder in (tmp_path / "a", tmp_path / "b"):
        for name in ("results", "protocol"):
            Validator(schemas[name]).validate(json.loads((folder / f"{name}.json").read_text()))
        for line in (folder / "outputs.jsonl").read_text().splitlines():
            Validator(schemas["output"]).validate(json.loads(line))
    assert not Validator(schemas["results"]).is_valid({"schema": "nanoqwen/results/1", "task": "a"})


def test_no_batch_size_changes_a_greedy_answer(command, tmp_path):
    data = rows(tmp_path / "sums.jsonl", SUMS * 3)
    for size in (1, 3, 16):
        command("run", "sums", "--data", data, "--out", tmp_path / str(size), "--batch-size", size)
    assert outputs(tmp_path / "1") == outputs(tmp_path / "3") == outputs(tmp_path / "16")


def test_samples_and_their_statistics(command, tmp_path):
    data = rows(tmp_path / "sums.jsonl", SUMS)
    flags = ("--samples", 3, "--temperature", 3, "--seed", 5, "--max-new-tokens", 200)
    for name, size in (("a", 2), ("b", 12)):
        command("run", "sums", "--data", data, "--out", tmp_path / name, "--batch-size", size, *flags)
    found = outputs(tmp_path / "a")
    assert found == outputs(tmp_path / "b") and [o["id"] for o in found[:4]] == ["0#0", "0#1", "0#2", "1#0"]
    assert len({tuple(o["token_ids"]) for o in found}) > 4
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["n"] == 4 and results["several"].keys() == {"pass@1", "pass@2", "pass@3", "majority@3"}
    assert results["several"]["pass@1"]["value"] == pytest.approx(results["value"])
    with pytest.raises(ValueError, match="greedy replies are all the same"):
        command("run", "sums", "--data", data, "--out", tmp_path / "c", "--samples", 2)


# --- kills, continuations, scoring again ---


def test_rescoring_changes_no_digit(command, tmp_path):
    data = rows(tmp_path / "sums.jsonl", SUMS)
    command("run", "sums", "--data", data, "--out", tmp_path / "run")
    before = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    command("rescore", tmp_path / "run")
    assert {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()} == before
    command("rescore", tmp_path / "run", "--scorer", "exact")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["scorer"] == "exact"


def test_a_run_that_is_killed_ten_times_is_the_run_that_was_not(command, tmp_path):
    data = rows(tmp_path / "sums.jsonl", SUMS * 3)
    flags = ["run", "sums", "--data", str(data), "--batch-size", "1"]
    command(*flags, "--out", tmp_path / "whole")
    whole, folder = outputs(tmp_path / "whole"), tmp_path / "killed"
    lines = (tmp_path / "whole" / "outputs.jsonl").read_bytes().splitlines(keepends=True)
    command(*flags, "--out", folder)
    for kept in range(10):  # what a kill leaves: some whole lines, and a piece of the next one
        (folder / "outputs.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][: 7 * kept])
        command(*flags, "--out", folder, "--resume")
        assert outputs(folder) == whole
    assert (folder / "results.json").read_text() != ""
    results = [json.loads((f / "results.json").read_text()) for f in (tmp_path / "whole", folder)]
    clocks = {*TIMES, "tokens_per_second", "seconds_per_100_prompts"}
    first, second = ({key: value for key, value in r.items() if key not in clocks} for r in results)
    assert first == second


def test_sigkill_leaves_a_run_that_goes_on(tmp_path):
    data, folder = rows(tmp_path / "sums.jsonl", SUMS * 50), tmp_path / "run"
    flags = [sys.executable, "evaluate.py", "run", "sums", "--data", str(data), "--out", str(folder)]
    with subprocess.Popen([*flags, "--batch-size", "2", "--threads", "1"], cwd=ROOT, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 120
        while not (folder / "outputs.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    done = (folder / "outputs.jsonl").read_bytes().count(b"\n")
    assert 0 < done < 200 and not (folder / "results.json").exists()
    assert Folder(folder).begin(json.loads((folder / "protocol.json").read_text()), resume=True)


def test_another_run_is_not_continued(command, tmp_path):
    data = rows(tmp_path / "sums.jsonl", SUMS)
    flags = ("run", "sums", "--data", data, "--out", tmp_path / "run", "--limit", 2)
    command(*flags)
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume"):
        command(*flags)
    with pytest.raises(ValueError, match="another thinking_budget"):
        command(*flags, "--resume", "--thinking-budget", 5)
    with pytest.raises(ValueError, match="another data"):
        rows(tmp_path / "sums.jsonl", SUMS[::-1])
        command(*flags, "--resume")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        command("run", "sums", "--data", data, "--out", tmp_path / "other")


# --- comparing ---


def test_two_precisions_are_compared_in_pairs(command, tmp_path):
    for name, flags in (("bf16", []), ("int4", ["--quantize", "int4"])):
        command("run", "families", "--limit", 11, "--max-new-tokens", 90, "--out", tmp_path / name, *flags)
    found = json.loads(command("compare", tmp_path / "bf16", tmp_path / "int4", "--json"))
    assert found["n"] == 55 and 0 <= found["mcnemar_p"] <= 1 and found["protocol_differences"] == ["model"]
    difference = found["difference"]
    assert difference["low"] <= difference["value"] <= difference["high"]
    changed = len(found["only_second_right"]) - len(found["only_first_right"])
    assert difference["value"] == pytest.approx(changed / 55)
    assert found["questions"].keys() == {*found["only_first_right"], *found["only_second_right"]}
    assert "McNemar" in command("compare", tmp_path / "bf16", tmp_path / "int4")
    data = rows(tmp_path / "sums.jsonl", SUMS)
    command("run", "sums", "--data", data, "--out", tmp_path / "other")
    with pytest.raises(ValueError, match="answer different questions"):
        command("compare", tmp_path / "bf16", tmp_path / "other")


def test_a_budget_is_what_the_chat_does(command, tmp_path, model, chat):
    for budget in (8, 40):
        command("run", "families", "--limit", 11, "--thinking-budget", budget, "--out", tmp_path / str(budget))
        for output in outputs(tmp_path / str(budget))[:8]:
            prompt = output["prompt_ids"]
            greedy = SamplingParams(temperature=0, max_new_tokens=400)
            intervene = ThinkingBudget(chat, prompt, budget)
            assert output["token_ids"] == [token for token, _ in steps(model, prompt, greedy, intervene=intervene)]
    picture = tmp_path / "budget.svg"
    command("report", tmp_path / "8", tmp_path / "40", "--plot", picture)
    assert picture.read_text().startswith("<?xml")


def test_what_a_card_takes(command, tmp_path):
    data = rows(tmp_path / "sums.jsonl", SUMS)
    command("run", "sums", "--data", data, "--out", tmp_path / "run")
    command("export", tmp_path / "run", "--out", tmp_path / "card", "--source", "https://example.org/outputs")
    (entry,) = yaml.safe_load((tmp_path / "card" / ".eval_results" / "sums.yaml").read_text())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert entry["value"] == pytest.approx(100 * results["value"]) and entry["source"]["url"].endswith("/outputs")
    (listed,) = json.loads((tmp_path / "card" / "evals.json").read_text())
    assert listed["value"] == results["value"] and Path(listed["outputs"]).is_file()


# --- likelihoods ---


@pytest.fixture(scope="module")
def reference():
    """transformers' model of the same weights, in float32."""
    return pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def test_likelihoods_are_transformers(model, reference, chat):
    ours = Scorer(Qwen3.from_pretrained(TINY, dtype=torch.float32))
    texts = [
        ("What is 7 + 8?", " 15"),
        ("What is 7 + 8? Is it 15", " or 14?"),
        ("What", " is it?"),
        ("What is 7", " + 8"),
    ]
    for context, text in texts * 2:
        ids, more = chat.encode(context), chat.encode(text)
        with torch.no_grad():
            logits = reference(torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(more)), more].tolist()
        assert ours.logprobs(ids, more) == pytest.approx(expected, abs=1e-4)


def test_choices_by_likelihood_and_by_letter(command, tmp_path, reference, chat):
    data = rows(tmp_path / "choices.jsonl", CHOICES)
    command("run", "choices", "--data", data, "--out", tmp_path / "run", "--dtype", "float32")
    for row, output in zip(CHOICES, outputs(tmp_path / "run"), strict=True):
        context = chat.encode(f"Question: {row['question']}\nAnswer:")
        assert output["reference"] == {"15": 0, "6": 1, "9": 0}[row["choices"][0]]
        for choice, found in zip(row["choices"], output["choices"], strict=True):
            ids = chat.encode(f"Question: {row['question']}\nAnswer: {choice}")
            with torch.no_grad():
                logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(logprobs[i - 1, ids[i]]) for i in range(len(context), len(ids)))
            assert found["logprob"] == pytest.approx(expected, abs=1e-3) and found["bytes"] == len(choice)
    for scorer in ("likelihood-bytes", "likelihood-tokens"):
        command("rescore", tmp_path / "run", "--scorer", scorer)
    command("run", "choices", "--data", data, "--out", tmp_path / "letters", "--scorer", "letter", "--few-shot", 1)
    (first, _) = outputs(tmp_path / "letters")
    assert "A. 15" in first["prompt"] and "Answer with the letter" in first["prompt"] and first["reference"] == "B"


def test_the_arithmetic_task_is_always_the_same(command, tmp_path):
    found = tasks.arithmetic()
    assert found == tasks.arithmetic() and len(found) == 200
    for _, row in found:
        a, sign, b = row["question"].removeprefix("What is ").removesuffix("?").split()
        right = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert row["choices"][row["label"]] == str(right) == row["answer"] and len(set(row["choices"])) == 4
    printed = command("run", "arithmetic", "--limit", 8, "--out", tmp_path / "run")
    assert printed.startswith("arithmetic: accuracy")


def test_perplexities_by_both_protocols(model, reference, chat):
    text = "How many times does the letter r appear in strawberry? " * 4
    ids = chat.encode(text)
    sizes = [len(chat.token_bytes(token)) for token in ids]
    scorer = Scorer(Qwen3.from_pretrained(TINY, dtype=torch.float32))
    for window, stride in ((32, None), (32, 8), (len(ids), None), (5, 4)):
        total, count, begin, seen = 0.0, 0, 0, 1
        while True:  # Hugging Face's loop, and windows side by side
            end = min(begin + window, len(ids))
            first = begin + 1 if stride is None else seen
            if first < end:
                with torch.no_grad():
                    logprobs = reference(torch.tensor([ids[begin:end]])).logits[0].log_softmax(-1)
                total -= sum(float(logprobs[i - 1 - begin, ids[i]]) for i in range(first, end))
                count += end - first
            seen = end
            if end == len(ids):
                break
            begin += window if stride is None else stride
        found = perplexity(scorer, ids, sizes, window, stride)
        assert found.tokens == count and found.value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert [w[0] for w in windows(10, 4, None)] == [0, 4, 8] and list(windows(1, 4, None)) == []
    for window, stride, said in ((1, None, "--window 1"), (8, 8, "--stride 8")):
        with pytest.raises(ValueError, match=said):
            perplexity(scorer, ids, sizes, window, stride)


def test_perplexity_from_the_command_line(command, tmp_path):
    found = json.loads(command("perplexity", "--model", TINY, "--window", 64, "--json"))
    assert found["value"] > 1 and found["protocol"] == "disjoint windows of 64 tokens"
    (tmp_path / "broken.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match="not UTF-8 at byte 3"):
        command("perplexity", tmp_path / "broken.txt")


# --- tasks of the hub, and rows of strangers ---


def test_published_tasks_in_their_true_form(command, tmp_path, monkeypatch):
    forms = {
        "gsm8k": {"question": "Tom has 3 pens and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
        "mmlu": {"question": "What is 2 + 2?", "choices": ["1", "4", "5", "6"], "answer": 1, "subject": "arithmetic"},
        "arc_easy": {"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"},
        "hellaswag": {"ctx": "A man sits", "endings": ["down.", "up."], "label": "0"},
        "humaneval": {"prompt": "def f():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "f"},
    }
    published = tasks.published()
    for name, row in forms.items():
        task = published[name]
        (question,) = tasks.questions(task, [(f"{name}: row 1", row)], [])
        if name == "mmlu":
            assert question.reference == "B" and question.groups == ("arithmetic",)
        elif name == "arc_easy":
            assert question.reference == 1 and question.choices == [" ice", " fire"]
        elif name == "hellaswag":
            assert question.reference == 0 and question.messages[0]["content"].startswith("Question: A man sits")
        elif name == "humaneval":
            assert question.reference.endswith("check(f)") and "def f():" in question.messages[0]["content"]
        else:
            assert "\\boxed{}" in question.messages[0]["content"] and question.reference.endswith("7")
    data = rows(tmp_path / "gsm8k.jsonl", [forms["gsm8k"]] * 3)
    fields = vars(published["gsm8k"]) | {"data": str(data), "subset": None}
    monkeypatch.setattr(tasks, "published", lambda: {"gsm8k": tasks.Task(**fields)})
    flags = ("--max-new-tokens", 60, "--thinking", "off", "--temperature", 0, "--few-shot", 1)
    command("run", "gsm8k", "--out", tmp_path / "run", *flags)
    assert outputs(tmp_path / "run")[0]["prompt"].count("Tom has 3 pens") == 2


HOSTILE = {
    "no object": ([1], "a int where a row"),
    "no question": ({"answer": "1"}, "give {question, answer}"),
    "a list as the question": ({"question": [1], "answer": "1"}, "question is a list"),
    "an object as the answer": ({"question": "a", "answer": {}}, "answer is a dict"),
    "one choice": ({"question": "a", "choices": ["b"], "label": 0}, "2 to 26 texts"),
    "27 choices": ({"question": "a", "choices": ["b"] * 27, "label": 0}, "2 to 26 texts"),
    "a label beyond": ({"question": "a", "choices": ["b", "c"], "label": 2}, "names none of the 2 choices"),
    "a negative label": ({"question": "a", "choices": ["b", "c"], "label": -1}, "names none of the 2 choices"),
    "a label that is true": ({"question": "a", "choices": ["b", "c"], "label": True}, "the label is True"),
    "no label": ({"question": "a", "choices": ["b", "c"]}, "has no label"),
    "a choice that is a number": ({"question": "a", "choices": ["b", 1], "label": 0}, "something else than"),
    "half a surrogate": ({"question": "\ud800", "answer": "1"}, "an unpaired surrogate"),
    "a megabyte": ({"question": "a" * (1 << 21), "answer": "1"}, "at most 1,048,576"),
}


@pytest.mark.parametrize("row, said", HOSTILE.values(), ids=HOSTILE)
def test_hostile_rows_are_one_line(command, tmp_path, row, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "x", "answer": "1", "choices": ["a", "b"], "label": 0}) + "\n")
    if isinstance(row, dict) and "choices" not in row and "answer" in row and "question" in row:
        path.write_text(json.dumps({"question": "x", "answer": "1"}) + "\n")
    if said.startswith("give {question"):
        path.write_text("")
    with path.open("a") as file:
        file.write(json.dumps(row[0] if isinstance(row, list) else row) + "\n")
    with pytest.raises(ValueError) as error:
        command("run", "rows", "--data", path, "--out", tmp_path / "run")
    assert said in str(error.value) and "\n" not in str(error.value) and "rows.jsonl" in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "gsm9k", "--out", "x"], "no task 'gsm9k'; did you mean gsm8k"),
        (["run", "families", "--limit", "3", "--out", "x"], "give at least 11"),
        (["run", "families", "--samples", "0", "--out", "x"], "--samples 0"),
        (["run", "families", "--temperature", "-1", "--out", "x"], "--temperature"),
        (["run", "families", "--thinking", "off", "--thinking-budget", "3", "--out", "x"], "--thinking-budget limits"),
        (["run", "humaneval", "--data", "{sums}", "--scorer", "function", "--out", "x"], "add --run-code"),
        (["run", "a", "--data", "{sums}", "--scorer", "nonsense", "--out", "x"], "the scorers are numeric"),
        (["run", "a", "--data", "{sums}", "--few-shot", "4", "--out", "x"], "no row is left"),
        (["rescore", "/nonexistent"], "no protocol.json in it"),
        (["report", ".", "--plot", "a.bmp"], "ends in .png"),
    ],
)
def test_bad_arguments(command, tmp_path, arguments, said):
    sums = rows(tmp_path / "sums.jsonl", SUMS)
    with pytest.raises(ValueError, match=said):
        command(*(str(sums) if a == "{sums}" else tmp_path / a if a == "x" else a for a in arguments))


def test_the_sets_are_apart():
    assert not any(is_refusal(example.answer) for example in unseen_examples(0, 50, PIECES))
    outside = {example.messages[-1]["content"] for example in outside_examples(0, 50)}
    hard = {example.messages[-1]["content"] for example in hard_examples(0, 50, PIECES)}
    trained = {training_example(0, index, PIECES).messages[-1]["content"] for index in range(2000)}
    assert not trained & (outside | hard) and len(hard) == 50 and len(outside) > 20


def test_damaged_outputs_are_named(command, tmp_path):
    data = rows(tmp_path / "sums.jsonl", SUMS)
    command("run", "sums", "--data", data, "--out", tmp_path / "run", "--limit", 2)
    file = tmp_path / "run" / "outputs.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for broken, said in (
        (["{\n"], "line 1: not JSON"),
        ([lines[0]] * 2, "occurs twice"),
        (["[1]\n"], "an object with an id"),
    ):
        file.write_text("".join(broken))
        with pytest.raises(ValueError, match=said):
            command("rescore", tmp_path / "run")
    file.write_text(json.dumps({key: v for key, v in json.loads(lines[0]).items() if key != "answer"}) + "\n")
    with pytest.raises(ValueError, match="has no answer"):
        command("rescore", tmp_path / "run")
