"""A job in a process of its own that needs no import of torch: a fork of this one."""

import os
import sys
from collections.abc import Callable


def in_child(job: Callable[[], None]) -> int:
    """Run a job in a fork of this process; 0 if it ended well, minus the signal if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            job()
        except BaseException as error:  # noqa: BLE001, a child must not run on into the tests of its parent
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)
    return exit_code(child)


def start_command(*arguments: object, stdout: int, stderr: int, prepare: Callable[[], object] | None = None) -> int:
    """Start ``bisparse ARGUMENTS`` in a fork that writes to these descriptors, after `prepare` has run there; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv = ["bisparse", *map(str, arguments)]
        if prepare is not None:
            prepare()
        from bisparse.__main__ import main

        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:  # noqa: BLE001, a child must not run on into the tests of its parent
        sys.stderr.write(f"Traceback: {error!r}\n")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(child: int) -> int:
    """Wait for a fork: its exit code, minus the signal if it was killed."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
