"""`sparsify_`: chooses the layers for sparse training and gives them masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize

from bisparse.arguments import check_flag
from bisparse.layers import Filter, Layer, Skipped, by_layer, computed_reason, dtype_reason, find_layers, matches
from bisparse.pattern import Pattern, Structure, parse_pattern
from bisparse.rollback import Rollback
from bisparse.solvers import Solver
from bisparse.static_mask import StaticMask, static_masks
from bisparse.tiles import Layout, to_matrices
from bisparse.training.decay import AnnealedDecay, Decay, FixedDecay
from bisparse.training.layer import Accelerated, SparseLayer, local
from bisparse.training.mask_check import check_loaded_masks
from bisparse.training.mask_search import Score, magnitude
from bisparse.training.mvue import MVUELinear
from bisparse.training.parametrizations import Masked, SoftThreshold, masked_parameters, sample_of
from bisparse.training.rules import GradientRule, StickyScore, parse_rule
from bisparse.training.run_state import check_mask
from bisparse.training.schedule import Phase, Schedule
from bisparse.training.shared_classes import share_class
from bisparse.training.sparsity import Method, Mode, Sparsity
from bisparse.wrappers import plain_names, unwrapped_model

__all__ = ["sparsify_"]


def sparsify_(
    model: nn.Module,
    pattern: str | Structure,
    *,
    mode: Mode = "dynamic",
    method: Method = "masked-decay",
    rule: str | GradientRule | None = None,
    solver: Solver | None = None,
    refresh: int = 40,
    decay: Decay | Mapping[str, Decay] | None = None,
    steps: int | None = None,
    schedule: Schedule | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
    layouts: Mapping[str, str | Layout] | None = None,
    remainder: Literal["pad", "dense", "error"] = "pad",
    patterns: Mapping[str, str | Structure] | None = None,
    score: Score | Literal["magnitude"] = magnitude,
    masks: Mapping[str, Tensor] | Literal["nonzero"] | None = None,
    mvue: bool = False,
    measure_every: int = 40,
    check_gradients: bool = True,
) -> Sparsity:
    """Prepare a model, in place, to train with sparse weights. Attach the returned `Sparsity` to the optimizer.

    In a compiled or wrapped model, the inner model is made sparse; names are those without the wrapper.

    >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    >>> sparsity = sparsify_(model, "4:8-T")
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> _ = sparsity.attach(optimizer)  # the training loop goes here, unchanged
    >>> len(sparsity.layers)
    2

    Args:
        pattern: such as ``"4:8-T"``; N is the number kept.
        mode: "dynamic": dense weights are kept, the forward pass uses ``mask * W``, and masks are refreshed. "static": masks are
            fixed, weights off the mask are zero from now on, and state_dict keys do not change.
        method: for a dynamic run. "ste": the gradient of ``mask * W`` is used for the whole W. "masked-decay": in addition,
            ``decay * (1 - mask) * W`` is added to the gradient before the optimizer's step (Zhou et al.'s code with SGD;
            Hu et al. 2024 with Adam). "sr-ste": ``W -= lr * decay * (1 - mask) * W`` separately from the optimizer's step,
            SR-STE's formula as printed. "s-ste": a continuous soft threshold, for plain N:M.
        rule: a `GradientRule` or its name in `RULES`, instead of `method` and `decay`.
        solver: for transposable patterns; by default the exact one.
        refresh: optimizer steps between mask searches.
        decay: total decay of pruned weights over the run: lambda times the sum of learning rates. `FixedDecay` sets lambda
            itself. By default 5 if `steps` is known, otherwise a lambda of 2e-4, or 2e-3 for masked decay with Adam and its
            variants. A total of masked decay with optimizers that divide gradients by their size is applied as "sr-ste" does.
            With a mapping from layer names or globs, only those layers decay.
        steps: optimizer steps of the whole run. The callbacks for the transformers Trainer and Lightning set it.
        schedule: dense and frozen phases of a dynamic run, in optimizer steps.
        include, exclude: which layers, by name, glob, ``re:`` or function, as `bisparse.layers.find_layers` takes them.
        layouts: how single layers store their matrices, as for `prune_`.
        remainder: for layers that M does not divide: "pad" as if with zeros, leave "dense" with the reason, or "error".
        patterns: different patterns for some layers, by name or glob; the first match counts; ``"dense"`` leaves a layer out.
        score: (layer name, weight) -> scores, or "magnitude".
        masks: for a static run: a mask for each layer, by the name of the layer or its parameter, instead of the best one for
            the scores; or "nonzero": the non-zeros of the weights.
        mvue: Linear layers compute an unbiased weight gradient from a 2:4 output gradient; see `bisparse.training.mvue`.
        measure_every: optimizer steps between measurements of flip rate and other metrics, at least `refresh`; 0 for never.
        check_gradients: raise an error on a NaN or infinite gradient before the optimizer's step spreads it.

    Raises:
        ValueError: wrong or contradictory arguments, no layer to make sparse, or a model that is already sparsified.
        PatternError: a given mask that breaks its pattern.
    """
    pattern = parse_pattern(pattern)
    score = magnitude if isinstance(score, str) and score == "magnitude" else score
    if not callable(score):
        raise ValueError(f"score={score!r:.60}: expected a function (layer name, weight) -> scores, or 'magnitude'")
    if schedule is not None and not isinstance(schedule, Schedule):
        raise ValueError(f"schedule={schedule!r:.60}: expected a Schedule")
    schedule = schedule or Schedule()
    if rule is not None:
        if method != "masked-decay" or decay is not None or mode != "dynamic":
            raise ValueError("rule= replaces method= and decay= of a dynamic run: pass one or the other")
        rule = parse_rule(rule)
        method, decay = cast(Method, rule.method), rule.decay
    sticky = StickyScore(score, rule.margin) if rule is not None and rule.margin else None
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps={steps!r}: expected the number of optimizer steps of the run, at least 1")
    _check_arguments(model, mode, method, refresh, measure_every, schedule, masks, decay)
    check_flag("mvue", mvue)
    check_flag("check_gradients", check_gradients)
    model = unwrapped_model(model)
    plain = plain_names(model)
    if patterns is not None and not isinstance(patterns, Mapping):
        raise ValueError(f"patterns={patterns!r:.60}: expected a mapping from layer names or globs to patterns, or 'dense'")
    structures = {name: None if own == "dense" else parse_pattern(own) for name, own in (patterns or {}).items()}
    layers, skipped = _choose(model, pattern, structures, include, exclude, remainder, mode, layouts)
    decays = dict(decay) if isinstance(decay, Mapping) else None
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for held in module.parameters(recurse=False):
            holders.setdefault(id(held), []).append(module)
    sparse = [
        SparseLayer(
            plain(layer.name),
            layer.module,
            layer.parameter,
            layer.layout,
            own,
            plain(layer.parameter_name),
            _decay_of(layer, decays),
            tuple(module for module in holders.get(id(layer.weight), ()) if module is not layer.module),
        )
        for layer, own in layers
    ]
    _check_names("decay", decays or {}, layers)
    _check_ready(model, sparse, mode, method)
    sparsity = Sparsity(
        sparse,
        skipped,
        _called(model, sparse),
        mode=mode,
        method=method,
        pattern=pattern,
        solver=solver,
        refresh=refresh,
        decay=None if isinstance(decay, Mapping) else decay,
        steps=steps,
        schedule=schedule,
        score=sticky or score,
        measure_every=measure_every,
        check_gradients=check_gradients,
    )
    if mvue and not any(type(layer.module) in (nn.Linear, MVUELinear) for layer in sparse):
        raise ValueError("mvue=True applies to torch.nn.Linear layers, but none is made sparse")
    with torch.no_grad(), Rollback(model) as rollback:
        found = _given_masks(sparse, masks) if masks is not None else _first_masks(sparsity)
        for layer in sparse:
            if mvue:
                MVUELinear.install_(layer.module)
            mask = found[layer.name].to(layer.weight.device)
            if mode == "static":
                setattr(layer.module, layer.mask_name, StaticMask(mask.contiguous(), layer.pattern))
                rollback.touch(local(layer.weight.detach()))
                layer.zero_pruned()
            else:
                _parametrize(model, layer, mask, method, schedule)
        if sticky is not None:
            sticky.layers = {layer.name: layer for layer in sparse}
        if mode == "dynamic":
            sparsity.hook.install(sparsity.called)
            model.register_load_state_dict_pre_hook(check_loaded_masks)
    return sparsity


def _called(model: nn.Module, layers: list[SparseLayer]) -> list[nn.Module]:
    """The modules whose forward pass may use a sparse weight: those that have one, and all that contain those."""
    holders = {id(module) for layer in layers for module in (layer.module, *layer.sharing)}
    return [module for module in model.modules() if any(id(inner) in holders for inner in module.modules())]


def _check_arguments(
    model: nn.Module,
    mode: str,
    method: str,
    refresh: int,
    measure_every: int,
    schedule: Schedule,
    masks: object,
    decay: Decay | Mapping[str, Decay] | None,
) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"sparsify_ needs a torch module, not {type(model).__name__}")
    if mode not in ("dynamic", "static"):
        raise ValueError(f"mode={mode!r}: expected 'dynamic' or 'static'")
    if method not in ("ste", "sr-ste", "masked-decay", "s-ste"):
        raise ValueError(f"method={method!r}: expected 'ste', 'sr-ste', 'masked-decay' or 's-ste'")
    if isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 1:
        raise ValueError(f"refresh={refresh!r}: expected a number of optimizer steps, at least 1")
    if isinstance(measure_every, bool) or not isinstance(measure_every, int) or measure_every < 0:
        raise ValueError(f"measure_every={measure_every!r}: expected a number of optimizer steps, or 0 for never")
    if mode == "static" and schedule != Schedule():
        raise ValueError("a schedule requires mode='dynamic': masks of a static run are fixed")
    if mode == "dynamic" and masks is not None:
        raise ValueError("masks= requires mode='static'; a dynamic run finds its own masks")
    if isinstance(masks, str) and masks != "nonzero":
        raise ValueError(f"masks={masks!r}: expected a mapping from layer names to masks, or 'nonzero'")
    for number in decay.values() if isinstance(decay, Mapping) else [decay]:
        if number is None or isinstance(number, FixedDecay | AnnealedDecay):
            continue
        if isinstance(number, bool) or not isinstance(number, float | int) or not 0 <= number < float("inf"):
            raise ValueError(f"decay={number!r}: expected a number that is 0 or more, or FixedDecay(lambda)")
    already = [name for name, *_ in masked_parameters(model)]
    already += [name for name, module in model.named_modules() if static_masks(module)]
    if already:
        raise ValueError(f"the model is already sparsified (at {already[0]!r}): call finalize_(model) first")
    if mode == "dynamic" and isinstance(model, DistributedDataParallel | DataParallel):
        raise ValueError(f"sparsify_ the model before wrapping it in {type(model).__name__}")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "FullyShardedDataParallel flattens weights, and masks need whole matrices: sparsify_ the plain model and shard it "
            "with FSDP2 (torch.distributed.fsdp.fully_shard)"
        )


def _choose(
    model: nn.Module,
    pattern: Structure,
    patterns: Mapping[str, Structure | None],
    include: Filter | None,
    exclude: Filter | None,
    remainder: str,
    mode: str,
    layouts: Mapping[str, str | Layout] | None,
) -> tuple[list[tuple[Layer, Structure]], list[Skipped]]:
    if remainder not in ("pad", "dense", "error"):
        raise ValueError(f"remainder={remainder!r}: expected 'pad', 'dense' or 'error'")
    found, skipped = find_layers(model, include, exclude, layouts=layouts)
    _check_names("patterns", patterns, [(layer, pattern) for layer in found])
    chosen: list[tuple[Layer, Structure]] = []
    for layer in found:
        own: Structure | None = pattern
        for name, other in patterns.items():
            if matches(name, layer.name, layer.module):
                own = other
                break
        if own is None:
            skipped.append(Skipped(layer.name, "left dense by its pattern"))
        elif mode == "dynamic" and isinstance(layer.module, nn.RNNBase):
            kind = type(layer.module).__name__
            reason = (
                f"{kind} reads its weights from one flat buffer, which a dynamic mask cannot change; mode='static' can mask it"
            )
            skipped.append(Skipped(layer.name, reason))
        elif remainder != "pad" and (problem := _remainder(layer, own)):
            if remainder == "error":
                raise ValueError(f"{layer.name}: {problem}; pass remainder='pad' or 'dense', or exclude the layer")
            skipped.append(Skipped(layer.name, problem))
        else:
            chosen.append((layer, own))
    if not chosen:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in skipped[:5])
        raise ValueError(f"the model has no layer to make sparse at {pattern} ({reasons or 'it has no prunable layer'})")
    return chosen, skipped


def _remainder(layer: Layer, pattern: Structure) -> str | None:
    m = getattr(pattern, "m", 1)
    _, rows, columns = to_matrices(torch.empty(layer.weight.shape, device="meta"), layer.layout).shape
    if columns % m == 0 and (rows % m == 0 or not (isinstance(pattern, Pattern) and pattern.transposable)):
        return None
    return f"{m} does not divide the sides of its {rows} x {columns} matrix at {pattern}"


def _check_names(argument: str, given: Mapping[str, object], layers: list[tuple[Layer, Structure]]) -> None:
    for name in given:
        if not any(matches(name, layer.name, layer.module) for layer, _ in layers):
            raise ValueError(
                f"{argument}: {name!r} matches none of the sparse layers: {[layer.name for layer, _ in layers][:10]}"
            )


def _decay_of(layer: Layer, decays: Mapping[str, Decay] | None) -> Decay | None:
    if decays is None:
        return None
    return next((decay for name, decay in decays.items() if matches(name, layer.name, layer.module)), 0.0)


def _check_ready(model: nn.Module, layers: list[SparseLayer], mode: str, method: str) -> None:
    for layer in layers:
        if layer.module._parameters.get(layer.parameter) is not None and layer.weight.is_meta:
            raise ValueError(
                f"{layer.name}: its weight is on the meta device and has no values to find a mask for; load the model's "
                "weights first"
            )
        if isinstance(layer.module, Accelerated):
            raise ValueError(
                f"{layer.name} is accelerated, its weight packed: call finalize_(model) first, and accelerate_ after sparsify_"
            )
        if parametrize.is_parametrized(layer.module, layer.parameter):
            raise ValueError(
                f"{layer.name} is already parametrized, such as by weight_norm: remove that first, or exclude the layer"
            )
        if not isinstance(layer.module._parameters.get(layer.parameter), Tensor):
            raise ValueError(
                f"{layer.name}: its weight is not a parameter of the module, as after torch.nn.utils.prune: call prune.remove "
                "first, or exclude the layer"
            )
        if (reason := computed_reason(layer.module, layer.parameter)) is not None:
            raise ValueError(f"{layer.name}: {reason}; remove what computes it first, or exclude the layer")
        if (reason := dtype_reason(layer.weight)) is not None:
            raise ValueError(f"{layer.name}: {reason}")
        if hasattr(layer.module, layer.mask_name):
            raise ValueError(f"{layer.name} already has an attribute {layer.mask_name!r}, the name of the mask")
        if mode == "dynamic" and isinstance(layer.weight, DTensor):
            raise ValueError(f"{layer.name} is already sharded: for a dynamic run call sparsify_ before fully_shard")
        if (
            mode == "dynamic"
            and method == "s-ste"
            and not (isinstance(layer.pattern, Pattern) and not layer.pattern.transposable)
        ):
            raise ValueError(
                f"{layer.name}: S-STE's soft threshold is for plain N:M patterns such as '2:4', not '{layer.pattern}'"
            )


def _first_masks(sparsity: Sparsity) -> dict[str, Tensor]:
    # Ranks may still have different weights (DDP makes them equal later), so they share the work only if weights are sharded.
    share = any(isinstance(layer.weight, DTensor) for layer in sparsity.layers)
    return {name: mask for name, (mask, _) in sparsity.search.masks(share=share).items()}


def _given_masks(layers: list[SparseLayer], masks: Mapping[str, Tensor] | str) -> dict[str, Tensor]:
    if isinstance(masks, str):
        found = {layer.name: layer.full_weight() != 0 for layer in layers}
    else:
        found = by_layer("masks", masks, [layer.name for layer in layers])
    for layer in layers:
        check_mask(layer.name, found[layer.name], layer.pattern, layer)
    return found


def _parametrize(model: nn.Module, layer: SparseLayer, mask: Tensor, method: str, schedule: Schedule) -> None:
    weight = layer.weight
    if method == "s-ste":
        assert isinstance(layer.pattern, Pattern)
        own: Masked | SoftThreshold = SoftThreshold(weight, layer.pattern, layer.layout)
    else:
        # The memory format of the weight: conv weights may be channels_last.
        own = Masked(torch.empty_like(weight, dtype=torch.bool).copy_(mask), layer.pattern, layer.layout)
    own.has_dense_phase = schedule.dense_until > 0 or schedule.dense_from is not None
    if schedule.phase(0) is Phase.DENSE:
        own.state.dense = own.state.warm_up = True
        own.mask.fill_(True)
    owners = [
        (module, name) for module in model.modules() for name, held in module.named_parameters(recurse=False) if held is weight
    ]
    for module, name in owners:  # all modules that share the weight use it masked
        parametrize.register_parametrization(module, name, own)
        share_class(module)
    own.owner = layer.module, layer.parameter
    if method != "s-ste" or schedule != Schedule():  # a soft threshold follows the weight by itself
        own.start = sample_of(local(weight))
