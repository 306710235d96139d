"""An audit for people: the lines of the terminal, Markdown, and a page in the house's style."""

from typing import Any

from inspection.findings import FINDINGS
from inspection.page import Page, badge, code, facts, fold, show, table, tabs, text
from inspection.questions import size

TONES = {
    "high": "bad",
    "medium": "warn",
    "low": "info",
    "info": "",
    "verified": "good",
    "claimed": "warn",
    "absent": "",
}
SHOWN = (
    *(
        "repo",
        "revision",
        "task",
        "parameter_count",
        "dtypes",
        "weight_formats",
        "recommended_runtimes",
        "safe_to_load",
    ),
    *("requires_trust_remote_code", "license", "license_allows", "intended_use", "not_recommended_for", "datasets"),
    *("languages", "papers"),
)
VERDICTS = {
    0: "everything listed was examined; no finding is of medium or high severity",
    1: "findings of medium or high severity",
    2: "something could not be examined",
}


def printable(value: Any) -> str:
    """A stranger's text on one line of a terminal."""
    line = " ".join(str(value).split())
    return "".join(character if character.isprintable() else f"\\u{{{ord(character):x}}}" for character in line)


def plain(value: Any) -> str:
    """A manifest's value as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, list):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(one)}" for key, one in value.items())
    return "not known" if value is None else str(value)


def accusations(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [finding for finding in manifest["findings"] if finding["severity"] in ("high", "medium")]


def verdict(manifest: dict[str, Any]) -> str:
    """One line: what the exit status means here."""
    count = len(accusations(manifest))
    unseen = sum(not file["examined"] for file in manifest["files"])
    left = f"{unseen} {'file' if unseen == 1 else 'files'} could not be examined"
    if count:
        return f"{count} finding{'' if count == 1 else 's'} of medium or high severity" + (
            f"; {left}" if unseen else ""
        )
    return f"{left}; no finding of medium or high severity in the others" if unseen else VERDICTS[manifest["status"]]


def terminal(manifest: dict[str, Any], lines: list[str]) -> str:
    """What the command prints."""
    out = [f"{printable(manifest['repo'])}: {verdict(manifest)}", f"  {manifest['coverage']}"]
    out += [f"  {printable(line)}" for line in lines]
    if manifest["findings"]:
        out.append("")
    for finding in manifest["findings"]:
        place = f"{printable(finding['file'])}: " if finding["file"] else ""
        out.append(f"{finding['severity']:<7}{finding['id']:<24}{place}{printable(finding['what'])}")
    out.append("")
    for key in SHOWN:
        note = manifest["evidence"].get(key)
        if note and note["status"] != "absent":
            value = printable(plain(manifest[key]))
            out.append(f"{note['status']:<10}{key:<27}{value if len(value) < 110 else value[:107] + '...'}")
    for one in manifest["lineage"]:
        out.append(f"{one['status']:<10}{'lineage':<27}{printable(one['relation'])} {printable(one['repo'])[:120]}")
    if behaviour := manifest.get("behaviour"):
        perplexity = (
            f"perplexity {behaviour['perplexity']:,} of {behaviour['passage']}, " if behaviour.get("perplexity") else ""
        )
        speed = f"{behaviour['tokens_per_second']:,} tokens/s, {size(behaviour['peak_memory_bytes'])} of memory"
        out.append(f"{'verified':<10}{'behaviour':<27}{perplexity}{speed}")
    absent = [key for key, note in manifest["evidence"].items() if note["status"] == "absent"]
    out.append(f"{'absent':<10}{', '.join(absent) or 'nothing'}")
    return "\n".join(out)


def _cell(value: Any) -> str:
    return (
        printable(value)
        .replace("\\", "\\\\")
        .replace("|", "\\|")
        .replace("<", "&lt;")
        .replace("[", "\\[")
        .replace("`", "\\`")
    )


def markdown(manifest: dict[str, Any], lines: list[str]) -> str:
    out = [f"# Audit of {_cell(manifest['repo'])}", "", f"**{verdict(manifest)}.** {_cell(manifest['coverage'])}.", ""]
    out += [f"- {_cell(line)}" for line in lines] + [""] * bool(lines)
    out += ["## The thirteen questions", "", "| | question | answer | status |", "|---|---|---|---|"]
    out += [
        f"| {one['number']} | {one['question']} | {_cell(one['answer'])} | {one['status']} |"
        for one in manifest["questions"]
    ]
    out += ["", "## Findings", ""]
    if manifest["findings"]:
        out += ["| severity | finding | file | what |", "|---|---|---|---|"]
        out += [
            f"| {one['severity']} | {one['id']} | {_cell(one['file'] or '')} | {_cell(one['what'])} |"
            for one in manifest["findings"]
        ]
    else:
        out.append("None.")
    out += ["", "## Fields", "", "| field | value | status | how it is known |", "|---|---|---|---|"]
    out += [
        f"| {key} | {_cell(plain(manifest[key]))[:300]} | {note['status']} | {_cell(note['how'])} |"
        for key, note in manifest["evidence"].items()
        if key != "behaviour"
    ]
    out += ["", "## Files", "", "| file | bytes | tier | format | examined | sha256 |", "|---|---|---|---|---|---|"]
    for file in manifest["files"]:
        examined = "yes" if file["examined"] else f"no: {_cell(file['note'])}"
        cells = (
            _cell(file["path"]),
            f"{file['bytes']:,}",
            file["tier"],
            _cell(file["format"]),
            examined,
            file["sha256"] or "",
        )
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def page(manifest: dict[str, Any], lines: list[str], diffs: dict[str, str] | None = None) -> str:
    """The whole report as one HTML file."""
    tone = {0: "good", 1: "bad", 2: "warn"}[manifest["status"]]
    found = accusations(manifest)
    tone = "warn" if found and all(one["severity"] == "medium" for one in found) else tone
    result = Page(f"Audit of {manifest['repo']}", manifest["coverage"], (tone, verdict(manifest)), "made by audit.py")
    rows = [
        (one["number"], show(one["question"]), show(one["answer"]), badge(one["status"], TONES[one["status"]]))
        for one in manifest["questions"]
    ]
    result.section("The thirteen questions", table(rows, ["", "question", "answer", "status"]))
    if lines:
        result.section("Against the base or the manifest", *lines)
    rows = [
        (
            badge(one["severity"], TONES[one["severity"]]),
            one["id"],
            one["file"],
            one["what"],
            FINDINGS.get(one["id"], ("", ""))[1],
        )
        for one in manifest["findings"]
    ]
    result.section(
        "Findings", table(rows, ["severity", "finding", "file", "what", "meaning"]) if rows else text("None.")
    )
    for where, lines_of_diff in (diffs or {}).items():
        result.section(f"Template: {where}", code(lines_of_diff))
    rows = [
        (key, plain(manifest[key])[:600], badge(note["status"], TONES[note["status"]]), note["how"])
        for key, note in manifest["evidence"].items()
        if key != "behaviour"
    ]
    result.section("Verified, claimed, absent", table(rows, ["field", "value", "status", "how it is known"]))
    result.section("Files", _files(manifest))
    if behaviour := manifest.get("behaviour"):
        shown = {key.replace("_", " "): value for key, value in behaviour.items() if not isinstance(value, list)}
        shown["peak memory"] = size(shown.pop("peak memory bytes"))
        pairs = ", ".join(
            f"{id}: {value:.3f}" for id, value in zip(behaviour["top_ids"], behaviour["top_logits"], strict=False)
        )
        result.section(
            "Measured on this machine", facts(shown), fold("the largest logits of the prompt's last position", pairs)
        )
    if manifest["tensors"]:
        rows = [
            (one["name"], one["dtype"], str(one["shape"]), one["sha256"][:16]) for one in manifest["tensors"][:5000]
        ]
        result.section(
            "Tensors",
            fold(f"{len(manifest['tensors']):,} tensors", table(rows, ["tensor", "dtype", "shape", "sha256"])),
        )
    return result.render()


def _files(manifest: dict[str, Any]) -> Any:
    panels = {}
    for tier in ("data", "code", "unknown"):
        rows = [
            (
                file["path"],
                size(file["bytes"]),
                file["format"],
                badge("examined", "good") if file["examined"] else badge(file["note"][:60] or "not examined", "warn"),
                (file["sha256"] or "")[:16],
            )
            for file in manifest["files"]
            if file["tier"] == tier
        ]
        if rows:
            panels[f"{tier} ({len(rows)})"] = table(rows, ["file", "size", "format", "", "sha256"])
    return tabs(panels) if panels else text("No files.")
