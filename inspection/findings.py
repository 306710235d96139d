"""What an audit can find, by name, and the ledger into which every part of it writes.

A finding has a stable name. `high` and `medium` ones accuse; `low` and `info` ones tell. What could not be examined is
not an accusation: the file is in the ledger with `examined` false and the reason, and the command ends with 2.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

SEVERITIES = ("high", "medium", "low", "info")

# name -> (severity, what it means)
FINDINGS = {
    # files
    "symlink-outside": ("high", "a symbolic link leads out of the repository"),
    "name-deceptive": ("medium", "a file name holds invisible or reordering characters"),
    "format-disguised": ("high", "the content is of another kind than the name says, and a loader may run it"),
    "native-code": ("high", "machine code or bytecode"),
    "json-duplicate-key": ("medium", "a JSON key occurs twice, so two readers may see two values"),
    "json-invalid": ("medium", "a file that must be JSON cannot be parsed"),
    "yaml-tag": ("high", "a YAML tag that makes a Python object when it is loaded unsafely"),
    "archive": ("info", "an archive; its members are examined like files"),
    "archive-path": ("high", "an archive member's name leads out of the folder that it is unpacked into"),
    "archive-bomb": ("high", "a few bytes that unpack into very many"),
    # pickles
    "pickle-import": ("high", "a pickle imports what can run code when it is loaded"),
    "pickle-unlisted": ("medium", "a pickle imports a name that is not on the list of harmless ones"),
    "pickle-hidden-import": ("high", "a pickle computes the name of an import while it is loaded"),
    "pickle": ("info", "a pickle whose imports are all on the list of harmless ones"),
    # code
    "remote-code": ("medium", "a configuration names Python code of the repository (needs trust_remote_code)"),
    "remote-code-elsewhere": ("high", "a configuration names Python code of another repository"),
    "remote-code-missing": ("medium", "a configuration names Python code that is not in the repository"),
    "code-danger": ("high", "code that a loader would run starts processes, opens connections or evaluates text"),
    "code-danger-unused": ("medium", "code beside the model starts processes, opens connections or evaluates text"),
    "python-file": ("low", "Python code that no configuration names"),
    "notebook": ("low", "a notebook with code"),
    "shell-script": ("low", "a script for a shell"),
    "script-danger": ("medium", "a script or notebook downloads and runs, decodes and runs, or deletes"),
    "other-code": ("low", "code in a language that is listed here and not examined further"),
    # templates
    "template-invalid": ("medium", "the chat template cannot be parsed"),
    "template-unrendered": (
        "low",
        "the chat template fails on every fixture: it was read, and its words were not tried",
    ),
    "template-attribute": ("high", "the chat template reaches for Python's internals"),
    "template-call": ("high", "the chat template calls what no chat template needs"),
    "template-include": ("high", "the chat template loads another file"),
    "template-blowup": ("medium", "the chat template loops or multiplies without a sensible bound"),
    "template-hidden-unicode": ("high", "the chat template holds invisible or reordering characters"),
    "template-homoglyph": ("medium", "the chat template mixes alphabets within one word"),
    "template-url": ("medium", "the chat template writes a web address into the prompt"),
    "template-date": ("medium", "the chat template writes something else on some dates"),
    "template-date-printed": ("info", "the chat template writes today's date into the prompt"),
    "template-trigger": ("medium", "words of the user change what the chat template writes around them"),
    "template-switch": ("info", "markup or a command in the user's text changes what the chat template writes"),
    "template-conflict": ("medium", "two chat templates of the repository differ"),
    "template-differs": ("medium", "the chat template is not that of the base model"),
    "template-official": ("info", "the chat template equals an official one byte for byte"),
    "template-unofficial": ("info", "the chat template is not one of the family's official ones"),
    # weights
    "weights-malformed": ("high", "the container breaks its format"),
    "weights-overlap": ("high", "two tensors share bytes"),
    "weights-gap": ("high", "bytes inside the container belong to no tensor"),
    "weights-duplicate-key": ("high", "a tensor's name occurs twice"),
    "weights-trailing-bytes": ("high", "bytes follow the last tensor"),
    "weights-index": ("high", "the index and the shards disagree"),
    "weights-mismatch": ("high", "tensors and config.json disagree"),
    "weights-nonfinite": ("high", "a tensor holds NaN or infinite values"),
    "weights-dead": ("medium", "a tensor is zero throughout"),
    "weights-dead-rows": ("info", "rows of a matrix are zero"),
    "weights-duplicated": ("medium", "two tensors of different places hold the same values"),
    "weights-norm-range": ("medium", "a normalisation's weights are far outside the usual range"),
    "weights-head-differs": ("high", "a tied head is stored and differs from the embedding"),
    "weights-none": ("info", "no weights in the repository"),
    # configuration
    "config-invalid": ("medium", "config.json cannot be of the model that it names"),
    "dtype-mismatch": ("medium", "config.json names another dtype than the weights have"),
    "vocabulary-too-large": ("high", "a token's id has no row in the embedding"),
    "special-token-missing": ("medium", "a configured token does not exist in the tokenizer"),
    "end-token-mismatch": ("medium", "config, generation_config, tokenizer and template disagree on the end tokens"),
    "tokenizer-blowup": ("medium", "a pattern or replacement of tokenizer.json takes time or memory without bound"),
    "tokenizer-invalid": ("medium", "tokenizer.json cannot be read"),
    # claims
    "card-missing": ("low", "no model card"),
    "card-invalid": ("medium", "the model card's front matter cannot be read"),
    "license-missing": ("low", "no licence is stated"),
    "license-contradiction": ("medium", "the card's licence is not that of the licence file"),
    "parameters-contradiction": ("medium", "the card's number of parameters is not that of the weights"),
    "dtype-contradiction": ("medium", "the card's dtype is not that of the weights"),
    "base-unstated": ("info", "the card names no base model"),
    "evals-unproven": ("info", "the card's results come without raw outputs"),
    # against a base or an earlier manifest
    "base-differs": ("medium", "tensors differ from what the base gives"),
    "base-metadata": ("low", "metadata differ from what the base gives"),
    "changed": ("high", "a file is not what the manifest says"),
    "added": ("medium", "a file is not in the manifest"),
    "removed": ("medium", "a file of the manifest is gone"),
    "lineage-broken": ("medium", "the source or the result is not what the record says"),
    # what could not be examined
    "pointer-file": ("low", "a pointer to a file that was not downloaded"),
    "truncated": ("low", "the file ends too early"),
    "unknown-format": ("low", "a format that is not known here"),
    "unreadable": ("low", "the file cannot be read"),
    "encrypted": ("low", "encrypted"),
    "too-large": ("low", "larger than is examined"),
    "special-file": ("low", "a pipe, socket or device; never opened"),
    "sparse-file": ("low", "almost all of it is a hole"),
    "symlink-broken": ("low", "a symbolic link leads nowhere, or in a circle"),
    "unparsable-code": ("low", "code that cannot be parsed"),
    "not-read": ("low", "left out to stay within the bytes that may be read over the network"),
}


class Unexamined(Exception):
    """Why a file could not be examined: the name of a finding and the reason."""

    def __init__(self, id: str, what: str):
        super().__init__(what)
        self.id, self.what = id, what


@dataclass
class Finding:
    id: str
    severity: str
    file: str | None
    what: str


@dataclass
class File:
    """One file of the repository. `sha256` is of its bytes, or null where they were not all read; `examined` says
    whether all that a loader acts on was read (of weights the whole header; the values are a matter of `values`)."""

    path: str
    bytes: int
    sha256: str | None = None
    tier: str = "unknown"
    format: str = "unknown"
    examined: bool = False
    note: str = ""


@dataclass
class Ledger:
    """All that an audit gathers. `facts` are what later rooms and the reports use, by name."""

    files: list[File] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    unpacked: int = 0  # bytes taken out of archives so far
    members: int = 0  # files examined inside archives
    headers: int = 0  # bytes of safetensors headers
    tensors: int = 0  # that those describe
    opcodes: int = 0  # of pickles
    code: int = 0  # characters of code that were parsed
    _known: set[tuple[str, str | None, str]] = field(default_factory=set)

    def find(self, id: str, file: str | None, what: str) -> None:
        severity = FINDINGS[id][0]
        what = what[:400]
        if (id, file, what) not in self._known:
            self._known.add((id, file, what))
            self.findings.append(Finding(id, severity, file, what))

    def accusations(self) -> Iterator[Finding]:
        return (finding for finding in self.findings if finding.severity in ("high", "medium"))

    def unexamined(self) -> Iterator[File]:
        return (file for file in self.files if not file.examined)

    @property
    def status(self) -> int:
        """The exit status: 1 something was found, 2 something could not be examined, 0 neither."""
        if any(self.accusations()):
            return 1
        return 2 if any(self.unexamined()) else 0

    def sorted(self) -> list[dict[str, Any]]:
        """The findings, the most severe first."""
        order = sorted(self.findings, key=lambda one: (SEVERITIES.index(one.severity), one.id, one.file or ""))
        return [asdict(finding) for finding in order]
