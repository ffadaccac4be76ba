"""The registry of layers, for models and files: what counts as a layer, its layout, the evidence for it, and why not."""

from bisparse.layers.files import NOT_NAMED, QUANTISED, FileEvidence, TensorInfo
from bisparse.layers.filters import (
    Filter,
    NameFilter,
    first_match,
    matches,
    matches_name,
    matrix_sides,
    parse_patterns,
    remainder_reason,
    sides,
)
from bisparse.layers.kinds import (
    Kind,
    Skipped,
    check_unheld,
    computed_reason,
    dtype_reason,
    held_reason,
    parse_layout,
    parse_layouts,
    why_dense,
)
from bisparse.layers.modules import Layer, find_layers
from bisparse.layers.names import BY_NAME, by_layer, head_reason, layer_name
from bisparse.layers.packed_numbers import quantisation_state, shows_packed_numbers
from bisparse.layers.shared_memory import memory_of, not_written

__all__ = [
    "BY_NAME",
    "NOT_NAMED",
    "QUANTISED",
    "FileEvidence",
    "Filter",
    "Kind",
    "Layer",
    "NameFilter",
    "Skipped",
    "TensorInfo",
    "by_layer",
    "check_unheld",
    "computed_reason",
    "dtype_reason",
    "find_layers",
    "first_match",
    "head_reason",
    "held_reason",
    "layer_name",
    "matches",
    "matches_name",
    "matrix_sides",
    "memory_of",
    "not_written",
    "parse_layout",
    "parse_layouts",
    "parse_patterns",
    "quantisation_state",
    "remainder_reason",
    "shows_packed_numbers",
    "sides",
    "why_dense",
]
