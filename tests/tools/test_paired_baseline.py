"""A gain is told with its interval, and that there is none is told plainly."""

import csv
import io
import json
import math
import os
import subprocess
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import pycocotools.mask
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2.data import Metadata

from d2kd import load_config
from d2kd.cli.steps import METRICS
from d2kd.report.outside import verdict
from tests.helpers.forks import run_python
from tests.helpers.runs import run_config
from tests.helpers.toys import ROOT, stock_backbone, write_teacher


@pytest.fixture
def paired(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("paired_baseline")


@pytest.fixture
def ap(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("paired_ap")


def truth(num_images: int) -> COCO:
    """Images with one to three boxes of two classes."""
    random, coco = np.random.default_rng(0), COCO()
    annotations: List[Dict[str, Any]] = []
    for image in range(num_images):
        for _ in range(random.integers(1, 4)):
            x, y, w, h = (float(v) for v in random.integers(10, 60, size=4))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(random.integers(1, 3)),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    coco.dataset = {
        "images": [{"id": i, "width": 128, "height": 128} for i in range(num_images)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    coco.createIndex()
    return coco


def detections(coco: COCO, noise: float, seed: int = 1) -> List[Dict[str, Any]]:
    """The ground truth, each side moved by so many pixels, and as many false ones."""
    random, found = np.random.default_rng(seed), []
    for x in coco.dataset["annotations"]:
        bbox = [float(v + noise * random.standard_normal()) for v in x["bbox"]]
        score = float(random.random())
        found.append(
            {**{k: x[k] for k in ("image_id", "category_id")}, "bbox": bbox, "score": score}
        )
        wrong = [5.0, 5.0, 8.0, 8.0]
        found.append({**found[-1], "bbox": wrong, "score": float(random.random())})
    return found


def of_pycocotools(coco: COCO, found: List[Dict[str, Any]], images: List[int]) -> float:
    evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
    evaluation.params.imgIds = images
    with redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats[0]


@pytest.mark.parametrize("images", [list(range(12)), [0, 3, 7]])
def test_ap_of_some_images_is_that_of_pycocotools(ap: ModuleType, images: List[int]) -> None:
    coco = truth(12)
    found = detections(coco, noise=4.0)
    expected = of_pycocotools(coco, found, images)
    assert ap.ImageAP(coco, found)(images) == pytest.approx(expected) and 5 < expected < 95


def test_crowds_and_equal_scores_are_taken_as_pycocotools_takes_them(ap: ModuleType) -> None:
    # A crowd is no object, and a detection on one neither right nor wrong.
    coco = truth(12)
    for x in coco.dataset["annotations"][::3]:
        x["iscrowd"] = 1
    coco.createIndex()
    found = detections(coco, noise=2.0)
    for x in found:
        x["score"] = round(x["score"], 1)
    images = list(range(12))
    assert ap.ImageAP(coco, found)(images) == pytest.approx(of_pycocotools(coco, found, images))


def test_class_without_an_object_in_these_images_does_not_count(ap: ModuleType) -> None:
    coco = truth(12)
    found = detections(coco, noise=4.0)
    measure = ap.ImageAP(coco, found)
    assert any(len({x["category_id"] for x in coco.imgToAnns[i]}) == 1 for i in range(12))
    for i in range(12):
        assert measure([i]) == pytest.approx(of_pycocotools(coco, found, [i]))


def test_image_that_is_drawn_twice_counts_twice(ap: ModuleType) -> None:
    coco = truth(4)
    measure = ap.ImageAP(coco, detections(coco, noise=4.0))
    assert measure([0, 1, 2, 3] * 2) == pytest.approx(measure([0, 1, 2, 3]), abs=3.0)
    assert measure([0, 0, 0, 1]) != measure([0, 1])


def drawn(coco: COCO, found: List[Dict[str, Any]], images: List[int]) -> float:
    """The obvious way: a data set in which each drawn image is one of its own."""
    copy, copied = COCO(), []
    parts = {"images": [], "annotations": [], "categories": coco.dataset["categories"]}
    for new, old in enumerate(images):
        parts["images"].append({"id": new, "width": 128, "height": 128})
        for x in coco.dataset["annotations"]:
            if x["image_id"] == old:
                ids = {"id": len(parts["annotations"]) + 1, "image_id": new}
                parts["annotations"].append({**x, **ids})
        copied += [{**x, "image_id": new} for x in found if x["image_id"] == old]
    copy.dataset = parts
    copy.createIndex()
    return of_pycocotools(copy, copied, list(range(len(images))))


def test_error_is_that_of_data_sets_with_the_drawn_images(ap: ModuleType) -> None:
    coco = truth(8)
    bad, good = (detections(coco, noise, seed) for noise, seed in ((6.0, 1), (3.0, 2)))
    samples = [ap.ImageAP(coco, x).samples(6) for x in (bad, good)]
    random, gains = np.random.default_rng(0), []
    for _ in range(6):
        images = list(random.integers(8, size=8))
        assert len(set(images)) < 8
        gains.append(drawn(coco, good, images) - drawn(coco, bad, images))
    found = ap.image_error(samples[:1], samples[1:])
    assert found == pytest.approx(np.std(gains, ddof=1)) and found > 0


@pytest.mark.parametrize("gains", [[1.0], [1.0, 2.0]])
def test_gain_is_drawn_with_its_interval_where_it_has_one(
    gains: List[float], paired: ModuleType, tmp_path: Path
) -> None:
    values = {k: 1.0 for k in METRICS}
    path = tmp_path / "gain.png"
    paired.draw({arm: {1: values} for arm in paired.ARMS}, paired.decide(gains, 0.1), str(path))
    assert path.stat().st_size > 1000


def test_metrics_are_those_of_boxes_and_the_ap_of_masks_where_there_are_some(
    tool: Callable,
) -> None:
    lines = [f"copypaste: {x}" for x in ("Task: bbox", "AP,AP50,APs,APm,APl", "1,2,3,4,5")]
    masks = [f"copypaste: {x}" for x in ("Task: segm", "AP,AP50,APs,APm,APl", "6,7,8,9,9")]
    evaluation = tool("quickstart").evaluation
    assert list(evaluation(lines).values()) == [1, 2, 3, 4, 5]
    for given in (lines + masks, masks + lines):
        assert list(evaluation(given).values()) == [1, 2, 3, 4, 5, 6]
    blind = [x.replace("6,7,8,9,9", "nan,nan,nan,nan,nan") for x in masks]
    assert evaluation(lines + blind)["mask AP"] == 0.0


def test_what_pascal_voc_does_not_measure_is_not_a_number(tool: Callable) -> None:
    lines = ["copypaste: Task: bbox", "copypaste: AP,AP50,AP75", "copypaste: 1,2,3"]
    found = tool("quickstart").evaluation(lines)
    assert [str(x) for x in found.values()] == ["1.0", "2.0", "nan", "nan", "nan"]


def test_size_without_objects_has_a_dash(paired: ModuleType) -> None:
    runs = {"AP": 30.0, "AP50": 50.0, "APs": 20.0, "APm": 40.0, "APl": math.nan}
    results = {arm: {1: runs} for arm in paired.ARMS}
    report = paired.make_report(results, paired.decide([0.0], 0.1), 10)
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in report.splitlines()[2:5]]
    assert [row[1] for row in rows] == ["30.0", "30.0", "+0.0"]
    assert [row[-1] for row in rows] == ["-"] * 3


@pytest.mark.parametrize(
    "box, mask, warns", [(1.0, -0.5, True), (1.0, 0.5, False), (-1.0, -0.5, False)]
)
def test_masks_that_are_lost_are_told(
    box: float, mask: float, warns: bool, paired: ModuleType
) -> None:
    metrics = [*METRICS, paired.MASK_AP]
    alone = dict.fromkeys(metrics, 30.0)
    distilled = {**dict.fromkeys(metrics, 30.0 + box), paired.MASK_AP: 30.0 + mask}
    results = {"alone": {1: alone}, "distilled": {1: distilled}}
    verdicts = [paired.decide([x], 0.1) for x in (box, mask)]
    report = paired.make_report(results, verdicts[0], 10, verdicts[1])
    assert "mask AP" in report and f"Masks: {verdicts[1]}" in report
    assert ("masks lose" in report) == warns
    del distilled[paired.MASK_AP]
    assert not paired.have_masks(results)
    assert "mask" not in paired.make_report(results, verdicts[0], 10).lower()


def test_masks_are_measured_as_pycocotools_measures_them(ap: ModuleType) -> None:
    coco, found = truth(4), detections(truth(4), noise=4.0)
    for x in (*coco.dataset["annotations"], *found):
        x0, y0, w, h = x["bbox"]  # the left upper half of the box
        x["segmentation"] = [[x0, y0, x0 + w, y0, x0, y0 + h]]
    coco.createIndex()
    for x in found:  # as Detectron2 writes them
        rle = pycocotools.mask.frPyObjects(x["segmentation"], 128, 128)
        x["segmentation"] = pycocotools.mask.merge(rle)
    boxes, masks = (ap.ImageAP(coco, found, task)(range(4)) for task in ("bbox", "segm"))
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(found), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert masks == pytest.approx(100 * evaluation.stats[0]) and masks != boxes


def test_run_without_a_test_set_is_refused_before_it_is_trained(
    paired: ModuleType, tmp_path: Path
) -> None:
    cfg = run_config(tmp_path, write_teacher(tmp_path, "retinanet"))
    (tmp_path / "run.yaml").write_text(cfg.dump())
    with pytest.raises(ValueError, match="an interval needs a test set"):
        paired.main(["--config-file", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("kind", ["lvis", None])
def test_set_that_is_not_evaluated_as_coco_is_refused_before_it_is_trained(
    kind: Optional[str], paired: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of LVIS the AP is another one, and its evaluator leaves other files."""
    said = {"evaluator_type": kind} if kind else {}
    odd = Metadata(name="odd", json_file="odd.json", **said)
    monkeypatch.setattr(paired, "MetadataCatalog", {"odd": odd})
    monkeypatch.setattr(paired, "register_datasets", lambda *_, **__: None)
    cfg = load_config(os.path.join(ROOT, "configs", "quickstart", "pkd.yaml"))
    cfg.DATASETS.TEST = ("odd",)
    with pytest.raises(ValueError, match="needs a test set in COCO's format"):
        paired.truth_of(cfg)


@pytest.mark.parametrize(
    "opts, told",
    [
        (["DISTILL.ENABLED", "False"], "nothing to compare it with"),
        (["DISTILL.TEACHER.WEIGHTS", "gone.pth"], "DISTILL.TEACHER.WEIGHTS: .*'gone.pth'"),
        (["DATASETS.TRAIN", "('gone',)"], "DATASETS.TRAIN: .*gone"),
    ],
)
def test_what_would_stop_the_second_arm_stops_the_first(
    opts: List[str],
    told: str,
    paired: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paired.Steps, "run", lambda *_, **__: pytest.fail("it began to train"))
    cfg = run_config(tmp_path, write_teacher(tmp_path, "retinanet"))
    cfg.DATASETS.TEST = ("d2kd_shapes_val",)
    (tmp_path / "run.yaml").write_text(cfg.dump())
    with pytest.raises((ValueError, OSError), match=told):
        paired.main(["--config-file", str(tmp_path / "run.yaml"), *opts])


def test_comparison_that_is_interrupted_at_its_end_is_none_for_a_report(
    paired: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    cfg = run_config(tmp_path, write_teacher(tmp_path, "retinanet"))
    cfg.DATASETS.TEST = ("d2kd_shapes_val",)
    (tmp_path / "run.yaml").write_text(cfg.dump())
    os.mkdir(cfg.OUTPUT_DIR + "_paired")
    monkeypatch.setattr(paired.Steps, "run", lambda *_, **__: dict.fromkeys(METRICS, 30.0))
    monkeypatch.setattr(paired, "stop_on_sigterm", lambda: None)
    decided = paired.decide([0.0, 0.1], 0.1, 0.5)
    monkeypatch.setattr(paired, "verdict_of", lambda *_: decided)
    monkeypatch.setattr(paired, "draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        paired.main(["--config-file", str(tmp_path / "run.yaml"), "--seeds", "1", "2"])
    assert isinstance(verdict(cfg.OUTPUT_DIR), str), "nobody asked"


def test_detector_that_finds_nothing_has_0_on_any_images(ap: ModuleType) -> None:
    assert ap.ImageAP(truth(4), [])([0, 2]) == 0.0


def test_equal_detectors_have_no_error_and_unlike_ones_have(ap: ModuleType) -> None:
    coco = truth(30)
    good, bad = (ap.ImageAP(coco, detections(coco, x)).samples(50) for x in (1.0, 8.0))
    assert ap.image_error([bad], [bad]) == 0.0
    assert ap.image_error([bad, bad], [good, good]) > 0.0


def leave_runs(
    paired: ModuleType, ap: ModuleType, coco: COCO, folder: Path, seeds: List[int]
) -> Dict[str, Dict[int, Dict[str, float]]]:
    """
    What finished runs of both arms leave: alone the boxes are off and the masks right, distilled
    the boxes are right and the masks those of nothing.

    Returns:
        AP of boxes and of masks of each arm and seed
    """
    for x in coco.dataset["annotations"]:
        x0, y0, w, h = x["bbox"]
        x["segmentation"] = [[x0, y0, x0 + w, y0, x0 + w, y0 + h, x0, y0 + h]]
    coco.createIndex()
    nothing = pycocotools.mask.encode(np.zeros((128, 128), dtype=np.uint8, order="F"))
    results: Dict[str, Dict[int, Dict[str, float]]] = {arm: {} for arm in paired.ARMS}
    for arm in paired.ARMS:
        for seed in seeds:
            found = detections(coco, noise=4.0 if arm == "alone" else 0.0, seed=seed)[::2]
            for x, truth_of_it in zip(found, coco.dataset["annotations"]):
                rle = coco.annToRLE(truth_of_it) if arm == "alone" else nothing
                x["segmentation"] = {**rle, "counts": rle["counts"].decode()}
            inference = folder / f"{arm}_seed_{seed}" / "inference"
            inference.mkdir(parents=True)
            (inference / "coco_instances_results.json").write_text(json.dumps(found))
            boxes, masks = (ap.ImageAP(coco, found, x)(range(12)) for x in ("bbox", "segm"))
            results[arm][seed] = {"AP": boxes, paired.MASK_AP: masks}
    return results


def test_verdict_is_on_what_the_teacher_adds_by_the_users_threshold_of_boxes_and_of_masks(
    paired: ModuleType, ap: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("VERSION: 2\n")
    words = ["--config-file", str(tmp_path / "run.yaml"), "--output", str(tmp_path)]
    words += ["--seeds", "1", "2", "3", "--samples", "20"]
    coco = truth(12)
    results = leave_runs(paired, ap, coco, tmp_path, [1, 2, 3])
    args = paired.parse_args(words)
    boxes, masks = (paired.verdict_of(args, coco, results, x) for x in ("bbox", "segm"))
    # Exact boxes have 100 AP, and masks of nothing 0.
    alone = [results["alone"][seed] for seed in (1, 2, 3)]
    assert boxes.gain == pytest.approx(100 - np.mean([x["AP"] for x in alone])) and boxes.gain > 20
    assert masks.gain == pytest.approx(0 - np.mean([x[paired.MASK_AP] for x in alone]))
    assert (boxes.decision, masks.decision) == ("GAIN", "NO GAIN") and masks.gain < -90
    args = paired.parse_args([*words, "--threshold", "99"])
    assert paired.verdict_of(args, coco, results).decision == "NO GAIN"


def test_report_has_the_mean_of_the_seeds_and_what_each_of_them_gains(paired: ModuleType) -> None:
    # 20 and 30 alone are 25 on average, 23 and 31 distilled 27.
    results = {
        arm: {seed: dict.fromkeys(METRICS, ap) for seed, ap in enumerate(aps, start=1)}
        for arm, aps in (("alone", (20.0, 30.0)), ("distilled", (23.0, 31.0)))
    }
    report = paired.make_report(results, paired.decide([3.0, 1.0], 0.1), 10)
    rows = [[x.strip() for x in line.split("|")[1:3]] for line in report.splitlines()[2:5]]
    assert rows == [["alone", "25.0"], ["distilled", "27.0"], ["gain", "+2.0"]]
    assert "mean of 2 seeds:\n  seed 1: 20.0 alone, 23.0 distilled, +3.0\n" in report
    assert "  seed 2: 30.0 alone, 31.0 distilled, +1.0\n" in report


class Process:
    """In the place of subprocess.Popen, without importing everything anew; see forks.python."""

    def __init__(self, words: List[str], **_: Any):
        done = run_python(words)
        self.returncode, self.stdout = done.returncode, io.StringIO(done.stdout)

    def wait(self) -> int:
        return self.returncode


@pytest.mark.process
def test_two_runs_give_table_csv_and_picture(
    paired: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess, "Popen", Process)
    stock = stock_backbone("retinanet")
    teacher = write_teacher(tmp_path, "retinanet", **stock)
    cfg = run_config(tmp_path, teacher, ["PKD"], SOLVER__MAX_ITER=2, **stock)
    cfg.DATASETS.TEST = ("d2kd_shapes_val", "d2kd_shapes_train")  # the first one counts
    (tmp_path / "run.yaml").write_text(cfg.dump())
    words = ["--config-file", str(tmp_path / "run.yaml"), "--samples", "3", "--seeds", "5"]
    paired.main([*words, "SOLVER.BASE_LR", "0.001"])
    folder = Path(cfg.OUTPUT_DIR + "_paired")
    with open(folder / "results.csv") as file:
        rows = list(csv.reader(file))
    assert [x[:2] for x in rows] == [["arm", "seed"], ["alone", "5"], ["distilled", "5"]]
    assert "seed 5:" in (folder / "table.md").read_text()
    assert (folder / "gain.png").stat().st_size > 1000
    config = (folder / "alone_seed_5" / "config.yaml").read_text()
    assert "ENABLED: false" in config and "SEED: 5" in config and "BASE_LR: 0.001" in config
    assert "d2kd_shapes_train" not in config.split("TEST:")[1].split("TRAIN:")[0]
    assert "INCONCLUSIVE: +0.0 AP of one seed" in capsys.readouterr().out
    assert "The student's own losses at the end: " in (folder / "table.md").read_text()
    # Another evaluation in the folder of a run leaves its own detections there.
    found = [{**x, "score": 1.0} for x in paired.truth_of(cfg).dataset["annotations"]]
    inference = folder / "distilled_seed_5" / "inference"
    (inference / "coco_instances_results.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="has 100.00 AP and the run had 0.00: it was evaluated"):
        paired.main([*words, "SOLVER.BASE_LR", "0.001"])


@pytest.mark.parametrize(
    "words",
    [["--seeds", "1", "1"], ["--seeds", "-1"], ["--samples", "1"], ["--threshold", "-1"]],
)
def test_senseless_arguments_are_refused(paired: ModuleType, words: List[str]) -> None:
    with pytest.raises(SystemExit):
        paired.parse_args(["--config-file", "x.yaml", "--output", "x", *words])
