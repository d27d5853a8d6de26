"""AP of what ground truth says, whatever it leaves out and wherever its ids begin."""

import json
from pathlib import Path
from typing import Any, Callable, Dict, List

import pycocotools.mask
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.structures import Boxes, Instances

from d2kd.data import register_datasets
from d2kd.engine.evaluator import build_evaluator, complete_truth
from tests.helpers.toy_sets import Content, config_of, every, write_set


def one_object(said: Content) -> None:
    said["annotations"] = said["annotations"][:1]
    said["annotations"][0].update(id=0)


def from_zero(said: Content) -> None:
    for i, annotation in enumerate(said["annotations"]):
        annotation["id"] = i


def ap_of_truth(folder: Path, *changes: Callable, shift: float = 0.0) -> Dict[str, float]:
    """Box AP of detections that are the boxes themselves, moved to the right by `shift` pixels."""

    def change(said: Content) -> None:
        for apply in changes:
            apply(said)

    name = "set_" + str(len(list(folder.iterdir())))
    write_set(folder, name, change)
    cfg = config_of(folder, [], [name])
    cfg.OUTPUT_DIR = str(folder)
    register_datasets(cfg, parts=("TEST",))
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for image in DatasetCatalog.get(name):
        found = Instances((image["height"], image["width"]))
        boxes = torch.tensor([x["bbox"] for x in image["annotations"]]).float().reshape(-1, 4)
        found.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1) + shift)
        found.scores = torch.linspace(0.9, 0.5, len(boxes))
        found.pred_classes = torch.tensor([x["category_id"] for x in image["annotations"]]).long()
        evaluator.process([image], [{"instances": found}])
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_ids_from_0_give_the_ap_of_ids_from_1(
    shift: float, tmp_path: Path, forget_sets: None
) -> None:
    expected, found = (ap_of_truth(tmp_path, *x, shift=shift) for x in ([], [from_zero]))
    assert found == pytest.approx(expected, nan_ok=True)
    assert shift or expected["AP"] == pytest.approx(100)


@pytest.mark.skipif(
    coco_evaluation.COCOeval_opt is COCOeval, reason="this Detectron2 has no compiled COCOeval"
)
@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_compiled_evaluation_gives_the_numbers_of_pycocotools(
    shift: float, tmp_path: Path, forget_sets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ap_of_truth(tmp_path, from_zero, shift=shift)
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", COCOeval)
    assert found == pytest.approx(ap_of_truth(tmp_path, from_zero, shift=shift), nan_ok=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_evaluation_is_taken_where_it_is_installed(
    compiled: bool, tmp_path: Path, forget_sets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Compiled(COCOeval):
        pass

    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", Compiled if compiled else COCOeval)
    write_set(tmp_path, "some_set", lambda said: None)
    cfg = config_of(tmp_path, [], ["some_set"])
    cfg.OUTPUT_DIR = str(tmp_path)
    register_datasets(cfg, parts=("TEST",))
    assert build_evaluator(cfg, "some_set")._use_fast_impl == compiled


def as_floats(said: Content) -> None:
    for image in said["images"]:
        image.update({k: float(image[k]) for k in ("id", "width", "height")})
    for annotation in said["annotations"]:
        annotation.update({k: float(annotation[k]) for k in ("id", "image_id", "category_id")})
    for category in said["categories"]:
        category["id"] = float(category["id"])


def test_whole_numbers_may_be_written_as_floats(tmp_path: Path, forget_sets: None) -> None:
    expected, found = (ap_of_truth(tmp_path, *x, shift=1.0) for x in ([], [as_floats]))
    assert found == pytest.approx(expected, nan_ok=True) and 0 < found["AP"] < 100


def test_a_polygon_is_a_mask_where_sizes_are_floats(tmp_path: Path) -> None:
    # pycocotools draws into an image of 48 x 64 pixels, not of 48.0 x 64.0.
    base = {"id": 0, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 10]}
    annotation = {**base, "segmentation": [[10, 10, 30, 10, 10, 20]]}
    whole, floats = (truth_of(tmp_path, [dict(annotation)], kind) for kind in (int, float))
    assert floats.anns[1]["area"] == whole.anns[1]["area"] > 0


def test_one_object_of_id_0_is_found(tmp_path: Path, forget_sets: None) -> None:
    assert ap_of_truth(tmp_path, one_object)["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    "change",
    [
        every("annotations", lambda x: x.pop("area")),
        every("annotations", lambda x: x.pop("iscrowd")),
        every("annotations", lambda x: x.update(area=None)),
        every("annotations", lambda x: x.update(id=-x["id"])),
        lambda said: said.update(info=None, licenses=None),
    ],
)
def test_what_is_left_out_changes_no_number(
    change: Callable, tmp_path: Path, forget_sets: None
) -> None:
    expected = ap_of_truth(tmp_path, shift=1.0)
    assert 10 < expected["AP"] < 100
    found = ap_of_truth(tmp_path, change, shift=1.0)
    assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("offset", [-1, 100])
def test_ids_of_images_and_categories_may_begin_anywhere(
    offset: int, tmp_path: Path, forget_sets: None
) -> None:
    def move(said: Content) -> None:
        for entry in said["images"] + said["categories"]:
            entry["id"] += offset
        for annotation in said["annotations"]:
            annotation["image_id"] += offset
            annotation["category_id"] += offset

    expected = ap_of_truth(tmp_path, shift=1.0)
    assert ap_of_truth(tmp_path, move, shift=1.0) == pytest.approx(expected, nan_ok=True)


def truth_of(folder: Path, annotations: List[Dict[str, Any]], kind: type = int) -> COCO:
    said = {"images": [{"id": 1, "file_name": "a", "width": kind(64), "height": kind(48)}]}
    said.update(categories=[{"id": 1, "name": "a"}], annotations=annotations)
    path = folder / "a.json"
    path.write_text(json.dumps(said))
    truth = COCO(str(path))
    complete_truth(truth)
    return truth


def test_area_is_that_of_the_mask_where_there_is_one(tmp_path: Path) -> None:
    base = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 10]}
    triangle, two_points = [[10, 10, 30, 10, 10, 20]], [[10, 10, 30, 20]]
    whole = {"counts": [0, 64 * 48], "size": [48, 64]}
    masks = [None, [], triangle, two_points, triangle + two_points, whole]
    annotations = [{**base, "id": i, "segmentation": x} for i, x in enumerate(masks)]
    for i, area in ((9, 7.5), (10, 0)):
        annotations.append({**base, "id": i, "area": area, "segmentation": triangle})
    truth = truth_of(tmp_path, annotations)
    areas = [truth.anns[i]["area"] for i in range(1, 9)]
    assert areas == [200, 200, pytest.approx(100, abs=12), 200, areas[2], 64 * 48, 7.5, 0]
    assert [x["iscrowd"] for x in truth.loadAnns(truth.getAnnIds())] == [0] * 8


@pytest.mark.parametrize("line", [[10, 10], [10, 10, 30, 20], [10, 10, 30, 10, 10]])
@pytest.mark.parametrize("place", [0, 1])
def test_lines_among_polygons_are_no_masks(line: List[int], place: int, tmp_path: Path) -> None:
    polygons = [[10, 10, 30, 10, 10, 20]]
    polygons.insert(place, line)
    base = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 10], "area": 1.0}
    truth = truth_of(tmp_path, [{**base, "id": 0, "segmentation": polygons}])
    assert pycocotools.mask.area(truth.annToRLE(truth.anns[1])) == pytest.approx(100, abs=12)


def test_visible_keypoints_are_counted(tmp_path: Path) -> None:
    base = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 10]}
    base["keypoints"] = [9, 9, 2, 4, 4, 0, 5, 5, 1]
    truth = truth_of(tmp_path, [{**base, "id": 0}, {**base, "id": 1, "num_keypoints": 1}])
    assert [x["num_keypoints"] for x in truth.dataset["annotations"]] == [2, 1]


def test_id_that_is_there_twice_stays_so(tmp_path: Path) -> None:
    base = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 10]}
    truth = truth_of(tmp_path, [{**base, "id": i} for i in (5, 0, 5)])
    assert [x["id"] for x in truth.dataset["annotations"]] == [1, 2, 1]


def test_sound_truth_is_evaluated_as_detectron2_does(tmp_path: Path, forget_sets: None) -> None:
    ours = ap_of_truth(tmp_path, shift=1.5)
    (name,) = [x for x in DatasetCatalog.list() if x.startswith("set_")]
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path), use_fast_impl=False)
    evaluator.reset()
    evaluator._predictions = torch.load(
        tmp_path / "inference" / "instances_predictions.pth", weights_only=False
    )
    assert evaluator.evaluate()["bbox"] == pytest.approx(ours, nan_ok=True)
