"""Files of a folder by name; images and label files are matched by these names."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from examples.workbench.errors import InputError

__all__ = ["list_files", "path_below"]


def path_below(root: Path, path: str) -> Path:
    """A path below the data root. Links are not resolved, since large data sets are often behind a link."""
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise InputError(f"expected a folder or file below the data root {root}, got {path}")
    return root / path


def list_files(
    root: Path, folder: str, pattern: str, endings: Sequence[str], passed_over: Sequence[str] = ()
) -> dict[str, Path]:
    """Files by name without the ending, in Unicode's composed form. Names that begin with a dot are skipped."""
    where = path_below(root, folder)
    if not where.is_dir():
        raise InputError(f"expected {where} to be a folder, got none")
    files: dict[str, Path] = {}
    for file in sorted(where.glob(pattern)):
        name = _composed(file.name)
        ending = next((end for end in endings if _ends(name, end)), None)
        below = file.relative_to(where)
        hidden = any(part.startswith(".") for part in below.parts)
        if ending is None or hidden or any(_ends(name, end) for end in passed_over):
            continue
        try:
            str(below).encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(file).decode("utf-8", "backslashreplace")
            raise InputError(f"expected file names in UTF-8, got {shown}; rename this file") from error
        name = name[: -len(_composed(ending))]
        if name in files:
            raise InputError(f"expected only one file with the name {name}, got {files[name]} and {file.name}")
        files[name] = file
    if not files:
        other = f" but not in {' or '.join(passed_over)}" if passed_over else ""
        raise InputError(f"expected {where} to hold files ending in {', '.join(endings)}{other}, got none")
    return files


def _composed(name: str) -> str:
    """A name in Unicode's composed form; some systems write a letter and its accent as two characters."""
    return unicodedata.normalize("NFC", name)


def _ends(name: str, ending: str) -> bool:
    return name.lower().endswith(_composed(ending).lower())
