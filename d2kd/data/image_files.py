"""Are the images of a data set there, and are they what its JSON says?"""

import logging
import os
import warnings
from typing import Dict, List, Sequence, Set

from PIL import Image

from detectron2.utils.file_io import PathManager

from .coco_parts import ImageEntry
from .image_headers import check_header, is_transparent

logger = logging.getLogger(__name__)

MAX_TRAINING_HEADERS = 2000  # a fraction of a millisecond each, more where the disk is far
MAX_TRANSPARENT = 20  # images with an alpha channel that are decoded


def check_images(images: Sequence[ImageEntry], folder: str, part: str, blame: str) -> None:
    """
    Look for all images. Of a test set the headers of all are read, as what is wrong there would
    only be met after the last iteration; of a training set those of some, spread over all.

    Args:
        folder: of the images
        part: "TRAIN" or "TEST"
        blame: who names the images, for errors and warnings

    Raises:
        FileNotFoundError, OSError, ValueError: naming the first image that is not there, cannot be
            read, or is not what the JSON says
    """
    if not os.path.isdir(folder):  # only PathManager knows it, and may fetch what is asked for
        few = [*images[:3], images[-1]]
        gone = [x for x in few if not PathManager.exists(os.path.join(folder, x.file_name))]
        _check_found(gone, folder, blame)
        return
    _check_found(_missing(images, folder), folder, blame)
    step = 1 if part == "TEST" else -(-len(images) // MAX_TRAINING_HEADERS)
    chosen = images[::step]
    if len(chosen) >= MAX_TRAINING_HEADERS:
        logger.info(f"Looking at the headers of {len(chosen)} images in {folder}.")
    with warnings.catch_warnings():
        # An error only from twice the pixels on: training reads what is below.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        _check_headers(chosen, folder, blame)


def _check_headers(images: Sequence[ImageEntry], folder: str, blame: str) -> None:
    decoded, transparent = 0, []
    for image in images:
        path = os.path.join(folder, image.file_name)
        try:
            if check_header(path, image) and decoded < MAX_TRANSPARENT:
                decoded += 1
                transparent += [path] if is_transparent(path) else []
        except (OSError, ValueError) as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"{blame}: {error}") from error
    if transparent:
        logger.warning(
            f"{blame}: {len(transparent)} of {decoded} images with an alpha channel have "
            f"transparent pixels, such as {transparent[0]}. Detectors see their colours as if they "
            "were opaque."
        )


def _check_found(missing: Sequence[ImageEntry], folder: str, blame: str) -> None:
    if missing:
        name, others = missing[0].file_name, len(missing) - 1
        raise FileNotFoundError(
            f"{blame} names the image {name}, missing at "
            f"{os.path.abspath(os.path.join(folder, name))}"
            + (f", and {others} more that are missing" if others else "")
        )


def _missing(images: Sequence[ImageEntry], folder: str) -> List[ImageEntry]:
    """Lists each folder once: a look at each of many thousand files takes minutes on some disks."""
    listed: Dict[str, Set[str]] = {}
    missing = []
    for image in images:
        inner, name = os.path.split(image.file_name)
        if inner not in listed:
            listed[inner] = _files(os.path.join(folder, inner))
        # Some disks also find names whose case is another than in the listing.
        if name not in listed[inner]:
            if not os.path.isfile(os.path.join(folder, image.file_name)):
                missing.append(image)
    return missing


def _files(folder: str) -> Set[str]:
    try:
        with os.scandir(folder) as entries:
            return {x.name for x in entries if x.is_file()}
    except OSError:
        return set()
