"""The main path: scores and a pattern in, the best mask and its proof out."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Real
from torch import Tensor

from bisparse.kernels.exact.ops import BadScoreError, check_scores, keep_largest
from bisparse.kernels.figures.cpu import keep_largest_of_all
from bisparse.kernels.registration import is_plain_on_cpu
from bisparse.pattern import Paired, Pattern, Sequential, Structure, Unstructured, parse_pattern
from bisparse.solution import Certificate, Solution
from bisparse.solvers import Solver, parse_solver
from bisparse.tiles import Layout, LayoutKind, default_layout, from_matrices, pad_to_multiple, to_matrices

__all__ = ["solve"]

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
)  # fmt: skip


def solve(
    scores: Real[Tensor, "..."],
    pattern: str | Structure,
    solver: str | Solver | None = None,
    *,
    layout: Layout | None = None,
    remainder: str = "pad",
    warm_start: Solution | None = None,
) -> Solution:
    """The best mask of a structure for given scores: it keeps the largest total score.

    Structures without coupling between groups (N:M, sequential, paired, unstructured) are solved by selection, whatever
    the solver; a transposable pattern by `solver`, by default `Exact`. Ties are broken deterministically, the same
    whatever the batch order or the number of threads. In a plain selection the lowest index wins.

    Args:
        scores: non-negative, finite; float64, float32, float16, bfloat16 or an integer type. 2-D (O, I); 3-D a batch of
            matrices, or of tiles; 4-D and 5-D a convolution's weight; or as `layout` says.
        pattern: the structure or its text, such as ``"4:8-T"``. N is the number kept.
        solver: for transposable patterns: a `Solver`, or its name in `bisparse.solvers.SOLVERS`, such as ``"greedy"``.
        layout: how the tensor stores its matrices.
        remainder: what to do where M does not divide a side. "pad": complete with zeros, solve, crop (the mask still
            obeys the pattern); "dense": keep everything; "error": raise.
        warm_start: an earlier solution of nearly the same scores, whose prices make this one faster. The value does not
            depend on it.

    Raises:
        ValueError: scores that are NaN, infinite, negative, of another dtype, of no matrix shape or in no plain tensor.

    >>> scores = torch.tensor([[4.0, 3.0], [3.0, 1.0]])  # the largest entry is not part of the optimum
    >>> solution = solve(scores, "1:2-T")
    >>> solution.value, solution.bound, solution.mask.int().tolist()
    (6.0, 6.0, [[0, 1], [1, 0]])
    """
    pattern = parse_pattern(pattern)
    if not isinstance(scores, Tensor):
        raise ValueError(f"scores must be a torch tensor, not {type(scores).__name__}")
    if not _is_plain(scores):
        raise ValueError(
            f"scores must be a plain dense tensor that holds numbers, not a {type(scores).__name__} of layout {scores.layout} "
            f"on {scores.device}; convert them first, as by .to_dense() or, if sharded, .full_tensor()"
        )
    if scores.dtype not in DTYPES:
        raise ValueError(f"scores of dtype {scores.dtype} cannot be solved; convert them to float32")
    if remainder not in ("pad", "dense", "error"):
        raise ValueError(f"remainder={remainder!r}: expected 'pad', 'dense' or 'error'")
    if layout is not None or warm_start is not None:
        for name, given, kind in (("layout", layout, Layout), ("warm_start", warm_start, Solution)):
            if given is not None and not isinstance(given, kind):
                raise ValueError(f"{name}={given!r:.60}: expected an instance of {kind.__name__}")
    # On cold caches each call of torch takes as long as the masks of thousands of weights, so a plain matrix uses few calls.
    if type(scores) is not Tensor or scores.requires_grad:
        scores = scores.detach()
    matrices, shape = scores, scores.shape
    layout = default_layout(len(shape)) if layout is None else layout
    plain = len(shape) == 2 and layout.kind is LayoutKind.LINEAR
    if not plain:
        matrices = to_matrices(scores, layout)
    rows, columns = shape if plain else matrices.shape[-2:]
    m = getattr(pattern, "m", 1)
    transposable = isinstance(pattern, Pattern) and pattern.transposable
    ragged = bool(columns % m or (transposable and rows % m))
    if ragged:
        problem = f"{m} does not divide the sides of a {rows} x {columns} matrix at {pattern}"
        if remainder == "error":
            raise ValueError(f"{problem}; pass remainder='pad' or 'dense'")
        if remainder == "dense":
            check_scores(scores)
            return Solution(torch.ones_like(scores, dtype=torch.bool), scores, pattern, layout)
    if not transposable or 0 in shape:
        check_scores(scores)
        mask = from_matrices(select(to_matrices(scores, layout), pattern), layout, scores.shape)
        return Solution(mask, scores, pattern, layout, certify=lambda: _certificate_of_nothing(m) if transposable else None)
    assert isinstance(pattern, Pattern)
    solver = parse_solver(solver)
    padded = pad_to_multiple(matrices, m) if ragged else matrices
    if not solver.checks_scores:
        check_scores(scores)
    start = _start_of(warm_start, padded, pattern)
    try:
        flat = padded if plain else padded.reshape(-1, padded.shape[-1])
        mask, certificate = solver.solve_matrix(flat, pattern.n, m, start)
    except BadScoreError:
        check_scores(scores)  # says where in the caller's own tensor
        raise
    mask = mask if plain else mask.view(padded.shape)
    if ragged:
        mask = mask[..., :rows, :columns].contiguous()
    if not plain:
        mask = from_matrices(mask, layout, shape)
    return Solution(mask, scores, pattern, layout, solver.exactly, certificate)


def _is_plain(scores: Tensor) -> bool:
    """Not sparse, nested, sharded, fake or on the meta device; a subclass without arithmetic of its own is plain."""
    if type(scores) is not Tensor and type(scores).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False
    return scores.layout is torch.strided and not (scores.is_nested or scores.is_meta)


def _certificate_of_nothing(m: int) -> Certificate:
    prices = torch.zeros(0, m, dtype=torch.int64, device="cpu")
    return Certificate(prices, prices, torch.zeros(0, dtype=torch.int64, device="cpu"))


def _start_of(solution: Solution | None, scores: Tensor, pattern: Pattern) -> Certificate | None:
    if solution is None:
        return None
    if solution.pattern != pattern:
        raise ValueError(f"warm_start is a solution at {solution.pattern}, not {pattern}")
    certificate = solution.certificate
    if certificate is None:
        return None
    tiles = scores.numel() // pattern.m**2
    if certificate.u.shape != (tiles, pattern.m):
        raise ValueError(f"warm_start has prices of {certificate.u.shape[0]} tiles, these scores have {tiles}")
    return certificate.to(scores.device)


def select(matrices: Real[Tensor, "B R C"], pattern: Structure) -> Bool[Tensor, "B R C"]:
    """The best mask of a structure whose groups are independent; of equal scores the one with the lower index is kept."""
    batch, rows, columns = matrices.shape
    if isinstance(pattern, Unstructured):
        flat, kept = matrices.reshape(batch, rows * columns), pattern.kept(rows * columns)
        if is_plain_on_cpu(flat):
            exact = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
            lines = [keep_largest_of_all(line, kept) for line in exact]
            if (found := [line for line in lines if line is not None]) and len(found) == batch:
                return torch.stack(found).view(batch, rows, columns)
        mask = torch.zeros_like(flat, dtype=torch.bool)
        best = flat.sort(stable=True, dim=-1, descending=True).indices[:, :kept]
        return mask.scatter_(1, best, True).view(batch, rows, columns)
    assert isinstance(pattern, Pattern | Sequential | Paired)
    m, n = pattern.m, pattern.n
    padded = torch.nn.functional.pad(matrices, (0, -columns % m)) if columns % m else matrices
    groups = padded.unflatten(-1, (-1, m))
    if isinstance(pattern, Sequential):
        return _sequential(groups, n).flatten(-2)[..., :columns]
    if isinstance(pattern, Paired):
        groups, n = _summable(groups).unflatten(-1, (m // 2, 2)).sum(-1), n // 2
    mask = keep_largest(groups.reshape(-1, groups.shape[-1]), n).view(groups.shape)
    if isinstance(pattern, Paired):
        mask = mask.repeat_interleave(2, dim=-1)
    return mask.flatten(-2)[..., :columns]


def _sequential(groups: Real[Tensor, "B R G M"], n: int) -> Bool[Tensor, "B R G M"]:
    m = groups.shape[-1]
    mask = torch.ones_like(groups, dtype=torch.bool)
    if n == m:
        return mask
    windows = _summable(groups).unfold(-1, m - n, 1).sum(-1)
    start = windows.argmin(-1, keepdim=True)
    place = torch.arange(m, device=groups.device)
    return (place < start) | (place >= start + (m - n))


def _summable(groups: Real[Tensor, "*B M"]) -> Real[Tensor, "*B M"]:
    """The scores in a type that adds up a group without loss: int64 for integers, unless they are so large that it overflows."""
    if not groups.is_floating_point():
        return groups.double() if bool((groups > torch.iinfo(torch.int64).max // groups.shape[-1]).any()) else groups.long()
    if groups.dtype == torch.float64 and bool((groups > 2.0**960).any()):
        return groups * 2.0**-64  # or sums would leave float64
    return groups.double()
