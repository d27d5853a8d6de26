"""FCOS from YAML: the detector of upstream's LazyConfig, with its values."""

import copy
import inspect
import math
from typing import Dict, List, Tuple

import pytest
import torch
from torch import Tensor, nn

import detectron2.modeling
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import EventStorage

from d2kd import load_config
from d2kd.conformance.cuda_autocast import cuda_autocast
from d2kd.conformance.half_precision import runs_in_float16
from tests.helpers.toys import batch, detector_config

has_fcos = hasattr(detectron2.modeling, "FCOS")
needs_fcos = pytest.mark.skipif(not has_fcos, reason="this Detectron2 has no FCOS")


@needs_fcos
def test_yaml_builds_upstream_s_class_with_the_values_of_the_yaml() -> None:
    # None of these is a default, of d2kd's or of upstream's.
    cfg = detector_config(
        "fcos",
        MODEL__FCOS__IN_FEATURES=["p3", "p4", "p5"],
        MODEL__FCOS__NUM_CONVS=3,
        MODEL__FCOS__NORM="",
        MODEL__FCOS__PRIOR_PROB=0.2,
        MODEL__FCOS__CENTER_SAMPLING_RADIUS=2.0,
        MODEL__FCOS__FOCAL_LOSS_ALPHA=0.4,
        MODEL__FCOS__FOCAL_LOSS_GAMMA=1.0,
        MODEL__FCOS__SCORE_THRESH_TEST=0.1,
        MODEL__FCOS__TOPK_CANDIDATES_TEST=50,
        MODEL__FCOS__NMS_THRESH_TEST=0.3,
        MODEL__PIXEL_MEAN=[1.0, 2.0, 3.0],
        MODEL__PIXEL_STD=[4.0, 5.0, 6.0],
        TEST__DETECTIONS_PER_IMAGE=7,
    )
    model = build_model(cfg)
    assert isinstance(model, detectron2.modeling.FCOS) and type(model).__name__ == "FCOS"
    assert model.head_in_features == ["p3", "p4", "p5"]
    assert (model.num_classes, model.head.cls_score.out_channels) == (3, 3)
    for tower in (model.head.cls_subnet, model.head.bbox_subnet):
        assert [type(x) for x in tower] == [nn.Conv2d, nn.ReLU] * 3
    # sigmoid(bias) = 0.2
    assert torch.allclose(model.head.cls_score.bias.sigmoid(), torch.tensor(0.2))
    assert model.center_sampling_radius == 2.0
    assert (model.focal_loss_alpha, model.focal_loss_gamma) == (0.4, 1.0)
    assert (model.test_score_thresh, model.test_topk_candidates) == (0.1, 50)
    assert (model.test_nms_thresh, model.max_detections_per_image) == (0.3, 7)
    assert model.pixel_mean.flatten().tolist() == [1.0, 2.0, 3.0]
    assert model.pixel_std.flatten().tolist() == [4.0, 5.0, 6.0]


@needs_fcos
def test_defaults_are_those_of_upstream() -> None:
    node = load_config().MODEL.FCOS
    defaults = {
        name: parameter.default
        for cls in (detectron2.modeling.FCOS,)
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
    }
    pairs = {
        "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
        "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
        "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
        "test_score_thresh": node.SCORE_THRESH_TEST,
        "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
        "test_nms_thresh": node.NMS_THRESH_TEST,
    }
    assert {k: defaults[k] for k in pairs} == pairs
    assert math.isclose(node.PRIOR_PROB, 0.01)
    # Of the towers as its LazyConfig has them
    head = build_model(detector_config("fcos", MODEL__FCOS__NORM=node.NORM)).head
    assert isinstance(head.cls_subnet[1], nn.GroupNorm) and node.NUM_CONVS == 4


@needs_fcos
def test_extra_levels_come_from_p5() -> None:
    model = build_model(detector_config("fcos"))
    assert model.backbone.top_block.in_feature == "p5"
    assert {k: v.stride for k, v in model.backbone.output_shape().items()} == {
        f"p{i}": 2**i for i in range(3, 8)
    }


@needs_fcos
def test_fcos_trains_and_detects() -> None:
    torch.manual_seed(0)
    model = build_model(detector_config("fcos"))
    with EventStorage():
        losses = model.train()(batch())
    assert set(losses) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert [set(x) for x in model.eval()(batch())] == [{"instances"}] * 2


def losses_and_gradients(model: nn.Module) -> Tuple[Dict[str, Tensor], List[Tensor]]:
    torch.manual_seed(0)
    with EventStorage():
        losses = model.train()(batch())
    sum(losses.values()).backward()
    return losses, [p.grad for p in model.parameters()]


@needs_fcos
def test_losses_are_those_of_upstream_to_the_bit() -> None:
    torch.manual_seed(0)
    ours = build_model(detector_config("fcos"))
    theirs = copy.deepcopy(ours)
    theirs.__class__ = detectron2.modeling.FCOS
    # TorchScript's focal loss rounds otherwise the first times, when it is not optimised yet.
    with torch.jit.optimized_execution(False):
        found, expected = (losses_and_gradients(model) for model in (ours, theirs))
    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1]))


@needs_fcos
@pytest.mark.skipif(not runs_in_float16(), reason="this PyTorch has no float16 on CPUs")
@pytest.mark.parametrize("boxes", [2, 0])
def test_fcos_trains_under_float16_autocast(boxes: int) -> None:
    torch.manual_seed(0)
    model = build_model(detector_config("fcos")).train()
    with EventStorage(), cuda_autocast():
        losses = model(batch(boxes=boxes))
    assert all(x.dtype == torch.float32 and x.isfinite() for x in losses.values()), losses
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@needs_fcos
@pytest.mark.parametrize("key, value", [("NUM_CONVS", 0), ("CENTER_SAMPLING_RADIUS", 0.0)])
def test_value_with_which_nothing_is_built_or_learnt_is_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"MODEL\.FCOS\.{key} must be .*, got {value}"):
        build_model(detector_config("fcos", **{f"MODEL__FCOS__{key}": value}))


@pytest.mark.skipif(has_fcos, reason="this Detectron2 has FCOS")
def test_fcos_is_refused_where_detectron2_lacks_it() -> None:
    assert "FCOS" in META_ARCH_REGISTRY
    with pytest.raises(ValueError, match="MODEL.META_ARCHITECTURE: FCOS needs .* came with 0.6"):
        build_model(detector_config("fcos"))
