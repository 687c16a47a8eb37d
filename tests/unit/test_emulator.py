"""The emulated warp itself, beside the PTX manual's words and numpy's halves."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator import one

LANE = np.arange(32)
GROUP, IN_GROUP = LANE // 4, LANE % 4
"""groupID and threadID_in_group of the manual."""


def random_halves(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float16)


def packed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    low, high = (x.view(np.uint16).astype(np.uint32) for x in (first, second))
    return low | high << 16


def both(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tuple((words >> shift & 0xFFFF).astype(np.uint16).view(np.float16) for shift in (0, 16))


def words(*columns: np.ndarray) -> np.ndarray:
    table = np.zeros((32, 6), np.uint32)
    for i, column in enumerate(columns):
        table[:, i] = column
    return table


def test_products_with_16_rows_in_depth_are_laid_out_as_in_the_manual():
    """m16n8k16: a_i, i in 0..7: row = groupID for 0 <= i < 2 and 4 <= i < 6, else groupID + 8;
    column = 2 threadID_in_group + (i & 1), + 8 for i >= 4. b_i: row = 2 threadID_in_group + (i &
    1), + 8 for i >= 2; column = groupID. c_i: row = groupID, + 8 for i >= 2; column = 2
    threadID_in_group + (i & 1)."""
    a, b = random_halves(16, 16), random_halves(16, 8)
    of_a = [
        a[GROUP if i < 2 or 4 <= i < 6 else GROUP + 8, 2 * IN_GROUP + i % 2 + 8 * (i >= 4)]
        for i in range(8)
    ]
    of_b = [b[2 * IN_GROUP + i % 2 + 8 * (i >= 2), GROUP] for i in range(4)]
    registers = [packed(of_a[i], of_a[i + 1]) for i in (0, 2, 4, 6)]
    registers += [packed(of_b[i], of_b[i + 1]) for i in (0, 2)]
    found = one(0, words(*registers)).view(np.float32)
    expected = a.astype(float) @ b.astype(float)
    for i in range(4):
        wanted = expected[GROUP + 8 * (i >= 2), 2 * IN_GROUP + i % 2]
        np.testing.assert_allclose(found[:, i], wanted, rtol=1e-6)


def test_products_with_8_rows_in_depth_are_laid_out_as_in_the_manual():
    """m16n8k8: a_i: row = groupID for i < 2, else groupID + 8; column = 2 threadID_in_group + (i &
    1). b_i: row = 2 threadID_in_group + i; column = groupID. c as above."""
    a, b = random_halves(16, 8), random_halves(8, 8)
    of_a = [a[GROUP if i < 2 else GROUP + 8, 2 * IN_GROUP + i % 2] for i in range(4)]
    of_b = [b[2 * IN_GROUP + i, GROUP] for i in range(2)]
    found = one(1, words(packed(*of_a[:2]), packed(*of_a[2:]), packed(*of_b)))
    expected = (a.astype(float) @ b.astype(float)).astype(np.float16)
    for i in range(2):
        for j, half in enumerate(both(found[:, i])):
            assert (half == expected[GROUP + 8 * i, 2 * IN_GROUP + j]).all()


def test_a_matrix_is_transposed():
    matrix = random_halves(8, 8)
    rows = packed(matrix[GROUP, 2 * IN_GROUP], matrix[GROUP, 2 * IN_GROUP + 1])
    for j, half in enumerate(both(one(2, words(rows))[:, 0])):
        assert (half == matrix.T[GROUP, 2 * IN_GROUP + j]).all()


EDGES = [0.0, -0.0, 65504, 65519.99, 65520, -1e9, np.inf, np.nan, 2**-14, 2**-24, 2**-25, 1.0004883]
EDGES += [1 + 2**-11, 1 + 3 * 2**-11, 2**-25 * 1.01, 6.1e-5, 2047.5 * 2**-25, 1e-20]


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-7, 3e4])
def test_halves_are_those_of_numpy(scale):
    random = np.random.default_rng(3)
    x, y = (scale * random.standard_normal((2, 32))).astype(np.float32)
    x[: len(EDGES)] = EDGES
    a, b = random_halves(32), random_halves(32)[::-1].copy()
    a[:3] = np.nan, 60000, 1e-7
    b[:3] = 1, 60000, 0.3
    found = one(3, words(x.view(np.uint32), y.view(np.uint32), packed(a, a), packed(b, np.abs(b))))
    with np.errstate(over="ignore", invalid="ignore"):
        for half, wanted in zip(both(found[:, 0]), (x, y), strict=True):
            np.testing.assert_array_equal(half, wanted.astype(np.float16))
        for half, other in zip(both(found[:, 1]), (b, np.abs(b)), strict=True):
            np.testing.assert_array_equal(half, a * other)
        for half, other in zip(both(found[:, 2]), (b, np.abs(b)), strict=True):
            np.testing.assert_array_equal(half, np.where(a >= other, a, np.float16(0)))


def test_lanes_that_do_not_meet_are_an_error():
    with pytest.raises(RuntimeError, match="lane 1 is at lanes_with, another at sync_warp"):
        one(4, words())
