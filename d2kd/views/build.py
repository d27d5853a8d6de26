"""Which view a detector has."""

from typing import Type

from fvcore.common.registry import Registry
from torch import nn

from .base import DetectorView
from .detector_info import DetectorInfo

DETECTOR_VIEW_REGISTRY = Registry("DETECTOR_VIEW")
DETECTOR_VIEW_REGISTRY.__doc__ = """
Registry of views: how d2kd reads a detector of one family.

A view is registered under the class name of a meta-architecture and serves its subclasses too. It
is called as `View(detector, batched_inputs, requires)` and subclasses :class:`DetectorView`.
"""


def find_view(detector: nn.Module, role: str) -> Type[DetectorView]:
    """
    Args:
        detector: a student or a teacher
        role: "student" or "teacher", for the error

    Raises:
        ValueError: no view is registered for the detector's class or a parent of it
    """
    for cls in type(detector).__mro__:
        if cls.__name__ in DETECTOR_VIEW_REGISTRY:
            return DETECTOR_VIEW_REGISTRY.get(cls.__name__)
    known = ", ".join(sorted(name for name, _ in DETECTOR_VIEW_REGISTRY))
    name = type(detector).__name__
    raise ValueError(
        f"The {role}'s meta-architecture {name} has no DetectorView. Known: {known}. Register one "
        f'under its name, DETECTOR_VIEW_REGISTRY._do_register("{name}", MyView), in a file for '
        "--plugin (docs/add_a_detector.md)."
    )


def describe_detector(detector: nn.Module, role: str) -> DetectorInfo:
    """
    What is known of a detector before any batch; arguments and errors as of :func:`find_view`.
    """
    return find_view(detector, role)(detector).info
