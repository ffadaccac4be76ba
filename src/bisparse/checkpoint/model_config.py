"""config.json of plain weights: without what says that they are stored as sparse ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["plain_config"]

COMPRESSION = ("quantization_config", "compression_config")


def plain_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A config.json for plain weights; None where it is one already.

    Left out, at any depth, are ``sparsity_config``, which serving engines reject and for which loaders look for packed weights,
    and a configuration of compressed-tensors that quantises nothing, for which transformers would ask for that package.
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
