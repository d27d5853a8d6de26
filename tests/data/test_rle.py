"""Runs that do not fill the image are told from those that pycocotools writes."""

from typing import Any

import numpy as np
import pycocotools.mask
import pytest

from d2kd.data.rle import is_rle


@pytest.mark.parametrize("seed", range(20))
def test_what_pycocotools_writes_passes_and_a_part_of_it_does_not(seed: int) -> None:
    drawn = np.random.default_rng(seed)
    height, width = drawn.integers(1, 200, 2).tolist()
    mask = drawn.random((height, width)) < drawn.choice([0, 0.01, 0.5, 1])
    if seed % 2:
        mask = np.zeros((height, width)) > 0
        mask[height // 3 :, width // 2 :] = True
    rle = pycocotools.mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    rle = {"size": rle["size"], "counts": rle["counts"].decode()}
    assert is_rle(rle)
    assert not is_rle({**rle, "counts": rle["counts"][:-1]})
    assert not is_rle({**rle, "size": [height + 1, width]})


@pytest.mark.parametrize(
    "counts", ["zzzz", "", "PPYo0", "\n", [], [1, 2], [-5, 13], ["8"], None, 8]
)
def test_other_runs_do_not_pass(counts: Any) -> None:
    assert not is_rle({"size": [2, 4], "counts": counts})


@pytest.mark.parametrize("size", [None, [8], [0, 8], [2.0, 4], "24", [-2, -4]])
def test_other_sizes_do_not_pass(size: Any) -> None:
    assert not is_rle({"size": size, "counts": [8]})
    assert is_rle({"size": [2, 4], "counts": [8]}) and is_rle({"size": [2, 4], "counts": [0, 3, 5]})
