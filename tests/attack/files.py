"""Crafted files: whatever is read is what an independent reader finds there, or ends in an error of the domain."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bisparse
from attack.found import Found, attempt, bits, run_command, tree
from bisparse.checkpoint import detect_patterns, load_masks, read_sidecar, to_dense

__all__ = ["attack"]

State = dict[str, Tensor]
ITEMS = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
HOSTILE: list[Callable[[random.Random], Any]] = [
    lambda choose: None,
    lambda choose: True,
    lambda choose: -1,
    lambda choose: 0,
    lambda choose: 2**63,
    lambda choose: 10**400,
    lambda choose: 1e300,
    lambda choose: float("nan"),
    lambda choose: float("inf"),
    lambda choose: 0.5,
    lambda choose: "",
    lambda choose: "x" * 5000,
    lambda choose: "../../escape",
    lambda choose: "/etc/passwd",
    lambda choose: "a\x1b[2Jb\n",
    lambda choose: "\ud800",
    lambda choose: [],
    lambda choose: {},
    lambda choose: [[]],
    lambda choose: {"": None},
    lambda choose: [1, "a", None],
    lambda choose: -4,
    lambda choose: "2:4",
    lambda choose: "4:2",
    lambda choose: "0:0-T",
    lambda choose: "model.safetensors",
    lambda choose: nested(choose),
    lambda choose: [2**40, 2**40],
    lambda choose: 499_999,
    lambda choose: "torch.nn",
    lambda choose: "1:99999-T",
]


def nested(choose: random.Random) -> Any:
    value: Any = 1
    for _ in range(choose.choice([50, 900])):
        value = [value] if choose.random() < 0.5 else {"a": value}
    return value


def state_of(choose: random.Random) -> State:
    state: State = {
        "embed_tokens.weight": torch.randn(24, 16),
        "layers.0.up.weight": torch.randn(24, 16),
        "layers.0.up.bias": torch.randn(24),
        "layers.0.down.weight": torch.randn(16, 24).bfloat16(),
        "layers.1.up.weight": torch.randn(32, 16).half(),
        "norm.weight": torch.randn(16),
        "position_ids": torch.arange(9).view(1, 9),
    }
    for name in list(state):
        if choose.random() < 0.15:
            del state[name]
    state["layers.2.up.weight"] = torch.randn(8, 16)
    if choose.random() < 0.3:
        state["layers.2.up.weight"] *= bisparse.solve(state["layers.2.up.weight"].abs(), "2:4-T").mask
    return state


# ---- what an independent reader finds


def own_safetensors(path: Path) -> State | None:
    """The tensors of a file by its specification; None if it breaks the specification."""
    data = path.read_bytes()
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_without_duplicates)
        body, state, end = data[8 + length :], {}, 0
        if len(data) < 8 + length or not isinstance(header, dict):
            return None
        for name, one in sorted(((k, v) for k, v in header.items() if k != "__metadata__"), key=lambda kv: kv[1]["data_offsets"]):
            first, last = one["data_offsets"]
            size = ITEMS[one["dtype"]]
            for side in one["shape"]:
                if type(side) is not int or side < 0:
                    return None
                size *= side
            if type(first) is not int or first != end or last - first != size or last > len(body):
                return None
            end = last
            state[name] = torch.frombuffer(bytearray(body[first:last]) or bytearray(1), dtype=torch.uint8)[:size]
            state[name] = state[name].view(DTYPES[one["dtype"]]).view(one["shape"])
        return state if end == len(body) else None
    except (ValueError, KeyError, TypeError, RecursionError, struct.error, RuntimeError, OverflowError):
        return None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


def own_torch(path: Path, original: State) -> State | None:
    """The tensors as torch reads them; where torch reads nothing, those that were written."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001
        return original
    if not isinstance(loaded, dict) or not all(isinstance(one, Tensor) for one in loaded.values()):
        return None
    return {name: one.resolve_neg().resolve_conj() for name, one in loaded.items()}


# ---- crafting


def flipped(data: bytes, choose: random.Random, first: int = 0) -> bytes:
    changed = bytearray(data)
    for _ in range(choose.choice([1, 1, 2, 8])):
        if len(changed) > first:
            changed[choose.randrange(first, len(changed))] ^= 1 << choose.randrange(8)
    return bytes(changed)


def damaged(data: bytes, choose: random.Random) -> bytes:
    kind = choose.randrange(5)
    if kind == 0:
        return data[: choose.randrange(len(data) + 1)]
    if kind == 1:
        return data + choose.randbytes(choose.choice([1, 8, 1000]))
    if kind == 2:
        at = choose.randrange(len(data) + 1)
        return data[:at] + choose.randbytes(choose.choice([1, 2, 8])) + data[at:]
    return flipped(data, choose, 0 if kind == 3 else max(0, len(data) - 400))


def mutated(value: Any, choose: random.Random) -> Any:
    """JSON with one node, or one key, replaced, removed or doubled."""
    value = json.loads(json.dumps(value))
    node, steps = value, choose.randrange(6)
    while isinstance(node, dict | list) and node:
        key = choose.choice(list(node)) if isinstance(node, dict) else choose.randrange(len(node))
        if steps == 0 or not isinstance(node[key], dict | list) or not node[key]:
            if choose.random() < 0.15:
                del node[key]
            elif choose.random() < 0.1 and isinstance(node, dict):
                node[str(choose.choice(HOSTILE)(choose))] = node.pop(key)
            else:
                node[key] = choose.choice(HOSTILE)(choose)
            return value
        node, steps = node[key], steps - 1
    return choose.choice(HOSTILE)(choose)


def json_bytes(value: Any, choose: random.Random) -> bytes:
    """Text of a JSON value, at times with a key twice, bytes that are no UTF-8, or its end missing."""
    data = json.dumps(value).encode()
    kind = choose.random()
    if kind < 0.08 and data.startswith(b"{") and len(value) > 0:
        name = json.dumps(next(iter(value))).encode()
        return b"{" + name + b": 1, " + data[1:]
    if kind < 0.14:
        return flipped(data, choose)
    if kind < 0.18:
        return data[: choose.randrange(len(data) + 1)]
    if kind < 0.21:
        return data.replace(b"a", b"\xff", 1)
    if kind < 0.24:
        return b"[" * 100_000
    if kind < 0.26:
        return b"\xef\xbb\xbf" + data
    return data


def crafted_safetensors(path: Path, state: State, choose: random.Random) -> None:
    save_file(state, path, metadata={"format": choose.choice(["pt", "pt", "mlx", "np", "x"])})
    data = path.read_bytes()
    if choose.random() < 0.25:
        path.write_bytes(damaged(data, choose))
        return
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = choose.randrange(8)
    names = [name for name in header if name != "__metadata__"]
    one, other = choose.choice(names), choose.choice(names)
    if kind == 0:
        header[one]["data_offsets"] = header[other]["data_offsets"]
    elif kind == 1:
        header[one]["dtype"] = choose.choice([*ITEMS, "F4", "X", 5, None, "f32", "C64", "F8_E8M0"])
    elif kind == 2:
        header[one]["shape"] = choose.choice(
            [[0], [], [-1], [2**63], [2**32, 2**32], [1.5], [True], "16", [[16]], None, [384, 1], [16, 24]]
        )
    elif kind == 3:
        first, last = header[one]["data_offsets"]
        header[one]["data_offsets"] = choose.choice(
            [
                [last, first],
                [first - 1, last - 1],
                [first, last + 1],
                [first],
                [-1, last],
                ["0", "8"],
                [first, 2**64],
                [float(first), float(last)],
                [0, 0],
                None,
            ]
        )
    elif kind == 4:
        header[str(choose.choice(HOSTILE)(choose))] = header.pop(one)
    elif kind == 5:
        header = mutated(header, choose)
    elif kind == 6:
        items = list(header.items())
        choose.shuffle(items)
        header = dict(items)  # harmless
    text = json_bytes(header, choose) if choose.random() < 0.5 else json.dumps(header).encode()
    text += b" " * choose.choice([0, 0, -len(text) % 8, 3])
    size = (
        len(text)
        if choose.random() < 0.9
        else choose.choice([0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1, 100_000_001])
    )
    path.write_bytes(struct.pack("<Q", size) + text + body)


def crafted_torch(path: Path, state: State, choose: random.Random) -> None:
    for name in list(state):
        kind = choose.randrange(14)
        if kind == 0:
            state[name] = state[name].t() if state[name].ndim == 2 else state[name]
        elif kind == 1 and state[name].is_floating_point() and state[name].dtype is torch.float32:
            state[name] = torch._neg_view(state[name])
        elif kind == 2:
            state[name] = state[name][..., ::2]
        elif kind == 3:
            state[name] = state[name][..., :1].expand_as(state[name])
        elif kind == 4 and state[name].ndim == 2:
            state[name] = torch.cat([state[name], state[name]])[len(state[name]) :]
        elif kind == 5 and "layers.0.up.weight" in state:
            state["tied.weight"] = state["layers.0.up.weight"]
    zipped = choose.random() < 0.8
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    kind = choose.randrange(8) if zipped else choose.choice([5, 6, 7])
    if kind < 5:
        with zipfile.ZipFile(path) as archive:
            records = [(one.filename, archive.read(one)) for one in archive.infolist()]
        if kind in (1, 2):
            choose.shuffle(records)
        if kind == 2:
            records = [(name, b"big" if name.endswith("byteorder") else data) for name, data in records]
        if kind == 3:
            at = choose.randrange(len(records))
            records[at:at] = [records[choose.randrange(len(records))]] if choose.random() < 0.5 else []
            records.pop(choose.randrange(len(records)))
        if kind == 4:
            at = choose.randrange(len(records))
            records[at] = (records[at][0], damaged(records[at][1], choose))
        method = choose.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in records:
                archive.writestr(name, data)
    elif kind < 7:
        path.write_bytes(damaged(path.read_bytes(), choose))


# ---- what must hold


def obeys(weight: Tensor, pattern: str) -> bool:
    """Whether a matrix obeys N:M along its rows and, for -T, along its columns; either way round, as layouts may say."""
    match = re.fullmatch(r"(\d+):(\d+)(-T)?", pattern)
    assert match
    n, m = int(match[1]), int(match[2])

    def rows(matrix: Tensor) -> bool:
        padded = nn.functional.pad((matrix != 0).int(), (0, -matrix.shape[-1] % m))
        return bool((padded.view(len(matrix), -1, m).sum(2) <= n).all())

    return (rows(weight) and rows(weight.t())) if match[3] else (rows(weight) or rows(weight.t()))


def _check_pruned(found: Found, what: str, target: Path, truth: State | None, pattern: str) -> None:
    written = {
        name: one for path in target.glob("*.safetensors") if "masks" not in path.name for name, one in load_file(path).items()
    }
    sidecar = read_sidecar(target)
    if truth is None:
        found.add("wrong", f"{what}: pruned, though no reader can read it")
    elif set(written) != set(truth):
        found.add("wrong", f"{what}: names {sorted(set(written) ^ set(truth))[:4]} are lost or made up")
    else:
        assert sidecar is not None
        pruned = {layer.parameter for layer in sidecar.report}
        for name, one in written.items():
            true = truth[name]
            kept = torch.where(one.float() != 0, true.float(), 0) if one.is_floating_point() else true
            same = one.dtype == true.dtype and one.shape == true.shape
            if name in pruned and same:
                fine = torch.equal(kept, one.float()) and (one.ndim != 2 or obeys(one, pattern))
            else:
                fine = same and bits(one) == bits(true)
            if not fine:
                found.add("wrong", f"{what}: {name} is not the source's")


def _check_verified(found: Found, what: str, result: Any, truth: State | None, given: str) -> None:
    if truth is None:
        found.add("wrong", f"{what}: verified, though no reader can read it")
        return
    for one in result.layers:
        weight = next((truth[name] for name in (f"{one.layer}.weight", one.layer) if name in truth), None)
        if weight is not None and weight.ndim == 2 and bool(one) and not obeys(weight, given or str(one.pattern)):
            found.add("wrong", f"{what}: {one.layer} is said to hold {one.pattern}")
    seen = {one.layer for one in result.layers} | {one.name for one in (*result.unchecked, *result.left_out)}
    if missed := [
        name for name, one in truth.items() if one.ndim == 2 and name.removesuffix(".weight") not in seen and name not in seen
    ]:
        found.add("wrong", f"{what}: nothing is said about {missed}")


def _check_loaded(found: Found, what: str, source: Path, truth: State | None) -> None:
    shapes = truth or {"layers.2.up.weight": torch.zeros(8, 16)}
    model = nn.Module()
    for name, one in shapes.items():
        owner = model
        *path, last = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        owner.register_buffer(last, torch.full(one.shape, 7.0).to(one.dtype))
    before = {name: bits(one) for name, one in model.state_dict().items()}
    worked, _ = attempt(found, f"load {what}", lambda: bisparse.load(model, source))
    after = {name: bits(one) for name, one in model.state_dict().items()}
    if not worked and after != before:
        found.add("half-changed", f"load {what}")
    if worked and (truth is None or any(bits(one) != after[name] for name, one in truth.items())):
        found.add("wrong", f"load {what}: other numbers than those in the file")


def _read_every_way(found: Found, what: str, source: Path, truth: State | None, folder: Path, choose: random.Random) -> None:
    pattern = choose.choice(["2:4", "2:4-T", "4:8-T", "1:4"])
    before, target = tree(source), folder / "out"
    worked, result = attempt(found, f"verify {what}", lambda: bisparse.verify_checkpoint(source, pattern))
    if worked:
        _check_verified(found, f"verify {what}", result, truth, pattern)
    worked, _ = attempt(found, f"prune {what}", lambda: bisparse.prune_checkpoint(source, target, pattern))
    if worked:
        _check_pruned(found, f"prune {what}", target, truth, pattern)
        shutil.rmtree(target)
    elif target.exists():
        found.add("wrong", f"prune {what}: an output was left by a job that failed")
    attempt(found, f"detect {what}", lambda: detect_patterns(source))
    if all(re.fullmatch(r"\w+(\.\w+)*", name) for name in truth or {}):
        _check_loaded(found, what, source, truth)
    if choose.random() < 0.3:
        attempt(found, f"to_dense {what}", lambda: to_dense(source, folder / "dense"))
    if choose.random() < 0.3:
        command = choose.choice(
            [
                ["info", str(source)],
                ["bench", "--model", str(source)],
                ["prune", str(source), "--dry-run"],
                ["verify", str(source)],
            ]
        )
        run_command(found, command)
    if tree(source) != before:
        found.add("wrong", f"{what}: the input was changed")


def attack(seed: int, folder: Path) -> Found:
    """One crafted checkpoint, read by every reader there is."""
    found, choose = Found(), random.Random(seed)
    torch.manual_seed(seed)
    state = state_of(choose)
    kind = choose.choice(["safetensors", "safetensors", "torch", "torch", "config", "index", "sidecar", "sidecar", "masks"])
    source = folder / "model"
    source.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaModel"], "hidden_size": 16, "vocab_size": 24, "num_hidden_layers": 3}
    (source / "config.json").write_text(json.dumps(config))
    if kind == "safetensors":
        crafted_safetensors(source / "model.safetensors", state, choose)
        _read_every_way(found, kind, source, own_safetensors(source / "model.safetensors"), folder, choose)
    elif kind == "torch":
        crafted_torch(source / "pytorch_model.bin", state, choose)
        truth = own_torch(source / "pytorch_model.bin", {name: one.resolve_neg() for name, one in state.items()})
        _read_every_way(found, kind, source, truth, folder, choose)
    elif kind == "config":
        save_file(state, source / "model.safetensors")
        (source / "config.json").write_bytes(json_bytes(mutated(config, choose), choose))
        _read_every_way(found, kind, source, state, folder, choose)
    elif kind == "index":
        names = list(state)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for part, held in parts.items():
            save_file({name: state[name] for name in held}, source / part)
        total = sum(one.nbytes for one in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: part for part, held in parts.items() for name in held}}
        (source / "model.safetensors.index.json").write_bytes(json_bytes(mutated(index, choose), choose))
        _read_every_way(found, kind, source, state, folder, choose)
    else:
        _of_our_own(found, kind, source, state, folder, choose)
    return found


def _of_our_own(found: Found, kind: str, source: Path, state: State, folder: Path, choose: random.Random) -> None:
    """A folder that bisparse wrote, with its sidecar, masks or weights changed afterwards."""
    save_file(state, source / "model.safetensors")
    pruned = folder / "pruned"
    pattern = choose.choice(["2:4-T", "2:4", "4:8-T"])
    bisparse.prune_checkpoint(source, pruned, pattern)
    weights = load_file(pruned / "model.safetensors")
    if choose.random() < 0.4:  # a layer that is dense again
        weights["layers.2.up.weight"] = state["layers.2.up.weight"]
        save_file(weights, pruned / "model.safetensors", metadata={"format": "pt"})
    if kind == "sidecar":
        path = pruned / "bisparse.json"
        path.write_bytes(json_bytes(mutated(json.loads(path.read_text()), choose), choose))
    else:
        path = pruned / "bisparse-masks.safetensors"
        path.write_bytes(damaged(path.read_bytes(), choose))
    worked, result = attempt(found, f"verify {kind}", lambda: bisparse.verify_checkpoint(pruned))
    if worked:
        _check_verified(found, f"verify {kind}", result, weights, "")
        held = [one for one in result.layers if one.layer == "layers.2.up"]
        if bool(result) and not held and not result.unchecked and not result.left_out:
            found.add("wrong", f"verify {kind}: holds, though one layer was passed over")
    attempt(found, f"read_sidecar {kind}", lambda: read_sidecar(pruned))
    worked, masks = attempt(found, f"load_masks {kind}", lambda: load_masks(pruned))
    if worked and kind == "sidecar" and pruned.exists():
        for name, mask in masks.items():
            true = next((weights[one] for one in (f"{name}.weight", name) if one in weights), None)
            if true is not None and mask.shape != true.shape:
                found.add("wrong", f"load_masks {kind}: {name} has another shape")
    before = tree(pruned)
    run_command(found, ["report", str(pruned), "-o", str(folder / "report.html")])
    run_command(found, ["verify", str(pruned), *(["--json"] if choose.random() < 0.5 else [])])
    if choose.random() < 0.5:
        run_command(found, ["prune", str(pruned), str(folder / "again"), "-p", "1:4"])
        run_command(found, ["info", str(pruned)])
    if tree(pruned) != before:
        found.add("wrong", f"{kind}: the input was changed")
