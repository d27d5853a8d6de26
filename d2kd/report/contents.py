"""What a run has to tell, section by section."""

import math
import os
from statistics import median
from typing import List, NamedTuple

import yaml

from ..config import leaves, load_config
from ..engine.metrics import METRICS
from .blocks import Facts, Part, Picture, Section, Table, Text
from .charts import draw_curve
from .distillation import gradients, levels, pictures, teacher
from .outside import export_proof, verdict
from .run import Run


class Contents(NamedTuple):
    """`title`: name of the run; `absent`: a line for each thing that it cannot tell."""

    title: str
    sections: List[Section]
    absent: List[str]


def gather(folder: str, compared: str = "", exported: str = "") -> Contents:
    """
    Args:
        folder: OUTPUT_DIR
        compared: folder of d2kd compare; "": looked for beside OUTPUT_DIR
        exported: folder of d2kd export; "": looked for in OUTPUT_DIR

    Raises:
        FileNotFoundError: a folder is not what it should be
    """
    run = Run(folder)
    parts: List[Part] = [
        overview(run),
        results(run),
        verdict(folder, compared),
        teacher(run),
        levels(run),
        losses(run),
        gradients(run),
        pictures(run),
        export_proof(folder, exported),
        command(run),
        config(run),
    ]
    title = os.path.basename(os.path.abspath(folder))
    absent = dict.fromkeys(x for x in parts if isinstance(x, str))
    return Contents(title, [x for x in parts if isinstance(x, Section)], list(absent))


def overview(run: Run) -> Section:
    done, wanted = run.metrics.done, run.config["SOLVER.MAX_ITER"]
    state = f"{done} of {wanted} iterations" if done < wanted else f"finished, {wanted} iterations"
    rows = [["state", state]]
    if run.distils:
        heads = [head for lesson in run.lessons() for head in lesson["heads"]]
        rows.append(["heads", ", ".join(dict.fromkeys(heads or run.config["DISTILL.HEADS"]))])
    rows += [
        ["trained on", ", ".join(run.config["DATASETS.TRAIN"])],
        ["evaluated on", ", ".join(run.config["DATASETS.TEST"]) or "nothing"],
    ]
    seconds = run.metrics.curve("time").values
    if seconds:
        rows.append(["time", f"{median(seconds):.2f} s per iteration"])
    return Section("", [Facts(rows)])


def results(run: Run) -> Part:
    rows, charts = [], []
    for task, names in run.metrics.evaluations().items():
        curve = run.metrics.curve(names["AP"])
        values = [run.metrics.curve(names.get(k, "")).values[-1:] for k in METRICS]
        done = min(curve.iterations[-1] + 1, run.config["SOLVER.MAX_ITER"])
        rows.append([task, done, *map(_number, values)])
        if len(curve.values) > 1:
            charts.append(Picture(f"AP, {task}", draw_curve(curve)))
    if not rows:
        return "AP: nothing was evaluated yet (TEST.EVAL_PERIOD, DATASETS.TEST)."
    headers = ["", "iterations", *METRICS]
    return Section("AP of the student", [Table(headers, rows, range(1, len(headers))), *charts])


def losses(run: Run) -> Part:
    charts = [Picture(x, draw_curve(run.metrics.curve(x))) for x in run.metrics.losses()]
    return Section("Losses", charts) if charts else "Losses: none was logged yet."


def command(run: Run) -> Part:
    lines = [x["line"] for x in run.facts_of("command")]
    versions = run.facts_of("environment")[-1:]
    if not (lines or versions):
        return "Command and versions: the run has no facts.jsonl, of which only newer d2kd write."
    rows = [[k, v] for x in versions for k, v in x.items() if k not in ("kind", "time")]
    return Section("Command and versions", [Text("\n".join(lines)), Facts(rows)])


def config(run: Run) -> Section:
    """What differs from the defaults first; a plug-in's keys have none here."""
    defaults = dict(leaves(yaml.safe_load(load_config().dump())))
    rows = [[k, v] for k, v in run.config.items() if k not in defaults or defaults[k] != v]
    return Section("Config", [Facts(rows), Text(run.config_text, "All keys")])


def _number(value: List[float]) -> str:
    """At most one; NaN where the data has nothing of that size."""
    return f"{value[0]:.1f}" if value and not math.isnan(value[0]) else "-"
