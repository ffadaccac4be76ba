"""peft's LoRA layers under the mask: peft's own merge, ours, and the trained model agree, and the pattern holds."""

import copy

import pytest
import torch
from torch import nn

from bisparse import PatternError, prune_, sparsify_, verify
from bisparse.training import mask_lora_, merge_lora_

peft = pytest.importorskip("peft")


class Two(nn.Module):
    def __init__(self, kind: str = "linear") -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        if kind == "linear":
            self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
        else:
            from transformers.pytorch_utils import Conv1D

            self.first, self.second = Conv1D(32, 16), Conv1D(16, 32)
            for module in (self.first, self.second):
                module.weight.data.normal_(std=0.2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(self.embedding(ids))))


def adapted(kind="linear", prune=True, targets=("first", "second"), **how):
    torch.manual_seed(0)
    model = Two(kind)
    if prune:
        prune_(model, "4:8-T", include=["first", "second"])
    config = peft.LoraConfig(target_modules=list(targets), r=4, lora_alpha=8, fan_in_fan_out=kind == "conv1d", **how)
    return peft.get_peft_model(model, config)


def train(model, steps=5):
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, 12, (8, 3), generator=generator)
        (model(ids) - torch.randn(8, 3, 16, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


IDS = torch.arange(12).view(4, 3)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(
    "how", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.2}, {"use_dora": True, "lora_dropout": 0.2}]
)
def test_both_merges_give_the_trained_model(kind, how):
    model = adapted(kind, **how)
    base = {name: value.clone() for name, value in model.state_dict().items() if "base_layer.weight" in name}
    assert mask_lora_(model, "4:8-T") == ["base_model.model.first", "base_model.model.second"]
    train(model)
    with torch.no_grad():
        expected = model.eval()(IDS)
        ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
        records = merge_lora_(ours, "4:8-T")
        assert all(one.lost == 0 for one in records)
        assert torch.allclose(ours(IDS), expected, atol=1e-5)
        plain = ours.unload()
        assert torch.allclose(plain(IDS), expected, atol=1e-5)
        merged = theirs.merge_and_unload()
        assert torch.allclose(merged(IDS), expected, atol=1e-5)
    for one in (plain, merged):
        weights = one.first.weight, one.second.weight
        assert all(verify(weight.T if kind == "conv1d" else weight, "4:8-T") for weight in weights)
        for name, value in base.items():
            assert bool((one.get_parameter(f"{name.split('.')[2]}.weight")[value == 0] == 0).all())
    assert not torch.allclose(expected, adapted(kind)(IDS), atol=1e-2)


def test_dropout_is_that_of_peft_and_unmerging_returns():
    model = adapted(lora_dropout=0.5)
    for one in model.modules():
        if hasattr(one, "lora_B"):
            nn.init.normal_(one.lora_B["default"].weight)
    whole = copy.deepcopy(model)
    for one in whole.modules():  # a mask that keeps everything, so that nothing is different from peft
        if hasattr(one, "lora_B"):
            one.base_layer.weight.data.normal_()
    masked = copy.deepcopy(whole)
    mask_lora_(masked, "8:8")
    outputs = []
    for one in (whole, masked):
        torch.manual_seed(1)
        outputs.append(one.train()(IDS))
    assert torch.allclose(*outputs, atol=1e-4)
    mask_lora_(model, "4:8-T")
    before = model.eval()(IDS)
    model.merge_adapter()
    assert torch.allclose(model(IDS), before, atol=1e-4)
    model.unmerge_adapter()
    assert torch.allclose(model(IDS), before, atol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(model(IDS), before, atol=1e-2)


def test_a_static_run_below_the_adapters_gives_the_mask():
    model = adapted()
    sparsify_(model.base_model.model, "4:8-T", mode="static", masks="nonzero", include=["first.base_layer", "second.base_layer"])
    base = model.base_model.model.first.base_layer
    kept = base.weight_mask.mask.clone()
    with torch.no_grad():  # kept, and zero for now
        row, column = kept.nonzero()[0]
        base.weight[row, column] = 0
    mask_lora_(model, "4:8-T")
    train(model)
    merge_lora_(model, "4:8-T")
    assert base.weight[row, column] != 0 and bool((base.weight[~kept] == 0).all())


@pytest.mark.parametrize(
    "how, message",
    [
        ({"init_lora_weights": "pissa"}, "PiSSA"),
        ({"init_lora_weights": "olora"}, "OLoRA"),
        ({"prune": False}, "exclude="),
        ({"targets": ("first", "embedding")}, "embedding"),
        ({"lora_bias": True}, "bias"),
    ],
)
def test_what_cannot_keep_the_mask_is_refused_before_anything_is_changed(how, message):
    model = adapted(**how)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(PatternError if "init" in str(how) or "prune" in how else ValueError, match=message):
        mask_lora_(model, "4:8-T")
    assert [type(module) for module in model.modules()] == kinds


def test_more_refusals():
    model = adapted(targets=("first", "embedding"))
    assert mask_lora_(model, "4:8-T", exclude="*embedding*") == ["base_model.model.first"]
    with pytest.raises(ValueError, match="already"):
        mask_lora_(model, "4:8-T", exclude="*embedding*")
    merged = adapted()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        mask_lora_(merged, "4:8-T")
    with pytest.raises(ValueError, match="no LoRA layer"):
        mask_lora_(nn.Linear(4, 4), "4:8-T")
    own = adapted()
    mask_lora_(own, "4:8-T")
    with pytest.raises(ValueError, match="new_mask"):
        merge_lora_(own, "4:8-T", new_mask=True)
    two = adapted(lora_dropout=0.1)
    two.add_adapter("other", peft.LoraConfig(target_modules=["first", "second"], r=2, lora_dropout=0.1))
    mask_lora_(two, "4:8-T")
    two.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="lora_dropout=0"):
        two.train()(IDS)


def test_adapters_of_tied_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False))
    model[2].weight = model[0].weight
    prune_(model, "2:4-T")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "2"], r=2))
    before = copy.deepcopy(adapted.state_dict())
    with pytest.raises(ValueError, match="is tied to"):
        mask_lora_(adapted, "2:4-T")
    assert all(torch.equal(before[name], one) for name, one in adapted.state_dict().items())
