"""Parameter groups for Adam-type optimizers, in which sparse weights take larger steps.

With a fraction d of its inputs left, a unit's output changes only d times as much under a step of the same size per weight, so
the learning rate that is best for the dense network is too small for its sparse layers. Dividing theirs by d makes up for that.
Source: Dey, Bergsma, Hestness, "Sparse Maximal Update Parameterization", NeurIPS 2024 (arXiv 2405.15743).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bisparse.arguments import check_flag, check_number
from bisparse.training.sparsity import Sparsity
from bisparse.wrappers import check_module

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module, sparsity: Sparsity, lr: float, *, weight_decay: float = 0.0, scale: bool = True
) -> list[dict[str, Any]]:
    """A model's parameters that require gradients, as groups for Adam, AdamW and the like.

    ::

        sparsity = sparsify_(model, "4:8-T")
        optimizer = torch.optim.AdamW(parameter_groups(model, sparsity, lr=1e-3, weight_decay=0.1))
        sparsity.attach(optimizer)

    Sparse weights of density d get the learning rate ``lr / d``, and a weight decay of ``weight_decay * d``, so that their decay
    per step, a product of both, is that of the other weights. Vectors, such as norms and biases, are not decayed. Not for SGD,
    whose steps grow with the gradients. Call it after the model is wrapped (DDP, FSDP2), as for any optimizer.

    Args:
        model: the model that was sparsified, or one that contains it.
        sparsity: what `sparsify_` returned.
        lr: learning rate of the weights that are not sparse, tuned for the dense network.
        weight_decay: weight decay of matrices that are not sparse, as AdamW takes it.
        scale: False: the same learning rate for all.

    Raises:
        ValueError: `lr` or `weight_decay` is negative or no number; a parameter that has no shape yet (lazy layers); a sparse
            weight that is no parameter of the model, as of a copy of it.
    """
    check_module(model)
    if not isinstance(sparsity, Sparsity):
        raise ValueError(f"sparsity={sparsity!r:.60}: expected what sparsify_ returned")
    check_flag("scale", scale)
    check_number("lr", lr, above=0)
    check_number("weight_decay", weight_decay, least=0)
    density = {id(layer.weight): layer.pattern.density if scale else 1.0 for layer in sparsity.layers}
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"{name} has no shape yet: run the model once before its optimizer is made")
        own, decays = density.pop(id(parameter), 1.0), parameter.ndim > 1
        if parameter.requires_grad:
            decay = weight_decay * own if decays else 0.0
            group = groups.setdefault((own, decays), {"params": [], "lr": lr / own, "weight_decay": decay})
            group["params"].append(parameter)
    if density:
        missing = next(layer for layer in sparsity.layers if id(layer.weight) in density)
        raise ValueError(
            f"{missing.name}: its weight is no parameter of this {type(model).__name__}: pass the model that was sparsified, "
            "not a copy of it"
        )
    return list(groups.values())
