"""`to_dense`: writes any readable checkpoint as plain dense weights with zeros, which load anywhere."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

from bisparse.apart import check_apart
from bisparse.arguments import check_function
from bisparse.checkpoint.atomic_folder import PLAIN, check_room, output_folder
from bisparse.checkpoint.prune import SLACK, Progress, copy_others, limit_permissions, read_back
from bisparse.checkpoint.reader import Source, open_source
from bisparse.checkpoint.sidecar import plain_mark
from bisparse.checkpoint.stored_tensor import SafetensorsWriter
from bisparse.errors import CheckpointError
from bisparse.layers import shows_packed_numbers

__all__ = ["to_dense"]

STORED = ("I8", "F8_E4M3", "F8_E5M2")
"""Dtypes of quantised weights with a place for each number."""


def to_dense(
    source: str | Path,
    target: str | Path,
    *,
    key: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Source:
    """Write a checkpoint as plain safetensors into a new folder, with every weight dense, unchanged and under its own name.

    For checkpoints of compressed-tensors (``sparse-24-bitmask``, ``sparse-bitmask``), torch's semi-structured tensors,
    ``weight_orig`` and ``weight_mask`` of `torch.nn.utils.prune`, and training checkpoints of bisparse. config.json is copied
    without its sparsity_config and without a quantization_config that quantises nothing, and so are the source's other files.
    Numbers of quantised weights are copied with their scales where each has a place of its own (int8, float8).
    The target only appears once it is complete and its files have been read back. `bisparse-plain.json` marks it as written by
    bisparse.

    Args:
        source: the checkpoint. ``x.pt`` is written as ``x.safetensors``; shards and their index keep their names.
        key: where a torch file keeps the state dict, such as ``"model.state_dict"``; by default it is found.
        overwrite: replace a target that bisparse wrote.

    Returns:
        The source, with `notes` on what was unpacked, copied and left out.

    Raises:
        CheckpointError: the source cannot be read or has packed numbers of quantised weights, or the target exists, cannot be
            written or overlaps the source.
    """
    opened = open_source(source, key)
    opened.check_writable()
    _check_unpacked(opened)
    target = Path(target)
    check_apart(target, {"source": opened.path})
    check_function("progress", progress)
    report: Progress = (lambda what, done, total: None) if progress is None else progress
    total, done = 2 * opened.nbytes, 0
    with output_folder(target, overwrite=overwrite) as folder:
        check_room(folder, opened.nbytes + sum((opened.path / name).stat().st_size for name in opened.others) + SLACK)
        checksums: dict[str, int] = {}
        for shard in opened.shards:
            with SafetensorsWriter(folder / shard.file, shard.header) as writer:
                for tensor in shard.tensors:
                    checksum = 0
                    for piece in tensor.pieces():
                        report(tensor.name, done, total)
                        checksum = zlib.crc32(piece, checksum)
                        writer.write(piece)
                        done += len(piece)
                    checksums[tensor.name] = checksum
        if opened.index is not None:
            name, text = opened.index
            (folder / name).write_text(text, encoding="utf-8")
        notes = (*_quantised(opened), *copy_others(opened, folder))
        opened.check_unchanged()
        (folder / PLAIN).write_text(plain_mark(opened.name, (*opened.notes, *notes)), encoding="utf-8")
        limit_permissions(folder, opened, (PLAIN,))
        for shard in opened.shards:
            read_back(
                folder / shard.file, shard.tensors, checksums, {}, lambda tensor: report(f"check {tensor.name}", done, total)
            )
    report("", total, total)
    return replace(opened, notes=(*opened.notes, *notes))


def _check_unpacked(source: Source) -> None:
    packed = [name for name, tensor in source.tensors.items() if shows_packed_numbers(name, tensor.dtype, source.tensors)]
    if packed:
        others = f" (and {len(packed) - 1} others)" if len(packed) > 1 else ""
        raise CheckpointError(
            source.path,
            f"has the packed numbers of a quantised weight{others}, which are not unpacked",
            "use the checkpoint from before the quantisation, or dequantise it with the library that wrote it",
            tensor=packed[0],
        )


def _quantised(source: Source) -> tuple[str, ...]:
    """A note on quantised weights that are copied as they are."""
    count = sum(tensor.dtype in STORED and name.endswith("weight") for name, tensor in source.tensors.items())
    if count == 0:
        return ()
    return (f"the numbers of {count} quantised weights (int8, float8) are copied as they are stored, with their scales",)
