"""Re-estimation and folding of batch norms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from bisparse import prune_, verify
from bisparse.pruning import BiasCorrection, CalibrationError, fold_batch_norms_, reestimate_batch_norms_


class Residual(nn.Module):
    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8, affine=False)
        self.drop = nn.Dropout(0.5)
        self.fc, self.nf = nn.Linear(8, 5), nn.BatchNorm1d(5)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = torch.relu(self.na(y))
        x = x + self.nb(self.b(x))
        if self.shared:
            x = x + y
        return self.nf(self.fc(self.drop(x).mean((2, 3))))


def model(shared: bool = False) -> Residual:
    torch.manual_seed(0)
    one = Residual(shared)
    for module in one.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
    return one.eval()


def test_reestimated_statistics_are_plain_averages_of_the_network_as_it_is() -> None:
    one = model()
    batches = [torch.randn(6, 3, 5, 5) for _ in range(4)]
    names = reestimate_batch_norms_(one, batches)
    assert names == ["na", "nb", "nf"]
    with torch.no_grad():
        first = [one.a(batch) for batch in batches]
    torch.testing.assert_close(one.na.running_mean, torch.stack([y.mean((0, 2, 3)) for y in first]).mean(0))
    torch.testing.assert_close(one.na.running_var, torch.stack([y.transpose(0, 1).flatten(1).var(1) for y in first]).mean(0))
    assert one.na.momentum == 0.1 and not one.training and not one.na.training
    assert int(one.na.num_batches_tracked) == 4


def test_reestimation_does_not_depend_on_dropout() -> None:
    batches = [torch.randn(6, 3, 5, 5) for _ in range(2)]
    one, other = model(), model()
    other.drop.p = 0.0
    reestimate_batch_norms_(one, batches)
    reestimate_batch_norms_(other, batches)
    torch.testing.assert_close(one.nf.running_mean, other.nf.running_mean)


@pytest.mark.parametrize("batches", [[], [torch.randn(6, 3, 5, 5), torch.randn(2, 4)], [torch.full((6, 3, 5, 5), float("nan"))]])
def test_bad_data_leave_the_old_statistics(batches: list[Tensor]) -> None:
    one = model()
    before = copy.deepcopy(one.state_dict())
    with pytest.raises(CalibrationError):
        reestimate_batch_norms_(one, batches)
    assert all(torch.equal(before[key], value) for key, value in one.state_dict().items())
    assert one.na.momentum == 0.1


def test_folding_keeps_the_outputs_depthwise_and_linear_included() -> None:
    one, x = model(), torch.randn(4, 3, 6, 6)
    before = one(x)
    assert sorted(fold_batch_norms_(one, x)) == ["a", "b", "fc"]
    assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) for module in one.modules())
    torch.testing.assert_close(one(x), before, rtol=1e-4, atol=1e-5)
    assert one.a.bias is not None
    assert fold_batch_norms_(one, x) == []


def test_outputs_that_hold_no_tensor_are_refused_and_nothing_is_folded() -> None:
    class Wrapped(nn.Sequential):
        def forward(self, x: Tensor) -> object:
            return type("Result", (), {"value": super().forward(x)})()

    model = Wrapped(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval()
    with pytest.raises(ValueError, match="pass forward="):
        fold_batch_norms_(model, torch.randn(3, 4))
    assert isinstance(model[1], nn.BatchNorm1d)
    assert fold_batch_norms_(model, torch.randn(3, 4), forward=lambda model, x: model(x).value) == ["0"]


def test_a_layer_whose_output_is_used_twice_keeps_its_norm() -> None:
    one, x = model(shared=True), torch.randn(4, 3, 6, 6)
    before = one(x)
    assert sorted(fold_batch_norms_(one, x)) == ["b", "fc"]
    assert isinstance(one.na, nn.BatchNorm2d) and one.a.bias is None
    torch.testing.assert_close(one(x), before, rtol=1e-4, atol=1e-5)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Read(nn.Module):
    """A convolution and its norm, and something else that reads the convolution's output, its weight, or uses the norm."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.how = how
        self.kept: Tensor | None = None
        if how == "a forward pass of its own":
            self.a = Standardised(3, 3, 3, padding=1, bias=False)
        if how == "a weight that is computed":
            nn.utils.parametrizations.weight_norm(self.a)
        if how == "a hook that changes the output":
            self.a.register_forward_hook(lambda module, args, output: output + args[0].mean())
        if how == "a hook that keeps the output":
            self.a.register_forward_hook(lambda module, args, output: setattr(self, "kept", output[:, :1]))
        if how == "a hook of the norm that changes its output":
            self.na.register_forward_hook(lambda module, args, output: output + args[0].mean())
        if how == "a hook of the norm":
            self.na.register_forward_pre_hook(lambda _, args: setattr(self, "kept", args[0].sum()))
        if how == "a tied weight":
            self.tied = nn.Conv2d(3, 3, 3, padding=1, bias=False)
            self.tied.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.a(x)
        z = self.na(y)
        match self.how:
            case "a skip":
                return z + y
            case "a view":
                return z + y.flatten().view_as(y) * 2
            case "the caller":
                return z, y
            case "the caller, in an object":
                return z, SimpleNamespace(y=y[:1])
            case "an attribute":
                self.kept = y
            case "the weight":
                return z + nn.functional.conv2d(x, self.a.weight, padding=1)
            case "a tied weight":
                return z + self.tied(x)
            case "the norm's mean":
                return z + x * self.na.running_var.view(1, -1, 1, 1)
            case "the norm twice":
                return z + self.na(x)
            case "the layer twice":
                return z + self.a(x.flip(0))
            case "a hook of the norm":
                return z if self.kept is None else z + self.kept
        return z


READS = [
    "a skip", "a view", "the caller", "the weight", "a tied weight", "the norm's mean", "the norm twice", "the layer twice",
    "a hook of the norm", "the caller, in an object", "an attribute", "a hook that keeps the output",
    "a hook that changes the output", "a hook of the norm that changes its output", "a forward pass of its own",
    "a weight that is computed",
]  # fmt: skip


@pytest.mark.parametrize("example", [torch.zeros, torch.randn])
@pytest.mark.parametrize("how", READS)
def test_folding_changes_no_function_whatever_the_example_shows(how: str, example: Callable[..., Tensor]) -> None:
    one, x = Read(how), torch.randn(4, 3, 6, 6)
    one.na.running_var.fill_(4)
    one.eval()
    before, kept = one(x), one.kept
    assert fold_batch_norms_(one, example(4, 3, 6, 6)) == []
    after = one(x)
    if how == "the caller, in an object":
        before, after = ((z, other.y) for z, other in (before, after))
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(one.kept, kept)


def test_what_is_folded_in_inference_mode_can_be_trained() -> None:
    one, x = model(), torch.randn(4, 3, 6, 6)
    one.b.requires_grad_(False)
    with torch.inference_mode():
        assert sorted(fold_batch_norms_(one, x)) == ["a", "b", "fc"]
    one(x).sum().backward()
    torch.optim.SGD(one.parameters(), lr=0.1).step()
    assert one.a.bias.requires_grad and not one.b.bias.requires_grad


def test_models_of_inference_mode_and_outputs_that_are_not_finite_are_refused() -> None:
    x = torch.randn(4, 3, 6, 6)
    with torch.inference_mode():
        inference = model()
    with pytest.raises(ValueError, match="created in inference mode"):
        fold_batch_norms_(inference, x)
    with pytest.raises(ValueError, match="not finite"):
        fold_batch_norms_(model(), x * torch.nan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_half_precision_is_no_other_function(dtype: torch.dtype) -> None:
    one, x = model().to(dtype), torch.randn(4, 3, 6, 6, dtype=dtype)
    before = one(x)
    assert sorted(fold_batch_norms_(one, x)) == ["a", "b", "fc"]
    torch.testing.assert_close(one(x), before, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("how", READS[:3])
def test_a_bias_is_not_moved_into_a_norm_that_is_one_of_several_readers(how: str) -> None:
    one = Read(how).eval()
    means = one.na.running_mean.clone()
    prune_(one, "2:4", "adaprune", [torch.rand(4, 3, 6, 6) for _ in range(3)], include=["a"], layouts={"a": "conv"})
    assert torch.equal(one.na.running_mean, means)
    alone = Read("").eval()
    prune_(alone, "2:4", "adaprune", [torch.rand(4, 3, 6, 6) for _ in range(3)], include=["a"], layouts={"a": "conv"})
    assert not torch.equal(alone.na.running_mean, means)


@pytest.mark.parametrize("positions", [8, 5])
@pytest.mark.parametrize("kind", ["linear on positions", "convolution without a batch"])
@pytest.mark.parametrize("method", ["adaprune", "alps", BiasCorrection("wanda")], ids=["adaprune", "alps", "bias"])
def test_a_norm_of_another_axis_than_the_outputs_is_no_bias(positions: int, kind: str, method: object) -> None:
    """The norm after a Linear layer on (B, positions, features) is one of positions, also where there are as many as outputs."""
    torch.manual_seed(0)
    if kind == "linear on positions":
        first, shape, last = nn.Linear(16, 8, bias=False), (8, positions, 16), 8
    else:
        first, shape, last = nn.Conv1d(16, 8, 1, bias=False), (16, positions), positions
    network = nn.Sequential(first, nn.BatchNorm1d(positions), nn.ReLU(), nn.Linear(last, 8))
    norm = network[1]
    nn.init.normal_(norm.running_mean)
    norm.running_var.uniform_(0.5, 2)
    network.eval()
    batches = [torch.randn(shape) for _ in range(6)]
    before = copy.deepcopy(network)
    prune_(network, "1:4", method, batches, include=["0"])  # type: ignore[arg-type]
    assert verify(network[0].weight, "1:4")
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[1].get_buffer(name))
    assert fold_batch_norms_(before, batches[0]) == []
