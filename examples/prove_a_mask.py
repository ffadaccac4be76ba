"""Prove with a few lines of numpy, without bisparse's own checks, that a mask is optimal.

For any prices u of the rows and v of the columns of a tile, all >= 0, no mask with at most N kept in every row and column can
keep more than

    N * sum(u) + N * sum(v) + sum of max(0, score - u - v)

since the score of each kept weight is at most its row's price plus its column's price plus the excess over both. A mask that
keeps exactly that much is therefore optimal. The arithmetic is in integers, so the comparison is exact.

    python examples/prove_a_mask.py
"""

import numpy as np
import torch

import bisparse

N, M = 4, 8


def tiles_of(matrix: np.ndarray) -> np.ndarray:
    """(tiles, M, M), band by band, left to right."""
    rows, columns = matrix.shape
    return matrix.reshape(rows // M, M, columns // M, M).swapaxes(1, 2).reshape(-1, M, M)


def main() -> None:
    torch.manual_seed(0)
    scores = torch.randn(256, 256).abs()
    solution = bisparse.solve(scores, f"{N}:{M}-T")
    certificate = solution.certificate
    u, v = (prices.numpy().astype(np.int64) for prices in (certificate.u, certificate.v))

    mask = tiles_of(solution.mask.numpy())
    # The solver sees each tile in units of 2**-exponent, 24 bits of its largest score.
    units = np.round(np.ldexp(tiles_of(scores.double().numpy()), certificate.exponent.numpy()[:, None, None])).astype(np.int64)

    kept = (units * mask).sum((1, 2))
    left = np.maximum(units - u[:, :, None] - v[:, None, :], 0).sum((1, 2))
    bound = N * u.sum(1) + N * v.sum(1) + left
    assert mask.sum(1).max() <= N and mask.sum(2).max() <= N, "a row or a column keeps too many"
    assert u.min() >= 0 and v.min() >= 0, "a price is negative"
    assert (kept == bound).all(), "some tile is not proved"
    print(f"{len(mask)} tiles: each mask keeps exactly what no mask can exceed")
    print(f"kept {solution.value:.2f} of {float(scores.sum()):.2f}, {solution.retained:.1%}")


if __name__ == "__main__":
    main()
