"""From a run's saved outputs to its figures; run, rescore, compare and report all come here.

A question's score is the mean over its samples; a figure's interval is that over the questions (statistics.py).
"""

import math
import statistics
from collections import Counter, defaultdict
from typing import Any

from evaluation import scoring
from evaluation.families import declines, family_verdict
from evaluation.folder import RESULTS, Folder, line
from evaluation.scoring import Verdict
from evaluation.statistics import interval, pass_at
from formats.files import write_text

LIKELIHOODS = {"likelihood": None, "likelihood-bytes": "bytes", "likelihood-tokens": "tokens"}
SCORERS = (*scoring.SCORERS, *LIKELIHOODS, "families", "harness")


def verdict(scorer: str, output: dict[str, Any]) -> Verdict:
    """What a scorer says of one saved output. ValueError names what the output lacks for it."""
    try:
        if scorer in LIKELIHOODS:
            return scoring.likelihood(output["choices"], output["reference"], LIKELIHOODS[scorer])
        if scorer == "families":
            return family_verdict(output["reference"], output["answer"])
        if scorer == "harness":  # its own verdict, saved with the answer
            (value,) = output["metrics"].values()
            return Verdict(value, output["answer"])
        return scoring.SCORERS[scorer].judge(output["answer"], output["reference"])
    except KeyError as error:
        raise ValueError(f"output {output['id']} has no {error.args[0]}, which the scorer {scorer} needs") from None


def score(folder: Folder, scorer: str) -> dict[str, Any]:
    """Scores all outputs (again), writes them with results.json and report.md, and returns the results."""
    outputs = []
    for output in folder.outputs():
        found = verdict(scorer, output)
        refused = (declines if scorer == "families" else scoring.is_refusal)(output.get("answer", ""))
        outputs.append(output | {"score": found.score, "read": found.read, "refused": refused})
    if not outputs:
        raise ValueError(f"{folder.outputs_file}: no answer in it")
    results = summary(folder.protocol() | {"scorer": scorer}, outputs)
    write_text(folder.outputs_file, "".join(map(line, outputs)))
    write_text(folder.results_file, line(results))
    from evaluation.report import report

    write_text(folder.report_file, report(folder.protocol(), results, outputs))
    return results


def summary(protocol: dict[str, Any], outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """results.json of scored outputs."""
    samples: dict[str, list[dict]] = defaultdict(list)
    groups: dict[str, dict[str, list[dict]]] = defaultdict(dict)
    for output in outputs:
        samples[output["question"]].append(output)
        for name in output["groups"]:
            groups[name][output["question"]] = samples[output["question"]]
    # A task of several columns has one that represents it.
    headline = groups[protocol["headline"]] if protocol.get("headline") else samples
    results = {
        "schema": RESULTS,
        "task": protocol["task"],
        "metric": protocol["metric"],
        "scorer": protocol["scorer"],
        "samples": protocol["samples"],
        **figures(headline),
        "seconds": math.fsum(o["seconds"] for o in outputs),
    }
    spoken = sum(o.get("tokens", 0) for o in outputs)
    results["tokens_per_second"] = spoken / results["seconds"] if results["seconds"] else None
    firsts = [
        o["first_token_seconds"] for o in outputs if "finish_reason" in o and o.get("first_token_seconds") is not None
    ]
    results["first_token_seconds"] = statistics.median(firsts) if firsts else None
    results["peak_bytes"] = max((o.get("peak_bytes", 0) for o in outputs), default=0)
    results["seconds_per_100_prompts"] = 100 * results["seconds"] / len(outputs)
    if (price := protocol.get("price_per_hour")) is not None:
        results["cost_per_100_prompts"] = results["seconds_per_100_prompts"] / 3600 * price
    results["groups"] = {name: figures(found) for name, found in groups.items()}
    if protocol["samples"] > 1:
        results["several"] = several(headline)
    return results


def figures(samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of some questions' outputs: the mean score with its interval, and counts over all of their samples."""
    outputs = [output for found in samples.values() for output in found]
    replies = [output for output in outputs if "finish_reason" in output]
    scores = [statistics.fmean(o["score"] for o in found) for found in samples.values()]
    return interval(scores)._asdict() | {
        "n": len(samples),
        "tokens": sum(o.get("tokens", 0) for o in replies),
        "thinking_tokens": sum(o.get("thinking_tokens", 0) for o in replies),
        "truncated": sum(o["finish_reason"] in ("length", "context", "loop") for o in replies),
        "format_errors": sum(o["read"] is None or o.get("malformed", False) for o in outputs),
        "refusals": sum(o["refused"] for o in replies),
    }


def several(samples: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """pass@k for powers of two, and self-consistency (Wang et al. 2022, https://arxiv.org/abs/2203.11171): whether the
    answer that most samples of a question give is right, of equally frequent ones the first."""
    most = min(map(len, samples.values()))
    found = {}
    for k in sorted({1 << i for i in range(most.bit_length())} | {most}):
        rates = [pass_at(k, len(o), sum(one["score"] == 1 for one in o)) for o in samples.values()]
        found[f"pass@{k}"] = interval(rates)._asdict()
    votes = []
    for outputs in samples.values():
        counts = Counter(o["read"] for o in outputs if o["read"] is not None)
        best = counts.most_common(1)[0][0] if counts else None
        votes.append(next((o["score"] for o in outputs if best is not None and o["read"] == best), 0.0))
    return found | {f"majority@{most}": interval(votes)._asdict()}
