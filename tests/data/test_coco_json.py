"""One pass over a JSON finds what training or evaluation would fail on, or read otherwise."""

import json
import os
from pathlib import Path
from typing import Any, Callable

import pytest

from d2kd.data import register_datasets
from d2kd.data.coco_json import read_classes, read_summary
from tests.helpers.toy_sets import Content, config_of, content, every, second, write_set


def without(part: str, key: str) -> Callable[[Content], Any]:
    return every(part, lambda x: x.pop(key, None))


def twice_one_name(said: Content) -> None:
    said["categories"][1]["name"] = said["categories"][0]["name"]


def one_file_of_two_ids(said: Content) -> None:
    said["images"][4]["file_name"] = "./2.png"


def no_mapping(said: Content) -> None:
    said["annotations"][1] = 7


# A change, and what the error says besides the file
UNSOUND = [
    (second("annotations", id="b"), r"annotations\[1\] has the id 'b'; it must be a whole number"),
    (second("annotations", id=None), r"annotations\[1\] has the id None"),
    (second("annotations", id=True), r"annotations\[1\] has the id True"),
    (second("annotations", id=1), "annotations has the id 1 twice"),
    (second("images", id="2"), r"images\[1\] has the id '2'"),
    (second("images", id=2**63), rf"images\[1\] has the id {2**63}"),
    (second("categories", id="2"), r"categories\[1\] has the id '2'"),
    (second("categories", id=None), r"categories\[1\] has the id None"),
    (second("annotations", image_id=99), "annotation 2 has the image_id 99, .*among the images"),
    (second("annotations", image_id="1"), "annotation 2 has the image_id '1'"),
    (second("annotations", image_id=[1]), r"annotation 2 has the image_id \[1\]"),
    (second("annotations", category_id="1"), "annotation 2 has the category_id '1'"),
    (second("annotations", bbox=None), "annotation 2 has the bbox None"),
    (second("annotations", bbox=[]), r"annotation 2 has the bbox \[\]"),
    (second("annotations", bbox="1 1 4 4"), "annotation 2 has the bbox 1 1 4 4"),
    (second("annotations", bbox=[1, 1, "4", 4]), r"annotation 2 has the bbox \[1, 1, '4', 4\]"),
    (second("annotations", bbox=[1, 1, None, 4]), r"annotation 2 has the bbox \[1, 1, None, 4\]"),
    (second("annotations", bbox=[10**400, 1, 4, 4]), "annotation 2 has the bbox"),
    (second("annotations", bbox=[9, 9, -4, 4]), r"annotation 2 has the bbox \[9, 9, -4, 4\]"),
    (second("annotations", bbox=[9, 9, 4, -4]), r"annotation 2 has the bbox \[9, 9, 4, -4\]"),
    (second("annotations", bbox=[1, 1, 4, 4, 30]), r"annotation 2 has the bbox \[1, 1, 4, 4, 30\]"),
    (second("annotations", iscrowd=None), "annotation 2 has the iscrowd None"),
    (second("annotations", iscrowd="0"), "annotation 2 has the iscrowd '0'"),
    (second("annotations", iscrowd=2), "annotation 2 has the iscrowd 2"),
    (second("annotations", ignore=1), "annotation 2 has the ignore 1"),
    (second("annotations", area="big"), "annotation 2 has the area 'big'"),
    (second("annotations", area=-4), "annotation 2 has the area -4"),
    (second("annotations", segmentation="x"), "annotation 2 has a segmentation that is neither"),
    (second("annotations", segmentation=[1, 2, 3, 4, 5, 6]), "annotation 2 has a segmentation"),
    (second("annotations", segmentation=[["1"] * 6]), "annotation 2 has a segmentation"),
    (
        second("annotations", segmentation={"counts": "x"}),
        'annotation 2 has an RLE whose "counts"',
    ),
    (second("annotations", keypoints=["a"]), "annotation 2 has keypoints"),
    (no_mapping, r"annotations\[1\] is 7; it must have the keys id, image_id"),
    (second("images", width=None), "image 2 has the width None; it must be a whole number"),
    (second("images", width="64"), "image 2 has the width '64'"),
    (second("images", height=48.5), "image 2 has the height 48.5"),
    (second("images", height=0), "image 2 has the height 0"),
    (second("images", file_name=None), "image 2 has the file_name None"),
    (second("images", file_name=7), "image 2 has the file_name 7"),
    (without("images", "width"), r'images\[0\] has no "width"'),
    (without("annotations", "id"), r'annotations\[0\] has no "id"'),
    (twice_one_name, "the categories 1 and 2 have the same name, 'cat'"),
    (second("categories", name=None), "category 2 has the name None"),
    (second("categories", name=" "), "category 2 has the name ' '"),
    (one_file_of_two_ids, "the images 2 and 5 are the same file, 2.png, with different"),
]


@pytest.mark.parametrize("change, message", UNSOUND, ids=[x[1][:40] for x in UNSOUND])
@pytest.mark.parametrize("part", ["TRAIN", "TEST"])
def test_what_is_not_sound_is_refused_by_file_id_and_key(
    part: str, change: Callable, message: str, tmp_path: Path, forget_sets: None
) -> None:
    write_set(tmp_path, "good")
    path = write_set(tmp_path, "bad", change)
    sets = (["bad"], ["good"]) if part == "TRAIN" else (["good"], ["bad"])
    with pytest.raises(ValueError, match=rf"DATASETS.COCO_FORMAT\[\d\]: {path} .*{message}"):
        register_datasets(config_of(tmp_path, *sets))


SOUND = [
    lambda said: None,
    without("annotations", "area"),
    without("annotations", "iscrowd"),
    every("annotations", lambda x: x.update(area=None, iscrowd=False, ignore=0)),
    every("annotations", lambda x: x.update(id=x["id"] - 1)),  # from 0
    every("annotations", lambda x: x.update(id=-x["id"])),
    every("annotations", lambda x: x.update(segmentation=[], keypoints=[])),
    every("annotations", lambda x: x.update(bbox=[float(v) for v in x["bbox"]])),
    second("annotations", iscrowd=1, segmentation={"counts": [3072], "size": [48, 64]}),
]


@pytest.mark.parametrize("change", SOUND)
def test_what_has_one_meaning_is_taken(change: Callable, tmp_path: Path, forget_sets: None) -> None:
    for name in ("a", "b"):
        write_set(tmp_path, name, change)
    register_datasets(config_of(tmp_path, ["a"], ["b"]))


def test_image_that_is_repeated_as_a_whole_is_taken(tmp_path: Path) -> None:
    def repeat(said: Content) -> None:
        said["images"].append({**said["images"][0], "id": 50})
        copies = [dict(x) for x in said["annotations"] if x["image_id"] == 1]
        for i, copy in enumerate(copies):
            copy.update(id=500 + i, image_id=50)
        said["annotations"] += copies

    path = write_set(tmp_path, "a", repeat)
    assert len(read_summary(path, "key").images) == 9


def test_classes_are_told_also_of_a_file_whose_boxes_nobody_reads(tmp_path: Path) -> None:
    path = write_set(tmp_path, "a", second("annotations", bbox=None))
    assert read_classes(path, "key") == ("cat", "dog")
    with pytest.raises(ValueError, match="annotation 2"):
        read_summary(path, "key")


def test_nested_beyond_reason_is_refused_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" * 10**5)
    with pytest.raises(ValueError, match=f"key: {path} is not in COCO's format"):
        read_summary(str(path), "key")


def test_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: Any) -> None:
    path = write_set(tmp_path, "a")
    first = read_summary(path, "key")
    monkeypatch.setattr(json, "load", lambda f: pytest.fail("read again"))
    assert read_summary(path, "other key") is first
    monkeypatch.undo()
    Path(path).write_text(json.dumps(content(count=3)))
    os.utime(path, (0, 0))  # whatever the disk's clock
    assert len(read_summary(path, "key").images) == 3
