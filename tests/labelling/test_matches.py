"""Detections are matched with ground truth as COCO's evaluation does it."""

from typing import Any, Dict, List, Set, Tuple

import numpy as np
import pytest
from pycocotools.coco import COCO

from d2kd.labelling import match

Box = Tuple[float, float, float, float]  # XYWH
WHOLE = (0, 0, 100, 100)


def annotation(image: int, category: int, box: Box, **values: Any) -> Dict[str, Any]:
    area = box[2] * box[3]
    place = {"image_id": image, "category_id": category, "bbox": list(box), "area": area}
    return {**place, "iscrowd": 0, **values}


def truth_of(annotations: List[Dict[str, Any]]) -> COCO:
    """Of two images and two classes."""
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": i, "width": 200, "height": 200} for i in (1, 2)],
        "categories": [{"id": i, "name": str(i)} for i in (1, 2)],
        "annotations": [{**x, "id": i} for i, x in enumerate(annotations, 1)],
    }
    truth.createIndex()
    return truth


# Boxes of class 1 in image 1; detections there with falling score; which are hits, None: left out
CASES = {
    "an IoU of a half is enough": ([WHOLE], [(0, 0, 50, 100)], [True]),
    "less is not": ([WHOLE], [(0, 0, 49, 100)], [False]),
    "a box is found once": ([WHOLE], [(0, 0, 90, 100), WHOLE], [True, False]),
    "a taken box leaves the next": (
        [WHOLE, (0, 0, 100, 60)],
        [WHOLE, (0, 0, 100, 90)],
        [True, True],
    ),
    "the best box is taken, even if the next detection then has none": (
        [WHOLE, (0, 0, 100, 60)],
        [(0, 0, 100, 81), (0, 0, 100, 130)],
        [True, False],
    ),
    "no box, no hit": ([], [WHOLE], [False]),
    "nothing detected": ([WHOLE], [], []),
}


@pytest.mark.parametrize("boxes, found, hits", CASES.values(), ids=CASES)
def test_worked_out_cases(boxes: List[Box], found: List[Box], hits: List[bool]) -> None:
    detections = [annotation(1, 1, x, score=0.9 - 0.1 * i) for i, x in enumerate(found)]
    matches = match(truth_of([annotation(1, 1, x) for x in boxes]), detections)[1]
    assert matches.hits.tolist() == hits and len(matches.truth) == len(boxes)
    assert np.isfinite(matches.found_with).sum() == sum(hits)


def test_detections_on_a_crowd_are_left_out_and_a_crowd_is_no_box() -> None:
    crowd = annotation(1, 1, WHOLE, iscrowd=1)
    inside = [(0, 0, 10, 10), (20, 20, 10, 10), (150, 150, 10, 10)]
    detections = [annotation(1, 1, x, score=0.5) for x in inside]
    matches = match(truth_of([crowd]), detections)[1]
    assert matches.truth == [] and [x["bbox"] for x in matches.detections] == [[150, 150, 10, 10]]
    assert matches.hits.tolist() == [False]


def test_all_detections_of_an_image_count_and_not_the_first_100() -> None:
    boxes = [annotation(1, 1, (x, 0, 1, 1)) for x in range(120)]
    matches = match(truth_of(boxes), [{**x, "score": 0.5} for x in boxes])[1]
    assert matches.hits.sum() == len(matches.hits) == 120


@pytest.mark.parametrize("image, category", [(2, 1), (1, 2)])
def test_another_image_or_class_is_no_hit(image: int, category: int) -> None:
    matches = match(
        truth_of([annotation(1, 1, WHOLE)]), [annotation(image, category, WHOLE, score=1)]
    )
    assert not any(x.hits.any() for x in matches.values())
    assert len(matches[1].misses(0.0)) == 1 and len(matches[category].false_alarms(0.0)) == 1


def test_a_threshold_divides_hits_from_misses() -> None:
    boxes = [annotation(1, 1, (x, 0, 50, 50)) for x in (0, 60, 120)]
    detections = [annotation(1, 1, (x, 0, 50, 50), score=s) for x, s in ((0, 0.9), (60, 0.5))]
    detections.append(annotation(1, 1, (0, 120, 50, 50), score=0.7))
    matches = match(truth_of(boxes), detections)[1]
    for threshold, missed, false in ((0.5, [120], 1), (0.6, [60, 120], 1), (0.8, [60, 120], 0)):
        assert [x["bbox"][0] for x in matches.misses(threshold)] == missed
        assert len(matches.false_alarms(threshold)) == false


def iou(a: Box, b: Box, crowd: int) -> float:
    """Over a crowd: the share of `a` that it covers."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / (a[2] * a[3] if crowd else a[2] * a[3] + b[2] * b[3] - both)


def slow_match(truth: List[Dict[str, Any]], detections: List[Dict[str, Any]]) -> List[Any]:
    """(score, hit) of all detections that are not on a crowd, in one image and class."""
    taken: Set[int] = set()
    found = []
    for x in sorted(detections, key=lambda x: -x["score"]):
        overlaps = [iou(x["bbox"], t["bbox"], t["iscrowd"]) for t in truth]
        free = [
            i
            for i, t in enumerate(truth)
            if not t["iscrowd"] and i not in taken and overlaps[i] >= 0.5
        ]
        if free:
            taken.add(max(free, key=lambda i: overlaps[i]))
            found.append((x["score"], True))
        elif not any(t["iscrowd"] and o >= 0.5 for t, o in zip(truth, overlaps)):
            found.append((x["score"], False))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_as_an_obvious_slow_matching(seed: int) -> None:
    drawn = np.random.default_rng(seed)

    def boxes(count: int) -> List[Dict[str, Any]]:
        places = np.concatenate(
            [drawn.uniform(0, 60, (count, 2)), drawn.uniform(40, 90, (count, 2))], 1
        )
        kinds = drawn.integers(1, 3, (count, 2)).tolist()
        return [annotation(i, c, tuple(x)) for (i, c), x in zip(kinds, places.tolist())]

    truth = [{**x, "iscrowd": int(drawn.random() < 0.2)} for x in boxes(20)]
    detections = [{**x, "score": round(drawn.random(), 1)} for x in boxes(60)]  # with ties
    found = match(truth_of(truth), detections)
    for category in (1, 2):
        ours = list(zip(found[category].scores.tolist(), found[category].hits.tolist()))
        theirs: List[Any] = []
        for image in (1, 2):
            here = (image, category)
            theirs += slow_match(
                *(
                    [x for x in y if (x["image_id"], x["category_id"]) == here]
                    for y in (truth, detections)
                )
            )
        assert sorted(ours) == sorted(theirs) and len(ours) > 5
        assert ours == sorted(ours, key=lambda x: -x[0])
