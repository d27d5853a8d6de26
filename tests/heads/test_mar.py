"""MARHead beside its equations in loops, its closed forms, padding, and its limits."""

import math
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import pytest
import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes

from d2kd import load_config
from d2kd.heads import DetectorInfo, DistillPair, MARHead, build_head
from d2kd.heads.mar_mask import ObjectMask
from d2kd.pairing.levels import pair_levels
from d2kd.views import Regions, RegionSampler
from tests.helpers.baseline_references import (
    Box,
    LargestTensor,
    PartsView,
    masked_error,
    multi_value_mask,
    pooled_pixels,
    relation,
)
from tests.helpers.references import conv
from tests.helpers.toys import level_pairs, noise

# Three images in maps of 48 x 64 pixels: overlapping boxes; on the border, beyond it, tiny; none.
BOXES: List[List[Box]] = [
    [[4.5, 6.5, 30.5, 28.5], [20.5, 16.5, 40.5, 47.5], [1.5, 1.5, 300.5, 299.5]],
    [[0.0, 0.0, 16.0, 30.0], [-9.5, 20.5, 60.5, 60.5], [41.25, 9.5, 41.75, 9.75]],
    [],
]
SIZES = [(48, 64), (40, 50), (33, 9)]  # height and width without padding
MAPS = {"p3": (6, 8), "p4": (3, 4)}
TOWERS = {"p3": (5, 7), "p4": (3, 3)}  # channels of student and teacher
REGIONS = Regions([Boxes(torch.zeros(3, 4)), Boxes(torch.zeros(2, 4)), Boxes(torch.zeros(0, 4))])


def random_head(dense: bool = True, **values: Any) -> MARHead:
    torch.manual_seed(0)
    levels = level_pairs(p3=(3, 4), p4=(4, 4))
    fields = {
        "levels": levels,
        "dense_levels": levels if dense else (),
        "relation": "dense" if dense else "regions",
        "sampler": RegionSampler(),
    }
    return MARHead(**{**fields, **values})


def maps(channels: Mapping[str, int], seed: int, images: int = 3) -> Dict[str, Tensor]:
    return {
        k: noise(images, c, *MAPS[k], seed=seed + i).float()
        for i, (k, c) in enumerate(channels.items())
    }


def views(sizes: Sequence[Any] = ()) -> Tuple[PartsView, PartsView]:
    """Student and teacher, with features, towers and RoI features of noise."""
    rois = [noise(5, c, 3, 3, seed=20 + c).float() for c in (5, 7)]
    towers = [maps({k: c[i] for k, c in TOWERS.items()}, seed=10 + i) for i in (0, 1)]
    return (
        PartsView(maps({"p3": 3, "p4": 4}, seed=1), BOXES, sizes, towers[0], rois[0], REGIONS),
        PartsView(maps({"p3": 4, "p4": 4}, seed=3), BOXES, sizes, towers[1], rois[1]),
    )


def cells_of(size: Tuple[int, int], level: str) -> Tuple[int, int]:
    """Rows and columns that hold a part of an image."""
    stride = 2 ** int(level[1:])
    return math.ceil(size[0] / stride), math.ceil(size[1] / stride)


def by_level(losses: Any) -> Dict[str, Tensor]:
    """A term without levels has the level ""."""
    return losses if isinstance(losses, dict) else {"": losses}


def feature_loss(
    head: MARHead, x: Tensor, target: Tensor, boxes: Sequence[Any], sizes: Sequence[Any] = ()
) -> Tensor:
    """Of p3, by a head of that level alone."""
    found = head._features(
        PartsView({"p3": x}, boxes, sizes), PartsView({"p3": target}, boxes, sizes)
    )
    return found["p3"]


def identity_head(**values: Any) -> MARHead:
    """On p3, of one adapter that hands on what it is given, with the weights 1."""
    fields = {
        "levels": level_pairs(p3=(2, 2)),
        "dense_levels": (),
        "relation": "dense" if "dense_levels" in values else "regions",
        "sampler": RegionSampler(),
        "feature_weight": 1.0,
        "relation_weight": 1.0,
    }
    head = MARHead(**{**fields, **values})
    head.adapter["p3"] = nn.Identity()
    return head


# Features -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[], SIZES])
@pytest.mark.parametrize("kind", ["values", "gaussian"])
def test_feature_loss_is_that_of_the_equations(kind: str, sizes: List[Any]) -> None:
    mask = ObjectMask(kind, inside=0.9, near=0.4, far=0.05, near_factor=1.7)
    head, (student, teacher) = random_head(mask=mask, feature_weight=3.0), views(sizes)
    values = (0.9, 0.4, 0.05), 1.7, True, kind == "gaussian"
    for x in student.features.values():  # the adapter sees neighbours: zeros, as beyond the map
        for n, size in enumerate(sizes):
            rows, columns = cells_of(size, "p3" if x.shape[2] == 6 else "p4")
            x[n, :, rows:], x[n, :, :, columns:] = 0.0, 0.0
    losses = head(student, teacher)["loss_mar_feature"]
    assert list(losses) == ["p3", "p4"]
    for level, loss in losses.items():
        x, stride = student.features[level], 2 ** int(level[1:])
        adapted = torch.stack([conv(image.double(), head.adapter[level]) for image in x])
        weights = [multi_value_mask(b, stride, [8, 16], *MAPS[level], *values) for b in BOXES]
        for n, size in enumerate(sizes):
            rows, columns = cells_of(size, level)
            weights[n][rows:], weights[n][:, columns:] = 0.0, 0.0
        total = torch.stack(weights)
        expected = 3.0 / 2 * masked_error(adapted, teacher.features[level], total)
        assert loss.shape == () and loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=1e-5) and expected > 0.1
        torch.testing.assert_close(head.maps["mask"][level][:, 0], total.float())


def test_constant_difference_is_half_of_its_square_whatever_the_mask() -> None:
    # A weighted mean of 3^2, times 1/2.
    x = noise(3, 2, 6, 8).float()
    for sizes in ([], SIZES):
        for kind in ("values", "gaussian"):
            head = identity_head(mask=ObjectMask(kind))
            assert feature_loss(head, x, x + 3, BOXES, sizes).item() == pytest.approx(4.5, rel=1e-5)


def test_error_inside_a_box_counts_ten_times_as_much_as_far_from_it() -> None:
    # One box of 1 cell, its 8 neighbours near; 12 x 12 - 9 = 135 cells far. In all
    # 1 + 8/2 + 135/10 = 18.5. An error of 4 in one of two channels: 4^2 V / (2 x 2 x 18.5).
    x, boxes = torch.zeros(1, 2, 12, 12), [[[40.0, 40.0, 48.0, 48.0]]]
    for cell, value in (((5, 5), 1.0), ((4, 6), 0.5), ((6, 5), 0.5), ((3, 5), 0.1), ((0, 11), 0.1)):
        target = torch.zeros(1, 2, 12, 12)
        target[(0, 1, *cell)] = 4.0
        found = feature_loss(identity_head(), x, target, boxes).item()
        assert found == pytest.approx(16 * value / (4 * 18.5), rel=1e-5), cell


def test_mass_of_the_mask_below_one_half_channel_does_not_blow_the_loss_up() -> None:
    # Far from all objects 0: without a box nothing counts, and the divisor is 1.
    x, target = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
    assert feature_loss(identity_head(mask=ObjectMask(far=0.0)), x, target, [[]]).item() == 0.0
    # 16 cells x 0.01 x 2 channels = 0.32 errors over max(1, 2 x 2 x 0.16)
    found = feature_loss(identity_head(mask=ObjectMask(far=0.01)), x, target, [[]]).item()
    assert found == pytest.approx(0.32, rel=1e-5)


def test_order_of_the_levels_does_not_matter() -> None:
    head, sides = random_head(), views(SIZES)
    before = head(*sides)
    head.levels, head.dense_levels = head.levels[::-1], head.dense_levels[::-1]
    for name, losses in head(*sides).items():
        assert list(losses) == ["p4", "p3"]
        assert all(torch.equal(loss, before[name][level]) for level, loss in losses.items())


def test_adapter_is_a_3x3_convolution_also_between_equal_channels() -> None:
    shapes = {k: tuple(v.shape) for k, v in random_head().adapter.named_parameters()}
    assert shapes["p3.weight"] == (4, 3, 3, 3) and shapes["p4.weight"] == (4, 4, 3, 3)
    assert shapes["p3.bias"] == shapes["p4.bias"] == (4,)


# Relation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_cells", [24, 3])
@pytest.mark.parametrize("sizes", [[], SIZES])
def test_relation_of_towers_is_that_of_the_equations(sizes: List[Any], max_cells: int) -> None:
    head, sides = random_head(max_cells=max_cells, relation_weight=7.0), views(sizes)
    losses = head(*sides)["loss_mar_relation"]
    assert list(losses) == ["p3", "p4"]
    for level, loss in losses.items():
        expected = 0.0
        for n in range(3):
            part = cells_of(sizes[n], level) if sizes else MAPS[level]
            towers = [side.towers[level][n] for side in sides]
            expected += relation(*(pooled_pixels(x, max_cells, *part) for x in towers)) / 3
        assert loss.shape == () and loss.dtype == torch.float32
        assert loss.item() == pytest.approx(7.0 * expected, rel=1e-5) and expected > 0.01


def test_relation_within_regions_is_that_of_the_equations() -> None:
    student, teacher = views()
    loss = random_head(dense=False, relation_weight=7.0)(student, teacher)["loss_mar_relation"]
    expected = sum(
        relation(list(x.flatten(1).T), list(target.flatten(1).T))
        for x, target in zip(student.rois, teacher.rois)
    )
    assert loss.shape == () and loss.item() == pytest.approx(7.0 * expected / 5, rel=1e-5)


def relations(student: PartsView, teacher: PartsView) -> List[Tensor]:
    """On towers and within regions."""
    head = random_head()
    dense = head._between_cells(student, teacher)
    return [*dense.values(), head._within_regions(student, teacher)]


def test_rotated_and_scaled_towers_have_the_same_relation() -> None:
    student, teacher = views()
    before = relations(student, teacher)
    rotations = {c: torch.linalg.qr(noise(c, c))[0].float() for c in (3, 7)}
    for k, x in teacher.towers.items():
        factor = noise(3, 1, *x.shape[2:], seed=4).float().exp()
        teacher.towers[k] = torch.einsum("dc,nchw->ndhw", rotations[x.shape[1]], x) * factor
    teacher.rois = torch.einsum("dc,nchw->ndhw", rotations[7], teacher.rois) * 5
    for found, expected in zip(relations(student, teacher), before):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)


def test_equal_towers_and_regions_have_no_relation_loss() -> None:
    student = views()[0]
    assert max(x.item() for x in relations(student, student)) < 1e-10


def test_only_levels_on_which_both_predict_are_related() -> None:
    student, teacher = views()
    head = random_head(dense_levels=level_pairs(p4=(4, 4)))
    losses = head(student, teacher)
    assert list(losses["loss_mar_relation"]) == ["p4"]
    assert list(losses["loss_mar_feature"]) == ["p3", "p4"]


def test_no_regions_give_a_connected_zero() -> None:
    rois = torch.randn(0, 5, 3, 3, requires_grad=True)
    regions = Regions([Boxes(torch.zeros(0, 4))] * 3)
    student, teacher = views()
    student.rois, student._regions, teacher.rois = rois, regions, torch.randn(0, 7, 3, 3)
    loss = random_head(dense=False)(student, teacher)["loss_mar_relation"]
    loss.backward()
    assert loss.item() == 0.0 and rois.grad is not None


def test_relation_never_has_more_pixels_than_a_square_of_max_cells() -> None:
    # On 100 x 168 cells all pairs would be 16,800^2 = 282 million numbers; of 24 x 24, 331,776.
    x = torch.randn(1, 3, 100, 168)
    view = PartsView({"p3": x}, [[]], [], {"p3": x})
    head = random_head(levels=level_pairs(p3=(3, 3)), dense_levels=level_pairs(p3=(3, 3)))
    assert head.max_cells == 24
    with LargestTensor() as largest:
        head(view, view)
    assert largest.entries == 24**4
    head.max_cells = 12
    with LargestTensor() as largest:
        head._between_cells(view, view)
    assert largest.entries == 12**4


# Padding ------------------------------------------------------------------------------------------


def padded(x: Tensor, stride: int, height: int, width: int, garbage: float, seed: int) -> Tensor:
    """The cells of each image of SIZES, and noise of that magnitude everywhere else."""
    around = garbage * noise(len(x), x.shape[1], height, width, seed=seed).float()
    for n, (rows, columns) in enumerate(SIZES):
        rows, columns = math.ceil(rows / stride), math.ceil(columns / stride)
        around[n, :, :rows, :columns] = x[n, :, :rows, :columns]
    return around


@pytest.mark.parametrize("garbage", [0.0, 1e3])
@pytest.mark.parametrize("term", ["feature", "relation"])
def test_neither_more_padding_nor_what_is_in_it_matters(term: str, garbage: float) -> None:
    # Maps of at most max_cells a side are related cell by cell: more cells make no other ones.
    found, levels = [], level_pairs(p3=(3, 4))
    inside = padded(torch.ones(3, 1, 6, 8), 8, 10, 13, 0.0, seed=0).bool()
    for height, width, seed in ((6, 8, 5), (10, 13, 6)):
        sides = []
        for view in views():
            x = view.features if term == "feature" else view.towers
            x = padded(x["p3"], 8, height, width, garbage, seed).requires_grad_()
            sides.append(PartsView({"p3": x}, BOXES, SIZES, {"p3": x}))
        head = random_head(levels=levels, dense_levels=levels)
        loss = (head._features if term == "feature" else head._between_cells)(*sides)["p3"]
        loss.backward()
        found.append((loss, sides[0].features["p3"].grad))
    (loss, gradient), (more, more_gradient) = found
    torch.testing.assert_close(more, loss, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(more_gradient[..., :6, :8], gradient, rtol=1e-4, atol=1e-6)
    assert (more_gradient * ~inside == 0).all() and (more_gradient * inside != 0).any()


@pytest.mark.parametrize("garbage", [0.0, 1e3])
def test_teacher_s_padding_does_not_matter(garbage: float) -> None:
    student, teacher = views(SIZES)
    before = random_head()(student, teacher)
    for stride, maps_of in ((8, "p3"), (16, "p4")):
        for side in (teacher.features, teacher.towers):
            side[maps_of] = padded(side[maps_of], stride, *MAPS[maps_of], garbage, seed=7)
    after = random_head()(student, teacher)
    for name in before:
        for level, loss in before[name].items():
            torch.testing.assert_close(after[name][level], loss, rtol=1e-5, atol=0.0)


# Limits -------------------------------------------------------------------------------------------


def test_duplicated_images_leave_the_losses_as_they_are() -> None:
    student, teacher = views(SIZES)
    doubled = []
    for view in (student, teacher):
        sides = [{k: torch.cat([x, x]) for k, x in v.items()} for v in (view.features, view.towers)]
        rois = torch.cat([view.rois, view.rois])
        regions = Regions(REGIONS.boxes + REGIONS.boxes)
        doubled.append(PartsView(sides[0], BOXES + BOXES, SIZES + SIZES, sides[1], rois, regions))
    for dense in (True, False):
        once, twice = random_head(dense)(student, teacher), random_head(dense)(*doubled)
        for name, losses in once.items():
            for level, loss in by_level(losses).items():
                found = by_level(twice[name])[level]
                torch.testing.assert_close(found, loss, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("boxes", [[], [[0.0, 0.0, 128.0, 128.0]]])
def test_level_of_one_cell_is_finite_and_trains(boxes: List[Box], images: int) -> None:
    x, tower = (torch.randn(images, 3, 1, 1, requires_grad=True) for _ in range(2))
    levels = level_pairs(p7=(3, 4))
    head = random_head(levels=levels, dense_levels=levels)
    target = torch.randn(images, 4, 1, 1)
    student = PartsView({"p7": x}, [boxes] * images, [], {"p7": tower})
    losses = head(student, PartsView({"p7": target}, [boxes] * images, [], {"p7": target}))
    sum(v["p7"] for v in losses.values()).backward()
    assert losses["loss_mar_feature"]["p7"] > 0
    # A single pixel is like itself.
    assert losses["loss_mar_relation"]["p7"].item() == pytest.approx(0.0, abs=1e-10)
    assert x.grad.isfinite().all() and tower.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


# Gradients and precision --------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [True, False])
def test_gradient_reaches_student_and_all_parameters_but_not_the_teacher(dense: bool) -> None:
    head, sides = random_head(dense), views(SIZES)
    parts = [
        [*view.features.values(), *(view.towers.values() if dense else [view.rois])]
        for view in sides
    ]
    for x in parts[0] + parts[1]:
        x.requires_grad_()
    losses = head(*sides)
    sum(v for x in losses.values() for v in by_level(x).values()).backward()
    assert all(x.grad is None for x in parts[1])
    for x in (*parts[0], *head.parameters()):
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("dense", [True, False])
def test_autocast_gives_float32_losses_close_to_the_exact_ones(dense: bool) -> None:
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses = random_head(dense)(*views(SIZES))
        found.append({f"{k} {i}": v for k, x in losses.items() for i, v in by_level(x).items()})
    for name, exact in found[0].items():
        assert found[1][name].dtype == torch.float32, name
        torch.testing.assert_close(found[1][name], exact, rtol=2e-2, atol=0.0)


def test_large_features_of_half_precision_do_not_overflow() -> None:
    # 300^2 is above the largest float16, 65,504. As a mean: 300^2 / 2.
    x, target = (torch.full((1, 2, 100, 168), v, dtype=torch.float16) for v in (0.0, 300.0))
    tower = (noise(1, 64, 100, 168) + 100).half()
    head = identity_head(dense_levels=level_pairs(p3=(2, 2)))
    student = PartsView({"p3": x}, [[[80.5, 80.5, 180.5, 160.5]]], [], {"p3": tower})
    teacher = PartsView({"p3": target}, [[]], [], {"p3": tower.flip(3)})
    losses = head(student, teacher)
    assert losses["loss_mar_feature"]["p3"].item() == pytest.approx(45000.0, rel=1e-5)
    relation_loss = losses["loss_mar_relation"]["p3"]
    assert relation_loss.dtype == torch.float32 and 0 < relation_loss.item() < 1


# Keys ---------------------------------------------------------------------------------------------


def config(**values: Any) -> CfgNode:
    words = [w for k, v in values.items() for w in (f"DISTILL.MAR.{k.replace('__', '.')}", v)]
    return load_config(opts=words)


def build(teacher_roi_size: int = 7, **values: Any) -> nn.Module:
    shapes = {f"p{i}": ShapeSpec(channels=4, stride=2**i) for i in (3, 4, 5)}
    provides = frozenset({"features", "dense", "regions", "roi_features"})
    sides = [
        DetectorInfo("Toy", shapes, 3, provides, dense_levels=("p3", "p5"), roi_size=size)
        for size in (7, teacher_roi_size)
    ]
    return build_head("MAR", config(**values), DistillPair(*sides, pair_levels(shapes, shapes)))


def test_defaults_are_those_of_the_notes() -> None:
    head = build()
    assert (head.feature_weight, head.relation_weight, head.max_cells) == (6.0, 40.0, 24)
    assert head.mask == ObjectMask() and head.sampler == RegionSampler()
    assert [p.student for p in head.levels] == ["p3", "p4", "p5"]
    assert [p.student for p in head.dense_levels] == ["p3", "p5"]
    assert config().DISTILL.MAR.LOSS_WEIGHT == 1.0


def test_keys_reach_the_head() -> None:
    head = build(FEATURE_WEIGHT=3.0, RELATION_WEIGHT=20.0, MAX_CELLS=12, MASK__NEAR=0.25)
    assert (head.feature_weight, head.relation_weight, head.max_cells) == (3.0, 20.0, 12)
    assert head.mask.near == 0.25
    assert build(MASK__KIND="gaussian", MASK__BY_SIZE=False).mask == ObjectMask(
        "gaussian", by_size=False
    )
    head = build(RELATION="regions")
    assert not head.dense_levels and head.sampler == RegionSampler()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"RELATION": "all"}, r"RELATION must be one of dense, regions, got 'all'"),
        ({"MAX_CELLS": 0}, r"MAX_CELLS must be 1 or more, got 0"),
        ({"MASK__KIND": "disc"}, r"MASK\.KIND must be one of values, gaussian, got 'disc'"),
        (
            {"MASK__NEAR": 1.5},
            r"MASK.INSIDE must .* INSIDE >= NEAR >= FAR >= 0 .* got 1.0, 1.5 and 0.1",
        ),
        ({"MASK__NEAR_FACTOR": 0.5}, r"MASK\.NEAR_FACTOR must be at least 1, got 0.5"),
    ],
)
def test_value_outside_its_range_is_refused_by_its_key(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"DISTILL\.MAR\.{message}"):
        build(**values)


def test_regions_of_unequal_sizes_are_refused_and_dense_relations_do_not_need_them() -> None:
    build(teacher_roi_size=14)
    with pytest.raises(ValueError, match="RELATION is 'regions', .* 7 cells .* teacher's 14"):
        build(teacher_roi_size=14, RELATION="regions")
