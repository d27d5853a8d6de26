"""Images that are missing, broken, of another size or of more than 8 bits are found beforehand."""

import os
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np
import pytest
from PIL import Image, ImageOps

from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager

from d2kd.data import image_files, register_datasets
from d2kd.data.image_files import check_images
from d2kd.data.image_headers import (
    EIGHT_BIT_MODES,
    ORIENTATION,
    check_header,
    check_sound,
    read_header,
)
from tests.helpers.toy_sets import config_of, every, read_entries, second, write_set

SIZE = (64, 48)
RAMP = np.linspace(0, 1, SIZE[0] * SIZE[1]).reshape(SIZE[::-1])


def replace(path: Path, image: Image.Image, **values: Any) -> None:
    path.unlink()
    image.save(path, **values)


def remove(path: Path) -> None:
    path.unlink()


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def halve_jpeg(path: Path) -> None:
    replace(path, Image.open(path).convert("RGB"), format="JPEG")
    halve(path)


def halve_bmp(path: Path) -> None:
    replace(path, Image.open(path).convert("RGB"), format="BMP")
    halve(path)


def halve_tiff(path: Path) -> None:
    replace(path, Image.open(path).convert("RGB"), format="TIFF")
    halve(path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def as_text(path: Path) -> None:
    path.write_text("<html>404</html>")


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.png")


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def resize(path: Path) -> None:
    replace(path, Image.open(path).resize((48, 64)))


def turn(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    replace(path, Image.open(path).copy(), exif=exif)


def deep(path: Path) -> None:
    replace(path, Image.fromarray((RAMP * 65535).astype(np.uint16)))


def deep_tiff(path: Path) -> None:
    replace(path, Image.fromarray((RAMP * 65535).astype(np.uint16)), format="TIFF")


def floats(path: Path) -> None:
    replace(path, Image.fromarray((RAMP * 9000).astype(np.float32)), format="TIFF")


def integers(path: Path) -> None:
    replace(path, Image.fromarray((RAMP * 9000).astype(np.int32)), format="TIFF")


def stencil(path: Path) -> None:
    shape = np.zeros((*SIZE[::-1], 4), np.uint8)
    shape[9:30, 9:30, 3] = 255
    replace(path, Image.fromarray(shape))


DAMAGES: Dict[Callable, str] = {
    remove: "lists the image 6.png, missing at {path}",
    dangling: "lists the image 6.png, missing at {path}",
    as_folder: "lists the image 6.png, missing at {path}",
    halve: "{path} cannot be read",
    halve_jpeg: "{path} cannot be read",
    halve_bmp: "{path} cannot be read",
    halve_tiff: "{path} cannot be read",
    empty: "{path} cannot be read",
    as_text: "{path} cannot be read",
    resize: "{path} has 48x64 pixels .*in the JSON it has the width 64 and the height 48",
    turn: "{path} has 48x64 pixels .*after its EXIF rotation",
    deep: r"{path} has pixels of more than 8 bits \(PIL mode I;16\)",
    deep_tiff: r"{path} has pixels of more than 8 bits \(PIL mode I;16\)",
    floats: r"{path} has pixels of more than 8 bits \(PIL mode F\)",
    integers: r"{path} has pixels of more than 8 bits \(PIL mode I\)",
    stencil: "{path} has a single colour; only its transparency",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda x: x.__name__)
@pytest.mark.parametrize("part", ["TRAIN", "TEST"])
def test_image_deep_in_a_set_is_refused_by_its_path(
    part: str, damage: Callable, tmp_path: Path, forget_sets: None
) -> None:
    write_set(tmp_path, "good")
    json_file = write_set(tmp_path, "bad")
    path = tmp_path / "bad" / "6.png"
    damage(path)
    sets = (["bad"], ["good"]) if part == "TRAIN" else (["good"], ["bad"])
    message = DAMAGES[damage].format(path=path)
    with pytest.raises((ValueError, OSError), match=rf"COCO_FORMAT\[\d\]: {json_file}:? {message}"):
        register_datasets(config_of(tmp_path, *sets))


def turned_as_the_json_says(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 8
    replace(path, Image.open(path).resize((48, 64)), exif=exif)


def jpeg_with_a_tail(path: Path) -> None:
    replace(path, Image.open(path).convert("RGB"), format="JPEG")
    path.write_bytes(path.read_bytes() + b"\0" * 5000)


@pytest.mark.parametrize(
    "change",
    [
        turned_as_the_json_says,
        jpeg_with_a_tail,
        lambda path: replace(path, Image.open(path).convert("L")),
        lambda path: replace(path, Image.open(path).convert("1")),
        lambda path: replace(path, Image.open(path).convert("P"), transparency=0),
        lambda path: replace(path, Image.open(path).convert("RGBA")),
        lambda path: replace(path, Image.open(path).convert("LA")),
        lambda path: replace(path, Image.new("RGBA", SIZE, (0, 0, 0, 255))),  # a lens cap
        lambda path: replace(path, Image.open(path).convert("CMYK"), format="JPEG"),
        lambda path: replace(path, Image.open(path).convert("RGB"), format="BMP"),
        lambda path: replace(path, Image.open(path).convert("P"), format="BMP"),
        lambda path: replace(path, Image.open(path).convert("RGB"), format="TIFF"),
        lambda path: replace(path, Image.open(path), format="TIFF", compression="tiff_lzw"),
        lambda path: replace(path, Image.open(path).convert("P"), format="GIF"),
    ],
)
def test_what_detectron2_reads_well_passes(
    change: Callable, tmp_path: Path, forget_sets: None
) -> None:
    write_set(tmp_path, "a")
    change(tmp_path / "a" / "6.png")
    register_datasets(config_of(tmp_path, ["a"], ["a"]))


@pytest.mark.parametrize("mode", EIGHT_BIT_MODES)
def test_modes_that_pass_keep_the_picture(mode: str, tmp_path: Path) -> None:
    """Of a ramp from black to white in each channel, the reader keeps the order."""
    gray = Image.fromarray((RAMP * 255).astype(np.uint8))
    try:
        image = gray.convert(mode)
    except ValueError:  # by way of another
        image = gray.convert({"RGBa": "RGBA", "PA": "P"}.get(mode, "RGB")).convert(mode)
    check_sound(image, "a.png")
    read = np.asarray(image.convert("RGB"), dtype=int).mean(axis=2)
    expected = (RAMP * 255) if mode != "1" else read
    assert np.abs(read - expected).max() < 40 and read.min() < 40 and read.max() > 215


def test_reader_cuts_off_what_is_refused(tmp_path: Path) -> None:
    """Why: once Detectron2 or PIL scales these, they need not be refused any more."""
    path = tmp_path / "a.png"
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(path)
    assert (read_image(str(path), "BGR") == 255).mean() > 0.9


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_tiff_that_would_be_turned_twice_is_refused(orientation: int, tmp_path: Path) -> None:
    path, exif = tmp_path / "a.tif", Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray((RAMP * 255).astype(np.uint8)).save(path, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    read = read_image(str(path), "L")[..., 0]
    if orientation == 1:
        assert (read == upright).all() and read_header(str(path)).width == SIZE[0]
        return
    # Once Pillow or Detectron2 leaves it to the other, they need not be refused any more.
    assert read.shape != upright.shape or (read != upright).any()
    with pytest.raises(ValueError, match="a.tif is a TIFF with an orientation, by which both"):
        read_header(str(path))


def test_sixteen_bits_in_three_channels_are_scaled(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    path = str(tmp_path / "a.png")
    cv2.imwrite(path, np.repeat((RAMP * 65535).astype(np.uint16)[..., None], 3, axis=2))
    write_set(tmp_path, "set")
    assert not check_header(path, read_entries(tmp_path / "set.json")[0])
    assert np.abs(read_image(path, "RGB")[..., 0] - RAMP * 255).max() < 2


def test_all_that_are_missing_are_counted(tmp_path: Path, forget_sets: None) -> None:
    write_set(tmp_path, "a")
    for i in (2, 5, 6):
        (tmp_path / "a" / f"{i}.png").unlink()
    with pytest.raises(FileNotFoundError, match="2.png, .*and 2 more missing images"):
        register_datasets(config_of(tmp_path, ["a"], []))


def test_transparent_pixels_are_told(
    tmp_path: Path, forget_sets: None, caplog: pytest.LogCaptureFixture
) -> None:
    write_set(tmp_path, "a")
    image = Image.open(tmp_path / "a" / "3.png").convert("RGBA")
    replace(tmp_path / "a" / "2.png", image.copy())
    image.putpixel((3, 3), (9, 9, 9, 0))
    replace(tmp_path / "a" / "3.png", image)
    register_datasets(config_of(tmp_path, [], ["a"]), parts=("TEST",))
    assert "1 of 2 images with an alpha channel have transparent pixels, such as" in caplog.text
    assert f"{tmp_path}/a/3.png" in caplog.text


def test_folders_are_listed_once_and_files_in_them_found(
    tmp_path: Path, forget_sets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path, "a", every("images", lambda x: x.update(file_name=f"in/{x['file_name']}")))
    (tmp_path / "moved").mkdir()
    os.rename(tmp_path / "a", tmp_path / "moved" / "in")
    os.rename(tmp_path / "moved", tmp_path / "a")
    asked = []
    monkeypatch.setattr(os.path, "isfile", lambda path: asked.append(path) or True)
    check_images(read_entries(tmp_path / "a.json"), str(tmp_path / "a"), "TEST", "key")
    assert not asked


def test_of_a_training_set_some_headers_are_read_and_of_a_test_set_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path, "a")
    entries, seen = read_entries(tmp_path / "a.json"), []
    monkeypatch.setattr(image_files, "MAX_TRAINING_HEADERS", 3)
    monkeypatch.setattr(image_files, "check_header", lambda path, x: seen.append(x.file_name))
    check_images(entries, str(tmp_path / "a"), "TRAIN", "key")
    assert seen == ["1.png", "4.png", "7.png"]
    seen.clear()
    check_images(entries, str(tmp_path / "a"), "TEST", "key")
    assert len(seen) == 8


def test_folder_that_only_the_path_manager_knows_is_asked_for_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path, "a")
    entries, asked = read_entries(tmp_path / "a.json"), []
    monkeypatch.setattr(PathManager, "exists", lambda path: not asked.append(path))
    check_images(entries, "far://a", "TEST", "key")
    assert asked == [f"far://a/{i}.png" for i in (1, 2, 3, 8)]


def test_decompression_bomb_is_told_by_its_path(
    tmp_path: Path, forget_sets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path, "a")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 2 - 1)
    with pytest.raises(OSError, match=f"{tmp_path}/a/1.png cannot be read: .*exceeds limit"):
        register_datasets(config_of(tmp_path, ["a"], []))


def test_width_and_height_the_wrong_way_round(tmp_path: Path, forget_sets: None) -> None:
    write_set(tmp_path, "a", second("images", width=48, height=64))
    with pytest.raises(ValueError, match="a/2.png has 64x48 pixels"):
        register_datasets(config_of(tmp_path, ["a"], []))
