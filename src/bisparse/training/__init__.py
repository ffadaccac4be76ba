"""Sparse training: static and dynamic masks by two lines in any training loop."""

from bisparse.training.decay import AnnealedDecay, FixedDecay
from bisparse.training.distill import Distillation
from bisparse.training.finalize import finalize_, plain_state_dict
from bisparse.training.live_table import LiveTable
from bisparse.training.lora import MergedAdapter, merge_lora_, merged_weight
from bisparse.training.masked_lora import MaskedLoRA, add_masked_lora_
from bisparse.training.masked_peft import mask_lora_
from bisparse.training.metrics import MaskChange
from bisparse.training.mvue import MVUELinear, mvue_2_4
from bisparse.training.parameter_groups import parameter_groups
from bisparse.training.rng_state import random_state, restore_random_state
from bisparse.training.rules import RULES, GradientRule
from bisparse.training.schedule import Phase, Schedule
from bisparse.training.sparsify import sparsify_
from bisparse.training.sparsity import Sparsity

__all__ = [
    "RULES",
    "AnnealedDecay",
    "Distillation",
    "FixedDecay",
    "GradientRule",
    "LiveTable",
    "MVUELinear",
    "MaskChange",
    "MaskedLoRA",
    "MergedAdapter",
    "Phase",
    "Schedule",
    "Sparsity",
    "add_masked_lora_",
    "finalize_",
    "mask_lora_",
    "merge_lora_",
    "merged_weight",
    "mvue_2_4",
    "parameter_groups",
    "plain_state_dict",
    "random_state",
    "restore_random_state",
    "sparsify_",
]
