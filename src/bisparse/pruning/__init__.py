"""One-shot pruning: one file a method, one line here each."""

from bisparse.pruning.adaprune import AdaPrune
from bisparse.pruning.magnitude import Magnitude
from bisparse.pruning.method import LayerProblem, Method, Pruned
from bisparse.pruning.prune import prune_
from bisparse.pruning.statistics import CalibrationError, Statistic, Statistics
from bisparse.pruning.wanda import Wanda

__all__ = [
    "AdaPrune",
    "CalibrationError",
    "LayerProblem",
    "Magnitude",
    "Method",
    "Pruned",
    "Statistic",
    "Statistics",
    "Wanda",
    "prune_",
]
