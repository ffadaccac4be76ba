"""`bisparse` and `python -m bisparse`: start the command line, or say what it needs."""

from __future__ import annotations

import importlib.util
import os
import sys

from bisparse.errors import install_extra

__all__ = ["main"]


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 a violation or a failed job, 2 wrong use, 130 interrupted, 143 stopped by SIGTERM.
    """
    missing = [package for package in ("typer", "rich") if importlib.util.find_spec(package) is None]
    if missing:
        sys.stderr.write(
            f"bisparse: the command line needs {' and '.join(missing)}, which this installation lacks.\n"
            f"Please {install_extra('cli')}\n"
        )
        sys.exit(2)
    if not sys.stderr.isatty():
        # Otherwise the progress bars of other libraries fill log files with control characters.
        os.environ.setdefault("TQDM_DISABLE", "1")
    from bisparse.cli import run

    run()


if __name__ == "__main__":
    main()
