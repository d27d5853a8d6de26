"""A teacher that is whole, but knows nothing of the data, is refused before the first step."""

import json
import re
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.structures import Instances

from d2kd import build_teacher, load_config, student_config
from d2kd.data import register_datasets
from d2kd.data.outlines import CLASSES
from d2kd.engine import train
from d2kd.engine.preflight.teacher_check import check_teacher, evenly_spaced
from d2kd.labelling.inference import Collector
from d2kd.lesson import describe_pair
from d2kd.pairing.classes import match_classes
from d2kd.pairing.pair import DistillPair
from d2kd.teacher.speed_up import speed_up
from d2kd.views import describe_detector
from tests.helpers.runs import run_config
from tests.helpers.toys import ROOT, write_teacher
from tests.helpers.view_toys import needs_fcos


@pytest.fixture
def cfg(folder: Path, monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    monkeypatch.chdir(ROOT)
    return quickstart_config(folder)


def quickstart_config(folder: Path) -> CfgNode:
    """The quickstart's pair, on a few images; its paths start at ROOT."""
    data = ["NUM_TRAIN", 8, "NUM_VAL", 12, "ROOT", str(folder)]
    opts: List[Any] = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder / "run")]
    for key, value in zip(data[0::2], data[1::2]):
        opts += [f"DATASETS.SHAPES.{key}", value]
    cfg = load_config("configs/quickstart/pkd.yaml", opts)
    register_datasets(cfg, "RetinaNet")
    return cfg


def ap_in(text: str) -> float:
    return float(re.search(r"The teacher has ([\d.]+) AP on", text).group(1))


def test_trained_teacher_passes_and_its_ap_is_told(
    cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="d2kd")
    check_teacher(cfg, build_teacher(cfg))
    assert ap_in(caplog.text) > 20 and "on 12 images of d2kd_shapes_val" in caplog.text
    assert all(f"\n{x} " in caplog.text for x in CLASSES), "errors of each class"
    assert (Path(cfg.OUTPUT_DIR) / "teacher_worst.png").stat().st_size > 1000
    caplog.clear()
    cfg.DISTILL.TEACHER.EVAL_IMAGES = 5
    check_teacher(cfg, build_teacher(cfg))
    assert ap_in(caplog.text) > 10 and "on 5 images" in caplog.text


@pytest.mark.parametrize(
    "opts", [["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]], ["MODEL.PIXEL_MEAN", [900.0, 900.0, 900.0]]]
)
def test_teacher_that_sees_other_pixels_than_it_learned_from_is_refused(
    cfg: CfgNode, opts: List[Any]
) -> None:
    cfg.DISTILL.TEACHER.MIN_AP = 15.0
    check_teacher(cfg, build_teacher(cfg))
    cfg.DISTILL.TEACHER.OPTS = opts
    with pytest.raises(ValueError, match="(?s)has .* AP, less than DISTILL.TEACHER.MIN_AP 15.0"):
        check_teacher(cfg, build_teacher(cfg))
    cfg.DISTILL.TEACHER.EVAL_IMAGES = 0
    check_teacher(cfg, build_teacher(cfg))


def test_floor_is_the_user_s(cfg: CfgNode) -> None:
    cfg.DISTILL.TEACHER.MIN_AP = 99.0
    with pytest.raises(ValueError, match="less than DISTILL.TEACHER.MIN_AP 99.0"):
        check_teacher(cfg, build_teacher(cfg))


def test_run_with_a_teacher_that_knows_nothing_stops_before_its_first_step(
    folder: Path, teacher: List[Any]
) -> None:
    # A toy teacher of 3 classes, for data of 6: it cannot be asked. Of 6: it knows none of them.
    cfg = run_config(folder, teacher, DISTILL__TEACHER__EVAL_IMAGES=4, SOLVER__MAX_ITER=1)
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = ("d2kd_shapes_val",), str(folder / "unlike")
    train(cfg)
    values = {"MODEL__FPN__OUT_CHANNELS": 64, "MODEL__RETINANET__NUM_CLASSES": 6}
    (folder / "six").mkdir()
    cfg.DISTILL.TEACHER.merge_from_list(
        [
            x.replace("DISTILL.TEACHER.", "")
            for x in write_teacher(folder / "six", "retinanet", **values)
        ]
    )
    cfg.OUTPUT_DIR = str(folder / "refused")
    with pytest.raises(ValueError, match="on 4 images of d2kd_shapes_val it has 0.00 AP"):
        train(cfg)
    assert not list((folder / "refused").glob("model*"))
    cfg.DISTILL.TEACHER.MIN_AP = 0.0
    train(cfg)


@pytest.mark.parametrize("change", ["no test set", "other classes", "random"])
def test_what_cannot_be_evaluated_is_said(
    cfg: CfgNode, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    node = cfg.DISTILL.TEACHER
    if change == "no test set":
        cfg.DATASETS.TEST = ()
    elif change == "other classes":
        node.OPTS, node.ALLOW_RANDOM_WEIGHTS = ["MODEL.RETINANET.NUM_CLASSES", 2], True
        node.WEIGHTS = ""
    else:
        node.WEIGHTS, node.ALLOW_RANDOM_WEIGHTS = "", True
    check_teacher(cfg, build_teacher(cfg))
    assert "The teacher is not evaluated: " in caplog.text


def test_masks_of_a_teacher_are_not_asked_of_a_data_set_of_boxes(
    cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="d2kd")
    opts = write_teacher(tmp_path, "mask_rcnn", MODEL__ROI_HEADS__NUM_CLASSES=6)
    cfg.merge_from_list(opts + ["DISTILL.TEACHER.EVAL_IMAGES", 2, "DISTILL.TEACHER.MIN_AP", 0.0])
    check_teacher(cfg, build_teacher(cfg))
    assert ap_in(caplog.text) < 10


def test_masks_of_a_teacher_are_not_asked_where_one_of_the_labels_is_a_line(
    cfg: CfgNode, tmp_path: Path, forget_sets: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Detectron2 leaves such an object out, and pycocotools finds no mask of it."""
    caplog.set_level("INFO", logger="d2kd")
    opts = write_teacher(tmp_path, "mask_rcnn", MODEL__ROI_HEADS__NUM_CLASSES=6)
    cfg.merge_from_list(opts + ["DISTILL.TEACHER.EVAL_IMAGES", 99, "DISTILL.TEACHER.MIN_AP", 0.0])
    metadata = MetadataCatalog.get("d2kd_shapes_val")
    said = json.loads(Path(metadata.json_file).read_text())
    for annotation in said["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    for name in ("masks", "a_line"):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(said))
        entry = {"NAME": name, "JSON": str(path), "IMAGES": metadata.image_root}
        cfg.DATASETS.COCO_FORMAT.append(entry)
        cfg.DATASETS.TEST = (name,)
        register_datasets(cfg, "RetinaNet")
        caplog.clear()
        check_teacher(cfg, build_teacher(cfg))
        assert ("of masks, on 12 images of" in caplog.text) == (name == "masks")
        said["annotations"][3]["segmentation"] = [[1, 1, 9, 9]]


def test_slice_without_an_object_is_said_and_not_refused(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = [{**x, "annotations": []} for x in DatasetCatalog.get("d2kd_shapes_val")]
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: images)
    cfg.DISTILL.TEACHER.EVAL_IMAGES, cfg.DISTILL.TEACHER.MIN_AP = 5, 99.0
    check_teacher(cfg, build_teacher(cfg))
    reason = "there is no object in 5 images of d2kd_shapes_val"
    assert f"The teacher is not evaluated: {reason}." in caplog.text


def test_slice_of_crowds_alone_is_said_and_not_refused(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = DatasetCatalog.get("d2kd_shapes_val")
    for annotation in (x for image in images for x in image["annotations"]):
        annotation["iscrowd"] = 1
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: images)
    cfg.DISTILL.TEACHER.EVAL_IMAGES, cfg.DISTILL.TEACHER.MIN_AP = 5, 99.0
    check_teacher(cfg, build_teacher(cfg))
    assert "The teacher is not evaluated: there is no object in 5 images" in caplog.text


def test_ids_of_annotations_from_0_change_nothing(
    cfg: CfgNode, tmp_path: Path, forget_sets: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Of one object, whose id is 0, as the exporters of some tools write it."""
    caplog.set_level("INFO", logger="d2kd")
    metadata, found = MetadataCatalog.get("d2kd_shapes_val"), []
    said = json.loads(Path(metadata.json_file).read_text())
    (image,) = [x for x in said["images"] if x["id"] == 3]
    largest = max((x for x in said["annotations"] if x["image_id"] == 3), key=lambda x: x["area"])
    for first in (1, 0):
        entry = {"NAME": f"one_from_{first}", "IMAGES": metadata.image_root}
        entry["JSON"] = str(tmp_path / f"{first}.json")
        content = {**said, "images": [image], "annotations": [{**largest, "id": first}]}
        Path(entry["JSON"]).write_text(json.dumps(content))
        cfg.DATASETS.COCO_FORMAT.append(entry)
        cfg.DATASETS.TEST = (entry["NAME"],)
        register_datasets(cfg, "RetinaNet")
        caplog.clear()
        check_teacher(cfg, build_teacher(cfg))
        found.append(ap_in(caplog.text))
    assert found[0] == found[1] > 5


@needs_fcos
def test_boxes_of_a_teacher_in_half_precision_are_evaluated_without_rounding(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"NUM_CLASSES": len(CLASSES), "SCORE_THRESH_TEST": 0.0, "NORM": ""}
    teacher = write_teacher(tmp_path, "fcos", **{f"MODEL__FCOS__{k}": v for k, v in keys.items()})
    cfg = run_config(folder, teacher)
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = ("d2kd_shapes_val",), str(tmp_path)
    node = cfg.DISTILL.TEACHER
    node.EVAL_IMAGES, node.MIN_AP, node.PRECISION = 1, 0.0, "bfloat16"
    register_datasets(cfg, "RetinaNet")
    teacher, found = build_teacher(cfg), []
    speed_up(teacher, "precision")
    process = Collector.process

    def keep(self: Collector, inputs: List[Any], outputs: List[Any]) -> None:
        found.extend(x["instances"].pred_boxes.tensor for x in outputs)
        process(self, inputs, outputs)

    monkeypatch.setattr(Collector, "process", keep)
    check_teacher(cfg, teacher)
    (boxes,) = found
    rounded = boxes.bfloat16().float()
    assert len(boxes) > 5 and (boxes != rounded).float().mean() > 0.5


def test_teacher_of_the_other_channel_order_is_evaluated_in_its_own(
    cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="d2kd")
    teacher = build_teacher(cfg)
    check_teacher(cfg, teacher)
    expected = ap_in(caplog.text)
    # The same detector, with all that meets the channels of an image turned round
    teacher.image_format = {"BGR": "RGB", "RGB": "BGR"}[teacher.image_format]
    convolutions = [x for x in teacher.model.modules() if isinstance(x, torch.nn.Conv2d)]
    (first,) = [x for x in convolutions if x.in_channels == 3]
    first.weight.data = first.weight.flip(1)
    for name in ("pixel_mean", "pixel_std"):
        setattr(teacher.model, name, getattr(teacher.model, name).flip(0))
    caplog.clear()
    check_teacher(cfg, teacher)
    # Sums over the channels are in another order.
    assert ap_in(caplog.text) == pytest.approx(expected, abs=0.2) and expected > 20


def test_images_that_are_not_looked_at_do_not_count(
    cfg: CfgNode, tmp_path: Path, forget_sets: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="d2kd")
    cfg.DISTILL.TEACHER.EVAL_IMAGES = 5
    check_teacher(cfg, build_teacher(cfg))
    of_whole = ap_in(caplog.text)
    metadata = MetadataCatalog.get("d2kd_shapes_val")
    said = json.loads(Path(metadata.json_file).read_text())
    said["images"] = evenly_spaced(said["images"], 5)
    ids = {x["id"] for x in said["images"]}
    said["annotations"] = [x for x in said["annotations"] if x["image_id"] in ids]
    entry = {"NAME": "these", "JSON": str(tmp_path / "x.json"), "IMAGES": metadata.image_root}
    Path(entry["JSON"]).write_text(json.dumps(said))
    cfg.DATASETS.COCO_FORMAT.append(entry)
    cfg.DATASETS.TEST = ("these",)
    register_datasets(cfg, "RetinaNet")
    caplog.clear()
    check_teacher(cfg, build_teacher(cfg))
    assert "on 5 images of these" in caplog.text and ap_in(caplog.text) == of_whole


def test_images_are_taken_at_equal_distances() -> None:
    images = [{"i": i} for i in range(10)]
    assert [x["i"] for x in evenly_spaced(images, 4)] == [0, 2, 5, 7]
    assert evenly_spaced(images, 10) == evenly_spaced(images, 99) == images


# Other classes -----------------------------------------------------------------------------------

# What the quickstart's teacher knows: disc, ring, triangle, square, star, cross
NAMES = list(CLASSES)
Detections = List[Tuple[Dict[str, Any], Instances]]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Detections:
    """The inputs and detections of the quickstart's teacher, image by image."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        cfg = quickstart_config(folder)
        teacher, mapper = build_teacher(cfg), DatasetMapper(cfg, is_train=False)
    inputs = [mapper(x) for x in DatasetCatalog.get("d2kd_shapes_val")]
    with torch.no_grad():
        return [(x, teacher.model([x])[0]["instances"]) for x in inputs]


def mean_ap(whole: Detections, places: Dict[int, int]) -> float:
    """Mean AP of the test set's classes in `places`: the teacher's class to the set's."""
    evaluator = COCOEvaluator("d2kd_shapes_val", distributed=False, use_fast_impl=False)
    evaluator.reset()
    for inputs, found in whole:
        kept = found[torch.tensor([int(x) in places for x in found.pred_classes])]
        kept.pred_classes = torch.tensor([places[int(x)] for x in kept.pred_classes])
        evaluator.process([inputs], [{"instances": kept}])
    results = evaluator.evaluate()["bbox"]
    aps = [results[f"AP-{NAMES[i]}"] for i in set(places.values())]
    assert len(aps) == len(set(places.values())) and max(aps) > 10
    return sum(aps) / len(aps)


def with_classes(cfg: CfgNode, folder: Path, rows: List[int], names: List[str]) -> CfgNode:
    """Let the teacher have these rows of the quickstart's, under these names."""
    node = cfg.DISTILL.TEACHER
    state = torch.load(node.WEIGHTS)["model"]
    for key in ("head.cls_score.weight", "head.cls_score.bias"):
        state[key] = state[key].unflatten(0, (-1, len(NAMES)))[:, rows].flatten(0, 1)
    torch.save({"model": state}, folder / "other.pth")
    node.WEIGHTS, node.CLASSES = str(folder / "other.pth"), names
    node.OPTS = ["MODEL.RETINANET.NUM_CLASSES", len(rows)]
    return cfg


def check(cfg: CfgNode) -> None:
    """As a run does it."""
    teacher, student = build_teacher(cfg), build_model(student_config(cfg))
    check_teacher(cfg, teacher, describe_pair(cfg, student, teacher.model, teacher.class_names))


@pytest.mark.parametrize(
    "rows, extra",
    [
        ([3, 0, 5, 1, 4, 2], []),  # another order
        ([4, 0, 2], []),  # fewer
        ([5, 4, 3, 2, 1, 0, 3, 3], ["dog", "cat"]),  # more: dogs and cats are squares
        ([1, 0, 0], ["dog", "cat"]),  # one of them
    ],
)
def test_teacher_of_other_classes_is_as_good_on_the_common_ones(
    cfg: CfgNode,
    whole: Detections,
    rows: List[int],
    extra: List[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="d2kd")
    common = rows[: len(rows) - len(extra)]
    check(with_classes(cfg, tmp_path, rows, [NAMES[i] for i in common] + extra))
    expected = mean_ap(whole, {i: i for i in common})
    # Dogs and cats have a share in the 100 detections of an image.
    assert ap_in(caplog.text) == pytest.approx(expected, abs=0.2 if extra else 0.06)
    where = f"on 12 images of d2kd_shapes_val, {len(common)} of its 6 classes."
    assert where in caplog.text


@pytest.mark.parametrize(
    "aliases, places",
    [
        # The teacher's star is the student's disc, whether or not its disc is that too.
        ([["disc", "star"]], {4: 0, 1: 1, 2: 2, 3: 3, 5: 5}),
        ([["disc", "star"], ["disc", "disc"]], {0: 0, 4: 0, 1: 1, 2: 2, 3: 3, 5: 5}),
        # The teacher's star is either of the student's star and disc: nobody can tell which.
        ([["disc", "star"], ["star", "star"]], {1: 1, 2: 2, 3: 3, 5: 5}),
        ([["disc", ""], ["star", ""], ["", "cross"]], {1: 1, 2: 2, 3: 3}),
    ],
)
def test_aliases_move_detections_where_there_is_one_class_for_them(
    cfg: CfgNode,
    whole: Detections,
    aliases: List[List[str]],
    places: Dict[int, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="d2kd")
    cfg.DISTILL.TEACHER.ALIASES = aliases
    check(cfg)
    assert ap_in(caplog.text) == pytest.approx(mean_ap(whole, places), abs=0.06)
    assert f"d2kd_shapes_val, {len(set(places.values()))} of its 6 classes." in caplog.text


def test_class_of_which_the_images_have_no_object_does_not_count(
    cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="d2kd")
    cfg.DISTILL.TEACHER.EVAL_IMAGES, cfg.DISTILL.TEACHER.MIN_AP = 1, 1.0
    image = DatasetCatalog.get("d2kd_shapes_val")[0]
    there = {x["category_id"] for x in image["annotations"]}
    assert len(there) < len(NAMES)
    check(with_classes(cfg, tmp_path, [3, 0, 5, 1, 4, 2], [NAMES[i] for i in (3, 0, 5, 1, 4, 2)]))
    match = re.search(r"The teacher has ([\d.]+) AP on 1 images of .*, 6 of its 6", caplog.text)
    assert float(match.group(1)) > 10


def test_teacher_that_is_bad_at_the_common_classes_is_refused(cfg: CfgNode, tmp_path: Path) -> None:
    # Its "ring" is a cross, its "star" a disc.
    with_classes(cfg, tmp_path, [5, 0], ["ring", "star"]).DISTILL.TEACHER.MIN_AP = 10.0
    message = r"on 12 images of d2kd_shapes_val, 2 of its 6 classes, it has \d\.\d+ AP, less than"
    with pytest.raises(ValueError, match=message):
        check(cfg)


@pytest.mark.parametrize(
    "aliases, reason",
    [
        ([[x, "dog"] for x in NAMES], "no class of it is one class of the student's"),
        ([], "no class of it is one class of the student's"),
    ],
    ids=["all joined", "nothing in common"],
)
def test_classes_without_a_place_in_the_test_set_are_not_evaluated(
    cfg: CfgNode, aliases: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_classes(cfg, tmp_path, [0, 1], ["dog", "cat"])
    cfg.DISTILL.TEACHER.merge_from_list(["ALIASES", aliases, "ALLOW_OTHER_CLASSES", True])
    check(cfg)
    assert f"The teacher is not evaluated: {reason}." in caplog.text


def test_slice_without_an_object_of_the_common_classes_is_said_and_not_refused(
    cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = DatasetCatalog.get("d2kd_shapes_val")
    for annotation in (x for image in images for x in image["annotations"]):
        annotation["category_id"] = NAMES.index("cross")
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: images)
    check(with_classes(cfg, tmp_path, [0, 1], ["disc", "ring"]))
    assert "there is no object of the common classes in 12 images" in caplog.text


def test_test_set_of_other_classes_than_the_student_s_is_not_evaluated(
    cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = build_teacher(cfg)
    info = describe_detector(teacher.model, "teacher")
    classes = match_classes(["ring", "disc"], ["disc", "ring"])
    check_teacher(cfg, teacher, DistillPair(info, info, (), classes))
    reason = "d2kd_shapes_val has other classes than the student"
    assert f"The teacher is not evaluated: {reason}." in caplog.text


def test_set_that_a_user_has_registered_needs_no_other_ids(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    teacher = build_teacher(cfg)
    check_teacher(cfg, teacher)
    # Ids of the built-in classes count from 1; as their indices they are those of other classes.
    monkeypatch.delattr(metadata, "thing_dataset_id_to_contiguous_id")
    cfg.DISTILL.TEACHER.MIN_AP = 0.0
    check_teacher(cfg, teacher)
