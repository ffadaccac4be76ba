"""Sorting networks: which pairs to compare and exchange, whatever the values.

Source: Batcher, Sorting networks and their applications, AFIPS 1968 (odd-even merge sort); Knuth, The Art of Computer
Programming 3, section 5.3.4.
"""

from __future__ import annotations

from functools import cache

__all__ = ["sorting_network"]


@cache
def sorting_network(size: int) -> tuple[tuple[int, int], ...]:
    """Comparators (low, high) that sort `size` values ascending, by Batcher's odd-even merge sort; any size.

    >>> sorting_network(4)
    ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2))
    >>> [len(sorting_network(size)) for size in (4, 8, 16, 32)]
    [5, 19, 63, 191]
    """
    comparators = []
    block = 1
    while block < size:
        step = block
        while step >= 1:
            for start in range(step % block, size - step, 2 * step):
                for low in range(start, min(start + step, size - step)):
                    if low // (2 * block) == (low + step) // (2 * block):
                        comparators.append((low, low + step))
            step //= 2
        block *= 2
    return tuple(comparators)
