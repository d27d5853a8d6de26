"""A model of timm as a teacher of features: where its cells are, what it can teach."""

from pathlib import Path
from typing import Any, List, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2kd import load_config
from d2kd.config.unread import why_unread
from d2kd.conformance.detectors import enliven
from d2kd.engine.preflight.summary import summary
from d2kd.engine.preflight.teacher_check import check_teacher
from d2kd.labelling.detector import load_detector
from d2kd.modeling import backbone_teacher
from d2kd.modeling.backbone_teacher import BackboneTeacher, resample
from d2kd.teacher import build_teacher
from d2kd.teacher.stand_in import confident
from tests.helpers.runs import assert_same_tensors, run, run_config
from tests.helpers.toys import GROUP_NORM, batch, distill_config, write_teacher

timm = pytest.importorskip("timm")
WITHOUT_LABELS = {
    "DISTILL__UNLABELLED__SETS": ["a_folder"],
    "DISTILL__UNLABELLED__BOX_SCORE": 0.01,
}


def vit(patch: int = 16) -> Any:
    torch.manual_seed(0)
    return timm.create_model(
        "test_vit", num_classes=0, patch_size=patch, img_size=10 * patch, dynamic_img_size=True
    ).eval()


@pytest.fixture
def teacher(tmp_path: Path) -> List[Any]:
    """DISTILL.TEACHER.* of a small ViT and its weights, with the classifier that nobody reads."""
    torch.manual_seed(1)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    weights = str(tmp_path / "vit.pth")
    return ["DISTILL.TEACHER.BACKBONE", "test_vit", "DISTILL.TEACHER.WEIGHTS", weights]


# Where cells are ----------------------------------------------------------------------------------


def centers(stride: int, pixels: int) -> Tensor:
    return torch.arange(-(-pixels // stride)) * stride + stride / 2


@pytest.mark.parametrize("old, new", [(14, 16), (16, 16), (16, 8), (14, 32), (8, 32), (14, 64)])
def test_resampled_cell_has_the_value_of_its_centre(old: int, new: int) -> None:
    # A map whose values are the pixel coordinates of its cells' centres: any interpolation that is
    # right about places returns those of the new centres, but beyond the outermost old ones.
    pixels = 192
    x = centers(old, pixels)
    maps = torch.stack([x[:, None].expand(-1, len(x)), x[None].expand(len(x), -1)])[None]
    found = resample(maps, old, new, (pixels, pixels))
    expected = centers(new, pixels)
    assert found.shape == (1, 2, pixels // new, pixels // new)
    mean = max(new // old, 1) * old  # an old cell, or the mean of several
    inner = (expected >= mean / 2) & (expected <= pixels - mean)
    assert inner.any()
    torch.testing.assert_close(found[0, 0][inner][:, 0], expected[inner])
    torch.testing.assert_close(found[0, 1][:, inner][0], expected[inner])
    # Beyond them, by no more than from an old cell's centre to its border.
    assert (found[0, 0][:, 0] - expected).abs().max() <= old / 2


def test_half_precision_rounds_the_values_and_not_the_places() -> None:
    maps = torch.rand(1, 2, 96, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = resample(maps, 14, 16, (1344, 1344))
    exact = resample(maps.double(), 14, 16, (1344, 1344))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("patch, strides", [(16, [16]), (14, [16]), (14, [8, 16, 32])])
def test_maps_have_the_strides_that_are_asked_for(patch: int, strides: Sequence[int]) -> None:
    model = BackboneTeacher(vit(patch), strides).eval()
    images = model.preprocess_image([{"image": torch.zeros(3, 100, 150, dtype=torch.uint8)}])
    height, width = images.tensor.shape[-2:]
    assert not height % max(strides) and not width % max(strides)
    with torch.no_grad():
        features = model.backbone(images.tensor)
    assert {k: tuple(x.shape) for k, x in features.items()} == {
        k: (1, v.channels, height // v.stride, width // v.stride)
        for k, v in model.backbone.output_shape().items()
    }
    assert {v.stride for v in model.backbone.output_shape().values()} == set(strides)


def test_map_of_the_wanted_stride_is_the_model_s_own() -> None:
    net = vit(16)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = net.forward_intermediates(image, norm=True, intermediates_only=True)[-1]
        found = BackboneTeacher(net, [16]).backbone(image)["p4"]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [(64, 96), (48, 80)])  # of which the second needs padding
def test_convolutional_model_teaches_several_strides_without_resampling(
    size: Sequence[int],
) -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_efficientnet", num_classes=0).eval()
    image = torch.randn(1, 3, *size)
    padded = F.pad(image, (0, 96 - size[1], 0, 64 - size[0]))
    with torch.no_grad():
        found = BackboneTeacher(net, [8, 16]).backbone(image)
        expected = net.forward_intermediates(padded, intermediates_only=True)
    own = {x.shape[-1]: x for x in expected}
    for level, stride in (("p3", 8), ("p4", 16)):
        rows, columns = (x // stride for x in size)
        assert torch.equal(found[level], own[96 // stride][..., :rows, :columns])


def test_stride_beyond_those_of_the_model_is_of_its_last_map() -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_efficientnet", num_classes=0).eval()
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        found = BackboneTeacher(net, [64]).backbone(image)["p6"]
        last = net.forward_intermediates(image, intermediates_only=True)[-1]
    # A cell of 64 pixels is four of 32.
    torch.testing.assert_close(found, F.avg_pool2d(last, 2))


def test_images_are_normalised_as_the_model_was_trained() -> None:
    model = BackboneTeacher(vit(), [16])  # mean and deviation 0.5
    white = model.preprocess_image([{"image": torch.full((3, 32, 32), 255, dtype=torch.uint8)}])
    torch.testing.assert_close(white.tensor, torch.ones(1, 3, 32, 32))


# What it teaches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("student", ["retinanet", "faster_rcnn"])
@pytest.mark.parametrize("head", ["PKD", "CWD", "MGD"])
def test_step_trains_student_and_head_on_one_level(
    student: str, head: str, teacher: List[Any]
) -> None:
    torch.manual_seed(0)
    distiller = build_model(distill_config(student, teacher, [head])).train()
    with EventStorage():
        losses = distiller(batch(height=64, width=96))
    (levels,) = distiller.last_step.losses.values()
    assert list(levels) == ["p4"]
    losses[f"loss_{head.lower()}"].backward()
    trained = [*distiller.heads.parameters(), *distiller.student.backbone.bottom_up.parameters()]
    assert sum(p.grad.abs().sum() for p in trained if p.grad is not None) > 0
    assert all(p.grad is None for p in distiller.teacher.model.parameters())
    assert "the teacher has features and no classes" in summary(distiller)


def test_weights_are_those_of_the_file(teacher: List[Any]) -> None:
    model = build_teacher(distill_config("retinanet", teacher)).model
    saved = torch.load(teacher[3])
    assert_same_tensors(
        model.backbone.net.state_dict(), {k: v for k, v in saved.items() if "head" not in k}
    )
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_run_trains_and_its_ap_is_not_asked_for(
    teacher: List[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = run_config(tmp_path, teacher, ["PKD"])
    run(cfg)
    assert (Path(cfg.OUTPUT_DIR) / "model_final.pth").is_file()
    cfg = distill_config("retinanet", teacher, DATASETS__TEST=("d2kd_shapes_val",))
    cfg.OUTPUT_DIR = str(tmp_path)
    with caplog.at_level("WARNING", logger="d2kd"):
        check_teacher(cfg, build_teacher(cfg))
    assert "The teacher is not evaluated: it has features and detects nothing." in caplog.text


def test_another_teacher_detects_where_labels_are_missing(
    teacher: List[Any], tmp_path: Path
) -> None:
    (tmp_path / "detector").mkdir()
    detector = write_teacher(tmp_path / "detector", "retinanet", **GROUP_NORM)
    entries = [
        {"NAME": name, "TEACHER": {"WEIGHTS": opts[3], key: opts[1]}, "HEADS": [head]}
        for name, key, opts, head in (
            ("features", "BACKBONE", teacher, "PKD"),
            ("boxes", "CONFIG_FILE", detector, "FGD"),
        )
    ]
    distiller = build_model(
        distill_config("retinanet", [], DISTILL__TEACHERS=entries, **WITHOUT_LABELS)
    ).train()
    enliven(distiller.lessons[1].teacher.model)
    images = [{k: v for k, v in x.items() if k != "instances"} for x in batch()]
    with EventStorage():
        losses = distiller(images)
    assert losses["loss_features_pkd"] > 0 and losses["loss_boxes_fgd_foreground"] > 0
    view = distiller.view_of_teacher(images, distiller.lessons[1])
    expected = confident(view.detections(), 0.01)
    for x, boxes in zip(distiller.last_step.student.gt_instances, expected):
        assert len(x) > 0 and torch.equal(x.gt_boxes.tensor, boxes.gt_boxes.tensor)


# What it cannot -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head, missing", [("MLD", "dense"), ("MAR", "dense"), ("RoIFI", "roi_features")]
)
def test_heads_that_need_predictions_are_refused(
    head: str, missing: str, teacher: List[Any]
) -> None:
    with pytest.raises(ValueError, match=f"{head} needs .*{missing}.*BackboneTeacher has none"):
        build_model(distill_config("retinanet", teacher, [head]))


@pytest.mark.parametrize(
    "opts, expected",
    [
        (["DISTILL.TEACHER.CONFIG_FILE", "x.yaml"], "is 'test_vit' and CONFIG_FILE 'x.yaml'"),
        (["DISTILL.TEACHER.WEIGHTS", ""], "WEIGHTS is empty: name a file with weights of test_vit"),
        (["DISTILL.TEACHER.BACKBONE_STRIDES", [12]], r"BACKBONE_STRIDES must be .* got \[12\]"),
        (["DISTILL.TEACHER.BACKBONE_STRIDES", [16, 16]], "BACKBONE_STRIDES must be different"),
        (["DISTILL.TEACHER.BACKBONE_STRIDES", [2048]], r"up to 1024, got \[2048\]"),
        (["DISTILL.TEACHER.BACKBONE_STRIDES", []], r"BACKBONE_STRIDES must be .* got \[\]"),
        (["DISTILL.TEACHER.BACKBONE", "no_vit"], "BACKBONE: timm .* has no 'no_vit'"),
        (["DISTILL.TEACHER.BACKBONE", "test_vit2"], "is not of the model that .*BACKBONE"),
        (
            ["DISTILL.TEACHER.BACKBONE", "visformer_tiny"],
            "BACKBONE: visformer_tiny takes images of",
        ),
    ],
)
def test_bad_values_are_refused(opts: List[Any], expected: str, teacher: List[Any]) -> None:
    with pytest.raises(ValueError, match=expected):
        build_teacher(distill_config("retinanet", [*teacher, *opts]))


def test_model_without_features_in_between_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net = torch.nn.Identity()
    net.pretrained_cfg = {}
    monkeypatch.setattr(backbone_teacher, "create_timm", lambda key, name, **options: net)
    with pytest.raises(ValueError, match="BACKBONE: timm gives no intermediate features of x"):
        backbone_teacher.build_backbone_teacher("x", [16])


def test_it_has_no_boxes_for_images_without_labels(teacher: List[Any]) -> None:
    with pytest.raises(ValueError, match="FGD needs boxes, and the teacher .* detects none"):
        build_model(distill_config("retinanet", teacher, ["FGD"], **WITHOUT_LABELS))
    build_model(distill_config("retinanet", teacher, ["PKD"], **WITHOUT_LABELS))


def test_it_cannot_be_inherited_from(teacher: List[Any]) -> None:
    cfg = distill_config("retinanet", teacher, DISTILL__INHERIT=["neck"])
    with pytest.raises(ValueError, match="no entry of the student's 'neck' matches"):
        build_model(cfg).inherit_from_teacher()


def test_it_cannot_label(teacher: List[Any]) -> None:
    cfg = distill_config("retinanet", teacher, ["PKD"])
    with pytest.raises(ValueError, match="'test_vit' has features and detects nothing"):
        load_detector(cfg, use_teacher=True)


def test_keys_that_only_detectors_read_are_told() -> None:
    cfg = distill_config("retinanet", ["DISTILL.TEACHER.BACKBONE", "test_vit"], ["PKD"])
    assert "a teacher that detects" in why_unread("DISTILL.TEACHER.MIN_AP", cfg)
    assert not why_unread("DISTILL.TEACHER.BACKBONE_STRIDES", cfg)
    cfg.DISTILL.TEACHER.BACKBONE = ""
    assert why_unread("DISTILL.TEACHER.BACKBONE_STRIDES", cfg) == "with DISTILL.TEACHER.BACKBONE"
    assert load_config().DISTILL.TEACHER.BACKBONE_STRIDES == [16]
