"""Memory of outputs: used again, but never while anybody holds it."""

import threading

import numpy as np
import pytest
import torch

from bisparse.kernels import memory
from bisparse.kernels.memory import LARGE, empty

pytestmark = pytest.mark.skipif(not memory.MARKS, reason="this system cannot mark memory as free to take")


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    memory._free.clear()


@pytest.mark.parametrize("dtype", [np.bool_, np.int32])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (2, LARGE // 8, 4), (LARGE + 1,)])
def test_an_array_of_the_shape_and_type_that_can_be_written(shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    array = empty(shape, dtype)
    assert array.shape == shape and array.dtype == dtype and array.flags.c_contiguous and array.flags.writeable
    array.fill(1)
    assert array.all()


def test_memory_that_nobody_holds_is_used_again_and_no_other() -> None:
    first, second = (torch.from_numpy(empty((LARGE,), np.bool_)) for _ in range(2))
    addresses = {first.data_ptr(), second.data_ptr()}
    assert len(addresses) == 2
    held = first[5:7]  # a view is enough
    del first, second
    third = torch.from_numpy(empty((LARGE,), np.bool_))
    assert third.data_ptr() in addresses and third.data_ptr() != held.data_ptr() - 5
    assert empty((LARGE + 4096,), np.bool_).ctypes.data not in addresses  # another size
    fourth = torch.from_numpy(empty((LARGE,), np.bool_))
    assert fourth.data_ptr() not in addresses  # `held` still lies in the first


def test_little_memory_is_kept() -> None:
    arrays = [empty((LARGE,), np.bool_) for _ in range(3 * memory.KEPT)]
    del arrays
    assert len(memory._free) == memory.KEPT


def test_threads_do_not_get_the_same_memory() -> None:
    wrong = []

    def use(number: int) -> None:
        for _ in range(50):
            array = empty((LARGE,), np.uint8)
            array[::4096] = number
            if not (array[::4096] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
