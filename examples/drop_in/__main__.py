"""Print the lines that each program adds to its loop. With `--write PAGE ...`, update the diffs on these pages."""

import argparse
import difflib
import re
from pathlib import Path

__all__ = ["diff", "main", "updated", "versions"]

_BLOCK = re.compile(r"(<!-- diff of (\w+)\.py[^\n]*-->\n+)```diff\n.*?^```", flags=re.MULTILINE | re.DOTALL)


def versions(source: str) -> tuple[str, str]:
    """The program without and with its added lines. Lines that end in `# check` are left out of both."""
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
    """The unified diff between both versions. The title of each hunk is the function around it."""
    before, after = (version.splitlines() for version in versions(source))
    lines: list[str] = []
    for line in list(difflib.unified_diff(before, after, n=2, lineterm=""))[2:]:
        if line.startswith("@@"):
            start = int(line.split("+")[1].split(",")[0])
            # The first line of a hunk may be the definition itself.
            inside = [above.strip() for above in after[:start] if re.match(r" *(def|class) ", above)]
            line = f"@@ {re.split('[(:]', inside[-1])[0] if inside else 'imports'} @@"
        lines.append(line.rstrip())
    return "\n".join(lines)


def updated(page: str) -> str:
    """The page's text with up-to-date diffs of the programs."""

    def block(match: re.Match[str]) -> str:
        program = Path(__file__).with_name(f"{match[2]}.py")
        return f"{match[1]}```diff\n{diff(program.read_text())}\n```"

    return _BLOCK.sub(block, page)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.drop_in", description=__doc__)
    parser.add_argument("--write", type=Path, nargs="+", metavar="PAGE")
    pages: list[Path] | None = parser.parse_args().write
    if pages is not None:
        for page in pages:
            page.write_text(updated(page.read_text()))
        return
    for program in sorted(Path(__file__).parent.glob("[!_]*.py")):
        print(f"{program.name}\n{diff(program.read_text())}\n")


if __name__ == "__main__":
    main()
