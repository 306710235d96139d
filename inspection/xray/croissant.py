"""Croissant (https://docs.mlcommons.org/croissant/), the field's machine-readable card of a data set: read through
mlcroissant and held against what is there; written for a set that has none.
"""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

from formats.files import sha256, write_text
from inspection.xray.reading import kind_of

NAMES = ("croissant.json", "metadata.json")
BYTES = 32 << 20
FORMATS = {
    **{".parquet": "application/x-parquet", ".jsonl": "application/jsonlines", ".ndjson": "application/jsonlines"},
    **{".csv": "text/csv", ".tsv": "text/tab-separated-values", ".json": "application/json", ".txt": "text/plain"},
}


def library():
    """mlcroissant, or one line that says how to get it."""
    try:
        import mlcroissant
    except ImportError:
        raise ValueError("Croissant needs mlcroissant: pip install -e '.[xray]'") from None
    logging.getLogger("absl").setLevel(logging.ERROR)
    return mlcroissant


def find(src: str) -> dict[str, Any] | None:
    """The Croissant of a folder, of the folder of a file, or of a data set on the hub."""
    path = Path(src).expanduser()
    if path.exists():
        folder = path if path.is_dir() else path.parent
        for file in [*(folder / name for name in NAMES), *sorted(folder.glob("*.jsonld"))]:
            if file.is_file() and file.stat().st_size <= BYTES:
                found = _json(file.read_bytes())
                if found is not None and "conformsTo" in json.dumps(found)[:200_000]:
                    return found
        return None
    return _from_hub(src)


def _json(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _from_hub(src: str) -> dict[str, Any] | None:
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers

    from formats.download import reach

    url = f"{constants.ENDPOINT}/api/datasets/{src.partition('@')[0]}/croissant"
    try:
        answer = reach(lambda: get_session().get(url, headers=build_hf_headers(), timeout=5))
        return _json(answer.content) if answer.status_code == 200 and len(answer.content) <= BYTES else None
    except Exception:  # the HTTP library's classes: a Croissant is worth no failure
        return None


def compared(found: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """What it says beside what is there: {"valid", "differences": [...], ...}. Needs mlcroissant."""
    mlc = library()
    try:
        with quiet():
            metadata = mlc.Dataset(jsonld=found).metadata
    except Exception as error:  # the library raises classes of its own and of what it is built on
        return {"valid": False, "differences": [f"is not valid: {' '.join(str(error).split())[:500]}"]}
    stated: dict[str, str] = {}
    for record_set in metadata.record_sets:
        columns = _columns(record_set)
        if columns.keys() & {column["name"] for column in report["columns"]}:
            stated |= columns
    there = {column["name"]: column["type"] for column in report["columns"]}
    differences = [f"states a column {name}, which is not there" for name in stated if name not in there]
    differences += [f"does not state the column {name}" for name in there if name not in stated]
    for name in stated.keys() & there.keys():
        if stated[name] and not _same_type(stated[name], there[name]):
            differences.append(f"states {name} as {stated[name]}, but it is {there[name]}")
    licenses = [str(value) for value in (metadata.license or [])]
    if report["license"] and licenses and not any(_same_license(value, report["license"]) for value in licenses):
        differences.append(f"states the licence {', '.join(licenses)}, the card {report['license']}")
    return {"valid": True, "name": metadata.name, "license": licenses, "differences": sorted(differences)}


def _columns(record_set: Any) -> dict[str, str]:
    made = {}
    for field in record_set.fields:
        name = getattr(field.source.extract, "column", None) if field.source is not None else None
        kinds = [str(kind).rpartition("/")[2].rpartition(":")[2] for kind in field.data_types or []]
        kind = "" if field.sub_fields or getattr(field, "is_array", None) else (kinds or [""])[0]
        made[name or (field.name or "").rpartition("/")[2]] = kind
    return made


def _same_type(stated: str, there: str) -> bool:
    kinds = {
        "Text": ("string",),
        "URL": ("string",),
        "Integer": ("int", "uint"),
        "Float": ("float", "double", "halffloat"),
        "Number": ("int", "uint", "float", "double"),
        "Boolean": ("bool",),
        "Date": ("date", "timestamp", "string"),
        "DateTime": ("timestamp", "string"),
    }
    known = kinds.get(stated, ())
    known = known or (
        ("int", "uint")
        if stated.startswith(("int", "uint"))
        else ("float", "double")
        if stated.startswith("float")
        else ()
    )
    return not known or there == "null" or any(there.removeprefix("large_").startswith(kind) for kind in known)


def _same_license(one: str, other: str) -> bool:
    one, other = (text.lower().rstrip("/").rpartition("/")[2].removesuffix(".html") for text in (one, other))
    return one == other or other in one or one in other


@contextlib.contextmanager
def quiet():
    """mlcroissant logs its warnings through absl."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


# --- writing ---


def write(out: Path, report: dict[str, Any], files: list[Path]) -> None:
    """A valid Croissant of local files, with each file's SHA-256. ValueError where the library finds a fault."""
    mlc = library()
    base = out.parent.resolve()
    distribution, sources = [], {}
    for number, file in enumerate(files):
        distribution.append(
            mlc.FileObject(
                id=f"file-{number}",
                name=file.name,
                content_url=_relative(file.resolve(), base),
                encoding_formats=[FORMATS.get(kind_of(file), "application/octet-stream")],
                sha256=sha256(file),
            )
        )
        sources[file] = f"file-{number}"
    first = next(iter(sources.values()))
    fields = [
        mlc.Field(
            id=f"rows/{number}",
            name=column["name"],
            data_types=[_data_type(mlc, column["type"])],
            source=mlc.Source(file_object=first, extract=mlc.Extract(column=column["name"])),
        )
        for number, column in enumerate(report["columns"])
    ]
    with quiet():
        metadata = mlc.Metadata(
            name=report["name"].replace("/", "_"),
            description=f"{report['intended_use']} {report['rows_read']:,} rows.",
            license=[report["license"]] if report["license"] else None,
            url=report["address"],
            distribution=distribution,
            record_sets=[mlc.RecordSet(id="rows", name="rows", fields=fields)],
        )
        content = json.dumps(metadata.to_json(), indent=2, ensure_ascii=False, default=str)
        try:
            mlc.Dataset(jsonld=json.loads(content))
        except Exception as error:
            raise ValueError(f"--croissant {out}: {' '.join(str(error).split())[:500]}") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, content + "\n")


def _relative(file: Path, base: Path) -> str:
    return file.relative_to(base).as_posix() if file.is_relative_to(base) else file.as_uri()


def _data_type(mlc: Any, kind: str) -> Any:
    kind = kind.partition(" or ")[0]
    if kind.startswith(("int", "uint")):
        return mlc.DataType.INTEGER
    if kind.startswith(("float", "double", "halffloat")):
        return mlc.DataType.FLOAT
    return mlc.DataType.BOOL if kind == "bool" else mlc.DataType.TEXT
