"""What bench.py found, for people: its JSON report as tables, as Markdown and as a picture.

All figures come from the report alone, so the three of them cannot disagree. Units: tokens per second, MB = 10^6 bytes.
"""

import statistics
from pathlib import Path
from typing import Any

from formats.files import atomic_file

Report = dict[str, Any]

SECONDS = {"load": "load, s"}
RATES = {"prefill": "prefill {prefill}", "decode": "decode after {after}", "decode_deep": "decode at depth {deep}"}
BATCHES = (4, 8, 16, 32)
BATCH_RATES = {f"decode_batch_{rows}": f"batch {rows}" for rows in BATCHES}
BATCH_HEADINGS = {}  # a rate, and what share of its limit it is
for rate in BATCH_RATES:
    BATCH_HEADINGS |= {rate: BATCH_RATES[rate], f"{rate}_share": "%"}
OTHERS = {
    "bytes_per_token": "MB a token",
    "weight_bandwidth": "GB/s",
    "share": "% of bandwidth",
    "peak_bytes": "peak MB",
}
HEADINGS = {**SECONDS, **RATES, **OTHERS}
SCALES = {"bytes_per_token": 1e-6, "weight_bandwidth": 1e-9, "peak_bytes": 1e-6, "share": 100}
SCALES |= {f"{rate}_share": 100 for rate in BATCH_RATES}
SAME_SIZE = {"q8_0": ("q8_0", "int8", "int8-32"), "q4_0": ("q4_0", "int4")}  # ours that a peer's is compared with
BATCH_LIMIT = (
    "The limit of a batch: a step takes no less time than to read the weights once at that bandwidth, and no less than "
    "the same row's prompt takes for as many multiplications. A batch computes logits for each token, a prompt for its "
    "last one alone, so the limit is below the prompt's rate."
)
# Colour, marker, and on which side of it the label is, so that neighbouring labels do not overlap.
LOOKS = {
    "nanoqwen": ("C0", "o", {"xytext": (7, -3), "ha": "left"}),
    "transformers": ("C1", "s", {"xytext": (0, -13), "ha": "center"}),
    "llama.cpp": ("C2", "^", {"xytext": (-7, -3), "ha": "right"}),
}


def summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum of every figure of some runs."""
    columns = {name: [run[name] for run in runs] for name in (runs[0] if runs else ())}
    return {name: {"median": statistics.median(x), "min": min(x), "max": max(x)} for name, x in columns.items()}


def batch_shares(run: dict[str, float], multiplications: float) -> dict[str, float]:
    """What share of its limit each batch's rate is. A step has to read the weights once and to multiply all rows by
    them; the longer one of the two is the limit, as both can be done at the same time.

    How fast this row multiplies is what its prompt says. `multiplications`: of a batch's token for each one of a
    prompt's token.
    """
    reading, found = run["bytes_per_token"] / run["read_bandwidth"], {}
    for rows, name in zip(BATCHES, BATCH_RATES, strict=True):
        if name in run:
            found[f"{name}_share"] = run[name] / rows * max(reading, rows * multiplications / run["prefill"])
    return found


def ratios(rows: list[Report]) -> list[Report]:
    """How many times as fast as each peer of its precision our rows are: quotients of runs of the same round."""
    found = []
    for ours in (row for row in rows if row["engine"] == "nanoqwen"):
        for peer in (row for row in rows if row["engine"] != "nanoqwen" and row["device"] == ours["device"]):
            if ours["precision"] not in SAME_SIZE.get(peer["precision"], (peer["precision"],)):
                continue
            rounds = []
            for a, b in zip(ours["runs"], peer["runs"], strict=False):
                faster = {name: a[name] / b[name] for name in RATES | BATCH_RATES if name in a and name in b}
                rounds.append(faster | {name: b[name] / a[name] for name in SECONDS if name in a and name in b})
            if rounds:
                found.append({"ours": title(ours), "peer": title(peer), "summary": summary(rounds)})
    return found


def title(row: Report) -> str:
    return f"{row['engine']} {row['precision']}" + (" on the GPU" if row["device"] == "cuda" else "")


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def cell(name: str, found: dict[str, float] | None) -> str:
    """Median, and in parentheses minimum and maximum where they differ."""
    if found is None:
        return ""
    low, middle, high = (number(found[key] * SCALES.get(name, 1)) for key in ("min", "median", "max"))
    return middle if low == high else f"{middle} ({low}–{high})"  # noqa: RUF001


def tables(report: Report) -> dict[str, list[list[str]]]:
    """The report as tables of text under their titles; the first line of each holds its headings."""
    limits = report["machine"]["limits"]
    precisions = list(next(iter(limits.values()))["matrix_rate"])
    head = ["", "read, GB/s", *(f"{name} product, 10^9/s" for name in precisions)]
    found = {"Limits of the machine": [head]}
    for name, limit in limits.items():
        rates = (limit["matrix_rate"][precision] for precision in precisions)
        rates = ("" if rate is None else number(rate / 1e9) for rate in rates)
        found["Limits of the machine"].append([name, number(limit["read_bandwidth"] / 1e9), *rates])
    measured = [(title(row), row["summary"]) for row in report["rows"] if row["runs"]]
    found["Speed"] = table(measured, HEADINGS, report["settings"])
    if report["settings"]["batches"]:
        found["Batches, and % of their limit"] = table(measured, BATCH_HEADINGS, report["settings"])
    if report["ratios"]:
        compared = [(f"{ratio['ours']} / {ratio['peer']}", ratio["summary"]) for ratio in report["ratios"]]
        headings = {name: heading.removesuffix(", s") for name, heading in (HEADINGS | BATCH_RATES).items()}
        found["Times as fast"] = table(compared, headings, report["settings"])
    return found


def table(rows: list[tuple[str, Report]], headings: dict[str, str], settings: Report) -> list[list[str]]:
    """(title, summary) of each row, in those columns of `headings` that any row has; the first line is the headings."""
    present = [name for name in headings if any(name in found for _, found in rows)]
    head = ["", *(headings[name].format(**settings) for name in present)]
    return [head, *([name, *(cell(column, found.get(column)) for column in present)] for name, found in rows)]


def markdown_table(head: list[str], body: list[list[str]]) -> list[str]:
    rule = "|---" + "|--:" * (len(head) - 1) + "|"
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(cells)} |" for cells in body)]


def hardware(machine: Report) -> str:
    """What ops.limits.describe found and how busy it was, in words."""
    words = (
        f"{machine['cpu']} ({machine['instructions']}, {machine['cores']} cores), {machine['memory'] / 2**30:.0f} GiB"
    )
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    products = f"; row products: {machine['row_products']}" if machine.get("row_products") else ""
    return f"{words}{gpu}, {machine['system']}, load average {machine['load_average']:.1f} before the start{products}"


def markdown(report: Report) -> str:
    machine, settings, versions = report["machine"], report["settings"], report["versions"]
    programs = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        f"# Speed of {report['model']['name']}",
        "",
        f"`{report['command']}`, {report['date']}, commit {report['commit']}.",
        f"{hardware(machine)}; {programs}.",
    ]
    for name, (head, *body) in tables(report).items():
        lines += ["", f"## {name}", "", *markdown_table(head, body)]
    plain = [title(row) for row in report["rows"] if any(run.get("repacked") == 0 for run in row["runs"])]
    lines += [
        "",
        f"Median (minimum and maximum) of {settings['repeats']} alternated runs, each in a process of its own with "
        f"{settings['threads']} thread{'s' * (settings['threads'] > 1)}"
        f"{'' if settings['isa'] == 'native' else ' and no other instructions than ' + settings['isa']}.",
        f"Tokens per second, {settings['tokens']} decoded; the bandwidth is the better one of just before and just "
        "after each run. nanoqwen's weights lie in huge pages where those are faster, as after some hundred tokens.",
        *([BATCH_LIMIT] if settings["batches"] else []),
        *([f"Without its repacked products, with which it crashes here: {', '.join(plain)}."] if plain else []),
        *(f"{reason}: {', '.join(rows)}." for reason, rows in report["absent"].items()),
    ]
    return "\n".join(lines) + "\n"


def show(tables: dict[str, list[list[str]]]) -> None:
    """Tables on standard output, medians alone."""
    from rich.console import Console
    from rich.table import Table

    for name, (head, *body) in tables.items():
        shown = Table(title=name, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for index, heading in enumerate(head):
            shown.add_column(heading, justify="right" if index else "left", no_wrap=not index)
        for cells in body:
            shown.add_row(*(text.partition(" (")[0] for text in cells))
        Console(highlight=False).print(shown, "")


def draw(report: Report, path: Path) -> None:
    """The roofline (Williams, Waterman and Patterson, 2009): what the CPU allows, and how close each row came."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    name, limit = [item for item in report["machine"]["limits"].items() if item[1]["device"] == "cpu"][-1]
    bandwidth, rates = limit["read_bandwidth"], {n: rate for n, rate in limit["matrix_rate"].items() if rate}
    left, right, peak = 0.25, 6000.0, max(rates.values())
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    axes.plot([left, peak / bandwidth], [bandwidth * left, peak], color="0.4", lw=1)
    small = {"textcoords": "offset points", "fontsize": 8}
    middle = (min(rates.values()) * peak) ** 0.5  # of the stretch where only some precisions are memory-bound
    label = f"{number(bandwidth / 1e9)} GB/s"
    axes.annotate(label, (middle / bandwidth, middle), (-8, 4), **small, color="0.3", ha="right")
    for precision, rate in rates.items():
        axes.plot([rate / bandwidth, right], [rate, rate], color="0.4", lw=1)
        label = f"{precision} {number(rate / 1e9)}·10⁹/s"
        axes.annotate(label, (right, rate), (-2, 3), **small, color="0.3", ha="right")
    weights = report["model"]["active_parameters"]
    rows = [row for row in report["rows"] if row["runs"] and row["device"] == "cpu"]
    for row in rows:
        color, marker, side = LOOKS[row["engine"]]
        size = row["summary"]["bytes_per_token"]["median"]
        for kind, tokens in (("decode", 1), ("prefill", report["settings"]["prefill"])):
            point = (2 * weights * tokens / size, 2 * weights * row["summary"][kind]["median"])
            axes.plot(*point, marker, color=color, mfc="none" if row["engine"] != "nanoqwen" else color)
            axes.annotate(row["precision"], point, **small, **side, color=color)
    for engine in dict.fromkeys(row["engine"] for row in rows):
        color, marker, _ = LOOKS[engine]
        axes.plot([], [], marker, color=color, mfc="none" if engine != "nanoqwen" else color, label=engine)
    axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="operations per byte of weights read")
    axes.set(ylabel="operations per second", title=f"{report['model']['name']} on {report['machine']['cpu']}, {name}")
    axes.legend(frameon=False, loc="lower right", title="left: decode, right: prefill")
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)
