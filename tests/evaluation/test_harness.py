"""lm-evaluation-harness on our model gives what it gives on its own hf model, for three kinds of tasks, offline."""

import json
import logging

import pytest
import torch
from harness_tasks import values, write_tasks

from data.corpus.tokenizer import TINY


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra `harness`)")
    folder = tmp_path_factory.mktemp("tasks")
    return folder, write_tasks(folder)


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
