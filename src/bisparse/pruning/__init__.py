"""One-shot pruning of models: `prune_`, `convert_`, the methods and their helpers."""

from bisparse.process_group import OtherRankError
from bisparse.pruning.batch_norm import fold_batch_norms_, reestimate_batch_norms_
from bisparse.pruning.block_reconstruction import BlockReconstruction
from bisparse.pruning.budget import Budget
from bisparse.pruning.calibration.statistics import CalibrationError, Statistic, Statistics
from bisparse.pruning.channels.permute import PermutationReport, permute_
from bisparse.pruning.convert import convert_, fitting_patterns
from bisparse.pruning.journal import remove_journal
from bisparse.pruning.methods import METHODS, parse_method
from bisparse.pruning.methods.adaprune import AdaPrune
from bisparse.pruning.methods.adaprune_gradient import GradientAdaPrune
from bisparse.pruning.methods.alps import ALPS
from bisparse.pruning.methods.base import LayerProblem, Method, Pruned
from bisparse.pruning.methods.bias_correction import BiasCorrection, MatchMoments
from bisparse.pruning.methods.magnitude import Magnitude
from bisparse.pruning.methods.mean_absorption import MeanAbsorption, absorb_mean
from bisparse.pruning.methods.regrow import Regrow
from bisparse.pruning.methods.sparsegpt import SparseGPT
from bisparse.pruning.methods.wanda import Wanda
from bisparse.pruning.network_reconstruction import NetworkReconstruction
from bisparse.pruning.prune import prune_
from bisparse.pruning.violation import PatternViolation, predicted_violation, sparsest_pattern, violation

__all__ = [
    "ALPS",
    "METHODS",
    "AdaPrune",
    "BiasCorrection",
    "BlockReconstruction",
    "Budget",
    "CalibrationError",
    "GradientAdaPrune",
    "LayerProblem",
    "Magnitude",
    "MatchMoments",
    "MeanAbsorption",
    "Method",
    "NetworkReconstruction",
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
    "parse_method",
    "permute_",
    "predicted_violation",
    "prune_",
    "reestimate_batch_norms_",
    "remove_journal",
    "sparsest_pattern",
    "violation",
]
