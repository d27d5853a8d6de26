"""Conditions on other keys under which a key is used; keys that are not here always are."""

from functools import reduce
from typing import Any, Callable, NamedTuple, Sequence, Tuple

from fvcore.common.registry import Registry

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from ..data.shapes import SPLITS
from .load import leaves


class Reader(NamedTuple):
    """
    `patterns`: shell-style patterns of keys; `reads`: whether they are read, given a plain
    detector's config; `who`: what would read them, completing the phrase "read only ...".
    """

    patterns: Tuple[str, ...]
    reads: Callable[[CfgNode], bool]
    who: str


def value_of(cfg: CfgNode, key: str) -> Any:
    """Of a key by its dotted name."""
    return reduce(lambda node, name: node[name], key.split("."), cfg)


def _switch(key: str, *values: Any, of: Tuple[str, ...]) -> Reader:
    """Keys that are read only if the key `key` has one of these values."""
    text = "" if values == (True,) else " " + " or ".join(map(str, values))
    return Reader(of, lambda cfg: value_of(cfg, key) in values, f"with {key}{text}")


def _detector(who: str, *names: str, of: Tuple[str, ...]) -> Reader:
    """Keys that are read only by these meta-architectures, or possibly by a user's own."""
    return Reader(of, lambda cfg: _may_be(cfg, names), f"by {who}")


def _may_be(cfg: CfgNode, names: Sequence[str]) -> bool:
    name = cfg.MODEL.META_ARCHITECTURE
    return name in names or not _is_ours(META_ARCH_REGISTRY, name)


def _marked_by_masks(cfg: CfgNode) -> bool:
    """Whether a head would read the masks of labels, which are loaded with MODEL.MASK_ON."""
    keys = leaves(cfg.get("DISTILL", {}))
    return any(key.endswith(".OBJECTS") and value == "masks" for key, value in keys)


def _backbone(who: str, part: str, of: Tuple[str, ...]) -> Reader:
    """Keys that are read only by backbones with `part` in their builder's name, or a user's."""

    def reads(cfg: CfgNode) -> bool:
        name = cfg.MODEL.BACKBONE.NAME
        return part in name or not _is_ours(BACKBONE_REGISTRY, name)

    return Reader(of, reads, f"with {who} in MODEL.BACKBONE.NAME")


def _is_ours(registry: Registry, name: str) -> bool:
    """Whether a builder is Detectron2's or d2kd's, so that the keys it reads are known."""
    return name in registry and registry.get(name).__module__.startswith(("detectron2.", "d2kd."))


def _uses_shapes(cfg: CfgNode) -> bool:
    return any(x in SPLITS for x in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))


_TWO_STAGE = ("GeneralizedRCNN", "PanopticFPN")
_PROPOSALS = (*_TWO_STAGE, "ProposalNetwork")
_CLIP = "SOLVER.CLIP_GRADIENTS"
_SCHEDULE, _COSINE = "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"
_MULTI_STEP, _FIXED_GAMMA = "WarmupMultiStepLR", "WarmupStepWithFixedGammaLR"

# A key is read only if all entries that match it say so.
READERS = (
    _detector("RetinaNet", "RetinaNet", of=("MODEL.RETINANET.*",)),
    _detector("FCOS", "FCOS", of=("MODEL.FCOS.*",)),
    _detector("RepPoints", "RepPoints", of=("MODEL.REPPOINTS.*",)),
    _detector("detectors with anchors", "RetinaNet", *_PROPOSALS, of=("MODEL.ANCHOR_GENERATOR.*",)),
    _detector("two-stage detectors", *_PROPOSALS, of=("MODEL.RPN.*", "MODEL.PROPOSAL_GENERATOR.*")),
    _detector(
        "two-stage detectors",
        *_TWO_STAGE,
        of=("MODEL.ROI_*", "MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS"),
    ),
    Reader(
        ("MODEL.MASK_ON",),
        lambda cfg: _may_be(cfg, _TWO_STAGE) or _marked_by_masks(cfg),
        "by two-stage detectors and by heads with OBJECTS 'masks'",
    ),
    _detector(
        "detectors that segment the whole image",
        *("PanopticFPN", "SemanticSegmentor"),
        of=("MODEL.SEM_SEG_HEAD.*", "MODEL.PANOPTIC_FPN.*"),
    ),
    _backbone("a Swin", "swin", of=("MODEL.SWIN.*",)),
    _backbone("a model of timm", "timm", of=("MODEL.TIMM.*",)),
    _backbone("a ResNet", "resnet", of=("MODEL.RESNETS.*", "MODEL.BACKBONE.FREEZE_AT")),
    _backbone("an FPN", "fpn", of=("MODEL.FPN.*",)),
    _switch("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", of=("MODEL.ROI_BOX_CASCADE_HEAD.*",)),
    _switch("MODEL.MASK_ON", True, of=("MODEL.ROI_MASK_HEAD.*", "INPUT.MASK_FORMAT")),
    _switch(
        "MODEL.KEYPOINT_ON", True, of=("MODEL.ROI_KEYPOINT_HEAD.*", "TEST.KEYPOINT_OKS_SIGMAS")
    ),
    _switch("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True, of=("MODEL.ROI_BOX_HEAD.FED_LOSS_*",)),
    _switch(
        "MODEL.LOAD_PROPOSALS", True, of=("DATASETS.PROPOSAL_FILES_*", "DATASETS.PRECOMPUTED_*")
    ),
    _switch("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", of=("DATALOADER.REPEAT_*",)),
    _switch("INPUT.CROP.ENABLED", True, of=("INPUT.CROP.TYPE", "INPUT.CROP.SIZE")),
    _switch(f"{_CLIP}.ENABLED", True, of=(f"{_CLIP}.CLIP_*", f"{_CLIP}.NORM_TYPE")),
    _switch(f"{_CLIP}.CLIP_TYPE", "norm", "full_model", of=(f"{_CLIP}.NORM_TYPE",)),
    _switch("SOLVER.OPTIMIZER", "SGD", of=("SOLVER.MOMENTUM", "SOLVER.NESTEROV")),
    _switch(_SCHEDULE, _MULTI_STEP, of=("SOLVER.STEPS",)),
    _switch(_SCHEDULE, _MULTI_STEP, _FIXED_GAMMA, of=("SOLVER.GAMMA",)),
    _switch(_SCHEDULE, _FIXED_GAMMA, of=("SOLVER.NUM_DECAYS",)),
    _switch(_SCHEDULE, _COSINE, of=("SOLVER.BASE_LR_END",)),
    Reader(("DATASETS.SHAPES.*",), _uses_shapes, "with a built-in set in DATASETS"),
    Reader(
        ("TEST.EVAL_PERIOD", "TEST.BEST_METRIC", "TEST.EXPECTED_RESULTS"),
        lambda cfg: bool(cfg.DATASETS.TEST),
        "with a set in DATASETS.TEST",
    ),
    # Their ENABLED is refused.
    Reader(
        ("TEST.AUG.M*", "TEST.AUG.FLIP", "TEST.PRECISE_BN.NUM_ITER"),
        lambda cfg: False,
        "by features that d2kd does not support",
    ),
)

# In a head's node: keys that are read only if a sibling key has one of these values.
HEAD_SWITCHES = (
    (("SCHEDULE.DECAY_FROM", "SCHEDULE.END_FACTOR"), "DECAY", ("linear", "cosine")),
    (("MASK.THRESHOLD",), "RULE", ("threshold",)),
    (("CKD.SHARED_CHANNELS",), "PROJECTION", ("shared",)),
    (("MAR.MAX_CELLS",), "RELATION", ("dense",)),
)
