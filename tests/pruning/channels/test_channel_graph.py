"""Which channels may be permuted: uses that the graph of the layers does not show leave a space as it is.

Where a gate of zero hides the use on every example, a comparison of outputs cannot find it; the gate is opened afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from bisparse.pruning import PermutationReport, permute_

WIDTH = 16


class Gated(nn.Module):
    """Two spaces, a to b and b to c; and behind a gate of zero a second use of their weights or channels."""

    def __init__(self, extra: Callable[[Gated, Tensor, Tensor], Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.c, self.d = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8, bias=False)
        self.norm = nn.LayerNorm(WIDTH) if norm is None else norm
        self.gate, self.pool = nn.Parameter(torch.zeros(1)), nn.MaxPool1d(2)
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.a(x)))
        return self.c(torch.relu(self.b(h))) + self.gate * self.extra(self, x, h)


class Untraceable(Gated):
    """A part of it is traced: a to b, in a Sequential."""

    def __init__(self, extra: Callable[[Gated, Tensor, Tensor], Tensor]) -> None:
        super().__init__(extra)
        self.part = nn.Sequential(self.a, self.norm, nn.ReLU(), self.b, nn.ReLU(), self.c)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.part(x) + self.gate * self.extra(self, x, x)


def randomised(model: nn.Module) -> nn.Module:
    for name, one in [*model.named_parameters(), *model.named_buffers()]:
        if name != "gate" and one.is_floating_point():
            one.data.mul_(0.5 + torch.rand_like(one)).add_(0.2 * torch.rand_like(one))
    return model.eval()


def stays_the_same(model: nn.Module, example: Tensor) -> PermutationReport:
    """Permutes; the model with its gate open then computes what it would have computed."""
    model = randomised(model)
    dense = copy.deepcopy(model)
    report = permute_(model, "2:4", example)
    for one in (model, dense):
        one.gate.data.fill_(1)
    x = torch.randn(32, *example.shape[1:])
    for training in (False, True):
        torch.testing.assert_close(model.train(training)(x), dense.train(training)(x), rtol=1e-4, atol=1e-4)
    return report


def ramp() -> Tensor:
    return torch.linspace(0, 1, WIDTH)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.t()


READS: dict[str, tuple[Callable[[Gated, Tensor, Tensor], Tensor], str]] = {
    "writer": (lambda net, x, h: functional.linear(x, net.a.weight) @ ramp()[:, None], "a.weight"),
    "reader": (lambda net, x, h: functional.linear(ramp(), net.b.weight).sum(), "b.weight"),
    "reader, transposed": (
        lambda net, x, h: functional.linear(x, (net.d.weight + net.c.weight).t()) @ ramp()[:, None],
        "c.weight",
    ),
    "norm": (lambda net, x, h: (net.norm.weight * ramp()).sum(), "norm.weight"),
    "bias": (lambda net, x, h: (net.b.bias * ramp()).sum(), "b.bias"),
    "data": (lambda net, x, h: x @ net.a.weight.data.t() @ ramp()[:, None], "a.weight"),
    "rows": (lambda net, x, h: x @ net.a.weight[3][:, None], "a.weight"),
    "derivatives of its own": (lambda net, x, h: Product.apply(x, net.a.weight) @ ramp()[:, None], "a.weight"),
    "training": (lambda net, x, h: x @ net.a.weight.t() @ ramp()[:, None] if net.training else x.sum(), "a.weight"),
}


@pytest.mark.parametrize("zeros", [False, True], ids=["random", "zeros"])
@pytest.mark.parametrize("kind", [Gated, Untraceable])
@pytest.mark.parametrize("name", READS)
def test_weights_that_other_code_reads_stay_as_they_are(name: str, kind: type[Gated], zeros: bool) -> None:
    extra, weight = READS[name]
    report = stays_the_same(kind(extra), torch.randn(4, 8) * (not zeros))
    assert any(weight in space.reason and "read directly" in space.reason for space in report.spaces), report
    if not zeros:  # the other space is none of its business
        assert any(not space.reason for space in report.spaces) or weight == "b.weight"


def test_statistics_of_a_norm_that_other_code_reads_stay_as_they_are() -> None:
    model = Gated(lambda net, x, h: (torch.sqrt(net.norm.running_var + 1) * ramp()).sum(), nn.BatchNorm1d(WIDTH))
    report = stays_the_same(model, torch.randn(32, 8))
    assert [space.reason for space in report.spaces] == ["norm.running_var is also read directly, not by its layer", ""]


def test_a_view_of_a_weight_is_that_weight() -> None:
    model = Gated(lambda net, x, h: x @ net.view.t() @ ramp()[:, None])
    model.view = model.a.weight.detach()[:]
    randomised(model)
    before = model.a.weight.clone()
    report = permute_(model, "2:4", torch.randn(4, 8))
    assert report.spaces[0].reason == "a.weight is also read directly, not by its layer" and not report.spaces[1].reason
    assert torch.equal(model.a.weight, before)


def test_a_hook_that_reads_the_weight_of_its_layer() -> None:
    model = Gated(lambda net, x, h: x.sum())
    model.a.register_forward_hook(lambda module, args, output: output + model.gate * module.weight.sum(1))
    model.a.register_forward_hook(lambda module, args, output: output + model.gate * ramp() * module.weight.sum())
    report = permute_(randomised(model), "2:4", torch.randn(4, 8))
    assert report.spaces[0].reason == "a.weight is also read directly, not by its layer"


def test_shapes_and_dtypes_may_be_read() -> None:
    model = Gated(lambda net, x, h: x.to(net.a.weight.dtype).to(net.a.weight.device) * net.b.weight.shape[0] * len(net.c.weight))
    assert not any(space.reason for space in stays_the_same(model, torch.randn(4, 8)).spaces)


USES: dict[str, Callable[[Gated, Tensor, Tensor], Tensor]] = {
    "transposed": lambda net, x, h: (h.T * ramp()[:, None]).sum(),
    "by keyword": lambda net, x, h: functional.relu(input=h) @ ramp()[:, None],
    "pooled by keyword": lambda net, x, h: functional.avg_pool1d(input=h, kernel_size=2).sum(1, keepdim=True) * ramp()[1:9],
    "pooled without a batch": lambda net, x, h: net.pool(h) @ ramp()[:8, None],
    "pooled by a function": lambda net, x, h: functional.max_pool1d(h, 2) @ ramp()[:8, None],
    "a norm elsewhere": lambda net, x, h: net.norm(x.repeat(1, 2)) @ ramp()[:, None],
    "a layer elsewhere": lambda net, x, h: net.b(x.repeat(1, 2)[:, None]).sum(1) @ ramp()[:, None],
}


@pytest.mark.parametrize("name", USES)
def test_channels_whose_order_another_operation_needs(name: str) -> None:
    report = stays_the_same(Gated(USES[name]), torch.randn(4, 8))
    assert any(space.reason for space in report.spaces) and not any("outputs" in space.reason for space in report.spaces)


class Pooled(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.pool = nn.Linear(8, WIDTH), nn.Linear(WIDTH // 2, 8), pool

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.pool(self.a(x)))


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool1d(2),
        nn.AvgPool1d(2),
        nn.AdaptiveAvgPool1d(8),
        nn.AdaptiveMaxPool1d(8),
        lambda x: functional.avg_pool1d(x, 2),
        lambda x: functional.max_pool1d(x, 2),
        lambda x: functional.adaptive_avg_pool1d(x, 8),
    ],
)
def test_pooling_without_a_batch_pools_channels(pool: Callable[[Tensor], Tensor]) -> None:
    """The activation has two dimensions: the layer's channels are the ones that are pooled."""
    model, x = Pooled(pool), torch.randn(6, 8)
    state, before = copy.deepcopy(model.state_dict()), model(x)
    permute_(model, "2:4", x)
    permute_(model, "2:4-T", x)
    assert torch.equal(model(x), before) and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_norm_that_is_called_twice_has_one_order() -> None:
    class Twice(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.norm(self.b(torch.relu(self.norm(self.a(x)))))))

    report = stays_the_same(Twice(lambda net, x, h: x), torch.randn(4, 8))
    assert len(report.spaces) == 1 and not report.spaces[0].reason


def test_norms_that_share_their_weight_are_left_alone() -> None:
    class Shared(Gated):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.norm(self.a(x)))
            return self.c(self.gate * self.second(self.b(h)) + self.d(h).sum())

    model = Shared(lambda net, x, h: x)
    model.second = nn.LayerNorm(WIDTH)
    model.second.weight = model.norm.weight
    report = stays_the_same(model, torch.randn(4, 8))
    assert {space.reason for space in report.spaces} == {"a weight is shared between modules"}


def test_a_layer_that_other_parts_call_is_left_alone() -> None:
    model = Untraceable(lambda net, x, h: net.part[0](x) @ ramp()[:, None])
    report = stays_the_same(model, torch.randn(4, 8))
    assert not report.spaces and "not called as in its graph" in report.untraced["part"]


def test_a_branch_that_the_graph_does_not_take() -> None:
    class Optional(Gated):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            h = torch.relu(self.norm(self.a(x)))
            y = self.c(torch.relu(self.b(h)))
            return y + self.gate * self.d(h * ramp()) if scale is None else y

    report = stays_the_same(Optional(lambda net, x, h: x), torch.randn(4, 8))
    assert not report.spaces and "not called as in its graph" in report.untraced["Optional"]


class LowRankLinear(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.zeros(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.t() @ self.up.t()


@pytest.mark.parametrize("make", [lambda: LowRankLinear(WIDTH, WIDTH), lambda: weight_norm(nn.Linear(WIDTH, WIDTH))])
def test_layers_with_other_tensors_than_weight_and_bias_are_left_alone(make: Callable[[], nn.Module]) -> None:
    model = Gated(lambda net, x, h: x)
    model.b = make()
    report = permute_(model, "2:4", torch.randn(4, 8))
    assert all("Linear may mix" in space.reason or "input of the graph" in space.reason for space in report.spaces), report


class Rolling(nn.ReLU):
    """Mixes channels, for numbers that the example does not hold."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 10, x.roll(1, -1), x.relu())


class ScalingActivation(nn.Module):
    """Has a number for each channel, all zero where it is permuted."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.zeros(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() + self.scale


class FlippingLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.abs().sum() > 1000, 1.0, 0.0) * super().forward(x).flip(-1) + super().forward(x)


class CenteringNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x.abs().max() > 100) * torch.arange(WIDTH)


class SmoothActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.7 * x)


@pytest.mark.parametrize("kind", [Rolling, ScalingActivation, FlippingLinear, CenteringNorm])
def test_a_forward_pass_of_its_own_is_not_trusted(kind: type[nn.Module]) -> None:
    first = FlippingLinear(8, WIDTH) if kind is FlippingLinear else nn.Linear(8, WIDTH)
    middle = CenteringNorm(WIDTH) if kind is CenteringNorm else nn.ReLU() if kind is FlippingLinear else kind()
    model = nn.Sequential(first, middle, nn.Linear(WIDTH, 8)).eval()
    dense = copy.deepcopy(model)
    permute_(model, "2:4", torch.randn(8, 8))
    if kind is ScalingActivation:
        for one in (model, dense):
            one[1].scale = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    x = 1000 * torch.randn(8, 8)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-2)


def test_an_activation_that_is_found_to_be_elementwise_is_followed() -> None:
    report = permute_(nn.Sequential(nn.Linear(8, WIDTH), SmoothActivation(), nn.Linear(WIDTH, 8)), "2:4", torch.randn(8, 8))
    assert [space.reason for space in report.spaces] == [""]


def test_constants_of_the_graph_are_not_left_in_the_model() -> None:
    model = Gated(lambda net, x, h: x * torch.linspace(0, 1, 8))
    attributes = set(vars(model))
    stays_the_same(model, torch.randn(4, 8))
    assert set(vars(model)) == attributes
