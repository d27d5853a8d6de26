"""Keys of DISTILL.REGIONS: how a dense student's regions are sampled."""

from typing import NamedTuple

from detectron2.config import CfgNode

from ..utils.checks import check_range
from .detector_info import DetectorInfo


class RegionSampler(NamedTuple):
    """
    How a dense student's regions are chosen among its predicted boxes. The fields are the keys of
    DISTILL.REGIONS. A two-stage student has regions of its own: the proposals that MODEL.ROI_HEADS
    samples.

    Heads with equal samplers share one sample of a batch (DetectorView.regions).

    Attributes:
        pre_nms_topk: predictions of highest score kept on each level, before non-maximum
            suppression
        nms_thresh: of boxes of one level that overlap by more than this IoU, the one of highest
            score is kept
        post_nms_topk: boxes of highest score kept in each image, after it
        per_image: how many of these are sampled at random
        positive_fraction, iou_threshold: share of the sample, at most, whose IoU with a
            ground-truth box is iou_threshold or more (as in Detectron2's matchers; the notes on
            G-DetKD say more than 0.5)
    """

    pre_nms_topk: int = 2000
    nms_thresh: float = 0.7
    post_nms_topk: int = 1000
    per_image: int = 512
    positive_fraction: float = 0.25
    iou_threshold: float = 0.5

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorInfo) -> "RegionSampler":
        """
        Raises:
            ValueError: a value of DISTILL.REGIONS outside its range, or one that has no effect
        """
        sampler = cls(**{k.lower(): v for k, v in cfg.DISTILL.REGIONS.items()})
        for name, value in sampler._asdict().items():
            if isinstance(cls._field_defaults[name], int):
                check_range(f"DISTILL.REGIONS.{name.upper()}", value, 1, 10**6, "a number of boxes")
            if isinstance(cls._field_defaults[name], float) and not 0 < value <= 1:
                raise ValueError(f"DISTILL.REGIONS.{name.upper()} must be in (0, 1], got {value}.")
            if student.two_stage and value != cls._field_defaults[name]:
                raise ValueError(
                    f"DISTILL.REGIONS.{name.upper()} is {value}, but the two-stage student "
                    f"{student.name} would not read it: its regions are its own proposals "
                    "(MODEL.RPN, MODEL.ROI_HEADS)."
                )
        return sampler


def add_region_config(node: CfgNode) -> None:
    """Write the keys of DISTILL.REGIONS: the fields of :class:`RegionSampler`."""
    for name, default in RegionSampler._field_defaults.items():
        setattr(node, name.upper(), default)
