"""What the Croissant metadata of a linked data set say that its README does not. Read from the hub, for hub audits.

Croissant (https://docs.mlcommons.org/croissant/): JSON-LD with the record sets and fields of a data set; the hub makes
it at /api/datasets/ID/croissant.
"""

import json
import re
from typing import Any

from formats import hub
from inspection.findings import Ledger, Unexamined
from inspection.tree import Tree

MOST = 200_000  # bytes of either document
DATASETS = 2


def examine(ledger: Ledger, tree: Tree) -> None:
    """Compares the two documents of the first data sets that the card names."""
    result, unread = {}, {}
    names = ledger.facts["card"]["datasets"]
    for name in names[:DATASETS]:
        if not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name):
            unread[name[:96]] = "not the name of a data set on the hub"
            continue
        try:
            tree.budget.spend(0)
            document = hub.get(f"/api/datasets/{name}/croissant", min(MOST, tree.budget.left))
            readme = hub.get(f"/datasets/{name}/resolve/main/README.md", min(MOST, tree.budget.left))
            tree.budget.spend(len(document) + len(readme))
            result[name] = difference(json.loads(document), readme.decode("utf-8", "replace"))
        except (ValueError, Unexamined, RecursionError) as error:
            unread[name] = f"could not be read ({str(error)[:120]})"
    if len(names) > DATASETS:
        unread[", ".join(names[DATASETS : DATASETS + 6])] = f"not read: only the first {DATASETS} data sets are"
    ledger.facts["croissant"], ledger.facts["croissant_unread"] = result, unread


def difference(document: Any, readme: str) -> str:
    """One line: fields, licence, creators and files that Croissant states and the README does not."""
    if not isinstance(document, dict):
        return "its Croissant is no object"
    said = readme.lower()
    fields = [
        str(field.get("name")).rpartition("/")[2]
        for record in _list(document.get("recordSet"))
        for field in _list(record.get("field"))
        if not str(record.get("@id", "")).endswith("_splits")
    ]
    unsaid = [name for name in fields if name.lower() not in said]
    parts = [
        f"{len(fields)} fields"
        + (f", of which the README does not name {', '.join(unsaid[:8])}" if unsaid else ", all named in the README")
    ]
    for key in ("license", "creator", "citeAs", "version", "datePublished"):
        value = document.get(key)
        value = value.get("name") if isinstance(value, dict) else value
        if isinstance(value, str) and value and value.lower().rstrip("/").rpartition("/")[2] not in said:
            parts.append(f"{key} {value[:100]}, which the README does not say")
    return "; ".join(parts)


def _list(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
