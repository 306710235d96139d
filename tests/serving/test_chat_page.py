"""serving/page/ in a real Chromium, in front of a server that says what a test has written down.

After each test: the browser's console is empty, nothing popped up, and no request went anywhere but to that server.
"""

import json
import threading
from dataclasses import replace

import pytest
from scripted import MODEL, SUM, Error, Server, answer, ask, done, entry, pick

from inference import saved_chat
from inference.params import SamplingParams
from inference.session import Session
from serving.page import render

EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\u202e"


@pytest.fixture(scope="module")
def scripted():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server(scripted):
    scripted.replies, scripted.asked, scripted.key, scripted.model = [], [], None, MODEL
    return scripted


@pytest.fixture
def view(server, browser):
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    page.set_default_timeout(20_000)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url.replace("behind/a/proxy/", "")))
    page.goto(server.url)
    yield page
    said = [text for text in said if not text.startswith("Failed to load resource")]  # of a status that a test sent
    assert not said and {url for url in asked if not url.startswith(("data:", "blob:"))} <= {
        server.url + path for path in ("", "v1/models", "v1/chat/completions")
    }
    page.close()


def test_a_reply_streams_and_its_thinking_is_folded(view, server):
    queued, half = threading.Event(), threading.Event()
    server.replies = [[queued, *SUM[:4], half, *SUM[4:]]]
    ask(view, wait=False)
    view.wait_for_selector(".stats:has-text('waiting for the first token')")
    queued.set()
    view.wait_for_selector("summary:has-text('Thinking')")
    assert "waiting" not in view.inner_text(".stats")
    assert "17 +" in view.locator(".preview").inner_text() and view.inner_text("#send") == "Stop"
    assert not view.locator(".thought").is_visible()
    view.wait_for_timeout(100)
    half.set()
    done(view)
    assert answer(view) == "It is 45." and view.inner_text("#send") == "Send"
    assert view.inner_text("summary") == "Thoughts · 6 tokens" and not view.locator(".thought").is_visible()
    stats = view.inner_text(".stats").replace("\u00a0", " ")
    for part in ("13 tokens (6 thinking)", "tokens/s", "first after", "prompt 21 (16 cached)", "3 % of the context"):
        assert part in stats
    assert f"seed {server.asked[0]['seed']}" in stats
    view.click("summary")
    assert view.inner_text(".thought").strip() == "17 + 28"
    assert view.inner_text("#model") == "tiny" and "0.48 million parameters · bf16" in view.inner_text("#facts")
    sent = server.asked[0]
    assert sent["messages"] == [{"role": "user", "content": "What is 17 + 28?"}] and sent["model"] == "tiny"
    assert sent["stream_options"] == {"include_usage": True} and sent["top_logprobs"] == 20
    assert sent["chat_template_kwargs"] == {"enable_thinking": True} and "temperature" not in sent


def test_stop_keeps_what_was_said_and_the_reply_can_go_on(view, server):
    never = threading.Event()
    server.replies = [[("It", 0.9), (" is ", 0.9), never], [("45", 0.9), (".", 0.9), ("<|im_end|>", 1.0)]]
    ask(view, wait=False)
    view.wait_for_selector(".markdown:has-text('It is')")
    view.click("#send")
    never.set()
    done(view)
    assert answer(view).strip() == "It is" and "stopped" in view.inner_text(".stats")
    view.click("[data-act=continue]")
    view.wait_for_selector(".markdown:has-text('It is 45.')")
    done(view)
    assert server.asked[1]["messages"][-1] == {"role": "assistant", "content": "It is "}
    assert server.asked[1]["continue_final_message"] is True and not view.locator(".versions").count()


def test_a_branch_while_the_reply_still_comes(view, server):
    more, never = threading.Event(), threading.Event()
    server.replies = [[("a", 0.9), (" b", 0.5, (" c", 0.4)), more, (" d", 0.9), never], [(" e", 0.9)]]
    ask(view, wait=False)
    view.locator(".tok:text-is(' b')").click()
    more.set()
    view.wait_for_selector(".markdown:has-text('a b d')")
    assert view.locator(".tok.picked").inner_text() == " b"  # the card stays at its token, which is a new element
    view.locator("#card li button").filter(has_text="␣c").click()
    view.wait_for_selector(".markdown:has-text('a c e')")
    done(view)
    never.set()
    assert server.asked[1]["messages"][-1]["content"] == "a c" and view.inner_text("#live") == "Reply: a c e"
    view.click("[data-act=back]")
    assert answer(view) == "a b d" and "stopped" in view.inner_text(".stats")


def test_another_reply_and_another_message_keep_the_older_ones(view, server):
    server.replies = [[("one", 0.9)], [("two", 0.9)], [("three", 0.9)], [("four", 0.9)]]
    ask(view)
    view.click("[data-act=regenerate]")
    view.wait_for_selector(".versions:has-text('2 / 2')")
    done(view)
    assert answer(view) == "two" and server.asked[0]["seed"] != server.asked[1]["seed"]
    view.click("[data-act=back]")
    assert answer(view) == "one"
    ask(view, "And now?")
    assert [m["content"] for m in server.asked[2]["messages"]] == ["What is 17 + 28?", "one", "And now?"]
    view.locator("[data-act=edit]").first.click()
    view.keyboard.press("Control+a")
    view.keyboard.type("What is 1 + 1?")
    view.keyboard.press("Enter")
    view.wait_for_selector(".markdown:has-text('four')")
    done(view)
    assert view.locator("article").count() == 2 and len(server.asked[3]["messages"]) == 1
    view.locator(".user [data-act=back]").click()
    assert view.locator("article").count() == 4 and answer(view) == "three"
    view.reload()
    assert view.locator("article").count() == 4 and answer(view) == "three"
    view.locator(".user [data-act=forward]").first.click()
    assert answer(view) == "four"
    view.click("#new")
    assert view.locator(".welcome").is_visible() and not view.locator("article").count()


def test_a_token_shows_its_alternatives_and_a_click_branches_the_thinking(view, server):
    server.replies = [
        SUM,
        [("\n", 0.9), ("</think>", 1.0), ("\n\n", 1.0), ("So", 0.9), (" 44", 0.9), ("<|im_end|>", 1.0)],
    ]
    ask(view)
    view.click("summary")
    assert not view.locator(".thought .control").first.is_visible()
    view.click("#shading")
    shades = {
        tok.inner_text().strip(): tok.get_attribute("class")
        for tok in view.locator(".thought .tok, .answer .tok").all()
    }
    assert "h1" in shades["+"] and "h1" in shades["28"] and "h2" in shades["45"] and "control" in shades["<think>"]
    view.locator(".tok:text-is(' 28')").hover()
    view.wait_for_selector("#card:visible")
    rows = view.locator("#card li").all_inner_texts()
    assert [row.split() for row in rows] == [
        *[["␣28", "60.0", "%"], ["␣27", "30.0", "%"], ["</think>", "5.0", "%"]],
        *[["all", "others", "5.0", "%"]],
    ]
    view.mouse.move(5, 400)
    view.wait_for_selector("#card", state="hidden")
    pick(view, " 28", "␣27")
    done(view)
    sent = server.asked[1]
    assert sent["messages"][-1] == {"role": "assistant", "content": "", "reasoning_content": "17 + 27"}
    assert sent["continue_final_message"] is True
    assert view.locator(".thought .tok.branched").inner_text() == " 27" and "branched at “␣27”" in view.inner_text(
        ".stats"
    )
    assert view.locator(".markdown").inner_text().startswith("So 44") and "2 / 2" in view.inner_text(".versions")
    view.click("[data-act=back]")
    assert "It is 45." in view.locator(".markdown").inner_text()
    view.reload()  # tokens and shades are kept
    view.locator(".tok:text-is(' 45')").click()
    assert "50.0 %" in view.inner_text("#card")


def test_every_kind_of_alternative(view, server):
    server.replies = [SUM, [("Sure", 0.9), (".", 0.9)], [(" then", 0.9)]]
    ask(view)
    view.click("summary")
    view.click("#shading")
    pick(view, " 28", "</think>")  # ends the thinking there
    done(view)
    assert server.asked[1]["messages"][-1] == {"role": "assistant", "content": "<think>\n17 +\n</think>\n\n"}
    assert view.locator(".markdown").inner_text() == "Sure." and "</think>" in view.inner_text(".thought")
    view.click("[data-act=back]")
    pick(view, " 45", "␣44")
    done(view)
    assert server.asked[2]["messages"][-1]["content"] == "It is 44"
    assert server.asked[2]["messages"][-1]["reasoning_content"] == "17 + 28"
    view.click("[data-act=back]")
    view.click("[data-act=back]")
    pick(view, " 45", "<|im_end|>")  # ends the reply there: nothing to ask for
    assert view.locator(".markdown").inner_text() == "It is" and len(server.asked) == 3
    view.click("[data-act=back]")
    view.click("[data-act=back]")
    view.click("[data-act=back]")
    view.locator(".tok:visible:text-is(' 45')").click()
    refused = view.locator("#card li button[aria-disabled]")
    assert refused.count() == 3  # the chosen one, a mark of the chat, a part of a character
    assert "\\xf0" in refused.nth(2).inner_text() and "part of a character" in refused.nth(2).get_attribute("title")
    refused.nth(1).click(force=True)
    assert len(server.asked) == 3 and view.locator("#card").is_visible()


def test_a_character_of_several_tokens(view):
    fox = "🦊".encode()
    events = [entry("a"), entry("\ufffd", 0.5), entry("\ufffd", 0.4, (" x", 0.2)), entry("b")]
    events[1]["bytes"], events[2]["bytes"] = list(fox[:2]), list(fox[2:])
    texts = ["a", "", "🦊", "b"]
    body = "".join(
        "data: " + json.dumps({"choices": [{"delta": {"content": text}, "logprobs": {"content": [one]}}]}) + "\n\n"
        for text, one in zip(texts, events, strict=True)
    )
    view.route("**/completions", lambda route: route.fulfill(body=body + "data: [DONE]\n\n"))
    ask(view)
    assert answer(view) == "a🦊b"
    assert view.locator(".markdown .tok").all_inner_texts() == ["a", "🦊", "b"]
    view.locator(".tok:text-is('🦊')").click()
    assert "\\xf0\\x9f" in view.inner_text("#card .head") and "2 of 4" in view.inner_text("#card .head")
    view.click("#card [aria-label='The token after']")  # has no element of its own
    assert "\\xa6\\x8a" in view.inner_text("#card .head")
    assert view.locator("#card li button").last.get_attribute("aria-disabled") == "true"


def test_a_text_that_is_not_what_its_tokens_say(view):
    """Behind a stop string, a mark in mid-text or half a character at the end: the tokens before it are still told."""
    events = [[("a", 0.9), "a"], [(" b", 0.9), " b"], [("</think>", 0.1), ""], [("\n", 0.9), ""], [("c", 0.9), "c"]]
    chunks = [{"delta": {"content": text}, "logprobs": {"content": [entry(*token)]}} for token, text in events]
    body = "".join(f"data: {json.dumps({'choices': [chunk]})}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    view.route("**/completions", lambda route: route.fulfill(body=body))
    ask(view)
    assert answer(view) == "a bc" and view.locator(".markdown .tok").all_inner_texts() == ["a", " b"]


def test_text_is_never_markup(view, server):
    links = "[a](javascript:alert(3)) [b](data:text/html,x) [c](https://u:p@h/) ![d](https://e.org/f.png) [g](https://h.org)"
    server.model = {**MODEL, "id": EVIL, "precision": EVIL}
    server.replies = [
        [
            ("<think>", 1.0),
            (EVIL, 0.5, (EVIL, 0.4)),
            ("</think>", 1.0),
            (f"{EVIL} {links}\n\n```{EVIL}\n{EVIL}\n```\n", 0.5, (EVIL, 0.3)),
        ],
        Error(500, EVIL),
    ]
    view.reload()
    ask(view, EVIL)
    view.click("summary")
    view.click("#shading")
    view.locator(".markdown .tok").first.click()
    text = view.inner_text("body")
    assert text.count("<img src=x onerror=alert(1)>") >= 8 and "\u202e" not in text and "\\u{202e}" in text
    view.keyboard.press("Escape")
    ask(view, EVIL)
    assert "alert(2)" in view.locator(".assistant .error").last.inner_text()
    assert view.locator("img, iframe, object, embed, svg script").count() == 0
    assert view.locator("script").count() == 1  # its own
    assert view.locator(".markdown a").evaluate_all("all => all.map((a) => [a.href, a.rel])") == [
        ["https://e.org/f.png", "noopener noreferrer nofollow"],
        ["https://h.org/", "noopener noreferrer nofollow"],
    ]
    attributes = view.evaluate(
        "[...document.querySelectorAll('*')].flatMap((e) => [...e.attributes].map((a) => [a.name, a.value]))"
    )
    assert not [a for a in attributes if a[0].startswith("on") or a[1].lower().startswith("javascript:")]


def test_the_policy_allows_the_page_and_nothing_else(view):
    html, headers = render()
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    assert "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert html.count("<script") == 1 and "/* page.css */" not in html and "/* the scripts */" not in html
    assert not [
        word for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(") if word in html
    ]


def test_code_is_copied_as_it_is(view, server):
    view.context.grant_permissions(["clipboard-read", "clipboard-write"])
    code = "def f(x):\n    return '<b>' + x  # *a*"
    server.replies = [
        [("- so:\n\n  ```py\n", 0.9), *[(f"  {line}\n", 0.9) for line in code.split("\n")], ("  ```\n", 0.9)]
    ]
    ask(view)
    view.click(".code .copy")
    view.wait_for_selector(".copy:has-text('Copied')")
    assert view.evaluate("navigator.clipboard.readText()") == code
    view.click("[data-act=copy]")
    view.wait_for_selector("[data-act=copy]:has-text('Copied')")
    assert view.evaluate("navigator.clipboard.readText()").startswith("- so:\n\n  ```py")


def test_errors_are_a_line_and_can_be_tried_again(view, server):
    server.replies = [
        *[Error(429, "the queue is full", Retry_After="3"), [("It", 0.9), Error(0, "out of memory")]],
        *[[(" is", 0.9), (" 45", 0.9)]],
    ]
    ask(view)
    error = view.locator(".assistant .error")
    assert error.inner_text().startswith("the queue is full (try again in 3 s)")
    error.locator("button").click()
    view.wait_for_selector(".error:has-text('out of memory')")
    assert answer(view) == "It"
    error.locator("button").click()
    view.wait_for_selector(".markdown:has-text('It is 45')")
    done(view)
    assert not error.is_visible() and server.asked[2]["messages"][-1]["content"] == "It"
    view.route("**/completions", lambda route: route.abort())
    ask(view, "Still there?")
    assert "can't be reached" in view.locator(".assistant .error").last.inner_text()
    view.unroute("**/completions")
    server.replies = [[("yes", 0.9)]]
    ask(view, "And now?")  # what failed is no turn of the assistant
    assert [m["role"] for m in server.asked[3]["messages"]] == ["user", "assistant", "user", "user"]


def test_behind_a_proxy_that_adds_a_path(view, server):
    server.replies = [[("yes", 0.9)]]
    urls = []
    view.on("request", lambda request: urls.append(request.url))
    view.goto(server.url + "behind/a/proxy/")
    view.wait_for_selector("#model:has-text('tiny')")
    ask(view)
    assert answer(view) == "yes"
    paths = [url.removeprefix(server.url + "behind/a/proxy/") for url in urls if url.startswith("http")]
    assert paths == ["", "v1/models", "v1/chat/completions"]


def test_the_key_is_asked_for_once(view, server):
    server.key, server.replies = "secret", [[("yes", 0.9)]]
    view.reload()
    view.wait_for_selector("#key-dialog[open]")
    view.keyboard.type("wrong, ünd more")
    view.keyboard.press("Enter")
    view.wait_for_selector("#key-note:has-text('does not accept')")
    view.keyboard.type("secret")
    view.keyboard.press("Enter")
    view.wait_for_selector("#model:has-text('tiny')")
    ask(view)
    view.reload()
    view.wait_for_selector("#model:has-text('tiny')")
    assert answer(view) == "yes" and not view.locator("#key-dialog[open]").count()
    assert "secret" not in view.content()


def test_settings_are_sent_and_kept(view, server):
    server.replies = [[("yes", 0.9)], [("no", 0.9)]]
    view.click("#open-settings")
    view.fill("#system", "Be brief.")
    values = {"temperature": "1.5", "top_p": "0.5", "top_k": "7", "min_p": "0.1", "presence_penalty": "-1"}
    values |= {"frequency_penalty": "0.5", "repetition_penalty": "1.2", "max_new_tokens": "99", "thinking_budget": "8"}
    values |= {"seed": "5"}
    assert view.get_attribute("#knob-temperature", "placeholder") == "0.6"
    for name, value in values.items():
        view.fill(f"#knob-{name}", value)
    view.fill("#stop", "END\n\\n\\n")
    view.fill("#knob-top_k", "7.5")  # no whole number: marked, and not taken
    assert view.get_attribute("#knob-top_k", "aria-invalid") == "true"
    ask(view)
    sent = {"max_tokens" if name == "max_new_tokens" else name: float(value) for name, value in values.items()}
    assert sent.items() <= server.asked[0].items() and server.asked[0]["stop"] == ["END", "\n\n"]
    assert server.asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    view.reload()
    view.click("#thinking")
    view.click("#open-settings")
    assert view.input_value("#knob-temperature") == "1.5" and view.input_value("#system") == "Be brief."
    view.locator(".knob:has(#knob-temperature) .reset").click()
    assert view.get_attribute("#knob-temperature", "placeholder") == "0.7"  # the advice without thinking
    view.click("[data-act=regenerate]")
    view.wait_for_selector(".versions:has-text('2 / 2')")
    done(view)
    last = server.asked[1]
    assert "temperature" not in last and "thinking_budget" not in last and last["seed"] == 6
    assert last["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_chat_goes_to_the_terminal_and_back(view, server, tiny, tmp_path):
    session = Session(*tiny, SamplingParams())
    server.replies = [SUM]
    view.click("#open-settings")
    view.click("#export")
    assert "no message yet" in view.inner_text("#alert")
    view.fill("#system", "Be brief.")
    view.fill("#knob-temperature", "0.3")
    view.fill("#knob-max_new_tokens", "64")
    view.click("#thinking")
    ask(view)
    with view.expect_download() as download:
        view.click("#export")
    download.value.save_as(tmp_path / "chat.json")
    assert saved_chat.load(session, tmp_path / "chat.json")
    assert session.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 17 + 28?"},
        {"role": "assistant", "content": "It is 45.", "reasoning_content": "17 + 28"},
    ]
    assert session.params.temperature == 0.3 and session.params.max_new_tokens == 64 and not session.thinking
    session.set_system("Be long.")
    session.thinking_budget = 9
    session.params = replace(session.params, stop=("\n\n", "a\\n"))
    saved_chat.save(session, tmp_path / "back.json")
    view.click("#new")
    assert view.locator("article").count() == 0 and "The chat was cleared" in view.inner_text("#alert")
    view.click("#alert button")  # Undo
    assert answer(view) == "It is 45." and view.locator("#alert").is_hidden()
    view.set_input_files("#file", tmp_path / "back.json")
    view.wait_for_selector("#alert:has-text('The chat was cleared')")
    view.click("#alert button")  # Undo, of the settings too
    assert view.input_value("#system") == "Be brief." and view.input_value("#knob-thinking_budget") == ""
    view.set_input_files("#file", tmp_path / "back.json")
    view.wait_for_selector("#alert:has-text('The chat was cleared')")
    view.wait_for_selector(".markdown:has-text('It is 45.')")
    assert view.inner_text("summary").startswith("Thoughts") and view.input_value("#system") == "Be long."
    assert view.input_value("#knob-temperature") == "0.3" and view.input_value("#knob-thinking_budget") == "9"
    assert view.input_value("#stop") == "\\n\\n\na\\\\n"
    for text, said in (
        ("no", "not JSON"),
        ("[]", "not a saved chat"),
        ('{"messages": [{"role": "tool", "content": ""}]}', "message 1: its role"),
        ('{"messages": [{"role": "user", "content": 1}]}', "message 1: its content"),
        ('{"schema": "other", "messages": [1]}', 'schema is "other"'),
    ):
        (tmp_path / "wrong.json").write_text(text)
        view.set_input_files("#file", tmp_path / "wrong.json")
        view.wait_for_selector("#alert:has-text('wrong.json: ')")
        assert said in view.inner_text("#alert") and answer(view) == "It is 45."  # the chat stays
        view.click("#alert button")


def test_the_keyboard_alone(view, server):
    never = threading.Event()
    server.replies = [[("It", 0.9), never], SUM, [(".", 0.9)]]
    view.wait_for_selector("textarea:focus")
    view.keyboard.type("What is 17 + 28?")
    view.keyboard.press("Shift+Enter")
    view.keyboard.type("Think.")
    view.keyboard.press("Enter")
    view.wait_for_selector(".markdown:has-text('It')")
    view.keyboard.press("Escape")
    never.set()
    done(view)
    assert server.asked[0]["messages"][0]["content"] == "What is 17 + 28?\nThink."

    def tab_to(selector: str, key: str = "Tab") -> None:
        for _ in range(40):
            if view.evaluate("(s) => document.activeElement.matches(s)", selector):
                return
            view.keyboard.press(key)
        raise AssertionError(f"the Tab key doesn't reach {selector}")

    tab_to(".assistant [data-act=regenerate]", "Shift+Tab")
    view.keyboard.press("Enter")
    view.wait_for_selector(".versions:has-text('2 / 2')")
    done(view)
    tab_to(".assistant summary")
    view.keyboard.press("Enter")
    view.keyboard.press("Alt+p")
    tab_to(".toks.answer")
    view.keyboard.press("ArrowRight")
    assert view.evaluate("document.activeElement.textContent") == "⏎⏎"
    view.keyboard.press("Shift+ArrowRight")  # the next that is unsure
    assert view.evaluate("document.activeElement.textContent") == " 45" and view.locator("#card").is_visible()
    view.keyboard.press("Enter")
    assert "␣44" in view.evaluate("document.activeElement.textContent")
    view.keyboard.press("Escape")
    assert view.evaluate("document.activeElement.textContent") == " 45" and not view.locator("#card").is_visible()
    view.keyboard.press("Enter")
    view.keyboard.press("Enter")
    view.wait_for_selector(".versions:has-text('3 / 3')")
    done(view)
    assert server.asked[2]["messages"][-1]["content"] == "It is 44"
    assert view.evaluate("document.activeElement.matches('.toks.answer')")


def test_a_narrow_screen_and_a_dark_one(view, server):
    server.replies = [
        [*SUM[:-1], ("\n\n```\n" + "x" * 300 + "\n```\n\n| a | b |\n|--|--|\n| " + "word " * 40 + "| y |\n", 0.5)]
    ]
    view.set_viewport_size({"width": 390, "height": 800})
    view.emulate_media(color_scheme="dark")
    ask(view, "W" * 200)

    def fits() -> bool:
        return view.evaluate(
            "document.documentElement.scrollWidth <= 390 && document.getElementById('chat').scrollWidth <= 390"
        )

    assert fits()
    view.click("summary")
    view.click("#shading")
    assert fits()
    view.locator(".tok:text-is(' 45')").click()
    card = view.locator("#card").bounding_box()
    assert card["x"] >= 0 and card["x"] + card["width"] <= 390 and card["y"] + card["height"] <= 800
    view.keyboard.press("Escape")
    view.click("#open-settings")
    panel = view.locator("#settings").bounding_box()
    assert fits() and panel["width"] <= 390 and panel["x"] >= 0
    dark = view.evaluate("getComputedStyle(document.body).backgroundColor")
    view.click("#close-settings")
    view.click("#theme")
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") != dark


def test_the_shares_of_the_draw_are_those_of_the_sampler(view):
    """Computed by the page from the 20 likeliest tokens, or not told."""
    import numpy as np
    import torch

    from inference.params import SamplingParams
    from inference.sampling import distribution, top_logprobs

    chance, told = np.random.default_rng(0), 0
    for number in range(120):
        logits = chance.normal(0, chance.choice([1, 4]), 60).astype(np.float32)
        given = {"temperature": chance.choice([0.0, 0.6, 1.0, 1.7]), "top_k": chance.choice([0, 1, 3, 20, 40])}
        given |= {"top_p": chance.choice([0.3, 0.95, 1.0]), "min_p": chance.choice([0.0, 0.05])}
        given = {name: value.item() for name, value in given.items()}
        ids, weights = distribution(logits, SamplingParams(**given))
        shares = np.zeros(60)
        shares[slice(None) if ids is None else ids] = weights / weights.sum()
        top = top_logprobs(torch.from_numpy(logits), 0, 20)[1]
        penalties = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}
        asked = [[value for _, value in top], given | penalties]
        found = view.evaluate("([logprobs, sampling]) => drawnShares(logprobs, sampling)", asked)
        if found is None:
            assert given["temperature"] and (given["top_k"] in (0, 40))
            continue
        told += 1
        assert found == pytest.approx([shares[token] for token, _ in top], abs=1e-5), (number, given)
        asked[1]["presence_penalty"] = 1
        assert view.evaluate("([logprobs, sampling]) => drawnShares(logprobs, sampling)", asked) is None
    assert told > 70


def test_a_card_tells_the_shares_of_the_draw_where_they_differ(view, server):
    server.model = {**server.model, "sampling": {"answer": {"temperature": 0.5, "top_k": 2, "top_p": 1, "min_p": 0}}}
    server.model["thinking"] = "never"
    view.reload()
    view.wait_for_selector("#model:text-is('tiny')")
    server.replies = [[("a", 0.6, (" b", 0.3), (" c", 0.1)), ("<|im_end|>", 1.0)]]
    ask(view)
    view.locator(".tok:text-is('a')").first.click()
    rows = [row.replace("\u00a0", " ").split() for row in view.locator("#card li").all_inner_texts()]
    assert rows[0] == ["model", "sampling"]
    assert [row[-4:] for row in rows[1:3]] == [["60.0", "%", "80.0", "%"], ["30.0", "%", "20.0", "%"]]
    assert rows[3][-1] == "never"
