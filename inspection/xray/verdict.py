"""Train on it or not, for what, and what has to go first: the rules behind it are the findings."""

from typing import Any

from inspection.xray.rubric import Rule

TASKS = {
    "pretraining": (
        "pretraining",
        "next token of texts: make shards with data/shards.py tokenize, then stage: pretrain",
    ),
    "sft": ("sft", "answers to single instructions: stage: sft"),
    "chat": ("sft", "the assistant's turns of conversations: stage: sft"),
    "tree": (
        "sft",
        "paths through the trees, after they are written out as messages: stage: sft; ranks make pairs for dpo",
    ),
    "preference": ("dpo", "which of two answers is better: stage: dpo"),
    "eval": (
        "evaluation",
        "questions with known answers: to measure with; train on the training split alone (sft, grpo)",
    ),
    "rag": (
        "sft",
        "answers from given passages: stage: sft after joining them to the prompt; or to measure retrieval with",
    ),
    "shards": ("pretraining", "next token: stage: pretrain, data.source: shards"),
}
MOST = 0.5  # of the rows: where more have to go, it is not this set


def verdict(report: dict[str, Any], rules: dict[str, Rule], to_drop: int) -> dict[str, Any]:
    """`to_drop`: rows that `--fix` would leave out."""
    task, _ = TASKS[report["shape"]]
    rows = report["rows_read"]
    reasons = []
    for finding in report["findings"]:
        rule = rules[finding["id"]]
        if rule.drops or rule.severity == "medium":
            what = "leave out" if rule.drops else "look at"
            rows_of = f"{finding['count']:,} row{'' if finding['count'] == 1 else 's'}"
            reasons.append(f"{what} {rows_of} of {finding['id']}: {rule.reason}")
    train = "yes"
    if to_drop:
        train = "after-fixes"
    if not rows or to_drop > MOST * rows:
        train = "no"
        reasons.insert(0, f"{to_drop:,} of {rows:,} rows have to go")
    mask = report.get("mask")
    if mask and mask["rows_examined"] and not mask["target_tokens"]:
        train = "no"
        reasons.insert(0, "of the rows examined, no token is learnt")
    if report["commercial_use"] == "no":
        reasons.append("its licence forbids commercial use")
    if report["shape"] == "eval":
        reasons.append("questions that a model was trained on measure its memory")
    if not report["complete"]:
        reasons.append(f"only {rows:,} rows were read; the rest may be otherwise")
    return {"train": train, "task": task, "reasons": reasons, "rows_to_leave_out": to_drop}
