"""Computes a page's numbers again, from the ids and settings that it holds, and names what differs."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inspection.lens.numbers import SCHEMA, unpack_attention

MAX_PAGE = 64 << 20
DATA = re.compile(r'<script type="application/json" id="lens">(.*?)</script>', re.DOTALL)
TOLERANCE = 2e-3  # of a number, relative or absolute: another processor sums in another order


def read_page(path: Path) -> dict[str, Any]:
    """The numbers of a page or of a --json file. ValueError for what is none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a page that lens.py wrote")
    if path.stat().st_size > MAX_PAGE:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; a lens page has at most {MAX_PAGE:,}")
    try:
        content = path.read_text(encoding="utf-8")
        found = DATA.search(content)
        value = json.loads(found[1] if found else content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a page of lens.py ({str(error)[:80]})") from None
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not a page of lens.py of the form {SCHEMA}")
    return value


def differences(stated: Any, found: Any, place: str = "") -> Iterator[tuple[str, Any, Any, bool]]:
    """(place, stated, found, whether beyond what another processor's rounding explains) for all that is not equal."""
    if place.endswith(".attention") and isinstance(stated, dict) and isinstance(found, dict):
        yield from _attention(stated, found, place)
    elif isinstance(stated, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*stated, *found]):
            if key not in stated or key not in found:
                yield f"{place}.{key}", stated.get(key), found.get(key), True
            else:
                yield from differences(stated[key], found[key], f"{place}.{key}")
    elif isinstance(stated, list) and isinstance(found, list):
        if len(stated) != len(found):
            yield f"{place} (length)", len(stated), len(found), True
        for index, (a, b) in enumerate(zip(stated, found, strict=False)):
            yield from differences(a, b, f"{place}[{index}]")
    elif stated != found or type(stated) is not type(found):
        yield place, stated, found, not _near(stated, found)


def _near(stated: Any, found: Any) -> bool:
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in (stated, found)):
        return False
    return abs(stated - found) <= TOLERANCE * max(1.0, abs(found))


def _attention(stated: dict[str, Any], found: dict[str, Any], place: str) -> Iterator[tuple[str, Any, Any, bool]]:
    """The packed weights, value by value; which of two equal ones comes first is left to the machine."""
    if stated == found:
        return
    try:
        (places, weights), (own_places, own_weights) = unpack_attention(stated), unpack_attention(found)
        if weights.shape != own_weights.shape:
            raise ValueError(f"shape {weights.shape} instead of {own_weights.shape}")
    except Exception as error:  # a stranger's bytes: zlib, base64 and numpy have classes of their own
        yield place, str(error)[:80], "attention", True
        return
    differs = (places != own_places) | (weights != own_weights)
    for index in zip(*differs.nonzero(), strict=True):
        a, b = float(weights[index]), float(own_weights[index])
        at = "".join(f"[{i}]" for i in index)
        yield f"{place}{at}", [int(places[index]), a], [int(own_places[index]), b], abs(a - b) > TOLERANCE
