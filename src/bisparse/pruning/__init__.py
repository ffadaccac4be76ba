"""One-shot pruning: one file a method, one line here each."""

from bisparse.pruning.magnitude import Magnitude
from bisparse.pruning.method import LayerProblem, Method, Pruned, Statistic, Statistics
from bisparse.pruning.prune import prune_

__all__ = ["LayerProblem", "Magnitude", "Method", "Pruned", "Statistic", "Statistics", "prune_"]
