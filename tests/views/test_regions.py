"""Regions: where a student's boxes come from, which are chosen, and their vectors."""

from dataclasses import replace
from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Sequence, Tuple

import pytest
import torch
from torch import Tensor, nn

import detectron2.modeling
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances, pairwise_iou

from d2kd import DetectorView, load_config
from d2kd.views import DenseView, DetectorInfo, Regions, RegionSampler, find_view
from d2kd.views.predictions import DensePredictions
from d2kd.views.regions import Source
from tests.helpers.toys import batch, detector_config, noise

needs_fcos = pytest.mark.skipif(
    not hasattr(detectron2.modeling, "FCOS"), reason="this Detectron2 has no FCOS"
)
DENSE = ["retinanet", pytest.param("fcos", marks=needs_fcos)]
MANY = 10**6
# Nothing is left out.
EVERY = RegionSampler(MANY, 1.0, MANY, MANY, 1.0, 0.5)


# Of real detectors -------------------------------------------------------------------------------


def build(name: str) -> nn.Module:
    """A dense one predicts boxes of many sizes and many scores."""
    torch.manual_seed(0)
    detector = build_model(detector_config(name)).train()
    if name in ("retinanet", "fcos"):
        nn.init.normal_(detector.head.bbox_pred.weight, std=0.03)
        nn.init.normal_(detector.head.cls_score.weight, std=0.1)
        # FCOS: the distances from the centre to the four sides, in strides.
        nn.init.constant_(detector.head.bbox_pred.bias, 1.0 if name == "fcos" else 0.0)
    return detector


def record(
    detector: nn.Module,
    inputs: List[Dict[str, Any]],
    requires: FrozenSet[str] = frozenset({"regions", "region_vectors"}),
) -> DetectorView:
    view = find_view(detector, "student")(detector, inputs)
    torch.manual_seed(3)  # which proposals are sampled
    with view.record(requires):
        detector(inputs)
    return view


def sources_of(regions: Regions) -> List[Tuple[int, ...]]:
    """(image, stride, y, x, anchor) of each region."""
    source = regions.source
    columns = regions.image, source.stride, source.y, source.x, source.anchor
    return list(zip(*(x.tolist() for x in columns)))


def decode_in_loops(view: DetectorView) -> Dict[Tuple[int, ...], List[float]]:
    """(image, stride, y, x, anchor) to the box that is predicted there, clipped to its image."""
    dense, detector, found = view.dense(), view.detector, {}
    anchors = detector.anchor_generator([view.features[k] for k in dense.levels])
    for level, deltas, of_level in zip(dense.levels, dense.deltas, anchors):
        images, channels, height, width = deltas.shape
        rows = iter(of_level.tensor)  # row by row, cell by cell, the anchors of a cell together
        for y in range(height):
            for x in range(width):
                for a in range(channels // 4):
                    anchor = next(rows)[None]
                    for n in range(images):
                        delta = deltas[n, 4 * a : 4 * a + 4, y, x][None].detach()
                        box = detector.box2box_transform.apply_deltas(delta, anchor)[0].tolist()
                        limits = [view.image_sizes[n][i] for i in (1, 0, 1, 0)]
                        box = [min(max(v, 0.0), m) for v, m in zip(box, limits)]
                        found[n, view.strides[level], y, x, a] = box
    return found


@pytest.mark.parametrize("sizes", [[(64, 64), (64, 64)], [(64, 64), (30, 41)]])
@pytest.mark.parametrize("name", DENSE)
def test_regions_are_the_boxes_that_cells_of_the_image_predict(
    name: str, sizes: List[Tuple[int, int]]
) -> None:
    # Each with an extent, once; of the padding, cells from pixel 30 or 41 on, none.
    inputs = [x for i, (h, w) in enumerate(sizes) for x in batch(1, height=h, width=w, seed=i)]
    view = record(build(name), inputs)
    regions = view.regions(EVERY)
    expected = {
        (n, stride, y, x, a): box
        for (n, stride, y, x, a), box in decode_in_loops(view).items()
        if y * stride < sizes[n][0]
        and x * stride < sizes[n][1]
        and box[0] < box[2]
        and box[1] < box[3]
    }
    sources = sources_of(regions)
    assert len(sources) == len(set(sources)) == len(regions) > 50
    assert set(sources) == set(expected)
    assert {stride for _, stride, *_ in sources} == {8, 16, 32, 64, 128}
    assert max(a for *_, a in sources) == (2 if name == "retinanet" else 0)
    boxes = torch.cat([x.tensor for x in regions.boxes])
    wanted = torch.tensor([expected[s] for s in sources])
    torch.testing.assert_close(boxes, wanted, rtol=1e-5, atol=1e-4)
    assert not boxes.requires_grad and not regions.rois.requires_grad


@pytest.mark.parametrize("name", DENSE)
def test_default_sample_is_of_these_boxes_too(name: str) -> None:
    view = record(build(name), batch())
    regions = view.regions(RegionSampler(per_image=20))
    assert [len(x) for x in regions.boxes] == [20, 20]
    expected = decode_in_loops(view)
    for box, source in zip(torch.cat([x.tensor for x in regions.boxes]), sources_of(regions)):
        torch.testing.assert_close(box, torch.tensor(expected[source]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", DENSE)
def test_vector_of_a_region_is_that_of_its_cell(name: str) -> None:
    view = record(build(name), batch(width=96))  # rows and columns differ
    regions = view.regions(RegionSampler(per_image=40))
    vectors, dense = view.region_vectors(regions), view.dense()
    tower = {view.strides[k]: x for k, x in zip(dense.levels, dense.tower)}
    assert vectors.shape == (80, 32)
    sources = sources_of(regions)
    assert sources != sorted(sources, key=lambda s: s[1]), "not level by level"
    for vector, (n, stride, y, x, _) in zip(vectors, sources):
        assert torch.equal(vector, tower[stride][n, :, y, x])
    vectors.square().sum().backward()
    student = view.detector
    assert student.head.cls_subnet[0].weight.grad.abs().sum() > 0
    assert student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    assert student.head.bbox_pred.weight.grad is None, "boxes carry no gradient"


@pytest.mark.parametrize("paddings", [(32, 128), (128, 32)])
def test_teacher_padded_to_another_size_answers_for_the_same_cells(
    paddings: Tuple[int, int],
) -> None:
    # 40 x 50 pixels become 64 x 64 or 128 x 128: p3 has 8 x 8 or 16 x 16 cells, 5 x 7 of them with
    # a part of the image.
    inputs = batch(height=40, width=50)
    student, teacher = build("retinanet"), build("retinanet").requires_grad_(False)
    for detector, padding in zip((student, teacher), paddings):
        detector.backbone._size_divisibility = padding
    ours, theirs = record(student, inputs), DenseView(teacher, inputs)
    assert ours.image_size != theirs.image_size
    regions = ours.regions(EVERY)
    vectors, dense = theirs.region_vectors(regions), theirs.dense()
    assert len(vectors) == len(regions) and not vectors.requires_grad
    tower = {theirs.strides[k]: x for k, x in zip(dense.levels, dense.tower)}
    for vector, (n, stride, y, x, _) in zip(vectors, sources_of(regions)):
        assert torch.equal(vector, tower[stride][n, :, y, x])
    on_p3 = regions.source.stride == 8
    assert (regions.source.y[on_p3].max(), regions.source.x[on_p3].max()) == (4, 6)


@pytest.mark.parametrize("name", ["faster_rcnn", "cascade_rcnn"])
def test_regions_of_a_two_stage_student_are_the_proposals_of_its_own_pass(name: str) -> None:
    student, vectors = build(name), []
    predictor = student.roi_heads.box_predictor
    predictor = predictor[0] if name == "cascade_rcnn" else predictor
    predictor.register_forward_hook(lambda module, x, output: vectors.append(x[0]))
    view = record(student, batch())
    regions = view.regions(RegionSampler(per_image=3))
    assert view.regions(RegionSampler()) is regions, "a sampler has no say"
    assert regions.source is None and len(regions) > 6
    assert view.regions() is regions
    for boxes, of_image in zip(regions.boxes, view.sampled_proposals):
        assert not boxes.tensor.requires_grad
        if name == "faster_rcnn":  # a cascade's are those of its last stage
            assert torch.equal(boxes.tensor, of_image.proposal_boxes.tensor)
    assert view.region_vectors(regions) is vectors[0]
    assert vectors[0].shape == (len(regions), 32) and vectors[0].requires_grad
    # Detectron2 appends the ground truth.
    for boxes, gt in zip(regions.boxes, view.gt_instances):
        assert (pairwise_iou(gt.gt_boxes, boxes).amax(dim=1) > 0.999).all()


def test_dense_student_that_was_not_asked_for_regions_has_none() -> None:
    view = record(build("retinanet"), batch(), frozenset({"features"}))
    with pytest.raises(RuntimeError, match="student's 'dense' was not recorded"):
        view.regions(RegionSampler())


# Of predictions made by hand ---------------------------------------------------------------------

# The image of a prediction, its level, and its cell: row and column.
Cell = Tuple[int, str, int, int]
Box = Sequence[float]


class ToyDetector(nn.Module):
    """One anchor per cell: squares of 8 and 16 pixels."""

    anchor_generator = DefaultAnchorGenerator(
        sizes=[[8], [16]], aspect_ratios=[[1.0]], strides=[8, 16], offset=0.5
    )
    box2box_transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))


class ToyView(DenseView):
    """
    Two images of 64 x 64 and a detector that predicts given boxes in given cells with given
    scores, and in all other cells boxes without extent.
    """

    def __init__(
        self, found: Mapping[Cell, Tuple[Box, float]], gt: Sequence[Sequence[Box]] = ((), ())
    ):
        images = [{"image": torch.zeros(3, 64, 64), "instances": Instances((64, 64))} for _ in gt]
        for image, boxes in zip(images, gt):
            boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
            image["instances"].gt_boxes = Boxes(boxes)
        DetectorView.__init__(self, ToyDetector(), images)
        shapes = {"p3": (8, 8), "p4": (4, 4)}
        self._maps = {k: noise(2, 5, *s, seed=i).float() for i, (k, s) in enumerate(shapes.items())}
        anchors = self.detector.anchor_generator(list(self._maps.values()))
        # Of two classes one is predicted. The other is far below, so far that means would be in the
        # opposite order.
        logits = {k: torch.full((2, 2, *s), -60.0) for k, s in shapes.items()}
        deltas = {k: torch.full((2, 4, *s), -1e4) for k, s in shapes.items()}
        for (n, level, y, x), (box, score) in found.items():
            anchor = anchors[list(shapes).index(level)].tensor[y * shapes[level][1] + x]
            delta = self.detector.box2box_transform.get_deltas(
                anchor[None], torch.tensor([box], dtype=torch.float32)
            )
            deltas[level][n, :, y, x] = delta[0]
            logits[level][n, :, y, x] = -60.0 - 3 * score
            logits[level][n, (y + x) % 2, y, x] = score
        self._predictions = DensePredictions(
            list(shapes), list(logits.values()), list(deltas.values()), list(self._maps.values())
        )

    @property
    def num_anchors(self) -> int:
        return 1

    @property
    def features(self) -> Dict[str, Tensor]:
        return self._maps

    @property
    def strides(self) -> Dict[str, int]:
        return {"p3": 8, "p4": 16}

    def dense(self) -> DensePredictions:
        return self._predictions


def cells(regions: Regions) -> List[Cell]:
    """In order of image, level, row and column."""
    names = {8: "p3", 16: "p4"}
    return sorted((n, names[stride], y, x) for n, stride, y, x, _ in sources_of(regions))


ONE = [8.0, 8.0, 40.0, 40.0]
NEAR = [8.0, 8.0, 40.0, 36.0]  # IoU with ONE: 28 / 32 = 0.875
HALF = [8.0, 8.0, 40.0, 24.0]  # 16 / 32
FAR = [50.0, 50.0, 60.0, 60.0]


def test_boxes_suppress_each_other_within_an_image_and_a_level_alone() -> None:
    found = {
        (0, "p3", 1, 1): (ONE, 0.0),
        (0, "p3", 5, 2): (NEAR, 1.0),  # suppresses the one above: IoU 0.875 > 0.7, higher score
        (0, "p3", 6, 2): (HALF, 2.0),  # IoU 0.5 with ONE, 16 / 28 with NEAR
        (0, "p4", 1, 1): (ONE, -5.0),  # another level
        (0, "p4", 2, 3): (ONE, -6.0),  # that level: the same box with a lower score
        (1, "p3", 1, 1): (ONE, -7.0),  # another image
    }
    view = ToyView(found)
    suppressed = {(0, "p3", 1, 1), (0, "p4", 2, 3)}
    assert cells(view.regions(RegionSampler())) == sorted(set(found) - suppressed)
    # Nothing overlaps by more than 0.9 but equal boxes.
    kept = sorted(set(found) - {(0, "p4", 2, 3)})
    assert cells(view.regions(RegionSampler(nms_thresh=0.9))) == kept
    assert cells(view.regions(RegionSampler(nms_thresh=1.0))) == sorted(found)
    # All of one image and level overlap by more than 0.4.
    kept = [(0, "p3", 6, 2), (0, "p4", 1, 1), (1, "p3", 1, 1)]
    assert cells(view.regions(RegionSampler(nms_thresh=0.4))) == kept


def scattered(counts: Mapping[Tuple[int, str], int]) -> Dict[Cell, Tuple[Box, float]]:
    """In each image and level so many boxes of 4 pixels a side; the score falls with each."""
    found: Dict[Cell, Tuple[Box, float]] = {}
    for (n, level), count in counts.items():
        columns = {"p3": 8, "p4": 4}[level]
        for i in range(count):
            y, x = divmod(i, columns)
            corner = [x * 8.0 + 1, y * 8.0 + 1]
            found[n, level, y, x] = ([*corner, corner[0] + 4, corner[1] + 4], -0.1 * i)
    return found


ALL_CELLS = {(0, "p3"): 20, (0, "p4"): 10, (1, "p3"): 3, (1, "p4"): 16}


def count(regions: Regions) -> Dict[Tuple[int, str], int]:
    counts: Dict[Tuple[int, str], int] = {}
    for n, level, _, _ in cells(regions):
        counts[n, level] = counts.get((n, level), 0) + 1
    return counts


def test_predictions_before_suppression_are_the_best_of_each_image_and_level() -> None:
    view = ToyView(scattered(ALL_CELLS))
    assert count(view.regions(EVERY)) == ALL_CELLS
    regions = view.regions(EVERY._replace(pre_nms_topk=6))
    assert count(regions) == {k: min(n, 6) for k, n in ALL_CELLS.items()}
    assert set(cells(regions)) == set(scattered({k: min(n, 6) for k, n in ALL_CELLS.items()}))


def test_boxes_after_suppression_are_the_best_of_each_image() -> None:
    # Scores fall by 0.1 on each level: the best 7 of the first image are 4 and 3, or 3 and 4.
    view = ToyView(scattered(ALL_CELLS))
    regions = view.regions(EVERY._replace(post_nms_topk=8))
    expected = {(0, "p3"): 4, (0, "p4"): 4, (1, "p3"): 3, (1, "p4"): 5}
    assert count(regions) == expected
    assert set(cells(regions)) == set(scattered(expected))


def test_number_of_regions_is_that_of_an_image() -> None:
    regions = ToyView(scattered(ALL_CELLS)).regions(EVERY._replace(per_image=25))
    assert [len(x) for x in regions.boxes] == [25, 19], "all that there are"


def positives(regions: Regions, gt: Sequence[Sequence[Box]], threshold: float = 0.5) -> List[int]:
    """How many boxes of each image overlap with its ground truth by the threshold or more."""
    counts = []
    for boxes, of_image in zip(regions.boxes, gt):
        truth = Boxes(torch.tensor(of_image, dtype=torch.float32).reshape(-1, 4))
        iou = pairwise_iou(truth, boxes)
        counts.append(int((iou.amax(dim=0) >= threshold).sum()) if len(truth) else 0)
    return counts


def with_objects(num_positives: int) -> Dict[Cell, Tuple[Box, float]]:
    """Small boxes in 16 cells of p4 of both images; in p3 of the first, boxes near ONE."""
    found = scattered({(0, "p4"): 16, (1, "p4"): 16})
    for i in range(num_positives):
        found[0, "p3", i // 8, i % 8] = (NEAR if i % 2 else ONE, 5.0)
    return found


@pytest.mark.parametrize(
    "num_positives, fraction, expected",
    [
        # Of 16: one positive for three negatives, if there are so many of both.
        (12, 0.25, (4, 12)),
        (12, 0.5, (8, 8)),
        (3, 0.25, (3, 13)),
        (12, 0.05, (0, 16)),
        (30, 1.0, (16, 0)),
    ],
)
def test_share_of_positives_is_bounded(
    num_positives: int, fraction: float, expected: Tuple[int, int]
) -> None:
    gt = [[ONE], []]
    view = ToyView(with_objects(num_positives), gt)
    sampler = EVERY._replace(per_image=16, positive_fraction=fraction)
    torch.manual_seed(0)
    regions = view.regions(sampler)
    sizes = [len(x) for x in regions.boxes]
    assert positives(regions, gt) == [expected[0], 0]
    assert sizes == [sum(expected), 16], "without ground truth, all are negatives"


def test_positives_do_not_fill_up_what_negatives_leave() -> None:
    # 30 positives and 16 negatives: of 40 at most 10 are positive.
    regions = ToyView(with_objects(30), [[ONE], []]).regions(
        EVERY._replace(per_image=40, positive_fraction=0.25)
    )
    assert [len(x) for x in regions.boxes] == [26, 16]


@pytest.mark.parametrize("threshold, expected", [(0.5, 1), (0.51, 0)])
def test_overlap_of_exactly_the_threshold_is_positive(threshold: float, expected: int) -> None:
    # IoU of HALF and each of two objects is 0.5, and they do not add up; no positive may be taken,
    # so a positive is left out.
    view = ToyView({(0, "p3", 1, 1): (HALF, 0.0), (0, "p3", 4, 4): (FAR, 0.0)}, [[ONE, ONE], []])
    sampler = EVERY._replace(iou_threshold=threshold, positive_fraction=1e-9, per_image=5)
    assert [len(x) for x in view.regions(sampler).boxes] == [2 - expected, 0]


def test_image_without_ground_truth_has_regions_still() -> None:
    regions = ToyView(with_objects(12)).regions(EVERY._replace(per_image=20))
    assert [len(x) for x in regions.boxes] == [20, 16]


def test_ground_truth_is_no_region() -> None:
    gt = [[FAR], [FAR, ONE]]
    regions = ToyView(scattered({(0, "p3"): 2}), gt).regions(EVERY)
    assert [len(x) for x in regions.boxes] == [2, 0]


def test_boxes_end_where_their_image_ends_and_those_beyond_are_no_regions() -> None:
    view = ToyView(
        {
            (0, "p3", 0, 0): ([-10.0, -4.0, 12.0, 70.0], 0.0),
            (0, "p3", 7, 7): ([65.0, 60.0, 80.0, 64.0], 9.0),  # to the right of the image
        }
    )
    regions = view.regions(EVERY)
    assert cells(regions) == [(0, "p3", 0, 0)]
    torch.testing.assert_close(
        regions.boxes[0].tensor, torch.tensor([[0.0, 0.0, 12.0, 64.0]]), rtol=1e-4, atol=1e-4
    )


def test_predictions_that_are_not_finite_are_no_regions() -> None:
    view = ToyView(scattered({(0, "p3"): 4}))
    view.dense().logits[0][0, :, 0, 1] = torch.nan
    assert (0, "p3", 0, 1) not in cells(view.regions(EVERY))
    assert len(view.regions(EVERY)) == 3


def test_no_prediction_at_all_gives_no_region() -> None:
    regions = ToyView({}).regions(RegionSampler())
    assert len(regions) == 0 and [len(x) for x in regions.boxes] == [0, 0]
    assert ToyView({}).region_vectors(regions).shape == (0, 5)
    assert regions.rois.shape == (0, 5) and regions.image.shape == (0,)


# Drawn once --------------------------------------------------------------------------------------


def test_heads_with_equal_samplers_share_one_sample() -> None:
    view = ToyView(with_objects(12), [[ONE], []])
    regions = view.regions(RegionSampler(per_image=10))
    assert view.regions(RegionSampler(per_image=10)) is regions
    other = view.regions(RegionSampler(per_image=9))
    assert other is not regions and [len(x) for x in other.boxes] == [9, 9]
    assert view.regions(RegionSampler(per_image=10)) is regions


def test_sample_is_that_of_the_seed() -> None:
    sampler, samples = RegionSampler(per_image=10), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(ToyView(with_objects(12), [[ONE], []]).regions(sampler))
    assert sources_of(samples[0]) == sources_of(samples[1])
    assert torch.equal(samples[0].rois, samples[1].rois)
    assert set(sources_of(samples[0])) != set(sources_of(samples[2]))


# Regions -----------------------------------------------------------------------------------------


def regions_of(*boxes: Sequence[Box], source: Optional[Source] = None) -> Regions:
    return Regions([Boxes(torch.tensor(x, dtype=torch.float32).reshape(-1, 4)) for x in boxes])


def test_rois_name_the_image_of_each_box() -> None:
    regions = regions_of([], [ONE, HALF], [], [FAR], [])
    assert len(regions) == 3
    assert regions.image.tolist() == [1, 1, 3]
    assert regions.rois.tolist() == [[1.0, *ONE], [1.0, *HALF], [3.0, *FAR]]


@pytest.mark.parametrize("images", [1, 3])
def test_without_boxes_there_are_no_rois(images: int) -> None:
    regions = regions_of(*[[]] * images)
    assert len(regions) == 0 and regions.rois.shape == (0, 5)
    assert regions.image.dtype == torch.int64


def test_mean_over_regions_divides_by_one_at_least() -> None:
    assert regions_of([ONE, FAR], [HALF]).mean_count == 3.0
    assert regions_of([], []).mean_count == 1.0
    # Of several processes, by the mean of their numbers; here they are told.
    regions = regions_of([ONE], [])
    regions.counts = torch.tensor([1, 4, 4, 0])
    assert regions.mean_count == 2.25


# Configuration -----------------------------------------------------------------------------------


STUDENT = DetectorInfo("RetinaNet", shapes={}, num_classes=3, provides=frozenset())


def test_keys_reach_the_sampler_and_defaults_are_its_own() -> None:
    assert RegionSampler.from_config(load_config(), STUDENT) == RegionSampler()
    values = {
        "PRE_NMS_TOPK": 11,
        "NMS_THRESH": 0.6,
        "POST_NMS_TOPK": 12,
        "PER_IMAGE": 13,
        "POSITIVE_FRACTION": 0.3,
        "IOU_THRESHOLD": 0.4,
    }
    opts = [w for k, v in values.items() for w in (f"DISTILL.REGIONS.{k}", v)]
    sampler = RegionSampler.from_config(load_config(opts=opts), STUDENT)
    assert sampler == RegionSampler(11, 0.6, 12, 13, 0.3, 0.4)
    assert [k.upper() for k in sampler._fields] == list(values)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("PRE_NMS_TOPK", 0, r"in \[1, 1000000\], got 0"),
        ("POST_NMS_TOPK", 0, r"in \[1, 1000000\], got 0"),
        ("PER_IMAGE", -5, r"in \[1, 1000000\], got -5"),
        ("PER_IMAGE", 10**7, r"in \[1, 1000000\], got 10000000"),
        ("NMS_THRESH", 0.0, r"in \(0, 1\], got 0.0"),
        ("NMS_THRESH", 1.1, r"in \(0, 1\], got 1.1"),
        ("POSITIVE_FRACTION", 0.0, r"in \(0, 1\], got 0.0"),
        ("POSITIVE_FRACTION", float("nan"), r"in \(0, 1\], got nan"),
        ("IOU_THRESHOLD", -0.5, r"in \(0, 1\], got -0.5"),
        ("IOU_THRESHOLD", 2.0, r"in \(0, 1\], got 2.0"),
    ],
)
def test_value_outside_its_range_is_refused_by_its_key(key: str, value: Any, message: str) -> None:
    cfg = load_config(opts=[f"DISTILL.REGIONS.{key}", value])
    with pytest.raises(ValueError, match=rf"DISTILL\.REGIONS\.{key} must be {message}"):
        RegionSampler.from_config(cfg, STUDENT)


def test_key_that_a_two_stage_student_would_not_read_is_refused() -> None:
    student = replace(STUDENT, name="GeneralizedRCNN", two_stage=True)
    assert RegionSampler.from_config(load_config(), student) == RegionSampler()
    cfg = load_config(opts=["DISTILL.REGIONS.PER_IMAGE", 99])
    with pytest.raises(ValueError, match=r"REGIONS\.PER_IMAGE is 99, but the two-stage student"):
        RegionSampler.from_config(cfg, student)


@pytest.mark.parametrize("key", ["NMS_THRESH", "POSITIVE_FRACTION", "IOU_THRESHOLD"])
def test_shares_may_be_one(key: str) -> None:
    sampler = RegionSampler.from_config(load_config(opts=[f"DISTILL.REGIONS.{key}", 1.0]), STUDENT)
    assert getattr(sampler, key.lower()) == 1.0
