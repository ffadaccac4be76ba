"""Masks that sparse training holds: nothing rewrites them, replaces them or loses their layers without a word."""

import copy
import io
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import bisparse
from bisparse import PatternError, accelerate_, convert_, finalize_, prune_, sparsify_, verify
from bisparse.pruning import fold_batch_norms_, permute_
from bisparse.quantization import quantize_


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())


@pytest.mark.parametrize("held", ["static", "dynamic", "accelerated", "packed"])
@pytest.mark.parametrize(
    "how", ["prune_", "convert_", "with data", "permute_", "fold_batch_norms_", "sparsify_", "quantize_", "load", "load a part"]
)
def test_what_rewrites_weights_refuses_a_model_whose_masks_are_held(held: str, how: str, tmp_path: Path) -> None:
    other = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
    bisparse.save(other, tmp_path / "other", report=prune_(other, "4:8"))
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
    if held in ("static", "dynamic"):
        sparsify_(model, "2:4-T", mode=held)
    else:
        prune_(model, "2:4-T")
        accelerate_(model.train(held == "accelerated"), "reference", dtype=torch.float32)
    before, inputs = numbers(model), torch.randn(8, 16)
    calls = {
        "prune_": lambda: prune_(model, "1:4"),
        "convert_": lambda: convert_(model, "4:8-T"),
        "with data": lambda: prune_(model, "2:4", "sparsegpt", [inputs]),
        "permute_": lambda: permute_(model, "2:4", inputs),
        "fold_batch_norms_": lambda: fold_batch_norms_(model, inputs),
        "sparsify_": lambda: sparsify_(model, "1:4"),
        "quantize_": lambda: quantize_(model, "int8"),
        "load": lambda: bisparse.load(model, tmp_path / "other"),
        "load a part": lambda: bisparse.load(model, tmp_path / "other", strict=False),
    }
    with pytest.raises(ValueError, match=r"finalize_|load into the plain model"):
        calls[how]()
    assert unchanged(model, before)


def test_layers_whose_masks_are_not_held_can_still_be_pruned(mlp: nn.Sequential) -> None:
    sparsity = sparsify_(mlp, "2:4-T", mode="static", include="0")
    assert [layer.name for layer in prune_(mlp, "1:4", include="2")] == ["2"]
    assert len(sparsity.report()) == 1 and verify(mlp[2].weight, "1:4") and verify(mlp[0].weight, "2:4-T")


BROKEN = {
    "all": lambda mask: torch.ones_like(mask),
    "none": lambda mask: torch.zeros_like(mask),
    "another pattern": lambda mask: mask | (torch.arange(mask.shape[1]) % 4 < 3),
    "numbers": lambda mask: mask.float() * 3,
    "NaN": lambda mask: torch.where(mask, float("nan"), 0.0),
}


@pytest.mark.parametrize("broken", list(BROKEN))
@pytest.mark.parametrize("whole", [True, False])
def test_a_state_dict_with_a_mask_of_no_pattern_is_refused_before_anything_is_loaded(
    mlp: nn.Sequential, broken: str, whole: bool
) -> None:
    sparsify_(mlp, "2:4-T")
    state = numbers(copy.deepcopy(mlp))
    state |= {name: torch.randn_like(value) for name, value in state.items() if value.dtype != torch.bool}
    key = "2.parametrizations.weight.0.mask"
    state[key] = BROKEN[broken](state[key])
    before = numbers(mlp)
    if whole:
        with pytest.raises(PatternError, match=r"^2: its mask .*nothing was loaded"):
            mlp.load_state_dict(state)
        assert unchanged(mlp, before)
    else:
        part = {name.removeprefix("2."): value for name, value in state.items() if name.startswith("2.")}
        with pytest.raises(RuntimeError, match=r"its mask"):
            mlp[2].load_state_dict(part)
        assert torch.equal(mlp.state_dict()[key], before[key])


@pytest.mark.parametrize("broken", ["all", "none", "another pattern", "numbers"])
def test_the_state_of_a_static_run_with_a_mask_of_no_pattern_is_refused(mlp: nn.Sequential, broken: str) -> None:
    sparsity = sparsify_(mlp, "2:4-T", mode="static")
    state = copy.deepcopy(sparsity.state_dict()) | {"step": 7}
    state["layers"]["2"]["mask"] = BROKEN[broken](state["layers"]["2"]["mask"])
    before = numbers(mlp)
    with pytest.raises(ValueError, match=r"^2: "):
        sparsity.load_state_dict(state)
    assert unchanged(mlp, before) and sparsity.step == 0
    del state["layers"]["2"]["mask"]
    with pytest.raises(ValueError, match=r"2: .* must have a mask"):
        sparsity.load_state_dict(state)


def test_a_mask_argument_that_keeps_nothing_is_refused(mlp: nn.Sequential) -> None:
    masks = {"0": bisparse.solve(torch.rand(32, 16), "2:4").mask, "2": torch.zeros(8, 32, dtype=torch.bool)}
    with pytest.raises(PatternError, match="2: its mask at 2:4 keeps nothing"):
        sparsify_(mlp, "2:4", mode="static", masks=masks)


def test_all_true_masks_of_a_dense_phase_load(mlp: nn.Sequential) -> None:
    schedule = bisparse.Schedule(dense_from=5)
    state = numbers(mlp.requires_grad_())
    sparsify_(mlp, "2:4-T", schedule=schedule)
    state = {name: torch.ones_like(one) if one.dtype == torch.bool else one for name, one in numbers(mlp).items()}
    mlp.load_state_dict(state)
    assert mlp.state_dict()["0.parametrizations.weight.0.mask"].all()


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("act", ["finalize_", "report", "metrics", "step", "state_dict", "refresh", "attach"])
def test_a_layer_that_was_replaced_is_noticed(mlp: nn.Sequential, mode: str, act: str) -> None:
    if mode == "static" and act == "refresh":
        pytest.skip("a static run has no refresh")
    sparsity = sparsify_(mlp, "2:4-T", mode=mode)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    if act != "attach":
        sparsity.attach(optimizer)
    mlp[2] = nn.Linear(32, 8)
    mlp(torch.randn(4, 16)).square().sum().backward()
    acts = {
        "finalize_": lambda: finalize_(mlp),
        "step": optimizer.step,
        "attach": lambda: sparsity.attach(optimizer),
    }
    with pytest.warns(UserWarning, match=r"2: replaced after sparsify_.*dense"):
        acts.get(act, lambda: getattr(sparsity, act)())()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        if act != "finalize_":
            report = sparsity.report()
            assert [layer.name for layer in report] == ["0"]
            assert "replaced" in next(one.reason for one in report.left_dense if one.name == "2")
            finalize_(mlp)
    assert verify(mlp[0].weight, "2:4-T") and sparsity.ended is not None


def test_a_wrapper_around_a_layer_does_not_replace_it(mlp: nn.Sequential) -> None:
    sparsity = sparsify_(mlp, "2:4-T")
    sparsity.report()
    mlp[0] = nn.Sequential(mlp[0])
    copied, own = copy.deepcopy((mlp, sparsity))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(sparsity.report()) == len(own.report()) == 2
    copied[2] = nn.Linear(32, 8)
    with pytest.warns(UserWarning, match="2: replaced"):
        own.report()
    assert len(sparsity.report()) == 2


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("mode", ["static", "dynamic", "fixed"])
def test_averages_of_accelerated_layers_compute_with_their_own_weights(mlp: nn.Sequential, mode: str, use_buffers: bool) -> None:
    keys = None
    if mode == "fixed":
        prune_(mlp, "2:4-T")
        keys = list(mlp.state_dict())
    else:
        sparsity = sparsify_(mlp, "2:4-T", mode=mode, refresh=1)
    accelerate_(mlp, "reference", dtype=torch.float32)
    assert not list(mlp.buffers())  # integers as buffers take part in other people's averages
    assert keys is None or list(mlp.state_dict()) == keys
    average = AveragedModel(mlp, use_buffers=use_buffers)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.01)
    if mode != "fixed":
        sparsity.attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        mlp(torch.randn(8, 16)).square().sum().backward()
        optimizer.step()
        average.update_parameters(mlp)
    inputs = torch.randn(5, 16)
    output = average(inputs)
    plain = finalize_(copy.deepcopy(average))
    assert torch.allclose(plain(inputs), output, atol=1e-6)
    assert all(verify(layer.weight, "2:4-T") for layer in (plain.module[0], plain.module[2]))


@pytest.mark.parametrize("mode", ["static", "dynamic", "fixed", "packed"])
def test_accelerated_layers_can_be_copied_cast_and_moved_to_the_meta_device_and_back(mlp: nn.Sequential, mode: str) -> None:
    if mode in ("fixed", "packed"):
        prune_(mlp, "2:4-T")
    else:
        sparsify_(mlp, "2:4-T", mode=mode)
    accelerate_(mlp.train(mode != "packed"), "reference", dtype=torch.float32)
    inputs, state = torch.randn(3, 16), numbers(mlp)
    mlp.eval()
    output = mlp(inputs)
    assert torch.allclose(copy.deepcopy(mlp)(inputs), output)
    assert torch.allclose(copy.deepcopy(mlp).double()(inputs.double()).float(), output, atol=1e-5)
    meta = copy.deepcopy(mlp).to("meta")
    assert meta(inputs.to("meta")).shape == output.shape
    if mode in ("fixed", "packed"):
        meta.load_state_dict(state, assign=True)
        assert torch.allclose(meta(inputs), output, atol=1e-6)


def test_pickling_a_model_in_dynamic_training_says_what_to_save(mlp: nn.Sequential) -> None:
    sparsify_(mlp, "2:4-T")
    with pytest.raises(RuntimeError, match=r"state_dict\(\).*finalize_\(copy.deepcopy\(model\)\)"):
        torch.save(mlp, io.BytesIO())
    torch.save(finalize_(copy.deepcopy(mlp)), io.BytesIO())


@pytest.mark.parametrize("training", [True, False])
def test_accelerated_layers_refuse_onnx(mlp: nn.Sequential, training: bool) -> None:
    pytest.importorskip("onnx")
    prune_(mlp, "2:4-T")
    accelerate_(mlp.train(training), "reference", dtype=torch.float32)
    mlp.eval()
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"finalize_\(copy.deepcopy\(model\)\)"):
        warnings.simplefilter("ignore")
        torch.onnx.export(mlp, (torch.randn(2, 16),), io.BytesIO(), dynamo=False)


@pytest.mark.parametrize("stage", ["pruned", "finalized", "static", "dynamic"])
def test_an_onnx_export_computes_what_the_model_does(mlp: nn.Sequential, stage: str) -> None:
    onnx, reference = pytest.importorskip("onnx"), pytest.importorskip("onnx.reference")
    if stage == "pruned":
        prune_(mlp, "2:4-T")
    else:
        sparsify_(mlp, "2:4-T", mode="static" if stage == "static" else "dynamic")
        if stage == "finalized":
            finalize_(mlp)
    mlp.eval()
    inputs, file = torch.randn(4, 16), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(mlp, (inputs,), file, dynamo=False, input_names=["x"])
    graph = onnx.load_model_from_string(file.getvalue())
    onnx.checker.check_model(graph)
    (output,) = reference.ReferenceEvaluator(graph).run(None, {"x": inputs.numpy()})
    assert torch.allclose(torch.from_numpy(output), mlp(inputs), atol=1e-6)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * 0.5, self.bias)


def test_a_layout_makes_a_layer_that_scales_its_weight_sparse() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Scaled(16, 16))
    sparsity = sparsify_(model, "2:4-T", layouts={"1": "linear"})
    assert [layer.name for layer in sparsity.layers] == ["0", "1"]
    with pytest.raises(ValueError, match="not a layout"):
        sparsify_(nn.Sequential(nn.Linear(16, 16)), "2:4", layouts={"0": "sideways"})
