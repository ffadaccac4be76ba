"""Quantised weights keep every zero, come from the stored numbers that the report describes, and a failure changes nothing."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import bisparse
from bisparse.quantization import SCHEMES, quantize_, stored_values


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64))


def data(batches: int = 6) -> list[Tensor]:
    torch.manual_seed(1)
    mix = torch.randn(128, 128) / 12
    return [torch.randn(48, 128) @ mix for _ in range(batches)]


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: one == 0 for name, one in model.state_dict().items() if one.ndim > 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4-g32", "fp4"])
def test_zeros_stay_and_stored_numbers_give_the_weights(scheme: str, method: str, dtype: torch.dtype) -> None:
    model = network()
    bisparse.prune_(model, "2:4")
    model = model.to(dtype)
    before = zeros(model)
    report = quantize_(model, scheme, data=[one.to(dtype) for one in data()], method=method)
    assert len(report) == 3 and bisparse.verify(model, "2:4")
    for layer in report:
        weight = model.state_dict()[layer.parameter]
        assert bool((weight[before[layer.parameter]] == 0).all()), layer.name
        stored = stored_values(weight, layer)
        low, high = SCHEMES[scheme].range
        assert stored.dtype == SCHEMES[scheme].dtype and low <= float(stored.float().min()) <= float(stored.float().max()) <= high
        scale = layer.scale[0].repeat_interleave(weight.shape[1] // layer.scale.shape[-1], 1)
        assert torch.equal(stored.to(dtype) * scale, weight)
        assert layer.density <= layer.density_before == pytest.approx(0.5)


@pytest.mark.parametrize("pattern", ["2:4", "2:4-T", "8:16-T", "2:4-seq"])
@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "fp4"])
def test_pruned_and_rounded_in_one_sweep(scheme: str, pattern: str) -> None:
    model, batches = network(), data()
    report = quantize_(model, scheme, data=batches, method="gptq", pattern=pattern)
    assert len(report) == 3 and bisparse.verify(model, pattern)
    for layer in report:
        assert layer.density_before == 1 and 0.4 < layer.density < 0.51
        stored = stored_values(model.state_dict()[layer.parameter], layer)
        assert torch.equal(stored.float() != 0, model.state_dict()[layer.parameter] != 0)
        assert layer.error is not None and layer.error_rounded is not None and layer.error < layer.error_rounded


def test_the_size_of_weights_does_not_change_what_is_pruned() -> None:
    model, batches = nn.Sequential(nn.Linear(128, 32, bias=False)), data()
    small = copy.deepcopy(model)
    with torch.no_grad():
        small[0].weight.mul_(2.0**-75)
    for one in (model, small):
        quantize_(one, "int4-g64", data=batches, method="gptq", pattern="2:4")
    assert torch.equal(small[0].weight * 2.0**75, model[0].weight)


def test_one_sweep_is_as_good_as_two() -> None:
    """Pruned by SparseGPT and then rounded by GPTQ, errors are fed back twice; in one sweep once, for both together."""
    batches, errors = data(), {}
    for way in ("one", "two"):
        model, target = network(), network()
        if way == "two":
            bisparse.prune_(model, "2:4", bisparse.SparseGPT(), batches, include=["0"])
        quantize_(model, "int4-g32", data=batches, method="gptq", pattern="2:4" if way == "one" else None, include=["0"])
        with torch.no_grad():
            outputs = [(model[0](one) - target[0](one)).square().sum() for one in batches]
        errors[way] = float(sum(outputs))
    assert errors["one"] < 1.02 * errors["two"], errors


def test_convolutions_are_pruned_within_each_kernel_position() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3))
    quantize_(model, "int8", data=[torch.randn(4, 6, 9, 9) for _ in range(4)], method="gptq", pattern="2:4-T", include=["0", "2"])
    assert bisparse.verify(model, "2:4-T", include=["0", "2"])


def test_a_layer_without_data_is_pruned_by_magnitude() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.used, self.idle = nn.Linear(128, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Idle()
    meant = bisparse.solve(model.idle.weight.detach().abs(), "2:4").mask
    report = quantize_(model, "int8", data=data(), method="gptq", pattern="2:4", include=["used", "idle"])
    assert bool((model.idle.weight[~meant] == 0).all()) and "pruned by magnitude" in report["idle"].note


def test_each_channel_uses_its_own_scale() -> None:
    layer = nn.Linear(64, 4, bias=False)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([1e-3, 1.0, 10.0, 0.0])[:, None])
    before = layer.weight.detach().clone()
    report = quantize_(nn.Sequential(layer), "int8")
    step = before.abs().amax(1) / 127
    assert bool(((layer.weight - before).abs() <= step[:, None] * 0.501).all())
    assert report["0"].weight_error == pytest.approx(float((layer.weight.detach() - before).norm() / before.norm()), rel=1e-4)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4-g32", "fp4"])
@pytest.mark.parametrize("size", [1.0, 0.02, 1e-5])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_small_float16_weights_keep_the_levels_of_float32(scheme: str, size: float, method: str) -> None:
    narrow = network().half()
    with torch.no_grad():
        for one in narrow[::2]:
            one.weight.mul_(size)
    wide = copy.deepcopy(narrow).float()
    found = quantize_(narrow, scheme, data=[one.half() for one in data()], method=method)
    expected = quantize_(wide, scheme, data=data(), method=method)
    assert found.weight_error < (1.1 if size > 1e-5 else 1.5) * expected.weight_error
    for layer in found:
        weight = narrow.state_dict()[layer.parameter]
        scale = layer.scale[0].repeat_interleave(weight.shape[1] // layer.scale.shape[-1], 1)
        assert torch.equal(stored_values(weight, layer).half() * scale, weight)
        assert ("fewer levels" in layer.note) == (size == 1e-5)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-40), (torch.float64, 1e-40), (torch.float64, 1e-300)])
def test_weights_too_small_for_any_scale_are_refused(dtype: torch.dtype, size: float) -> None:
    model = nn.Sequential(nn.Linear(64, 8)).to(dtype)
    with torch.no_grad():
        model[0].weight.mul_(size)
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="would become zero"):
        quantize_(model, "int8")
    assert torch.equal(model[0].weight, before)


def test_fp4_rounds_as_the_number_format_does() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    scheme = SCHEMES["fp4"]
    values = torch.cat([torch.arange(-64, 65) / 8, torch.randn(4000) * 3, torch.tensor([0.0, -0.0, 1e-30, 1e9])])
    clamped = values.clamp(-6, 6).numpy()
    meant = torch.from_numpy(clamped.astype(ml_dtypes.float4_e2m1fn).astype("float32"))
    found = scheme.round(values, torch.ones(()))
    assert torch.equal(found, meant) and not bool(torch.signbit(found[found == 0]).any())


def test_fp4_scales_are_float8_multiples_of_one_power_of_two_whatever_the_size_of_weights() -> None:
    for size in (1e-20, 1e-3, 1.0, 3e4):
        model = nn.Sequential(nn.Linear(64, 32, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(32, 64) * size * torch.logspace(-4, 0, 32)[:, None])
            model[0].weight[5] = 0
        before = model[0].weight.detach().clone()
        (layer,) = quantize_(model, "fp4")
        assert layer.unit is not None and math.log2(layer.unit).is_integer()
        steps = layer.scale[0].float() / layer.unit
        assert torch.equal(steps.to(torch.float8_e4m3fn).float(), steps) and bool((steps > 0).all())
        # The largest rows keep the precision of the format: half a step of 2 below the largest number, 6.
        changed = (model[0].weight - before).detach()[-1].view(-1, 16)
        assert bool((changed.abs() <= before[-1].view(-1, 16).abs().amax(1, keepdim=True) / 5).all())
        assert not model[0].weight[5].any()


def test_error_feedback_lowers_the_output_error() -> None:
    rounded, fed = network(), network()
    bisparse.prune_(rounded, "4:8")
    fed.load_state_dict(rounded.state_dict())
    dense = copy.deepcopy(rounded)
    held_out = data(9)[-1]
    for model, method in ((rounded, "rtn"), (fed, "gptq")):
        quantize_(model, "int4-g32", data=data(), method=method)
    error = {
        name: float((model(held_out) - dense(held_out)).detach().norm()) for name, model in (("rtn", rounded), ("gptq", fed))
    }
    assert error["gptq"] < 0.9 * error["rtn"]


@pytest.mark.parametrize("size", [1.0, 2.0**-75])
@pytest.mark.parametrize(("scheme", "dtype"), [("int4-g64", torch.float32), ("int8", torch.bfloat16), ("fp8", torch.bfloat16)])
def test_the_report_states_the_output_error_of_the_layer_as_it_is_stored(scheme: str, dtype: torch.dtype, size: float) -> None:
    model, batches = nn.Sequential(nn.Linear(128, 32, bias=False)).to(dtype), data()
    with torch.no_grad():
        model[0].weight.mul_(size)
    dense = model[0].weight.detach().double()
    report = quantize_(model, scheme, data=batches, method="gptq", forward=lambda one, batch: one(batch.to(dtype)))
    inputs = torch.cat(batches).to(dtype).double()
    error = (inputs @ (model[0].weight.detach().double() - dense).T).norm() / (inputs @ dense.T).norm()
    assert report["0"].error == pytest.approx(float(error), rel=1e-3)
    assert report["0"].error < report["0"].error_rounded


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 16, 3, groups=2)
        self.transposed = nn.ConvTranspose2d(16, 8, 3)
        self.hidden = nn.Linear(8, 32)
        self.last = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(self.transposed(self.conv(self.stem(x))).mean((2, 3))))


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_convolutions_have_a_scale_per_output_channel(scheme: str) -> None:
    model = Layers().eval()
    bisparse.prune_(model, "2:4")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    report = quantize_(model, scheme, data=[torch.randn(2, 3, 9, 9) for _ in range(4)], method="gptq")
    assert {one.name for one in report} >= {"conv", "transposed", "hidden"} and bisparse.verify(model, "2:4")
    for layer in report:
        weight = model.state_dict()[layer.parameter]
        assert bool((weight[before[layer.parameter] == 0] == 0).all())
        stored_values(weight, layer)
    channels = model.conv.weight.flatten(1)
    largest = channels.abs().amax(1)
    if scheme == "int8":
        steps = channels / (largest / 127)[:, None]
        assert float((steps - steps.round()).abs().max()) < 0.3


def test_layers_that_a_group_does_not_divide_are_left_with_the_reason() -> None:
    model = network()
    report = quantize_(model, "int4-g128")
    assert [one.name for one in report] == ["0", "4"]
    assert [(one.name, one.reason) for one in report.left] == [("2", "128 does not divide its 96 inputs, as int4-g128 needs")]


def test_changed_weights_have_no_stored_numbers() -> None:
    model = network()
    report = quantize_(model, "int8")
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-4
    with pytest.raises(ValueError, match="was changed after it was quantised"):
        stored_values(model[0].weight, report["0"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "int3"}, "expected one of 'int8'"),
        ({"scheme": "int8", "method": "awq"}, "expected one of 'rtn', 'gptq'"),
        ({"scheme": "int8", "method": "gptq"}, "pass data"),
        ({"scheme": "int8", "damping": -1}, "damping"),
        ({"scheme": "int8", "include": "nothing"}, "nothing"),
        ({"scheme": "int8", "method": "gptq", "data": []}, "empty"),
        ({"scheme": "int8", "pattern": "2:4"}, "call prune_ first"),
        ({"scheme": "int8", "method": "gptq", "data": [torch.ones(4, 128)], "pattern": "5:4"}, "5:4"),
        ({"scheme": "int8", "method": "gptq", "data": [torch.ones(4, 128)], "pattern": "50%"}, "cannot be combined"),
        ({"scheme": "int4-g32", "method": "gptq", "data": [torch.ones(4, 128)], "pattern": "2:6"}, "cannot be combined"),
    ],
)
def test_wrong_arguments_change_nothing(arguments: dict[str, object], message: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        quantize_(model, **arguments)  # type: ignore[arg-type]
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def interrupt_if(changed: bool) -> None:
    if changed:
        raise KeyboardInterrupt


@pytest.mark.parametrize("failure", ["nan weight", "nan input", "interrupted"])
def test_a_failure_undoes_all_layers(failure: str) -> None:
    model, batches = network(), data()
    if failure == "nan weight":
        with torch.no_grad():
            model[4].weight[3, 3] = float("nan")
    if failure == "nan input":
        batches[2][0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    if failure == "interrupted":
        model[1].register_forward_hook(lambda *_: interrupt_if(not torch.equal(model[0].weight, before["0.weight"])))
    with pytest.raises((ValueError, KeyboardInterrupt)):
        quantize_(model, "int8", data=batches, method="gptq")
    for name, one in model.state_dict().items():
        assert torch.equal(one.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_layers_that_no_batch_reaches_are_rounded_and_say_so() -> None:
    model = network()
    report = quantize_(model, "int8", data=data(), method="gptq", forward=lambda model, batch: model[0](batch))
    assert [bool(one.note) for one in report] == [False, True, True]
    assert "rounded to nearest" in report["2"].note and report["2"].error is None
