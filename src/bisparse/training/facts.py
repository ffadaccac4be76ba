"""Figures of a layer in training, computed only from its current weight."""

from __future__ import annotations

import torch

from bisparse._solve import solve
from bisparse.results import LayerResult, checksum_of, has_bound
from bisparse.training.layer import SparseLayer
from bisparse.training.mask_search import Score
from bisparse.training.parametrizations import SoftThreshold

__all__ = ["layer_facts"]


@torch.no_grad()
def layer_facts(layer: SparseLayer, score: Score) -> LayerResult:
    """Density and, for a dynamic mask, the fraction of the score that it keeps and its gap to the best mask of this weight.

    The gap is proved by the certificate of a new exact search, whichever solver the run uses. These figures are None for a
    static mask, which does not follow scores, and in a dense phase, which has no mask, as a note says.
    """
    weight = layer.full_weight()
    own = layer.parametrization
    forward = weight if own is None or own.dense else own(weight)
    retained = value = gap = scores = None
    if own is not None and not own.dense:
        scores = score(layer.name, weight)
    if scores is not None and bool(torch.isfinite(scores).all()):
        mask = forward != 0 if isinstance(own, SoftThreshold) else layer.mask
        value = float(torch.where(mask, scores, 0).sum(dtype=torch.float64))
        total = float(scores.sum(dtype=torch.float64))
        retained = value / total if total > 0 else 1.0
        solution = solve(scores, layer.pattern, layout=layer.layout)
        if has_bound(solution):
            bound = solution.bound if scores.numel() else 0.0
            gap = max(0.0, bound - value) / bound if bound > 0 else 0.0
    return LayerResult(
        name=layer.name,
        parameter=layer.key,
        shape=tuple(weight.shape),
        dtype=str(weight.dtype).removeprefix("torch."),
        layout=layer.layout,
        pattern=str(layer.pattern),
        density=float((forward != 0).double().mean()),
        retained=retained,
        gap=gap,
        value=value,
        time_s=0.0,
        note="dense: the run is in a dense phase, which has no mask" if own is not None and own.dense else "",
        checksum=checksum_of(forward),
    )
