"""Options of a pruning job other than its layers and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bisparse.arguments import check_flag
from bisparse.pruning.calibration.finished_block import BlockFitter
from bisparse.solvers import Exact, Solver

__all__ = ["Options", "Order"]

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

    def __post_init__(self) -> None:
        check_flag("keep_journal", self.keep_journal)
        if self.progress is not None:
            check_flag("progress", self.progress)
        if self.order not in ("sequential", "parallel"):
            raise ValueError(f"order={self.order!r}: expected 'sequential' or 'parallel'")
        if self.reconstruction is not None and self.order != "sequential":
            raise ValueError(f"order={self.order!r}: blocks are reconstructed in the order 'sequential' only")
        if self.device is not None:
            try:
                kind = torch.device(self.device).type
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"device={self.device!r} is no device: {str(error).splitlines()[0]}") from error
            if kind == "meta":
                raise ValueError(f"device={self.device!r} holds no numbers: expected a device to run blocks on, such as 'cuda'")
