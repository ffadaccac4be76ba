"""Results do not depend on torch's global settings: autocast, default dtype and device, matmul precision, modes of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn

import bisparse
from bisparse.checkpoint import detect_patterns, load, load_masks, prune_checkpoint, save, verify_checkpoint
from bisparse.pruning import (
    ALPS,
    AdaPrune,
    BiasCorrection,
    BlockReconstruction,
    GradientAdaPrune,
    Magnitude,
    MatchMoments,
    MeanAbsorption,
    NetworkReconstruction,
    SparseGPT,
    Wanda,
    fold_batch_norms_,
    permute_,
    reestimate_batch_norms_,
    violation,
)
from bisparse.quantization import quantize_
from bisparse.solvers import SOLVERS
from bisparse.training import add_masked_lora_, merge_lora_

SEED = torch.Generator().manual_seed(0)
INPUTS = [torch.randn(24, 32, generator=SEED, dtype=torch.float64) for _ in range(5)]
IMAGES = [torch.randn(4, 4, 8, 8, generator=SEED, dtype=torch.float64) for _ in range(5)]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(), Residual()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def network() -> nn.Module:
    """In float64, which autocast leaves alone: what a forward pass computes is the same with and without it."""
    torch.manual_seed(0)
    return Chain().double().eval()


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)).double().eval()


def sparse() -> nn.Module:
    model = network()
    bisparse.prune_(model, "4:8")
    return model


def pruned(method: bisparse.Method, **options: object) -> Callable[[nn.Module], object]:
    return lambda model: bisparse.prune_(model, "2:4-T", method, INPUTS, **options)  # type: ignore[arg-type]


def trained(mode: str, method: str = "masked-decay") -> Callable[[nn.Module], object]:
    def run(model: nn.Module) -> None:
        optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-2)
        sparsity = bisparse.sparsify_(model, "2:4-T", mode=mode, method=method, refresh=1).attach(optimizer)  # type: ignore[arg-type]
        with torch.enable_grad():
            for inputs in INPUTS:
                model(inputs).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        sparsity.report()
        bisparse.finalize_(model)

    return run


def merged(**options: bool) -> Callable[[nn.Module], object]:
    def run(model: nn.Module) -> None:
        bisparse.prune_(model, "2:4-T")
        parameters = add_masked_lora_(model, "2:4-T", rank=4, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            for number, one in enumerate(parameters):
                generator = torch.Generator().manual_seed(number)
                one.copy_(torch.randn(one.shape, dtype=torch.float64, device="cpu", generator=generator))
        merge_lora_(model, "2:4-T")

    return run


def solved(solver: str) -> Callable[[nn.Module], object]:
    def run(model: nn.Module) -> None:
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.data.copy_(bisparse.solve(weight.detach().float().abs(), "2:4-T", solver=solver).mask)

    return run


def with_budget(model: nn.Module) -> object:
    return bisparse.prune_(
        model, budget="60%", patterns=["2:4-T", "6:8-T", "dense"], method="adaprune", batches=INPUTS, include="*"
    )


JOBS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "magnitude": (network, pruned(Magnitude())),
    "wanda": (network, pruned(Wanda())),
    "sparsegpt": (network, pruned(SparseGPT())),
    "sparsegpt refitted": (network, pruned(SparseGPT(refit=True, correct_upstream=True))),
    "adaprune": (network, pruned(AdaPrune())),
    "adaprune parallel": (network, pruned(AdaPrune(), order="parallel")),
    "adaprune by gradients": (network, pruned(GradientAdaPrune(steps=5))),
    "alps": (network, pruned(ALPS())),
    "mean absorption": (network, pruned(MeanAbsorption(Magnitude()))),
    "bias correction": (network, pruned(BiasCorrection(Magnitude()))),
    "moments": (network, pruned(MatchMoments(Magnitude()))),
    "blocks": (network, pruned(AdaPrune(), reconstruction=BlockReconstruction(epochs=2))),
    "network": (network, pruned(Magnitude(), reconstruction=NetworkReconstruction(epochs=2))),
    "convolutions": (convolutions, lambda model: bisparse.prune_(model, "2:4", AdaPrune(), IMAGES, include="*")),
    "convolutions, moments": (
        convolutions,
        lambda model: bisparse.prune_(model, "2:4", MatchMoments(Magnitude()), IMAGES, include="*"),
    ),
    "convert": (sparse, lambda model: bisparse.convert_(model, "2:4-T", batches=INPUTS, regrow=True)),
    "budget": (network, with_budget),
    "permute": (network, lambda model: permute_(model, "2:4", INPUTS[0])),
    "quantize by gptq": (sparse, lambda model: quantize_(model, "int4-g32", data=INPUTS, method="gptq")),
    "quantize by rounding": (sparse, lambda model: quantize_(model, "fp8")),
    "fold batch norms": (convolutions, lambda model: fold_batch_norms_(model, IMAGES[0])),
    "batch norms again": (convolutions, lambda model: reestimate_batch_norms_(model, IMAGES)),
    "dynamic": (network, trained("dynamic")),
    "dynamic, sr-ste": (network, trained("dynamic", "sr-ste")),
    "static": (network, trained("static")),
    "lora": (network, merged()),
    "dora": (network, merged(dora=True)),
    **{f"solve by {name}": (network, solved(name)) for name in SOLVERS},
}


TRAINING = ("dynamic", "static")  # which a caller cannot do in inference mode


def result_of(job: str, setting: Callable[[], AbstractContextManager[object]]) -> Tensor:
    """All weights after the job, which alone runs under the setting."""
    make, act = JOBS[job]
    model = make()
    with setting():
        act(model)
    return torch.cat([one.detach().double().flatten() for one in model.state_dict().values()])


@contextmanager
def changed(get: Callable[[], Any], put: Callable[[Any], object], value: object) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return changed(torch.get_default_dtype, torch.set_default_dtype, dtype)


def matmul_precision(precision: str) -> AbstractContextManager[None]:
    return changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, precision)


def deterministic() -> AbstractContextManager[None]:
    """It also fills new tensors with NaN, so that whatever reads memory that was not written is found."""
    return changed(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True)


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "matmul precision": lambda: matmul_precision("medium"),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "no grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "deterministic": deterministic,
}


@contextmanager
def together(*names: str) -> Iterator[None]:
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(SETTINGS[name]())
        yield


AT_ONCE = {
    "autocast": ("autocast",),
    "default device, float64": ("default device", "default float64"),
    "default bfloat16, matmul precision, no grad, deterministic": (
        "default bfloat16",
        "matmul precision",
        "no grad",
        "deterministic",
    ),
    "inference mode": ("inference mode",),
}
"""Settings that have nothing to do with each other, at once: every job runs fewer times, and one that does not hold is seen."""


@cache
def usual(job: str) -> Tensor:
    return result_of(job, nullcontext)


NEED_GRADIENTS = ("adaprune by gradients", "blocks", "network")
CASES = [(job, setting) for job in JOBS for setting in AT_ONCE if setting != "inference mode" or not job.startswith(TRAINING)]


@pytest.mark.parametrize(("job", "setting"), CASES)
def test_a_result_is_the_same_under_every_global_setting(job: str, setting: str) -> None:
    if setting == "inference mode" and job in NEED_GRADIENTS:
        with pytest.raises(ValueError, match="needs gradients"):
            result_of(job, lambda: together(*AT_ONCE[setting]))
        return
    assert torch.equal(result_of(job, lambda: together(*AT_ONCE[setting])), usual(job))


@pytest.mark.parametrize("reconstruction", [None, BlockReconstruction(epochs=2)])
def test_changed_weights_are_seen_inside_an_autocast_of_the_caller(reconstruction: BlockReconstruction | None) -> None:
    """Autocast keeps its casts of weights until it ends, whatever happens to the weights meanwhile."""

    torch.manual_seed(0)
    once, always = Chain().eval(), Chain().eval()
    always.load_state_dict(once.state_dict())
    inputs = [one.float() for one in INPUTS]
    for model, keeps in ((once, False), (always, True)):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps):
            bisparse.prune_(model, "2:4-T", AdaPrune(), inputs, reconstruction=reconstruction)
    for name, weight in once.state_dict().items():
        assert torch.equal(weight, always.state_dict()[name]), name


@pytest.mark.parametrize("act", ["prune", "fit", "finalize", "load", "quantize"])
def test_a_caller_sees_changed_weights_in_the_rest_of_its_autocast(act: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Chain().eval(), INPUTS[0].float()
    other = Chain().eval()
    save(other, tmp_path / "other", report=bisparse.prune_(other, "2:4"))
    acts: dict[str, Callable[[], object]] = {
        "prune": lambda: bisparse.prune_(model, "2:4"),
        "fit": lambda: bisparse.prune_(model, "2:4", reconstruction=NetworkReconstruction(), batches=[inputs] * 5),
        "finalize": lambda: bisparse.finalize_(model),
        "load": lambda: load(model, tmp_path / "other"),
        "quantize": lambda: quantize_(model, "int8"),
    }
    if act == "finalize":
        bisparse.sparsify_(model, "2:4")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for parameter in model.parameters():
            parameter.requires_grad_(True)  # only such weights have casts that are kept
        model(inputs)
        acts[act]()
        found = model(inputs)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(inputs), found)


def write(folder: Path) -> Path:
    torch.manual_seed(0)
    folder.mkdir()
    save_file({"up.weight": torch.randn(64, 32), "down.weight": torch.randn(32, 64)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def prune_files(folder: Path) -> object:
    prune_checkpoint(folder / "model", folder / "out", "4:8-T")
    patterns = [str(one) for one in detect_patterns(folder / "out")]
    return patterns, verify_checkpoint(folder / "out").message, (folder / "out" / "model.safetensors").read_bytes()


def prune_files_unstructured(folder: Path) -> object:
    prune_checkpoint(folder / "model", folder / "out", "50%")
    return (folder / "out" / "model.safetensors").read_bytes()


def save_and_load(folder: Path) -> object:
    with torch.device("cpu"):
        model, other = (nn.Linear(16, 16, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        model.weight.copy_(torch.arange(256.0, device="cpu").view(16, 16))
        model.bias.fill_(1)
    save(model, folder / "saved", report=bisparse.prune_(model, "2:4-T", include="*"))
    load(other, folder / "saved")
    kept = [int(mask.sum()) for mask in load_masks(folder / "saved").values()]
    return other.weight.tolist(), kept, (folder / "saved" / "model.safetensors").read_bytes()


def look_at_a_distributed_checkpoint(folder: Path) -> object:
    state = {"up.weight": torch.arange(512.0, dtype=torch.float32, device="cpu").view(16, 32)}
    with torch.device("cpu"):
        dcp.save(state, checkpoint_id=str(folder / "dcp"))
    return verify_checkpoint(folder / "dcp", "2:4").message


def measure_a_violation(folder: Path) -> object:
    mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu") < 0.5
    return str(violation(mask, "4:8-T"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", ["default device", "default bfloat16", "autocast", "deterministic"])
@pytest.mark.parametrize(
    "act",
    [prune_files, prune_files_unstructured, save_and_load, look_at_a_distributed_checkpoint, measure_a_violation],
)
def test_files_are_the_same_under_every_global_setting(act: Callable[[Path], object], setting: str, tmp_path: Path) -> None:
    places = [tmp_path / "usual", tmp_path / "under"]
    for place in places:
        place.mkdir()
        write(place / "model")
    expected = act(places[0])
    with SETTINGS[setting]():
        assert act(places[1]) == expected
