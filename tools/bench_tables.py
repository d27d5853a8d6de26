#!/usr/bin/env python
"""
Write the figures of tools/bench.py into the documents. What stands between a mark and
<!-- /bench --> is what configs/bench/NAME.yaml and its CSV give:

<!-- bench:NAME -->                                 all runs, in the order of the table
<!-- bench:NAME at 1000 -->                         those of so many iterations, the best first
<!-- bench:NAME by grid -->                         a line for all settings that a GRID lists
<!-- bench:NAME verdicts against ROW | ROW -->      what bench_verdict.py says of the runs it kept,
<!-- bench:NAME verdicts at 1000 against ROW -->    of those of so many iterations, the most first
<!-- bench:NAME losses -->                          how own losses and AP go together, by budget
<!-- bench:NAME losses at 1000 -->                  by row, of those of so many iterations
"""

import argparse
import glob
import os
import re
import sys
from typing import Dict, List, Optional, Sequence, Tuple

from tabulate import tabulate

from bench_cells import Table, named_rows, read_table
from bench_losses import losses_by_budget, losses_of_rows, read_losses
from bench_results import Group, Row, groups, in_order, read_results
from bench_samples import NOTHING, read_kept, verdict_on
from d2kd.cli.common import command_parser
from d2kd.utils.atomic_file import atomic_write
from d2kd.utils.user_mistakes import run_command
from paired_verdict import INCONCLUSIVE, Verdict
from quickstart import ROOT
from student_t import t_interval

KIND = r" by grid| at \d+| losses(?: at \d+)?| verdicts(?: at \d+)? against [^>]+"
MARKED = re.compile(rf"(<!-- bench:([\w-]+)({KIND})? -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
COMMON = ["run", "YAML", "iterations", "seeds"]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns: the exit code; 1 where --check finds another text"""
    args = parse_args(argv)
    root = os.path.abspath(args.root)  # the paths of tables are joined to it
    found = differing(documents(root), os.path.join(root, "configs", "bench"), root)
    for path, text in found.items():
        if args.check:
            print(f"{path} is not what the CSV says; write it: python tools/bench_tables.py")
        else:
            with atomic_write(path, "w") as file:
                file.write(text)
            print(f"Written: {path}")
    if not found:
        print("All tables are what the CSVs say.")
    return 1 if found and args.check else 0


def documents(root: str) -> List[str]:
    return sorted(glob.glob(f"{root}/*.md") + glob.glob(f"{root}/docs/**/*.md", recursive=True))


def differing(paths: Sequence[str], tables: str, root: str) -> Dict[str, str]:
    """
    Args:
        tables: folder of the YAMLs
        root: where the paths in them start

    Returns:
        documents that hold another text between their marks: path to what it should be
    """
    found = {}
    for path in paths:
        with open(path) as file:
            text = file.read()
        if text.count("<!-- bench:") != len(MARKED.findall(text)):
            raise ValueError(f"{path}: a <!-- bench:NAME --> has no <!-- /bench --> behind it.")
        new = MARKED.sub(lambda x: x[1] + block(tables, x[2], root, x[3] or "") + x[5], text)
        if new != text:
            found[path] = new
    return found


def block(tables: str, name: str, root: str, kind: str) -> str:
    """What belongs between the marks of a table."""
    table = read_table(os.path.join(tables, f"{name}.yaml"))
    table = table._replace(results=os.path.join(root, table.results))
    what, _, asked = kind.strip().partition(" ")
    if what == "verdicts":
        of, _, baselines = asked.partition("against ")
        budget = int(of[len("at ") :] or 0)
        text = make_verdict_table(table, [x.strip() for x in baselines.split("|")], budget)
    elif what == "losses":
        found, budget = read_losses(table), int(asked[len("at ") :] or 0)
        text = losses_of_rows(table, found, budget) if budget else losses_by_budget(table, found)
    elif what == "by":
        text = make_grid_table(table, read_results(table.results))
    else:
        text = make_table(table, read_results(table.results), int(asked or 0))
    return f"\n{text}\n\n"


def make_table(table: Table, results: Sequence[Row], budget: int = 0) -> str:
    """
    A Markdown table of mean and, over two seeds or more, its 95 % interval by Student's t.

    Args:
        budget: iterations of the runs to show, the best first; 0: of all, in the table's order
    """
    parts = ["val", "test"] if table.test else ["val"]
    results = [x for x in results if x[f"{parts[-1]}_AP"]]  # TEST may be younger than a run
    found = groups(results)
    lines, masks = [], any(x[f"{parts[-1]}_mask_AP"] for x in results)
    for row, iterations in in_order(found, table.rows):
        if budget in (0, iterations):
            base = found.get((table.baseline, iterations), {}) if row != table.baseline else {}
            lines.append(line_of(found[row, iterations], base, parts, bool(table.baseline), masks))
    if not lines:
        return "No run of this table is finished."
    gain = [f"gain on {parts[-1]}"] if table.baseline else []
    header = COMMON + [f"AP on {x}" for x in parts[::-1]] + gain + ["AP50"]
    header += [*(["mask AP"] if masks else []), "minutes"]
    if budget:
        lines.sort(key=lambda x: -float(x[len(COMMON)].split()[0]))
        place = COMMON.index("iterations")
        header, *lines = ([*x[:place], *x[place + 1 :]] for x in (header, *lines))
    return tabulate(lines, header, tablefmt="github", disable_numparse=True)


def make_grid_table(table: Table, results: Sequence[Row]) -> str:
    """A Markdown table of a line for each GRID, with the AP on val of each of its settings."""
    found = groups(results)
    places: Dict[Tuple[str, int], Dict[str, Group]] = {}
    for row in table.rows:
        name = table.grids.get(row, row)
        for iterations in sorted(x for other, x in found if other == row):
            settings = places.setdefault((name, iterations), {})
            settings[row[len(name) :].lstrip(", ")] = found[row, iterations]
    if not places:
        return "No run of this table is finished."
    lines = []
    for (name, iterations), settings in places.items():
        rows = [row for group in settings.values() for row in group.values()]
        seeds = "/".join(sorted({str(len(x)) for x in settings.values()}))
        cells = [name, f"`{rows[0]['config']}`", str(iterations), seeds]
        lines.append([*cells, by_setting(settings), minutes_of(rows)])
    header = [*COMMON, "AP on val by setting", "minutes"]
    return tabulate(lines, header, tablefmt="github", disable_numparse=True)


def make_verdict_table(table: Table, baselines: Sequence[str], budget: int = 0) -> str:
    """
    A Markdown table of a line for each row and budget that has two seeds or more beside a baseline.

    Args:
        budget: as for :func:`make_table`

    Raises:
        ValueError: a baseline that is no row of the table
    """
    named_rows(table, baselines, "verdicts against")
    found = read_kept(table)
    lines: List[Tuple[float, List[str]]] = []
    for row, iterations in in_order(found, table.rows):
        others = [found.get((x, iterations), NOTHING) if x != row else NOTHING for x in baselines]
        told = [verdict_on(found[row, iterations], x) for x in others]
        told = [x if x and x.seeds > 1 else None for x in told]
        counts = sorted({x.count for x in told if x})
        if counts and budget in (0, iterations):
            cells = [verdict_cell(x.verdict) if x else "" for x in told]
            gain = -next(x.verdict.gain for x in told if x) if budget else 0.0
            places = [] if budget else [str(iterations)]
            lines.append((gain, [row, *places, "/".join(counts), *cells]))
    if not lines:
        return "No verdict of this table is there."
    lines.sort(key=lambda x: x[0])
    header = ["run", *([] if budget else ["iterations"]), "seeds"]
    header += [f"against {x}" for x in baselines]
    return tabulate([x for _, x in lines], header, tablefmt="github", disable_numparse=True)


def verdict_cell(verdict: Verdict) -> str:
    decision = verdict.decision if verdict.decision == INCONCLUSIVE else f"**{verdict.decision}**"
    gain, low, high = (_rounded(x, "+") for x in (verdict.gain, verdict.low, verdict.high))
    return f"{decision} {gain} ({low} to {high})"


def by_setting(settings: Dict[str, Group]) -> str:
    """As "LOSS_WEIGHT 0.6: 52.8, 2.0: **55.9**": by value, the best in bold, the key said once."""
    texts = {k: mean_of([float(x["val_AP"]) for x in v.values()]) for k, v in settings.items()}
    best = max(float(x.split()[0]) for x in texts.values())
    words = []
    for setting in sorted(texts, key=_value):
        value = setting.partition(" ")[2]
        text = texts[setting]
        if len(texts) > 1 and float(text.split()[0]) == best:
            text = f"**{text}**"
        words.append(f"{value if words else setting}: {text}" if setting else text)
    return ", ".join(words)


def _value(setting: str) -> float:
    """For sorting; words keep their order."""
    try:
        return float(setting.split()[-1])
    except (ValueError, IndexError):
        return 0.0


def line_of(group: Group, base: Group, parts: Sequence[str], gains: bool, masks: bool) -> List[str]:
    """
    Args:
        base: the baseline's runs with as many iterations
        masks: there is a column for their AP
    """
    rows, last = list(group.values()), parts[-1]
    cells = [rows[0]["row"], f"`{rows[0]['config']}`", rows[0]["iterations"], str(len(rows))]
    cells += [mean_of([float(x[f"{part}_AP"]) for x in rows]) for part in parts[::-1]]
    if gains:
        both = [(group[seed], base[seed]) for seed in group if seed in base]
        values = [float(a[f"{last}_AP"]) - float(b[f"{last}_AP"]) for a, b in both]
        cells.append(mean_of(values, "+") if values else "")
    cells.append(mean_of([float(x[f"{last}_AP50"]) for x in rows]))
    if masks:
        of_masks = [float(x[f"{last}_mask_AP"]) for x in rows if x[f"{last}_mask_AP"]]
        cells.append(mean_of(of_masks) if of_masks else "")
    return [*cells, minutes_of(rows)]


def minutes_of(rows: Sequence[Row]) -> str:
    return f"{sum(float(x['seconds']) for x in rows) / len(rows) / 60:.1f}"


def mean_of(values: Sequence[float], sign: str = "") -> str:
    mean, half = t_interval(values)
    return _rounded(mean, sign) + (f" ± {half:.1f}" if len(values) > 1 else "")


def _rounded(value: float, sign: str) -> str:
    return f"{round(value, 1) + 0.0:{sign}.1f}"  # + 0.0: what rounds to zero has no minus


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser(
        "bench_tables.py", __doc__, "Example: python tools/bench_tables.py --check"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where one differs"
    )
    parser.add_argument("--root", default=ROOT, metavar="FOLDER", help="of the documents")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command("bench_tables.py", main))
