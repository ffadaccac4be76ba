"""Nothing is left of a call that fails: a model, its hooks and the random numbers are what they were, bit for bit."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import bisparse
from attack import steps
from bisparse.checkpoint import CheckpointError, load
from bisparse.pruning import (
    AdaPrune,
    BlockReconstruction,
    GradientAdaPrune,
    Magnitude,
    Method,
    fold_batch_norms_,
    permute_,
    reestimate_batch_norms_,
)
from bisparse.rollback import Rollback

LAYERS = 4


class Stop(BaseException):
    """No Exception, as KeyboardInterrupt: nothing catches it by accident."""


class Net(nn.Module):
    """A chain of blocks with batch norms, a dropout, a frozen parameter, a gradient, and a NaN that nobody prunes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.Dropout(0.1))
            for _ in range(2)
        )
        self.unused = nn.Parameter(torch.tensor([float("nan"), -0.0]))
        self.blocks[0][0].weight.requires_grad_(False)
        self.blocks[1][3].weight.grad = torch.ones(16, 16)
        self.blocks[1][0].register_forward_hook(lambda *_: None)
        self.blocks[1][3].eval()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def bits(tensor: Tensor | None) -> Any:
    return (
        None
        if tensor is None
        else (tensor.dtype, tuple(tensor.shape), tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    )


def everything(model: nn.Module) -> Any:
    """All that a user could see of a model, and the next random number."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: (id(one), one.data_ptr(), bits(one), one.requires_grad, bits(one.grad)) for name, one in tensors.items()},
        list(model.state_dict()),
        [
            (name, type(one), one.training, tuple(one._forward_hooks), tuple(one._forward_pre_hooks), sorted(vars(one)))
            for name, one in model.named_modules()
        ],
        bits(torch.get_rng_state()),
    )


def net() -> tuple[Net, list[Tensor]]:
    torch.manual_seed(0)
    return Net(), [torch.randn(12, 16) for _ in range(6)]


class FailsAt(Method):
    """Another method that raises, or returns what cannot be written, at its k-th layer."""

    def __init__(self, of: Method, at: int, how: str) -> None:
        self.of, self.at, self.how, self.count = of, at, how, 0

    def __repr__(self) -> str:
        return repr(self.of)

    @property
    def needs(self):
        return self.of.needs

    def prune(self, problem):
        self.count += 1
        pruned = self.of.prune(problem)
        if self.count != self.at:
            return pruned
        if self.how == "raises":
            raise Stop
        weight = problem.weight.clone()
        weight.view(-1)[3] = float("nan")
        return bisparse.pruning.Pruned(pruned.solution, weight)


@pytest.mark.parametrize("at", range(1, LAYERS + 1))
@pytest.mark.parametrize("how", ["raises", "returns NaN"])
@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("inner", [Magnitude(), AdaPrune(), GradientAdaPrune(steps=2)], ids=lambda one: one.name)
@pytest.mark.parametrize("job", [bisparse.prune_, bisparse.convert_])
def test_a_method_that_fails_at_any_layer(job: Callable[..., Any], inner: Method, order: str, how: str, at: int) -> None:
    model, batches = net()
    before = everything(model)
    with pytest.raises((Stop, ValueError)):
        job(model, "2:4", FailsAt(inner, at, how), batches if inner.needs else None, order=order)
    assert everything(model) == before


@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("batches_given", [False, True])
def test_a_write_that_fails_at_any_tensor(order: str, batches_given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = net()
    before, copy_ = everything(model), Tensor.copy_
    live = {id(one) for one in (*model.parameters(), *model.buffers())}
    failed = 0
    for at in range(1, 20):
        writes = 0

        def failing(self: Tensor, *args: Any, at: int = at, **kwargs: Any) -> Tensor:
            nonlocal writes
            writes += id(self) in live
            if writes == at and id(self) in live:
                copy_(self, torch.full_like(self, 7))  # half done
                raise Stop
            return copy_(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, "copy_", failing)
        try:
            bisparse.prune_(model, "2:4", AdaPrune() if batches_given else None, batches if batches_given else None, order=order)
        except Stop:
            failed += 1
        else:
            monkeypatch.undo()
            break
        monkeypatch.undo()
        assert everything(model) == before, f"write {at}"
    # A weight per layer and its bias, which with data may be the running mean of a batch norm.
    assert failed == (2 * LAYERS if batches_given else LAYERS + 2)


@pytest.mark.parametrize("at", range(LAYERS))
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2, torch.complex64])
@pytest.mark.parametrize("job", [bisparse.prune_, bisparse.convert_, bisparse.sparsify_])
def test_a_weight_of_a_dtype_that_cannot_be_pruned(job: Callable[..., Any], dtype: torch.dtype, at: int) -> None:
    model, _ = net()
    module = [one for one in model.modules() if isinstance(one, nn.Linear)][at]
    module.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.uint8).view(dtype), requires_grad=False)
    before = everything(model)
    try:
        report = job(model, "2:4-T")
    except ValueError as error:
        assert "blocks." in str(error) and "float" in str(error)
        assert everything(model) == before
    else:
        assert any("type" in left.reason for left in getattr(report, "left_dense", None) or report.skipped)


@pytest.mark.parametrize("device", ["meta", "no such device"])
@pytest.mark.parametrize("method", [AdaPrune(), Magnitude()], ids=lambda one: one.name)
def test_a_device_that_holds_no_numbers(device: str, method: Method) -> None:
    model, batches = net()
    before = everything(model)
    with pytest.raises(ValueError, match=f"device='{device}'"):
        bisparse.prune_(model, "2:4", method, batches, device=device)
    assert everything(model) == before


@pytest.mark.parametrize("at", range(1, 40, 3))
def test_a_forward_pass_that_fails_at_any_call(at: int) -> None:
    _, batches = net()
    calls = 0

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        torch.rand(1)
        if calls == at:
            raise Stop
        return model(batch)

    jobs: list[Callable[[nn.Module], Any]] = [
        lambda one: bisparse.prune_(one, "2:4", AdaPrune(), batches, forward=forward),
        lambda one: reestimate_batch_norms_(one, batches, forward=forward),
        lambda one: fold_batch_norms_(one, batches[0], forward=forward),
        lambda one: permute_(one, "2:4", batches[0], forward=forward, steps=2, rounds=1),
    ]
    for job in jobs:
        calls, model = 0, net()[0]
        before = everything(model)
        try:
            job(model)
        except Stop:
            assert everything(model) == before


def test_a_block_reconstruction_that_fails_at_any_step() -> None:
    model, batches = net()
    before, step = everything(model), torch.optim.Adam.step
    for at in (1, 4, 9):
        taken = 0

        def failing(self: Any, *args: Any, at: int = at) -> Any:
            nonlocal taken
            taken += 1
            if taken == at:
                raise Stop
            return step(self, *args)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            patch.setattr(torch.optim.Adam, "step", failing)
            bisparse.prune_(model, "2:4", AdaPrune(), batches, reconstruction=BlockReconstruction(epochs=4))
        assert everything(model) == before


@pytest.mark.parametrize("at", range(1, LAYERS + 1))
@pytest.mark.parametrize("options", [{}, {"mvue": True}, {"mode": "static"}, {"mode": "static", "mvue": True}], ids=str)
def test_sparse_training_that_fails_to_begin_at_any_layer(options: dict[str, Any], at: int) -> None:
    model, _ = net()
    before, count = everything(model), 0

    def score(name: str, weight: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count == at:
            raise Stop
        return weight.abs()

    with pytest.raises(Stop):
        bisparse.sparsify_(model, "2:4-T", score=score, **options)
    assert everything(model) == before
    name = "__setattr__"
    original, seen = getattr(nn.Module, name), 0

    def failing(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        nonlocal seen
        seen += 1
        original(self, *args, **kwargs)
        if seen == at:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(nn.Module, name, failing)
        bisparse.sparsify_(model, "2:4-T", **options)
    assert everything(model) == before
    sparsity = bisparse.sparsify_(model, "2:4-T", **options)
    assert len(sparsity.layers) == LAYERS
    bisparse.finalize_(model)


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("fault", ["float4", "unreadable"])
def test_a_checkpoint_that_cannot_be_loaded(fault: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList(nn.Linear(16, 8, bias=False) for _ in range(3))
    tensors = {f"{i}.weight": torch.randn(8, 16) for i in range(3)}
    if fault == "float4":
        tensors[f"{at}.weight"] = torch.randint(0, 255, (8, 16), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    try:
        save_file(tensors, tmp_path / "model.safetensors")
    except (KeyError, ValueError, RuntimeError):
        pytest.skip("this safetensors writes no float4")
    if fault == "unreadable":
        copy_, count = Tensor.copy_, 0

        def failing(self: Tensor, *args: Any) -> Tensor:
            nonlocal count
            count += 1
            if count == at + 1:
                raise Stop
            return copy_(self, *args)

        monkeypatch.setattr(Tensor, "copy_", failing)
    before = everything(model)
    with pytest.raises((CheckpointError, Stop)):
        load(model, tmp_path)
    monkeypatch.undo()
    assert everything(model) == before


class Computed(nn.Linear):
    """A live layer of another library's: its weight is made of the parameter at each access."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self._parameters["weight"])
        nn.init.zeros_(self._parameters["bias"])

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found * 2 if name == "weight" and isinstance(found, Tensor) else found


@pytest.mark.parametrize("job", [bisparse.prune_, bisparse.convert_, bisparse.sparsify_])
def test_a_computed_weight_is_refused(job: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(16, 16), Computed(16, 16))
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(ValueError, match="1: its weight is computed by Computed at each access"):
        job(model, "2:4")
    assert all(torch.equal(before[name], one) for name, one in model.named_parameters())


def test_a_computed_weight_stays_as_it_is_when_others_are_accelerated() -> None:
    model = nn.Sequential(nn.Linear(64, 64), Computed(64, 64)).eval()
    bisparse.prune_(model, "2:4-T", exclude="1")
    report = bisparse.accelerate_(model, "reference")
    assert [one.name for one in report.layers] == ["0"] and type(model[1]) is Computed


def test_what_is_written_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = net()
    before, copy_ = everything(model), Tensor.copy_
    last = id(model.blocks[1][3].weight)
    written = []

    def rounding(self: Tensor, new: Tensor, *args: Any) -> Tensor:
        if id(self) == last and not written:
            written.append(True)
            return copy_(self, new * 1.001)
        return copy_(self, new, *args)

    monkeypatch.setattr(Tensor, "copy_", rounding)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.3: its weight differs from what was written"):
        bisparse.prune_(model, "2:4")
    monkeypatch.undo()
    assert everything(model) == before


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_done_to_a_model_is_undone(seed: int) -> None:
    model, _ = net()
    before = everything(model)
    choose = random.Random(seed)
    with pytest.raises(Stop), Rollback(model) as rollback:
        for _ in range(6):
            module = choose.choice(list(model.modules()))
            action = choose.randrange(7)
            if action == 0:
                module.train(not module.training)
            elif action == 1:
                module.register_forward_pre_hook(lambda *_: None)
            elif action == 2:
                module.register_buffer("more", torch.ones(1))
            elif action == 3:
                module.marker = "set"
            elif action == 4:
                for one in module.parameters():
                    rollback.touch(one)
                    one.data.normal_()
                    one.requires_grad_(not one.requires_grad)
                    one.grad = None
            elif action == 5 and list(module.named_children()):
                setattr(module, next(iter(dict(module.named_children()))), nn.Identity())
            else:
                torch.rand(3)
        raise Stop
    assert everything(model) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["setter", "deleter", "write", "masked", "hook"])
@pytest.mark.parametrize(
    "job", ["finalize_", "finalize_ static", "merge_lora_", "merge_lora_ new mask", "sparsify_", "sparsify_ mvue"]
)
def test_a_merge_or_an_end_that_fails_at_any_step(job: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = steps.Net()
    steps.BEFORE.get(job, lambda _: None)(model)
    counted = copy.deepcopy(model)
    with steps.failing(steps.POINTS[kind], -1, Stop, False) as count:
        steps.JOBS[job](counted, [], tmp_path)
    for at in range(1, count[0] + 1, 1 + count[0] // 6):
        tried = copy.deepcopy(model)
        held, before = dict(tried.named_parameters()), steps.everything(tried)
        with steps.failing(steps.POINTS[kind], at, Stop, at % 2 == 0), pytest.raises(Stop):
            steps.JOBS[job](tried, [], tmp_path)
        assert steps.everything(tried) == before, f"step {at}"
        assert all(one is held[name] for name, one in tried.named_parameters())


@pytest.mark.parametrize("order", [("whole", "part"), ("part", "whole"), ("part", "other"), ("same", "part")])
def test_tensors_that_share_memory_are_restored_whatever_was_touched_when(order: tuple[str, str]) -> None:
    storage = torch.arange(12.0)
    views = {"whole": storage, "part": storage[2:7], "other": storage[5:9], "same": storage.view(3, 4)}
    try:
        with Rollback() as rollback:
            for number, name in enumerate(order):
                rollback.touch(views[name])
                views[name].fill_(-1.0 - number)
            raise Stop
    except Stop:
        pass
    assert torch.equal(storage, torch.arange(12.0))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lists what is mapped")
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("call", ["magnitude", "wanda", "static", "convert"])
def test_weights_that_are_mapped_read_only_are_refused_before_the_process_would_end(tmp_path, call):
    numpy.save(tmp_path / "weight.npy", torch.randn(16, 16).numpy())
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    model[0].weight.data = torch.from_numpy(numpy.load(tmp_path / "weight.npy", mmap_mode="r"))
    calls = {
        "magnitude": lambda: bisparse.prune_(model, "2:4"),
        "wanda": lambda: bisparse.prune_(model, "2:4", "wanda", [torch.randn(4, 16)]),
        "static": lambda: bisparse.sparsify_(model, "2:4", mode="static"),
        "convert": lambda: bisparse.convert_(model, "2:4"),
    }
    with pytest.raises(ValueError, match="mapped read-only"):
        calls[call]()
    model[0].weight.data = model[0].weight.data.clone()
    calls[call]()


def test_what_is_restored_does_not_depend_on_what_cannot_be_set() -> None:
    with torch.inference_mode():
        other = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), other)
    before = model[0].weight.detach().clone()
    with pytest.raises(KeyError), Rollback(model) as rollback:
        rollback.touch(model[0].weight)
        model[0].weight.data.zero_()
        raise KeyError
    assert torch.equal(model[0].weight, before)
