"""Which pairs of detectors a head says it takes, and which it can be built for."""

from functools import lru_cache
from typing import Any, Dict, FrozenSet, List, Set

import pytest

import detectron2.modeling
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model

from d2kd.heads import DetectorInfo, DistillPair, build_head, head_class
from d2kd.heads.build import fitting
from d2kd.heads.fit import misfit
from d2kd.heads.registry import head_names
from d2kd.lesson import describe_pair
from d2kd.pairing.levels import pair_levels
from d2kd.pairing.pair import ANY_PAIR, DENSE, SAME_KIND, TWO_STAGE
from tests.helpers.logit_references import refusal_of
from tests.helpers.toys import detector_config

needs_fcos = pytest.mark.skipif(
    not hasattr(detectron2.modeling, "FCOS"), reason="this Detectron2 has no FCOS"
)
# (student, teacher) of each kind, "teacher -> student".
OF_KIND = {
    "dense -> dense": ("retinanet", "retinanet"),
    "dense -> two-stage": ("faster_rcnn", "retinanet"),
    "two-stage -> dense": ("retinanet", "faster_rcnn"),
    "two-stage -> two-stage": ("faster_rcnn", "faster_rcnn"),
}
# As the methods define it: what compares answers wants two detectors that answer alike.
TAKES: Dict[str, FrozenSet[str]] = {
    "BCKD": DENSE,
    "CrossKD": DENSE,
    "DKD": TWO_STAGE,
    "RoICls": TWO_STAGE,
    "RoILoc": TWO_STAGE,
    "RoIMask": TWO_STAGE,
    "DIST": SAME_KIND,
    "MLD": SAME_KIND,
    "CKD": ANY_PAIR - {"dense -> two-stage"},
}


@lru_cache(maxsize=None)
def detector(name: str) -> Any:
    convs = {f"MODEL__{x}__NUM_CONVS": 3 for x in ("RETINANET", "FCOS", "REPPOINTS")}
    return build_model(detector_config(name, **convs))


def pair_of(student: str, teacher: str) -> DistillPair:
    return describe_pair(config(), detector(student), detector(teacher))


def config(*opts: Any) -> CfgNode:
    cfg = detector_config("retinanet")
    cfg.merge_from_list(list(opts))
    return cfg


def buildable(cfg: CfgNode, pair: DistillPair) -> List[str]:
    """Names of the heads that can be built for the pair, found by building every one."""
    names = []
    for name in head_names():
        try:
            build_head(name, cfg, pair)
        except ValueError:
            continue
        names.append(name)
    return names


def test_kind_is_told_teacher_first() -> None:
    for kind, names in OF_KIND.items():
        assert pair_of(*names).kind == kind
    assert set(OF_KIND) == ANY_PAIR


@pytest.mark.parametrize("kind", OF_KIND)
@pytest.mark.parametrize("name", head_names())
def test_head_can_be_built_for_the_kinds_it_declares_and_for_no_other(name: str, kind: str) -> None:
    pairs = getattr(head_class(name), "pairs", ANY_PAIR)
    assert pairs <= ANY_PAIR and pairs == TAKES.get(name, ANY_PAIR)
    of_kind = ("mask_rcnn", "mask_rcnn") if name == "RoIMask" and kind in pairs else OF_KIND[kind]
    pair, cfg = pair_of(*of_kind), config()
    if kind in pairs:
        assert misfit(name, cfg, pair) is None
        assert type(build_head(name, cfg, pair)) is head_class(name)
        return
    text = refusal_of(name, cfg, pair)
    student, teacher = pair.student.name, pair.teacher.name
    assert text.startswith(f"DISTILL.HEADS: {name} takes {', '.join(sorted(pairs))}; ")
    assert f"this is {kind} (teacher {teacher}, student {student})." in text
    assert misfit(name, cfg, pair) in text


@pytest.mark.parametrize(
    "kind, without",
    # None of these detectors has masks.
    [(k, {"RoIMask", *(n for n, v in TAKES.items() if k not in v)}) for k in OF_KIND],
)
def test_heads_that_fit_are_those_that_can_be_built(kind: str, without: Set[str]) -> None:
    pair = pair_of(*OF_KIND[kind])
    assert fitting(config(), pair) == buildable(config(), pair)
    assert set(fitting(config(), pair)) == set(head_names()) - without


def test_keys_decide_with_which_heads_fit() -> None:
    pair = pair_of("retinanet", "retinanet")
    assert "CrossKD" in fitting(config("DISTILL.CrossKD.DEPTH", 3), pair)
    assert "CrossKD" not in fitting(config("DISTILL.CrossKD.DEPTH", 4), pair)
    assert "CrossKD" not in fitting(config("DISTILL.CrossKD.BOX_LOSS", "l1"), pair)


@needs_fcos
def test_unequal_anchors_leave_out_what_compares_cell_by_cell() -> None:
    pair = pair_of("fcos", "retinanet")
    names = set(fitting(config(), pair))
    assert names == set(buildable(config(), pair))
    assert not names & {"BCKD", "CrossKD", "DIST", "MLD"} and {"FGD", "PKD", "CKD"} <= names


CELLS = {
    "retinanet": "RetinaNet predicts for 3 anchors per cell",
    "fcos": "FCOS predicts from the centre of each cell, without anchors",
    "reppoints": "RepPoints predicts from the corner of each cell, without anchors",
}
UNLIKE = [("retinanet", "reppoints"), ("reppoints", "retinanet"), ("reppoints", "faster_rcnn")]
UNLIKE += [("faster_rcnn", "reppoints")]
WITH_FCOS = [("fcos", "retinanet"), ("reppoints", "fcos"), ("fcos", "reppoints")]


@pytest.mark.parametrize(
    "student, teacher", [*UNLIKE, *(pytest.param(*x, marks=needs_fcos) for x in WITH_FCOS)]
)
def test_detectors_with_unlike_cells_learn_by_what_does_not_compare_cells(
    student: str, teacher: str
) -> None:
    pair = pair_of(student, teacher)
    of_cells = {"BCKD", "CrossKD", "DIST", "MLD"} if pair.kind in DENSE else set()
    fit = {x for x in head_names() if misfit(x, config(), pair) is None}
    assert fit == {x for x in head_names() if pair.kind in TAKES.get(x, ANY_PAIR)} - of_cells
    for name in of_cells:
        text = refusal_of(name, config(), pair)
        assert f"{name} compares logits cell by cell, but the student {CELLS[student]}" in text
        assert f"and the teacher {CELLS[teacher].replace(' predicts', '')}. Take a teacher " in text
        assert "ANCHOR_GENERATOR" not in text and "Heads that fit: ACAMKD, AMD, " in text


# Levels on which both predict --------------------------------------------------------------------


def info(levels: List[str], dense: List[str]) -> DetectorInfo:
    shapes = {k: ShapeSpec(channels=4, stride=2 ** int(k[1:])) for k in levels}
    return DetectorInfo("RetinaNet", shapes, 3, frozenset(), dense_levels=tuple(dense))


def test_dense_levels_are_the_paired_ones_on_which_both_predict() -> None:
    student = info(["p2", "p3", "p4", "p5"], ["p3", "p4", "p5"])
    teacher = info(["p2", "p3", "p4", "p5"], ["p2", "p3", "p4"])
    levels = pair_levels(student.shapes, teacher.shapes)
    pair = DistillPair(student, teacher, levels)
    assert [x.student for x in pair.dense_levels] == ["p3", "p4"]
    assert [x.student for x in DistillPair(student, teacher, levels[2:]).dense_levels] == ["p4"]
    with pytest.raises(ValueError, match=r"DISTILL\.LEVELS: .* p2; .* p3, p4, p5, .* p2, p3, p4\."):
        DistillPair(student, teacher, levels[:1]).dense_levels


@pytest.mark.parametrize("name", ["DIST", "BCKD", "CrossKD"])
def test_heads_on_cells_take_the_named_levels_only(name: str) -> None:
    cfg = config("DISTILL.LEVELS", [["p4", "p4"], ["p6", "p6"]])
    pair = describe_pair(cfg, detector("retinanet"), detector("retinanet"))
    assert [x.student for x in build_head(name, cfg, pair).levels] == ["p4", "p6"]
