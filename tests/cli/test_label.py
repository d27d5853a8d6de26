"""`d2kd label`: the shipped teacher labels a few images of the built-in shapes."""

import json
import shutil
from collections import defaultdict
from hashlib import sha256
from pathlib import Path
from typing import Any, Dict, List, Tuple

import cv2
import numpy as np
import pytest
import yaml
from pycocotools.coco import COCO

from detectron2.data import DatasetCatalog, MetadataCatalog

import d2kd_cli
from d2kd import load_config
from d2kd.cli import label
from d2kd.config import merge_mapping
from d2kd.data import make_shapes, register_datasets
from d2kd.data.outlines import CLASSES
from d2kd.labelling import match
from tests.helpers.runs import SHAPES_CLASSES
from tests.helpers.toys import ROOT, write_teacher

TEACHER = f"{ROOT}/configs/quickstart/teacher.pth"
IMAGES = 12
# The JSON, the words of the command
Run = Tuple[Dict[str, Any], List[str]]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    # It would keep d2kd's log from caplog, in the tests of other files too.
    monkeypatch.setattr(label, "setup_logger", lambda **_: None)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> List[str]:
    """Overrides for few shapes; the training ones, and a black image, are in ROOT/unlabelled."""
    root = tmp_path_factory.mktemp("label")
    words = ["DATASETS.SHAPES.ROOT", str(root)]
    words += ["DATASETS.SHAPES.NUM_TRAIN", str(IMAGES), "DATASETS.SHAPES.NUM_VAL", "30"]
    drawn = make_shapes(load_config("quickstart/teacher.yaml", words), "train")
    shutil.copytree(f"{drawn}/images", root / "unlabelled")
    shutil.copy(f"{drawn}/annotations.json", root / "truth.json")
    cv2.imwrite(str(root / "unlabelled" / "black.png"), np.zeros((80, 100, 3), dtype=np.uint8))
    return words


def words_of(shapes: List[str], output: str, *more: str) -> List[str]:
    config = () if "--config-file" in more else ("--config-file", "quickstart/teacher.yaml")
    weights = () if "--teacher" in more else ("MODEL.WEIGHTS", TEACHER)
    folder = f"{shapes[1]}/unlabelled"
    return [*config, "--images", folder, "--output", output, *more, *weights, *shapes]


@pytest.fixture(scope="module")
def done(shapes: List[str]) -> Path:
    """Folder of a run with --worst."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(label, "setup_logger", lambda **_: None)
        label.main(words_of(shapes, f"{shapes[1]}/out/labels.json", "--worst", "3"))
    return Path(shapes[1], "out")


@pytest.fixture
def written(done: Path) -> Dict[str, Any]:
    return json.loads((done / "labels.json").read_text())


def test_labels_are_in_cocos_format_inside_their_images_and_above_their_thresholds(
    written: Dict[str, Any],
) -> None:
    assert [x["name"] for x in written["categories"]] == list(CLASSES)
    sizes = {x["id"]: (x["width"], x["height"]) for x in written["images"]}
    names = {x["id"]: x["name"] for x in written["categories"]}
    labels = written["annotations"]
    assert [x["id"] for x in labels] == list(range(1, len(labels) + 1)) and len(labels) > IMAGES
    for x in labels:
        assert x["iscrowd"] == 0 and x["area"] == pytest.approx(
            x["bbox"][2] * x["bbox"][3], abs=1e-2
        )
        assert x["score"] >= written["info"]["classes"][names[x["category_id"]]]["threshold"]
        for place, extent, size in zip(x["bbox"][:2], x["bbox"][2:], sizes[x["image_id"]]):
            assert 0 <= place and 0 < extent and place + extent <= size + 1e-6


def test_labels_say_where_they_come_from(written: Dict[str, Any]) -> None:
    info = written["info"]
    assert "Pseudo-labels" in info["description"] and info["labelled_set"] == "d2kd_shapes_val"
    weights = sha256(Path(TEACHER).read_bytes()).hexdigest()
    assert info["teacher"]["weights_sha256"] == weights and "RESNETS" in info["teacher"]["config"]
    assert info["wanted_precision"] == 0.9 and list(info["classes"]) == list(CLASSES)
    passed = [x for x in info["classes"].values() if x["threshold"] is not None]
    assert passed and all(x["precision"] >= 0.9 and 0 < x["recall"] <= 1 for x in passed)


def test_labels_are_the_objects(written: Dict[str, Any], shapes: List[str]) -> None:
    truth = COCO(f"{shapes[1]}/truth.json")
    names = {x["id"]: x["file_name"] for x in written["images"]}
    ids = {x["file_name"]: x["id"] for x in truth.dataset["images"]}
    labels = [{**x, "image_id": ids[names[x["image_id"]]]} for x in written["annotations"]]
    hits = np.concatenate([x.hits for x in match(truth, labels).values()])
    assert hits.mean() > 0.8


def test_an_image_without_a_label_is_left_out(written: Dict[str, Any]) -> None:
    files = [x["file_name"] for x in written["images"]]
    assert "black.png" not in files and len(files) > IMAGES / 2
    assert {x["id"] for x in written["images"]} == {x["image_id"] for x in written["annotations"]}


def test_worst_images_are_listed_and_drawn(done: Path) -> None:
    listed = json.loads((done / "labels_worst.json").read_text())
    counts = [len(x["misses"]) + len(x["false_alarms"]) for x in listed]
    assert 0 < len(counts) <= 3 and min(counts) > 0 and counts == sorted(counts, reverse=True)
    assert all(Path(x["file_name"]).is_file() for x in listed)
    assert cv2.imread(str(done / "labels_worst.png")).shape[1] > 320 * len(counts)


def test_printed_yaml_trains_on_the_labels(
    shapes: List[str],
    written: Dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    forget_sets: Any,
) -> None:
    """And images without labels are kept where that is asked for, with the ids of --json."""
    images = [{**x, "id": x["id"] + 40} for x in written["images"][:3]]
    images.append({"id": 7, "file_name": "black.png", "width": 100, "height": 80})
    (tmp_path / "list.json").write_text(json.dumps({"images": images}))
    output = str(tmp_path / "some.json")
    caplog.set_level("INFO", "d2kd")
    more = ["--keep-empty", "--json", str(tmp_path / "list.json")]
    label.main(words_of(shapes, output, *more))
    content = json.loads(Path(output).read_text())
    assert {x["id"] for x in content["images"]} == {x["id"] for x in images}
    same = {x["id"] - 40 for x in images}
    expected = [x["bbox"] for x in written["annotations"] if x["image_id"] in same]
    assert [x["bbox"] for x in content["annotations"]] == expected

    told = caplog.records[-1].getMessage()
    cfg = load_config("quickstart/teacher.yaml", shapes)
    merge_mapping(cfg, yaml.safe_load(told.partition("\n")[2]), "the log")
    assert list(cfg.DATASETS.TRAIN) == ["d2kd_shapes_train", "pseudo_some"]
    register_datasets(cfg)
    records = DatasetCatalog.get("pseudo_some")
    assert MetadataCatalog.get("pseudo_some").thing_classes == list(CLASSES)
    loaded = defaultdict(list)
    for record in records:
        assert Path(record["file_name"]).is_file()
        loaded[record["image_id"]] = [x["bbox"] for x in record["annotations"]]
    assert len(loaded[7]) == 0 and sum(map(len, loaded.values())) == len(expected)


def test_a_teachers_classes_are_matched_by_name(
    shapes: List[str], written: Dict[str, Any], tmp_path: Path
) -> None:
    output = str(tmp_path / "labels.json")
    names = ["a", "ring", "b", "c", "d", "e"]  # its own for disc, ring, triangle, ...
    more = ["--teacher", "--config-file", "quickstart/cwd.yaml"]
    opts = ["DISTILL.TEACHER.CLASSES", str(names), "DISTILL.TEACHER.ALIASES", "[['star', 'd']]"]
    label.main([*words_of(shapes, output, *more), *opts])
    ids = {x["name"]: x["id"] for x in written["categories"]}
    both = (ids["ring"], ids["star"])
    # Ids of annotations count on; images are the same.
    ours, theirs = (
        [(x["image_id"], x["category_id"], x["bbox"]) for x in content["annotations"]]
        for content in (json.loads(Path(output).read_text()), written)
    )
    assert ours == [x for x in theirs if x[1] in both] and len({x[1] for x in ours}) == 2


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
def test_a_teacher_that_reaches_the_precision_nowhere_is_refused(
    detector: str, shapes: List[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    classes = {f"MODEL__{x}__NUM_CLASSES": SHAPES_CLASSES for x in ("RETINANET", "ROI_HEADS")}
    toy = write_teacher(tmp_path, detector, **classes)
    more = ["--teacher", "--config-file", "quickstart/cwd.yaml"]
    opts = ["DATASETS.SHAPES.NUM_VAL", "2", "DISTILL.TEACHER.CLASSES", str(list(CLASSES))]
    opts += ["INPUT.MIN_SIZE_TEST", "160"]  # else p7 is a single cell, too little for GroupNorm
    output = tmp_path / "labels.json"
    assert d2kd_cli.main(["label", *words_of(shapes, str(output), *more), *toy, *opts]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "d2kd label: error: --precision 0.9: no class reaches it on d2kd_shapes_val" in told
    assert all(f"{name} " in told for name in CLASSES) and not output.exists()


# More words, and what the line says
MISTAKES = {
    "no image": (["--images", "."], "--images: there is no image in '.'"),
    "output exists": (["--output", "there.json"], "--output: 'there.json' exists"),
    "precision": (["--precision", "90"], "--precision must be above 0 and at most 1, got 90.0"),
    "no weights": (["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
    "weights of another detector": (["--teacher"], "MODEL.WEIGHTS has no effect with --teacher"),
    "no labelled set": (["DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
    "other classes": (
        ["MODEL.RETINANET.NUM_CLASSES", "3"],
        "MODEL.RETINANET.NUM_CLASSES is 3, but data set d2kd_shapes_val has 6 classes",
    ),
}


@pytest.mark.parametrize("more, told", MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_one_line_and_nothing_is_written(
    more: List[str],
    told: str,
    shapes: List[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.json").write_text("mine")
    words = [*words_of(shapes, "new.json"), *more]
    assert d2kd_cli.main(["label", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"d2kd label: error: {told}")
    assert [x.name for x in Path().iterdir()] == ["there.json"]
    assert Path("there.json").read_text() == "mine"


@pytest.mark.parametrize("kind", ["json", "png"])
def test_list_of_an_earlier_worst_is_not_written_over(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(f"new_worst.{kind}").touch()
    words = ["--config-file", "mine.yaml", "--images", ".", "--output", "new.json"]
    label.check_args(label.parse_args(words))
    with pytest.raises(FileExistsError, match=f"--output: 'new_worst.{kind}' exists"):
        label.check_args(label.parse_args([*words, "--worst", "3"]))


@pytest.mark.parametrize("learnt", ["train", "val"])
def test_labelled_set_that_was_learnt_from_is_told(
    learnt: str,
    shapes: List[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Reached(Exception):
        pass

    def detect(*_: Any) -> None:
        raise Reached

    monkeypatch.setattr(label.labelling, "detect", detect)
    sets = ["DATASETS.TRAIN", f"('d2kd_shapes_{learnt}',)"]
    with pytest.raises(Reached):
        label.main([*words_of(shapes, str(tmp_path / "new.json")), *sets])
    told = "d2kd_shapes_val is also in DATASETS.TRAIN: on images that a detector has learnt"
    assert (told in caplog.text) == (learnt == "val")
