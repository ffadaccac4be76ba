"""The solvers of the transposable mask problem: one file each, one line here each."""

from bisparse.solvers.exact import Exact
from bisparse.solvers.solver import Guarantee, Solver

__all__ = ["Exact", "Guarantee", "Solver"]
