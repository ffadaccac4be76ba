"""Every model type of transformers that can be built without weights, and where a file's layers differ from its module's."""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bisparse.checkpoint import plan_checkpoint
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
LARGEST_SAVED = 1 << 23
"""Numbers in a model that is written to disk."""
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


def as_saved(model: nn.Module) -> dict[str, Tensor]:
    """What `save_pretrained` would write: parameters and buffers by their names in files, fused ones apart, shared ones once."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: one for name, one in model.state_dict(keep_vars=True).items() if isinstance(one, Tensor)}
    with torch.no_grad():
        saved: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    owners: set[int] = set()
    once = {}
    for name in [*(name for name in state if name in saved), *(name for name in saved if name not in state)]:
        if id(saved[name]) not in owners:
            owners.add(id(saved[name]))
            once[name] = saved[name]
    return once


def disagreements(built: Built) -> list[str]:
    """Parameters of a model that a file of it is read differently for: how the module and the file see them.

    A parameter that is saved under another name may stay dense in the file for the sake of that name. Of parameters that are
    fused in the module and apart in the file, or the other way round, the numbers of weights to prune are compared.
    """
    assert built.model is not None
    layers, skipped = find_layers(built.model)
    by_module: dict[str, Layout | str] = {layer.parameter_name: layer.layout for layer in layers}
    reasons = {one.name: one.reason for one in skipped}
    state = built.model.state_dict(keep_vars=True)
    own_names = {id(one): name for name, one in reversed(state.items())}
    saved = as_saved(built.model)
    tensors = {
        name: FileTensor(name, CODES.get(one.dtype, "U8"), tuple(one.shape), Path("model.safetensors"), 0, 0, NOTHING)
        for name, one in saved.items()
    }
    chosen, left = choose_layers(tensors, built.config, Pattern(2, 4), metadata={"format": "pt"})
    by_file: dict[str, Layout | str] = {layer.tensor.name: layer.layout for layer in chosen}
    left_dense = {one.name: one.reason for one in left}
    found = []
    apart_in_file, in_both = 0, set()
    for name, tensor in tensors.items():
        own = own_names.get(id(saved[name]))
        if own is None:
            apart_in_file += saved[name].numel() if name in by_file else 0
            continue
        in_both.add(own)
        if len(tensor.shape) < 2 or by_module.get(own) == by_file.get(name):
            continue
        module = by_module.get(own, reasons.get(own.removesuffix(".weight"), "not listed"))
        file = by_file.get(name, left_dense.get(name.removesuffix(".weight"), "not listed"))
        by_its_name = own != name and any(reason in str(file) for reason in ("(its name ends in", "embedding: "))
        if "its output is the model's" not in str(module) and not by_its_name:  # data flow, which no file has
            found.append(f"{built.type}: {re.sub(r'[0-9]+', '*', name)} {tensor.shape}: module: {module}; file: {file}")
    shared = {id(one) for name, one in state.items() if name in in_both}
    apart = sum(one.numel() for name, one in state.items() if name in by_module and id(one) not in shared)
    if apart != apart_in_file:
        found.append(f"{built.type}: of fused parameters the module prunes {apart:,} weights, a file {apart_in_file:,}")
    return list(dict.fromkeys(found))


def differs_once_saved(built: Built, folder: Path) -> list[str] | None:
    """Layers that a folder written by `save_pretrained` is read differently for than `as_saved`; None if it is too large."""
    model = built.model
    assert model is not None
    if sum(one.numel() for one in model.state_dict().values() if isinstance(one, Tensor)) > LARGEST_SAVED:
        return None
    tensors = {
        name: FileTensor(name, CODES.get(one.dtype, "U8"), tuple(one.shape), Path("model.safetensors"), 0, 0, NOTHING)
        for name, one in as_saved(model).items()
    }
    expected = {one.tensor.name for one in choose_layers(tensors, built.config, Pattern(2, 4), metadata={"format": "pt"})[0]}
    filled = model.to_empty(device="cpu")
    with torch.no_grad():
        for one in (*filled.parameters(), *filled.buffers()):
            one.zero_()
    try:
        filled.save_pretrained(folder)
    except Exception:  # noqa: BLE001 (some classes cannot be saved, such as those without a file of their own)
        return None
    found = {one.tensor.name for one in plan_checkpoint(folder, "2:4").layers} if expected else set()
    return [f"{built.type}: {name}: in one of the two only" for name in sorted(found ^ expected)]
