"""What an image file tells before it is decoded: can it be read, and is it what the JSON says?"""

import os
from contextlib import contextmanager
from typing import BinaryIO, Iterator

from PIL import Image

from .coco_parts import ImageEntry

# Of PIL. What it has of more than 8 bits, converted to 8, is cut off at 255 and not scaled.
EIGHT_BIT_MODES = "1 L LA P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV".split()
ALPHA_MODES = ("LA", "PA", "RGBA", "RGBa")
ORIENTATION, TURNED = 274, (5, 6, 7, 8)  # EXIF's tag, and its values that swap width and height
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
TAIL = 2048  # bytes in which the end mark of a whole file is


def check_mode(path: str, mode: str) -> None:
    """
    Raises:
        ValueError: an image whose pixels Detectron2's reader would cut off
    """
    if mode not in EIGHT_BIT_MODES:
        raise ValueError(
            f"{path} has pixels of more than 8 bits (PIL's mode {mode}): all that is above 255 "
            "would be read as 255. Scale the images of the set to 0..255 and save them with 8 bits."
        )


def check_header(path: str, entry: ImageEntry) -> bool:
    """
    Check an image without decoding it, unless its end is missing.

    Returns:
        whether it may have transparent pixels

    Raises:
        ValueError: of more than 8 bits, or of another size than the JSON says
        OSError: it cannot be read
    """
    with _readable(path), open(path, "rb") as file, Image.open(file) as image:
        mode, size, turned = image.mode, image.size, _is_turned(image)
        has_alpha = mode in ALPHA_MODES or "transparency" in image.info
        if not _has_end(file, image.format):
            image.load()  # which tells for sure
    check_mode(path, mode)
    size = size[::-1] if turned else size
    if size != (entry.width, entry.height):
        told = ", as its EXIF orientation turns it" if turned else ""
        raise ValueError(
            f"{path} has {size[0]}x{size[1]} pixels (width x height){told}, but in the JSON it has "
            f"the width {entry.width} and the height {entry.height}. Are its boxes of this image?"
        )
    return has_alpha


def is_transparent(path: str) -> bool:
    """
    Whether a pixel is, which takes decoding it.

    Raises:
        ValueError: nothing would be left of the picture
        OSError: it cannot be read
    """
    with _readable(path), Image.open(path) as image:
        *colours, alpha = image.convert("RGBA").getextrema()
    if alpha[0] < alpha[1] and all(low == high for low, high in colours):
        raise ValueError(
            f"{path} is of one colour, and only its transparency, which is not read, shows what is "
            "there. Paste the images of the set on a background and save them without."
        )
    return alpha[0] < 255


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the bytes look like to PIL
        raise OSError(f"{path} cannot be read: {error}") from error


def _is_turned(image: Image.Image) -> bool:
    """Whether Detectron2's reader swaps width and height."""
    try:
        # The base class's: that of a PNG decodes it, to look for what may stand behind the pixels.
        return Image.Image.getexif(image).get(ORIENTATION) in TURNED
    except Exception:  # as Detectron2 does, which then ignores it
        return False


def _has_end(file: BinaryIO, kind: str) -> bool:
    """Whether the file's end is there; True for kinds that do not mark it."""
    mark = END_MARKS.get(kind, b"")
    place = file.tell()
    file.seek(max(os.fstat(file.fileno()).st_size - TAIL, 0))
    found = mark in file.read()
    file.seek(place)
    return found
