"""
What a head costs the host in a training step on a GPU.

Waits, in forward and backward: while the host waits for the GPU nothing is queued, and after it the
GPU waits for the host. Operators of the head's own forward: each is a launch, which takes the host
longer than the GPU needs for a small map.
"""

import warnings
from collections import Counter
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pytest

import detectron2.modeling

from d2kd.config import merge_opts
from d2kd.conformance.case import MASK_PAIRS, PAIRS, Pair, find_case
from d2kd.distiller import Distiller
from d2kd.heads.build import build_head
from d2kd.heads.fit import requires_of
from d2kd.heads.registry import head_class
from d2kd.lesson import Lesson
from d2kd.schedule import WeightSchedule
from d2kd.views.predictions import PARTS
from tests.helpers.device_steps import EVERY_CASE
from tests.helpers.pretended_cuda import PretendedCuda

# Pair to head to waits, counted with Detectron2 0.5, which has no FCOS; heads that are not
# named: 0. Where a change needs more, raise the number; where it needs fewer, lower it.
RECORDED: Dict[str, Dict[str, int]] = {
    "retinanet-to-retinanet": {"CKD": 2, "RoIFI": 2, "SGFI": 2},
    "faster_rcnn-to-faster_rcnn": {},
    "faster_rcnn-to-retinanet": {"CKD": 2, "RoIFI": 2, "SGFI": 2},
    "retinanet-to-faster_rcnn": {},
    "reppoints-to-reppoints": {"CKD": 2, "RoIFI": 2, "SGFI": 2},
    "mask_rcnn-to-mask_rcnn": {},
}


RETINANET, FASTER_RCNN = PAIRS[:2]
# Head and pair to operators, with the Detectron2 that has more of them. Where a change needs more,
# raise the number; where it needs fewer, lower it.
OPERATORS: Dict[Tuple[str, Pair], int] = {
    ("ACAMKD", RETINANET): 272,
    ("AMD", RETINANET): 110,
    ("BCKD", RETINANET): 248,
    ("CKD", FASTER_RCNN): 91,
    ("CKD", RETINANET): 276,
    ("CWD", RETINANET): 50,
    ("CanKD", RETINANET): 60,
    ("CrossKD", RETINANET): 292,
    ("DCSFKD", RETINANET): 56,
    ("DFMSD", FASTER_RCNN): 294,
    ("DIST", RETINANET): 160,
    ("DIST", FASTER_RCNN): 82,
    ("DKD", FASTER_RCNN): 81,
    ("DMKD", RETINANET): 175,
    ("FGD", RETINANET): 298,
    ("MAR", RETINANET): 220,
    ("MGD", RETINANET): 40,
    ("MLD", RETINANET): 96,
    ("MLD", FASTER_RCNN): 142,
    ("PKD", RETINANET): 40,
    ("ReviewKD", FASTER_RCNN): 113,
    ("RoICls", FASTER_RCNN): 58,
    ("RoIFI", RETINANET): 226,
    ("RoIFI", FASTER_RCNN): 48,
    ("RoILoc", FASTER_RCNN): 58,
    ("RoIMask", MASK_PAIRS[0]): 62,
    ("SAMKD", FASTER_RCNN): 300,
    ("SGFI", RETINANET): 206,
}


@EVERY_CASE
def test_head_adds_no_more_waits_and_operators_than_recorded(
    name: str, pair: Pair, pretended: Optional[PretendedCuda]
) -> None:
    if pretended is None:
        pytest.skip("waits and operators are counted on a pretended GPU")
    if str(pair) not in RECORDED:
        pytest.skip("not recorded")
    try:
        distiller = distiller_with([name], pair)
    except ValueError:
        pytest.skip("not served")
    if pair not in _WITHOUT:
        _WITHOUT[pair] = waits_of_step(distiller_with([], pair), pair, pretended)
    counted = count_operators(distiller, name, pretended)
    waits = waits_of_step(distiller, pair, pretended)
    operators = counted[1] - counted[0]
    assert operators <= OPERATORS.get((name, pair), operators), f"{operators} operators"
    if hasattr(detectron2.modeling, "FCOS"):
        return  # a newer Detectron2 copies anchors to the GPU; that no devices met has been checked
    # In all: a head may only change the place from which the student's own work is asked for.
    found = sum(waits.values()) - sum(_WITHOUT[pair].values())
    recorded = RECORDED[str(pair)].get(name, 0)
    table = f"RECORDED of {__name__}: {name}, {pair}"
    added = (waits - _WITHOUT[pair]).items()
    where = "\n".join(f"  {n} x {operator}, {line}" for (operator, line), n in added)
    assert found <= recorded, f"{table} has {recorded} waits, but it was {found}:\n{where}"
    if found < recorded:
        warnings.warn(f"{table} has {recorded} waits, and it was only {found}: lower it.")


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("FGD", "DISTILL.FGD.OBJECTS", "masks"),
        ("MAR", "DISTILL.MAR.MASK.OBJECTS", "masks"),
        ("RoIFI", "DISTILL.RoIFI.POOLER", "mask"),
        ("SGFI", "DISTILL.SGFI.POOLER", "mask"),
    ],
)
def test_heads_that_read_masks_add_no_wait(
    name: str, key: str, value: str, pretended: Optional[PretendedCuda]
) -> None:
    if pretended is None:
        pytest.skip("waits are counted on a pretended GPU")
    (pair,) = MASK_PAIRS
    without, found = (
        waits_of_step(distiller_with(names, pair, [key, value]), pair, pretended)
        for names in ([], [name])
    )
    assert sum(found.values()) <= sum(without.values()), found - without


_ON_GPU: Dict[Pair, Distiller] = {}
_WITHOUT: Dict[Pair, Counter] = {}  # waits of a step without heads


def distiller_with(names: List[str], pair: Pair, opts: Sequence[Any] = ()) -> Distiller:
    """
    On the GPU, of the two detectors that all heads of a pair share: how often the student itself
    waits depends on its predictions.

    Raises:
        ValueError: a head refuses the pair
    """
    case = find_case("PKD", pair)
    cfg = case.cfg.clone()
    merge_opts(cfg, list(opts), "opts")
    for name in names:
        cfg.DISTILL[name].SCHEDULE.WARMUP_ITERS = 0
    heads = {x: build_head(x, cfg, case.distiller.pair).train() for x in names}
    if pair not in _ON_GPU:
        _ON_GPU[pair] = case.fresh(own_teacher=True).to("cuda")
    detectors = _ON_GPU[pair]
    requires = [requires_of(head_class(x), cfg, detectors.pair) for x in names]
    lesson = Lesson(detectors.teacher, names, frozenset().union(*requires), detectors.pair)
    return Distiller(
        student=detectors.student,
        lessons=[lesson],
        heads=heads,
        schedules={x: WeightSchedule.from_config(x, cfg) for x in names},
        image_format=detectors.image_format,
    ).to("cuda")


def waits_of_step(distiller: Distiller, pair: Pair, gpu: PretendedCuda) -> Counter:
    """(operator, its place in the code) to how often it makes the host wait in a step."""
    gpu.waits.clear()
    sum(find_case("PKD", pair).losses(distiller).values()).backward()
    return gpu.waits.copy()


def count_operators(distiller: Distiller, name: str, gpu: PretendedCuda) -> List[int]:
    """Where the next step leaves how many operators had run before and after the head's forward."""
    counted: List[int] = []

    def before(module: Any, views: Tuple[Any, Any]) -> None:
        list(views[1].features.values())  # each is computed when it is first read
        if "dense" in distiller.requires:
            for part in PARTS:
                getattr(views[1].dense(), part)
        counted.append(sum(gpu.operators.values()))

    def after(*_: Any) -> None:
        counted.append(sum(gpu.operators.values()))

    head = distiller.heads[name]
    head.register_forward_pre_hook(before)
    head.register_forward_hook(after)
    return counted
