"""When masks move: before the forward pass that trains with them, so that what is evaluated is what was trained."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from bisparse import Schedule, Sparsity, finalize_, solve, sparsify_, verify
from bisparse.training import FixedDecay

STEPS = 7


class Net(nn.Module):
    """A root of its own class: torch.compile calls its hooks outside the graph, those of nn.Sequential inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)


def build(root: str = "net") -> nn.Module:
    torch.manual_seed(2)
    model = Net()
    return model if root == "net" else model.layers


def masks_of(sparsity: Sparsity) -> list[torch.Tensor]:
    return [layer.mask.clone() for layer in sparsity.layers]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def run(model, forward, steps: int = STEPS, micro: int = 1, **how):
    """Losses, and the masks in each forward pass; between steps the model is evaluated and must not have changed."""
    sparsity = sparsify_(model, "4:8-T", include="*", refresh=2, **how)  # the last layer too
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsity.attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    losses, masks = [], []
    for _ in range(steps):
        for _ in range(micro):
            inputs, labels = torch.randn(8, 16, generator=generator), torch.randint(0, 8, (8,), generator=generator)
            loss = nn.functional.cross_entropy(forward(inputs), labels)
            loss.backward()
            losses.append(float(loss.detach()))
            masks.append(masks_of(sparsity))
        optimizer.step()
        optimizer.zero_grad()
        assert same(masks_of(sparsity), masks[-1]), "a step changes no mask"
        model.eval()
        forward(inputs)  # with gradients
        model.train()
        with torch.no_grad():
            forward(inputs)
        assert same(masks_of(sparsity), masks[-1]), "an evaluation changes no mask"
    return sparsity, losses, masks


def test_what_is_finalized_after_any_step_was_trained() -> None:
    for steps in range(1, 6):
        model = build()
        sparsity, _, masks = run(model, model, steps=steps)
        expected = copy.deepcopy(model).eval()(torch.ones(1, 16))
        finalize_(model)
        assert torch.equal(model.eval()(torch.ones(1, 16)), expected)
        assert same([layer.weight != 0 for layer in sparsity.layers], masks[-1])


def test_a_run_does_not_lose_accuracy_when_masks_are_due() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8))
    inputs = torch.randn(512, 32)
    labels = (inputs @ torch.randn(32, 8)).argmax(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity = sparsify_(model, "4:8-T")
    sparsity.attach(optimizer)
    accuracy = []
    for _ in range(120):
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            accuracy.append(float((model.eval()(inputs).argmax(1) == labels).double().mean()))
        model.train()
    assert accuracy[118] > 0.98 and accuracy[119] > 0.98, "the masks of step 80 are used up to step 120"
    finalize_(model)
    assert float((model(inputs).argmax(1) == labels).double().mean()) == accuracy[119] and verify(model, "4:8-T")


@pytest.mark.parametrize(
    ("root", "compiled"),
    [("net", "torch.compile"), ("sequential", "torch.compile"), ("sequential", "compile in place"), ("net", "layer by layer")],
)
def test_compiled_runs_refresh_at_the_same_forward_passes(root: str, compiled: str) -> None:
    plain = build(root)
    expected, losses, masks = run(plain, plain, micro=2)
    torch._dynamo.reset()
    model = build(root)
    how = {"backend": "aot_eager", "fullgraph": True}
    forward = model
    if compiled == "torch.compile":
        forward = torch.compile(model, **how)
    elif compiled == "compile in place":
        model.compile(**how)
    else:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.compile(**how)
    sparsity, found, found_masks = run(model, forward, micro=2)
    torch._dynamo.reset()
    assert found == pytest.approx(losses, rel=1e-5)
    assert sparsity.refreshes == expected.refreshes == 3
    assert all(same(*pair) for pair in zip(found_masks, masks, strict=True))


def test_a_compiled_function_and_phases() -> None:
    schedule = Schedule(dense_until=2, freeze_at=5)
    for how in ({}, {"schedule": schedule}):
        torch._dynamo.reset()
        model = build("sequential")
        step = torch.compile(lambda inputs, model=model: model(inputs), backend="aot_eager", fullgraph=True)
        sparsity = sparsify_(model, "4:8-T", refresh=2, **how)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        sparsity.attach(optimizer)
        density = []
        for _ in range(STEPS):
            step(torch.randn(8, 16)).square().mean().backward()
            density.append(float(sparsity.layers[0].mask.double().mean()))
            optimizer.step()
            optimizer.zero_grad()
        assert density == ([1.0] * 2 if how else [0.5] * 2) + [0.5] * 5
        assert sparsity.refreshes == (2 if how else 3)
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_with_the_masks_of_the_forward_pass(reentrant: bool) -> None:
    plain, model = build(), build()
    _, losses, masks = run(plain, plain)
    model.layers = nn.Sequential(model.layers[:2], model.layers[2:])
    model.forward = lambda inputs: checkpoint(model.layers[1], model.layers[0](inputs), use_reentrant=reentrant)
    sparsity, found, found_masks = run(model, model)
    assert found == pytest.approx(losses, rel=1e-6) and sparsity.refreshes == 3
    assert all(same(*pair) for pair in zip(found_masks, masks, strict=True))


def test_a_layer_that_is_called_without_its_root_refreshes() -> None:
    plain, model = build(), build()
    _, losses, masks = run(plain, plain)
    _, found, found_masks = run(model, model.layers)
    assert found == losses and all(same(*pair) for pair in zip(found_masks, masks, strict=True))


@pytest.mark.parametrize("why", ["eval mode", "no forward pass", "no gradients until the backward pass"])
def test_without_a_training_forward_pass_the_refresh_follows_the_next_step(why: str) -> None:
    model = build()
    sparsity = sparsify_(model, "4:8-T", refresh=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsity.attach(optimizer)
    refreshes = []
    for _ in range(6):
        if why == "eval mode":
            model.eval()(torch.randn(8, 16)).square().mean().backward()
        elif why.startswith("no gradients"):
            inputs = torch.randn(8, 16, requires_grad=True)
            checkpoint(model, inputs, use_reentrant=True).square().mean().backward()
        else:
            for weight in model.parameters():
                weight.grad = torch.randn_like(weight)
        optimizer.step()
        refreshes.append(sparsity.refreshes)
    assert refreshes == [0, 0, 1, 1, 2, 2]


def test_copies_and_detached_models_do_not_refresh() -> None:
    model = build()
    sparsity, _, _ = run(model, model, steps=2)
    average = copy.deepcopy(model)
    masks = masks_of(sparsity)
    average(torch.ones(1, 16))
    sparsity.detach()
    model(torch.ones(1, 16))
    assert same(masks_of(sparsity), masks) and sparsity.due
    finalize_(average)
    assert not any(layer._forward_pre_hooks for layer in average.modules())
    sparsity.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.ones(1, 16))
    assert not same(masks_of(sparsity), masks) and not sparsity.due


def test_a_pair_of_model_and_sparsity_is_copied_with_what_is_due() -> None:
    model = build()
    sparsity, _, _ = run(model, model, steps=2)
    twin, own = copy.deepcopy((model, sparsity))
    masks = masks_of(sparsity)
    own.attach(torch.optim.SGD(twin.parameters(), lr=0.1))
    twin(torch.ones(1, 16))
    assert own.refreshes == 1 and not same(masks_of(own), masks)
    assert sparsity.refreshes == 0 and same(masks_of(sparsity), masks)


def test_numbers_that_are_not_finite_leave_the_masks_as_they_are() -> None:
    model = build()
    sparsity, _, masks = run(model, model, steps=2)
    weight = sparsity.layers[1].weight.detach()
    kept = weight[0, 0].clone()
    weight[0, 0] = float("nan")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"layers\.2: its scores"):
            model(torch.ones(1, 16))
    assert same(masks_of(sparsity), masks[-1]) and sparsity.due
    weight[0, 0] = kept
    model(torch.ones(1, 16))
    assert sparsity.refreshes == 1


PASSES = {
    "the Jacobian of the outputs": lambda model, inputs, others: vmap(jacrev(model))(inputs),
    "gradients for each sample": lambda model, inputs, others: vmap(
        grad(lambda one: functional_call(model, dict(model.named_parameters()), one).square().sum())
    )(inputs),
    "other weights": lambda model, inputs, others: functional_call(model, others, inputs),
    "other weights without gradients": lambda model, inputs, others: functional_call(
        model, {name: one.detach() for name, one in others.items()}, inputs
    ),
}


@pytest.mark.parametrize("what", PASSES)
def test_masks_are_of_the_trained_weights_whatever_torch_func_does(mlp, what):
    sparsity = sparsify_(mlp, "4:8-T", refresh=1, decay=FixedDecay(0.0))
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.5)
    sparsity.attach(optimizer)
    torch.manual_seed(3)
    others = {name: torch.randn_like(one).requires_grad_() for name, one in mlp.named_parameters()}
    for _ in range(3):
        inputs = torch.randn(4, 16)
        PASSES[what](mlp, inputs, others)  # before any other pass of this step
        mlp(inputs).square().sum().backward()
        for layer in sparsity.layers:
            assert torch.equal(layer.mask, solve(layer.weight.detach().abs(), "4:8-T").mask)
        optimizer.step()
        optimizer.zero_grad()
    assert sparsity.refreshes == 2


def test_a_loop_of_torch_func_alone_refreshes_masks(mlp):
    sparsity = sparsify_(mlp, "4:8-T", refresh=2)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.01)
    sparsity.attach(optimizer)
    weights = dict(mlp.named_parameters())
    for number in range(8):
        inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(number))
        found = grad(lambda held, inputs=inputs: functional_call(mlp, held, inputs).square().sum())(weights)
        for name, weight in weights.items():
            weight.grad = found[name]
        optimizer.step()
    assert sparsity.refreshes == 3
    finalize_(mlp)
    assert verify(mlp, "4:8-T")
