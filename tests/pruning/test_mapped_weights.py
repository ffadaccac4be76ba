"""Weights mapped from a file stay mapped when a job writes them: the same results, without the model in memory."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from bisparse import prune_, save, verify_checkpoint
from bisparse.memory_map import mapped_ids
from bisparse.pruning import BlockReconstruction

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lists what is mapped")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Chain(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def mapped(folder: Path, width: int = 32, depth: int = 3) -> Chain:
    """A model whose weights are mapped, as transformers loads them."""
    torch.manual_seed(0)
    path = folder / "model.safetensors"
    if not path.exists():
        save_file(Chain(width, depth).state_dict(), path)
    with torch.device("meta"):
        model = Chain(width, depth)
    with safe_open(path, framework="pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, assign=True)  # noqa: SIM118
    return model.eval()


def is_mapped(tensor: torch.Tensor) -> bool:
    return bool(mapped_ids([tensor]))


def in_memory(model: nn.Module) -> nn.Module:
    twin = Chain(model.layers[0].up.in_features, len(model.layers)).eval()
    twin.load_state_dict(model.state_dict())
    return twin


BATCHES = [torch.randn(8, 32, generator=torch.Generator().manual_seed(number)) for number in range(4)]


@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "adaprune"])
def test_results_are_those_of_a_model_in_memory(tmp_path, method, order):
    model = mapped(tmp_path)
    twin, parameters = in_memory(model), dict(model.named_parameters())
    expected = prune_(twin, "2:4-T", method, BATCHES, order=order)
    report = prune_(model, "2:4-T", method, BATCHES, order=order)
    assert all(own is parameters[name] for name, own in model.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, twin.get_parameter(name))
        assert is_mapped(weight)
    assert [one.error for one in report] == [one.error for one in expected]
    save(model, tmp_path / "out", report=report)
    assert verify_checkpoint(tmp_path / "out", "2:4-T")
    assert all(torch.equal(own, mapped(tmp_path).get_parameter(name)) for name, own in mapped(tmp_path).named_parameters())


def test_blocks_are_fitted_and_mapped_again(tmp_path):
    model = mapped(tmp_path)
    twin = in_memory(model)
    for one in (model, twin):
        prune_(one, "2:4", "wanda", BATCHES, reconstruction=BlockReconstruction(epochs=1))
    for name, weight in model.named_parameters():
        assert torch.equal(weight, twin.get_parameter(name)) and is_mapped(weight), name


def test_an_error_brings_back_the_files_of_before_and_the_job_resumes(tmp_path):
    model, twin = mapped(tmp_path), in_memory(mapped(tmp_path))
    before = {name: one.data_ptr() for name, one in model.named_parameters()}
    calls = 0

    def forward(own: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise KeyboardInterrupt
        return own(batch)

    stop = 10**9
    prune_(twin, "4:8-T", "sparsegpt", BATCHES, forward=forward)
    stop, calls = calls * 2 // 3, 0
    with pytest.raises(KeyboardInterrupt):
        prune_(model, "4:8-T", "sparsegpt", BATCHES, forward=forward, resume=tmp_path / "journal")
    assert {name: one.data_ptr() for name, one in model.named_parameters()} == before
    assert all(torch.equal(one, mapped(tmp_path).get_parameter(name)) for name, one in model.named_parameters())
    stop = 10**9
    prune_(model, "4:8-T", "sparsegpt", BATCHES, forward=forward, resume=tmp_path / "journal")
    assert all(torch.equal(one, twin.get_parameter(name)) for name, one in model.named_parameters())


def test_weights_that_share_their_memory_keep_sharing_it(tmp_path):
    model = mapped(tmp_path)
    model.layers[1].up.weight = nn.Parameter(model.layers[0].up.weight.data)  # another object, the same memory
    prune_(model, "2:4", "wanda", BATCHES)
    assert model.layers[1].up.weight.data_ptr() == model.layers[0].up.weight.data_ptr()
    assert is_mapped(model.layers[0].down.weight)


def transposed_buffer(weight: nn.Parameter) -> nn.Module:
    holder = nn.Module()
    holder.register_buffer("view", weight.detach().t())
    return holder


def part_of_attribute(weight: nn.Parameter) -> nn.Module:
    holder = nn.Module()
    holder.views = [weight.detach()[3:5].t()]
    return holder


def read_again_from_the_file(weight: nn.Parameter) -> nn.Module:
    holder = nn.Module()
    storage = weight.untyped_storage()[: weight.nbytes // 2]  # another storage in the same memory
    holder.register_buffer("view", torch.tensor([], dtype=weight.dtype).set_(storage).view(-1, weight.shape[1]).t())
    return holder


@pytest.mark.parametrize("held", [transposed_buffer, part_of_attribute, read_again_from_the_file])
def test_views_of_a_weight_see_what_is_written_to_it_as_in_memory(tmp_path, held):
    model = mapped(tmp_path)
    weight = model.layers[0].up.weight
    model.add_module("holder", held(weight))
    view = model.holder.views[0] if hasattr(model.holder, "views") else model.holder.view
    before = view.t().clone()
    prune_(model, "2:4", "wanda", BATCHES)
    start = 3 if view.shape[1] == 2 else 0
    assert torch.equal(view.t(), weight[start : start + view.shape[1]])
    assert not torch.equal(view.t(), before)
    assert model.layers[0].down.weight.data_ptr() != mapped(tmp_path).layers[0].down.weight.data_ptr()
    assert is_mapped(model.layers[0].down.weight)


def test_gradients_of_an_earlier_graph_are_refused_as_in_memory(tmp_path):
    """A graph that keeps the parameter itself, and would take the new values for the old ones."""

    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            ctx.save_for_backward(weight)
            return weight.square().sum()

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient * ctx.saved_tensors[0]

    model = mapped(tmp_path)
    for one in (in_memory(model), model):
        loss = Squared.apply(one.layers[0].up.weight)
        prune_(one, "2:4", "wanda", BATCHES)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_other_weights_are_written_in_place(tmp_path):
    model = in_memory(mapped(tmp_path))
    before = {name: one.data_ptr() for name, one in model.named_parameters()}
    prune_(model, "2:4", "wanda", BATCHES)
    assert {name: one.data_ptr() for name, one in model.named_parameters()} == before
    assert not any(map(is_mapped, model.parameters()))
    assert not is_mapped(torch.empty(0)) and not is_mapped(torch.empty(2, device="meta"))


def test_a_model_that_was_pruned_in_inference_mode_can_be_trained(tmp_path):
    model = mapped(tmp_path)
    with torch.inference_mode():
        prune_(model, "2:4", "wanda", BATCHES)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.layers[0].up.weight.detach().clone()
    model(BATCHES[0]).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.layers[0].up.weight, before)


def test_the_memory_is_that_of_some_layers(tmp_path):
    def private() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    model = mapped(tmp_path, 512, 16)
    size = sum(one.nbytes for one in model.parameters())
    assert size > 64 * 2**20
    batches = [torch.randn(4, 512)]
    prune_(model.layers[0], "2:4", "wanda", batches)  # what is compiled and imported is no matter of the weights
    before = private()
    prune_(model, "2:4", "wanda", batches)
    assert private() - before < size / 3


@pytest.mark.parametrize("name", ["w\x0c7f00-7fff r-.bin", "x\u2028y.bin", "line\x85.bin", "ret\rurn.bin"])
def test_files_of_any_name_are_mapped_and_pruned(tmp_path, name):
    model = mapped(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with safe_open(tmp_path / name, framework="pt") as file:
        model.load_state_dict({one: file.get_tensor(one) for one in file.keys()}, assign=True)  # noqa: SIM118
    assert all(map(is_mapped, model.parameters()))
    prune_(model, "2:4", "wanda", BATCHES)
    prune_(model, "2:4")
