"""Checkpoints loaded straight into packed layers: the same model as `load` and `accelerate_`, or nothing."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bisparse import accelerate_, load, prune_, save, sparsify_
from bisparse.accelerate import PackedLinear, eligibility, load_accelerated_
from bisparse.accelerate.backends.cpu import CPUTiming, cpu_reason
from bisparse.errors import CheckpointError
from bisparse.verification import PatternError

pytestmark = pytest.mark.skipif(cpu_reason(torch.device("cpu")) is not None, reason="this processor has neither AVX-512 nor AVX2")


@pytest.fixture(autouse=True)
def wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is faster packed."""
    monkeypatch.setattr(eligibility, "measured", lambda weight, *_: CPUTiming(2.0, 1.0, 4))


class Net(nn.Module):
    """Two layers to pack, a tied pair that stays dense, a norm with buffers, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight
        self.seen = 0
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.seen)

    def set_extra_state(self, state: Tensor) -> None:
        self.seen = int(state)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.down(torch.relu(self.up(self.embed(tokens)))) * self.scale))


def empty(dtype: torch.dtype = torch.float32) -> Net:
    """The model with its parameters and saved buffers on the meta device."""
    net = Net().to(dtype)
    scale = net.scale.clone()
    net.to("meta")
    net.scale = scale
    net.head.weight = net.embed.weight
    return net


@pytest.fixture
def pruned(tmp_path: Path) -> tuple[Net, Path]:
    torch.manual_seed(0)
    net = Net()
    net(torch.arange(40))
    net.seen = 40
    report = prune_(net.eval(), "4:8-T", include=["up", "down"])
    save(net, tmp_path / "model", report=report)
    return net, tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_model_is_that_of_load_and_accelerate(dtype: torch.dtype, pruned: tuple[Net, Path]) -> None:
    other, model = Net().to(dtype), empty(dtype)
    load(other, pruned[1])
    expected, report = accelerate_(other.eval()), load_accelerated_(model, pruned[1])
    assert [one.name for one in report.layers] == [one.name for one in expected.layers] == ["up", "down"]
    assert {one.name for one in report.left_dense} == {one.name for one in expected.left_dense}
    assert (report.bytes_after, report.bytes_before) == (expected.bytes_after, expected.bytes_before - other.scale.nbytes)
    assert isinstance(model.up, PackedLinear) and model.head.weight is model.embed.weight and not model.training
    assert model.seen == other.seen == 40
    found, state = model.state_dict(), other.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], value) for name, value in state.items())
    tokens = torch.arange(12)
    assert torch.equal(model(tokens), other(tokens))


def test_parameters_keep_what_they_were(pruned: tuple[Net, Path]) -> None:
    model = empty()
    model.norm.weight.requires_grad_(False)
    load_accelerated_(model, pruned[1], include="up")
    assert not model.norm.weight.requires_grad and model.embed.weight.requires_grad
    assert type(model.down) is nn.Linear and type(model.up) is PackedLinear


@pytest.mark.parametrize(
    "fault",
    [
        "missing",
        "other shape",
        "damaged",
        "broken mask",
        "meta buffer",
        "copies",
        "accelerated",
        "tokens",
        "int8",
        "sparse training",
    ],
)
def test_nothing_is_changed_by_what_cannot_be_loaded(fault: str, pruned: tuple[Net, Path], tmp_path: Path) -> None:
    net, folder = pruned
    model, tokens, error = empty(), 1, (CheckpointError, PatternError, ValueError)
    if fault == "missing":
        model.extra = nn.Linear(3, 3, device="meta")
    elif fault == "other shape":
        model.up = nn.Linear(32, 65, device="meta")
    elif fault == "damaged":
        data = bytearray((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").write_bytes(data[:-40])
    elif fault == "broken mask":
        with torch.no_grad():
            broken = copy.deepcopy(net)
            broken.up.weight.fill_(1.0)
        tensors = {name: value for name, value in broken.state_dict().items() if name != "head.weight"}
        save_file(tensors, folder / "model.safetensors")
    elif fault == "meta buffer":
        model.scale = model.scale.to("meta")
    elif fault == "copies":
        model.register_state_dict_post_hook(lambda _, state, *__: state.update({key: v.clone() for key, v in state.items()}))
    elif fault == "accelerated":
        load_accelerated_(model, folder)
    elif fault == "sparse training":
        model = Net()
        sparsify_(model, "2:4", mode="static", include="up")
    elif fault == "tokens":
        tokens = 0
    before = {name: (id(value), value.is_meta) for name, value in model.named_parameters()}
    kinds, mode = [type(module) for module in model.modules()], model.training
    with pytest.raises(error):
        load_accelerated_(model, folder, tokens=tokens, **({"int8": "no"} if fault == "int8" else {}))
    assert {name: (id(value), value.is_meta) for name, value in model.named_parameters()} == before
    assert [type(module) for module in model.modules()] == kinds and model.training == mode


def test_a_failure_half_way_leaves_the_empty_model(pruned: tuple[Net, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = empty(), []

    def fails(weight: Tensor, *_: object) -> CPUTiming:
        calls.append(weight.shape)
        if len(calls) == 2:
            raise RuntimeError("of the second layer")
        return CPUTiming(2.0, 1.0, 4)

    monkeypatch.setattr(eligibility, "measured", fails)
    with pytest.raises(RuntimeError, match="of the second layer"):
        load_accelerated_(model, pruned[1])
    assert all(one.is_meta for one in model.parameters()) and type(model.up) is type(model.down) is nn.Linear


def test_one_dense_layer_at_a_time(pruned: tuple[Net, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """While a layer is timed, no other layer's dense weight is alive."""
    model, alive = empty(), []

    def timed(weight: Tensor, *_: object) -> CPUTiming:
        weights = {name: model.get_submodule(name)._parameters.get("weight") for name in ("up", "down")}
        alive.append([name for name, own in weights.items() if own is not None and not own.is_meta])
        return CPUTiming(2.0, 1.0, 4)

    monkeypatch.setattr(eligibility, "measured", timed)
    load_accelerated_(model, pruned[1])
    assert sorted(alive) == [["down"], ["up"]]


def test_tied_weights_that_the_file_names_twice(pruned: tuple[Net, Path]) -> None:
    """Equal bits are equal, NaN too; other values are refused."""
    net, folder = pruned
    tensors = {name: value.detach().clone() for name, value in net.state_dict().items()}
    for name in ("embed.weight", "head.weight"):
        tensors[name][3, 4] = float("nan")
    (folder / "bisparse.json").unlink()
    save_file(tensors, folder / "model.safetensors")
    model = empty()
    load_accelerated_(model, folder)
    assert model.head.weight is model.embed.weight and bool(model.embed.weight[3, 4].isnan())
    tensors["head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="to which the model ties it"):
        load_accelerated_(empty(), folder)


def test_figures_that_the_weights_contradict_are_named(pruned: tuple[Net, Path]) -> None:
    text = (folder := pruned[1]).joinpath("bisparse.json").read_text()
    content = json.loads(text)
    content["layers"][0]["density"] = 0.123
    (folder / "bisparse.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"bisparse.json is wrong: .*density"):
        load_accelerated_(empty(), folder)
