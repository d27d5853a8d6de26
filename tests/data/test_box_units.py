"""Boxes that are no pixels are told from what many of them say together; sound ones pass."""

from pathlib import Path
from typing import Callable, List

import numpy as np
import pytest

from d2kd.data import register_datasets
from d2kd.data.box_units import Boxes, check_pixels
from tests.helpers.toy_sets import config_of, every, write_set

Change = Callable[[np.ndarray, np.ndarray], np.ndarray]


def sound(count: int = 200, seed: int = 0, width: int = 640, height: int = 480) -> np.ndarray:
    """(N, 4), [x, y, width, height] of objects of all sizes, everywhere in the image."""
    drawn = np.random.default_rng(seed)
    size = np.array([width, height])
    extent = size * drawn.uniform(0.02, 0.9, (count, 2))
    corner = drawn.uniform(0, 1, (count, 2)) * (size - extent)
    return np.concatenate([corner, extent], 1)


def check(values: np.ndarray, width: int = 640, height: int = 480) -> List[str]:
    size = np.tile(np.array([width, height], dtype=float), (len(values), 1))
    return check_pixels(Boxes(list(range(1, len(values) + 1)), values[:, :2], values[:, 2:], size))


def shares(boxes: np.ndarray) -> np.ndarray:
    return boxes / np.array([640, 480, 640, 480])


def corners(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def centres(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], 1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "change, reason",
    [
        (shares, "boxes lie within 0..1, .*fractions of the image"),
        (lambda x: shares(centres(x)), "fractions of the image"),
        (lambda x: shares(corners(x)), "fractions of the image"),
        (corners, r"but not if read as \[x0, y0, x1, y1\]: they seem to be corners"),
        (centres, "they seem to be centres"),
        (lambda x: 2 * x + 80, "boxes end beyond their image"),
        (lambda x: np.r_[x[:120], corners(x[120:])], "they seem to be corners"),  # a part of them
        (lambda x: x - np.array([2000, 0, 0, 0]), "lie outside their image or are empty"),
    ],
)
def test_other_units_are_refused_with_an_example(change: Callable, reason: str, seed: int) -> None:
    with pytest.raises(ValueError, match=f"{reason}.*A bbox is .x, y, width, height. in pixels"):
        check(change(sound(seed=seed)))


@pytest.mark.parametrize("full, name", [(100, "percent"), (1000, "thousandths")])
def test_percent_is_told_where_the_images_are_much_larger(full: int, name: str) -> None:
    boxes = shares(sound()) * full
    for change in (lambda x: x, corners):
        with pytest.raises(ValueError, match=f"within 0..{full}, .*they seem to be {name}"):
            check(change(boxes), 4000, 3000)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: x[:1],
        lambda x: x[:3],
        lambda x: np.round(x) + 1,  # counted from 1
        lambda x: x * np.array([0.2, 0.2, 0.1, 0.1]),  # small, all in the upper left
        lambda x: np.r_[x, [[600.0, 400.0, 90.0, 200.0]] * 20],  # objects that the border cuts
        lambda x: x * np.array([1.0, 1.0, 0.5, 1.4]),  # whole people, of whom half are seen
        lambda x: x - np.array([40.0, 40.0, 0.0, 0.0]),
        lambda x: np.array([[5.0, 5.0, 630.0, 470.0]]),
        lambda x: np.array([[0.0, 0.0, 640.0, 480.0]] * 9),  # the whole image
        lambda x: np.r_[x, [[9.0, 9.0, 0.0, 0.0]] * 40],
    ],
)
def test_sound_boxes_pass(change: Callable, seed: int) -> None:
    check(change(sound(seed=seed)))


def test_single_pixels_are_boxes() -> None:
    assert check(np.array([[0.0, 0.0, 1.0, 1.0]]), 1, 1) == []
    assert check(np.array([[7.0, 0.0, 1.0, 1.0]]), 90, 1) == []


def test_a_few_boxes_are_no_evidence_of_another_unit() -> None:
    # 19 boxes, of which 4 end beyond the image, lie in it if x, y is the centre; 20 tell.
    size = [100.0, 100.0, 60.0, 60.0]
    boxes = np.array([size] * 15 + [[600.0, 400.0, 60.0, 60.0]] * 4)
    assert check(boxes) == []
    with pytest.raises(ValueError, match="they seem to be centres"):
        check(np.r_[boxes, [size]])
    # So do 19 that end at 100 pixels of thousands.
    boxes = np.array([[5.0, 5.0, 95.0, 95.0]] * 19)
    assert check(boxes, 4000, 3000) == []
    with pytest.raises(ValueError, match="they seem to be percent"):
        check(np.r_[boxes, boxes[:1]], 4000, 3000)


def test_few_odd_boxes_are_told_by_the_first_one_s_id() -> None:
    boxes = sound(50)
    boxes[7] = [9, 9, 0, 4]
    boxes[9] = [700, 9, 5, 5]
    boxes[11] = [0.2, 0.3, 0.4, 0.5]
    empty, tiny = check(boxes)
    assert "2 of 50 boxes have no area" in empty and "annotation 8 in" in empty
    assert "1 of 50 boxes lie within 0..1" in tiny and "annotation 12 in" in tiny


@pytest.mark.parametrize("part", ["TRAIN", "TEST"])
def test_both_parts_are_looked_at(part: str, tmp_path: Path, forget_sets: None) -> None:
    def to_corners(annotation: dict) -> None:
        x, y, width, height = annotation["bbox"]
        annotation.update(bbox=[x, y, x + width, y + height], area=width * height)

    write_set(tmp_path, "good")
    path = write_set(tmp_path, "bad", every("annotations", to_corners))
    sets = (["bad"], ["good"]) if part == "TRAIN" else (["good"], ["bad"])
    with pytest.raises(ValueError, match=f"{path} .*seem to be corners"):
        register_datasets(config_of(tmp_path, *sets))
