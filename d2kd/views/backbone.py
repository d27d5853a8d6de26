"""A backbone in a teacher's place: features and nothing else."""

from .base import DetectorView
from .build import DETECTOR_VIEW_REGISTRY


class BackboneView(DetectorView):
    """A view of BackboneTeacher."""

    @property
    def num_classes(self) -> int:
        return 0


DETECTOR_VIEW_REGISTRY._do_register("BackboneTeacher", BackboneView)
