"""Table and heat map of the weights with which a head mixes the student's levels per region."""

from typing import Dict, List, Mapping, NamedTuple, Sequence

import cv2
import numpy as np
from tabulate import tabulate
from torch import Tensor

from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes

from ..distiller import Distiller
from ..views import DetectorView, find_view
from .maps import WEIGHTS
from .tiles import BLACK, FONT, GAP, GREY, WHITE, join, text_line

ROW, COLUMN = 56, 88  # height and width of a cell, pixels
NO_REGION = (238, 238, 238)  # colour of a cell without a mean
FINER = 3  # number of additional rows for small regions, all on the teacher's finest level


class Row(NamedTuple):
    """Regions of one teacher level and one range of sides (square root of the area) in pixels."""

    level: str
    stride: int
    sides: str


class LevelWeights:
    """
    Mean mixing weights of the student's L levels, for each of T rows of regions.

    `rows`: finest first; `student`: level name to stride, finest first; `counts`: (T,), number of
    regions per row.
    """

    def __init__(self, rows: Sequence[Row], student: Mapping[str, int]):
        """
        Args:
            rows: see rows_of
            student: level name to stride, in the order of the weights given to `add`
        """
        names = list(student)
        self._columns = sorted(range(len(names)), key=lambda i: student[names[i]])
        self.rows = list(rows)
        self.student = {names[i]: student[names[i]] for i in self._columns}
        self.counts = np.zeros(len(self.rows), dtype=np.int64)
        self._sums = np.zeros((len(self.rows), len(names)))

    def add(self, weights: Tensor, assigned: Tensor) -> None:
        """
        Args:
            weights: (R, L), for the R regions of a batch
            assigned: (R,) in [0, T), the row of each region
        """
        rows = assigned.cpu().numpy()
        np.add.at(self._sums, rows, weights.double().cpu().numpy()[:, self._columns])
        self.counts += np.bincount(rows, minlength=len(self.counts))

    @property
    def means(self) -> np.ndarray:
        """(T, L), each row sums to 1; NaN in rows without regions."""
        with np.errstate(invalid="ignore"):
            return self._sums / self.counts[:, None]

    @property
    def cells(self) -> List[List[str]]:
        """The means as text, T rows of L."""
        return [["-" if np.isnan(x) else f"{x:.2f}" for x in row] for row in self.means]

    def __str__(self) -> str:
        ours = [f"{name} / {stride}" for name, stride in self.student.items()]
        theirs = [[f"{x.level} / {x.stride}", x.sides] for x in self.rows]
        rows = [[*name, *row, n] for name, row, n in zip(theirs, self.cells, self.counts)]
        headers = ["teacher \\ student", "side, pixels", *ours, "regions"]
        aligned = ["left"] * 2 + ["right"] * (len(headers) - 2)
        return tabulate(rows, headers, disable_numparse=True, colalign=aligned)


def level_tables(distiller: Distiller) -> Dict[str, LevelWeights]:
    """An empty table for each head that weights the student's levels: has `latest_weights`."""
    student = find_view(distiller.student, "student")(distiller.student)
    tables = {}
    for lesson in distiller.lessons:
        teacher = lesson.teacher_view(lesson.teacher.model)
        for name in lesson.heads:
            head = distiller.heads[name]
            if hasattr(head, "latest_weights"):
                strides = {k: student.strides[k] for k in head.student_levels}
                tables[name] = LevelWeights(rows_of(teacher), strides)
    return tables


def add_level_weights(tables: Mapping[str, LevelWeights], distiller: Distiller) -> None:
    """Add the regions of the latest batch, after a training forward pass, to the heads' tables."""
    for lesson, teacher in zip(distiller.lessons, distiller.last_step.teachers):
        for name in (x for x in lesson.heads if x in tables):
            weights, boxes = distiller.heads[name].latest_weights
            tables[name].add(weights, assigned_rows(teacher, boxes))


def rows_of(teacher: DetectorView) -> List[Row]:
    """
    One octave of sides per level that the teacher pools from, and FINER more for the finest level,
    to which all regions of a small image belong.
    """
    names, rule = list(teacher.pooled_levels), teacher.pooler
    names = names[:1] * FINER + names
    octave = 2.0 ** (rule.min_level - FINER - rule.canonical_level)
    limits = [round(rule.canonical_box_size * octave * 2**i) for i in range(len(names))] + [0]
    sides = [f"{low} to {high}" for low, high in zip(limits, limits[1:])]
    sides[0], sides[-1] = f"below {limits[1]}", f"from {limits[-2]}"
    return [Row(k, teacher.strides[k], x) for k, x in zip(names, sides)]


def assigned_rows(teacher: DetectorView, boxes: List[Boxes]) -> Tensor:
    """
    Args:
        boxes: one Boxes per image, XYXY in input pixels, R in all

    Returns:
        (R,), indices into rows_of(teacher), by the level assignment of its RoIAlign
    """
    rule = teacher.pooler
    sizes = rule.max_level, rule.canonical_box_size, rule.canonical_level
    return assign_boxes_to_levels(boxes, rule.min_level - FINER, *sizes)


def draw_level_weights(tables: Mapping[str, LevelWeights]) -> np.ndarray:
    """Heat maps of heads, one below the other, (H, W, 3) uint8, RGB."""
    picture = join([_heat_map(*item) for item in tables.items()], axis=0, gap=4 * GAP)
    return cv2.copyMakeBorder(picture, *[2 * GAP] * 4, cv2.BORDER_CONSTANT, value=WHITE)


def _heat_map(name: str, table: LevelWeights) -> np.ndarray:
    """The table as coloured cells, from black for 0 to the highest mean."""
    means, total = np.nan_to_num(table.means), max(table.counts.sum(), 1)
    shades = (means / max(means.max(), 1e-9) * 255).astype(np.uint8)
    colours = cv2.applyColorMap(shades, WEIGHTS)[..., ::-1]
    names = [_tile(level, f"stride {stride}") for level, stride in table.student.items()]
    rows = [[_tile(""), *names, _tile("regions")]]
    for i, row in enumerate(table.rows):
        cells = [
            _tile(text, colour=NO_REGION if text == "-" else colour, framed=row.stride == other)
            for text, colour, other in zip(table.cells[i], colours[i], table.student.values())
        ]
        count = _tile(f"{table.counts[i]}", f"{table.counts[i] / total:.1%}")
        rows.append([_tile(row.level, f"{row.sides} px"), *cells, count])
    head = [
        text_line(f"{name}: mean weight of each of the student's levels (columns) in the mixture"),
        text_line("for a region, by the level that the teacher pools it from and its side (rows)"),
    ]
    foot = text_line("Each row sums to 1. Framed: levels of the same stride.", GREY)
    grid = join([join(row, axis=1, gap=2) for row in rows], axis=0, gap=2)
    return join([join(head, axis=0, gap=0), grid, foot], axis=0)


def _tile(text: str, note: str = "", colour: Sequence[int] = WHITE, framed: bool = False):
    """(ROW, COLUMN, 3): text with a note below, black or white, whichever is readable."""
    tile = np.full((ROW, COLUMN, 3), colour, dtype=np.uint8)
    ink = BLACK if tile[0, 0] @ np.array([0.299, 0.587, 0.114]) > 128 else WHITE
    middle = ROW // 2 - (8 if note else 0)
    for words, scale, y in ((text, 0.55, middle), (note, 0.4, middle + 19)):
        (width, height), _ = cv2.getTextSize(words, FONT, scale, 1)
        corner = (COLUMN - width) // 2, y + height // 2
        cv2.putText(tile, words, corner, FONT, scale, ink, 1, cv2.LINE_AA)
    if framed:
        cv2.rectangle(tile, (2, 2), (COLUMN - 3, ROW - 3), ink, 1)
    return tile
