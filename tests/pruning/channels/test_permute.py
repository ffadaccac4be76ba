"""Channel permutation: the same function, more score kept, and an assignment as good as any."""

from __future__ import annotations

import copy
from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor, nn

from bisparse import Pattern, solve
from bisparse.pruning import permute_
from bisparse.pruning.channels.channel_graph import channel_spaces
from bisparse.pruning.channels.permute import search_order
from bisparse.pruning.channels.stripe_kernel import DIVISIONS, best_divisions


def kept(scores: Tensor, pattern: Pattern) -> float:
    return solve(scores, pattern).value


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "2:4-T", "4:8-T"])
def test_an_order_is_a_permutation_that_keeps_more(text: str) -> None:
    pattern = Pattern.parse(text)
    for columns in (48, 54):
        scores = torch.randn(32, columns).abs() * torch.rand(1, columns)
        order = search_order(scores, pattern)
        assert torch.equal(order.sort().values, torch.arange(columns))
        assert kept(scores[:, order], pattern) > (1.0015 if pattern.transposable else 1.005) * kept(scores, pattern)
        assert torch.equal(order, search_order(scores, pattern))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("text", ["2:4", "2:4-T", "4:8"])
def test_the_size_of_scores_does_not_matter(text: str, dtype: torch.dtype) -> None:
    scores = torch.rand(16, 32, dtype=torch.float64).to(dtype)
    huge = (scores.double() * 2.0 ** {torch.float64: 1000, torch.float16: 15}.get(dtype, 127)).to(dtype)
    orders = [search_order(one, Pattern.parse(text)) for one in (scores, huge, torch.zeros_like(scores))]
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[2].sort().values, torch.arange(32))


def test_it_comes_close_to_the_best_of_all_orders() -> None:
    pattern, ratios = Pattern(1, 2), []
    for seed in range(8):
        torch.manual_seed(seed)
        scores = torch.rand(6, 6)
        best = max(float(scores[:, list(order)].view(6, 3, 2).amax(2).sum()) for order in permutations(range(6)))
        ratios.append(kept(scores[:, search_order(scores, pattern)], pattern) / best)
    assert min(ratios) > 0.95 and sum(ratios) / len(ratios) > 0.985


def test_it_is_as_good_as_swapping_channels_until_no_swap_helps() -> None:
    """The local search of ASP's channel swaps, written out: the best swap between two stripes, again and again."""
    scores = torch.randn(64, 32).abs() * torch.rand(1, 32)
    start = kept(scores, Pattern(2, 4))
    order = torch.arange(32)

    def stripe(columns: Tensor) -> float:
        return float(scores[:, columns].topk(2, dim=1).values.sum())

    improved = True
    while improved:
        improved, best = False, (1e-4, None)
        for a in range(32):
            for b in range(a + 1, 32):
                if a // 4 == b // 4:
                    continue
                trial = order.clone()
                trial[a], trial[b] = order[b], order[a]
                own = [slice(x // 4 * 4, x // 4 * 4 + 4) for x in (a, b)]
                gain = sum(stripe(trial[s]) - stripe(order[s]) for s in own)
                if gain > best[0]:
                    best = (gain, trial)
        if best[1] is not None:
            order, improved = best[1], True
    swapped = kept(scores[:, order], Pattern(2, 4)) - start
    ours = kept(scores[:, search_order(scores, Pattern(2, 4))], Pattern(2, 4)) - start
    assert ours > 0.95 * swapped > 0


def stripe_groups(scores: Tensor, n: int) -> Tensor:
    """ASP's search written out: of all ways to divide two stripes anew the best, again and again, until none is better."""
    order = torch.arange(scores.shape[1]).view(-1, 4)
    pairs = list(combinations(range(len(order)), 2))

    def best(one: int, other: int) -> tuple[float, Tensor]:
        ways = order[[one, other]].reshape(8)[torch.tensor(DIVISIONS)]
        values = scores[:, ways.view(-1, 2, 4)].topk(n, dim=3).values.sum((0, 2, 3))
        return float(values.max() - values[0]), ways[int(values.argmax())]

    found = {pair: best(*pair) for pair in pairs}
    while True:
        pair = max(pairs, key=lambda one: found[one][0])
        if found[pair][0] < 1e-3:
            return order.flatten()
        order[list(pair)] = found[pair][1].view(2, 4)
        found.update({other: best(*other) for other in pairs if set(other) & set(pair)})


@pytest.mark.parametrize("n", [1, 2, 3])
def test_it_is_as_good_as_stripe_groups(n: int) -> None:
    pattern, shares = Pattern(n, 4), []
    for seed in range(4):
        torch.manual_seed(seed)
        scores = torch.randn(64, 32).abs() * torch.rand(1, 32)
        start = kept(scores, pattern)
        theirs = kept(scores[:, stripe_groups(scores, n)], pattern) - start
        shares.append((kept(scores[:, search_order(scores, pattern)], pattern) - start) / theirs)
    assert min(shares) > 0.93 and sum(shares) / len(shares) > 1.02, shares


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("rows", [16, 80])
def test_divisions_keep_what_they_are_said_to(n: int, rows: int) -> None:
    columns = torch.randn(24, rows).abs()
    columns[3] = columns[4]  # ties
    columns[5] = 0
    members = torch.randperm(24).view(6, 4)
    pairs = torch.triu_indices(6, 6, 1).t()
    gains, choices = best_divisions(columns, members, pairs, n, 1e-6)
    for (one, other), gain, choice in zip(pairs.tolist(), gains, choices, strict=True):
        ways = members[[one, other]].reshape(8)[torch.tensor(DIVISIONS)]
        values = columns.double()[ways.view(-1, 2, 4)].topk(n, dim=2).values.sum((1, 2, 3))
        assert float(gain) == pytest.approx(float(values.max() - values[0]), abs=1e-4)
        assert float(values[choice]) == pytest.approx(float(values.max()), rel=1e-5)
    assert sorted(map(sorted, {frozenset(d[:4]) for d in DIVISIONS})) == sorted(map(list, combinations(range(8), 4)))[:35]


def test_a_transposable_search_leaves_the_rows_bands_alone_and_counts_columns() -> None:
    # One band of rows: all the weight of a column in one place; a tile keeps two a row, so heavy columns must be dealt out.
    scores = torch.full((4, 16), 0.01)
    scores[0, :8] = 1.0
    assert kept(scores, Pattern(2, 4, True)) < 4.5
    order = search_order(scores, Pattern(2, 4, True))
    assert kept(scores[:, order], Pattern(2, 4, True)) > 7.9


class Residual(nn.Module):
    """Norms, a depthwise convolution, a residual sum, a gate, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.expand, self.n1 = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.deep, self.n2 = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32)
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.project, self.n3 = nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16)
        self.hidden, self.norm, self.fc = nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n0(self.stem(x)))
        y = nn.functional.silu(self.n2(self.deep(torch.relu(self.n1(self.expand(x))))))
        y = y * torch.sigmoid(self.excite(nn.functional.relu(self.squeeze(nn.functional.adaptive_avg_pool2d(y, 1)))))
        x = x + self.n3(self.project(y))
        return self.fc(self.norm(self.hidden(x.mean((2, 3)))))


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.mul_(1 + torch.rand_like(tensor)).add_(0.1 * torch.rand_like(tensor))
            if tensor.ndim > 1:
                tensor.mul_(torch.rand(tensor.shape[1]).view(1, -1, *[1] * (tensor.ndim - 2)))
    return model.eval()


@pytest.mark.parametrize("pattern", ["2:4", "4:8-T"])
def test_outputs_stay_equal_and_the_masks_keep_more(pattern: str) -> None:
    model, x = randomised(Residual()), torch.randn(2, 3, 6, 6)
    before, state = model(x), copy.deepcopy(model.state_dict())
    report = permute_(model, pattern, x)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert report.retained_after > report.retained_before
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    assert {"n1.running_mean", "deep.weight", "squeeze.weight", "excite.weight", "project.weight"} <= moved
    # The space before the head, which is not pruned by default, is written only: of use to a transposable pattern alone.
    assert ("norm.weight" in moved) is (pattern == "4:8-T")
    assert "fc.bias" not in moved
    assert "spaces permuted" in str(report)
    # The pixels and the classes keep their places: the stem's columns and the head's rows are as they were.
    torch.testing.assert_close(model.stem.weight.abs().sum((0, 2, 3)), state["stem.weight"].abs().sum((0, 2, 3)))
    torch.testing.assert_close(model.fc.weight.abs().sum(1), state["fc.weight"].abs().sum(1))


def test_what_the_graph_cannot_permute_is_left_with_the_reason() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(torch.roll(self.a(x), 1, -1))
            return self.c(torch.softmax(x, -1))

    model, x = Shuffled(), torch.randn(3, 8)
    state = copy.deepcopy(model.state_dict())
    report = permute_(model, "2:4", x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    spaces, _ = channel_spaces(model, x)
    assert all("roll" in space.frozen or "softmax" in space.frozen or "graph" in space.frozen for space in spaces)
    assert report.retained_after == report.retained_before


def test_a_hidden_use_of_the_channels_is_caught_by_the_outputs() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
            self.a.register_forward_hook(lambda module, args, output: output * torch.linspace(0, 1, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model, x = randomised(Hidden()), torch.randn(3, 8)
    state = copy.deepcopy(model.state_dict())
    report = permute_(model, "2:4", x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "outputs changed" in report.spaces[0].reason


class Hiding(nn.Module):
    """Convolutions without biases, and a gate; a hook, which the graph does not show, weights channels after the first norm."""

    def __init__(self, gate: float, last: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1, bias=False)
        self.first, self.norm = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.second, self.last = nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.gate, self.head = nn.Parameter(torch.full((1,), gate)), nn.Linear(16, 8)
        nn.init.constant_(self.last.weight, last)
        self.hook = self.norm.register_forward_hook(lambda module, args, output: output * torch.linspace(0, 1, 32)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.last(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(x.mean((2, 3)) + self.gate * y.mean((2, 3)))


class TwoInputs(nn.Module):
    """Both write the same channels; a hook weights those of the second, which the graph does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(8, 16, bias=False), nn.Linear(16, 8)
        self.gate, self.last = nn.Parameter(torch.zeros(1)), nn.Identity()
        self.hook = self.second.register_forward_hook(lambda module, args, output: output * torch.linspace(0, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.third(self.first(x[:, 0]) + self.second(x[:, 1])))


PICTURES = (2, 3, 6, 6)
BLIND = {
    "zeros": (lambda: Hiding(1.0), torch.zeros(PICTURES), "first.weight"),
    "a gate of zero": (lambda: Hiding(0.0), torch.rand(PICTURES), "first.weight"),
    "a small gate": (lambda: Hiding(1e-8), torch.rand(PICTURES), "first.weight"),
    "a residual that starts at zero": (lambda: Hiding(1.0, last=0.0), torch.rand(PICTURES), "first.weight"),
    "one of two inputs is zero": (TwoInputs, torch.randn(4, 2, 8) * torch.tensor([[1.0], [0.0]]), "second.weight"),
}


@pytest.mark.parametrize("pattern", ["2:4", "2:4-T"])
@pytest.mark.parametrize("name", BLIND)
def test_examples_that_cannot_show_a_change_leave_a_space_as_it_is(name: str, pattern: str) -> None:
    make, example, weight = BLIND[name]
    model = make().eval()
    dense = copy.deepcopy(model)
    report = permute_(model, pattern, example)
    reasons = [space.reason for space in report.spaces if weight.split(".")[0] in space.layers]
    assert any(f"the example cannot show a change: the order in {weight} has no effect" in reason for reason in reasons), report
    assert "of them: pass a batch of real data" in str(report)
    x = torch.randn(8, *example.shape[1:])
    for one in (model, dense):
        nn.init.ones_(one.gate)
        if name == "a residual that starts at zero":
            nn.init.ones_(one.last.weight)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [False, True])
def test_examples_that_can_show_a_change_permute_or_find_the_hidden_use(hidden: bool) -> None:
    for make, example in ((lambda: Hiding(1.0), torch.randn(PICTURES)), (TwoInputs, torch.randn(4, 2, 8))):
        model = randomised(make())
        if not hidden:
            model.hook.remove()
        before = model(example)
        report = permute_(model, "2:4-T", example)
        assert "outputs changed" in str(report.spaces) if hidden else "" in [space.reason for space in report.spaces]
        torch.testing.assert_close(model(example), before, rtol=1e-4, atol=1e-4)
        assert "real data" not in str(report)


def test_weights_that_a_permutation_leaves_as_they_are_need_not_be_shown() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    nn.init.zeros_(model[0].weight)
    nn.init.uniform_(model[0].bias)
    x = torch.zeros(2, 8)
    before = model(x)
    assert not permute_(model, "2:4", x).spaces[0].reason
    torch.testing.assert_close(model(x), before)


def test_blocks_in_a_list_are_traced_where_the_whole_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(2))

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return torch.add(x, x) if scale is None else x * scale

    model, x = randomised(Blocks()), torch.randn(3, 8)
    before = model(x)
    report = permute_(model, "2:4", x)
    assert list(report.untraced) == ["Blocks"] and [space.layers[0] for space in report.spaces] == ["blocks.0.0", "blocks.1.0"]
    assert report.retained_after > report.retained_before and not any(space.reason for space in report.spaces)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert not capsys.readouterr().err


class Auxiliary(nn.Module):
    """A second head, as in GoogLeNet and DeepLab, that runs in training only."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8), nn.Linear(32, 8)
        self.norm, self.dropout = nn.BatchNorm1d(32), dropout

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = torch.relu(self.b(torch.relu(self.norm(self.a(x)))))
        y = nn.functional.dropout(y, self.dropout, self.training)
        return (self.c(y), self.head(y)) if self.training else self.c(y)


def test_outputs_in_training_mode_stay_equal_too() -> None:
    model, x = randomised(Auxiliary()), torch.randn(64, 16)
    dense, state = copy.deepcopy(model), copy.deepcopy(dict(model.named_buffers()))
    report = permute_(model, "2:4", x)
    for one, other in zip(model.train()(x), dense.train()(x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert {space.layers: space.reason[:19] for space in report.spaces} == {("a", "b"): "", ("b", "c"): "the outputs changed"}
    assert "does not reach it" in report.untraced["head"]
    assert not model.eval().training and int(model.norm.num_batches_tracked) == int(state["norm.num_batches_tracked"]) + 1


def test_random_outputs_in_training_mode_are_not_compared_and_the_layers_are_named() -> None:
    model, x = randomised(Auxiliary(dropout=0.5)), torch.randn(64, 16)
    before = model(x)
    report = permute_(model, "2:4", x)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert all(not space.reason for space in report.spaces) and "does not reach it" in report.untraced["head"]


def test_outputs_that_hold_no_tensor_are_refused() -> None:
    class Result:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    class Wrapped(nn.Sequential):
        def forward(self, x: Tensor) -> Result:
            return Result(super().forward(x))

    model = Wrapped(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    with pytest.raises(ValueError, match="pass forward="):
        permute_(model, "2:4", torch.randn(2, 16))
    report = permute_(model, "2:4", torch.randn(2, 16), forward=lambda model, x: model(x).value)
    assert "cannot trace" in report.untraced["Wrapped"]


def test_parts_are_traced_where_the_whole_cannot_be() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x) if x.sum() > -1e9 else x

    model, x = randomised(Branching()), torch.randn(3, 8)
    before = model(x)
    report = permute_(model, "2:4", x)
    assert list(report.untraced) == ["Branching"] and len(report.spaces) == 1 and not report.spaces[0].reason
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_tied_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    model[2].weight = model[0].weight
    x = torch.randn(3, 16)
    before = model(x)
    permute_(model, "2:4", x)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_models_of_inference_mode_are_refused_and_left_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    with torch.inference_mode():
        model[2] = nn.Linear(32, 8)
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"2.weight was created in inference mode"):
        permute_(model, "2:4", torch.randn(4, 8))
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_half_precision_is_no_hidden_use(dtype: torch.dtype) -> None:
    layers = [nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64), nn.GELU(), nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64)]
    report = permute_(nn.Sequential(*layers).to(dtype), "2:4", torch.randn(64, 64, dtype=dtype), steps=5, rounds=1)
    assert [space.reason for space in report.spaces] == ["", "", ""]


def test_examples_with_outputs_that_are_not_finite_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    with pytest.raises(ValueError, match="outputs on the example are not finite"):
        permute_(model, "2:4", torch.full((2, 8), torch.nan))


def test_scripted_models_are_not_said_to_be_out_of_reach() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)))
    reasons = permute_(model, "2:4", torch.randn(2, 8)).untraced.values()
    assert reasons and all("torch.jit" in reason for reason in reasons)


def test_only_patterns_are_permuted_for() -> None:
    with pytest.raises(ValueError, match="expected a pattern such as"):
        permute_(nn.Sequential(nn.Linear(8, 8)), "50%", torch.randn(2, 8))
