"""One audit from end to end: the rooms in their order. audit.py is the command around it."""

import difflib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from formats import hub
from formats.source import HUB_ID, HubUnreachable
from inspection import (
    behaviour,
    claims,
    code,
    consistency,
    contents,
    croissant,
    lineage,
    manifest,
    questions,
    weights,
)
from inspection.findings import Ledger
from inspection.tree import Tree, hub_tree, local_tree

Progress = Callable[[int], None]


def find_tree(src: str, deep: bool, scratch: Path) -> Tree:
    """The files of SRC: a directory, a file, or a hub id. With `deep` a hub repository is downloaded into `scratch`."""
    path = Path(src).expanduser()
    try:
        if src and path.exists():
            return local_tree(path)
    except OSError:
        pass
    match = HUB_ID.fullmatch(src)
    if match is None:
        raise ValueError(f"{src}: no such directory or file, and not a hub id like org/name")
    try:
        if deep:
            commit = hub.download_all(match["repo"], match["revision"], scratch)
            tree = local_tree(scratch)
            tree.repo, tree.revision = match["repo"], commit
            return tree
        return hub_tree(match["repo"], match["revision"])
    except HubUnreachable:
        if snapshot := hub.cached(match["repo"], match["revision"]):
            return local_tree(snapshot)
        raise


class Audit:
    """An examined repository: `ledger`, `files`, `tree`, `manifest`, and the `lines` that comparisons gave."""

    def __init__(self, tree: Tree, *, deep: bool = False, progress: Progress = lambda size: None):
        self.tree, self.ledger, self.lines, self.diffs = tree, Ledger(), [], {}
        if not tree.entries:
            raise ValueError(f"{tree.root or tree.repo}: holds no file; give the directory of a model")
        ledger = self.ledger
        for entry in tree.entries:
            contents.examine(ledger, entry)
            progress(entry.size)
        self.files = files = consistency.Files(tree, ledger)
        config = files.config or (
            weights.gguf_config(tree.root) if files.gguf and tree.root and tree.root.is_file() else None
        )
        weights.examine_headers(ledger, config)
        for name in files.names():
            if name.endswith(".index.json") and (index := files.value(name)) is not None:
                weights.examine_index(ledger, name, index, set(files.names()))
        consistency.examine_config(ledger, files)
        code.judge(ledger, tree.repo)
        consistency.examine_templates(ledger, files)
        for where, numbers in ledger.facts.get("template_lines", {}).items():
            lines = ledger.facts["templates"][where].split("\n")
            self.diffs[where] = "\n".join(f"+ {number:4}  {lines[number - 1]}" for number in numbers[:400])
        consistency.examine_tokens(ledger, files)
        claims.examine(ledger, files)
        weights.examine_values(ledger, tree, progress)
        if tree.root:
            lineage.examine_record(ledger, tree.root)
        if tree.budget:
            croissant.examine(ledger, tree)
        self._measure(deep)

    def _measure(self, deep: bool) -> None:
        """Runs the model where that is safe, possible and cheap."""
        ledger = self.ledger
        size = sum(file.bytes for file in ledger.files if file.format in ("safetensors", "gguf"))
        path = ledger.facts.get("model_path")
        if path is None or not ledger.facts.get("values_read"):
            return
        if any(finding.severity == "high" or finding.id == "tokenizer-blowup" for finding in ledger.findings):
            ledger.facts["behaviour_how"] = "not run: what was found comes first"
        elif size > behaviour.MOST and not deep:
            ledger.facts["behaviour_how"] = "not run without --deep: the weights are large"
        else:
            try:
                ledger.facts["behaviour"] = behaviour.measure(path)
                ledger.facts["behaviour_how"] = "audit.py ran the model on this machine"
            except ValueError as error:
                ledger.facts["behaviour_how"] = f"it could not be run ({str(error)[:120]})"

    def compare(self, base: Path) -> None:
        """Holds weights and template against a base."""
        root = self.tree.root
        if root is None:
            raise ValueError("--base: needs the weights on this machine; give a directory or a .gguf file")
        if not self.ledger.facts.get("values_read"):
            raise ValueError(f"--base: the weights of {root} could not be read, so there is nothing to compare")
        compare = lineage.compare_gguf if root.is_file() else lineage.compare_checkpoints
        self.lines += compare(self.ledger, root, base)
        self._compare_templates(base)

    def _compare_templates(self, base: Path) -> None:
        """Which lines of the chat template differ, and whether the prompts do."""
        other = Ledger()
        tree = local_tree(base)
        for entry in tree.entries:
            if entry.path in ("tokenizer_config.json", "chat_template.jinja", "config.json") or base.is_file():
                contents.examine(other, entry)
        files = consistency.Files(tree, other)
        consistency.examine_templates(other, files)
        theirs, ours = other.facts["templates"], self.ledger.facts["templates"]
        if not theirs or not ours:
            return
        (their_place, their_text), (place, text) = next(iter(theirs.items())), next(iter(ours.items()))
        if text == their_text:
            self.lines.append("the chat template is the base's")
            return
        different = list(
            difflib.unified_diff(
                their_text.split("\n"), text.split("\n"), f"base: {their_place}", place, lineterm="", n=0
            )
        )
        self.diffs[place] = "\n".join(different[:400])
        prompts = [
            name
            for name, prompt in self.ledger.facts["rendered"].get(place, {}).items()
            if other.facts["rendered"].get(their_place, {}).get(name) != prompt
        ]
        numbers = [line.split(" ")[2].lstrip("+").partition(",")[0] for line in different if line.startswith("@@")]
        which = f"prompts differ for: {', '.join(prompts)}" if prompts else "all fixtures give the same prompt"
        self.ledger.find("template-differs", place, f"lines {', '.join(numbers[:8])} differ from the base's; {which}")

    def verify(self, directory: Path) -> None:
        """Holds the repository against an earlier manifest."""
        earlier = lineage.read_manifest(directory)
        root = self.tree.root
        outputs = directory if directory.is_dir() else directory.parent
        ignored = tuple(OUTPUTS) if root and root.resolve() == outputs.resolve() else ()
        if not earlier.get("files"):
            self.lines += lineage.verify_record(self.ledger, root or directory)
            return
        self.lines += lineage.verify(self.ledger, earlier, ignored)
        if isinstance(before := earlier.get("behaviour"), dict) and (now := self.ledger.facts.get("behaviour")):
            furthest = behaviour.difference(before, now)
            if furthest is not None:
                self.lines.append(f"logits of the fixed prompt differ by at most {furthest:.3g}")

    def finish(self) -> dict[str, Any]:
        """The manifest with all answers."""
        result = manifest.build(self.tree, self.ledger, self.files)
        result["questions"] = questions.answer(self.tree, self.ledger, result)
        return result


OUTPUTS = (manifest.NAME, "audit.md", "audit.html", "bom.cdx.json")


def scratch() -> tempfile.TemporaryDirectory:
    """Where a hub repository goes that is read whole."""
    return tempfile.TemporaryDirectory(prefix="nanoqwen-audit-")
