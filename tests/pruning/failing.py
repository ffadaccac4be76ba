"""A method that fails in the middle of a job."""

from __future__ import annotations

from collections.abc import Callable

from bisparse.pruning import AdaPrune, Method, Pruned
from bisparse.pruning.methods.base import LayerProblem


class Failing(Method):
    """AdaPrune that raises at the n-th layer; to a journal it is AdaPrune."""

    def __init__(self, at: int, error: Callable[[], BaseException]) -> None:
        self.inner, self.at, self.error, self.count = AdaPrune(), at, error, 0

    def __repr__(self) -> str:
        return repr(self.inner)

    @property
    def needs(self):
        return self.inner.needs

    def prune(self, problem: LayerProblem) -> Pruned:
        self.count += 1
        if self.count == self.at:
            raise self.error()
        return self.inner.prune(problem)
