"""`export_onnx`: writes ONNX files for TensorRT, onnxruntime and OpenVINO, in which weights are initializers with their zeros.

torch's exporter writes the graph. Constants are folded only up to `FOLDED` elements, so that every weight keeps its name and
values. The file is then verified along the axis over which TensorRT's 2:4 kernels reduce, and run.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bisparse.arguments import check_flag
from bisparse.atomic_file import check_output_file, explaining
from bisparse.checkpoint.save_load import HasDenseWeight, plain_weights
from bisparse.errors import CheckpointError, install_extra
from bisparse.export.int8_inputs import input_scales, quantize_inputs, rounded_inputs
from bisparse.export.onnx_checks import check_weights, naming, verify_patterns
from bisparse.export.onnx_graph import check_quantizable, name_axes, quantize_weights, rename_weights, tied_names
from bisparse.layers import Skipped
from bisparse.pattern import Structure
from bisparse.quantization import QuantizationReport
from bisparse.user_errors import error_in_one_line

__all__ = ["OnnxExport", "export_onnx", "onnx_metadata"]

FOLDED = 1024
"""Maximum number of elements of a constant that the exporter may fold."""
ONE_FILE_BYTES = 1_500_000_000
"""Weights of more bytes are stored in a file next to the model, since a protocol buffer is limited to 2 GiB."""
PREFIX = "model."
OUTPUTS = ("logits", "last_hidden_state")
"""Fields of a transformers model's output; the first one that exists is exported."""
INVALID = ("Load model from", "Type Error")
"""What onnxruntime says of a file whose types are against ONNX's rules, as opposed to one that it does not support."""
DynamicAxes = Mapping[str, Mapping[int, str]]
Inputs = Mapping[str, Tensor] | Sequence[Tensor] | Tensor
"""Inputs of a model, by name or by position."""


@dataclass(frozen=True)
class OnnxExport:
    """The written file, and the results of the checks."""

    path: Path
    inputs: dict[str, tuple[int | str, ...]]
    """Shapes by input, with names for dynamic axes."""
    output: str
    weights: int
    """Number of the model's matrices that are bit-identical initializers of the file."""
    unmatched: tuple[str, ...]
    """Names of the model's matrices that are not in the file, and so were not compared, nor stored as int8; without tied ones."""
    verified: dict[str, int]
    """By pattern, the number of layers that obey it along the reduction axis of the graph."""
    difference: float | None
    """Largest difference between outputs of onnxruntime and of the model, infinite if only one is NaN; None if it was not run."""
    largest: float | None
    """Largest absolute output of the model on the same inputs, infinite if one is NaN."""
    note: str = ""
    int8_inputs: int = 0
    """Number of layers whose inputs are rounded to int8 in the file."""
    unverified: tuple[Skipped, ...] = ()
    """Layers whose pattern could not be checked in the file, such as recurrent ones, and why."""


class _Exported(nn.Module):
    """A model as a function of positional tensors that returns one tensor."""

    def __init__(self, model: nn.Module, names: Sequence[str] | None) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.options = {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", None) is not None else {}

    def forward(self, *tensors: Tensor) -> Tensor:
        if self.names is None:
            made = self.model(*tensors)
        else:
            made = self.model(**dict(zip(self.names, tensors, strict=True)), **self.options)
        return _tensor_of(made)


def _tensor_of(made: Any) -> Tensor:
    if isinstance(made, Tensor):
        return made
    named = next((getattr(made, name) for name in OUTPUTS if isinstance(getattr(made, name, None), Tensor)), None)
    found = named if named is not None else made[0] if isinstance(made, tuple | list) and made else None
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model returns {type(made).__name__}, in which the output is not known; wrap the model to return a tensor"
        )
    return found


@torch.no_grad()
def export_onnx(
    model: nn.Module,
    path: str | Path,
    inputs: Inputs,
    *,
    pattern: str | Structure | Mapping[str, str | Structure] | None = None,
    quantized: QuantizationReport | None = None,
    dynamic_axes: DynamicAxes | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
    int8_inputs: Iterable[Inputs] | None = None,
) -> OnnxExport:
    """Write a model as an ONNX file, check its weights and patterns in the file, and run it in onnxruntime.

    Args:
        inputs: example inputs, by name or by position.
        pattern: the pattern of the weights, checked on the file: one for all layers of the model that `prune_` prunes by default,
            without heads, embeddings and the first convolution, or by layer name. TensorRT needs ``"2:4"``.
        quantized: the report of `quantize_` with the scheme int8: weights are written as int8 behind DequantizeLinear nodes.
        dynamic_axes: names of axes of any length, by input; by default the first axis is "batch", and the second axis of
            two-dimensional integers is "sequence".
        overwrite: replace the file.
        metadata: texts to store in the file; see `onnx_metadata`.
        int8_inputs: with `quantized`: typical inputs of the model, from which the range of each quantised layer's inputs is
            taken; they are then rounded to int8 by QuantizeLinear nodes, so that a runtime can compute int8 products. The file's
            outputs are compared with those of the model rounded in the same way.

    Raises:
        CheckpointError: the file exists or cannot be written, or its weights differ from the model's.
        ImportError: onnx or onnxscript is not installed.
        PatternError: a weight in the file breaks its pattern. No file is left.
        ValueError: `path` is a folder or a device; an accelerated model, a scheme other than int8, inputs that the model does not
            take or that have no elements, axes that no input has, or a graph that is not valid, such as one with a convolution
            of bfloat16. No file is left.
    """
    path = Path(path)
    check_flag("overwrite", overwrite)
    check_output_file(path)  # what is no file could not be replaced either
    if not overwrite and os.path.lexists(path):
        raise CheckpointError(path, "exists already", "choose another name, or pass overwrite (--overwrite)")
    if accelerated := [name for name, module in model.named_modules() if isinstance(module, HasDenseWeight)]:
        raise ValueError(
            f"the model is accelerated (at {accelerated[0]!r}), for which ONNX has no operators: call finalize_ first"
        )
    if quantized is not None:
        check_quantizable(quantized, plain_weights(model))
    elif int8_inputs is not None:
        raise ValueError("int8_inputs needs quantized=, the report of quantize_(model, 'int8')")
    _check_packages()
    names, tensors = _named(inputs)
    axes = dict(dynamic_axes) if dynamic_axes is not None else _default_axes(names, tensors)
    _check_axes(names, tensors, axes)
    modes = [(module, module.training) for module in model.modules()]
    with explaining(path):  # before the graph is traced, which may take minutes
        folder = _folder_next_to(path)
    try:
        model.eval()
        whole = _Exported(model, list(inputs) if isinstance(inputs, Mapping) else None).eval()
        output = _output_name(whole, tensors)
        proto = _proto(whole, names, tensors, axes, output)
        weights = plain_weights(model)
        tied = tied_names(weights)
        written = {} if quantized is None else quantize_weights(proto, quantized, weights)
        scales: dict[str, float] = {}
        if int8_inputs is not None:
            examples = (_ordered(one, names, isinstance(inputs, Mapping)) for one in int8_inputs)
            scales = input_scales(model, {name: tied[name] for name in written}, examples, whole)
        rounded = quantize_inputs(proto, scales)
        for key, value in (metadata or {}).items():
            proto.metadata_props.add(key=key, value=value)
        with explaining(path):
            file = _write(proto, folder / path.name)
        with naming(path, file), rounded_inputs(model, {name: scales[name] for name in rounded}, tied):
            count, unmatched = check_weights(file, weights, written)
            verified, unverified = verify_patterns(file, pattern, model, tied)
            difference, largest, note = _run(whole, file, names, tensors, axes)
        with explaining(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for one in sorted(folder.iterdir(), key=lambda one: one.name == path.name):
                os.replace(one, path.parent / one.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for module, mode in modes:
            module.training = mode
    shapes = {
        name: tuple(axes.get(name, {}).get(i, side) for i, side in enumerate(one.shape))
        for name, one in zip(names, tensors, strict=True)
    }
    return OnnxExport(path, shapes, output, count, unmatched, verified, difference, largest, note, len(rounded), unverified)


def _folder_next_to(path: Path) -> Path:
    """A new folder on the disk of a file to come, in which a file of its name can be written."""
    with suppress(FileNotFoundError, NotADirectoryError):
        path.lstat()  # another error, such as that of a path too long, comes before the work
    home = next(one for one in path.absolute().parents if os.path.lexists(one))
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:200]}-", dir=home))
    try:
        (folder / path.name).touch()
    except OSError:
        folder.rmdir()
        raise
    return folder


def onnx_metadata(path: str | Path) -> dict[str, str]:
    """The texts that an ONNX file has in its ``metadata_props``; none if the file is not an ONNX model."""
    _check_packages()
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError, ValueError):
        return {}
    return {one.key: one.value for one in model.metadata_props}


def _output_name(whole: _Exported, tensors: Sequence[Tensor]) -> str:
    """The name of the output: "logits" if its last axis is the vocabulary."""
    vocabulary = getattr(getattr(whole.model, "config", None), "vocab_size", None)
    try:
        made = whole(*tensors)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        given = ", ".join(whole.names or [f"{len(tensors)} tensors by position"])
        raise ValueError(f"the model cannot be called with {given}: {error_in_one_line(error)}") from error
    return "logits" if made.shape[-1] == vocabulary else "output"


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"exporting to ONNX needs onnx and onnxscript; {install_extra('serve')}") from error


def _named(inputs: Inputs) -> tuple[list[str], list[Tensor]]:
    if isinstance(inputs, Mapping):
        return list(inputs), list(inputs.values())
    tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    return (["input"] if len(tensors) == 1 else [f"input_{i}" for i in range(len(tensors))]), tensors


def _ordered(example: Inputs, names: Sequence[str], named: bool) -> list[Tensor]:
    """The tensors of an example in the order of the exported inputs; other entries, such as labels, are left out."""
    if not named:
        return _named(example)[1]
    if not isinstance(example, Mapping) or (missing := [name for name in names if name not in example]):
        raise ValueError(f"an example of int8_inputs lacks {missing[0] if isinstance(example, Mapping) else names[0]!r}")
    return [example[name] for name in names]


def _default_axes(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, dict[int, str]]:
    found = {name: dict.fromkeys(range(min(one.ndim, 1)), "batch") for name, one in zip(names, tensors, strict=True)}
    for name, one in zip(names, tensors, strict=True):
        if one.ndim == 2 and not one.is_floating_point():
            found[name] = {0: "batch", 1: "sequence"}
    return found


def _check_axes(names: Sequence[str], tensors: Sequence[Tensor], axes: DynamicAxes) -> None:
    """Raise ValueError for example inputs without elements, and for axes that no input has."""
    given = dict(zip(names, tensors, strict=True))
    if empty := [name for name, one in given.items() if not one.numel()]:
        raise ValueError(f"the example input {empty[0]!r} has no elements: pass one of at least one sample, to compare outputs")
    for name, own in axes.items():
        if name not in given:
            raise ValueError(f"dynamic_axes names {name!r}, which is no input: expected {', '.join(map(repr, names))}")
        if wrong := [axis for axis in own if axis not in range(given[name].ndim)]:
            raise ValueError(f"dynamic_axes[{name!r}] names axis {wrong[0]!r} of an input of {given[name].ndim} dimensions")


def _proto(whole: nn.Module, names: Sequence[str], tensors: Sequence[Tensor], axes: DynamicAxes, output: str) -> Any:
    """The exported graph, with the model's names for weights and the caller's names for axes."""
    from onnxscript import optimizer

    # An axis of length 1 would be exported as a constant.
    example = [_widened(one, axes.get(name, {})) for name, one in zip(names, tensors, strict=True)]
    shapes = tuple(dict.fromkeys(axes.get(name, {}), torch.export.Dim.DYNAMIC) for name in names)
    with warnings.catch_warnings(), _without_notes_of_the_exporter():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                whole,
                tuple(example),
                input_names=list(names),
                output_names=[output],
                dynamic_shapes=(shapes,),
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ValueError(f"torch cannot export {type(whole.model).__name__} to ONNX: {error_in_one_line(error)}") from error
        assert program is not None
        # Without the rewriting rules, which would fold batch norms into the weights before them.
        optimizer.inline(program.model)
        optimizer.fold_constants(
            program.model,
            input_size_limit=FOLDED,
            output_size_limit=FOLDED,
            # Otherwise transposed weights of any size would be stored under other names.
            should_fold=lambda node: False if node.op_type == "Transpose" else None,
        )
        optimizer.remove_unused_nodes(program.model)
    proto = program.model_proto
    rename_weights(proto, PREFIX)
    name_axes(proto, axes)
    return proto


@contextmanager
def _without_notes_of_the_exporter() -> Iterator[None]:
    """A context manager that hides torch's log lines about operators of packages that are not installed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _widened(tensor: Tensor, axes: Mapping[int, str]) -> Tensor:
    for axis in axes:
        if tensor.shape[axis] == 1:
            tensor = torch.cat([tensor, tensor], axis)
    return tensor


def _largest(values: Tensor) -> float:
    """The largest magnitude; that of NaN is infinite."""
    return float(values.abs().nan_to_num(math.inf, math.inf).max())


def _write(proto: Any, file: Path) -> Path:
    import onnx

    large = sum(len(one.raw_data) for one in proto.graph.initializer) > ONE_FILE_BYTES
    onnx.save(proto, str(file), save_as_external_data=large, location=f"{file.name}.data")
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _invalid(error) from error
    return file


def _invalid(error: Exception) -> ValueError:
    found = error_in_one_line(error)
    return ValueError(f"the graph that was exported is not valid ONNX; convert the model to float32 by model.float(): {found}")


def _run(
    whole: nn.Module, file: Path, names: Sequence[str], tensors: Sequence[Tensor], axes: DynamicAxes
) -> tuple[float | None, float | None, str]:
    """(the largest difference between onnxruntime and the model on two shapes, the largest output, a note)."""
    try:
        import onnxruntime
    except ImportError:
        return None, None, f"not run: {install_extra('serve')} for onnxruntime"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Further optimisations of onnxruntime round the inputs of products with int8 weights, which the file does not require.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common type, and it may not support bfloat16
        if all(one in str(error) for one in INVALID):
            raise _invalid(error) from error
        return None, None, f"onnxruntime cannot run it here: {str(error).splitlines()[0][:200]}"
    shorter = [
        one[tuple(slice(0, max(1, one.shape[i] - 1)) if i in axes.get(name, {}) else slice(None) for i in range(one.ndim))]
        for name, one in zip(names, tensors, strict=True)
    ]
    difference = largest = 0.0
    for example in (list(tensors), shorter):
        meant = whole(*example).float().cpu()
        given = {name: one.cpu().numpy() for name, one in zip(names, example, strict=True)}
        made = torch.from_numpy(session.run(None, given)[0]).float()
        if made.shape != meant.shape:
            raise CheckpointError(
                file, f"gives outputs of shape {tuple(made.shape)}, the model {tuple(meant.shape)}", "report this"
            )
        alike = (made == meant) | (made.isnan() & meant.isnan())  # also equal infinities, whose difference is NaN
        difference = max(difference, _largest(torch.where(alike, 0.0, made - meant)))
        largest = max(largest, _largest(meant))
    return difference, largest, ""
