"""The report for people: one HTML page, Markdown, and what the terminal shows. xray.json is the report for programs.

All text in it is a stranger's. The page's helpers escape it; Markdown gets it with the characters escaped that would
begin a link, an image, mark-up or HTML; the terminal gets no control characters.
"""

from pathlib import Path
from typing import Any

from markupsafe import Markup

from data.inspection import printable
from inspection import page

TONES = {"high": "bad", "medium": "warn", "low": "info"}
VERDICTS = {
    "yes": ("good", "Train on it"),
    "after-fixes": ("warn", "Train on it after fixes"),
    "no": ("bad", "Do not train on it"),
}
STYLE = """
section ul { margin: .3rem 0 .7rem; padding-left: 1.2rem; } section li { margin: .2rem 0; overflow-wrap: anywhere; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font-family: var(--mono, monospace); font-size: 13px;
  max-height: 24em; overflow-y: auto; padding: 8px 10px; border: 1px solid var(--line); border-radius: 6px; }
.tokens mark { background: color-mix(in srgb, var(--good, #2a7) 26%, transparent); color: inherit; border-radius: 3px; }
.tokens span { opacity: .62; }
"""


def number(value: float | int | None) -> str:
    if value is None:
        return "not counted"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 100 else f"{value:,.4g}"


def rows_line(report: dict[str, Any]) -> str:
    """The rows, and everywhere the same words where only a part was read."""
    if report["complete"]:
        return f"{report['rows_read']:,}, all counted"
    whole = f" of {report['rows']:,}" if report["rows"] is not None else " (how many there are is not known)"
    return f"{report['rows_read']:,} read{whole}: all figures are of this part"


def headline(report: dict[str, Any]) -> str:
    """The verdict in one line."""
    verdict = report["verdict"]
    why = verdict["reasons"][0] if verdict["train"] == "no" else report["task"]
    return f"{VERDICTS[verdict['train']][1]}: {why}"


def license_line(report: dict[str, Any]) -> str:
    if report["license"] is None:
        return "not stated; commercial use: unknown"
    return f"{report['license']}; commercial use: {report['commercial_use']}"


def fields(report: dict[str, Any]) -> dict[str, str]:
    """Those of the course's twelve fields that are one line each."""
    made = {
        "name": report["name"],
        "address": report["address"],
        "intended use": f"{report['intended_use'].rstrip('.')} ({report['intended_use_from']})",
        "licence": license_line(report),
        "rows": rows_line(report),
        "splits": ", ".join(f"{name}: {count:,}" for name, count in report["splits"].items()),
        "shape": report["shape"]
        + (f", by the column {report['signature_column']}" if report["signature_column"] else ""),
        "tokenizer": report["tokenizer"] or "none, tokens are not counted",
    }
    duplicates = report["duplicates"]
    made["duplicates"] = f"{duplicates['exact']:,} exact (ignoring case and white space), {duplicates['near']:,} near"
    if duplicates.get("near_rows_compared") == 0:
        made["duplicates"] = made["duplicates"].rpartition(", ")[0] + "; near ones were not looked for"
    elif "near_threshold" in duplicates:
        made["duplicates"] += f" (Jaccard of word 3-grams at least {duplicates['near_threshold']}"
        compared = duplicates["near_rows_compared"]
        made["duplicates"] += ")" if compared >= report["rows_read"] else f", in the first {compared:,} rows)"
    return made


def mask_facts(report: dict[str, Any]) -> dict[str, str]:
    mask = report["mask"]
    whole = "all" if report["complete"] and mask["rows_examined"] >= report["rows_read"] else "the first"
    made = {
        "rows examined": f"{whole} {mask['rows_examined']:,}",
        "training rows": f"{mask['training_rows']:,} of at most {mask['sequence']:,} tokens",
        "longer rows": number(mask["truncated_rows"]),
        "tokens learnt": f"{mask['target_tokens']:,} of {mask['tokens']:,}",
        "rows that teach nothing": number(mask["zero_target_rows"]),
        "rows without an end": number(mask["missing_end_rows"]),
        "padding": f"{mask['padding_share']:.1%} of a step's tokens",
    }
    if mask.get("packing_efficiency") is not None:
        made["packing"] = f"{mask['packing_efficiency']:.1%} of the sequences' tokens are rows, with data.pack"
    if "bits" in mask:
        made["bits per token"] = (
            f"median {mask['bits']['median']:.2f}, mean {mask['bits']['mean']:.2f} of {mask['bits']['rows']:,} rows"
        )
    return made


def length_rows(report: dict[str, Any]) -> list[list[Any]]:
    return [
        [name, unit, *(number(spread[key]) for key in ("median", "p95", "max", "total"))]
        for name, units in report["lengths"].items()
        for unit, spread in units.items()
        if spread is not None
    ]


def suspicious_rows(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(rule, row) of three rules, the most severe first."""
    return [(finding["id"], row) for finding in report["findings"] for row in finding["shown"][:1]][:3]


LENGTH_HEADER = ["column", "unit", "median", "95 %", "maximum", "total"]


def extras(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What only some shapes have."""
    made = {}
    if tree := report.get("tree"):
        made["Trees"] = {name: _plain(value) for name, value in tree.items()}
    if pairs := report.get("pairs"):
        made["Pairs"] = {name.replace("_", " "): _plain(value) for name, value in pairs.items()}
    if found := report.get("shards"):
        made["Shards"] = {name.replace("_", " "): _plain(value) for name, value in found.items() if name != "files"}
    if found := report.get("croissant"):
        differences = "; ".join(found["differences"]) or "none"
        made["Croissant"] = {"valid": _plain(found["valid"]), "differences from what is there": differences}
        if "not_compared" in found:
            made["Croissant"] = {"not compared": found["not_compared"]}
    return made


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number(count)}" for name, count in list(value.items())[:12])
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    return number(value) if isinstance(value, int | float) else str(value)


# --- HTML ---


def html(report: dict[str, Any]) -> str:
    verdict = report["verdict"]
    tone, _ = VERDICTS[verdict["train"]]
    made = page.Page(f"X-ray of {report['name']}", rows_line(report), (tone, headline(report)))
    made.style(STYLE)
    made.section("What it is", page.facts(fields(report)), _columns(report))
    made.section(
        "Verdict",
        page.badge(verdict["train"], tone),
        page.text(f"For {verdict['task']}: {report['task']}."),
        Markup("<ul>{}</ul>").format(
            Markup("").join(Markup("<li>{}</li>").format(page.show(reason)) for reason in verdict["reasons"])
        )
        if verdict["reasons"]
        else page.text("No rule is broken."),
    )
    made.section("Findings", *_findings(report))
    if suspicious := suspicious_rows(report):
        made.section(
            "Three suspicious rows",
            *(_row(row | {"why": ": ".join(filter(None, (name, row["why"])))}) for name, row in suspicious),
        )
    if report["mask"]:
        made.section("What will be learnt", page.facts(mask_facts(report)), *_spans(report["mask"]))
    made.section("Lengths", page.table(length_rows(report), LENGTH_HEADER), *_histograms(report))
    made.section("Three rows", *(_row(example) for example in report["examples"]))
    if report["repeated_prompts"]:
        rows = [[prompt["count"], prompt["text"][:300]] for prompt in report["repeated_prompts"]]
        made.section("The most repeated prompts", page.table(rows, ["rows", "prompt"]))
    if report["duplicates"].get("nearest"):
        rows = [[pair["row"], pair["other_row"], pair["jaccard"]] for pair in report["duplicates"]["nearest"]]
        made.section("Near-duplicates", page.table(rows, ["row", "similar row", "Jaccard"]))
    if report["against"]:
        made.section(f"Leakage against {report['against']}", *_leaks(report))
    for title, facts in extras(report).items():
        made.section(title, page.facts(facts))
    return made.render()


def _columns(report: dict[str, Any]) -> Markup:
    rows = [
        [
            column["name"],
            column["type"],
            column["nulls"],
            page.badge("gives the shape", "info") if column["name"] == report["signature_column"] else "",
        ]
        for column in report["columns"]
    ]
    return page.table(rows, ["column", "type", "empty", ""])


def _findings(report: dict[str, Any]) -> list[Markup]:
    if not report["findings"]:
        return [page.text("No row breaks a rule.")]
    made = []
    for finding in report["findings"]:
        some = ", ".join(f"{row:,}" for row in finding["rows"][:20]) + (" …" if finding["count"] > 20 else "")
        head = Markup("{} {} {}").format(
            page.badge(finding["severity"], TONES[finding["severity"]]),
            finding["id"],
            f"{finding['count']:,} row{'' if finding['count'] == 1 else 's'}",
        )
        parts = [page.text(finding["reason"]), page.facts({"condition": finding["rule"], "rows": some})]
        made.append(page.fold(head, *parts, *(_row(shown) for shown in finding["shown"])))
    return made


def _row(shown: dict[str, Any]) -> Markup:
    head = f"{shown['where']}" + (f" — {shown['why']}" if shown["why"] else "")
    return Markup("").join(
        [Markup('<p class="soft">{}</p>').format(page.show(head)), page.code(shown["text"]) if shown["text"] else ""]
    )


def _spans(mask: dict[str, Any]) -> list[Markup]:
    made = [page.text("Green is learnt, grey is only read, as train.py masks it:")] if mask["examples"] else []
    for example in mask["examples"]:
        text = Markup("").join(
            Markup("<mark>{}</mark>" if span["learnt"] else "<span>{}</span>").format(page.show(span["text"][:4000]))
            for span in example["spans"]
        )
        made.append(
            Markup('<p class="soft">row {}</p><div class="tokens">{}</div>').format(page.show(example["row"]), text)
        )
    return made


def _histograms(report: dict[str, Any]) -> list[Markup]:
    made = []
    for name, units in list(report["lengths"].items())[:8]:
        for unit, spread in units.items():
            if spread is not None:
                shape = spread["histogram"]
                plot = page.histogram(shape["edges"], shape["counts"], unit)
                made.append(page.fold(f"{name}, {unit}", plot, open=not made))
    return made


def _leaks(report: dict[str, Any]) -> list[Markup]:
    count = next((finding["count"] for finding in report["findings"] if finding["id"] == "leakage"), 0)
    if not count:
        return [page.text("No row shares a run of eight words with the other set.")]
    rows = [[leak["row"], leak["other_row"], leak["ngram"]] for leak in report["leakage"][:100]]
    return [
        page.text(f"{count:,} rows share a run of words with the other set."),
        page.table(rows, ["row", "other row", "shared"]),
    ]


# --- Markdown and terminal ---

SPECIAL = {character: "\\" + character for character in "\\`*_{}[]#|!~$"}
SPECIAL = str.maketrans(SPECIAL | {"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "@\u200b"})


def escaped(text: Any, most: int = 300) -> str:
    """A stranger's text on one line of Markdown that is only text."""
    line = printable(" ".join(str(text).split()))
    line = line if len(line) <= most else line[: most - 1] + "…"
    return line.translate(SPECIAL).replace("://", ":\u200b//")


def markdown(report: dict[str, Any]) -> str:
    verdict = report["verdict"]
    lines = [f"# X-ray of {escaped(report['name'])}", ""]
    lines += [f"**{escaped(headline(report))}**", ""]
    lines += [f"- {escaped(reason)}" for reason in verdict["reasons"]]
    lines += [
        "",
        "| field | |",
        "|---|---|",
        *(f"| {name} | {escaped(value)} |" for name, value in fields(report).items()),
    ]
    lines += ["", "## Columns", "", "| column | type | empty |", "|---|---|---|"]
    lines += [
        f"| {escaped(column['name'])} | {escaped(column['type'])} | {column['nulls']:,} |"
        for column in report["columns"]
    ]
    lines += ["", "## Lengths", "", f"| {' | '.join(LENGTH_HEADER)} |", "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(escaped(cell) for cell in row)} |" for row in length_rows(report)]
    lines += ["", "## Findings", ""]
    if report["findings"]:
        lines += ["| finding | severity | rows | reason |", "|---|---|---|---|"]
        for finding in report["findings"]:
            lines.append(
                f"| {finding['id']} | {finding['severity']} | {finding['count']:,} | {escaped(finding['reason'])} |"
            )
        for finding in report["findings"]:
            if finding["shown"]:
                lines += ["", f"### {finding['id']}", ""]
            for shown in finding["shown"]:
                lines.append(f"- {escaped(shown['where'])}: {escaped(shown['why'] or shown['text'])}")
    else:
        lines.append("No row breaks a rule.")
    if report["mask"]:
        lines += [
            "",
            "## What will be learnt",
            "",
            *(f"- {name}: {value}" for name, value in mask_facts(report).items()),
        ]
    lines += ["", "## Three rows", ""]
    lines += [
        f"- {escaped(example['where'])} ({escaped(example['why'])}): {escaped(example['text'])}"
        for example in report["examples"]
    ]
    if report["repeated_prompts"]:
        lines += ["", "## The most repeated prompts", ""]
        lines += [f"- {prompt['count']:,} times: {escaped(prompt['text'])}" for prompt in report["repeated_prompts"]]
    if report["leakage"]:
        lines += [
            "",
            f"## Leakage against {escaped(report['against'])}",
            "",
            "| row | other row | shared |",
            "|---|---|---|",
        ]
        lines += [
            f"| {leak['row']} | {leak['other_row']} | {escaped(leak['ngram'])} |" for leak in report["leakage"][:100]
        ]
    for title, facts in extras(report).items():
        lines += ["", f"## {title}", "", *(f"- {name}: {escaped(value, 1000)}" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


def terminal(report: dict[str, Any]):
    """What the command prints: the same in a hundred lines at most."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    def cell(value: Any, most: int = 400) -> Text:
        line = printable(" ".join(str(value).split()))
        return Text(line if len(line) <= most else line[: most - 1] + "…")

    def grid(pairs: dict[str, Any]) -> Padding:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for name, value in pairs.items():
            table.add_row(name, cell(value))
        return Padding.indent(table, 2)

    def listed(header: list[str], rows: list[list[Any]], right: set[int]) -> Padding:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for place, name in enumerate(header):
            table.add_column(name, justify="right" if place in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(cell(value, 160) for value in row))
        return Padding.indent(table, 2)

    colours = {"good": "green", "warn": "yellow", "bad": "red"}
    tone, _ = VERDICTS[report["verdict"]["train"]]
    parts: list[Any] = [Text(f"X-ray of {printable(report['name'])}", style="bold"), grid(fields(report))]
    columns = [[column["name"], column["type"]] for column in report["columns"][:20]]
    parts += [Text("\nColumns", style="bold"), listed(["column", "type"], columns, set())]
    if report["lengths"]:
        parts += [Text("\nLengths", style="bold"), listed(LENGTH_HEADER, length_rows(report), {2, 3, 4, 5})]
    if report["mask"]:
        parts += [Text("\nWhat will be learnt", style="bold"), grid(mask_facts(report))]
    for title, facts in extras(report).items():
        parts += [Text(f"\n{title}", style="bold"), grid(facts)]
    parts.append(Text("\nFindings", style="bold"))
    if report["findings"]:
        rows = [
            [
                finding["id"],
                finding["severity"],
                f"{finding['count']:,}",
                ", ".join(map(str, finding["rows"][:5])) + (" …" if finding["count"] > 5 else ""),
            ]
            for finding in report["findings"]
        ]
        parts.append(listed(["finding", "severity", "rows", "which (from 0)"], rows, {2}))
        if suspicious := suspicious_rows(report):
            parts.append(Text("\nThree suspicious rows", style="bold"))
            parts += [grid({name: f"{row['where']}: {row['why'] or row['text']}"}) for name, row in suspicious]
    else:
        parts.append(Padding.indent(Text("no row breaks a rule"), 2))
    if report["leakage"]:
        rows = [[str(leak["row"]), str(leak["other_row"]), leak["ngram"]] for leak in report["leakage"][:10]]
        parts += [Text("\nLeakage", style="bold"), listed(["row", "other row", "shared"], rows, {0, 1})]
    if report["repeated_prompts"]:
        rows = [[f"{prompt['count']:,}", prompt["text"]] for prompt in report["repeated_prompts"][:5]]
        parts += [Text("\nThe most repeated prompts", style="bold"), listed(["rows", "prompt"], rows, {0})]
    parts.append(Text("\nThree rows", style="bold"))
    parts += [
        grid({printable(row["why"]).partition(":")[0]: f"{row['where']}: {row['text']}"}) for row in report["examples"]
    ]
    parts += [Text(f"\n{headline(report)}", style=f"bold {colours[tone]}")]
    parts += [Padding.indent(Text("· ") + cell(reason), 2) for reason in report["verdict"]["reasons"]]
    return Group(*parts)


# --- plots ---


def plots(report: dict[str, Any], folder: Path) -> list[Path]:
    """The histograms as PNG, one file a column."""
    from matplotlib.figure import Figure

    from formats.files import atomic_file

    made = []
    for place, (name, units) in enumerate(list(report["lengths"].items())[:8]):
        known = {unit: spread for unit, spread in units.items() if spread is not None}
        if not known:
            continue
        figure = Figure(figsize=(4.8 * len(known), 3.2), layout="constrained")
        for axes, (unit, spread) in zip(figure.subplots(1, len(known), squeeze=False)[0], known.items(), strict=True):
            shape = spread["histogram"]
            counts, edges = shape["counts"], shape["edges"]
            width = edges[1] - edges[0]
            axes.bar(
                [width * bin for bin in range(len(counts))], counts, width=0.92 * width, align="edge", color="#4477aa"
            )
            title = printable(name).replace("$", r"\$")[:40]
            axes.set(xlabel=unit, ylabel="rows", title=f"{title} (median {number(spread['median'])})")
            axes.yaxis.get_major_locator().set_params(integer=True)
            axes.spines[["top", "right"]].set_visible(False)
        path = folder / f"lengths-{place}.png"
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
        made.append(path)
    return made
