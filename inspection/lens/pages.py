"""The lens page: five tabs that a learner follows from left to right, with the code of model.py that computes each."""

import hashlib
import inspect
from pathlib import Path
from typing import Any

from markupsafe import Markup

import model
from inspection.page import Page, bars, code, facts, fold, table, tabs, text

HERE = Path(__file__).parent
ABOUT = {
    "ids": (
        "The chat template writes the messages out as one text, and the tokenizer cuts it into pieces that have "
        "numbers. Under each piece: its number and its bytes. Thinking is grey, the answer blue, what the "
        "template wrote has no background."
    ),
    "tokens": (
        "For each next token the model gives every token of its vocabulary a probability p. A token's surprise is "
        "-log2 p bits: 0 is certain, 1 a coin toss. Click a token, or press , and . to move."
    ),
    "origin": (
        "How many bits each part of the text before it was worth to the chosen token: the part is taken out and "
        "the probability computed again. Blue parts made the token likelier, red ones less likely. The two "
        "approximations need one backward pass instead."
    ),
    "layers": (
        "What the model would say if it ended behind each layer: the last norm and the head applied to the "
        "residual stream. The darker, the surer; bold is the token that was said."
    ),
    "heads": "A square for each head (across) of each layer (down), darker where it looks at one token alone.",
    "model": (
        "One block, repeated: attention mixes positions, the MLP works on each by itself, and both add to the "
        "residual stream. Open a block for its operations."
    ),
}


def excerpt(name: str) -> Markup:
    """A class or function of model.py with its line numbers, folded."""
    thing: Any = model
    for part in name.split("."):
        thing = getattr(thing, part)
    lines, start = inspect.getsourcelines(thing)
    numbered = "".join(f"{start + at:4}  {line}" for at, line in enumerate(lines))
    return fold(f"model.py, line {start}: {name}", code(numbered.rstrip("\n")))


def place(id: str, kind: str = "div", classes: str = "reading") -> Markup:
    """An element that the page's script fills."""
    return Markup('<{0} id="{1}" class="{2}"></{0}>').format(kind, id, classes)


def control(label: str, id: str) -> Markup:
    return Markup('<label>{} <select id="{}"></select></label>').format(label, id)


def controls(*parts: Markup) -> Markup:
    return Markup('<div class="controls">{}</div>').format(Markup("").join(parts))


def heading(label: str) -> Markup:
    return Markup("<h3>{}</h3>").format(label)


def layout() -> str:
    """The digest of all that draws a page: two pages with the same data and layout are equal to the byte."""
    files = [Path(__file__), HERE / "lens.css", HERE / "lens.js", Path(model.__file__)]
    files += [HERE.parent / name for name in ("page.py", "page.css", "page.js")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def lens_page(found: dict[str, Any]) -> str:
    """The HTML of what `numbers` gave, with `model`, `settings` and `architecture` beside it."""
    settings, tokens = found["settings"], found["tokens"]
    page = Page(
        "What the model saw",
        f"{found['model']['source']} · {len(tokens)} tokens, {len(tokens) - found['reply']} of them the reply",
        footer="Every number on this page is computed again by `python lens.py --verify` with this file.",
    )
    page.style((HERE / "lens.css").read_text("utf-8"))
    page.script((HERE / "lens.js").read_text("utf-8"), lens={**found, "layout": layout()})
    shown = {**settings, "sampling": ", ".join(f"{name} {value}" for name, value in settings["sampling"].items())}
    hidden = ("prompt",)
    kept = {name: value for name, value in shown.items() if name not in hidden and value not in (None, "", False)}
    page.section("The question", text(settings["prompt"]), fold("settings", facts(kept)))
    page.section(
        "The lens",
        tabs(
            {
                "Text to ids": Markup("").join(
                    [
                        text(ABOUT["ids"]),
                        place("ids", classes="chips"),
                        excerpt("Decoder.forward"),
                    ]
                ),
                "One token at a time": Markup("").join(
                    [
                        text(ABOUT["tokens"]),
                        controls(control("shade by", "metric")),
                        heading("The reply"),
                        place("reply"),
                        place("token-facts"),
                        Markup('<div class="scroll" id="alternatives"></div>'),
                        fold("the prompt under the same shade", place("prompt-bits")),
                        excerpt("Qwen3.head"),
                    ]
                ),
                "Where it came from": Markup("").join(
                    [
                        text(ABOUT["origin"]),
                        controls(control("measure", "measure")),
                        place("origin-text"),
                        place("origin-facts"),
                        heading("As a graph"),
                        place("origin-graph", classes="scroll"),
                        heading("The parts"),
                        Markup('<div class="scroll" id="origin-list"></div>'),
                        heading("All tokens of the reply (rows) and all parts (columns)"),
                        place("origin-matrix", classes="scroll"),
                    ]
                ),
                "Layer by layer": Markup("").join(
                    [
                        text(ABOUT["layers"]),
                        Markup('<div class="scroll" id="lens-table"></div>'),
                        excerpt("Block"),
                        heading("Attention"),
                        text(ABOUT["heads"]),
                        place("heads", classes="scroll"),
                        controls(control("layer", "layer"), control("head", "head")),
                        place("attention-facts", "p", "soft"),
                        place("attention-text"),
                        excerpt("Attention"),
                        heading("Length of the residual stream"),
                        place("norms"),
                    ]
                ),
                "The model": architecture_panel(found["architecture"]),
            }
        ),
    )
    return page.render()


def architecture_page(found: dict[str, Any]) -> str:
    page = Page(
        "The model itself", str(found["source"]), footer="Read from the config and the headers of the files alone."
    )
    page.style((HERE / "lens.css").read_text("utf-8"))
    page.section("Architecture", architecture_panel(found))
    return page.render()


def architecture_panel(found: dict[str, Any]) -> Markup:
    total, flops = found["parameters"], found["flops_per_token"]
    parts = [
        text(ABOUT["model"]),
        facts(
            {
                "type": found["model_type"],
                "blocks": found["blocks"],
                "parameters": f"{total:,}",
                "parameters that one token reads": f"{found['active_parameters']:,}",
                "bytes of the weights": f"{found['bytes']:,}",
                "FLOPs for one token": f"{flops:,}",
                "and for each position before it": f"{found['attention_flops_per_position']:,}",
                "operations": ", ".join(f"{count:,} {kind}" for kind, count in found["operations"].items()),
            }
        ),
        heading("Parameters"),
        bars({row["part"]: row["parameters"] for row in found["parts"] if row["parameters"]}),
        heading("FLOPs of one token"),
        bars({row["part"]: row["flops"] for row in found["parts"] if row["flops"]}),
        table(
            [
                (
                    row["part"],
                    row["parameters"],
                    f"{row['parameters'] / total:.1%}",
                    row["flops"],
                    f"{row['flops'] / flops:.1%}",
                )
                for row in found["parts"]
            ],
            header=("part", "parameters", "share", "FLOPs a token", "share"),
        ),
    ]
    for stack in found["stacks"]:
        layers = stack["layers"]
        title = f"{len(layers)} \N{MULTIPLICATION SIGN} {stack['kind']} block (layers {layers[0]} to {layers[-1]})"
        parts.append(
            fold(title, operations(stack["operations"]), excerpt("Block.forward"), excerpt("Attention.forward"))
        )
    parts.append(fold("embedding, last norm and head", operations(found["outer"]), open=False))
    parts += [
        heading("Keys and values kept for the context"),
        text(
            f"{found['cache_bytes_per_position']:,} bytes a position in 16 bits; the context is {found['context']:,}."
        ),
        bars({f"{row['positions']:,} positions": row["bytes"] / 1e6 for row in found["cache"]}, "MB"),
    ]
    if found.get("stored"):
        stored = found["stored"]
        kinds = ", ".join(f"{kind} {size:,}" for kind, size in stored["types"].items())
        parts.append(text(f"The files' headers: {stored['tensors']:,} tensors, bytes by type: {kinds}."))
    return Markup("").join(parts)


def operations(found: list[dict[str, Any]]) -> Markup:
    return table(
        [
            (o["kind"], o["name"], " \N{MULTIPLICATION SIGN} ".join(map(str, o["shape"])), o["parameters"], o["flops"])
            for o in found
        ],
        header=("operation", "name", "shape", "parameters", "FLOPs a token"),
    )
