"""Sparse training on accelerated layers: step by step what the masked-dense run does."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from bisparse import PatternError, Schedule, accelerate_, finalize_, prune_, save, solve, sparsify_, verify, verify_checkpoint
from bisparse.accelerate import SparseLinear
from bisparse.training import mvue_2_4, plain_state_dict
from bisparse.training.layer import Accelerated


def build() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 8))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, amp: bool = False) -> float:
    generator = torch.Generator().manual_seed(number)
    inputs, labels = torch.randn(16, 16, generator=generator), torch.randint(0, 8, (16,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = nn.functional.cross_entropy(model(inputs).float(), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def train(accelerated: bool, steps: int = 9, amp: bool = False, **how: object) -> tuple[nn.Module, list[float], list[Tensor]]:
    model = build()
    sparsity = sparsify_(model, "2:4-T", refresh=2, **how)
    if accelerated:
        report = accelerate_(model, "reference")
        assert [(one.name, one.weight, one.backward) for one in report.layers] == [(n, "trained", True) for n in "024"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    sparsity.attach(optimizer)
    losses = [step(model, optimizer, number, amp) for number in range(steps)]
    return model, losses, [layer.mask.clone() for layer in sparsity.layers]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"method": "ste"},
        {"method": "sr-ste"},
        {"mode": "static"},
        {"schedule": Schedule(dense_until=3, freeze_at=5, dense_from=7)},
        {"amp": True},
    ],
    ids=str,
)
def test_every_step_equals_that_of_the_masked_dense_run(how: dict[str, object]) -> None:
    model, losses, masks = train(True, **how)
    plain, expected, expected_masks = train(False, **how)
    assert losses == pytest.approx(expected, rel=1e-3 if "amp" in how else 1e-5)
    assert all(torch.equal(one, other) for one, other in zip(masks, expected_masks, strict=True))
    parameters = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, parameters[name], atol=2e-2 if "amp" in how else 1e-5), name
    if "schedule" not in how:
        finalize_(model)
        assert verify(model, "2:4-T") and {type(one) for one in model} == {nn.Linear, nn.GELU}


def test_masks_move_and_the_product_follows() -> None:
    model = build()
    sparsity = sparsify_(model, "2:4-T", refresh=1)
    accelerate_(model, "reference")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsity.attach(optimizer)
    before = model[0].positions.clone()
    for number in range(3):
        step(model, optimizer, number)
        for layer in (model[0], model[2], model[4]):
            dense = layer.parametrizations["weight"].original
            best = solve(dense.detach().abs(), "2:4-T").mask
            inputs = torch.randn(3, layer.in_features)
            expected = nn.functional.linear(inputs, dense * best, layer.bias)
            assert torch.allclose(layer(inputs), expected, atol=1e-6), "with this step's values at this step's mask"
    assert not torch.equal(model[0].positions, before)


@pytest.mark.parametrize("sparse", ["", "2"])
def test_a_layer_that_shares_its_weight_follows_the_mask_whichever_of_them_is_sparse(sparse: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    sparsity = sparsify_(model, "2:4-T", refresh=1, include=sparse or None)
    accelerate_(model, "reference", include="0" if sparse else "2", dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    layer = model[0 if sparse else 2]
    before = layer.positions.clone()
    with torch.no_grad():
        layer.parametrizations["weight"].original.copy_(torch.randn(16, 16))
    inputs = torch.randn(3, 16)
    for _ in range(2):
        model(inputs).sum().backward()
        optimizer.step()
    assert not torch.equal(layer.positions, before)
    assert torch.allclose(layer(inputs), nn.functional.linear(inputs, layer.dense_weight(), layer.bias), atol=1e-6)


def test_a_mask_that_was_transposable_by_chance_is_checked_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    prune_(model, "1:4-T")
    sparsity = sparsify_(model, "2:4", mode="static", masks="nonzero")
    assert accelerate_(model, "reference", dtype=torch.float32)["0"].backward
    with pytest.raises(PatternError, match="break 2:4-T"):
        sparsity.refresh()


def test_metadata_is_made_where_masks_change_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from bisparse.accelerate.linear_trained import SparseProducts

    found = []
    honest = SparseProducts.slots
    monkeypatch.setattr(SparseProducts, "slots", lambda own, mask, *how: found.append(mask.shape) or honest(own, mask, *how))
    model, _, _ = train(True, steps=9)
    assert len(found) == 3 * (1 + 4), "three layers, at the start and at four refreshes of nine steps"
    del model


def test_mvue_estimates_the_weight_gradient_by_a_sparse_product() -> None:
    model = build()
    sparsify_(model, "2:4-T", mvue=True)
    plain = copy.deepcopy(model)
    accelerate_(model, "reference")
    inputs = torch.randn(6, 16)  # 4 does not divide the tokens
    upstream = torch.randn(6, 32)
    for one in (model, plain):
        torch.manual_seed(7)
        one[0](inputs).backward(upstream)
    found, expected = (one[0].parametrizations["weight"].original.grad for one in (model, plain))
    torch.manual_seed(7)
    by_hand = mvue_2_4(nn.functional.pad(upstream, (0, 0, 0, 2)))[:6].t() @ inputs
    assert torch.allclose(found, by_hand, atol=1e-6) and torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, upstream.t() @ inputs, atol=1e-2), "an estimate, not the gradient"
    draws = []
    for _ in range(250):
        model.zero_grad()
        model[0](inputs).backward(upstream)
        draws.append(model[0].parametrizations["weight"].original.grad.clone())
    draws = torch.stack(draws)
    error = (draws.mean(0) - upstream.t() @ inputs).abs() / (draws.std(0) / len(draws) ** 0.5 + 1e-6)
    assert float(error.mean()) < 1.1 and float(error.max()) < 5.5
    finalize_(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_estimate_of_a_gradient_that_is_not_finite_is_not_finite(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    sparsify_(model, "2:4-T", mvue=True)
    accelerate_(model, "reference", dtype=dtype)
    (model[0](torch.randn(8, 16, dtype=dtype)) * torch.inf).sum().backward()
    assert bool(model[0].parametrizations["weight"].original.grad.isnan().all())


def test_state_resumes_on_accelerated_layers() -> None:
    def start() -> tuple[nn.Module, object, torch.optim.Optimizer]:
        model = build()
        sparsity = sparsify_(model, "2:4-T", refresh=2)
        accelerate_(model, "reference")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        return model, sparsity.attach(optimizer), optimizer

    model, sparsity, optimizer = start()
    for number in range(3):
        step(model, optimizer, number)
    state = copy.deepcopy([one.state_dict() for one in (model, sparsity, optimizer)])
    plain = build()
    sparsify_(plain, "2:4-T")
    assert list(plain.state_dict()) == list(state[0]), "no names but those of the masked-dense run"
    expected = [step(model, optimizer, number) for number in range(3, 7)]
    other = start()
    for one, saved in zip(other, state, strict=True):
        one.load_state_dict(saved)
    assert [step(other[0], other[2], number) for number in range(3, 7)] == expected


@pytest.mark.parametrize("model_first", [False, True])
def test_states_are_taken_up_across_a_dense_phase_in_either_order(model_first: bool) -> None:
    model = build()
    sparsity = sparsify_(model, "2:4-T", refresh=1, schedule=Schedule(dense_until=2))
    accelerate_(model, "reference", dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    states = []
    for number in range(4):
        states.append(copy.deepcopy([one.state_dict() for one in (model, sparsity)]))
        step(model, optimizer, number)
    inputs = torch.randn(3, 16)
    for back in (3, 0, 3):
        pairs = list(zip((model, sparsity), states[back], strict=True))
        for one, state in pairs if model_first else pairs[::-1]:
            one.load_state_dict(state)
        assert (model[0].positions is None) == (back == 0)
        expected = nn.functional.linear(inputs, states[back][0]["0.parametrizations.weight.original"] * sparsity.layers[0].mask)
        with torch.no_grad():  # a training forward pass would refresh the masks
            assert torch.allclose(model[0](inputs) - model[0].bias, expected, atol=1e-6)


def test_saved_and_plain_states_are_those_of_the_masked_weights(tmp_path: Path) -> None:
    model, _, _ = train(True, steps=3)
    expected = {name: value.clone() for name, value in plain_state_dict(model).items()}
    save(model, tmp_path / "saved", "2:4-T", exclude="4")
    assert verify_checkpoint(tmp_path / "saved")
    for layer in (model[0], model[2]):
        assert isinstance(layer, SparseLinear) and verify(layer.dense_weight(), "2:4-T")
    finalize_(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_compiled_training_follows_the_masks_without_graph_breaks() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    runs = []
    for compiled in (True, False):
        model = build()
        sparsity = sparsify_(model, "2:4-T", refresh=1)
        accelerate_(model, "reference")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        sparsity.attach(optimizer)
        runner = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        runs.append([step(runner, optimizer, number) for number in range(4)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    counters = torch._dynamo.utils.counters["stats"]
    assert counters["unique_graphs"] == 2, "one graph for a step, and one that refreshes first"
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.down(nn.functional.gelu(self.up(self.norm(inputs))))


@pytest.mark.parametrize("how", ["dense", "sparse", "mvue", "accelerated", "s-ste"])
def test_blocks_that_are_compiled_one_by_one_share_their_code(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(10)])  # torch recompiles 8 times at most
    if how == "s-ste":
        sparsify_(model, "2:4", method="s-ste")
    elif how != "dense":
        sparsify_(model, "2:4-T", mvue=how == "mvue")
    if how == "accelerated":
        assert len(accelerate_(model, "reference")) == 20
    expected = model(torch.ones(4, 32)).detach()
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    inputs = torch.ones(4, 32, requires_grad=True)
    assert torch.allclose(model(inputs), expected, atol=1e-6)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_copies_and_type_checks_do_not_part_the_classes_of_equal_layers() -> None:
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])
    sparsify_(model, "2:4-T")
    for step in range(2):
        copied = copy.deepcopy(model)
        assert not isinstance(copied[0], Accelerated) or step == 1
        if step == 0:
            accelerate_(model, "reference")
        assert len({type(layer) for layer in model}) == 1


def test_what_is_left_masked_dense_in_training_and_why() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    sparsify_(model, "2:4-T", patterns={"1": "4:8-T", "2": "2:4"})
    report = accelerate_(model, "reference")
    assert report["0"].backward and not report["2"].backward and "not 2:4 on W^T" in report["2"].note
    assert report["1"].reason.startswith("4:8-T does not run on sparse tensor cores")
    soft = build()
    sparsify_(soft, "2:4", method="s-ste")
    assert "S-STE changes its mask in every step" in accelerate_(soft)["0"].reason
    assert soft(torch.randn(2, 16)).shape == (2, 8)


def test_layers_accelerated_for_inference_are_refused_with_what_to_do() -> None:
    model = build().to(torch.bfloat16).eval()
    prune_(model, "2:4")
    accelerate_(model, "reference")
    with pytest.raises(ValueError, match=r"0 is accelerated.*finalize_"):
        sparsify_(model, "2:4")
    sparsify_(finalize_(model), "2:4")
