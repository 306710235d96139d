"""Makes the pictures of the README from what the commands print and draw: `make pictures`.

terminal.svg    the answer of `make run`, in a terminal
loss.png        the loss of 200 steps of configs/tiny-pretrain.yaml, with 8 rows a step
page.png        the page of serve.py: a token and its alternatives
page-branch.png the page again: a reply that was branched in its thinking
"""

import io
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "runs" / "pictures"


def printed(*command: str) -> str:
    """What a command shows in a terminal, with its colours."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the end, on Linux
                break
            if not piece:
                break
            shown += piece
    os.close(ours)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {shown.decode()}")
    return shown.decode().replace("\r\n", "\n")


def terminal(picture: Path) -> None:
    question = re.search(r"^QUESTION \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    screen = Console(record=True, width=72, file=io.StringIO())
    screen.print(Text("$ make run", style="bold"))
    screen.print(Text.from_ansi(printed(sys.executable, "generate.py", "--model", "models/tiny", question)))
    style = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)  # no fonts from the network
    style = style.replace("Fira Code", "ui-monospace, Menlo, Consolas")
    picture.write_text(screen.export_svg(title="nanoqwen", theme=MONOKAI, code_format=style, unique_id="terminal"))


def loss(picture: Path) -> None:
    shutil.rmtree(RUN, ignore_errors=True)
    keys = ["train.steps=200", "train.validate_every=25", "train.validate_batches=2", "train.sample_every=0"]
    keys += ["train.batch=8", "train.accumulate=1"]  # a sixth of the work
    command = [sys.executable, "train.py", "configs/tiny-pretrain.yaml", "--set", f"train.out={RUN}", *keys]
    subprocess.run(command, cwd=ROOT, check=True)
    shutil.copyfile(RUN / "loss.png", picture)


def pages(alternatives: Path, branch: Path) -> None:
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "serve.py", "--model", "models/tiny", "--port", "0"]
    with (
        subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server,
        sync_playwright() as playwright,
    ):
        try:
            address = re.search(r"http://\S+", server.stderr.readline())[0]
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])

            def asked(question: str, scheme: str, thinking: bool):
                size = {"width": 760, "height": 720}
                view = browser.new_page(viewport=size, color_scheme=scheme, device_scale_factor=1.5)
                view.goto(address)
                view.click("#shading")
                if not thinking:
                    view.click("#thinking")
                view.fill("#ask", question)
                view.keyboard.press("Enter")
                view.wait_for_selector("body:not(.busy) [data-act=regenerate]")
                return view

            view = asked("What is 47 + 38?", "light", thinking=False)
            view.locator(".answer .tok:is(.h2, .h3, .h4)").last.click()
            view.screenshot(path=alternatives)
            view = asked("Which is larger, 9.11 or 9.9?", "dark", thinking=True)
            view.click("summary")
            view.locator(".thought .tok:text-is(' less')").first.click()
            view.locator("#card li button").filter(has_text="␣or").click()
            view.wait_for_selector("body:not(.busy) .versions")
            view.screenshot(path=branch)
        finally:
            server.terminate()


if __name__ == "__main__":
    terminal(ROOT / "docs" / "terminal.svg")
    loss(ROOT / "docs" / "loss.png")
    pages(ROOT / "docs" / "page.png", ROOT / "docs" / "page-branch.png")
