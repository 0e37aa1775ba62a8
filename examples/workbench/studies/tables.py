"""Numbers of runs as text: Markdown, percent, spread, versions."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["duration", "markdown", "percent", "spread", "versions"]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float | None, sign: str = "") -> str:
    """A share in percent with one decimal; "–" for None."""
    # Adding 0.0 turns the -0.0 of a rounded tiny loss into 0.0.
    return "–" if value is None else format(round(100 * value, 1) + 0.0, f"{sign}.1f")


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± sample standard deviation in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return f"{percent(statistics.fmean(values), sign)} ± {percent(deviation)}"


def duration(seconds: float) -> str:
    """Minutes and seconds, or hours and minutes."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def versions(results: Sequence[Mapping[str, Any]]) -> str:
    """List each package's version, or its versions where the runs differ."""
    versions: dict[str, list[str]] = {}
    for result in results:
        for package, version in result["versions"].items():
            if str(version) not in versions.setdefault(package, []):
                versions[package].append(str(version))
    return ", ".join(" ".join([package, " and ".join(found)]) for package, found in versions.items())
