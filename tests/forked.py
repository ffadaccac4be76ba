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
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
