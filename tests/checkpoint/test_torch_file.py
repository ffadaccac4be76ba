"""Torch files, as torch and other tools write them: what torch.load returns, or an error, never other numbers."""

import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import State
from torch import Tensor

from bisparse.checkpoint import CheckpointError, load, prune_checkpoint
from bisparse.checkpoint.reader import open_source

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int32, torch.int8,
          torch.uint8, torch.uint16, torch.bool, torch.complex64]  # fmt: skip
OLD_DTYPES = [dtype for dtype in DTYPES if dtype not in (torch.float8_e4m3fn, torch.uint16)]
"""Those that torch can write to legacy files."""
Records = list[tuple[str, bytes]]


def read(path: Path) -> State:
    """Every tensor of a file, by bisparse, whole and in two pieces."""
    tensors = {}
    for name, stored in open_source(path).tensors.items():
        half = stored.size // 2
        whole = stored.read()
        assert same(whole, torch.cat([stored.read(0, half), stored.read(half)])), name
        tensors[name] = whole.view(stored.shape)
    return tensors


def same(one: Tensor, other: Tensor) -> bool:
    """Equal dtype, shape and bits."""
    bits = [value.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8) for value in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def random_state(seed: int, dtypes: list[torch.dtype]) -> State:
    """Tensors of many dtypes: plain, empty, strided, shifted, expanded and sharing storages."""
    draw, state = random.Random(seed), {}
    generator = torch.Generator().manual_seed(seed)
    for number in range(8):
        dtype = draw.choice(dtypes)
        rows, columns = draw.randint(1, 9), draw.randint(1, 9)
        count = 4 * rows * columns
        base = torch.randint(0, 2 if dtype is torch.bool else 120, (count,), generator=generator).to(dtype)
        views: list[Callable[[], Tensor]] = [
            lambda base=base: base,
            lambda base=base, r=rows, c=columns: base.view(2 * r, 2 * c),
            lambda base=base, r=rows, c=columns: base.view(2 * r, 2 * c).t(),
            lambda base=base, r=rows, c=columns: base.view(2 * r, 2 * c)[1::2, 1:],
            lambda base=base, r=rows: base[3 : 3 + r],
            lambda base=base, c=columns: base[1 : 1 + c].expand(3, c),
            lambda base=base, r=rows, c=columns: base.as_strided((r, 3), (1, 2), 1 if c > 1 else 0) if r * c > 4 else base[:0],
            lambda base=base: base[:0].view(0, 5),
            lambda base=base: base[2],
        ]
        for view in draw.sample(views, 2):
            state[f"{number}.{len(state)}.weight"] = view()
    return state


def saved(state: State, path: Path, **options: bool) -> Path:
    torch.save(state, path, **options)
    return path


def records_of(path: Path) -> Records:
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


class Stream(io.BytesIO):
    """Cannot seek, so that zipfile writes sizes and checksums behind the data."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation

    def tell(self) -> int:
        raise io.UnsupportedOperation


def zipped(records: Records, *, stream: bool = False, align: int = 0, zip64: bool = False, deflated: bool = False) -> bytes:
    """An archive of these records, written by zipfile."""
    target = Stream() if stream else io.BytesIO()
    method = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, data in records:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            if align:
                info.extra = b"FB" + (align).to_bytes(2, "little") + bytes(align)
            with archive.open(info, "w", force_zip64=zip64) as record:
                record.write(data)
    return target.getvalue()


def harmless(records: Records, how: str, draw: random.Random) -> bytes:
    """The same records in another archive."""
    match how:
        case "stored":
            return zipped(records)
        case "another order":
            return zipped(draw.sample(records, len(records)))
        case "another alignment":
            return zipped(records, align=draw.randint(1, 99))
        case "data descriptors":
            return zipped(records, stream=True)
        case "zip64":
            return zipped(records, zip64=True)
        case "another root":
            return zipped([("x/" + name.partition("/")[2], data) for name, data in records])
        case "folders listed":
            root = records[0][0].partition("/")[0]
            return zipped([(f"{root}/", b""), (f"{root}/data/", b""), *records])
        case _:  # no mark of torch's newer versions
            return zipped([(name, data) for name, data in records if "/." not in name and "byteorder" not in name])


HARMLESS = ["stored", "another order", "another alignment", "data descriptors", "zip64", "another root", "folders listed", "old"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["as torch writes it", "without checksums", "legacy", *HARMLESS])
def test_every_tensor_is_read_as_torch_reads_it(tmp_path: Path, how: str) -> None:
    draw = random.Random(how)
    for seed in range(12):
        state, path = random_state(seed, OLD_DTYPES if how == "legacy" else DTYPES), tmp_path / f"{seed}.pt"
        torch.serialization.set_crc32_options(how != "without checksums")
        try:
            saved(state, path, _use_new_zipfile_serialization=how != "legacy")
        finally:
            torch.serialization.set_crc32_options(True)
        if how in HARMLESS:
            path.write_bytes(harmless(records_of(path), how, draw))
        truth = torch.load(path, weights_only=True)
        found = read(path)
        assert found.keys() == truth.keys() == state.keys()
        for name in truth:
            assert same(truth[name], state[name]) and same(found[name], truth[name]), (how, seed, name)


def test_what_is_pruned_is_what_is_in_a_rewritten_archive(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.randn(16, 24).bfloat16() for i in range(4)}
    for name in ("plain", "rewritten"):
        saved(state, tmp_path / f"{name}.pt")
    (tmp_path / "rewritten.pt").write_bytes(zipped(records_of(tmp_path / "plain.pt")))
    for name in ("plain", "rewritten"):
        prune_checkpoint(tmp_path / f"{name}.pt", tmp_path / name, "2:4")
    weights = [(tmp_path / name / f"{name}.safetensors").read_bytes() for name in ("plain", "rewritten")]
    assert weights[0] == weights[1]


def changed(records: Records, suffix: str, data: bytes | None) -> Records:
    """The records, one of them with other content, or without it."""
    return [
        (name, old if not name.endswith(suffix) else data)
        for name, old in records
        if not name.endswith(suffix) or data is not None
    ]  # type: ignore[misc]


def damaged(path: Path, how: str) -> bytes:
    """An archive of the tensors a.weight (record 0) and b.weight (record 1) that torch.load may or may not read."""
    records, whole = records_of(path), path.read_bytes()
    root = records[0][0].partition("/")[0]
    content = dict(records)[f"{root}/data/1"]
    match how:
        case "compressed":
            return zipped(records, deflated=True)
        case "missing record":
            return zipped(changed(records, "data/1", None))
        case "short record":
            return zipped(changed(records, "data/1", content[:-4]))
        case "long record":
            return zipped(changed(records, "data/1", content + bytes(8)))
        case "empty record":
            return zipped(changed(records, "data/1", b""))
        case "two records of one name":
            return zipped([*records, (f"{root}/data/1", bytes(len(content)))])
        case "two records but for case":
            return zipped([(f"{root}/DATA/1", bytes(len(content))), *records])
        case "big-endian":
            return zipped(changed(records, "byteorder", b"big"))
        case "flipped bit":
            place = whole.index(content) + 5
            return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        case "something before":
            return b"PK\x03\x04" + bytes(60) + whole
        case "one behind the other":
            return whole + zipped(records)
        case "TorchScript":
            return zipped([*records, (f"{root}/constants.pkl", b"")])
        case "no root":
            return zipped([(name.partition("/")[2], data) for name, data in records])
        case "moved":
            place = whole.rindex(f"{root}/data/1".encode()) - 46
            return whole[: place + 42] + (64).to_bytes(4, "little") + whole[place + 46 :]
        case _:  # truncated
            return whole[:-200]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("compressed", "compressed record"), ("missing record", "data/1"), ("short record", r"b\.weight.*data/1 has 252 bytes"),
        ("long record", r"b\.weight.*data/1 has 264 bytes"), ("empty record", r"b\.weight.*data/1 has 0 bytes"),
        ("two records of one name", "two records named"), ("two records but for case", "two records named"),
        ("big-endian", "byte order 'big'"), ("flipped bit", r"b\.weight.*breaks its checksum"),
        ("something before", "torch.save did not write"), ("one behind the other", "torch.save did not write"),
        ("TorchScript", "TorchScript"), ("no root", "torch.save did not write"), ("moved", "data/1 is not where"),
        ("truncated", "truncated"),
    ],
)  # fmt: skip
def test_archives_that_are_not_read(tmp_path: Path, how: str, message: str) -> None:
    path = saved({"a.weight": torch.randn(8, 8), "b.weight": torch.randn(8, 8)}, tmp_path / "weights.pt")
    path.write_bytes(damaged(path, how))
    with pytest.raises(CheckpointError, match=message) as caught:
        prune_checkpoint(path, tmp_path / "out", "2:4")
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.pt"]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(1).expand(100_000, 100_000), "is expanded from 4 bytes"),
        (torch.ones(1).expand(1 << 31, 1 << 30), "is expanded from 4 bytes"),
        (torch.ones(3, 4).expand(1 << 28, 3, 4), "is expanded from 48 bytes"),
        (torch._neg_view(torch.ones(3, 4)), r"negated view.*resolve_neg"),
        (torch.ones(3, 4, dtype=torch.complex64).conj(), r"conjugated view.*resolve_conj"),
        (torch.empty(3, 4, device="meta"), "meta device"),
        (torch.ones(3, 4).to_sparse(), "sparse"),
    ],
)
def test_tensors_that_are_more_than_a_view_of_bytes(tmp_path: Path, tensor: Tensor, message: str, legacy: bool) -> None:
    path = saved({"x.weight": tensor, "a.weight": torch.ones(8, 8)}, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=rf"w\.pt: tensor x\.weight .*{message}"):
        open_source(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
def test_quantized_tensors_are_refused_by_name_of_what_they_are(tmp_path: Path, legacy: bool) -> None:
    tensor = torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8)
    path = saved({"x.weight": tensor}, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"w\.pt.*(qint8).*; save dense tensors$"):
        open_source(path)


def test_a_small_view_of_a_large_storage_reads_only_its_own_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.randn(1 << 16)
    path = saved({"a.weight": flat[1000:1064].view(8, 8).t(), "b.weight": flat[:64].view(8, 8)}, tmp_path / "w.pt")
    tensor = open_source(path).tensors["a.weight"]
    assert same(tensor.read().view(8, 8), flat[1000:1064].view(8, 8).t())
    lengths: list[int] = []
    from bisparse.checkpoint.input_file import InputFile

    original = InputFile.read
    monkeypatch.setattr(InputFile, "read", lambda self, *arguments: (lengths.append(arguments[1]), original(self, *arguments))[1])
    tensor.read()
    assert lengths == [256]


@pytest.mark.filterwarnings("ignore")
def test_every_damaged_pickle_without_checksums_is_an_error_or_harmless(tmp_path: Path) -> None:
    path = saved({"a.weight": torch.randn(8, 8)[:, 1:], "n": torch.arange(3)}, tmp_path / "w.pt")
    records = records_of(path)
    pickled = next(data for name, data in records if name.endswith("data.pkl"))
    draw, read_well = random.Random(0), 0
    for place in range(len(pickled)):
        for _ in range(3):
            other = pickled[:place] + bytes([draw.randrange(256)]) + pickled[place + 1 :]
            path.write_bytes(zipped(changed(records, "data.pkl", other)))
            try:
                found = read(path)
            except CheckpointError as error:
                assert str(path) in str(error)
                continue
            try:
                truth = torch.load(path, weights_only=True)
            except (RuntimeError, ValueError, pickle.UnpicklingError):
                # torch also refuses a device that does not exist, classes that are stubs here, and checks sizes by other rules
                continue
            assert all(same(found[name], truth[name]) for name in found)
            read_well += 1
    assert read_well > 50


def test_one_storage_under_two_dtypes_is_refused(tmp_path: Path) -> None:
    class Twice:
        def __reduce__(self) -> tuple[object, ...]:
            return torch._utils._rebuild_tensor_v2, (Storage(torch.IntStorage), 0, (8, 8), (8, 1), False, {})

    class Storage:
        def __init__(self, kind: type) -> None:
            self.kind = kind

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", value.kind, "0", "cpu", 64) if isinstance(value, Storage) else None

    class Once(Twice):
        def __reduce__(self) -> tuple[object, ...]:
            return torch._utils._rebuild_tensor_v2, (Storage(torch.FloatStorage), 0, (8, 8), (8, 1), False, {})

    path = saved({"a.weight": torch.randn(8, 8)}, tmp_path / "w.pt")
    target = io.BytesIO()
    Pickler(target, 2).dump({"a.weight": Once(), "b.weight": Twice()})
    path.write_bytes(zipped(changed(records_of(path), "data.pkl", target.getvalue())))
    with pytest.raises(CheckpointError, match=r"b\.weight shares data/0 with a tensor of dtype torch\.float32"):
        open_source(path)


def test_a_record_that_breaks_its_checksum_leaves_the_model_unchanged(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: torch.randn_like(tensor) for name, tensor in before.items()}
    path = saved(state, tmp_path / "w.pt")
    data, last = path.read_bytes(), state["1.bias"].numpy().tobytes()
    path.write_bytes(data.replace(last, last[:-1] + bytes([last[-1] ^ 1])))
    with pytest.raises(CheckpointError, match=r"w\.pt: tensor 1\.bias is corrupt: data/3 breaks its checksum"):
        load(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("at", [0, 100, 4096])
def test_a_storage_with_a_byte_too_many_is_corrupt_wherever_it_is(tmp_path: Path, at: int) -> None:
    """Everything behind an inserted byte would be other numbers; the checksum of a file that was zipped again is right."""
    torch.save({"a.weight": torch.randn(32, 32)}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as archive:
        records = {one: archive.read(one) for one in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data[:at] + b"x" + data[at:] if name.endswith("data/0") else data)
    with pytest.raises(CheckpointError, match="corrupt"):
        prune_checkpoint(tmp_path / "w.pt", tmp_path / "out", "2:4")
