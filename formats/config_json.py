"""The spellings of config.json: published files, transformers 4 and transformers 5 name some fields differently."""

from typing import Any


def published_spelling(given: dict[str, Any]) -> dict[str, Any]:
    """The fields as the published files spell them, where transformers 5 writes others (nested rope, renamed names).

    ValueError where a file has both spellings and they disagree: which one somebody meant can't be known.
    """
    given = dict(given)
    for new, old in (("num_local_experts", "num_experts"), ("torch_dtype", "dtype")):
        if (value := given.pop(new, None)) is not None:
            given[old] = agreed({new: value, old: given.get(old)})
    flat, nested = (_rope_settings(name, given.get(name)) for name in ("rope_scaling", "rope_parameters"))
    given.pop("rope_parameters", None)
    thetas = {"rope_theta": given.get("rope_theta"), "rope_scaling.rope_theta": flat.get("rope_theta")}
    given["rope_theta"] = agreed(thetas | {"rope_parameters.rope_theta": nested.get("rope_theta")})
    stated = {name: _scaling(settings) for name, settings in (("rope_scaling", flat), ("rope_parameters", nested))}
    scaling = agreed({name: value or None for name, value in stated.items()})
    given["rope_scaling"] = None if rope_type(scaling or {}) == "default" else scaling
    return given


def agreed(values: dict[str, Any]) -> Any:
    """The one value that all spellings of a field state; those that are None state nothing."""
    stated = {name: value for name, value in values.items() if value is not None}
    (first, value), *others = stated.items() or [("", None)]
    for name, other in others:
        if other != value:
            raise ValueError(f"config: {first} is {value!r}, but {name} is {other!r}; remove the one that is wrong")
    return value


def _rope_settings(name: str, settings: Any) -> dict[str, Any]:
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"config: {name} is {settings!r}, which is neither null nor an object {{...}}")
    for key, value in settings.items():
        if isinstance(value, dict):
            raise ValueError(f"config: {name} has settings of its own for {key}; one for all layers is implemented")
    kind = agreed({f"{name}.{key}": settings.get(key) for key in ("rope_type", "type")})
    if kind is None and settings.get("factor") is not None:
        raise ValueError(f"config: {name} has a factor but no rope_type; the Qwen family uses yarn")
    return settings


def _scaling(settings: dict[str, Any]) -> dict[str, Any]:
    """What rope settings say about scaling: without theta, and the type under its newer name."""
    stated = {name: value for name, value in settings.items() if value is not None}
    scaling = {name: value for name, value in stated.items() if name not in ("rope_theta", "type")}
    return scaling | ({"rope_type": stated["type"]} if "type" in stated else {})


def rope_type(scaling: dict[str, Any]) -> str:
    return scaling.get("rope_type", "default")
