"""Objects by their masks in place of their boxes: FGD's and MAR's key OBJECTS."""

from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import pytest
import torch
from torch import Tensor

from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from d2kd import load_config
from d2kd.config.unread import why_unread
from d2kd.conformance.case import MASK_PAIRS, Pair, find_case
from d2kd.conformance.detectors import write_teacher
from d2kd.heads import FGDHead
from d2kd.heads.mar_mask import ObjectMask, _level_of
from d2kd.heads.object_cells import object_cells
from d2kd.layers import touched_cells
from tests.helpers.baseline_references import BoxView
from tests.helpers.runs import SHAPES_CLASSES, at, run, run_config, scalars
from tests.helpers.toys import level_pairs, noise

STRIDES = [8, 16, 32]
SIZE = (48, 64)  # of the padded batch
MAPS = [(6, 8), (3, 4), (2, 2)]
# Height and width of three images, and how many objects they have
IMAGES = [((48, 64), 3), ((40, 50), 2), ((33, 56), 0)]


def blobs(size: Tuple[int, int], count: int, seed: int) -> Tensor:
    """Ragged masks, one of them empty: all of whose pixels something else hides."""
    smooth = torch.nn.functional.interpolate(
        noise(1, max(count, 1), 5, 6, seed=seed).float(), size=size, mode="bilinear"
    )[0, :count]
    masks = smooth > 0.6
    masks[2:] = False
    return masks


def ground_truth() -> List[Instances]:
    found = []
    for n, (size, count) in enumerate(IMAGES):
        instances = Instances(size)
        corner = noise(count, 2, seed=n).float().abs() * 8
        instances.gt_boxes = Boxes(torch.cat([corner, corner + 20.5], dim=1))
        instances.gt_masks = BitMasks(blobs(size, count, seed=n))
        found.append(instances)
    return found


def in_loops(mask: Tensor, stride: int, height: int, width: int) -> Tensor:
    """The cells of a map in which a mask has a pixel, pixel by pixel."""
    cells = torch.zeros(height, width, dtype=torch.bool)
    for y, x in mask.nonzero().tolist():
        cells[y // stride, x // stride] = True
    return cells


def all_in_loops(instances: Sequence[Instances], level: int) -> List[Tensor]:
    masks = [mask for x in instances for mask in x.gt_masks.tensor]
    return [in_loops(mask, STRIDES[level], *MAPS[level]) for mask in masks]


class MaskView(BoxView):
    """A view whose ground truth has masks."""

    def __init__(self, features: Dict[str, Tensor], instances: Sequence[Instances]):
        super().__init__(features, [[]] * len(instances), [x.image_size for x in instances])
        self._instances = instances

    @property
    def gt_instances(self) -> List[Instances]:
        return list(self._instances)


# Cells --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_cells_are_those_in_which_a_mask_has_a_pixel(order: List[int]) -> None:
    instances = ground_truth()
    found = object_cells(instances, [STRIDES[i] for i in order], [MAPS[i] for i in order])
    for i, cells in zip(order, found):
        assert cells.dtype == torch.bool and cells.shape == (5, *MAPS[i])
        assert torch.equal(cells, torch.stack(all_in_loops(instances, i)))
    assert found[0].any() and not found[0].all()


def test_strides_need_not_be_multiples_of_each_other() -> None:
    masks, sizes = blobs((30, 37), 2, seed=3), [(5, 7), (4, 5)]
    for stride, size, cells in zip((6, 8), sizes, touched_cells(masks, [6, 8], sizes)):
        assert torch.equal(cells, torch.stack([in_loops(x, stride, *size) for x in masks]))


def test_map_that_ends_before_the_image_has_the_cells_that_it_has() -> None:
    masks = blobs((30, 37), 2, seed=4)
    whole, cut = (touched_cells(masks, [4], [size])[0] for size in ((8, 10), (5, 6)))
    assert torch.equal(cut, whole[:, :5, :6])


def test_polygons_are_read_as_the_bitmaps_that_they_outline() -> None:
    polygons = [
        [np.array([3.0, 4, 30, 5, 12, 38])],
        [np.array([0.0, 0, 16, 0, 16, 16]), np.array([40.0, 20, 60, 20, 60, 44, 40, 44])],
    ]
    instances = Instances(SIZE)
    instances.gt_boxes = Boxes(torch.tensor([[3.0, 4, 30, 38], [0.0, 0, 60, 44]]))
    instances.gt_masks = PolygonMasks(polygons)
    found = object_cells([instances], STRIDES, MAPS)
    instances.gt_masks = BitMasks.from_polygon_masks(polygons, *SIZE)
    for cells, expected in zip(found, object_cells([instances], STRIDES, MAPS)):
        assert torch.equal(cells, expected) and cells.any()


def test_object_without_a_mask_is_its_box() -> None:
    # As what a teacher detects on an image without labels. The pixels 8 to 23 by 16 to 31.
    instances = ground_truth()
    instances[1].remove("gt_masks")
    instances[1].gt_boxes = Boxes(torch.tensor([[8.0, 16.0, 24.0, 32.0], [9.0, 17.0, 9.2, 17.2]]))
    cells = object_cells(instances, STRIDES, MAPS)[0]
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[2:4, 1:3] = True
    assert torch.equal(cells[3], expected)
    assert not cells[4].any()  # smaller than a pixel, between two centres
    assert torch.equal(cells[:3], torch.stack(all_in_loops(ground_truth(), 0)[:3]))


def test_batch_without_objects_has_no_cells() -> None:
    empty = Instances(SIZE, gt_boxes=Boxes(torch.zeros(0, 4)))
    for cells, size in zip(object_cells([empty, empty], STRIDES, MAPS), MAPS):
        assert cells.shape == (0, *size)


# FGD ----------------------------------------------------------------------------------------------


def fgd_head(**values: Any) -> FGDHead:
    weights = {f"{k}_weight": 1.0 for k in ("foreground", "background", "attention", "global")}
    return FGDHead(levels=level_pairs(p3=(2, 2), p4=(2, 2)), **{**weights, **values})


def test_fgd_s_foreground_is_each_object_s_cells_by_their_number() -> None:
    instances, head = ground_truth(), fgd_head(objects="masks")
    maps = {k: noise(3, 2, *MAPS[i]).float() for i, k in enumerate(("p3", "p4"))}
    views = [MaskView(x, instances) for x in (maps, {k: x + 1 for k, x in maps.items()})]
    losses = head(*views)
    for i, level in enumerate(("p3", "p4")):
        cells, expected = all_in_loops(instances, i), torch.zeros(3, *MAPS[i])
        for n, of_image in ((0, cells[:3]), (1, cells[3:])):
            for mask in of_image:
                value = mask.float() / max(mask.sum().item(), 1)
                expected[n] = torch.maximum(expected[n], value)
        torch.testing.assert_close(head.maps["foreground"][level][:, 0], expected)
        assert losses["loss_fgd_foreground"][level] > 0


def test_fgd_does_not_hold_the_notch_of_an_object_for_foreground() -> None:
    # An L of 3 of the 4 cells of its box. Both attentions of a constant teacher are 1; an error of
    # 2 in the notch, in both channels, is 2 x 2^2 of the background's 1/(48 - 3) a cell.
    instances = Instances(SIZE, gt_boxes=Boxes(torch.tensor([[8.0, 8.0, 24.0, 24.0]])))
    mask = torch.zeros(1, *SIZE, dtype=torch.bool)
    mask[0, 8:24, 8:24], mask[0, 8:16, 16:24] = True, False
    instances.gt_masks = BitMasks(mask)
    head = FGDHead(levels=level_pairs(p3=(2, 2)), foreground_weight=1, objects="masks")
    target = torch.ones(1, 2, 6, 8)
    x = target.clone()
    x[:, :, 1, 2] += 2
    losses = head(MaskView({"p3": x}, [instances]), MaskView({"p3": target}, [instances]))
    assert losses["loss_fgd_foreground"]["p3"] == 0
    background = losses["loss_fgd_background"]["p3"].item()
    assert background == pytest.approx(5e-4 * 8 / 45, rel=1e-5)
    x = target.clone()
    x[:, :, 2, 2] += 2  # of the object itself
    losses = head(MaskView({"p3": x}, [instances]), MaskView({"p3": target}, [instances]))
    assert losses["loss_fgd_foreground"]["p3"].item() == pytest.approx(8 / 3, rel=1e-5)
    assert losses["loss_fgd_background"]["p3"] == 0


# MAR ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_size", [True, False])
def test_mar_s_inside_is_the_mask_and_near_the_enlarged_box(by_size: bool) -> None:
    instances = ground_truth()
    values = {"inside": 0.9, "near": 0.4, "far": 0.05, "near_factor": 1.7, "by_size": by_size}
    found = ObjectMask(objects="masks", **values)(instances, STRIDES, MAPS)
    # Near is what boxes alone give where inside is worth no more than near.
    near = ObjectMask(**{**values, "inside": 0.4})(instances, STRIDES, MAPS)
    image = [n for n, (_, count) in enumerate(IMAGES) for _ in range(count)]
    boxes = torch.cat([x.gt_boxes.tensor for x in instances])
    for i, level in enumerate(found):
        expected = near[i][:, 0].clone()
        for n, box, cells in zip(image, boxes, all_in_loops(instances, i)):
            if not by_size or _level_of(box[None], STRIDES).item() == i:
                expected[n][cells] = 0.9
        torch.testing.assert_close(level[:, 0], expected)
    assert (found[0] == 0.9).any() and (found[0] == 0.4).any()


# Between detectors --------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [Pair("retinanet", "retinanet"), *MASK_PAIRS], ids=str)
@pytest.mark.parametrize(
    "name, key", [("FGD", "DISTILL.FGD.OBJECTS"), ("MAR", "DISTILL.MAR.MASK.OBJECTS")]
)
def test_both_learn_from_masks_and_the_student_gets_the_gradient(
    name: str, key: str, pair: Pair
) -> None:
    terms = {}
    for objects in ("boxes", "masks"):
        case = find_case(name, pair, ["MODEL.MASK_ON", True, key, objects])
        distiller = case.fresh()
        terms[objects] = sum(case.terms(distiller).values())
        terms[objects].backward()
        assert any(x.grad is not None and x.grad.any() for x in distiller.student.parameters())
    assert terms["masks"].isfinite() and terms["masks"] != terms["boxes"]


def refused(opts: Sequence[Any], match: str) -> None:
    case = find_case("FGD" if "FGD" in opts[0] else "MAR", Pair("retinanet", "retinanet"), opts)
    assert match in case.refusal


def test_what_cannot_be_is_refused_by_its_key() -> None:
    refused(["DISTILL.FGD.OBJECTS", "masks"], "DISTILL.FGD.OBJECTS is 'masks', but labels")
    refused(["DISTILL.MAR.MASK.OBJECTS", "masks"], "DISTILL.MAR.MASK.OBJECTS is 'masks', but")
    on = ["MODEL.MASK_ON", True]
    refused(
        ["DISTILL.FGD.OBJECTS", "masks", "DISTILL.FGD.LEGACY_SCALE", True, *on],
        "DISTILL.FGD.LEGACY_SCALE is True, but masks have no box to stretch",
    )
    refused(
        ["DISTILL.MAR.MASK.OBJECTS", "masks", "DISTILL.MAR.MASK.KIND", "gaussian", *on],
        "DISTILL.MAR.MASK.OBJECTS is 'masks', but KIND 'gaussian' is a bell over each box",
    )
    refused(["DISTILL.FGD.OBJECTS", "mask"], "DISTILL.FGD.OBJECTS must be one of boxes, masks")


def test_dense_student_may_have_its_data_loaded_with_masks() -> None:
    cfg = load_config("configs/quickstart/fgd.yaml")
    assert "OBJECTS 'masks'" in why_unread("MODEL.MASK_ON", cfg)
    cfg.DISTILL.FGD.OBJECTS = "masks"
    assert why_unread("MODEL.MASK_ON", cfg) == ""
    cfg.DISTILL.FGD.OBJECTS, cfg.DISTILL.MAR.MASK.OBJECTS = "boxes", "masks"
    assert why_unread("MODEL.MASK_ON", cfg) == ""


def test_a_run_of_a_dense_student_reads_the_masks_of_its_data(tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path, "retinanet", MODEL__RETINANET__NUM_CLASSES=SHAPES_CLASSES)
    losses = {}
    for objects in ("boxes", "masks"):
        values = {
            "MODEL__MASK_ON": True,
            "INPUT__MASK_FORMAT": "bitmask",
            "DATASETS__SHAPES__MASKS": True,
            "DISTILL__FGD__OBJECTS": objects,
        }
        cfg = run_config(tmp_path, teacher, ["FGD"], **values)
        found = scalars(run(at(cfg, tmp_path, objects)))
        losses[objects] = {k: found[k][0] for k in found if k.startswith("loss_fgd")}
    assert losses["boxes"].keys() == losses["masks"].keys()
    assert losses["boxes"] != losses["masks"]
