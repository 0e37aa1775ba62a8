"""Settings as plain values: for files, and to compare those of two runs."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.workbench.errors import InputError

__all__ = ["MAY_CHANGE", "as_plain", "check_same_run", "flatten"]

MAY_CHANGE = frozenset({"log_every", "save_every", "validate_every", "data.workers", "data.timeout"})
"""Settings that may differ when a run resumes: its weights do not depend on them."""


def as_plain(settings: Any) -> dict[str, Any]:
    """The settings as dicts, lists and scalars, fit for YAML and for a checkpoint without code."""
    result: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return result


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names, as the command line writes them."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Check that the run in a folder is the one that resumes; only settings of `MAY_CHANGE` may differ."""
    written, given = flatten(before), flatten(now)
    for name in [*given, *written]:
        # The settings file does not list the images.
        if name in MAY_CHANGE or (name.startswith("images.") and name not in written):
            continue
        old, new = written.get(name, "nothing"), given.get(name, "nothing")
        if old != new:
            raise InputError(
                f"--resume needs the settings and the version of the run, got {name} {new} where {where} has {old}"
            )
