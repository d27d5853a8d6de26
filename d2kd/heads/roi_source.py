"""Which RoI features are compared, a head's POOLER: the box head's or the mask head's."""

from typing import FrozenSet, Tuple

from torch import Tensor

from ..pairing.pair import DistillPair
from ..views import DetectorView, Regions, RegionSampler

POOLERS = ("box", "mask")


def required_words(pooler: str) -> FrozenSet[str]:
    """What a head requires of both views."""
    words = {"mask_features"} if pooler == "mask" else {"roi_features", "regions"}
    return frozenset(words | {"features"})


def cells_and_key(pooler: str, pair: DistillPair) -> Tuple[int, int, str]:
    """Cells along a side of the student's and of the teacher's RoI features, and their key."""
    if pooler == "mask":
        key = "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION"
        return pair.student.mask_size, pair.teacher.mask_size, key
    return pair.student.roi_size, pair.teacher.roi_size, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION"


def regions_of(student: DetectorView, pooler: str, sampler: RegionSampler) -> Regions:
    """The boxes that are pooled; with "mask", the student's proposals of objects."""
    return student.mask_regions if pooler == "mask" else student.regions(sampler)


def features_of(view: DetectorView, pooler: str, regions: Regions) -> Tensor:
    """
    Args:
        view: of the student or of the teacher

    Returns:
        (R, C, S, S)
    """
    if pooler == "box":
        return view.roi_features(regions.boxes)
    return view.mask_features(regions.boxes)
