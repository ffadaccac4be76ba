"""Weights inside training checkpoints, pickled modules and TorchScript: found, chosen by key, and nothing is executed."""

import copyreg
import io
import os
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bisparse
from bisparse.checkpoint import CheckpointError, load, prune_checkpoint, verify_checkpoint
from bisparse.checkpoint.reader import open_source


def network() -> nn.Module:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 16)
            self.register_buffer("counts", torch.arange(4))
            self.register_buffer("cache", torch.zeros(3), persistent=False)

    Inner.__qualname__ = "Inner"
    Inner.__module__ = __name__
    globals()["Inner"] = Inner
    tied = nn.Linear(16, 16, bias=False)
    return nn.Sequential(Inner(), nn.BatchNorm1d(16), tied, tied, nn.Conv2d(4, 8, 3))


def read(path: Path, key: str | None = None) -> dict[str, Tensor]:
    return {name: one.read().view(one.shape) for name, one in open_source(path, key).tensors.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nested", ["whole", "in a dict", "in a training checkpoint"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickled_module_is_read_as_its_state_dict(tmp_path: Path, legacy: bool, nested: str, protocol: int) -> None:
    model = network()
    content: Any = model
    if nested != "whole":
        content = {"model": model} if nested == "in a dict" else {"epoch": 3, "net": {"ema": model}, "opt": [1, 2]}
    if legacy:  # torch also writes the source of classes there, unless they are none of a file
        type(model[0]).__module__ = "elsewhere"
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(__import__("sys").modules, "elsewhere", __import__("sys").modules[__name__])
            torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    else:
        torch.save(content, tmp_path / "w.pt", pickle_protocol=protocol)
    assert same(read(tmp_path / "w.pt"), model.state_dict())
    assert any("Sequential" in note and "not loaded" in note for note in open_source(tmp_path / "w.pt").notes)
    bisparse.prune_(model, "2:4")
    prune_checkpoint(tmp_path / "w.pt", tmp_path / "out", "2:4", include=["2", "3"])
    assert torch.equal(read(tmp_path / "out")["2.weight"], model[2].weight)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"model": {"state_dict": "here"}}, "model.state_dict"),
        ({"state_dict": "here", "optimizer": {"state": {0: {"exp_avg": "other"}}}}, "state_dict"),
        ({"module": "here", "lr_scheduler": {"x": 1}, "param_shapes": [{}]}, "module"),
        ({"net": "here"}, "net"),
        ({"a": {"b": {"c": {"d": "here"}}}, "epoch": 3}, "a.b.c.d"),
        ({"state_dict": {}, "model": "here"}, "model"),
        ({"state_dict": "here", "state_dict_ema": "other"}, "state_dict"),
        ("here", ""),
    ],
)
def test_nested_state_dicts_are_found(tmp_path: Path, content: Any, place: str) -> None:
    weights = {"a.weight": torch.randn(4, 4), "b.weight": torch.randn(4, 4)}

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        return weights if value == "here" else {"z.weight": torch.zeros(4, 4)} if value == "other" else value

    torch.save(filled(content), tmp_path / "w.pt")
    assert same(read(tmp_path / "w.pt"), weights)
    assert any(f"'{place}'" in note for note in open_source(tmp_path / "w.pt").notes) == bool(place)
    if place:
        assert same(read(tmp_path / "w.pt", place), weights)


def test_of_several_state_dicts_the_key_chooses_one(tmp_path: Path) -> None:
    parts = {name: {f"{name}.weight": torch.randn(4, 4)} for name in ("generator", "critic")}
    torch.save({**parts, "with.dot": {"c.weight": torch.ones(4, 4)}, "step": 3}, tmp_path / "gan.pt")
    with pytest.raises(CheckpointError, match=r"several state dicts: generator, critic, with\.dot; choose one with --key"):
        open_source(tmp_path / "gan.pt")
    for name, weights in parts.items():
        assert same(read(tmp_path / "gan.pt", name), weights)
        prune_checkpoint(tmp_path / "gan.pt", tmp_path / name, "2:4", key=name)
        assert verify_checkpoint(tmp_path / name)
    assert read(tmp_path / "gan.pt", "with.dot").keys() == {"c.weight"}
    assert not verify_checkpoint(tmp_path / "gan.pt", "2:4", key="critic")
    with pytest.raises(CheckpointError, match=r"holds no 'actor'; its keys are \['generator', 'critic'"):
        open_source(tmp_path / "gan.pt", "actor")
    with pytest.raises(CheckpointError, match="holds no tensors under 'step'"):
        open_source(tmp_path / "gan.pt", "step")
    model = nn.Module()
    model.critic = nn.Linear(4, 4, bias=False)
    load(model, tmp_path / "gan.pt", key="critic")
    assert torch.equal(model.critic.weight, parts["critic"]["critic.weight"])


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_checkpoint(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Linear(width, 8)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.net(batch[0]).square().mean()

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 8)))
    model = Module()
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert same(read(tmp_path / "last.ckpt"), model.state_dict())


class Evil:
    """Runs code when it is unpickled, in one of several ways."""

    def __init__(self, how: tuple[Any, ...]) -> None:
        self.how = how

    def __reduce__(self) -> tuple[Any, ...]:
        return self.how


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_pickle_is_executed_or_changed(tmp_path: Path, legacy: bool) -> None:
    mark = tmp_path / "mark"
    weight = torch.randn(4, 4)
    rebuild = torch._utils._rebuild_tensor_v2
    attacks = [
        (os.system, (f"touch {mark}",)),
        (exec, (f"open({str(mark)!r}, 'w')",)),
        (eval, (f"open({str(mark)!r}, 'w')",)),
        (getattr, (str, "format")),
        (copyreg._reconstructor, (object, object, None)),
        (dict, (), {"__class__": int}),
        (set, ([1, 2],)),
    ]
    before = (rebuild.__defaults__, dict(rebuild.__dict__))
    for attack in attacks:
        torch.save({"a.weight": weight, "x": Evil(attack)}, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
        assert same(read(tmp_path / "w.pt"), {"a.weight": weight})
        assert not mark.exists()
    assert (rebuild.__defaults__, dict(rebuild.__dict__)) == before


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00ax\x01\x00\x00\x00bsb.",  # BUILD on a known function
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02N}\x86ccollections\nOrderedDict\n\x86.",
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # a memo of two thousand million entries
        b"\x80\x05\x96\x00\x00\x00\x00\xff\x00\x00\x00.",  # a bytearray of 1 TB
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b".",
        b"",
        b"\x80",
    ],
)
def test_crafted_pickles_are_errors(tmp_path: Path, pickled: bytes) -> None:
    torch.save({"a.weight": torch.ones(4, 4)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "w.pt", "w") as crafted:
        for name in whole.namelist():
            crafted.writestr(name, pickled if name.endswith("data.pkl") else whole.read(name))
    with pytest.raises(CheckpointError):
        open_source(tmp_path / "w.pt")
    assert torch.load(tmp_path / "whole.pt", weights_only=True)["a.weight"].sum() == 16


@pytest.mark.filterwarnings("ignore")
def test_modules_that_each_hold_the_next_one_twice_are_refused_in_time(tmp_path: Path) -> None:
    module: nn.Module = nn.Linear(4, 4)
    for _ in range(40):  # 2 ** 40 names
        outer = nn.Module()
        outer.one = outer.two = module
        module = outer
    torch.save(module, tmp_path / "model.pt")
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="modules"):
        open_source(tmp_path / "model.pt")
    assert time.perf_counter() - started < 20


def test_a_name_that_is_no_text_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    torch.save({"\ud800.weight": torch.rand(8, 8)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="no Unicode text"):
        prune_checkpoint(tmp_path / "model.pt", tmp_path / "out", "2:4")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_an_unknown_function_makes_is_refused_not_dropped(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(4, 4), "b.weight": torch.ones(2)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "w.pt", "w") as other:
        for name in whole.namelist():
            other.writestr(name, whole.read(name).replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"))
    with pytest.raises(CheckpointError, match=r"a\.weight is made by torch\._utils\._rebuild_tensor_v9, not a plain tensor"):
        open_source(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_program_is_verified_and_not_pruned(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8)))
    bisparse.prune_(model, "2:4")
    torch.jit.script(model).save(tmp_path / "m.pt")
    torch.jit.trace(model.eval(), torch.randn(2, 16)).save(tmp_path / "traced.bin")
    for name in ("m.pt", "traced.bin"):
        assert same(read(tmp_path / name), torch.jit.load(tmp_path / name).state_dict())
        assert verify_checkpoint(tmp_path / name, "2:4") and not verify_checkpoint(tmp_path / name, "1:4")
        with pytest.raises(CheckpointError, match=r"is a TorchScript program: it can be verified, but not pruned"):
            prune_checkpoint(tmp_path / name, tmp_path / "out", "2:4")


def semi_structured(weight: Tensor) -> Tensor:
    from torch.sparse import SparseSemiStructuredTensorCUTLASS
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    return SparseSemiStructuredTensorCUTLASS(
        weight.shape, packed=values, meta=metadata, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_semi_structured_tensors_are_read_as_dense_ones(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(64, 128) * 20
    weight = (weight * bisparse.solve(weight.abs(), "2:4").mask).to(dtype)
    packed = semi_structured(weight)
    torch.save({"a.weight": nn.Parameter(packed, requires_grad=False), "b.weight": packed.t()}, tmp_path / "w.pt")
    found = read(tmp_path / "w.pt")
    assert torch.equal(found["a.weight"], weight) and torch.equal(found["b.weight"], weight.t())
    if dtype is not torch.int8:
        assert verify_checkpoint(tmp_path / "w.pt", "2:4", include="a")
        assert not verify_checkpoint(tmp_path / "w.pt", "2:4", include="b")


@pytest.mark.filterwarnings("ignore")
def test_semi_structured_tensors_of_cusparselt_are_refused_by_name(tmp_path: Path) -> None:
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

    packed = SparseSemiStructuredTensorCUSPARSELT(
        torch.Size([64, 128]), packed=torch.zeros(5000).half(), meta=None, packed_t=None, meta_t=None,
        compressed_swizzled_bitmask=None,
    )  # fmt: skip
    torch.save({"a.weight": packed}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"a\.weight is packed by cuSPARSELt.*to_dense"):
        open_source(tmp_path / "w.pt")


def test_pickles_inside_are_those_of_torch_only(tmp_path: Path) -> None:
    """A plain pickle renamed into the archive is found out by its references to storages."""
    target = io.BytesIO()
    pickle.Pickler(target, 2).dump({"a.weight": [1.0]})
    torch.save({"a.weight": torch.ones(4, 4)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "w.pt", "w") as crafted:
        for name in whole.namelist():
            crafted.writestr(name, target.getvalue() if name.endswith("data.pkl") else whole.read(name))
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_source(tmp_path / "w.pt")
