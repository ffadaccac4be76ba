"""Memory of outputs: used again, but never while anybody holds it."""

import threading

import pytest
import torch

from bisparse.kernels.numba_runtime import memory
from bisparse.kernels.numba_runtime.memory import LARGE, empty

pytestmark = pytest.mark.skipif(not memory.MARKS, reason="this system cannot mark memory as free to take")


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    memory._free.clear()
    memory._unmarked.clear()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (2, LARGE // 8, 4), (LARGE + 1,)])
def test_an_array_of_the_shape_and_type_that_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    array = empty(shape, dtype)
    assert array.shape == shape and array.dtype == dtype and array.is_contiguous()
    array.fill_(1)
    assert array.all()


def test_memory_that_nobody_holds_is_used_again_and_no_other() -> None:
    first, second = (empty((LARGE,), torch.bool) for _ in range(2))
    addresses = {first.data_ptr(), second.data_ptr()}
    assert len(addresses) == 2
    held = first[5:7]  # a view is enough
    del first, second
    third = empty((LARGE,), torch.bool)
    assert third.data_ptr() in addresses and third.data_ptr() != held.data_ptr() - 5
    assert empty((LARGE + 4096,), torch.bool).data_ptr() not in addresses  # another size
    fourth = empty((LARGE,), torch.bool)
    assert fourth.data_ptr() not in addresses  # `held` still lies in the first


def test_little_memory_is_kept() -> None:
    arrays = [empty((LARGE,), torch.bool) for _ in range(3 * memory.KEPT)]
    del arrays
    assert len(memory._free) == memory.KEPT


@pytest.mark.parametrize("shape", [(2 * LARGE,), (1,)])
def test_memory_is_marked_once_another_size_is_asked_for(shape: tuple[int, ...]) -> None:
    first = empty((LARGE,), torch.bool)
    del first
    assert len(memory._unmarked) == len(memory._free) == 1
    again = empty((LARGE,), torch.bool)
    assert not memory._unmarked and not memory._free
    del again
    other = empty(shape, torch.bool)
    assert not memory._unmarked and len(memory._free) == 1
    again = empty((LARGE,), torch.bool)  # marked memory is used again all the same
    assert not memory._free and again.fill_(True).all()
    del other


def test_threads_do_not_get_the_same_memory() -> None:
    wrong = []

    def use(number: int) -> None:
        for _ in range(50):
            array = empty((LARGE,), torch.uint8)
            array[::4096] = number
            if not (array[::4096] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
