"""The solvers of the transposable mask problem: one file each, one line in `SOLVERS` each."""

from difflib import get_close_matches

from bisparse.solvers.exact import Exact
from bisparse.solvers.greedy import Greedy
from bisparse.solvers.min_cost_flow import MinCostFlow
from bisparse.solvers.sinkhorn import Sinkhorn
from bisparse.solvers.solver import Guarantee, Solver
from bisparse.solvers.two_approximation import TwoApproximation

__all__ = ["SOLVERS", "Exact", "Greedy", "Guarantee", "MinCostFlow", "Sinkhorn", "Solver", "TwoApproximation", "parse_solver"]

SOLVERS: dict[str, type[Solver]] = {
    "exact": Exact,
    "greedy": Greedy,
    "min-cost-flow": MinCostFlow,
    "sinkhorn": Sinkhorn,
    "two-approximation": TwoApproximation,
}
"""Every solver by the name that Python functions and the command line take."""

EXACT = Exact()


def parse_solver(solver: str | Solver | None) -> Solver:
    """A solver from its name in `SOLVERS`; a `Solver` is returned unchanged, and None gives `Exact()`, the default.

    Raises:
        ValueError: no solver has that name, or it is neither a name nor a solver.
    """
    if solver is None:
        return EXACT
    if isinstance(solver, Solver):
        return solver
    if isinstance(solver, str) and solver in SOLVERS:
        return SOLVERS[solver]()
    close = get_close_matches(str(solver).lower().replace("_", "-"), SOLVERS, n=1) if isinstance(solver, str) else []
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"solver={solver!r:.60}: {hint}expected a Solver or one of {', '.join(map(repr, SOLVERS))}")
