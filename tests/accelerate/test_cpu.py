"""Models on a CPU whose weights are packed as non-zeros and a bit mask: the dense model's numbers, from whatever pattern."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bisparse import accelerate_, finalize_, load, prune_, save, sparsify_, verify, verify_checkpoint
from bisparse.accelerate import BackendError, PackedLinear, eligibility
from bisparse.accelerate import accelerate as accelerate_module
from bisparse.accelerate.accelerate import held_bytes
from bisparse.accelerate.advisor import advise
from bisparse.accelerate.backends import cpu
from bisparse.accelerate.backends.cpu import BitmaskWeight, CPUTiming, cpu_reason
from bisparse.kernels.packed_cpu import instructions
from bisparse.kernels.packed_cpu.multiply import expands
from bisparse.verification import PatternError

RUNS = cpu_reason(torch.device("cpu")) is None
needs_kernels = pytest.mark.skipif(not RUNS, reason="this processor has neither AVX-512 nor AVX2")
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
"""Of a product, once; sums are float32."""


@pytest.fixture
def wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed products count as twice as fast, and as fast as expanded ones up to 4 tokens, whatever this machine does."""
    monkeypatch.setattr(eligibility, "measured", lambda weight, *_: CPUTiming(2.0, 1.0, 4))


def model_of(pattern: str | None = "4:8-T", dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False), nn.Linear(64, 8))
    if pattern is not None:
        prune_(model, pattern, include=["0", "2"])
    return model.to(dtype).eval()


def assert_product(output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    scale = linear(x.double().abs(), weight.double().abs()) + (0 if bias is None else bias.double().abs())
    assert output.dtype == x.dtype and output.shape == exact.shape
    rounded = 2 * ROUNDING[x.dtype] * exact.abs()  # a torch that adds the bias to a rounded product rounds twice
    assert ((output.double() - exact).abs() <= rounded + (2**-20 + ROUNDING[x.dtype] / 8) * scale).all()


# ---- numbers


@needs_kernels
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("pattern", ["4:8-T", "2:4-T", "50%", "3:4"])
def test_outputs_equal_the_dense_layers(pattern: str, dtype: torch.dtype, wins: None) -> None:
    dense = model_of(pattern, dtype)
    model = copy.deepcopy(dense)
    report = accelerate_(model)
    assert [(one.name, one.backend, one.weight, one.backward) for one in report.layers] == [
        ("0", "cpu", "packed", False),
        ("2", "cpu", "packed", False),
    ]
    for index in (0, 2):
        assert isinstance(model[index].packed_weight, BitmaskWeight)
        for tokens in (1, 4, 16, 64):
            inputs = torch.randn(tokens, dense[index].in_features).to(dtype)
            assert_product(model[index](inputs), inputs, dense[index].weight, dense[index].bias)


@needs_kernels
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (0, 64), (2, 0, 64)])
def test_inputs_of_any_number_of_dimensions_and_their_gradients(shape: tuple[int, ...], wins: None) -> None:
    dense = model_of()
    model = copy.deepcopy(dense)
    accelerate_(model)
    results = []
    for one in (model, dense):
        inputs = torch.linspace(-1, 1, max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()].reshape(shape)
        output = one(inputs.requires_grad_())
        output.square().sum().backward()
        results.append((output, inputs.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)


@needs_kernels
def test_the_first_call_compiles_without_a_graph_break_also_of_copies(wins: None) -> None:
    dense = model_of()
    model = copy.deepcopy(dense)
    accelerate_(model)
    inputs = torch.randn(2, 64)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch._dynamo.reset()
        compiled = torch.compile(one, backend="eager", fullgraph=True)
        with torch.no_grad():
            assert torch.allclose(compiled(inputs), dense(inputs), atol=1e-5)
    torch._dynamo.reset()


@needs_kernels
def test_inference_mode_autocast_and_compile(wins: None) -> None:
    dense = model_of(dtype=torch.float32)
    model = copy.deepcopy(dense)
    accelerate_(model)
    for tokens in (1, 64):
        inputs = torch.randn(tokens, 64)
        with torch.inference_mode():
            assert torch.allclose(model(inputs), dense(inputs), atol=1e-5)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(inputs), dense(inputs), atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            output = model[0](inputs)
        # In the dtype of the packed weight, and rounded once, whichever way the product takes.
        assert output.dtype == torch.bfloat16 and torch.allclose(output.float(), dense[0](inputs), rtol=2**-8, atol=1e-5)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=r"packed in torch\.float32 .* is torch\.bfloat16"):
        model[0](inputs.to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"\(3, 31\) does not fit a layer of 64 inputs"):
        model[0](torch.randn(3, 31))


# ---- state


@needs_kernels
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_state_save_and_finalize_give_the_weights_back(dtype: torch.dtype, wins: None, tmp_path: Path) -> None:
    dense = model_of("4:8-T", dtype)
    expected = dense.state_dict()
    model = copy.deepcopy(dense)
    accelerate_(model)
    state = model.state_dict()
    assert set(state) == set(expected) and all(torch.equal(state[name], value) for name, value in expected.items())
    assert torch.equal(model[0].dense_weight(), dense[0].weight) and torch.equal(model[0].weight, dense[0].weight)
    model_of(None, dtype).load_state_dict(state, strict=True)
    save(model, tmp_path / "saved", "4:8-T", include=["0", "2"])
    assert verify_checkpoint(tmp_path / "saved")
    plain = model_of(None, dtype)
    load(plain, tmp_path / "saved")
    finalize_(model)
    for one in (plain, model):
        assert all(type(layer) is not PackedLinear for layer in one) and list(one.state_dict()) == list(expected)
        assert all(torch.equal(one.state_dict()[name], value) for name, value in expected.items())
    assert model[0].weight.requires_grad


@needs_kernels
def test_loading_copying_pickling_and_moving_keep_the_numbers(wins: None, tmp_path: Path) -> None:
    dense = model_of()
    model = copy.deepcopy(dense)
    accelerate_(model)
    inputs = torch.randn(3, 64)
    torch.save(model, tmp_path / "model.pt")
    for one in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model).share_memory()):
        assert torch.equal(one(inputs), model(inputs)) and torch.equal(one[0].weight, dense[0].weight)
    other = model_of("30%")  # another pattern: nothing is lost by any
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(model[0].weight, other[0].weight) and torch.allclose(model(inputs), other(inputs), atol=1e-5)
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float64):
        model.type(dtype)  # which leaves no dtype out
        other.type(dtype)
        assert model[0].packed_weight.dtype == dtype and torch.equal(model[0].weight, other[0].weight)
        assert torch.allclose(model(inputs.to(dtype)), other(inputs.to(dtype)), atol=0.02)
    state = {name: one.clone() for name, one in model.state_dict().items()}
    model.to("meta")
    model.load_state_dict(state, assign=True)
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())


@needs_kernels
def test_zeros_of_either_sign_and_nan(wins: None) -> None:
    model = model_of()
    with torch.no_grad():
        weight = model[0].weight
        weight.copy_(torch.where(weight == 0, -0.0, weight))
        weight[tuple(weight.nonzero()[0])] = torch.nan
    expected = torch.where(weight == 0, 0.0, weight.detach())
    accelerate_(model)
    assert torch.equal(model[0].weight.view(torch.int32), expected.view(torch.int32))


# ---- report and reasons


@needs_kernels
def test_report_counts_bytes_and_says_what_was_measured(wins: None) -> None:
    model = model_of("2:4", torch.bfloat16)
    before = held_bytes(model)
    report = accelerate_(model)
    dense, packed = 2 * 64 * 96, 64 * 96 * 2 // 2 + 64 * 96 // 8  # half of the values, and one bit per entry
    around = sum(32 * 2 + 8 * (model[index].out_features // 4 + 1) for index in (0, 2))
    assert (report.bytes_before, report.bytes_after) == (before, before - 2 * dense + 2 * packed + around)
    beyond = 4 if expands(torch.bfloat16) else None
    expanded = f"; expanded in bands beyond {beyond} tokens" if beyond else ""
    assert report["0"].note == f"2.00x faster at 1 token, when timed here{expanded}"
    assert "weight" not in dict(model[0].named_parameters())
    expanded = f", expanded beyond {beyond} tokens" if beyond else ""
    assert repr(model[0]).endswith(f"bias=True, packed with a bit mask{expanded})")


@needs_kernels
def test_what_is_left_dense_and_why(monkeypatch: pytest.MonkeyPatch, wins: None) -> None:
    model = model_of()
    report = accelerate_(model)
    assert report["3"].reason == "its weight is dense: prune it first" and type(model[3]) is nn.Linear
    assert accelerate_(model)["0"].reason == "accelerated already"
    with pytest.raises(PatternError, match="3: its weight is dense"):
        accelerate_(model_of(), "cpu", include="3")
    assert "keeps 90.6% of its entries, and at most 80%" in accelerate_(model_of("29:32"))["0"].reason
    with pytest.raises(BackendError, match=r"float64; it stays masked-dense"):
        accelerate_(model_of(dtype=torch.float64), "cpu")
    tied = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    tied[1].weight = tied[0].weight
    prune_(tied, "2:4-T")
    assert "another module shares its weight" in accelerate_(tied.eval())["0"].reason and tied[0].weight is tied[1].weight
    monkeypatch.setattr(eligibility, "measured", lambda weight, *_: CPUTiming(1.0, 2.0, 1))
    slow = model_of()
    report, weight = accelerate_(slow), slow[0].weight
    assert len(report) == 0 and type(slow[0]) is nn.Linear and slow[0].weight is weight
    assert report["0"].reason == "packed it was slower by 2.00x at 1 token, when timed here; it stays masked-dense"
    with pytest.raises(BackendError, match=r"no layer of the model can run sparse \(.*0: packed it was slower"):
        accelerate_(slow, "cpu")
    with pytest.raises(ValueError, match="is for inference: pass training=False"):
        advise(slow, 1, backend="cpu", training=True)


@pytest.mark.parametrize("make", [
    lambda model: model.train(),
    lambda model: sparsify_(model, "4:8-T", include=["0", "2"]),
    lambda model: sparsify_(model.eval(), "4:8-T", include=["0", "2"], mode="static"),
], ids=["own zeros", "dynamic", "static"])  # fmt: skip
def test_weights_that_are_trained_stay_the_optimizers(make: Callable[[nn.Module], object], wins: None) -> None:
    model = model_of()
    make(model)
    parameters = [id(one) for one in model.parameters()]
    report = accelerate_(model)
    assert len(report) == 0 and [id(one) for one in model.parameters()] == parameters
    assert "its weight is trained, and only constant weights are packed on CPUs" in report["0"].reason


@needs_kernels
def test_frozen_weights_of_a_model_in_training_are_packed(wins: None) -> None:
    model = model_of().train().requires_grad_(False)
    assert len(accelerate_(model)) == 2
    finalize_(model)
    assert not model[0].weight.requires_grad


def test_a_processor_without_kernels_leaves_a_working_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "usable_ways", lambda dtype: ())
    model = model_of()
    report = accelerate_(model)
    assert len(report) == 0 and "needs AVX-512 or AVX2" in report["0"].reason and type(model[0]) is nn.Linear
    with pytest.raises(BackendError, match="backend='cpu': cpu needs AVX-512 or AVX2"):
        accelerate_(model, "cpu")


# ---- timing


@needs_kernels
def test_one_timing_serves_layers_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([[2.0, 1.0], [1.0, 1.5], [1.0, 2.0], [1.5, 1.0], [1.0, 2.0]])  # packed wins at 1, 4 and 8 tokens, bands at 16
    times: list[int] = []

    def fastest(*contenders: Callable[[], Tensor]) -> list[float]:
        one, other = (run() for run in contenders)
        assert torch.allclose(one, other, atol=1e-4), "contenders give the same product"
        times.append(one.shape[0])
        return next(seconds)

    monkeypatch.setattr(cpu, "_timings", {})
    monkeypatch.setattr(cpu, "_fastest", fastest)
    weights = [one[0].weight for one in (model_of("50%"), model_of("2:4"))]
    assert [cpu.measured(one) for one in weights] == [CPUTiming(2.0, 1.0, 8, 0.5)] * 2 and times == [1, 4, 8, 16, 512]
    seconds = iter([[1.0, 2.0], [1.0, 3.0]])
    assert cpu.measured(model_of("25%")[0].weight) == CPUTiming(1.0, 2.0, 1), "another density, which loses"
    assert cpu.measured(weights[0].double().float().to(torch.bfloat16)) == CPUTiming(1.0, 3.0, 1), "another dtype"


@needs_kernels
@pytest.mark.parametrize(("expanded", "most"), [(1.04, cpu.TOKENS[-1]), (1.1, cpu.ANY_TOKENS)])
def test_a_weight_that_is_faster_as_stored_with_many_tokens_is_never_expanded(
    expanded: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([[2.0, 1.0], *[[1.0, expanded]] * (len(cpu.TOKENS) + 1), [3.0, 1.0]])
    monkeypatch.setattr(cpu, "_timings", {})
    monkeypatch.setattr(cpu, "_fastest", lambda *_: next(seconds))
    model = model_of()
    report = accelerate_(model, include=["0"])
    assert cpu.measured(model_of()[0].weight) == CPUTiming(2.0, 1.0, most, 3.0) and next(seconds, None) is None
    assert ("expanded" in report.layers[0].note) == ("expanded" in repr(model)) == (most == cpu.TOKENS[-1])


@needs_kernels
def test_a_real_timing_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_timings", {})
    weight, before = model_of()[0].weight, torch.get_rng_state()
    found = cpu.measured(weight)
    assert 0 < found.dense_s < 1 and 0 < found.packed_s < 1 and found.max_tokens in (1, *cpu.TOKENS, cpu.ANY_TOKENS)
    assert torch.equal(torch.get_rng_state(), before)


# ---- all or nothing


@needs_kernels
@pytest.mark.parametrize("step", [
    (PackedLinear, "install_"), (cpu, "pack_bitmask"), (cpu, "unpack_bitmask"), (eligibility, "measured"),
    (accelerate_module, "held_bytes"), (accelerate_module, "AccelerationReport"),
], ids=lambda step: step[1])  # fmt: skip
def test_a_step_that_fails_leaves_the_model_as_it_was(step: tuple[Any, str], wins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = step
    honest, failed = getattr(owner, name), 0
    for failing in range(1, 10):
        model, calls = model_of(), []
        parameters, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())

        def fails(*arguments: Any, failing: int = failing, calls: list[int] = calls, **how: Any) -> Any:
            calls.append(1)
            if len(calls) == failing:
                raise RuntimeError("the step fails")
            return honest(*arguments, **how)

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, staticmethod(fails) if name == "install_" else fails)
            try:
                accelerate_(model, "cpu")
            except RuntimeError as error:
                assert str(error) == "the step fails"
            else:
                break
        failed += 1
        assert {type(one) for one in model} == {nn.Linear, nn.GELU} and "packed_weight" not in vars(model[0])
        assert all(value is parameters[key] for key, value in model.named_parameters())
        assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert 0 < failed < 9


@needs_kernels
def test_what_does_not_come_back_is_not_packed(wins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "unpack_bitmask", lambda packed, *shape: torch.zeros(shape))
    model = model_of()
    report = accelerate_(model)
    assert len(report) == 0 and type(model[0]) is nn.Linear
    assert "0 of shape (96, 64) and torch.float32: unpacking does not return the same values" in report["0"].reason


# ---- int8


@pytest.mark.skipif(cpu.int8_reason(torch.bfloat16) is not None, reason="this processor has no bfloat16 products")
@torch.no_grad()
def test_int8_keeps_masks_and_says_what_rounding_cost(wins: None) -> None:
    model = model_of("4:8-T", torch.bfloat16)
    exact, inputs = copy.deepcopy(model), torch.randn(3, model[0].in_features).bfloat16()
    dense = {name: layer.weight.clone() for name, layer in exact.named_modules() if isinstance(layer, nn.Linear)}
    smaller, report = accelerate_(exact, int8=False), accelerate_(model, int8=True)
    assert report.bytes_after < smaller.bytes_after
    for one in report.layers:
        layer = model.get_submodule(one.name)
        error = float((layer.weight.float() - dense[one.name].float()).norm() / dense[one.name].float().norm())
        stated = float(one.note.rsplit(" ", 1)[1].rstrip("%")) / 100
        # `layer.weight` is rounded once more, to bfloat16; products are not.
        assert "in int8, relative error" in one.note and 0 < stated <= error < 2 * stated < 0.04
        assert verify(layer.weight, "4:8-T") and bool((layer.weight[dense[one.name] == 0] == 0).all())
        assert "in int8" in repr(layer)
    torch.testing.assert_close(model(inputs), exact(inputs), rtol=0.05, atol=0.05)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(inputs), model(inputs), rtol=0.02, atol=0.02)
    assert model.float()[0].packed_weight.dtype == torch.float32  # a dtype that int8 does not have
    finalize_(model)
    assert type(model[0]) is nn.Linear


@needs_kernels
def test_lazy_layers_stay_as_they_are(wins: None) -> None:
    model = nn.Sequential(model_of(), nn.LazyLinear(4)).eval()
    x = torch.randn(3, 64)
    expected = model[0](x)
    report = accelerate_(model)
    assert isinstance(model[1], nn.LazyLinear)
    assert len(report) == (2 if RUNS else 0)
    torch.testing.assert_close(model[0](x), expected)
    assert model(x).shape == (3, 4)


def test_int8_refuses_other_dtypes_and_values(wins: None) -> None:
    report = accelerate_(model_of("4:8-T", torch.float32), int8=True)
    assert not report.layers and "int8" in report["0"].reason
    model = model_of("4:8-T", torch.bfloat16)
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    assert "int8" in accelerate_(model, int8=True)["0"].reason


@needs_kernels
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_weights_are_packed_inside_an_autocast_of_the_caller(dtype: torch.dtype, autocast: torch.dtype, wins: None) -> None:
    dense, inputs = model_of("4:8-T", dtype), torch.randn(3, 64).to(dtype)
    model = copy.deepcopy(dense)
    with torch.autocast("cpu", autocast):
        accelerate_(model)
        model.load_state_dict(dense.state_dict())
        others = {one: copy.deepcopy(model).to(one) for one in ROUNDING}
        saved = model.state_dict()
    assert isinstance(model[0], PackedLinear)
    assert all(torch.equal(saved[name], value) for name, value in dense.state_dict().items())
    for one, other in {dtype: model, **others}.items():
        assert torch.allclose(other(inputs.to(one)).float(), dense(inputs).float(), atol=0.05)
