"""The solvers of the transposable mask problem: one file each, one line here each."""

from bisparse.solvers.exact import Exact
from bisparse.solvers.greedy import Greedy
from bisparse.solvers.min_cost_flow import MinCostFlow
from bisparse.solvers.sinkhorn import Sinkhorn
from bisparse.solvers.solver import Guarantee, Solver
from bisparse.solvers.two_approximation import TwoApproximation

__all__ = ["Exact", "Greedy", "Guarantee", "MinCostFlow", "Sinkhorn", "Solver", "TwoApproximation"]
