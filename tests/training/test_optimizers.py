"""Optimizers as there are: closures, maximize, no learning rate, groups that change, and those that cannot be followed."""

import pytest
import torch
from torch import nn

from bisparse import finalize_, sparsify_, verify
from bisparse.training import FixedDecay


def norm_off_the_mask(sparsity) -> float:
    layer = sparsity.layers[0]
    return float(layer.weight.detach()[~layer.mask].norm())


def one_layer(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(16, 16, bias=False)


@pytest.mark.parametrize("method", ["masked-decay", "sr-ste"])
@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_a_closure_decays_as_a_plain_step_does(method: str, how: str) -> None:
    norms = []
    for closed in (False, True):
        model = one_layer()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsity = sparsify_(model, "2:4-T", decay=FixedDecay(0.5), refresh=1000, method=method).attach(optimizer)

        def closure(model=model, optimizer=optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(torch.zeros(4, 16)).square().mean()
            loss.backward()
            return loss

        start = norm_off_the_mask(sparsity)
        for _ in range(20):
            if not closed:
                closure()
                optimizer.step()
            elif how == "positional":
                assert optimizer.step(closure) == 0
            else:
                optimizer.step(closure=closure)
        norms.append(norm_off_the_mask(sparsity))
        assert sparsity.step == 20
    assert norms[0] == norms[1] == pytest.approx(start * 0.95**20, rel=1e-5)


def test_lbfgs_decays_at_each_evaluation_and_refreshes_once_a_step() -> None:
    model = one_layer()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    sparsity = sparsify_(model, "2:4-T", decay=FixedDecay(0.5), refresh=1).attach(optimizer)
    inputs, calls = torch.randn(8, 16), []

    def closure() -> torch.Tensor:
        calls.append(sparsity.refreshes)
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    start = norm_off_the_mask(sparsity)
    for _ in range(3):
        optimizer.step(closure)
    assert sparsity.step == 3 and sparsity.refreshes == 2 and norm_off_the_mask(sparsity) < 0.9 * start
    assert len(calls) > 6


def test_a_closure_that_makes_nan_gradients_is_refused_before_the_step() -> None:
    model = one_layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity = sparsify_(model, "2:4-T").attach(optimizer)
    before = model.parametrizations.weight.original.detach().clone()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.full((4, 16), float("nan"))).mean()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match=r"gradient of .* optimizer step 1"):
        optimizer.step(closure)
    assert torch.equal(model.parametrizations.weight.original, before) and sparsity.step == 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("method", ["masked-decay", "sr-ste"])
def test_maximize_shrinks_pruned_weights_too(kind, method: str) -> None:
    results = []
    for maximize in (False, True):
        model = one_layer()
        optimizer = kind(model.parameters(), lr=0.01, maximize=maximize)
        sparsity = sparsify_(model, "2:4-T", decay=FixedDecay(0.5), refresh=1000, method=method).attach(optimizer)
        start = norm_off_the_mask(sparsity)
        inputs = torch.ones(4, 16)
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(inputs).square().mean() * (0 if method == "masked-decay" else 1)
            (-loss if maximize else loss).backward()
            optimizer.step()
        results.append(model.parametrizations.weight.original.detach().clone())
        if method == "masked-decay":
            assert norm_off_the_mask(sparsity) < start
    assert torch.equal(*results)


class Alpha(torch.optim.Optimizer):
    """Plain descent whose rate has another name."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"alpha": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.sub_(weight.grad, alpha=group["alpha"])


def test_an_optimizer_without_lr() -> None:
    model = one_layer()
    optimizer = Alpha(model.parameters())
    sparsity = sparsify_(model, "2:4-T", decay=FixedDecay(0.5), refresh=1000).attach(optimizer)
    start = norm_off_the_mask(sparsity)
    model(torch.zeros(4, 16)).sum().backward()
    optimizer.step()
    assert norm_off_the_mask(sparsity) == pytest.approx(0.95 * start)
    other = one_layer()
    with pytest.raises(ValueError, match=r'"sr-ste" .* Alpha has no "lr"'):
        sparsify_(other, "2:4-T", method="sr-ste").attach(Alpha(other.parameters()))


def test_the_rate_may_be_a_tensor() -> None:
    results = []
    for rate in (0.1, torch.tensor(0.1)):
        model = one_layer()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        sparsify_(model, "2:4-T", decay=FixedDecay(0.5), method="sr-ste").attach(optimizer)
        model(torch.ones(4, 16)).sum().backward()
        optimizer.step()
        results.append(model.parametrizations.weight.original.detach().clone())
    assert torch.allclose(*results)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_group_that_is_swapped_for_one_of_equal_length_is_followed(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    sparsity = sparsify_(model, "2:4-T", mode=mode, include="*", decay=FixedDecay(0.5), refresh=1000)
    first, second = (layer.weight for layer in sparsity.layers)
    optimizer = torch.optim.SGD([first], lr=0.1, momentum=0.9, weight_decay=0.0)
    second.requires_grad_(False)
    sparsity.attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 16) * (mode == "static")).square().sum().backward()
        optimizer.step()

    step()
    second.requires_grad_(True)
    optimizer.param_groups[0]["params"][:] = [second]
    mask = sparsity.layers[1].mask
    before = second.detach().clone()
    for _ in range(3):
        step()
    if mode == "static":
        assert not torch.equal(second[mask], before[mask]) and not bool(second[~mask].any())
        finalize_(model)
        assert verify(model, "2:4-T", include="*")
    else:
        # Velocity v = 0.9 v + decay * w, then w -= lr * v, on the pruned weights alone.
        expected, velocity = before[~mask], 0.0
        for _ in range(3):
            velocity = 0.9 * velocity + 0.5 * expected
            expected = expected - 0.1 * velocity
        assert torch.allclose(second[~mask], expected) and torch.equal(second[mask], before[mask])


class Forgetful(torch.optim.SGD):
    def __init__(self, parameters) -> None:
        self.defaults, self.state = {"lr": 0.1}, {}
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]


def test_an_optimizer_without_hooks_is_refused_and_another_can_follow() -> None:
    model = one_layer()
    sparsity = sparsify_(model, "2:4-T")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Forgetful has no step hooks: .* super\(\)\.__init__"):
            sparsity.attach(Forgetful(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Forgetful"):
        sparsity.attach(optimizer, Forgetful(model.parameters()))
    assert not optimizer._optimizer_step_pre_hooks
    sparsity.attach(optimizer)
    model(torch.ones(4, 16)).sum().backward()
    optimizer.step()
    assert sparsity.step == 1


class Derived(torch.optim.SGD):
    """Its step is that of a base class with something around it; torch calls hooks in both."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            raise RuntimeError("out of memory")
        return super().step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_calls_the_step_of_its_base_class_is_one_step(with_closure: bool) -> None:
    results = []
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # from now on torch calls hooks in SGD.step, too
    for kind in (torch.optim.SGD, Derived):
        model = one_layer()
        optimizer = kind(model.parameters(), lr=0.1)
        sparsity = sparsify_(model, "2:4-T", decay=FixedDecay(0.5), refresh=2).attach(optimizer)

        def step(number: int, model=model, optimizer=optimizer) -> None:
            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = model(torch.randn(4, 16, generator=torch.Generator().manual_seed(number))).square().mean()
                loss.backward()
                return loss

            if not with_closure:
                closure()
            optimizer.step(closure if with_closure else None)

        for number in range(5):
            step(number)
            if number == 2 and kind is Derived:  # a step that fails does not count, and the next one does
                optimizer.fails = True
                with pytest.raises(RuntimeError, match="out of memory"):
                    step(number)
                optimizer.fails = False
        assert sparsity.step == 5 and sparsity.refreshes == 2
        results.append(model.parametrizations.weight.original.detach().clone())
    assert torch.equal(*results)


class Careful(torch.optim.SGD):
    """Repeats the step of its base class if that fails."""

    def step(self, closure=None):
        def failing() -> None:
            raise RuntimeError("out of memory")

        try:
            super().step(failing)
        except RuntimeError:
            return super().step(closure)


def test_a_step_that_repeats_a_failed_step_of_its_base_class_is_one_step() -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # from now on torch calls hooks in SGD.step, too
    model = one_layer()
    optimizer = Careful(model.parameters(), lr=0.1)
    sparsity = sparsify_(model, "2:4-T", refresh=2).attach(optimizer)
    for _ in range(3):
        model(torch.ones(4, 16)).sum().backward()
        optimizer.step()
    assert sparsity.step == 3
