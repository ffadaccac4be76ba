"""Accelerated models by the reference backend: the numbers of the masked-dense model, from really packed weights."""

import copy
import itertools
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import TensorWeakRef

from bisparse import (
    accelerate_,
    finalize_,
    load,
    prune_,
    save,
    sparsify_,
    verify,
    verify_checkpoint,
)
from bisparse.accelerate import BackendError, PackedLinear, SparseLinear, eligibility, linear_trained, load_accelerated_
from bisparse.accelerate import accelerate as accelerate_module
from bisparse.accelerate.accelerate import held_bytes
from bisparse.accelerate.backends import BACKENDS
from bisparse.accelerate.backends.cpu import CPUTiming
from bisparse.accelerate.eligibility import is_2to4
from bisparse.kernels.sparse24.positions import find_positions, from_metadata, kept_mask, put_values, take_values, to_metadata
from bisparse.pattern import parse_pattern
from bisparse.verification import PatternError

GROUPS = [group for group in itertools.product([False, True], repeat=4) if sum(group) <= 2]


class Block(nn.Module):
    """The MLP of a transformer, residual and normed, with a layer that stays dense."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.head = nn.Linear(width, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs + self.down(nn.functional.gelu(self.up(self.norm(inputs)))))


def block(pattern: str | None = "2:4-T") -> nn.Module:
    torch.manual_seed(0)
    model = Block()
    if pattern is not None:
        prune_(model, pattern)
    return model


def random_mask(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(GROUPS), (rows, -(-columns // 4)), generator=generator)
    return torch.tensor(GROUPS)[chosen].flatten(1)[:, :columns]


def both(model: nn.Module, other: nn.Module, shape: tuple[int, ...] = (2, 3, 32)) -> tuple[list[Tensor], list[Tensor]]:
    """Output, gradient of the input, and gradients of the parameters that both have, of two models on the same batch."""
    results = []
    for one in (model, other):
        torch.manual_seed(1)
        inputs = torch.randn(shape, requires_grad=True)
        output = one(inputs)
        output.mul(torch.randn(output.shape)).sum().backward()
        results.append([output.detach(), inputs.grad])
    return results[0], results[1]


# ---- packing


@pytest.mark.parametrize("columns", [4, 8, 12, 6, 33])
def test_packing_loses_nothing(columns: int) -> None:
    mask = random_mask(17, columns)
    weight = torch.randn(17, columns)
    positions = find_positions(mask)
    dense = torch.where(mask, weight, 0)
    values = take_values(weight, positions)
    assert values.shape == (17, 2 * -(-columns // 4)) and values.is_contiguous()
    assert torch.equal(put_values(values, positions, columns), dense)
    assert torch.equal(kept_mask(positions, columns), mask)
    again = from_metadata(to_metadata(positions), positions.shape[1])
    assert torch.equal(put_values(values, again, columns), dense)


def test_every_group_has_its_two_slots_in_order() -> None:
    mask = torch.tensor(GROUPS)
    positions = find_positions(mask)
    for group, code in zip(GROUPS, positions[:, 0].tolist(), strict=True):
        first, second = code & 3, code >> 2 & 3
        used = [slot for slot, bit in ((first, 16), (second, 32)) if code & bit]
        assert used == [place for place, kept in enumerate(group) if kept]
        assert first < second, "hardware wants them in order, used or not"


def test_a_kept_weight_that_is_zero_now_keeps_its_place() -> None:
    mask = torch.tensor([[True, False, True, False]])
    positions = find_positions(mask)
    assert take_values(torch.tensor([[0.0, 9.0, 5.0, 9.0]]), positions).tolist() == [[0.0, 5.0]]
    assert take_values(torch.tensor([[7.0, 9.0, 5.0, 9.0]]), positions).tolist() == [[7.0, 5.0]]


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
)
def test_values_and_positions_give_the_weight_back(rows: int, groups: int, seed: int, dtype: torch.dtype) -> None:
    mask = random_mask(rows, 4 * groups, seed)
    weight = torch.randn(rows, 4 * groups, generator=torch.Generator().manual_seed(seed)).to(dtype)
    positions = find_positions(mask)
    assert torch.equal(put_values(take_values(weight, positions), positions, 4 * groups), weight * mask)


# ---- the main path


@pytest.mark.parametrize("pattern", ["2:4-T", "2:4", "1:4-T"])
def test_packed_model_equals_the_masked_dense_one(pattern: str) -> None:
    dense = block(pattern).requires_grad_(False)
    model = copy.deepcopy(dense)
    report = accelerate_(model, "reference")
    assert [(one.name, one.weight, one.backward) for one in report.layers] == [
        ("up", "packed", pattern != "2:4"),
        ("down", "packed", pattern != "2:4"),
    ]
    assert [one.name for one in report.left_dense] == ["head"]
    (output, gradient), (expected, expected_gradient) = both(model, dense)
    assert torch.equal(output, expected), "the same product of the same matrix"
    assert torch.allclose(gradient, expected_gradient, atol=1e-6)


def test_zeros_of_either_sign_come_back_as_plain_zeros() -> None:
    dense = block().eval()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for layer in (model.up, model.down):  # what `weight * mask` leaves behind
            layer.weight.copy_(torch.where(layer.weight == 0, -0.0, layer.weight))
    assert bool((model.up.weight == 0).any()) and not torch.equal(model.up.weight.signbit(), dense.up.weight.signbit())
    accelerate_(model, "reference")
    finalize_(model)
    for one, other in zip(model.parameters(), dense.parameters(), strict=True):
        zero = one == 0
        assert torch.equal(one, other) and torch.equal(one[~zero].signbit(), other[~zero].signbit())
        assert not bool(one[zero].signbit().any())


def test_packed_weights_are_stored_in_half_the_space_and_a_bit() -> None:
    model = block().to(torch.bfloat16).eval()
    before = held_bytes(model)
    report = accelerate_(model, "reference")
    weights = 2 * 32 * 128
    assert (report.bytes_before, report.bytes_after) == (before, before - 2 * weights + 2 * weights * 9 // 16)
    for layer in (model.up, model.down):
        own = layer.packed_weight
        assert own.packed.numel() == weights // 4 and own.metadata.numel() * 8 == weights // 2
        assert "weight" not in dict(layer.named_parameters())
    assert sum(one.bytes_before - one.bytes_after for one in report.layers) == report.bytes_before - report.bytes_after


def test_the_product_comes_from_what_is_packed() -> None:
    model = block().eval()
    inputs = torch.randn(4, 32)
    expected = model(inputs)
    accelerate_(model, "reference")
    model.up.packed_weight.packed.zero_()
    model.down.packed_weight.packed.mul_(2)
    assert not torch.allclose(model(inputs), expected)
    assert torch.equal(model.up.weight, torch.zeros(128, 32))


@pytest.mark.parametrize("shape", [(32,), (1, 32), (5, 32), (2, 3, 4, 32), (0, 32), (2, 0, 32)])
def test_inputs_of_any_number_of_dimensions_and_of_no_tokens(shape: tuple[int, ...]) -> None:
    dense = block().requires_grad_(False)
    model = copy.deepcopy(dense)
    accelerate_(model, "reference")
    (output, gradient), (expected, expected_gradient) = both(model, dense, shape)
    assert output.shape == expected.shape and torch.equal(output, expected)
    assert torch.allclose(gradient, expected_gradient, atol=1e-6)


def test_non_contiguous_inputs_and_weights() -> None:
    dense = nn.Linear(32, 16).requires_grad_(False)
    prune_(dense, "2:4-T", include="*")
    dense.weight = nn.Parameter(dense.weight.t().contiguous().t(), requires_grad=False)
    assert not dense.weight.is_contiguous()
    model = copy.deepcopy(dense)
    accelerate_(model, "reference", include="*")
    inputs = torch.randn(32, 7).t()
    assert torch.allclose(model(inputs), dense(inputs), atol=1e-6)
    assert torch.equal(model.dense_weight(), dense.weight)


def test_wrong_input_is_explained() -> None:
    model = block().eval()
    accelerate_(model, "reference")
    with pytest.raises(ValueError, match=r"\(3, 31\) does not fit a layer of 32 inputs"):
        model.up(torch.randn(3, 31))
    with pytest.raises(ValueError, match=r"packed in torch\.float32 .* is torch\.bfloat16.*autocast"):
        model.up(torch.randn(3, 32).to(torch.bfloat16))


# ---- state


def test_state_is_that_of_the_plain_model_and_loads_both_ways() -> None:
    dense = block().eval()
    model = copy.deepcopy(dense)
    accelerate_(model, "reference")
    state = model.state_dict()
    assert set(state) == set(dense.state_dict())
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in state.items())
    block(None).load_state_dict(state, strict=True)
    torch.manual_seed(5)
    other = Block()
    prune_(other, "2:4-T")
    model.load_state_dict(other.state_dict(), strict=True)
    inputs = torch.randn(3, 32)
    assert torch.equal(model(inputs), other(inputs))


def test_a_state_that_is_not_2to4_is_refused_and_changes_nothing() -> None:
    model = block().eval()
    accelerate_(model, "reference")
    held = model.up.dense_weight()
    with pytest.raises(RuntimeError, match=r"up\.weight: .* groups break 2:4; the first: up\.weight: W, row 0"):
        model.load_state_dict(block(None).state_dict())
    assert torch.equal(model.up.dense_weight(), held)
    state = model.state_dict()
    del state["up.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*up\.weight"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"up\.weight: shape \(3, 4\), expected \(128, 32\)"):
        model.load_state_dict(state | {"up.weight": torch.zeros(3, 4)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*up\.packed"):
        model.load_state_dict(model.state_dict() | {"up.packed": torch.zeros(3)})


def test_save_and_finalize_give_the_dense_weights_back_bit_by_bit(tmp_path: Path) -> None:
    dense = block().to(torch.bfloat16).eval()
    model = copy.deepcopy(dense)
    accelerate_(model, "reference")
    save(model, tmp_path / "saved", "2:4-T", exclude="head")
    assert verify_checkpoint(tmp_path / "saved")
    plain = block(None).to(torch.bfloat16)
    load(plain, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"accelerated \(at 'up'\)"):
        load(model, tmp_path / "saved")
    finalize_(model)
    for one in (plain, model):
        assert type(one.up) is nn.Linear and list(one.state_dict()) == list(dense.state_dict())
        for name, value in dense.state_dict().items():
            assert torch.equal(one.state_dict()[name], value), name
    assert model.up.weight.requires_grad
    with pytest.warns(UserWarning, match="plain already, and finalize_ changed nothing"):
        finalize_(model)


def test_deepcopy_dtype_and_pickle_keep_the_numbers(tmp_path: Path) -> None:
    dense = block().eval()
    model = copy.deepcopy(dense)
    accelerate_(model, "reference")
    inputs = torch.randn(3, 32)
    assert torch.equal(copy.deepcopy(model)(inputs), dense(inputs))
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(inputs), dense(inputs))
    model.to(torch.bfloat16)
    dense.to(torch.bfloat16)
    assert model.up.packed_weight.packed.dtype == torch.bfloat16 and torch.equal(model.up.weight, dense.up.weight)
    assert torch.equal(model(inputs.to(torch.bfloat16)), dense(inputs.to(torch.bfloat16)))
    assert verify(model.up.weight, "2:4-T")
    model.type(torch.bfloat16)  # which leaves no dtype out
    assert torch.equal(model(inputs.to(torch.bfloat16)), dense(inputs.to(torch.bfloat16)))


def test_a_packed_layer_that_cannot_be_packed_again_keeps_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    from bisparse.accelerate.linear_packed import PackedWeight

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model = block().eval()
    accelerate_(model, "reference")
    before = model.up.weight
    with monkeypatch.context() as short:
        short.setattr(PackedWeight, "from_dense", full)
        with pytest.raises(torch.OutOfMemoryError):
            model.up.to(torch.bfloat16)
    assert torch.equal(model.up.weight, before) and model.up(torch.randn(3, 32)).dtype == torch.float32
    state = model.state_dict()
    state["up.weight"] = torch.where(before != 0, torch.nan, 0)
    with pytest.raises(RuntimeError, match=r"up\.weight of shape .* does not return the same values"):
        model.load_state_dict(state)
    assert torch.equal(model.up.weight, before)


# ---- machinery around


@pytest.mark.parametrize("trained", [False, True])
def test_compiles_without_graph_breaks(trained: bool) -> None:
    dense = block()
    dense.train(trained)
    model = copy.deepcopy(dense)
    accelerate_(model, "reference")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (output, gradient), (expected, expected_gradient) = both(compiled, dense)
    assert torch.allclose(output, expected, atol=1e-6) and torch.allclose(gradient, expected_gradient, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_equals_autocast_of_the_masked_dense_model(trained: bool) -> None:
    dense = block()
    dense.train(trained)
    model = copy.deepcopy(dense)
    if not trained:
        model.to(torch.bfloat16)
    accelerate_(model, "reference")
    inputs = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = model.up(inputs), dense.up(inputs)
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)


@pytest.mark.parametrize("how", ["packed", "trained", "mvue"])
def test_autocast_leaves_float64_alone_as_it_does_in_linear(how: str) -> None:
    dense = block().double().train(how != "packed")
    model = copy.deepcopy(dense)
    if how == "mvue":
        sparsify_(model, "2:4-T", mvue=True)
    else:
        accelerate_(model, "reference", dtype=torch.float64)
    inputs = torch.randn(4, 32, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = model.up(inputs), dense.up(inputs)
    assert output.dtype == expected.dtype == torch.float64 and torch.allclose(output, expected)


def test_autocast_sees_a_weight_that_was_changed_in_its_context() -> None:
    model = block().train()
    accelerate_(model, "reference")
    inputs = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        before = model.up(inputs)
        with torch.no_grad():
            model.up.weight.mul_(2)
        after = model.up(inputs) - model.up.bias.to(torch.bfloat16)
    assert torch.allclose(after.float(), 2 * (before - model.up.bias.to(torch.bfloat16)).float(), atol=0.05)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    dense = block().train()
    model = copy.deepcopy(dense)
    accelerate_(model, "reference")
    plain = copy.deepcopy(model)
    inputs = torch.randn(4, 32, requires_grad=True)
    checkpoint(model, inputs, use_reentrant=reentrant).square().sum().backward()
    other = inputs.detach().clone().requires_grad_()
    plain(other).square().sum().backward()
    assert torch.equal(inputs.grad, other.grad)
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_gradients_are_derivatives(both_ways: bool, fixed: bool) -> None:
    from bisparse.accelerate.operators import linear_2to4

    layer = nn.Linear(8, 12).double()
    prune_(layer, "2:4-T", include="*")
    mask = layer.weight.detach() != 0
    positions, positions_t = find_positions(mask), find_positions(mask.t())
    inputs = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    transposed = (positions_t, to_metadata(positions_t)) if both_ways else None

    def product(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        masked = weight * mask if fixed else weight  # the straight-through gradient is no derivative off the mask
        return linear_2to4(inputs, masked, bias, positions, to_metadata(positions), transposed, "reference", fixed=fixed)

    if fixed:
        assert torch.autograd.gradcheck(product, (inputs, layer.weight, layer.bias))
    else:
        assert torch.autograd.gradcheck(lambda one, two: product(one, layer.weight.detach(), two), (inputs, layer.bias))
        product(inputs, layer.weight, layer.bias).square().sum().backward()
        outer = (2 * product(inputs, layer.weight, layer.bias)).t() @ inputs
        assert torch.allclose(layer.weight.grad, outer), "of all weights, kept or not"


def test_operators_obey_torch() -> None:
    mask = random_mask(8, 8) & random_mask(8, 8, 1).t()
    weight = (torch.randn(8, 8) * mask).requires_grad_()
    positions, positions_t = find_positions(mask), find_positions(mask.t())
    inputs, bias = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    metadata, metadata_t = to_metadata(positions), to_metadata(positions_t)
    ways = (positions, metadata, positions_t, metadata_t)
    ops = torch.ops.bisparse
    torch.library.opcheck(ops.linear_2to4, (inputs, weight, bias, *ways, "reference", False, False, False))
    torch.library.opcheck(ops.linear_2to4, (inputs, weight, None, *ways[:2], None, None, "reference", False, True, False))
    packed, packed_t = take_values(weight.detach(), positions), take_values(weight.detach().t(), positions_t)
    torch.library.opcheck(ops.packed_linear_2to4, (inputs, packed, metadata, packed_t, metadata_t, bias, 8, "reference", False))
    torch.library.opcheck(ops.packed_linear_2to4, (inputs, packed, metadata, None, None, None, 8, "reference", False))
    torch.library.opcheck(ops.masked_2to4, (weight, positions, False))
    torch.library.opcheck(ops.masked_2to4, (weight, positions, True))
    torch.library.opcheck(ops.unpack_2to4, (packed, metadata, 8, 8, "reference"))
    torch.library.opcheck(
        ops.weight_gradient_2to4,
        (torch.randn(7, 8), torch.randn(7, 8), "reference", False),
        test_utils=("test_schema", "test_faketensor"),
    )


# ---- what is not accelerated, and why


def test_on_a_machine_without_a_gpu_auto_leaves_a_working_model_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligibility, "measured", lambda weight, *_: CPUTiming(1.0, 2.0, 1))
    dense = block().eval()
    model = copy.deepcopy(dense)
    report = accelerate_(model)
    assert len(report) == 0
    assert report["up"].reason.endswith("; it stays masked-dense") and type(model.up) is nn.Linear
    inputs = torch.randn(3, 32)
    assert torch.equal(model(inputs), dense(inputs)) and report.bytes_before == report.bytes_after


@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
def test_asking_for_a_backend_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(BackendError, match=f"{name} needs a CUDA device, and the weights are on cpu. Pass backend='auto'"):
        accelerate_(block(), name)
    with pytest.raises(BackendError, match="'cuda': expected 'auto', 'cusparselt', 'cutlass', 'reference', 'cpu'"):
        accelerate_(block(), "cuda")


def test_a_weight_that_is_not_2to4_is_refused_with_its_place() -> None:
    model = block().eval()
    with torch.no_grad():
        model.down.weight[5, 8:12] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    before = model.down.weight.clone()
    report = accelerate_(model, "reference")
    assert [one.name for one in report.layers] == ["up"]
    assert "row 5, columns 8 to 11 keep 3 (1 of 1024 groups" in report["down"].reason
    assert type(model.down) is nn.Linear and torch.equal(model.down.weight, before)
    with pytest.raises(PatternError, match="down: its weight is not 2:4: row 5, columns 8 to 11"):
        accelerate_(model, "reference", include="down")


def test_a_mask_broken_on_the_transpose_alone_runs_sparse_forward_only() -> None:
    dense = block().train()
    with torch.no_grad():
        dense.down.weight[0:4, 0] = 1.0
        dense.down.weight[0:4, 1:4] = 0.0
    model = copy.deepcopy(dense)
    report = accelerate_(model, "reference")
    assert (report["up"].backward, report["down"].backward) == (True, False)
    assert "not 2:4 on W^T" in report["down"].note
    (output, gradient), (expected, expected_gradient) = both(model, dense)
    assert torch.equal(output, expected) and torch.allclose(gradient, expected_gradient, atol=1e-6)


@pytest.mark.parametrize("pattern", ["4:8-T", "8:16"])
def test_wider_patterns_stay_masked_dense_and_say_so(pattern: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    prune_(model, pattern)
    with pytest.raises(BackendError, match=f"It obeys {pattern}. No tensor core takes it today"):
        accelerate_(model, "reference")
    training = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    sparsify_(training, pattern)
    with pytest.raises(BackendError, match=f"0: {pattern} does not run on sparse tensor cores; it stays masked-dense"):
        accelerate_(training, "reference")
    assert all(one.reason.startswith("its weight is trained") for one in accelerate_(training).left_dense)
    assert training(torch.randn(2, 64)).shape == (2, 64)


def test_patterns_that_are_2to4_are_told_by_their_masks() -> None:
    for text in ("2:4-T", "2:4", "1:4-T", "1:2", "1:3", "2:8-T", "3:4", "2:6", "4:8-T", "2:4-seq", "4:8-paired", "2:4-paired"):
        structure = parse_pattern(text)
        side = 24
        generator = torch.Generator().manual_seed(0)
        broken = False
        for _ in range(40):
            row = torch.zeros(1, side, dtype=torch.bool)
            for place in torch.randperm(side, generator=generator).tolist():  # greedily as full as the structure allows
                row[0, place] = True
                row[0, place] = not bool(structure.row_violations(row).any())
            broken |= not verify(row, "2:4")
        assert is_2to4(structure)[0] == (not broken), text


def test_reasons_by_kind_of_layer() -> None:
    from transformers.pytorch_utils import Conv1D

    class Own(nn.Linear):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)
            self.own = Own(16, 16)
            self.conv1d = Conv1D(16, 16)
            self.first, self.conv = nn.Conv2d(4, 16, 3), nn.Conv2d(16, 16, 3)
            self.attention = nn.MultiheadAttention(16, 2)
            self.embedding, self.lm_head = nn.Embedding(16, 16), nn.Linear(16, 16)
            self.dense, self.empty = nn.Linear(16, 16), nn.Linear(16, 0)

    model = Model().eval()
    prune_(model, "2:4-T", exclude=["dense", "empty"])
    report = accelerate_(model, "reference")
    assert [one.name for one in report.layers] == ["linear"]
    for name, words in {
        "own": "Own: only nn.Linear", "conv1d": "transposed", "conv": "Conv2d: only nn.Linear", "first": "first convolution",
        "attention.in_proj_weight": "MultiheadAttention", "attention.out_proj": "may read the weight themselves",
        "embedding": "looked up", "lm_head": "output head", "dense": "is dense: prune it to 2:4-T first", "empty": "empty weight",
    }.items():  # fmt: skip
        assert words in report[name].reason, name
    again = accelerate_(model)
    assert again["linear"].reason == "accelerated already"


def test_weights_without_values_and_parametrized_by_others() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)))
    for backend in ("auto", "reference"):
        left = dict.fromkeys(model.state_dict())
        with pytest.raises(BackendError) if backend == "reference" else nullcontext():
            report = accelerate_(model, backend)
        assert "parametrized by another library" in report["1"].reason and dict.fromkeys(model.state_dict()) == left
    with torch.device("meta"):
        assert "meta device" in accelerate_(nn.Sequential(nn.Linear(16, 16)))["0"].reason


def test_nan_weights_and_a_library_that_loses_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = block().eval()
    with torch.no_grad():
        kept = model.up.weight.nonzero()[0]
        model.up.weight[tuple(kept)] = float("nan")
    report = accelerate_(model, "reference")
    assert "does not return the same values (NaN among the weights" in report["up"].reason and type(model.up) is nn.Linear
    reference = BACKENDS["reference"]
    monkeypatch.setattr(type(reference), "unpack", lambda self, packed, *rest: packed.new_zeros(rest[1:]))
    with pytest.raises(BackendError, match="does not return the same values"):
        accelerate_(block().eval(), "reference")


def test_out_of_memory_leaves_the_layer_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, matrix: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(type(BACKENDS["reference"]), "pack", full)
    model = block().eval()
    before = model.up.weight.clone()
    with pytest.raises(BackendError, match="out of memory while packing"):
        accelerate_(model, "reference")
    assert type(model.up) is nn.Linear and torch.equal(model.up.weight, before)


# ---- layers that train without sparse training


def test_plain_layers_in_training_mode_train_on_their_zeros() -> None:
    dense = block().train()
    model = copy.deepcopy(dense)
    report = accelerate_(model, "reference")
    assert {one.weight for one in report.layers} == {"trained"} and type(model.up) is SparseLinear
    masks = {name: value != 0 for name, value in dense.named_parameters() if value.ndim == 2}
    ours, theirs = (torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1) for one in (model, dense))
    for _ in range(3):
        (output, _), (expected, _) = both(model, dense)
        assert torch.allclose(output, expected, atol=1e-5)
        with torch.no_grad():
            for name, value in dense.named_parameters():
                if name in ("up.weight", "down.weight"):
                    value.grad *= masks[name]
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    finalize_(model)
    for (name, value), expected in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.allclose(value, expected, atol=1e-5), name
    assert verify(model.up.weight, "2:4-T") and type(model.up) is nn.Linear


def test_a_trained_layer_takes_up_the_zeros_of_a_loaded_state() -> None:
    model = block().train()
    accelerate_(model, "reference")
    torch.manual_seed(9)
    other = Block()
    prune_(other, "2:4-T")
    model.load_state_dict(other.state_dict())
    inputs = torch.randn(3, 32)
    assert torch.equal(model(inputs), other(inputs))
    with pytest.raises(PatternError):
        model.load_state_dict(block(None).state_dict())


def test_frozen_layers_in_training_mode_are_packed_both_ways() -> None:
    model = block().train().requires_grad_(False)
    report = accelerate_(model, "reference")
    assert all(one.weight == "packed" and one.backward for one in report.layers)
    assert isinstance(model.up, PackedLinear) and model.up.packed_weight.packed_t is not None


def test_the_example_trains_finalizes_and_packs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program = Path(__file__).resolve().parents[2] / "examples" / "accelerate_a_model.py"
    monkeypatch.setattr(sys, "argv", [str(program), "20", "32"])
    runpy.run_path(str(program), run_name="__main__")
    printed = capsys.readouterr().out
    assert "training: 4 layers run sparse, 4 of them both ways; 0 stay as they are" in printed
    assert "2:4-T holds on" in printed and "inference: 4 layers run sparse, 0 of them both ways" in printed
    if not torch.cuda.is_available():
        assert "relative difference from masked dense: 0.0e+00" in printed


def test_tied_weights_are_not_parted_by_packing() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    prune_(model, "2:4-T")
    report = accelerate_(model.eval(), "reference")
    assert [layer.name for layer in report.layers] == ["3"]
    assert "another module shares its weight" in report["0"].reason and model[0].weight is model[2].weight
    trained = accelerate_(model.train(), "reference", include="0")
    assert trained["0"].weight == "trained" and model[0].weight is model[2].weight


# ---- second derivatives


class Penalised(nn.Module):
    """A model whose input's gradient is part of the loss."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(16, 32, bias=bias), nn.Linear(32, 16)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs)))


def trained(model: nn.Module) -> list[Tensor]:
    return [one for one in model.parameters() if one.requires_grad]


def penalty_gradients(model: nn.Module, third: bool = False) -> list[Tensor]:
    """Gradients of a loss with a gradient penalty, by the inputs and every parameter; with `third` of one more order."""
    torch.manual_seed(4)
    inputs = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    output = model(inputs)
    (slope,) = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
    loss = slope.square().sum() + output.sum()
    if third:
        (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
        loss = slope.square().sum()
    return list(torch.autograd.grad(loss, [inputs, *trained(model)]))


KINDS = ("dynamic 2:4-T", "dynamic 2:4", "static 2:4-T", "own zeros 2:4-T", "own zeros 2:4", "packed 2:4-T", "packed 2:4")


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("how", [*KINDS, "evaluated 2:4-T"])
def test_a_gradient_penalty_equals_that_of_the_masked_dense_model(how: str, third: bool) -> None:
    dense = Penalised().double()
    kind, _, pattern = how.rpartition(" ")
    if kind in ("dynamic", "static"):
        sparsify_(dense, pattern, mode=kind)
    else:
        prune_(dense, pattern)
        dense.train(kind != "evaluated").requires_grad_(kind == "own zeros")
    model = copy.deepcopy(dense)
    report = accelerate_(model, "reference", dtype=torch.float64)
    assert len(report) == 2 and all(layer.backward == (pattern != "2:4" and kind != "evaluated") for layer in report.layers)
    found, expected = penalty_gradients(model, third), penalty_gradients(dense, third)
    if kind == "own zeros":  # the gradients of pruned weights are not computed
        masks = [one != 0 if one.ndim == 2 else torch.ones_like(one, dtype=torch.bool) for one in trained(dense)]
        expected[1:] = [torch.where(mask, one, 0) for mask, one in zip(masks, expected[1:], strict=True)]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9 * float(theirs.abs().max() + 1))


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_gradient_penalty_with_mvue_is_right_in_expectation(accelerated: bool) -> None:
    dense, model = Penalised().double(), Penalised().double()
    for one in (dense, model):
        sparsify_(one, "2:4-T", mvue=one is model)
    if accelerated:
        assert len(accelerate_(model, "reference", dtype=torch.float64)) == 2

    def curvature(one: nn.Module) -> list[Tensor]:
        """Gradients of the inputs' gradient, and of the weights' gradients along a direction."""
        inputs = torch.linspace(-1, 1, 8 * 16, dtype=torch.float64).view(8, 16).requires_grad_()
        weights = [layer.parametrizations["weight"].original for layer in (one.first, one.second)]
        slope, *gradients = torch.autograd.grad(one(inputs).square().sum(), [inputs, *weights], create_graph=True)
        along = [(gradient * torch.linspace(-1, 1, gradient.numel()).view(gradient.shape)).sum() for gradient in gradients]
        return list(torch.autograd.grad(slope.square().sum() + sum(along), [inputs, *weights]))

    expected = curvature(dense)
    draws = [torch.stack(one) for one in zip(*(curvature(model) for _ in range(150)), strict=True)]
    for found, exact in zip(draws, expected, strict=True):
        error = (found.mean(0) - exact).abs() / (found.std(0) / len(found) ** 0.5 + 1e-9 * exact.abs().max())
        assert float(error.mean()) < 1.2 and float(error.max()) < 6
        assert float((found.mean(0) - exact).norm()) < 0.3 * float(exact.norm())


def test_no_operator_drops_a_gradient_silently() -> None:
    """Each operator that maps floating numbers to such has a formula, or raises; torch itself would warn, and give zeros."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bisparse::")}
    for name in sorted(names):
        schema = getattr(torch.ops.bisparse, name.removeprefix("bisparse::")).default._schema
        if name not in WITHOUT_A_DERIVATIVE and any(str(one.type) == "Tensor" for one in schema.returns):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd"), name


WITHOUT_A_DERIVATIVE = {
    "bisparse::exact_mask", "bisparse::exact_mask_of_magnitudes", "bisparse::exact_solve", "bisparse::exact_solve_integers",
    "bisparse::keep_largest", "bisparse::find_positions", "bisparse::unpack_2to4", "bisparse::unpack_bitmask",
}  # fmt: skip
"""Masks, prices and positions are no floating numbers; what is unpacked is a constant."""


# ---- all or nothing


STEPS = (
    (PackedLinear, "install_"), (SparseLinear, "install_"), (SparseLinear, "_hold"), (nn.Module, "register_buffer"),
    (nn.Module, "register_load_state_dict_post_hook"), (type(BACKENDS["reference"]), "pack"),
    (type(BACKENDS["reference"]), "unpack"), (accelerate_module, "held_bytes"),
    (accelerate_module, "AccelerationReport"), (linear_trained, "_set_class"), (eligibility, "layer_state"),
)  # fmt: skip


# An interrupt is undone in the same way as an error, so it is tried on a model of either class of layers alone.
FAILURES = [
    *((kind, RuntimeError("the library fails")) for kind in ("packed", "own zeros", "dynamic", "static", "mvue")),
    *((kind, KeyboardInterrupt()) for kind in ("packed", "mvue")),
]


@pytest.mark.parametrize(("kind", "error"), FAILURES, ids=[f"{type(error).__name__}-{kind}" for kind, error in FAILURES])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step[1])
def test_each_step_that_fails_leaves_the_model_as_it_was(
    kind: str, step: tuple[Any, str], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32, bias=False), nn.Linear(32, 16))
        if kind in ("dynamic", "static", "mvue"):
            sparsify_(model, "2:4-T", mode="static" if kind == "static" else "dynamic", mvue=kind == "mvue")
        else:
            prune_(model, "2:4-T")
            model.train(kind == "own zeros")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter[parameter == 0] = -0.0
        return model

    owner, name = step
    honest, calls = getattr(owner, name), []
    for failing in range(1, 30):
        model, calls = build(), []
        bound = name == "install_"

        def fails(*arguments: Any, failing: int = failing, calls: list[int] = calls, **how: Any) -> Any:
            calls.append(1)
            if len(calls) == failing:
                raise error
            return honest(*arguments, **how)

        before = [
            (module, type(module), {**vars(module)}, [(key, id(value)) for key, value in vars(module)["_parameters"].items()])
            for module in model.modules()
        ]
        parameters, hooks = dict(model.named_parameters()), [len(one._load_state_dict_post_hooks) for one in model.modules()]
        values = {key: value.clone() for key, value in model.state_dict().items()}
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, staticmethod(fails) if bound else fails)
            try:
                accelerate_(model, "reference")
            except type(error) as raised:
                assert raised is error
            else:
                assert len(calls) < failing
                break
        for module, its_type, attributes, held in before:
            assert type(module) is its_type and vars(module).keys() == attributes.keys()
            assert [(key, id(value)) for key, value in module._parameters.items()] == held
        assert [len(one._load_state_dict_post_hooks) for one in model.modules()] == hooks
        assert all(value is parameters[key] for key, value in model.named_parameters())
        for key, value in model.state_dict().items():
            assert torch.equal(value, values[key]) and torch.equal(value.signbit(), values[key].signbit())
        report = accelerate_(model, "reference")
        assert len(report) == 3, "and it can be accelerated afterwards"
    assert failing < 29, "the last one did not fail"


def test_a_failure_gives_weights_back_that_only_the_model_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model = block().eval()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.up.weight.grad = torch.ones_like(model.up.weight)
    freed = TensorWeakRef(model.down.weight)
    honest = PackedLinear.install_

    def last(module: nn.Linear, *plan: Any, **how: Any) -> str:
        if module is model.head:
            assert freed() is None, "the dense weights of a whole model are not held until its end"
            raise KeyboardInterrupt
        return honest(module, *plan, **how)

    prune_(model, "2:4-T", include="head")
    expected["head.weight"] = model.head.weight.detach().clone()
    monkeypatch.setattr(PackedLinear, "install_", last)
    with pytest.raises(KeyboardInterrupt):
        accelerate_(model, "reference", include=["up", "down", "head"])
    assert {type(layer) for layer in (model.up, model.down, model.head)} == {nn.Linear}
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert bool(model.up.weight.grad.all()) and model.down.weight.requires_grad


@pytest.mark.parametrize("phase", ["packed", "packed on a CPU", "fixed", "in sparse training"])
def test_derivatives_in_forward_mode_are_those_of_the_dense_layers(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligibility, "measured", lambda weight, *_: CPUTiming(2.0, 1.0, 4))
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)).train(not phase.startswith("packed"))
    prune_(dense, "2:4-T", include="*")
    model = copy.deepcopy(dense)
    if phase == "in sparse training":
        sparsify_(model, "2:4-T", include="*")
    accelerate_(model, "auto" if phase == "packed on a CPU" else "reference", dtype=torch.float32)
    inputs, direction = torch.randn(3, 32), torch.randn(3, 32)
    for one in (torch.enable_grad, torch.no_grad):
        with one():
            for found, expected in zip(*(torch.func.jvp(each, (inputs,), (direction,)) for each in (model, dense)), strict=True):
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            with forward_ad.dual_level():
                output = model(forward_ad.make_dual(inputs, direction))
                torch.testing.assert_close(forward_ad.unpack_dual(output).tangent, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("phase", ["packed", "packed on a CPU", "loaded", "fixed", "in sparse training"])
def test_what_is_accelerated_in_inference_mode_serves_outside_of_it(
    phase: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(eligibility, "measured", lambda weight, *_: CPUTiming(2.0, 1.0, 4))
    dense = block().train(phase in ("fixed", "in sparse training"))
    model = copy.deepcopy(dense)
    if phase == "in sparse training":
        sparsify_(model, "2:4-T")
    with torch.inference_mode():
        if phase == "loaded":
            save(dense, tmp_path / "saved", "2:4-T")
            load_accelerated_(model.to("meta"), tmp_path / "saved")
        else:
            accelerate_(model, "auto" if phase == "packed on a CPU" else "reference", dtype=torch.float32)
        model.load_state_dict(model.state_dict())
    results = both(model, dense)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        finalize_(model)
    assert not any(one.is_inference() for one in model.parameters())


@pytest.mark.parametrize("phase", ["packed", "packed on a CPU", "in int8", "fixed", "in sparse training", "mvue"])
@pytest.mark.parametrize("shape", [(32,), (1, 32), (3, 32), (2, 1, 32), (2, 3, 32), (2, 20, 32), (0, 32)])
def test_outputs_can_be_written_to_in_place(phase: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As by ``nn.ReLU(inplace=True)`` and ``output += residual``; autograd refuses that for views that an operator returns."""
    monkeypatch.setattr(eligibility, "measured", lambda weight, *_: CPUTiming(2.0, 1.0, 4))
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 34 if "CPU" in phase else 32)).bfloat16()
    dense.train(phase in ("fixed", "in sparse training", "mvue"))
    prune_(dense, "2:4-T", include="*")
    model = copy.deepcopy(dense)
    if phase in ("in sparse training", "mvue"):
        sparsify_(model, "2:4-T", include="*", mvue=phase == "mvue")
    on_cpu = phase in ("packed on a CPU", "in int8")
    accelerate_(model, "auto" if on_cpu else "reference", int8=phase == "in int8")
    results = []
    for one in (model, dense):
        inputs = torch.linspace(-1, 1, 32).expand(shape).bfloat16().requires_grad_()
        output = one(inputs)
        output += 1
        output.sum().backward()
        results.append((output.detach(), inputs.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("phase", ["dynamic", "mvue"])
def test_outputs_of_layers_in_training_can_be_written_to_in_place(phase: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    sparsify_(model, "2:4-T", include="*", mvue=phase == "mvue")
    for shape in ((32,), (3, 32), (2, 3, 32)):
        output = model(torch.randn(shape))
        output += 1
        output.sum().backward()
