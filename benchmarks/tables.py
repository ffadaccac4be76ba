"""Write docs/benchmarks.md from the rows in benchmarks/results: no figure on that page is typed.

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

N is the number KEPT. Targets are next to the figures, and missed ones are shown.

**In short**; the figures are in the sections

* *Speed*: on CPU the exact solver is faster than every other solver here, by more than a factor of ten.
* *What masks keep*: a transposable mask keeps a little less than a plain one; the difference shrinks as M grows.
* *Training* (ResNet-20): 4:8-T is close to 2:4 and to unstructured 50 %; dynamic training from scratch is behind dense.
* *Pruning with data*: a sentence encoder at 4:8-T stays close to dense; the perplexity of a small language model rises markedly.
* *Changing a mask*: least squares on calibration data recovers most of the accuracy that a conversion costs an image classifier.
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
    gpu = (
        HEAD
        if read_rows(results / "gpu.jsonl")
        else HEAD + "* *GPU*: products on sparse tensor cores have not been measured yet.\n"
    )
    return "\n".join([gpu, *sections]).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
