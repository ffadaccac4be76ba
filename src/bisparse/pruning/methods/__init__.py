"""The one-shot pruning methods: one file each, one line in `METHODS` each."""

from difflib import get_close_matches
from typing import Any

from bisparse.pruning.methods.adaprune import AdaPrune
from bisparse.pruning.methods.adaprune_gradient import GradientAdaPrune
from bisparse.pruning.methods.alps import ALPS
from bisparse.pruning.methods.base import Method
from bisparse.pruning.methods.bias_correction import BiasCorrection, MatchMoments
from bisparse.pruning.methods.magnitude import Magnitude
from bisparse.pruning.methods.mean_absorption import MeanAbsorption
from bisparse.pruning.methods.regrow import Regrow
from bisparse.pruning.methods.sparsegpt import SparseGPT
from bisparse.pruning.methods.wanda import Wanda

__all__ = ["METHODS", "parse_method"]

METHODS: dict[str, type[Method]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "adaprune": AdaPrune,
    "alps": ALPS,
    "adaprune-gradient": GradientAdaPrune,
    "mean-absorption": MeanAbsorption,
    "bias-correction": BiasCorrection,
    "match-moments": MatchMoments,
    "regrow": Regrow,
}
"""Every method by the name that Python functions and the command line take."""


def parse_method(method: str | Method, **settings: Any) -> Method:
    """A method from its name in `METHODS`, with the given settings; a `Method` is returned unchanged.

    Raises:
        ValueError: no method has that name, or it is neither a name nor a method.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method](**settings)
    close = get_close_matches(method.lower().replace("_", "-"), METHODS, n=1) if isinstance(method, str) else []
    hint = f"did you mean {close[0]!r}? " if close else ""
    if isinstance(method, type):
        hint = f"it is a class; did you mean {method.__name__}()? "
    raise ValueError(f"method={method!r:.60}: {hint}expected a Method or one of {', '.join(map(repr, METHODS))}")
