"""Added by d2kd's build of Detectron2: stands in for the compiled operators, which it lacks."""


class _Missing:
    """Names the missing operator when one is used, so that importing Detectron2 still works."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"This Detectron2 is built without compiled operators, and '{name}' is one of them "
            "(rotated boxes, deformable convolution). Install Detectron2 from upstream's source "
            "to use it."
        )


_C = _Missing()
