"""Two runs over the same questions, question by question: which one alone is right, and whether that is chance."""

import statistics
from collections import defaultdict
from typing import Any

from evaluation.folder import Folder
from evaluation.report import markdown, percent
from evaluation.statistics import mcnemar, paired_interval

SCHEMA = "nanoqwen/comparison/1"


def question_scores(folder: Folder) -> dict[str, float]:
    """The mean score of each question's samples."""
    found: dict[str, list[float]] = defaultdict(list)
    for output in folder.outputs():
        if "score" not in output:
            raise ValueError(
                f"{folder.outputs_file}: answers without a score; `evaluate.py rescore {folder.path}` first"
            )
        found[output["question"]].append(output["score"])
    return {question: statistics.fmean(scores) for question, scores in found.items()}


def compare(a: Folder, b: Folder) -> dict[str, Any]:
    """The comparison as an object. ValueError where the questions are not the same."""
    ours, theirs = a.protocol(), b.protocol()
    if ours["data"]["sha256"] != theirs["data"]["sha256"]:
        raise ValueError(
            f"{a.path} and {b.path} answer different questions (data {ours['data']['sha256'][:12]} and "
            f"{theirs['data']['sha256'][:12]}); a paired comparison needs the same"
        )
    scores_a, scores_b = question_scores(a), question_scores(b)
    if scores_a.keys() != scores_b.keys():
        missing = sorted(scores_a.keys() ^ scores_b.keys())
        raise ValueError(f"{len(missing)} questions are answered in one run alone ({missing[0]}); end it with --resume")
    order = list(scores_a)
    first, second = [scores_a[q] for q in order], [scores_b[q] for q in order]
    only_a = [q for q in order if scores_a[q] == 1 and scores_b[q] == 0]
    only_b = [q for q in order if scores_a[q] == 0 and scores_b[q] == 1]
    return {
        "schema": SCHEMA,
        "runs": [str(a.path), str(b.path)],
        "task": ours["task"],
        "n": len(order),
        "values": [a.results()["value"], b.results()["value"]],
        "only_first_right": only_a,
        "only_second_right": only_b,
        "mcnemar_p": mcnemar(len(only_a), len(only_b)),
        "difference": paired_interval(first, second)._asdict(),
        "protocol_differences": sorted(
            key for key in {*ours, *theirs} - {"started", "command", "schema"} if ours.get(key) != theirs.get(key)
        ),
        "questions": {q: [scores_a[q], scores_b[q]] for q in order if scores_a[q] != scores_b[q]},
    }


def text(found: dict[str, Any], a: Folder, b: Folder) -> str:
    difference = found["difference"]
    rows = [
        ("", *found["runs"]),
        ("value (95 %)", percent(a.results()), percent(b.results())),
        ("right alone", len(found["only_first_right"]), len(found["only_second_right"])),
    ]
    surely = "differ" if difference["low"] > 0 or difference["high"] < 0 else "may be equal"
    lines = [
        markdown(rows),
        f"Difference {difference['value']:+.2%}, paired bootstrap 95 % {difference['low']:+.2%} to "
        f"{difference['high']:+.2%}; McNemar's exact p {found['mcnemar_p']:.4g}, {found['n']:,} questions: "
        f"the two {surely}.",
        f"The protocols differ in: {', '.join(found['protocol_differences']) or 'nothing'}.",
    ]
    for name, only in (("first", found["only_first_right"]), ("second", found["only_second_right"])):
        lines += [f"Right in the {name} run alone: {', '.join(only[:20])}{' …' * (len(only) > 20)}"] if only else []
    return "\n\n".join(lines)
