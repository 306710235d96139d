"""What the model card says. Nothing here is verified: a claim is kept as one, and a file that contradicts it reported.

https://huggingface.co/docs/hub/model-cards: YAML between two lines of ---, then Markdown.
"""

import math
import re
from typing import Any

import yaml

from inspection.consistency import Files
from inspection.findings import Ledger

MAX_CARD = 1 << 20
MAX_FRONT = 200_000
MAX_EVALS, MAX_EVAL = 100, 1 << 16  # files of .eval_results that are read, and characters of each

# id -> (uses allowed in a phrase, words that its text must contain). https://spdx.org/licenses/, and the hub's own ids.
LICENCES = {
    "apache-2.0": (
        "any use, also commercial, with notice of licence and changes; grants patents",
        ("apache license", "version 2.0"),
    ),
    "mit": ("any use, also commercial, with notice of the licence", ("permission is hereby granted, free of charge",)),
    "bsd-3-clause": (
        "any use, also commercial, with notice of the licence",
        ("redistribution and use in source and binary forms", "neither the name"),
    ),
    "bsd-2-clause": (
        "any use, also commercial, with notice of the licence",
        ("redistribution and use in source and binary forms",),
    ),
    "gpl-3.0": (
        "any use; what is derived and passed on has to be under the same licence",
        ("gnu general public license", "version 3"),
    ),
    "agpl-3.0": (
        "any use; what is derived and served has to be under the same licence",
        ("gnu affero general public license",),
    ),
    "lgpl-3.0": ("any use; changes to it have to be under the same licence", ("gnu lesser general public license",)),
    "cc0-1.0": ("any use: public domain", ("cc0 1.0",)),
    "unlicense": ("any use: public domain", ("unencumbered software released into the public domain",)),
    "cc-by-4.0": ("any use, also commercial, with attribution", ("attribution 4.0 international",)),
    "cc-by-sa-4.0": ("any use with attribution; derived work under the same licence", ("attribution-sharealike 4.0",)),
    "cc-by-nc-4.0": ("no commercial use; attribution", ("attribution-noncommercial 4.0",)),
    "cc-by-nc-sa-4.0": (
        "no commercial use; attribution; derived work under the same licence",
        ("attribution-noncommercial-sharealike 4.0",),
    ),
    "cc-by-nc-nd-4.0": ("no commercial use; no derived work", ("attribution-noncommercial-noderivatives 4.0",)),
    "openrail": ("commercial use with restrictions on behaviour", ("rail",)),
    "bigscience-openrail-m": ("commercial use with restrictions on behaviour", ("openrail",)),
    "creativeml-openrail-m": ("commercial use with restrictions on behaviour", ("openrail",)),
    "llama2": ("commercial use under Meta's conditions", ("llama 2 community license",)),
    "llama3": ("commercial use under Meta's conditions", ("llama 3 community license",)),
    "llama3.1": ("commercial use under Meta's conditions", ("llama 3.1 community license",)),
    "gemma": ("commercial use under Google's conditions", ("gemma terms of use",)),
    "other": ("what the licence's own text says; read it", ()),
}
DTYPE_WORDS = {
    **dict.fromkeys(("bf16", "bfloat16"), "BF16"),
    **dict.fromkeys(("fp16", "float16", "f16", "half"), "F16"),
    **dict.fromkeys(("fp32", "float32", "f32", "float"), "F32"),
}

RAW_OUTPUTS = re.compile(r"(outputs|samples|predictions|responses)[^/]*\.(jsonl|json|parquet|csv)$")


class _Loader(yaml.SafeLoader):
    """YAML of a stranger: no aliases, which a few lines could make a billion values with."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def read(ledger: Ledger, files: Files) -> dict[str, Any]:
    """{"front": the front matter's fields, "text": the card's Markdown}; both empty without a card."""
    name = next((name for name in ("README.md", "readme.md", "README") if name in files.names()), None)
    content = files.text(name, MAX_CARD) if name else None
    if content is None and files.gguf:
        return {"front": _gguf_front(files.gguf.metadata), "text": "", "name": None}
    if content is None:
        file = next((file for file in ledger.files if file.path == name), None)
        if file and file.bytes > MAX_CARD:
            file.examined, file.note = False, f"{file.bytes:,} bytes; of a card at most {MAX_CARD:,} are read"
            ledger.find("too-large", name, file.note)
        else:
            ledger.find("card-missing", None, "there is no README.md")
        return {"front": {}, "text": "", "name": None}
    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", content, re.DOTALL)
    front: Any = {}
    if match and len(match[1]) <= MAX_FRONT:
        try:
            front = yaml.load(match[1], _Loader) or {}
        except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
            ledger.find("card-invalid", name, " ".join(str(error).split())[:160])
            front = {}
        if not isinstance(front, dict):
            ledger.find("card-invalid", name, f"the front matter is a {type(front).__name__}, not keys and values")
            front = {}
    elif match:
        ledger.find("card-invalid", name, f"a front matter of {len(match[1]):,} characters")
    return {"front": front, "text": content[match.end() :] if match else content, "name": name}


def _gguf_front(metadata: dict[str, Any]) -> dict[str, Any]:
    """The claims that a GGUF file makes about itself, as a card's front matter has them."""
    keys = {"license": "general.license", "language": "general.languages", "tags": "general.tags"}
    front = {name: metadata[key] for name, key in keys.items() if key in metadata}
    bases = [
        metadata.get(f"general.base_model.{at}.repo_url", metadata.get(f"general.base_model.{at}.name"))
        for at in range(4)
    ]
    front["base_model"] = [str(base).removeprefix("https://huggingface.co/") for base in bases if isinstance(base, str)]
    return front


def examine(ledger: Ledger, files: Files) -> None:
    """The card's claims into `facts["card"]`, and findings where the files contradict them."""
    card = read(ledger, files)
    front, text, name = card["front"], card["text"], card["name"]
    card["license"] = _as_text(front.get("license"))
    card["base_model"] = _as_list(front.get("base_model"))
    card["datasets"] = _as_list(front.get("datasets"))
    card["languages"] = _as_list(front.get("language") or front.get("languages"))
    card["evals"] = _evals(files, front)
    card["papers"] = sorted(
        set(re.findall(r"arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5})", text))
        | set(re.findall(r"arxiv:(\d{4}\.\d{4,5})", str(front.get("tags")), re.IGNORECASE))
    )
    card["intended_use"] = _section(
        text, r"intended uses?|uses?|direct use|for|usage and limitations|intended use cases?"
    )
    card["not_recommended_for"] = _section(
        text, r"out[- ]of[- ]scope.*|limitations?.*|not for|not recommended.*|misuse.*|bias,? risks.*"
    )
    ledger.facts["card"] = card
    if name is None:
        return
    _examine_license(ledger, files, card)
    _examine_parameters(ledger, card)
    _examine_dtype(ledger, card)
    if not card["base_model"]:
        ledger.find("base-unstated", name, "no base_model in the front matter")
    if card["evals"] and not any(entry["raw_outputs"] for entry in card["evals"]):
        ledger.find("evals-unproven", name, f"{len(card['evals'])} results, none with raw outputs in the repository")


LICENCE_FILE = re.compile(r"(UN)?LICEN[CS]E([-._][\w.-]{1,40})?|COPYING(\.\w{1,8})?", re.IGNORECASE)
GNU = {
    "gpl-3.0": "gnu general public license",
    "agpl-3.0": "gnu affero general public license",
    "lgpl-3.0": "gnu lesser general public license",
}


def licence_id(stated: str | None) -> str:
    """The hub's id of a licence that is named in words: "Apache License 2.0" -> apache-2.0."""
    plain = re.sub(r"\b(the|licen[cs]e|v(ersion)?)\b|(?<=[\s-])v(?=\d)", " ", (stated or "").lower())
    joined = re.sub(r"[\s,_-]+", "-", plain).strip("-")
    return joined if joined in LICENCES else next((id for id in LICENCES if id.removesuffix(".0") == joined), joined)


def _as_text(value: Any) -> str | None:
    if isinstance(value, list):
        value = value[0] if value else None
    return str(value)[:200] if isinstance(value, str | int | float) else None


def _as_list(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [str(one)[:200] for one in values if isinstance(one, str | int | float | bool)][:100]


def _section(text: str, heading: str) -> str | None:
    """The text under a heading, or of a list item that begins with the bold heading."""
    match = re.search(
        rf"^#{{1,5}}[ \t]*\**(?:{heading})\**[ \t]*$\n(.*?)(?=^#|\Z)", text, re.IGNORECASE | re.MULTILINE | re.DOTALL
    )
    match = match or re.search(
        rf"^[ \t]*[-*][ \t]*\*\*(?:{heading})\*\*:?[ \t]*(.*?)(?=^[ \t]*[-*][ \t]|^[ \t]*$|\Z)",
        text,
        re.IGNORECASE | re.MULTILINE | re.DOTALL,
    )
    found = " ".join(match[1].split())[:600] if match else ""
    return found or None


def _evals(files: Files, front: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of model-index and of .eval_results/, and whether raw outputs lie beside them."""
    raw = any(RAW_OUTPUTS.search(name) for name in files.names())
    found = []
    for one in _dicts(front.get("model-index")):
        for result in _dicts(one.get("results")):
            data, source = _dict(result.get("dataset")), _dict(result.get("source"))
            name = _as_text(data.get("name") or data.get("type"))
            for metric in _dicts(result.get("metrics")):
                kind = _as_text(metric.get("type") or metric.get("name"))
                found.append(_result(name, kind, metric.get("value"), _as_text(source.get("url")), raw))
    for entry in _dicts(files.value("evals.json")):  # evaluate.py export
        found.append(
            _result(_as_text(entry.get("task")), _as_text(entry.get("metric")), entry.get("value"), "evals.json", raw)
        )
    written = [name for name in files.names() if re.fullmatch(r"\.eval_results/[^/]+\.ya?ml", name)]
    for path in written[:MAX_EVALS]:
        try:
            entries = yaml.load(files.text(path, MAX_EVAL) or "", _Loader)
        except (yaml.YAMLError, ValueError, RecursionError):
            continue
        for entry in _dicts(entries if isinstance(entries, list) else [entries]):
            data = _dict(entry.get("dataset"))
            name, kind = _as_text(data.get("id")), _as_text(data.get("task_id"))
            found.append(_result(name, kind, entry.get("value"), path, raw or bool(entry.get("verifyToken"))))
    return found[:500]


def _result(dataset: str | None, metric: str | None, value: Any, source: str | None, raw: bool) -> dict[str, Any]:
    if isinstance(value, float) and not math.isfinite(value):
        value = str(value)
    value = value if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    return {"dataset": dataset, "metric": metric, "value": value, "source": source, "raw_outputs": raw}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _examine_license(ledger: Ledger, files: Files, card: dict[str, Any]) -> None:
    stated = licence_id(card["license"])
    names = (name for name in files.names() if LICENCE_FILE.fullmatch(name))
    file = min(names, key=lambda name: (len(name), name), default=None)
    text = " ".join((files.text(file) or "").lower().split()) if file else ""
    card["license_file"], found = file, None
    if text:
        fitting = [
            id
            for id, (_, words) in LICENCES.items()
            if words and all(word in text for word in words) and "rail" not in id
        ]
        found = max(fitting, key=lambda id: sum(map(len, LICENCES[id][1])), default=None)
        if found in GNU:  # each names the others; its own name comes first
            found = min((id for id in GNU if GNU[id] in text), key=lambda id: text.index(GNU[id]))
    card["license_of_file"] = found
    if not stated and not found:
        ledger.find("license-missing", card["name"], "neither the front matter nor a licence file names one")
    if stated in LICENCES and stated != "other" and text:
        words = LICENCES[stated][1]
        others = [licence_id(one) for one in _as_list(card["front"].get("license"))]
        if found not in others and (not all(word in text for word in words) or found in (*GNU, "bsd-3-clause")):
            ledger.find(
                "license-contradiction",
                card["name"],
                f"says {stated}, but {file} {'is ' + found if found else 'is another text'}",
            )


def _examine_parameters(ledger: Ledger, card: dict[str, Any]) -> None:
    """Numbers of parameters in front matter and text, against those of the weights (or of config.json)."""
    actual = ledger.facts.get("parameter_count") or ledger.facts.get("parameters_of_config")
    claims: list[str] = []
    for key in (
        "parameters",
        "parameter_count",
        "safetensors",
        "num_parameters",
        "params",
        "model_size",
        "size",
        "n_params",
    ):
        value = card["front"].get(key)
        if isinstance(value, dict):  # as the hub's API has it
            counts = value.get("parameters")
            counts = [one for one in counts.values() if type(one) is int] if isinstance(counts, dict) else []
            value = value.get("total") or sum(counts) or None
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            claims.append(str(value))
    claims += re.findall(
        r"number of param[ae]ters\W{0,6}(?:total\W{1,3})?([\d.,]+\s*(?:[KMBT]|million|billion)?)",
        card["text"],
        re.IGNORECASE,
    )
    card["parameters"] = claims[0] if claims else None
    if not actual:
        return
    for claim in claims:
        low, high = _bounds(claim)
        if high and not low <= actual <= high and not low <= ledger.facts.get("stored_values", actual) <= high:
            ledger.find("parameters-contradiction", card["name"], f"says {claim.strip()[:40]}, there are {actual:,}")


def _bounds(claim: str) -> tuple[float, float]:
    """The numbers that a rounded one like 0.6B can stand for; (0, 0) for what is no number."""
    match = re.fullmatch(
        r"\s*~?\s*([\d,]+(?:\.(\d+))?)\s*([KMBT]|thousand|million|billion|trillion)?\s*(?:params|parameters)?\s*",
        claim,
        re.IGNORECASE,
    )
    if not match or len(match[1]) > 24:
        return 0, 0
    unit = {"": 1, "t": 1e12, "b": 1e9, "m": 1e6, "k": 1e3}.get((match[3] or "")[:1].lower(), 1)
    unit = 1e3 if (match[3] or "").lower() == "thousand" else unit
    value, step = float(match[1].replace(",", "")) * unit, 10.0 ** -len(match[2] or "") * unit
    if not match[3]:
        return (value, value) if value >= 1000 else (0, 0)
    return (value - step) * 0.98, (value + step) * 1.02


def _examine_dtype(ledger: Ledger, card: dict[str, Any]) -> None:
    dtypes = ledger.facts.get("dtypes") or {}
    actual = next((name for name in dtypes if name in DTYPE_WORDS.values()), None)
    for key in ("dtype", "torch_dtype", "precision", "tensor_type"):
        stated = DTYPE_WORDS.get(str(card["front"].get(key)).lower().removeprefix("torch."))
        if stated and actual and stated != actual:
            ledger.find("dtype-contradiction", card["name"], f"says {card['front'][key]}, the weights are {actual}")
