"""SAMKDHead beside its equations: pooled scales, windows, and the weights of scales."""

import math
from typing import Any, List, NamedTuple, Sequence

import pytest
import torch
from torch import Tensor

from d2kd.heads import DMKDHead, SAMKDHead
from d2kd.heads.samkd import lag_weights
from d2kd.heads.samkd_scales import PooledMaps, Windows
from d2kd.layers import MaskRule
from tests.helpers.references import (
    BOTH_MOST,
    cell_attention,
    conv,
    generate_from_both,
    guide_of,
    masks_of,
    parts,
    visible,
)
from tests.helpers.toys import feature_view, level_pairs, noise

SIZES = [(72, 80), (50, 30), (8, 8)]  # 9 x 10, 7 x 4 cells and one cell, in maps of 9 x 10


def random_head(channels: int = 3, **values: Any) -> SAMKDHead:
    """From `channels` to 4, on p3; the two generators have unequal weights."""
    torch.manual_seed(0)
    head = SAMKDHead(
        levels=level_pairs(p3=(channels, 4)), **{"min_cells": 2, **BOTH_MOST, **values}
    )
    head.generator["p3"].fusion.data = torch.tensor([0.7, -0.4])
    return head.double()


def pool(x: Tensor, k: int) -> Tensor:
    """The largest of each k x k block, (C, H, W) -> (C, ceil(H / k), ceil(W / k))."""
    rows = [x[:, i : i + k] for i in range(0, x.shape[1], k)]
    blocks = [[row[..., j : j + k] for j in range(0, x.shape[2], k)] for row in rows]
    return torch.stack([torch.stack([b.amax(dim=(1, 2)) for b in row], 1) for row in blocks], 1)


def visible_in_windows(mask: MaskRule, x: Tensor, temperature: float, k: int) -> Tensor:
    """Attention and mask by themselves in each of k x k windows, (C, H, W) -> (1, H, W)."""
    height, width = (math.ceil(size / k) for size in x.shape[1:])
    shown = torch.zeros_like(x[:1])
    for i in range(0, x.shape[1], height):
        for j in range(0, x.shape[2], width):
            window = (..., slice(i, i + height), slice(j, j + width))
            shown[window] = visible(mask, cell_attention(x[window], temperature))
    return shown


class OneScale(NamedTuple):
    error: float  # summed over images
    lag: float


def scale_of_equations(
    head: SAMKDHead, k: int, student: Sequence[Tensor], teacher: Sequence[Tensor]
) -> OneScale:
    """
    k^2 sum (Rec_k - T_k)^2 and mean |S_k - T_k|. With windows the maps are the same on all scales:
    no k^2, and the lag is the mean over the cells that a scale hides.
    """
    error, lags = 0.0, []
    for x, target in zip(student, teacher):
        x = conv(x, head.adapter["p3"])
        if head.hierarchy is PooledMaps:
            x, target = pool(x, k), pool(target, k)
        cells, channels = masks_of(head.cell_mask, head.channel_mask, head.guide, x, target)
        counted = torch.ones_like(cells)
        if head.hierarchy is Windows:
            source = guide_of(head.guide, x, target)
            cells = visible_in_windows(head.cell_mask, source, head.guide.temperature, k)
            counted = 1 - cells
        rebuilt = generate_from_both(head.generator["p3"], x, cells, channels)
        area = k * k if head.hierarchy is PooledMaps else 1
        error += area * ((rebuilt - target) ** 2).sum().item()
        lags += (x - target).abs().mean(dim=0)[counted[0] == 1].tolist()
    return OneScale(error, sum(lags) / len(lags))


def samkd_of_equations(
    head: SAMKDHead, sizes: Sequence[int], student: Sequence[Tensor], teacher: Sequence[Tensor]
) -> float:
    """1/N sum_k u_k error_k, u_k = softmax_k(d_k / mean d)."""
    scales = [scale_of_equations(head, k, student, teacher) for k in sizes]
    mean = sum(scale.lag for scale in scales) / len(scales)
    weights = [math.exp(scale.lag / mean) for scale in scales]
    total = sum(w * scale.error for w, scale in zip(weights, scales))
    return total / sum(weights) / len(student)


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
        {"cell_mask": MaskRule(rule="threshold", hide="most")},
    ],
    ids=["most", "least-of-student", "threshold"],
)
@pytest.mark.parametrize("hierarchy", ["pool", "window"])
def test_loss_is_that_of_the_equations(hierarchy: str, values: Any, sizes: Any) -> None:
    # 9 x 10 cells: pooled by 4, blocks of 4, 4 and 1 rows and of 4, 4 and 2 columns.
    head = random_head(hierarchy=hierarchy, **values)
    student, teacher = noise(3, 3, 9, 10, seed=1) + 1, noise(3, 4, 9, 10, seed=2)
    loss = head(feature_view({"p3": student}, sizes), feature_view({"p3": teacher}, sizes))
    expected = samkd_of_equations(head, [1, 2, 4], parts(student, sizes), parts(teacher, sizes))
    assert loss["loss_samkd"]["p3"].item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("hierarchy", ["pool", "window"])
@pytest.mark.parametrize(
    "min_cells, size, kept",
    [
        (4, (16, 20), [1, 2, 4]),
        (4, (15, 20), [1, 2]),  # 15 / 4 < 4
        (4, (20, 7), [1]),
        (4, (2, 2), [1]),  # the map itself always stays
        (2, (9, 10), [1, 2, 4]),
        (1, (3, 9), [1, 2]),
    ],
)
def test_scales_that_leave_too_few_cells_are_left_out(
    hierarchy: str, min_cells: int, size: Any, kept: List[int]
) -> None:
    head = random_head(4, hierarchy=hierarchy, min_cells=min_cells)
    student, teacher = noise(1, 4, *size, seed=1), noise(1, 4, *size, seed=2)
    loss = head(feature_view({"p3": student}), feature_view({"p3": teacher}))["loss_samkd"]["p3"]
    shown = [int(key.split()[1]) for key, levels in head.maps.items() if levels]
    assert shown == kept
    expected = samkd_of_equations(head, kept, student, teacher)
    assert loss.item() == pytest.approx(expected, rel=2e-5)


def test_one_scale_is_dual_masking() -> None:
    # The weight of a single scale is 1, so this is DMKD.
    head = random_head(scales=[1])
    dmkd = DMKDHead(levels=level_pairs(p3=(3, 4)), **BOTH_MOST).double()
    dmkd.load_state_dict(head.state_dict())
    views = [feature_view({"p3": noise(3, c, 9, 10, seed=c)}, SIZES) for c in (3, 4)]
    torch.testing.assert_close(head(*views)["loss_samkd"], dmkd(*views)["loss_dmkd"])


def test_scales_where_the_student_lags_weigh_more() -> None:
    # softmax(d / mean d), d / mean d = (0.5, 1, 1.5); their sum is 1.
    weights = lag_weights([torch.tensor(v) for v in (0.1, 0.2, 0.3)])
    e = [math.exp(v) for v in (0.5, 1.0, 1.5)]
    torch.testing.assert_close(weights, torch.tensor([v / sum(e) for v in e]))
    torch.testing.assert_close(lag_weights([torch.tensor(0.0)] * 3), torch.full((3,), 1 / 3))


def test_weights_of_scales_pass_no_gradient_on() -> None:
    # Hidden cells of a single scale, without the branch of channels: the lag would be a way.
    head, x = random_head(4, scales=[1]), noise(1, 4, 5, 6).requires_grad_()
    head.generator["p3"].fusion.data = torch.tensor([0.0, -1e4]).double()
    head(feature_view({"p3": x}), feature_view({"p3": noise(1, 4, 5, 6, seed=1)}))["loss_samkd"][
        "p3"
    ].backward()
    shown = head.maps["visible 1"]["p3"].expand_as(x)
    assert (x.grad[~shown] == 0).all() and (x.grad[shown] != 0).all()


def test_windows_spread_the_mask_over_the_map() -> None:
    # All attention in one corner: over the whole map the mask would hide that corner first.
    target = torch.full((1, 4, 8, 8), 0.1).double()
    target[..., :4, :4] = 5.0
    for scales, hidden in (([1], [8, 0, 0, 0]), ([1, 2], [2, 2, 2, 2])):
        head = random_head(
            4, hierarchy="window", scales=scales, cell_mask=MaskRule(0.125, hide="most")
        )
        head(feature_view({"p3": noise(1, 4, 8, 8)}), feature_view({"p3": target}))
        shown = head.maps[f"visible {scales[-1]}"]["p3"][0, 0]
        quarters = [shown[i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)]
        assert [(~quarter).sum().item() for quarter in quarters] == hidden
