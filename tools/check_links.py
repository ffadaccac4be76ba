"""Check the links of the built site: every internal link and anchor leads somewhere; external ones are listed.

    python tools/check_links.py [out/site] [--external]

Reads the HTML that `make docs` writes, without a network. Exit code 1 if a page, file or anchor is missing.
"""

from __future__ import annotations

import argparse
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from set_up import ROOT

ATTRIBUTES = {"a": "href", "link": "href", "img": "src", "script": "src", "source": "src", "iframe": "src"}


class Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if (link := given.get(ATTRIBUTES.get(tag, ""))) is not None:
            self.links.append(link)


def check(site: Path) -> tuple[list[str], dict[str, set[str]], int]:
    """(problems, external addresses with the pages that link to them, the number of internal links)."""
    site = site.resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    problems: list[str] = []
    external: dict[str, set[str]] = {}
    count = 0
    for path, page in pages.items():
        here = path.relative_to(site).as_posix()
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("data", "mailto", "javascript"):
                continue
            if parts.scheme or parts.netloc:
                external.setdefault(link, set()).add(here)
                continue
            count += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_relative_to(site) or not target.exists():
                problems.append(f"{here}: {link} leads to nothing")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                problems.append(f"{here}: {link} has an anchor that is not on that page")
    return sorted(set(problems)), external, count


def main() -> int:
    """Check a site, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, nargs="?", default=ROOT / "out" / "site")
    parser.add_argument("--external", action="store_true", help="list the addresses outside the site")
    options = parser.parse_args()
    if not (options.site / "index.html").is_file():
        sys.exit(f"{options.site} has no index.html: run `make docs` first")
    problems, external, count = check(options.site)
    print("\n".join(problems), end="\n" if problems else "")
    if options.external:
        for address, pages in sorted(external.items()):
            print(f"{address}  ({len(pages)} page{'' if len(pages) == 1 else 's'}, such as {min(pages)})")
    size = sum(one.stat().st_size for one in options.site.rglob("*") if one.is_file())
    print(
        f"{count:,} internal links, {len(problems)} broken; {len(external)} addresses outside; the site has {size / 1e6:.1f} MB"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
