"""
AP of a bench's runs on bootstrap samples of the images, kept in a CSV beside its results: verdicts
can be told from it, also against another baseline, when the runs' folders are gone.
"""

import os
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from pycocotools.coco import COCO

from bench_cells import Cell, Table
from bench_results import Row, append_result, groups, read_results
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


class Kept(NamedTuple):
    """
    Of one row and budget, by seed. `ap`: of all runs, as in the table's results; `samples`: on
    samples of the images, of the runs of which these were kept.
    """

    ap: Dict[int, float]
    samples: Dict[int, np.ndarray]


NOTHING = Kept({}, {})


class Told(NamedTuple):
    """`verdict` on so many `seeds`, with the images' part of its error from `sampled` of them."""

    seeds: int
    sampled: int
    verdict: Verdict

    @property
    def count(self) -> str:
        """As "5", or "5 (2)" where samples were kept of two of five."""
        return str(self.seeds) + (f" ({self.sampled})" if self.sampled < self.seeds else "")


def read_kept(table: Table, task: str = BOXES) -> Dict[Tuple[str, int], Kept]:
    """What is known of the finished runs, by row and budget."""
    drawn = groups([x for x in read_results(_path(table), COLUMNS) if x["task"] == task])
    column = f"{'test' if table.test else 'val'}{'_mask' if task == MASKS else ''}_AP"
    results = groups([x for x in read_results(table.results) if x[column]])
    found = {}
    for place in {**results, **drawn}:
        runs = {k: float(x[column]) for k, x in results.get(place, {}).items()}
        recipes = {x["recipe"] for x in results.get(place, {}).values()}
        # A teacher that was trained again to the same weights is another file, and another recipe.
        samples = {
            k: x
            for k, x in drawn.get(place, {}).items()
            if not runs or x["recipe"] in recipes or float(x["AP"]) == runs.get(k)
        }
        own = {k: float(x["AP"]) for k, x in samples.items()}
        found[place] = Kept({**own, **runs}, {k: _drawn(x) for k, x in samples.items()})
    return found


def verdict_on(
    runs: Kept, baseline: Kept, threshold: float = 0.5, samples: int = SAMPLES
) -> Optional[Told]:
    """
    The verdict on all seeds that both have. How much it depends on the images is told from those of
    which samples are kept: of fewer seeds that is more, so the interval is rather too wide.

    Args:
        samples: how many of those kept to take

    Returns:
        None where no seed has samples in both
    """
    seeds = [x for x in runs.ap if x in baseline.ap]
    both = [x for x in runs.samples if x in baseline.samples]
    if not both:
        return None
    gains = [runs.ap[x] - baseline.ap[x] for x in seeds]
    ours, theirs = ([of.samples[x][:samples] for x in both] for of in (runs, baseline))
    return Told(len(seeds), len(both), decide(gains, image_error(theirs, ours), threshold))


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
