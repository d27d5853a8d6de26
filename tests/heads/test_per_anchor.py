"""One linear map for each anchor of a cell."""

from typing import List

import pytest
import torch
from torch import Tensor

from d2kd.heads.ckd import PerAnchorLinear


def in_loops(layer: PerAnchorLinear, x: Tensor, anchor: List[int]) -> Tensor:
    """Row by row, the map of its anchor."""
    return torch.stack([layer.weight.detach()[a] @ row for row, a in zip(x, anchor)])


def layer_of(num_anchors: int) -> PerAnchorLinear:
    torch.manual_seed(0)
    return PerAnchorLinear(4, 6, num_anchors)


@pytest.mark.parametrize(
    "anchor", [[2, 0, 1, 1, 2, 0, 0], [1, 1, 1], [2, 2, 0], [0, 1, 2], [2, 1, 0], [1]]
)
def test_every_row_goes_through_the_map_of_its_anchor(anchor: List[int]) -> None:
    layer, x = layer_of(3), torch.randn(len(anchor), 4)
    y = layer(x, torch.tensor(anchor))
    torch.testing.assert_close(y, in_loops(layer, x, anchor))


def test_maps_differ_from_the_start() -> None:
    # Of the size that nn.Linear gives them: uniform in +-1 / sqrt(4).
    weight = layer_of(3).weight
    assert weight.shape == (3, 6, 4) and weight.abs().max() <= 0.5
    assert (weight[0] - weight[1]).abs().min() > 0 and (weight[1] - weight[2]).abs().min() > 0


def test_gradient_of_a_map_is_that_of_its_rows() -> None:
    # y_r = W_a x_r, so the gradient of sum_r y_r is, in each row of W_a, the sum of that map's x.
    # DistributedDataParallel waits for a gradient of the anchor without rows, too: 0.
    layer, x = layer_of(3), torch.randn(5, 4, requires_grad=True)
    anchor = torch.tensor([2, 0, 2, 2, 0])
    layer(x, anchor).sum().backward()
    assert layer.weight.grad is not None
    for a in range(3):
        expected = x.detach()[anchor == a].sum(dim=0).expand(6, 4)
        torch.testing.assert_close(layer.weight.grad[a], expected)
    assert (layer.weight.grad[1] == 0).all()
    expected = torch.stack([layer.weight.detach()[a].sum(dim=0) for a in anchor])
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("num_anchors", [1, 3])
def test_no_rows_give_no_rows_and_zero_gradients(num_anchors: int) -> None:
    layer, x = layer_of(num_anchors), torch.zeros(0, 4, requires_grad=True)
    y = layer(x, torch.zeros(0, dtype=torch.int64))
    assert y.shape == (0, 6)
    y.sum().backward()
    assert (layer.weight.grad == 0).all() and layer.weight.grad.shape == (num_anchors, 6, 4)
    assert x.grad.shape == (0, 4)


def test_one_map_needs_no_anchor() -> None:
    layer, x = layer_of(1), torch.randn(5, 4)
    torch.testing.assert_close(layer(x), x @ layer.weight[0].T)
    torch.testing.assert_close(layer(x, torch.zeros(5, dtype=torch.int64)), layer(x))
