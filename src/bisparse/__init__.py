"""Neural networks that are sparse both ways: N:M masks, provably optimal, that hold on W and on its transpose."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bisparse._solve import solve
    from bisparse.accelerate import AccelerationReport, accelerate_, advise
    from bisparse.checkpoint import CheckpointError, load, load_masks, prune_checkpoint, save, verify_checkpoint
    from bisparse.diversity import MaskDiversity, hardware, mask_diversity
    from bisparse.pattern import Paired, Pattern, Sequential, Structure, Unstructured
    from bisparse.pruning import ALPS, AdaPrune, Magnitude, Method, SparseGPT, Wanda, convert_, prune_, violation
    from bisparse.report import plot_diversity, write_comparison, write_report
    from bisparse.results import LayerResult, PruneReport
    from bisparse.solution import Certificate, CertificateError, PatternError, Solution, Verification, Violation, verify
    from bisparse.solvers import Exact, Greedy, MinCostFlow, Sinkhorn, Solver, TwoApproximation
    from bisparse.training import Schedule, Sparsity, finalize_, sparsify_

__version__ = "0.1.0"

__all__ = [
    "ALPS",
    "AccelerationReport",
    "AdaPrune",
    "Certificate",
    "CertificateError",
    "CheckpointError",
    "Exact",
    "Greedy",
    "LayerResult",
    "Magnitude",
    "MaskDiversity",
    "Method",
    "MinCostFlow",
    "Paired",
    "Pattern",
    "PatternError",
    "PruneReport",
    "Schedule",
    "Sequential",
    "Sinkhorn",
    "Solution",
    "Solver",
    "SparseGPT",
    "Sparsity",
    "Structure",
    "TwoApproximation",
    "Unstructured",
    "Verification",
    "Violation",
    "Wanda",
    "accelerate_",
    "advise",
    "convert_",
    "finalize_",
    "hardware",
    "load",
    "load_masks",
    "mask_diversity",
    "plot_diversity",
    "prune_",
    "prune_checkpoint",
    "save",
    "solve",
    "sparsify_",
    "verify",
    "verify_checkpoint",
    "violation",
    "write_comparison",
    "write_report",
]

# Names are imported when they are first used: `bisparse --help` need not wait for torch.
_MODULES = (
    "diversity",
    "pattern",
    "solution",
    "_solve",
    "solvers",
    "results",
    "checkpoint",
    "pruning",
    "training",
    "accelerate",
    "report",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module_name in _MODULES:
            module = import_module(f"bisparse.{module_name}")
            if name in module.__all__:
                globals()[name] = getattr(module, name)
                return globals()[name]
    if name in _MODULES:
        return import_module(f"bisparse.{name}")
    raise AttributeError(f"module 'bisparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
