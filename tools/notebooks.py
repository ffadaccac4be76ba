"""Run the notebooks of docs/notebooks and store their outputs in them.

    python tools/notebooks.py [NAME ...]

Extra `docs`. A cell with the tag "parameters" sets the budget; its metadata, under "small", hold the smaller values
that the quick test uses. Times in outputs are those of the machine that ran them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
LIMIT_S = 900
"""For one cell."""


def run(path: Path) -> float:
    """Execute a notebook in a new kernel and write it back; returns the seconds it took."""
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    NotebookClient(notebook, timeout=LIMIT_S, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    seconds = time.perf_counter() - started
    for cell in notebook.cells:
        # Neither when a cell ran nor what this machine calls its Python belongs into the repository.
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            # Warnings and progress bars name paths and times of this machine.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)
    return seconds


def main() -> None:
    """Run the notebooks named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    names = parser.parse_args().names or list(known)
    for name in names:
        if name not in known:
            parser.error(f"no notebook {name!r}: choose from {', '.join(known)}")
    for name in names:
        print(f"{name}: {run(known[name]):.0f} s, {known[name].stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
