"""Write docs/benchmarks.md from the rows in benchmarks/results: nothing on that page is typed.

python benchmarks/tables.py [--check]

With --check nothing is written, and the exit code is 1 where the page is not what the rows say.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from record import RESULTS, ROOT, read_rows
from sections import SECTIONS
from sections.training import draw_gpt

PAGE = ROOT / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Written by `benchmarks/tables.py` from the rows in `benchmarks/results`; `make check` fails where they differ. Each row there
says on what it was measured: device, versions, commit, date. How to run them: [benchmarks/README.md](../benchmarks/README.md).

Patterns name the number KEPT. A target stands beside its figure, and what misses it stays.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    page = render(options.results)
    if not options.check:
        options.page.write_text(page, encoding="utf-8")
        if rows := read_rows(options.results / "training-gpt.jsonl"):
            draw_gpt(rows)
        return 0
    there = options.page.read_text(encoding="utf-8") if options.page.exists() else ""
    if there == page:
        return 0
    lines = difflib.unified_diff(there.splitlines(), page.splitlines(), "the page", "what the rows say", lineterm="", n=1)
    print("\n".join([*list(lines)[:40], "Run `make fix` (or benchmarks/tables.py) and commit the page."]))
    return 1


def render(results: Path) -> str:
    """The whole page."""
    sections = (part for file, section in SECTIONS.items() for part in section(read_rows(results / file)))
    return "\n".join([HEAD, *sections]).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
