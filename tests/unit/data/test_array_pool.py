"""Tests of arrays that are used again: never while anything refers to them, and always afterwards."""

import sys
import threading

import numpy as np
import pytest
import torch

from internlm.data.array_pool import ArrayPool


def test_an_array_without_references_is_given_out_again() -> None:
    pool = ArrayPool()
    first = pool.take(2, 3)
    address = first.ctypes.data
    assert pool.take(2, 3).ctypes.data != address
    del first
    assert pool.take(2, 3).ctypes.data == address


@pytest.mark.parametrize(
    "use",
    [
        lambda array: array[0],
        lambda array: array.reshape(-1)[1:],
        torch.from_numpy,
        lambda array: torch.from_numpy(array)[1, :2],
        lambda array: torch.from_numpy(array).view(-1).chunk(2)[1].numpy(),
        lambda array: memoryview(array),
        lambda array: torch.utils.dlpack.to_dlpack(torch.from_numpy(array)),
    ],
)
def test_an_array_in_use_is_not_given_out(use) -> None:
    pool = ArrayPool()
    array = pool.take(2, 4)
    address = array.ctypes.data
    kept = use(array)
    del array
    others = [pool.take(2, 4) for _ in range(5)]
    assert address not in {other.ctypes.data for other in others}
    del kept
    assert pool.take(2, 4).ctypes.data == address


def test_arrays_have_the_size_asked_for() -> None:
    pool = ArrayPool()
    sizes = [(3,), (4,), (3,), (1, 3), (0,), (2, 0)]
    for _ in range(2):
        for size in sizes:
            array = pool.take(*size)
            assert array.shape == size
            assert array.dtype == np.int64


def test_the_pool_keeps_a_limited_number_of_arrays() -> None:
    pool = ArrayPool(most=3)
    arrays = [pool.take(10) for _ in range(20)]
    assert sum(sys.getrefcount(arrays[place]) > 2 for place in range(20)) == 3  # besides this list


def test_threads_never_have_the_same_array() -> None:
    pool, wrong = ArrayPool(), []

    def work(number: int) -> None:
        for _ in range(2000):
            array = pool.take(64)
            array.fill(number)
            if not (array == number).all():
                wrong.append(number)
            del array

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
