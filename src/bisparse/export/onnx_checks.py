"""Checks of a written ONNX file: its weights against the model's, and its patterns along the axes over which its graph sums."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from bisparse.checkpoint.reader import open_source
from bisparse.checkpoint.verify import verify_checkpoint
from bisparse.errors import CheckpointError
from bisparse.layers import Skipped, find_layers, layer_name, matches_name, memory_of
from bisparse.pattern import Structure, parse_pattern
from bisparse.quantization import QuantizedLayer, stored_values
from bisparse.rollback import same_bits
from bisparse.verification import Verification

__all__ = ["check_weights", "naming", "verify_patterns"]

NOT_IN_THE_FILE = "the file has no weight of this name"


def check_weights(file: Path, weights: Mapping[str, Tensor], stored: Mapping[str, QuantizedLayer]) -> tuple[int, tuple[str, ...]]:
    """The number of matrices in the file that are bit-identical to the model's, and the names of those it lacks.

    Raises:
        CheckpointError: a matrix has different values.
    """
    tensors = open_source(file).tensors
    found, lacking = {}, {}
    for name, weight in weights.items():
        if weight.ndim < 2:
            continue
        if (tensor := tensors.get(name)) is None:
            lacking[name] = memory_of(weight)
            continue
        meant = stored_values(weight, stored[name]) if name in stored else weight
        if not same_bits(tensor.read().view(tensor.shape), meant):
            raise CheckpointError(file, "differs from the model's weight", "report this", tensor=name)
        found[name] = memory_of(weight)
    if lost := [name for name in stored if name not in found]:
        raise CheckpointError(file, "is not an initializer", "report this", tensor=lost[0])
    return len(found), tuple(name for name, place in lacking.items() if place not in found.values())


def verify_patterns(
    file: Path,
    pattern: str | Structure | Mapping[str, str | Structure] | None,
    model: nn.Module,
    tied: Mapping[str, Sequence[str]],
) -> tuple[dict[str, int], tuple[Skipped, ...]]:
    """By pattern, the number of layers in the file that obey it, and the layers that could not be checked.

    Args:
        pattern: by layer name, or one for the layers of the model that are pruned by default.
        tied: by the name of a weight, all its names, of which the file may have any.

    Raises:
        CheckpointError: one pattern, for a model without layers that are pruned by default.
        PatternError: a layer breaks its pattern.
    """
    if pattern is None:
        return {}, ()
    if not isinstance(pattern, Mapping):
        # The model says which layers they are; the file's names do not tell its first convolution.
        pattern = {one.name or one.parameter_name: pattern for one in find_layers(model)[0]}
        if not pattern:
            raise CheckpointError(file, "has no layer that is pruned by default", "pass the pattern by layer name")
    tensors = open_source(file).tensors
    pattern = {_name_in(tensors, name, tied): one for name, one in pattern.items()}
    absent = {one for one in pattern if not any(matches_name(one, layer_name(name), name) for name in tensors)}
    verified: dict[str, int] = {}
    unverified = [Skipped(name, NOT_IN_THE_FILE) for name in pattern if name in absent]
    names: dict[str, list[str]] = {}
    for name, one in pattern.items():
        if name not in absent:
            names.setdefault(str(parse_pattern(one)), []).append(name)
    for one, included in sorted(names.items()):
        found, unchecked = _verified(verify_checkpoint(file, one, include=included))
        verified |= found
        unverified += unchecked
    return verified, tuple(unverified)


def _name_in(tensors: Collection[str], name: str, tied: Mapping[str, Sequence[str]]) -> str:
    """The name of a layer in the file: of a tied weight, that of another layer if the file lacks its own."""
    names = tied.get(f"{name}.weight", tied.get(name, ()))
    present = [one for one in names if one in tensors]
    return name if not present or name in present or f"{name}.weight" in present else layer_name(present[0])


def _verified(found: Verification) -> tuple[dict[str, int], tuple[Skipped, ...]]:
    if found.layers:  # otherwise nothing was checked, which is no broken pattern
        found.check()
    return ({str(found.pattern): len(found.layers)} if found.layers else {}), found.unchecked


@contextmanager
def naming(path: Path, file: Path) -> Iterator[None]:
    """A context manager whose errors about a temporary file name the file that it is to become."""
    try:
        yield
    except CheckpointError as error:
        if error.path != file:
            raise
        raise CheckpointError(path, error.problem, error.remedy, tensor=error.tensor) from error
