"""Checkpoints: prune, verify, save and load plain dense weights with zeros. All code about file formats is here."""

from bisparse.checkpoint.detect import Detected, detect_patterns
from bisparse.checkpoint.load import load
from bisparse.checkpoint.model_card import record_evaluation
from bisparse.checkpoint.prune import CheckpointPlan, plan_checkpoint, prune_checkpoint
from bisparse.checkpoint.save_load import save
from bisparse.checkpoint.sidecar import MASKS, SIDECAR, SampleTile, Sidecar, load_masks, read_sidecar
from bisparse.checkpoint.to_dense import to_dense
from bisparse.checkpoint.verify import verify_checkpoint
from bisparse.errors import CheckpointError

__all__ = [
    "MASKS",
    "SIDECAR",
    "CheckpointError",
    "CheckpointPlan",
    "Detected",
    "SampleTile",
    "Sidecar",
    "detect_patterns",
    "load",
    "load_masks",
    "plan_checkpoint",
    "prune_checkpoint",
    "read_sidecar",
    "record_evaluation",
    "save",
    "to_dense",
    "verify_checkpoint",
]
