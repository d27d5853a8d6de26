#!/usr/bin/env python
"""
Draw what tools/bench.py measured: AP against iterations, a line for each row of a table, its seeds
as a band from the lowest to the highest. Dotted where budgets of other rows were left out.

Each point is the end of a run of its own, with a schedule of so many iterations.
"""

import argparse
import sys
from typing import Dict, List, Optional, Sequence, Tuple

from bench_cells import named_rows, read_table
from bench_results import Row, groups, read_results
from d2kd.cli.common import command_parser
from d2kd.utils.user_mistakes import run_command

EPILOG = """
Example: the student alone and three methods
  python tools/bench_curves.py configs/bench/heads.yaml curves.png \\
      --rows "student alone" CWD PKD
"""
# iterations -> lowest, mean, highest AP in percent
Curve = Dict[int, Tuple[float, float, float]]


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    table = read_table(args.table)
    part = "test" if table.test else "val"
    found = curves(named_rows(table, args.rows), read_results(table.results), part)
    if not found:
        raise ValueError(f"{table.results} has no finished run of these rows.")
    draw(found, f"AP on {part}", args.path)
    print(f"Wrote {args.path}")


def curves(rows: Sequence[str], results: Sequence[Row], part: str) -> Dict[str, Curve]:
    """
    Args:
        part: "val" or "test"

    Returns:
        name of each row with a finished run to its curve, in the order of `rows`
    """
    found: Dict[str, Curve] = {}
    measured = [x for x in results if x[f"{part}_AP"]]
    for (row, iterations), group in groups(measured).items():
        if row in rows:
            values = [float(x[f"{part}_AP"]) for x in group.values()]
            mean = sum(values) / len(values)
            found.setdefault(row, {})[iterations] = (min(values), mean, max(values))
    return {row: found[row] for row in rows if row in found}


def draw(found: Dict[str, Curve], label: str, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    budgets: List[int] = sorted({x for curve in found.values() for x in curve})
    for name, curve in found.items():
        x = sorted(curve)
        low, mean, high = zip(*(curve[i] for i in x))
        last = f"{name}: {mean[-1]:.1f} after {x[-1]}"
        reach = [[m - a for m, a in zip(mean, low)], [b - m for m, b in zip(mean, high)]]
        color = axes.errorbar(x, mean, reach, fmt="o", capsize=3, label=last)[0].get_color()
        for i in range(len(x) - 1):
            # What lies between is known where no budget of another row does.
            near, part = budgets.index(x[i + 1]) == budgets.index(x[i]) + 1, slice(i, i + 2)
            axes.plot(x[part], mean[part], color=color, linestyle="-" if near else ":")
            if near:
                axes.fill_between(x[part], low[part], high[part], color=color, alpha=0.2)
    axes.set_xscale("log")
    axes.set_xticks(budgets, [str(x) for x in budgets])
    axes.minorticks_off()
    axes.set(xlabel="iterations of the schedule", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("bench_curves.py", __doc__, EPILOG)
    parser.add_argument("table", help="YAML of the table, such as configs/bench/heads.yaml")
    parser.add_argument("path", help="picture to write, such as curves.png")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="default: all")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command("bench_curves.py", main))
