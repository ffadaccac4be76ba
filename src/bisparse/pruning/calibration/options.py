"""Options of a pruning job other than its layers and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bisparse.arguments import check_flag, is_number
from bisparse.pruning.calibration.finished_block import BlockFitter, NetworkFitter
from bisparse.solvers import Exact, Solver

__all__ = ["EXPERT_FLOOR", "Options", "Order"]

EXPERT_FLOOR = 2.0
"""Experts that fewer tokens per input of their matrix are routed to are calibrated on all tokens.

On synthetic tokens (`benchmarks/pruning/expert_tokens.py`) all tokens gave smaller errors on routed tokens than 2 routed tokens
per input did: 0.36 against 0.40 for SparseGPT at 2:4. At 4 the difference was 0.02.
"""

Order = Literal["sequential", "parallel"]


@dataclass(frozen=True)
class Options:
    """The arguments that `prune_`, `convert_` and `calibrate` share; `prune_` says what each means.

    Raises:
        ValueError: an unknown order, a device that cannot hold numbers, or a reconstruction in the order "parallel".
    """

    solver: Solver = field(default_factory=Exact)
    order: Order = "sequential"
    reconstruction: BlockFitter | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    device: torch.device | str | None = None
    resume: str | Path | None = None
    keep_journal: bool = False
    progress: bool | None = None
    expert_floor: float = EXPERT_FLOOR
    network: NetworkFitter | None = None
    """How the whole network is fitted at the end."""

    def __post_init__(self) -> None:
        check_flag("keep_journal", self.keep_journal)
        if self.progress is not None:
            check_flag("progress", self.progress)
        if self.order not in ("sequential", "parallel"):
            raise ValueError(f"order={self.order!r}: expected 'sequential' or 'parallel'")
        if self.reconstructs and self.order != "sequential":
            raise ValueError(f"order={self.order!r}: blocks and networks are reconstructed in the order 'sequential' only")
        floor = self.expert_floor
        if not is_number(floor) or not floor >= 0 or (isinstance(floor, int) and floor >= 1 << 63):
            raise ValueError(f"expert_floor={floor!r:.40}: expected a number of tokens per input, 0 or more")
        if self.device is not None:
            try:
                kind = torch.device(self.device).type
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"device={self.device!r} is no device: {str(error).splitlines()[0]}") from error
            if kind == "meta":
                raise ValueError(f"device={self.device!r} holds no numbers: expected a device to run blocks on, such as 'cuda'")

    @property
    def reconstructs(self) -> bool:
        """Whether blocks, or the network, are fitted as a whole."""
        return self.reconstruction is not None or self.network is not None
