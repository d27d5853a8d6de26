"""A view that overrides some members of another view."""

from typing import Any

from .base import DetectorView


class WrappedView:
    """Members that a subclass does not define are those of the inner view."""

    def __init__(self, view: DetectorView):
        self._view = view

    def __getattr__(self, name: str) -> Any:
        if name == "_view":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._view, name)
