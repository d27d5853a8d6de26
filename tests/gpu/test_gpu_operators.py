"""
How many operators the forward of a head runs on a GPU: each is a launch, which takes the host
longer than the GPU needs for a small map.
"""

from typing import Any, Dict, Optional, Tuple

import pytest

from d2kd.conformance.case import PAIRS, Case, Pair, find_case
from tests.helpers.pretended_cuda import PretendedCuda

RETINANET, FASTER_RCNN, TO_RETINANET = PAIRS[:3]
# Head and pair to operators, with the Detectron2 that has more of them. Where a change needs more,
# raise the number; where it needs fewer, lower it.
BOUNDS: Dict[Tuple[str, Pair], int] = {
    ("ACAMKD", RETINANET): 248,
    ("AMD", RETINANET): 110,
    ("BCKD", RETINANET): 248,
    ("CKD", FASTER_RCNN): 91,
    ("CKD", TO_RETINANET): 225,
    ("CWD", RETINANET): 50,
    ("CanKD", RETINANET): 60,
    ("CrossKD", RETINANET): 302,
    ("DCSFKD", RETINANET): 56,
    ("DFMSD", FASTER_RCNN): 299,
    ("DIST", RETINANET): 160,
    ("DIST", FASTER_RCNN): 82,
    ("DKD", FASTER_RCNN): 81,
    ("DMKD", RETINANET): 180,
    ("FGD", RETINANET): 294,
    ("MAR", RETINANET): 216,
    ("MGD", RETINANET): 40,
    ("MLD", RETINANET): 86,
    ("MLD", FASTER_RCNN): 142,
    ("PKD", RETINANET): 40,
    ("ReviewKD", FASTER_RCNN): 113,
    ("RoICls", FASTER_RCNN): 58,
    ("RoIFI", RETINANET): 226,
    ("RoIFI", FASTER_RCNN): 48,
    ("RoILoc", FASTER_RCNN): 58,
    ("SAMKD", FASTER_RCNN): 308,
    ("SGFI", TO_RETINANET): 200,
}


@pytest.mark.parametrize("key", BOUNDS, ids=lambda x: f"{x[0]}-{x[1]}")
def test_head_needs_no_more_operators_than_recorded(
    key: Tuple[str, Pair], pretended: Optional[PretendedCuda]
) -> None:
    if pretended is None:
        pytest.skip("operators are counted on a pretended GPU")
    found = operators_of_forward(find_case(*key), pretended)
    assert found <= BOUNDS[key], f"{found} operators"


def operators_of_forward(case: Case, gpu: PretendedCuda) -> int:
    """Of a case's head; what the two detectors compute anyhow is there already."""
    distiller, counted = case.fresh(own_teacher=True).to("cuda"), []

    def before(module: Any, views: Tuple[Any, Any]) -> None:
        list(views[1].features.values())  # each is computed when it is first read
        if "dense" in distiller.requires:
            views[1].dense()
        counted.append(sum(gpu.operators.values()))

    def after(*_: Any) -> None:
        counted.append(sum(gpu.operators.values()))

    head = distiller.heads[case.name]
    head.register_forward_pre_hook(before)
    head.register_forward_hook(after)
    case.terms(distiller)
    start, end = counted
    return end - start
