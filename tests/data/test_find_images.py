"""The images to label are found, and are refused before anything is computed."""

import json
from pathlib import Path
from typing import Any, Callable

import cv2
import numpy as np
import pytest

from d2kd.data.find_images import find_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, shape in (("b.png", (4, 6, 3)), ("inner/a.JPG", (8, 5, 3))):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.zeros(shape, dtype=np.uint8))
    (tmp_path / "images" / "._b.png").write_bytes(b"of macOS")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_all_images_below_a_folder(folder: Path) -> None:
    assert find_images(str(folder)) == [
        {"file_name": f"{folder}/b.png", "image_id": 1, "width": 6, "height": 4},
        {"file_name": f"{folder}/inner/a.JPG", "image_id": 2, "width": 5, "height": 8},
    ]


def listed(folder: Path, **values: Any) -> str:
    entry = {"id": 70, "file_name": "inner/a.JPG", "width": 5, "height": 8, **values}
    path = folder / "list.json"
    path.write_text(json.dumps({"images": [entry], "annotations": "ignored"}))
    return str(path)


def test_those_of_a_json_keep_their_ids(folder: Path) -> None:
    found = find_images(str(folder), listed(folder))
    entry = {"file_name": f"{folder}/inner/a.JPG", "image_id": 70, "width": 5, "height": 8}
    assert found == [entry]


def broken(folder: Path) -> str:
    (folder / "a.jpg").write_bytes(b"not a picture")
    return ""


def written(text: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / "list.json").write_text(text)
        return str(folder / "list.json")

    return write


# How it is spoilt, and what is told
MISTAKES = {
    "broken image": (broken, "--images: 1 of 3 images cannot be used.*a.jpg cannot be read"),
    "no such JSON": (lambda folder: "no.json", "--json: there is no file 'no.json'"),
    "no JSON": (written("{"), "--json: .*list.json is not in COCO's format"),
    "no images": (written("[]"), 'there is no list "images"'),
    "missing image": (lambda x: listed(x, file_name="gone.png"), "lists the image gone.png"),
    "other size": (lambda x: listed(x, width=9), "has 5x8 pixels"),
    "path out of the folder": (lambda x: listed(x, file_name="../a.png"), "leads out of"),
}


@pytest.mark.parametrize("spoil, told", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(folder: Path, spoil: Callable[[Path], str], told: str) -> None:
    with pytest.raises((ValueError, OSError), match=told):
        find_images(str(folder), spoil(folder))


def test_no_folder_and_no_image(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--images: there is no folder"):
        find_images(str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="--images: there is no image in"):
        find_images(str(tmp_path))


def test_linked_folders_are_read_once_and_links_back_are_not(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    cv2.imwrite(str(tmp_path / "more" / "c.png"), np.zeros((2, 3, 3), dtype=np.uint8))
    (folder / "linked").symlink_to(tmp_path / "more")
    (folder / "linked again").symlink_to(tmp_path / "more")
    (folder / "inner" / "back").symlink_to(folder)
    found = [x["file_name"] for x in find_images(str(folder))]
    assert found == [f"{folder}/{x}" for x in ("b.png", "inner/a.JPG", "linked/c.png")]
