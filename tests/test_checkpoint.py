"""What is in a checkpoint, what it loads into, and what is refused."""

import io
import math
import pickle
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from d2kd import student_config
from d2kd.checkpoint import (
    PlainCheckpointer,
    TeacherManifest,
    load_initial_weights,
    load_whole_detector,
)
from d2kd.engine import evaluate
from tests.helpers.runs import (
    assert_same_tensors,
    build_trainer,
    run,
    run_config,
    snapshot,
    tensors_in,
)
from tests.helpers.toys import distill_config, write_teacher

SAVES = ["model_0000001.pth", "model_0000003.pth", "model_final.pth"]


class RecordingCheckpointer(DetectionCheckpointer):
    """Stock Detectron2, which only logs what did not fit."""

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible


@pytest.fixture(scope="module")
def finished(folder: Path, teacher: List[Any]) -> CfgNode:
    """Config of a distilled run of 4 iterations with a save every second."""
    cfg = run_config(folder, teacher, ["MGD", "PKD"])
    run(cfg)
    return cfg


def read(cfg: CfgNode, name: str = "model_final.pth") -> Dict[str, Any]:
    return torch.load(Path(cfg.OUTPUT_DIR) / name, weights_only=True)


def new_distiller(teacher: List[Any], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(distill_config("retinanet", teacher))


# What is in it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAVES)
def test_model_of_every_save_loads_in_stock_detectron2(finished: CfgNode, name: str) -> None:
    path = str(Path(finished.OUTPUT_DIR) / name)
    detector = build_model(student_config(finished))
    checkpointer = RecordingCheckpointer(detector)
    checkpointer.load(path)
    assert not checkpointer.incompatible.missing_keys
    assert not checkpointer.incompatible.unexpected_keys
    assert not checkpointer.incompatible.incorrect_shapes
    detector.load_state_dict(read(finished, name)["model"], strict=True)


def test_saves_differ_and_the_last_is_the_trained_student(finished: CfgNode) -> None:
    first, last = read(finished, SAVES[0]), read(finished, SAVES[-1])
    key = "backbone.fpn_output3.weight"
    assert not torch.equal(first["model"][key], last["model"][key])
    assert (first["iteration"], last["iteration"]) == (1, 3)


def test_heads_and_teacher_manifest_are_saved_beside_the_student(finished: CfgNode) -> None:
    for name in SAVES:
        checkpoint = read(finished, name)  # weights_only: nothing in it runs code
        assert set(checkpoint) == {"model", "distill_heads", "teacher", "trainer", "iteration"}
        assert set(checkpoint["teacher"]) == {"config", "weights_sha256", "classes"}
        assert {k.split(".")[0] for k in checkpoint["distill_heads"]} == {"MGD", "PKD"}


def test_no_weight_of_the_teacher_is_in_the_file(finished: CfgNode, teacher: List[Any]) -> None:
    weights = torch.load(teacher[-1], weights_only=True)["model"]
    # Constants (a new norm's weight and bias, mean and deviation of pixels) belong to nobody.
    own = [x for x in weights.values() if x.numel() > 3 and x.float().std() > 0]
    own = [x for x in own if x.shape != (9, 4)]  # anchors, where they are saved
    assert len(own) > 50
    saved = {(x.shape, float(x.double().sum())) for x in tensors_in(read(finished))}
    assert not [x.shape for x in own if (x.shape, float(x.double().sum())) in saved]


def test_infinite_buffer_is_saved_and_a_parameter_that_is_not_finite_is_not(
    teacher: List[Any], tmp_path: Path
) -> None:
    distiller = new_distiller(teacher)
    checkpointer = PlainCheckpointer(distiller, str(tmp_path))
    for part in (distiller.student, distiller.heads):
        part.register_buffer("running_min", torch.tensor(math.inf))
    checkpointer.save("whole")
    content = torch.load(tmp_path / "whole.pth", weights_only=True)
    assert content["model"]["running_min"] == content["distill_heads"]["running_min"] == math.inf
    for part, value in ((distiller.student, math.nan), (distiller.heads, math.inf)):
        name, parameter = next(part.named_parameters())
        kept = parameter.detach().clone()
        parameter.data.view(-1)[0] = value
        with pytest.raises(FloatingPointError, match=f"half.pth was not saved: {name} is not"):
            checkpointer.save("half")
        parameter.data.copy_(kept)
    assert not (tmp_path / "half.pth").exists()


# Resuming ----------------------------------------------------------------------------------------


def test_resume_restores_student_heads_and_optimizer(finished: CfgNode) -> None:
    cfg = finished.clone()
    cfg.SOLVER.MAX_ITER = 6
    trainer = build_trainer(cfg, resume=True)
    checkpoint = read(finished)
    assert trainer.start_iter == 4
    assert_same_tensors(trainer._module.student.state_dict(), checkpoint["model"])
    assert_same_tensors(trainer._module.heads.state_dict(), checkpoint["distill_heads"])
    expected = checkpoint["trainer"]["_trainer"]["optimizer"]["state"]
    actual = trainer.optimizer.state_dict()["state"]
    assert list(actual) == list(expected) and len(actual) > 50
    for i, state in expected.items():
        assert torch.equal(actual[i]["momentum_buffer"], state["momentum_buffer"])


def test_resume_with_other_teacher_weights_is_refused(
    finished: CfgNode, folder: Path, teacher: List[Any]
) -> None:
    cfg = finished.clone()
    (folder / "other").mkdir()
    other = write_teacher(folder / "other", "retinanet", seed=8, MODEL__FPN__OUT_CHANNELS=64)
    cfg.merge_from_list(other)
    with pytest.raises(ValueError, match="another teacher: weights_sha256 differs"):
        build_trainer(cfg, resume=True)


def test_resume_with_another_teacher_config_is_refused(finished: CfgNode) -> None:
    cfg = finished.clone()
    cfg.DISTILL.TEACHER.OPTS = ["MODEL.RETINANET.NMS_THRESH_TEST", 0.7]
    with pytest.raises(
        ValueError, match="(?s)another teacher: config differs.*NMS_THRESH_TEST: 0.5, now 0.7"
    ):
        build_trainer(cfg, resume=True)


def test_resume_with_other_heads_is_refused(finished: CfgNode) -> None:
    cfg = finished.clone()
    cfg.DISTILL.HEADS = ["MGD"]
    with pytest.raises(ValueError, match=r"\['MGD', 'PKD'\].*\['MGD'\].*OUTPUT_DIR"):
        build_trainer(cfg, resume=True)


def test_resume_with_heads_on_other_levels_is_refused(finished: CfgNode) -> None:
    cfg = finished.clone()
    cfg.DISTILL.LEVELS = [["p4", "p4"]]
    with pytest.raises(ValueError, match=r"DISTILL.LEVELS: \[\], now \[\['p4', 'p4'\]\]"):
        build_trainer(cfg, resume=True)


def test_resume_of_a_distilled_run_by_a_plain_one_is_refused(finished: CfgNode) -> None:
    with pytest.raises(ValueError, match="DISTILL.HEADS"):
        build_trainer(student_config(finished), resume=True)


def test_resume_of_a_plain_run_by_a_distilled_one_is_refused(
    folder: Path, teacher: List[Any], tmp_path: Path
) -> None:
    plain = run_config(folder, OUTPUT_DIR=str(tmp_path), SOLVER__MAX_ITER=1)
    run(plain)
    cfg = run_config(folder, teacher, OUTPUT_DIR=str(tmp_path))
    with pytest.raises(ValueError, match="DISTILL.HEADS"):
        build_trainer(cfg, resume=True)


def test_resume_of_another_student_is_refused(finished: CfgNode) -> None:
    cfg = finished.clone()
    cfg.MODEL.RETINANET.NUM_CONVS = 2
    with pytest.raises(ValueError, match="(?s)MODEL.RETINANET.NUM_CONVS: 1, now 2.*OUTPUT_DIR"):
        build_trainer(cfg, resume=True)


# Initial weights ---------------------------------------------------------------------------------


def test_zoo_detector_loads_into_the_student(teacher: List[Any], tmp_path: Path) -> None:
    source = new_distiller(teacher, seed=1).student.state_dict()
    path = tmp_path / "model_final_abc123.pkl"
    zoo = {"model": {k: v.numpy() for k, v in source.items()}, "__author__": "Detectron2 Model Zoo"}
    path.write_bytes(pickle.dumps(zoo))
    distiller = new_distiller(teacher)
    heads = snapshot(distiller.heads)
    load_initial_weights(PlainCheckpointer(distiller), str(path))
    assert_same_tensors(distiller.student.state_dict(), source)
    assert_same_tensors(distiller.heads.state_dict(), heads)


@pytest.mark.parametrize("style", ["msra", "torchvision"])
def test_imagenet_backbone_loads_into_the_student(
    teacher: List[Any], tmp_path: Path, style: str
) -> None:
    source = new_distiller(teacher, seed=1).student.backbone.bottom_up
    weights = {k: v.detach().numpy() for k, v in source.named_parameters()}
    if style == "msra":
        content = {caffe2_name(k): v for k, v in weights.items()}
    else:
        content = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(content))
    distiller = new_distiller(teacher)
    checkpointer = PlainCheckpointer(distiller)
    load_initial_weights(checkpointer, str(path))
    loaded = dict(distiller.student.backbone.bottom_up.named_parameters())
    assert_same_tensors(loaded, dict(source.named_parameters()))
    assert checkpointer.loaded_keys == len(weights)


def caffe2_name(key: str) -> str:
    """stem.conv1.norm.weight -> res_conv1_bn_s; res2.0.conv1.weight -> res2_0_branch2a_w"""
    suffix = {"norm.weight": "_bn_s", "norm.bias": "_bn_b"}.get(".".join(key.split(".")[-2:]), "_w")
    if key.startswith("stem"):
        return ("conv1" if suffix == "_w" else "res_conv1") + suffix
    stage, block, conv = key.split(".")[:3]
    branches = {"shortcut": "1", "conv1": "2a", "conv2": "2b", "conv3": "2c"}
    return f"{stage}_{block}_branch{branches[conv]}{suffix}"


def test_a_caffe2_name_is_that_of_the_published_files() -> None:
    assert caffe2_name("stem.conv1.weight") == "conv1_w"
    assert caffe2_name("stem.conv1.norm.weight") == "res_conv1_bn_s"
    assert caffe2_name("res2.0.conv1.weight") == "res2_0_branch2a_w"
    assert caffe2_name("res5.2.conv3.norm.bias") == "res5_2_branch2c_bn_b"
    assert caffe2_name("res2.0.shortcut.weight") == "res2_0_branch1_w"


def pickled(content: Any) -> bytes:
    return pickle.dumps(content)


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


NOT_CHECKPOINTS = {
    "text.pth": b"<!DOCTYPE html>",
    "text.pkl": b"<!DOCTYPE html>",
    "empty.pth": b"",
    "empty.pkl": b"",
    "list.pth": saved([1, 2]),
    "list.pkl": pickled([1, 2]),
    "cut.pth": saved({"model": {"a": torch.zeros(1000)}})[:800],
    "model_is_a_list.pth": saved({"model": [1]}),
}


@pytest.mark.parametrize("name", NOT_CHECKPOINTS)
def test_file_that_is_no_checkpoint_is_refused_with_the_key_that_named_it(
    teacher: List[Any], tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(NOT_CHECKPOINTS[name])
    student = new_distiller(teacher)
    with pytest.raises(ValueError, match=f"MODEL.WEIGHTS.*{name}"):
        load_initial_weights(PlainCheckpointer(student), str(path))
    with pytest.raises(ValueError, match=f"DISTILL.TEACHER.WEIGHTS.*{name}"):
        load_whole_detector(student.student, str(path), "DISTILL.TEACHER.WEIGHTS")


def test_missing_file_is_refused_with_the_key_that_named_it(teacher: List[Any]) -> None:
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS.*nowhere.pth"):
        load_initial_weights(PlainCheckpointer(new_distiller(teacher)), "nowhere.pth")


def test_weights_that_fit_nothing_are_refused(teacher: List[Any], tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"model": {"classifier.weight": torch.zeros(3, 3)}}, path)
    with pytest.raises(ValueError, match="MODEL.WEIGHTS: nothing in .*other.pth"):
        load_initial_weights(PlainCheckpointer(new_distiller(teacher)), str(path))


def test_empty_weights_leave_the_initialisation(teacher: List[Any]) -> None:
    distiller = new_distiller(teacher)
    before = snapshot(distiller)
    load_initial_weights(PlainCheckpointer(distiller), "")
    assert_same_tensors(distiller.state_dict(), before)


def test_evaluation_needs_weights_for_the_whole_student(finished: CfgNode, tmp_path: Path) -> None:
    cfg = finished.clone()
    cfg.DATASETS.TEST = ("d2kd_shapes_val",)
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        evaluate(cfg)
    model = read(finished)["model"]
    model.pop("head.bbox_pred.bias")
    cfg.MODEL.WEIGHTS = str(tmp_path / "part.pth")
    torch.save({"model": model}, cfg.MODEL.WEIGHTS)
    with pytest.raises(ValueError, match="(?s)MODEL.WEIGHTS.*head.bbox_pred.bias"):
        evaluate(cfg)


def test_checkpoint_from_before_classes_were_kept_is_of_the_same_teacher() -> None:
    for key in ("classes", "left: classes"):
        manifest = TeacherManifest({"config": "a", key: "class i is class i"})
        manifest.load_state_dict({"config": "a"})
        with pytest.raises(ValueError, match=f"another teacher: {key} differs"):
            manifest.load_state_dict({"config": "a", key: "[(0,)] <- [(1,)]"})
    with pytest.raises(ValueError, match="another teacher: weights_sha256 differs"):
        TeacherManifest({"weights_sha256": "1"}).load_state_dict({})


def test_teacher_of_another_detectron2_is_the_same_where_both_know_its_keys() -> None:
    ours = "INPUT.FORMAT: BGR\nRPN:\n  NMS_THRESH: 0.7\nMASK_ON: false\n"
    newer = "INPUT.FORMAT: BGR\nRPN:\n  NMS_THRESH: 0.7\n  NEW: 1\nMASK_ON: false\n"
    TeacherManifest({"config": newer}).load_state_dict({"config": ours})
    with pytest.raises(ValueError, match="another teacher: .*\n  RPN.NMS_THRESH: 0.7, now 0.6"):
        TeacherManifest({"config": newer.replace("0.7", "0.6")}).load_state_dict({"config": ours})
    # A LazyConfig's text is compared as it is.
    with pytest.raises(ValueError, match="\n  checkpoint: a\n  this run:   b"):
        TeacherManifest({"config": "b"}).load_state_dict({"config": "a"})
