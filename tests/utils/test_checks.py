"""What is suggested in place of a name that nobody knows."""

from typing import List

import pytest

from d2kd.utils.checks import nearest, shown

HEADS = ["CKD", "CrossKD", "MGD", "PKD"]


@pytest.mark.parametrize(
    "name, known, expected",
    [
        ("crosskd", HEADS, ["CrossKD"]),
        ("CROSSKD", HEADS, ["CrossKD"]),
        ("croskd", HEADS, ["CrossKD"]),
        ("mgd", HEADS, ["MGD"]),
        ("Traffic_Light", ["traffic light", "train"], ["traffic light"]),
        ("retinanet", ["FCOS", "RetinaNet"], ["RetinaNet"]),
        ("elephant", HEADS, []),
        (3, HEADS, []),
        ("x", [], []),
    ],
)
def test_nearest_name_is_found_whatever_its_case(
    name: object, known: List[str], expected: List[str]
) -> None:
    assert nearest(name, known) == expected


def test_as_many_are_listed_as_asked_for_and_as_alike() -> None:
    assert nearest("coco_trian", ["coco_train", "coco_val", "lvis"], count=3) == [
        "coco_train",
        "coco_val",
    ]
    assert nearest("coco_trian", ["coco_val"], cutoff=0.9) == []


@pytest.mark.parametrize("names, text", [("", ""), ("a", "a"), ("abc", "a, b, c")])
def test_a_few_names_are_all_shown(names: str, text: str) -> None:
    assert shown(list(names)) == text


def test_of_many_names_the_first_are_shown_and_the_others_counted() -> None:
    assert shown(list("abcde")) == "a, b, c and 2 more"
    assert shown(list("abcde"), 4) == "a, b, c, d and 1 more"
