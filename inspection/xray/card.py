"""What a data set says about itself: its card's licence and use, and whether the licence allows commercial use."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

CARD_BYTES = 4 << 20
FREE = {
    *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0"),
    *("cc-by-sa-3.0", "cc-by-sa-4.0", "odc-by", "odbl", "pddl", "unlicense", "isc", "zlib", "wtfpl", "cc-by-2.5"),
    *("cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "gpl-3.0", "gpl-2.0", "agpl-3.0", "lgpl-3.0"),
    *("mpl-2.0", "artistic-2.0", "c-uda", "etalab-2.0", "cc-by-nd-4.0", "gfdl", "afl-3.0", "ecl-2.0", "epl-2.0"),
}
CONDITIONS = ("openrail", "bigscience", "llama", "gemma", "creativeml", "deepfloyd", "gpl", "odbl", "-sa-", "gfdl")


class Card:
    """`fields`: the YAML at the head of a card, or what the hub says of it."""

    def __init__(self, source: str, fields: dict[str, Any], text: str = ""):
        self.source, self.fields, self.text = source, fields, text

    @property
    def license(self) -> str | None:
        """In the card's words."""
        value = self.fields.get("license")
        value = ", ".join(map(str, value)) if isinstance(value, list) else value
        if value == "other" and self.fields.get("license_name"):
            value = f"other: {self.fields['license_name']}"
        return str(value)[:200] if value else None

    @property
    def commercial_use(self) -> str:
        """yes, yes with conditions, no or unknown: what the licence's name says, which is no legal advice."""
        names = [name.strip().lower() for name in (self.license or "").split(",")]
        if any(re.search(r"(^|-)nc(-|$)|non-?commercial|research", name) for name in names):
            return "no"
        if not names[0] or not all(name in FREE or any(part in name for part in CONDITIONS) for name in names):
            return "unknown"
        return "yes, with conditions" if any(part in name for name in names for part in CONDITIONS) else "yes"


def read_card(src: str) -> Card:
    """The card of a folder, of the folder of a file, or of a data set on the hub."""
    path = Path(src).expanduser()
    if path.exists():
        card = (path if path.is_dir() else path.parent) / "README.md"
        if not card.is_file():
            return Card("none", {})
        with card.open("rb") as file:
            return parse(str(card), file.read(CARD_BYTES).decode("utf-8", "replace"))
    return _hub_card(src)


def parse(source: str, text: str) -> Card:
    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        fields = yaml.safe_load(match[1]) if match else {}
    except (yaml.YAMLError, RecursionError):
        fields = {}
    return Card(source, fields if isinstance(fields, dict) else {}, text[match.end() :] if match else text)


def _hub_card(src: str) -> Card:
    from huggingface_hub import HfApi

    from formats.download import reach

    repo, _, revision = src.partition("@")
    try:
        info = reach(lambda: HfApi().dataset_info(repo, revision=revision or None))
    except Exception as error:  # the HTTP library's classes: a card is worth no failure
        return Card(f"not to be had ({error})", {})
    fields = info.card_data.to_dict() if info.card_data is not None else {}
    for tag in info.tags or []:
        if tag.startswith("license:") and not fields.get("license"):
            fields["license"] = tag.removeprefix("license:")
    return Card(f"the hub's card of {repo}", json.loads(json.dumps(fields, default=str)))
