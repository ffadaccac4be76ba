"""Static masks: keys unchanged, and zeros that stay exactly zero whatever the optimizer does."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bisparse
from bisparse import finalize_, solve, sparsify_, verify
from bisparse.training.bits import keep_only_

OPTIMIZERS = {
    "sgd": lambda held: torch.optim.SGD(held, lr=0.1),
    "sgd momentum, weight decay": lambda held: torch.optim.SGD(held, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd foreach": lambda held: torch.optim.SGD(held, lr=0.1, momentum=0.9, foreach=True, maximize=True),
    "adam": lambda held: torch.optim.Adam(held, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw fused": lambda held: torch.optim.AdamW(held, lr=0.01, weight_decay=0.3, fused=True),
    "adamax": lambda held: torch.optim.Adamax(held, lr=0.01),
    "nadam": lambda held: torch.optim.NAdam(held, lr=0.01, decoupled_weight_decay=True, weight_decay=0.1),
    "radam": lambda held: torch.optim.RAdam(held, lr=0.01),
    "rmsprop": lambda held: torch.optim.RMSprop(held, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda held: torch.optim.Adagrad(held, lr=0.01),
    "adadelta": lambda held: torch.optim.Adadelta(held),
    "asgd": lambda held: torch.optim.ASGD(held, lr=0.1, weight_decay=0.1),
    "rprop": lambda held: torch.optim.Rprop(held, lr=0.01),
    "adafactor": lambda held: torch.optim.Adafactor(held, lr=0.01),
    "muon": lambda held: torch.optim.Muon([one for one in held if one.ndim == 2], lr=0.01),
}


def zeros_hold(model: nn.Module, masks: dict[str, torch.Tensor]) -> bool:
    weights = dict(model.named_parameters())
    found = [weights[name if name.endswith("_weight") else f"{name}.weight"] for name in masks]
    return all(not bool(weight[~mask].any()) for weight, mask in zip(found, masks.values(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zero_under_every_optimizer(mlp, step, name):
    sparsity = sparsify_(mlp, "4:8-T", mode="static")
    masks = {layer.name: layer.mask.clone() for layer in sparsity.layers}
    before = mlp[0].weight.detach().clone()
    optimizer = OPTIMIZERS[name](list(mlp.parameters()))
    sparsity.attach(optimizer)
    averaged = AveragedModel(mlp, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for number in range(5):
        step(mlp, optimizer, number, clip=0.5)
        averaged.update_parameters(mlp)
        assert zeros_hold(mlp, masks) and zeros_hold(averaged.module, masks)
    assert not torch.equal(mlp[0].weight, before)
    assert all(torch.equal(layer.mask, masks[layer.name]) for layer in sparsity.layers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(33, 17), (8, 4, 3, 3)])
def test_what_is_off_the_mask_becomes_exactly_zero_whatever_it_was(dtype, shape):
    values = torch.randn(shape).to(dtype)
    values.view(-1)[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1.0, -1.0], dtype=dtype)
    for own in (values, values.transpose(0, 1)) if len(shape) == 2 else (values.to(memory_format=torch.channels_last),):
        mask = torch.rand(own.shape) < 0.5
        expected = torch.where(mask, own, 0)
        found = own.clone(memory_format=torch.preserve_format)
        keep_only_(found, mask)
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert not bool(torch.signbit(found[~mask]).any())


def test_lbfgs_with_its_closure(mlp):
    sparsity = sparsify_(mlp, "4:8-T", mode="static")
    optimizer = torch.optim.LBFGS(mlp.parameters(), lr=0.5, max_iter=5)
    sparsity.attach(optimizer)
    inputs, losses = torch.randn(8, 16), []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = mlp(inputs).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    optimizer.step(closure)
    assert losses[-1] < losses[0]
    assert zeros_hold(mlp, {layer.name: layer.mask for layer in sparsity.layers})


def test_an_optimizer_with_momentum_from_a_dense_run_moves_no_zero(mlp, step):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for number in range(3):
        step(mlp, optimizer, number)
    sparsity = sparsify_(mlp, "4:8-T", mode="static").attach(optimizer)
    for number in range(3):
        step(mlp, optimizer, number)
        assert zeros_hold(mlp, {layer.name: layer.mask for layer in sparsity.layers})


def test_state_dict_keys_are_those_of_the_plain_model(model):
    keys = list(model.state_dict())
    sparsify_(model, "4:8-T", mode="static")
    assert list(model.state_dict()) == keys
    fresh = type(model)()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert verify(fresh.up.weight, "4:8-T")
    finalize_(model)
    assert list(model.state_dict()) == keys and not [name for name, _ in model.named_buffers()]
    pickled = io.BytesIO()
    torch.save(model, pickled)  # pickling the whole module works once finalized
    pickled.seek(0)
    assert torch.equal(torch.load(pickled, weights_only=False).up.weight, model.up.weight)


def test_the_clipped_norm_is_that_of_the_gradient_that_is_used(mlp):
    sparsity = sparsify_(mlp, "4:8-T", mode="static").attach(torch.optim.SGD(mlp.parameters(), lr=0.1))
    for _ in range(2):  # accumulated
        mlp(torch.randn(4, 16)).square().sum().backward()
    for layer in sparsity.layers:
        gradient = layer.weight.grad
        assert not bool(gradient[~layer.mask].any()) and bool(gradient[layer.mask].any())


@pytest.mark.parametrize("pattern", ["2:4", "2:4-T", "4:8-T", "16:32-T", "30%", "4:8-seq", "4:8-paired"])
def test_any_structure_and_any_score(model, pattern):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    scores = {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items() if weight.ndim > 1}

    def score(name: str, weight: torch.Tensor) -> torch.Tensor:
        return scores[name if name.endswith("_weight") else f"{name}.weight"]

    for layer in sparsify_(model, pattern, mode="static", score=score).layers:
        best = solve(score(layer.name, layer.weight), pattern, layout=layer.layout)
        assert torch.equal(layer.mask, best.mask)
        original = weights[layer.name if layer.name.endswith("_weight") else f"{layer.name}.weight"]
        assert torch.equal(layer.weight, original * layer.mask)


def test_given_masks_and_zeros_of_a_pruned_checkpoint(mlp, step):
    masks = {"0": solve(torch.rand(32, 16), "4:8-T").mask, "2": solve(torch.rand(8, 32), "4:8-T").mask}
    for by_parameter in (False, True):
        given = {f"{name}.weight" if by_parameter else name: mask for name, mask in masks.items()}
        sparsity = sparsify_(mlp, "4:8-T", mode="static", masks=given)
        assert all(torch.equal(layer.mask, masks[layer.name]) for layer in sparsity.layers)
        finalize_(mlp)
    again = sparsify_(mlp, "4:8-T", mode="static", masks="nonzero")
    assert all(torch.equal(layer.mask, masks[layer.name]) for layer in again.layers)


@pytest.mark.parametrize("forward_before", [False, True])
@pytest.mark.parametrize("where", ["all", "one entry", "load_state_dict", "a layer called on its own"])
def test_the_next_forward_pass_undoes_writes_at_any_time(mlp, step, where, forward_before):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    sparsity = sparsify_(mlp, "4:8-T", mode="static").attach(optimizer)
    masks = {layer.name: layer.mask.clone() for layer in sparsity.layers}
    step(mlp, optimizer, 0)
    if forward_before:
        mlp(torch.randn(2, 16))
    for evaluating in (False, True):
        mlp.train(not evaluating)
        with torch.no_grad():
            if where == "one entry":
                mlp[0].weight[(~masks["0"]).nonzero()[3].tolist()] = 3.0
            elif where == "load_state_dict":
                dense = {key: torch.randn_like(value) for key, value in mlp.state_dict().items() if value.is_floating_point()}
                mlp.load_state_dict(dense, strict=False)
            else:
                mlp[0].weight.copy_(torch.randn(32, 16))
        kept = mlp[0].weight[masks["0"]].clone()
        with torch.no_grad():
            mlp[0](torch.randn(2, 16)) if where == "a layer called on its own" else mlp(torch.randn(2, 16))
        assert not bool(mlp[0].weight[~masks["0"]].any()), "not undone"
        assert torch.equal(mlp[0].weight[masks["0"]], kept)


@pytest.mark.parametrize(
    "order", ["model, attach, masks", "attach, masks, model", "attach, model, masks", "masks, attach, model"]
)
def test_no_order_of_loading_and_attaching_loses_weights(mlp, step, order):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    masks = {"0": solve(torch.rand(32, 16), "4:8-T").mask, "2": solve(torch.rand(8, 32), "4:8-T").mask}
    sparsity = sparsify_(mlp, "4:8-T", mode="static", masks=masks).attach(optimizer)
    step(mlp, optimizer, 0)
    weights = copy.deepcopy(mlp.state_dict())
    fresh = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    resumed = sparsify_(fresh, "4:8-T", mode="static")
    does = {
        "model": lambda: fresh.load_state_dict(weights),
        "masks": lambda: resumed.load_state_dict(sparsity.state_dict()),
        "attach": lambda: resumed.attach(torch.optim.SGD(fresh.parameters(), lr=0.1)),
    }
    for one in order.split(", "):
        does[one]()
    inputs = torch.randn(2, 16)
    assert torch.equal(fresh(inputs), mlp(inputs))
    for name, mask in masks.items():
        assert torch.equal(fresh[int(name)].weight, mlp[int(name)].weight) and not bool(fresh[int(name)].weight[~mask].any())


def test_resume_takes_the_masks_from_the_state_and_not_from_the_weights(mlp, step):
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=0.01)
    masks = {"0": solve(torch.rand(32, 16), "4:8-T").mask, "2": solve(torch.rand(8, 32), "4:8-T").mask}
    sparsity = sparsify_(mlp, "4:8-T", mode="static", masks=masks).attach(optimizer)
    step(mlp, optimizer, 0)
    with torch.no_grad():  # a kept weight that happens to be zero is trained on
        mlp[0].weight[masks["0"].nonzero()[0].tolist()] = 0.0
    saved = io.BytesIO()
    torch.save({"model": mlp.state_dict(), "sparsity": sparsity.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    fresh = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    again = torch.optim.AdamW(fresh.parameters(), lr=0.01)
    resumed = sparsify_(fresh, "4:8-T", mode="static")
    fresh.load_state_dict(state["model"])
    resumed.load_state_dict(state["sparsity"])
    again.load_state_dict(state["optimizer"])
    resumed.attach(again)
    for number in range(1, 4):
        assert step(mlp, optimizer, number) == step(fresh, again, number)
    assert resumed.step == 4
    for one, other in zip(mlp.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(layer.mask, masks[layer.name]) for layer in resumed.layers)


def test_a_copy_of_model_and_sparsity_trains_on_its_own(mlp, step):
    sparsity = sparsify_(mlp, "4:8-T", mode="static")
    sparsity.attach(torch.optim.SGD(mlp.parameters(), lr=0.1))
    twin, own = copy.deepcopy((mlp, sparsity))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, weight_decay=0.1)
    own.attach(optimizer)
    untouched = mlp[0].weight.detach().clone()
    step(twin, optimizer, 0)
    assert own.step == 1 and sparsity.step == 0
    assert torch.equal(mlp[0].weight, untouched) and not torch.equal(twin[0].weight, untouched)
    assert zeros_hold(twin, {layer.name: layer.mask for layer in own.layers})


def test_hooks_do_nothing_after_finalize(mlp, step):
    sparsity = bisparse.sparsify_(mlp, "4:8-T", mode="static")
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    step(mlp, optimizer, 0)
    finalize_(mlp)
    step(mlp, optimizer, 1)  # dense training goes on
    assert float((mlp[0].weight != 0).double().mean()) > 0.9


def test_weights_that_moved_without_attach_are_zero_again_after_finalize_with_a_warning() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    sparsify_(model, "4:8-T", mode="static")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    with pytest.warns(UserWarning, match=r"Sparsity\.attach"):
        finalize_(model)
    assert verify(model, "4:8-T")


class Lookahead:
    """Lookahead (Zhang et al. 2019) as often written: no torch optimizer, or one without its __init__."""

    def __init__(self, inner, every=2):
        self.base, self.every, self.count = inner, every, 0
        self.param_groups = inner.param_groups
        self.slow = [[one.detach().clone() for one in group["params"]] for group in inner.param_groups]

    def zero_grad(self):
        self.base.zero_grad()

    def step(self):
        self.base.step()
        self.count += 1
        if self.count % self.every == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for fast, own in zip(group["params"], slow, strict=True):
                    own.add_(fast.data - own, alpha=0.5)
                    fast.data.copy_(own)


class TorchLookahead(Lookahead, torch.optim.Optimizer):
    pass


@pytest.mark.parametrize("kind", [Lookahead, TorchLookahead])
def test_zeros_hold_under_an_optimizer_around_the_optimizer(mlp, step, kind):
    optimizer = kind(torch.optim.SGD(mlp.parameters(), lr=0.1))  # its slow weights are dense
    sparsity = sparsify_(mlp, "4:8-T", mode="static").attach(optimizer)
    masks = {layer.name: layer.mask.clone() for layer in sparsity.layers}
    for number in range(5):
        step(mlp, optimizer, number)
        assert zeros_hold(mlp, masks) and sparsity.step == number + 1
    sparsity.detach()
    step(mlp, optimizer, 5)
    assert not zeros_hold(mlp, masks)


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_pass_uses_zeros_whoever_wrote_the_weights_since_the_step(mlp, step, training):
    inner = torch.optim.SGD(mlp.parameters(), lr=0.1)
    optimizer = Lookahead(inner, every=1)
    sparsity = sparsify_(mlp, "4:8-T", mode="static").attach(inner)  # the outer one is not known
    masks = {layer.name: layer.mask for layer in sparsity.layers}
    for number in range(3):
        step(mlp, optimizer, number)
        assert not zeros_hold(mlp, masks)
        mlp.train(training)(torch.randn(2, 16))
        assert zeros_hold(mlp, masks)


def test_a_recurrent_layer_takes_static_masks_and_no_changing_ones() -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"rnn": nn.LSTM(8, 8), "up": nn.Linear(8, 8)})

    changing = sparsify_(model(), "2:4")
    assert [layer.name for layer in changing.layers] == ["up"]
    assert "one flat buffer" in next(one.reason for one in changing.skipped if one.name == "rnn.weight_ih_l0")
    fixed = model()
    assert {layer.name for layer in sparsify_(fixed, "2:4", mode="static").layers} == {
        "rnn.weight_ih_l0", "rnn.weight_hh_l0", "up"
    }  # fmt: skip
    assert verify(fixed, "2:4")


def attached(mlp):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    return optimizer, sparsify_(mlp, "4:8-T", mode="static").attach(optimizer)


def test_tensors_of_functional_call_are_not_written_to(mlp, step):
    optimizer, sparsity = attached(mlp)
    step(mlp, optimizer, 0)
    inputs = torch.randn(3, 16)
    for kind in (lambda value: torch.ones_like(value), lambda value: nn.Parameter(torch.ones_like(value))):
        given = {name: kind(value) for name, value in mlp.named_parameters()}
        for _ in range(2):
            torch.func.functional_call(mlp, given, (inputs,))
        assert all(bool((value == 1).all()) for value in given.values())
    step(mlp, optimizer, 1)
    stacked = {name: torch.stack([value.detach()] * 2) for name, value in mlp.named_parameters()}
    both = torch.func.vmap(lambda one: torch.func.functional_call(mlp, one, (inputs,)))(stacked)
    assert torch.allclose(both[1], mlp(inputs), atol=1e-6)
    assert all(not bool(layer.weight[~layer.mask].any()) for layer in sparsity.layers)


def test_a_part_may_be_finalized_and_the_rest_trains_on(mlp, step):
    model = nn.Sequential(mlp[0], nn.ReLU(), nn.Sequential(mlp[2]))
    optimizer, _ = attached(model)
    step(model, optimizer, 0)
    finalize_(model[2])
    for number in (1, 2, 3):
        step(model, optimizer, number)
    assert verify(model[0].weight, "4:8-T")
    assert not verify(model[2][0].weight, "4:8-T"), "it trains dense"


def test_a_module_that_is_called_on_its_own_and_reads_a_weight_inside_of_it():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x):
            return nn.functional.linear(x, self.inner.weight)

    model = nn.Sequential(Reader(), nn.MultiheadAttention(16, 2), nn.Linear(16, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity = sparsify_(model, "4:8-T", mode="static", include="*").attach(optimizer)
    model[0](torch.randn(2, 16))
    model.load_state_dict({key: torch.randn_like(value) for key, value in model.named_parameters()}, strict=False)
    model[0](torch.randn(2, 16))
    model[1](*[torch.randn(3, 16)] * 3)
    broken = {layer.name for layer in sparsity.layers if bool(layer.weight[~layer.mask].any())}
    assert broken == {"2"}, "only what was not called"


def test_an_attached_run_is_freed_with_its_model_and_optimizer(mlp, step):
    mlp = copy.deepcopy(mlp)  # the fixture holds the original
    optimizer, sparsity = attached(mlp)
    kept = [weakref.ref(one) for one in (mlp, optimizer, sparsity, mlp[0].weight)]
    step(mlp, optimizer, 0)
    del mlp, optimizer, sparsity
    gc.collect()
    assert [one() for one in kept] == [None] * 4


def test_writes_through_data_are_seen_in_whichever_columns_they_are(mlp, step):
    mask = torch.tensor([False, False, True, True]).repeat(32, 4)
    sparsity = sparsify_(mlp, "2:4", mode="static", include="0", masks={"0": mask})
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    step(mlp, optimizer, 0)
    mlp[0].weight.data[:, [1, 4, 5, 9, 12, 13]] = 1.0
    mlp(torch.randn(2, 16))
    assert bool((mlp[0].weight[~mask] == 0).all())
