"""Max-pooling and windows, at borders and beside padding."""

import math

import pytest
import torch

from d2kd.heads.samkd_scales import cut_windows, max_pool, pool_inside
from tests.helpers.toys import feature_view, noise

SIZES = [(56, 72), (40, 24), (8, 8)]  # 7 x 9, 5 x 3 cells and one cell, in maps of 7 x 9


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("padded", [False, True])
def test_pooling_takes_the_largest_of_each_block(size: int, padded: bool) -> None:
    # Negative values too: a zero of the padding must not win. Garbage neither.
    x = noise(3, 2, 7, 9) - 3
    inside = feature_view({"p3": x}, SIZES).inside_image("p3") if padded else None
    blocks = pool_inside(inside, size)
    pooled = max_pool(x if inside is None else torch.where(inside, x, 1e3), size, inside, blocks)
    assert pooled.shape == (3, 2, math.ceil(7 / size), math.ceil(9 / size))
    for n, (h, w) in enumerate([(7, 9), (5, 3), (1, 1)] if padded else [(7, 9)] * 3):
        for i in range(pooled.shape[2]):
            for j in range(pooled.shape[3]):
                block = x[
                    n, :, i * size : min((i + 1) * size, h), j * size : min((j + 1) * size, w)
                ]
                covered = block[0].numel() > 0
                assert blocks is None or blocks[n, 0, i, j] == covered
                if covered:
                    assert torch.equal(pooled[n, :, i, j], block.amax(dim=(1, 2)))
                elif size > 1:
                    assert (pooled[n, :, i, j] == 0).all()


def test_pooling_gives_padding_no_gradient() -> None:
    x = noise(3, 2, 7, 9).requires_grad_()
    inside = feature_view({"p3": x}, SIZES).inside_image("p3")
    max_pool(x, 4, inside, pool_inside(inside, 4)).sum().backward()
    assert (x.grad * ~inside == 0).all() and x.grad.isfinite().all()
    # One per block that is inside: 2 x 3, 2 x 1 and 1 blocks of both channels.
    assert x.grad.sum() == 2 * (6 + 2 + 1)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_windows_cut_what_each_image_covers(count: int) -> None:
    x = torch.zeros(3, 1, 7, 9)
    inside = feature_view({"p3": x}, SIZES).inside_image("p3")
    windows = cut_windows(inside, count)
    assert windows.shape == (3, count * count, 7, 9)
    for n, (h, w) in enumerate([(7, 9), (5, 3), (1, 1)]):
        for i in range(7):
            for j in range(9):
                expected = [False] * count * count
                if i < h and j < w:  # windows of ceil(h / count) rows and ceil(w / count) columns
                    row, column = i // math.ceil(h / count), j // math.ceil(w / count)
                    expected[row * count + column] = True
                assert windows[n, :, i, j].tolist() == expected


def test_windows_of_an_image_without_any_cell_are_empty() -> None:
    assert not cut_windows(torch.zeros(1, 1, 3, 3, dtype=torch.bool), 2).any()
