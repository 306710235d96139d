"""serving/page/markdown.js: what becomes which element, that no character is lost, and that no text is slow."""

import pytest

from serving.page import HERE


@pytest.fixture(scope="module")
def view(browser):
    page = browser.new_page()
    page.set_content("<p>")
    page.add_script_tag(content=(HERE / "markdown.js").read_text("utf-8"))
    yield page
    page.close()


MARKDOWN = [
    ("a **b** *c* `d` ~~e~~", "<p>a <strong>b</strong> <em>c</em> <code>d</code> <s>e</s></p>"),
    ("***a*** **b *c* d**", "<p><strong><em>a</em></strong> <strong>b <em>c</em> d</strong></p>"),
    ("2 * 3 * 4, a*b*c, snake_case_name, __init__", "<p>2 * 3 * 4, a*b*c, snake_case_name, <strong>init</strong></p>"),
    ("**open *never closed `too", "<p>**open *never closed `too</p>"),
    (r"\*a\* \n", r"<p>*a* \n</p>"),
    ("# A #\n## B\ntext", "<h3>A</h3><h4>B</h4><p>text</p>"),
    (
        "- a\n- b\n  - c\n\n- d",
        "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li><li><p>d</p></li></ul>",
    ),
    ("3. a\n4. b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
    ("> a\n> b", "<blockquote><p>a\nb</p></blockquote>"),
    ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    (
        "| a | b |\n|---|--:|\n| 1 | 2 |",
        "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>",
    ),
    ("```py\n*a*\n<b>\n```", "<pre><code>*a*\n&lt;b&gt;</code></pre>"),
    ("```\nnot closed", "<pre><code>not closed</code></pre>"),
    ("``a ` b``", "<p><code>a ` b</code></p>"),
    (r"\(a_1 * b_2\), \[x*y*z\], \(open", r"<p><span>\(a_1 * b_2\)</span>, <span>\[x*y*z\]</span>, (open</p>"),
    ("$a_1*b$ and $$c*d*e$$", "<p><span>$a_1*b$</span> and <span>$$c*d*e$$</span></p>"),
    ("from $5 to *$10*, $5-$10, $ 1 $", "<p>from $5 to <em>$10</em>, $5-$10, $ 1 $</p>"),
    ("so\n$$\na\n- b\n+ c\n$$\n- d", "<p>so\n<span>$$\na\n- b\n+ c\n$$</span></p><ul><li><p>d</p></li></ul>"),
    ("\\[\na\n\n- b", "<p>[\na</p><ul><li><p>b</p></li></ul>"),
    ("<b>x</b> &amp;", "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp;</p>"),
    ("", ""),
]
PLAIN = """(source) => {
  const parent = document.createElement("div");
  for (const block of blocks(source)) {
    const writer = new Writer(source, () => undefined, block.from);
    block.build(writer, parent);
    writer.rest(block.to, parent);
  }
  const all = parent.cloneNode(true);
  all.querySelectorAll(".bar, .host").forEach((one) => one.remove());
  parent.querySelectorAll(".bar, .mark").forEach((one) => one.remove());
  parent.querySelectorAll(".code, .scroll").forEach((one) => one.replaceWith(...one.childNodes));
  for (const name of ["class", "dir", "tabindex"])
    for (const one of parent.querySelectorAll(`[${name}]`)) one.removeAttribute(name);
  return [parent.innerHTML, all.textContent.replaceAll("⏎", "\\n")];
}"""


def test_markdown(view):
    for source, html in MARKDOWN:
        assert view.evaluate(PLAIN, source) == [html, source]


def test_markdown_loses_no_character_of_any_text(view):
    """Every character of the source is in some node, once and in order: so is every token. And no text is slow."""
    lost = view.evaluate(
        f"""() => {{
      const plain = {PLAIN};
      let state = 7;
      const random = (n) => (state = (state * 1103515245 + 12345) % 2147483648) % n;
      const parts = ["*", "**", "_", "`", "```", "~~", "[", "](", "](https://a.b)", ")", "|", "|--|", "\\n",
        "\\n\\n", "- ", "1. ", "> ", "# ", "  ", "    ",        "a", "b c", "<i>", "\\\\", "---", "https://x.y/z", "é",
        "🦊", "\\t", "!", "$", "$$", "\\\\(", "\\\\)", "\\\\[", "\\\\]"];
      const lost = [];
      for (let round = 0; round < 1500; round++) {{
        const source = Array.from({{ length: 1 + random(30) }}, () => parts[random(parts.length)]).join("");
        if (plain(source)[1] !== source) lost.push(source);
      }}
      return lost.slice(0, 3);
    }}"""
    )
    assert lost == []
    hostile = (
        "*a ",
        "**a",
        "[",
        "[a](",
        "`a",
        "> ",
        "- ",
        "|",
        "\\",
        "_a _",
        "https://",
        "*a **b ",
        "\n",
        "|a\n|-\n",
        "~~~",
        "$a ",
        "\\(",
        "$$\na\n",
        "\\[\n",
        "$a$$\n\n\\[",
    )
    seconds = view.evaluate(
        f"""(hostile) => hostile.map((text) => {{
      const begin = performance.now();
      ({PLAIN})(text.repeat(50000 / text.length));
      return (performance.now() - begin) / 1000;
    }})""",
        hostile,
    )
    assert max(seconds) < 3, dict(zip(hostile, seconds, strict=True))
