"""Positions and metadata in one pass: against torch's own packer, in any metadata layout, and the Triton kernel compiled."""

import pytest
import torch
from torch import Tensor

from bisparse import solve
from bisparse.accelerate.backends import BACKENDS
from bisparse.kernels.sparse24 import pack
from bisparse.kernels.sparse24.metadata import (
    CODES,
    NO_LAYOUT,
    MetadataLayout,
    empty_slots,
    kept_sets,
    lay_out,
    layout_from_order,
)
from bisparse.kernels.sparse24.positions import find_positions, to_metadata

CPU = torch.device("cpu")


def mask_both_ways(rows: int, columns: int, seed: int = 0) -> Tensor:
    """2:4-T, with groups that keep one or none."""
    own = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=own)
    return solve(weight.abs(), "2:4-T").mask & (torch.rand(rows, columns, generator=own) < 0.8)


def any_layout(rows: int, columns: int, seed: int, height: int = 16, width: int = 4) -> MetadataLayout:
    """A layout with random slots and codes, in consecutive blocks of rows and groups, each in a random order."""
    own = torch.Generator().manual_seed(seed)
    codes = torch.zeros(16, dtype=torch.uint8)
    for kept in range(16):
        entries = [entry for entry in range(4) if kept >> entry & 1]
        if len(entries) <= 2:
            free = [-1 - int(torch.randint(4, (), generator=own)) for _ in range(2 - len(entries))]
            slots = [(entries + free)[place] for place in torch.randperm(2, generator=own).tolist()]
            first, second = (max(slot, -1 - slot) for slot in slots)
            codes[kept] = first | second << 2 | (slots[0] >= 0) << 4 | (slots[1] >= 0) << 5
    nibbles = torch.randint(16, (CODES,), generator=own).to(torch.uint8)
    place = torch.randperm(height * width, generator=own).view(height, width)
    size, across = height * width // 4, columns // 4 // width
    return layout_from_order(place, across * size, size, CPU, (codes, nibbles))


def laid_out(
    mask: Tensor, layout: MetadataLayout, layout_t: MetadataLayout | None, broken: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    rows, columns = mask.shape
    slots = [one.fill_(77) for one in empty_slots(rows, columns, mask.device)]
    slots_t = [one.fill_(77) for one in empty_slots(columns, rows, mask.device)]
    lay_out(mask, layout, *slots, None if layout_t is None else (layout_t, *slots_t), broken)
    return (*slots, *slots_t)


@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (64, 192)])
def test_cutlass_form_gives_the_metadata_of_the_packer(shape: tuple[int, int]) -> None:
    mask, own = mask_both_ways(*shape), BACKENDS["cutlass"]
    layout, layout_t = own.metadata_layout(*shape, torch.bfloat16, CPU), own.metadata_layout(*shape[::-1], torch.bfloat16, CPU)
    assert layout is not None and layout_t is not None
    found = laid_out(mask, layout, layout_t)
    packed, packed_t = pack.pack_2to4(mask.bfloat16(), mask)
    metadata, metadata_t = pack.split_packed(packed, *shape)[1], pack.split_packed(packed_t, *shape[::-1])[1]
    assert torch.equal(found[0], find_positions(mask)) and torch.equal(found[2], find_positions(mask.t()))
    assert torch.equal(found[1].view(torch.int16), metadata) and torch.equal(found[3].view(torch.int16), metadata_t)


def test_plain_form_gives_the_metadata_of_the_reference() -> None:
    mask = mask_both_ways(48, 80)
    layout, layout_t = (BACKENDS["reference"].metadata_layout(*shape, torch.float32, CPU) for shape in ((48, 80), (80, 48)))
    assert layout is not None and layout_t is not None
    found = laid_out(mask, layout, layout_t)
    assert torch.equal(found[1], to_metadata(find_positions(mask)))
    assert torch.equal(found[3], to_metadata(find_positions(mask.t())))


@pytest.mark.parametrize(("height", "width"), [(1, 4), (16, 4), (32, 8), (8, 16), (4, 1)])
def test_codes_and_places_are_the_forms_own(height: int, width: int) -> None:
    """Group by group, by Python's integers."""
    rows, columns = 32, 64
    mask, layout = mask_both_ways(rows, columns), any_layout(rows, columns, 3, height, width)
    positions, metadata, _, untouched = laid_out(mask, layout, None)
    words = metadata.view(torch.int16).flatten().tolist()
    place = {int(group): at for at, group in enumerate(layout.sources.flatten())}
    for row in range(rows):
        for group in range(columns // 4):
            kept = sum(1 << j for j in range(4) if mask[row, 4 * group + j])
            assert int(kept_sets(mask)[row, group]) == kept
            assert int(positions[row, group]) == int(layout.codes[kept])
            at = place[row % height * width + group % width]
            word = row // height * layout.row_stride + group // width * layout.group_stride + at // 4
            assert words[word] >> at % 4 * 4 & 15 == int(layout.nibbles[layout.codes[kept].long()])
    assert bool((untouched == 77).all())


def test_a_mask_that_is_not_2to4_is_marked_on_either_side() -> None:
    layout = any_layout(32, 32, 0)
    layout_t = any_layout(32, 32, 1)
    fine = mask_both_ways(32, 32)
    row, column = fine.clone(), fine.clone()
    row[7, 4:8] = torch.tensor([True, True, False, True])
    row[4:7, 4:8] = False
    column[8:12, 9] = torch.tensor([True, False, True, True])
    column[8:12, [8, 10, 11]] = False
    for mask, both, one_way in ((fine, 0, 0), (row, 1, 1), (column, 1, 0)):
        for other, expected in ((layout_t, both), (None, one_way)):
            broken = torch.zeros((), dtype=torch.int32)
            laid_out(mask, layout, other, broken)
            assert int(broken) == expected
    laid_out(fine, layout, layout_t, broken := torch.ones((), dtype=torch.int32))
    assert int(broken) == 1, "what was found before stays"


def test_lines_that_are_no_whole_words_or_blocks_are_refused() -> None:
    layout = any_layout(24, 16, 0, 8, 4)
    for mask, other in ((torch.zeros(16, 24), None), (torch.zeros(24, 16), layout)):
        with pytest.raises(ValueError, match=r"rows of 24 entries have no metadata in whole words: 16 must divide"):
            laid_out(mask.bool(), layout, other)
    with pytest.raises(ValueError, match=r"in blocks of 32 x 32 does not tile a 48 x 32 matrix"):
        laid_out(torch.zeros(48, 32).bool(), any_layout(64, 32, 0, 32, 8), None)


def test_the_operator_obeys_torch() -> None:
    mask, layout, layout_t = mask_both_ways(32, 64), any_layout(32, 64, 0), any_layout(64, 32, 1)
    slots, slots_t = empty_slots(32, 64, CPU), empty_slots(64, 32, CPU)
    where = (*layout, *layout_t, slots[0], slots[1].view(torch.int16), slots_t[0], slots_t[1].view(torch.int16))
    torch.library.opcheck(torch.ops.bisparse.lay_out_2to4, (mask, *where, torch.zeros((), dtype=torch.int32)))
    one_way = (*layout, *NO_LAYOUT, slots[0], slots[1].view(torch.int16), None, None, None)
    torch.library.opcheck(torch.ops.bisparse.lay_out_2to4, (mask, *one_way))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["positions", "positions, checked", "metadata", "metadata, odd block"])
def test_the_kernels_compile_without_a_gpu_and_without_spills(arch: int, name: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bisparse.kernels.sparse24 import cuda_metadata

    if name.startswith("positions"):
        kernel = cuda_metadata.positions_kernel
        constants = {"BANDS": cuda_metadata.BANDS, "GROUPS": cuda_metadata.GROUPS, "BOTH_WAYS": True, "CHECK": "checked" in name}
        pointers = {"mask": "*i32", "codes": "*u8", "codes_t": "*u8", "positions": "*u8", "positions_t": "*u8", "invalid": "*i32"}
    else:
        kernel = cuda_metadata.metadata_kernel
        constants = dict(zip(("HEIGHT", "WIDTH"), (96, 20) if "odd" in name else (64, 8), strict=True))
        constants["WORDS"] = cuda_metadata.WORDS
        pointers = {"positions": "*u8", "nibbles": "*u8", "sources": "*i32", "metadata": "*i16"}
    names = kernel.arg_names
    types = {one: pointers.get(one, "constexpr" if one in constants else "i32") for one in names}
    source = ASTSource(kernel, types, {(names.index(one),): value for one, value in constants.items()})
    code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4, "enable_fp_fusion": False}).asm
    assert f"sm_{arch}" in code["ptx"] and ".local" not in code["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1024, 1024), (992, 4112), (16, 48)])
def test_on_a_gpu_all_is_as_specified(shape: tuple[int, int]) -> None:
    mask = mask_both_ways(*shape)
    layout = any_layout(*shape, 5)
    layout_t = any_layout(*shape[::-1], 6)
    device = [MetadataLayout(*(one.cuda() for one in own[:3]), *own[3:]) for own in (layout, layout_t)]
    broken = torch.zeros((), dtype=torch.int32, device="cuda")
    for found, expected in zip(laid_out(mask.cuda(), *device, broken), laid_out(mask, layout, layout_t), strict=True):
        assert torch.equal(found.cpu(), expected)
    assert int(broken) == 0
    laid_out(torch.ones_like(mask).cuda(), *device, broken)
    assert int(broken) == 1
