"""Detects whether experts in one 3-D parameter are stored as (E, outputs, inputs) or (E, inputs, outputs).

All such parameters of a module are decided together: the outputs of the up projection are the inputs of the down projection. If
both layouts fit, the length of an expert's bias and the model's width decide. Without evidence the layout stays unknown.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from bisparse.tiles import Layout, LayoutKind

__all__ = ["config_parts", "config_widths", "experts_layout", "is_pair"]

WIDTHS_IN_CONFIG = r"^(hidden_size|d_model|n_embd|model_dim|embed_dim|dim|hidden_dim)$"

UP = r"gate|up|w1|w3|v1|wi|w_in|input|fc1|fc_in|in_proj|c_fc|lin1|linear1|mlp1|h_to_4h"
DOWN = r"down|w2|wo|w_out|output|fc2|fc_out|out_proj|c_proj|lin2|linear2|mlp2|4h_to_h"


def experts_layout(
    name: str, stacks: Mapping[str, tuple[int, ...]], biases: Mapping[str, tuple[int, ...]], widths: Collection[int]
) -> Layout | str:
    """The layout of an expert stack, or a message on the missing evidence.

    Args:
        name: the parameter.
        stacks: shapes (E, *, *) of all 3-D parameters of its module, including this one.
        biases: shapes of the 2-D parameters (E, *) of the same module.
        widths: sizes of the experts' inputs and outputs, from the router or config.json.
    """
    votes = _by_pair(stacks)
    if len(votes) == 1:
        return Layout(votes.pop())
    for one, shape in stacks.items():
        votes |= _by_bias(one, shape, biases, alone=len(stacks) == 1) | _by_width(one, shape, widths)
    if len(votes) == 1:
        return Layout(votes.pop())
    shape = stacks[name]
    found = "the evidence is contradictory" if votes else "nothing distinguishes inputs from outputs"
    return (
        f"experts of shape {shape}: {found} (config.json's hidden_size, a router, biases, up and down projections would); "
        "give the layout 'experts' for (E, outputs, inputs) or 'experts-transposed' for (E, inputs, outputs)"
    )


def is_pair(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Whether two stacks of equally many matrices can be the up and the down projection of experts."""
    return len(first) == len(second) == 3 and first[0] == second[0] > 1 and bool(_pair(first, second) | _pair(second, first))


def config_parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a model's configuration and its nested configurations, such as ``text_config``."""
    yield config
    for part in config.values():
        if isinstance(part, Mapping):
            yield from config_parts(part)


def config_widths(config: Mapping[str, Any]) -> set[int]:
    """Hidden sizes of a model, from its configuration."""
    numbers = ((key, value) for part in config_parts(config) for key, value in part.items())
    return {value for key, value in numbers if isinstance(value, int) and re.search(WIDTHS_IN_CONFIG, str(key))}


def _role(name: str) -> str:
    last = re.sub(r"[._](weight|kernel)$", "", name).rsplit(".", 1)[-1].lower()
    up, down = re.search(UP, last), re.search(DOWN, last)
    # "output_linear" contains neither "up" nor "input"; a name that contains both decides nothing.
    return "" if bool(up) == bool(down) else "up" if up else "down"


def _by_bias(name: str, shape: tuple[int, ...], biases: Mapping[str, tuple[int, ...]], *, alone: bool) -> set[LayoutKind]:
    stem = name.removesuffix(".weight").removesuffix("_weight")
    own = [biases.get(one) for one in (f"{stem}_bias", f"{stem}.bias", f"{name}_bias")]
    if alone:
        own += [bias for one, bias in biases.items() if one.endswith("bias")]
    for bias in own:
        if bias is not None and len(bias) == 2 and bias[0] == shape[0] and (bias[1] == shape[1]) != (bias[1] == shape[2]):
            return {LayoutKind.EXPERTS if bias[1] == shape[1] else LayoutKind.EXPERTS_TRANSPOSED}
    return set()


def _by_width(name: str, shape: tuple[int, ...], widths: Collection[int]) -> set[LayoutKind]:
    role = _role(name)
    first, last = shape[1] in widths, shape[2] in widths
    if not role or first == last:
        return set()
    # The model's width is the input size of an up projection and the output size of a down projection.
    return {LayoutKind.EXPERTS if last == (role == "up") else LayoutKind.EXPERTS_TRANSPOSED}


def _by_pair(stacks: Mapping[str, tuple[int, ...]]) -> set[LayoutKind]:
    ups = [shape for name, shape in stacks.items() if _role(name) == "up"]
    downs = [shape for name, shape in stacks.items() if _role(name) == "down"]
    return set().union(*(_pair(up, down) for up in ups for down in downs if up[0] == down[0]))


def _pair(up: tuple[int, ...], down: tuple[int, ...]) -> set[LayoutKind]:
    """The layouts that fit an up and a down projection: the up's outputs (half of them with a gate) are the down's inputs."""
    stored = up[2] == down[1] and up[1] in (down[2], 2 * down[2])
    transposed = up[1] == down[2] and up[2] in (down[1], 2 * down[1])
    if stored == transposed:
        return set()
    return {LayoutKind.EXPERTS if stored else LayoutKind.EXPERTS_TRANSPOSED}
