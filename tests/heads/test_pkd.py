"""PKDHead beside its equations in loops, its closed forms, and its limits."""

from typing import Dict, Tuple

import numpy as np
import pytest
import torch
from torch import Tensor

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from d2kd import load_config
from d2kd.heads import DetectorInfo, DistillPair, PKDHead, build_head
from d2kd.pairing.levels import LevelPair, pair_levels
from tests.helpers.toys import feature_view, level_pairs, noise


def pkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of one level of equal channels."""
    head = PKDHead(levels=level_pairs(p3=(student.shape[1], teacher.shape[1])))
    return head(feature_view({"p3": student}), feature_view({"p3": teacher}))["loss_pkd"]["p3"]


def pkd_in_loops(student: Tensor, teacher: Tensor) -> float:
    """1/2 mean (s~ - t~)^2, x~ = (x - mean) / (std + 1e-6) per channel, std with m - 1."""
    images, channels, height, width = student.shape
    total = 0.0
    for c in range(channels):
        standardised = []
        for x in (student, teacher):
            values = [
                x[n, c, i, j].item()
                for n in range(images)
                for i in range(height)
                for j in range(width)
            ]
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
            standardised.append([(v - mean) / (variance**0.5 + 1e-6) for v in values])
        for s, t in zip(*standardised):
            total += (s - t) ** 2
    return total / (2 * student.numel())


def mean_pearson(student: Tensor, teacher: Tensor) -> float:
    """Pearson's r of each channel over images and positions, averaged over channels."""
    pairs = zip(student.transpose(0, 1), teacher.transpose(0, 1))
    return float(np.mean([np.corrcoef(s.flatten(), t.flatten())[0, 1] for s, t in pairs]))


def pair_of_detectors(
    student: Dict[str, Tuple[int, int]], teacher: Dict[str, Tuple[int, int]]
) -> DistillPair:
    """A DistillPair from two pyramids: level name to (channels, stride)."""
    infos = [
        DetectorInfo(
            name="Toy",
            shapes={k: ShapeSpec(channels=c, stride=s) for k, (c, s) in levels.items()},
            num_classes=3,
            provides=frozenset({"features"}),
        )
        for levels in (student, teacher)
    ]
    return DistillPair(*infos, pair_levels(infos[0].shapes, infos[1].shapes))


def pyramid(first: int, last: int, channels: int = 4) -> Dict[str, Tuple[int, int]]:
    """Levels p<first> to p<last>, coarsest first: the order must not matter."""
    return {f"p{i}": (channels, 2**i) for i in reversed(range(first, last + 1))}


def config(**values: object) -> CfgNode:
    words = [word for k, v in values.items() for word in (f"DISTILL.PKD.{k}", v)]
    return load_config(opts=words)


def test_loss_is_that_of_the_equations() -> None:
    student, teacher = noise(2, 3, 4, 5, seed=1) * 3 + 2, noise(2, 3, 4, 5, seed=2)
    loss = pkd_loss(student, teacher)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(pkd_in_loops(student, teacher), rel=1e-5)


def test_loss_is_one_minus_pearson_but_for_bessel_s_correction() -> None:
    # With the unbiased deviation the m standardised values have the sum of squares m - 1, so
    # 1/(2m) sum (s~ - t~)^2 = (2 (m - 1) - 2 r (m - 1)) / (2m) = (1 - r) (m - 1) / m.
    student = noise(2, 3, 4, 5, seed=1)
    teacher = student + noise(2, 3, 4, 5, seed=2)
    m = 2 * 4 * 5
    expected = (1 - mean_pearson(student, teacher)) * (m - 1) / m
    assert pkd_loss(student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_equal_features_give_zero_and_opposite_ones_two() -> None:
    x = noise(2, 3, 4, 5)
    assert pkd_loss(x, x).item() == 0.0
    # r = -1, m = 40
    assert pkd_loss(x, -x).item() == pytest.approx(2 * 39 / 40, rel=1e-4)


@pytest.mark.parametrize("changed", ["student", "teacher"])
def test_magnitude_and_offset_of_a_channel_do_not_matter(changed: str) -> None:
    student, teacher = noise(2, 3, 4, 5, seed=1), noise(2, 3, 4, 5, seed=2)
    scale = torch.tensor([0.1, 1.0, 50.0]).view(1, 3, 1, 1).double()
    offset = torch.tensor([-3.0, 0.0, 100.0]).view(1, 3, 1, 1).double()
    x = {"student": student, "teacher": teacher}
    x[changed] = x[changed] * scale + offset
    torch.testing.assert_close(
        pkd_loss(x["student"], x["teacher"]), pkd_loss(student, teacher), rtol=1e-4, atol=0.0
    )


def test_duplicated_images_leave_the_correlation_as_it_is() -> None:
    # Only m doubles in (1 - r) (m - 1) / m; here from 20 to 40.
    student, teacher = noise(1, 3, 4, 5, seed=1), noise(1, 3, 4, 5, seed=2)
    once = pkd_loss(student, teacher).item()
    twice = pkd_loss(torch.cat([student, student]), torch.cat([teacher, teacher])).item()
    assert twice / (39 / 40) == pytest.approx(once / (19 / 20), rel=1e-4)


def test_gradient_reaches_student_and_adapters_of_every_level() -> None:
    head = PKDHead(levels=level_pairs(p3=(3, 5), p4=(3, 5)))
    student = {"p3": torch.randn(2, 3, 8, 8), "p4": torch.randn(2, 3, 4, 4)}
    teacher = {"p3": torch.randn(2, 5, 8, 8), "p4": torch.randn(2, 5, 4, 4)}
    for x in student.values():
        x.requires_grad_()
    losses = head(feature_view(student), feature_view(teacher))["loss_pkd"]
    assert list(losses) == ["p3", "p4"]
    sum(losses.values()).backward()
    # Not the adapters' biases: an offset does not matter.
    weights = [(k, p) for k, p in head.named_parameters() if k.endswith("weight")]
    for name, x in [*student.items(), *weights]:
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0, name
    assert all(p.grad is not None for p in head.parameters()), "DDP would wait for it"


def test_detectors_of_equal_channels_need_no_parameters() -> None:
    assert not list(PKDHead(levels=level_pairs(p3=(4, 4))).parameters())


def test_autocast_gives_a_float32_loss_close_to_the_exact_one() -> None:
    torch.manual_seed(0)
    head = PKDHead(levels=level_pairs(p3=(6, 8)))
    student = feature_view({"p3": torch.randn(2, 6, 16, 16)})
    teacher = feature_view({"p3": torch.randn(2, 8, 16, 16)})
    exact = head(student, teacher)["loss_pkd"]["p3"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(student, teacher)["loss_pkd"]["p3"]
    assert loss.dtype == torch.float32 and loss.isfinite()
    # The adapter rounds to bfloat16, 8 significant bits; the rest is float32.
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0.0)


def test_half_precision_features_are_standardised_in_float32() -> None:
    # A mean over 20,000 values around 1000 would overflow float16 on the way.
    x = (noise(2, 1, 100, 100) * 10 + 1000).half()
    loss = pkd_loss(x, x.flip(-1))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(pkd_loss(x.float(), x.flip(-1).float()).item(), rel=1e-6)


@pytest.mark.parametrize("images", [1, 2])
def test_level_of_one_cell_is_finite(images: int) -> None:
    # A single value per channel has no deviation; it carries no correlation and no gradient.
    x = torch.randn(images, 3, 1, 1, requires_grad=True)
    loss = pkd_loss(x, torch.randn(images, 3, 1, 1))
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
    if images == 1:
        assert loss.item() == 0.0 and (x.grad == 0).all()


@pytest.mark.parametrize("constant", ["student", "teacher"])
def test_channel_without_any_variation_is_finite(constant: str) -> None:
    features = {"student": torch.randn(2, 3, 4, 4), "teacher": torch.randn(2, 3, 4, 4)}
    features[constant][:, 1] = 0.0  # a dead channel
    x = features["student"].requires_grad_()
    loss = pkd_loss(x, features["teacher"])
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_first_levels_are_the_finest_ones() -> None:
    pair = pair_of_detectors(pyramid(3, 7), pyramid(2, 7))
    for num_levels, expected in ((4, "p3 p4 p5 p6"), (1, "p3"), (0, "p3 p4 p5 p6 p7")):
        head = build_head("PKD", config(NUM_LEVELS=num_levels), pair)
        assert [p.student for p in head.levels] == expected.split()


def test_index_pairs_first_with_first_as_the_published_configs_do() -> None:
    # RetinaNet from Mask R-CNN: P3 <- P2, ..., P6 <- P5. By stride P3 is never paired with P2.
    pair = pair_of_detectors(pyramid(3, 7), pyramid(2, 6))
    by_index = build_head("PKD", config(MATCH="index"), pair)
    assert [(p.student, p.teacher) for p in by_index.levels] == [
        ("p3", "p2"),
        ("p4", "p3"),
        ("p5", "p4"),
        ("p6", "p5"),
    ]
    by_stride = build_head("PKD", config(MATCH="stride"), pair)
    assert [(p.student, p.teacher) for p in by_stride.levels] == [
        (k, k) for k in ("p3", "p4", "p5", "p6")
    ]


def bilinear_in_loops(x: Tensor, height: int, width: int) -> Tensor:
    """Cell centres at (i + 1/2): position (i + 1/2) h / H - 1/2 of the source, edges repeated."""
    h, w = x.shape[-2:]
    y = torch.zeros(*x.shape[:2], height, width, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            row = max((i + 0.5) * h / height - 0.5, 0.0)
            column = max((j + 0.5) * w / width - 0.5, 0.0)
            top, left = int(row), int(column)
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            down, across = row - top, column - left
            y[..., i, j] = (
                x[..., top, left] * (1 - down) * (1 - across)
                + x[..., top, right] * (1 - down) * across
                + x[..., bottom, left] * down * (1 - across)
                + x[..., bottom, right] * down * across
            )
    return y


def test_index_compares_the_part_that_both_maps_cover() -> None:
    # The teacher pads to a square, as ViTDet does: below the image its map has nothing to compare.
    x = noise(2, 4, 8, 16).float()
    padded = torch.cat([x, noise(2, 4, 8, 16, seed=1).float()], dim=2)
    head = PKDHead(levels=level_pairs(p3=(4, 4)), match="index")
    for student, teacher in ((x, padded), (padded, x)):
        (loss,) = head(feature_view({"p3": student}), feature_view({"p3": teacher}))[
            "loss_pkd"
        ].values()
        assert loss == 0


# Of 5 x 7 cells of stride 4 the last are half of one of stride 8, which counts.
@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_index_brings_the_student_to_the_teacher_s_size(size: Tuple[int, int]) -> None:
    levels = (LevelPair("p3", "p2", 3, 3, 8, 4),)
    student, teacher = noise(2, 3, 3, 4, seed=1), noise(2, 3, *size, seed=2)
    head = PKDHead(levels=levels, match="index")
    loss = head(feature_view({"p3": student}), feature_view({"p2": teacher}))["loss_pkd"]["p3"]
    expected = pkd_in_loops(bilinear_in_loops(student, *size), teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"MATCH": "name"}, r"DISTILL\.PKD\.MATCH must be one of stride, index, got 'name'"),
        ({"NUM_LEVELS": -1}, r"DISTILL\.PKD\.NUM_LEVELS must be 0 or more, got -1: 0 is all"),
    ],
)
def test_value_outside_its_range_is_refused(values: Dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_head("PKD", config(**values), pair_of_detectors(pyramid(3, 7), pyramid(3, 7)))


def test_index_and_named_levels_are_refused_together() -> None:
    cfg = config(MATCH="index")
    cfg.DISTILL.LEVELS = [["p3", "p3"]]
    with pytest.raises(ValueError, match="MATCH is 'index', but DISTILL.LEVELS names pairs"):
        build_head("PKD", cfg, pair_of_detectors(pyramid(3, 7), pyramid(3, 7)))
