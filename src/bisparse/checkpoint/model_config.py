"""Removes the settings for sparse storage from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["plain_config"]

COMPRESSION = ("quantization_config", "compression_config")


def plain_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config.json for plain weights; None if it needs no change.

    Removes, at any depth, ``sparsity_config``, which serving engines reject and which makes loaders expect packed weights, and a
    compressed-tensors configuration that quantises nothing, for which transformers would require that package.
    """
    plain = _plain(config)
    return plain if plain != config else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: _plain(inner) for key, inner in value.items() if key != "sparsity_config"}
        return {key: inner for key, inner in kept.items() if not (key in COMPRESSION and _quantises_nothing(inner))}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _quantises_nothing(configuration: Any) -> bool:
    return (
        isinstance(configuration, Mapping)
        and configuration.get("quant_method", "compressed-tensors") in ("compressed-tensors", "sparseml")
        and not configuration.get("config_groups")
        and not configuration.get("kv_cache_scheme")
        and configuration.get("format") in (None, "dense")
        and ("format" in configuration or "quant_method" in configuration or not configuration)
    )
