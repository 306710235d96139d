"""The same findings as a CycloneDX 1.6 ML-BOM (https://cyclonedx.org/capabilities/mlbom/), made and validated by
cyclonedx-python-lib. Its models have no model card yet, so what the standard keeps there stands in properties, with
whether it is verified or claimed."""

from typing import Any


def available() -> bool:
    """Whether the library is installed (the extra `audit`)."""
    from importlib.util import find_spec

    return find_spec("cyclonedx") is not None


def to_json(manifest: dict[str, Any]) -> str:
    """The bill of materials of a manifest, checked against the standard's schema. ValueError where it does not fit."""
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.license import DisjunctiveLicense
    from cyclonedx.output.json import JsonV1Dot6
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.spdx import fixup_id
    from cyclonedx.validation.json import JsonStrictValidator

    def safe(text: Any) -> str:
        return str(text).encode("utf-8", "backslashreplace").decode("utf-8")

    licence = manifest["license"]
    known = fixup_id(licence) if licence else None
    licences = [DisjunctiveLicense(id=known) if known else DisjunctiveLicense(name=safe(licence))] if licence else []
    properties = [
        Property(name=f"nanoqwen:{key}:{note['status']}", value=safe(manifest[key]))
        for key, note in manifest["evidence"].items()
        if note["status"] != "absent" and key != "behaviour"
    ]
    properties += [
        Property(
            name=f"nanoqwen:finding:{finding['id']}",
            value=safe(f"{finding['severity']}: {finding['file']}: {finding['what']}"),
        )
        for finding in manifest["findings"]
    ]
    root = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=safe(manifest["repo"]),
        version=manifest["revision"] or "unknown",
        licenses=licences,
        properties=properties,
        bom_ref="model",
    )
    files = [
        Component(
            type=ComponentType.FILE,
            name=safe(file["path"]),
            bom_ref=f"file:{number}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=file["sha256"])] if file["sha256"] else [],
            properties=[
                Property(name="nanoqwen:tier", value=file["tier"]),
                Property(name="nanoqwen:format", value=safe(file["format"])),
                Property(name="nanoqwen:examined", value=str(file["examined"]).lower()),
            ],
        )
        for number, file in enumerate(manifest["files"])
    ]
    parents = [
        Component(
            type=ComponentType.MACHINE_LEARNING_MODEL,
            name=safe(one["repo"]),
            version=one["revision"] or "unknown",
            bom_ref=f"lineage:{number}",
            properties=[Property(name=f"nanoqwen:relation:{one['status']}", value=safe(one["relation"]))],
        )
        for number, one in enumerate(manifest["lineage"])
    ]
    data = [
        Component(
            type=ComponentType.DATA,
            name=safe(name),
            bom_ref=f"data:{number}",
            properties=[Property(name="nanoqwen:datasets", value="claimed")],
        )
        for number, name in enumerate(manifest["datasets"])
    ]
    bom = Bom(components=[*files, *parents, *data])
    bom.metadata.component = root
    bom.register_dependency(root, [*files, *parents, *data])
    text = JsonV1Dot6(bom).output_as_string(indent=1)
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise ValueError(f"the CycloneDX document is not valid: {str(error)[:300]}")
    return text + "\n"
