"""The logo: a dot and a cross for each of three classes, the same class in two domains, joined by a line."""

from pathlib import Path

from examples.workbench.files import write_whole

__all__ = ["draw_logo"]

# Positions of the dot and of the cross of each class; colours that differ in lightness too, and that of the lines.
_PAIRS = [((10, 11), (23, 24)), ((54, 11), (41, 24)), ((32, 56), (32, 39))]
_LIGHT = (("#332288", "#ee6677", "#228833"), "#555555")
_DARK = (("#99ddff", "#f0e442", "#ee6677"), "#bbbbbb")


def draw_logo(path: Path, *, dark: bool) -> None:
    """Write the logo as SVG, for a light or a dark background."""
    colours, line = _DARK if dark else _LIGHT
    shapes = []
    for ((x, y), (u, v)), colour in zip(_PAIRS, colours, strict=True):
        shapes.append(f'<path d="M{x} {y}L{u} {v}" stroke="{line}" stroke-width="2.5"/>')
        shapes.append(f'<circle cx="{x}" cy="{y}" r="7" fill="{colour}"/>')
        cross = f"M{u - 4} {v - 4}l8 8m0 -8l-8 8"
        shapes.append(f'<path d="{cross}" stroke="{colour}" stroke-width="4" stroke-linecap="round"/>')
    body = "\n  ".join(shapes)
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64" width="64" height="64" fill="none">\n'
        f"  <title>semshift</title>\n  {body}\n</svg>\n"
    )
    write_whole(path, lambda to: to.write_text(text, encoding="utf-8"))
