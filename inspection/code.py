"""Code that a repository holds, read and never run: which Python a configuration names, what it imports and calls.

Names are followed through the file's own imports (`from os import system as s` makes `s()` a call of os.system). This
finds what is written plainly; code that hides what it does is found by the means that it hides with (eval, getattr of
a built name, decoding), which are on the list too.
"""

import ast
import re
from typing import Any

from inspection.findings import Ledger, Unexamined

MAX_CODE = 1 << 19  # characters of a file that is parsed: a syntax tree is a thousand times as large
MAX_TOTAL = 1 << 24  # of all files of a repository
DANGER = re.compile(
    r"(os\.(system|popen|exec\w*|spawn\w*|posix_spawn\w*|fork\w*|remove|unlink|rmdir|removedirs|kill|putenv|startfile|dup2)"
    r"|(posix|nt|pty|commands|popen2|webbrowser|ctypes|_ctypes|cffi|socket|ssl|subprocess|telnetlib|ftplib|smtplib|paramiko|requests"
    r"|aiohttp|httpx|httpx2|urllib3|xmlrpc|runpy|code|codeop|marshal|dill|cloudpickle|joblib|pickle|_pickle|shelve|pip)\.\w[\w.]*"
    r"|urllib\.request\.\w+|http\.client\.\w+|asyncio\.(create_subprocess\w*|open_connection|start_server)"
    r"|multiprocessing\.\w+|importlib\.(import_module|reload|util\.\w+|machinery\.\w+)|imp\.load\w*|shutil\.(rmtree|move)"
    r"|(builtins\.)?(eval|exec|compile|__import__|breakpoint)|builtins\.\w+|torch\.(load|hub\.load\w*)|torch\.utils\.cpp_extension\.\w+"
    r"|sys\.(modules|settrace|setprofile|meta_path|path_hooks)\.?\w*|numpy\.ctypeslib\.\w+|(numpy\.|np\.)?f2py\.\w+"
    r"|types\.(FunctionType|CodeType))"
)
PICKLE_SAFE = {"pickle.PickleError", "pickle.HIGHEST_PROTOCOL"}
SHELL_DANGER = re.compile(
    r"\b(curl|wget|fetch)\b[^\n|;&]{0,120}\|\s*(sudo\s+)?(ba|z|da|k)?sh\b|\b(curl|wget)\b[^\n|;&]{0,120}\|\s*(sudo\s+)?(python|perl|ruby|node)"
    r"|\b(ba|z)?sh\s+(-c\s+)?[\"']?[<$]\(\s*(curl|wget)|base64\s+(-d|--decode|-D)[^\n]{0,120}\|\s*\w*sh\b|/dev/(tcp|udp)/|\bnc\b[^\n]{0,120}\s-e\b"
    r"|\brm\s+(-\w{1,20}\s+){0,6}-\w{0,9}[rf]\w{0,9}\s+(-\w{1,20}\s+){0,6}[\"']?(/|~|\$HOME)|\beval\s+[\"']?\$\(|\bcrontab\b|authorized_keys"
    r"|chmod\s+[^\n]{0,120}(\+x|7\d\d)[^\n]{0,120}[\n;&]+\s*(sudo\s+)?\./|powershell[^\n]{0,120}-enc|Invoke-Expression|\bIEX\b|DownloadString"
    r"|:\(\)\s*\{|\bmkfs\b|\bdd\b[^\n]{0,120}of=/dev/|python3?\s+-c\s+[\"'][^\n]{0,120}(exec|eval|urllib|socket)",
    re.IGNORECASE,
)
SCRIPT = re.compile(r"<script|\bon\w+\s*=|javascript:", re.IGNORECASE)  # in HTML and SVG
SHELL_NAMES = (".sh", ".bash", ".zsh", ".bat", ".cmd", ".ps1", ".command")
OTHER_NAMES = (
    *(
        ".js",
        ".mjs",
        ".ts",
        ".lua",
        ".rb",
        ".pl",
        ".php",
        ".c",
        ".cc",
        ".cpp",
        ".h",
        ".cu",
        ".rs",
        ".go",
        ".java",
        ".r",
    ),
    *(".jl", ".swift", ".pyx", ".wat", "makefile", "dockerfile"),
)
INTERNALS = {
    *("__subclasses__", "__globals__", "__builtins__", "__code__", "__reduce__", "__import__", "f_globals", "gi_frame"),
}


def parse(text: str) -> ast.Module:
    """The file's syntax tree. `Unexamined` for what is not current Python, or is nested too deeply."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise Unexamined("unparsable-code", f"not parsed as Python ({str(error)[:80]})") from None
    except (RecursionError, MemoryError):
        raise Unexamined("unparsable-code", "is nested too deeply to be parsed") from None


def is_python(text: str) -> bool:
    """Whether a text of any name is Python: it parses, and imports, calls or defines something."""
    if len(text) > MAX_CODE or not re.search(
        r"^[ \t]*(import|from|def|class|exec|eval|__import__)\b|\(", text, re.MULTILINE
    ):
        return False
    try:
        tree = parse(text)
    except Unexamined:
        return False
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Call)
    return any(isinstance(node, kinds) for node in _walk(tree))


def _walk(tree: ast.AST):
    """ast.walk over a tree of any depth."""
    pending = [tree]
    while pending:
        node = pending.pop()
        pending.extend(ast.iter_child_nodes(node))
        yield node


class Calls:
    """What a file imports and calls: `imports` (modules), `dangers` ({what: line})."""

    def __init__(self, tree: ast.Module):
        self.imports: set[str] = set()
        self.relative: set[str] = set()
        self.dangers: dict[str, int] = {}
        self._names: dict[str, str] = {}
        nodes = list(_walk(tree))
        for node in nodes:
            self._learn(node)
        for _ in range(3):  # aliases: f = os.system; g = f
            for node in nodes:
                if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                    full = self._full(node.value)
                    if full and DANGER.fullmatch(full):
                        self._names[node.targets[0].id] = full
        for node in nodes:
            self._judge(node)
        for called in [what for what in self.dangers if f"{what}()" in self.dangers]:
            del self.dangers[called]

    def _learn(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                self.imports.add(alias.name)
                self._names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                self.relative.add(module.partition(".")[0])
                return
            self.imports.add(module)
            for alias in node.names:
                self._names[alias.asname or alias.name] = f"{module}.{alias.name}"
                if alias.name == "*" and DANGER.fullmatch(f"{module}.x"):
                    self.dangers.setdefault(f"from {module} import *", node.lineno)

    def _full(self, node: ast.AST) -> str | None:
        """os.path.join for the expression that means it, through the file's own names."""
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Call) and (called := self._full(node.func)) in (
            "__import__",
            "importlib.import_module",
        ):
            argument = node.args[0] if node.args else None
            root = (
                argument.value
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
                else f"{called}()"
            )
        elif isinstance(node, ast.Name):
            root = self._names.get(node.id, node.id)
        else:
            return None
        return ".".join([root, *reversed(parts)])

    def _judge(self, node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            full = self._full(node.func) or ""
            if DANGER.fullmatch(full) and full not in PICKLE_SAFE:
                self.dangers.setdefault(f"{full}()", node.lineno)
            elif full == "open" and _writes(node):
                self.dangers.setdefault("open() for writing", node.lineno)
            elif full in ("getattr", "vars", "globals", "locals") and self._hides(node, full):
                self.dangers.setdefault(f"{full}() of a computed name", node.lineno)
            elif isinstance(node.func, ast.Subscript | ast.Call) and isinstance(_root(node.func), ast.Name):
                root = _root(node.func).id
                if root in ("globals", "locals", "vars", "__builtins__"):
                    self.dangers.setdefault(f"a call through {root}", node.lineno)
        elif isinstance(node, ast.Attribute) and node.attr in INTERNALS:
            self.dangers.setdefault(f".{node.attr}", node.lineno)
        elif isinstance(node, ast.Name) and node.id in ("__builtins__", "__loader__"):
            self.dangers.setdefault(node.id, node.lineno)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            full = self._full(node) or ""
            if full in (
                "os.system",
                "os.popen",
                "eval",
                "exec",
                "builtins.eval",
                "builtins.exec",
                "subprocess.run",
                "subprocess.Popen",
            ):
                self.dangers.setdefault(full, node.lineno)

    def _hides(self, node: ast.Call, full: str) -> bool:
        if full != "getattr" or len(node.args) < 2 or isinstance(node.args[1], ast.Constant):
            return False
        owner = self._full(node.args[0]) or ""
        return owner.partition(".")[0] in ("os", "sys", "builtins", "__builtins__", "importlib", "subprocess", "posix")


def _root(node: ast.AST) -> ast.AST:
    while isinstance(node, ast.Subscript | ast.Call | ast.Attribute):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node


def _writes(node: ast.Call) -> bool:
    modes = [*node.args[1:2], *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
    return any(not isinstance(mode, ast.Constant) or set(str(mode.value)) & set("wax+") for mode in modes)


def examine_python(ledger: Ledger, where: str, text: str) -> None:
    """Keeps what the file imports and calls for `judge`, which knows whether a configuration names it."""
    ledger.code += len(text)
    if len(text) > MAX_CODE or ledger.code > MAX_TOTAL:
        raise Unexamined("too-large", f"{len(text):,} characters of code; at most {MAX_CODE:,} are parsed")
    calls = Calls(parse(text))
    ledger.facts.setdefault("python", {})[where] = calls


def examine_notebook(ledger: Ledger, where: str, notebook: dict[str, Any]) -> None:
    """The code cells of a Jupyter notebook: Python, and lines for a shell."""
    lines, shell = [], []
    cells = notebook.get("cells") or [
        cell for sheet in notebook.get("worksheets") or [] for cell in sheet.get("cells", [])
    ]
    for cell in cells if isinstance(cells, list) else []:
        if isinstance(cell, dict) and cell.get("cell_type") == "code":
            source = cell.get("source", cell.get("input", ""))
            source = "".join(map(str, source)) if isinstance(source, list) else str(source)
            for line in source.split("\n"):
                is_magic = line.lstrip()[:1] in ("!", "%", "?")
                (shell if is_magic else lines).append(line.lstrip().lstrip("!%") if is_magic else line)
            if source.lstrip().startswith(("%%bash", "%%sh", "%%script")):
                shell.append(source)
    shown = [cell for cell in cells if isinstance(cell, dict)] if isinstance(cells, list) else []
    shown = [cell["outputs"] if "outputs" in cell else cell.get("source") for cell in shown]
    if "application/javascript" in str(shown)[:MAX_CODE] or SCRIPT.search("".join(_texts(shown))):
        ledger.find("other-code", where, "what it shows holds a script")
    if not any(line.strip() for line in (*lines, *shell)):
        return
    ledger.find("notebook", where, f"{sum(bool(line.strip()) for line in lines)} lines of code")
    _judge_shell(ledger, where, "\n".join(shell))
    ledger.code += sum(map(len, lines))
    if sum(map(len, lines)) > MAX_CODE or ledger.code > MAX_TOTAL:
        raise Unexamined("too-large", f"{len(lines):,} lines of code")
    try:
        dangers = Calls(parse("\n".join(lines))).dangers
    except Unexamined:
        dangers = {}
        for line in lines:  # one incomplete cell must not hide the others
            try:
                dangers |= Calls(parse(line.strip())).dangers
            except Unexamined:
                continue
    if dangers:
        ledger.find("script-danger", where, "calls " + ", ".join(sorted(dangers)[:8]))


def examine_shell(ledger: Ledger, where: str, text: str) -> None:
    ledger.find("shell-script", where, f"{text.count(chr(10)) + 1} lines")
    _judge_shell(ledger, where, text)


def _judge_shell(ledger: Ledger, where: str, text: str) -> None:
    text = re.sub(r"\\\r?\n", " ", text[:MAX_CODE])
    bare = re.sub(r"^[ \t]*#.*$", "", text, flags=re.MULTILINE)
    for match in SHELL_DANGER.finditer(bare):
        ledger.find("script-danger", where, f"has {' '.join(match[0].split())[:120]!r}")
        return


# ---- which Python a configuration names ------------------------------------------------------------------------------


def references(config: Any) -> list[str]:
    """The classes of the repository, or of another, that loading a configuration imports: module.Class, or
    repository--module.Class. They stand in auto_map, wherever it is nested, and in the files of pipelines,
    sentence-transformers (modules.json) and PEFT (auto_mapping)."""
    found: list[str] = []
    pending = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
            found += _texts(value.get("auto_map"))
            if isinstance(pipelines := value.get("custom_pipelines"), dict):
                found += _texts([one.get("impl") for one in pipelines.values() if isinstance(one, dict)])
            if isinstance(mapping := value.get("auto_mapping"), dict):
                library, name = (str(mapping.get(key)) for key in ("parent_library", "base_model_class"))
                if library.partition(".")[0] not in (*LIBRARIES, "None"):
                    found.append(f"{library}.{name}")
    if isinstance(config, list):
        types = [one.get("type") for one in config if isinstance(one, dict) and {"path", "type"} <= one.keys()]
        found += [name for name in _texts(types) if name.partition(".")[0] not in LIBRARIES]
    return found


LIBRARIES = ("transformers", "torch", "sentence_transformers", "diffusers", "timm", "peft")


def _texts(value: Any) -> list[str]:
    """The texts inside lists and objects."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in _texts(part)]


def judge(ledger: Ledger, repo: str) -> None:
    """Which Python files a configuration names, directly or through their imports, and what each of them does."""
    python: dict[str, Calls] = ledger.facts.get("python", {})
    named: dict[str, str] = {}
    for file, reference in ledger.facts.get("references", []):
        owner, _, place = reference.rpartition("--")
        if owner and owner != repo:
            ledger.find("remote-code-elsewhere", file, f"names {reference}, code of the repository {owner}")
            continue
        module = place.rpartition(".")[0] or place
        folder = file.rpartition("/")[0]
        path = f"{folder}/" * bool(folder) + module.replace(".", "/") + ".py"
        if path in python or any(one.path == path for one in ledger.files):
            named.setdefault(path, file)
            ledger.find("remote-code", file, f"names {place} in {path}: loading it needs trust_remote_code")
        else:
            ledger.find("remote-code-missing", file, f"names {place}, but there is no {path}")
    pending = list(named)
    while pending:
        path = pending.pop()
        for module in python[path].relative if path in python else ():
            beside = f"{path.rpartition('/')[0]}/" * ("/" in path) + f"{module}.py"
            if beside in python and beside not in named:
                named[beside] = path
                pending.append(beside)
    for path, calls in python.items():
        if path not in named:
            ledger.find("python-file", path, "imports " + (", ".join(sorted(calls.imports)[:12]) or "nothing"))
        if calls.dangers:
            listed = ", ".join(
                f"{what} (line {line})" for what, line in sorted(calls.dangers.items(), key=lambda one: one[1])[:8]
            )
            ledger.find("code-danger" if path in named else "code-danger-unused", path, listed)
    ledger.facts["remote_code"] = sorted(named)


def config_references(ledger: Ledger, where: str, config: Any) -> None:
    """Notes the references of a JSON configuration, if it has any."""
    for reference in references(config):
        ledger.facts.setdefault("references", []).append((where, reference))
