"""The layers of a checkpoint without its model, by config.json, shapes and names of the stored tensors.

Evidence, in this order: the file's metadata, config.json (architecture, sizes), shapes of biases and of neighbouring tensors,
names. Tensors that remain uncertain are left dense with the reason, and the caller can give their layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from bisparse.layers.experts import config_parts, config_widths, experts_layout, is_pair
from bisparse.layers.kinds import DEPTHWISE, Kind
from bisparse.layers.names import BY_NAME, Names, is_embedding_name, is_transposed_by_name, layer_name, reads_input_by_name
from bisparse.layers.packed_numbers import quantisation_state
from bisparse.tiles import Layout, LayoutKind

__all__ = ["NOT_NAMED", "QUANTISED", "FileEvidence", "TensorInfo"]

PRUNABLE = ("F64", "F32", "F16", "BF16")

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
CONV1D_ARCHITECTURES = ("GPT2", "OpenAIGPT", "ImageGPT", "DecisionTransformer", "Clvp")
CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Models that use GPT-2's `Conv1D`, which stores (inputs, outputs), and the names of those layers."""

GIVE_LAYOUT = "give its layout: 'conv' or 'conv-transposed'"

INPUTS_FIRST_EXPERTS = ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter")
"""Models that store experts as (E, inputs, outputs), in case the sizes do not show it."""
GROUPS_BY_MODEL = {"mgp-str": 8}
"""Numbers of groups of convolutions in models whose configurations do not contain them."""
EXPERTS_IN_CONFIG = r"(^|_)(n|num)_(local_|routed_|moe_)?experts$|^moe_num_experts$|^n_routed_experts$"
CHANNELS_IN_CONFIG = (
    r"^(num_channels|in_channels|in_chans|num_mel_bins|input_channels|num_input_channels|n_mels|feature_size|input_feat.*)$"
)
VOCABULARIES_IN_CONFIG = r"vocab.*size|(^|_)vocab$"

QUANTISED = (
    "weight_integer",
    "weight_scale",
    "weight_scale_inv",
    "weight_scaling_factor",
    "fc_scaling_factor",
    "weight_zero_point",
)
"""Names of tensors that are next to a weight if its module quantises it."""

RECURRENT = r"(^|\.)weight_(ih|hh|hr)(_l\d+)?(_reverse)?$"
MOST_KERNEL = 31
"""Maximum odd kernel size for which a three-dimensional tensor is taken as a convolution without other evidence."""


NOT_NAMED = "not named as a layer's weight; give its layout, such as 'linear'"
EMBEDDING = "embedding: looked up, not multiplied"


@runtime_checkable
class TensorInfo(Protocol):
    """The properties of a stored tensor that are known before it is read."""

    @property
    def dtype(self) -> str:
        """The dtype's name in safetensors, such as ``"BF16"``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as stored."""


class FileEvidence:
    """The evidence of a whole checkpoint about its tensors."""

    def __init__(
        self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], metadata: Mapping[str, str] | None = None
    ) -> None:
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self._config = config
        self._names = Names(tensors)
        self._channels_last = (metadata or {}).get("format") == "mlx"
        self._numbers = list(_numbers(config))
        self._types = {str(part["model_type"]) for part in config_parts(config) if "model_type" in part}
        self._inputs_first = self._stores_inputs_first()
        input_channels = self._sizes(CHANNELS_IN_CONFIG)
        self._input_channels = input_channels - {shape[0] for shape in self._shapes.values() if len(shape) > 1}
        self._delivered = self._delivered_channels() | input_channels | set(_channel_lists(config))
        self._expert_counts = self._sizes(EXPERTS_IN_CONFIG)
        vocabularies = self._sizes(VOCABULARIES_IN_CONFIG)
        # A vocabulary of the same size as another dimension is no evidence.
        self._vocabularies = vocabularies - {
            number for key, number in self._numbers if not re.search(VOCABULARIES_IN_CONFIG, key)
        }

    def kind(self, name: str) -> Kind:
        """The kind of a tensor of two or more dimensions."""
        shape, layer = self._shapes[name], layer_name(name)
        if self._dtypes[name] not in PRUNABLE:
            return Kind(refused=f"dtype {self._dtypes[name]}: integers, quantised and packed weights cannot be pruned")
        if (state := quantisation_state(name, self._shapes)) is not None:
            return Kind(refused=f"packed numbers of bitsandbytes, since {state} is next to it")
        if 0 in shape:
            return Kind(refused="empty")
        if len(shape) > 5:
            return Kind(refused=f"{len(shape)} dimensions: not the weight of a GEMM")
        is_table = len(shape) == 2 and self._bias(name) is None
        default = EMBEDDING if is_table and is_embedding_name(layer) else self._names.default_reason(name) or ""
        if not default and is_table and shape[0] in self._vocabularies and shape[0] > shape[1]:
            default = f"embedding or output head: its {shape[0]} rows are the vocabulary; {BY_NAME}"
        scales = [one for one in QUANTISED if f"{layer}.{one}" in self._shapes]
        if scales and name.endswith(".weight"):
            return Kind(uncertain=f"its module quantises it, since {scales[0]} is next to it; give its layout if it does not")
        kind = self._by_shape(name, layer)
        return Kind(kind.layout, kind.refused, kind.uncertain, default or kind.default)

    def _stores_inputs_first(self) -> bool:
        """Whether ``c_attn`` and similar layers are `Conv1D`, by the architecture or, without a config, by lengths of biases."""
        if self._types:
            return bool(self._types & set(CONV1D_MODELS))
        if architectures := self._config.get("architectures"):
            return any(str(one).startswith(CONV1D_ARCHITECTURES) for one in architectures)
        for name, shape in self._shapes.items():
            bias = self._bias(name)
            if _last(name) in CONV1D_NAMES and bias is not None and len(shape) == 2 and shape[0] != shape[1]:
                return bias == shape[1]
        return False

    def _delivered_channels(self) -> set[int]:
        """The numbers of outputs of all layers and norms in the file, which a convolution may read."""
        found = {shape[0] for name, shape in self._shapes.items() if len(shape) == 1 or len(shape) > 2}
        return found | {side for shape in self._shapes.values() if len(shape) == 2 for side in shape}

    def _sizes(self, key: str) -> set[int]:
        """Numbers in config.json and its nested configurations, by name."""
        return {number for name, number in self._numbers if re.search(key, name)}

    def _bias(self, name: str) -> int | None:
        """Length of the bias next to a weight; None if there is none."""
        shape = self._shapes.get(f"{layer_name(name)}.bias")
        return shape[0] if shape is not None and len(shape) == 1 else None

    def _norm_after(self, layer: str) -> int | None:
        """Size of the norm in the same small module as a convolution; None if there is none."""
        parent = layer.rpartition(".")[0]
        for one in ("normalization", "norm", "bn", "batch_norm", "batchnorm"):
            shape = self._shapes.get(f"{parent}.{one}.weight" if parent else f"{one}.weight")
            if shape is not None and len(shape) == 1:
                return shape[0]
        return None

    def _by_shape(self, name: str, layer: str) -> Kind:
        shape = self._shapes[name]
        last = _last(name)
        if re.search(RECURRENT, name) and len(shape) == 2:
            return Kind(Layout(LayoutKind.LINEAR))
        if last == "in_proj_weight" and len(shape) == 2 and shape[0] % 3 == 0:
            return Kind(Layout(LayoutKind.PACKED, parts=3))
        if len(shape) == 3 and self._is_experts(name):
            return self._experts(name)
        if not (name.endswith(".weight") or name == "weight" or last.endswith("proj_weight")):
            return Kind(uncertain=NOT_NAMED)
        if len(shape) == 2:
            bias = self._bias(name)
            inputs_first = self._inputs_first and last in CONV1D_NAMES
            if bias is not None and bias == shape[1] != shape[0]:
                inputs_first = True
            return Kind(Layout(LayoutKind.TRANSPOSED if inputs_first else LayoutKind.LINEAR))
        return self._convolution(name, layer)

    def _is_experts(self, name: str) -> bool:
        shape = self._shapes[name]
        near = ".".join(layer_name(name).lower().split(".")[-2:])
        if "expert" in near:
            return True
        if shape[0] == 1 or "conv" in near or self._bias(name) == shape[0]:
            return False
        if shape[0] in self._expert_counts or re.search(r"(^|[._])moe([._]|$)", name.lower()):
            return True
        return any(is_pair(shape, other) for other in self._stacks(name).values() if other is not shape)

    def _stacks(self, name: str) -> dict[str, tuple[int, ...]]:
        """Stacks of equally many matrices in the same module."""
        parent = layer_name(name).rpartition(".")[0]
        return {
            one: shape
            for one, shape in self._shapes.items()
            if len(shape) == 3 and shape[0] == self._shapes[name][0] and layer_name(one).rpartition(".")[0] == parent
        }

    def _experts(self, name: str) -> Kind:
        stacks = self._stacks(name)
        count = self._shapes[name][0]
        parent = layer_name(name).rpartition(".")[0]
        mixture = parent.rpartition(".")[0] if "expert" in parent.rsplit(".", 1)[-1] else parent
        near = {
            one: shape
            for one, shape in self._shapes.items()
            if len(shape) == 2 and one.startswith(f"{mixture}." if mixture else "")
        }
        biases = {one: shape for one, shape in near.items() if one.startswith(parent)}
        routers = {shape[1] for one, shape in near.items() if shape[0] == count and one.endswith(".weight")}
        layout = experts_layout(name, stacks, biases, routers or config_widths(self._config))
        if isinstance(layout, Layout):
            return Kind(layout)
        if self._types & set(INPUTS_FIRST_EXPERTS):
            return Kind(Layout(LayoutKind.EXPERTS_TRANSPOSED))
        return Kind(uncertain=layout)

    def _convolution(self, name: str, layer: str) -> Kind:
        shape, bias = self._shapes[name], self._bias(name)
        if self._channels_last:
            if shape[-1] == 1 and shape[0] > 1:
                return Kind(refused=DEPTHWISE)
            return Kind(Layout(LayoutKind.CONV_LAST), default=self._first_convolution(layer, shape[-1]))
        if "bilinear" in layer.lower():
            return Kind(refused="bilinear layer: no single matrix multiplies its inputs")
        if shape[1] == 1 and bias != 1:
            return Kind(refused=DEPTHWISE)
        if len(shape) == 3 and not self._is_conv1d(layer, shape, bias):
            return Kind(
                uncertain="three dimensions, which may be a convolution or experts; give its layout: 'conv', "
                "'experts' for (E, outputs, inputs) or 'experts-transposed' for (E, inputs, outputs)"
            )
        if len(shape) == 4 and shape[1] == shape[2] != shape[3] and shape[1] <= MOST_KERNEL:
            return Kind(
                uncertain=f"a kernel of {shape[2]} x {shape[3]} over {shape[1]} channels looks like channels last; give its "
                "layout: 'conv-last', or 'conv' if this is wrong"
            )
        return self._oriented(layer, shape, bias)

    def _is_conv1d(self, layer: str, shape: tuple[int, ...], bias: int | None) -> bool:
        kernel = shape[2]
        return (
            "conv" in layer.lower()
            or kernel == 1
            or (bias is not None and bias in shape[:2])
            or (not self._config and kernel <= MOST_KERNEL and (kernel % 2 == 1 or kernel <= 4))
        )

    def _oriented(self, layer: str, shape: tuple[int, ...], bias: int | None) -> Kind:
        """A plain or transposed convolution, by its bias, otherwise by its name and kernel."""
        by_name = is_transposed_by_name(layer, shape[2:])
        if bias is not None and bias not in shape[:2]:
            # Transposed with groups: (C_in, C_out / groups, *kernel).
            parts, rest = divmod(bias, shape[1])
            if rest or shape[0] % parts:
                return Kind(uncertain=f"its bias of {bias} fits no convolution of shape {shape}; {GIVE_LAYOUT}")
            return Kind(refused=DEPTHWISE) if parts == shape[0] else Kind(Layout(LayoutKind.CONV_TRANSPOSED, groups=parts))
        if bias is not None and shape[0] != shape[1]:
            is_transposed: bool | None = bias == shape[1]
            if not is_transposed and by_name and shape[0] % shape[1] == 0:
                return Kind(
                    uncertain="its bias is that of a plain convolution, or of a transposed one with "
                    f"{shape[0] // shape[1]} groups, as its name says; {GIVE_LAYOUT}"
                )
        else:
            is_transposed = by_name
            norm = self._norm_after(layer)
            if is_transposed is None and (norm == shape[0]) != (norm == shape[1]):
                is_transposed = norm == shape[1]
        if is_transposed is None:
            kernel = " x ".join(map(str, shape[2:]))
            return Kind(
                uncertain=f"its name and its kernel of {kernel} do not show whether the convolution is transposed; {GIVE_LAYOUT}"
            )
        if is_transposed:
            return Kind(refused=DEPTHWISE) if shape[0] == 1 else Kind(Layout(LayoutKind.CONV_TRANSPOSED))
        if shape[1] == 1:
            return Kind(refused=DEPTHWISE)
        default, groups = self._first_convolution(layer, shape[1]), self._groups(layer, shape)
        if groups is not None:
            return Kind(Layout(LayoutKind.CONV, groups=groups), default=default)
        return Kind(
            uncertain=f"reads {shape[1]} channels per output, which no layer in the file outputs: a convolution with groups, or "
            "one that reads the model's input; give its layout, such as 'groups:32' or 'conv'",
            default=default,
        )

    def _groups(self, layer: str, shape: tuple[int, ...]) -> int | None:
        """The groups of a convolution (C_out, C_in / groups, *kernel); None if unknown.

        A convolution with groups usually has as many outputs as inputs, so its C_in / groups divides its C_out.
        """
        outputs, inputs = shape[:2]
        for key, number in self._numbers:
            if "group" not in key or number < 2 or outputs % number:
                continue
            if "width" in key and inputs == number:
                return outputs // number
            of = re.sub(r"^(num|n)_|_?groups?$", "", key)
            if self._reads(inputs * number) and (not self._reads(inputs) or (of and f".{of}." in f".{layer}.")):
                return number
        known = next((number for model, number in GROUPS_BY_MODEL.items() if model in self._types), None)
        if known and not self._reads(inputs) and self._reads(inputs * known):
            return known
        fits = inputs < outputs and outputs % inputs == 0
        if fits and "group" in layer.rsplit(".", 1)[-1].lower():
            return outputs // inputs
        return None if fits and not self._reads(inputs) else 1

    def _reads(self, channels: int) -> bool:
        return channels == 3 or channels in self._delivered

    def _first_convolution(self, layer: str, channels: int) -> str:
        if channels == 3 or reads_input_by_name(layer) or channels in self._input_channels:
            return f"first convolution (reads {channels} channels); {BY_NAME}"
        return ""


def _last(name: str) -> str:
    return layer_name(name).rsplit(".", 1)[-1]


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for part in config_parts(config):
        for key, value in part.items():
            if isinstance(value, int) and not isinstance(value, bool):
                yield str(key), value


def _channel_lists(config: Mapping[str, Any]) -> Iterator[int]:
    """Channels of a model's stages, from lists in its configuration."""
    for part in config_parts(config):
        for key, value in part.items():
            if isinstance(value, list) and re.search(r"channels|hidden_sizes|embed_dims", str(key)):
                yield from (one for one in value if isinstance(one, int) and not isinstance(one, bool))
