from .adapter import build_adapter
from .generator import build_generator

__all__ = [k for k in globals().keys() if not k.startswith("_")]
