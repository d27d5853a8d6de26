"""A view that gives some answers of its own, and all others of the view inside it."""

from typing import Any

from .base import DetectorView


class WrappedView:
    """What a subclass does not define is the inner view's own."""

    def __init__(self, view: DetectorView):
        self._view = view

    def __getattr__(self, name: str) -> Any:
        if name == "_view":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._view, name)
