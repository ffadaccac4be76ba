"""Products that skip the dispatcher: the operator's numbers, and the operator itself wherever something watches the call."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from bisparse.kernels.packed_cpu import multiply
from bisparse.kernels.packed_cpu.direct import Product
from bisparse.kernels.packed_cpu.instructions import usable_ways
from bisparse.kernels.packed_cpu.layout import pack_bitmask

pytestmark = pytest.mark.skipif(not usable_ways(torch.float32), reason="this processor has neither AVX-512 nor AVX2")
ROWS, COLUMNS = 12, 70


@pytest.fixture
def weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    return weight * (torch.rand(ROWS, COLUMNS, generator=generator) < 0.5)


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (2, 3, COLUMNS), (0, COLUMNS), (40, COLUMNS)])
def test_the_same_numbers_in_any_mode(shape: tuple[int, ...], weight: Tensor) -> None:
    packed, bias = pack_bitmask(weight), torch.arange(ROWS).float()
    inputs = torch.linspace(-1, 1, max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()].reshape(shape)
    expected = linear(inputs, weight, bias)

    def run() -> Tensor:
        return Product(packed, ROWS, COLUMNS, 16)(inputs, bias)

    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            assert torch.allclose(run(), expected, atol=1e-5) and run().shape == expected.shape


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_what_watches_calls_sees_the_operator(weight: Tensor) -> None:
    packed, inputs = pack_bitmask(weight), torch.randn(2, COLUMNS)

    def run(x: Tensor) -> Tensor:
        return Product(packed, ROWS, COLUMNS, 16)(x, None)

    with Watch() as watch:
        run(inputs)
    assert any("linear_bitmask" in one for one in watch.seen)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run(inputs)
    assert any("linear_bitmask" in one.key for one in profiler.key_averages())
    traced = torch.jit.trace(run, (inputs,), check_trace=False)
    other = torch.randn(2, COLUMNS)
    assert torch.allclose(traced(other), linear(other, weight), atol=1e-5), "the trace holds the product, not its first result"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(run(inputs).float(), linear(inputs, weight).float(), rtol=2**-6, atol=0.1)


@torch.no_grad()
def test_inputs_that_are_more_than_memory(weight: Tensor) -> None:
    packed = pack_bitmask(weight)
    conjugate = torch.randn(2, COLUMNS, dtype=torch.complex64).conj().imag
    assert conjugate.is_neg(), "its sign is a flag of the tensor"
    apart = torch.randn(COLUMNS, 2).t()
    fake = torch.empty(2, COLUMNS, device="meta")
    for one in (conjugate, apart, torch.nn.Parameter(torch.randn(2, COLUMNS))):
        found = Product(packed, ROWS, COLUMNS, 16)(one, None)
        assert torch.allclose(found, linear(one, weight), atol=1e-5)
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        Product(packed, ROWS, COLUMNS, 16)(fake, None).sum().item()
    with pytest.raises(ValueError, match=r"do not fit|packs into"):
        Product(packed, ROWS, COLUMNS, 16)(torch.randn(2, 31), None)


@torch.no_grad()
def test_gradients_are_not_lost(weight: Tensor) -> None:
    packed, inputs = pack_bitmask(weight), torch.randn(2, COLUMNS, requires_grad=True)
    with torch.enable_grad():
        Product(packed, ROWS, COLUMNS, 16)(inputs, None).sum().backward()
    assert inputs.grad is not None and torch.allclose(inputs.grad, weight.sum(0).expand_as(inputs), atol=1e-5)


@torch.no_grad()
def test_no_inputs_and_no_outputs() -> None:
    for rows, columns in ((4, 0), (0, 32), (0, 0)):
        found = Product(pack_bitmask(torch.zeros(rows, columns)), rows, columns, 16)(torch.zeros(3, columns), None)
        assert torch.equal(found, torch.zeros(3, rows))


@torch.no_grad()
@pytest.mark.skipif(multiply.expands(torch.bfloat16), reason="this processor, or its system, has no AMX")
def test_nothing_is_expanded_in_bands_where_there_is_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with more tokens than `max_tokens`, but fewer than AMX takes."""

    def refused(*_: object) -> None:
        raise AssertionError("expanded")

    monkeypatch.setattr(multiply, "multiply_bands", refused)
    for columns in (64, COLUMNS):
        matrix = (torch.randn(ROWS, columns) * (torch.rand(ROWS, columns) < 0.5)).bfloat16()
        for tokens in (1, 2, 3, 4, 100):
            x = torch.randn(tokens, columns).bfloat16()
            found = Product(pack_bitmask(matrix), ROWS, columns, 1)(x, None)
            torch.testing.assert_close(found, linear(x, matrix), rtol=2**-7, atol=2e-2)


@torch.no_grad()
def test_bands_share_memory_but_not_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workspace of one product is another's, also after a larger one and in another dtype."""
    monkeypatch.setattr(multiply, "WORKSPACE_BYTES", 1 << 20)  # the second shape takes several bands
    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns in ((8, 64), (2100, 1024), (64, 32)):
            matrix = (torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.5)).to(dtype)
            inputs = torch.randn(20, columns).to(dtype)
            first = Product(pack_bitmask(matrix), rows, columns, 0)(inputs, None)
            kept = first.clone()
            Product(pack_bitmask(-matrix), rows, columns, 0)(inputs, None)
            assert torch.equal(first, kept)
            error = (first.double() - linear(inputs.double(), matrix.double())).norm() / first.double().norm()
            assert error < (1e-6 if dtype == torch.float32 else 2**-8)
