"""Every model type of transformers that can be built without weights, and where a file's layers differ from its module's."""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bisparse.checkpoint.layer_selection import choose_layers
from bisparse.checkpoint.stored_tensor import FileTensor
from bisparse.layers import find_layers
from bisparse.pattern import Pattern
from bisparse.tiles import Layout

DEPTHS = {
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_encoder_layers",
    "num_decoder_layers",
}  # fmt: skip
MAIN = "MODEL_MAPPING"
CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


class Nothing:
    """The content of a file that is not read."""

    def read(self, offset: int, length: int, tensor: str = "") -> bytearray:
        raise AssertionError(f"{tensor} is read")


NOTHING = Nothing()


@dataclass(frozen=True)
class Built:
    """A model type: its model on the meta device, or why there is none."""

    type: str
    model: nn.Module | None
    config: dict[str, Any]
    problem: str = ""


def model_types() -> Iterator[Built]:
    """Every model type that transformers knows, of at most two layers per stack, on the meta device."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = [name for name in vars(modeling_auto) if name.startswith("MODEL_") and name.endswith("_MAPPING")]
    mappings = [getattr(modeling_auto, name) for name in sorted(names, key=lambda name: (name != MAIN, name))]
    warnings.simplefilter("ignore")
    for kind in CONFIG_MAPPING:
        try:
            config_class = CONFIG_MAPPING[kind]
            classes = (mapping[config_class] for mapping in mappings if config_class in mapping)
            found = next(classes, None)
        except (ImportError, ValueError) as error:
            yield Built(kind, None, {}, _line(error))
            continue
        if found is None:
            yield Built(kind, None, {}, "no model class of its own: a part of another")
            continue
        yield _built(kind, found[0] if isinstance(found, tuple) else found, config_class)


def _built(kind: str, model_class: Any, config_class: Any) -> Built:
    problem = ""
    for shallow in (True, False):
        try:
            config = config_class()
            if shallow:
                _make_shallow(config)
            with torch.device("meta"):
                model = model_class(config)
        except Exception as error:  # noqa: BLE001 (whatever a foreign class raises is listed)
            problem = problem or _line(error)
            continue
        return Built(kind, model, {**config.to_dict(), "architectures": [model_class.__name__]})
    return Built(kind, None, {}, problem)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]


def _make_shallow(config: Any) -> None:
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and not key.startswith("_"):
            _make_shallow(value)
        elif key in DEPTHS and isinstance(value, int) and value > 2:
            setattr(config, key, 2)
        elif key.endswith("layer_types") and isinstance(value, list):
            setattr(config, key, value[:2])


def disagreements(built: Built) -> list[str]:
    """Parameters of a model that a file of it is read differently for: how the module and the file see them."""
    assert built.model is not None
    layers, skipped = find_layers(built.model)
    by_module: dict[str, Layout | str] = {layer.parameter_name: layer.layout for layer in layers}
    reasons = {one.name: one.reason for one in skipped}
    tensors = {}
    owners: set[int] = set()
    for name, parameter in built.model.state_dict(keep_vars=True).items():
        if not isinstance(parameter, torch.Tensor):
            continue
        # A file holds a shared parameter once.
        if id(parameter) not in owners:
            owners.add(id(parameter))
            shape = tuple(parameter.shape)
            tensors[name] = FileTensor(name, CODES.get(parameter.dtype, "U8"), shape, Path("model.safetensors"), 0, 0, NOTHING)
    chosen, left = choose_layers(tensors, built.config, Pattern(2, 4), metadata={"format": "pt"})
    by_file: dict[str, Layout | str] = {layer.tensor.name: layer.layout for layer in chosen}
    left_dense = {one.name: one.reason for one in left}
    found = []
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if len(tensor.shape) < 2 or by_module.get(name) == by_file.get(name):
            continue
        module = by_module.get(name, reasons.get(layer, "not listed"))
        file = by_file.get(name, left_dense.get(layer, "not listed"))
        if "its output is the model's" not in str(module):  # data flow, which no file has
            found.append(f"{built.type}: {re.sub(r'[0-9]+', '*', name)} {tensor.shape}: module: {module}; file: {file}")
    return list(dict.fromkeys(found))
