"""Scorers take for right what they show, statistics equal scipy's and statsmodels', and hostile answers harm nobody."""

import itertools
import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from evaluation.sandbox import passes
from evaluation.scoring import SCORERS, boxed, likelihood, number
from evaluation.statistics import interval, mcnemar, paired_interval, pass_at

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_judges_its_own_examples(name):
    scorer = SCORERS[name]
    assert [scorer.judge(*case).score for case in scorer.right] == [1.0] * len(scorer.right)
    assert [scorer.judge(*case).score for case in scorer.wrong] == [0.0] * len(scorer.wrong)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("It is 1,234,567.", 1234567),
        ("x = -3.50", -3.5),
        ("about 2/3 of it", 2 / 3),
        ("\\frac{-7}{2}", -3.5),
        ("1e3 metres", 1000),
        ("on 2024-05-06", 6),
        ("5 + 7 = 12.", 12),
        ("$18.00", 18),
        ("version 3.11.7", None),
        ("none here", None),
        ("10%", 10),
        (".5", 0.5),
        ("3/0", None),
    ],
)
def test_the_last_number(text, value):
    found = number(text)
    if text == "version 3.11.7":  # two numbers or one: any reading but a crash
        return
    assert (found is None) if value is None else float(abs(found)) == pytest.approx(abs(value))


def test_boxed_takes_the_last_whole_one():
    assert boxed("\\boxed{1} then \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert boxed("\\boxed{1") is None and boxed("") is None


def test_likelihoods_by_length():
    choices = [{"logprob": -4.0, "bytes": 2, "tokens": 1}, {"logprob": -6.0, "bytes": 6, "tokens": 3}]
    assert likelihood(choices, 0).score == 1 and likelihood(choices, 1, "bytes").score == 1
    assert likelihood(choices, 1, "tokens").score == 1


def test_code_is_held_within_its_limits(tmp_path):
    started = time.monotonic()
    assert not passes("while True: pass", seconds=1)
    assert not passes("x = bytearray(4 << 30)")
    assert not passes(f"import os, subprocess; subprocess.Popen(['sleep', '1000']); open({str(tmp_path / 'x')!r})", 5)
    assert not passes("raise SystemExit(3)") and not passes("1 +") and not passes("\0")
    assert passes("import os; assert os.listdir('.') == [] and 'HOME' not in os.environ")
    assert time.monotonic() - started < 30


def test_mcnemar_is_statsmodels():
    from statsmodels.stats.contingency_tables import mcnemar as theirs

    for b, c in itertools.product((0, 1, 2, 5, 17, 40), repeat=2):
        expected = theirs([[3, b], [c, 4]], exact=True).pvalue
        assert mcnemar(b, c) == pytest.approx(expected, rel=1e-12, abs=0) or b == c == 0
    assert mcnemar(700, 800) == pytest.approx(theirs([[0, 700], [800, 0]], exact=True).pvalue, rel=1e-9)


def test_wilson_is_statsmodels():
    from statsmodels.stats.proportion import proportion_confint

    for right, n in ((0, 5), (3, 7), (100, 100), (61, 200)):
        found = interval([1.0] * right + [0.0] * (n - right))
        assert found[1:] == pytest.approx(proportion_confint(right, n, method="wilson"), abs=1e-12)


def test_clustered_scores_have_the_normal_interval():
    scores = [0.25, 0.5, 1.0, 0.0, 0.75]
    half = 1.959963984540054 * np.std(scores, ddof=1) / math.sqrt(5)
    assert interval(scores) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_the_bootstrap_is_scipys():
    from scipy.stats import bootstrap

    rng = random.Random(1)
    a = [float(rng.random() < 0.6) for _ in range(150)]
    b = [float(rng.random() < 0.75) for _ in range(150)]
    theirs = bootstrap(
        (np.subtract(b, a),), np.mean, method="percentile", n_resamples=10_000, rng=3
    ).confidence_interval
    found = paired_interval(a, b)
    assert found.value == pytest.approx(np.mean(b) - np.mean(a))
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.012)
    assert found == paired_interval(a, b)
    with pytest.raises(ValueError, match="the same questions"):
        paired_interval([1.0], [])


def test_pass_at_k_is_the_share_of_choices_with_a_right_one():
    for n, right in ((4, 1), (5, 3), (3, 0), (3, 3)):
        samples = [1] * right + [0] * (n - right)
        for k in range(1, n + 1):
            chosen = list(itertools.combinations(samples, k))
            assert pass_at(k, n, right) == pytest.approx(sum(map(any, chosen)) / len(chosen))
    with pytest.raises(ValueError, match="k from 1 to 3"):
        pass_at(4, 3, 1)


def test_only_running_imports_torch(tmp_path):
    code = "import sys, runpy; sys.argv = sys.argv[1:]\ntry: runpy.run_path('evaluate.py', run_name='__main__')\n"
    code += "except SystemExit as end: assert not end.code, end\nassert 'torch' not in sys.modules"
    write_run(tmp_path / "a", [1, 0, 1])
    write_run(tmp_path / "b", [1, 1, 1])
    for arguments in (["tasks"], ["rescore", "a"], ["compare", "a", "b"], ["report", "a", "b"], ["--help"]):
        command = [
            sys.executable,
            "-c",
            code,
            "evaluate.py",
            *(str(tmp_path / a) if len(a) == 1 else a for a in arguments),
        ]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


def write_run(path: Path, scores: list[int]) -> None:
    """A finished run of a task with one-letter answers."""
    path.mkdir()
    protocol = {"schema": "nanoqwen/protocol/1", "task": "t", "metric": "accuracy", "scorer": "exact", "headline": None}
    protocol |= {"data": {"source": "t.jsonl", "sha256": "0" * 64}, "samples": 1, "model": {"source": "m"}}
    protocol |= {"thinking": True, "thinking_budget": 0, "started": "2026-01-01T00:00:00", "price_per_hour": 0.5}
    (path / "protocol.json").write_text(json.dumps(protocol))
    outputs = [
        {"id": str(i), "question": str(i), "groups": ["g"], "reference": "A", "answer": "A" if score else "B"}
        | {"finish_reason": "stop", "tokens": 3, "thinking_tokens": 1, "seconds": 0.5, "score": score}
        for i, score in enumerate(scores)
    ]
    (path / "outputs.jsonl").write_text("".join(json.dumps(output) + "\n" for output in outputs))
    from evaluation.folder import Folder
    from evaluation.results import score

    score(Folder(path), "exact")
