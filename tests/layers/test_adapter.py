"""The adapter between the channels of student and teacher."""

import pytest
import torch
from torch import nn

from detectron2.layers import ShapeSpec

from d2kd.layers import build_adapter, build_adapters
from d2kd.pairing.levels import pair_levels
from tests.helpers.toys import level_pairs


@pytest.mark.parametrize("channels, always", [((3, 5), False), ((3, 5), True), ((4, 4), True)])
def test_adapter_turns_student_channels_into_teacher_channels(channels, always) -> None:
    adapter = build_adapter(*channels, always=always)
    assert adapter(torch.randn(2, channels[0], 6, 7)).shape == (2, channels[1], 6, 7)
    assert [tuple(p.shape) for p in adapter.parameters()] == [
        (channels[1], channels[0], 1, 1),
        (channels[1],),
    ]


def test_equal_channels_need_none_and_else_start_with_the_identity() -> None:
    x = torch.randn(2, 4, 6, 7)
    assert isinstance(build_adapter(4, 4), nn.Identity)
    torch.testing.assert_close(build_adapter(4, 4, always=True)(x), x)


def test_every_pair_of_levels_has_its_own() -> None:
    adapters = build_adapters(level_pairs(p3=(3, 5), p4=(5, 5)))
    assert list(adapters) == ["p3", "p4"] and isinstance(adapters["p4"], nn.Identity)


def test_equal_channels_in_another_order_are_adapted_where_asked_for() -> None:
    # The student has the teacher's channels in the order 2, 0, 1: a matrix of 0 and 1 undoes it.
    teacher, order = torch.randn(2, 3, 4, 5), [2, 0, 1]
    pairs = pair_levels(*2 * [{"p3": ShapeSpec(channels=3, stride=8)}], adapt_equal=True)
    (adapter,) = build_adapters(pairs).values()
    torch.testing.assert_close(adapter(teacher), teacher)  # until it has learnt
    with torch.no_grad():
        adapter.weight.zero_()
        adapter.weight[order, range(3)] = 1.0
    torch.testing.assert_close(adapter(teacher[:, order]), teacher)
