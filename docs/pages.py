"""The fenced blocks of a page, for the tests that run them and the pictures that are drawn from them."""

import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["Block", "read_blocks"]


class Block(NamedTuple):
    """A fenced block."""

    language: str
    code: str
    line: int
    """Of the fence, from 1."""


def read_blocks(path: Path) -> list[Block]:
    """All blocks of a page of Markdown; directives such as `{toctree}` are none."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^(`{3,})(\w[\w+-]*)[^\n]*\n(.*?)^\1[ ]*$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(match[2], match[3], text[: match.start()].count("\n") + 1) for match in found]
