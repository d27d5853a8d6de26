"""
AP of a bench's runs on bootstrap samples of the images, kept in a CSV beside its results: verdicts
can be told from it, also against another baseline, when the runs' folders are gone.
"""

import os
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from pycocotools.coco import COCO

from bench_cells import Cell, Table
from bench_results import Group, Row, append_result, groups, read_results
from d2kd.utils.silent import silent
from paired_ap import SAMPLES, ImageAP, image_error, read_detections
from paired_baseline import truth_of
from paired_verdict import Verdict, decide

COLUMNS = ("row", "seed", "iterations", "task", "AP", "samples", "key", "recipe")
BOXES, MASKS = "bbox", "segm"  # tasks


def keep_samples(table: Table, rows: Sequence[str]) -> None:
    """Measure the finished runs of these rows whose folders are there, each once."""
    path = _path(table)
    kept = {x["key"] for x in read_results(path, COLUMNS)}
    truths: Dict[str, COCO] = {}  # rows may have data of their own
    for cell in table.cells:
        found = _detections(table, cell) if cell.row in rows else ""
        if not found or cell.key in kept:
            continue
        cfg = cell.cfg
        cfg.DATASETS.TEST = (table.test,) if table.test else cfg.DATASETS.TEST
        data = repr([cfg.DATASETS[x] for x in ("TEST", "SHAPES", "COCO_FORMAT")])
        if data not in truths:
            truths[data] = truth_of(cfg)
        for row in _measure(cell, truths[data], read_detections(found)):
            append_result(path, row, COLUMNS)


def read_samples(table: Table, task: str = BOXES) -> Dict[Tuple[str, int], Group]:
    """Rows of COLUMNS, by row and budget and then by seed."""
    return groups([x for x in read_results(_path(table), COLUMNS) if x["task"] == task])


def verdict_on(
    runs: Group, baseline: Group, threshold: float = 0.5, samples: int = SAMPLES
) -> Tuple[int, Optional[Verdict]]:
    """
    Args:
        samples: how many of those kept to take

    Returns:
        number of seeds that both have, and the verdict on them; None where there are none
    """
    seeds = [x for x in runs if x in baseline]
    if not seeds:
        return 0, None
    gains = [float(runs[x]["AP"]) - float(baseline[x]["AP"]) for x in seeds]
    ours, theirs = ([_drawn(of[x])[:samples] for x in seeds] for of in (runs, baseline))
    return len(seeds), decide(gains, image_error(theirs, ours), threshold)


def _drawn(row: Row) -> np.ndarray:
    return np.array(row["samples"].split(), dtype=float)


def _measure(cell: Cell, truth: COCO, found: List[Dict[str, Any]]) -> Iterator[Row]:
    tasks = (BOXES, MASKS) if all("segmentation" in x for x in found) else (BOXES,)
    for task in tasks:
        with silent():
            measure = ImageAP(truth, found, task)
        yield {
            **{k: str(getattr(cell, k)) for k in ("row", "seed", "iterations", "key", "recipe")},
            "task": task,
            "AP": f"{measure(range(measure.num_images)):.3f}",
            "samples": " ".join(f"{x:.2f}" for x in measure.samples()),
        }


def _path(table: Table) -> str:
    return os.path.splitext(table.results)[0] + "_samples.csv"


def _detections(table: Table, cell: Cell) -> str:
    """File of the set that the table reports; "" where the run has not got so far."""
    parts: List[str] = ["test"] if table.test else []
    folder = table.folder(cell)
    done = os.path.join(folder, "test.json" if table.test else "val.json")
    path = os.path.join(folder, *parts, "inference", "coco_instances_results.json")
    return path if os.path.isfile(done) and os.path.isfile(path) else ""
