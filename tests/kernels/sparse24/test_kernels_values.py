"""The operator that takes a weight's kept values: torch's rules, values by hand, and its Triton kernel compiled."""

import pytest
import torch

from bisparse.kernels.sparse24.positions import find_positions, take_values


def test_values_by_hand_and_in_another_dtype() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 1 + 2**-10]])
    mask = torch.tensor([[True, False, True, False], [False, False, False, True]])
    assert take_values(weight, find_positions(mask)).tolist() == [[1.0, 3.0], [0.0, 1 + 2**-10]]
    found = take_values(weight, find_positions(mask), torch.bfloat16)
    assert found.dtype == torch.bfloat16 and found.tolist() == [[1.0, 3.0], [0.0, 1.0]]


def test_the_operator_obeys_torch() -> None:
    weight = torch.randn(8, 12)
    positions = find_positions(torch.tensor([[True, False, False, True]]).repeat(8, 3))
    for one, where in ((weight, positions), (weight.t(), find_positions(torch.zeros(12, 8, dtype=torch.bool)))):
        for behind in (None, torch.arange(3, dtype=torch.bfloat16)):
            torch.library.opcheck(torch.ops.bisparse.take_values, (one, where, torch.bfloat16, behind))


@pytest.mark.parametrize("arch", [80, 90])
def test_the_kernel_compiles_without_a_gpu_and_without_spills(arch: int) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bisparse.kernels.sparse24 import cuda_values

    constants = {"BLOCK_ROWS": cuda_values.BLOCK_ROWS, "BLOCK_GROUPS": cuda_values.BLOCK_GROUPS}
    types = {"weight": "*fp32", "positions": "*u8", "values": "*bf16", "rows": "i32", "groups": "i32", "row_stride": "i64"}
    types |= {"columns": "i32", "column_stride": "i64"}
    names = cuda_values.take_kernel.arg_names
    # Pointers and sizes as they are in practice: multiples of 16.
    even = {
        (names.index(name),): [["tt.divisibility", 16]] for name in ("weight", "positions", "values", "rows", "columns", "groups")
    }
    for beside, far in (("column_stride", "row_stride"), ("row_stride", "column_stride")):
        own = {**constants, beside: 1, "ROW_MAJOR": beside == "column_stride"}
        signature = {
            name: "constexpr" if name in own else {**types, "columns": "i32", "column_stride": "i64"}[name] for name in names
        }
        here = {**even, (names.index(far),): [["tt.divisibility", 16]]}
        source = ASTSource(cuda_values.take_kernel, signature, {(names.index(k),): v for k, v in own.items()}, here)
        code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4, "enable_fp_fusion": False}).asm
        assert f"sm_{arch}" in code["ptx"] and ".local" not in code["ptx"]
        assert "cvt.rn.bf16" in code["ptx"], "rounded to nearest, as torch does"
        assert "ld.global.v4.b32" in code["ptx"] and "st.global.v4.b32" in code["ptx"], "16 bytes a thread"


@pytest.mark.parametrize("arch", [80, 90])
def test_the_positions_compile_without_a_gpu_and_without_spills(arch: int) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bisparse.kernels.sparse24 import cuda_values

    names = cuda_values.positions_kernel.arg_names
    types = {"mask": "*u8", "positions": "*u8", "invalid": "*i32", **dict.fromkeys(names[3:8], "i64")}
    constants = {"BLOCK_ROWS": cuda_values.BLOCK_ROWS, "BLOCK_GROUPS": cuda_values.BLOCK_GROUPS}
    source = ASTSource(
        cuda_values.positions_kernel,
        {**types, **dict.fromkeys(constants, "constexpr")},
        {(names.index(name),): value for name, value in constants.items()},
    )
    code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4, "enable_fp_fusion": False}).asm
    assert f"sm_{arch}" in code["ptx"] and ".local" not in code["ptx"]


def test_a_mask_that_is_not_2to4_has_no_positions() -> None:
    mask = torch.zeros(4, 8, dtype=torch.bool)
    torch.library.opcheck(torch.ops.bisparse.find_positions, (mask,))
    mask[2, 4:7] = True
    with pytest.raises(ValueError, match=r"shape \(4, 8\) keeps more than 2 of 4"):
        find_positions(mask)


@pytest.mark.gpu
def test_on_a_gpu_values_are_those_of_the_specification() -> None:
    from bisparse.kernels.sparse24.positions import reference_take_values

    weight = torch.randn(1000, 516)
    for matrix in (weight, weight.t()):
        mask = torch.rand(matrix.shape[0], matrix.shape[1] // 4, 4).argsort(-1) < 2
        positions = find_positions(mask.flatten(1))
        assert torch.equal(find_positions(mask.flatten(1).cuda()).cpu(), positions)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            found = take_values(matrix.cuda(), positions.cuda(), dtype)
            assert torch.equal(found.cpu(), reference_take_values(matrix, positions, dtype))
            behind = torch.arange(7, dtype=dtype)
            found = take_values(matrix.cuda(), positions.cuda(), dtype, behind.cuda())
            assert torch.equal(found.cpu(), reference_take_values(matrix, positions, dtype, behind))
