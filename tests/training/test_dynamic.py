"""Dynamic masks: what the forward pass sees, what the optimizer gets, when masks move, and what is reported."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import bisparse
from bisparse import Schedule, finalize_, solve, sparsify_, verify
from bisparse.tiles import Layout, LayoutKind
from bisparse.training import FixedDecay
from bisparse.training.layer import SparseLayer

PATTERNS = ["2:4", "2:4-T", "4:8-T", "16:32-T", "50%", "4:8-seq", "4:8-paired", "1:4-T"]


def originals(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items() if name.endswith(".original")}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_layer_has_the_best_mask_in_its_own_layout(model, pattern):
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    sparsity = sparsify_(model, pattern)
    assert [layer.name for layer in sparsity.layers] == [
        "conv", "attention.in_proj_weight", "attention.out_proj", "up", "down",
    ]  # fmt: skip
    assert {skipped.name: skipped.reason for skipped in sparsity.skipped}.keys() == {"stem", "head"}
    layouts = {"conv": Layout(LayoutKind.CONV), "attention.in_proj_weight": Layout(LayoutKind.PACKED, parts=3)}
    for layer in sparsity.layers:
        weight = dense[layer.name if layer.name.endswith("_weight") else f"{layer.name}.weight"]
        alone = solve(weight.abs(), pattern, layout=layouts.get(layer.name))
        forward = getattr(layer.module, layer.parameter)
        assert float(forward.detach().abs().double().sum()) == pytest.approx(alone.value, rel=1e-6), layer.name
        assert torch.equal(forward != 0, layer.mask & (weight != 0))
        assert verify(forward, pattern, layout=layer.layout)
        assert torch.equal(forward, weight * layer.mask)


def test_forward_is_masked_and_the_gradient_goes_to_all_of_the_weight(mlp):
    sparsify_(mlp, "4:8-T", include="0")
    layer = mlp[0]
    dense = layer.parametrizations.weight.original
    inputs = torch.randn(5, 16)
    masked = (dense * layer.parametrizations.weight[0].mask).detach().requires_grad_()
    upstream = torch.randn(5, 32)
    expected = nn.functional.linear(inputs, masked, layer.bias)
    expected.backward(upstream)
    output = layer(inputs)
    output.backward(upstream)
    assert torch.equal(output, expected)
    assert torch.equal(dense.grad, masked.grad)
    assert bool((dense.grad[~layer.parametrizations.weight[0].mask] != 0).all())


def hand_step(weight, velocity, gradient, mask, *, method, decay, lr, momentum):
    """A step of SGD with momentum, from the papers' formulas."""
    pruned = (1 - mask) * weight
    if method == "masked-decay":
        gradient = gradient + decay * pruned
    velocity = momentum * velocity + gradient
    update = velocity + (decay * pruned if method == "sr-ste" else 0)
    return weight - lr * update, velocity


@pytest.mark.parametrize("method", ["ste", "sr-ste", "masked-decay"])
def test_steps_follow_the_formulas(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    weight = model[0].weight.detach().clone()
    sparsity = sparsify_(model, "2:4-T", method=method, decay=FixedDecay(0.05), refresh=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    sparsity.attach(optimizer)
    velocity = torch.zeros_like(weight)
    mask = solve(weight.abs(), "2:4-T").mask
    for number in range(6):
        inputs = torch.randn(4, 8)
        if number > 0 and number % 2 == 0:
            mask = solve(weight.abs(), "2:4-T").mask
        model(inputs).square().sum().backward()
        masked = (weight * mask).requires_grad_()
        nn.functional.linear(inputs, masked).square().sum().backward()
        weight, velocity = hand_step(weight, velocity, masked.grad, mask.float(), method=method, decay=0.05, lr=0.3, momentum=0.9)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.allclose(model[0].parametrizations.weight.original, weight, rtol=1e-4, atol=1e-5)
        assert torch.equal(model[0].parametrizations.weight[0].mask, mask)


def test_adam_sees_the_decay_before_its_moments():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    sparsity = sparsify_(model, "2:4-T", decay=FixedDecay(0.1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sparsity.attach(optimizer)
    original, mask = model[0].parametrizations.weight.original, model[0].parametrizations.weight[0].mask
    before = original.detach().clone()
    model(torch.randn(4, 8)).square().sum().backward()
    gradient = original.grad.clone()
    optimizer.step()
    expected = gradient + 0.1 * torch.where(mask, 0, before)
    assert torch.allclose(optimizer.state[original]["exp_avg"], 0.1 * expected, rtol=1e-5)
    assert torch.allclose(optimizer.state[original]["exp_avg_sq"], 0.001 * expected**2, rtol=1e-5)


@pytest.mark.parametrize(
    ("optimizer_class", "method", "expected"),
    [
        (torch.optim.SGD, "masked-decay", 2e-4),
        (torch.optim.AdamW, "masked-decay", 2e-3),
        (torch.optim.NAdam, "masked-decay", 2e-3),
        (torch.optim.RMSprop, "masked-decay", 2e-4),
        (torch.optim.AdamW, "sr-ste", 2e-4),
    ],
)
def test_the_default_decay_goes_by_the_optimizer(mlp, step, optimizer_class, method, expected):
    given = copy.deepcopy(mlp)
    for model, how in ((mlp, {}), (given, {"decay": FixedDecay(expected)})):
        optimizer = optimizer_class(model.parameters(), lr=0.01)
        sparsify_(model, "4:8-T", method=method, **how).attach(optimizer)
        for number in range(3):
            step(model, optimizer, number)
    for one, other in zip(mlp.parameters(), given.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("refresh", "moves_at"), [(1, [1, 2, 3, 4, 5]), (3, [3]), (40, [])])
def test_masks_move_in_the_forward_pass_after_every_refresh_steps_and_are_optimal_then(model, step, refresh, moves_at):
    sparsity = sparsify_(model, "4:8-T", refresh=refresh, measure_every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsity.attach(optimizer)
    moved = []
    for done in range(6):
        before = {layer.name: layer.mask.clone() for layer in sparsity.layers}
        weights = {layer.name: layer.weight.detach().clone() for layer in sparsity.layers}
        step(model, optimizer, done)
        changed = {layer.name: layer.mask ^ before[layer.name] for layer in sparsity.layers}
        if any(bool(one.any()) for one in changed.values()):
            moved.append(done)
            assert sparsity.metrics()["sparsity/step"] == done
            for layer in sparsity.layers:
                scores = weights[layer.name].abs()
                best = solve(scores, "4:8-T", layout=layer.layout).check()
                kept = float(scores.double()[layer.mask].sum())
                assert kept == pytest.approx(best.value, rel=1e-6)
                change = sparsity.changes[layer.name]
                assert change.step == done
                assert change.flip_rate == float(changed[layer.name].double().mean())
                assert change.retained == pytest.approx(best.retained, rel=1e-6)
                assert change.distance < 1e-6
                stale = float(scores.double()[before[layer.name]].sum())
                assert change.stale_distance == pytest.approx(1 - stale / best.value, abs=1e-6)
        elif done in moves_at:
            pytest.fail("weights moved a lot, the masks did not")
    assert moved == moves_at and sparsity.step == 6
    assert set(sparsity.metrics()) >= ({"sparsity/flip_rate", "sparsity/conv/changed_tiles"} if moves_at else set())


def test_distance_of_a_greedy_mask_is_to_the_true_optimum(mlp, step):
    sparsity = sparsify_(mlp, "4:8-T", refresh=1, solver=bisparse.solvers.Greedy(), measure_every=1)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    step(mlp, optimizer, 0)
    weights = [layer.weight.detach().clone() for layer in sparsity.layers]
    step(mlp, optimizer, 1)
    for layer, weight in zip(sparsity.layers, weights, strict=True):
        kept = float(weight.abs().double()[layer.mask].sum())
        best = solve(weight.abs(), "4:8-T").value
        assert kept < best
        assert sparsity.changes[layer.name].distance == pytest.approx(1 - kept / best)


def test_changed_tiles_counts_tiles(mlp):
    sparsity = sparsify_(mlp, "4:8-T", include="0", refresh=1, measure_every=1)
    original = mlp[0].parametrizations.weight.original
    tile = original[8:16, 8:16].detach()
    mask = sparsity.layers[0].mask[8:16, 8:16]
    with torch.no_grad():  # in one tile, what was pruned outgrows what was kept
        original[8:16, 8:16] = torch.where(mask, tile * 1e-3, tile + 10)
    sparsity.refresh()
    assert sparsity.changes["0"].changed_tiles == 1 / 8
    assert 0 < sparsity.changes["0"].flip_rate <= 1 / 8


def test_dense_then_sparse_then_frozen_then_dense(mlp, step):
    schedule = Schedule(dense_until=3, freeze_at=6, dense_from=9)
    sparsity = sparsify_(mlp, "4:8-T", refresh=1, schedule=schedule)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.5)
    sparsity.attach(optimizer)
    density, masks = [], []
    for number in range(12):
        density.append(float((mlp[0].weight != 0).double().mean()))
        masks.append(sparsity.layers[0].mask.clone())
        step(mlp, optimizer, number)
    # Before a step the weight is what was trained; its forward pass changes the phase.
    assert density == [1.0] * 4 + [0.5] * 6 + [1.0] * 2
    assert not torch.equal(masks[4], masks[6])
    assert torch.equal(masks[6], masks[9])
    finalize_(mlp)
    assert float((mlp[0].weight != 0).double().mean()) == 1.0


def test_decay_only_on_what_the_recipe_says(mlp, step):
    sparsity = sparsify_(mlp, "2:4-T", decay={"0": FixedDecay(0.5)}, refresh=40)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    for layer in sparsity.layers:
        layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    decayed, untouched = (layer.weight.grad for layer in sparsity.layers)
    pruned = torch.where(sparsity.layers[0].mask, 0, 1.0) != 0
    assert bool((decayed[pruned] != 0).all()) and not bool(decayed[~pruned].any())
    assert not bool(untouched.any())


def test_patterns_by_name(model):
    patterns = {"attention.*": "2:4", "up": "dense", "*": "8:16-T"}
    sparsity = sparsify_(model, "4:8-T", patterns=patterns)
    assert {layer.name: str(layer.pattern) for layer in sparsity.layers} == {
        "conv": "8:16-T",
        "attention.in_proj_weight": "2:4",
        "attention.out_proj": "2:4",
        "down": "8:16-T",
    }
    assert "up" in {skipped.name for skipped in sparsity.skipped}
    for layer in sparsity.layers:
        assert verify(layer.mask, layer.pattern, layout=layer.layout)


def test_a_custom_score_decides(mlp):
    generator = torch.Generator().manual_seed(5)
    scores = {"0": torch.rand(32, 16, generator=generator), "2": torch.rand(8, 32, generator=generator)}
    sparsity = sparsify_(mlp, "4:8-T", score=lambda name, weight: scores[name])
    for layer in sparsity.layers:
        assert torch.equal(layer.mask, solve(scores[layer.name], "4:8-T").mask)


@pytest.mark.parametrize("size", [4.0, 1e-4])
def test_the_scale_of_a_soft_threshold_in_float16_is_that_of_float32(size):
    weight = size * torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    scales = []
    for dtype in (torch.float16, torch.float32):
        model = nn.Sequential(nn.Linear(512, 512)).to(dtype)
        model[0].weight.data.copy_(weight.half())
        sparsify_(model, "2:4", method="s-ste", include="0")
        scales.append(float(model[0].parametrizations.weight[0].scale))
    assert scales[0] == pytest.approx(scales[1], rel=1e-3)


def test_soft_threshold_is_continuous_and_scaled(mlp, step):
    weight = mlp[0].weight.detach().clone()
    sparsity = sparsify_(mlp, "2:4", method="s-ste", include="0")
    groups = weight.view(-1, 4)
    third = groups.abs().sort(dim=1, descending=True).values[:, 2:3]
    shrunk = (groups.sign() * (groups.abs() - third).clamp(min=0)).view_as(weight)
    scale = (weight * shrunk).sum() / (shrunk * shrunk).sum()
    assert torch.allclose(mlp[0].weight, scale * shrunk, rtol=1e-6)
    assert all(
        float((weight - scale * shrunk).norm()) <= float((weight - factor * scale * shrunk).norm()) for factor in (0.98, 1.02)
    )
    # Two entries that swap ranks: the hard mask jumps by their size, the soft threshold by the change.
    original = mlp[0].parametrizations.weight.original
    with torch.no_grad():
        original[0, :4] = torch.tensor([1.0, 0.5001, 0.5, 0.1])
        before = mlp[0].weight[0, :4].clone()
        original[0, :4] = torch.tensor([1.0, 0.5, 0.5001, 0.1])
        after = mlp[0].weight[0, :4]
    assert float((before - after).abs().max()) < 1e-3
    optimizer = torch.optim.Adam(mlp.parameters(), lr=0.05)
    sparsity.attach(optimizer)
    first = step(mlp, optimizer, 0)
    assert min(step(mlp, optimizer, 0) for _ in range(30)) < first / 2
    finalize_(mlp)
    assert verify(mlp[0].weight, "2:4") and float((mlp[0].weight != 0).double().mean()) == 0.5


def test_gradient_accumulation_counts_optimizer_steps(mlp):
    sparsity = sparsify_(mlp, "4:8-T", refresh=2)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    for micro in range(12):
        mlp(torch.randn(4, 16)).square().mean().backward()
        if micro % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert sparsity.step == 3 and sparsity.refreshes == 1


def test_only_the_first_micro_batch_after_a_step_refreshes(mlp):
    sparsity = sparsify_(mlp, "4:8-T", refresh=1)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=1.0)
    sparsity.attach(optimizer)
    masks = []
    for micro in range(9):
        mlp(torch.randn(4, 16)).square().mean().backward()
        masks.append(sparsity.layers[0].mask.clone())
        if micro % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(sparsity.layers[0].mask, masks[-1])
    assert all(torch.equal(masks[micro], masks[micro // 3 * 3]) for micro in range(9))
    assert sparsity.refreshes == 2 and not torch.equal(masks[0], masks[3]) and not torch.equal(masks[3], masks[6])


def test_one_refresh_of_many_layers_costs_one_call_a_width(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)), nn.Linear(16, 24))
    calls = []
    import bisparse.training.mask_search as search

    monkeypatch.setattr(search, "solve", lambda scores, *rest, **how: calls.append(scores.shape) or solve(scores, *rest, **how))
    sparsity = sparsify_(model, "4:8-T", include="*")
    assert calls == [(6 * 16 + 24, 16)]
    for layer in sparsity.layers:
        assert torch.equal(layer.mask, solve(layer.weight.detach().abs(), "4:8-T").mask)


@pytest.mark.parametrize("pattern", ["2:4-T", "4:8-T", "16:32-T"])
def test_masks_do_not_depend_on_how_layers_are_gathered(model, step, monkeypatch, pattern):
    other = copy.deepcopy(model)
    runs = []
    for one, most in ((model, 1 << 22), (other, 1)):
        monkeypatch.setattr("bisparse.training.mask_search.GATHERED_WEIGHTS", {"cpu": most})
        sparsity = sparsify_(one, pattern, refresh=1, measure_every=1)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.5)
        sparsity.attach(optimizer)
        for number in range(3):
            step(one, optimizer, number)
        runs.append(sparsity)
    assert len(runs[0].search._gathered) < len(runs[1].search._gathered) == len(runs[1].layers)
    for one, another in zip(runs[0].layers, runs[1].layers, strict=True):
        assert torch.equal(one.mask, another.mask), one.name
        assert torch.equal(one.weight, another.weight), one.name
    assert runs[0].metrics() == runs[1].metrics()


def test_layers_cast_apart_after_they_were_gathered(step):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    sparsity = sparsify_(model, "4:8-T")
    model[1].double()
    sparsity.refresh()
    for layer in sparsity.layers:
        assert torch.equal(layer.mask, solve(layer.weight.detach().abs().float(), "4:8-T").mask)


def test_layers_that_m_does_not_divide_are_padded():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 10, 3), nn.Conv2d(10, 12, 3, groups=2))
    sparsity = sparsify_(model, "4:8-T")
    for layer in sparsity.layers:
        assert verify(layer.mask, "4:8-T", layout=layer.layout)
        best = solve(layer.weight.detach().abs(), "4:8-T", layout=layer.layout)
        assert float(layer.weight.detach().abs().double()[layer.mask].sum()) == pytest.approx(best.value, rel=1e-6)
    assert isinstance(sparsity.layers[0], SparseLayer)
    other = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 10))
    left = sparsify_(other, "4:8-T", remainder="dense").skipped
    assert [one.name for one in left] == ["1"] and "8 does not divide" in left[0].reason


def test_finalizing_a_model_leaves_its_copies_alone(mlp):
    sparsify_(mlp, "4:8-T")
    average = copy.deepcopy(mlp)
    finalize_(mlp)
    inputs = torch.randn(3, 16)
    assert torch.equal(average(inputs), mlp(inputs)), "an average of the weights, say, that goes on"
    finalize_(average)
    assert torch.equal(average(inputs), mlp(inputs))


@pytest.mark.parametrize("how", [{}, {"method": "s-ste", "schedule": Schedule(dense_until=1)}], ids=str)
def test_training_that_no_mask_followed_is_told_at_the_end(how, mlp, step):
    sparsify_(mlp, "2:4", **how)
    step(mlp, torch.optim.SGD(mlp.parameters(), lr=0.1), 0)
    with pytest.warns(UserWarning, match=r"Sparsity\.attach\(optimizer\)") as told:
        finalize_(mlp)
    assert len(told) == 1 and told[0].filename == __file__


@pytest.mark.parametrize("moved", [lambda model: model.to(torch.bfloat16), lambda model: model.to(torch.float64).float()])
def test_a_model_that_was_cast_was_not_trained(moved, mlp, recwarn):
    sparsify_(mlp, "2:4")
    finalize_(moved(mlp))
    assert not recwarn


def test_a_model_whose_weights_were_written_onto_themselves_was_not_trained(mlp, recwarn):
    """As DDP does it to all parameters when it begins, and as torch swaps them in a cast, if told so."""
    sparsify_(mlp, "2:4")
    with torch.no_grad():
        for weight in mlp.parameters():
            weight.copy_(weight.clone())
    finalize_(mlp)
    assert not recwarn


def test_a_model_without_gradients_is_sparsified_and_finalized_in_inference_mode(recwarn):
    with torch.inference_mode():
        model = nn.Linear(16, 16)
        sparsify_(model, "2:4")
        finalize_(model)
        assert verify(model.weight, "2:4")
    assert not recwarn


def test_a_soft_threshold_needs_no_optimizer_to_follow(mlp, step, recwarn):
    followed = copy.deepcopy(mlp)
    for model in (mlp, followed):
        sparsity = sparsify_(model, "2:4", method="s-ste", refresh=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if model is followed:
            sparsity.attach(optimizer)
        step(model, optimizer, 0)
        finalize_(model)
    assert not recwarn and all(torch.equal(*pair) for pair in zip(mlp.parameters(), followed.parameters(), strict=True))


@pytest.mark.parametrize("case", ["untrained", "attached", "refreshed", "model resumed", "sparsity resumed", "average"])
def test_masks_that_are_as_they_should_be_are_not_warned_about(case, mlp, step, recwarn):
    state = copy.deepcopy(mlp).state_dict()
    sparsity = sparsify_(mlp, "2:4")
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(mlp, use_buffers=True)
    if case == "attached":
        sparsity.attach(optimizer)
    if case != "untrained":
        step(mlp, optimizer, 0)
    if case == "refreshed":
        sparsity.refresh()
    elif case == "average":
        average.update_parameters(mlp)
        mlp = average.module
    elif case.endswith("resumed"):
        resumed = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        resumed.load_state_dict(state)
        again = sparsify_(resumed, "2:4")
        if case == "model resumed":
            resumed.load_state_dict(mlp.state_dict())
        else:
            again.load_state_dict(sparsity.state_dict())
            step(resumed, torch.optim.SGD(resumed.parameters(), lr=0.1), 1)
        mlp = resumed
    finalize_(mlp)
    assert not [one for one in recwarn if "Sparsity.attach" in str(one.message)]


def test_layers_share_a_class_and_yet_are_parametrized_and_freed_apart() -> None:
    class Twice(nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return 2 * value

    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    sparsify_(model, "2:4-T")
    first, second, third = model
    assert type(first) is type(second) is type(third) and type(first).__bases__ == (nn.Linear,)
    bias = first.bias.detach().clone()
    parametrize.register_parametrization(first, "bias", Twice())
    assert torch.equal(first.bias, 2 * bias) and isinstance(second.bias, nn.Parameter)
    inputs = torch.ones(2, 16)
    assert torch.compile(model, backend="eager", fullgraph=True)(inputs).allclose(model(inputs))
    other = nn.Linear(16, 16)
    sparsify_(other, "2:4-T", include="*")
    assert type(other) is not type(first) and "bias" not in vars(type(other))
    parametrize.register_parametrization(second, "bias", Twice())
    parametrize.remove_parametrizations(first, "bias")
    assert isinstance(first.bias, nn.Parameter) and torch.equal(first.bias, 2 * bias) and not second.bias.is_leaf
    masked = second.weight.detach().clone()
    parametrize.remove_parametrizations(second, "weight")
    assert torch.equal(second.weight, masked) and isinstance(second.weight, nn.Parameter) and verify(second.weight, "2:4-T")
    parametrize.remove_parametrizations(second, "bias")
    assert type(second) is nn.Linear and type(first) is type(third)
    copied = copy.deepcopy(model)
    finalize_(model)
    assert {type(layer) for layer in model} == {nn.Linear}
    assert copied(torch.ones(2, 16)).allclose(model(torch.ones(2, 16)))
    finalize_(copied)
