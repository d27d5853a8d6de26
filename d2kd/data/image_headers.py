"""Check an image file before it is decoded: it can be read and matches the JSON."""

import os
from contextlib import contextmanager
from typing import BinaryIO, Iterator, NamedTuple

from PIL import Image

from .coco_parts import ImageEntry

# Modes of PIL. It clips pixels of more than 8 bits at 255 instead of scaling them.
EIGHT_BIT_MODES = "1 L LA P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV".split()
ALPHA_MODES = ("LA", "PA", "RGBA", "RGBa")
ORIENTATION, TURNED = 274, (5, 6, 7, 8)  # EXIF tag, and its values that swap width and height
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
# Tags with the offsets of its strips, or tiles, and with their numbers of bytes
PARTS_OF_TIFF = ((273, 279), (324, 325))
TAIL = 2048  # a complete file has its end mark in this many last bytes


def check_sound(image: Image.Image, path: str) -> None:
    """
    Args:
        image: opened, its pixels not read yet; it may be closed again

    Raises:
        ValueError: Detectron2's reader would not give its pixels
    """
    if image.mode not in EIGHT_BIT_MODES:
        raise ValueError(
            f"{path} has pixels of more than 8 bits (PIL mode {image.mode}): values above 255 "
            "would be read as 255. Scale the images of the set to 0..255 and save them with 8 bits."
        )
    if image.format == "TIFF" and image.tag_v2.get(ORIENTATION, 1) != 1:
        raise ValueError(
            f"{path} is a TIFF with an orientation, by which both Pillow and Detectron2 would turn "
            "it: its pixels would not be where its boxes are. Save the images of the set upright, "
            "without orientation."
        )


class Header(NamedTuple):
    """Size in pixels as Detectron2 reads the image; `turned`: EXIF swaps width and height."""

    width: int
    height: int
    turned: bool
    has_alpha: bool  # it may have transparent pixels


def read_header(path: str) -> Header:
    """
    Read an image's header without decoding it, unless its end is missing.

    Raises:
        ValueError: more than 8 bits, or a TIFF that would be turned twice
        OSError: it cannot be read
    """
    with _readable(path), open(path, "rb") as file, Image.open(file) as image:
        size, turned = image.size, _is_turned(image)
        has_alpha = image.mode in ALPHA_MODES or "transparency" in image.info
        if not _has_end(file, image):
            image.load()  # fails if the image is incomplete
    check_sound(image, path)
    width, height = size[::-1] if turned else size
    return Header(width, height, turned, has_alpha)


def check_header(path: str, entry: ImageEntry) -> bool:
    """
    Check an image as :func:`read_header` does, and its size.

    Returns:
        whether it may have transparent pixels

    Raises:
        ValueError: as of :func:`read_header`, or not the size in the JSON
        OSError: it cannot be read
    """
    header = read_header(path)
    if (header.width, header.height) != (entry.width, entry.height):
        told = " after its EXIF rotation" if header.turned else ""
        raise ValueError(
            f"{path} has {header.width}x{header.height} pixels (width x height){told}, but in the "
            f"JSON it has the width {entry.width} and the height {entry.height}. Do its boxes "
            "belong to this image?"
        )
    return header.has_alpha


def is_transparent(path: str) -> bool:
    """
    Decode an image to see whether any pixel is transparent.

    Raises:
        ValueError: only the alpha channel, which is not read, holds the picture
        OSError: it cannot be read
    """
    with _readable(path), Image.open(path) as image:
        *colours, alpha = image.convert("RGBA").getextrema()
    if alpha[0] < alpha[1] and all(low == high for low, high in colours):
        raise ValueError(
            f"{path} has a single colour; only its transparency, which is not read, shows the "
            "picture. Paste the images of the set on a background and save them without "
            "transparency."
        )
    return alpha[0] < 255


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # PIL raises many types on corrupt files
        raise OSError(f"{path} cannot be read: {error}") from error


def _is_turned(image: Image.Image) -> bool:
    """Whether Detectron2's reader swaps width and height."""
    try:
        # Not the PNG's own getexif, which decodes the image to find EXIF behind the pixels.
        return Image.Image.getexif(image).get(ORIENTATION) in TURNED
    except Exception:  # Detectron2 ignores invalid EXIF, too
        return False


def _has_end(file: BinaryIO, image: Image.Image) -> bool:
    """Whether the file has its end; True for formats of which that cannot be told."""
    size = os.fstat(file.fileno()).st_size
    if image.format in ("BMP", "TIFF"):
        return _pixels_end(image) <= size
    mark = END_MARKS.get(image.format, b"")
    place = file.tell()
    file.seek(max(size - TAIL, 0))
    found = mark in file.read()
    file.seek(place)
    return found


def _pixels_end(image: Image.Image) -> int:
    """Where in a BMP's or TIFF's file its pixels end by its header; 0: it does not say."""
    if image.format == "TIFF":
        tags = image.tag_v2
        parts = (zip(tags.get(x, ()), tags.get(y, ())) for x, y in PARTS_OF_TIFF)
        return max((offset + count for part in parts for offset, count in part), default=0)
    codec, box, offset, args = image.tile[0]
    return offset + args[1] * box[3] if codec == "raw" else 0  # bytes of a row, and rows
