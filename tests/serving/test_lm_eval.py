"""lm-evaluation-harness' own clients against this server find what its hf model finds on the same files."""

import logging

import pytest
import torch
from harness_tasks import values, write_tasks

from evaluation.harness import without_our_evaluate

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra `harness`)")
TINY = "models/tiny"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """`evaluated(model, names)`: what the harness finds, of these tasks."""
    with without_our_evaluate():
        import lm_eval
        from lm_eval.tasks import TaskManager
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = tmp_path_factory.mktemp("tasks")
    names = write_tasks(folder)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield lambda model, names=names: lm_eval.simple_evaluate(
            model, tasks=list(names), task_manager=manager, bootstrap_iters=0
        )


@pytest.fixture(scope="module")
def expected(evaluated):
    from lm_eval.models.huggingface import HFLM

    return evaluated(HFLM(pretrained=TINY, device="cpu", dtype=torch.float32, batch_size=1))


@pytest.mark.usefixtures("idle", "one_thread")
@pytest.mark.parametrize("how", [{"tokenizer": TINY, "num_concurrent": 4}, {"tokenizer_backend": "remote"}])
def test_local_completions_finds_what_the_hf_model_finds(running, evaluated, expected, how):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    url = f"{running.url}/v1/completions"
    found = evaluated(LocalCompletionsAPI(model=TINY, base_url=url, max_length=1024, **how))
    for name, samples in found["samples"].items():
        for sample, reference in zip(samples, expected["samples"][name], strict=True):
            for ours, hf in zip(values(sample["resps"]), values(reference["resps"]), strict=True):
                assert ours == (hf if isinstance(hf, str) else pytest.approx(hf, abs=1e-3))
        for metric, value in expected["results"][name].items():
            if isinstance(value, float):
                assert found["results"][name][metric] == pytest.approx(value, rel=1e-4)
