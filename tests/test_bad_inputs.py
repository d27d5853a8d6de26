"""Images and boxes that no one expects: every head goes on, or the run stops with a name."""

import json
from pathlib import Path
from typing import Any, Callable, Dict, List

import cv2
import numpy as np
import pytest
import torch

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2kd.data import register_datasets
from d2kd.heads.build import head_class, head_names
from d2kd.pairs import ANY_PAIR

from runs import build_trainer, run_config
from toys import distill_config, write_teacher

PAIRS = {"retinanet": "dense -> dense", "faster_rcnn": "two-stage -> two-stage"}


@pytest.fixture(scope="module")
def distillers(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, torch.nn.Module]:
    """Of both kinds, with every head that takes such a pair at once."""
    built = {}
    for name, kind in PAIRS.items():
        heads = [x for x in head_names() if kind in getattr(head_class(x), "pairs", ANY_PAIR)]
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
    "thousands of boxes in one image": lambda: [image(64, 64, many_boxes(2_000))],
    "black images": lambda: [{**image(64, 64, [[9, 9, 30, 30]]), "image": torch.zeros(3, 64, 64)}]
    * 2,
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", INPUTS)
def test_every_head_gives_finite_losses_and_gradients(
    kind: str, name: str, distillers: Dict[str, torch.nn.Module]
) -> None:
    check_step(distillers[name], INPUTS[kind]())


def test_ten_thousand_boxes_in_one_image(distillers: Dict[str, torch.nn.Module]) -> None:
    # Of a Faster R-CNN Detectron2's own matching of each with each takes half a minute.
    check_step(distillers["retinanet"], [image(64, 64, many_boxes(10_000))])


def check_step(distiller: torch.nn.Module, inputs: List[Dict[str, Any]]) -> None:
    distiller.zero_grad()
    torch.manual_seed(0)
    with EventStorage():
        losses = distiller(inputs)
    # Of a box without area, the student's own loss is not finite; Detectron2's mapper drops those.
    bad = [k for k in distiller.latest["terms"] if not losses[k].isfinite()]
    assert not bad, bad
    sum(losses[k] for k in distiller.latest["terms"]).backward()
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


def coco(folder: Path, names: List[str]) -> List[Dict[str, str]]:
    """DATASETS.COCO_FORMAT of images with one box each."""
    images = [{"id": i, "file_name": x, "width": 64, "height": 64} for i, x in enumerate(names)]
    boxes = [
        {
            "id": i,
            "image_id": i,
            "category_id": 1,
            "bbox": [5, 5, 30, 30],
            "area": 900,
            "iscrowd": 0,
        }
        for i in range(len(names))
    ]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}
    (folder / "set.json").write_text(json.dumps(content))
    return [{"NAME": "odd_train", "JSON": str(folder / "set.json"), "IMAGES": str(folder)}]


def train_on(folder: Path, names: List[str]) -> Any:
    cfg = run_config(folder, student="retinanet", SOLVER__MAX_ITER=2)
    cfg.DATASETS.COCO_FORMAT, cfg.DATASETS.TRAIN = coco(folder, names), ("odd_train",)
    cfg.MODEL.RETINANET.NUM_CLASSES = 1
    register_datasets(cfg, "RetinaNet")
    trainer = build_trainer(cfg)
    trainer.train()
    return trainer


@pytest.fixture
def forget() -> Any:
    """The data set's name is free again after the test."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop("odd_train", None)


def test_grayscale_files_are_read(tmp_path: Path, forget: Any) -> None:
    gray = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    for name in ("a.png", "b.jpg"):
        cv2.imwrite(str(tmp_path / name), gray)
    assert train_on(tmp_path, ["a.png", "b.jpg"]).iter == 2, "both steps are behind it"


def test_missing_image_is_told_by_its_path(tmp_path: Path, forget: Any) -> None:
    # Not among the few that are looked for before training.
    names = [f"{i}.png" for i in range(8)]
    for name in names[:4] + names[5:]:
        cv2.imwrite(str(tmp_path / name), np.zeros((64, 64, 3), dtype=np.uint8))
    with pytest.raises(FileNotFoundError, match="4.png"):
        for _ in range(8):
            train_on(tmp_path, names)
