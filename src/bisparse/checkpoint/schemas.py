"""Schemas that validate JSON from files before use: the index of shards, config.json, the shapes of masks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from bisparse.errors import CheckpointError

__all__ = ["Config", "Index", "MaskShapes", "check_depth", "check_text", "decode", "validate"]

T = TypeVar("T")

MAX_DEPTH = 100
"""Maximum nesting of JSON, since its users are recursive."""

MaskShapes = dict[str, Annotated[list[Annotated[int, Meta(ge=0, lt=1 << 48)]], Meta(max_length=8)]]
"""Shapes of the weights of packed masks."""


class Index(msgspec.Struct):
    """``model.safetensors.index.json``: the shard of each tensor."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1)]
    metadata: dict[str, Any] = {}


class Config(msgspec.Struct):
    """The parts of config.json that are used."""

    model_type: str | None = None
    architectures: list[str] | None = None


def validate(content: Any, kind: type[T], path: Path, remedy: str) -> T:
    """Decoded JSON as a value of a type.

    Raises:
        CheckpointError: the JSON does not match the type; says where.
    """
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(path, f"is not valid ({error})", remedy) from error


def decode(text: str, path: Path, remedy: str) -> Any:
    """Decode JSON in which all numbers are finite.

    Raises:
        CheckpointError: it is none, is nested too deeply, or has NaN, infinity, a number beyond a float, or no Unicode text.
    """

    def refuse(number: str) -> float:
        raise ValueError(f"{number[:32]} is not a finite number")

    def parse(number: str) -> float:
        return value if math.isfinite(value := float(number)) else refuse(number)

    try:
        content = json.loads(text, parse_constant=refuse, parse_float=parse)
        check_depth(content)
        check_text(content)
        return content
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(path, f"cannot be read as JSON ({problem})", remedy) from error


def check_text(content: Any) -> None:
    """Raise ValueError if decoded JSON has halves of characters, such as ``"\\ud800"``, which cannot be written anywhere."""
    json.dumps(content, ensure_ascii=False).encode()


def check_depth(content: Any) -> None:
    """Raise ValueError if decoded JSON is nested more deeply than `MAX_DEPTH`."""
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [
            inner for one in level if isinstance(one, dict | list) for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise ValueError("nested too deeply")
