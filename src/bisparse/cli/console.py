"""Shared by all commands: exit codes, messages without tracebacks, JSON, progress and options."""

from __future__ import annotations

import functools
import json
import math
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from typer.core import TyperGroup

from bisparse.errors import printable
from bisparse.progress_lines import ProgressLines
from bisparse.user_errors import TERMINATED, ends_the_process

if TYPE_CHECKING:
    from bisparse.pattern import Structure
    from bisparse.solvers import Solver

__all__ = [
    "INTERRUPTED",
    "AsJson",
    "Commands",
    "Excluded",
    "Included",
    "Key",
    "Layouts",
    "Threads",
    "command",
    "command_line",
    "fail",
    "is_function",
    "parse_layout_options",
    "parse_pattern_option",
    "parse_solver_option",
    "parse_source",
    "print_coverage",
    "print_json",
    "print_written",
    "progress_bar",
    "run_app",
    "set_quiet",
    "set_threads",
    "shows_progress",
    "to_stderr",
    "to_stdout",
]  # fmt: skip

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

P = ParamSpec("P")
_given: list[str] = []
_options: set[str] = set()
"""Options that were given to the running command."""
_complete: list[Path] = []
_signals: list[int] = []
"""Signals that have asked this process to end."""
_quiet = False

MOST_THREADS = 1024
"""Most threads that are started: systems refuse tens of thousands with errors of many kinds."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
Included = Annotated[
    list[str] | None,
    typer.Option("--include", "-i", metavar="GLOB", help="Only these layers: a name, a glob, or re:PATTERN. May be repeated."),
]
Excluded = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", "-x", metavar="GLOB", help="Leave these layers out; takes precedence over --include. May be repeated."
    ),
]
Layouts = Annotated[
    list[str] | None,
    typer.Option(
        "--layout",
        metavar="GLOB=LAYOUT",
        help="How some layers store their matrices, if it cannot be detected: linear, transposed, conv, conv-last, "
        "conv-transposed, experts, experts-transposed, groups:32, parts:q,k,v. May be repeated.",
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", metavar="KEY", help="Key of the state dict in a torch file, such as model.state_dict. Found by default."
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=MOST_THREADS, help="CPU threads; by default torch's number.")
]

INTERRUPTED = 130
PIPED_WIDTH = 160
WRONG_USE: Any = typer.BadParameter.__mro__[1]
"""The exception that typer raises for every argument that does not parse; the class has no public name."""


class _Terminal(Console):
    """A console that escapes control characters, so that names in files cannot send escape sequences or extra lines."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(one) if isinstance(one, str) else one for one in objects), **options)


def to_stdout() -> Console:
    """The console for results; silent with `--quiet`. Without a terminal it is wide enough that no table is cut."""
    return _Terminal(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False, emoji=False, quiet=_quiet)


def set_quiet(quiet: bool) -> None:
    """Turn results and progress off or on; errors and JSON are always printed."""
    global _quiet
    _quiet = quiet


def shows_progress(*, as_json: bool) -> bool:
    """Whether a command shows its progress on standard error."""
    return not (as_json or _quiet)


def to_stderr() -> Console:
    """The console for messages and progress."""
    return _Terminal(stderr=True, highlight=False, emoji=False)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Decorate a command: errors become messages, with exit code 1 (failed job), 2 (wrong use), 130 (Ctrl-C) or 143 (SIGTERM)."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        as_json = bool(kwargs.get("as_json"))
        try:
            try:
                function(*args, **kwargs)
            except Exception as error:
                # On its way through foreign code and cleanups a signal can become any error, such as a bad file descriptor.
                if _signals:
                    raise (SystemExit(TERMINATED) if signal.SIGTERM in _signals else KeyboardInterrupt) from error
                raise
        except KeyboardInterrupt:
            fail(f"interrupted; {_left_behind(kwargs.get('resume'))}", INTERRUPTED, as_json=as_json)
        except MemoryError:
            fail("out of memory; close other programs or use fewer --threads", 1, as_json=as_json)
        except ImportError as error:
            fail(str(error), 2, as_json=as_json)
        except OSError as error:
            fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 1, as_json=as_json)
        except SystemExit as error:
            if not ends_the_process(error):
                raise
            fail(f"stopped by SIGTERM; {_left_behind(kwargs.get('resume'))}", TERMINATED, as_json=as_json)
        except RuntimeError as error:
            from bisparse.process_group import OtherRankError

            if not isinstance(error, OtherRankError):
                raise
            # The rank that failed prints the JSON.
            fail(str(error), 1)
        except ValueError as error:
            from bisparse.checkpoint import CheckpointError
            from bisparse.pruning.journal import JournalError
            from bisparse.verification import PatternError

            # Other ValueErrors are arguments that do not fit: a pattern, a filter that matches nothing.
            fail(str(error), 1 if isinstance(error, CheckpointError | JournalError | PatternError) else 2, as_json=as_json)

    return guarded


def command_line() -> list[str]:
    """The arguments that the running command was called with."""
    return list(_given)


def refuse_given(why: str, *options: str) -> None:
    """Refuse options that were given to the running command, but would have no effect."""
    if given := [option for option in options if option in _options]:
        raise typer.BadParameter(why, param_hint=given[0])


class Commands(TyperGroup):
    """The commands of an app; with `--json`, wrong use is reported as JSON too."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        given = list(args)
        context = super().make_context(info_name, args, parent, **extra)
        _given[:] = given
        _options.clear()
        _complete.clear()
        return context

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, found, rest = super().resolve_command(ctx, args)
        for parameter in () if found is None else found.params:
            _watch(parameter)
        return name, found, rest

    def invoke(self, ctx: Any) -> Any:
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except WRONG_USE as error:
            error.message = "\n".join(map(printable, error.message.split("\n")))  # it may quote what was given
            if as_json:
                print_json({"ok": False, "error": error.format_message(), "exit_code": error.exit_code})
            raise


def _watch(parameter: Any) -> None:
    """Note that a parameter is given, and refuse an empty text: no option has a use for it, and a path would be the folder."""
    process = parameter.process_value
    if hasattr(process, "watches"):
        return

    def checked(ctx: Any, value: Any) -> Any:
        if ctx.get_parameter_source(parameter.name).name != "DEFAULT":
            _options.update(parameter.opts)
        if value == "" or (isinstance(value, list | tuple) and "" in value):
            raise typer.BadParameter("it is empty", ctx, parameter)
        return process(ctx, value)

    checked.watches = True  # type: ignore[attr-defined]
    parameter.process_value = checked


def note_complete(place: Path) -> None:
    """Note an output that stays if a later step of the command fails or is interrupted; messages name it."""
    if place not in _complete:
        _complete.append(place)


def _outputs() -> str:
    names = ", ".join(map(str, _complete))
    return (
        f"{names} {'is' if len(_complete) == 1 else 'are'} complete; the same command with --resume FOLDER continues from there"
    )


def _left_behind(journal: Any) -> str:
    """A sentence on what an interrupted job left on disk: outputs that are complete or, with --resume, its journal."""
    if _complete:
        return f"{_outputs()}; nothing else was left behind"
    if journal is None or not journal.exists():
        return "nothing was left behind"
    return f"the layers finished so far are kept in {journal}, and the same command continues from there; nothing else was left"


def fail(message: str, code: int, *, as_json: bool = False) -> NoReturn:
    """Print an error and exit with this code."""
    if _complete and _outputs() not in message:
        message = f"{message} ({_outputs()})"
    to_stderr().print(f"[bold red]bisparse:[/] {escape(message)}", soft_wrap=True)
    if as_json:
        print_json({"ok": False, "error": message, "exit_code": code})
    raise typer.Exit(code)


def run_app(app: typer.Typer) -> None:
    """Run an app as a process. SIGTERM unwinds the stack like Ctrl-C, so that no partial output is left behind."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        # A launcher may send it again, which must not interrupt the cleanup.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _signals.append(number)
        raise SystemExit(TERMINATED)

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        _signals.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of the pipe, such as `head`, has closed it. Python would report that once more when it flushes at exit.
        sys.stderr.close()
        sys.exit(1)


def print_json(content: object) -> None:
    """Print one JSON document on standard output; numbers that JSON lacks, NaN and infinity, are null."""
    typer.echo(json.dumps(_finite(content), indent=2, default=str, allow_nan=False))


def _finite(content: object) -> object:
    if isinstance(content, Mapping):
        return {key: _finite(one) for key, one in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(one) for one in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def is_function(source: str | Path) -> bool:
    """Whether a source is given as ``module:function``; what exists is a file or folder, whatever its name."""
    return FUNCTION.fullmatch(str(source)) is not None and not Path(source).exists()


def print_written(target: Path, *, dense: bool = False) -> None:
    """Print the place of a folder, and a command line that checks its masks, or looks at it if it is `dense`."""
    command = shlex.join(["bisparse", "info" if dense else "verify", str(target)])
    to_stdout().print(f"Written to {target}. {'Look at' if dense else 'Check'} it: {command}", markup=False, soft_wrap=True)


def set_threads(threads: int | None) -> None:
    """Set the number of threads of torch, which bisparse's kernels use too."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def parse_pattern_option(text: str, hint: str = "--pattern") -> Structure:
    """The pattern of a text from the command line; wrong use if it is not one."""
    from bisparse.pattern import parse_pattern

    try:
        return parse_pattern(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=hint) from error


def parse_layout_options(given: list[str] | None) -> dict[str, str]:
    """Layouts by layer, from texts GLOB=LAYOUT of the command line; wrong use if one is malformed."""
    from bisparse.layers import parse_layouts

    layouts: dict[str, str] = {}
    for text in given or ():
        name, _, layout = text.rpartition("=")
        if not name:
            raise typer.BadParameter(f"{text!r}: expected GLOB=LAYOUT, such as '*.experts.*=experts'", param_hint="--layout")
        layouts[name] = layout
    try:
        parse_layouts(layouts)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--layout") from error
    return layouts


def parse_solver_option(name: str | None) -> Solver | None:
    """The solver of this name; wrong use if there is none."""
    from bisparse.solvers import parse_solver

    if name is None:
        return None
    try:
        return parse_solver(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--solver") from error


def parse_source(name: str | Path, hint: str) -> Path:
    """The path of a checkpoint: the given one, or the model of this name in the local Hugging Face cache; otherwise wrong use."""
    from bisparse.checkpoint.hub import find_source
    from bisparse.errors import CheckpointError

    try:
        return find_source(name)
    except CheckpointError as error:
        raise typer.BadParameter(str(error), param_hint=hint) from error


@contextmanager
def progress_bar(*, show: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A function (what, done, total) that shows progress on standard error: a bar, or lines with the time without a terminal."""
    if not show or _quiet:
        yield lambda what, done, total: None
        return
    if not sys.stderr.isatty():
        yield ProgressLines()
        return
    columns = (
        BarColumn(bar_width=24, table_column=Column(min_width=24)),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=to_stderr(), transient=True) as bar:
        task = bar.add_task("", total=None)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=escape(printable(what)), completed=done, total=total)

        yield advance


def print_coverage(console: Console, coverage: str) -> None:
    """Print how much of the model was pruned; a warning is yellow."""
    if coverage:
        console.print(coverage, style="yellow" if coverage.startswith("Warning") else None, markup=False, soft_wrap=True)
