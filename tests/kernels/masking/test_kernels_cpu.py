"""The compiled kernel equals `torch.where`, bit for bit, on one and two threads, and is used for plain tensors alone."""

import pytest
import torch
from torch import nn

from bisparse import sparsify_
from bisparse.kernels.masking.dispatch import MIN_WEIGHTS, applies
from bisparse.training.bits import add_off_each_, keep_only_, keep_only_each_, kept, off
from dispatched import Seen

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SHAPES = [(MIN_WEIGHTS,), (181, 199), (3, 131, 129), (64, 64, 3, 3), (0,), (7, 5)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(BITS[tensor.element_size()])


def crafted(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(shape).to(dtype)
    if values.numel() > 6:
        values.view(-1)[:4] = torch.tensor([float("nan"), -0.0, 1.0, -1.0]).to(dtype)
    return values


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_where(dtype, shape, threads):
    values, mask = crafted(shape, dtype), torch.rand(shape) < 0.5
    if values.ndim == 4:
        values, mask = values.contiguous(memory_format=torch.channels_last), mask.contiguous(memory_format=torch.channels_last)
    torch.set_num_threads(threads)
    try:
        inside, outside, written = kept(values, mask), off(values, mask), values.clone()
        version = written._version
        keep_only_(written, mask)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(bits(inside), torch.where(mask, bits(values), 0))
    assert torch.equal(bits(outside), torch.where(mask, 0, bits(values)))
    assert torch.equal(bits(written), bits(inside)) and written._version > version
    assert inside.stride() == outside.stride() == values.stride()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("alpha", [0.0123456789, -3e-7, 0.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adding_the_pruned_weights_equals_torch_bit_for_bit(shape, alpha, threads):
    values, gradient, mask = torch.randn(shape), torch.randn(shape), torch.rand(shape) < 0.5
    gradient.view(-1)[::7] = -0.0
    values[mask & (torch.rand(shape) < 0.1)] = torch.nan  # a kept weight is not read
    pruned = torch.where(mask, 0, values)
    expected, shrunk = gradient.clone().add_(pruned, alpha=alpha), values.clone().add_(pruned, alpha=alpha)
    version = gradient._version
    torch.set_num_threads(threads)
    try:
        add_off_each_([(gradient, values, mask, alpha), (values, values, mask, alpha)])
    finally:
        torch.set_num_threads(1)
    assert torch.equal(bits(gradient), bits(expected)) and gradient._version > version
    assert torch.equal(values.nan_to_num(7), shrunk.nan_to_num(7))


@pytest.mark.parametrize("threads", [1, 2])
def test_many_tensors_in_one_call(threads):
    shapes = [(7, 5), (0,), (181, 199), (1,), (64, 64), (63,), (65, 3), (3, 131, 129)]
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    values = [crafted(shape, dtype) for dtype in dtypes for shape in shapes] + [torch.randn(64, 128)[:, ::2]]
    masks = [torch.rand(one.shape) < 0.5 for one in values]
    gradients = [torch.randn(one.shape).to(one.dtype) for one in values]
    factors = [torch.rand(()).item() for _ in values]
    written, versions = [one.clone() for one in values], [one._version for one in gradients]
    torch.set_num_threads(threads)
    try:
        expected = [one.clone().add_(off(v, m), alpha=f) for one, v, m, f in zip(gradients, values, masks, factors, strict=True)]
        keep_only_each_(zip(written, masks, strict=True))
        add_off_each_(zip(gradients, values, masks, factors, strict=True))
    finally:
        torch.set_num_threads(1)
    for one, original, mask in zip(written, values, masks, strict=True):
        assert torch.equal(bits(one.contiguous()), torch.where(mask, bits(original.contiguous()), 0))
    for one, other, version in zip(gradients, expected, versions, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)) and one._version > version


def test_autograd_notices_that_a_tensor_was_written():
    weight = torch.randn(256, 256, requires_grad=True)
    product = weight * weight
    with torch.no_grad():
        keep_only_(weight.detach(), torch.rand(256, 256) < 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


class Subclass(torch.Tensor):
    pass


def test_other_tensors_are_left_to_torch():
    values, mask = torch.randn(256, 256), torch.rand(256, 256) < 0.5
    assert applies(values, mask) and applies(nn.Parameter(values), mask)
    others = {
        "of few weights": (values[:2].contiguous(), mask[:2].contiguous()),
        "with another mask's shape": (values, mask[:1]),
        "transposed": (values.t(), mask),
        "strided": (torch.randn(256, 512)[:, ::2], mask),
        "with a transposed mask": (values, mask.t()),
        "a subclass": (values.as_subclass(Subclass), mask),
        "on the meta device": (values.to("meta"), mask.to("meta")),
        "complex": (torch.randn(256, 256, dtype=torch.complex64), mask),
        "a negated view": (torch.randn(256, 256, dtype=torch.complex64).conj().imag, mask),
    }
    for name, (tensor, own) in others.items():
        assert not applies(tensor, own), name
    strided = torch.randn(256, 512)[:, ::2]
    before = strided.clone()
    keep_only_(strided, mask)
    assert torch.equal(strided, torch.where(mask, before, 0))
    with Seen() as seen:
        kept(values, mask)
    assert any("bitwise_and" in name for name in seen.names), "a mode that watches torch's operators sees the masking"


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_masks_follow_the_memory_format_of_their_weights(mode, late):
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3))
    if not late:
        model.to(memory_format=torch.channels_last)
    sparsity = sparsify_(model, "4:8-T", mode=mode)
    expected = sparsity.layers[0].mask.clone()
    model.to(memory_format=torch.channels_last)
    layer = sparsity.layers[0]
    assert applies(layer.weight, layer.mask) and torch.equal(layer.mask, expected)
