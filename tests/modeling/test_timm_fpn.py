"""timm's models as backbones from YAML: levels, what is frozen, errors; as student and teacher."""

from pathlib import Path
from typing import Any, List, Sequence

import pytest
import torch
from torch import nn

from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage

from d2kd.checkpoint import PlainCheckpointer, load_whole_detector
from d2kd.modeling.timm_fpn import Images, TimmBackbone
from tests.helpers.toys import detector_config, distill_config, write_teacher
from tests.helpers.view_toys import masked_batch, needs_fcos

timm = pytest.importorskip("timm")

TWO_STAGE, DENSE = "build_timm_fpn_backbone", "build_retinanet_timm_fpn_backbone"
BUILDER = {
    "retinanet": DENSE,
    "reppoints": DENSE,
    "fcos": DENSE,
    "faster_rcnn": TWO_STAGE,
    "mask_rcnn": TWO_STAGE,
    "cascade_rcnn": TWO_STAGE,
}
DETECTORS_HERE = [pytest.param(x, marks=needs_fcos if x == "fcos" else ()) for x in BUILDER]


def timm_keys(name: str, net: str = "test_efficientnet", **keys: Any) -> Any:
    """Overrides of a toy detector; keys: of MODEL.TIMM."""
    own = {f"MODEL__TIMM__{k}": v for k, v in keys.items()}
    return {"MODEL__BACKBONE__NAME": BUILDER[name], "MODEL__TIMM__NAME": net, **own}


def build(name: str, net: str = "test_efficientnet", **keys: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(detector_config(name, **timm_keys(name, net, **keys)))


def strides(model: nn.Module) -> Any:
    return {k: v.stride for k, v in model.backbone.output_shape().items()}


def test_pyramids_have_the_levels_that_detectors_expect() -> None:
    assert strides(build("faster_rcnn")) == {f"p{i}": 2**i for i in range(2, 7)}
    assert strides(build("retinanet")) == {f"p{i}": 2**i for i in range(3, 8)}
    assert strides(build("retinanet", STRIDES=[4, 8, 16, 32])) == {
        f"p{i}": 2**i for i in range(2, 8)
    }


def test_pyramid_is_built_by_the_keys_of_fpn() -> None:
    pyramid = build("retinanet").backbone
    assert isinstance(pyramid.fpn_lateral3.norm, nn.BatchNorm2d) and pyramid._fuse_type == "sum"
    keys = {"MODEL__FPN__NORM": "GN", "MODEL__FPN__FUSE_TYPE": "avg"}
    cfg = detector_config("retinanet", **timm_keys("retinanet"), **keys)
    pyramid = build_model(cfg).backbone
    assert isinstance(pyramid.fpn_lateral3.norm, nn.GroupNorm) and pyramid._fuse_type == "avg"


# Three ways in which timm returns features, one of them with channels last; without and with a
# stage of stride 2.
@pytest.mark.parametrize(
    "net", ["test_efficientnet", "test_resnet", "test_convnext", "mambaout_femto"]
)
def test_features_are_channels_first_and_cells_cover_the_image(net: str) -> None:
    bottom_up = build("retinanet", net).backbone.bottom_up.eval()
    with torch.no_grad():
        features = bottom_up(torch.zeros(2, 3, 96, 128))
    assert {k: tuple(x.shape) for k, x in features.items()} == {
        k: (2, v.channels, 96 // v.stride, 128 // v.stride)
        for k, v in bottom_up.output_shape().items()
    }
    assert list(features) == ["stride8", "stride16", "stride32"]


@pytest.mark.parametrize("name", DETECTORS_HERE)
def test_detector_trains_every_parameter(name: str) -> None:
    model = build(name).train()
    with EventStorage():
        losses = model(masked_batch())
    assert all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    missing = [k for k, p in model.named_parameters() if p.grad is None]
    assert not missing, "DistributedDataParallel would wait for these"


def test_stages_behind_the_last_stride_are_not_built() -> None:
    cfg = detector_config("retinanet", **timm_keys("retinanet", "test_resnet", STRIDES=[8, 16]))
    short = build_backbone(cfg)
    assert {k: v.stride for k, v in short.output_shape().items()} == {
        f"p{i}": 2**i for i in range(3, 7)
    }
    assert not [k for k, _ in short.named_parameters() if "layer4" in k]


# What makes coarser features, and what makes the finest one of several that are made at once.
@pytest.mark.parametrize(
    "net, strides", [("test_efficientnet", [8, 16]), ("hrnet_w18_small", [8, 16, 32])]
)
def test_layers_that_timm_keeps_for_other_features_wait_for_no_gradient(
    net: str, strides: List[int]
) -> None:
    cfg = detector_config("retinanet", **timm_keys("retinanet", net, STRIDES=strides))
    backbone = build_backbone(cfg)
    sum(x.sum() for x in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    trained = {k: p for k, p in backbone.bottom_up.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    assert 0 < len(trained) < len(list(backbone.bottom_up.parameters()))


# What training leaves alone -----------------------------------------------------------------------


def changed_by_a_step(model: nn.Module) -> List[str]:
    """Names of the entries of its timm net that a training step changes."""
    net = model.backbone.bottom_up.net
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with EventStorage():
        sum(model.train()(masked_batch()).values()).backward()
    optimizer.step()
    return [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]


def is_statistic(key: str) -> bool:
    return key.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_batch_norms_train_unless_told_otherwise() -> None:
    assert any(map(is_statistic, changed_by_a_step(build("retinanet"))))


def test_eval_batch_norms_train_weight_and_bias_alone() -> None:
    changed = changed_by_a_step(build("retinanet", NORM="EvalBN"))
    assert not any(map(is_statistic, changed))
    assert "bn1.weight" in changed and "bn1.bias" in changed


def test_frozen_batch_norms_do_not_change_and_convolutions_do() -> None:
    changed = changed_by_a_step(build("retinanet", NORM="FrozenBN"))
    assert "conv_stem.weight" in changed
    assert not [k for k in changed if "bn" in k or is_statistic(k)]


def test_sync_batch_norms_are_pytorchs_and_keep_their_names() -> None:
    plain, sync = (build("retinanet", NORM=x).backbone.bottom_up for x in ("BN", "SyncBN"))
    assert any(isinstance(x, nn.SyncBatchNorm) for x in sync.modules())
    assert list(plain.state_dict()) == list(sync.state_dict())


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_frozen_stride_leaves_all_before_it_alone_and_trains_all_behind(norm: str) -> None:
    changed = changed_by_a_step(build("retinanet", "test_resnet", FREEZE_TO_STRIDE=8, NORM=norm))
    # test_resnet: stride 8 is the output of layer2.
    assert changed and all(k.startswith(("layer3", "layer4")) for k in changed)


def test_image_that_the_first_convolution_sees_folded_has_three_channels_still() -> None:
    """A TResNet's has 48: of each block of 4x4 pixels, all values."""
    net = build("retinanet", "tresnet_m", FREEZE_TO_STRIDE=8).backbone.bottom_up.net
    trained = {k for k, p in net.named_parameters() if p.requires_grad}
    assert trained and all(k.startswith(("body_layer3", "body_layer4")) for k in trained)


def test_frozen_batch_norms_stay_in_eval_mode_from_the_start() -> None:
    bottom_up = build("retinanet", "test_resnet", FREEZE_TO_STRIDE=8).backbone.bottom_up
    for net in (bottom_up.net, bottom_up.train().net):
        training = [k for k, x in net.named_modules() if x.training and hasattr(x, "running_var")]
        assert training and all(k.startswith(("layer3", "layer4")) for k in training)


def test_drop_path_reaches_the_net() -> None:
    drops = lambda model: [x for x in model.modules() if type(x).__name__ == "DropPath"]  # noqa
    assert not drops(build("retinanet", "test_convnext"))
    assert drops(build("retinanet", "test_convnext", DROP_PATH_RATE=0.2))


# As student and teacher ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS_HERE)
@pytest.mark.parametrize("of_timm", [("student",), ("teacher",), ("student", "teacher")])
def test_distillation_step_trains_the_student_alone(
    name: str, of_timm: Sequence[str], tmp_path: Path
) -> None:
    keys = {x: timm_keys(name) if x in of_timm else {} for x in ("student", "teacher")}
    opts = write_teacher(tmp_path, name, **keys["teacher"])
    torch.manual_seed(0)
    cfg = distill_config(name, opts, DISTILL__INHERIT=["neck", "head"], **keys["student"])
    distiller = build_model(cfg).train()
    with EventStorage():
        losses = distiller(masked_batch())
    sum(losses.values()).backward()
    trained = [*distiller.student.parameters(), *distiller.heads.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert all(p.grad is None for p in distiller.teacher.model.parameters())
    PlainCheckpointer(distiller, str(tmp_path)).save("run")
    student = build_model(detector_config(name, **keys["student"]))
    load_whole_detector(student, str(tmp_path / "run.pth"), "KEY")


def test_images_have_as_many_channels_as_means() -> None:
    grey = {"MODEL__PIXEL_MEAN": [128.0], "MODEL__PIXEL_STD": [64.0], "INPUT__FORMAT": "L"}
    cfg = detector_config("retinanet", **timm_keys("retinanet"), **grey)
    bottom_up = build_model(cfg).backbone.bottom_up
    assert bottom_up.images == Images("L", (128.0,), (64.0,))
    assert next(bottom_up.net.parameters()).shape[1] == 1


def test_norm_without_weights_trains_as_its_model_has_it() -> None:
    net = timm.create_model("test_efficientnet", features_only=True)
    net.of_its_own = nn.BatchNorm2d(4, affine=False)
    images = Images("RGB", (0.0,) * 3, (1.0,) * 3)
    assert TimmBackbone(net, images, "EvalBN").train().net.of_its_own.training


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({"net": "mobilenetv3_larje_100"}, r"MODEL\.TIMM\.NAME.*no 'mobilenetv3_larje_100'.*large"),
        (
            {"net": "visformer_tiny"},
            r"MODEL\.TIMM\.NAME: visformer_tiny takes images of \(224, 224\)",
        ),
        ({"net": "test_vit"}, r"MODEL\.TIMM\.STRIDES must be of \[16\]"),
        ({"STRIDES": [8, 32]}, r"MODEL\.TIMM\.STRIDES.*twice the one before.*got \[8, 32\]"),
        ({"STRIDES": [8, 16, 32, 64]}, r"MODEL\.TIMM\.STRIDES must be of \[2, 4, 8, 16, 32\]"),
        ({"NORM": "GN"}, r"MODEL\.TIMM\.NORM must be one of BN, .*'GN'"),
        ({"net": "test_convnext", "NORM": "FrozenBN"}, r"MODEL\.TIMM\.NORM: test_convnext has no"),
        ({"FREEZE_TO_STRIDE": 2}, r"MODEL\.TIMM\.FREEZE_TO_STRIDE must be 0 or one of .*got 2"),
        ({"DROP_PATH_RATE": 1.5}, r"MODEL\.TIMM\.DROP_PATH_RATE must be in \[0, 1\], got 1\.5"),
        ({"net": "hrnet_w18_small", "DROP_PATH_RATE": 0.5}, r"MODEL\.TIMM\.NAME.*drop_path_rate"),
    ],
)
def test_bad_values_are_refused(keys: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        build("retinanet", **keys)


def test_missing_timm_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(
        ValueError, match="MODEL.TIMM.NAME 'test_efficientnet' needs timm.*pip install timm"
    ):
        build("retinanet")
