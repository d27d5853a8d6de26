"""Images and boxes that no one expects: every head goes on, or the run stops with a name."""

import json
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import cv2
import numpy as np
import pytest
import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2kd.engine import train
from d2kd.heads.registry import head_class, head_names
from d2kd.pairing.pair import ANY_PAIR
from d2kd.weights.run_checkpoints import last_whole_checkpoint
from tests.helpers.runs import (
    RecordBatches,
    build_trainer,
    run,
    run_config,
    scalars,
    tensors_in,
)
from tests.helpers.toys import distill_config, write_teacher

PAIRS = {"retinanet": "dense -> dense", "faster_rcnn": "two-stage -> two-stage"}


@pytest.fixture(scope="module")
def distillers(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, torch.nn.Module]:
    """Of both kinds, with every head that takes such a pair at once."""
    built = {}
    for name, kind in PAIRS.items():
        heads = [x for x in head_names() if kind in getattr(head_class(x), "pairs", ANY_PAIR)]
        heads = [x for x in heads if x != "RoIMask"]  # neither has masks
        # Norms that take a single image of a single cell, which is the student's own matter.
        keys = ("MODEL__RESNETS__NORM", "MODEL__FPN__NORM", "MODEL__RETINANET__NORM")
        norms = dict(zip(keys, ("FrozenBN", "", "")))
        teacher = write_teacher(tmp_path_factory.mktemp(name), name, MODEL__RETINANET__NORM="")
        cfg = distill_config(name, teacher, heads, DISTILL__CrossKD__DEPTH=1, **norms)
        built[name] = build_model(cfg).train()
    return built


def image(height: int, width: int, boxes: List[List[float]]) -> Dict[str, Any]:
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": pixels, "instances": instances, "height": height, "width": width}


def many_boxes(count: int) -> List[List[float]]:
    corner = np.random.default_rng(0).uniform(0, 50, size=(count, 2))
    return np.concatenate([corner, corner + 8], axis=1).tolist()


INPUTS: Dict[str, Callable[[], List[Dict[str, Any]]]] = {
    "no boxes": lambda: [image(64, 64, []), image(64, 64, [])],
    "boxes of one pixel": lambda: [image(64, 64, [[5, 5, 6, 6], [63, 63, 64, 64]])] * 2,
    "boxes without area": lambda: [image(64, 64, [[5, 5, 5, 5], [9, 4, 20, 4]])] * 2,
    "boxes beyond the image": lambda: [image(64, 64, [[-30, -5, 400, 90]])] * 2,
    "one row of pixels": lambda: [image(1, 90, [[0, 0, 30, 1]]), image(64, 64, [])],
    "one column of pixels": lambda: [image(90, 1, [[0, 0, 1, 30]])],
    "one pixel": lambda: [image(1, 1, [[0, 0, 1, 1]])],
    "black images": lambda: [{**image(64, 64, [[9, 9, 30, 30]]), "image": torch.zeros(3, 64, 64)}]
    * 2,
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", INPUTS)
def test_every_head_gives_finite_losses_and_gradients(
    kind: str, name: str, distillers: Dict[str, torch.nn.Module]
) -> None:
    check_step(distillers[name], INPUTS[kind]())


@pytest.mark.parametrize("name", PAIRS)
def test_thousands_of_boxes_in_one_image(name: str, distillers: Dict[str, torch.nn.Module]) -> None:
    check_step(distillers[name], [image(64, 64, many_boxes(3000))])


def check_step(distiller: torch.nn.Module, inputs: List[Dict[str, Any]]) -> None:
    distiller.zero_grad()
    torch.manual_seed(0)
    with EventStorage():
        losses = distiller(inputs)
    # Of a box without area, the student's own loss is not finite; Detectron2's mapper drops those.
    bad = [k for k in distiller.last_step.losses if not losses[k].isfinite()]
    assert not bad, bad
    sum(losses[k] for k in distiller.last_step.losses).backward()
    grads = {k: p.grad for k, p in distiller.named_parameters() if p.grad is not None}
    assert not [k for k, g in grads.items() if not g.isfinite().all()]
    assert {f"heads.{k}" for k, _ in distiller.heads.named_parameters()} <= set(grads)


def test_teacher_with_a_nan_is_refused_by_the_name_of_its_weight(tmp_path: Path) -> None:
    opts = write_teacher(tmp_path, "retinanet")
    saved = torch.load(opts[3], weights_only=True)
    saved["model"]["head.cls_score.weight"].view(-1)[7] = float("nan")
    torch.save(saved, opts[3])
    with pytest.raises(ValueError, match="TEACHER.WEIGHTS: .*head.cls_score.weight.*not finite"):
        build_model(distill_config("retinanet", opts))


Pixels = np.ndarray  # (H, W) or (H, W, 3), uint8


def coco(folder: Path, images: Dict[str, Tuple[Pixels, List[List[float]]]]) -> CfgNode:
    """
    Write a data set, and the config of a run on it.

    Args:
        images: name of a file to its pixels and boxes, [x, y, width, height]
    """
    content: Dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": 1, "name": "a"}]
    for i, (name, (pixels, boxes)) in enumerate(images.items()):
        cv2.imwrite(str(folder / name), pixels)
        height, width = pixels.shape[:2]
        content["images"].append({"id": i, "file_name": name, "width": width, "height": height})
        for box in boxes:
            annotation = {"id": len(content["annotations"]), "image_id": i, "category_id": 1}
            annotation.update({"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
            content["annotations"].append(annotation)
    (folder / "set.json").write_text(json.dumps(content))
    teacher = write_teacher(folder, "retinanet", MODEL__RETINANET__NUM_CLASSES=1)
    cfg = run_config(folder, teacher, ["MGD", "FGD", "CKD"], MODEL__RETINANET__NUM_CLASSES=1)
    entry = {"NAME": "odd_train", "JSON": str(folder / "set.json"), "IMAGES": str(folder)}
    cfg.DATASETS.COCO_FORMAT, cfg.DATASETS.TRAIN = [entry], ("odd_train",)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    # Two passes, so that every image has been met also where wide ones wait for each other.
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = len(images), 1
    return cfg


@pytest.fixture
def forget() -> Iterator[None]:
    """The data set's name is free again after the test."""
    yield
    forget_set()


def forget_set() -> None:
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop("odd_train", None)


def noise_image(*shape: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


def test_odd_files_are_read_and_trained_on(tmp_path: Path, forget: Any) -> None:
    box, pixel = [5, 5, 30, 30], [40, 3, 1, 1]
    corners = np.random.default_rng(0).integers(0, 56, size=(3000, 2)).tolist()
    images = {
        "gray.png": (noise_image(64, 64), [box]),
        "gray.jpg": (noise_image(64, 64), [box, pixel]),
        "row.png": (noise_image(1, 90, 3), [[0, 0, 30, 1]]),
        "gray_row.png": (noise_image(1, 90), [[7, 0, 1, 1]]),
        "column.png": (noise_image(90, 1, 3), [[0, 0, 1, 30]]),
        "pixel.png": (noise_image(1, 1, 3), [[0, 0, 1, 1]]),
        "pixels.png": (noise_image(64, 64, 3), [pixel, [63, 63, 1, 1], [0, 0, 1, 1]]),
        "no_area.png": (noise_image(64, 64, 3), [[5, 5, 0, 0], [9, 4, 12, 0]]),
        "no_boxes.png": (noise_image(64, 64, 3), []),
        "many_boxes.png": (noise_image(64, 64, 3), [[x, y, 8, 8] for x, y in corners]),
    }
    cfg = coco(tmp_path, images)
    recorder = RecordBatches()
    trainer = run(cfg, recorder)
    met = {Path(x["file_name"]).name: x for batch in recorder.batches for x in batch}
    assert set(met) == set(images)
    for name in ("gray.png", "gray.jpg", "gray_row.png"):
        assert (met[name]["image"] == met[name]["image"][:1]).all(), "three equal channels"
    boxes = {name: len(x["instances"]) for name, x in met.items()}
    assert (boxes["many_boxes.png"], boxes["pixels.png"], boxes["row.png"]) == (3000, 3, 1)
    assert boxes["no_boxes.png"] == boxes["no_area.png"] == 0
    losses = scalars(trainer)
    assert {"loss_mgd", "loss_fgd_foreground", "loss_ckd", "loss_cls"} <= set(losses)
    for name, values in losses.items():
        assert len(values) == len(images) and np.isfinite(list(values.values())).all(), name
    assert all(x.isfinite().all() for x in tensors_in(trainer.model.state_dict()))


def eight_images() -> Dict[str, Tuple[Pixels, List[List[float]]]]:
    return {f"{i}.png": (noise_image(64, 64, 3), [[5, 5, 30, 30]]) for i in range(8)}


def remove(path: Path) -> None:
    path.unlink()


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def deepen(path: Path) -> None:
    cv2.imwrite(str(path), np.full((64, 64), 60000, np.uint16))


DAMAGES = [(remove, FileNotFoundError), (halve, OSError), (deepen, ValueError)]


@pytest.mark.parametrize("damage, error", DAMAGES)
def test_image_that_is_missing_or_broken_is_told_before_the_run_begins(
    damage: Callable[[Path], None], error: type, tmp_path: Path, forget: Any
) -> None:
    cfg = coco(tmp_path, eight_images())
    damage(tmp_path / "6.png")
    with pytest.raises(error, match=f"{tmp_path}/6.png"):
        train(cfg)
    assert not Path(cfg.OUTPUT_DIR).exists()


@pytest.mark.parametrize("damage, error", DAMAGES[1:])
def test_image_that_breaks_later_is_told_in_its_step(
    damage: Callable[[Path], None], error: type, tmp_path: Path, forget: Any
) -> None:
    cfg = coco(tmp_path, eight_images())
    trainer = build_trainer(cfg)
    damage(tmp_path / "6.png")
    with pytest.raises(error, match=f"{tmp_path}/6.png"):
        trainer.train()
    assert last_whole_checkpoint(cfg.OUTPUT_DIR), "it had begun"


# How a test set can be such that its evaluation, after the last iteration, would fail or be wrong
SPOILT: Dict[str, Callable[[Dict[str, Any]], Any]] = {
    "annotation 3 has the area 'x'": lambda x: x["annotations"][3].update(area="x"),
    r"annotations\[3\] has the id 'c'": lambda x: x["annotations"][3].update(id="c"),
    "annotation 3 has the iscrowd None": lambda x: x["annotations"][3].update(iscrowd=None),
    "annotation 3 has the bbox None": lambda x: x["annotations"][3].update(bbox=None),
    "image 6 has the width None": lambda x: x["images"][6].update(width=None),
    "6.png has 64x64 pixels": lambda x: x["images"][6].update(width=63),
    "missing at .*/gone.png": lambda x: x["images"][6].update(file_name="gone.png"),
    "has no object": lambda x: x.update(annotations=[]),
    "odd_test has 1 classes .b": lambda x: x["categories"][0].update(name="b"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> CfgNode:
    """A run on eight images."""
    return coco(tmp_path_factory.mktemp("sound"), eight_images())


@pytest.mark.parametrize("message", SPOILT)
def test_test_set_that_cannot_be_evaluated_stops_the_run_before_it_begins(
    message: str, sound: CfgNode, tmp_path: Path, forget_sets: None
) -> None:
    cfg = sound.clone()
    (train_set,) = cfg.DATASETS.COCO_FORMAT
    said = json.loads(Path(train_set["JSON"]).read_text())
    SPOILT[message](said)
    (tmp_path / "test.json").write_text(json.dumps(said))
    entry = {**train_set, "NAME": "odd_test", "JSON": str(tmp_path / "test.json")}
    cfg.DATASETS.COCO_FORMAT.append(entry)
    cfg.DATASETS.TEST = ("odd_test",)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(cfg)
    assert not Path(cfg.OUTPUT_DIR).exists()


def test_test_set_that_says_less_is_evaluated(tmp_path: Path, forget_sets: None) -> None:
    cfg = coco(tmp_path, eight_images())
    said = json.loads((tmp_path / "set.json").read_text())
    for annotation in said["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    (tmp_path / "set.json").write_text(json.dumps(said))
    cfg.DATASETS.TEST, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = ("odd_train",), 1, ()
    assert "AP" in train(cfg)["bbox"]


def test_id_that_is_there_twice_stops_the_run_before_it_begins(tmp_path: Path, forget: Any) -> None:
    cfg = coco(tmp_path, eight_images())
    path = tmp_path / "set.json"
    content = json.loads(path.read_text())
    for part in ("images", "annotations"):
        path.write_text(json.dumps({**content, part: content[part] + content[part][2:3]}))
        with pytest.raises(ValueError, match=f"set.json .*{part} has the id 2 twice"):
            train(cfg)
        forget_set()
    assert not Path(cfg.OUTPUT_DIR).exists()
