"""Of a teacher's pyramid only what is read is computed, once, and as Detectron2 computes it."""

from typing import Any, Dict, List

import pytest
import torch
from test_views import count_calls
from torch import nn

from tests.helpers.toys import GROUP_NORM, batch
from tests.helpers.view_toys import build, build_teacher, c4_detector, needs_fcos, view_of_teacher


def parts_of(fpn: nn.Module) -> Dict[str, nn.Module]:
    names = [x for x in fpn._modules if x.startswith("fpn_output")]
    return {**{x: getattr(fpn, x) for x in names}, "top": fpn.top_block}


@pytest.mark.parametrize(
    "name", ["retinanet", "faster_rcnn", pytest.param("fcos", marks=needs_fcos)]
)
@torch.no_grad()
def test_levels_are_those_of_the_backbone(name: str) -> None:
    detector = build_teacher(name)
    images = detector.preprocess_image(batch()).tensor
    expected = detector.backbone(images)
    found = view_of_teacher(detector, batch()).features
    assert list(found) == list(expected) and len(found) == len(expected)
    assert all(torch.equal(x, expected[k]) for k, x in reversed(list(found.items())))


# Levels that are read, in this order, to what runs for them.
READ: List[Any] = [
    ("faster_rcnn", ["p3", "p5"], {"fpn_output3", "fpn_output5"}),
    ("faster_rcnn", ["p6"], {"fpn_output5", "top"}),  # it is pooled from P5
    ("faster_rcnn", ["p6", "p5"], {"fpn_output5", "top"}),
    ("retinanet", ["p3", "p4", "p5"], {"fpn_output3", "fpn_output4", "fpn_output5"}),
    ("retinanet", ["p7", "p6", "p7"], {"top"}),  # of RES5
    ("retinanet", [], set()),
]


@pytest.mark.parametrize("name, levels, runs", READ)
def test_only_what_is_read_runs_and_once(name: str, levels: List[str], runs: set) -> None:
    detector = build_teacher(name)
    calls = count_calls({**parts_of(detector.backbone), "stem": detector.backbone.bottom_up.stem})
    features = view_of_teacher(detector, batch()).features
    for level in levels:
        assert features[level].shape[1] == 32 and not features[level].requires_grad
    assert calls == {k: int(k in runs or k == "stem") for k in calls}


# What is read of a teacher's predictions, to what runs for it, once on each of five levels.
BRANCHES: List[Any] = [
    ("retinanet", ["tower"], {"cls_subnet"}),
    ("retinanet", ["logits", "tower", "logits"], {"cls_subnet", "cls_score"}),
    ("retinanet", ["deltas"], {"bbox_subnet", "bbox_pred"}),
    ("retinanet", ["centerness"], set()),
    pytest.param("fcos", ["centerness"], {"bbox_subnet", "ctrness"}, marks=needs_fcos),
]


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
@pytest.mark.parametrize("name, parts, runs", BRANCHES)
def test_only_the_branches_that_are_read_run_and_as_the_head_runs_them(
    name: str, parts: List[str], runs: set, norm: str
) -> None:
    # Under BN the newest Detectron2 has a norm for each level, which counts its calls.
    key = f"MODEL__{name.upper()}__NORM"
    detector = build(name, **{**GROUP_NORM, key: norm}).eval().requires_grad_(False)
    features = list(detector.backbone(detector.preprocess_image(batch()).tensor).values())
    maps = dict(zip(("logits", "deltas", "centerness"), detector.head(features)))
    maps["tower"] = [detector.head.cls_subnet(x) for x in features]
    calls = count_calls(dict(detector.head.named_children()))
    dense = view_of_teacher(detector, batch()).dense()
    for part in parts:
        found, expected = getattr(dense, part), maps.get(part)
        assert (found is None) == (expected is None)
        assert all(torch.equal(x, y) for x, y in zip(found or (), expected or ()))
    assert {k: v for k, v in calls.items() if v} == dict.fromkeys(runs, 5)


def test_head_with_a_forward_of_its_own_is_run_as_it_is() -> None:
    detector = build_teacher("retinanet")

    class Doubled(type(detector.head)):
        def forward(self, features: List[torch.Tensor]) -> Any:
            logits, deltas = super().forward(features)
            return [2 * x for x in logits], deltas

    plain = view_of_teacher(detector, batch()).dense().logits
    detector.head.__class__ = Doubled
    found = view_of_teacher(detector, batch()).dense()
    assert all(torch.equal(x, 2 * y) for x, y in zip(found.logits, plain))
    assert len(found.tower) == 5


def test_backbone_without_a_pyramid_is_run_as_it_is() -> None:
    detector = c4_detector().eval().requires_grad_(False)
    features = view_of_teacher(detector, batch()).features
    expected = detector.backbone(detector.preprocess_image(batch()).tensor)["res4"]
    assert list(features) == ["res4"] and torch.equal(features["res4"], expected)


def test_level_that_is_not_there_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        view_of_teacher(build_teacher("retinanet"), batch()).features["p2"]


def test_mapped_levels_are_computed_when_they_are_read() -> None:
    detector = build_teacher("retinanet")
    calls = count_calls(parts_of(detector.backbone))
    levels = view_of_teacher(detector, batch()).features
    doubled = levels.map(lambda x: 2 * x)
    assert not any(calls.values())
    assert torch.equal(doubled["p4"], 2 * levels["p4"]) and sum(calls.values()) == 1


def test_detector_itself_is_left_as_it_is() -> None:
    detector = build("retinanet").eval()
    before = dict(detector.backbone._modules), list(detector.backbone.output_convs)
    view_of_teacher(detector, batch()).features["p3"]
    assert before == (detector.backbone._modules, detector.backbone.output_convs)
