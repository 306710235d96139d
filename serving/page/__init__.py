"""The chat page that the server answers `/` with: one HTML file of the files beside this one, and the headers to it.

Nothing is built and nothing is fetched. The page's Content Security Policy names its own style and script by their
hashes and lets it talk to the server that it came from, and to nobody else. What a model writes becomes text nodes.
"""

import base64
import hashlib
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = ("markdown.js", "replies.js", "tokens.js", "views.js", "page.js")  # joined into one, in this order


@cache
def render() -> tuple[str, dict[str, str]]:
    """The page, and the response headers that it has to be sent with."""
    style = (HERE / "page.css").read_text("utf-8")
    script = '"use strict";\n' + "\n".join((HERE / name).read_text("utf-8") for name in SCRIPTS)
    html = (HERE / "page.html").read_text("utf-8")
    html = html.replace("/* page.css */", style, 1).replace("/* the scripts */", script, 1)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return html, headers


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
