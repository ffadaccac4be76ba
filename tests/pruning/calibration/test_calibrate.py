"""The walker: what it measures, in which order, and what it does with data it cannot use. Oracles are plain forward passes."""

from __future__ import annotations

import copy
import warnings
from collections import UserDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bisparse.layers import find_layers
from bisparse.pruning import AdaPrune, CalibrationError, GradientAdaPrune, Statistic, Wanda, prune_
from bisparse.pruning.calibration.block_chain import find_chains
from bisparse.pruning.calibration.calibrate import Walk, calibrate
from bisparse.pruning.calibration.execution_order import discover
from bisparse.pruning.calibration.moments import Moments
from bisparse.pruning.calibration.options import Options
from bisparse.pruning.reduction import positions, to_rows
from bisparse.quantization import quantize_
from bisparse.tiles import to_matrices

ALL = frozenset({Statistic.NORM, Statistic.MEAN, Statistic.GRAM})

CONVOLUTIONS = {
    "plain": (nn.Conv2d(6, 8, 3, padding=1), (6, 9, 7)),
    "strided": (nn.Conv2d(6, 8, 3, stride=(2, 1), padding=(1, 0)), (6, 9, 7)),
    "dilated": (nn.Conv2d(6, 8, 3, dilation=(2, 1), padding=2), (6, 9, 7)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2, padding=1), (6, 9, 7)),
    "same": (nn.Conv2d(6, 8, (3, 2), padding="same"), (6, 9, 7)),
    "circular": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (6, 9, 7)),
    "reflect": (nn.Conv2d(6, 8, 3, padding=(2, 1), padding_mode="reflect"), (6, 9, 7)),
    "one dimension": (nn.Conv1d(6, 8, 5, stride=2, padding=3), (6, 11)),
    "three dimensions": (nn.Conv3d(4, 8, (1, 2, 3), groups=2, padding=(0, 1, 1), stride=(1, 2, 1)), (4, 3, 5, 6)),
}


def walked(model: nn.Module, batches, needs=ALL, include=None, walk=None, **options):
    layers, _ = find_layers(model, include)
    stages = calibrate(model, layers, batches, frozenset(needs), Options(progress=False, **options), walk=walk)
    return {layer.name: one for stage in stages for layer, one in zip(stage.layers, stage.statistics, strict=True)}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_moments_of_a_convolution_give_the_energy_of_its_outputs(name: str) -> None:
    conv, shape = CONVOLUTIONS[name]
    inputs = torch.randn(5, *shape)
    statistics = walked(nn.Sequential(conv), [(inputs,)], include="0")["0"]
    outputs = conv._conv_forward(inputs, conv.weight, None).detach()
    columns = outputs.transpose(0, 1).flatten(1)
    layer = find_layers(nn.Sequential(conv), include="0")[0][0]
    rows = to_rows(to_matrices(conv.weight.detach(), layer.layout), positions(layer.layout, conv.weight.shape))
    assert statistics.columns == columns.shape[1]
    energy = ((rows @ statistics.gram) * rows).sum(2).flatten()
    torch.testing.assert_close(energy, columns.square().mean(1), rtol=1e-4, atol=1e-5)
    mean = (rows @ statistics.mean[:, :, None]).flatten()
    torch.testing.assert_close(mean, columns.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.norm.square(), statistics.gram.diagonal(dim1=1, dim2=2), rtol=1e-4, atol=1e-6)


def test_packed_attention_and_the_projection_that_it_never_calls() -> None:
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(3, 7, 16)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    model = Model()
    found = walked(model, [x])
    torch.testing.assert_close(found["attention.in_proj_weight"].gram[0], (x.reshape(-1, 16).T @ x.reshape(-1, 16)) / 21)
    with torch.no_grad():
        outputs = model(x).reshape(-1, 16) - attention.out_proj.bias
        w = attention.out_proj.weight
        energy = ((w @ found["attention.out_proj"].gram[0]) * w).sum(1)
    torch.testing.assert_close(energy, outputs.square().mean(0), rtol=1e-4, atol=1e-6)


def test_cross_attention_measures_query_key_and_value_apart() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    q, kv = torch.randn(2, 5, 8), 3 * torch.randn(2, 5, 8)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, q: Tensor, kv: Tensor) -> Tensor:
            return self.attention(q, kv, kv)[0]

    gram = walked(Model(), [(q, kv)])["attention.in_proj_weight"].gram
    for part, x in enumerate((q, kv, kv)):
        torch.testing.assert_close(gram[part], x.reshape(-1, 8).T @ x.reshape(-1, 8) / 10)


def test_transformer_encoder_layers_are_observed_although_torch_has_a_fused_path() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    found = walked(model, [torch.randn(4, 6, 16) for _ in range(5)])
    assert len(found) == 8
    assert all(one.columns == 120 for one in found.values())
    assert torch.backends.mha.get_fastpath_enabled()


def test_hidden_positions_are_not_counted() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.linear(x)

    x = torch.randn(2, 3, 8)
    keep = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = walked(Model(), [{"x": x, "attention_mask": keep}])["linear"]
    assert found.columns == 3
    torch.testing.assert_close(found.gram[0], x[keep.bool()].T @ x[keep.bool()] / 3)


SINGLE = {
    "vector": (nn.Linear(16, 16), (16,)),
    "picture": (nn.Conv2d(16, 8, 3), (16, 6, 5)),
    "line": (nn.Conv1d(16, 8, 3), (16, 7)),
}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("method", [AdaPrune(), GradientAdaPrune(steps=20)], ids=repr)
@pytest.mark.parametrize("count", [3, 6])
def test_samples_without_a_batch_dimension_are_batches_of_one(name: str, method, count: int) -> None:
    layer, shape = SINGLE[name]
    samples = [torch.randn(shape) for _ in range(count)]
    one, many = (nn.Sequential(copy.deepcopy(layer)) for _ in range(2))
    found = prune_(one, "2:4", method, samples, include="0")
    expected = prune_(many, "2:4", method, [sample[None] for sample in samples], include="0")
    assert found["0"].error == expected["0"].error
    assert torch.equal(one[0].weight, many[0].weight)


@pytest.mark.parametrize("order", ["parallel", "sequential"])
@pytest.mark.parametrize(
    "made", [lambda x: x, lambda x: {"x": x}, lambda x: UserDict({"x": x})], ids=["tensor", "dict", "UserDict"]
)
def test_a_model_that_works_on_its_inputs_in_place_sees_the_same_data_in_each_pass(order: str, made) -> None:
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x.sub_(3.0))))

    x = [torch.randn(4, 8) for _ in range(5)]
    batches = [made(one.clone()) for one in x]
    found = walked(Normalising(), batches, include=["a", "b"], order=order)
    rows = torch.cat(x) - 3
    torch.testing.assert_close(found["a"].gram[0], rows.T @ rows / 20, rtol=1e-4, atol=1e-5)
    assert all(
        torch.equal(one, batch if isinstance(batch, Tensor) else batch["x"]) for one, batch in zip(x, batches, strict=True)
    )


@pytest.mark.parametrize("compiled", ["all", "block"])
def test_compiled_modules_are_calibrated_like_plain_ones(compiled: str) -> None:
    plain = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), nn.Linear(16, 16))
    model, batches = copy.deepcopy(plain.eval()), [torch.randn(20, 16) for _ in range(5)]
    (model if compiled == "all" else model[1]).compile(backend="eager")
    with torch.no_grad():
        model(batches[0])  # compiled code has the hooks of its first run: none
    expected, found = (prune_(one, "2:4", AdaPrune(), batches) for one in (plain, model))
    assert [layer.error for layer in found] == [layer.error for layer in expected]
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))
    torch.testing.assert_close(model(batches[0]), plain(batches[0]))
    wrapped = torch.compile(copy.deepcopy(plain), backend="eager")
    with torch.no_grad():
        wrapped(batches[0])
    assert len(prune_(wrapped, "1:4", Wanda(), batches)) == 4


class Recurrent(nn.Module):
    """A layer that a flag calls twice, and blocks of which a flag skips one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, *, short: bool = False, twice: bool = False) -> Tensor:
        x = torch.relu(self.first(x))
        if twice:
            x = torch.relu(self.first(x))
        for number, block in enumerate(self.blocks):
            if not (short and number == 1):
                x = torch.relu(block(x))
        return x


@pytest.mark.parametrize("order", ["parallel", "sequential"])
@pytest.mark.parametrize("flags", [{"short": True}, {"twice": True}, {"short": True, "twice": True}])
def test_batches_may_take_other_paths_than_the_first(order: str, flags: dict[str, bool]) -> None:
    model = Recurrent().eval()
    batches = [{"x": torch.randn(5, 8), **(flags if number % 2 else {})} for number in range(6)]
    found = walked(model, batches, include=["first", "blocks.*"], order=order)
    for name, one in found.items():
        inputs: list[Tensor] = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        handle.remove()
        x = torch.cat(inputs)
        assert one.columns == len(x)
        torch.testing.assert_close(one.gram[0], x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_layers_that_share_their_input_in_some_batches_only_have_statistics_of_their_own() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.a(x) + self.b(x if y is None else y)

    x = [torch.randn(4, 8) for _ in range(4)]
    found = walked(Either(), [{"x": x[0]}, {"x": x[1], "y": x[2]}, {"x": x[3]}], include=["a", "b"])
    for name, rows in (("a", torch.cat([x[0], x[1], x[3]])), ("b", torch.cat([x[0], x[2], x[3]]))):
        torch.testing.assert_close(found[name].gram[0], rows.T @ rows / 12, rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gate = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, None]:
        return x + self.b(torch.relu_(self.a(x)) * self.gate(x)) + shift, None


class Chained(nn.Module):
    def __init__(self, width: int = 8, depth: int = 3, leaking: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.last = nn.Linear(width, width)
        self.leaking = leaking

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.ones(()) * 0.1
        x = self.first(x)
        for block in self.blocks:
            if self.leaking:
                shift = x.mean()
            x, _ = block(x, shift=shift)
        return self.last(x)


def sequential_oracle(model: nn.Module, batches: list[Tensor], name: str) -> Tensor:
    """Second moments at one layer by a plain forward pass through the model as it is now."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    x = torch.cat([one.reshape(-1, one.shape[-1]) for one in seen])
    return x.T @ x / x.shape[0]


@pytest.mark.parametrize("leaking", [False, True], ids=["chain", "no chain"])
def test_sequential_statistics_are_those_of_the_network_as_changed_so_far(leaking: bool) -> None:
    torch.manual_seed(1)
    model = Chained(leaking=leaking)
    batches = [torch.randn(4, 8) for _ in range(6)]
    layers, _ = find_layers(model)
    calls = {layer.name: 1 for layer in layers}
    assert bool(find_chains(model, layers, calls, batches[:1], None)) is not leaking
    order = []
    for stage in calibrate(model, layers, batches, ALL | {Statistic.CROSS}, Options(progress=False)):
        for layer, statistics in zip(stage.layers, stage.statistics, strict=True):
            torch.testing.assert_close(statistics.gram[0], sequential_oracle(model, batches, layer.name), rtol=1e-4, atol=1e-5)
        for layer in stage.layers:
            order.append(layer.name)
            with torch.no_grad():
                layer.weight.mul_((torch.rand_like(layer.weight) < 0.7).float())
    assert order == ["first"] + [f"blocks.{i}.{x}" for i in range(3) for x in ("a", "gate", "b")] + ["last"]


@pytest.mark.parametrize("leaking", [False, True], ids=["chain", "no chain"])
def test_cross_moments_relate_the_dense_networks_inputs_to_the_present_ones(leaking: bool) -> None:
    torch.manual_seed(2)
    model = Chained(leaking=leaking)
    dense = copy.deepcopy(model)
    batches = [torch.randn(4, 8) for _ in range(6)]
    layers, _ = find_layers(model)

    def inputs(network: nn.Module, name: str) -> Tensor:
        seen: list[Tensor] = []
        handle = network.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        with torch.no_grad():
            for batch in batches:
                network(batch)
        handle.remove()
        return torch.cat(seen)

    checked = 0
    for stage in calibrate(model, layers, batches, ALL | {Statistic.CROSS}, Options(progress=False)):
        for layer, statistics in zip(stage.layers, stage.statistics, strict=True):
            z, x = inputs(dense, layer.name), inputs(model, layer.name)
            if statistics.cross is None:
                torch.testing.assert_close(z, x)
            else:
                checked += 1
                torch.testing.assert_close(statistics.cross[0], z.T @ x / len(x), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(statistics.dense_gram[0], z.T @ z / len(x), rtol=1e-4, atol=1e-5)
        for layer in stage.layers:
            with torch.no_grad():
                layer.weight.mul_((torch.rand_like(layer.weight) < 0.7).float())
    assert checked >= 9


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["stage by stage", "one pass"])
def test_parallel_statistics_are_those_of_the_dense_network(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bisparse.pruning.calibration.calibrate.WHOLE_BYTES", limit)
    model, walk = Chained(), Walk()
    batches = [torch.randn(4, 8) for _ in range(6)]
    layers, _ = find_layers(model)
    found = 0
    for stage in calibrate(model, layers, batches, ALL, Options(order="parallel", progress=False), walk=walk):
        for layer, statistics in zip(stage.layers, stage.statistics, strict=True):
            found += 1
            torch.testing.assert_close(statistics.gram[0], sequential_oracle(model, batches, layer.name), rtol=1e-4, atol=1e-5)
    assert found == len(layers)
    one_stage = 2 * 4 * (16 * 16 + 2 * 16)
    assert (walk.statistics_bytes <= one_stage) is (limit == 0), "what does not fit is collected stage by stage"


def test_raw_inputs_are_held_for_one_stage_only() -> None:
    model, walk = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))), Walk()
    batches = [torch.randn(4, 8) for _ in range(5)]
    for order in ("parallel", "sequential"):
        for _ in calibrate(model, find_layers(model)[0], batches, frozenset({Statistic.INPUTS}), Options(order=order), walk=walk):
            pass
    assert walk.statistics_bytes == 5 * 4 * 8 * 4


def test_every_fifth_batch_is_held_out_and_merging_gives_all_of_them() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    batches = [torch.randn(4, 8) for _ in range(10)]
    found = walked(model, batches, ALL | {Statistic.HELD_OUT})["0"]
    x, held = torch.cat([b for i, b in enumerate(batches) if i % 5 != 4]), torch.cat([batches[4], batches[9]])
    torch.testing.assert_close(found.gram[0], x.T @ x / 32)
    torch.testing.assert_close(found.held_out.gram[0], held.T @ held / 8)
    every = torch.cat(batches)
    torch.testing.assert_close(found.merged().gram[0], every.T @ every / 40)
    torch.testing.assert_close(found.merged().norm[0], (every.square().mean(0)).sqrt())
    assert found.merged().columns == 40
    few = walked(model, [torch.randn(10, 8)], ALL | {Statistic.HELD_OUT})["0"]
    assert (few.columns, few.held_out.columns) == (8, 2)


def test_statistics_are_float32_under_autocast_and_in_half_precision() -> None:
    model = nn.Sequential(nn.Linear(64, 8)).bfloat16()
    x = (torch.randn(512, 64) + 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        gram = walked(model, [x])["0"].gram[0]
    assert gram.dtype == torch.float32
    exact = x.double().T @ x.double() / 512
    assert float((gram - exact).abs().max() / exact.abs().max()) < 1e-6
    assert float(torch.linalg.eigvalsh(gram.double()).min()) > 0


def test_a_layer_called_twice_is_measured_over_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x))

    found = walked(Twice(), [torch.randn(5, 8) for _ in range(3)], order="sequential")
    assert found["linear"].columns == 30


def test_the_model_comes_back_in_its_own_mode_without_hooks() -> None:
    model = Chained()
    model.train()
    model.blocks[1].eval()
    walked(model, [torch.randn(4, 8)])
    assert model.training and not model.blocks[1].training and model.blocks[2].a.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_a_walk_cost_is_reported() -> None:
    model, walk = Chained(width=16, depth=3), Walk()
    walked(model, [torch.randn(4, 16) for _ in range(3)], walk=walk)
    assert walk.statistics_bytes >= 4 * 16 * 16
    assert walk.activation_bytes >= 3 * 4 * 16 * 4
    # One stage of statistics at a time, never the whole model's.
    assert walk.statistics_bytes < 4 * 3 * (3 * 16 * 16 + 32 * 32)
    assert walk.forwards > 0 and walk.time_s > 0


class Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class TestBadData:
    def test_empty(self) -> None:
        with pytest.raises(CalibrationError, match="empty"):
            prune_(nn.Sequential(nn.Linear(8, 8)), "2:4", Wanda(), [])

    def test_missing(self) -> None:
        with pytest.raises(ValueError, match="pass batches"):
            prune_(nn.Sequential(nn.Linear(8, 8)), "2:4", Wanda())

    @pytest.mark.parametrize("order", ["sequential", "parallel"])
    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_not_finite_names_the_layer_and_leaves_the_model_alone(self, order: str, number: float) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        before = copy.deepcopy(model.state_dict())
        bad = torch.randn(4, 8)
        bad[2, 3] = number
        with pytest.raises(CalibrationError, match=r"0: calibration batch \d: an input of shape .*NaN or infinite"):
            prune_(model, "2:4", AdaPrune(), [torch.randn(4, 8), bad], order=order)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    def test_a_batch_that_does_not_fit_says_what_it_was(self) -> None:
        with pytest.raises(CalibrationError, match=r"batch 0 \(float32\[4, 5\]\) does not fit the model Sequential"):
            prune_(nn.Sequential(nn.Linear(8, 8)), "2:4", Wanda(), [torch.randn(4, 5)])
        with pytest.raises(CalibrationError, match="forward=lambda model, batch"):
            prune_(nn.Sequential(nn.Linear(8, 8)), "2:4", Wanda(), [(torch.randn(4, 8), torch.zeros(4))])

    def test_a_later_batch_that_does_not_fit_leaves_the_model_alone(self) -> None:
        model = Chained()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CalibrationError, match="batch 1"):
            prune_(model, "2:4", Wanda(), [torch.randn(4, 8), torch.randn(4, 9)])
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    @pytest.mark.parametrize("order", ["sequential", "parallel"])
    def test_a_later_batch_of_another_width_names_itself_and_the_layer(self, order: str) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        before = copy.deepcopy(model.state_dict())
        fits = r"batch 2 \(float32\[4, 7\]\) does not fit " + ("the layer 0" if order == "sequential" else "the model Sequential")
        with pytest.raises(CalibrationError, match=fits):
            prune_(model, "2:4", AdaPrune(), [torch.randn(4, 8)] * 2 + [torch.randn(4, 7)], order=order)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    @pytest.mark.parametrize(
        "error", [AssertionError("4 rows, please"), ZeroDivisionError(), type("Own", (Exception,), {})("no")]
    )
    @pytest.mark.parametrize("place", ["before", "between", "after"])
    def test_whatever_a_forward_raises_is_told_with_its_batch_and_place(self, place: str, error: Exception) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                self.check("before", x)
                x = self.first(x)
                self.check("between", x)
                x = self.second(x)
                self.check("after", x)
                return x

            def check(self, where: str, x: Tensor) -> None:
                if place == where and len(x) != 4:
                    raise error

        model = nn.Sequential(Block(), Block())
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CalibrationError, match=rf"batch 1 .* {type(error).__name__}.*test_calibrate.py:\d+\)") as raised:
            prune_(model, "2:4", Wanda(), [torch.randn(4, 8), torch.randn(3, 8)])
        assert raised.value.__cause__ is error
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    def test_forward_takes_what_the_model_does_not(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8))
        report = prune_(
            model, "2:4", Wanda(), [(torch.randn(4, 8), torch.zeros(4))], forward=lambda model, batch: model(batch[0])
        )
        assert len(report) == 1

    @pytest.mark.parametrize("order", ["sequential", "parallel"])
    def test_a_layer_never_reached_stays_dense_with_the_reason(self, order: str) -> None:
        model = Dead()
        report = prune_(model, "2:4", Wanda(), [torch.randn(4, 8)], order=order)
        assert [layer.name for layer in report] == ["used"]
        assert [(one.name, one.reason) for one in report.left_dense] == [("unused", "no calibration batch reached this layer")]
        assert bool((model.unused.weight != 0).all())

    def test_none_reached_is_an_error(self) -> None:
        with pytest.raises(CalibrationError, match="no calibration batch reached any"):
            prune_(Dead(), "2:4", Wanda(), [torch.randn(4, 8)], include="unused")

    def test_only_padding_is_no_data(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(8, 8)

            def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
                return self.linear(x)

        with pytest.raises(CalibrationError, match="reached any"):
            prune_(Model(), "2:4", Wanda(), [{"x": torch.randn(2, 3, 8), "attention_mask": torch.zeros(2, 3)}])


def test_experts_in_one_parameter_are_left_dense_with_their_own_reason() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 8)
            self.experts = nn.Module()
            self.experts.gate_up_proj = nn.Parameter(torch.randn(2, 8, 8))
            self.experts.is_transposed = False

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ti,eoi->to", self.router(x), self.experts.gate_up_proj)

    model = Experts()
    before = model.experts.gate_up_proj.detach().clone()
    report = prune_(model, "2:4", Wanda(), [torch.randn(6, 8)], include="*")
    assert [layer.name for layer in report] == ["router"]
    (skipped,) = [one for one in report.left_dense if one.name == "experts.gate_up_proj"]
    assert "their module is not called itself" in skipped.reason and "magnitude" in skipped.reason
    assert torch.equal(model.experts.gate_up_proj, before)


def test_one_token_of_all_the_energy_does_not_decide_for_the_others() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 128, 8)
    x[:, 0] *= 1000
    found = walked(nn.Sequential(nn.Linear(8, 8, bias=False)), [x], include="*")["0"]
    flat = x.reshape(-1, 8)
    usual = x[:, 1:].reshape(-1, 8).square().sum(1).mean()
    # The definition: weights that limit a token's energy to 32 times the usual one.
    weights = (32 * usual / flat.square().sum(1)).clamp(max=1)
    expected = (flat * weights[:, None]).T @ flat / weights.sum()
    torch.testing.assert_close(found.gram[0], expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(found.mean[0], (flat * weights[:, None]).sum(0) / weights.sum(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(found.norm[0].square(), found.gram[0].diagonal(), rtol=1e-4, atol=1e-5)
    plain = walked(nn.Sequential(nn.Linear(8, 8, bias=False)), [x], needs={Statistic.MEAN}, include="*")["0"]
    torch.testing.assert_close(plain.mean[0], flat.mean(0), rtol=1e-4, atol=1e-3)


class Mixture(nn.Module):
    """Tokens are sent to one of the experts, or batches are, by what their first number says."""

    def __init__(self, width: int = 16, experts: int = 4, by_token: bool = False) -> None:
        super().__init__()
        self.norm = nn.Identity()
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, width), "gate": nn.Linear(width, width), "down": nn.Linear(width, width)})
            for _ in range(experts)
        )
        self.by_token = by_token

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        key = x[:, 0] if self.by_token else x[:1, 0].expand(len(x))
        chosen = (key.abs() * 1000).long() % len(self.experts)
        for number in chosen.unique().tolist():
            expert, tokens = self.experts[number], chosen == number
            inner = x[tokens]
            out[tokens] = expert["down"](expert["up"](inner).relu() * expert["gate"](inner))
        return x + out


class Routed(nn.Module):
    def __init__(self, chained: bool, by_token: bool) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(Mixture(by_token=by_token) for _ in range(3 if chained else 1))
        self.last = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("chained", [False, True], ids=["one block", "chain"])
@pytest.mark.parametrize("by_token", [False, True], ids=["batches routed", "tokens routed"])
def test_experts_that_only_later_batches_reach_are_pruned_on_what_they_see(chained: bool, by_token: bool, order: str) -> None:
    torch.manual_seed(3)
    model = Routed(chained, by_token).eval()
    batches = [torch.randn(6 if by_token else 24, 16) for _ in range(16)]
    layers, _ = find_layers(model)
    first: set[str] = set()
    handles = [layer.module.register_forward_pre_hook(lambda *_, name=layer.name: first.add(name)) for layer in layers]
    with torch.no_grad():
        model(batches[0])
    for handle in handles:
        handle.remove()
    assert len(first) < len(layers)
    report = prune_(model, "2:4", AdaPrune(), batches, order=order)
    assert sorted(layer.name for layer in report) == sorted(layer.name for layer in layers)
    assert not report.left_dense
    assert all(layer.error <= layer.error_before * (1 + 1e-3) for layer in report)


@pytest.mark.parametrize("chained", [False, True], ids=["one block", "chain"])
@pytest.mark.parametrize("by_token", [False, True], ids=["batches routed", "tokens routed"])
def test_statistics_of_routed_experts_are_those_of_their_own_tokens(chained: bool, by_token: bool) -> None:
    torch.manual_seed(4)
    model = Routed(chained, by_token).eval()
    batches = [torch.randn(6 if by_token else 24, 16) for _ in range(16)]
    layers, _ = find_layers(model)
    assert bool(find_chains(model, layers, discover(model, layers, batches, None)[1], batches[:1], None)) is chained
    order = []
    for stage in calibrate(model, layers, batches, ALL | {Statistic.CROSS}, Options(progress=False)):
        for layer, statistics in zip(stage.layers, stage.statistics, strict=True):
            order.append(layer.name)
            torch.testing.assert_close(statistics.gram[0], sequential_oracle(model, batches, layer.name), rtol=1e-4, atol=1e-4)
        for layer in stage.layers:
            with torch.no_grad():
                layer.weight.mul_((torch.rand_like(layer.weight) < 0.7).float())
    assert order[0] == "first" and order[-1] == "last" and len(order) == len(layers)
    for number in range(4):
        names = [f"blocks.0.experts.{number}.{name}" for name in ("up", "gate", "down")]
        assert sorted(map(order.index, names)) == list(map(order.index, names))


def test_every_batch_is_looked_at_only_while_layers_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = Chained(), [torch.randn(4, 8) for _ in range(5)]
    layers, _ = find_layers(model)
    assert discover(model, layers, batches, None)[2] == 1
    model.unused = nn.Linear(8, 8)
    layers, _ = find_layers(model)
    stages, calls, forwards = discover(model, layers, batches, None)
    assert forwards == 5 and "unused" not in calls and len(calls) == len(layers) - 1
    assert stages[0][0].name == "first"


def test_a_layer_that_only_held_out_batches_reach_is_pruned() -> None:
    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.usual, self.rare = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, rare: bool) -> Tensor:
            return self.rare(x) if rare else self.usual(x)

    model = Rare()
    report = prune_(model, "2:4", AdaPrune(), [(torch.randn(9, 8), number == 4) for number in range(5)])
    assert [layer.name for layer in report] == ["usual", "rare"] and not report.left_dense
    assert "too little data to hold any out" in report["rare"].note


def test_inputs_of_other_tokens_than_the_dense_networks_are_not_compared_with_them() -> None:
    layer = find_layers(nn.Sequential(nn.Linear(8, 8)))[0][0]
    pairs = [
        (torch.randn(5, 8), torch.randn(5, 8)),
        (torch.randn(4, 8), torch.randn(6, 8)),
        (torch.randn(3, 8), torch.randn(3, 8)),
    ]
    moments = Moments(layer, ALL | {Statistic.CROSS})
    for x, z in pairs:
        moments.add(x, z)
    found = moments.statistics()
    x = torch.cat([x for x, _ in pairs])
    assert found.cross is None and found.dense_mean is None and found.columns == 12
    torch.testing.assert_close(found.gram[0], x.T @ x / 12)


def test_layers_whose_inputs_no_hook_sees_are_left_dense_with_their_reason() -> None:
    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(8, 8)
            self.up = nn.ConvTranspose1d(8, 8, 2)
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.up(self.rnn(x)[0].transpose(1, 2)).transpose(1, 2))

    report = prune_(Speech(), "2:4", Wanda(), [torch.randn(6, 2, 8)])
    assert [layer.name for layer in report] == ["inner"]
    reasons = {one.name: one.reason for one in report.left_dense}
    assert "recurrent layer" in reasons["rnn.weight_ih_l0"] and "transposed convolutions" in reasons["up"]


@pytest.mark.parametrize("how", ["wanda", "budget", "quantize"])
def test_if_no_layer_can_be_calibrated_the_error_says_why(how: str) -> None:
    model = nn.Sequential(nn.ConvTranspose1d(8, 8, 2))
    batches = [torch.randn(2, 8, 6)] * 5
    with pytest.raises(CalibrationError, match=r"none of these layers, such as 0: .* transposed convolutions"):
        if how == "quantize":
            quantize_(model, "int8", data=batches, method="gptq", include=["0"])
        elif how == "budget":
            prune_(model, None, "wanda", batches, budget="50%", patterns=["2:4", "4:8"], include=["0"])
        else:
            prune_(model, "2:4", "wanda", batches, include=["0"])


@pytest.mark.parametrize("kind", ["scripted", "compiled", "compiled in place"])
def test_modules_without_weights_may_be_compiled_or_scripted(kind: str) -> None:
    made: dict[str, Callable[[], nn.Module]] = {
        "scripted": lambda: torch.jit.script(nn.ReLU()),
        "compiled": lambda: torch.compile(nn.ReLU(), backend="eager"),
        "compiled in place": nn.ReLU,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        models = [nn.Sequential(nn.Linear(16, 16), one, nn.Linear(16, 8)).eval() for one in (nn.ReLU(), made[kind]())]
    models[1].load_state_dict(models[0].state_dict())
    if kind == "compiled in place":
        models[1][1].compile(backend="eager")
    batches = [torch.randn(32, 16) for _ in range(3)]
    reports = [prune_(one, "2:4", "adaprune", batches) for one in models]
    for a, b in zip(*(one.parameters() for one in models), strict=True):
        torch.testing.assert_close(a, b)
    assert [one.error for one in reports[1]] == pytest.approx([one.error for one in reports[0]], rel=1e-4)
