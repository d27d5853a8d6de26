#!/usr/bin/env python
"""
Say of each row of a bench whether it is better than the baseline: GAIN, NO GAIN or INCONCLUSIVE, by
the rule of paired_baseline.py, over the seeds that both have finished.

It needs the AP of runs on samples of the images, which the bench keeps in a CSV beside the table's
results. Of older runs it keeps that itself, where their folders are still there. Where they are not
of all seeds, "5 (2) seeds" is a verdict on the AP of five, and of the samples of two.
"""

import argparse
import sys
from typing import Iterator, Optional, Sequence, Tuple

from bench_cells import Table, named_rows, read_table
from bench_results import in_order
from bench_samples import BOXES, MASKS, NOTHING, Told, keep_samples, read_kept, verdict_on
from d2kd.cli.common import command_parser
from d2kd.utils.user_mistakes import run_command
from paired_ap import SAMPLES
from paired_baseline import check_rule

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
    for row, iterations, told in verdicts(table, args):
        count = "one seed" if told.seeds == 1 else f"{told.count} seeds"
        print(f"{row}, {iterations} iterations, {count}: {told.verdict}", flush=True)
        compared = True
    if not compared:
        raise ValueError(
            f"{table.output} has no finished run of these rows beside one of the baseline "
            f"{args.baseline or table.baseline!r} with the same budget and seed, and none is kept. "
            f"A verdict needs the runs' detections, which the CSV does not have: "
            f"d2kd bench {args.table}"
        )


def verdicts(table: Table, args: argparse.Namespace) -> Iterator[Tuple[str, int, Told]]:
    """Yields: row, iterations, and the verdict on them."""
    rows, baseline = named_rows(table, args.rows), args.baseline or table.baseline
    named_rows(table._replace(grids={}), [baseline], "--baseline")  # one row, no GRID
    keep_samples(table, [*rows, baseline])
    found = read_kept(table, MASKS if args.masks else BOXES)
    if args.masks:
        for row, _ in read_kept(table):
            if row in (*rows, baseline) and row not in dict(found):
                raise ValueError(f"--masks: {row} detects boxes alone.")
    for row, iterations in in_order(found, [x for x in rows if x != baseline]):
        base = found.get((baseline, iterations), NOTHING)
        told = verdict_on(found[row, iterations], base, args.threshold, args.samples)
        if told:
            yield row, iterations, told


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("bench_verdict.py", __doc__, EPILOG)
    add = parser.add_argument
    add("table", help="YAML of the bench")
    add("--rows", nargs="+", default=[], metavar="ROW", help="default: all")
    add("--baseline", default="", metavar="ROW", help="default: the table's BASELINE")
    add("--threshold", type=float, default=0.5, metavar="AP", help="no more is no gain (0.5)")
    add("--samples", type=int, default=SAMPLES, metavar="N", help=f"of the images ({SAMPLES})")
    add("--masks", action="store_true", help="of masks, not of boxes")
    args = parser.parse_args(argv)
    check_rule(parser, args)
    if args.samples > SAMPLES:
        parser.error(f"--samples: {SAMPLES} are kept of each run, got {args.samples}")
    return args


if __name__ == "__main__":
    sys.exit(run_command("bench_verdict.py", main))
