"""The layers of a model in memory, by the classes of modules, then by shapes and names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from bisparse.layers.experts import config_widths, experts_layout, is_pair
from bisparse.layers.filters import Filter, first_match, matches, matrix_sides, remainder_reason
from bisparse.layers.kinds import DEPTHWISE, Kind, Skipped, parse_layout, parse_layouts, why_dense
from bisparse.layers.names import BY_NAME, Names, is_embedding_name, reads_input_by_name
from bisparse.layers.own_forward import own_forward_reason
from bisparse.layers.shared_memory import clashes, memory_of
from bisparse.pattern import Structure
from bisparse.tiles import Layout, LayoutKind

__all__ = ["Layer", "find_layers"]

RECURRENT = ("weight_ih", "weight_hh", "weight_hr")
"""Prefixes of the matrices in torch's recurrent layers; the gates are rows of one GEMM operand."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Layer:
    """One prunable parameter of a model."""

    name: str
    """The parameter's full name without ``.weight``: ``encoder.0.linear``, ``attention.in_proj_weight``."""
    module: nn.Module
    parameter: str
    """The parameter's name inside its module."""
    layout: Layout

    @property
    def weight(self) -> Tensor:
        """The weight as the module currently uses it."""
        weight = getattr(self.module, self.parameter)
        assert isinstance(weight, Tensor)
        return weight

    @property
    def parameter_name(self) -> str:
        """The key of the parameter in the model's state_dict."""
        if self.parameter == "weight":
            return f"{self.name}.weight" if self.name else "weight"
        return self.name


@dataclass(frozen=True)
class _Candidate:
    """A parameter that may be a layer, with its kind according to its module."""

    name: str
    module: nn.Module
    parameter: str
    kind: Kind


def find_layers(
    model: nn.Module,
    include: Filter | None = None,
    exclude: Filter | None = None,
    *,
    pattern: Structure | None = None,
    remainder: str = "pad",
    layouts: Mapping[str, str | Layout] | None = None,
) -> tuple[list[Layer], list[Skipped]]:
    """The prunable layers of a model, and a reason for each other parameter of two or more dimensions.

    By default every Linear, convolution (also transposed), Conv1D, recurrent weight, packed attention projection and stack
    of experts, without embeddings, output heads (by name, and the Linear whose output is the model's), routers, adapters and the
    first convolution. `include` overrides those defaults for the layers it matches and leaves out the others; `exclude` takes
    precedence. A parameter shared by several modules is listed once, under its first name.

    Args:
        include, exclude: names, globs, ``re:`` patterns, or functions ``(name, module) -> bool``.
        pattern: with ``remainder="dense"``, layers whose sides its M does not divide are left out.
        remainder: "pad" (prune as if padded with zeros), "dense" (leave such a layer dense) or "error".
        layouts: how single layers store their matrices, by name, glob or ``re:`` pattern, if it cannot be detected; see
            `parse_layout`. The first match counts.

    Raises:
        ValueError: a filter that matches nothing, a layout that a layer cannot have, or ``remainder="error"`` and a layer that M
            does not divide.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, not {type(model).__name__}")
    if remainder not in ("pad", "dense", "error"):
        raise ValueError(f"remainder={remainder!r}: expected 'pad', 'dense' or 'error'")
    given = parse_layouts(layouts)
    unused = set(given)
    candidates = list(_candidates(model))
    everything = [*model.named_modules(), *((one.name, one.module) for one in candidates)]
    if isinstance(exclude, str | Sequence) and exclude and not any(matches(exclude, *one) for one in everything):
        raise ValueError(f"exclude={exclude!r} matches nothing in the model: a layer that should stay dense would be pruned")
    layers: list[Layer] = []
    skipped: list[Skipped] = []
    owners: dict[int, tuple[str, Tensor]] = {}  # a reference to the tensor keeps its id from being reused
    tied = {
        memory_of(module.weight): name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    clashing = clashes(model.named_parameters())
    included = False
    for one in candidates:
        name, module, kind = one.name, one.module, one.kind
        wanted = None if include is None else matches(include, name, module)
        included |= bool(wanted)
        weight = _stored(module, one.parameter)
        chosen, text = first_match(given, name, f"{name}.weight")
        unused.discard(chosen or "")
        embedding = tied.get(memory_of(weight)) if isinstance(weight, Tensor) else None
        default = kind.default if embedding is None else f"shares its weight with the embedding {embedding}"
        reason = (
            kind.refused
            or _weight_reason(weight)
            or clashing.get(id(weight))
            or why_dense(
                Kind(kind.layout, kind.refused, kind.uncertain if text is None else "", default),
                included=wanted,
                excluded=exclude is not None and matches(exclude, name, module),
            )
        )
        if reason is None and id(weight) in owners:
            reason = f"shares its weight with {owners[id(weight)][0]}"
        if reason is None and text is None:
            reason = own_forward_reason(module)
        if reason is not None:
            skipped.append(Skipped(name, reason))
            continue
        layout = kind.layout if text is None else parse_layout(text, tuple(weight.shape), name)
        assert layout is not None
        if pattern is not None:
            reason = remainder_reason(matrix_sides(weight, layout), pattern, remainder, name)
        if reason is None:
            owners[id(weight)] = (name, weight)
            layers.append(Layer(name, module, one.parameter, layout))
        else:
            skipped.append(Skipped(name, reason))
    names = [one.name for one in candidates][:20]
    if include is not None and not included:
        raise ValueError(f"include={include!r} matches no layer of the model; its layers are {names}")
    if unused:
        raise ValueError(f"layouts={sorted(unused)} match no layer of the model; its layers are {names}")
    return layers, skipped


def _weight_reason(weight: Tensor) -> str | None:
    """Why a weight cannot be pruned, by its type and shape; None if it can."""
    if nn.parameter.is_lazy(weight):
        return "its weight has no shape yet; run the model once, then prune it"
    if not isinstance(weight, Tensor) or not (weight.is_floating_point() and weight.ndim >= 2):
        return f"weight of type {getattr(weight, 'dtype', type(weight).__name__)}: quantised or packed weights cannot be pruned"
    return "empty weight" if weight.numel() == 0 else None


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    """Yield every parameter that may be prunable, with its kind."""
    names = Names([name for name, _ in model.named_parameters(remove_duplicate=False)])
    found = [
        _Candidate(f"{name}.{own}" if name and own != "weight" else own if own != "weight" else name, module, own, kind)
        for name, module in model.named_modules()
        for own, kind in _of_module(name, module, model)
    ]
    first = _first_convolution(found)
    head = _head_by_flow(model, found)
    for one in found:
        kind = one.kind
        if kind.refused or kind.default:
            yield one
            continue
        parameter = f"{one.name}.weight" if one.parameter == "weight" else one.name
        default = names.default_reason(parameter) or ""
        if not default and "router" in type(one.module).__name__.lower():
            default = f"router of a mixture of experts ({type(one.module).__name__}); {BY_NAME}"
        if not default and isinstance(one.module, _ConvNd):
            channels = one.module.in_channels
            if not isinstance(one.module, _ConvTransposeNd) and (one is first or channels == 3 or reads_input_by_name(one.name)):
                default = f"first convolution; {BY_NAME}"
        if not default and type(one.module) is nn.Linear and one.module.bias is None and is_embedding_name(one.name):
            default = f"embedding, or the projection of the model's input (by its name); {BY_NAME}"
        if not default and one is head:
            default = f"output head (its output is the model's); {BY_NAME}"
        yield _Candidate(one.name, one.module, one.parameter, Kind(kind.layout, "", kind.uncertain, default))


def _of_module(name: str, module: nn.Module, model: nn.Module) -> Iterator[tuple[str, Kind]]:
    """Yield a module's own matrices, each with its kind by the module's class."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        yield "weight", Kind(refused="embedding: looked up, not multiplied")
    elif isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is not None:
            yield "in_proj_weight", Kind(Layout(LayoutKind.PACKED, parts=3))
        else:
            for projection in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                yield projection, Kind(Layout(LayoutKind.LINEAR))
    elif isinstance(module, nn.Linear):
        yield "weight", Kind(Layout(LayoutKind.LINEAR))
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        # Other parameters of these names are those of weight_norm and the like, from which a weight is computed.
        read = module._flat_weights_names if isinstance(module, nn.RNNBase) else RECURRENT
        for own in read:
            held = own in module._parameters or own in vars(module) or parametrize.is_parametrized(module, own)
            if own.startswith(RECURRENT) and held:
                yield own, Kind(Layout(LayoutKind.LINEAR))
    elif isinstance(module, nn.Bilinear):
        yield "weight", Kind(refused="bilinear layer: no single matrix multiplies its inputs")
    elif isinstance(module, _ConvNd):
        yield "weight", _convolution(module)
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight"):
        yield "weight", Kind(Layout(LayoutKind.TRANSPOSED))
    elif not isinstance(module, ParametrizationList) and ".parametrizations." not in f".{name}.":
        for own, parameter in module.named_parameters(recurse=False):
            if not nn.parameter.is_lazy(parameter) and parameter.ndim >= 2 and parameter.is_floating_point():
                yield own, _bare(name, own, module, model)


def _convolution(module: _ConvNd) -> Kind:
    if module.groups == module.in_channels:
        return Kind(refused=DEPTHWISE)
    transposed = isinstance(module, _ConvTransposeNd)
    return Kind(Layout(LayoutKind.CONV_TRANSPOSED if transposed else LayoutKind.CONV, groups=module.groups))


def _bare(name: str, own: str, module: nn.Module, model: nn.Module) -> Kind:
    """The kind of a parameter in a module of unknown class: experts, if there is evidence for it."""
    stacks = {key: tuple(one.shape) for key, one in module.named_parameters(recurse=False) if one.ndim == 3}
    flag = getattr(module, "is_transposed", None)
    kind = type(module).__name__
    if own in stacks and isinstance(flag, bool):
        return Kind(Layout(LayoutKind.EXPERTS_TRANSPOSED if flag else LayoutKind.EXPERTS))
    named = "expert" in f"{name.rsplit('.', 1)[-1]}.{kind}".lower()
    paired = own in stacks and any(is_pair(stacks[own], other) for key, other in stacks.items() if key != own)
    if own in stacks and stacks[own][0] > 1 and (named or paired):
        biases = {f"{name}.{key}": tuple(one.shape) for key, one in module.named_parameters(recurse=False) if one.ndim == 2}
        named_stacks = {f"{name}.{key}": shape for key, shape in stacks.items()}
        layout = experts_layout(f"{name}.{own}", named_stacks, biases, _widths(name, module, model, stacks[own][0]))
        return Kind(layout) if isinstance(layout, Layout) else Kind(uncertain=layout)
    said = f"a parameter of {kind}, of which it is not known how it is used; give its layout, such as 'linear'"
    return Kind(uncertain=said)


def _widths(name: str, module: nn.Module, model: nn.Module, experts: int) -> set[int]:
    """Input sizes of experts, from the module or from the router next to it."""
    found = {getattr(module, key, None) for key in ("hidden_size", "hidden_dim", "d_model", "model_dim", "embed_dim")}
    parent = name.rpartition(".")[0]
    for one in model.get_submodule(parent).modules():
        weight = one._parameters.get("weight")
        if one is not module and isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == experts:
            found.add(weight.shape[1])
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    known = {one for one in found if isinstance(one, int)}
    return known or (config_widths(to_dict()) if callable(to_dict) else set())


def _stored(module: nn.Module, parameter: str) -> Any:
    """The stored parameter, without computing a parametrized weight, which is impossible for a sharded model at this point."""
    if parametrize.is_parametrized(module, parameter):
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        if hasattr(lists[parameter], "original"):  # some, such as weight norm, have several
            return lists[parameter].original
    return getattr(module, parameter)


def _first_convolution(found: Sequence[_Candidate]) -> _Candidate | None:
    """The first convolution of the model, if no layer before it outputs its channels, so that it reads the model's input."""
    delivered: set[int] = set()
    for one in found:
        if isinstance(one.module, _ConvNd):
            return None if one.module.in_channels in delivered else one
        weight = _stored(one.module, one.parameter)
        if isinstance(weight, Tensor) and not nn.parameter.is_lazy(weight) and weight.ndim >= 2:
            # The output size of an embedding is its columns, that of a Linear its rows.
            delivered.add(weight.shape[1] if isinstance(one.module, nn.Embedding) else weight.shape[0])
    return None


def _head_by_flow(model: nn.Module, found: Sequence[_Candidate]) -> _Candidate | None:
    """The Linear whose output is the model's: registered last, directly in the model, with an output size that no layer reads.

    In a plain container such as `nn.Sequential` layers have no roles, so none of them is a head.
    """
    while (
        type(model).__name__ in ("DistributedDataParallel", "DataParallel", "OptimizedModule")
        and len(list(model.children())) == 1
    ):
        model = next(model.children())
    children = list(model.named_children())
    if isinstance(model, CONTAINERS) or not children or len(found) < 2:
        return None
    modules = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    last = modules[-1] if modules else None
    own = [child for _, child in children]
    if isinstance(own[-1], nn.Sequential):
        own.extend(own[-1].children())
    if type(last) is not nn.Linear or not any(last is child for child in own):
        return None
    inputs = {module.in_features for module in modules if isinstance(module, nn.Linear)}
    inputs |= {module.in_channels for module in modules if isinstance(module, _ConvNd)}
    if last.out_features in inputs:
        return None
    return next((one for one in found if one.module is last), None)
