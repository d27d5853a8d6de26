"""The picture of a batch: which maps it shows, and where their cells lie."""

import os
import random
from pathlib import Path
from typing import Any, List, Sequence

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2kd import Distiller
from d2kd.panel import draw_panel
from d2kd.panel.maps import Map, Row, image_maps
from d2kd.panel.tiles import LINE, TILE, map_tile, text_line, write_picture
from tests.helpers.toys import batch, distill_config

NO_BOXES = np.zeros((0, 4))
GREYS = cv2.COLORMAP_BONE


def build(
    teacher: Sequence[Any], heads: Sequence[str] = ("MGD",), student: str = "retinanet"
) -> Distiller:
    return build_model(distill_config(student, teacher, heads)).train()


def step(distiller: Distiller, inputs: List[Any]) -> Distiller:
    with EventStorage():
        distiller(inputs)
    return distiller


def titles(rows: List[Row]) -> List[List[str]]:
    return [[x.title for x in row if x is not None] for row in rows]


def cells(values: Any, size: Sequence[int], cell: int = 32, boxes: np.ndarray = NO_BOXES) -> Any:
    """Brightness of a tile without its words."""
    tile = map_tile(Map("p5", np.array(values), cell, GREYS), tuple(size), boxes)
    return tile[2 * LINE :].mean(axis=2)


def test_hidden_cells_are_dark_and_visible_ones_bright() -> None:
    picture = cells([[True, False], [False, True]], size=(64, 64))
    half = TILE // 2
    assert picture[:half, :half].min() > 140 and picture[half:, half:].min() > 140
    assert picture[:half, half:].max() < 60 and picture[half:, :half].max() < 60


@pytest.mark.parametrize("values", [np.eye(2, dtype=bool), np.eye(2) * 3 - 1])
def test_padding_is_cut_off_and_does_not_count(values: np.ndarray) -> None:
    padded = np.full((3, 4), 100).astype(values.dtype)
    padded[:2, :2] = values
    tiles = [map_tile(Map("p5", x, 32, GREYS), (64, 64), NO_BOXES) for x in (values, padded)]
    np.testing.assert_array_equal(*tiles)


def test_a_cell_that_reaches_over_the_border_ends_with_the_image() -> None:
    picture = cells([[0.0, 1.0]], size=(32, 48))
    bright = picture.mean(axis=0)[:TILE] > 128
    assert abs(bright.sum() - TILE / 3) <= 1 and bright[-1]
    assert picture.shape == (round(TILE * 32 / 48), TILE)


def test_colours_run_from_the_lowest_to_the_highest_value() -> None:
    picture = cells([[-5.0, 1000.0]], size=(32, 64))
    assert picture[0, 0] == 0 and picture[0, -1] == 255
    alone = cells([[7.0]], size=(32, 32))
    assert 0 < alone.min() == alone.max() < 255


def test_boxes_are_outlined_where_they_are() -> None:
    box = np.array([[32.0, 16.0, 48.0, 48.0]])
    changed = cells([[0.5]], (64, 64), 64, box) != cells([[0.5]], (64, 64), 64)
    rows, columns = np.nonzero(changed)
    scale = TILE / 64
    assert abs(columns.min() - 32 * scale) <= 1 and abs(columns.max() - 48 * scale) <= 1
    assert abs(rows.min() - 16 * scale) <= 1 and abs(rows.max() - 48 * scale) <= 1
    assert not changed[int(20 * scale) : int(44 * scale), int(36 * scale) : int(44 * scale)].any()


def test_every_tile_has_the_same_width() -> None:
    for title, size in (("p3", (64, 64)), ("p3 " + "long " * 30, (200, 10)), ("p3", (10, 200))):
        tile = map_tile(Map(title, np.ones((4, 4)), 64, GREYS), size, NO_BOXES)
        assert tile.shape[1] == TILE


def test_rows_are_attention_maps_of_heads_and_energies(teacher: List[Any]) -> None:
    distiller = step(build(teacher, ["PKD", "MGD"]), batch())
    levels = ["p3", "p4", "p5", "p6", "p7"]
    names = "attention (teacher)", "MGD visible", "energy (teacher)", "energy (student)"
    rows = image_maps(distiller, 0)
    assert titles(rows) == [[f"{k} {name}" for k in levels] for name in names]
    assert [x.cell for x in rows[0]] == [8, 16, 32, 64, 128]


def test_maps_are_of_the_image_asked_for(teacher: List[Any]) -> None:
    inputs = batch(1, height=64, width=96) + batch(1, height=80, width=50)
    distiller = step(build(teacher), inputs)
    for index, (rows, columns) in enumerate([(8, 12), (10, 7)]):
        attention, visible, energies, own = (x[0].values for x in image_maps(distiller, index))
        assert attention.shape == (12, 12)
        np.testing.assert_allclose(attention[:rows, :columns].mean(), 1, rtol=1e-5)
        np.testing.assert_allclose(attention.sum(), rows * columns, rtol=1e-5)
        for side, values in (("teacher", energies), ("student", own)):
            feature = getattr(distiller.last_step, side).features["p3"][index].detach()
            np.testing.assert_allclose(values, feature.abs().mean(dim=0).numpy(), rtol=1e-5)
        expected = distiller.heads["MGD"].maps["visible"]["p3"][index, 0]
        assert visible.dtype == bool and np.array_equal(visible, expected.numpy())


def test_pairs_of_levels_are_those_that_both_detectors_have(teacher: List[Any]) -> None:
    distiller = step(build(teacher, student="faster_rcnn"), batch())
    assert titles(image_maps(distiller, 0))[-1] == [f"p{i} energy (student)" for i in range(3, 7)]
    draw_panel(distiller)


def test_heads_that_do_not_say_their_levels_see_those_of_equal_stride(teacher: List[Any]) -> None:
    distiller = step(build(teacher), batch())
    expected = titles(image_maps(distiller, 0))
    distiller.heads["MGD"].levels = ["p3"]
    assert titles(image_maps(distiller, 0)) == expected


def test_a_map_of_a_coarser_grid_covers_the_same_image(teacher: List[Any]) -> None:
    distiller = step(build(teacher), batch())
    maps = {"pooled": {"p3": torch.ones(2, 1, 4, 4)}, "nowhere": {}}
    (name,) = distiller.heads
    distiller.last_step.maps = {name: maps}
    rows = image_maps(distiller, 0)
    assert titles(rows)[1] == [f"p3 {name} pooled"] and len(rows) == 4
    assert rows[1][0].cell == 16 and rows[1][1:] == [None] * 4
    draw_panel(distiller)


def test_maps_of_an_earlier_batch_are_not_drawn(teacher: List[Any]) -> None:
    distiller = step(build(teacher), batch())
    distiller.schedules["MGD"] = lambda iteration: 0.0
    step(distiller, batch(height=96))
    assert len(image_maps(distiller, 0)) == 3


@pytest.mark.parametrize("boxes", [0, 2])
def test_panel_is_an_rgb_picture_as_wide_as_its_columns(boxes: int, teacher: List[Any]) -> None:
    distiller = step(build(teacher), batch(boxes=boxes, height=64, width=96))
    for index in (0, 1):
        panel = draw_panel(distiller, index, class_names=["cat"])
        assert panel.dtype == np.uint8 and panel.shape[2] == 3
        assert panel.shape[1] > 5 * TILE and panel.shape[0] > 4 * TILE * 64 / 96


@pytest.mark.parametrize("image_format, red", [("BGR", [0, 0, 255]), ("RGB", [255, 0, 0])])
def test_panel_shows_the_colours_of_the_image(
    image_format: str, red: List[int], teacher: List[Any]
) -> None:
    cfg = distill_config("retinanet", teacher, INPUT__FORMAT=image_format)
    inputs = batch(boxes=0)
    for x in inputs:
        x["image"] = torch.tensor(red, dtype=torch.uint8)[:, None, None].expand(3, 64, 64)
    panel = draw_panel(step(build_model(cfg).train(), inputs))
    assert panel[TILE, TILE].tolist() == [255, 0, 0]


def test_drawing_leaves_no_trace(teacher: List[Any]) -> None:
    distiller = step(build(teacher), batch())
    before = _state(distiller)
    draw_panel(distiller)
    after = _state(distiller)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_the_name_of_a_file_need_not_be_utf_8(tmp_path: Path) -> None:
    """As of one unpacked from an archive of Windows; OpenCV would end the process."""
    name = os.fsdecode(b"bl\xfcte.png")
    line = text_line(name)
    np.testing.assert_array_equal(line, text_line("bl?te.png"))
    write_picture(tmp_path / name, line)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name)), line)


def _state(distiller: Distiller) -> List[Tensor]:
    """Random generators, weights, and what the step has recorded."""
    numbers = torch.tensor([*random.getstate()[1], *np.random.get_state()[1].tolist()])
    features = [x.clone() for k in ("student", "teacher") for x in _features(distiller, k)]
    weights = [x.clone() for x in distiller.state_dict().values()]
    return [torch.get_rng_state(), numbers, *weights, *features]


def _features(distiller: Distiller, side: str) -> List[Tensor]:
    return list(getattr(distiller.last_step, side).features.values())


def test_without_a_training_forward_there_is_nothing_to_draw(teacher: List[Any]) -> None:
    distiller = build(teacher)
    with pytest.raises(ValueError, match="run a training forward"):
        draw_panel(distiller)
    step(distiller, batch()).eval()
    distiller(batch())
    with pytest.raises(ValueError, match="run a training forward"):
        draw_panel(distiller)
