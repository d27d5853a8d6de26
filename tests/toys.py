"""Small detectors and batches that the tests share: real Detectron2 models, narrow ones."""

import os
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import torch

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2kd import load_config
from d2kd.pyramid import LevelPair
from d2kd.views import DetectorView

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
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
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
    "MODEL.RETINANET.NUM_CLASSES": NUM_CLASSES,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.RETINANET.NORM": "GN",
}

_FASTER_RCNN = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
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
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 60,
}

_FCOS = {
    "MODEL.META_ARCHITECTURE": "FCOS",
    "MODEL.BACKBONE.NAME": "build_fcos_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FCOS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.FCOS.NUM_CONVS": 1,
}

DETECTORS = {
    "retinanet": _RETINANET,
    "faster_rcnn": _FASTER_RCNN,
    "mask_rcnn": _MASK_RCNN,
    "cascade_rcnn": _CASCADE_RCNN,
    "fcos": _FCOS,
}


def detector_config(name: str, **overrides: Any) -> CfgNode:
    """
    Config of a toy detector.

    Args:
        name: a key of DETECTORS
        overrides: config keys with "__" for ".", such as MODEL__FPN__OUT_CHANNELS=64
    """
    values = {**_NARROW, **DETECTORS[name]}
    values.update({k.replace("__", "."): v for k, v in overrides.items()})
    return load_config(opts=[word for pair in values.items() for word in pair])


def write_teacher(folder: Any, name: str, seed: int = 7, **overrides: Any) -> List[Any]:
    """
    Write a toy teacher's YAML and weights: random ones, with BatchNorm statistics that fit.

    Returns:
        DISTILL.TEACHER.* as KEY, VALUE, ... for load_config
    """
    cfg = detector_config(name, **overrides)
    config_file, weights = os.path.join(folder, f"{name}.yaml"), os.path.join(folder, f"{name}.pth")
    with open(config_file, "w") as file:
        file.write(cfg.dump())
    torch.manual_seed(seed)
    model = build_model(cfg).train()
    with torch.no_grad(), EventStorage():
        for _ in range(30):  # enough for the running averages; without, eval mode explodes
            model.backbone(torch.randn(2, 3, 64, 64) * 60)  # pixels minus mean
    torch.save({"model": model.state_dict()}, weights)
    return ["DISTILL.TEACHER.CONFIG_FILE", config_file, "DISTILL.TEACHER.WEIGHTS", weights]


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


def batch(num_images: int = 2, boxes: int = 2, height: int = 64, width: int = 64, seed: int = 0):
    """
    Detectron2's training input: images of noise, each with `boxes` boxes.

    Returns:
        list of {"image": (3, height, width) uint8, "instances", "file_name", "height", "width"}
    """
    generator = torch.Generator().manual_seed(seed)
    inputs: List[Dict[str, Any]] = []
    for i in range(num_images):
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        corner = torch.rand(boxes, 2, generator=generator) * torch.tensor([width, height]) * 0.5
        size = 8 + torch.rand(boxes, 2, generator=generator) * (min(height, width) * 0.5 - 8)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        instances.gt_classes = torch.randint(0, NUM_CLASSES, (boxes,), generator=generator)
        inputs.append(
            {
                "image": image,
                "instances": instances,
                "file_name": f"image_{i}.png",
                "height": height,
                "width": width,
            }
        )
    return inputs


def level_pairs(**channels: Tuple[int, int]) -> Tuple[LevelPair, ...]:
    """Pairs of levels of one name and stride: level_pairs(p3=(Cs, Ct)) has the stride 2 ** 3."""
    return tuple(
        LevelPair(k, k, s, t, 2 ** int(k[1:]), 2 ** int(k[1:])) for k, (s, t) in channels.items()
    )


class FeatureView(DetectorView):
    """What a head that reads features alone needs of a DetectorView, without a detector."""

    def __init__(self, features: Mapping[str, torch.Tensor], image_sizes: Sequence[Any] = ()):
        self._features = features
        self._image_sizes = image_sizes

    @property
    def features(self) -> Mapping[str, torch.Tensor]:
        return self._features

    @property
    def strides(self) -> Dict[str, int]:
        return {k: 2 ** int(k[1:]) for k in self._features}

    @property
    def image_sizes(self) -> List[Tuple[int, int]]:
        if self._image_sizes:
            return list(self._image_sizes)
        level, x = next(iter(self._features.items()))
        height, width = (size * self.strides[level] for size in x.shape[-2:])
        return [(height, width)] * len(x)


def feature_view(
    features: Mapping[str, torch.Tensor], image_sizes: Sequence[Tuple[int, int]] = ()
) -> FeatureView:
    """
    Args:
        features: level name to (N, C, H, W); "p3" has the stride 2 ** 3
        image_sizes: (height, width) of each image in pixels; empty: no padding
    """
    return FeatureView(features, image_sizes)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal values in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
