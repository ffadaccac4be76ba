"""Mean absorption: the kept weights of a group take over the sum of its pruned ones.

    w'_i = m_i * (w_i + (sum of the pruned w of the group) / (number kept in the group))

The sum of the group is preserved, and with it the output for inputs that share a mean, as after a ReLU. On inputs with mean
zero it adds error; so it is applied only to output rows whose calibration error it lowers.
Source: Hubara et al., NeurIPS 2021, arXiv 2102.08124, section 5. Departure: the decision by calibration.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bisparse.arguments import check_dense, check_flag
from bisparse.layers import dtype_reason
from bisparse.pattern import Structure, parse_pattern
from bisparse.pruning.calibration.statistics import Statistic
from bisparse.pruning.methods.base import LayerProblem, Method, Pruned, method_setting_
from bisparse.pruning.methods.magnitude import Magnitude

__all__ = ["MeanAbsorption", "absorb_mean"]


def absorb_mean(
    kept: Float[Tensor, "*B O I"], dense: Float[Tensor, "*B O I"], mask: Bool[Tensor, "*B O I"], pattern: str | Structure
) -> Float[Tensor, "*B O I"]:
    """Distribute the sum of each group's pruned weights equally over its kept ones. A group with nothing kept stays zero.

    Args:
        kept: weights on the mask. dense: weights before pruning. pattern: its M is the group; without one, the whole row.

    >>> import torch
    >>> from bisparse import Pattern
    >>> dense = torch.tensor([[4.0, 3.0, 1.0, 0.5]])
    >>> mask = torch.tensor([[True, True, False, False]])
    >>> absorb_mean(dense * mask, dense, mask, Pattern(2, 4)).tolist()
    [[4.75, 3.75, 0.0, 0.0]]

    Raises:
        ValueError: tensors of other shapes or dtypes; a mask that is not bool.
    """
    for name, tensor in (("kept", kept), ("dense", dense), ("mask", mask)):
        check_dense(name, tensor)
        if tensor.ndim < 2 or tensor.shape != dense.shape:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)}: expected matrices (..., O, I), all of the shape {tuple(dense.shape)}"
            )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask of dtype {mask.dtype}: expected a bool tensor, True = kept")
    for name, tensor in (("kept", kept), ("dense", dense)):
        if (reason := dtype_reason(tensor)) is not None:
            raise ValueError(f"{name}: {reason}")
    pattern = parse_pattern(pattern)
    columns = mask.shape[-1]
    m = getattr(pattern, "m", columns)

    def grouped(tensor: Tensor) -> Tensor:
        padded: Tensor = torch.nn.functional.pad(tensor, (0, -columns % m))
        return padded.view(*padded.shape[:-1], -1, m)

    lost = grouped(dense * ~mask).sum(-1, keepdim=True)
    number = grouped(mask).sum(-1, keepdim=True)
    share = torch.where(number > 0, lost / number.clamp(min=1), 0.0)
    absorbed: Tensor = ((grouped(kept) + share) * grouped(mask)).flatten(-2)[..., :columns]
    return absorbed


@dataclass(frozen=True)
class MeanAbsorption(Method):
    """Mean absorption on the mask that another method selects.

    Args:
        selection: the method that chooses the mask, or its name.
        always: absorb in every row, as the paper's code does, without a decision by calibration; then no data is needed.
    """

    selection: Method = field(default_factory=Magnitude)
    always: bool = False

    def __post_init__(self) -> None:
        method_setting_(self, "selection")
        check_flag("always", self.always)

    @property
    def name(self) -> str:
        return f"{self.selection.name} + mean absorption"

    @property
    def needs(self) -> frozenset[Statistic]:
        return self.selection.needs if self.always else self.selection.needs | {Statistic.GRAM}

    def prune(self, problem: LayerProblem) -> Pruned:
        selected = self.selection.prune(problem)
        mask = selected.solution.mask
        before = problem.weight * mask if selected.weight is None else selected.weight
        after = absorb_mean(before, problem.weight, mask, problem.pattern)
        if self.always and not (problem.statistics and problem.statistics.columns):  # nothing to measure an error on
            return Pruned(selected.solution, after, selected.bias)
        whole = problem.least_squares(centred=False)
        plain, absorbed = problem.rows(before).float(), problem.rows(after).float()
        note = "absorbed in every row"
        if not self.always:
            helps = whole.row_error(absorbed) < whole.row_error(plain)
            absorbed = torch.where(helps[:, :, None], absorbed, plain)
            note = f"absorbed in {int(helps.sum())} of {helps.numel()} rows"
        return Pruned(
            selected.solution,
            problem.matrices(absorbed),
            selected.bias,
            error=whole.error(absorbed),
            error_before=whole.error(whole.weight * problem.rows(mask)),
            note=note,
        )
