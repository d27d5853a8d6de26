"""Refuse a detector that d2kd's data and losses cannot train, before it fails in its first step."""

from typing import List

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, PanopticFPN, SemanticSegmentor

from ..config.readers import value_of
from ..data.set_checks import DENSE_DETECTORS

UPRIGHT = "d2kd reads, trains and evaluates upright boxes only"
# Parts whose boxes have an angle, each with its counterpart for upright ones.
_ROTATED = {
    "MODEL.ANCHOR_GENERATOR.NAME": ("RotatedAnchorGenerator", "DefaultAnchorGenerator"),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RRPN", "RPN"),
    "MODEL.ROI_HEADS.NAME": ("RROIHeads", "StandardROIHeads"),
}


def check_trainable(cfg: CfgNode) -> None:
    """
    Args:
        cfg: of a student alone; sets that are not registered yet are COCO's JSONs

    Raises:
        ValueError: naming the key, its value and what would be right
    """
    check_upright(cfg, "The student")
    _check_segmentation(cfg)
    _check_keypoints(cfg)
    _check_proposals(cfg)


def check_teaches(cfg: CfgNode, source: str) -> None:
    """
    Args:
        cfg: of a teacher
        source: what the config is of, for the error

    Raises:
        ValueError: a teacher that d2kd cannot run on a batch of its student
    """
    check_upright(cfg, source)
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals" and _has_regions(cfg):
        raise ValueError(
            f"{source}: MODEL.PROPOSAL_GENERATOR.NAME is 'PrecomputedProposals': this teacher "
            "needs proposals with each image, which a student's batch has not. Take a detector "
            "with an RPN."
        )


def check_upright(cfg: CfgNode, source: str) -> None:
    """
    Raises:
        ValueError: the detector has boxes with an angle
    """
    for key, (rotated, upright) in _ROTATED.items():
        regions_only = key != "MODEL.ANCHOR_GENERATOR.NAME"
        if value_of(cfg, key) == rotated and (_has_regions(cfg) or not regions_only):
            raise ValueError(f"{source}: {key} is {rotated!r}. {UPRIGHT}: take {upright!r}.")


def _check_segmentation(cfg: CfgNode) -> None:
    name = cfg.MODEL.META_ARCHITECTURE
    detector = META_ARCH_REGISTRY.get(name)
    if not isinstance(detector, type):  # a function that builds one
        return
    if issubclass(detector, SemanticSegmentor):
        raise ValueError(
            f"The student's meta-architecture {name} segments and detects nothing, and d2kd trains "
            "detectors: take RetinaNet, FCOS, RepPoints or GeneralizedRCNN."
        )
    without = _sets_without_maps(cfg) if issubclass(detector, PanopticFPN) else []
    if without:
        raise ValueError(
            f"The student's meta-architecture {name} learns from a map of classes for each image "
            f"(sem_seg_file_name), which {without[0]} of DATASETS.TRAIN does not have. On boxes, "
            "or boxes and masks, train a GeneralizedRCNN."
        )


def _sets_without_maps(cfg: CfgNode) -> List[str]:
    """Training sets without a map of classes; those of a JSON in COCO's format have none."""
    known = DatasetCatalog.list()
    return [
        name
        for name in cfg.DATASETS.TRAIN
        if name not in known or not any("sem_seg_file_name" in x for x in DatasetCatalog.get(name))
    ]


def _check_keypoints(cfg: CfgNode) -> None:
    known = DatasetCatalog.list()
    for name in cfg.DATASETS.TRAIN if cfg.MODEL.KEYPOINT_ON else ():
        if name not in known or not MetadataCatalog.get(name).get("keypoint_names"):
            raise ValueError(
                f"MODEL.KEYPOINT_ON is True, but {name} of DATASETS.TRAIN has no keypoints that "
                'Detectron2 knows ("keypoint_names" of its metadata, as '
                "keypoints_coco_2017_train). Set it to False."
            )


def _check_proposals(cfg: CfgNode) -> None:
    model, data = cfg.MODEL, cfg.DATASETS
    given = model.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals"
    if given and _has_regions(cfg) and not model.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.PROPOSAL_GENERATOR.NAME is 'PrecomputedProposals', so MODEL.LOAD_PROPOSALS "
            "must be True and DATASETS.PROPOSAL_FILES_TRAIN name a file for each training set. "
            "Take 'RPN' to learn proposals."
        )
    if model.LOAD_PROPOSALS and not (given and _has_regions(cfg)):
        raise ValueError(
            "MODEL.LOAD_PROPOSALS is True, but the student makes its own proposals "
            f"(MODEL.PROPOSAL_GENERATOR.NAME {model.PROPOSAL_GENERATOR.NAME!r}) and reads none: "
            "set it to False, or take 'PrecomputedProposals' in a GeneralizedRCNN."
        )
    for part in ("TRAIN", "TEST") if model.LOAD_PROPOSALS else ():
        files, sets = data[f"PROPOSAL_FILES_{part}"], data[part]
        if len(files) != len(sets):
            raise ValueError(
                f"DATASETS.PROPOSAL_FILES_{part} has {len(files)} files for the {len(sets)} sets "
                f"of DATASETS.{part}: with MODEL.LOAD_PROPOSALS True it names one for each."
            )


def _has_regions(cfg: CfgNode) -> bool:
    """Whether the detector reads the keys of proposals and RoI heads."""
    return cfg.MODEL.META_ARCHITECTURE not in (*DENSE_DETECTORS, "SemanticSegmentor")
