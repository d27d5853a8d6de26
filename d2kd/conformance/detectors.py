"""Small detectors of every family: Detectron2's, so narrow and shallow that steps are fast."""

import os
from functools import reduce
from typing import Any, Dict, List, Mapping, Sequence

import torch
import yaml
from torch import nn

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from ..config import load_config
from ..modeling import RepPoints
from ..modeling.reppoints.points import PointConv
from . import backbones  # noqa: F401, registers what is named below

NUM_CLASSES = 3

_NARROW = {
    "VERSION": 2,
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.FPN.NORM": "BN",
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "SEED": 1,
}

_RETINANET = {
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_shallow_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
    "MODEL.RETINANET.NUM_CLASSES": NUM_CLASSES,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.RETINANET.NORM": "GN",
}

_FASTER_RCNN = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": "build_shallow_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 60,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 60,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
}

_MASK_RCNN = {
    **_FASTER_RCNN,
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
}

_CASCADE_RCNN = {
    **_FASTER_RCNN,
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
}

_FCOS = {
    "MODEL.META_ARCHITECTURE": "FCOS",
    "MODEL.BACKBONE.NAME": "build_shallow_fcos_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FCOS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.FCOS.NUM_CONVS": 1,
}

_REPPOINTS = {
    "MODEL.META_ARCHITECTURE": "RepPoints",
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.REPPOINTS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.REPPOINTS.NUM_CONVS": 1,
}

DETECTORS = {
    "retinanet": _RETINANET,
    "faster_rcnn": _FASTER_RCNN,
    "mask_rcnn": _MASK_RCNN,
    "cascade_rcnn": _CASCADE_RCNN,
    "fcos": _FCOS,
    "reppoints": _REPPOINTS,
}


def detector_config(name: str, **overrides: Any) -> CfgNode:
    """
    Config of a toy detector.

    Args:
        name: a key of DETECTORS
        overrides: config keys with "__" for ".", such as MODEL__FPN__OUT_CHANNELS=64
    """
    return load_config(opts=[word for pair in _values(name, overrides).items() for word in pair])


def _values(name: str, overrides: Mapping[str, Any]) -> Dict[str, Any]:
    """What a toy detector's config says beyond the defaults, by dotted keys."""
    return {**_NARROW, **DETECTORS[name], **{k.replace("__", "."): v for k, v in overrides.items()}}


def _as_yaml(values: Mapping[str, Any]) -> str:
    """A YAML of dotted keys; read in no time, as that of a whole config is not."""
    tree: Dict[str, Any] = {}
    for key, value in values.items():
        *above, last = key.split(".")
        node = reduce(lambda node, name: node.setdefault(name, {}), above, tree)
        node[last] = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(tree)


def write_teacher(folder: Any, name: str, seed: int = 7, **overrides: Any) -> List[Any]:
    """
    Write a toy teacher's YAML and random weights with matching BatchNorm statistics.

    Returns:
        DISTILL.TEACHER.* as KEY, VALUE, ... for load_config
    """
    cfg = detector_config(name, **overrides)
    config_file, weights = os.path.join(folder, f"{name}.yaml"), os.path.join(folder, f"{name}.pth")
    with open(config_file, "w") as file:
        file.write(_as_yaml(_values(name, overrides)))
    torch.manual_seed(seed)
    model = build_model(cfg).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches, for which a few are enough
    with torch.no_grad(), EventStorage():
        for _ in range(4):  # without, eval mode explodes
            model.backbone(torch.randn(2, 3, 64, 64) * 60)  # pixels minus mean
    torch.save({"model": model.state_dict()}, weights)
    return ["DISTILL.TEACHER.CONFIG_FILE", config_file, "DISTILL.TEACHER.WEIGHTS", weights]


def classifier(detector: nn.Module) -> nn.Module:
    """The layer of a toy detector that computes the class logits."""
    has_regions = hasattr(detector, "roi_heads")
    return (detector.roi_heads.box_predictor if has_regions else detector.head).cls_score


def enliven(detector: nn.Module) -> None:
    """
    Randomise the head of a new toy detector, so that predictions vary with cells and classes.

    With Detectron2's initialisation it predicts background everywhere, which teaches nothing.
    """
    layers = [classifier(detector)]
    nn.init.zeros_(layers[0].bias)
    if hasattr(detector, "head"):
        layers += [*detector.head.cls_subnet, *detector.head.bbox_subnet]
    if isinstance(detector, RepPoints):  # whose boxes would be the same everywhere, too
        # Where all points of a cell are outside the map, its logits are these.
        nn.init.normal_(layers[0].bias)
        layers += [x for x in detector.head.modules() if isinstance(x, PointConv)]
        layers += [*detector.head.init_points, detector.head.refine_points]
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear, PointConv)):
            nn.init.kaiming_normal_(layer.weight)
        if getattr(layer, "weight", None) is not None and layer.weight.shape[2:] == (3, 3):
            # On a level with a single cell only the centre weight of 9 has an effect.
            layer.weight.data[:, :, 1, 1] *= 3


def distill_config(
    student: str, teacher_opts: Sequence[Any], heads: Sequence[str] = ("MGD",), **overrides: Any
) -> CfgNode:
    """Config of a toy distillation run; see detector_config and write_teacher."""
    cfg = detector_config(student, **overrides)
    cfg.DISTILL.STUDENT_META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.DISTILL.HEADS = list(heads)
    cfg.merge_from_list(list(teacher_opts))
    return cfg
