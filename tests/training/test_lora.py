"""Merging adapters: exact for what is W + s B A, and refused, with the model unchanged, for the rest."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bisparse import PatternError, finalize_, prune_, solve, sparsify_, verify
from bisparse.training import merge_lora_, merged_weight


class Conv1D(nn.Module):
    """As transformers has it: the weight is (I, O)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weight + self.bias


class Adapted(nn.Module):
    """A LoRA layer as peft lays it out."""

    def __init__(self, base: nn.Module, inside: int, out: int, adapters: tuple[str, ...] = ("default",)) -> None:
        super().__init__()
        self.base_layer, self.merged = base, False
        self.lora_A = nn.ModuleDict({name: nn.Linear(inside, 2, bias=False) for name in adapters})
        self.lora_B = nn.ModuleDict({name: nn.Linear(2, out, bias=False) for name in adapters})
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.use_dora, self.lora_bias, self.lora_variant = dict.fromkeys(adapters, False), dict.fromkeys(adapters, False), {}
        self.scaling, self.active_adapters = dict.fromkeys(adapters, 8 / 2**0.5), list(adapters)  # rsLoRA's

    def delta(self) -> torch.Tensor:
        """s B A, (O, I), in float64."""
        parts = [self.lora_B[one].weight.double() @ self.lora_A[one].weight.double() for one in self.active_adapters]
        return 8 / 2**0.5 * sum(parts)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.base_layer(inputs) + inputs @ self.delta().T.to(inputs)


@pytest.mark.parametrize("adapters", [("default",), ("one", "two")])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "square conv1d"])
@pytest.mark.parametrize("state", ["pruned", "static"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8-T"])
def test_a_merge_is_the_mask_times_the_sum(kind, adapters, state, pattern):
    torch.manual_seed(0)
    inside, out = (16, 16) if kind == "square conv1d" else (16, 32)
    base = nn.Linear(inside, out) if kind == "linear" else Conv1D(out, inside)
    model = nn.Sequential(Adapted(base, inside, out, adapters))
    if state == "pruned":
        prune_(model, pattern, include="0.base_layer")
    else:
        sparsify_(model, pattern, mode="static", include="0.base_layer")
        with torch.no_grad():  # a kept weight that is zero for now stays kept
            base.weight.view(-1)[base.weight.view(-1).nonzero()[0]] = 0
    mask = base.weight != 0 if state == "pruned" else base.weight_mask.mask.clone()
    delta = model[0].delta() if kind == "linear" else model[0].delta().T
    expected = torch.where(mask, base.weight.detach().double() + delta, 0)
    (record,) = merge_lora_(model, pattern)
    assert record.name == "0" and torch.allclose(base.weight.double(), expected, atol=1e-5)
    if state == "static":
        finalize_(model)
    assert verify(base.weight if kind == "linear" else base.weight.T, pattern)
    inputs = torch.randn(3, inside)
    assert torch.equal(model(inputs), base(inputs))


def dora(layer):
    layer.use_dora["default"] = True


def magnitude(layer):
    layer.lora_magnitude_vector["default"] = nn.Linear(1, 1)


def variant(layer):
    layer.lora_variant["default"] = SimpleNamespace()


def biased(layer):
    layer.lora_B["default"] = nn.Linear(2, 16)


def convolution(layer):
    layer.base_layer = nn.Conv1d(16, 16, 1)


def embedding(layer):
    layer.lora_embedding_A["default"] = nn.Parameter(torch.zeros(2, 16))


def quantised(layer):
    layer.base_layer.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)


def dynamic(layer):
    sparsify_(layer, "4:8-T", include="base_layer")


def rewritten(layer):  # as PiSSA and OLoRA do
    layer.base_layer.weight.data += 1.0


def merged(layer):
    layer.merged = True


REFUSED = {
    dora: "DoRA", magnitude: "DoRA", variant: "variant", biased: "bias", convolution: "Conv1d", embedding: "embedding",
    quantised: "quantised", dynamic: "finalize_", rewritten: "PiSSA", merged: "unmerge",
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED, ids=lambda one: one.__name__)
def test_what_is_not_w_plus_b_a_is_refused_before_anything_is_changed(change):
    torch.manual_seed(0)
    model = nn.Sequential(*(Adapted(nn.Linear(16, 16), 16, 16) for _ in range(2)))
    for layer in model:
        layer.base_layer.weight.data *= solve(torch.rand(16, 16), "4:8-T").mask
    change(model[1])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PatternError if change is rewritten else ValueError, match=f"1.*{REFUSED[change]}"):
        merge_lora_(model, "4:8-T")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("size", [1.0, 1e-60, 1e200])
def test_float64_weights_are_merged_in_float64(size: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 8, dtype=torch.float64) * size
    weight *= solve((weight / size).abs(), "2:4").mask
    a, b = torch.randn(2, 8, dtype=torch.float64) * size, torch.randn(8, 2, dtype=torch.float64)
    same = merged_weight(weight, a, torch.zeros(8, 2), 1.0, "2:4")
    assert torch.equal(same.weight, weight)
    assert same.lost == 0
    merged = merged_weight(weight, a, b, 1.0, "2:4")
    torch.testing.assert_close(merged.weight, torch.where(weight != 0, weight + b @ a, 0), rtol=1e-14, atol=0)
    assert 0 < merged.lost < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_merged_weight_that_is_not_finite_is_refused(dtype: torch.dtype) -> None:
    weight = torch.ones(4, 4, dtype=dtype) * solve(torch.rand(4, 4), "2:4").mask
    huge = torch.full((1, 4), torch.finfo(dtype).max, dtype=dtype)
    with pytest.raises(ValueError, match=r"first: W \+ s B A has NaN or infinite"):
        merged_weight(weight, huge, torch.full((4, 1), 4.0, dtype=dtype), 1.0, "2:4", name="first")


@pytest.mark.parametrize("other", ["adapted", "plain"])
def test_an_adapter_of_a_tied_weight_is_refused_and_nothing_is_changed(other):
    base, tied = nn.Linear(16, 16), nn.Linear(16, 16)
    prune_(base, "4:8-T", include="")
    tied.weight = base.weight
    model = nn.Sequential(Adapted(base, 16, 16), Adapted(tied, 16, 16) if other == "adapted" else tied)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0: its weight is tied to 1\..*nothing was merged"):
        merge_lora_(model, "4:8-T")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
