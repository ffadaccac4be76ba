"""Loops as people write them: AMP, compile, copies, averages, frozen and tied weights, adapters."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bisparse import PatternError, finalize_, prune_, solve, sparsify_, verify
from bisparse.training import FixedDecay, add_masked_lora_, merge_lora_, merged_weight, plain_state_dict


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("fused", [False, True])
def test_amp_steps_that_were_skipped_do_not_count(mlp, mode, fused):
    sparsity = sparsify_(mlp, "4:8-T", mode=mode, refresh=1, decay=FixedDecay(0.5))
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1, fused=fused)
    sparsity.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = mlp(torch.randn(4, 16)).float().square().mean()
        scaler.scale(loss).backward()
        if number in (1, 2):
            mlp[0].bias.grad[0] = float("inf")
        before = {name: value.clone() for name, value in mlp.state_dict().items()}
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = any(not torch.equal(value, before[name]) for name, value in mlp.state_dict().items())
        assert moved == (number not in (1, 2))
    assert sparsity.step == 2


def test_a_fused_optimizer_that_unscales_gets_the_decay_scaled():
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16))
        sparsity = sparsify_(model, "4:8-T", decay=FixedDecay(0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        sparsity.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scaler.scale(model(torch.ones(4, 16)).square().mean()).backward()
        scaler.step(optimizer)
        results.append(model[0].parametrizations.weight.original.detach().clone())
    assert torch.allclose(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("arguments", [{}, {"method": "s-ste", "pattern": "2:4"}, {"mode": "static"}, {"mvue": True}])
def test_compiles_without_graph_breaks(model, mlp, arguments):
    arguments = dict(arguments)
    shape = (2, 16) if arguments else (2, 3, 8, 8)
    model = mlp if arguments else model
    sparsity = sparsify_(model, arguments.pop("pattern", "4:8-T"), refresh=1, **arguments)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    graphs = []
    try:
        for _ in range(4):  # masks move, the graph does not
            output = compiled(torch.ones(shape))
            assert torch.allclose(output, model(torch.ones(shape)), atol=1e-5)
            output.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    finally:
        torch._dynamo.reset()
    assert graphs[1:] == [graphs[1]] * 3 and graphs[1] <= graphs[0] + 1, "one more, which refreshes first"


def test_deepcopy_then_each_trains_on_its_own(model, step):
    sparsity = sparsify_(model, "4:8-T", refresh=1)
    twin, own = copy.deepcopy((model, sparsity))
    assert all(
        torch.equal(one, other) for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    )
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    own.attach(optimizer)
    masks = [layer.mask.clone() for layer in sparsity.layers]
    for number in range(3):
        step(twin, optimizer, number)
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(sparsity.layers, masks, strict=True))
    assert any(not torch.equal(layer.mask, mask) for layer, mask in zip(own.layers, masks, strict=True))
    finalize_(twin)
    assert verify(twin.up.weight, "4:8-T") and sparsity.layers[0].active


def test_finalize_leaves_a_plain_model_that_pickles_and_loads_strictly(model, step):
    plain = copy.deepcopy(model)
    sparsity = sparsify_(model, "4:8-T", refresh=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    for number in range(3):
        step(model, optimizer, number)
    expected = model(torch.ones(2, 3, 8, 8))
    state = plain_state_dict(model)
    held = [id(one) for one in model.parameters()]
    assert finalize_(model) is model
    assert [id(one) for one in model.parameters()] == held or {id(one) for one in model.parameters()} == set(held)
    assert type(model.up) is nn.Linear and type(model.attention) is nn.MultiheadAttention
    assert torch.equal(model(torch.ones(2, 3, 8, 8)), expected)
    assert state.keys() == model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    plain.load_state_dict(model.state_dict(), strict=True)
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    assert torch.equal(torch.load(pickled, weights_only=False)(torch.ones(2, 3, 8, 8)), expected)
    for layer in sparsity.layers:
        assert verify(layer.weight, "4:8-T", layout=layer.layout)


def test_frozen_layers_keep_weight_and_mask(mlp, step):
    mlp[0].weight.requires_grad_(False)
    for mode in ("dynamic", "static"):
        sparsity = sparsify_(mlp, "4:8-T", refresh=1, mode=mode)
        optimizer = torch.optim.SGD([one for one in mlp.parameters() if one.requires_grad], lr=0.1)
        sparsity.attach(optimizer)
        weight, mask = sparsity.layers[0].weight.clone(), sparsity.layers[0].mask.clone()
        for number in range(2):
            step(mlp, optimizer, number)
        assert torch.equal(sparsity.layers[0].weight, weight) and torch.equal(sparsity.layers[0].mask, mask)
        sparsity.detach()
        finalize_(mlp)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_layers_that_thaw_and_join_the_optimizer_are_followed(mlp, step, mode):
    mlp[0].weight.requires_grad_(False)
    sparsity = sparsify_(mlp, "4:8-T", refresh=1, mode=mode)
    thawing = sparsity.layers[0]
    optimizer = torch.optim.SGD([one for one in mlp.parameters() if one.requires_grad], lr=0.5, momentum=0.9, weight_decay=0.1)
    sparsity.attach(optimizer)
    step(mlp, optimizer, 0)
    thawing.weight.requires_grad_(True)
    optimizer.add_param_group({"params": [thawing.weight]})
    before = thawing.weight.detach().clone()
    for number in range(1, 4):
        step(mlp, optimizer, number)
        assert mode == "dynamic" or not bool(thawing.weight[~thawing.mask].any())
    assert not torch.equal(thawing.weight, before)
    finalize_(mlp)
    assert verify(mlp, "4:8-T")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(inputs)))


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_tied_weights_are_one_weight_with_one_mask(mode):
    torch.manual_seed(0)
    model = Tied()
    sparsity = sparsify_(model, "4:8-T", mode=mode, refresh=1)
    assert [layer.name for layer in sparsity.layers] == ["first"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsity.attach(optimizer)
    for _ in range(3):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(model.first.weight, model.second.weight)
        assert verify(model.second.weight, "4:8-T")
    expected = model(torch.ones(1, 16))
    finalize_(model)
    assert model.first.weight is model.second.weight and torch.equal(model(torch.ones(1, 16)), expected)
    assert len(list(model.parameters())) == 3


def test_encoder_layers_of_torch_run_in_both_modes():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    sparsify_(layer, "4:8-T")
    inputs = torch.randn(2, 5, 16)
    trained = layer.train()(inputs)
    with torch.no_grad():
        assert torch.allclose(layer.eval()(inputs), trained, atol=1e-5)


class Adapted(nn.Module):
    """A LoRA layer as peft lays it out."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer, self.merged = base, False
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.scaling, self.active_adapters = {"default": 2.0}, ["default"]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.base_layer(inputs) + 2.0 * self.lora_B["default"](self.lora_A["default"](inputs))


def test_adapters_train_on_frozen_sparse_weights_and_merge_without_losing_zeros():
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(nn.Linear(16, 32)), nn.ReLU(), Adapted(nn.Linear(32, 8)))
    for layer in (model[0], model[2]):
        layer.base_layer.weight.requires_grad_(False)
    sparsity = sparsify_(model, "4:8-T", mode="static")
    assert [layer.name for layer in sparsity.layers] == ["0.base_layer", "2.base_layer"]
    assert "LoRA" in {one.name: one.reason for one in sparsity.skipped}["0.lora_A.default"]
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.01)
    sparsity.attach(optimizer)
    for _ in range(5):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    finalize_(model)
    base, a, b = model[0].base_layer.weight.clone(), model[0].lora_A["default"].weight, model[0].lora_B["default"].weight.clone()
    results = merge_lora_(model, "4:8-T")
    assert [one.name for one in results] == ["0", "2"] and all(0 < one.lost < 1 for one in results)
    assert torch.allclose(model[0].base_layer.weight, (base + 2.0 * b @ a) * (base != 0), atol=1e-6)
    assert verify(model[0].base_layer.weight, "4:8-T") and verify(model[2].base_layer.weight, "4:8-T")
    inputs = torch.randn(3, 16)
    assert torch.equal(model[0](inputs), model[0].base_layer(inputs))


def test_a_merge_with_a_new_mask_keeps_the_most():
    torch.manual_seed(0)
    weight = torch.randn(16, 16) * solve(torch.rand(16, 16), "4:8-T").mask
    a, b = torch.randn(4, 16), torch.randn(16, 4)
    old = merged_weight(weight, a, b, 0.5, "4:8-T")
    new = merged_weight(weight, a, b, 0.5, "4:8-T", new_mask=True)
    assert new.lost < old.lost and verify(new.weight, "4:8-T")
    with pytest.raises(PatternError):
        merged_weight(torch.randn(16, 16), a, b, 0.5, "4:8-T")
    with pytest.raises(ValueError, match=r"expected \(rank, 16\)"):
        merged_weight(weight, b, a, 0.5, "4:8-T")
    with pytest.raises(ValueError, match="no LoRA layer"):
        merge_lora_(nn.Linear(8, 8), "4:8-T")


def test_an_optimizer_inside_a_wrapper_is_found(mlp, step):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)

    class Wrapper(torch.optim.Optimizer):
        def __init__(self) -> None:
            self.optimizer = optimizer

    sparsity = sparsify_(mlp, "4:8-T").attach(Wrapper())
    step(mlp, optimizer, 0)
    assert sparsity.step == 1
    with pytest.raises(ValueError, match=r"torch\.optim\.Optimizer"):
        sparsify_(copy.deepcopy(nn.Linear(8, 8)), "4:8-T").attach(SimpleNamespace())


def test_a_layer_that_thaws_is_clipped_by_the_gradient_that_is_used(mlp, step):
    mlp[0].weight.requires_grad_(False)
    sparsity = sparsify_(mlp, "4:8-T", mode="static")
    thawing = sparsity.layers[0]
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    assert not thawing.weight.requires_grad
    step(mlp, optimizer, 0)
    thawing.weight.requires_grad_(True)
    mlp(torch.ones(2, 16)).square().sum().backward()
    assert bool(thawing.weight.grad.any()) and not bool(thawing.weight.grad[~thawing.mask].any())


@pytest.mark.parametrize("adapters", [False, True])
def test_a_cache_of_parametrizations_has_the_weights_of_each_module(adapters):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    if adapters:
        prune_(model, "4:8-T")
        optimizer = torch.optim.SGD(add_masked_lora_(model, "4:8-T", rank=2), lr=0.5)
    else:
        sparsity = sparsify_(model, "4:8-T", refresh=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        sparsity.attach(optimizer)
    model.append(copy.deepcopy(model[0]))
    for number in range(3):
        inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(number))
        with nn.utils.parametrize.cached():
            output = model(inputs)
            assert model[1].weight is model[1].weight  # it is computed once
        assert torch.equal(output, model(inputs))
        output.square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
