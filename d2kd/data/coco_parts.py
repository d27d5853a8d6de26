"""Check the single lists of a COCO-format JSON: entries, ids, images and categories."""

import os
from collections import defaultdict
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

MAX_ID = 2**63  # pycocotools sorts ids as NumPy int64


class ImageEntry(NamedTuple):
    """An entry of "images"; sizes in pixels."""

    file_name: str
    width: int
    height: int


def is_whole(value: Any) -> bool:
    """Whether the value is a whole number; some tools write it as 640.0."""
    return type(value) is int or isinstance(value, float) and value.is_integer()


def whole_size(entry: Dict[str, Any]) -> Dict[str, int]:
    """Width and height, as far as the entry has them, as integers: 640.0 is no size of a mask."""
    return {side: int(entry[side]) for side in ("width", "height") if side in entry}


def check_entries(entries: List[Any], part: str, keys: Sequence[str], twice: bool = False) -> None:
    """Check that each entry has these keys, and a unique id unless `twice` allows duplicates."""
    seen = set()
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{part}[{i}] is {entry!r}; it must have the keys {', '.join(keys)}")
        for k in keys:
            if k not in entry:
                raise ValueError(f'{part}[{i}] has no "{k}"')
        number = entry["id"]
        if not is_whole(number) or not -MAX_ID <= number < MAX_ID:
            raise ValueError(f"{part}[{i}] has the id {number!r}; it must be a whole number")
        if number in seen and not twice:
            raise ValueError(f"{part} has the id {number!r} twice")
        seen.add(number)


def names_by_id(categories: List[Any]) -> Tuple[str, ...]:
    check_entries(categories, "categories", ("id", "name"))
    for category in categories:
        name = category["name"]
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"category {category['id']} has the name {name!r}; it must be text")
    return tuple(x["name"] for x in sorted(categories, key=lambda x: x["id"]))


def check_names_differ(categories: List[Dict[str, Any]]) -> List[str]:
    """Check that category names are unique. Returns: warnings about nearly equal names."""
    ids: Dict[str, int] = {}
    spellings: Dict[str, str] = {}
    notes = []
    for category in categories:
        number, name = category["id"], category["name"]
        if name in ids:
            raise ValueError(
                f"the categories {ids[name]} and {number} have the same name, {name!r}: classes "
                "are identified by their names. Rename one, or merge them under one id"
            )
        ids[name] = number
        other = spellings.setdefault(name.strip().casefold(), name)
        if other != name:
            notes.append(
                f"the categories {ids[other]} and {number}, {other!r} and {name!r}, differ only in "
                "spelling and are two classes"
            )
    return notes


def _check_inside(name: str, file_name: str) -> None:
    """Refuse paths outside the image folder, which a JSON of unknown origin could contain."""
    if os.path.isabs(file_name):
        what = "is an absolute path"
    elif os.path.normpath(file_name).split(os.sep)[0] == os.pardir:
        what = "leads out of the image folder"
    else:
        return
    raise ValueError(
        f"{name} has the file_name {file_name!r}, which {what}; it must be relative to the image "
        "folder, and in it"
    )


def check_same_file(images: List[Dict[str, Any]], annotations: List[Dict[str, Any]]) -> None:
    """Refuse one file under two ids with different objects: each would miss some of them."""
    by_file = defaultdict(list)
    for entry in images:
        by_file[os.path.normpath(entry["file_name"])].append(entry["id"])
    repeated = {k: v for k, v in by_file.items() if len(v) > 1}
    objects: Dict[int, List[Any]] = {x: [] for ids in repeated.values() for x in ids}
    for annotation in annotations if objects else ():
        if annotation["image_id"] in objects:
            found = [annotation["category_id"], *annotation["bbox"]]
            objects[annotation["image_id"]].append(found)
    for file_name, ids in repeated.items():
        if any(sorted(objects[x]) != sorted(objects[ids[0]]) for x in ids):
            raise ValueError(
                f"the images {' and '.join(map(str, ids[:2]))} are the same file, {file_name}, "
                "with different annotations: give the file one id, and use it in all of them"
            )


def read_images(entries: List[Any]) -> Tuple[ImageEntry, ...]:
    check_entries(entries, "images", ("id", "file_name", "width", "height"))
    for entry in entries:
        name = f"image {entry['id']}"
        if not isinstance(entry["file_name"], str) or not entry["file_name"]:
            raise ValueError(f"{name} has the file_name {entry['file_name']!r}; it must be text")
        for side in ("width", "height"):
            if not is_whole(entry[side]) or entry[side] < 1:
                raise ValueError(
                    f"{name} has the {side} {entry[side]!r}; it must be a whole number of pixels, "
                    "1 or more"
                )
        _check_inside(name, entry["file_name"])
    return tuple(ImageEntry(x["file_name"], **whole_size(x)) for x in entries)
