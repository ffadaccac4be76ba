"""Adapters trained under the mask: the merged weights are the ones that were trained, and keep the pattern."""

import copy

import pytest
import torch
from torch import nn

from bisparse import PatternError, finalize_, prune_, sparsify_, verify
from bisparse.layers import memory_of
from bisparse.training import add_masked_lora_, masked_lora, merge_lora_


class Conv1D(nn.Module):
    """As transformers has it: the weight is (I, O)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.2), nn.Parameter(torch.zeros(nf))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weight + self.bias


class Pixels(nn.Module):
    """A 1 x 1 convolution on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.conv(inputs[..., None, None]).flatten(1)


LAYERS = {"linear": lambda: nn.Linear(16, 16), "conv1d": lambda: Conv1D(16, 16), "conv": Pixels}


@pytest.fixture(params=LAYERS)
def pruned(request):
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[request.param](), nn.ReLU(), LAYERS[request.param]())
    prune_(model, "4:8-T", include=lambda name, module: True)
    return model


def trained(model, parameters, steps=5, autocast=False, batches=5):
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    losses = []
    for number in range(steps):
        generator = torch.Generator().manual_seed(number % batches)
        inputs, target = torch.randn(8, 16, generator=generator), torch.randn(8, 16, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = (model(inputs).float() - target).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


EVERYTHING = {"include": lambda name, module: True}


@pytest.mark.parametrize("how", [{}, {"rslora": True}, {"dora": True}, {"alpha": 4.0}])
def test_the_merged_model_is_the_trained_one_bit_by_bit(pruned, how):
    zeros = {name: value == 0 for name, value in pruned.state_dict().items()}
    plain = set(pruned.state_dict())
    base = copy.deepcopy(pruned)
    adapters = add_masked_lora_(pruned, "4:8-T", rank=4, **EVERYTHING, **how)
    inputs = torch.randn(3, 16)
    assert torch.allclose(pruned(inputs), base(inputs), atol=1e-5)  # B is zero
    assert {id(one) for one in adapters} == {id(one) for one in pruned.parameters() if one.requires_grad}
    trained(pruned, adapters)
    expected = pruned(inputs)
    assert not torch.allclose(expected, base(inputs), atol=1e-2)
    records = merge_lora_(pruned, "4:8-T")
    assert all(one.lost == 0 for one in records) and set(pruned.state_dict()) == plain
    assert torch.equal(pruned(inputs), expected)
    assert verify(pruned, "4:8-T", **EVERYTHING)
    for name, value in pruned.state_dict().items():
        if name.endswith("weight"):
            assert bool((value[zeros[name]] == 0).all()), name


@pytest.mark.parametrize("scale, how", [(2.0, {}), (4.0, {"rslora": True}), (0.75, {"alpha": 3.0})])
def test_what_is_trained_is_the_mask_times_the_sum(scale, how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32, bias=False))
    prune_(model, "2:4", include="0")
    base = model[0].weight.detach().clone()
    a, b = add_masked_lora_(model, "2:4", rank=4, **({} if how else {"alpha": None}), **how, include="0")
    with torch.no_grad():
        b.normal_()
    expected = (base != 0) * (base.double() + scale * b.detach().double() @ a.detach().double())
    assert torch.allclose(model[0].weight.double(), expected, atol=1e-5)
    inputs = torch.randn(4, 16)
    model(inputs).square().sum().backward()
    own = a.grad.clone(), b.grad.clone()
    leaves = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    weight = (base != 0) * (base + scale * leaves[1] @ leaves[0])
    (inputs @ weight.T).square().sum().backward()
    assert all(torch.allclose(one, other.grad, rtol=1e-4, atol=1e-4) for one, other in zip(own, leaves, strict=True))


def test_training_learns_and_bfloat16_merges_bit_by_bit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).bfloat16()
    prune_(model, "4:8-T", **EVERYTHING)
    adapters = add_masked_lora_(model, "4:8-T", rank=8, **EVERYTHING)
    assert {one.dtype for one in adapters} == {torch.float32}
    losses = trained(nn.Sequential(Cast(), model), adapters, steps=30, batches=1)
    assert losses[-1] < losses[0]
    inputs = torch.randn(3, 16).bfloat16()
    expected = model(inputs)
    merge_lora_(model, "4:8-T")
    assert torch.equal(model(inputs), expected) and model[0].weight.dtype == torch.bfloat16


class Cast(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.bfloat16()


def test_autocast_trains_the_weights_that_are_merged(pruned):
    adapters = add_masked_lora_(pruned, "4:8-T", **EVERYTHING)
    trained(pruned, adapters, autocast=True)
    inputs = torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = pruned(inputs)
        merge_lora_(pruned, "4:8-T")
        assert torch.equal(pruned(inputs), expected)


def test_compiled_and_saved(pruned):
    torch._dynamo.reset()
    adapters = add_masked_lora_(pruned, "4:8-T", **EVERYTHING)
    try:
        compiled = torch.compile(pruned, backend="aot_eager", fullgraph=True)
        trained(compiled, adapters)
        inputs = torch.randn(3, 16)
        assert torch.allclose(compiled(inputs), pruned(inputs), atol=1e-5)
    finally:
        torch._dynamo.reset()
    other = copy.deepcopy(pruned)
    with torch.no_grad():
        for one in other.parameters():
            one.zero_()
    other.load_state_dict(pruned.state_dict())
    merge_lora_(other, "4:8-T")
    assert torch.equal(other(inputs), pruned(inputs))


def test_frozen_and_trained_weights_are_again_what_they_were(pruned):
    pruned[0].requires_grad_(False)
    add_masked_lora_(pruned, "4:8-T", **EVERYTHING)
    merge_lora_(pruned, "4:8-T")
    assert not any(one.requires_grad for one in pruned[0].parameters())
    (weight,) = [one for name, one in pruned[2].named_parameters() if name.endswith("weight")]
    assert weight.requires_grad
    sparsity = sparsify_(pruned, "4:8-T", mode="static", masks="nonzero", **EVERYTHING)
    assert len(sparsity.layers) == 2
    finalize_(pruned)


def dense(model):
    model[2].weight.data += 1.0


def static(model):
    sparsify_(model, "4:8-T", mode="static", include="*")


def dynamic(model):
    sparsify_(model, "4:8-T", include="*")


def adapted(model):
    add_masked_lora_(model, "4:8-T", include="*")


def normed(model):
    nn.utils.parametrizations.weight_norm(model[2])


REFUSED = {dense: "exclude it", static: "finalize_", dynamic: "finalize_", adapted: "already", normed: "2"}


@pytest.mark.parametrize("change", REFUSED, ids=lambda one: one.__name__)
def test_what_has_no_mask_is_refused_before_anything_is_changed(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    prune_(model, "4:8-T", include="*")
    change(model)
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model]
    flags = [one.requires_grad for one in model.parameters()]
    with pytest.raises(PatternError if change is dense else ValueError, match=REFUSED[change]):
        add_masked_lora_(model, "4:8-T", include="*")
    assert [type(module) for module in model] == kinds and flags == [one.requires_grad for one in model.parameters()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "arguments, message",
    [({"rank": 0}, "rank=0"), ({"rank": 17}, "more than"), ({"alpha": 0.0}, "alpha"), ({"pattern": "2:4-T"}, "2:4-T")],
)
def test_bad_arguments(arguments, message):
    model = nn.Sequential(nn.Linear(16, 16))
    prune_(model, "4:8-T", include="*")
    with pytest.raises(ValueError, match=message):
        add_masked_lora_(model, **{"pattern": "4:8-T", "include": "*", **arguments})
    kernels = nn.Sequential(nn.Conv2d(16, 16, 3))
    prune_(kernels, "4:8-T", include="*")
    with pytest.raises(ValueError, match="9 matrices"):
        add_masked_lora_(kernels, "4:8-T", include="*")


@pytest.mark.parametrize("tie", [lambda weight: weight, lambda weight: nn.Parameter(weight.data)])
def test_weights_that_are_tied_are_refused_and_nothing_is_changed(tie):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    prune_(model, "4:8-T")
    model[2].weight = tie(model[0].weight)
    before = list(model.named_parameters())
    with pytest.raises(ValueError, match=r"0: its weight is tied to 2\.weight"):
        add_masked_lora_(model, "4:8-T", include="0", rank=2)
    assert all(one is other for (_, one), (_, other) in zip(before, model.named_parameters(), strict=True))
    assert all(one.requires_grad for one in model.parameters())


def test_ties_are_searched_for_once_and_not_by_each_layer(monkeypatch):
    asked = []

    def counted(weight):
        asked.append(weight)
        return memory_of(weight)

    monkeypatch.setattr(masked_lora, "memory_of", counted)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(20)))
    prune_(model, "4:8-T", include="*")
    add_masked_lora_(model, "4:8-T", rank=2, include="*")
    assert len(asked) < 100
