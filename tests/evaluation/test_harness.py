"""lm-evaluation-harness on our model gives what it gives on its own hf model, for three kinds of tasks, offline."""

import json
import logging

import pytest
import torch
import yaml

from data.corpus.tokenizer import TINY


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three tasks of our own in the harness' form: choices with examples, a text's likelihood, and replies."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra `harness`)")
    folder = tmp_path_factory.mktemp("tasks")
    choices = [
        {"question": f"What is {a} + {b}?", "choices": [str(a + b), str(a + b + 1), str(a)], "label": 0}
        for a, b in ((7, 8), (12, 30), (5, 5), (9, 3), (31, 4))
    ]
    texts = [{"text": "How many times does the letter r appear in strawberry?" * n} for n in (1, 9)]
    found = {
        "tiny_choices": {
            "rows": choices,
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "label",
            "doc_to_choice": "choices",
            "fewshot_split": "test",
            "num_fewshot": 1,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "tiny_text": {
            "rows": texts,
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "tiny_replies": {
            "rows": [{"question": c["question"], "answer": c["choices"][0]} for c in choices],
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 24},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in found.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in task.pop("rows")))
        task |= {"task": name, "dataset_path": "json", "test_split": "test"}
        task["dataset_kwargs"] = {"data_files": {"test": str(file)}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder, list(found)


def test_three_kinds_of_tasks_are_the_hf_models(tasks, monkeypatch, tmp_path, capsys):
    import evaluate
    from evaluation.harness import language_model, without_our_evaluate
    from evaluation.run import Evaluated

    with without_our_evaluate():
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder, names = tasks
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    flags = ["run", *names, "--model", str(TINY), "--dtype", "float32", "--harness", "--out", str(tmp_path / "run")]
    options = evaluate.parse_arguments(flags)
    settings = {"tasks": names, "task_manager": manager, "bootstrap_iters": 0}
    theirs = HFLM(pretrained=str(TINY), device="cpu", dtype=torch.float32, batch_size=1)
    expected = lm_eval.simple_evaluate(theirs, **settings)
    found = lm_eval.simple_evaluate(language_model(Evaluated(options)), **settings)
    for name in names:
        for sample, reference in zip(found["samples"][name], expected["samples"][name], strict=True):
            assert sample["arguments"] == reference["arguments"]
            for ours, hf in zip(values(sample["resps"]), values(reference["resps"]), strict=True):
                assert ours == (hf if isinstance(hf, str) else pytest.approx(hf, abs=1e-4))
        for metric, value in expected["results"][name].items():
            if isinstance(value, float):
                assert found["results"][name][metric] == pytest.approx(value, rel=1e-4)
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda *_, **__: found)
    evaluate.run(options)
    results = json.loads((tmp_path / "run" / "tiny_choices" / "results.json").read_text())
    assert results["value"] == pytest.approx(expected["results"]["tiny_choices"]["acc,none"]) and results["n"] == 5
    assert "tiny_choices: 5 questions" in capsys.readouterr().out


def values(nested) -> list:
    """All strings and numbers of nested lists, in order."""
    if isinstance(nested, list | tuple):
        return [value for one in nested for value in values(one)]
    return [nested]
