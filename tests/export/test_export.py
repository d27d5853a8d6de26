"""What is handed over is the student, and needs no d2kd."""

import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
import torch
import torchvision
import yaml

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from d2kd.config import leaves
from d2kd.export import __main__ as command
from d2kd.export import export_student, graph, verify, why_no_yaml
from d2kd.export.__main__ import main
from d2kd.export.graph import _count_alike, export_graph
from d2kd.export.student import find_weights
from d2kd.modeling.deform_conv2d import as_traced, deform_conv2d
from tests.helpers.forks import run_python
from tests.helpers.runs import run, run_config
from tests.helpers.toys import detector_config, stock_backbone, write_teacher
from tests.helpers.view_toys import needs_fcos


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Tuple[CfgNode, str]:
    """A distillation run of four iterations, and its checkpoint from the middle."""
    folder = tmp_path_factory.mktemp("run")
    teacher = write_teacher(folder, "retinanet")
    cfg = run_config(folder, teacher, ["PKD"], **stock_backbone("retinanet"))
    run(cfg)
    return cfg, os.path.join(cfg.OUTPUT_DIR, "model_0000001.pth")


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Any]:
    """Writes a detector with random weights: its config and the path of its checkpoint."""

    def save(name: str, **overrides: Any) -> Tuple[CfgNode, str]:
        cfg = detector_config(name, **overrides)
        torch.manual_seed(0)
        path = tmp_path / "weights.pth"
        torch.save({"model": build_model(cfg).state_dict()}, path)
        return cfg, str(path)

    yield save


@pytest.fixture
def cheap_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has imported d2kd, and is good enough to tell what else is wrong."""
    monkeypatch.setattr(subprocess, "run", run_python)


def test_mid_run_checkpoint_is_exported(finished: Tuple[CfgNode, str], tmp_path: Path) -> None:
    cfg, weights = finished
    export_student(cfg, weights, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["student.pth", "student.yaml"]
    exported = torch.load(tmp_path / "student.pth", weights_only=True)
    trained = torch.load(weights, weights_only=True)["model"]
    assert list(exported) == ["model"] and all(
        torch.equal(exported["model"][k], v) for k, v in trained.items()
    )


def test_yaml_has_stock_keys_alone_and_the_student_s_values(
    finished: Tuple[CfgNode, str], tmp_path: Path
) -> None:
    export_student(*finished, str(tmp_path))
    written = yaml.safe_load((tmp_path / "student.yaml").read_text())
    assert set(dict(leaves(written))) <= set(dict(leaves(get_cfg())))
    stock = get_cfg()
    stock.merge_from_file(str(tmp_path / "student.yaml"))
    assert stock.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert stock.MODEL.FPN == finished[0].MODEL.FPN
    assert "SOLVER" not in written and "DISTILL" not in written


@pytest.mark.process
def test_every_difference_from_the_student_is_told_by_its_key(
    saved: Any, tmp_path: Path, cheap_process: None
) -> None:
    cfg, weights = saved("retinanet", MODEL__RETINANET__NORM="", **stock_backbone("retinanet"))
    folder = tmp_path / "exported"
    export_student(cfg, weights, str(folder))
    state = torch.load(folder / "student.pth", weights_only=True)
    state["model"]["extra.weight"] = state["model"].pop("head.bbox_pred.bias")
    bias = state["model"]["head.cls_score.bias"]
    bias[0] = torch.nextafter(bias[0], torch.tensor(9.0))  # the smallest change there is
    torch.save(state, folder / "student.pth")
    config = yaml.safe_load((folder / "student.yaml").read_text())
    config.setdefault("INPUT", {})["FORMAT"] = "RGB"
    config["MODEL"]["RETINANET"]["SCORE_THRESH_TEST"] = 0.99
    (folder / "student.yaml").write_text(yaml.safe_dump(config))
    report = verify(cfg, weights, str(folder))
    assert not report["verified"]
    changed = {"INPUT.FORMAT", "MODEL.RETINANET.SCORE_THRESH_TEST"}
    assert set(report["different_config"]) == changed
    assert report["missing_keys"] == ["head.bbox_pred.bias"], report
    assert report["unexpected_keys"] == ["extra.weight"], report
    assert "head.cls_score.bias" in report["different_weights"], report


@pytest.mark.process
def test_yaml_of_other_weights_is_told_though_they_are_equal(
    saved: Any, tmp_path: Path, cheap_process: None
) -> None:
    cfg, weights = saved("retinanet", MODEL__RETINANET__NORM="", **stock_backbone("retinanet"))
    folder = tmp_path / "exported"
    export_student(cfg, weights, str(folder))
    config = yaml.safe_load((folder / "student.yaml").read_text())
    config["MODEL"]["WEIGHTS"] = "../weights.pth"
    (folder / "student.yaml").write_text(yaml.safe_dump(config))
    report = verify(cfg, weights, str(folder))
    assert report["different_config"] == ["MODEL.WEIGHTS"] and not report["different_weights"]


@pytest.mark.process
def test_yaml_of_another_detector_is_told_with_what_the_process_said(
    saved: Any, tmp_path: Path, cheap_process: None
) -> None:
    cfg, weights = saved("faster_rcnn")  # the YAML is replaced
    folder = tmp_path / "exported"
    export_student(cfg, weights, str(folder))
    (folder / "student.yaml").write_text("MODEL: {META_ARCHITECTURE: Nothing}\nVERSION: 2\n")
    report = verify(cfg, weights, str(folder))
    assert not report["verified"] and "Nothing" in report["error"]


@pytest.mark.process
def test_command_exports_and_verifies_the_last_checkpoint_without_the_teacher(
    finished: Tuple[CfgNode, str], tmp_path: Path
) -> None:
    cfg = finished[0].clone()
    cfg.DISTILL.TEACHER.CONFIG_FILE = "gone.yaml"
    path = tmp_path / "run.yaml"
    path.write_text(cfg.dump())
    words = ["--config-file", str(path), "--output", str(tmp_path / "out")]
    assert main([*words, "--formats", "torchscript", "MODEL.DEVICE", "cpu"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verified"] and report["detections"] > 0, report
    assert report["weights"] == find_weights(cfg)
    assert report["weights"].endswith("model_final.pth")
    assert report["torchscript"].get("verified"), report


@pytest.mark.parametrize(
    "name", ["faster_rcnn", "cascade_rcnn", pytest.param("fcos", marks=needs_fcos)]
)
def test_torchscript_detects_what_the_student_does(name: str, saved: Any, tmp_path: Path) -> None:
    cfg, weights = saved(name, MODEL__FCOS__NORM="")
    found = export_graph(cfg, weights, "torchscript", str(tmp_path))
    assert found.get("verified"), found
    assert os.path.isfile(found["file"]) and found["detections"] > 0
    # The order that docs/export.md tells
    boxes, classes, scores, size = torch.jit.load(found["file"])(torch.zeros(3, 64, 96))
    assert boxes.shape == (len(scores), 4) and scores.dtype == torch.float32
    assert classes.shape == scores.shape and classes.dtype == torch.int64
    assert size.tolist() == [64, 96]


def test_torchscript_of_reppoints_is_proved_to_the_bit_where_the_student_convolves_otherwise(
    saved: Any, tmp_path: Path
) -> None:
    # On a CPU its points are read by a faster function than the graph's, which rounds otherwise.
    cfg, weights = saved(
        "reppoints", MODEL__REPPOINTS__NORM="", MODEL__REPPOINTS__SCORE_THRESH_TEST=0.0
    )
    found = export_graph(cfg, weights, "torchscript", str(tmp_path))
    assert found.get("verified") and found["equal"] == found["detections"] > 0, found
    x, offset = torch.rand(1, 8, 9, 9), torch.rand(1, 18, 7, 7)
    weight = torch.rand(8, 8, 3, 3)
    with as_traced():
        inside = deform_conv2d(x, offset, weight)
    assert torch.equal(inside, torchvision.ops.deform_conv2d(x, offset, weight))
    assert not torch.equal(inside, deform_conv2d(x, offset, weight))


PROPOSALS = {
    "MODEL__LOAD_PROPOSALS": True,
    "MODEL__PROPOSAL_GENERATOR__NAME": "PrecomputedProposals",
    **stock_backbone("faster_rcnn"),
}


@pytest.mark.usefixtures("cheap_process")
def test_student_that_is_given_proposals_is_verified_with_some(saved: Any, tmp_path: Path) -> None:
    cfg, weights = saved("faster_rcnn", **PROPOSALS)
    folder = str(tmp_path / "exported")
    export_student(cfg, weights, folder)
    report = verify(cfg, weights, folder)
    # The cheap process has imported d2kd, as said above.
    assert {k for k, v in report.items() if v} <= {"imported_d2kd", "detections"}, report
    assert report["detections"] > 0


def test_graph_that_would_want_proposals_is_refused(saved: Any, tmp_path: Path) -> None:
    cfg, weights = saved("faster_rcnn", **PROPOSALS)
    path = tmp_path / "run.yaml"
    path.write_text(cfg.dump())
    words = ["--config-file", str(path), "--weights", weights, "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--formats: .* MODEL.LOAD_PROPOSALS is True"):
        main([*words, "--formats", "onnx"])


TIMM = {
    "MODEL__BACKBONE__NAME": "build_retinanet_timm_fpn_backbone",
    "MODEL__TIMM__NAME": "test_efficientnet",
}
needs_timm = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="timm is missing")
DEFORMABLE = {
    "MODEL__RESNETS__DEFORM_ON_PER_STAGE": [False, False, False, True],
    "MODEL__RESNETS__DEFORM_MODULATED": True,
    "MODEL__RESNETS__DEFORM_NUM_GROUPS": 2,
}


@pytest.mark.parametrize(
    "name, opts",
    [
        ("mask_rcnn", {}),
        ("reppoints", {}),
        pytest.param("fcos", {}, marks=needs_fcos),
        ("retinanet", DEFORMABLE),
        pytest.param("retinanet", TIMM, marks=needs_timm),
    ],
    ids=["mask_rcnn", "reppoints", "fcos", "deformable retinanet", "retinanet on timm"],
)
def test_onnx_detects_what_the_student_does(
    name: str, opts: Dict[str, Any], saved: Any, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    # GN with one channel a group takes no map of one cell.
    norms = {f"MODEL__{x}__NORM": "" for x in ("RETINANET", "REPPOINTS", "FCOS")}
    cfg, weights = saved(name, **norms, **opts)
    found = export_graph(cfg, weights, "onnx", str(tmp_path))
    assert found.get("verified"), found
    assert os.path.isfile(found["file"]) and found["equal"] > 50
    # The names and the order that docs/export.md tells
    outputs = [x.name for x in onnx.load(found["file"]).graph.output]
    masks = ["masks"] if name == "mask_rcnn" else []
    assert outputs == ["boxes", "classes", *masks, "scores", "image_size"]


def test_student_without_a_stock_yaml_wants_any_graph(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, weights = saved("reppoints", MODEL__REPPOINTS__NORM="")
    path = tmp_path / "run.yaml"
    path.write_text(cfg.dump())
    words = ["--config-file", str(path), "--weights", weights, "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="no stock YAML: .*--formats torchscript, onnx or both"):
        main(words)
    asked = []
    proof = {"verified": True}
    monkeypatch.setattr(command, "export_graph", lambda *args: asked.append(args[2]) or proof)
    assert main([*words, "--formats", "onnx"]) == 0 and asked == ["onnx"]


def test_interrupted_export_leaves_no_proof_of_an_earlier_one(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, weights = saved("retinanet", MODEL__RETINANET__NORM="", **stock_backbone("retinanet"))
    path, output = tmp_path / "run.yaml", tmp_path / "out"
    path.write_text(cfg.dump())
    words = ["--config-file", str(path), "--weights", weights, "--output", str(output)]
    monkeypatch.setattr(command, "verify", lambda *_: {"verified": True})
    assert main(words) == 0 and (output / "report.json").is_file()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    assert sorted(os.listdir(output)) == ["student.pth", "student.yaml"]


def test_full_disk_leaves_no_half_of_a_proof(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, weights = saved("retinanet", MODEL__RETINANET__NORM="", **stock_backbone("retinanet"))
    path, output = tmp_path / "run.yaml", tmp_path / "out"
    path.write_text(cfg.dump())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(*_: Any) -> Dict[str, Any]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
        return {"verified": True}

    monkeypatch.setattr(command, "verify", fill)
    try:
        with pytest.raises(OSError):
            main(["--config-file", str(path), "--weights", weights, "--output", str(output)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(os.listdir(output)) == ["student.pth", "student.yaml"]


def test_graph_of_another_student_is_told(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, weights = saved("retinanet", MODEL__RETINANET__NORM="")
    write = graph._to_torchscript

    def write_another(adapter: torch.nn.Module, *args: Any) -> None:
        bias = adapter.model.head.bbox_pred.bias
        bias.data += 0.1
        write(adapter, *args)
        bias.data -= 0.1

    monkeypatch.setattr(graph, "_to_torchscript", write_another)
    found = graph.export_graph(cfg, weights, "torchscript", str(tmp_path))
    assert found["verified"] is False and found["equal"] < found["detections"]


def test_students_that_detect_nothing_prove_nothing(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, weights = saved("retinanet", MODEL__RETINANET__NORM="")
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.999
    load = graph.load_student
    monkeypatch.setattr(graph, "load_student", lambda *args: load(*args[:2]))
    found = graph.export_graph(cfg, weights, "torchscript", str(tmp_path))
    assert (found["verified"], found["detections"]) == (False, 0)
    module = sys.modules["d2kd.export.verify"]
    nothing = [{"scores": torch.zeros(0)}] * 2
    same = {"keys": {"missing": [], "unexpected": []}, "config": {}, "imported": [], "loaded": {}}
    monkeypatch.setattr(module, "detect", lambda *_: nothing)
    monkeypatch.setattr(module, "_in_fresh_process", lambda *_: {**same, "outputs": nothing})
    report = verify(cfg, weights, str(tmp_path))
    assert (report["verified"], report["detections"]) == (False, 0)
    one = [{"scores": torch.ones(1)}] * 2
    monkeypatch.setattr(module, "detect", lambda *_: one)
    monkeypatch.setattr(module, "_in_fresh_process", lambda *_: {**same, "outputs": one})
    assert verify(cfg, weights, str(tmp_path))["verified"]


def test_graph_that_nothing_can_run_is_not_verified(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    cfg, weights = saved("retinanet", MODEL__RETINANET__NORM="")
    found = graph.export_graph(cfg, weights, "onnx", str(tmp_path))
    assert "onnxruntime" in found["error"] and "verified" not in found


def detections(boxes: List[List[float]], scores: List[float], classes: List[int]) -> Instances:
    found = Instances((64, 64))
    found.pred_boxes = Boxes(torch.tensor(boxes))
    found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(classes)
    return found


def test_detections_are_equal_in_any_order_but_not_of_another_box_score_or_class() -> None:
    boxes = [[0.0, 0.0, 9.0, 9.0], [5.0, 5.0, 30.0, 20.0], [5.0, 5.0, 30.0, 20.0]]
    expected = detections(boxes, [0.9, 0.8, 0.7], [0, 1, 2])
    order = torch.tensor([2, 0, 1])
    assert _count_alike(expected[order], expected) == 3
    moved = detections([[0.0, 0.0, 9.0, 9.1], *boxes[1:]], [0.9, 0.8, 0.7], [0, 1, 2])
    assert _count_alike(moved, expected) == 2
    assert _count_alike(detections(boxes, [0.9, 0.802, 0.7], [0, 1, 2]), expected) == 2
    assert _count_alike(detections(boxes, [0.9, 0.8, 0.7], [0, 1, 1]), expected) == 2
    assert _count_alike(expected[:0], expected) == _count_alike(expected, expected[:0]) == 0


def test_detections_of_another_mask_or_other_keypoints_are_not_equal() -> None:
    boxes = [[0.0, 0.0, 9.0, 9.0], [5.0, 5.0, 30.0, 20.0], [5.0, 5.0, 30.0, 20.0]]
    expected, found = (detections(boxes, [0.9, 0.8, 0.7], [0, 1, 2]) for _ in range(2))
    expected.pred_masks = torch.linspace(0, 1, 3)[:, None, None, None].expand(-1, 1, 28, 28)
    found.pred_masks = expected.pred_masks + 0.001
    order = torch.tensor([2, 0, 1])
    assert _count_alike(found[order], expected) == 3
    found.pred_masks = found.pred_masks[[0, 2, 1]]
    assert _count_alike(found[order], expected) == 1
    found.pred_masks = expected.pred_masks
    expected.pred_keypoints = torch.zeros(3, 17, 3)
    found.pred_keypoints = torch.zeros(3, 17, 3)
    found.pred_keypoints[1, 16, 0] = 1.0
    assert _count_alike(found, expected) == 2


def test_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint in .*OUTPUT_DIR.*--weights"):
        find_weights(detector_config("retinanet", OUTPUT_DIR=str(tmp_path)))


def test_detector_that_stock_yaml_cannot_build_is_told() -> None:
    assert re.search("FCOS.*LazyConfig only", why_no_yaml(detector_config("fcos")))
    assert why_no_yaml(detector_config("faster_rcnn", **stock_backbone("faster_rcnn"))) == ""


def test_optimizer_and_heads_stay_behind(finished: Tuple[CfgNode, str], tmp_path: Path) -> None:
    export_student(*finished, str(tmp_path))
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "student.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    left = DetectionCheckpointer(model).load(str(tmp_path / "student.pth"))
    assert left == {}
