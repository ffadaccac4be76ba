"""cuSPARSELt and CUTLASS without a GPU: torch's operators played by stand-ins that check how they are called, and real layouts.

The stand-ins follow torch's own sources: what they accept (shapes, strides, dtypes), and what they give back. What only a GPU can
tell, whether the real libraries agree, is in the tests marked `gpu` at the end.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from bisparse import PatternError, accelerate_, finalize_, prune_, sparsify_
from bisparse.accelerate import BackendError, usable_backends
from bisparse.accelerate.backends import BACKENDS, Refusal, metadata_layout, probe
from bisparse.accelerate.backends.cusparselt import search_algorithm
from bisparse.accelerate.eligibility import choose_backend
from bisparse.accelerate.linear_packed import PackedLinear, PackedWeight
from bisparse.accelerate.linear_trained import SparseProducts
from bisparse.accelerate.timing import random_mask
from bisparse.kernels.mvue.ops import estimate_2to4
from bisparse.kernels.mvue.philox import draw_seed
from bisparse.kernels.sparse24.metadata import empty_slots, lay_out
from bisparse.kernels.sparse24.pack import metadata_place
from bisparse.kernels.sparse24.positions import find_positions, kept_mask

CUDA = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: run `make test-gpu` on a machine that has one"
)


def order_of_groups(order: str, rows: int, groups: int) -> Tensor | None:
    """Where a library puts the four bits of each group; None for row by row."""
    row, group = torch.arange(rows)[:, None], torch.arange(groups)
    if order == "Hopper" and rows % 64 == 0 and groups % 8 == 0:  # torchao, sparse24_sm90_sparsify.cu
        block = row // 64 * 64 * groups + group // 8 * 512 + row % 64 // 16 * 128
        return block + row % 8 * 16 + group % 4 * 4 + group // 4 % 2 * 2 + row // 8 % 2
    if order == "Ampere" and rows % 128 == 0 and groups % 16 == 0:  # torch, SparseSemiStructuredTile.cu
        block = row // 128 * 2048 + group // 16 * 2048 * (rows // 128) + row % 128 // 32 * 256 + group % 16 // 8 * 1024
        return block + 4 * metadata_place(32, 2)[row % 32, group // 4 % 2] + group % 4
    if order == "nibbles swapped":
        return row * groups + (group ^ 1)
    if order == "shuffled":
        return torch.randperm(rows * groups, generator=torch.Generator().manual_seed(0)).view(rows, groups)
    return None


class Library:
    """What torch's operators do, on the CPU."""

    def __init__(self, order: str) -> None:
        self.order, self.values_first = order, order != "values last"
        self.compressed, self.searched, self.algorithms = 0, 0, []

    def compress(self, matrix: Tensor) -> Tensor:
        assert matrix.is_contiguous() and matrix.dtype in (torch.float16, torch.bfloat16)
        rows, columns = matrix.shape
        assert rows % 16 == 0 and columns % 16 == 0
        self.compressed += 1
        # By bits, to be unkind: a -0.0 is no zero.
        there = (matrix.view(torch.int16).view(-1, 4) != 0).long()
        places = self.places()[(there << torch.arange(4)).sum(1)]
        low = (places[:, 0] | places[:, 1] << 2).to(torch.uint8).view(-1, 2)
        tail = self.stored((low[:, 0] | low[:, 1] << 4), rows).view(matrix.dtype)
        kept = matrix.view(-1, 4).gather(1, places).flatten()
        if self.order == "groups reversed":
            kept = kept.view(-1, 2).flip(0).flatten()
        return torch.cat((kept, tail) if self.values_first else (tail, kept))

    def places(self) -> Tensor:
        """The entries in the two slots of a group, for each set of its entries that are not zero."""
        found = []
        for there in range(16):
            own = [place for place in range(4) if there >> place & 1][:2]
            own += [free for free in range(4) if free not in own][: 2 - len(own)]
            found.append(sorted(own, reverse=self.order == "slots reversed"))
        return torch.tensor(found)

    def stored(self, metadata: Tensor, rows: int, back: bool = False) -> Tensor:
        """The bytes of metadata in this library's order, or back."""
        if (place := order_of_groups(self.order, rows, 2 * len(metadata) // rows)) is None:
            return metadata
        nibbles = torch.stack((metadata & 15, metadata >> 4), -1).flatten()
        nibbles = nibbles[place.flatten() if back else place.flatten().argsort()].view(-1, 2)
        return nibbles[:, 0] | nibbles[:, 1] << 4

    def dense(self, packed: Tensor, columns: int) -> Tensor:
        flat = packed.flatten()
        size = flat.numel() * 16 // 9
        values, tail = flat.split([size // 2, size // 16]) if self.values_first else flat.split([size // 16, size // 2])[::-1]
        codes = self.stored(tail.contiguous().view(torch.uint8), flat.numel() * 16 // 9 // columns, back=True)
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten().long()
        groups = torch.zeros(size // 4, 4, dtype=packed.dtype)
        pairs = values.view(-1, 2).flip(0) if self.order == "groups reversed" else values.view(-1, 2)
        groups.scatter_(1, torch.stack((codes & 3, codes >> 2), -1), pairs)
        return groups.view(-1, columns)

    def multiply(
        self,
        packed: Tensor,
        dense: Tensor,
        bias: Tensor | None = None,
        transpose_result: bool = False,
        alg_id: int = 0,
        split_k: int = 1,
        split_k_mode: int = -1,
    ) -> Tensor:
        assert packed.dtype == dense.dtype and (bias is None or bias.dtype == dense.dtype)
        assert dense.is_contiguous() or dense.t().is_contiguous(), "torch takes the strides of anything else for a transpose"
        assert dense.shape[1] % 8 == 0 and dense.shape[0] % 16 == 0
        self.algorithms.append((alg_id, split_k, split_k_mode))
        with torch.autocast("cpu", enabled=False):
            product = self.dense(packed, dense.shape[0]) @ dense
        product = product if bias is None else product + bias[:, None]
        return product.t().contiguous() if transpose_result else product

    def search(self, packed: Tensor, dense: Tensor, bias: Tensor | None = None, transpose_result: bool = False) -> int:
        self.multiply(packed, dense, bias, transpose_result)
        self.algorithms.pop()
        self.searched += 1
        return 3

    def search_all(
        self, packed: Tensor, dense: Tensor, bias: Tensor | None, alpha: None, out_dtype: None, transpose_result: bool
    ) -> tuple[int, int, int, int]:
        return self.search(packed, dense, bias, transpose_result), 4, 2, 9

    @staticmethod
    def cutlass(values: Tensor, metadata: Tensor, dense: Tensor) -> Tensor:
        assert metadata.dtype == torch.int16 and values.shape[1] * 2 == dense.shape[0]
        assert 1 in dense.stride() and dense.shape[1] % 8 == 0 and values.is_contiguous()
        return sparse_semi_structured_to_dense_cutlass(values, metadata) @ dense

    @classmethod
    def cutlass_add(cls, bias: Tensor, values: Tensor, metadata: Tensor, dense: Tensor) -> Tensor:
        assert bias.shape == values.shape[:1] and bias.dtype == values.dtype
        return cls.cutlass(values, metadata, dense) + bias[:, None]


FORMS = ["values first", "values last", "slots reversed", "Hopper"]


@pytest.fixture(params=FORMS)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    stand_in = Library(request.param)
    monkeypatch.setattr(torch, "_cslt_compress", stand_in.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", stand_in.multiply)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", stand_in.search)
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", stand_in.cutlass)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", stand_in.cutlass_add)
    for name in ("cusparselt", "cutlass"):
        monkeypatch.setattr(type(BACKENDS[name]), "device_reason", lambda self, device: None)
    caches = (search_algorithm, metadata_layout.learn_layout, probe._shaped_product, probe._other_half)
    for cache in caches:
        cache.cache_clear()
    yield stand_in
    for cache in caches:
        cache.cache_clear()


def how(layer: nn.Module) -> PackedWeight | SparseProducts:
    return layer.packed_weight if isinstance(layer, PackedLinear) else layer.products


def model_of(pattern: str = "2:4-T", dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64, bias=False)).to(dtype)
    prune_(model, pattern)
    return model


def run(model: nn.Module, tokens: int = 11, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    inputs = torch.randn(tokens, 64).to(dtype).requires_grad_()
    output = model(inputs)
    output.backward(torch.randn(output.shape).to(output.dtype))
    return output.detach().float(), inputs.grad.float()


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= 0.02 * other.norm())


@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
@pytest.mark.parametrize("pattern", ["2:4-T", "2:4"])
def test_packed_layers(library: Library, name: str, pattern: str) -> None:
    dense = model_of(pattern).requires_grad_(False)
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model[0].weight[model[0].weight == 0] = -0.0  # what a product with a mask leaves behind
    report = accelerate_(model, name)
    assert [one.backend for one in report.layers] == [name, name] and report.layers[0].backward == (pattern == "2:4-T")
    for ours, theirs in zip(run(model), run(dense), strict=True):
        assert close(ours, theirs)
    assert torch.equal(model[0].dense_weight(), dense[0].weight)
    finalize_(model)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), dense.parameters(), strict=True))


def test_usable_backends_takes_a_device_by_its_name() -> None:
    assert usable_backends("cpu") == usable_backends(torch.device("cpu"))
    for bad in ("gpu", 3.5, None):
        with pytest.raises(ValueError, match="expected a torch device or its name"):
            usable_backends(bad)  # type: ignore[arg-type]


def test_packed_bytes_are_nine_sixteenths(library: Library) -> None:
    for name in ("cusparselt", "cutlass"):
        model = model_of().eval()
        report = accelerate_(model, name)
        assert report.bytes_before - report.bytes_after == 2 * 2 * 64 * 128 * 7 // 16


@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
def test_layers_in_training_hold_positions_and_metadata_and_nothing_else(library: Library, name: str) -> None:
    model = nn.Sequential(nn.Linear(64, 128, bias=False)).train()
    with torch.no_grad():
        model[0].weight.mul_(random_mask(128, 64, torch.device("cpu")))
    report = accelerate_(model, name)
    weights = 64 * 128
    assert report.bytes_after - report.bytes_before == 2 * (weights // 4 + weights // 8)
    held = model[0].derived_tensors
    assert len(held) == 4 and all(one.untyped_storage().nbytes() == one.nbytes for one in held)


@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
@pytest.mark.parametrize("mvue", [False, True])
def test_layers_in_training(library: Library, name: str, mvue: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64, bias=False))
    model = copy.deepcopy(dense)
    runs = []
    for one in (model, dense):
        sparsity = sparsify_(one, "2:4-T", refresh=2, mvue=mvue)
        if one is model:
            report = accelerate_(model, name)
            assert all(layer.backward and layer.weight == "trained" for layer in report.layers)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.005)
        sparsity.attach(optimizer)
        history = []
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                output, gradient = run(one, dtype=torch.float32)
            torch.manual_seed(11)  # MVUE draws
            optimizer.step()
            optimizer.zero_grad()
            history += [output, gradient]
        runs.append((history, [layer.mask.clone() for layer in sparsity.layers]))
    for ours, theirs in zip(runs[0][0][:2], runs[1][0][:2], strict=True):
        assert close(ours, theirs)
    if not mvue:  # its draws differ, and so do the steps from the second on
        for ours, theirs in zip(runs[0][0], runs[1][0], strict=True):
            assert float((ours - theirs).norm()) <= 0.1 * float(theirs.norm())  # rounding decides a few near ties of the masks
        for ours, theirs in zip(runs[0][1], runs[1][1], strict=True):
            assert float((ours != theirs).float().mean()) < 0.01


def test_new_values_reach_the_product_without_packing_where_the_layout_allows_it(library: Library) -> None:
    layer = model_of(dtype=torch.float32).train()
    accelerate_(layer, "cusparselt", dtype=torch.bfloat16, search=False)
    packed_so_far = library.compressed
    outputs = []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(run(layer, dtype=torch.float32)[0])
        with torch.no_grad():
            for weight in layer.parameters():
                weight.mul_(2)
    assert not torch.equal(outputs[0], outputs[1])
    per_step = 4  # W and W^T of two layers
    # Of groups that keep one or none the stand-in fills free slots from the left and CUTLASS's packer from the right.
    assert any(int((one != 0).unflatten(-1, (-1, 4)).sum(-1).min()) < 2 for one in layer.parameters() if one.ndim == 2)
    assert library.compressed - packed_so_far == (0 if library.values_first else 3 * per_step)


@pytest.mark.parametrize("name", ["cusparselt", "cutlass", "reference"])
def test_no_tokens_give_no_gradient(name: str, library: Library) -> None:
    model = nn.Sequential(nn.Linear(64, 128))
    sparsify_(model, "2:4-T", mvue=True)
    accelerate_(model, name)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(0, 64)).sum().backward()
    assert not bool(model[0].parametrizations["weight"].original.grad.any())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
def test_an_average_elsewhere_that_gets_the_buffers_too_is_right(
    name: str, packed: bool, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128))
    if packed:
        model.to(torch.bfloat16).requires_grad_(False)
        prune_(model, "2:4-T")
    else:
        sparsify_(model, "2:4-T")
    accelerate_(model, name)
    average = torch.optim.swa_utils.AveragedModel(model)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(type(BACKENDS[name]), "device_reason", lambda self, device: "not here")
        average.to(torch.float32).to(torch.bfloat16 if packed else torch.float32)
    assert how(average.module[0]).backend == "reference"
    average.update_parameters(model)
    inputs = torch.randn(3, 64, dtype=torch.bfloat16)
    assert close(average(inputs).float(), model(inputs).float())


LEARNT = {
    "values first": (1, 4),
    "slots reversed": (1, 4),
    "nibbles swapped": (1, 4),
    "Hopper": (64, 8),
    "Ampere": (128, 16),
    "shuffled": (128, 16),
}
"""Orders that can be told of, and the block of rows and groups that repeats."""


@pytest.mark.parametrize("library", ["values first"], indirect=True)
@pytest.mark.parametrize("order", [*LEARNT, "values last", "groups reversed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_form_of_a_library_is_learnt_from_what_it_packs(order: str, dtype: torch.dtype, library: Library) -> None:
    library.order, library.values_first = order, order != "values last"
    own, shape = BACKENDS["cusparselt"], (128, 64) if order == "shuffled" else (256, 128)
    found = own.metadata_layout(*shape, dtype, torch.device("cpu"))
    if order not in LEARNT:
        assert found is None
        return
    assert found is not None and (found.height, found.width) == LEARNT[order]
    many = random_mask(*shape, torch.device("cpu"))
    for mask in (many, torch.zeros_like(many), many & (torch.rand(shape) < 0.5)):
        positions, metadata = empty_slots(*shape, mask.device)
        lay_out(mask, found, positions, metadata)
        assert torch.equal(kept_mask(positions, shape[1]), mask)
        before = library.compressed
        weight = torch.randn(shape)
        for values in (weight, weight * (torch.arange(shape[1]) % 3 > 0)):  # a kept weight may be zero, in its place
            packed, _ = own.fill(values, positions, metadata, dtype)
            assert torch.equal(library.dense(packed, shape[1]), torch.where(mask, values, 0).to(dtype))
        assert library.compressed == before
        assert torch.equal(own.fill(mask.float(), positions, metadata, dtype)[0], own.pack(mask.to(dtype))[0])


def test_a_library_that_packs_now_so_and_now_so_has_no_form(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = torch._cslt_compress, []

    def fickle(matrix: Tensor) -> Tensor:
        calls.append(matrix.shape)
        packed = honest(matrix)
        if len(calls) == len(calls_of_one):  # the last one, by which the layout is judged
            packed[-1] = packed[-2]
        return packed

    own, calls_of_one = BACKENDS["cusparselt"], []
    monkeypatch.setattr(torch, "_cslt_compress", lambda matrix: calls_of_one.append(1) or honest(matrix))
    known = own.metadata_layout(32, 32, torch.bfloat16, torch.device("cpu"))
    assert (known is not None) == library.values_first
    metadata_layout.learn_layout.cache_clear()
    monkeypatch.setattr(torch, "_cslt_compress", fickle)
    assert own.metadata_layout(32, 32, torch.bfloat16, torch.device("cpu")) is None


def test_short_memory(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    own, honest, device = BACKENDS["cusparselt"], torch._cslt_compress, torch.device("cpu")
    monkeypatch.setattr(torch, "_cslt_compress", full)
    assert own.metadata_layout(32, 32, torch.bfloat16, device) is None
    assert "out of memory while probing cusparselt" in str(probe.probe_shape(own, 32, 32, torch.bfloat16, device))
    monkeypatch.setattr(torch, "_cslt_compress", honest)
    assert own.metadata_layout(32, 32, torch.bfloat16, device) is None, "not tried again in every pass"
    assert probe.probe_shape(own, 32, 32, torch.bfloat16, device) is None, "tried again"


def test_a_report_says_where_the_order_of_metadata_is_not_known(library: Library) -> None:
    model = model_of(dtype=torch.float32).train()
    report = accelerate_(model, "cusparselt")
    for layer in report.layers:
        assert layer.backward
        assert ("compresses its weight in every pass" in layer.note) == (not library.values_first)
    assert all(layer.note == "" for layer in accelerate_(model_of().requires_grad_(False), "cusparselt").layers), "packed once"


@pytest.mark.parametrize("name", ["cusparselt", "cutlass", "reference"])
@pytest.mark.parametrize("search", [False, True])
def test_an_estimate_is_packed_as_it_is_drawn(library: Library, name: str, search: bool) -> None:
    gradient, inputs = torch.randn(70, 32).to(torch.bfloat16), torch.randn(70, 48).to(torch.bfloat16)
    multiply = torch.ops.bisparse.weight_gradient_2to4
    torch.manual_seed(5)
    multiply(gradient, inputs, name, search)  # the layout is learnt once a shape
    before = library.compressed
    torch.manual_seed(5)
    found = multiply(gradient, inputs, name, search)
    anew = name == "cusparselt" and not (search and library.values_first)
    assert library.compressed - before == anew
    torch.manual_seed(5)
    estimate = estimate_2to4(gradient, draw_seed(gradient.device), 18)
    assert int((estimate != 0).unflatten(1, (-1, 4)).sum(-1).max()) == 2
    assert close(found.float(), estimate[:, :70].float() @ inputs.float())


def test_an_estimate_of_a_shape_that_the_library_refuses_is_a_dense_gradient(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = torch._cslt_sparse_mm

    def picky(packed: Tensor, dense: Tensor, **how: object) -> Tensor:
        if dense.shape[0] == 48:  # the tokens
            raise RuntimeError("CUDA error: operation not supported when calling `cusparseLtMatmulPlanInit`\nmore")
        return honest(packed, dense, **how)

    monkeypatch.setattr(torch, "_cslt_sparse_mm", picky)
    gradient, inputs = torch.randn(48, 32).to(torch.bfloat16), torch.randn(48, 64).to(torch.bfloat16)
    for search in (False, True):
        with pytest.warns(
            UserWarning, match=r"a dense product, without MVUE: cusparselt refuses matrices of 32 x 48: CUDA error"
        ):
            found = torch.ops.bisparse.weight_gradient_2to4(gradient, inputs, "cusparselt", search)
        assert torch.equal(found, gradient.t() @ inputs)


@pytest.mark.parametrize("torch_tells_the_split", [True, False])
def test_the_best_algorithm_is_searched_once_a_shape(
    library: Library, torch_tells_the_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch_tells_the_split:
        monkeypatch.setattr(torch._C, "_cusparselt", SimpleNamespace(mm_search=library.search_all), raising=False)
        monkeypatch.setattr(torch, "_cslt_sparse_mm_search", None)
    best = (3, 4, 2) if torch_tells_the_split else (3, 1, -1)
    model = model_of().eval().requires_grad_(False)
    accelerate_(model, "cusparselt")
    inputs = torch.randn(16, 64).to(torch.bfloat16)
    library.algorithms.clear()
    for _ in range(3):
        model(inputs)
    tried = [(0, 1, -1), best]  # the found one's product is compared with the usual one's
    assert library.searched == 2 and library.algorithms == [*tried, best] * 2 + [best] * 4
    model(inputs[:8])
    assert library.searched == 4
    model(inputs[:5])  # completed to 8 tokens: the same shape
    assert library.searched == 4
    state = torch.get_rng_state()
    model(inputs[:16].repeat(2, 1))
    assert library.searched == 6 and torch.equal(torch.get_rng_state(), state), "searching is no event of the run"
    other = model_of().eval()
    accelerate_(other, "cusparselt", search=False)
    library.algorithms.clear()
    other(inputs)
    assert library.searched == 6 and library.algorithms == [(0, 1, -1)] * 2


@pytest.mark.parametrize("fault", ["wrong", "refused", "search fails"])
def test_an_algorithm_that_is_wrong_or_refused_is_not_used(library: Library, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(*arguments: Tensor, alg_id: int = 0, **how: Any) -> Tensor:
        if fault == "refused" and alg_id:
            raise RuntimeError("CUDA error: internal error when calling cusparseLtMatmul")
        product = library.multiply(*arguments, alg_id=alg_id, **how)
        return product * 1.5 if alg_id else product

    def search(*_: object, **__: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    if fault == "search fails":
        monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search)
    model = model_of().eval().requires_grad_(False)
    inputs = torch.randn(16, 64).to(torch.bfloat16)
    expected = model(inputs)
    accelerate_(model, "cusparselt")
    assert torch.allclose(model(inputs), expected, rtol=0.05, atol=0.05)


def test_an_explicit_request_that_fails_leaves_the_model_as_it_was(library: Library) -> None:
    model = model_of().eval()
    with torch.no_grad():
        model[2].weight[0, :3] = 1.0
    with pytest.raises(PatternError, match=r"^2: .*2:4"):
        accelerate_(model, "cusparselt", include=["0", "2"])
    assert [type(one) for one in model] == [nn.Linear, nn.GELU, nn.Linear]


def test_backends_refuse_shapes_and_dtypes_with_reasons(library: Library) -> None:
    for name, rows, columns, multiples in (("cusparselt", 24, 32, (16, 16)), ("cutlass", 64, 32, (32, 64))):
        layer = nn.Sequential(nn.Linear(columns, rows)).to(torch.bfloat16).eval()
        prune_(layer, "2:4-T")
        before = layer[0].weight.clone()
        with pytest.raises(BackendError, match=f"{name} packs matrices whose rows are a multiple of {multiples[0]} and columns"):
            accelerate_(layer, name)
        assert torch.equal(layer[0].weight, before)
    with pytest.raises(BackendError, match=r"cusparselt takes float16, bfloat16, not float32; convert the model first"):
        accelerate_(model_of(dtype=torch.float32).eval(), "cusparselt")
    with pytest.raises(BackendError, match=r"not float64; pass dtype=torch.bfloat16"):
        accelerate_(model_of(dtype=torch.float32).train(), "cutlass", dtype=torch.float64)


def test_a_shape_whose_transpose_is_refused_runs_sparse_forward_only(library: Library) -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).to(torch.bfloat16)
    prune_(model, "2:4-T")
    dense = copy.deepcopy(model)
    report = accelerate_(model, "cutlass")
    assert not report.layers[0].backward and "for W^T, cutlass packs" in report.layers[0].note
    for ours, theirs in zip(run(model), run(dense), strict=True):
        assert close(ours, theirs)


def test_other_input_dtypes_run_masked_dense_and_say_so_once(library: Library) -> None:
    model = model_of(dtype=torch.float32).train()
    dense = copy.deepcopy(model)
    accelerate_(model, "cusparselt")
    library.algorithms.clear()
    with pytest.warns(
        UserWarning, match=r"^0 runs masked-dense: it was accelerated for torch\.bfloat16, the input is torch\.float32"
    ):
        ours = run(model, dtype=torch.float32)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(ours, run(dense, dtype=torch.float32), strict=True))
    assert library.algorithms == []


@pytest.mark.parametrize("name", ["cusparselt", "cutlass", "reference"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_packed_layers_run_under_autocast_of_any_kind(library: Library, name: str, half: torch.dtype) -> None:
    packed, dense = model_of().requires_grad_(False), model_of()
    accelerate_(packed, name)
    with torch.autocast("cpu", half):
        ours, theirs = run(packed, dtype=torch.float32), run(dense, dtype=torch.float32)
        assert packed(torch.randn(8, 64)).dtype == half
    assert all(close(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_shape_that_the_library_refuses_only_when_it_multiplies(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch._cslt_sparse_mm

    def picky(packed: Tensor, dense: Tensor, **how: object) -> Tensor:
        if dense.shape[0] == 64:
            raise RuntimeError("CUDA error: operation not supported when calling `cusparseLtMatmulPlanInit`\nmore")
        return honest(packed, dense, **how)

    monkeypatch.setattr(torch, "_cslt_sparse_mm", picky)
    for trained in (False, True):
        model = model_of().requires_grad_(trained)
        report = accelerate_(model, "cusparselt")
        reason = "cusparselt refuses matrices of 128 x 64: CUDA error: operation not supported when calling"
        assert reason in report["0"].reason and "stays masked-dense" in report["0"].reason
        assert not report["2"].backward and "for W^T, cusparselt refuses matrices of 128 x 64" in report["2"].note
        assert all(close(one, other) for one, other in zip(run(model), run(model_of()), strict=True))
    with pytest.raises(BackendError, match="0: cusparselt refuses matrices of 128 x 64"):
        accelerate_(model_of().eval().requires_grad_(False), "cusparselt", include="0")


@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
@pytest.mark.parametrize(
    ("library", "compiled"),
    [(form, False) for form in FORMS] + [(form, True) for form in ("values first", "Hopper")],  # the graph is that of any form
    indirect=["library"],
)
def test_either_half_precision_of_autocast_runs_sparse(
    library: Library, name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    model, dense = (nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(2))
    dense.load_state_dict(model.state_dict())
    for one in (model, dense):
        sparsify_(one, "2:4-T")
    accelerate_(model, name)
    torch._dynamo.reset()
    runner = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    for half in (torch.float16, torch.bfloat16):
        library.algorithms.clear()
        library.searched = 0
        with torch.autocast("cpu", half):
            for ours, theirs in zip(run(runner, dtype=torch.float32), run(dense, dtype=torch.float32), strict=True):
                assert close(ours, theirs)
        products = len(library.algorithms) - 2 * library.searched  # a search compares two
        assert name == "cutlass" or products == 4, "two layers, forward and backward"
    assert not [one for one in recwarn if "masked-dense" in str(one.message)]
    torch._dynamo.reset()


def test_a_library_whose_half_precisions_differ_takes_one_and_warns(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch._cslt_sparse_mm

    def particular(packed: Tensor, dense: Tensor, **how: object) -> Tensor:
        return honest(packed, dense, **how) * (2 if packed.dtype == torch.float16 else 1)

    monkeypatch.setattr(torch, "_cslt_sparse_mm", particular)
    for compiled in (False, True):
        model = nn.Sequential(nn.Linear(64, 64))
        sparsify_(model, "2:4-T")
        accelerate_(model, "cusparselt")
        if not library.values_first:  # it packs anew in every pass, in any dtype
            assert model[0].products.dtypes == (torch.float16, torch.bfloat16)
            return
        assert model[0].products.dtypes == (torch.bfloat16,)
        torch._dynamo.reset()
        runner = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with (
            pytest.warns(
                UserWarning, match=r"^0 runs masked-dense: it was accelerated for torch\.bfloat16, the input is torch\.float16"
            ),
            torch.autocast("cpu", torch.float16),
        ):
            runner(torch.randn(8, 64))
    torch._dynamo.reset()


def test_moving_packs_anew_with_what_runs_there(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of().eval()
    weight = model[0].weight.detach().clone()
    accelerate_(model, "cusparselt")
    model.to(torch.float32)
    assert how(model[0]).backend == "reference" and torch.equal(model[0].dense_weight(), weight.float())
    model.to(torch.bfloat16)
    assert how(model[0]).backend == "cusparselt" and torch.equal(model[0].dense_weight(), weight)


@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
def test_layers_in_training_leave_the_device_and_come_back(library: Library, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64, bias=False))
    model = copy.deepcopy(dense)
    for one in (model, dense):
        sparsify_(one, "2:4-T")
    accelerate_(model, name)
    resting = copy.deepcopy(model)
    resting[0].parametrizations["weight"][0].state.dense = True
    resting[0].mask_changed()

    def refuse(*_: object, **__: object) -> Tensor:
        raise NotImplementedError("Could not run 'aten::_cslt_compress' with arguments from the 'CPU' backend")

    with monkeypatch.context() as away:
        for one in ("cusparselt", "cutlass"):
            away.setattr(type(BACKENDS[one]), "device_reason", lambda self, device: f"{self.name} needs a CUDA device")
        for operator in ("_cslt_compress", "_cslt_sparse_mm", "_sparse_semi_structured_mm", "_sparse_semi_structured_addmm"):
            away.setattr(torch, operator, refuse)
        average = copy.deepcopy(model).cpu()
        assert [how(average[0]).backend, how(average[2]).backend] == ["reference", "reference"]
        for ours, theirs in zip(run(average, dtype=torch.float32), run(dense, dtype=torch.float32), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
        resting.cpu()
        resting[0].parametrizations["weight"][0].state.dense = False
        resting[0].mask_changed()
        assert close(run(resting, dtype=torch.float32)[0], run(dense, dtype=torch.float32)[0])
    average.cpu()
    assert how(average[0]).backend == name
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(run(average, dtype=torch.float32), run(model, dtype=torch.float32), strict=True):
            assert torch.equal(ours, theirs)
    finalize_(average)
    assert type(average[0]) is nn.Linear and not hasattr(average[0], "products")


@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
def test_ddp_has_nothing_to_broadcast(library: Library, name: str, tmp_path: Path) -> None:
    training = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    sparsify_(training, "2:4-T")
    accelerate_(training, name)
    packed = nn.Sequential(model_of().requires_grad_(False), nn.Linear(64, 8))
    assert accelerate_(packed, name)["0.0"].backward
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for model in (training, packed):
            assert not list(model.buffers()), "positions and packed values are no buffers, which DDP would broadcast"
            nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (96, 192)])
def test_cutlass_metadata_are_those_of_torch(shape: tuple[int, int]) -> None:
    own, weight = BACKENDS["cutlass"], torch.randn(shape).to(torch.bfloat16)
    weight *= random_mask(*shape, weight.device) & (torch.rand(shape) < 0.7)
    found = own.metadata_layout(*shape, torch.bfloat16, weight.device)
    assert found is not None
    positions, metadata = empty_slots(*shape, weight.device)
    lay_out(weight != 0, found, positions, metadata)
    assert torch.equal(positions, find_positions(weight != 0))
    values, expected = sparse_semi_structured_from_dense_cutlass(weight)
    packed, filled = own.fill(weight, positions, metadata, torch.bfloat16)
    assert torch.equal(packed, values) and torch.equal(filled.view(torch.int16), expected)
    assert torch.equal(own.unpack(*own.pack(weight), *weight.shape), weight)


# ---- which backend runs where


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that says it has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test")
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    monkeypatch.setattr(probe, "probe_device", lambda backend, device: None)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    return monkeypatch


def test_what_runs_on_which_generation(gpu: pytest.MonkeyPatch) -> None:
    assert usable_backends(CUDA)["cusparselt"] is None
    assert "run on compute capability 8.x, and this device has 9.0" in str(usable_backends(CUDA)["cutlass"])
    assert choose_backend("auto", CUDA) is BACKENDS["cusparselt"]
    gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    assert [name for name, reason in usable_backends(CUDA).items() if reason is not None] == ["cpu"]
    assert "not float32" in str(usable_backends(CUDA, torch.float32)["cutlass"])
    gpu.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert usable_backends(CUDA)["cusparselt"] == "this torch is built without cuSPARSELt"
    assert choose_backend("auto", CUDA) is BACKENDS["cutlass"]
    with pytest.raises(BackendError, match="built without cuSPARSELt"):
        choose_backend("cusparselt", CUDA)


def test_old_devices_and_other_makers(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    reason = choose_backend("auto", CUDA)
    assert isinstance(reason, Refusal)
    assert "needs sparse tensor cores (compute capability 8.0, Ampere), and this device has 7.5" in reason.reason
    gpu.setattr(torch.version, "hip", "6.2", raising=False)
    assert usable_backends(CUDA)["cutlass"] is None, "on ROCm a trial decides"
    gpu.setattr(probe, "probe_device", lambda backend, device: f"{backend.name} does not run on this device")
    assert usable_backends(CUDA)["cutlass"] == "cutlass does not run on this device"
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees none here" in str(usable_backends(CUDA)["cutlass"])


def test_a_library_that_fails_or_lies_is_found_out(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test")

    def tried(name: str) -> str | None:
        probe._small_product.cache_clear()
        return probe.probe_device(BACKENDS[name], torch.device("cpu"))

    assert tried("cusparselt") is None and tried("cutlass") is None

    def mismatch(*_: object, **__: object) -> Tensor:
        raise RuntimeError("CUDA error: architecture mismatch when calling `cusparseLtInit(&handle)`\nmore")

    honest = torch._cslt_sparse_mm
    monkeypatch.setattr(torch, "_cslt_sparse_mm", mismatch)
    assert tried("cusparselt") == (
        "cusparselt does not run on NVIDIA Test: CUDA error: architecture mismatch when calling `cusparseLtInit(&handle)`"
    )
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda *one, **other: honest(*one, **other) * 1.02)
    assert tried("cusparselt") == "cusparselt gives wrong products on NVIDIA Test"


# ---- on a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_packed_layers_equal_the_masked_dense_ones(name: str, dtype: torch.dtype) -> None:
    if (reason := usable_backends(CUDA)[name]) is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256, bias=False)).to("cuda", dtype)
    prune_(dense, "2:4-T")
    dense.requires_grad_(False)
    model = copy.deepcopy(dense)
    accelerate_(model, name)
    for tokens in (1, 8, 300):
        inputs = torch.randn(tokens, 256, device="cuda", dtype=dtype)
        one, other = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
        ours, theirs = model(one), dense(other)
        assert close(ours.float(), theirs.float())
        upstream = torch.randn_like(ours)
        ours.backward(upstream)
        theirs.backward(upstream)
        assert close(one.grad.float(), other.grad.float())
    assert torch.equal(model[0].dense_weight(), dense[0].weight)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
@pytest.mark.parametrize("shape", [(512, 1024), (4096, 4096), (14336, 4096)])
def test_on_a_gpu_the_form_is_known_and_metadata_are_the_librarys_own(name: str, shape: tuple[int, int]) -> None:
    if (reason := usable_backends(CUDA)[name]) is not None:
        pytest.skip(reason)
    own, mask = BACKENDS[name], random_mask(*shape, CUDA) & (torch.rand(shape, device=CUDA) < 0.9)
    found = own.metadata_layout(*shape, torch.bfloat16, CUDA)
    assert found is not None, "then every pass compresses anew: right, and slow"
    positions, metadata = empty_slots(*shape, CUDA)
    lay_out(mask, found, positions, metadata)
    weight = torch.randn(shape, device=CUDA)
    packed = own.fill(weight, positions, metadata, torch.bfloat16)
    for ours, theirs in zip(packed, own.pack(torch.where(mask, weight, 0).to(torch.bfloat16)), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
@pytest.mark.parametrize("mvue", [False, True])
def test_on_a_gpu_training_equals_masked_dense_training(name: str, mvue: bool) -> None:
    if (reason := usable_backends(CUDA)[name]) is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda()
    model = copy.deepcopy(dense)
    losses = []
    for one in (model, dense):
        sparsity = sparsify_(one, "2:4-T", refresh=2, mvue=mvue)
        if one is model:
            assert len(accelerate_(model, name)) == 2
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        sparsity.attach(optimizer)
        own = []
        for step in range(6):
            inputs = torch.randn(512, 256, generator=torch.Generator().manual_seed(step)).cuda()
            with torch.autocast("cuda", torch.bfloat16):
                loss = nn.functional.mse_loss(one(inputs), inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            own.append(float(loss.detach()))
        losses.append(own)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-2)
    assert losses[0] == pytest.approx(losses[1], rel=5e-2)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_the_reference_agrees_and_compiled_code_does_too() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(256, 512).to("cuda", torch.bfloat16).requires_grad_(False)
    prune_(dense, "2:4-T", include="*")
    inputs = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    for name, reason in usable_backends(CUDA).items():
        if reason is None:
            model = copy.deepcopy(dense)
            accelerate_(model, name, include="*")
            compiled = torch.compile(model, fullgraph=True)
            assert close(compiled(inputs).float(), dense(inputs).float()), name
