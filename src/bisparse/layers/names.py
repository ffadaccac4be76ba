"""What the name of a parameter says about its role: heads, embeddings, routers, adapters, tokens, first convolutions.

The same rules serve models and files. They only ever leave a parameter dense by default; `include` overrules them, by name.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection

__all__ = ["Names", "head_reason", "is_embedding_name", "is_transposed_by_name", "layer_name", "reads_input_by_name"]

HEAD_NAMES = (
    "lm_head", "classifier", "head", "fc", "score", "embed_out", "output_layer", "logits", "output_projection", "lm_output",
    "*_head",
)  # fmt: skip
"""A layer whose last name is one of these is an output head, in the naming habits of torch, timm, fairseq and transformers."""
OUTER_HEADS = ("linear", "output", "out", "final", "last_linear", "fc_out", "predict", "prediction", "output_proj")
"""The same of a layer of the model itself, of which no other is a head: the names alone are too common."""
HEAD_PATHS = ("*predictions.decoder", "*generator_lm_head")
WRAPPERS = ("module", "model", "_orig_mod", "net", "network", "backbone", "student", "_forward_module", "_fsdp_wrapped_module")
"""First names that belong to whoever wrapped or trained the model."""

EMBEDDINGS = (
    "embed", "embed_*", "embedding", "embeddings", "*_embed", "*_embeds", "*_embedding", "*_embeddings", "tok_embeddings",
    "*_embeddings_[0-9]*", "*_embedder", "*embedder_[0-9]*", "wte", "wpe", "wtt", "shared", "relative_attention_bias", "emb",
    "*_emb", "*_embeds_layer", "*_embedding_table", "*_embeddings_table", "codebook", "lookup_table",
    "relative_position_bias_table", "reference_points", "pe_k", "pe_v", "bias_values",
)  # fmt: skip
"""Last names of embeddings, in the habits of transformers, timm, fairseq, Whisper and Llama's own code."""

ROUTERS = ("gate", "router", "wg", "gating", "switch")
"""Names of a mixture's router, where experts are next to it."""
ROUTER = r"(^|[._])router([._]|$)|shared_expert_gate$|gate_network"

ADAPTERS = r"(^|[._])(lora|dora|hada|lokr|ia3|vera|vblora|boft|oft)(_|\.)|_lora(\.|$)|(^|\.)prompt_encoder\."
"""Low-rank and other adapters, as peft, diffusers and kohya name them."""

TOKENS = r"(^|[._])tokens?$|(^|\.)(query_feat|quer(y|ies)_features|latents|latent_query|probe|prompt)$|^quer(y|ies)$"
"""Learned inputs: class and mask tokens, queries of detection transformers, latents of perceivers."""

NORMS = r"(^|[._])(layer|group|batch|rms|instance|input|post)?_?(norm|ln|bn)\d*$|layernorm[a-z_]*$"

FIRST_CONVOLUTIONS = (
    r"patch_embed|(^|\.)(conv_in|conv_stem|stem_conv|conv_first|first_conv|input_conv|conv_input|conv_pre|quant_conv)$|"
    r"(^|\.)stem\.conv(\.conv)?$|(^|\.)(audio_tower|audio_encoder|encoder)\.conv1$"
)
"""Names of convolutions that read the input of a model or of a part of it."""

TRANSPOSED = r"conv_?trans|deconv|trans_?conv|convt_|conv_?tr(\.|$)"
"""Names that only transposed convolutions have."""
ENLARGING = r"up_?conv|upscale|up_?sampl|unpool|(^|[._])(up|resize|conv_up)([._]|\d|$)"
"""Names of what enlarges its input: a transposed convolution, or a plain one after an interpolation."""
REDUCING = r"down|subsampl|reduc|(^|\.)sr(\.|$)|patch|strid|squeeze|feature_extractor|pool|to_molecules"
"""Names of what makes its input smaller, which a plain convolution does."""


def layer_name(parameter: str) -> str:
    """A parameter's name without ``.weight``, as layers are named."""
    return parameter.removesuffix(".weight")


def _last(layer: str) -> str:
    # Private attributes count as what they are: EfficientNet's head is `_fc`.
    return layer.rsplit(".", 1)[-1].lower().strip("_")


def head_reason(name: str) -> str | None:
    """Why a layer of this name stays dense by default as an output head, or None."""
    layer = layer_name(name)
    last = _last(layer)
    if any(fnmatch.fnmatchcase(last, one) for one in HEAD_NAMES) or any(fnmatch.fnmatchcase(layer, one) for one in HEAD_PATHS):
        return f"output head (its name ends in '{last}'); include it by name to prune it"
    return None


def _unwrapped(layer: str) -> str:
    """A layer's name without that of whoever wrapped the model."""
    first, _, rest = layer.partition(".")
    return _unwrapped(rest) if rest and first.lower() in WRAPPERS else layer


def is_embedding_name(layer: str) -> bool:
    """Whether a layer is named as an embedding is, or its list of layers."""
    parts = [part for part in layer.split(".") if not part.isdecimal()] or [layer]
    return any(fnmatch.fnmatchcase(_last(one), glob) for glob in EMBEDDINGS for one in (parts[-1], layer))


def reads_input_by_name(layer: str) -> bool:
    """Whether a convolution is named as one that reads the model's input."""
    return re.search(FIRST_CONVOLUTIONS, layer.lower()) is not None


def is_transposed_by_name(layer: str, kernel: tuple[int, ...]) -> bool | None:
    """Whether a convolution is a transposed one, by its name and kernel; None where these do not tell.

    Transposed convolutions enlarge by even factors with even kernels, as a rule; plain ones have even kernels where they reduce.
    """
    name = layer.lower()
    if re.search(TRANSPOSED, name):
        return True
    if all(size == 1 for size in kernel):
        return False
    if all(size % 2 for size in kernel):
        return None if re.search(r"up_?conv\d*$", name) else False
    # Of both, the later name is of the smaller part of the model.
    enlarging, reducing = (max((one.start() for one in re.finditer(rule, name)), default=-1) for rule in (ENLARGING, REDUCING))
    return None if enlarging == reducing else enlarging > reducing


class Names:
    """What the names of all parameters of a model or file say about each of them."""

    def __init__(self, parameters: Collection[str]) -> None:
        self._mixtures: set[str] = set()
        self._sequential_ends: dict[str, int] = {}
        layers = {layer_name(name) for name in parameters if name.endswith("weight")}
        outer = {layer for layer in layers if _last(_unwrapped(layer)) in OUTER_HEADS and "." not in _unwrapped(layer)}
        has_head = any(head_reason(layer) for layer in layers)
        self._outer_head = outer.pop() if len(outer) == 1 and len(layers) > 1 and not has_head else None
        for name in parameters:
            if "expert" in name:
                self._mixtures.add(name.split("expert")[0].rpartition(".")[0])
            parent, _, index = layer_name(name).rpartition(".")
            if index.isdecimal():
                self._sequential_ends[parent] = max(self._sequential_ends.get(parent, -1), int(index))

    def default_reason(self, parameter: str) -> str | None:
        """Why a parameter stays dense by default, by its name and those around it; None where they say nothing."""
        layer = layer_name(parameter)
        if re.search(ADAPTERS, layer):
            return "low-rank (LoRA) or other adapter: its base layer is the one to prune; include it by name to prune it"
        if self._is_router(layer):
            return "router of a mixture of experts; include it by name to prune it"
        parent, _, index = layer.rpartition(".")
        is_last = index.isdecimal() and self._sequential_ends.get(parent) == int(index)
        if (head := head_reason(parent if is_last and parent else layer)) is not None:
            return head
        if layer == self._outer_head:
            return f"output head (the model's own '{_last(layer)}'); include it by name to prune it"
        if re.search(NORMS, _last(parent if _last(layer) in ("scale", "shift", "gamma", "beta") else layer)):
            return "normalisation: it scales, and is no matrix of a product; include it by name to prune it"
        if re.search(TOKENS, layer.lower()):
            return "learned token or query: an input, no weight that inputs are multiplied by"
        return None

    def _is_router(self, layer: str) -> bool:
        if re.search(ROUTER, layer.lower()):
            return True
        parts = layer.split(".")
        return any(part.lower() in ROUTERS and ".".join(parts[:at]) in self._mixtures for at, part in enumerate(parts))
