"""One-shot pruning: one file a method, one line here each."""

from bisparse.pruning.adaprune import AdaPrune
from bisparse.pruning.adaprune_gradient import GradientAdaPrune
from bisparse.pruning.alps import ALPS
from bisparse.pruning.batch_norm import fold_batch_norms_, reestimate_batch_norms_
from bisparse.pruning.bias import BiasCorrection, MatchMoments
from bisparse.pruning.block_reconstruction import BlockReconstruction
from bisparse.pruning.convert import convert_, fitting_patterns
from bisparse.pruning.journal import remove_journal
from bisparse.pruning.magnitude import Magnitude
from bisparse.pruning.mean_absorption import MeanAbsorption, absorb_mean
from bisparse.pruning.method import LayerProblem, Method, Pruned
from bisparse.pruning.permutation import PermutationReport, permute_
from bisparse.pruning.prune import prune_
from bisparse.pruning.ranks import OtherRankError
from bisparse.pruning.regrow import Regrow
from bisparse.pruning.sparsegpt import SparseGPT
from bisparse.pruning.statistics import CalibrationError, Statistic, Statistics
from bisparse.pruning.violation import PatternViolation, predicted_violation, sparsest_pattern, violation
from bisparse.pruning.wanda import Wanda

__all__ = [
    "ALPS",
    "AdaPrune",
    "BiasCorrection",
    "BlockReconstruction",
    "CalibrationError",
    "GradientAdaPrune",
    "LayerProblem",
    "Magnitude",
    "MatchMoments",
    "MeanAbsorption",
    "Method",
    "OtherRankError",
    "PatternViolation",
    "PermutationReport",
    "Pruned",
    "Regrow",
    "SparseGPT",
    "Statistic",
    "Statistics",
    "Wanda",
    "absorb_mean",
    "convert_",
    "fitting_patterns",
    "fold_batch_norms_",
    "permute_",
    "predicted_violation",
    "prune_",
    "reestimate_batch_norms_",
    "remove_journal",
    "sparsest_pattern",
    "violation",
]
