#!/usr/bin/env python
"""
Say of each row of a bench whether it is better than the baseline: GAIN, NO GAIN or INCONCLUSIVE, by
the rule of paired_baseline.py, over the seeds that both have finished. Needs the runs' folders.
"""

import argparse
import os
import sys
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from pycocotools.coco import COCO

from bench_cells import Cell, Table, named_rows, read_table
from d2kd.cli.common import command_parser
from d2kd.utils.silent import silent
from d2kd.utils.user_mistakes import run_command
from paired_ap import ImageAP, image_error, read_detections
from paired_baseline import check_rule, truth_of
from paired_verdict import Verdict, decide

EPILOG = """
Example:
  python tools/bench_verdict.py configs/bench/heads.yaml --rows PKD CanKD
"""


def main(argv: Optional[Sequence[str]] = None) -> None:
    """
    Raises:
        ValueError: a row that the table does not have, or no runs to compare
    """
    args = parse_args(argv)
    table, compared = read_table(args.table), False
    for row, iterations, seeds, verdict in verdicts(table, args):
        count = "one seed" if seeds == 1 else f"{seeds} seeds"
        print(f"{row}, {iterations} iterations, {count}: {verdict}", flush=True)
        compared = True
    if not compared:
        raise ValueError(
            f"{table.output} has no finished run of these rows beside one of the baseline "
            f"{args.baseline or table.baseline!r} with the same budget and seed. A verdict needs "
            f"the runs' detections, which the CSV does not have: d2kd bench {args.table}"
        )


def verdicts(table: Table, args: argparse.Namespace) -> Iterator[Tuple[str, int, int, Verdict]]:
    """Yields: row, iterations, number of seeds, and the verdict on them."""
    finished = {(x.row, x.iterations, x.seed): x for x in table.cells if _detections(table, x)}
    rows, baseline = named_rows(table, args.rows), args.baseline or table.baseline
    named_rows(table._replace(grids={}), [baseline], "--baseline")  # one row, no GRID
    truth: Optional[COCO] = None
    base: Dict[Tuple[int, int], ImageAP] = {}
    for row, iterations in dict.fromkeys((x.row, x.iterations) for x in table.cells):
        if row == baseline or row not in rows:
            continue
        seeds = [
            seed
            for name, budget, seed in finished
            if (name, budget) == (row, iterations) and (baseline, budget, seed) in finished
        ]
        if not seeds:
            continue
        if truth is None:
            cfg = finished[row, iterations, seeds[0]].cfg
            cfg.DATASETS.TEST = (table.test,) if table.test else cfg.DATASETS.TEST
            truth = truth_of(cfg)
        with silent():
            for seed in seeds:
                if (iterations, seed) not in base:
                    cell = finished[baseline, iterations, seed]
                    base[iterations, seed] = _ap(truth, table, cell, args.masks)
            alone = [base[iterations, seed] for seed in seeds]
            runs = [finished[row, iterations, seed] for seed in seeds]
            found = [_ap(truth, table, x, args.masks) for x in runs]
            everything = list(range(found[0].num_images))
            gains = [ours(everything) - theirs(everything) for ours, theirs in zip(found, alone)]
            verdict = decide(gains, image_error(alone, found, args.samples), args.threshold)
        yield row, iterations, len(seeds), verdict


def _ap(truth: COCO, table: Table, cell: Cell, masks: bool) -> ImageAP:
    path = _detections(table, cell)
    found = read_detections(path)
    if masks and any("segmentation" not in x for x in found):
        raise ValueError(f"--masks: {cell.row} detects boxes alone, see {path}.")
    return ImageAP(truth, found, "segm" if masks else "bbox")


def _detections(table: Table, cell: Cell) -> str:
    """File of the set that the table reports; "" where the run has not got so far."""
    parts: List[str] = ["test"] if table.test else []
    folder = table.folder(cell)
    done = os.path.join(folder, "test.json" if table.test else "val.json")
    path = os.path.join(folder, *parts, "inference", "coco_instances_results.json")
    return path if os.path.isfile(done) and os.path.isfile(path) else ""


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("bench_verdict.py", __doc__, EPILOG)
    add = parser.add_argument
    add("table", help="YAML of the bench")
    add("--rows", nargs="+", default=[], metavar="ROW", help="default: all")
    add("--baseline", default="", metavar="ROW", help="default: the table's BASELINE")
    add("--threshold", type=float, default=0.5, metavar="AP", help="no more is no gain (0.5)")
    add("--samples", type=int, default=200, metavar="N", help="of the bootstrap (200)")
    add("--masks", action="store_true", help="of masks, not of boxes")
    args = parser.parse_args(argv)
    check_rule(parser, args)
    return args


if __name__ == "__main__":
    sys.exit(run_command("bench_verdict.py", main))
