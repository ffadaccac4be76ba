"""The shapes and dtypes that signatures state are true: the whole engine runs once with every call checked."""

import subprocess
import sys
from pathlib import Path

CHECKED = [
    "bisparse.accelerate",
    "bisparse.kernels.mvue.ops",
    "bisparse.kernels.exact.ops",
    "bisparse.kernels.sparse24.positions",
    "bisparse.kernels.exact.reference",
    "bisparse.layers",
    "bisparse.pattern",
    "bisparse.solution",
    "bisparse.verification",
    "bisparse._solve",
    "bisparse.solvers",
    "bisparse.tiles",
]
PROGRAM = f"""
# First: what is imported under the hook is compiled again, libraries as well.
import numba, torch, torch._dynamo, torch.distributed.tensor
from jaxtyping import install_import_hook
with install_import_hook({CHECKED!r}, "beartype.beartype"):
    import bisparse.accelerate, bisparse.kernels.mvue.ops, bisparse.kernels.sparse24.positions
    import bisparse.kernels.exact.ops, bisparse.kernels.exact.reference, bisparse.layers
    import bisparse.pattern, bisparse.solution, bisparse.verification, bisparse._solve, bisparse.solvers, bisparse.tiles
    import bisparse
torch.set_num_threads(1)
"""
ENGINE = """
from bisparse import solve, verify
from bisparse.solvers import Exact, Greedy, MinCostFlow, Sinkhorn, TwoApproximation
from bisparse.kernels.exact import ops, reference
from bisparse.layers import find_layers
from bisparse.tiles import Layout, LayoutKind

for dtype in (torch.float64, torch.bfloat16, torch.uint8):
    scores = (torch.rand(12, 20) * 200).to(dtype)
    exact = (Exact(), Exact(exactly=True), Exact(strict=True))
    for solver in (*exact, Greedy(), MinCostFlow(), Sinkhorn(iterations=3), TwoApproximation()):
        for pattern in ("2:4-T", "4:8-T", "3:3-T"):
            solution = solve(scores, pattern, solver)
            assert verify(solution.mask, pattern)
            if isinstance(solver, Exact):
                assert solution.check().gap >= 0
                solve(scores, pattern, solver, warm_start=solution)
    for pattern in ("2:4", "4:8-seq", "4:8-paired", "50%"):
        solve(scores, pattern).check()
    for empty in (scores[:0], scores[:, :0]):
        for pattern in ("2:4-T", "2:4", "50%", "2:4-seq"):
            solve(empty, pattern)
outlier = torch.rand(8, 8)
outlier[0, 0] = 1e30
solve(outlier, "4:8-T").check()
solve(torch.rand(12, 6, 3, 3), "2:4-T", layout=Layout(LayoutKind.CONV, groups=2)).check()
q, exponent = reference.quantise(torch.rand(3, 8, 8))
reference.exact_mask(torch.rand(8, 8), 4, 8, False)
reference.exact_solve_integers(q, 4, True, None, None)
find_layers(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Conv2d(4, 4, 3)), pattern=solution.pattern, remainder="dense")
"""
ACCELERATION = """
from bisparse import accelerate_, finalize_, prune_, sparsify_
from bisparse.accelerate import advise
for trained in (False, True):
    model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.Linear(8, 20)).train(trained)
    if trained:
        sparsify_(model, "2:4-T", mvue=True)
    else:
        prune_(model, "2:4-T", include="*")
    advise(model, 3, backend="reference", dtype=torch.float32)
    assert len(accelerate_(model, "reference", include="*")) == 2
    inputs = torch.randn(2, 3, 12, requires_grad=True)
    model(inputs).sum().backward()
    [layer.dense_weight() for layer in model]
    finalize_(model)
"""
LIES = """
import jaxtyping
solve_tiles = bisparse.solvers.Exact().solve_tiles
for call in (lambda: solve_tiles(torch.rand(4, 4), 2), lambda: solve_tiles(torch.rand(2, 4, 8), 2)):
    try:
        call()
    except jaxtyping.TypeCheckError:
        continue
    raise SystemExit("a false shape went unseen")
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=300)


def test_signatures_are_true_and_a_false_shape_is_seen() -> None:
    result = run(PROGRAM + ENGINE + ACCELERATION + LIES)
    assert result.returncode == 0, result.stderr[-3000:]
