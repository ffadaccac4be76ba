"""Sphinx configuration of the documentation site: `make docs` writes it to out/site."""

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

import bisparse

project = "bisparse"
author = "the bisparse authors"
copyright = "2026, the bisparse authors"
release = version = bisparse.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["conf.py"]
html_theme = "furo"
html_title = f"bisparse {release}"
html_math_renderer = "mathml"

nb_execution_mode = "off"  # they are stored with their outputs; tools/notebooks.py runs them
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# Pages also link to files of the repository, which are no pages of the site: README, CONTRIBUTING, examples, folders.
suppress_warnings = ["myst.xref_missing", "myst.header"]

default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

# Docstrings are prose with code in backticks, not reStructuredText: |w| is a magnitude, prune_ a name, *args an argument.
CODE = re.compile(r"(``.*?``|`[^`]*`)", re.DOTALL)
MARKUP = re.compile(r"\||(?<=\w)_(?!\w)|(?<![\w*\s])\*|\*(?=[\w(])")


def escape_markup(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Escape what reStructuredText would read as markup outside of code: backticks, examples, and blocks after two colons."""
    prose: list[str] = []
    escaped: list[str] = []

    def flush() -> None:
        pieces = CODE.split("\n".join(prose))
        text = "".join(piece if piece.startswith("`") else MARKUP.sub(r"\\\g<0>", piece) for piece in pieces)
        escaped.extend(text.split("\n") if prose else [])
        prose.clear()

    block: int | None = None  # the indentation of the line before a block of code
    example = False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        block = None if block is not None and line.strip() and indent <= block else block
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        if block is not None or example:
            flush()
            escaped.append(line)
        else:
            prose.append(line)
            block = indent if line.rstrip().endswith("::") else None
    flush()
    lines[:] = escaped


def inline_mathml(page: Any, node: nodes.math) -> None:
    """Write a formula as MathML, which browsers show without a script from elsewhere."""
    page.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_mathml(page: Any, node: nodes.math_block) -> None:
    """Write a formula of its own line as MathML."""
    page.body.append(f"<p>{convert(node.astext(), display='block')}</p>\n")
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (inline_mathml, None), (block_mathml, None))
    app.connect("autodoc-process-docstring", escape_markup, priority=900)
