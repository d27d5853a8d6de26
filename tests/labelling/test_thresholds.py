"""The threshold is the lowest score that has the precision that is wanted."""

import re
from typing import List, Optional, Tuple

import numpy as np
import pytest

from d2kd.labelling import ClassMatches, Gate, choose_gate, gate_table, gate_warnings


def gate_of(scores: List[float], hits: List[bool], boxes: int, wanted: Optional[float]) -> Gate:
    found_with = [s for s, hit in zip(scores, hits) if hit]
    found_with += [-np.inf] * (boxes - len(found_with))
    matches = ClassMatches(
        [{"score": x} for x in scores],
        np.array(hits, dtype=bool),
        [{}] * boxes,
        np.array(found_with),
    )
    return choose_gate({"id": 3, "name": "cat"}, matches, wanted)


# Scores, hits, boxes, wanted; threshold, precision, recall
CASES = {
    "all are right": ([0.9, 0.2], [1, 1], 4, 0.9, (0.2, 1.0, 0.5)),
    "just enough": ([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 0], 2, 0.5, (0.6, 0.5, 1.0)),
    "the lowest counts, though it was not enough in between": (
        [0.9, 0.8, 0.7, 0.6, 0.5],
        [1, 0, 1, 1, 0],
        3,
        0.7,
        (0.6, 0.75, 1.0),
    ),
    "equal scores pass together": ([0.9, 0.5, 0.5], [1, 1, 0], 2, 0.9, (0.9, 1.0, 0.5)),
    "never enough": ([0.9, 0.8, 0.7], [0, 1, 1], 2, 0.9, (None, 2 / 3, 1.0)),
    "equal scores that are never enough": ([0.9, 0.9], [1, 0], 1, 0.9, (None, 0.5, 1.0)),
    "nothing detected": ([], [], 5, 0.9, (None, 0.0, 0.0)),
    "no box": ([0.9, 0.8], [0, 0], 0, 0.9, (None, 0.0, 0.0)),
}


@pytest.mark.parametrize("scores, hits, boxes, wanted, expected", CASES.values(), ids=CASES)
def test_worked_out_cases(
    scores: List[float],
    hits: List[bool],
    boxes: int,
    wanted: float,
    expected: Tuple[Optional[float], float, float],
) -> None:
    gate = gate_of(scores, hits, boxes, wanted)
    assert (gate.threshold, gate.precision, gate.recall) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(20))
def test_as_trying_every_score(seed: int) -> None:
    drawn = np.random.default_rng(seed)
    scores = sorted(drawn.random(40).round(1 + seed % 2).tolist(), reverse=True)  # with ties
    hits = (drawn.random(40) < np.array(scores)).tolist()
    tried = {}
    for threshold in set(scores):
        passed = [hit for score, hit in zip(scores, hits) if score >= threshold]
        tried[threshold] = sum(passed) / len(passed)
    enough = [x for x, precision in tried.items() if precision >= 0.8]
    gate = gate_of(scores, hits, 40, 0.8)
    assert gate.threshold == min(enough, default=None)
    assert gate.precision == (tried[min(enough)] if enough else max(tried.values()))
    assert len(gate.false_alarms) == sum(
        not hit for score, hit in zip(scores, hits) if enough and score >= gate.threshold
    )
    assert gate.threshold is None or len(gate.misses) == round(40 * (1 - gate.recall))


@pytest.mark.parametrize("seed", range(5))
def test_best_f1_as_trying_every_score(seed: int) -> None:
    drawn = np.random.default_rng(seed)
    scores = sorted(drawn.random(40).round(2).tolist(), reverse=True)
    hits = (drawn.random(40) < np.array(scores)).tolist()
    tried = {}
    for threshold in set(scores):
        passed = [hit for score, hit in zip(scores, hits) if score >= threshold]
        precision, recall = sum(passed) / len(passed), sum(passed) / 40
        tried[threshold] = 2 * precision * recall / (precision + recall) if any(passed) else 0.0
    assert tried[gate_of(scores, hits, 40, None).threshold] == pytest.approx(max(tried.values()))
    assert gate_of([], [], 5, None).threshold is None


@pytest.mark.parametrize(
    "gate, told",
    [
        (gate_of([0.9] * 50, [True] * 50, 50, 0.9), []),
        (gate_of([0.9] * 5, [True] * 5, 50, 0.9), ["unsure: 50 boxes, 5 detections"]),
        (gate_of([0.9] * 10, [True] * 9 + [False], 9, 0.9), ["unsure: 9 boxes, 10 detections"]),
        (gate_of([0.9] * 50, [False] * 49 + [True], 50, 0.9), ["no labels, .*0.020, not 0.9"]),
        (gate_of([], [], 5, 0.9), ["no labels, because nothing was detected"]),
    ],
)
def test_a_class_to_be_careful_with_gets_one_line(gate: Gate, told: List[str]) -> None:
    lines = gate_warnings([gate], 0.9)
    assert len(lines) == len(told)
    for line, pattern in zip(lines, told):
        assert line.startswith("cat: ") and re.search(pattern, line)


def test_table_has_a_row_for_each_class() -> None:
    # Of 4 boxes 3 are found, and of 5 detections from 0.5 on 3 are right.
    some = gate_of([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [1, 0, 1, 0, 1, 0], 4, 0.6)
    none = gate_of([0.9], [False], 2, 0.9)._replace(category_id=8, name="dog")
    header, _, *rows = gate_table([some, none], {3: 17, 8: 0}).splitlines()
    words = "class boxes threshold precision recall misses false alarms labels"
    assert header.split() == words.split()
    assert rows[0].split() == ["cat", "4", "0.500", "0.600", "0.750", "1", "2", "17"]
    assert rows[1].split() == ["dog", "2", *"-----", "0"]
