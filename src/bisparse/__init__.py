"""Neural networks that are sparse both ways: N:M masks, provably optimal, that hold on W and on its transpose.

What most programs need is here. The rest is in submodules that are available after ``import bisparse``: solvers in
`bisparse.solvers`, pruning methods in `bisparse.pruning`, and so on.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bisparse._solve import solve
    from bisparse.accelerate import accelerate_
    from bisparse.checkpoint import load, prune_checkpoint, save, verify_checkpoint
    from bisparse.diversity import mask_diversity
    from bisparse.errors import CheckpointError
    from bisparse.pattern import Pattern
    from bisparse.pruning import ALPS, AdaPrune, Magnitude, SparseGPT, Wanda, convert_, prune_, violation
    from bisparse.report import write_report
    from bisparse.solution import CertificateError, Solution
    from bisparse.training import Schedule, Sparsity, finalize_, sparsify_
    from bisparse.verification import PatternError, verify

__version__ = "0.1.0"

__all__ = [
    "ALPS",
    "AdaPrune",
    "CertificateError",
    "CheckpointError",
    "Magnitude",
    "Pattern",
    "PatternError",
    "Schedule",
    "Solution",
    "SparseGPT",
    "Sparsity",
    "Wanda",
    "accelerate_",
    "convert_",
    "finalize_",
    "load",
    "mask_diversity",
    "prune_",
    "prune_checkpoint",
    "save",
    "solve",
    "sparsify_",
    "verify",
    "verify_checkpoint",
    "violation",
    "write_report",
]

# Names are imported when they are first used: `bisparse --help` does not wait for torch.
_HOMES = (
    "pattern",
    "solution",
    "verification",
    "_solve",
    "pruning",
    "training",
    "accelerate",
    "checkpoint",
    "diversity",
    "report",
)
_SUBMODULES = ("solvers", "results", "layers", "scores", "tiles", "quantization", "export", *_HOMES)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = import_module(f"bisparse.{home}")
            if name in module.__all__:
                globals()[name] = getattr(module, name)
                return globals()[name]
    if name in _SUBMODULES:
        return import_module(f"bisparse.{name}")
    raise AttributeError(f"module 'bisparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES} - {"_solve"})
