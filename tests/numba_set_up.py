"""Imported by the process that ranks are forked from: what numba sets up before the first kernel takes a second."""

from numba.core.registry import cpu_target

cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()
