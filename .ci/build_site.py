"""Build the documentation site into a folder and check its links. A warning or a network access is an error.

.ci/run calls this script: `python .ci/build_site.py OUT`.
"""

import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.cmd.build import main as build
from sphinx.util.inventory import InventoryFile

import semshift

DOCS = Path(__file__).parent.parent / "docs"


def refuse_network(event: str, arguments: object) -> None:
    """Audit hook: stop at the first attempt to use the network."""
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"the site must build without a network, got {event} {arguments}")


class Page(HTMLParser):
    """The anchors of an HTML page, its links, and the files that it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record the anchors, links and loaded files of one tag."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        is_page = values.get("rel") in ("author", "canonical", "index", "next", "prev", "search")
        if tag in ("a", "link") and "href" in values:
            (self.links if tag == "a" or is_page else self.loads).append(values["href"])
        elif "src" in values:
            self.loads.append(values["src"])
        self.loads += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]


def problems(out: Path) -> list[str]:
    """Broken links, missing or external pictures and scripts, and public names that the API reference lacks."""
    pages = {path: Page(path) for path in sorted(out.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for target in [*page.links, *page.loads]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loads and parts.scheme != "data":
                    found.append(f"{path}: loads {target} from another site")
                continue
            where = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not where.exists():
                found.append(f"{path}: link to {target}, which does not exist")
            elif where in pages and parts.fragment and unquote(parts.fragment) not in pages[where].anchors:
                found.append(f"{path}: link to {target}, but that page has no such anchor")
    for path in sorted([*out.rglob("*.css"), *pages]):
        # An HTML page may also contain styles.
        for target in re.findall(
            r"""(?:url\(|@import)\s*["']?((?:[a-z]+:)?//[^)"']*)""", path.read_text(encoding="utf-8")
        ):
            found.append(f"{path}: loads {target} from another site")
    with (out / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda _, name: name)
    entries = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    for name in semshift.__all__:
        if f"semshift.{name}" not in entries:
            found.append(f"semshift.{name} has no entry in the API reference")
    if "PrototypeDiscriminator" not in (out / "searchindex.js").read_text(encoding="utf-8"):
        found.append("the search index lacks PrototypeDiscriminator")
    print(f"{len(pages)} pages, {sum(len(p.links) for p in pages.values())} links, {len(entries)} names")
    return found


if __name__ == "__main__":
    sys.addaudithook(refuse_network)
    out = Path(sys.argv[1]).resolve()
    # Sphinx does not rewrite a page of source code when only its links back have changed.
    shutil.rmtree(out / "_modules", ignore_errors=True)
    if build(["-q", "-W", "-n", "--keep-going", "-E", str(DOCS), str(out)]):
        sys.exit("the site must build without a warning; see the warnings above")
    if found := problems(out):
        sys.exit("\n".join(found))
