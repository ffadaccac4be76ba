"""The unbiased 2:4 estimate: its random numbers, at most two kept, one answer everywhere, its packed form, its Triton kernels."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from bisparse.kernels.mvue.ops import estimate_2to4, estimate_by, pack_estimate, reference_estimate_2to4
from bisparse.kernels.mvue.philox import draw_seed, philox, uniforms
from bisparse.kernels.sparse24.metadata import CODES, NO_LAYOUT, MetadataLayout, layout_from_order, reference_lay_out
from bisparse.kernels.sparse24.positions import reference_take_values

SEEDS = [0, -1, 2**63 - 1, 0x299F31D0A4093822]


def seed_of(number: int) -> Tensor:
    return torch.tensor([number])


def gradient_of(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Zeros, ties, entries that are certain, and some beside which the others are lost in a sum."""
    numbers = torch.randn(shape) * torch.randint(0, 3, shape)
    numbers = torch.where(torch.rand(shape) < 0.3, numbers.sign(), numbers)
    numbers[:1] *= 100
    return torch.where(torch.rand(shape) < 0.02, numbers * 2**12, numbers).clamp(-3e4, 3e4).to(dtype)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: Any, key: Any, expected: Any) -> None:
    found = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))  # type: ignore[arg-type]
    assert tuple(int(number) for number in found) == expected


def test_uniforms_are_where_the_counter_says() -> None:
    found = uniforms(seed_of(0x299F31D0A4093822), 7, 5, torch.float32)
    assert found.shape == (7, 5) and found.dtype == torch.float32
    key = torch.tensor(0xA4093822), torch.tensor(0x299F31D0)
    for group, output in ((0, 0), (2, 1), (6, 4)):
        counter = tuple(torch.tensor(number) for number in (output, group // 4, 0, 0))
        assert float(found[group, output]) == (int(philox(counter, key)[group % 4]) >> 8) / 2**24  # type: ignore[arg-type]
    assert torch.equal(uniforms(seed_of(-1), 7, 5, torch.float64).float(), uniforms(seed_of(-1), 7, 5, torch.float32))


def test_seeds_are_torch_s_own_and_of_64_bits() -> None:
    one, other = (draw_seed(torch.device("cpu"), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, other)
    seeds = torch.cat([draw_seed(torch.device("cpu")) for _ in range(200)])
    assert len(seeds.unique()) == 200 and bool((seeds < -(2**62)).any() and (seeds > 2**62).any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_cpu_estimates_are_those_of_the_specification(dtype: torch.dtype) -> None:
    for tokens, outputs, groups in ((1001, 130, 256), (6, 3, 5), (0, 3, 1), (4, 0, 1), (0, 3, 0)):
        gradient = gradient_of((tokens, outputs), dtype)
        for seed in SEEDS:
            for own in (gradient, gradient.t().contiguous().t()):  # any strides
                found = estimate_2to4(own, seed_of(seed), groups)
                assert found.dtype == dtype and torch.equal(found, reference_estimate_2to4(own, seed_of(seed), groups))
    gradient, wide = gradient_of((700, 3), dtype), torch.float64 if dtype == torch.float64 else torch.float32
    whole = estimate_by(uniforms(seed_of(1), 180, 3, wide), gradient)
    assert torch.equal(estimate_2to4(gradient, seed_of(1), 180), whole), "in parts as at once"
    gradient = gradient_of((8, 9), dtype)
    assert not torch.equal(estimate_2to4(gradient, seed_of(0), 2), estimate_2to4(gradient, seed_of(1), 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_no_rounding_keeps_a_third_entry_or_loses_a_certain_one(dtype: torch.dtype) -> None:
    large, smallest = (2.0**24, 2.0**-149) if dtype == torch.float32 else (2.0**53, 2.0**-1074)
    groups = [
        [large, 1.0, 1.0, 1.0], [large, 1.9, 0.99, 0.99], [1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 0.0], [0.7, 0.7, 0.1, 0.0],
        [5.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, smallest], [smallest, 0.0, 0.0, -0.0], [0.0, -0.0, 0.0, -0.0],
        [1.0, 1.0, 1e-20, 1e-20],
    ]  # fmt: skip
    numbers = torch.cat((torch.tensor(groups, dtype=dtype), torch.rand(300, 4, dtype=dtype), torch.randn(300, 4).exp().to(dtype)))
    for step in (0, 1, 2, 3, 2**23, 2**24 - 2, 2**24 - 1):  # a sum meets its threshold near the ends of [0, 1)
        found = estimate_by(torch.full((1, len(numbers)), step * 2.0**-24, dtype=dtype), numbers.t().contiguous())
        assert int((found != 0).sum(1).max()) == 2
        assert bool((found[:2, 0] == large).all()) and torch.equal(found[5:9], numbers[5:9])
        assert not bool((torch.signbit(found) & (found == 0)).any())
    assert bool((found[0, 1:] != 0).any()), "beside a large entry, small ones are not lost"


def test_nothing_that_is_kept_rounds_to_zero() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        gradient = (torch.randint(0, 4, (400, 50)) * smallest).to(dtype)
        wide = estimate_2to4(gradient.float(), seed_of(5), 100)
        assert torch.equal(estimate_2to4(gradient, seed_of(5), 100) != 0, wide != 0)


def layout_of(rows: int, words: int, lone_first: bool) -> MetadataLayout:
    """A made-up library: four bits like no other's, words in disorder, and free slots that point at the entry in use."""
    codes, nibbles = torch.zeros(16, dtype=torch.uint8), torch.zeros(CODES, dtype=torch.uint8)
    for kept in range(16):
        entries = [entry for entry in range(4) if kept >> entry & 1]
        if len(entries) <= 2:
            first, second = (entries or [0])[0], (entries or [3])[-1]
            used = 3 if len(entries) == 2 else 0 if not entries else 1 if lone_first else 2
            codes[kept] = first | second << 2 | used << 4
            nibbles[codes[kept].long()] = (11 * kept + 6) % 16
    height, width = math.gcd(rows, 4), 4 * math.gcd(words, 2)
    size = height * width // 4
    place = torch.randperm(4 * size).view(height, width)
    return layout_from_order(place, 4 * words // width * size, size, codes.device, (codes, nibbles))


def packed_by_steps(estimate: Tensor, layout: MetadataLayout) -> Tensor:
    """The dense estimate of finite entries, then its positions and metadata, then its values."""
    rows, groups = estimate.shape[0], estimate.shape[1] // 4
    positions, metadata = torch.empty(rows, groups, dtype=torch.uint8), torch.empty(rows * groups // 4, dtype=torch.int16)
    reference_lay_out(estimate != 0, *layout, *NO_LAYOUT, positions, metadata, None, None, None)
    return torch.cat((reference_take_values(estimate, positions, estimate.dtype).flatten(), metadata.view(estimate.dtype)))


PACKED_SHAPES = [(16, 3, 4), (64, 9, 16), (14, 20, 4), (39, 6, 16), (0, 2, 4)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lone_first", [True, False])
def test_the_packed_estimate_is_the_estimate_packed(dtype: torch.dtype, lone_first: bool) -> None:
    for tokens, outputs, groups in PACKED_SHAPES:
        gradient, layout = gradient_of((tokens, outputs), dtype), layout_of(outputs, groups // 4, lone_first)
        found = pack_estimate(gradient, seed_of(7), groups, layout)
        expected = packed_by_steps(reference_estimate_2to4(gradient, seed_of(7), groups), layout)
        assert found.dtype == dtype and found.numel() == 9 * outputs * groups // 4
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16)), "bit by bit: no -0.0"


def test_a_group_that_is_not_finite_keeps_its_first_two() -> None:
    gradient, layout = torch.randn(32, 4).half(), layout_of(4, 2, True)
    gradient[9, 2] = float("nan")
    found = pack_estimate(gradient, seed_of(7), 8, layout)
    gradient[8:12, 2] = torch.tensor([5.0, 7.0, 0.0, 0.0])
    expected = pack_estimate(gradient, seed_of(7), 8, layout)
    values, finite = found[:64].view(4, 8, 2), expected[:64].view(4, 8, 2)
    assert bool(values[2, 2].isnan().all()) and finite[2, 2].tolist() == [5.0, 7.0]
    values[2, 2] = finite[2, 2]
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def test_packing_obeys_torch_and_says_what_it_needs() -> None:
    layout = layout_of(3, 1, True)
    for gradient in (torch.randn(10, 3).half(), torch.randn(3, 16).half().t()):
        torch.library.opcheck(torch.ops.bisparse.pack_estimate_2to4, (gradient, seed_of(1), 4, *layout))
    for gradient, groups, message in (
        (torch.randn(8, 3), 4, "in float16 or bfloat16, not in torch.float32"),
        (torch.randn(8, 3).half(), 6, "6 groups do not fill words"),
        (torch.randn(20, 3).half(), 4, "needs a group for every 4 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            pack_estimate(gradient, seed_of(0), groups, layout)
    with pytest.raises(ValueError, match="in blocks of 4 x 16 does not tile a 6 x 16 matrix"):
        pack_estimate(torch.randn(16, 6).half(), seed_of(0), 4, layout_of(8, 1, True))


@pytest.mark.parametrize("estimate", [estimate_2to4, reference_estimate_2to4])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_lost(estimate, broken: float) -> None:  # type: ignore[no-untyped-def]
    gradient = torch.randn(16, 5)
    expected = estimate(gradient, seed_of(1), 4)
    gradient[6, 2] = broken
    found = estimate(gradient, seed_of(1), 4)
    assert bool(found[2, 4:8].isnan().all())
    expected[2, 4:8] = found[2, 4:8] = 0
    assert torch.equal(found, expected)


def test_the_estimate_obeys_torch_and_needs_a_group_for_every_4_tokens() -> None:
    for tokens, groups in ((8, 2), (6, 2), (6, 5)):
        torch.library.opcheck(torch.ops.bisparse.estimate_2to4, (torch.randn(tokens, 3), seed_of(1), groups))
    with pytest.raises(ValueError, match="needs a group for every 4 tokens, not 1 in all"):
        estimate_2to4(torch.randn(8, 3), seed_of(0), 1)
    for seed in (torch.zeros(1), torch.zeros(2, dtype=torch.int64), torch.tensor(0)):
        with pytest.raises(ValueError, match="a seed is one number of int64"):
            estimate_2to4(torch.randn(8, 3), seed, 2)


# ---- compiled without a GPU ------------------------------------------------------------------------------------------


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, int], arch: int, divisible: tuple[str, ...] = ()) -> Any:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        kernel,
        {**types, **dict.fromkeys(constants, "constexpr")},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4, "enable_fp_fusion": False}).asm


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_estimate_compiles_without_a_gpu_and_without_spills(arch: int, dtype: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from bisparse.kernels.mvue import cuda as cuda_estimate

    types = {"gradient": f"*{dtype}", "seed": "*i64", "estimate": f"*{dtype}", "tokens": "i32", "outputs": "i32", "groups": "i32"}
    constants = {"WORDS": cuda_estimate.WORDS, "OUTPUTS": cuda_estimate.OUTPUTS}
    code = compiled(cuda_estimate.estimate_kernel, types, constants, arch)
    assert f"sm_{arch}" in code["ptx"] and ".local" not in code["ptx"]
    assert "fma.rn" not in code["ptx"] and "ftz" not in code["ptx"], "rounded as torch does"
    assert dtype == "fp32" or f"cvt.rn.{dtype.replace('fp', 'f')}" in code["ptx"]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_packing_compiles_without_a_gpu_and_without_spills(arch: int, dtype: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from bisparse.kernels.mvue import cuda as cuda_estimate

    numbers = dict.fromkeys(("tokens", "outputs", "words"), "i32")
    pointers = {"codes": "*u8", "values": f"*{dtype}", "positions": "*i32"}
    types = {"gradient": f"*{dtype}", "seed": "*i64", **pointers, **numbers}
    constants = {"WORDS": cuda_estimate.WORDS, "OUTPUTS": cuda_estimate.OUTPUTS}
    code = compiled(cuda_estimate.pack_kernel, types, constants, arch, ("gradient", "values", "outputs"))
    assert f"sm_{arch}" in code["ptx"] and ".local" not in code["ptx"]
    assert "fma.rn" not in code["ptx"] and "ftz" not in code["ptx"] and f"cvt.rn.{dtype.replace('fp', 'f')}" in code["ptx"]
    # Eight values of a lane in one store, its four positions in another; two outputs of a lane in one load.
    stored = set(re.findall(r"st\.global\.\S+", code["ptx"]))
    assert stored == {"st.global.v4.b32", "st.global.b32"} and "ld.global.b32" in code["ptx"]


def test_gradients_and_results_lie_beyond_two_to_the_31() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from bisparse.kernels.mvue import cuda as cuda_estimate

    types = {"gradient": "*fp16", "seed": "*i64", "estimate": "*fp16", "tokens": "i32", "outputs": "i32", "groups": "i32"}
    ir = compiled(cuda_estimate.estimate_kernel, types, {"WORDS": 4, "OUTPUTS": 64}, 90)["ttir"]
    numbers = dict.fromkeys(("tokens", "outputs", "words"), "i32")
    pointers = {"codes": "*u8", "values": "*fp16", "positions": "*i32"}
    types = {"gradient": "*fp16", "seed": "*i64", **pointers, **numbers}
    ir += compiled(cuda_estimate.pack_kernel, types, {"WORDS": 4, "OUTPUTS": 64}, 90)["ttir"]
    for name in ("gradient", "estimate", "values", "positions"):
        pointers_of = [f"%{name}", *re.findall(rf"(%\w+) = tt.splat %{name} ", ir)]
        offsets = [wide for one in pointers_of for wide in re.findall(rf"tt.addptr {one}, .*, (?:tensor<[\dx]*)?(i\d+)", ir)]
        assert offsets and set(offsets) == {"i64"}, name


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_on_a_gpu_estimates_are_those_of_the_specification(dtype: torch.dtype) -> None:
    for shape, groups in (((1001, 130), 256), ((4096, 512), 1024), ((6, 3), 2)):
        gradient = gradient_of(shape, dtype)
        for seed in SEEDS:
            found = estimate_2to4(gradient.cuda(), seed_of(seed).cuda(), groups).cpu()
            assert torch.equal(found, reference_estimate_2to4(gradient, seed_of(seed), groups))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu_packed_estimates_are_those_of_the_specification(dtype: torch.dtype) -> None:
    for tokens, outputs, groups in [*PACKED_SHAPES, (1001, 132, 256), (4096, 512, 1024)]:
        gradient, layout = gradient_of((tokens, outputs), dtype), layout_of(outputs, groups // 4, False)
        on_a_gpu = MetadataLayout(*(one.cuda() for one in layout[:3]), *layout[3:])
        for own in (gradient, gradient.t().contiguous().t()):
            found = pack_estimate(own.cuda(), seed_of(-1).cuda(), groups, on_a_gpu).cpu()
            assert torch.equal(found.view(torch.int16), pack_estimate(own, seed_of(-1), groups, layout).view(torch.int16))


@pytest.mark.gpu
def test_a_recorded_graph_draws_anew_with_a_new_seed() -> None:
    gradient, seed = torch.randn(64, 128).cuda(), seed_of(1).cuda()
    estimate_2to4(gradient, seed, 16)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = estimate_2to4(gradient, seed, 16)
    for number in (1, 2):
        seed.fill_(number)
        graph.replay()
        assert torch.equal(found.cpu(), reference_estimate_2to4(gradient.cpu(), seed_of(number), 16))
