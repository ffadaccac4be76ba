"""Gradients of static runs are zero off the masks from the moment they are accumulated, whoever looks at them."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bisparse import sparsify_
from bisparse.kernels.masking.dispatch import MIN_WEIGHTS
from bisparse.training import FixedDecay

WIDTHS = {"compiled": 192, "by torch": 16}
assert MIN_WEIGHTS < 192 * 192


@pytest.fixture(params=WIDTHS.values(), ids=WIDTHS)
def model(request: pytest.FixtureRequest) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(request.param, request.param) for _ in range(3)))


def attached(model: nn.Sequential) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsify_(model, "2:4-T", mode="static", include="*").attach(optimizer)
    return optimizer


def loss_of(model: nn.Sequential) -> torch.Tensor:
    return model(torch.ones(2, model[0].in_features)).square().sum()


def assert_masked(model: nn.Sequential) -> None:
    for layer in model:
        assert not layer.weight.grad[layer.weight == 0].any() and layer.weight.grad.any()


def test_after_one_backward_pass_and_after_several(model: nn.Sequential) -> None:
    attached(model)
    for _ in range(3):
        loss_of(model).backward()
        assert_masked(model)


def test_after_a_pass_that_raised_an_error(model: nn.Sequential) -> None:
    attached(model)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("planned")

    inputs = torch.ones(2, model[0].in_features)
    with pytest.raises(RuntimeError, match="planned"):
        model[2](model[1](Fails.apply(model[0](inputs)))).sum().backward()
    loss_of(model).backward()
    assert_masked(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_activation_checkpoints(model: nn.Sequential, reentrant: bool) -> None:
    attached(model)
    inputs = torch.ones(2, model[0].in_features, requires_grad=True)
    hidden = checkpoint(model[:2], inputs, use_reentrant=reentrant)
    model[2](hidden).square().sum().backward()
    assert_masked(model)


def test_a_backward_pass_inside_of_another(model: nn.Sequential) -> None:
    attached(model)
    seen = []

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, gradient):
            with torch.enable_grad():
                model[0](torch.ones(1, model[0].in_features)).sum().backward()
            seen.append(not model[0].weight.grad[model[0].weight == 0].any())
            return gradient

    model[2](Inner.apply(model[1](torch.ones(2, model[1].in_features)))).square().sum().backward()
    assert seen == [True]
    assert_masked(model)


def test_hooks_of_single_weights_see_masked_gradients(
    model: nn.Sequential,
) -> None:
    optimizers = {layer.weight: torch.optim.SGD([layer.weight], lr=0.1, momentum=0.9) for layer in model}
    sparsify_(model, "2:4-T", mode="static", include="*").attach(*optimizers.values())
    masks = {layer.weight: layer.weight != 0 for layer in model}
    seen = []

    def step(weight: torch.Tensor) -> None:
        seen.append(not weight.grad[~masks[weight]].any())
        optimizers[weight].step()
        weight.grad = None

    for weight in optimizers:
        weight.register_post_accumulate_grad_hook(step)
    for _ in range(2):
        loss_of(model).backward()
    assert seen == [True] * 6
    for weight, optimizer in optimizers.items():
        assert not weight[~masks[weight]].any() and not optimizer.state[weight]["momentum_buffer"][~masks[weight]].any()


def test_clipping_uses_the_norm_of_the_masked_gradients(model: nn.Sequential) -> None:
    attached(model)
    loss_of(model).backward()
    own = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    kept = [layer.weight.grad[layer.weight != 0] for layer in model] + [layer.bias.grad for layer in model]
    assert torch.allclose(own, nn.utils.get_total_norm(kept))


def test_layers_that_are_finalized_get_whole_gradients(model: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity = sparsify_(model, "2:4-T", mode="static", include="*").attach(optimizer)
    sparsity.detach()
    loss_of(model).backward()
    assert any(layer.weight.grad[layer.weight == 0].any() for layer in model)


def test_a_step_of_some_layers_in_the_backward_pass_leaves_the_gradients_of_the_others_masked(model: nn.Sequential) -> None:
    late = torch.optim.SGD(model[1:].parameters(), lr=0.1)
    early = torch.optim.SGD(model[0].parameters(), lr=0.1)
    sparsify_(model, "2:4-T", mode="static", include="*").attach(late, early)
    model[0].weight.register_post_accumulate_grad_hook(lambda _: early.step())
    loss_of(model).backward()
    assert_masked(model)


def of_another_parameter(model: nn.Sequential, look: Callable[[], None]) -> None:
    model[0].bias.register_post_accumulate_grad_hook(lambda _: look())


def of_a_module(model: nn.Sequential, look: Callable[[], None]) -> None:
    model[1].register_full_backward_hook(lambda *_: look())


def of_the_node_that_accumulates(model: nn.Sequential, look: Callable[[], None]) -> None:
    weight = model[2].weight
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: look())
    model.kept_alive = [node]


def of_a_callback(model: nn.Sequential, look: Callable[[], None]) -> None:
    engine = torch.autograd.Variable._execution_engine
    model[2].bias.register_hook(lambda _: engine.queue_callback(look))


@pytest.mark.parametrize("hook", [of_another_parameter, of_a_module, of_the_node_that_accumulates, of_a_callback])
def test_every_kind_of_hook_sees_masked_gradients(
    model: nn.Sequential, hook: Callable[[nn.Sequential, Callable[[], None]], None]
) -> None:
    attached(model)
    pruned = model[2].weight == 0
    seen: list[bool] = []
    hook(model, lambda: seen.append(not model[2].weight.grad[pruned].any()))
    loss_of(model).backward()
    assert seen and all(seen)


def test_gradients_of_a_pass_that_failed_are_masked(model: nn.Sequential) -> None:
    attached(model)

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("planned")

    model[0].bias.register_hook(fail)
    with pytest.raises(RuntimeError, match="planned"):
        loss_of(model).backward()
    reached = [layer.weight for layer in model if layer.weight.grad is not None]
    assert reached and not any(weight.grad[weight == 0].any() for weight in reached)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_gradients_whose_elements_share_memory_train_as_their_copies_do(model: nn.Sequential, mode: str) -> None:
    trained = []
    for one, copied in ((model, False), (copy.deepcopy(model), True)):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        decay = {"decay": FixedDecay(0.01)} if mode == "dynamic" else {}
        sparsify_(one, "2:4-T", mode=mode, include="*", **decay).attach(optimizer)
        loss_of(one)
        for parameter in one.parameters():
            parameter.grad = torch.ones(1).expand_as(parameter)
            if copied:
                parameter.grad = parameter.grad.clone()
        optimizer.step()
        trained.append([parameter.detach().clone() for parameter in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))
