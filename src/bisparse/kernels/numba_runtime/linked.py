"""Functions that only kernels call: their code is linked into each kernel and optimised there, and not compiled alone.

numba optimises every function, makes machine code of it and stores that before it compiles the function that calls it. For
functions that nothing else calls this is a quarter of the time that compiling a kernel takes.
"""

from __future__ import annotations

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

__all__ = ["LinkedCompiler"]


class _LinkedLibrary(JITCodeLibrary):  # type: ignore[misc]
    """The code of one function, for other libraries to link.

    It is its own `codegen`, which numba asks to set a variable in the machine code, of which there is none.
    """

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0

    @property
    def codegen(self) -> _LinkedLibrary:
        return self

    def set_env(self, env_name: str, env: Any) -> None:
        pass


class LinkedCompiler(Compiler):  # type: ignore[misc]
    """A `pipeline_class` of `numba.njit`. Calling such a function from Python would crash."""

    def define_pipelines(self) -> Any:
        self.state.library = _LinkedLibrary(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return super().define_pipelines()
