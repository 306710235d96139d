"""model_context.json: what an audit found, for programs. Each of the course's keys stands plain, and beside it, in
`evidence`, whether it is verified, claimed or absent, and how that is known. schemas/model_context.schema.json is its
JSON Schema; a change that breaks readers gets a new version."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from formats.record import NAME, SCHEMA
from inspection.claims import LICENCES, licence_id
from inspection.consistency import Files
from inspection.findings import Ledger
from inspection.tree import Tree

SCHEMA_FILE = Path(__file__).resolve().parent.parent / "schemas" / "model_context.schema.json"
VERIFIED, CLAIMED, ABSENT = "verified", "claimed", "absent"
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1.03, "int4": 0.56}  # a weight, with its scales
LOAD_FINDINGS = {
    *(
        "pickle-import",
        "pickle-unlisted",
        "pickle-hidden-import",
        "remote-code",
        "remote-code-elsewhere",
        "code-danger",
    ),
    *("native-code", "format-disguised", "yaml-tag", "archive-path", "archive-bomb", "symlink-outside"),
    *("template-attribute", "template-call", "template-include"),
    *("weights-malformed", "weights-overlap", "weights-gap", "weights-duplicate-key", "weights-trailing-bytes"),
}


class Evidence:
    """The plain values and what stands behind each."""

    def __init__(self):
        self.values: dict[str, Any] = {}
        self.notes: dict[str, dict[str, str]] = {}

    def put(self, key: str, value: Any, status: str, how: str) -> None:
        is_there = value is not None and value != [] and value != ""
        self.values[key] = value
        self.notes[key] = {"status": status if is_there else ABSENT, "how": how if is_there else f"not found: {how}"}


def build(tree: Tree, ledger: Ledger, files: Files) -> dict[str, Any]:
    """The manifest of an examined repository, without the questions' answers."""
    facts, card = ledger.facts, ledger.facts["card"]
    evidence = Evidence()
    evidence.put(
        "repo", tree.repo, VERIFIED if tree.root or tree.revision else CLAIMED, "the directory's or repository's name"
    )
    evidence.put("revision", tree.revision, VERIFIED, "the commit that the hub named")
    _put_task(evidence, files, card)
    _put_weights(evidence, ledger, files)
    _put_safety(evidence, ledger)
    licence = card["license"]
    evidence.put(
        "license",
        licence or card.get("license_of_file"),
        CLAIMED,
        "front matter of the card" if licence else "licence file",
    )
    evidence.put(
        "license_allows",
        LICENCES.get(licence_id(evidence.values["license"]), (None,))[0],
        CLAIMED,
        "the usual reading of that licence; no legal advice",
    )
    for key in ("intended_use", "not_recommended_for"):
        evidence.put(key, card[key], CLAIMED, "the card's section")
    evidence.put("evals", card["evals"], CLAIMED, "model-index of the card and .eval_results/")
    evidence.put("datasets", card["datasets"], CLAIMED, "front matter of the card")
    evidence.put("languages", card["languages"], CLAIMED, "front matter of the card")
    evidence.put("papers", card["papers"], CLAIMED, "links of the card")
    evidence.put(
        "special_tokens", facts.get("end_tokens"), VERIFIED, "end tokens of generation_config.json or config.json"
    )
    evidence.put(
        "norms",
        dict(list(facts.get("norms", {}).items())[:64]) or None,
        VERIFIED,
        "values of the weights: the largest weight of each kind of norm, in the layer of the least and of the greatest",
    )
    evidence.put(
        "behaviour",
        facts.get("behaviour"),
        VERIFIED,
        facts.get("behaviour_how", "audit.py runs the model where it lies on this machine"),
    )
    lineage = facts.get("lineage", []) + [
        {
            "relation": str(card["front"].get("base_model_relation") or "base_model")[:40],
            "repo": name,
            "revision": None,
            "status": CLAIMED,
        }
        for name in card["base_model"]
    ]
    return {
        "schema": SCHEMA,
        **evidence.values,
        "evidence": evidence.notes,
        "files": [asdict(file) for file in sorted(ledger.files, key=lambda file: file.path)],
        "tensors": facts.get("tensors", []),
        "findings": ledger.sorted(),
        "lineage": lineage,
        "coverage": coverage(tree, ledger),
        "status": ledger.status,
    }


def coverage(tree: Tree, ledger: Ledger) -> str:
    """What was looked at, in one line."""
    examined = sum(file.examined for file in ledger.files)
    values = "all values of the weights read" if ledger.facts.get("values_read") else "no value of the weights read"
    if unread := ledger.facts.get("values_unread"):
        values = f"values of the weights read except those of {', '.join(unread[:4])}"
    members = (
        f", {ledger.members:,} {'member' if ledger.members == 1 else 'members'} of archives" if ledger.members else ""
    )
    network = f", {tree.budget.used:,} bytes over the network" if tree.budget else ""
    left_out = f"; left out: {', '.join(tree.left_out)}" if tree.left_out else ""
    return f"{examined:,} of {len(ledger.files):,} files examined{members}, {values}{network}{left_out}"


def _put_task(evidence: Evidence, files: Files, card: dict[str, Any]) -> None:
    architectures = files.config.get("architectures")
    first = (
        architectures[0]
        if isinstance(architectures, list) and architectures and isinstance(architectures[0], str)
        else ""
    )
    if files.gguf or first.endswith("ForCausalLM"):
        evidence.put(
            "task", "text-generation", VERIFIED, "config.json's architecture" if first else "GGUF architecture"
        )
    else:
        tag = card["front"].get("pipeline_tag")
        evidence.put("task", tag if isinstance(tag, str) else None, CLAIMED, "pipeline_tag of the card")


def _put_weights(evidence: Evidence, ledger: Ledger, files: Files) -> None:
    facts = ledger.facts
    if facts.get("parameter_count"):
        evidence.put(
            "parameter_count", facts["parameter_count"], VERIFIED, "headers of the weights; a tied head counts once"
        )
    elif facts.get("parameters_of_config"):
        evidence.put("parameter_count", facts["parameters_of_config"], CLAIMED, "config.json, without weights to count")
    else:
        evidence.put("parameter_count", None, CLAIMED, "headers of the weights, config.json")
    evidence.put("weight_formats", facts.get("weight_formats", []), VERIFIED, "content of the files")
    evidence.put("dtypes", facts.get("dtypes"), VERIFIED, "headers of the weights: values of each type")
    evidence.put(
        "recommended_runtimes", runtimes(ledger, files), VERIFIED, "containers and architecture that were found"
    )
    evidence.put(
        "memory",
        memory(ledger, files),
        VERIFIED,
        "arithmetic: parameters, precision, and keys and values of 4,096 tokens",
    )


def runtimes(ledger: Ledger, files: Files) -> list[str]:
    formats = ledger.facts.get("weight_formats", [])
    known = files.config.get("model_type") in ("qwen3", "qwen3_moe", "qwen2")
    found = []
    if "safetensors" in formats and files.config:
        found += ["transformers", "vLLM"] + ["nanoqwen"] * known
    if "gguf" in formats:
        architecture = files.gguf.metadata.get("general.architecture") if files.gguf else None
        found += ["llama.cpp", "Ollama"] + ["nanoqwen"] * (architecture in ("qwen3", "qwen3moe", "qwen2"))
    return list(dict.fromkeys(found))


def memory(ledger: Ledger, files: Files) -> dict[str, int] | None:
    """Precision -> bytes of weights, and of keys and values for 4,096 tokens in two bytes."""
    count = ledger.facts.get("parameter_count") or ledger.facts.get("parameters_of_config")
    if not count:
        return None
    result = {precision: round(count * size) for precision, size in BYTES.items()}
    if config := ledger.facts.get("config"):
        result["cache_of_4096_tokens"] = (
            2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4096
        )
    return result


def _put_safety(evidence: Evidence, ledger: Ledger) -> None:
    found = sorted({finding.id for finding in ledger.findings} & LOAD_FINDINGS)
    pickled = [file.path for file in ledger.files if file.format.startswith(("pickle", "pytorch", "npy of objects"))]
    unseen = [file.path for file in ledger.unexamined()]
    if found or pickled:
        evidence.put("safe_to_load", False, VERIFIED, "found: " + ", ".join(found or ["pickle"]))
    elif unseen:
        evidence.put("safe_to_load", None, ABSENT, f"{len(unseen)} files could not be examined")
        evidence.notes["safe_to_load"] = {
            "status": ABSENT,
            "how": f"{len(unseen)} files could not be examined: {', '.join(unseen[:3])}",
        }
    else:
        evidence.put(
            "safe_to_load",
            True,
            VERIFIED,
            "every file examined: data formats alone, and no code that a configuration names",
        )
    references = ledger.facts.get("references", [])
    evidence.put(
        "requires_trust_remote_code", bool(references), VERIFIED, "auto_map and custom_pipelines of all JSON files"
    )


def validate(manifest: dict[str, Any]) -> None:
    """ValueError where a manifest is not what the schema says. Needs jsonschema (the extra `audit`)."""
    import jsonschema

    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text("utf-8")))
    if error := jsonschema.exceptions.best_match(validator.iter_errors(manifest)):
        place = "/".join(map(str, error.absolute_path)) or "the top"
        raise ValueError(f"{NAME}: {error.message[-200:]} (at {place})")
