"""timm's models with an FPN, from YAML: MobileNet, EfficientNet-Lite, RepViT, ConvNeXt, ..."""

import importlib
import math
from types import ModuleType
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7

from ..utils.checks import check_choice, check_range, nearest
from .pyramid import build_pyramid

NORMS = ("BN", "SyncBN", "EvalBN", "FrozenBN")


def import_timm(wanted_by: str) -> ModuleType:
    """
    Args:
        wanted_by: config key and value, for the error

    Raises:
        ValueError: timm is not installed
    """
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError:
        raise ValueError(
            f"{wanted_by} needs timm, which is not installed. Run `pip install timm`."
        ) from None


def create_timm(key: str, name: str, **options: Any) -> nn.Module:
    """
    timm.create_model, without weights.

    Args:
        key: the config key that has the name, for errors

    Raises:
        ValueError: timm is missing, has no such model, or the model does not take the options
    """
    timm = import_timm(f"{key} {name!r}")
    if not timm.is_model(name):
        similar = ", ".join(nearest(name.split(".")[0], timm.list_models(), 3)) or "none similar"
        raise ValueError(f"{key}: timm {timm.__version__} has no {name!r} ({similar}).")
    try:
        return timm.create_model(name, pretrained=False, **options)
    except Exception as error:  # whatever a model says to arguments that it does not take
        raise ValueError(
            f"{key}: {name!r} cannot be built with {options}: {type(error).__name__}: {error}"
        ) from error


class Images(NamedTuple):
    """What a detector's images are: the order of their channels, and (x - mean) / std."""

    order: str
    mean: Tuple[float, ...]
    std: Tuple[float, ...]


class TimmBackbone(Backbone):
    """
    Feature maps of a timm model at several strides, "stride4", "stride8", ..., each (N, C, H, W).

    In training mode, BatchNorms that are frozen keep their statistics.
    """

    def __init__(
        self,
        net: nn.Module,
        images: Images,
        norm: str = "BN",
        freeze_to_stride: int = 0,
        has_more: bool = False,
    ):
        """
        Args:
            net: from timm.create_model(..., features_only=True)
            images: what it is fed, to be compared with what its weights were trained on
            norm: what its BatchNorms do: "BN" train, "SyncBN" with statistics of all processes,
                "EvalBN" train weight and bias only, "FrozenBN" stay as they are
            freeze_to_stride: what the features of this stride depend on is not trained; 0: all is
            has_more: the model has features beside these; some of timm's keep the layers of those
        """
        super().__init__()
        strides = net.feature_info.reduction()
        self._out_features = [f"stride{x}" for x in strides]
        self._out_feature_strides = dict(zip(self._out_features, strides))
        self._out_feature_channels = dict(zip(self._out_features, net.feature_info.channels()))
        if norm == "SyncBN":
            net = import_timm("MODEL.TIMM.NORM SyncBN").layers.convert_sync_batchnorm(net)
        self.net, self.images, self.norm = net, images, norm
        self._channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
        if has_more:  # otherwise DistributedDataParallel would wait for their gradients
            used = set(self._parameters_of(len(strides)))
            frozen = [x for x in net.parameters() if x not in used]
        else:
            frozen = []
        if freeze_to_stride:
            frozen += self._parameters_of(1 + strides.index(freeze_to_stride))
        for parameter in frozen:
            parameter.requires_grad_(False)
        if norm == "FrozenBN":
            for batch_norm in self._batch_norms():
                batch_norm.requires_grad_(False)
        self.train()

    def forward(self, images: Tensor) -> Dict[str, Tensor]:
        """
        Args:
            images: (N, C, H, W), normalised
        """
        features = self.net(images)
        if self._channels_last:
            features = [x.permute(0, 3, 1, 2).contiguous() for x in features]
        return dict(zip(self._out_features, features))

    def train(self, mode: bool = True) -> "TimmBackbone":
        super().train(mode)
        for batch_norm in self._batch_norms():
            if self.norm == "EvalBN" or not batch_norm.weight.requires_grad:
                batch_norm.eval()
        return self

    def _batch_norms(self) -> List[_BatchNorm]:
        return [x for x in self.net.modules() if isinstance(x, _BatchNorm) and x.affine]

    def _parameters_of(self, count: int) -> List[nn.Parameter]:
        """
        Those that the first `count` feature maps depend on. The gradient tells: timm's nets nest
        and name their stages in many ways.
        """
        parameters = list(self.net.parameters())
        channels = len(self.images.mean)  # the first convolution may have more, of a folded image
        side = self._out_feature_strides[self._out_features[-1]]
        with torch.enable_grad():
            features = self.net.eval()(torch.zeros(1, channels, side, side))[:count]
            total = sum(x.sum() for x in features)
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return [x for x, gradient in zip(parameters, gradients) if gradient is not None]


def build_timm(cfg: CfgNode, input_shape: ShapeSpec, strides: Sequence[int]) -> TimmBackbone:
    """
    Build the model of MODEL.TIMM without weights.

    Args:
        strides: of the wanted feature maps, where MODEL.TIMM.STRIDES is empty

    Raises:
        ValueError: timm is missing, or a value is wrong
    """
    node = cfg.MODEL.TIMM
    strides = list(node.STRIDES or strides)
    check_choice("MODEL.TIMM.NORM", node.NORM, NORMS)
    check_range("MODEL.TIMM.DROP_PATH_RATE", node.DROP_PATH_RATE, 0, 1)
    if node.FREEZE_TO_STRIDE not in (0, *strides):
        raise ValueError(
            f"MODEL.TIMM.FREEZE_TO_STRIDE must be 0 or one of the strides {strides}, got "
            f"{node.FREEZE_TO_STRIDE}."
        )
    options: Dict[str, Any] = {"features_only": True, "in_chans": input_shape.channels}
    if node.DROP_PATH_RATE:
        options["drop_path_rate"] = node.DROP_PATH_RATE
    net = create_timm("MODEL.TIMM.NAME", node.NAME, **options)
    found = net.feature_info.reduction()
    # Of several with a stride the last. Some nets count one more that is not among them.
    last = {x["reduction"]: x["index"] for x in net.feature_info.get_dicts()}
    doubling = all(b == 2 * a for a, b in zip(strides, strides[1:]))
    if not doubling or any(x not in last for x in strides):
        raise ValueError(
            f"MODEL.TIMM.STRIDES must be of {sorted(set(found))}, each twice the one before, as "
            f"{node.NAME} has features there; got {strides}."
        )
    if net.pretrained_cfg.get("fixed_input_size"):
        raise ValueError(
            f"MODEL.TIMM.NAME: {node.NAME} takes images of {net.pretrained_cfg['input_size'][1:]} "
            "pixels only; a detector's differ in size."
        )
    if found != strides:  # without the stages behind the last one
        net = create_timm(
            "MODEL.TIMM.NAME", node.NAME, out_indices=[last[x] for x in strides], **options
        )
    mean, std = tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD)
    images = Images(cfg.INPUT.FORMAT, mean, std)
    # An HRNet makes all of its features at its end, so that finer ones may be left over, too.
    has_more = strides[-1] < max(found) or type(net).__name__ == "HighResolutionNetFeatures"
    backbone = TimmBackbone(net, images, node.NORM, node.FREEZE_TO_STRIDE, has_more)
    if node.NORM != "BN" and not backbone._batch_norms():
        raise ValueError(f"MODEL.TIMM.NORM: {node.NAME} has no BatchNorm; leave it at 'BN'.")
    return backbone


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """P2 to P5 and a pooled P6, for two-stage detectors."""
    bottom_up = build_timm(cfg, input_shape, (4, 8, 16, 32))
    return build_pyramid(cfg, bottom_up, list(bottom_up.output_shape()), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """P3 to P5, and P6 and P7 convolved from P5, for RetinaNet, FCOS and RepPoints."""
    bottom_up, channels = build_timm(cfg, input_shape, (8, 16, 32)), cfg.MODEL.FPN.OUT_CHANNELS
    features = bottom_up.output_shape()
    last = int(math.log2(max(x.stride for x in features.values())))
    top_block = LastLevelP6P7(channels, channels, in_feature=f"p{last}")
    return build_pyramid(cfg, bottom_up, list(features), top_block)
