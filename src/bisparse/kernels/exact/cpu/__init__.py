"""The exact solver on CPUs, in numba, which is imported at the first call because that takes a second."""

from torch import Tensor

from bisparse.kernels.registration import register_kernel

__all__: list[str] = []


@register_kernel("keep_largest", "CPU")
def _keep_largest(groups: Tensor, n: int) -> Tensor:
    from bisparse.kernels.exact.cpu import top_n

    return top_n.keep_largest(groups, n)


@register_kernel("exact_mask", "CPU")
def _exact_mask(scores: Tensor, n: int, m: int, exactly: bool) -> tuple[Tensor, Tensor]:
    from bisparse.kernels.exact.cpu import solve

    return solve.exact_mask(scores, n, m, exactly)


@register_kernel("exact_solve", "CPU")
def _exact_solve(
    scores: Tensor, n: int, m: int, exactly: bool, prices: Tensor | None, exponent: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from bisparse.kernels.exact.cpu import solve

    return solve.exact_solve(scores, n, m, exactly, prices, exponent)


@register_kernel("exact_solve_integers", "CPU")
def _exact_solve_integers(q: Tensor, n: int, exactly: bool, u: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from bisparse.kernels.exact.cpu import solve

    return solve.exact_solve_integers(q, n, exactly, u, v)
