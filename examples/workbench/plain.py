"""Settings as plain values: for files, and to compare the settings of two runs."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.workbench.errors import InputError

__all__ = ["MAY_CHANGE", "as_plain", "check_same_run", "flatten"]

MAY_CHANGE = frozenset({"log_every", "save_every", "validate_every", "data.workers", "data.timeout"})
"""Settings that may change when a run resumes, since its weights do not depend on them."""


def as_plain(settings: Any) -> dict[str, Any]:
    """Settings as dicts, lists and scalars, which YAML files and checkpoints without code can hold."""
    result: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return result


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names, as the command line writes them."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Check that a run resumes with the settings that it began with; only those in `MAY_CHANGE` may differ."""
    written, given = flatten(before), flatten(now)
    for name in [*given, *written]:
        # The settings file does not list the images.
        if name in MAY_CHANGE or (name.startswith("images.") and name not in written):
            continue
        old, new = written.get(name, "nothing"), given.get(name, "nothing")
        if old != new:
            raise InputError(
                f"--resume needs the settings and the version that the run began with, got {name} {new}, but {where} "
                f"has {old}"
            )
