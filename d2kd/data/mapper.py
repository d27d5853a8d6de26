"""Detectron2's mapper with checks of the image, and errors that name it."""

import math
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Set

from PIL import Image

from detectron2.data import DatasetMapper
from detectron2.utils.file_io import PathManager

from .coco_parts import whole_size
from .image_headers import check_sound


class CheckedMapper(DatasetMapper):
    """Read images for training, evaluation and visualisation, all in the same way."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments are Detectron2's, or a config."""
        super().__init__(*args, **kwargs)
        self._checked: Set[str] = set()
        self._crops_masks = self.recompute_boxes

    def __call__(self, dataset_dict: Dict[str, Any]) -> Dict[str, Any]:
        """
        Args:
            dataset_dict: one image in Detectron2's format

        Raises:
            OSError, ValueError, RuntimeError: naming the image
        """
        with image_in_errors(dataset_dict):
            self._check_once(dataset_dict["file_name"])
            # With INPUT.CROP and masks Detectron2 asks the masks for the boxes, also of an image
            # without objects, which has no masks.
            self.recompute_boxes = self._crops_masks and _has_object(dataset_dict)
            return super().__call__({**dataset_dict, **whole_size(dataset_dict)})

    def _check_once(self, path: str) -> None:
        if path in self._checked:
            return
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            check_sound(image, path)
        self._checked.add(path)


def _has_object(dataset_dict: Dict[str, Any]) -> bool:
    """Whether there is an annotation that is no crowd, which training leaves out."""
    return any(not x.get("iscrowd", 0) for x in dataset_dict.get("annotations", ()))


@contextmanager
def image_in_errors(dataset_dict: Dict[str, Any]) -> Iterator[None]:
    """Add the image, and the annotation if one is invalid, to any error raised inside."""
    try:
        yield
    except Exception as error:
        path, blame = str(dataset_dict.get("file_name")), _odd_box(dataset_dict)
        if path in str(error) and not blame or getattr(error, "filename", None):
            raise
        if isinstance(error, OSError):
            raise OSError(f"{path} cannot be read: {error}") from error
        kind = ValueError if blame or isinstance(error, ValueError) else RuntimeError
        text = blame or f"{type(error).__name__}: {error}"
        raise kind(f"{path} cannot be used: {text}") from error


def _odd_box(dataset_dict: Dict[str, Any]) -> str:
    """Describe the first annotation with an invalid box; "" if all boxes are valid."""
    for i, annotation in enumerate(dataset_dict.get("annotations") or ()):
        box = annotation.get("bbox")
        try:
            if len(box) >= 4 and all(map(math.isfinite, box)):
                continue
        except TypeError:
            pass
        name = annotation.get("id", f"{i} (counted from 0)")
        return f"its annotation {name} has the bbox {box}, which is not a valid box."
    return ""
