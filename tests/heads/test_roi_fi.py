"""RoIFIHead beside its equation in loops, at its limits, and between real detectors."""

from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import pytest
import torch
from torch import Tensor, nn

from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from d2kd import load_config
from d2kd.heads import DetectorInfo, DistillPair, RoIFIHead, build_head
from d2kd.pairing.levels import pair_levels
from d2kd.views import Regions, RegionSampler
from tests.helpers.distillers import build_distiller
from tests.helpers.region_references import pool_assigned_level, roi_fi
from tests.helpers.toys import FeatureView, batch, noise

# Of an image of 512 x 512, in the order of levels p3, p5, p4, p3: below 224 pixels a side, 448 and
# more, between these, beyond the edge.
BOXES = [
    [[9.0, 5.5, 40.0, 30.0], [10.0, 20.0, 500.0, 480.0]],
    [[100.0, 90.0, 330.0, 340.0], [-20.0, 400.0, 30.0, 530.0]],
]


class MapsView(FeatureView):
    """Maps that RoIAlign reads, and regions; no detector behind them."""

    provides = frozenset({"features", "roi_features", "regions"})

    def __init__(self, features: Mapping[str, Tensor], regions: Regions):
        super().__init__(features)
        self._regions = regions

    def regions(self, sampler: RegionSampler) -> Regions:
        return self._regions

    @property
    def pooled_levels(self) -> List[str]:
        return list(self._features)


def views(channels: Tuple[int, int] = (3, 4), boxes: Sequence = BOXES) -> Tuple[MapsView, MapsView]:
    """The teacher's pyramid begins one level later and ends one level later."""
    regions = Regions([Boxes(torch.tensor(x).reshape(-1, 4)) for x in boxes])
    maps = [
        {f"p{i}": noise(2, c, 512 >> i, 512 >> i, seed=i + c) for i in levels}
        for c, levels in zip(channels, [(3, 4, 5), (4, 5, 6)])
    ]
    return MapsView(maps[0], regions), MapsView(maps[1], regions)


def make_head(channels: Tuple[int, int] = (3, 4)) -> RoIFIHead:
    torch.manual_seed(0)
    return RoIFIHead(
        student_channels=channels[0], teacher_channels=channels[1], sampler=RegionSampler()
    ).double()


def pooled(view: MapsView) -> Tensor:
    rois = view.regions(RegionSampler()).rois
    return pool_assigned_level(list(view.features.values()), list(view.strides.values()), rois)


@pytest.mark.parametrize("channels", [(3, 4), (4, 4)])
def test_loss_is_that_of_the_equation(channels: Tuple[int, int]) -> None:
    head, (student, teacher) = make_head(channels), views(channels)
    if channels == (4, 4):
        nn.init.normal_(head.adapter.weight)
        nn.init.normal_(head.adapter.bias)
    losses = head(student, teacher)
    assert list(losses) == ["loss_roifi"] and losses["loss_roifi"].shape == ()
    expected = roi_fi(pooled(student), pooled(teacher), head.adapter)
    assert losses["loss_roifi"].item() == pytest.approx(expected, rel=1e-5)


def test_equal_features_give_zero_and_one_channel_its_share() -> None:
    # The adapter of equal channels starts as the identity. One of 4 channels is off by 2: 4 / 4.
    head, (student, _) = make_head((4, 4)), views((4, 4))
    maps = {k: x.clone() for k, x in student.features.items()}
    teacher = MapsView(maps, student._regions)
    assert head(student, teacher)["loss_roifi"].item() == 0.0
    # Within the image only: beyond its edge RoIAlign reads 0.
    student, _ = views((4, 4), [BOXES[0], BOXES[1][:1]])
    for x in maps.values():
        x[:, 2] += 2
    teacher = MapsView(maps, student._regions)
    assert head(student, teacher)["loss_roifi"].item() == pytest.approx(1.0, rel=1e-5)


def test_gradient_reaches_student_and_adapter_and_never_the_teacher() -> None:
    head, (student, teacher) = make_head(), views()
    maps = [*student.features.values()], [*teacher.features.values()]
    for x in maps[0] + maps[1]:
        x.requires_grad_()
    head(student, teacher)["loss_roifi"].backward()
    assert all(x.grad.abs().sum() > 0 for x in [*maps[0], *head.parameters()])
    assert all(x.grad is None for x in maps[1])


def test_batch_without_regions_gives_a_connected_zero() -> None:
    head, (student, teacher) = make_head(), views(boxes=[[], []])
    maps = list(student.features.values())
    for x in maps:
        x.requires_grad_()
    loss = head(student, teacher)["loss_roifi"]
    assert loss.shape == () and loss.item() == 0.0
    loss.backward()
    trained = [*maps, *head.parameters()]
    assert all(x.grad is not None and (x.grad == 0).all() for x in trained)


# Between real detectors --------------------------------------------------------------------------


def build(student: str, opts: Sequence[Any]) -> nn.Module:
    values = {"DISTILL__REGIONS__PER_IMAGE": 16} if student == "retinanet" else {}
    return build_distiller(student, opts, ["RoIFI"], **values)


def count_pooling(distiller: nn.Module) -> Dict[str, int]:
    calls = {"student": 0, "teacher": 0}

    def count(side: str, module: nn.Module) -> None:
        def on_forward(*_: Any) -> None:
            calls[side] += 1

        module.register_forward_hook(on_forward)

    for side, detector in (("student", distiller.student), ("teacher", distiller.teacher.model)):
        if hasattr(detector, "roi_heads"):
            count(side, detector.roi_heads.box_pooler)
    return calls


@pytest.mark.parametrize(
    "student, teacher, expected",
    [
        # Of the student, its own training pass alone; a cascade's has three stages.
        ("faster_rcnn", "cascade_rcnn", {"student": 1, "teacher": 1}),
        ("cascade_rcnn", "faster_rcnn", {"student": 3, "teacher": 1}),
        ("retinanet", "faster_rcnn", {"student": 0, "teacher": 1}),
    ],
)
def test_student_s_features_are_those_of_its_own_training_pass(
    student: str,
    teacher: str,
    expected: Dict[str, int],
    teacher_of: Callable[[str], List[Any]],
) -> None:
    distiller, own = build(student, teacher_of(teacher)), []
    calls = count_pooling(distiller)
    if student != "retinanet":
        pooler = distiller.student.roi_heads.box_pooler
        pooler.register_forward_hook(lambda module, x, output: own.append(output))
    with EventStorage():
        losses = distiller(batch())
    assert calls == expected
    view, head = distiller.last_step.student, distiller.heads["RoIFI"]
    features = view.roi_features(view.regions(head.sampler).boxes)
    assert features.requires_grad and len(features) > 0
    if own:
        assert features is own[0]
    assert 0 < losses["loss_roifi"].item() < 1e4
    losses["loss_roifi"].backward()
    trained = [*distiller.heads.parameters(), *distiller.student.backbone.bottom_up.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert all(p.grad is None for p in distiller.teacher.model.parameters())


# Refusals ----------------------------------------------------------------------------------------


def detector(roi_size: int = 7, channels: Sequence[int] = (8, 8)) -> DetectorInfo:
    shapes = {f"p{i}": ShapeSpec(channels=c, stride=2**i) for i, c in zip(range(3, 5), channels)}
    provides = frozenset({"features", "roi_features", "regions"})
    return DetectorInfo("RetinaNet", shapes, 3, provides, roi_size=roi_size)


def build_for(student: DetectorInfo, teacher: DetectorInfo) -> nn.Module:
    pair = DistillPair(student, teacher, pair_levels(student.shapes, teacher.shapes))
    return build_head("RoIFI", load_config(opts=["DISTILL.REGIONS.PER_IMAGE", 99]), pair)


def test_keys_reach_the_head() -> None:
    head = build_for(detector(), detector(channels=(16, 16)))
    assert head.sampler.per_image == 99
    assert tuple(head.adapter.weight.shape) == (16, 8, 1, 1)


@pytest.mark.parametrize("sizes", [(7, 14), (14, 7)])
def test_unequal_roi_sizes_are_refused_with_the_key(sizes: Tuple[int, int]) -> None:
    with pytest.raises(
        ValueError,
        match=rf"student's have {sizes[0]} cells .* teacher's {sizes[1]} "
        r"\(MODEL\.ROI_BOX_HEAD\.POOLER_RESOLUTION\)",
    ):
        build_for(detector(sizes[0]), detector(sizes[1]))
    assert build_for(detector(14), detector(14))


def test_levels_of_unequal_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"DISTILL\.HEADS: .* has p3 \(8\), p4 \(16\)"):
        build_for(detector(channels=(8, 16)), detector())
