"""Compares the statements of a sidecar with the weights, as far as they can be computed from them.

The pattern is checked by `verify_checkpoint`, the masks by `wrong_masks`. From the weights follow the density and dtype of each
layer, the number of all parameters, the checksum of a weight, and for magnitude pruning the total score kept; of a quantised
weight only its density. The share of the score kept and the gap need the dense weights; they are repeated as what the sidecar
says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from bisparse.checkpoint.mask_statements import wrong_masks
from bisparse.checkpoint.reader import Source
from bisparse.checkpoint.sidecar import SIDECAR, Sidecar
from bisparse.checkpoint.stored_tensor import StoredTensor
from bisparse.layers import QUANTISED, layer_name
from bisparse.results import LayerResult, checksum_of_pieces
from bisparse.scores import magnitude
from bisparse.verification import Verification

__all__ = ["RECORDED", "corrected", "is_quantised", "origin", "same_sum", "wrong_statements"]

RECORDED = (
    "score kept, gap, errors and times are what bisparse.json says: they follow from the dense weights or the calibration data, "
    "and were not computed again"
)
TOLERANCE = 1e-6
"""Relative tolerance of sums of scores, which are rounded in a different order."""
TINY = 1e-30
PIECE = 1 << 21
SHOWN = 4


def wrong_statements(sidecar: Sidecar, source: Source, checked: Iterable[Verification]) -> tuple[str, ...]:
    """The false statements of a sidecar about its weights, each as a sentence.

    Args:
        checked: the layers' verifications, whose densities are compared.
    """
    found: list[str] = []
    density = {one.layer: one.density for one in checked}
    for result in sidecar.report:
        if (tensor := source.tensors.get(result.parameter)) is not None:
            found += _wrong(sidecar, result, tensor, density.get(result.name), quantised=is_quantised(source, tensor))
    stated, counted = sidecar.report.parameters, sum(tensor.size for tensor in source.tensors.values())
    least = sum(layer.size for layer in sidecar.report)
    # Packed tensors have several weights per entry.
    plain = all(tensor.torch_dtype is not None and tensor.torch_dtype.is_floating_point for tensor in source.tensors.values())
    if stated and plain and source.path.is_dir() and not least <= stated <= counted:
        found.append(f"the number of parameters is not {stated:,}: the files have {counted:,}, the pruned layers {least:,}")
    return (*found, *wrong_masks(sidecar, source))


def is_quantised(source: Source, tensor: StoredTensor) -> bool:
    """Whether a tensor has the numbers of a quantised weight: one byte or integers, with a scale next to them.

    A sidecar describes the weight, which is number times scale: its dtype and checksum are not those of the numbers.
    """
    layer, dtype = layer_name(tensor.name), tensor.torch_dtype
    narrow = dtype is None or not dtype.is_floating_point or dtype.itemsize == 1
    return narrow and any(f"{layer}.{one}" in source.tensors for one in QUANTISED)


def _wrong(sidecar: Sidecar, result: LayerResult, tensor: StoredTensor, density: float | None, *, quantised: bool) -> list[str]:
    found = []
    if not quantised and (own := _dtype(tensor)) != result.dtype:
        found.append(f"{result.name} is {own}, not {result.dtype}")
    if density is not None and abs(density - result.density) > TOLERANCE:
        found.append(f"the density of {result.name} is {density:.6g}, not {result.density:.6g}")
    if result.checksum is not None:
        if not quantised and _checksum(tensor) != result.checksum:
            found.append(f"{result.name} is not the weight that its figures are about, by their checksum")
    elif result.value is not None and _keeps_weights(sidecar, result):
        kept = _kept(tensor)
        if kept is not None and not same_sum(kept, result.value):
            found.append(f"the kept weights of {result.name} sum up to {kept:.6g}, not {result.value:.6g}")
    if (result.value == 0 and result.retained not in (None, 0, 1)) or (result.retained == 0 and result.value):
        found.append(f"the score kept of {result.name} is both {result.value} and {result.retained:.2%} of all")
    return found


def corrected(sidecar: Sidecar, source: Source, checked: Iterable[Verification]) -> Sidecar:
    """The sidecar with densities, dtypes and number of parameters from the weights, and without figures that they contradict."""
    verified = {one.layer: one for one in checked}
    layers, wrong = [], wrong_statements(sidecar, source, verified.values())
    for result in sidecar.report:
        tensor = source.tensors.get(result.parameter)
        if tensor is not None:
            density = verified[result.name].density if result.name in verified else None
            quantised = is_quantised(source, tensor)
            if _wrong(sidecar, result, tensor, density, quantised=quantised):
                own = result.density if density is None else density
                result = replace(result.without_figures(), dtype=result.dtype if quantised else _dtype(tensor), density=own)
        layers.append(result)
    if not wrong:
        return sidecar
    shown = "; ".join(wrong[:SHOWN]) + (f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else "")
    report = replace(sidecar.report, layers=tuple(layers), notes=(*sidecar.report.notes, f"{SIDECAR} was wrong: {shown}"))
    if any(one.startswith("the number of parameters") for one in wrong):
        report = replace(report, parameters=sum(tensor.size for tensor in source.tensors.values()))
    return replace(sidecar, report=report)


def origin(sidecar: Sidecar) -> tuple[str, ...]:
    """Sentences on how the job was called and on what data, from the sidecar."""
    said: dict[str, Any] = dict(sidecar.provenance)
    lines = []
    if isinstance(command := said.get("command"), str):
        lines.append(f"made by: {command}")
    data = said.get("calibration")
    if isinstance(data, dict):
        lines.append(_calibration(data))
    if isinstance(order := said.get("order"), str):
        lines.append(f"order of the layers: {order}")
    return tuple(lines)


def _calibration(data: dict[str, Any]) -> str:
    if "function" in data:
        return f"calibrated on {data.get('batches')} batches of {data['function']}"
    files = data.get("files")
    named = [
        f"{one.get('name')} ({one.get('bytes')} bytes, sha256 {str(one.get('sha256'))[:12]}, {one.get('sequences')} sequences)"
        for one in (files if isinstance(files, list) else [])
        if isinstance(one, dict)
    ]
    return (
        f"calibrated on {data.get('sequences')} sequences of at most {data.get('length')} tokens, seed {data.get('seed')}, from "
        f"{', '.join(named) or data.get('file')}"
    )


def _keeps_weights(sidecar: Sidecar, result: LayerResult) -> bool:
    """Whether the total kept score is the sum of |w|, as for magnitude pruning, which does not change kept weights."""
    return sidecar.report.method == "magnitude" and result.error is None and result.violated_weights is None


def _dtype(tensor: StoredTensor) -> str:
    return tensor.dtype if tensor.torch_dtype is None else str(tensor.torch_dtype).removeprefix("torch.")


def _kept(tensor: StoredTensor) -> float | None:
    """Sum of |w|; None of quantised numbers, whose scales are elsewhere."""
    if tensor.torch_dtype is None or not tensor.torch_dtype.is_floating_point or tensor.torch_dtype.itemsize == 1:
        return None
    total = 0.0
    for start in range(0, tensor.size, PIECE):
        total += float(magnitude(tensor.read(start, min(start + PIECE, tensor.size))).sum(dtype=torch.float64))
    return total


def _checksum(tensor: StoredTensor) -> int:
    """`bisparse.results.checksum_of` of a stored weight."""
    return checksum_of_pieces(tensor.read(start, min(start + PIECE, tensor.size)) for start in range(0, tensor.size, PIECE))


def same_sum(one: float, other: float) -> bool:
    """Whether two sums of scores are equal up to rounding."""
    return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TINY)
