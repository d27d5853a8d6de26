"""Predictions of a cell are compared anchor with anchor, in whatever order a detector has them."""

from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from torch import Tensor

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2kd.conformance.detectors import enliven
from d2kd.distiller import Distiller
from d2kd.heads import build_head
from d2kd.views import anchor_order
from d2kd.views.anchors import reorder
from tests.helpers.toys import batch, distill_config, write_teacher

LOGITS_HEADS = ["BCKD", "CrossKD", "DIST", "MLD"]
RATIOS = "MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS"


def build(teacher: List[Any], heads: List[str], **overrides: Any) -> Distiller:
    """Every call builds the same student; CrossKD hands over after the one convolution it has."""
    values = {"DISTILL__CrossKD__DEPTH": 1, **overrides}
    torch.manual_seed(0)
    distiller = build_model(distill_config("retinanet", teacher, heads, **values)).train()
    enliven(distiller.student)
    return distiller


def terms(distiller: Distiller) -> Dict[str, float]:
    torch.manual_seed(1)
    with EventStorage():
        losses = distiller(batch())
    names = list(distiller.last_step.losses)
    return {k: losses[k].item() for k in names}


def rewrite_rows(teacher: List[Any], layer: str, change: Any) -> None:
    """Change weight and bias of a layer in a teacher's file."""
    path = teacher[3]
    state = torch.load(path)["model"]
    for key in (f"{layer}.weight", f"{layer}.bias"):
        state[key] = change(state[key])
    torch.save({"model": state}, path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> List[Any]:
    return lively_teacher(tmp_path_factory.mktemp("plain"))


def lively_teacher(folder: Path, **overrides: Any) -> List[Any]:
    opts = write_teacher(folder, "retinanet", **overrides)
    for i, layer in enumerate(("head.cls_score", "head.bbox_pred")):
        generator = torch.Generator().manual_seed(i)
        rewrite_rows(
            opts, layer, lambda x: x + 0.05 * torch.randn(x.shape, generator=generator)  # noqa
        )
    return opts


def rotate_anchors(rows: Tensor) -> Tensor:
    """(3*E, ...) -> the last of three anchors, then the others: not its own inverse."""
    return rows.unflatten(0, (3, -1)).roll(1, dims=0).flatten(0, 1)


def test_order_in_which_a_teacher_lists_its_anchors_does_not_matter(
    plain: List[Any], tmp_path: Path
) -> None:
    expected = terms(build(plain, LOGITS_HEADS))
    assert len(expected) == 7 and min(expected.values()) > 1e-3
    rotated = lively_teacher(tmp_path, **{RATIOS: [[2.0, 0.5, 1.0]]})
    for layer in ("head.cls_score", "head.bbox_pred"):
        rewrite_rows(rotated, layer, rotate_anchors)
    distiller = build(rotated, LOGITS_HEADS)
    assert set(distiller.lessons[0].anchor_orders) == {f"p{i}" for i in range(3, 8)}
    assert set(distiller.lessons[0].anchor_orders.values()) == {(1, 2, 0)}
    assert terms(distiller) == pytest.approx(expected, rel=1e-4)
    # Taken in their own order, all losses would be others; but for CrossKD, which compares the
    # teacher's head with itself, and only in what it counts has anchors of the student's.
    distiller.lessons[0].anchor_orders = {}
    for key, value in terms(distiller).items():
        assert "crosskd" in key or value != pytest.approx(expected[key], rel=2e-4), key


@pytest.mark.parametrize(
    "overrides, shown",
    [
        ({RATIOS: [[0.5, 1.0, 3.0]]}, "on p3 they differ"),
        ({"MODEL__ANCHOR_GENERATOR__OFFSET": 0.5}, "on p3 they differ"),
        (
            {"MODEL__ANCHOR_GENERATOR__SIZES": [[8], [16], [32], [64], [100]]},
            "on p7 they differ",
        ),
    ],
)
def test_other_anchors_are_refused_by_key_for_heads_that_compare_logits(
    overrides: Dict[str, Any], shown: str, tmp_path: Path
) -> None:
    teacher = write_teacher(tmp_path, "retinanet", **overrides)
    distiller = build(teacher, ["PKD"])
    cfg = distill_config("retinanet", teacher, DISTILL__CrossKD__DEPTH=1)
    for head in LOGITS_HEADS:
        with pytest.raises(ValueError, match="MODEL.ANCHOR_GENERATOR") as error:
            build_head(head, cfg, distiller.pair)
        text = str(error.value)
        assert f"{head} compares logits anchor by anchor, but {shown}" in text
        assert "SIZES, ASPECT_RATIOS and OFFSET" in text and "PKD" in text.split("that fit")[1]


def test_anchors_of_a_level_that_is_not_compared_may_differ(tmp_path: Path) -> None:
    sizes = {"MODEL__ANCHOR_GENERATOR__SIZES": [[8], [16], [32], [64], [100]]}
    teacher = write_teacher(tmp_path, "retinanet", **sizes)
    assert build(teacher, ["DIST"], DISTILL__LEVELS=[["p3", "p3"], ["p4", "p4"]])


def test_boxes_are_compared_in_pixels_whatever_scales_the_deltas(
    plain: List[Any], tmp_path: Path
) -> None:
    expected = terms(build(plain, ["BCKD", "CrossKD"]))
    scaled = lively_teacher(tmp_path, MODEL__RETINANET__BBOX_REG_WEIGHTS=(2.0, 2.0, 2.0, 2.0))
    rewrite_rows(scaled, "head.bbox_pred", lambda x: 2 * x)
    distiller = build(scaled, ["BCKD", "CrossKD"])
    assert distiller.pair.teacher.box_weights == (2.0,) * 4
    assert distiller.pair.student.box_weights == (1.0,) * 4
    assert terms(distiller) == pytest.approx(expected, rel=1e-4)


def test_order_names_where_each_anchor_stands() -> None:
    a, b, c = (0.0, 0, 1, 1), (0.0, 0, 2, 2), (0.0, 0, 3, 3)
    assert anchor_order([a, b, c], [a, b, c]) == (0, 1, 2)
    assert anchor_order([a, b, c], [c, a, b]) == (1, 2, 0)
    assert anchor_order([a, a, b], [b, a, a]) == (1, 2, 0)  # each of two equal ones once
    assert anchor_order([a, b], [a, c]) is None and anchor_order([a, b, b], [a, a, b]) is None


def test_reordering_moves_all_entries_of_an_anchor_together() -> None:
    # Two classes of three anchors: channel 10 a + k.
    x = torch.tensor([0.0, 1, 10, 11, 20, 21]).view(1, 6, 1, 1)
    assert reorder(x, (1, 2, 0)).flatten().tolist() == [10, 11, 20, 21, 0, 1]
