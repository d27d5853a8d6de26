"""A JSON with some of its classes."""

import errno
import json
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Callable

import pytest

DATA = {
    "images": [{"id": 1}, {"id": 2}],
    "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}, {"id": 9, "name": "cow"}],
    "annotations": [{"id": i, "image_id": 1, "category_id": k} for i, k in enumerate((8, 3, 9, 8))],
}


def test_chosen_classes_keep_their_ids_and_all_images_stay(
    tool: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    source, target = tmp_path / "all.json", tmp_path / "new" / "some.json"
    source.write_text(json.dumps(DATA))
    tool("choose_classes").main([str(source), str(target), "--classes", "dog", "cow"])
    found = json.loads(target.read_text())
    assert found["images"] == DATA["images"] and found["categories"] == DATA["categories"][1:]
    assert [x["category_id"] for x in found["annotations"]] == [8, 9, 8]


def test_full_disk_leaves_the_file_that_was_to_be_replaced(
    tool: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps(DATA))

    def dump(content: Any, file: IO) -> None:
        file.write("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(json, "dump", dump)
    with pytest.raises(OSError, match="all.json could not be written"):
        tool("choose_classes").main([str(path), str(path), "--classes", "dog"])
    assert json.loads(path.read_text()) == DATA


def test_unknown_class_is_refused(tool: Callable[[str], ModuleType]) -> None:
    with pytest.raises(ValueError, match="--classes 'cats': .* Did you mean 'cat'?"):
        tool("choose_classes").choose(DATA, ["cats"])
