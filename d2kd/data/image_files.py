"""Check that the images of a data set exist and match its JSON."""

import logging
import os
import warnings
from typing import Dict, List, Sequence, Set

from PIL import Image

from detectron2.utils.file_io import PathManager

from .coco_parts import ImageEntry
from .image_headers import check_header, is_transparent

logger = logging.getLogger(__name__)

MAX_TRAINING_HEADERS = 2000  # a fraction of a millisecond each, more on a network disk
MAX_TRANSPARENT = 20  # images with an alpha channel to decode


def check_images(images: Sequence[ImageEntry], folder: str, part: str, blame: str) -> None:
    """
    Check that all images exist, and read their headers: of a test set all, because an error there
    would only surface after the last iteration; of a training set an evenly spaced sample.

    Args:
        folder: folder of the images
        part: "TRAIN" or "TEST"
        blame: where the images are listed, for errors and warnings

    Raises:
        FileNotFoundError, OSError, ValueError: naming the first image that is missing, cannot be
            read, or does not match the JSON
    """
    if not os.path.isdir(folder):  # not local: PathManager may download what it checks
        few = [*images[:3], images[-1]]
        gone = [x for x in few if not PathManager.exists(os.path.join(folder, x.file_name))]
        _check_found(gone, folder, blame)
        return
    _check_found(_missing(images, folder), folder, blame)
    step = 1 if part == "TEST" else -(-len(images) // MAX_TRAINING_HEADERS)
    chosen = images[::step]
    if len(chosen) >= MAX_TRAINING_HEADERS:
        logger.info(f"Checking the headers of {len(chosen)} images in {folder}.")
    with warnings.catch_warnings():
        # Pillow only warns up to twice its pixel limit, and training reads such images.
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
            f"transparent pixels, such as {transparent[0]}. Their alpha channel is ignored: the "
            "pixels are read as opaque."
        )


def _check_found(missing: Sequence[ImageEntry], folder: str, blame: str) -> None:
    if missing:
        name, others = missing[0].file_name, len(missing) - 1
        raise FileNotFoundError(
            f"{blame} lists the image {name}, missing at "
            f"{os.path.abspath(os.path.join(folder, name))}"
            + (f", and {others} more missing images" if others else "")
        )


def _missing(images: Sequence[ImageEntry], folder: str) -> List[ImageEntry]:
    """Images that do not exist. Lists each folder once: a stat per file is slow on some disks."""
    listed: Dict[str, Set[str]] = {}
    missing = []
    for image in images:
        inner, name = os.path.split(image.file_name)
        if inner not in listed:
            listed[inner] = _files(os.path.join(folder, inner))
        # Case-insensitive file systems also find names that differ in case from the listing.
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
