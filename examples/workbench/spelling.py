"""Corrections for misspelt names of commands, options and settings."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = ["did_you_mean", "find_mistake", "is_setting", "setting_types"]

_NEAR = 0.6


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the most similar known name, or nothing if none is similar.

    >>> did_you_mean("optimizer.lr", ["optimiser.power", "optimiser.learning_rate"])
    '; did you mean optimiser.learning_rate?'
    """
    near = [other for other in known if _likeness(name, other) >= _NEAR]
    return f"; did you mean {max(near, key=lambda other: _likeness(name, other))}?" if near else ""


def setting_types(settings: type) -> dict[str, Any]:
    """The type of each setting of a dataclass, and of each group of settings, by dotted name."""
    return dict(_walk(settings, ""))


def is_setting(name: str, known: Mapping[str, Any]) -> bool:
    """Whether a setting has this name, or the name is a user's own key in a dict such as `data.subsets`."""
    above = [name[:end] for end, letter in enumerate(name) if letter == "."]
    return name in known or any(_is_dict(known.get(part)) for part in above)


def find_mistake(given: Mapping[str, Any], known: Mapping[str, Any]) -> str | None:
    """An error message for the first unknown name, or value outside a setting's choices, in `given`; else None."""
    for name, value in given.items():
        if not is_setting(name, known):
            return f"there is no setting {name}{did_you_mean(name, known)}"
        if typing.get_origin(known.get(name)) is typing.Literal:
            choices = list(map(str, typing.get_args(known[name])))
            if str(value) not in choices:
                meant = did_you_mean(str(value), choices)
                return f"expected {name} to be one of {', '.join(choices)}, got {value}{meant}"
    return None


def _walk(settings: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, kind in typing.get_type_hints(settings).items():
        yield prefix + name, kind
        for part in _alternatives(kind):
            if dataclasses.is_dataclass(part):
                yield from _walk(typing.cast(type, part), f"{prefix}{name}.")


def _alternatives(kind: Any) -> tuple[Any, ...]:
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if union else (kind,)


def _is_dict(kind: Any) -> bool:
    return any(typing.get_origin(part) is dict for part in _alternatives(kind))


def _likeness(name: str, other: str) -> float:
    """Similarity of two dotted names, in [0, 1]: that of their least similar parts. `name` may lack its groups."""
    parts, others = (text.lower().replace("-", "_").lstrip("_").split(".") for text in (name, other))
    if len(parts) == 1 < len(others):
        return 0.95 * _part_likeness(parts[0], others[-1])
    return min(map(_part_likeness, parts, others)) if len(parts) == len(others) else 0.0


def _part_likeness(part: str, other: str) -> float:
    initials = "".join(word[:1] for word in other.split("_"))
    return 1.0 if len(part) > 1 and part == initials else difflib.SequenceMatcher(None, part, other).ratio()
