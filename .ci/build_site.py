"""Build the site into a folder and check its links; warnings and network access are errors. Run by .ci/run."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.cmd.build import main as build
from sphinx.util.inventory import InventoryFile

import semshift

DOCS = Path(__file__).parent.parent / "docs"


def refuse_network(event: str, arguments: object) -> None:
    """Audit hook that ends the build at any network access."""
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"expected a build without network access, got {event} {arguments}")


class Page(HTMLParser):
    """Anchors of a page, its links, and the files that it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the anchors, links and files of a tag."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        leads = values.get("rel") in ("author", "canonical", "index", "next", "prev", "search")
        if tag in ("a", "link") and "href" in values:
            (self.links if tag == "a" or leads else self.loads).append(values["href"])
        elif "src" in values:
            self.loads.append(values["src"])
        self.loads += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]


def problems(out: Path) -> list[str]:
    """Broken links, files that are missing or loaded from other sites, and public names without an entry."""
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
                found.append(f"{path}: {target} does not exist")
            elif where in pages and parts.fragment and unquote(parts.fragment) not in pages[where].anchors:
                found.append(f"{path}: {target}: the page has no such anchor")
    for path in sorted([*out.rglob("*.css"), *pages]):
        # A page may have styles in a `<style>` element or in an attribute.
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
    if build(["-q", "-W", "-n", "--keep-going", "-E", str(DOCS), str(out)]):
        sys.exit("expected a build without warnings, got those above")
    if found := problems(out):
        sys.exit("\n".join(found))
