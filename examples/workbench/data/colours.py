"""Masks in colours: the table from colours to classes, and the class ids of a mask."""

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from examples.workbench.data.listing import path_below
from examples.workbench.errors import InputError

__all__ = ["ids_of_colours", "open_table"]

Colour = tuple[int, int, int]


def open_table(
    colours: Mapping[str, Colour] | str, root: Path, classes: Sequence[str], ignore_index: int
) -> tuple[dict[Colour, int], list[str]]:
    """Table from colour to index in `classes`, or to `ignore_index` for names outside `classes`; and those names."""
    known = _read_labelmap(path_below(root, colours)) if isinstance(colours, str) else colours
    by_name = {unicodedata.normalize("NFC", name): tuple(colour) for name, colour in known.items()}
    indices = {unicodedata.normalize("NFC", name): k for k, name in enumerate(classes)}
    if missing := [name for name in indices if name not in by_name]:
        where = root / colours if isinstance(colours, str) else "colours"
        raise InputError(
            f"expected {where} to have a colour for every class, got {', '.join(by_name)} without {missing[0]}"
        )
    table = {(r, g, b): indices.get(name, ignore_index) for name, (r, g, b) in by_name.items()}
    return table, [name for name in by_name if name not in indices]


def ids_of_colours(mask: Image.Image, table: Mapping[Colour, int]) -> np.ndarray:
    """Class ids `uint8 [H, W]` of a mask in mode RGB."""
    # Red is the lowest of four bytes. The table is large, but only the pages of colours that occur are in memory.
    colours = np.asarray(mask.convert("RGBA")).view("<u4")[..., 0] & 0xFFFFFF
    ids_plus_1 = np.zeros(1 << 24, np.uint16)
    for (r, g, b), index in table.items():
        ids_plus_1[r | g << 8 | b << 16] = index + 1
    found = ids_plus_1[colours]
    if not found.all():
        unknown, counts = np.unique(colours[found == 0], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        some = ", ".join(
            f"{[int(unknown[i]) >> shift & 255 for shift in (0, 8, 16)]} ({counts[i]} pixels)" for i in order[:3]
        )
        more = f" and {len(unknown) - 3} more colours" if len(unknown) > 3 else ""
        raise ValueError(f"expected only colours of the table, got {some}{more}")
    return np.asarray(found - 1, np.uint8)


def _read_labelmap(file: Path) -> dict[str, Colour]:
    """Colours by name, from a file like CVAT's `labelmap.txt` with lines `name:red,green,blue::`."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"expected colours to be a text file in UTF-8 below the data root, got {file}: {error}"
        ) from error
    colours: dict[str, Colour] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        name, *fields = (part.strip() for part in line.split(":"))
        channels = [part.strip() for part in fields[0].split(",")] if fields else []
        if not name or len(channels) != 3 or not all(c.isdecimal() and int(c) < 256 for c in channels):
            raise InputError(
                f"expected lines name:red,green,blue with colours of 0 to 255, got {line!r}: {file}, line {number}"
            )
        r, g, b = map(int, channels)
        if name in colours or (r, g, b) in colours.values():
            raise InputError(f"expected a new name and colour in every line, got {line!r} again: {file}, line {number}")
        colours[name] = (r, g, b)
    return colours
