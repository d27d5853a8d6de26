"""Teachers that pad to a square: cells line up with the student's, and nothing is cut off."""

from pathlib import Path
from typing import Any, List, Tuple

import pytest
import torch
from torch import Tensor

from detectron2 import config as detectron2_config
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2kd.engine.preflight.summary import summary
from d2kd.pairing.levels import match_levels
from d2kd.teacher import build_teacher
from tests.helpers.toys import batch, distill_config

# A RetinaNet on ViTDet's backbone, without weights.
VIT = """
from functools import partial

import torch.nn as nn
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import SimpleFeaturePyramid, ViT
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead

model = L(RetinaNet)(
    backbone=L(SimpleFeaturePyramid)(
        net=L(ViT)(
            img_size=128, patch_size=16, embed_dim=16, depth=1, num_heads=2, use_abs_pos=False,
            norm_layer=partial(nn.LayerNorm, eps=1e-6), out_feature="last_feat",
        ),
        in_feature="last_feat", out_channels=32, scale_factors=(2.0, 1.0, 0.5),
        top_block=L(LastLevelMaxPool)(), norm="LN", square_pad=128,
    ),
    head=L(RetinaNetHead)(
        input_shape=[ShapeSpec(channels=32)] * 3, num_classes=3, conv_dims=[32],
        prior_prob=0.01, num_anchors=1,
    ),
    anchor_generator=L(DefaultAnchorGenerator)(
        sizes=[[16], [32], [64]], aspect_ratios=[1.0], strides=[8, 16, 32], offset=0.0
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    anchor_matcher=L(Matcher)(
        thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
    num_classes=3,
    head_in_features=["p3", "p4", "p5"],
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
)
"""


@pytest.fixture
def vit(tmp_path: Path) -> List[Any]:
    """DISTILL.TEACHER.* of it."""
    pytest.importorskip("detectron2.modeling.backbone.vit", reason="this Detectron2 has no ViT")
    pytest.importorskip("timm")
    (tmp_path / "vit.py").write_text(VIT)
    config_file = str(tmp_path / "vit.py")
    return [
        "DISTILL.TEACHER.CONFIG_FILE",
        config_file,
        "DISTILL.TEACHER.ALLOW_RANDOM_WEIGHTS",
        True,
    ]


def center_of_mass(x: Tensor) -> Tuple[float, float]:
    """Row and column of the mean cell of an (H, W) map of weights."""
    share = x / x.sum()
    rows, columns = (torch.arange(n, dtype=x.dtype) for n in x.shape)
    return (share.sum(1) @ rows).item(), (share.sum(0) @ columns).item()


def test_maps_are_cropped_to_the_student_s_and_a_spot_is_in_the_same_cell_of_both(
    vit: List[Any],
) -> None:
    torch.manual_seed(0)
    distiller = build_model(
        distill_config("retinanet", vit, INPUT__MAX_SIZE_TRAIN=128, INPUT__MAX_SIZE_TEST=128)
    ).train()
    plain, spot = batch(height=64, width=96), batch(height=64, width=96)
    for x, y in zip(plain, spot):
        x["image"] = torch.full((3, 64, 96), 100, dtype=torch.uint8)
        y["image"] = x["image"].clone()
        y["image"][:, 32:48, 64:80] = 255  # on P4, of stride 16: row 2, column 4

    @torch.no_grad()
    def matched(inputs: Any) -> Any:
        distiller.student.eval()
        student = distiller.student_view(distiller.student, inputs)
        teacher = distiller.view_of_teacher(inputs)
        assert teacher.features["p4"].shape[-2:] == (8, 8), "128 / 16: the whole square"
        levels = match_levels(distiller.pair.levels, student.features, teacher.features)
        return {level: (x, target) for level, x, target in levels}

    before, after = matched(plain), matched(spot)
    for old, new in zip(before["p4"], after["p4"]):
        assert new.shape[-2:] == (4, 6), "64 x 96 at stride 16"
        row, column = center_of_mass((new - old).square().sum(1)[0])
        assert abs(row - 2) < 0.6 and abs(column - 4) < 0.6
    assert "the teacher pads every image to 128 x 128" in summary(distiller)


def test_step_with_a_square_teacher_trains_the_student(vit: List[Any]) -> None:
    cfg = distill_config("retinanet", vit, INPUT__MAX_SIZE_TRAIN=128, INPUT__MAX_SIZE_TEST=128)
    distiller = build_model(cfg).train()
    with EventStorage():
        losses = distiller(batch(height=64, width=96))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.student.parameters())


@pytest.mark.parametrize("key", ["MAX_SIZE_TRAIN", "MAX_SIZE_TEST"])
def test_images_larger_than_the_square_are_refused(key: str, vit: List[Any]) -> None:
    sizes = {"INPUT__MAX_SIZE_TRAIN": 128, "INPUT__MAX_SIZE_TEST": 128, f"INPUT__{key}": 129}
    with pytest.raises(ValueError, match=rf"INPUT\.{key} is 129, but .* 128 x 128.*128 or less"):
        build_teacher(distill_config("retinanet", vit, **sizes))


@pytest.mark.parametrize("part, shorter", [("TRAIN", (64, 0)), ("TEST", 0)])
def test_images_that_no_size_bounds_are_refused(part: str, shorter: Any, vit: List[Any]) -> None:
    # Detectron2 leaves an image as it is where its shorter side shall have 0 pixels.
    sizes = {"INPUT__MAX_SIZE_TRAIN": 128, "INPUT__MAX_SIZE_TEST": 128}
    sizes[f"INPUT__MIN_SIZE_{part}"] = shorter
    with pytest.raises(ValueError, match=rf"INPUT\.MIN_SIZE_{part} is .*0.* 128 x 128"):
        build_teacher(distill_config("retinanet", vit, **sizes))


def test_missing_package_of_a_lazy_config_is_named_with_the_remedy(tmp_path: Path) -> None:
    if not hasattr(detectron2_config, "LazyConfig"):
        pytest.skip("this Detectron2 has no LazyConfig")
    (tmp_path / "x.py").write_text("import no_such_package.layers")
    opts = ["DISTILL.TEACHER.CONFIG_FILE", str(tmp_path / "x.py")]
    opts += ["DISTILL.TEACHER.ALLOW_RANDOM_WEIGHTS", True]
    with pytest.raises(ValueError, match="Run `pip install no_such_package`"):
        build_teacher(distill_config("retinanet", opts))
