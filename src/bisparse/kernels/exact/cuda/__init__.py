"""The exact solver on GPUs, in Triton, which is imported at the first call. A kernel is launched on its tensors' device."""

import torch
from torch import Tensor

from bisparse.kernels.registration import HAS_TRITON, register_kernel

__all__: list[str] = []

if HAS_TRITON:

    @register_kernel("keep_largest", "CUDA")
    def _keep_largest(groups: Tensor, n: int) -> Tensor:
        from bisparse.kernels.exact.cuda import solve

        with torch.cuda.device_of(groups):
            return solve.keep_largest(groups, n)

    @register_kernel("exact_mask", "CUDA")
    def _exact_mask(scores: Tensor, n: int, m: int, exactly: bool) -> tuple[Tensor, Tensor]:
        from bisparse.kernels.exact.cuda import solve

        with torch.cuda.device_of(scores):
            return solve.exact_mask(scores, n, m, exactly)

    @register_kernel("exact_mask_of_magnitudes", "CUDA")
    def _exact_mask_of_magnitudes(weight: Tensor, exactly: bool) -> tuple[Tensor, Tensor]:
        from bisparse.kernels.exact.cuda import solve

        with torch.cuda.device_of(weight):
            return solve.exact_mask_of_magnitudes(weight, exactly)

    @register_kernel("exact_solve", "CUDA")
    def _exact_solve(
        scores: Tensor, n: int, m: int, exactly: bool, prices: Tensor | None, exponent: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        from bisparse.kernels.exact.cuda import solve

        with torch.cuda.device_of(scores):
            return solve.exact_solve(scores, n, m, exactly, prices, exponent)

    @register_kernel("exact_solve_integers", "CUDA")
    def _exact_solve_integers(
        q: Tensor, n: int, exactly: bool, u: Tensor | None, v: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        from bisparse.kernels.exact.cuda import solve

        with torch.cuda.device_of(q):
            return solve.exact_solve_integers(q, n, exactly, u, v)
