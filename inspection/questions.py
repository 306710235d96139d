"""The course's thirteen questions of a model page, answered from what was found, each with the status of its answer."""

from typing import Any

from inspection.findings import Ledger
from inspection.manifest import ABSENT, CLAIMED, LOAD_FINDINGS, VERIFIED
from inspection.tree import Tree

QUESTIONS = (
    "Where did it come from?",
    "What files define it, and are they data or code?",
    "Can the training data be inspected?",
    "What does a linked data set's Croissant say that its README does not?",
    "Can its benchmark claims be reproduced?",
    "Is it safe to load?",
    "Does it need remote code, and what does that do?",
    "What is its licence, and what does it allow?",
    "Can it run locally: which runtime, which precision, how much memory?",
    "What is the cheapest path to an endpoint?",
    "Which artefacts are linked?",
    "Could an agent answer all this from the repository, and what is missing?",
    "Which one change would make it more legible?",
)
Answer = tuple[str, str]  # text, status


def answer(tree: Tree, ledger: Ledger, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """[{number, question, answer, status}] of a built manifest."""
    card = ledger.facts["card"]
    first = (
        _origin(manifest, tree),
        _files(manifest),
        _training_data(card),
        _croissant(ledger, card),
        _benchmarks(card),
        _safety(manifest),
        _remote_code(ledger, manifest),
        _licence(manifest, card),
        _local(manifest),
        _endpoint(manifest),
        _linked(card, manifest),
    )
    missing = [QUESTIONS[at].rstrip("?") for at, (_, status) in enumerate(first) if status == ABSENT]
    answers = (*first, _agent(missing, manifest), _change(manifest, ledger))
    return [
        {"number": at + 1, "question": question, "answer": text, "status": status}
        for at, (question, (text, status)) in enumerate(zip(QUESTIONS, answers, strict=True))
    ]


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _origin(manifest: dict[str, Any], tree: Tree) -> Answer:
    place = (
        f"hub repository {tree.repo} at commit {tree.revision}"
        if tree.revision
        else f"{tree.root.name if tree.root else tree.repo}, a local copy"
    )
    proven = [one for one in manifest["lineage"] if one["status"] == VERIFIED]
    claimed = [one for one in manifest["lineage"] if one["status"] == CLAIMED]
    parts = [place]
    parts += [f"{one['relation']} {one['repo']} (proven)" for one in proven[:3]]
    parts += [f"{one['relation']} {one['repo']} (claimed)" for one in claimed[:3]]
    if not manifest["lineage"]:
        return f"{place}; nothing names what it was made from", ABSENT
    return "; ".join(parts), VERIFIED if proven else CLAIMED


def _files(manifest: dict[str, Any]) -> Answer:
    tiers: dict[str, list[str]] = {"data": [], "code": [], "unknown": []}
    for file in manifest["files"]:
        tiers[file["tier"]].append(file["path"])
    parts = []
    for tier, names in tiers.items():
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            parts.append(f"{len(names)} {tier} ({', '.join(names[:6])}{more})")
    is_whole = all(file["examined"] for file in manifest["files"])
    return "; ".join(parts) + ("" if is_whole else "; not all of them could be examined"), VERIFIED


def _training_data(card: dict[str, Any]) -> Answer:
    if card["datasets"]:
        return (
            f"the card names {', '.join(card['datasets'][:6])}; whether that is all of it cannot be known from here",
            CLAIMED,
        )
    return "no data set is named", ABSENT


def _croissant(ledger: Ledger, card: dict[str, Any]) -> Answer:
    found = ledger.facts.get("croissant") or {}
    unread = ledger.facts.get("croissant_unread") or {}
    if found or unread:
        said = "; ".join(f"{name}: {text}" for name, text in {**found, **unread}.items())
        return said, CLAIMED if found else ABSENT
    if not card["datasets"]:
        return "no data set is linked", ABSENT
    return (
        f"not examined: that of {', '.join(card['datasets'][:3])} lies on the hub, and this is a local copy",
        ABSENT,
    )


def _benchmarks(card: dict[str, Any]) -> Answer:
    evals = card["evals"]
    if not evals:
        return "it states no results in a form that a program can read", ABSENT
    raw = sum(entry["raw_outputs"] for entry in evals)
    shown = ", ".join(f"{entry['dataset']} {entry['metric']} {entry['value']}" for entry in evals[:4])
    if raw:
        return f"{len(evals)} results ({shown}), {raw} with raw outputs that can be scored again", CLAIMED
    return f"{len(evals)} results ({shown}), none with raw outputs: only by running the benchmark again", CLAIMED


def _safety(manifest: dict[str, Any]) -> Answer:
    note = manifest["evidence"]["safe_to_load"]
    word = {True: "yes", False: "no", None: "not known"}[manifest["safe_to_load"]]
    return f"{word}: {note['how']}", note["status"]


def _remote_code(ledger: Ledger, manifest: dict[str, Any]) -> Answer:
    if not manifest["requires_trust_remote_code"]:
        return "no: no configuration names Python code", VERIFIED
    parts = []
    for path in ledger.facts.get("remote_code", []):
        calls = ledger.facts.get("python", {}).get(path)
        if calls:
            does = f"imports {', '.join(sorted(calls.imports)[:8]) or 'nothing'}"
            parts.append(
                f"{path} {does}"
                + (
                    f" and calls {', '.join(sorted(calls.dangers)[:6])}"
                    if calls.dangers
                    else ", and makes no dangerous call that can be seen"
                )
            )
    return "yes: " + ("; ".join(parts) or "of files that are not in the repository"), VERIFIED


def _licence(manifest: dict[str, Any], card: dict[str, Any]) -> Answer:
    if not manifest["license"]:
        return "none is stated, so no use is allowed", ABSENT
    allows = manifest["license_allows"] or "read its text: it is not one of the usual licences"
    file = card.get("license_file")
    return f"{manifest['license']}: {allows}" + (
        f"; {file} is there" if file else "; no licence file is there"
    ), CLAIMED


def _local(manifest: dict[str, Any]) -> Answer:
    memory = manifest["memory"]
    if not memory or not manifest["recommended_runtimes"]:
        return "unknown: no weights, or no configuration that is known here", ABSENT
    cache = memory.get("cache_of_4096_tokens", 0)
    sizes = ", ".join(f"{precision} {size(memory[precision] + cache)}" for precision in ("bfloat16", "int8", "int4"))
    text = f"{', '.join(manifest['recommended_runtimes'])}; memory with 4,096 tokens: {sizes}"
    if behaviour := manifest.get("behaviour"):
        text += f"; measured here: {behaviour['tokens_per_second']:g} tokens/s in {behaviour['dtype']}"
    return text, VERIFIED


def _endpoint(manifest: dict[str, Any]) -> Answer:
    runtimes = manifest["recommended_runtimes"]
    if "nanoqwen" in runtimes:
        return "python serve.py --model SRC on a machine that you have: an OpenAI-compatible endpoint", VERIFIED
    if "llama.cpp" in runtimes:
        return "llama-server -m FILE.gguf on a machine that you have", VERIFIED
    if "vLLM" in runtimes:
        return "vllm serve on a machine whose GPU is large enough", CLAIMED
    return "none can be told from its files", ABSENT


def _linked(card: dict[str, Any], manifest: dict[str, Any]) -> Answer:
    parts = []
    for label, names in (
        ("papers", card["papers"]),
        ("data sets", card["datasets"]),
        ("base models", card["base_model"]),
    ):
        if names:
            parts.append(f"{label}: {', '.join(names[:5])}")
    return ("; ".join(parts), CLAIMED) if parts else ("none", ABSENT)


def _agent(missing: list[str], manifest: dict[str, Any]) -> Answer:
    if not missing:
        return "yes: every question has an answer, verified or claimed", VERIFIED
    return f"{11 - len(missing)} of the 11 before this one; missing: {'; '.join(missing)}", VERIFIED


def _change(manifest: dict[str, Any], ledger: Ledger) -> Answer:
    """The most severe problem first."""
    found = {finding.id for finding in ledger.findings}
    formats = manifest["weight_formats"]
    rules = (
        (
            found & LOAD_FINDINGS - {"remote-code"},
            "remove what can run code: " + ", ".join(sorted(found & LOAD_FINDINGS)),
        ),
        ("pickle" in formats, "replace the pickles with safetensors"),
        ("remote-code" in found, "replace the remote code with a model type that runtimes support"),
        (any(ledger.accusations()), "fix the first finding: " + next((one.id for one in ledger.accusations()), "")),
        (not manifest["license"], "state a licence in the card's front matter, and add its text"),
        (not manifest["lineage"], "name base_model in the card's front matter"),
        (not manifest["evals"], "add results with raw outputs, as model-index or .eval_results/"),
        (not manifest["datasets"], "name the training data in the card's front matter"),
        (not all(entry["raw_outputs"] for entry in manifest["evals"]), "add the raw outputs behind the results"),
    )
    return next(
        (text for applies, text in rules if applies), f"add {manifest['schema'].split('/')[1]}.json to the repository"
    ), VERIFIED
