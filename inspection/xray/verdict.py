"""Train on it or not, for what, and what has to go first: the rules behind it are the findings."""

from typing import Any, NamedTuple

from inspection.xray.rubric import Rule
from inspection.xray.views import Shape


class Use(NamedTuple):
    """What a set is for: in a sentence, the task's name, and how it is trained on."""

    intended: str
    task: str
    how: str


USES = {
    "pretraining": Use(
        "Texts for pretraining.",
        "pretraining",
        "next token of texts: make shards with data/shards.py tokenize, then stage: pretrain",
    ),
    "sft": Use(
        "Instructions with answers, for supervised fine-tuning.", "sft", "answers to single instructions: stage: sft"
    ),
    "chat": Use(
        "Conversations, for supervised fine-tuning.", "sft", "the assistant's turns of conversations: stage: sft"
    ),
    "tree": Use(
        "Trees of messages by several people, for supervised fine-tuning and, by their ranks, for preferences.",
        "sft",
        "the paths through the trees: stage: sft; ranks make pairs for dpo",
    ),
    "preference": Use(
        "Pairs of answers, for learning from preferences (DPO, a reward model).",
        "dpo",
        "which of two answers is better: stage: dpo",
    ),
    "eval": Use(
        "Questions with known answers, for evaluation.",
        "evaluation",
        "questions with known answers: to measure with; train on the training split alone (sft, grpo)",
    ),
    "rag": Use(
        "Questions with passages and answers, for retrieval-augmented generation.",
        "sft",
        "answers from given passages: stage: sft after joining them to the prompt; or to measure retrieval with",
    ),
    "shards": Use("Token ids, for pretraining.", "pretraining", "next token: stage: pretrain, data.source: shards"),
}
PROMPTS = Use(
    "Prompts without answers, to have answers written for them, or rewarded.",
    "prompts",
    "nothing is learnt from a prompt alone: generate answers, then stage: sft or dpo",
)
STAGES = {  # of a training run, which says what its rows are for whatever their columns are
    "pretrain": Use("Texts for pretraining.", "pretraining", "next token of texts: stage: pretrain"),
    "sft": Use("Answers to learn, for supervised fine-tuning.", "sft", "the assistant's answers: stage: sft"),
    "dpo": USES["preference"],
    "grpo": Use(
        "Questions whose answers can be checked, for reinforcement learning (GRPO).",
        "grpo",
        "the model's own answers, rewarded where they are right: stage: grpo",
    ),
}


def use_of(shape: Shape, stage: str | None) -> Use:
    """By a run's stage where there is one, else by the columns."""
    if stage is not None and (stage != "sft" or shape.name not in ("sft", "chat", "tree", "rag")):
        return STAGES[stage]
    return PROMPTS if shape.name == "eval" and shape.fields[2] is None else USES[shape.name]


MOST = 0.5  # of the rows: where more have to go, it is not this set


def verdict(report: dict[str, Any], rules: dict[str, Rule], to_drop: int, task: str) -> dict[str, Any]:
    """`to_drop`: rows that `--fix` would leave out."""
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
        reasons.insert(0, f"{to_drop:,} of {rows:,} rows must be left out")
    mask = report.get("mask")
    if mask and mask["rows_examined"] and not mask["target_tokens"]:
        train = "no"
        reasons.insert(0, "of the rows examined, no token is learnt")
    if report["commercial_use"] == "no":
        reasons.append("its licence forbids commercial use")
    if task == "evaluation":
        reasons.append("questions that a model was trained on measure its memory")
    if not report["complete"]:
        reasons.append(f"only {rows:,} rows were read; the rest may differ")
    return {"train": train, "task": task, "reasons": reasons, "rows_to_leave_out": to_drop}
