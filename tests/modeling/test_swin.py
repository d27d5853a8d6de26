"""Swin backbones from YAML: levels, strides and defaults."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import detectron2.modeling
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2kd import load_config
from tests.helpers.toys import batch, detector_config

has_swin = hasattr(detectron2.modeling, "SwinTransformer")
needs_swin = pytest.mark.skipif(not has_swin, reason="this Detectron2 has no Swin")

SMALL = {
    "MODEL__SWIN__EMBED_DIM": 8,
    "MODEL__SWIN__DEPTHS": [1, 1, 1, 1],
    "MODEL__SWIN__NUM_HEADS": [1, 1, 2, 2],
    "MODEL__SWIN__WINDOW_SIZE": 2,
    "MODEL__SWIN__DROP_PATH_RATE": 0.0,  # upstream's Swin needs timm for any other
}


def build(name: str, backbone: str, **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(
        detector_config(name, MODEL__BACKBONE__NAME=backbone, **{**SMALL, **overrides})
    )


@needs_swin
def test_two_stage_pyramid_has_a_pooled_p6() -> None:
    backbone = build("faster_rcnn", "build_swin_fpn_backbone").backbone
    assert {k: (v.channels, v.stride) for k, v in backbone.output_shape().items()} == {
        f"p{i}": (32, 2**i) for i in range(2, 7)
    }
    assert not list(backbone.top_block.parameters())


@needs_swin
def test_dense_pyramid_has_p6_and_p7_from_the_last_stage() -> None:
    backbone = build(
        "retinanet",
        "build_retinanet_swin_fpn_backbone",
        MODEL__SWIN__OUT_FEATURES=["p1", "p2", "p3"],
    ).backbone
    assert {k: v.stride for k, v in backbone.output_shape().items()} == {
        f"p{i}": 2**i for i in range(3, 8)
    }
    assert backbone.top_block.in_feature == "p3"  # of Swin: stride 32
    assert backbone.top_block.p6.in_channels == 8 * 2**3  # doubled three times


@needs_swin
@pytest.mark.parametrize(
    "name, backbone, stages",
    [
        ("faster_rcnn", "build_swin_fpn_backbone", ["p0", "p1", "p2", "p3"]),
        ("retinanet", "build_retinanet_swin_fpn_backbone", ["p1", "p2", "p3"]),
    ],
)
def test_swin_detector_trains(name: str, backbone: str, stages: Any) -> None:
    model = build(name, backbone, MODEL__SWIN__OUT_FEATURES=stages)
    with EventStorage():
        losses = model.train()(batch())
    assert all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    missing = [k for k, p in model.named_parameters() if p.grad is None]
    assert not missing, "DistributedDataParallel would wait for these"


@needs_swin
def test_keys_are_those_of_the_swin_that_is_built() -> None:
    pytest.importorskip("timm")
    keys = {"WINDOW_SIZE": 3, "DROP_PATH_RATE": 0.5, "FREEZE_AT": 1}
    values = {f"MODEL__SWIN__{k}": v for k, v in keys.items()}
    swin = build("faster_rcnn", "build_swin_fpn_backbone", **values).backbone.bottom_up
    assert swin.layers[0].window_size == 3 and swin.layers[3].blocks[0].drop_path.drop_prob == 0.5
    assert not any(p.requires_grad for p in swin.patch_embed.parameters())
    assert all(p.requires_grad for p in swin.layers.parameters())


@needs_swin
def test_defaults_are_swin_tiny_as_upstream_has_it() -> None:
    node = load_config().MODEL.SWIN
    parameters = inspect.signature(detectron2.modeling.SwinTransformer.__init__).parameters
    for key, name in (
        ("EMBED_DIM", "embed_dim"),
        ("DEPTHS", "depths"),
        ("NUM_HEADS", "num_heads"),
        ("WINDOW_SIZE", "window_size"),
        ("DROP_PATH_RATE", "drop_path_rate"),
        ("FREEZE_AT", "frozen_stages"),
    ):
        default = parameters[name].default
        assert node[key] == (list(default) if isinstance(default, tuple) else default), key


@pytest.mark.skipif(has_swin, reason="this Detectron2 has Swin")
def test_swin_is_refused_where_detectron2_lacks_it() -> None:
    with pytest.raises(ValueError, match="a Swin backbone needs .* came after 0.6"):
        build("faster_rcnn", "build_swin_fpn_backbone")


@needs_swin
def test_stochastic_depth_without_timm_is_refused_with_the_remedy(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="MODEL.SWIN.DROP_PATH_RATE is 0.1.*pip install timm"):
        build("faster_rcnn", "build_swin_fpn_backbone", MODEL__SWIN__DROP_PATH_RATE=0.1)


@needs_swin
@pytest.mark.parametrize(
    "key, value, words",
    [
        ("NUM_HEADS", [1, 1], r"DEPTHS \[1, 1, 1, 1\] and MODEL.SWIN.NUM_HEADS \[1, 1\] must be"),
        ("OUT_FEATURES", ["p4"], r"OUT_FEATURES must name some of p0, p1, p2, p3, got \['p4'\]"),
        ("OUT_FEATURES", [], r"OUT_FEATURES must name some of .* got \[\]"),
        ("EMBED_DIM", 0, "EMBED_DIM must be"),
        ("WINDOW_SIZE", 0, "WINDOW_SIZE must be"),
        ("DROP_PATH_RATE", 2.0, "DROP_PATH_RATE must be"),
    ],
)
def test_value_that_makes_no_swin_is_refused(key: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"MODEL.SWIN.{words}"):
        build("faster_rcnn", "build_swin_fpn_backbone", **{f"MODEL__SWIN__{key}": value})
