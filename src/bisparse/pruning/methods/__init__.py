"""The one-shot pruning methods: one file each, one line in `METHODS` each."""

from bisparse.pruning.methods.adaprune import AdaPrune
from bisparse.pruning.methods.adaprune_gradient import GradientAdaPrune
from bisparse.pruning.methods.alps import ALPS
from bisparse.pruning.methods.base import METHODS, parse_method
from bisparse.pruning.methods.bias_correction import BiasCorrection, MatchMoments
from bisparse.pruning.methods.magnitude import Magnitude
from bisparse.pruning.methods.mean_absorption import MeanAbsorption
from bisparse.pruning.methods.regrow import Regrow
from bisparse.pruning.methods.sparsegpt import SparseGPT
from bisparse.pruning.methods.wanda import Wanda

__all__ = ["METHODS", "parse_method"]

METHODS.update(
    {
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
)
