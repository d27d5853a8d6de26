"""Find images that have no labels, and check that they can be read."""

import json
import os
from typing import Any, Dict, Iterator, List, Tuple

from .coco_parts import read_images
from .image_files import check_images
from .image_headers import Header, read_header

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def find_images(
    folder: str, json_file: str = "", keys: Tuple[str, str] = ("--images", "--json")
) -> List[Dict[str, Any]]:
    """
    Args:
        folder: with the images, also in folders below it and in links to folders
        json_file: COCO-format JSON that lists some of them; "": all
        keys: what the user calls the two arguments, for errors

    Returns:
        in Detectron2's format: file_name (a path), image_id, width, height

    Raises:
        OSError, ValueError: there are none, or one cannot be read
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{keys[0]}: there is no folder {folder!r}.")
    if json_file:
        return _listed_images(folder, json_file, keys[1])
    return _all_images(folder, keys[0])


def _listed_images(folder: str, json_file: str, key: str) -> List[Dict[str, Any]]:
    """Ids are those of the JSON."""
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"{key}: there is no file {json_file!r}.")
    try:
        with open(json_file) as file:
            content = json.load(file)
        listed = content.get("images") if isinstance(content, dict) else None
        if not isinstance(listed, list) or not listed:
            raise ValueError('there is no list "images", or it is empty')
        entries = read_images(listed)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: {json_file} is not in COCO's format: {error}") from error
    check_images(entries, folder, "TEST", f"{key}: {json_file}")
    return [
        {
            "file_name": os.path.join(folder, entry.file_name),
            "image_id": listed[i]["id"],
            "width": entry.width,
            "height": entry.height,
        }
        for i, entry in enumerate(entries)
    ]


def _all_images(folder: str, key: str) -> List[Dict[str, Any]]:
    """Ids count from 1, in the order of the paths."""
    headers: Dict[str, Header] = {}
    problems: List[str] = []
    for path in sorted(_image_paths(folder)):
        try:
            headers[path] = read_header(path)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError(
            f"{key}: {len(problems)} of {len(headers) + len(problems)} images cannot be "
            f"used. The first: {problems[0].rstrip('.')}. Move them to another folder."
        )
    if not headers:
        raise FileNotFoundError(
            f"{key}: there is no image in {folder!r} ({', '.join(EXTENSIONS)})."
        )
    return [
        {"file_name": path, "image_id": i, "width": header.width, "height": header.height}
        for i, (path, header) in enumerate(headers.items(), 1)
    ]


def _image_paths(folder: str) -> Iterator[str]:
    seen = set()  # a link may lead to a folder twice, or back to one above it
    for parent, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders.sort()
        for name in names:
            # Hidden ones are no images, such as the "._a.jpg" that macOS leaves beside a.jpg.
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield os.path.join(parent, name)
