"""Whatever fails while an image is read names the image, in training and in evaluation."""

import copy
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pycocotools.mask
import pytest
import torch
from PIL import Image

from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes, BoxMode
from detectron2.utils.file_io import PathManager

from d2kd.data import build_train_loader
from d2kd.data.mapper import CheckedMapper
from d2kd.data.seeded import SeededDataset
from d2kd.engine import Trainer
from tests.helpers.toy_sets import config_of


@pytest.fixture
def record(tmp_path: Path) -> Dict[str, Any]:
    """A dataset dict with its image."""
    path = str(tmp_path / "a.png")
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    box = {"bbox": [4, 5, 30, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    values = {"file_name": path, "image_id": 1, "width": 64, "height": 48}
    return {**values, "annotations": [dict(box), dict(box)]}


def break_end(record: Dict[str, Any]) -> None:
    data = Path(record["file_name"]).read_bytes()
    Path(record["file_name"]).write_bytes(data[: len(data) // 2])


def gone(record: Dict[str, Any]) -> None:
    Path(record["file_name"]).unlink()


def other_size(record: Dict[str, Any]) -> None:
    record["width"] = 65


def no_box(record: Dict[str, Any]) -> None:
    record["annotations"][1]["bbox"] = None


def no_box_of_a_known_id(record: Dict[str, Any]) -> None:
    record["annotations"][1].update(bbox=[1, None, 3, 4], id=77)


def odd_mode(record: Dict[str, Any]) -> None:
    record["annotations"][0]["bbox_mode"] = "XYWH"


def sixteen_bits(record: Dict[str, Any]) -> None:
    Image.fromarray(np.full((48, 64), 60000, np.uint16)).save(record["file_name"])


FAULTS = {
    break_end: (OSError, "cannot be read"),
    gone: (FileNotFoundError, "No such file"),
    other_size: (ValueError, "Mismatched image shape"),
    no_box: (ValueError, r"its annotation 1 \(counted from 0\) has the bbox None"),
    no_box_of_a_known_id: (ValueError, r"its annotation 77 has the bbox \[1, None, 3, 4\]"),
    odd_mode: (RuntimeError, "cannot be used: .*Error"),
    sixteen_bits: (ValueError, r"more than 8 bits \(PIL mode I;16\)"),
}
OF_BOXES = (no_box, no_box_of_a_known_id, odd_mode)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda x: x.__name__)
@pytest.mark.parametrize("is_train", [True, False])
def test_error_names_the_image(fault: Any, is_train: bool, record: Any, tmp_path: Path) -> None:
    cfg = config_of(tmp_path, [], [])
    CheckedMapper(cfg, is_train=is_train)(record)
    fault(record)
    mapper = CheckedMapper(cfg, is_train=is_train)
    if fault in OF_BOXES and not is_train:
        mapper(record)  # in evaluation nobody reads them here
        return
    kind, words = FAULTS[fault]
    with pytest.raises(kind) as error:
        mapper(record)
    assert record["file_name"] in str(error.value)
    assert error.match(words) or str(error.value).count(record["file_name"]) == 1


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_image_without_objects_is_cropped_where_masks_are_learnt(
    mask_format: str, record: Any, tmp_path: Path
) -> None:
    cfg = config_of(tmp_path, [], [])
    cfg.MODEL.MASK_ON, cfg.INPUT.CROP.ENABLED, cfg.INPUT.MASK_FORMAT = True, True, mask_format
    mapper = CheckedMapper(cfg, is_train=True)
    crowd, everywhere = dict(record["annotations"][0]), np.ones((48, 64), np.uint8, order="F")
    crowd.update(iscrowd=1, segmentation=pycocotools.mask.encode(everywhere))
    for annotations in ([], [crowd]):
        assert len(mapper({**record, "annotations": annotations})["instances"]) == 0
    if mask_format == "polygon":
        return
    # An object that fills the image fills what is left of it, by its mask and not by its box.
    sample = mapper({**record, "annotations": [{**crowd, "iscrowd": 0, "bbox": [0, 0, 9, 9]}]})
    height, width = sample["image"].shape[1:]
    assert sample["instances"].gt_boxes.tensor.tolist() == [[0, 0, width, height]]


@pytest.mark.parametrize("is_train", [True, False])
def test_sizes_written_as_floats_are_sizes_of_masks(
    is_train: bool, record: Any, tmp_path: Path
) -> None:
    record.update(width=64.0, height=48.0)
    sample = CheckedMapper(config_of(tmp_path, [], []), is_train=is_train)(record)
    size = sample["height"], sample["width"]
    # What Detectron2 does to the masks of an image's detections; a tensor of 48.0 rows is none.
    masks = paste_masks_in_image(torch.ones(1, 4, 4), Boxes([[0, 0, 64, 48]]), size)
    assert masks.shape == (1, 48, 64)


def test_the_header_of_an_image_is_read_once(
    record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapper = CheckedMapper(config_of(tmp_path, [], []), is_train=True)
    opened = []
    monkeypatch.setattr(PathManager, "open", lambda *x: opened.append(x) or open(*x))
    for _ in range(3):
        mapper(record)
    assert len(opened) == 4, "three times its pixels, once its header"


def test_decompression_bomb_is_told_by_its_path(
    record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    mapper = CheckedMapper(config_of(tmp_path, [], []), is_train=True)
    with pytest.raises(RuntimeError, match=f"{record['file_name']} .*DecompressionBombError"):
        mapper(record)


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), ZeroDivisionError("x")])
def test_any_mapper_s_error_names_the_image(error: Exception) -> None:
    def mapper(image: Dict[str, Any]) -> None:
        raise error

    with pytest.raises(RuntimeError, match=f"my.png cannot be used: {type(error).__name__}: ") as e:
        SeededDataset([{"file_name": "my.png"}], mapper, 0)[0, 0]
    assert e.value.__cause__ is error


@pytest.mark.parametrize("is_train", [True, False])
def test_samples_are_detectron2_s(is_train: bool, record: Any, tmp_path: Path) -> None:
    cfg, samples = config_of(tmp_path, [], []), []
    for mapper in (CheckedMapper(cfg, is_train), DatasetMapper(cfg, is_train)):
        np.random.seed(3)
        samples.append(mapper(copy.deepcopy(record)))
    ours, theirs = samples
    assert list(ours) == list(theirs) and (ours["image"] == theirs["image"]).all()
    if is_train:
        ours, theirs = (x["instances"].gt_boxes.tensor for x in (ours, theirs))
        assert (ours == theirs).all()


def test_both_loaders_of_a_run_read_with_it(record: Any, tmp_path: Path, forget_sets: None) -> None:
    sixteen_bits(record)
    DatasetCatalog.register("deep", lambda: [record] * 2)
    cfg = config_of(tmp_path, [], [])
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("deep",)
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH, cfg.MODEL.DEVICE = 0, 1, "cpu"
    for loader in (build_train_loader(cfg, 0), Trainer.build_test_loader(cfg, "deep")):
        with pytest.raises(ValueError, match="more than 8 bits"):
            next(iter(loader))
