#!/usr/bin/env python
"""
Fill a table of runs, and keep the figures: each row of the table is a YAML with overrides, and is
run with each of its seeds and budgets.

Several runs go side by side, each with one thread. Stop it when you like and start it again: a run
that was interrupted goes on where it stopped, and one that is finished is not repeated.
"""

import argparse
import sys
from typing import Optional, Sequence

from bench_cells import check_table, narrowed, read_table
from bench_run import Bench
from d2kd.cli.common import command_parser
from d2kd.cli.steps import stop_on_sigterm
from d2kd.utils.user_mistakes import run_command

EPILOG = """
A table is a YAML:

    RESULTS: "results/mine.csv"            # default: beside the table, with .csv for .yaml
    OUTPUT_DIR: "output/bench/mine"        # of all runs; default: output/bench/<name>
    TEST: "d2kd_shapes_test"               # where each end is evaluated, beside DATASETS.TEST
    SEEDS: [1, 2, 3]                       # of all rows, or of one, as the two that follow
    ITERATIONS: [2000, 4000]               # SOLVER.MAX_ITER
    OPTS: ["SOLVER.CHECKPOINT_PERIOD", 1000]
    BASELINE: "alone"                      # the row that gains are told against
    ROWS:
      - NAME: "alone"
        CONFIG: "configs/quickstart/student.yaml"
        SEEDS: {4000: [1, 2, 3, 4, 5]}     # of one of its budgets
      - {NAME: "PKD", CONFIG: "configs/quickstart/pkd.yaml", OPTS: ["DISTILL.PKD.LOSS_WEIGHT", 3.0]}
      - NAME: "CWD"                        # a row for each value, "CWD, LOSS_WEIGHT 10.0", ...
        CONFIG: "configs/quickstart/cwd.yaml"
        GRID: {"DISTILL.CWD.LOSS_WEIGHT": [10.0, 30.0, 100.0]}
      - {NAME: "mine", CONFIG: "mine.yaml", PLUGIN: "my_head.py"}  # a head of your own

A finished run is a row of the CSV: its AP on DATASETS.TEST ("val") and on TEST ("test"), seconds of
training, commit, versions, hardware, command, and the key by which it is known again. That is made
of the config, without its OUTPUT_DIR, keys that are off and heads not in use, of the weights of its
teacher, and of what is in the PLUGIN: change what a run depends on, and it is another run.
Detectron2's defaults count too: another version of it can have other keys.
TEST is no part of the key, and neither is what is in the teacher's CONFIG_FILE: where one of them
becomes another, give the table other RESULTS and another OUTPUT_DIR.
Settings are chosen on val. On test nothing is chosen.

Of a table with a BASELINE the AP of each run on samples of the images is kept, too, in a CSV called
..._samples.csv, from which bench_verdict.py says GAIN, NO GAIN or INCONCLUSIVE without the runs.

The output of each run is in OUTPUT_DIR: val.txt and test.txt are what train_net.py said. Killed
with -9, the bench leaves its runs alive; started again, it waits for them and takes them over. On a
GPU runs go one after the other.

examples:
  what would be run, and what is finished:
    d2kd bench configs/bench/heads.yaml --list
  two at a time, on two cores:
    d2kd bench configs/bench/heads.yaml --jobs 2
  first of all what one method gives in the end:
    d2kd bench configs/bench/heads.yaml --rows "student alone" CWD --iterations 8000
  then write the figures into the documents:
    python tools/bench_tables.py
"""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """
    Returns:
        the exit code: 1 where a run failed

    Raises:
        ValueError, OSError: what is wrong with the table
    """
    args = parse_args(argv)
    table = narrowed(read_table(args.table), args.rows, args.iterations)
    bench = Bench(table, args.jobs, args.every)
    if args.list:
        done = bench.finished()
        for cell in table.cells:
            print(f"{'finished' if cell in done else 'to run  '}  {cell.key}  {cell}")
        return 0
    check_table(table)
    if args.jobs > 1 and any(x.cfg.MODEL.DEVICE != "cpu" for x in table.cells):
        raise ValueError(
            "--jobs: runs on a GPU go one after the other; set MODEL.DEVICE cpu in OPTS."
        )
    stop_on_sigterm()
    bench.run()
    for cell in bench.failed:
        print(f"failed: {cell}")
    return 1 if bench.failed else 0


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("d2kd bench", __doc__, EPILOG)
    add = parser.add_argument
    add("table", metavar="TABLE", help="YAML of the table")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time; default %(default)s")
    add(
        "--rows",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of the rows, or of a GRID; default: all",
    )
    add("--iterations", nargs="+", type=int, default=[], metavar="N", help="default: all budgets")
    add("--list", action="store_true", help="show the cells and run nothing")
    add("--every", type=float, default=60, metavar="SECONDS", help="between lines of progress")
    args = parser.parse_args(argv)
    if args.jobs < 1 or not args.every > 0:
        parser.error(f"--jobs and --every must be above 0, got {args.jobs} and {args.every}")
    return args


if __name__ == "__main__":
    sys.exit(run_command("d2kd bench", main))
