"""Chat templates, which are untrusted programs: read as syntax trees, and rendered nowhere but in the sandbox.

What a template may do is small: take messages apart and write them out with markup. This module looks for what that
never needs (Python's internals, other files, unknown functions), for work without bound, for characters that do not
show, and for texts that depend on the date or on words of the user. Words are read from the conditions on what is said,
and tried: every text of the template is put into a user's message, and where the prompt around it changes, it is a
switch; markup (`<think>`, `/no_think`) may be one, ordinary words may not.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from formats.template import TemplateSandbox, template_environment
from inspection import trials
from inspection.constants import value_of
from inspection.findings import Ledger
from inspection.trials import FIXTURES, is_wordy, request


def _names(text: str) -> frozenset[str]:
    """The words of a list that is written out over several lines."""
    return frozenset(text.split())


MAX_TEMPLATE = 1 << 18  # characters
MAX_LOOP = 20_000  # rounds of loops over constants, nested ones multiplied
MAX_REPEAT = 100_000  # characters or digits that a constant expression may make

HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\u3164\ufeff\ufff9-\ufffb\U000e0000-\U000e0fff]"
)
GLOBALS = {
    "range",
    "namespace",
    "raise_exception",
    "strftime_now",
    "dict",
    "cycler",
    "joiner",
    "caller",
    "super",
    "loop",
}
METHODS = _names(
    """
    split rsplit strip lstrip rstrip startswith endswith replace upper lower title capitalize items keys values get
    append extend insert pop update join format find rfind index count isdigit isalpha isalnum isspace isupper islower
    zfill splitlines partition rpartition cycle next removeprefix removesuffix strftime copy setdefault ljust rjust
    center
    """
)
INTERNALS = _names(
    """
    mro gi_frame gi_code cr_frame cr_code ag_frame ag_code f_globals f_locals f_builtins func_globals func_code
    im_class im_func im_self tb_frame tb_next format_map
    """
)

ASKING = {"startswith", "endswith", "find", "rfind", "index", "count", "replace", "removeprefix", "removesuffix"}
LENGTH = 3  # characters or words: less is a test of whether there is any
UNRENDERED = {"template-blowup", "template-attribute", "template-include"}


def examine(
    ledger: Ledger, where: str, source: str, sandbox: TemplateSandbox, variables: dict[str, str]
) -> dict[str, str]:
    """All checks of one template. Returns what it renders of each fixture that it accepts."""
    if len(source) > MAX_TEMPLATE:
        ledger.find("template-invalid", where, f"{len(source):,} characters")
        return {}
    _examine_characters(ledger, where, source)
    environment = template_environment()
    try:
        tree = environment.parse(source)
        Reading(ledger, where, tree, environment).examine()
    except Exception as error:  # jinja2's errors, or its recursion
        ledger.find("template-invalid", where, f"{type(error).__name__}: {str(error)[:120]}")
        return {}
    if any(finding.file == where and finding.id in UNRENDERED for finding in ledger.findings):
        return {}  # what was read is enough
    rendered, failed = {}, {}
    for name, fixture in FIXTURES.items():
        try:
            rendered[name] = sandbox.render(source, request(fixture, variables))
        except ValueError as error:
            failed[name] = str(error)
            if "ran for more than" in failed[name] or "memory" in failed[name] or "prints more than" in failed[name]:
                ledger.find("template-blowup", where, f"on the fixture {name!r} it {failed[name][:120]}")
                return rendered
    if not rendered:
        ledger.find("template-unrendered", where, f"it {next(iter(failed.values()))[:160]}")
    else:
        trials.try_words(ledger, where, source, tree, sandbox, variables)
    return rendered


def _examine_characters(ledger: Ledger, where: str, source: str) -> None:
    if found := HIDDEN.search(source):
        line = source.count("\n", 0, found.start()) + 1
        ledger.find("template-hidden-unicode", where, f"U+{ord(found[0]):04X} in line {line}")
    for word in re.findall(r"[^\W\d_]{2,}", source):
        scripts = {unicodedata.name(letter, "").split(" ")[0] for letter in word if not letter.isascii()}
        if scripts & {"CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE"} and any(letter.isascii() for letter in word):
            ledger.find("template-homoglyph", where, f"{ascii(word)[1:-1][:60]} mixes alphabets")
            return


class Reading:
    """One template's syntax tree and what there is to say about it."""

    def __init__(self, ledger: Ledger, where: str, tree: Any, environment: Any):
        from jinja2 import nodes

        self.ledger, self.where, self.tree, self.environment, self.nodes = ledger, where, tree, environment, nodes
        self.macros = {macro.name for macro in tree.find_all(nodes.Macro)}
        self.assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx in ("store", "param")}

    def find(self, id: str, node: Any, what: str) -> None:
        self.ledger.find(id, self.where, f"line {node.lineno}: {what}")

    def examine(self) -> None:
        nodes = self.nodes
        for node in self.tree.find_all(nodes.Expr):
            self._examine_attribute(node)
        for node in self.tree.find_all(nodes.Call):
            self._examine_call(node)
        for node in self.tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            self.find("template-include", node, "loads another template")
        for node in self.tree.find_all((nodes.Mul, nodes.Pow, nodes.Filter)):
            self._examine_size(node)
        self._examine_loops(self.tree, 1)
        for node in self.tree.find_all((nodes.TemplateData, nodes.Expr)):
            text = node.data if isinstance(node, nodes.TemplateData) else value_of(node)
            if isinstance(text, str):
                if HIDDEN.search(text):
                    self.find("template-hidden-unicode", node, f"U+{ord(HIDDEN.search(text)[0]):04X} in a text")
                if url := re.search(r"\b(?:https?|ftp|wss?)://[^\s\"'<>]+|\bwww\.\w+\.\w+", text):
                    self.find("template-url", node, f"writes {url[0][:100]}")
        self._examine_dates()
        self._examine_words()

    def _examine_attribute(self, node: Any) -> None:
        nodes = self.nodes
        name = None
        if isinstance(node, nodes.Getattr):
            name = node.attr
        elif isinstance(node, nodes.Getitem) and isinstance(value_of(node.arg), str):
            name = value_of(node.arg)
        elif isinstance(node, nodes.Filter) and node.name in (
            "attr",
            "map",
            "selectattr",
            "rejectattr",
            "sort",
            "groupby",
        ):
            values = [*node.args, *(pair.value for pair in node.kwargs)]
            names = [value_of(value) for value in values]
            name = next((one for one in names if isinstance(one, str) and _is_internal(one)), None)
            named = names[:1] if node.name in ("attr", "selectattr", "rejectattr", "groupby") else []
            named += [value_of(pair.value) for pair in node.kwargs if pair.key == "attribute"]
            if not all(isinstance(one, str | int) for one in named) or (node.name == "attr" and not named):
                self.find("template-attribute", node, "reaches for an attribute of a computed name")
                return
        elif (found := value_of(node)) and isinstance(found, str) and re.search(r"__[a-z]+__", found):
            name = re.search(r"__[a-z]+__", found)[0]
        if isinstance(name, str) and _is_internal(name):
            self.find("template-attribute", node, f"reaches for {name[:60]}")

    def _examine_call(self, node: Any) -> None:
        nodes, called = self.nodes, node.node
        if isinstance(called, nodes.Name):
            if called.name not in GLOBALS | self.macros | self.assigned:
                self.find("template-call", node, f"calls {called.name[:60]}()")
        elif isinstance(called, nodes.Getattr):
            if called.attr not in METHODS | self.macros and not _is_internal(called.attr):
                self.find("template-call", node, f"calls .{called.attr[:60]}()")
            elif called.attr == "format":  # '{0.attribute}' and '{0[key]}' reach into their arguments
                text = value_of(called.node)
                if not isinstance(text, str) or re.search(r"\{[^{}]*[.\[]", text):
                    self.find("template-attribute", node, "formats with a text that it computes, or that names fields")
        else:
            self.find("template-call", node, "calls what it computes")

    def _examine_size(self, node: Any) -> None:
        nodes = self.nodes
        if isinstance(node, nodes.Filter):
            numbers = [value_of(value) for value in (*node.args, *(pair.value for pair in node.kwargs))]
            if node.name in ("center", "indent", "wordwrap") and any(
                type(n) is int and n > MAX_REPEAT for n in numbers
            ):
                self.find(
                    "template-blowup", node, f"{node.name} of {max(n for n in numbers if type(n) is int):,} characters"
                )
            return
        left, right = value_of(node.left), value_of(node.right)
        if isinstance(node, nodes.Pow):
            if type(right) is int and right > 64:
                self.find("template-blowup", node, f"a power of {right:,}")
        elif any(type(factor) is int and factor > MAX_REPEAT for factor in (left, right)):
            self.find("template-blowup", node, "a product with a huge number")

    def _examine_loops(self, node: Any, rounds: int) -> None:
        for child in node.iter_child_nodes():
            inner = rounds
            if isinstance(child, self.nodes.For):
                inner = rounds * max(1, self._rounds(child.iter))
                if inner > MAX_LOOP:
                    self.find("template-blowup", child, f"loops {inner:,} times")
                    return
            self._examine_loops(child, inner)

    def _rounds(self, node: Any) -> int:
        """How often a loop over constants runs; 1 for one over what the template is given."""
        nodes = self.nodes
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name == "range":
            if any(
                part.name == "int"
                for argument in node.args
                for part in [argument, *argument.find_all(nodes.Filter)]
                if isinstance(part, nodes.Filter)
            ):
                self.find("template-blowup", node, "loops as often as a text says")
            numbers = [value_of(argument) for argument in node.args]
            if numbers and all(type(number) is int for number in numbers):
                try:
                    return len(range(*numbers))
                except (ValueError, TypeError, OverflowError):
                    return MAX_LOOP + 1
        value = value_of(node)
        return len(value) if isinstance(value, str | list | tuple) else 1

    def _flow(self, is_source: Callable[[Any], bool], whole: bool = True) -> Callable[[Any], bool]:
        """Whether an expression has a part that `is_source` names, or a value that was made of one, through variables
        and the arguments of macros; with `whole`, also through loops and what macros write."""
        nodes, keys = self.nodes, set()
        macros = {macro.name: macro for macro in self.tree.find_all(nodes.Macro)}
        assigned = list(self.tree.find_all((nodes.Assign, nodes.AssignBlock, *([nodes.For] if whole else []))))
        calls = [
            node
            for node in self.tree.find_all(nodes.Call)
            if isinstance(node.node, nodes.Name) and node.node.name in macros
        ]

        def has(node: Any) -> bool:
            if isinstance(node, nodes.Test) and node.name in ("defined", "undefined", "none"):
                return False
            if is_source(node):
                return True
            if isinstance(node, nodes.Name | nodes.NSRef | nodes.Getattr) and _key(nodes, node) in keys:
                return True
            return any(map(has, node.iter_child_nodes()))

        for _ in range(4):  # values of values of values
            for node in assigned:
                value = node.iter if isinstance(node, nodes.For) else getattr(node, "node", None)
                if any(map(has, node.body if isinstance(node, nodes.AssignBlock) else [value])):
                    keys |= {key for key in _targets(nodes, node.target) if key}
            for node in calls:
                given = zip(macros[node.node.name].args, node.args, strict=False)
                keys |= {argument.name for argument, value in given if has(value)}
                keys |= {pair.key for pair in node.kwargs if has(pair.value)}
            if whole:
                keys |= {name for name, macro in macros.items() if any(map(has, macro.body))}
        return has

    def _examine_dates(self) -> None:
        """What is decided by today's date, and what only shows it."""
        nodes = self.nodes
        if not any(node.name == "strftime_now" for node in self.tree.find_all(nodes.Name)):
            return
        self.ledger.find("template-date-printed", self.where, "uses today's date")
        is_dated = self._flow(lambda node: isinstance(node, nodes.Name) and node.name == "strftime_now")
        for node in self.tree.find_all((nodes.If, nodes.CondExpr)):
            # A date that somebody passes in, or today's where none was: only its presence is asked for.
            if is_dated(node.test) and not isinstance(node.test, nodes.Name | nodes.Not):
                self.find("template-date", node, "decides by the date")
        for node in self.tree.find_all((nodes.Compare, nodes.Mul, nodes.Getitem, nodes.Call, nodes.Filter)):
            if isinstance(node, nodes.Compare):
                decides = is_dated(node) and not all(value_of(one.expr) in (None, "", False) for one in node.ops)
            elif isinstance(node, nodes.Getitem):
                decides = not isinstance(node.arg, nodes.Slice) and is_dated(node.arg)
            elif isinstance(node, nodes.Filter):
                decides = node.name in ("select", "reject", "selectattr", "rejectattr") and is_dated(node)
            elif isinstance(node, nodes.Call):
                is_get = isinstance(node.node, nodes.Getattr) and node.node.attr == "get"
                decides = is_get and any(map(is_dated, node.args))
            else:
                decides = is_dated(node)
            if decides:
                self.find("template-date", node, "decides by the date")

    def _examine_words(self) -> None:
        """Conditions on words of what somebody says, or on its length, whatever they would change."""
        nodes = self.nodes
        fields = {_field(nodes, node) for node in self.tree.find_all((nodes.Getattr, nodes.Getitem))}
        is_said = self._flow(lambda node: _field(nodes, node) in ("content", "text"), whole=False)

        def says(node: Any) -> bool:
            """Whether it is what somebody says, or a part or another form of it; not another field of the message."""
            while isinstance(node, nodes.Filter | nodes.Call) or (
                isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
            ):
                node = (
                    node.node.node
                    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr)
                    else node.node
                )
            return node is not None and (_field(nodes, node) in (None, "content", "text")) and is_said(node)

        for node in self.tree.find_all((nodes.Compare, nodes.Call)):
            if isinstance(node, nodes.Compare):
                sides = [node.expr, *(one.expr for one in node.ops)]
            elif isinstance(node.node, nodes.Getattr) and node.node.attr in ASKING:
                sides = [node.node.node, *node.args]
            else:
                continue
            if not any(map(says, sides)):
                continue
            values = [value_of(side) for side in sides]
            if any(type(value) is int and value >= LENGTH for value in values):
                self.find("template-trigger", node, "decides by the length of what is said")
            words = [text for value in values for text in (value if isinstance(value, list) else [value])]
            for text in (text for text in words if isinstance(text, str) and is_wordy(text) and text not in fields):
                is_mode = re.search(r"\b(thinking|reasoning)\b", text)  # "detailed thinking on", in a system message
                what = f"looks for {text[:80]!r} in what is said"
                self.find("template-switch" if is_mode else "template-trigger", node, what)


def _field(nodes: Any, node: Any) -> Any:
    """The name that an expression takes a field by."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    return value_of(node.arg) if isinstance(node, nodes.Getitem) else None


def _key(nodes: Any, node: Any) -> str | None:
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        return f"{node.node.name}.{node.attr}"
    return node.name if isinstance(node, nodes.Name) else None


def _targets(nodes: Any, target: Any) -> Iterator[str | None]:
    yield _key(nodes, target)
    for child in target.find_all((nodes.Name, nodes.NSRef)):
        yield _key(nodes, child)


def _is_internal(name: str) -> bool:
    return name.startswith("_") or name in INTERNALS
