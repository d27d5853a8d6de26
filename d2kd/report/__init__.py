"""A run on one page that can be sent: what `d2kd report` writes."""

from .contents import Contents, gather
from .page import render

__all__ = ["Contents", "gather", "render"]
