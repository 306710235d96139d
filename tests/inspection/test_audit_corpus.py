"""Every bad repository of the corpus is found under the right name, and none of their harmless twins is accused."""

import pytest
from repositories import CASES, build

from inspection import auditing, behaviour
from inspection.tree import local_tree

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """Nothing here depends on what the model says."""
    monkeypatch.setattr(behaviour, "measure", lambda path: {})


def audit(path):
    return auditing.Audit(local_tree(path)).ledger


def test_there_are_enough():
    assert len(CASES) >= 60 and len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_and_good(case, tiny_checkpoint, tmp_path):
    bad = audit(build(tmp_path, case, True, tiny_checkpoint))
    found = {finding.id: finding for finding in bad.findings}
    assert case.finding in found, sorted(found)
    is_accusation = found[case.finding].severity in ("high", "medium")
    assert bad.status == (1 if is_accusation or case.also_good else 2)

    good = audit(build(tmp_path, case, False, tiny_checkpoint))
    assert {finding.id for finding in good.accusations()} <= set(case.also_good)
    assert not list(good.unexamined()), list(good.unexamined())
    assert good.status == (1 if case.also_good else 0)
    assert case.finding not in {finding.id for finding in good.findings}
