"""What a data set's part in a run asks of it, and what sets ask of each other."""

from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.transforms import ResizeShortestEdge

from d2kd.data import checks, register_datasets
from d2kd.data.coco_json import CocoSummary
from d2kd.data.coco_parts import ImageEntry
from d2kd.data.set_checks import check_role
from tests.helpers.toy_sets import Content, config_of, every, second, write_set

RLE = {"counts": [0, 3072], "size": [48, 64]}


def clear(said: Content) -> None:
    said["annotations"] = []


def polygon(annotation: Dict[str, Any]) -> None:
    x, y, width, height = annotation["bbox"]
    annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height]]


def all_crowds(annotation: Dict[str, Any]) -> None:
    annotation["iscrowd"] = 1


def good(said: Content) -> None:
    every("annotations", polygon)(said)
    keypoints(said)


def check(folder: Path, part: str, *changes: Callable, **values: Any) -> None:
    """Register a good set with polygons, and beside it one with changes."""

    def change(said: Content) -> None:
        for apply in (good, *changes):
            apply(said)

    write_set(folder, "good", good)
    write_set(folder, "bad", change)
    cfg = config_of(folder, *((["bad"], ["good"]) if part == "TRAIN" else (["good"], ["bad"])))
    for key, value in values.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    register_datasets(cfg)


def no_mask(said: Content) -> None:
    said["annotations"][1].pop("segmentation")


LABELS = {"MODEL__MASK_ON": True}  # of a RetinaNet: it may learn from masks and detects none
MASKS = {**LABELS, "MODEL__META_ARCHITECTURE": "GeneralizedRCNN"}
MASKS["MODEL__ROI_HEADS__NUM_CLASSES"] = 2
BITS = {**MASKS, "INPUT__MASK_FORMAT": "bitmask"}
KEYPOINTS = {"MODEL__KEYPOINT_ON": True, "MODEL__ROI_KEYPOINT_HEAD__NUM_KEYPOINTS": 2}
KEYPOINTS["TEST__KEYPOINT_OKS_SIGMAS"] = [0.1, 0.1]
keypoints = every("annotations", lambda x: x.update(keypoints=[9, 9, 2, 12, 9, 0]))
TWO_POINTS = {"segmentation": [[1, 1, 5, 5]]}
CROWD_ALONE = {"iscrowd": 1, "segmentation": []}
OTHER_SIZE = {"segmentation": {**RLE, "size": [64, 48]}}


@pytest.mark.parametrize(
    "part, change, values, message",
    [
        ("TEST", clear, {}, 'bad.json has no object in "annotations", so that AP is undefined'),
        ("TEST", every("annotations", all_crowds), {}, "bad.json has no object.*iscrowd 1 are no"),
        ("TRAIN", clear, {}, "DATASETS.TRAIN: no objects in the annotations of bad"),
        ("TRAIN", every("annotations", all_crowds), {}, "no objects in .* of bad.*iscrowd 1 are n"),
        ("TRAIN", no_mask, MASKS, "annotation 2 has no segmentation, but with MODEL.MASK_ON True"),
        ("TRAIN", no_mask, LABELS, "annotation 2 has no segmentation, but with MODEL.MASK_ON True"),
        ("TEST", no_mask, MASKS, "annotation 2 has no segmentation, but with MODEL.MASK_ON True"),
        ("TEST", second("annotations", **TWO_POINTS), MASKS, "annotation 2 has no segmentation"),
        # Whose evaluation asks the mask of each annotation.
        ("TEST", second("annotations", **CROWD_ALONE), MASKS, "annotation 2 has no segmentation"),
        ("TRAIN", second("annotations", segmentation=RLE), MASKS, "Set it to 'bitmask'"),
        ("TRAIN", second("annotations", **OTHER_SIZE), BITS, "annotation 2 has an RLE whose size"),
        ("TEST", second("annotations", **OTHER_SIZE), MASKS, "annotation 2 has an RLE whose size"),
        (
            "TRAIN",
            every("annotations", lambda x: x.update(TWO_POINTS)),
            {},
            "24 of 24 annotations, such as 1, have no polygon of three points",
        ),
        (
            "TEST",
            every("annotations", lambda x: x.update(area=0)),
            {},
            "24 of 24 annotations, such as 1, have an area that is 0 or larger than the box",
        ),
        ("TEST", every("annotations", lambda x: x.update(area=1e7)), {}, "an area that is 0 or"),
        ("TRAIN", second("annotations", keypoints=[1]), KEYPOINTS, "annotation 2 has 1 numbers in"),
        ("TEST", second("annotations", keypoints=None), KEYPOINTS, "annotation 2 has 0 numbers in"),
        ("TEST", keypoints, {**KEYPOINTS, "TEST__KEYPOINT_OKS_SIGMAS": [0.1]}, "_SIGMAS has 1 val"),
        ("TEST", keypoints, {**KEYPOINTS, "TEST__KEYPOINT_OKS_SIGMAS": []}, "_SIGMAS has 17 val"),
    ],
)
def test_set_that_cannot_play_its_part_is_refused(
    part: str, change: Callable, values: Any, message: str, tmp_path: Path, forget_sets: None
) -> None:
    with pytest.raises(ValueError, match=message):
        check(tmp_path, part, change, **values)


@pytest.mark.parametrize(
    "part, change, values",
    [
        ("TRAIN", no_mask, {}),
        ("TEST", no_mask, {}),
        ("TEST", no_mask, LABELS),
        ("TRAIN", every("annotations", lambda x: x.update(area=0)), {}),
        ("TEST", every("annotations", lambda x: x.update(TWO_POINTS)), {}),
        ("TRAIN", second("annotations", segmentation=RLE), BITS),
        ("TEST", second("annotations", segmentation=RLE), MASKS),
        ("TRAIN", second("annotations", segmentation=RLE, iscrowd=1), MASKS),
        ("TRAIN", second("annotations", **OTHER_SIZE), {}),
        ("TEST", second("annotations", keypoints=None), {}),
        ("TEST", lambda said: None, {**KEYPOINTS, **MASKS}),
        ("TRAIN", second("annotations", **CROWD_ALONE), MASKS),
        ("TRAIN", second("annotations", keypoints=[]), KEYPOINTS),
    ],
)
def test_set_is_only_asked_for_what_its_part_needs(
    part: str, change: Callable, values: Any, tmp_path: Path, forget_sets: None
) -> None:
    check(tmp_path, part, change, **values)


def test_a_few_of_what_would_be_refused_are_told(
    tmp_path: Path, forget_sets: None, caplog: pytest.LogCaptureFixture
) -> None:
    check(tmp_path, "TRAIN", second("annotations", **TWO_POINTS))
    assert "1 of 24 annotations, such as 2, have no polygon of three points" in caplog.text


def test_a_few_odd_areas_are_told(
    tmp_path: Path, forget_sets: None, caplog: pytest.LogCaptureFixture
) -> None:
    check(tmp_path, "TEST", second("annotations", area=0))
    assert "1 of 24 annotations, such as 2, have an area that is 0 or larger" in caplog.text


@pytest.mark.parametrize("part", ["TRAIN", "TEST"])
@pytest.mark.parametrize("count, told", [(2, False), (3, True)])
def test_crowds_that_are_too_many_to_be_some_are_told(
    count: int,
    told: bool,
    part: str,
    tmp_path: Path,
    forget_sets: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As where a tool says by iscrowd that a mask is an RLE."""
    check(tmp_path, part, lambda said: [all_crowds(x) for x in said["annotations"][:count]])
    assert ("bad.json: 3 of 24 annotations have iscrowd 1: neither" in caplog.text) == told


@pytest.mark.parametrize("part", ["TRAIN", "TEST"])
def test_objects_that_are_there_twice_are_told(
    part: str, tmp_path: Path, forget_sets: None, caplog: pytest.LogCaptureFixture
) -> None:
    def repeat(said: Content) -> None:
        first, crowd, last = (dict(said["annotations"][i]) for i in (0, 1, 23))
        said["annotations"][1]["iscrowd"] = crowd["iscrowd"] = 1
        other_image, other_class = dict(last, image_id=7), dict(last, category_id=2)
        said["annotations"] += [first, crowd, other_image, other_class, last, dict(last)]
        for i, x in enumerate(said["annotations"][24:]):
            x.update(id=101 + i, bbox=[float(v) for v in x["bbox"]])

    check(tmp_path, part, repeat)
    told = (
        "3 of 30 annotations have the image, class and box of another one, such as 101 those of 1"
    )
    assert told in caplog.text


def test_training_set_of_background_alone_is_taken_beside_another(
    tmp_path: Path, forget_sets: None
) -> None:
    write_set(tmp_path, "a")
    write_set(tmp_path, "background", clear)
    register_datasets(config_of(tmp_path, ["a", "background"], ["a"]))


def test_images_in_training_and_test_sets_are_counted(
    tmp_path: Path, forget_sets: None, caplog: pytest.LogCaptureFixture
) -> None:
    write_set(tmp_path, "a")
    write_set(tmp_path, "b", lambda said: said["images"].pop() and drop_orphans(said))
    cfg = config_of(tmp_path, ["a"], ["b"])
    register_datasets(cfg)
    assert "also in DATASETS.TRAIN" not in caplog.text
    (tmp_path / "link").symlink_to(tmp_path / "a")
    cfg.DATASETS.COCO_FORMAT[1].update(NAME="c", IMAGES=str(tmp_path / "link"))
    cfg.DATASETS.TEST = ("c",)
    register_datasets(cfg)
    assert "7 of the 7 images of DATASETS.TEST are also in DATASETS.TRAIN, such as" in caplog.text


def test_links_to_images_are_the_images(
    tmp_path: Path, forget_sets: None, caplog: pytest.LogCaptureFixture
) -> None:
    """As in splits that link to the images of one folder."""
    write_set(tmp_path, "a")
    write_set(tmp_path, "b")
    for name in ("2.png", "5.png"):
        (tmp_path / "b" / name).unlink()
        (tmp_path / "b" / name).symlink_to(f"../a/{name}")
    register_datasets(config_of(tmp_path, ["a"], ["b"]))
    assert "2 of the 8 images of DATASETS.TEST are also in DATASETS.TRAIN, such as" in caplog.text
    assert str(tmp_path / "a" / "2.png") in caplog.text


def test_images_in_two_training_sets_are_counted(
    tmp_path: Path, forget_sets: None, caplog: pytest.LogCaptureFixture
) -> None:
    """As where all images were labelled by a teacher, also those that had labels."""
    write_set(tmp_path, "truth", lambda said: said["images"].pop() and drop_orphans(said))
    write_set(tmp_path, "labelled")
    cfg = config_of(tmp_path, ["truth", "labelled"], [])
    register_datasets(cfg)
    assert "another set" not in caplog.text
    cfg.DATASETS.COCO_FORMAT[1].update(NAME="pseudo", IMAGES=str(tmp_path / "truth"))
    cfg.DATASETS.TRAIN = ("truth", "pseudo", "pseudo")  # named twice, a set is told once
    register_datasets(cfg)
    assert caplog.text.count("7 of the 8 images of pseudo are also in another set of") == 1


def test_classes_that_only_the_test_set_has_are_told(
    tmp_path: Path, forget_sets: None, caplog: pytest.LogCaptureFixture
) -> None:
    write_set(tmp_path, "both")
    write_set(tmp_path, "cats", every("annotations", dogs_as_crowds))
    register_datasets(config_of(tmp_path, ["both"], ["cats"]))
    register_datasets(config_of(tmp_path, ["cats", "both"], ["both"]))  # sets count together
    assert "have none in DATASETS.TRAIN" not in caplog.text
    register_datasets(config_of(tmp_path, ["cats"], ["both"]))
    told = "1 of the classes with objects in DATASETS.TEST, such as 'dog', have none in"
    assert told in caplog.text


def dogs_as_crowds(annotation: Dict[str, Any]) -> None:
    annotation["iscrowd"] = int(annotation["category_id"] == 2)


def drop_orphans(said: Content) -> None:
    known = {x["id"] for x in said["images"]}
    said["annotations"] = [x for x in said["annotations"] if x["image_id"] in known]


def with_registered(folder: Path, name: str, train: List[str]) -> CfgNode:
    cfg = config_of(folder, train, [])
    cfg.DATASETS.TEST = (name,)
    return cfg


def test_test_set_that_nobody_evaluates_is_refused(tmp_path: Path, forget_sets: None) -> None:
    write_set(tmp_path, "a")
    DatasetCatalog.register("odd", list)
    for kind in (None, "cityscapes_instance"):
        if kind:
            MetadataCatalog.get("odd").set(evaluator_type=kind)
        message = f"DATASETS.TEST: 'odd' has the evaluator type {kind!r}"
        with pytest.raises(ValueError, match=message):
            register_datasets(with_registered(tmp_path, "odd", ["a"]))


def test_lvis_asks_for_its_package(
    tmp_path: Path, forget_sets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path, "a")
    DatasetCatalog.register("odd", list)
    MetadataCatalog.get("odd").set(evaluator_type="lvis")
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'odd' is evaluated by the package lvis.*pip install"):
        register_datasets(with_registered(tmp_path, "odd", ["a"]))


@pytest.mark.parametrize("part", ["TRAIN", "TEST"])
@pytest.mark.parametrize("size", [(1, 2666), (2667, 1), (9000, 3), (3, 7000), (1, 1), (1333, 800)])
def test_image_of_which_resizing_leaves_nothing_is_refused(part: str, size: Any) -> None:
    cfg, (width, height) = config_of(Path(), [], []), size
    summary = CocoSummary(("a",), images=(ImageEntry("a.png", *size),))
    summary.facts.objects = 1
    # Smallest side 800, largest 1333: Detectron2's own rule, rounding included.
    resized = ResizeShortestEdge(800, 1333).get_transform(np.zeros((height, width)))
    if resized.new_h and resized.new_w:
        check_role(summary, part, cfg, "RetinaNet", "a.json")
        return
    message = f"a.json: INPUT.MAX_SIZE_{part} 1333 would make the image a.png of {width}x{height} p"
    with pytest.raises(ValueError, match=message):
        check_role(summary, part, cfg, "RetinaNet", "a.json")
    cfg.INPUT[f"MIN_SIZE_{part}"] = 0 if part == "TEST" else (0,)
    check_role(summary, part, cfg, "RetinaNet", "a.json")


CROP = {"INPUT__CROP__ENABLED": True}
all_rle = every("annotations", lambda x: x.update(segmentation=RLE))


def test_cropped_polygons_ask_for_the_package_that_crops_them(
    tmp_path: Path, forget_sets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="annotation 1 has its mask as polygons.*pip install sha"):
        check(tmp_path / "a", "TRAIN", **MASKS, **CROP)


@pytest.mark.parametrize(
    "part, change, values",
    [("TRAIN", all_rle, {**BITS, **CROP}), ("TEST", all_rle, MASKS), ("TRAIN", good, CROP)],
    ids=["RLE", "not cropped", "boxes alone"],
)
def test_what_shapely_does_not_crop_does_not_ask_for_it(
    part: str,
    change: Callable,
    values: Any,
    tmp_path: Path,
    forget_sets: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check(tmp_path, part, change, **values)


def test_set_that_a_plugin_registers_is_looked_at_too(tmp_path: Path, forget_sets: None) -> None:
    write_set(tmp_path, "a")
    path = write_set(tmp_path, "mine", second("annotations", bbox=None))
    register_coco_instances("my_own", {}, path, str(tmp_path / "mine"))
    with pytest.raises(ValueError, match=f"DATASETS.TEST: {path} .*annotation 2 has the bbox None"):
        register_datasets(with_registered(tmp_path, "my_own", ["a"]))


def test_server_s_test_set_without_annotations_is_predicted(
    tmp_path: Path, forget_sets: None
) -> None:
    write_set(tmp_path, "a")
    path = write_set(tmp_path, "secret", lambda said: said.pop("annotations"))
    register_coco_instances("my_secret", {}, path, str(tmp_path / "secret"))
    register_datasets(with_registered(tmp_path, "my_secret", ["a"]))


def test_names_of_other_spelling_are_told(
    tmp_path: Path, forget_sets: None, caplog: pytest.LogCaptureFixture
) -> None:
    write_set(tmp_path, "a", second("categories", name="CAT "))
    register_datasets(config_of(tmp_path, ["a"], ["a"]))
    assert "the categories 1 and 2, 'cat' and 'CAT ', differ only in spelling" in caplog.text
