"""DFMSDHead beside its equations, its alignment beside Pearson's r, its filter beside Fourier's."""

import math
from typing import Any, List, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from d2kd.heads import DFMSDHead
from d2kd.heads.dfmsd import high_pass
from d2kd.layers import MaskRule
from tests.helpers.references import (
    BOTH_MOST,
    cell_attention,
    conv,
    generate_from_both,
    guide_of,
    masks_of,
    mean_one_softmax,
    parts,
    standardise,
    visible,
)
from tests.helpers.toys import feature_view, level_pairs, noise

SIZES = [(56, 64), (40, 26)]  # 7 x 8 and 5 x 4 cells, in maps of 7 x 8


def random_head(channels: int = 3, **values: Any) -> DFMSDHead:
    """From `channels` to 4, on p3; the two generators have unequal weights."""
    torch.manual_seed(0)
    head = DFMSDHead(levels=level_pairs(p3=(channels, 4)), **{**BOTH_MOST, **values})
    if "p3" in head.generator:
        head.generator["p3"].fusion.data = torch.tensor([0.7, -0.4])
    return head.double()


def high_pass_in_loops(x: Tensor, cutoff: float) -> Tensor:
    """
    x minus its mean weighted by exp(-d^2 / (2 sigma^2)), sigma = sqrt(ln 2) / (2 pi cutoff), over
    the cells that exist within 3 sigma, rounded up, along each axis: (C, H, W) -> the same shape.
    """
    sigma = math.sqrt(math.log(2)) / (2 * math.pi * cutoff)
    radius, (height, width) = math.ceil(3 * sigma), x.shape[1:]
    y = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            total, mean = 0.0, torch.zeros_like(x[:, 0, 0])
            for a in range(max(i - radius, 0), min(i + radius + 1, height)):
                for b in range(max(j - radius, 0), min(j + radius + 1, width)):
                    weight = math.exp(-((a - i) ** 2 + (b - j) ** 2) / (2 * sigma**2))
                    total, mean = total + weight, mean + weight * x[:, a, b]
            y[:, i, j] = x[:, i, j] - mean / total
    return y


def dfmsd_of_equations(
    head: DFMSDHead, student: Sequence[Tensor], teacher: Sequence[Tensor]
) -> List[float]:
    """
    mean (T^ - norm(T))^2 and beta/2 mean (norm(f(S)) - norm(T))^2, over channels and all cells of
    all images; cells are hidden by (A + gamma E) / (1 + gamma), E the attention of what the
    high-pass filter leaves.
    """
    student = [conv(x, head.adapter["p3"]) for x in student]
    rebuilding = semantic = count = 0.0
    for x, target, x_normal, normal in zip(
        student, teacher, standardise(student), standardise(teacher)
    ):
        guide, gamma = head.guide, head.enhancement["p3"]
        _, channels = masks_of(head.cell_mask, head.channel_mask, guide, x, target)
        source = guide_of(guide, x, target)
        detail = high_pass_in_loops(source, head.high_pass_cutoff).abs().mean(0, keepdim=True)
        attention = cell_attention(source, guide.temperature)
        attention = attention + gamma * mean_one_softmax(detail, guide.temperature)
        cells = visible(head.cell_mask, attention / (1 + gamma))
        rebuilt = generate_from_both(head.generator["p3"], x, cells, channels)
        rebuilding += ((rebuilt - normal) ** 2).sum().item()
        semantic += ((x_normal - normal) ** 2).sum().item()
        count += normal.numel()
    return [rebuilding / count, head.semantic_ratio * semantic / (2 * count)]


@pytest.mark.parametrize("sizes", [(), SIZES], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"enhancement": 0.0},
        {
            "enhancement": 2.0,
            "high_pass_cutoff": 0.15,
            "temperature": 0.8,
            "attention_from": "student",
        },
        {"cell_mask": MaskRule(rule="threshold", hide="most"), "semantic_ratio": 1.5},
    ],
    ids=["enhanced", "plain", "student", "threshold"],
)
@pytest.mark.parametrize("channels", [3, 4])
def test_losses_are_those_of_the_equations(channels: int, values: Any, sizes: Any) -> None:
    head = random_head(channels, **values)
    assert len(list(head.adapter.parameters())) == 2, "also between equal channels"
    student, teacher = noise(2, channels, 7, 8, seed=1) * 3 + 1, noise(2, 4, 7, 8, seed=2)
    losses = head(feature_view({"p3": student}, sizes), feature_view({"p3": teacher}, sizes))
    assert list(losses) == ["loss_dfmsd_rebuild", "loss_dfmsd_semantic"]
    expected = dfmsd_of_equations(head, parts(student, sizes), parts(teacher, sizes))
    found = [x["p3"].item() for x in losses.values()]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sizes", [(), SIZES], ids=["whole", "padded"])
def test_semantic_part_is_one_minus_pearson_but_for_bessel_s_correction(sizes: Any) -> None:
    # As PKD's: (1 - r) (m - 1) / m, of the m cells that hold a part of their image.
    head = random_head(semantic_ratio=0.5, reconstruct=False)
    student = noise(2, 3, 7, 8, seed=1)
    teacher = student[:, [0, 1, 2, 0]] + noise(2, 4, 7, 8, seed=2)
    losses = head(feature_view({"p3": student}, sizes), feature_view({"p3": teacher}, sizes))
    assert list(losses) == ["loss_dfmsd_semantic"] and not list(head.generator.parameters())
    x, target = (
        torch.cat([image.flatten(1) for image in images], dim=1)
        for images in (
            [conv(image, head.adapter["p3"]) for image in parts(student, sizes)],
            parts(teacher, sizes),
        )
    )
    m = x.shape[1]
    assert m == (7 * 8 + 5 * 4 if sizes else 2 * 7 * 8)
    r = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(x, target)])
    expected = 0.5 * (1 - r) * (m - 1) / m
    assert losses["loss_dfmsd_semantic"]["p3"].item() == pytest.approx(expected, rel=1e-4)


def test_magnitude_and_offset_of_the_teacher_s_channels_do_not_matter() -> None:
    # Nor for the target of the reconstruction; the student guides, as attention does see them.
    head = random_head(attention_from="student")
    student, teacher = noise(2, 3, 7, 8, seed=1), noise(2, 4, 7, 8, seed=2)
    changed = teacher * torch.tensor([0.1, 1.0, 3.0, 50.0]).view(4, 1, 1) + 7
    first, second = (
        head(feature_view({"p3": student}, SIZES), feature_view({"p3": x}, SIZES))
        for x in (teacher, changed)
    )
    for name, levels in first.items():
        torch.testing.assert_close(second[name], levels, rtol=1e-4, atol=0.0)


def test_student_that_is_the_teacher_up_to_scale_and_shift_is_aligned() -> None:
    head, x = random_head(4, reconstruct=False), noise(2, 4, 7, 8)
    head.adapter["p3"].weight.data = torch.diag(torch.tensor([0.5, 1.0, 2.0, 9.0]))[..., None, None]
    loss = head.double()(feature_view({"p3": x}, SIZES), feature_view({"p3": x}, SIZES))
    assert loss["loss_dfmsd_semantic"]["p3"].item() < 1e-9


def test_semantic_part_can_be_left_out() -> None:
    x = feature_view({"p3": noise(2, 4, 7, 8)})
    assert list(random_head(4, semantic_ratio=0.0)(x, x)) == ["loss_dfmsd_rebuild"]


def test_enhancement_is_for_fine_levels_and_moves_the_mask_but_not_its_share() -> None:
    # A flat bright half and a faint chequerboard: attention alone hides the bright half, that of
    # high frequencies the chequerboard.
    x = torch.zeros(1, 1, 8, 16)
    x[..., :8] = 1.0
    x[..., 8:] = 0.9 * (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))
    levels = level_pairs(p4=(1, 1), p5=(1, 1))
    for enhancement, hidden in ((0.0, {"p4": 0, "p5": 0}), (3.0, {"p4": 64, "p5": 0})):
        head = DFMSDHead(
            levels=levels,
            cell_mask=MaskRule(ratio=0.5, hide="most"),
            channel_mask=BOTH_MOST["channel_mask"],
            enhancement=enhancement,
        )
        view = feature_view({"p4": x, "p5": x}, image_sizes=[(256, 512)])
        head(view, view)
        for level, shown in head.maps["visible"].items():
            assert (~shown).sum() == 64
            assert (~shown[..., 8:]).sum() == hidden[level], (enhancement, level)


# The high-pass filter -----------------------------------------------------------------------------


@pytest.mark.parametrize("cutoff", [0.05, 0.1, 0.15])
def test_high_pass_is_a_product_in_the_frequency_domain(cutoff: float) -> None:
    # A map repeated three times each way: of the one in the middle the repetition that a discrete
    # Fourier transform assumes is true, and the border is far.
    x = noise(1, 2, 24, 32)
    found = high_pass(x.repeat(1, 1, 3, 3), cutoff)[..., 24:48, 32:64]
    rows, columns = torch.fft.fftfreq(24), torch.fft.fftfreq(32)  # cycles per cell
    squared = (rows[:, None] ** 2 + columns**2).double()
    response = 1 - torch.exp(-squared * math.log(2) / (2 * cutoff**2))
    expected = torch.fft.ifft2(torch.fft.fft2(x) * response).real
    # The Gaussian ends at 3 sigma and is sampled once per cell, which aliases where it is not yet 0
    # at half a cycle per cell: exp(-0.25 ln 2 / (2 cutoff^2)) is 0.02 for 0.15. x has deviation 1.
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.05)
    assert (found - expected).square().mean().sqrt() < 0.01


@pytest.mark.parametrize("cutoff", [0.05, 0.1, 0.2])
def test_blur_passes_half_of_the_power_at_the_cutoff(cutoff: float) -> None:
    # So the filter leaves 1 - 1/sqrt(2) of a wave's amplitude there.
    wave = torch.cos(2 * math.pi * cutoff * torch.arange(-100, 101).double())
    left = high_pass(wave.expand(1, 1, 21, 201), cutoff)[0, 0, 10, 100]
    assert left.item() == pytest.approx(1 - 1 / math.sqrt(2), abs=0.01)


@pytest.mark.parametrize("sizes", [[(56, 64), (56, 64)], SIZES], ids=["whole", "padded"])
def test_high_pass_is_that_of_the_loops_also_at_borders_and_beside_padding(sizes: Any) -> None:
    x = noise(2, 3, 7, 8)
    inside = feature_view({"p3": x}, sizes).inside_image("p3")
    found = high_pass(x if inside is None else torch.where(inside, x, 1e4), 0.1, inside)
    for image, part in zip(parts(found, sizes), parts(x, sizes)):
        torch.testing.assert_close(image, high_pass_in_loops(part, 0.1))
    assert inside is None or (found * ~inside == 0).all()


def test_nothing_is_left_of_a_constant() -> None:
    x = torch.full((2, 3, 7, 8), 5.0, dtype=torch.float64)
    inside = feature_view({"p3": x}, SIZES).inside_image("p3")
    for cells in (None, inside):
        assert high_pass(x, 0.1, cells).abs().max() < 1e-12
