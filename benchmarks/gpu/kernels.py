"""What every Triton kernel of the solver, and that of MVUE, takes of a GPU, found without one: registers, spills, instructions.

    python benchmarks/gpu/kernels.py [--arch 90] [--only 4:8-T] [--results FILE]

The kernels are those that the operators launch: each call of an operator below is made without a device to launch on.
Instructions are counted in the machine code, each once; loops multiply them. Rows go to benchmarks/results/gpu_kernels.jsonl.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bisparse.kernels.exact.cuda import solve as cuda
from bisparse.kernels.mvue import cuda as cuda_estimate
from bisparse.kernels.sparse24 import cuda_metadata, cuda_pack, pack
from bisparse.kernels.sparse24.metadata import empty_slots
from bisparse.pattern import parse_pattern
from record import RESULTS, Record

PIPES = {
    "integer and select": r"IADD|VIADD|VIMNMX|VIADDMNMX|IMNMX|ISETP|SEL$|LOP3|PLOP3|SHF|LEA|PRMT|SGXT|FMNMX|FSETP|FSEL",
    "multiply-add": r"IMAD|FMUL|FADD|FFMA",
    "conversion": r"F2I|I2F",
    "shuffle and vote": r"SHFL|REDUX|VOTE",
    "memory": r"LD|ST|BAR",
}


def calls(only: str | None) -> dict[str, Callable[[], Any]]:
    """Each operator at each pattern; a matrix of a few tiles, since only types and divisibility matter."""
    found: dict[str, Callable[[], Any]] = {}
    for pattern in ("4:8-T", "8:16-T", "16:32-T", "32:64-T"):
        shape = parse_pattern(pattern)
        for exactly in (False, True):
            name = f"{pattern}, exactly" if exactly else pattern
            found[name] = lambda n=shape.n, m=shape.m, e=exactly: cuda.exact_solve(torch.rand(2 * m, 16 * m), n, m, e, None, None)
    for pattern in ("4:8-T", "8:16-T", "16:32-T"):
        shape = parse_pattern(pattern)
        found[f"{pattern}, warm"] = lambda n=shape.n, m=shape.m: cuda.exact_solve(
            torch.rand(2 * m, 16 * m), n, m, False, torch.zeros(2, 32, m, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
        )
    found["2:4-T, bfloat16"] = lambda: cuda.exact_mask(torch.rand(32, 64).bfloat16(), 2, 4, False)
    found["2:4-T, exactly, bfloat16"] = lambda: cuda.exact_mask(torch.rand(32, 64).bfloat16(), 2, 4, True)
    found["2:4-T, float32"] = lambda: cuda.exact_mask(torch.rand(32, 64), 2, 4, False)
    found["2:4, bfloat16"] = lambda: cuda.keep_largest(torch.rand(4096, 4).bfloat16(), 2)
    found["2:4-T prices"] = lambda: cuda.exact_solve(torch.rand(8, 64), 2, 4, False, None, None)
    found["2:4-T of magnitudes, float32"] = lambda: cuda.exact_mask_of_magnitudes(torch.rand(32, 64), False)
    weight, mask = torch.rand(32, 64).bfloat16(), torch.zeros(32, 64, dtype=torch.bool)
    layouts = pack.cutlass_layout(32, weight.device), pack.cutlass_layout(64, weight.device)
    flat = *layouts[0], *layouts[1]
    found["2:4-T packed, bfloat16"] = lambda: cuda_pack.pack_2to4_transposable(weight, *flat)
    found["2:4 packed under a mask, bfloat16"] = lambda: cuda_pack.pack_2to4(weight, mask, *flat)
    slots, slots_t = empty_slots(32, 64, mask.device), empty_slots(64, 32, mask.device)
    words, words_t = slots[1].view(torch.int16), slots_t[1].view(torch.int16)
    found["2:4-T laid out"] = lambda: cuda_metadata.lay_out(mask, *flat, slots[0], words, slots_t[0], words_t, None)
    seed = torch.zeros(1, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float16):
        found[f"MVUE packed, {str(dtype).removeprefix('torch.')}"] = lambda t=dtype: cuda_estimate.pack_estimate_2to4(
            torch.rand(256, 64).to(t), seed, 64, *layouts[1]
        )
    found["integers, one tile"] = lambda: cuda.exact_solve_integers(torch.zeros(1, 8, 8, dtype=torch.int64), 4, True, None, None)
    found["integers, 8"] = lambda: cuda.exact_solve_integers(torch.zeros(4, 8, 8, dtype=torch.int64), 4, False, None, None)
    return {name: call for name, call in found.items() if only is None or name.split(",")[0] == only}


class NoDevice:
    """Stands in for Triton's driver: it names a target to compile for, and has nothing to launch on."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(call: Callable[[], Any]) -> list[tuple[str, int, Any]]:
    """Name, warps and code of each kernel that a call would launch, specialised to its arguments as a launch does."""
    launched: list[tuple[str, int, Any]] = []
    original = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        code = original(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append((self.fn.__name__, kwargs["num_warps"], code))

    JITFunction.run = compile_only  # type: ignore[method-assign, assignment]
    try:
        call()
    finally:
        JITFunction.run = original  # type: ignore[method-assign]
    return launched


def resources(code: Any) -> dict[str, Any]:
    """Registers, stack and shared memory as the machine code declares them, and its instructions by kind."""
    tools = Path(triton.knobs.nvidia.ptxas.path).parent
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(code.asm["cubin"])
        declared = subprocess.run([tools / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True).stdout
        listing = subprocess.run([tools / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", declared)}
    names = re.findall(r"^\s+(?:/\*[0-9a-f]+\*/)?\s+(?:@!?U?P[0-9T]+ )?([A-Z][A-Z0-9]+)", listing, re.MULTILINE)
    instructions = Counter(name for name in names if name != "NOP")
    return {
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"] + usage["LOCAL"],
        "spill_instructions": instructions["LDL"] + instructions["STL"],
        "shared_bytes": code.metadata.shared,
        "instructions": instructions.total(),
        "float_arithmetic": sorted(set(re.findall(r"\b(?:(?:mul|add|fma)\.[a-z.]*f32|cvt\.[a-z.]*s32\.f32)\b", code.asm["ptx"]))),
        "kinds": {
            kind: sum(count for name, count in instructions.items() if re.match(names_of, name))
            for kind, names_of in PIPES.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="compute capability without the dot")
    parser.add_argument("--only", help="one pattern, such as 4:8-T")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu_kernels.jsonl")
    options = parser.parse_args()
    driver.set_active(NoDevice(options.arch))
    record = Record(options.results)
    record.environment = {
        "device": f"none: compiled for sm_{options.arch}",
        "versions": record.environment["versions"] | {"triton": triton.__version__},
        "sources": record.environment["sources"],
    }
    for name, call in calls(options.only).items():
        start = time.perf_counter()
        launched = compiled(call)
        seconds = time.perf_counter() - start
        for kernel, warps, code in launched:
            key = {"benchmark": "gpu kernels", "call": name, "kernel": kernel, "warps": warps}
            row = record.find(key) or record.add(key, resources(code))
            print(
                f"{name:36s} {kernel:18s} {warps} warps, {row['registers']:3d} registers, {row['spill_instructions']} spills, "
                f"{row['shared_bytes']} shared, {row['instructions']} instructions (compiled in {seconds:.1f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
