"""What a page states, held against what was computed again from the ids and settings that it holds."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inspection.lens.numbers import SCHEMA, unpack_attention

MAX_PAGE = 64 << 20
DATA = re.compile(r'<script type="application/json" id="lens">(.*?)</script>', re.DOTALL)
TOLERANCE = 2e-3  # of a number, relative or absolute: another processor sums in another order


def read_page(path: Path) -> tuple[dict[str, Any], str | None]:
    """The numbers of a page or of a --json file, and the HTML where it is a page. ValueError for what is neither."""
    if not path.is_file():
        raise ValueError(f"{path}: not a file; give a page that lens.py wrote")
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
    return value, content if found else None


def drawn_differences(page: str, expected: str) -> Iterator[tuple[str, Any, Any, bool]]:
    """The lines of a page that are not those which its own data give, in the form of `differences`."""
    stated, drawn = page.split("\n"), expected.split("\n")
    if len(stated) != len(drawn):
        yield "page (lines)", len(stated), len(drawn), True
    for number, (a, b) in enumerate(zip(stated, drawn, strict=False), 1):
        if a != b:
            same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            low, high = max(0, same - 20), same + 20
            yield f"page (line {number}, column {same + 1})", repr(str(a[low:high])), repr(str(b[low:high])), True


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
        yield place, stated, found, not _near(stated, found, place)


def _near(stated: Any, found: Any, place: str) -> bool:
    """Whether rounding may explain a difference: of a measured number, or of a rank among nearly equal ones."""
    kinds = (int, float) if place.endswith(".rank") else (float,)
    if type(stated) not in kinds or type(found) not in kinds:
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
