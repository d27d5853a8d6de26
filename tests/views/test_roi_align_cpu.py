"""RoIAlign as a sparse product is torchvision's."""

from typing import Tuple

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import roi_align

from d2kd.views.roi_align_cpu import roi_align_levels_cpu
from tests.helpers.toys import noise

STRIDES = [4, 8, 32]


def boxes(dtype: torch.dtype) -> torch.Tensor:
    """On two images of 96 x 128 pixels: anywhere, beyond all sides, of no width, a map's size."""
    corners = noise(40, 2, 2) * 80 + 50
    anywhere = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    special = [[5, 5, 5, 5], [9, 9, 9, 60], [900] * 4, [10, 10, 10.5, 90], [0, 0, 128, 96]]
    of_images = torch.arange(45)[:, None] % 2
    return torch.cat([of_images, torch.cat([anywhere, torch.tensor(special)])], dim=1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(7, 7), (3, 2)])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_features_and_gradients_are_those_of_torchvision(
    sampling_ratio: int, size: Tuple[int, int], dtype: torch.dtype
) -> None:
    maps = [noise(2, 3, 96 // s, 128 // s, seed=s).to(dtype).requires_grad_() for s in STRIDES]
    rois = boxes(dtype)
    expected = torch.stack(
        [roi_align(x, rois, size, 1 / s, sampling_ratio, True) for x, s in zip(maps, STRIDES)], 1
    )
    found = roi_align_levels_cpu(maps, STRIDES, rois, size, sampling_ratio)
    assert_close(found, expected)
    weight = noise(*expected.shape).to(dtype)
    gradients = [torch.autograd.grad((x * weight).sum(), maps) for x in (found, expected)]
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {}  # sums of 1000s
    assert_close(*gradients, **close)


def test_without_boxes_there_are_no_features() -> None:
    maps = [noise(2, 3, 8, 8).requires_grad_()]
    found = roi_align_levels_cpu(maps, [8], torch.zeros(0, 5), (7, 7))
    assert found.shape == (0, 1, 3, 7, 7)
    found.sum().backward()
    assert maps[0].grad.abs().sum() == 0
