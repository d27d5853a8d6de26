"""FGDHead beside its equations in loops, its closed forms, and its limits."""

import math
from typing import Any, Dict, List, Sequence, Tuple

import pytest
import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from d2kd import load_config
from d2kd.heads import DetectorInfo, DistillPair, FGDHead, build_head
from d2kd.heads.fgd import focal_masks
from d2kd.layers import box_maps
from d2kd.pairing.levels import pair_levels
from tests.helpers.baseline_references import Box, BoxView, LargestTensor, fgd
from tests.helpers.baseline_references import focal_masks as masks_in_loops
from tests.helpers.baseline_references import rois_of
from tests.helpers.references import conv
from tests.helpers.toys import level_pairs, noise

TERMS = ("foreground", "background", "attention", "global")
# Three images of 48 x 56 pixels: overlapping boxes; one on the border, one beyond it, one smaller
# than a cell; none.
BOXES: List[List[Box]] = [
    [[4.5, 6.5, 30.5, 28.5], [20.0, 16.0, 40.0, 47.0], [22.5, 18.5, 26.5, 25.5]],
    [[0.0, 0.0, 16.0, 48.0], [-9.5, 30.5, 70.5, 60.5], [41.25, 9.5, 41.75, 9.75]],
    [],
]
SIZES = [(48, 56), (40, 50), (33, 56)]  # height and width without padding


def weights_of(*weights: float) -> Dict[str, float]:
    return {f"{term}_weight": weight for term, weight in zip(TERMS, weights)}


def random_head(**values: Any) -> FGDHead:
    """Also the layers that start as zero, so that the global context is not 0."""
    torch.manual_seed(0)
    head = FGDHead(**{"levels": level_pairs(p3=(3, 4), p4=(4, 4)), **values})
    for blocks in (head.student_context, head.teacher_context):
        for p in blocks.parameters():
            nn.init.normal_(p)
    return head


def features(channels: Dict[str, int], images: int = 3, seed: int = 0) -> Dict[str, Tensor]:
    """Of 48 x 56 pixels."""
    sizes = {"p3": (6, 7), "p4": (3, 4)}
    return {
        k: noise(images, c, *sizes[k], seed=seed + i).float() * 2
        for i, (k, c) in enumerate(channels.items())
    }


def level_losses(
    head: FGDHead, x: Tensor, target: Tensor, boxes: Sequence[Any], sizes: Sequence[Any] = ()
) -> List[float]:
    """The four terms of p3."""
    losses = head(BoxView({"p3": x}, boxes, sizes), BoxView({"p3": target}, boxes, sizes))
    return [losses[f"loss_fgd_{k}"]["p3"].item() for k in TERMS]


def unit_head(channels: int = 2, **values: Any) -> FGDHead:
    """A new one on p3, with the weights 1."""
    levels = level_pairs(p3=(channels, channels))
    return FGDHead(**{"levels": levels, **weights_of(1.0, 1.0, 1.0, 1.0), **values})


# The equations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 0.8])
def test_losses_are_those_of_the_equations(temperature: float, legacy: bool) -> None:
    weights = (0.7, 0.5, 0.3, 0.11)
    head = random_head(temperature=temperature, **weights_of(*weights), legacy_scale=legacy)
    student, teacher = features({"p3": 3, "p4": 4}), features({"p3": 4, "p4": 4}, seed=5)
    losses = head(BoxView(student, BOXES, SIZES), BoxView(teacher, BOXES, SIZES))
    assert list(losses) == [f"loss_fgd_{k}" for k in TERMS]
    for level, stride in (("p3", 8), ("p4", 16)):
        x = torch.stack([conv(image.double(), head.adapter[level]) for image in student[level]])
        scales = [(1 / stride, 1 / stride)] * 3
        if legacy:
            scales = [(x.shape[3] / w, x.shape[2] / h) for h, w in SIZES]
        blocks = head.student_context[level], head.teacher_context[level]
        terms = fgd(x, teacher[level].double(), BOXES, scales, temperature, blocks)
        for name, weight, expected in zip(losses, weights, terms):
            loss = losses[name][level]
            assert loss.shape == () and loss.dtype == torch.float32
            assert loss.item() == pytest.approx(weight * expected, rel=1e-5), (name, level)
            assert expected > 0.01


def test_constant_difference_weighs_one_in_the_box_and_one_off_it() -> None:
    # Of a teacher equal in all cells and channels both attentions are 1, and both masks add up to
    # 1: 3^2 x 2 channels each. The student's attentions are the same; the context of new blocks is
    # 0, so that the last term is 3^2 x 2 channels x 30 cells.
    x, target = torch.full((1, 2, 5, 6), 4.0), torch.full((1, 2, 5, 6), 1.0)
    boxes = [[[8.5, 8.5, 15.5, 23.5]]]
    expected = [18.0, 18.0, 0.0, 540.0]
    assert level_losses(unit_head(), x, target, boxes) == pytest.approx(expected, rel=1e-5)


def test_attention_of_two_cells_and_two_channels_has_its_closed_form() -> None:
    # The teacher has 0 and 2 log 3 in the two cells of one channel, and nothing in the other. With
    # T = 1 the means are log 3 over channels and log 3 over cells: softmax (1/4, 3/4), times 2. The
    # student's is (1, 1) of both: |3/2 - 1| four times. The error is (2 log 3)^2 in one entry, with
    # the attention 3/2 of its cell and of its channel; no box, so that each cell has 1/2.
    target = torch.tensor([[[[0.0, 2 * math.log(3)]], [[0.0, 0.0]]]])
    error = (2 * math.log(3)) ** 2
    found = level_losses(unit_head(temperature=1.0), torch.zeros(1, 2, 1, 2), target, [[]])
    assert found == pytest.approx([0.0, 1.5 * 1.5 * error / 2, 2.0, error], rel=1e-5)


def test_attention_that_weighs_is_the_teacher_s() -> None:
    # Swapped, the student's would be: cell 1 of channel 0, where the error is, has (1/2)^2 there.
    target = torch.tensor([[[[0.0, 2 * math.log(3)]], [[0.0, 0.0]]]])
    x = torch.tensor([[[[2 * math.log(3), 2 * math.log(3)]], [[0.0, 0.0]]]])
    error = (2 * math.log(3)) ** 2  # in cell 0 of channel 0: attentions 1/2 and 3/2
    found = level_losses(unit_head(temperature=1.0), x, target, [[]])
    assert found[1] == pytest.approx(0.5 * 1.5 * error / 2, rel=1e-5)


def test_weights_are_the_published_ones_and_multiply_each_term() -> None:
    x, target = noise(2, 2, 5, 6, seed=1).float(), noise(2, 2, 5, 6, seed=2).float()
    once = level_losses(unit_head(), x, target, BOXES[:2])
    published = FGDHead(levels=level_pairs(p3=(2, 2)))
    found = level_losses(published, x, target, BOXES[:2])
    weights = (1e-3, 5e-4, 5e-4, 5e-6)
    assert found == pytest.approx([w * v for w, v in zip(weights, once)], rel=1e-5)


# The masks ----------------------------------------------------------------------------------------


def masks(boxes: Sequence[Any], height: int = 6, width: int = 7) -> Tuple[Tensor, Tensor]:
    """(N, H, W) of stride 8."""
    rois = rois_of(boxes)
    (found,) = focal_masks(rois[:, 0].long(), rois[:, None, 1:] / 8, [(height, width)], len(boxes))
    assert all(x.shape == (len(boxes), 1, height, width) for x in found)
    return found[0][:, 0], found[1][:, 0]


def test_masks_are_those_of_the_equations() -> None:
    for foreground, background, boxes in zip(*masks(BOXES), BOXES):
        expected = masks_in_loops(boxes, 6, 7, (1 / 8, 1 / 8))
        torch.testing.assert_close(foreground, expected[0].float())
        torch.testing.assert_close(background, expected[1].float())


def test_box_counts_to_one_cell_beyond_its_side_and_one_in_all() -> None:
    # 8 to 16 pixels: floor(1) to ceil(2), two cells; 10 to 17: floor(1.25) to ceil(2.125), three.
    foreground, background = masks([[[8.0, 10.0, 16.0, 17.0]]])
    expected = torch.zeros(6, 7)
    expected[1:4, 1:3] = 1 / 6
    torch.testing.assert_close(foreground[0], expected)
    torch.testing.assert_close(background[0], (expected == 0).float() / 36)


def test_lone_box_inside_the_map_has_the_weight_one_whatever_its_size() -> None:
    boxes = [[[8.5, 8.5, 9.0, 9.0]], [[0.0, 0.0, 8.0, 40.0]], [[3.5, 5.5, 45.5, 30.5]]]
    foreground, background = masks(boxes)
    for x in (foreground, background):
        torch.testing.assert_close(x.sum(dim=(1, 2)), torch.ones(3))


def test_smaller_box_wins_where_two_overlap() -> None:
    # 3 x 3 cells at 1 to 3, and 4 x 5 at 0 to 3 and 0 to 4.
    boxes = [[8.5, 8.5, 23.5, 23.5], [0.0, 0.0, 30.5, 23.5]]
    for order in (boxes, boxes[::-1]):
        (foreground,) = masks([order])[0]
        assert foreground[2, 2].item() == pytest.approx(1 / 9)
        assert foreground[0, 0].item() == pytest.approx(1 / 20)
        assert foreground[2, 4].item() == pytest.approx(1 / 20)
        assert foreground[5, 5] == 0


def test_box_that_covers_everything_leaves_no_background() -> None:
    # 7 x 8 cells, one row and one column of which are beyond the map.
    foreground, background = masks([[[0.0, 0.0, 56.0, 48.0]], []])
    torch.testing.assert_close(foreground[0], torch.full((6, 7), 1 / 56))
    assert (background[0] == 0).all() and (foreground[1] == 0).all()
    torch.testing.assert_close(background[1], torch.full((6, 7), 1 / 42))


def test_box_beyond_the_map_leaves_no_trace() -> None:
    for box in ([64.5, 0.0, 90.0, 20.0], [0.0, -50.0, 20.0, -8.5], [500.0, 500.0, 501.0, 501.0]):
        foreground, background = masks([[box]])
        assert (foreground == 0).all() and (background == background[0, 0, 0]).all()


def test_ten_thousand_boxes_of_an_image_need_bounded_memory() -> None:
    corner = torch.stack([torch.arange(10_000) * 13 % 1300, torch.arange(10_000) * 7 % 780], dim=1)
    boxes = torch.cat([corner, corner + 21.5], dim=1)[:, None] / 8
    with LargestTensor() as largest:
        ((foreground, _),) = focal_masks(torch.zeros(10_000).long(), boxes, [(100, 168)], 1)
    assert largest.entries <= box_maps._CHUNK * 100 * 168
    assert (foreground > 0).float().mean() > 0.5


# Placing the boxes --------------------------------------------------------------------------------


def test_legacy_scale_differs_on_padded_batches_alone() -> None:
    x, target = noise(3, 2, 6, 7, seed=1).float(), noise(3, 2, 6, 7, seed=2).float()
    found = {}
    for name, sizes in (("padded", SIZES), ("whole", [(48, 56)] * 3)):
        for legacy in (False, True):
            head = unit_head(legacy_scale=legacy)
            found[name, legacy] = level_losses(head, x, target, BOXES, sizes)
    assert found["whole", True] == pytest.approx(found["whole", False], rel=1e-6)
    assert found["whole", False] == found["padded", False], "without it, padding moves no box"
    for i in (0, 1):
        assert found["padded", True][i] != pytest.approx(found["padded", False][i], rel=1e-2)
    assert found["padded", True][2:] == found["padded", False][2:], "no boxes in these"


def test_legacy_scale_stretches_an_image_to_the_padded_map() -> None:
    # 24 x 28 of 48 x 56 pixels: a box from 4 to 14 across and 8 to 12 down is one from 8 to 28 and
    # from 16 to 24, the columns 1 to 4 and the rows 2 to 3.
    shown = []
    for legacy in (False, True):
        head, x = unit_head(legacy_scale=legacy), torch.randn(1, 2, 6, 7)
        level_losses(head, x, x, [[[4.0, 8.0, 14.0, 12.0]]], [(24, 28)])
        cells = (head.maps["foreground"]["p3"][0, 0] > 0).nonzero()  # row, column
        shown.append([cells.amin(dim=0).tolist(), cells.amax(dim=0).tolist()])
    assert shown == [[[1, 0], [2, 2]], [[2, 1], [3, 4]]]


@pytest.mark.parametrize("width, cells", [(1393, 176), (402, 52), (1000, 128)])
def test_legacy_scale_keeps_a_box_that_reaches_the_border_on_the_map(
    width: int, cells: int
) -> None:
    # The released code divides by the image first: width / width * cells is exactly `cells`. So a
    # box from the middle of the last cell on has two columns, one of them beyond the map; its 8 of
    # 16 rows of pixels, on a map of two rows, are the rows 0 and 1.
    x0 = (cells - 0.5) * width / cells
    head, x = unit_head(legacy_scale=True), torch.randn(1, 2, 2, cells)
    level_losses(head, x, x, [[[x0, 0.0, float(width), 8.0]]], [(16, width)])
    value = head.maps["foreground"]["p3"].max().item()
    assert value == pytest.approx(1 / (2 * 2), rel=1e-6)


# Limits -------------------------------------------------------------------------------------------


def test_new_head_gives_zero_for_equal_features() -> None:
    x = features({"p3": 4, "p4": 4})
    losses = FGDHead(levels=level_pairs(p3=(4, 4), p4=(4, 4)))(BoxView(x, BOXES), BoxView(x, BOXES))
    assert all(v.item() == 0 for levels in losses.values() for v in levels.values())


def test_levels_of_unlike_channels_are_compared_as_each_alone() -> None:
    both = random_head(levels=level_pairs(p3=(3, 4), p4=(5, 6)))
    maps = [features({"p3": a, "p4": b}, 2, seed=a) for a, b in ((3, 5), (4, 6))]
    found = both(*(BoxView(x, BOXES) for x in maps))
    for level in ("p3", "p4"):
        alone = random_head(levels=tuple(p for p in both.levels if p.student == level))
        alone.load_state_dict({k: v for k, v in both.state_dict().items() if f".{level}." in k})
        for name, losses in alone(*(BoxView({level: x[level]}, BOXES) for x in maps)).items():
            torch.testing.assert_close(losses[level], found[name][level])


def test_duplicated_images_leave_the_losses_as_they_are() -> None:
    head = random_head(levels=level_pairs(p3=(3, 4)), **weights_of(1.0, 1.0, 1.0, 1.0))
    x, target = noise(3, 3, 6, 7, seed=1).float(), noise(3, 4, 6, 7, seed=2).float()
    once = level_losses(head, x, target, BOXES, SIZES)
    twice = level_losses(
        head, torch.cat([x, x]), torch.cat([target, target]), BOXES + BOXES, SIZES + SIZES
    )
    assert twice == pytest.approx(once, rel=1e-5)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("boxes", [[], [[0.0, 0.0, 128.0, 128.0]], [[4.0, 4.0, 5.0, 5.0]]])
def test_level_of_one_cell_is_finite_and_trains(boxes: List[Box], images: int) -> None:
    head = random_head(levels=level_pairs(p7=(3, 4)))
    x = torch.randn(images, 3, 1, 1, requires_grad=True)
    losses = head(
        BoxView({"p7": x}, [boxes] * images),
        BoxView({"p7": torch.randn(images, 4, 1, 1)}, [boxes] * images),
    )
    sum(v["p7"] for v in losses.values()).backward()
    assert all(v["p7"].isfinite() for v in losses.values()) and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert (losses["loss_fgd_foreground"]["p7"] > 0) == bool(boxes)
    assert (losses["loss_fgd_background"]["p7"] > 0) != bool(boxes)


def test_batch_without_boxes_has_a_connected_zero_of_foreground() -> None:
    x = torch.randn(2, 2, 6, 7, requires_grad=True)
    view = BoxView({"p3": x}, [[], []])
    loss = unit_head()(view, BoxView({"p3": torch.randn(2, 2, 6, 7)}, [[], []]))
    loss["loss_fgd_foreground"]["p3"].backward()
    assert loss["loss_fgd_foreground"]["p3"] == 0 and (x.grad == 0).all()


# Gradients and precision --------------------------------------------------------------------------


def test_gradient_reaches_student_and_all_parameters_but_not_the_teacher() -> None:
    head = random_head(**weights_of(1.0, 1.0, 1.0, 1.0))
    student, teacher = features({"p3": 3, "p4": 4}), features({"p3": 4, "p4": 4}, seed=5)
    for x in (*student.values(), *teacher.values()):
        x.requires_grad_()
    losses = head(BoxView(student, BOXES), BoxView(teacher, BOXES))
    for name in losses:
        for level, loss in losses[name].items():
            (gradient,) = torch.autograd.grad(loss, student[level], retain_graph=True)
            assert gradient.isfinite().all() and gradient.abs().sum() > 0, (name, level)
    sum(v for levels in losses.values() for v in levels.values()).backward()
    assert all(x.grad is None for x in teacher.values())
    for key, p in head.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
        # A number added to all scores of a softmax does not matter.
        if not key.endswith("attention.bias"):
            assert p.grad.abs().sum() > 0, key


def test_autocast_gives_float32_losses_close_to_the_exact_ones() -> None:
    head, found = random_head(levels=level_pairs(p3=(6, 8))), []
    x, target = noise(3, 6, 6, 7, seed=1).float(), noise(3, 8, 6, 7, seed=2).float()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses = head(BoxView({"p3": x}, BOXES), BoxView({"p3": target}, BOXES))
        found.append({k: v["p3"] for k, v in losses.items()})
    for name, exact in found[0].items():
        assert found[1][name].dtype == torch.float32
        # The adapter and the context round to bfloat16, 8 significant bits.
        torch.testing.assert_close(found[1][name], exact, rtol=3e-2, atol=0.0)


def test_large_features_of_half_precision_do_not_overflow() -> None:
    # 100^2 x 2 channels x 100 x 168 cells = 336,000,000; the largest float16 is 65,504.
    x, target = (torch.full((1, 2, 100, 168), v, dtype=torch.float16) for v in (0.0, 100.0))
    found = level_losses(unit_head(), x, target, [[[80.5, 80.5, 400.5, 300.5]]])
    assert found == pytest.approx([20000.0, 20000.0, 0.0, 336e6], rel=1e-4)


# Keys ---------------------------------------------------------------------------------------------


def build(**values: Any) -> nn.Module:
    shapes = {f"p{i}": ShapeSpec(channels=4, stride=2**i) for i in (3, 4)}
    detector = DetectorInfo("Toy", shapes, num_classes=3, provides=frozenset({"features"}))
    pair = DistillPair(detector, detector, pair_levels(shapes, shapes))
    return build_head("FGD", config(**values), pair)


def config(**values: Any) -> CfgNode:
    return load_config(opts=[word for k, v in values.items() for word in (f"DISTILL.FGD.{k}", v)])


def test_defaults_are_the_published_ones() -> None:
    head = build()
    assert (tuple(head.weights.values()), head.temperature) == ((1e-3, 5e-4, 5e-4, 5e-6), 0.5)
    assert not head.legacy_scale and config().DISTILL.FGD.LOSS_WEIGHT == 1.0
    assert [p.student for p in head.levels] == ["p3", "p4"]


def test_keys_reach_the_head() -> None:
    terms = {"FOREGROUND": 4.0, "BACKGROUND": 3.0, "ATTENTION": 2.0, "GLOBAL": 1.0}
    head = build(**{f"{k}_WEIGHT": v for k, v in terms.items()}, TEMPERATURE=0.8, LEGACY_SCALE=True)
    assert list(head.weights.values()) == [4.0, 3.0, 2.0, 1.0]
    assert head.temperature == 0.8 and head.legacy_scale


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan])
def test_temperature_that_is_not_above_zero_is_refused(value: float) -> None:
    with pytest.raises(
        ValueError, match=rf"DISTILL\.FGD\.TEMPERATURE must be above 0, got {value}"
    ):
        build(TEMPERATURE=value)


def test_adapters_are_built_only_where_channels_differ() -> None:
    head = FGDHead(levels=level_pairs(p3=(3, 4), p4=(4, 4)))
    adapters = {k: tuple(v.shape) for k, v in head.adapter.named_parameters()}
    assert adapters == {"p3.weight": (4, 3, 1, 1), "p3.bias": (4,)}
    for blocks in (head.student_context, head.teacher_context):
        assert list(blocks) == ["p3", "p4"]
    assert head.student_context["p3"] is not head.teacher_context["p3"]
