"""ACAMKDHead beside its equations in loops, and its limits."""

import copy
import math
from typing import List, Optional, Tuple

import pytest
import torch
from torch import Tensor

from d2kd.heads import ACAMKDHead
from d2kd.heads.acamkd import CooperativeMasks, _overlap
from tests.helpers.toys import feature_view, level_pairs, noise

SIZES = [(40, 48), (24, 32)]  # 5 x 6 and 3 x 4 cells


def new_head(student: int = 3, teacher: int = 4, **values: float) -> ACAMKDHead:
    torch.manual_seed(0)
    return ACAMKDHead(levels=level_pairs(p3=(student, teacher)), num_masks=3, **values)


def losses_of(
    head: ACAMKDHead, student: Tensor, teacher: Tensor, sizes: Optional[List] = None
) -> List[Tensor]:
    views = (feature_view({"p3": x}, sizes or ()) for x in (student, teacher))
    return [x["p3"] for x in head(*views).values()]


def masks_in_loops(masks: CooperativeMasks, x: Tensor, target: Tensor) -> Tuple[Tensor, Tensor]:
    """Of one image, (C, H, W): masks of cells (M, H, W) and of channels (M, C)."""
    query, key = masks.query(target[None])[0], masks.key(x[None])[0]
    value = masks.value(x[None])[0].flatten(1)
    answers = torch.zeros_like(x)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            logits = query[:, i, j] @ key.flatten(1) / len(query) ** 0.5
            answers[:, i, j] = value @ logits.softmax(dim=0)
    cells = torch.einsum("mc,cij->mij", masks.of_cells, answers).sigmoid()
    return cells, (masks.of_channels * answers.mean(dim=(1, 2))).sigmoid()


def dice(one: Tensor, other: Tensor) -> Tensor:
    return 2 * (one * other).sum() / ((one**2).sum() + (other**2).sum())


def acamkd_in_loops(head: ACAMKDHead, student: Tensor, teacher: Tensor) -> Tuple[float, float]:
    """Of a batch whose images are cut to their sizes, in float64."""
    head, student, teacher = copy.deepcopy(head).double(), student.double(), teacher.double()
    loss, diversity = [], []
    for n, (height, width) in enumerate(SIZES):
        x = head.adapter["p3"](student[n : n + 1])[0, :, : height // 8, : width // 8]
        target = teacher[n, :, : height // 8, : width // 8]
        cells, channels = masks_in_loops(head.masks["p3"], x, target)
        error = (target - x) ** 2
        for a, b in zip(cells, channels):
            by_cells = [(a * e).sum() / a.sum() for e in error]
            by_channels = [(b @ e) / b.sum() for e in error.flatten(1).T]
            loss.append(sum(by_cells) / len(by_cells) + sum(by_channels) / len(by_channels))
        for i, j in ((0, 1), (0, 2), (1, 2)):
            diversity.append(dice(cells[i], cells[j]) + dice(channels[i], channels[j]))
    return tuple(sum(x).item() / len(x) for x in (loss, diversity))


def test_losses_are_those_of_the_equations() -> None:
    head = new_head(diversity_weight=0.5)
    student, teacher = (noise(2, c, 5, 6, seed=c).float() for c in (3, 4))
    student[1, :, 3:], teacher[1, :, :, 4:] = 1e3, 1e3  # padding does not count
    with torch.no_grad():
        for p in head.masks.parameters():
            p *= 4  # as initialised all masks are near 1/2, whatever the attention
        found = losses_of(head, student, teacher, SIZES)
        loss, diversity = acamkd_in_loops(head, student, teacher)
    assert [x.item() for x in found] == pytest.approx([loss, 0.5 * diversity], rel=1e-5)


@pytest.mark.parametrize("sizes", [None, [(320, 384), (192, 256)]])
def test_no_map_of_all_pairs_of_cells_is_kept(sizes: Optional[List]) -> None:
    student, teacher = (noise(2, c, 40, 48, seed=c).float().requires_grad_() for c in (3, 4))
    kept: List[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses_of(new_head(), student, teacher, sizes)
    assert max(kept) < (40 * 48) ** 2 / 10


def test_equal_features_have_no_loss_but_that_of_the_masks() -> None:
    x = noise(2, 4, 5, 6).float()
    loss, diversity = losses_of(new_head(4, 4), x, x)
    assert loss == 0 and diversity > 0


def test_gradient_reaches_student_adapter_and_masks_and_not_the_teacher() -> None:
    head = new_head()
    x, target = (noise(2, c, 5, 6, seed=c).float().requires_grad_() for c in (3, 4))
    sum(losses_of(head, x, target)).backward()
    assert target.grad is None and x.grad.abs().sum() > 0
    for name, p in head.named_parameters():
        # A constant added to all keys changes no softmax.
        assert p.grad is not None and (p.grad.abs().sum() > 1e-6) != name.endswith("key.bias"), name


def test_overlap_of_equal_masks_is_1_and_of_disjoint_ones_0() -> None:
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert _overlap(torch.stack([mask, mask])[None]) == 1
    assert _overlap(torch.stack([mask, 1 - mask])[None]) == 0
    # Pairs: equal, disjoint, disjoint.
    assert _overlap(torch.stack([mask, mask, 1 - mask])[None]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_weight_that_is_negative_or_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"^diversity_weight must be 0 or above, got {value};"):
        new_head(diversity_weight=value)


@pytest.mark.parametrize("values", [{"num_masks": 1}, {"diversity_weight": 0.0}])
def test_diversity_needs_a_weight_and_two_masks(values: dict) -> None:
    head = ACAMKDHead(levels=level_pairs(p3=(4, 4)), **values)
    x, target = (feature_view({"p3": noise(1, 4, 3, 3, seed=s).float()}) for s in (1, 2))
    assert list(head(x, target)) == ["loss_acamkd"]
