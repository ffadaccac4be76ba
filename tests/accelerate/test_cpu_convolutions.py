"""Convolutions of kernel size 1 on a CPU with packed weights: the plain convolution's numbers, shapes and memory formats."""

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

from bisparse import accelerate_, finalize_, prune_, save, sparsify_, verify
from bisparse.accelerate import BackendError, eligibility, load_accelerated_
from bisparse.accelerate.backends.cpu import CPUTiming, cpu_reason, measured

pytestmark = pytest.mark.skipif(cpu_reason(torch.device("cpu")) is not None, reason="this processor has neither AVX-512 nor AVX2")
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(autouse=True)
def _wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligibility, "measured", lambda weight, *_: CPUTiming(2.0, 1.0, 4))


def pruned(dimensions: int = 2, **options: object) -> nn.Module:
    torch.manual_seed(0)
    layer = KINDS[dimensions](32, 48, 1, **options)
    prune_(layer, "4:8-T", include="*")
    return layer.eval()


def both(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    packed = nn.Sequential(copy.deepcopy(layer))
    assert [one.name for one in accelerate_(packed, include="0").layers] == ["0"]
    return packed[0], layer


@pytest.mark.parametrize("batch", [(), (1,), (3,), (0,)], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"stride": 2}, {"padding": "same"}, {"dilation": 3}], ids=str)
@pytest.mark.parametrize("dimensions", KINDS)
def test_outputs_are_those_of_the_plain_convolution(dimensions, options, batch):
    packed, plain = both(pruned(dimensions, **options))
    inputs = torch.randn(*batch, 32, *(7, 5, 3)[:dimensions])
    for x in (inputs, inputs.transpose(-1, -2).contiguous().transpose(-1, -2) if dimensions > 1 else inputs):
        expected, found = plain(x), packed(x)
        assert found.shape == expected.shape and found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        found.view(-1)  # as after a pooling layer


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_memory_format_is_that_of_the_plain_convolution(dimensions):
    packed, plain = both(pruned(dimensions))
    x = torch.randn(2, 32, *(6, 5, 4)[:dimensions]).contiguous(memory_format=FORMATS[2 + dimensions])
    found = packed(x)
    assert found.stride() == plain(x).stride()
    torch.testing.assert_close(found, plain(x), rtol=1e-5, atol=1e-5)


def test_gradients_autocast_and_compiled_code():
    packed, plain = both(pruned())
    x = torch.randn(2, 32, 4, 4)
    gradients = []
    for one in (packed, plain):
        own = x.clone().requires_grad_()
        one(own).square().sum().backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed(x).dtype == plain(x).dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(packed, backend="aot_eager")(x), plain(x), rtol=1e-5, atol=1e-5)


def test_the_state_dict_is_the_plain_ones_and_copies_pickles_and_finalize_keep_it(tmp_path: Path):
    model = nn.Sequential(pruned(), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 16, 3)).eval()
    prune_(model, "4:8-T", include="3")
    expected = {name: one.clone() for name, one in model.state_dict().items()}
    report = accelerate_(model, include="0")
    assert [one.name for one in report.layers] == ["0"] and report.bytes_after < report.bytes_before
    assert verify(model, "4:8-T", include=["0", "3"])
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    x = torch.randn(1, 32, 6, 6)
    output = model(x)
    for one in (model, copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert list(one.state_dict()) == list(expected)
        assert all(torch.equal(value, expected[name]) for name, value in one.state_dict().items())
        assert torch.equal(one(x), output)
    save(model, tmp_path / "saved", "4:8-T", include=["0", "3"])
    other = nn.Sequential(nn.Conv2d(32, 48, 1), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 16, 3)).to("meta")
    other[1] = nn.BatchNorm2d(48)
    assert [one.name for one in load_accelerated_(other, tmp_path / "saved", include="0").layers] == ["0"]
    assert torch.equal(other(x), output)
    zeros = {name: torch.zeros_like(value) for name, value in expected.items()}
    model.load_state_dict(zeros)
    assert not model[0].weight.any() and model[0].weight.shape == (48, 32, 1, 1)
    model.load_state_dict(expected)
    with pytest.raises(RuntimeError, match=r"\(48, 32\), expected \(48, 32, 1, 1\)"):
        model.load_state_dict(expected | {"0.weight": expected["0.weight"].flatten(1)})
    finalize_(model)
    assert type(model[0]) is nn.Conv2d and list(model[0]._parameters) == ["weight", "bias"]
    assert torch.equal(model[0].weight, expected["0.weight"])
    torch.testing.assert_close(model(x), output, rtol=1e-5, atol=1e-5)


def test_other_convolutions_are_refused_with_the_reason():
    class Own(nn.Conv2d):
        pass

    layers = {
        "a kernel of 3 x 3": nn.Conv2d(32, 32, 3),
        "a kernel of 3": nn.Conv1d(32, 32, 3),
        "2 groups": nn.Conv2d(32, 32, 1, groups=2),
        "padding": nn.Conv2d(32, 32, 1, padding=1),
        "ConvTranspose2d": nn.ConvTranspose2d(32, 32, 1),
        "Own": Own(32, 32, 1),
    }
    for words, layer in layers.items():
        prune_(model := nn.Sequential(layer.eval()), "2:4", include="0", layouts=None)
        with pytest.raises(BackendError, match=words):
            accelerate_(model, "cpu", include="0")
        assert type(model[0]) is type(layer)
    for mode in ("static", "dynamic"):
        model = nn.Sequential(nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3))
        sparsify_(model, "2:4", mode=mode, include="*")
        small, large = (one.reason for one in accelerate_(model, include="*").left_dense)
        assert "is trained" in small and "finalize_" in small
        assert large.startswith("Conv2d with a kernel of 3 x 3")
    packed, _ = both(pruned())
    for shape in ((1, 31, 4, 4), (32, 4), (1, 1, 32, 4, 4)):
        with pytest.raises(ValueError, match="does not fit a Conv2d of 32 channels"):
            packed(torch.randn(shape))
    with pytest.raises(ValueError, match=r"packed in torch.float32 and the input is torch.float64: convert"):  # in no other shape
        packed(torch.randn(1, 32, 4, 4, dtype=torch.float64))


def test_a_model_without_values_computes_without_reading_elsewhere():
    """to_empty leaves any values, but the positions of the packed ones are no values."""
    packed, plain = both(pruned())
    linear = nn.Linear(32, 48).eval()
    prune_(linear, "2:4")
    model = nn.Sequential(packed, nn.Flatten(2), nn.Sequential(copy.deepcopy(linear)))
    accelerate_(model, include="2.0")
    state = copy.deepcopy(model.state_dict())
    torch.full((1 << 16,), 127, dtype=torch.uint8)  # what freed memory may hold
    model.to_empty(device="cpu")
    assert model[0](torch.randn(1, 32, 4, 8)).shape == (1, 48, 4, 8)
    assert model(torch.randn(1, 32, 4, 8)).shape == (1, 48, 48)
    model.load_state_dict(state)
    x = torch.randn(1, 32, 4, 8)
    torch.testing.assert_close(model(x), linear(plain(x).flatten(2)), rtol=1e-5, atol=1e-5)


def test_timed_as_a_convolution(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(
        eligibility, "measured", lambda weight, tokens, int8: asked.append((weight.ndim, tokens)) or CPUTiming(2, 1, 4)
    )
    for tokens in (1, 196):
        accelerate_(nn.Sequential(pruned()), include="0", tokens=tokens)
    assert asked == [(4, 49), (4, 196)]
    monkeypatch.setattr(eligibility, "measured", lambda *_: CPUTiming(2.0, 1.0, 4, many=0.8))
    (left,) = accelerate_(nn.Sequential(pruned()), include="0").left_dense
    assert "faster at 49 positions, when timed here, and slower by 1.25x at 512" in left.reason
    assert not accelerate_(model := nn.Sequential(nn.Identity(), pruned()), include="1").layers and type(model[1]) is nn.Conv2d
    assert len(accelerate_(model, include="1", tokens=196)) == 1
    for dimensions in KINDS:
        timing = measured(pruned(dimensions).weight, 16)
        assert timing.dense_s > 0 and timing.packed_s > 0
