"""The page style of all reports: one HTML file that needs no network, in light and dark, for wide and narrow screens.

    page = Page("Audit of org/name", "3 findings")
    page.section("Files", table(rows, header=["file", "bytes"]), fold("all hashes", code(text)))
    Path("report.html").write_text(page.render(), encoding="utf-8")

What a page shows comes from strangers' files. Every helper escapes what it is given, unless it is `Markup`, which only
the helpers make; characters that would reorder or hide text are spelt out. The page's Content Security Policy allows
the style and the script of this file, by their hashes, and nothing else: no request, no inline handler or style.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

HERE = Path(__file__).parent
WIDTH = 640  # of a plot, in its own units; the page scales it
TONES = ("good", "warn", "bad", "info", "")

# Control characters, bidirectional controls, half surrogates, byte order marks and tags (invisible copies of ASCII).
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


class Page:
    """A report: `section` adds to it in order, `render` gives its HTML. `banner`: (tone, one line) under the title."""

    def __init__(self, title: str, subtitle: str = "", banner: tuple[str, str] | None = None, footer: str = ""):
        self.title, self.subtitle, self.banner, self.footer = title, subtitle, banner, footer
        self._sections: list[tuple[str, Markup]] = []
        self._styles, self._scripts = [(HERE / "page.css").read_text("utf-8")], [(HERE / "page.js").read_text("utf-8")]
        self._data: dict[str, Any] = {}

    def section(self, title: str, *parts: Any) -> None:
        """A card with a heading; `parts` are what the helpers below return, or plain text."""
        self._sections.append(
            (title, Markup("").join(part if isinstance(part, Markup) else text(part) for part in parts))
        )

    def style(self, css: str) -> None:
        """CSS of one report, in the variables of page.css. Never with a stranger's text in it."""
        self._styles.append(css)

    def script(self, javascript: str, **data: Any) -> None:
        """A script of one report. It finds `data` (JSON values) by `JSON.parse(document.getElementById(name).text)`."""
        self._scripts.append(f"{{\n{javascript}\n}}")
        self._data |= data

    def render(self) -> str:
        """The whole page."""
        style, script = "\n".join(self._styles), "\n".join(self._scripts)
        policy = (
            f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
            "base-uri 'none'; form-action 'none'"
        )
        links = Markup(" ").join(
            Markup('<a href="#s{}">{}</a>').format(number, show(title))
            for number, (title, _) in enumerate(self._sections)
        )
        banner = Markup('<p class="banner {}">{}</p>').format(*_toned(*self.banner)) if self.banner else ""
        sections = Markup("\n").join(
            Markup('<section id="s{}"><h2>{}</h2>\n{}</section>').format(number, show(title), body)
            for number, (title, body) in enumerate(self._sections)
        )
        data = Markup("\n").join(
            Markup('<script type="application/json" id="{}">{}</script>').format(name, _json(value))
            for name, value in self._data.items()
        )
        return Markup(
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta http-equiv="Content-Security-Policy" content="{}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="referrer" content="no-referrer">\n'
            "<title>{}</title>\n<style>{}</style>\n</head>\n<body>\n"
            '<header><h1>{}</h1>\n<p class="soft">{}</p>\n'
            '<button class="theme" type="button" hidden>light/dark</button>{}\n'
            "<nav>{}</nav></header>\n<main>\n{}\n</main>\n<footer>{}</footer>\n{}\n<script>{}</script>\n</body>\n</html>\n"
        ).format(
            *(Markup(policy), show(self.title), Markup(style), show(self.title), show(self.subtitle), banner, links),
            *(sections, show(self.footer), data, Markup(script)),
        )


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _json(value: Any) -> Markup:
    """JSON that cannot end the element that it stands in."""
    return Markup(json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _toned(tone: str, label: Any) -> tuple[str, Markup]:
    assert tone in TONES, tone
    return tone, show(label)


def show(value: Any) -> Markup:
    """Anything as escaped text on one line of HTML; Markup as it is."""
    if isinstance(value, Markup):
        return value
    if isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, int):
        value = f"{value:,}"
    elif isinstance(value, float):
        value = f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return escape(HIDDEN.sub(lambda match: f"\\u{{{ord(match[0]):x}}}", "" if value is None else str(value)))


def text(value: Any) -> Markup:
    """A paragraph; line breaks stay."""
    return Markup('<p class="text">{}</p>').format(show(value))


def code(value: Any) -> Markup:
    """A block of source, as it is."""
    return Markup("<pre>{}</pre>").format(show(value))


def badge(label: Any, tone: str = "") -> Markup:
    """A small label: good, warn, bad, info or plain."""
    return Markup('<span class="badge {}">{}</span>').format(*_toned(tone, label))


def heat(value: Any, share: float, title: str = "") -> Markup:
    """Text inside a line with a background between none (0) and full (1); `title` shows under the pointer."""
    level = min(9, max(0, round(share * 9)))
    return Markup('<span class="heat h{}" title="{}">{}</span>').format(level, show(title), show(value))


def facts(pairs: dict[str, Any]) -> Markup:
    """Names and what they are, one below the other."""
    return Markup("<dl>{}</dl>").format(
        Markup("").join(
            Markup("<dt>{}</dt><dd>{}</dd>").format(show(name), show(value)) for name, value in pairs.items()
        )
    )


def table(rows: Iterable[Sequence[Any]], header: Sequence[str] = ()) -> Markup:
    """Rows of cells; numbers stand right-aligned, and so does their heading."""
    rows = [list(row) for row in rows]
    numbers = [_is_number(cell) for cell in rows[0]] if rows else []

    def line(tag: str, row: Sequence[Any]) -> Markup:
        cells = []
        for at, cell in enumerate(row):
            is_number = numbers[at : at + 1] == [True] if tag == "th" else _is_number(cell)
            kind = Markup(' class="number"') if is_number else ""
            label = Markup(' data-label="{}"').format(show(header[at])) if tag == "td" and at < len(header) else ""
            cells.append(Markup("<{0}{1}{2}>{3}</{0}>").format(tag, kind, label, show(cell)))
        return Markup("<tr>{}</tr>\n").format(Markup("").join(cells))

    head = Markup("<thead>{}</thead>").format(line("th", header)) if header else ""
    body = Markup("").join(line("td", row) for row in rows)
    return Markup('<div class="scroll"><table>{}<tbody>\n{}</tbody></table></div>').format(head, body)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def fold(summary: Any, *parts: Any, open: bool = False) -> Markup:
    """A collapsible part."""
    return Markup("<details{}><summary>{}</summary>{}</details>").format(
        Markup(" open") if open else "",
        show(summary),
        Markup("").join(part if isinstance(part, Markup) else text(part) for part in parts),
    )


def tabs(panels: dict[str, Markup]) -> Markup:
    """Panels of which one shows at a time; all of them where scripts are off, and on paper."""
    group = hashlib.sha256(repr(panels).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    buttons = Markup("").join(
        Markup('<button role="tab" type="button" id="t{0}-{1}" aria-controls="p{0}-{1}">{2}</button>').format(
            group, at, show(name)
        )
        for at, name in enumerate(panels)
    )
    bodies = Markup("").join(
        Markup('<div role="tabpanel" id="p{0}-{1}" aria-labelledby="t{0}-{1}">{2}</div>').format(group, at, show(panel))
        for at, panel in enumerate(panels.values())
    )
    return Markup('<div role="tablist" hidden>{}</div>{}').format(buttons, bodies)


# ---- plots -----------------------------------------------------------------------------------------------------------


def bars(pairs: dict[str, float], unit: str = "", most: float | None = None) -> Markup:
    """Horizontal bars, one line each, against `most` or the largest of them."""
    most = most or max(pairs.values(), default=0) or 1
    left, step = 200, 26
    full = WIDTH - left - 110
    parts = []
    for at, (name, value) in enumerate(pairs.items()):
        y, width = at * step, max(0.0, min(1.0, value / most)) * full
        label = name if len(name) < 26 else f"{name[:24]}…"
        parts += [
            _label(left - 8, y + 17, label, "end", title=name),
            _rectangle("rest", left, y + 5, full, 16),
            _rectangle("bar", left, y + 5, width, 16),
            _label(left + full + 8, y + 17, _number(value, unit), "start", "soft"),
        ]
    return _svg(len(pairs) * step + 6, parts, ", ".join(f"{name}: {_number(v, unit)}" for name, v in pairs.items()))


def histogram(edges: Sequence[float], counts: Sequence[float], unit: str = "") -> Markup:
    """Columns between neighbouring `edges` (one more than `counts`)."""
    assert len(edges) == len(counts) + 1
    top, height, left, above = max(counts, default=0) or 1, 150, 56, 12
    wide, base = (WIDTH - left - 8) / max(1, len(counts)), above + height
    axis = Markup('<line class="axis" x1="{0}" y1="{1}" x2="{2}" y2="{1}"/>').format(left, base, WIDTH)
    parts = [axis, _label(left - 6, above + 8, _number(top), "end", "soft")]
    for at, count in enumerate(counts):
        tall = count / top * height
        title = f"{_number(edges[at])} to {_number(edges[at + 1], unit)}: {_number(count)}"
        parts.append(_rectangle("bar", left + at * wide, base - tall, max(0.5, wide - 1), tall, title))
    for at in sorted({0, len(counts) // 2, len(counts)}):
        anchor = "start" if at == 0 else "end" if at == len(counts) else "middle"
        parts.append(_label(left + at * wide, base + 18, _number(edges[at], unit), anchor, "soft"))
    return _svg(base + 26, parts, f"histogram of {_number(sum(counts))} values")


def _label(x: float, y: float, value: str, anchor: str, kind: str = "", title: str = "") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}{}</text>').format(
        kind, x, y, anchor, show(value), _title(title)
    )


def _rectangle(kind: str, x: float, y: float, width: float, height: float, title: str = "") -> Markup:
    return Markup('<rect class="{}" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}">{}</rect>').format(
        kind, x, y, width, height, _title(title)
    )


def _title(title: str) -> Markup:
    return Markup("<title>{}</title>").format(show(title)) if title else Markup()


def _number(value: float, unit: str = "") -> str:
    return (f"{value:,}" if isinstance(value, int) else f"{value:,.3g}") + (f" {unit}" if unit else "")


def _svg(height: int, parts: Iterable[Markup], label: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" width="{}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, WIDTH, show(label), Markup("").join(parts)
    )
