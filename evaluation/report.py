"""Results for people: report.md of a run, a table of several runs, their curve over the thinking budget, and what a
model card takes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from evaluation.folder import Folder
from formats.files import atomic_file

SHOWN = 5  # wrong answers in a report


def percent(found: dict[str, Any]) -> str:
    """A share with its 95 % interval."""
    return f"{found['value']:.1%} ({found['low']:.1%}–{found['high']:.1%})"  # noqa: RUF001


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """The first row is the heading."""
    head, *body = ([escaped(cell) for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def escaped(cell: Any) -> str:
    """A cell that ends neither its column nor its row, and no tag."""
    return " ".join(str(cell).split()).replace("|", "\\|").replace("<", "&lt;")


def report(protocol: dict[str, Any], results: dict[str, Any], outputs: list[dict[str, Any]]) -> str:
    several = results.get("several", {})
    figures = [
        ("figure", "value"),
        (results["metric"], percent(results)),
        *((name, percent(found)) for name, found in several.items()),
        ("questions", f"{results['n']:,}, {results['samples']} answer{'s' * (results['samples'] > 1)} each"),
        ("answers that end in no form", f"{results['format_errors']:,}"),
        ("refusals", f"{results['refusals']:,}"),
        ("cut off by a limit", f"{results['truncated']:,}"),
        ("tokens, of which thinking", f"{results['tokens']:,}, {results['thinking_tokens']:,}"),
        ("tokens per second", _number(results["tokens_per_second"])),
        ("seconds to the first token (median)", _number(results["first_token_seconds"])),
        ("peak memory", f"{results['peak_bytes'] / 1e6:,.0f} MB"),
        ("seconds for 100 prompts", _number(results["seconds_per_100_prompts"])),
    ]
    if "cost_per_100_prompts" in results:
        figures.append(
            (f"cost of 100 prompts at {protocol['price_per_hour']} an hour", f"{results['cost_per_100_prompts']:.4f}")
        )
    model = protocol["model"]
    parts = [f"# {results['task']}: {escaped(model['source'])}", markdown(figures)]
    if results["groups"]:
        rows = [(name, found["n"], percent(found)) for name, found in results["groups"].items()]
        parts += ["## Groups", markdown([("group", "questions", results["metric"]), *rows])]
    settings = [
        (key, _short(protocol[key])) for key in protocol if key not in ("schema", "model", "machine", "versions")
    ]
    parts += ["## Protocol", markdown([("setting", "value"), *settings])]
    wrong = [output for output in outputs if output["score"] < 1][:SHOWN]
    if wrong:
        rows = [(o["id"], _short(o.get("answer", o.get("choices"))), _short(o["reference"])) for o in wrong]
        parts += ["## The first wrong answers", markdown([("question", "answer", "right"), *rows])]
    parts.append("Every figure above is computed from outputs.jsonl by `python evaluate.py rescore`.")
    return "\n\n".join(parts) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"  # noqa: RUF001


def _short(value: Any, most: int = 200) -> str:
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= most else f"{text[:most]} …"


def table(folders: Sequence[Folder], groups: Sequence[str] = ()) -> str:
    """A row for each run: its value with the interval, the groups that are asked for, form, length and time."""
    found = [(folder, folder.protocol(), folder.results()) for folder in folders]
    head = ["run", "task", "value", *groups, "form errors", "refusals", "thinking tokens", "tokens/s"]
    rows = []
    for folder, _, results in found:
        n = max(results["n"] * results["samples"], 1)
        cells = [percent(results["groups"][name]) if name in results["groups"] else "–" for name in groups]  # noqa: RUF001
        thinking = f"{results['thinking_tokens'] / n:.0f}"
        speed = _number(results["tokens_per_second"])
        shares = [f"{results[name] / n:.1%}" for name in ("format_errors", "refusals")]
        rows.append([folder.path, results["task"], percent(results), *cells, *shares, thinking, speed])
    return markdown([head, *rows])


def plot(folders: Sequence[Folder], picture: Path) -> None:
    """The value against the thinking budget, a curve for each model. 0: thinking was off; no budget: not drawn."""
    from matplotlib.figure import Figure

    curves: dict[str, dict[int, dict[str, float]]] = {}
    for folder in folders:
        protocol, results = folder.protocol(), folder.results()
        budget = 0 if not protocol["thinking"] else protocol["thinking_budget"]
        if budget or not protocol["thinking"]:
            curve = curves.setdefault(protocol["model"]["source"], {})
            curve[budget] = results
            if protocol["scorer"] == "families":
                curve[0] = results["groups"]["off"]
    if not curves:
        raise ValueError("--plot: none of these runs has a thinking budget; run them with --thinking-budget N")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        budgets = sorted(curve)
        values = [100 * curve[budget]["value"] for budget in budgets]
        axes.plot(budgets, values, "o-", label=label)
        low, high = ([100 * curve[budget][end] for budget in budgets] for end in ("low", "high"))
        axes.fill_between(budgets, low, high, alpha=0.15)
    axes.set(xlabel="thinking budget (tokens; 0: thinking off)", ylabel="right answers (%)", ylim=(0, 101))
    axes.legend()
    with atomic_file(picture) as temporary:
        figure.savefig(temporary, format=picture.suffix[1:], dpi=120)


def evaluation_results(folder: Folder, source: str | None = None) -> str:
    """One entry of a hub repository's .eval_results/TASK.yaml
    (https://huggingface.co/docs/hub/eval-results)."""
    protocol, results = folder.protocol(), folder.results()
    entry = {
        "dataset": {"id": protocol["data"]["source"], "task_id": results["task"]},
        "value": round(100 * results["value"], 4),
        "date": protocol["started"][:10],
        "notes": f"{results['metric']} {percent(results)} of {results['n']} questions; scorer {results['scorer']}",
    }
    if protocol["data"].get("revision"):
        entry["dataset"]["revision"] = protocol["data"]["revision"]
    if source:
        entry["source"] = {"url": source, "name": "outputs.jsonl"}
    return yaml.safe_dump([entry], sort_keys=False, allow_unicode=True)


def manifest_entries(folders: Sequence[Folder]) -> list[dict[str, Any]]:
    """The `evals` of a model_context.json: each figure with the place of its raw outputs."""
    found = []
    for folder in folders:
        results = folder.results()
        found.append(
            {key: results[key] for key in ("task", "metric", "value", "low", "high", "n")}
            | {"outputs": str(folder.outputs_file), "protocol": str(folder.protocol_file)}
        )
    return found
