"""Pictures of a checkpoint."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any, Callable, List

import cv2
import numpy as np
import pytest
import torch

from detectron2.data import get_detection_dataset_dicts

from d2kd.cli import draw as draw_module
from d2kd.cli import draw_detections
from d2kd.data.outlines import CLASSES
from tests.helpers.runs import SHAPES_CLASSES, run, run_config
from tests.helpers.toy_sets import NAMES, write_set
from tests.helpers.toys import detector_config, write_teacher


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    # It would keep d2kd's log from caplog, in the tests of other files too.
    monkeypatch.setattr(draw_module, "setup_logger", lambda **_: None)
    return draw_module.main


@pytest.fixture(scope="module")
def finished(folder: Path, teacher: List[Any]) -> Path:
    """OUTPUT_DIR of a toy run; its YAML is config.yaml."""
    cfg = run_config(folder, teacher, DATASETS__TEST=("d2kd_shapes_val",))
    run(cfg)
    (folder / "run" / "config.yaml").write_text(cfg.dump())
    return folder / "run"


@pytest.fixture
def words(finished: Path, tmp_path: Path) -> List[str]:
    arguments = {
        "--config-file": finished / "config.yaml",
        "--weights": finished / "model_final.pth",
        "--output": tmp_path / "pictures",
    }
    return [str(word) for pair in arguments.items() for word in pair]


def test_each_image_gets_a_picture_of_its_name(
    draw: Callable[..., None], words: List[str], tmp_path: Path
) -> None:
    draw([*words, "--images", "3"])
    files = sorted((tmp_path / "pictures").iterdir())
    assert [x.name for x in files] == ["000000.png", "000001.png", "000002.png"]
    pictures = [cv2.imread(str(x)) for x in files]
    assert len({x.shape for x in pictures}) == 1
    assert not (pictures[0] == pictures[1]).all()


def test_images_of_one_name_in_two_folders_get_a_picture_each(
    draw: Callable[..., None], words: List[str], tmp_path: Path, forget_sets: None
) -> None:
    write_set(tmp_path, "two")
    said = json.loads((tmp_path / "two.json").read_text())
    for entry, name in zip(said["images"], ("a/1.png", "b/1.png")):
        path = tmp_path / "two" / name
        path.parent.mkdir()
        shutil.copy(tmp_path / "two" / entry["file_name"], path)
        entry["file_name"] = name
    said["categories"] = [{"id": i, "name": x} for i, x in enumerate(CLASSES, 1)]
    (tmp_path / "two.json").write_text(json.dumps(said))
    entry = {"NAME": "two", "JSON": str(tmp_path / "two.json"), "IMAGES": str(tmp_path / "two")}
    sets = ["DATASETS.COCO_FORMAT", str([entry]), "DATASETS.TRAIN", "('two',)"]
    draw([*words, *sets, "DATASETS.TEST", "('two',)", "--images", "3"])
    files = sorted(x.name for x in (tmp_path / "pictures").iterdir())
    assert files == ["1.png", "1_2.png", "3.png"]


def test_proposals_are_read_where_the_student_wants_some(folder: Path, finished: Path) -> None:
    cfg = run_config(folder, MODEL__LOAD_PROPOSALS=True, DATASETS__TEST=("d2kd_shapes_val",))
    cfg.DATASETS.PROPOSAL_FILES_TEST = (str(folder / "proposals.pkl"),)
    images = get_detection_dataset_dicts(["d2kd_shapes_val"])
    boxes = [np.array([[1, 2, 30, 40], [5, 5, 20, 60]], np.float32) for _ in images]
    content = {"ids": [x["image_id"] for x in images], "boxes": boxes, "bbox_mode": 0}
    content["objectness_logits"] = [np.array([2, 1], np.float32) for _ in images]
    (folder / "proposals.pkl").write_bytes(pickle.dumps(content))
    for sample in draw_module.samples(cfg):
        # An image of 64 pixels is shown as it is.
        assert torch.equal(sample["proposals"].proposal_boxes.tensor, torch.tensor(boxes[0]))


def test_a_second_call_draws_the_same(
    draw: Callable[..., None], words: List[str], tmp_path: Path
) -> None:
    contents = []
    for _ in range(2):
        draw([*words, "--images", "1"])
        contents.append((tmp_path / "pictures" / "000000.png").read_bytes())
        torch.rand(3)
    assert contents[0] == contents[1]


def test_a_head_that_has_stopped_is_drawn_too(
    draw: Callable[..., None], words: List[str], tmp_path: Path
) -> None:
    heights = []
    for stop in ("-1", "1"):
        draw([*words, "--images", "1", "DISTILL.MGD.SCHEDULE.STOP_ITER", stop])
        heights.append(cv2.imread(str(tmp_path / "pictures" / "000000.png")).shape)
    assert heights[0] == heights[1]


def test_a_plain_student_is_drawn_with_a_warning(
    draw: Callable[..., None],
    words: List[str],
    finished: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = torch.load(finished / "model_final.pth", weights_only=True)["model"]
    torch.save({"model": model}, tmp_path / "plain.pth")
    draw([*words, "--images", "1", "--weights", str(tmp_path / "plain.pth")])
    assert "untrained" in caplog.text
    assert (tmp_path / "pictures" / "000000.png").exists()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> List[str]:
    """Words for a run of a RetinaNet that mixes its levels to imitate a Faster R-CNN's regions."""
    folder = tmp_path_factory.mktemp("mixed")
    opts = write_teacher(folder, "faster_rcnn", MODEL__ROI_HEADS__NUM_CLASSES=SHAPES_CLASSES)
    cfg = run_config(folder, opts, ["SGFI"], DATASETS__TEST=("d2kd_shapes_val",))
    run(cfg)
    (folder / "config.yaml").write_text(cfg.dump())
    files = {"--config-file": folder / "config.yaml", "--weights": folder / "run/model_final.pth"}
    return [str(word) for pair in files.items() for word in pair]


def test_weights_of_levels_are_drawn_and_printed(
    draw: Callable[..., None],
    mixed: List[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "d2kd")
    draw([*mixed, "--output", str(tmp_path), "--images", "1", "--level-images", "3"])
    names = [x.name for x in sorted(tmp_path.iterdir())]
    assert names == ["000000.png", "level_weights.png"]
    assert cv2.imread(str(tmp_path / "level_weights.png")).shape[1] > 600
    lines = [x for x in caplog.text.splitlines() if x.startswith("p") and " / " in x]
    assert [x.split()[0] for x in lines] == ["p2"] * 4 + ["p3", "p4", "p5"]
    filled = [x.split()[-6:-1] for x in lines if not x.endswith(" 0")]
    assert filled and all(sum(map(float, x)) == pytest.approx(1, abs=0.03) for x in filled)
    assert lines[-1].split()[-6:] == ["-"] * 5 + ["0"]


def test_as_many_images_count_as_asked_for(
    draw: Callable[..., None],
    mixed: List[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "d2kd")
    words = [*mixed, "--output", str(tmp_path), "DISTILL.REGIONS.PER_IMAGE", "5"]
    regions = []
    for images, level_images in ((0, 1), (3, 2), (0, 100)):  # of 4
        caplog.clear()
        draw([*words, "--images", f"{images}", "--level-images", f"{level_images}"])
        rows = [x for x in caplog.text.splitlines() if x.startswith("p2 / 4")]
        regions.append(sum(int(x.split()[-1]) for x in rows))
    assert regions == [5, 10, 20]


def test_nothing_to_draw_is_refused(
    draw: Callable[..., None], words: List[str]
) -> None:  # MGD weighs no levels
    with pytest.raises(ValueError, match="--images 0: there is nothing to draw"):
        draw([*words, "--images", "0"])


def test_no_level_weights_without_images_for_them_or_without_such_a_head(
    draw: Callable[..., None], mixed: List[str], words: List[str], tmp_path: Path
) -> None:
    draw([*mixed, "--output", str(tmp_path / "a"), "--images", "1", "--level-images", "0"])
    draw([*words, "--images", "1"])  # MGD
    for folder in ("a", "pictures"):
        assert [x.name for x in (tmp_path / folder).iterdir()] == ["000000.png"]


def test_heads_of_another_run_are_refused(draw: Callable[..., None], words: List[str]) -> None:
    with pytest.raises(ValueError, match="other heads"):
        draw([*words, "DISTILL.HEADS", "['PKD']"])


def test_another_student_is_refused(draw: Callable[..., None], words: List[str]) -> None:
    with pytest.raises(ValueError, match="another student"):
        draw([*words, "MODEL.RETINANET.NUM_CONVS", "2"])


def test_a_run_without_teacher_has_no_picture(draw: Callable[..., None], words: List[str]) -> None:
    with pytest.raises(ValueError, match="no teacher to draw"):
        draw([*words, "DISTILL.ENABLED", "False"])


def test_help_teaches_an_example(
    draw: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        draw(["--help"])
    text = capsys.readouterr().out
    for word in (
        "--weights",
        "level_weights.png",
        "VIS_PERIOD",
        "configs/quickstart/mgd.yaml",
        "How to read",
    ):
        assert word in text, word


def test_a_detector_that_wants_proposals_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "detector.yaml"
    path.write_text(detector_config("faster_rcnn", MODEL__LOAD_PROPOSALS=True).dump())
    words = [str(tmp_path / "a.png"), "--detector", "given", str(path), "weights.pth"]
    with pytest.raises(ValueError, match="--detector given: MODEL.LOAD_PROPOSALS is True"):
        draw_detections.main(words)


def test_no_test_set_and_a_detector_that_is_not_known_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "detector.yaml"
    path.write_text(detector_config("retinanet").dump())
    words = [str(tmp_path / "a.png"), "--detector", "mine", str(path), "weights.pth"]
    with pytest.raises(ValueError, match="--detector mine: DATASETS.TEST is empty"):
        draw_detections.main(words)
    words += ["DATASETS.TEST", "('pets',)"]
    match = "--detector mine: MODEL.META_ARCHITECTURE is 'RetinNet'.*mean RetinaNet"
    with pytest.raises(ValueError, match=match):
        draw_detections.main([*words, "MODEL.META_ARCHITECTURE", "RetinNet"])


def test_objects_of_which_some_have_no_mask_are_drawn(tmp_path: Path, forget_sets: None) -> None:
    def some_masks(said: Any) -> None:
        for annotation in said["annotations"][::2]:
            x, y, width, height = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height]]

    write_set(tmp_path, "pets", some_masks)
    values = {"MODEL__RETINANET__NUM_CLASSES": len(NAMES), "MODEL__RETINANET__NORM": ""}
    write_teacher(tmp_path, "retinanet", **values)
    pets = {"NAME": "pets", "JSON": f"{tmp_path}/pets.json", "IMAGES": f"{tmp_path}/pets"}
    values.update(DATASETS__COCO_FORMAT=[pets], DATASETS__TEST=("pets",))
    (tmp_path / "pets.yaml").write_text(detector_config("retinanet", **values).dump())
    files = [str(tmp_path / x) for x in ("pets.yaml", "retinanet.pth")]
    draw_detections.main([str(tmp_path / "a.png"), "--detector", "pets", *files])
    assert cv2.imread(str(tmp_path / "a.png")).shape[1] == 2 * (draw_detections.WIDTH + 4)


def test_each_detector_names_its_own_classes(
    folder: Path,
    finished: Path,
    teacher: List[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forget_sets: None,
) -> None:
    # The first detector's test set is shown. The second has two other classes; the third, whose
    # config names no data set that is here, as many as the set; the fourth more.
    write_set(tmp_path, "pets")
    pets = {"JSON": str(tmp_path / "pets.json"), "IMAGES": str(tmp_path / "pets")}
    words, counts = [], {"pets": 2, "unnamed": SHAPES_CLASSES, "many": SHAPES_CLASSES + 1}
    for name, count in counts.items():
        values = {"MODEL__RETINANET__NUM_CLASSES": count, "MODEL__RETINANET__NORM": ""}
        write_teacher(tmp_path, "retinanet", **values)
        if name == "pets":
            values["DATASETS__COCO_FORMAT"] = [{"NAME": name, **pets}]
            values["DATASETS__TRAIN"] = (name,)
        cfg = detector_config("retinanet", **values)
        (tmp_path / f"{name}.yaml").write_text(cfg.dump())
        weights = (tmp_path / "retinanet.pth").rename(tmp_path / f"{name}.pth")
        words += ["--detector", name, str(tmp_path / f"{name}.yaml"), str(weights)]
    first = ["--detector", "shapes", str(finished / "config.yaml")]
    words = [*first, str(finished / "model_final.pth"), *words]
    drawn, names = draw_detections.Visualizer.draw_instance_predictions, []

    def draw(self: Any, instances: Any) -> Any:
        names.append(tuple(self.metadata.get("thing_classes", ())))
        return drawn(self, instances)

    monkeypatch.setattr(draw_detections.Visualizer, "draw_instance_predictions", draw)
    draw_detections.main([str(tmp_path / "a.png"), *words, "--rows", "1", "--threshold", "0.0"])
    assert names == [tuple(CLASSES), NAMES, tuple(CLASSES), ()]
    assert (tmp_path / "a.png").stat().st_size > 1000
