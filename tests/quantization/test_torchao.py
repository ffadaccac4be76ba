"""torchao takes pruned models: its int8 path keeps the zeros; its sparse FP8 path needs a Hopper GPU, and is marked so."""

import copy

import pytest
import torch
from torch import nn

import bisparse

torchao = pytest.importorskip("torchao.quantization")


def pruned(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(device, torch.bfloat16).eval()
    bisparse.prune_(model, "2:4", include=["0", "2"])
    return model


def sparse_float8() -> object:
    packings = pytest.importorskip("torchao.quantization.quantize_.workflows.float8.float8_packing_format").Float8PackingFormat
    return torchao.Float8DynamicActivationFloat8WeightConfig(
        packing_format=packings.SPARSE_2D_DATA_2D_METADATA, granularity=torchao.PerRow()
    )


def test_dynamic_int8_keeps_the_zeros() -> None:
    model = pruned()
    rounded = copy.deepcopy(model)
    torchao.quantize_(rounded, torchao.Int8DynamicActivationInt8WeightConfig())
    for place in ("0", "2"):
        before, weight = model.get_submodule(place).weight.detach(), rounded.get_submodule(place).weight
        assert type(weight) is not nn.Parameter
        after = weight.dequantize().detach()
        assert bool((after[before == 0] == 0).all()) and bisparse.verify(after, "2:4")
        assert float((after - before).abs().max()) <= float(before.abs().max()) / 127
    inputs = torch.randn(16, 256, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert float((rounded(inputs) - model(inputs)).abs().max()) < 0.1 * float(model(inputs).abs().max())


def test_sparse_float8_says_that_it_needs_a_gpu() -> None:
    with pytest.raises(Exception, match="requires CUDA compute capability"):
        torchao.quantize_(pruned(), sparse_float8())


@pytest.mark.gpu
def test_sparse_float8_on_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("torchao's sparse FP8 kernels are for compute capability 9.0")
    model = pruned("cuda")
    packed = copy.deepcopy(model)
    torchao.quantize_(packed, sparse_float8())
    inputs = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        assert float((packed(inputs) - model(inputs)).abs().max()) < 0.2 * float(model(inputs).abs().max())
