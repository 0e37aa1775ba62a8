"""Print what each program here adds to its loop; with `--write PAGE`, update the diffs of a page."""

import argparse
import difflib
import re
from pathlib import Path

__all__ = ["diff", "main", "updated", "versions"]

_BLOCK = re.compile(r"(<!-- diff of (\w+)\.py[^\n]*-->\n+)```diff\n.*?^```", flags=re.MULTILINE | re.DOTALL)


def versions(source: str) -> tuple[str, str]:
    """A program without its marked lines, and with those that are added; the lines that log are in neither."""
    before, after = [], []
    for line in source.splitlines():
        code = line.strip()
        if line.endswith("  # check"):
            continue
        if line.endswith("  # +"):
            after.append(line.removesuffix("  # +"))
        elif code.startswith("# - "):
            before.append(line.replace("# - ", "", 1))
        else:
            before.append(line)
            after.append(line)
    return "\n".join(before) + "\n", "\n".join(after) + "\n"


def diff(source: str) -> str:
    """The unified diff between the two; each piece is titled by the function around it."""
    before, after = (version.splitlines() for version in versions(source))
    lines: list[str] = []
    for line in list(difflib.unified_diff(before, after, n=2, lineterm=""))[2:]:
        if line.startswith("@@"):
            start = int(line.split("+")[1].split(",")[0])
            # The first line of a piece may be the definition itself.
            inside = [above.strip() for above in after[:start] if re.match(r" *(def|class) ", above)]
            line = f"@@ {re.split('[(:]', inside[-1])[0] if inside else 'imports'} @@"
        lines.append(line.rstrip())
    return "\n".join(lines)


def updated(page: str) -> str:
    """The page with up-to-date diffs of the programs."""

    def block(match: re.Match[str]) -> str:
        program = Path(__file__).with_name(f"{match[2]}.py")
        return f"{match[1]}```diff\n{diff(program.read_text())}\n```"

    return _BLOCK.sub(block, page)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.drop_in", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE")
    page: Path | None = parser.parse_args().write
    if page is not None:
        page.write_text(updated(page.read_text()))
        return
    for program in sorted(Path(__file__).parent.glob("[!_]*.py")):
        print(f"{program.name}\n{diff(program.read_text())}\n")


if __name__ == "__main__":
    main()
