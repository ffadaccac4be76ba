"""Neural networks that are sparse both ways: N:M masks, provably optimal, that hold on W and on its transpose."""

from bisparse.diversity import MaskDiversity, hardware, mask_diversity
from bisparse.pattern import Paired, Pattern, Sequential, Structure, Unstructured
from bisparse.solution import Certificate, CertificateError, PatternError, Solution, Verification, Violation, verify
from bisparse.solve import choose_solver, solve
from bisparse.solvers import Exact, Greedy, MinCostFlow, Sinkhorn, Solver, TwoApproximation
from bisparse.training import Schedule, Sparsity, finalize_, sparsify_

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "CertificateError",
    "Exact",
    "Greedy",
    "MaskDiversity",
    "MinCostFlow",
    "Paired",
    "Pattern",
    "PatternError",
    "Schedule",
    "Sequential",
    "Sinkhorn",
    "Solution",
    "Solver",
    "Sparsity",
    "Structure",
    "TwoApproximation",
    "Unstructured",
    "Verification",
    "Violation",
    "choose_solver",
    "finalize_",
    "hardware",
    "mask_diversity",
    "solve",
    "sparsify_",
    "verify",
]
