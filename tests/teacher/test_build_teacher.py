"""A teacher is whole and frozen, sees its own kind of images, or is refused by name."""

import ast
import re
from pathlib import Path
from typing import Any, Callable, List
from unittest import mock

import pytest
import torch
from torch import nn

from detectron2 import config as detectron2_config
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2kd import Distiller, Teacher, build_teacher, load_config
from d2kd.teacher import resolve_teacher
from d2kd.teacher.manifest import identity
from tests.helpers.toys import batch, detector_config, distill_config, write_teacher

LAZY_RETINANET = """
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import BasicStem, FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead

dataloader = dict(train=dict(mapper=dict(image_format="RGB")))
model = L(RetinaNet)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=8, norm="BN"),
            # A function, not a class: printed with an address in memory.
            stages=L(ResNet.make_default_stages)(depth=18, norm="BN"),
            out_features=["res3", "res4", "res5"],
        ),
        in_features=["res3", "res4", "res5"],
        out_channels=16,
        top_block=L(LastLevelP6P7)(in_channels=512, out_channels="${..out_channels}"),
    ),
    head=L(RetinaNetHead)(
        input_shape=[ShapeSpec(channels=16)] * 5,
        num_classes="${..num_classes}",
        num_anchors=3,
        conv_dims=[16],
    ),
    anchor_generator=L(DefaultAnchorGenerator)(
        sizes=[[8], [16], [32], [64], [128]],
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=[8, 16, 32, 64, 128],
        offset=0.0,
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    anchor_matcher=L(Matcher)(
        thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
    num_classes=3,
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
)
"""

has_lazy_config = pytest.mark.skipif(
    not hasattr(detectron2_config, "LazyConfig"), reason="this Detectron2 has no LazyConfig"
)


@pytest.fixture(scope="module")
def retinanet(tmp_path_factory: pytest.TempPathFactory) -> List[Any]:
    return write_teacher(tmp_path_factory.mktemp("teacher"), "retinanet")


def save(model: nn.Module, path: Path) -> str:
    torch.save({"model": model.state_dict()}, path)
    return str(path)


# A teacher that is whole -------------------------------------------------------------------------


def test_teacher_has_all_its_weights_is_in_eval_mode_and_frozen(retinanet: List[Any]) -> None:
    teacher = build_teacher(distill_config("retinanet", retinanet))
    saved = torch.load(retinanet[3])["model"]
    for key, value in teacher.model.state_dict().items():
        assert torch.equal(value, saved[key]), key
    assert not any(m.training for m in teacher.model.modules())
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_teacher_has_its_own_config_with_its_own_overrides(tmp_path: Path) -> None:
    opts = write_teacher(tmp_path, "retinanet", MODEL__RETINANET__NUM_CLASSES=5)
    config_file = detector_config("retinanet")  # of 3 classes
    (tmp_path / "three.yaml").write_text(config_file.dump())
    opts[1] = str(tmp_path / "three.yaml")
    cfg = distill_config("faster_rcnn", opts, MODEL__FPN__OUT_CHANNELS=16)
    cfg.DISTILL.TEACHER.OPTS = ["MODEL.RETINANET.NUM_CLASSES", 5]
    cfg.freeze()
    before = cfg.dump()
    teacher = build_teacher(cfg)
    assert type(teacher.model).__name__ == "RetinaNet"
    assert teacher.model.num_classes == 5
    assert teacher.model.backbone.output_shape()["p3"].channels == 32
    assert cfg.dump() == before, "nothing of the teacher's reaches the student's"


def test_unknown_override_is_refused_by_its_key(retinanet: List[Any]) -> None:
    cfg = distill_config("retinanet", retinanet)
    cfg.DISTILL.TEACHER.OPTS = ["MODEL.RETINANET.NUM_CLASS", 5]
    message = r"DISTILL\.TEACHER\.OPTS .*\n  MODEL\.RETINANET\.NUM_CLASS \(did you mean"
    with pytest.raises(ValueError, match=message):
        build_teacher(cfg)


def test_teacher_is_the_same_wherever_it_runs_and_whatever_it_was_trained_from() -> None:
    cfg = detector_config("retinanet")
    other = cfg.clone()
    other.MODEL.DEVICE, other.MODEL.WEIGHTS, other.OUTPUT_DIR = "cuda:1", "R-50.pkl", "elsewhere"
    other.SOLVER.MAX_ITER += 1
    assert identity(other) == identity(cfg)
    for key, value in (("INPUT.FORMAT", "RGB"), ("MODEL.PIXEL_STD", [57.0, 57.0, 57.0])):
        changed = other.clone()
        changed.merge_from_list([key, value])
        assert identity(changed) != identity(cfg), key


def test_manifest_tells_configs_and_weights_apart(retinanet: List[Any], tmp_path: Path) -> None:
    manifest = build_teacher(distill_config("retinanet", retinanet)).manifest
    # Where the file lies and on which device it runs does not matter.
    copy = write_teacher(tmp_path, "retinanet", OUTPUT_DIR="elsewhere")
    assert build_teacher(distill_config("retinanet", copy)).manifest == manifest
    other_seed = write_teacher(tmp_path, "retinanet", seed=8)
    other = build_teacher(distill_config("retinanet", other_seed)).manifest
    assert other["config"] == manifest["config"]
    assert other["weights_sha256"] != manifest["weights_sha256"]
    cfg = distill_config("retinanet", retinanet)
    cfg.DISTILL.TEACHER.OPTS = ["MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]]
    assert build_teacher(cfg).manifest["config"] != manifest["config"]


# Refusals ----------------------------------------------------------------------------------------


def change(retinanet: List[Any], **values: Any) -> Callable[[], Teacher]:
    """Build the teacher of `retinanet` with other keys under DISTILL.TEACHER."""
    cfg = distill_config("retinanet", retinanet)
    for key, value in values.items():
        cfg.DISTILL.TEACHER[key] = value
    return lambda: build_teacher(cfg)


def test_missing_config_is_refused(retinanet: List[Any]) -> None:
    with pytest.raises(ValueError, match=r"DISTILL\.TEACHER\.CONFIG_FILE is empty"):
        change(retinanet, CONFIG_FILE="")()
    with pytest.raises(FileNotFoundError, match=r"'no\.yaml' is neither a file nor a config of"):
        change(retinanet, CONFIG_FILE="no.yaml")()


def test_missing_weights_are_refused_even_if_the_teacher_s_config_names_some(
    retinanet: List[Any], tmp_path: Path
) -> None:
    # There MODEL.WEIGHTS is what the teacher's own training began with.
    cfg = detector_config("retinanet", MODEL__WEIGHTS=retinanet[3])
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    with pytest.raises(ValueError, match=r"DISTILL\.TEACHER\.WEIGHTS is empty"):
        change(retinanet, CONFIG_FILE=str(tmp_path / "teacher.yaml"), WEIGHTS="")()
    with pytest.raises(FileNotFoundError, match=r"DISTILL\.TEACHER\.WEIGHTS: .*'no\.pth'"):
        change(retinanet, WEIGHTS="no.pth")()


@pytest.mark.parametrize("name", ["teacher.pth", "teacher.pkl"])
@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x80\x04half a pickle"])
def test_file_that_is_no_checkpoint_is_refused_by_its_name(
    retinanet: List[Any], tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.* is not a checkpoint"):
        change(retinanet, WEIGHTS=str(tmp_path / name))()


def test_weights_that_cover_less_are_refused_with_every_key(
    retinanet: List[Any], tmp_path: Path
) -> None:
    state = torch.load(retinanet[3])["model"]
    total = len(state)
    del state["head.bbox_pred.bias"]
    state["head.cls_score.bias"] = torch.zeros(7)
    torch.save({"model": state}, tmp_path / "part.pth")
    with pytest.raises(ValueError) as error:
        change(retinanet, WEIGHTS=str(tmp_path / "part.pth"))()
    message = str(error.value)
    assert message.startswith("DISTILL.TEACHER.WEIGHTS: ")
    assert f"covers {total - 2} of the detector's {total} entries" in message
    assert "\n  head.bbox_pred.bias\n" in message
    assert "\n  head.cls_score.bias: (7,) in the file, (9,) in the detector\n" in message


def test_coverage_is_told(retinanet: List[Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="d2kd")
    change(retinanet)()
    total = len(torch.load(retinanet[3])["model"])
    assert f"{retinanet[3]!r} covers all of the detector, {total} entries" in caplog.text


def test_an_imagenet_backbone_is_no_teacher(retinanet: List[Any], tmp_path: Path) -> None:
    model = build_model(detector_config("retinanet"))
    weights = save(model.backbone.bottom_up, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match=r"covers \d+ of the detector's .* entries"):
        change(retinanet, WEIGHTS=weights)()


def test_a_distillation_run_is_no_teacher(retinanet: List[Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(distill_config("retinanet", retinanet).dump())
    with pytest.raises(ValueError, match=r"run\.yaml' is itself a distillation run") as refused:
        change(retinanet, CONFIG_FILE=str(tmp_path / "run.yaml"))()
    # Its student may be one, by what the error advises.
    opts = re.search('DISTILL.TEACHER.OPTS "(.*)"', str(refused.value)).group(1)
    opts = ast.literal_eval(opts)
    teacher = change(retinanet, CONFIG_FILE=str(tmp_path / "run.yaml"), OPTS=opts)()
    assert type(teacher.model).__name__ == "RetinaNet"


def test_random_weights_need_to_be_allowed(
    retinanet: List[Any], caplog: pytest.LogCaptureFixture
) -> None:
    teacher = change(retinanet, WEIGHTS="", ALLOW_RANDOM_WEIGHTS=True)()
    assert teacher.manifest["weights_sha256"] == ""
    assert "this teacher knows nothing" in caplog.text


def test_allowed_random_weights_do_not_hide_weights_that_are_named(retinanet: List[Any]) -> None:
    with pytest.raises(FileNotFoundError, match="no.pth"):
        change(retinanet, WEIGHTS="no.pth", ALLOW_RANDOM_WEIGHTS=True)()
    named = change(retinanet, ALLOW_RANDOM_WEIGHTS=True)()
    assert named.manifest == change(retinanet)().manifest


def test_detector_without_a_view_is_refused(tmp_path: Path, retinanet: List[Any]) -> None:
    opts = write_teacher(tmp_path, "faster_rcnn", MODEL__META_ARCHITECTURE="ProposalNetwork")
    message = (
        "teacher's meta-architecture ProposalNetwork has no DetectorView. Known: .*RetinaNet.*"
        r'_do_register\("ProposalNetwork", MyView\)'
    )
    with pytest.raises(ValueError, match=message):
        build_model(distill_config("retinanet", opts))
    cfg = distill_config("faster_rcnn", retinanet)
    cfg.DISTILL.STUDENT_META_ARCHITECTURE = "ProposalNetwork"
    with pytest.raises(ValueError, match="The student's meta-architecture ProposalNetwork has no"):
        build_model(cfg)


# The model zoo -----------------------------------------------------------------------------------


def zoo_config(name: str, weights: str = "") -> Any:
    pytest.importorskip("detectron2.model_zoo")
    teacher = ["DISTILL.TEACHER.CONFIG_FILE", name, "DISTILL.TEACHER.WEIGHTS", weights]
    return load_config(opts=teacher)


def test_zoo_name_gives_config_and_checkpoint_without_downloading() -> None:
    name = "COCO-Detection/retinanet_R_101_FPN_3x.yaml"
    config_file, weights = resolve_teacher(zoo_config(name))
    assert Path(config_file).is_file() and config_file.endswith(name)
    assert weights.startswith("https://") and "/COCO-Detection/retinanet_R_101_FPN_3x/" in weights
    assert weights.endswith(".pkl")


def test_named_weights_replace_those_of_the_zoo(retinanet: List[Any]) -> None:
    cfg = zoo_config("COCO-Detection/retinanet_R_101_FPN_3x.yaml", weights=retinanet[3])
    assert resolve_teacher(cfg)[1] == retinanet[3]


def test_zoo_config_without_a_checkpoint_needs_weights() -> None:
    with pytest.raises(ValueError, match="DISTILL.TEACHER.WEIGHTS is empty"):
        resolve_teacher(zoo_config("Base-RetinaNet.yaml"))


# LazyConfig --------------------------------------------------------------------------------------


@pytest.fixture
def lazy(tmp_path: Path) -> List[Any]:
    if not hasattr(detectron2_config, "LazyConfig"):
        pytest.skip("this Detectron2 has no LazyConfig")
    (tmp_path / "teacher.py").write_text(LAZY_RETINANET)
    model = detectron2_config.instantiate(
        detectron2_config.LazyConfig.load(str(tmp_path / "teacher.py")).model
    )
    weights = save(model, tmp_path / "teacher.pth")
    config_file = str(tmp_path / "teacher.py")
    return ["DISTILL.TEACHER.CONFIG_FILE", config_file, "DISTILL.TEACHER.WEIGHTS", weights]


@has_lazy_config
def test_lazy_config_builds_a_teacher(lazy: List[Any]) -> None:
    teacher = build_teacher(distill_config("retinanet", lazy))
    saved = torch.load(lazy[3])["model"]
    assert all(torch.equal(v, saved[k]) for k, v in teacher.model.state_dict().items())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training
    assert teacher.image_format == "RGB", "from the data loader's mapper"


@has_lazy_config
def test_lazy_config_takes_overrides_of_its_own_kind(lazy: List[Any]) -> None:
    cfg = distill_config("retinanet", lazy)
    cfg.DISTILL.TEACHER.OPTS = ["model.num_classes=5"]
    with pytest.raises(ValueError, match="head.cls_score.weight"):
        build_teacher(cfg)  # these weights have 3 classes
    cfg.DISTILL.TEACHER.merge_from_list(["WEIGHTS", "", "ALLOW_RANDOM_WEIGHTS", True])
    assert build_teacher(cfg).model.num_classes == 5


@has_lazy_config
@pytest.mark.parametrize(
    "opts",
    [
        "model.num_classes={_target_: os.system, command: 'touch TRAP'}",
        "model.num_classes=[{_target_: os.system, command: 'touch TRAP'}]",
        "model={_target_: os.system, command: 'touch TRAP'}",
    ],
)
def test_override_of_a_lazy_config_cannot_call_what_it_likes(
    opts: str, lazy: List[Any], tmp_path: Path
) -> None:
    cfg = distill_config("retinanet", lazy)
    cfg.DISTILL.TEACHER.OPTS = [opts.replace("TRAP", str(tmp_path / "trap"))]
    with pytest.raises(ValueError, match="DISTILL.TEACHER.OPTS builds the teacher with os.system"):
        build_teacher(cfg)
    assert not (tmp_path / "trap").exists()


@has_lazy_config
def test_manifest_of_a_lazy_config_has_nothing_of_the_process_in_it(lazy: List[Any]) -> None:
    # A function's repr holds its address; resume would find another teacher in the next process.
    text = build_teacher(distill_config("retinanet", lazy)).manifest["config"]
    assert "<function ResNet.make_default_stages>" in text and " at 0x" not in text


# Channel order -----------------------------------------------------------------------------------


def test_rgb_student_feeds_a_bgr_teacher_its_own_kind_of_image(retinanet: List[Any]) -> None:
    cfg = distill_config("retinanet", retinanet, INPUT__FORMAT="RGB")
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.7, 116.3, 103.5], [58.0, 57.0, 56.0]
    distiller = build_model(cfg)
    assert isinstance(distiller, Distiller) and distiller.teacher.image_format == "BGR"
    inputs = batch(height=60, width=50)  # RGB, and not a multiple of the stride
    seen = []
    teacher = distiller.teacher.model
    handle = teacher.backbone.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    with torch.no_grad(), EventStorage():
        distiller.train()(inputs)
    handle.remove()
    flipped = [{**x, "image": x["image"][[2, 1, 0]]} for x in inputs]
    assert torch.equal(seen[0], teacher.preprocess_image(flipped).tensor)


def test_images_of_the_same_format_are_handed_on_as_they_are(retinanet: List[Any]) -> None:
    teacher = build_teacher(distill_config("retinanet", retinanet))
    inputs = batch()
    assert teacher.batch(inputs, "BGR") is inputs


@pytest.mark.parametrize("image_format", ["L", "YUV-BT.601"])
def test_formats_that_cannot_be_turned_into_each_other_are_refused(
    retinanet: List[Any], image_format: str
) -> None:
    cfg = distill_config("retinanet", retinanet, INPUT__FORMAT=image_format)
    with pytest.raises(ValueError, match=f"wants 'BGR', the student '{image_format}'"):
        build_teacher(cfg)


# Memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (torch.cuda.OutOfMemoryError("out of memory"), torch.cuda.OutOfMemoryError, "^out of"),
        (
            RuntimeError("size"),
            ValueError,
            "CONFIG_FILE: .* cannot be built from these keys .*size",
        ),
    ],
)
def test_memory_that_ran_out_is_not_blamed_on_the_config(
    error: Exception,
    kind: type,
    message: str,
    retinanet: List[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("d2kd.modeling.build.build_model", mock.Mock(side_effect=error))
    with pytest.raises(kind, match=f"(?s){message}") as info:
        build_teacher(distill_config("retinanet", retinanet))
    assert (info.value is error) == (kind is not ValueError)


@pytest.mark.parametrize(
    "key, value",
    [("MODEL.PIXEL_STD", [57.0, 57.0, 57.0]), ("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5)],
)
def test_teacher_is_the_detector_that_its_weights_were_trained_as(
    key: str, value: Any, tmp_path: Path
) -> None:
    opts = write_teacher(tmp_path, "retinanet")
    state = torch.load(opts[3])
    trained = detector_config("retinanet")
    torch.save({**state, "trainer": {"config": trained.dump()}}, opts[3])
    assert build_teacher(distill_config("retinanet", opts))
    cfg = distill_config("retinanet", [*opts, "DISTILL.TEACHER.OPTS", [key, value]])
    with pytest.raises(ValueError, match=f"TEACHER.WEIGHTS: .*trained with other.*\n  {key}: "):
        build_teacher(cfg)
