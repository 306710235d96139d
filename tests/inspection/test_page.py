"""inspection/page.py: what a stranger's text can do to a page, which is nothing."""

import re
from html.parser import HTMLParser

import pytest

from inspection import page

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)> \u202egnp.exe\ud800 & \"'"


class Elements(HTMLParser):
    """Counts the elements of a page and gathers its attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.names = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.names += [name for name, _ in attributes]


def everything(text: str) -> str:
    one = page.Page(text, text, ("bad", text), text)
    parts = (
        page.text(text),
        page.code(text),
        page.badge(text, "warn"),
        page.heat(text, 0.5, text),
        page.facts({text: text}),
    )
    one.section(text, text, *parts, page.table([[text, 1, 2.5, True, None]], [text] * 5), page.fold(text, text))
    one.section("plots", page.bars({text: 3, "b": 1.5}, "MB"), page.histogram([0, 1, 2.5], [4, 7], "tokens"))
    one.section("tabs", page.tabs({text: page.text(text), "b": page.text(text)}))
    one.script("const found = JSON.parse(document.getElementById('found').text);", found=[text])
    return one.render()


def test_strange_text_adds_no_element_and_no_attribute():
    plain, evil = Elements(everything("x")), Elements(everything(EVIL))
    assert plain.tags == evil.tags and plain.names == evil.names
    assert not {"style", "src", "href"} & set(evil.names) - {"href"} and not [
        n for n in evil.names if n.startswith("on")
    ]


def test_hidden_characters_are_spelt_out():
    html = everything(EVIL)
    assert "\u202e" not in html and "\\u{202e}" in html and "\\u{d800}" in html
    html.encode("utf-8")


def test_the_policy_allows_only_our_own_style_and_script():
    html = everything("x")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    assert f"style-src '{page._hash(style)}'" in policy and f"script-src '{page._hash(script)}'" in policy
    assert "://" not in html


def test_the_same_content_is_the_same_page():
    assert everything("x") == everything("x")


def test_plots_are_to_scale():
    svg = page.bars({"a": 2.0, "b": 1.0})
    widths = [float(width) for width in re.findall(r'class="bar".*?width="([\d.]+)"', svg)]
    assert widths[0] == 2 * widths[1] > 0
    heights = [
        float(height) for height in re.findall(r'class="bar".*?height="([\d.]+)"', page.histogram([0, 1, 2], [3, 9]))
    ]
    assert heights[1] == 3 * heights[0] > 0
    assert "<svg" in page.bars({}) and "<svg" in page.bars({"a": 0})


def test_an_unknown_tone_is_a_defect():
    with pytest.raises(AssertionError):
        page.badge("x", "purple")
