"""DMKDHead beside its equations, and which cells and channels get no gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from d2kd.heads import DMKDHead
from d2kd.layers import MaskRule
from tests.helpers.references import BOTH_MOST, conv, generate_from_both, masks_of, parts
from tests.helpers.toys import feature_view, level_pairs, noise

SIZES = [(40, 48), (24, 30), (8, 8)]  # 5 x 6, 3 x 4 cells and one cell, in maps of 5 x 6


def random_head(channels: int = 3, **values: Any) -> DMKDHead:
    """From `channels` to 4, on p3; the two generators have unequal weights."""
    torch.manual_seed(0)
    head = DMKDHead(levels=level_pairs(p3=(channels, 4)), **{**BOTH_MOST, **values})
    head.generator["p3"].fusion.data = torch.tensor([0.7, -0.4])
    return head.double()


def dmkd_of_equations(head: DMKDHead, x: Tensor, target: Tensor) -> float:
    """Of one image: sum (w_s G_s(X * M_s) + w_c G_c(X * M_c) - T)^2, X = f(S)."""
    x = conv(x, head.adapter["p3"])
    cells, channels = masks_of(head.cell_mask, head.channel_mask, head.guide, x, target)
    rebuilt = generate_from_both(head.generator["p3"], x, cells, channels)
    return ((rebuilt - target) ** 2).sum().item()


@pytest.mark.parametrize("sizes", [(), SIZES], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            "cell_mask": MaskRule(0.45, hide="least"),
            "temperature": 0.8,
            "attention_from": "student",
        },
        {"channel_mask": MaskRule(rule="threshold", threshold=0.98, hide="most")},
    ],
    ids=["most", "least-of-student", "threshold"],
)
@pytest.mark.parametrize("channels", [3, 4])
def test_loss_is_that_of_the_equations(channels: int, values: Any, sizes: Any) -> None:
    head = random_head(channels, **values)
    student, teacher = noise(3, channels, 5, 6, seed=1), noise(3, 4, 5, 6, seed=2)
    loss = head(feature_view({"p3": student}, sizes), feature_view({"p3": teacher}, sizes))
    pairs = zip(parts(student, sizes), parts(teacher, sizes))
    expected = sum(dmkd_of_equations(head, x, target) for x, target in pairs) / 3
    assert loss["loss_dmkd"]["p3"].item() == pytest.approx(expected, rel=1e-5)


def test_only_what_both_masks_hide_gets_no_gradient() -> None:
    head, x, target = random_head(4), noise(2, 4, 5, 6), noise(2, 4, 5, 6, seed=1)
    loss = head(feature_view({"p3": x.requires_grad_()}), feature_view({"p3": target}))
    loss["loss_dmkd"]["p3"].backward()
    for n, image in enumerate(target):
        cells, channels = masks_of(head.cell_mask, head.channel_mask, head.guide, x[n], image)
        assert channels.sum() == 2, "half of the channels"
        shown = (cells + channels) > 0
        assert (x.grad[n][~shown] == 0).all() and (x.grad[n][shown] != 0).all()
