"""How serving/page/ looks: contrast in both modes, on paper, on a phone, and what a screen reader is told."""

import threading

import pytest
from scripted import Server, ask

SHADES = [0.999, 0.8, 0.6, 0.4, 0.3, 0.2, 0.12, 0.06, 0.03, 0.005]
PIECES = [
    *[
        "\n\n# head",
        " **bold",
        "** ~~struck",
        "~~ `code",
        "` [link",
        "](https://example.org/x) https://e.org",
        "/a\n\n> q",
    ],
    *[" it\n\n| a", " | b |\n|--|--|\n| c", " | d |\n\n```py\n", "code\n", "```\n"],
]
# What text has less contrast than WCAG's AA asks of it: {element: [contrast, text]}.
FAINT = """() => {
  const linear = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const color = (text) => ((all) => [...all.slice(0, 3), all[3] ?? 1])(text.match(/[\\d.]+/g).map(Number));
  const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3]));
  const parents = (e) => (e ? [...parents(e.parentElement), e] : []);
  const found = {};
  const look = (element, style, text) => {
    const all = parents(element).map((e) => getComputedStyle(e));
    const opaque = all.slice(0, -1).reduce((opaque, one) => opaque * one.opacity, style.opacity);
    const behind = all.reduce((under, one) => over(color(one.backgroundColor), under), [255, 255, 255]);
    const ink = color(style.color);
    const [a, b] = [light(over([...ink.slice(0, 3), ink[3] * opaque], behind)), light(behind)].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) found[`${element.tagName}.${element.className}#${element.id}`] = [contrast, text];
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = texts.nextNode(); text; text = texts.nextNode()) {
    const element = text.parentElement;
    if (text.textContent.trim() && element.getClientRects().length)
      look(element, getComputedStyle(element), text.textContent);
  }
  for (const field of document.querySelectorAll("[placeholder]"))
    if (field.getClientRects().length) look(field, getComputedStyle(field, "::placeholder"), field.placeholder);
  return found;
}"""


@pytest.fixture(scope="module")
def view(browser):
    """A page with one reply that has every kind of text in every shade."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    thought = [("<think>", 1.0), ("\n", 1.0), *[(f" word{p}", p) for p in SHADES], ("\n", 1.0), ("</think>", 1.0)]
    server.replies = [[*thought, *[(text, p, (" other", 0.001)) for p in SHADES for text in PIECES]]]
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    page.set_default_timeout(20_000)
    page.goto(server.url)
    ask(page, "What is 17 + 28?")
    page.locator("summary").click()
    page.click("#shading")
    yield page
    page.close()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_on_every_shade(view, scheme):
    view.emulate_media(color_scheme=scheme)
    view.click("#open-settings")
    for shaded in (True, False):
        if view.evaluate("document.body.classList.contains('shaded')") != shaded:
            view.click("#shading")
        assert view.evaluate(FAINT) == {}
    view.click("#close-settings")
    view.click("#shading")
    view.locator(".thought .tok", has_text="word0.3").click()
    assert view.locator("#card").is_visible() and view.evaluate(FAINT) == {}
    view.keyboard.press("Escape")


def test_paper_is_white_and_has_no_buttons(view):
    view.emulate_media(color_scheme="dark", media="print")
    try:
        assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 248)"
        assert view.evaluate(FAINT) == {}
        assert view.locator("button:visible, #bottom:visible, header:visible").count() == 0
        assert view.locator(".thought:visible, .markdown:visible").count() == 2
        assert view.evaluate("getComputedStyle(document.querySelector('.code pre')).whiteSpace") == "pre-wrap"
    finally:
        view.emulate_media(color_scheme="light", media="screen")


def test_the_sheet_of_a_narrow_screen_does_not_cover_its_token(view):
    view.set_viewport_size({"width": 360, "height": 640})
    try:
        for place in (0, 0.5, 1):
            view.evaluate(
                "(at) => { const c = document.getElementById('chat'); c.scrollTop = at * c.scrollHeight }", place
            )
            lowest = view.evaluate(
                """() => {
              const end = $("bottom").getBoundingClientRect().top - 12;
              const all = [...document.querySelectorAll(".markdown .tok:not(.mark)")];
              const boxes = all.map((e) => [e.getBoundingClientRect(), e]);
              const seen = boxes.filter(([box]) => box.height && box.bottom < end && box.top > 60).pop()[1];
              seen.click();
              return [...document.querySelectorAll(".tok")].indexOf(seen);
            }"""
            )
            token, card = view.locator(".tok").nth(lowest).bounding_box(), view.locator("#card").bounding_box()
            assert token["y"] + token["height"] <= card["y"] and token["y"] > 0, place
            view.keyboard.press("Escape")
    finally:
        view.set_viewport_size({"width": 1100, "height": 800})


def test_a_token_in_focus_is_read_out_with_its_probability(view):
    view.evaluate("document.getElementById('chat').scrollTop = 0")
    view.locator(".toks.thought").focus()
    for _ in range(3):
        view.keyboard.press("ArrowRight")
    assert view.inner_text("#live").startswith("␣word0.999, 99.9 %")
    assert view.get_attribute("#live", "aria-live") == "polite"
    view.keyboard.press("Escape")
