"""Code blocks of the documentation pages: tests run these blocks, and some pictures are drawn from them."""

import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["Block", "read_blocks"]


class Block(NamedTuple):
    """A fenced code block of a Markdown page."""

    language: str
    code: str
    line: int
    """Line number of the opening fence, counted from 1."""


def read_blocks(path: Path) -> list[Block]:
    """All code blocks of a Markdown page, without directives such as `{toctree}`."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^(`{3,})(\w[\w+-]*)[^\n]*\n(.*?)^\1[ ]*$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(match[2], match[3], text[: match.start()].count("\n") + 1) for match in found]
