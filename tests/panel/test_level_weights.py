"""How a head mixes the student's levels: means over regions, by level of the teacher."""

from typing import Any, List

import cv2
import numpy as np
import pytest
import torch

from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from d2kd import Distiller
from d2kd.panel import LevelWeights, add_level_weights, draw_level_weights, level_tables
from d2kd.panel.level_weights import COLUMN, FINER, NO_REGION, ROW, Row, assigned_rows, rows_of
from d2kd.panel.tiles import LINE
from d2kd.views import find_view
from tests.helpers.toys import batch, distill_config, write_teacher

TEACHER = [Row("p2", 4, "below 112"), Row("p3", 8, "112 to 224"), Row("p4", 16, "from 224")]
STUDENT = {"p3": 8, "p4": 16}


@pytest.fixture(scope="module")
def teacher(folder: Any) -> List[Any]:
    """Of two stages: it pools regions from p2 to p5."""
    return write_teacher(folder, "faster_rcnn")


def build(teacher: List[Any], *heads: str, **overrides: Any) -> Distiller:
    cfg = distill_config("retinanet", teacher, heads, **overrides)
    return build_model(cfg).train()


def squares(*sides: float) -> Boxes:
    corners = [[8.0, 8.0, 8 + side, 8 + side] for side in sides]
    return Boxes(torch.tensor(corners).reshape(-1, 4))


def add(table: LevelWeights, weights: List[List[float]], assigned: List[int]) -> LevelWeights:
    rows = torch.tensor(weights).reshape(-1, len(table.student))
    table.add(rows, torch.tensor(assigned, dtype=torch.int64))
    return table


def test_a_cell_is_the_mean_over_the_regions_of_a_row_in_all_batches() -> None:
    table = LevelWeights(TEACHER, STUDENT)
    add(table, [[1.0, 0.0], [0.2, 0.8]], assigned=[0, 2])
    add(table, [[0.5, 0.5], [0.0, 1.0]], assigned=[0, 0])
    # p2: (1 + 0.5 + 0) / 3 and (0 + 0.5 + 1) / 3; p3: no region; p4: the one that it has
    expected = [[0.5, 0.5], [np.nan, np.nan], [0.2, 0.8]]
    np.testing.assert_allclose(table.means, expected, atol=1e-7)
    assert table.counts.tolist() == [3, 0, 1]


def test_a_batch_without_regions_changes_nothing() -> None:
    table = add(LevelWeights(TEACHER, STUDENT), [[0.3, 0.7]], assigned=[1])
    before = str(table)
    assert str(add(table, [], assigned=[])) == before


def test_columns_are_ordered_by_stride_whatever_the_order_of_the_weights() -> None:
    table = LevelWeights(TEACHER, {"p7": 128, "p3": 8, "p5": 32})
    add(table, [[0.1, 0.2, 0.7]], assigned=[0])
    assert list(table.student.items()) == [("p3", 8), ("p5", 32), ("p7", 128)]
    np.testing.assert_allclose(table.means[0], [0.2, 0.7, 0.1], atol=1e-7)


def test_the_printed_table_names_strides_and_shows_a_dash_without_regions() -> None:
    table = add(LevelWeights(TEACHER, STUDENT), [[0.25, 0.75]], assigned=[0])
    head, _, *rows = (line.split() for line in str(table).splitlines())
    assert " ".join(head) == "teacher \\ student side, pixels p3 / 8 p4 / 16 regions"
    assert " ".join(rows[0]) == "p2 / 4 below 112 0.25 0.75 1"
    assert " ".join(rows[1]) == "p3 / 8 112 to 224 - - 0"


def test_a_region_belongs_to_the_level_that_the_teacher_pools_it_from(teacher: List[Any]) -> None:
    model = build(teacher, "SGFI").teacher.model
    view = find_view(model, "teacher")(model, batch(2, height=512, width=512))
    # A box of 224 pixels belongs to stride 16, p4; half or twice the size is a level further.
    boxes, expected = [squares(13, 20, 111, 113), squares(225, 449)], [0, 0, 0, 1, 2, 3]
    rows = rows_of(view)
    names = [(row.level, row.sides) for row in rows]
    assert names[:4] == [("p2", x) for x in ("below 14", "14 to 28", "28 to 56", "56 to 112")]
    assert names[4:] == [("p3", "112 to 224"), ("p4", "224 to 448"), ("p5", "from 448")]
    assert assigned_rows(view, boxes).tolist() == [0, 1, 3, 4, 5, 6]
    assert [rows[i].level for i in (0, 1, 3, 4, 5, 6)] == ["p2", "p2", "p2", "p3", "p4", "p5"]
    with torch.no_grad():  # maps that say which level they are
        for i, name in enumerate(view.pooled_levels):
            view.features[name].data.fill_(i)  # heads must not, so a view would refuse it
        pooled = view.roi_features(boxes)
    assert pooled.amax(dim=(1, 2, 3)).round().tolist() == expected
    assert assigned_rows(view, [squares(), squares()]).tolist() == []


def test_means_of_a_real_head_over_two_batches(teacher: List[Any]) -> None:
    distiller = build(teacher, "SGFI", DISTILL__SGFI__LEVELS=["p5", "p3"])
    tables = level_tables(distiller)
    seen = []
    for seed in range(2):
        with EventStorage(), torch.no_grad():
            distiller(batch(2, seed=seed))
        add_level_weights(tables, distiller)
        seen.append(distiller.heads["SGFI"].latest_weights[0])
    table, weights = tables["SGFI"], torch.cat(seen).flip(1)
    # Regions in an image of 64 pixels are small: all of them on the teacher's finest level.
    assert table.counts[: FINER + 1].sum() == table.counts.sum() == len(weights)
    assert (table.counts > 0).sum() > 1
    assert [x.level for x in table.rows[FINER:]] == ["p2", "p3", "p4", "p5"]
    assert list(table.student) == ["p3", "p5"]
    total = np.nansum(table.means * table.counts[:, None], axis=0)
    np.testing.assert_allclose(total, weights.sum(dim=0), atol=1e-3)


def test_heads_that_mix_no_levels_have_no_table(teacher: List[Any]) -> None:
    assert level_tables(build(teacher, "MGD")) == {}
    assert list(level_tables(build(teacher, "MGD", "SGFI"))) == ["SGFI"]


def test_a_picture_is_brightest_where_the_mean_is_highest() -> None:
    table = add(LevelWeights(TEACHER, STUDENT), [[0.1, 0.9], [0.6, 0.4]], assigned=[0, 2])
    picture = draw_level_weights({"SGFI": table})
    assert picture.dtype == np.uint8 and picture.ndim == 3
    # Of each cell its upper left corner, inside the frame and beside the words.
    top, left = 16 + 2 * LINE + 8 + ROW + 2, 16 + COLUMN + 2
    corners = picture[top + 8 :: ROW + 2, left + 8 :: COLUMN + 2][:3, :2]
    assert (corners[1] == NO_REGION).all()
    brightness = corners[[0, 2]].mean(axis=2)
    assert brightness[0, 1] > brightness[1, 0] > brightness[1, 1] > brightness[0, 0]


def test_pictures_of_two_heads_are_one_below_the_other(tmp_path: Any) -> None:
    table = add(LevelWeights(TEACHER, STUDENT), [[0.1, 0.9]], assigned=[0])
    one, two = draw_level_weights({"A": table}), draw_level_weights({"A": table, "B": table})
    assert two.shape[1] == one.shape[1] and two.shape[0] > 1.8 * one.shape[0]
    assert cv2.imwrite(str(tmp_path / "two.png"), two[..., ::-1])


def test_a_table_without_any_region_can_be_drawn() -> None:
    table = LevelWeights(TEACHER, STUDENT)
    assert np.isnan(table.means).all()
    assert draw_level_weights({"SGFI": table}).size > 0
