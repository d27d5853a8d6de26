#!/usr/bin/env python
"""
Does a row have more AP because its students fit their training images better? Prints the student's
own losses, all but those of the heads, as a mean over the last tenth of the iterations, beside the
AP, and how the two go together over all runs of a budget.

The bench keeps them in a CSV beside the table's results. Of older runs this command keeps them,
where their folders are still there.
"""

import argparse
import json
import os
import sys
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from tabulate import tabulate

from bench_cells import Cell, Table, named_rows, read_table
from bench_results import append_result, groups, in_order, read_results
from d2kd.cli.common import command_parser
from d2kd.engine.facts import read_facts
from d2kd.engine.metrics import Metrics
from d2kd.utils.distils import distils
from d2kd.utils.user_mistakes import run_command

EPILOG = """
Example: with a picture, a point for each run
  python tools/bench_losses.py configs/bench/heads.yaml --picture losses.png
"""
COLUMNS = ("row", "seed", "iterations", "own_loss", "AP", "key", "recipe")


class Fit(NamedTuple):
    """Of one run: the student's own losses at the end of training, and AP in percent."""

    own_loss: float
    ap: float


Found = Dict[Tuple[str, int], List[Fit]]  # of all seeds, by row and budget


def main(argv: Optional[Sequence[str]] = None) -> None:
    """
    Raises:
        ValueError: a row that the table does not have, or no run that is finished
    """
    args = parse_args(argv)
    table = read_table(args.table)
    rows = named_rows(table, args.rows)
    keep_losses(table, rows)
    found = {k: v for k, v in read_losses(table).items() if k[0] in rows}
    if not found:
        raise ValueError(
            f"{table.output} has no finished run of these rows, and no loss of one is kept: "
            f"d2kd bench {args.table}"
        )
    for budget in _budgets(found):
        print(f"{budget} iterations\n{losses_of_rows(table, found, budget)}\n")
    print(losses_by_budget(table, found))
    if args.picture:
        draw(found, table, args.picture)
        print(f"Wrote {args.picture}")


def keep_losses(table: Table, rows: Sequence[str]) -> None:
    """Those of the finished runs of these rows whose folders are there, each once."""
    path = _path(table)
    kept = {x["key"] for x in read_results(path, COLUMNS)}
    for cell in table.cells:
        folder = table.folder(cell)
        done = os.path.join(folder, "test.json" if table.test else "val.json")
        if cell.row in rows and cell.key not in kept and os.path.isfile(done):
            with open(done) as file:
                ap = json.load(file)["AP"]
            metrics = Metrics(folder)
            own = _own(cell, folder, metrics)
            if own:  # none where no image has labels
                row = {k: str(getattr(cell, k)) for k in COLUMNS if k not in ("own_loss", "AP")}
                row.update(own_loss=f"{metrics.at_end(own):.4f}", AP=f"{ap:.3f}")
                append_result(path, row, COLUMNS)


def read_losses(table: Table) -> Found:
    """What is kept, in the order of the table."""
    found = groups(read_results(_path(table), COLUMNS))
    return {
        place: [Fit(float(x["own_loss"]), float(x["AP"])) for x in found[place].values()]
        for place in in_order(found, table.rows)
    }


def losses_of_rows(table: Table, found: Found, budget: int) -> str:
    """A Markdown table of means over seeds, the highest AP first."""
    means = [
        (row, len(runs), *np.mean(runs, axis=0))
        for (row, iterations), runs in found.items()
        if iterations == budget
    ]
    means.sort(key=lambda x: -x[-1])
    lines = [[row, seeds, f"{loss:.3f}", f"{ap:.1f}"] for row, seeds, loss, ap in means]
    header = ["run", "seeds", "own losses at the end", _measure(table)]
    return tabulate(lines, header, tablefmt="github", disable_numparse=True)


def losses_by_budget(table: Table, found: Found) -> str:
    """A Markdown table with the correlation of own losses and AP over the runs of each budget."""
    lines = []
    for budget in _budgets(found):
        runs = [run for (_, x), all_seeds in found.items() if x == budget for run in all_seeds]
        losses, aps = zip(*runs)
        told = len(runs) > 2 and min(losses) < max(losses) and min(aps) < max(aps)
        correlation = f"{np.corrcoef(losses, aps)[0, 1]:.2f}" if told else ""
        spans = [f"{min(losses):.3f} to {max(losses):.3f}", f"{min(aps):.1f} to {max(aps):.1f}"]
        lines.append([str(budget), str(len(runs)), *spans, correlation])
    header = ["iterations", "runs", "own losses at the end", _measure(table), "correlation"]
    return tabulate(lines, header, tablefmt="github", disable_numparse=True)


def draw(found: Found, table: Table, path: str) -> None:
    """A point for each run, a colour for each budget; the baseline's are crosses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for i, budget in enumerate(_budgets(found)):
        color = f"C{i}"
        for is_baseline in (False, True):
            runs = [
                run
                for (row, iterations), all_seeds in found.items()
                if iterations == budget and (row == table.baseline) == is_baseline
                for run in all_seeds
            ]
            if runs:
                name = f"{budget} iterations" + (f", {table.baseline}" if is_baseline else "")
                marker = "x" if is_baseline else "."
                axes.scatter(*zip(*runs), color=color, marker=marker, label=name)
    axes.set(xlabel="the student's own losses at the end of training", ylabel=_measure(table))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _budgets(found: Found) -> List[int]:
    return sorted({iterations for _, iterations in found})


def _own(cell: Cell, folder: str, metrics: Metrics) -> List[str]:
    """Names of the losses that the student has alone, too."""
    names = metrics.losses()[1:]  # without the total
    if not distils(cell.cfg):
        return names
    monitored = [x["losses"] for x in read_facts(folder) if x["kind"] == "gradients"]
    if monitored:
        return [x for x in names if not any(x in losses for losses in monitored)]
    # Without DISTILL.LIVENESS nothing says whose a loss is; d2kd's own heads begin with their name.
    heads = tuple(f"loss_{x.lower()}" for x in cell.cfg.DISTILL.HEADS)
    return [x for x in names if not x.startswith(heads)]


def _measure(table: Table) -> str:
    return f"AP on {'test' if table.test else 'val'}"


def _path(table: Table) -> str:
    return os.path.splitext(table.results)[0] + "_losses.csv"


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("bench_losses.py", __doc__, EPILOG)
    parser.add_argument("table", help="YAML of the bench")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="default: all")
    parser.add_argument(
        "--picture", default="", metavar="FILE", help="to write, such as losses.png"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command("bench_losses.py", main))
