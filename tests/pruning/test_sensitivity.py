"""How much a network's output depends on its layers: against changes of their outputs, and what is left as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bisparse import prune_
from bisparse.layers import find_layers
from bisparse.pruning.sensitivity import output_sensitivity

NETWORKS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Sequential(nn.Linear(8, 12), nn.ReLU(inplace=True), nn.Linear(12, 6)), torch.randn(200, 8)),
    "sequence": (nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)), torch.randn(50, 7, 8)),
    "convolution": (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Flatten(),
            nn.Linear(72, 5),
        ),
        torch.randn(60, 3, 8, 8),
    ),
    "transposed": (nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Tanh(), nn.Conv1d(6, 3, 2)), torch.randn(80, 4, 9)),
    "Conv1D": (nn.Sequential(Conv1D(12, 8), nn.Tanh(), Conv1D(6, 12)), torch.randn(200, 8)),
}  # fmt: skip


def changed_by(model: nn.Module, name: str, inputs: Tensor, size: float, channels: Tensor) -> float:
    """The squared change of the outputs, all together, where some channels of a layer's outputs change at random."""
    module, total, draws = model.get_submodule(name), 0.0, 30
    kernel = module.weight.ndim - 2 if hasattr(module, "stride") else 0
    sizes = (size * channels).view(-1, *(1,) * kernel)
    with torch.no_grad():
        before = model(inputs)
        for _ in range(draws):
            handle = module.register_forward_hook(lambda _, args, output: output + sizes * torch.randn_like(output))
            total += float((model(inputs) - before).square().sum())
            handle.remove()
    return total / draws


@pytest.mark.parametrize("kind", NETWORKS)
def test_it_is_how_much_outputs_change_with_a_layers(kind: str) -> None:
    model, inputs = NETWORKS[kind]
    layers, _ = find_layers(model, ["*"])
    assert len(layers) >= 2
    found = output_sensitivity(model, layers, inputs.split(20))
    assert isinstance(found, dict)
    size = 1e-3
    for layer in layers:
        half = torch.arange(layer.module.bias.numel()) < layer.module.bias.numel() // 2
        # Of 8 batches at most, all of which have 20 samples.
        own = found[layer.name] / len(range(0, len(inputs.split(20)), -(-len(inputs.split(20)) // 8)))
        for some in (half, ~half):
            expected = changed_by(model, layer.name, inputs[:20], size, some) / size**2
            assert float(own[some].sum()) == pytest.approx(expected, rel=0.3), layer.name


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 10), nn.Linear(10, 7)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.head(self.body(x).tanh()))


def test_of_logits_it_is_twice_the_divergence() -> None:
    """Of small random changes of the logits the expected divergence is half the trace of the softmax's covariance."""
    model, x = Classifier(), torch.randn(4, 300, 6)
    layers, _ = find_layers(model, ["*"])
    found = output_sensitivity(model, layers, [{"x": x}])
    p = model(x).logits.softmax(-1)
    assert isinstance(found, dict)
    trace = (p * (1 - p)).detach().double().sum((0, 1))
    torch.testing.assert_close(found["head"], trace, rtol=0.15, atol=0.0)
    noise = 1e-2 * torch.randn(40, 4, 300, 10)
    with torch.no_grad():
        q = model.head((model.body(x) + noise).tanh()).log_softmax(-1)
    divergence = float((p * (p.log() - q)).sum()) / len(noise)
    assert 0.5 * float(found["body"].sum()) * 1e-4 == pytest.approx(divergence, rel=0.1)


def test_hidden_positions_do_not_count() -> None:
    model, x = Classifier(), torch.randn(4, 50, 6)
    layers, _ = find_layers(model, ["*"])
    mask = torch.ones(4, 50, dtype=torch.long)
    mask[:, 30:] = 0
    found = output_sensitivity(model, layers, [{"x": x, "attention_mask": mask}])
    rest = output_sensitivity(model, layers, [{"x": x[:, :30]}])
    assert isinstance(found, dict) and isinstance(rest, dict)
    for name in rest:
        assert float(found[name].sum()) == pytest.approx(float(rest[name].sum()), rel=0.2)


def test_nothing_of_the_model_changes() -> None:
    model = NETWORKS["linear"][0].train()
    model[0].weight.requires_grad_(False)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    before, random = {name: one.clone() for name, one in model.state_dict().items()}, torch.get_rng_state()
    layers, _ = find_layers(model, ["*"])
    one, other = (output_sensitivity(model, layers, NETWORKS["linear"][1].split(20)) for _ in range(2))
    assert isinstance(one, dict) and isinstance(other, dict)
    assert all(torch.equal(value, other[name]) for name, value in one.items()), "the same each time"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and model.training
    assert [one.requires_grad for one in model.parameters()] == [False, True, True, True]
    assert torch.equal(model[2].weight.grad, torch.ones_like(model[2].weight)) and model[0].weight.grad is None
    assert not any(module._forward_hooks for module in model.modules())
    model[0].weight.requires_grad_(True)
    model[2].weight.grad = None


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class WithoutGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 8)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x).relu())


@pytest.mark.parametrize(("model", "said"), [
    (Attention(), "are not those of one linear"), (WithoutGradients(), "has no gradient"),
    (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)).requires_grad_(False), None),
    (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)).bfloat16(), None),
])  # fmt: skip
def test_where_gradients_cannot_tell_all_layers_are_weighed_alike(model: nn.Module, said: str | None) -> None:
    data = [torch.randn(4, 5, 16).to(next(model.parameters()).dtype) for _ in range(2)]
    report = prune_(model, budget="60%", patterns=["1:4", "2:4", "dense"], batches=data, include=["*"])
    weighed = "with layers weighed by how much the network's output depends on theirs" in report.notes[0]
    assert weighed == (said is None)
    assert said is None or ("with all layers weighed alike" in report.notes[0] and said in report.notes[0])
