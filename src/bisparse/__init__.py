"""Neural networks that are sparse both ways: N:M masks, provably optimal, that hold on W and on its transpose."""

from bisparse.pattern import Paired, Pattern, Sequential, Structure, Unstructured
from bisparse.solution import Certificate, CertificateError, PatternError, Solution, Verification, Violation, verify
from bisparse.solve import choose_solver, solve
from bisparse.solvers import Exact, Greedy, MinCostFlow, Sinkhorn, Solver, TwoApproximation

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "CertificateError",
    "Exact",
    "Greedy",
    "MinCostFlow",
    "Paired",
    "Pattern",
    "PatternError",
    "Sequential",
    "Sinkhorn",
    "Solution",
    "Solver",
    "Structure",
    "TwoApproximation",
    "Unstructured",
    "Verification",
    "Violation",
    "choose_solver",
    "solve",
    "verify",
]
