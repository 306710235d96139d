"""serving/page/ in front of the real server and the bundled model: what it shows and branches to is the model's own."""

import re
import time

import pytest
from scripted import answer, ask, done

from chat import EARLY_STOP_TEXT
from inference.decode import generate
from inference.params import SamplingParams


@pytest.fixture
def real(running, browser):
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    page.set_default_timeout(20_000)
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(running.url)
    yield page
    assert not said
    page.close()


def continued(tiny, messages: list[dict], thinking: bool = True, **options) -> str:
    """What the model says greedily, every token of it, tags and end included."""
    model, chat = tiny
    ids = chat.render(messages, thinking, continue_final_message=messages[-1]["role"] == "assistant", **options)
    return chat.decode(generate(model, ids, SamplingParams(temperature=0)))


def all_tokens(page) -> str:
    """Every token of the last reply that has an element, in order: with the tags, the line breaks and the end."""
    page.locator("summary").last.evaluate("(one) => one.parentElement.open = true")
    return page.evaluate("[...views.values()].at(-1).node.reply.tokens.map((token) => token.text).join('')")


def test_the_reply_and_a_branch_are_the_models_own(real, tiny):
    question = {"role": "user", "content": "Which is larger, 9.11 or 9.9?"}
    ask(real, question["content"])
    whole = continued(tiny, [question])
    assert all_tokens(real) == whole and answer(real) == "9.9 is larger than 9.11."
    real.click("#shading")
    shown = real.locator(".assistant .tok:visible").all_text_contents()
    assert "".join(shown).replace("⏎", "\n") == whole  # each token has an element, and each says what it is
    real.locator(".thought .tok:text-is(' less')").first.click()
    other = real.locator("#card li button:not([aria-disabled])").filter(has_text="␣")
    other = other.first.locator(".name").inner_text().replace("␣", " ")
    before = whole.removeprefix("<think>\n").partition(" less")[0]
    real.locator("#card li button:not([aria-disabled])").filter(has_text="␣").first.click()
    real.wait_for_selector(".versions:has-text('2 / 2')")
    done(real)
    begun = {"role": "assistant", "content": "", "reasoning_content": before + other}
    assert all_tokens(real) == "<think>\n" + before + other + continued(tiny, [question, begun])
    cached = re.search(r"prompt (\d+) \((\d+) cached\)", real.inner_text(".stats"))
    assert int(cached[1]) - int(cached[2]) == 1  # only the alternative was computed


def test_what_a_budget_puts_in_is_told_apart(real):
    real.click("#open-settings")
    real.fill("#knob-thinking_budget", "8")
    ask(real)
    real.click("#shading")
    forced = real.locator(".thought .forced")
    assert EARLY_STOP_TEXT in all_tokens(real) and forced.count() > 5
    forced.nth(1).click()
    assert "forced, not sampled" in real.inner_text("#card") and not real.locator("#card li").count()


def test_stop_frees_the_servers_row(real, running, idle, monkeypatch):
    step = running.service.engine.step
    monkeypatch.setattr(running.service.engine, "step", lambda: time.sleep(0.1) or step())
    ask(real, wait=False)
    real.wait_for_selector("body.busy .thought .tok", state="attached")
    real.keyboard.press("Escape")
    done(real)
    said = real.inner_text(".preview") + real.locator(".thought").text_content()
    assert said and not answer(real)
