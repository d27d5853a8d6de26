"""
See what distillation does, in minutes, from nothing: train a small detector alone, train it again
with a teacher beside it, and compare the two. Same seed, same batches in the same order, same
schedule; the teacher is the only difference.

Each step is a d2kd command, printed so that you can run it yourself. A step that was
finished before is not repeated; one that was interrupted goes on where it stopped.
"""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from typing import Dict, List, Optional, Sequence

from tabulate import tabulate

from detectron2.config import CfgNode

from ..config import load_config
from ..utils.command_line import add_overrides, parse_command_line
from ..utils.packaged import find_file
from .common import command_parser
from .draw_detections import draw_detections

EXAMPLES = """
Examples:
  d2kd quickstart
  another method:
    d2kd quickstart --distilled configs/quickstart/mgd.yaml
"""
METRICS = ("AP", "AP50", "APs", "APm", "APl")
# Detectron2's progress line: keep time left, iteration and losses, drop timers and learning rate.
PROGRESS = re.compile(r"eta: .*?iter: (\d+).*?(?=\s+time:)")


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    distilled = load_config(args.distilled, args.opts)
    teacher_weights = distilled.DISTILL.TEACHER.WEIGHTS
    steps = [
        ("teacher", distilled.DISTILL.TEACHER.CONFIG_FILE, teacher_weights),
        ("student alone", args.student, ""),
        ("student distilled", args.distilled, ""),
    ]
    start, results = time.perf_counter(), {}
    for i, (name, config_file, weights) in enumerate(steps, 1):
        print(f"\n[{i}/{len(steps)}] {name}: {config_file}", flush=True)
        results[name] = run_step(config_file, weights, opts_for(name, args.opts), args.fresh)
    seconds = time.perf_counter() - start
    report = make_report(results, seconds)
    print("\n" + report)
    folder = os.path.dirname(load_config(args.student, args.opts).OUTPUT_DIR.rstrip("/")) or "."
    with open(os.path.join(folder, "table.md"), "w") as file:
        file.write(report + "\n")
    panels = [(n, c, w or final_weights(load_config(c, args.opts))) for n, c, w in steps[::-1]]
    draw_detections(panels, args.opts, rows=4, threshold=0.3, path=f"{folder}/detections.png")
    print(
        f"\nTable: {folder}/table.md. Picture: {folder}/detections.png. "
        f"Curves: tensorboard --logdir {folder}"
    )


def run_step(config_file: str, weights: str, opts: Sequence[str], fresh: bool) -> Dict[str, float]:
    """
    Train, or only evaluate where trained weights are there already.

    Args:
        weights: trained weights of this detector, "" if it is to be trained

    Returns:
        metric to value, in percent
    """
    cfg = load_config(config_file, opts)
    command = ["train", "--config-file", config_file]
    if weights and os.path.isfile(find_file(weights)):
        print(f"Trained weights are there: {weights}. Evaluating them.")
        scratch = os.path.join(cfg.OUTPUT_DIR, "evaluation")
        words = [*opts, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", scratch]
        return evaluation(run(["eval", *command[1:]], words))
    done = os.path.join(cfg.OUTPUT_DIR, "quickstart.json")
    if not fresh and os.path.isfile(done) and load_json(done)["config"] == identity(cfg):
        print(f"Done before: {done}. Add --fresh to repeat it.")
        return load_json(done)["results"]
    resume = [] if fresh else resumable(cfg)
    results = evaluation(run(command + resume, opts))
    with open(done, "w") as file:
        json.dump({"config": identity(cfg), "results": results}, file)
    return results


def run(command: List[str], opts: Sequence[str]) -> List[str]:
    """Run a command of d2kd, show its progress, and return all it printed; stop if it fails."""
    words = [*command, *opts]
    print(f"$ d2kd {shlex.join(words)}")
    process = subprocess.Popen(
        [sys.executable, "-m", "d2kd", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        progress = PROGRESS.search(line)
        if progress and int(progress.group(1)) % 100 == 99:
            print("  " + progress.group(), flush=True)
        elif "Drawing" in line or "Start inference" in line:
            print("  " + line.split("]: ")[-1].rstrip(), flush=True)
    if process.wait() == 2:  # the last line tells the mistake
        print(lines[-1], file=sys.stderr)
        sys.exit(2)
    if process.returncode:
        sys.exit("\n".join(lines[-30:]) + "\nThe step failed; the lines above say why.")
    return lines


def evaluation(lines: Sequence[str]) -> Dict[str, float]:
    """
    Read Detectron2's last "copypaste" block for boxes: a line of names, a line of values. For
    masks there is another.

    Detectron2 says NaN where a detector detects nothing at all; that is an AP of 0.
    """
    rows = [x.split("copypaste: ")[1] for x in lines if "copypaste: " in x]
    start = len(rows) - rows[::-1].index("Task: bbox")
    values = dict(zip(rows[start].split(","), map(float, rows[start + 1].split(","))))
    blind = math.isnan(values["AP"])
    return {k: 0.0 if blind else values[k] for k in METRICS}


def make_report(results: Dict[str, Dict[str, float]], seconds: float) -> str:
    """The three rows and the gain, as a Markdown table with a sentence."""
    rows = [[name] + [f"{v[k]:.1f}" for k in METRICS] for name, v in results.items()]
    gains = [results["student distilled"][k] - results["student alone"][k] for k in METRICS]
    rows.append(["gain"] + [f"{x:+.1f}" for x in gains])
    table = tabulate(rows, ["", *METRICS], tablefmt="github", disable_numparse=True)
    verdict = (
        f"The teacher's company is worth {gains[0]:+.1f} AP to this student."
        if gains[0] > 0
        else f"No gain this time ({gains[0]:+.1f} AP)."
    )
    return f"{table}\n\n{verdict} ({seconds / 60:.1f} minutes; one seed, so take it as one draw.)"


def resumable(cfg: CfgNode) -> List[str]:
    """["--resume"] if OUTPUT_DIR holds an interrupted run of this very config."""
    saved = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if not os.path.isfile(saved) or identity(load_config(saved)) != identity(cfg):
        return []
    return ["--resume"]


def final_weights(cfg: CfgNode) -> str:
    return os.path.join(cfg.OUTPUT_DIR, "model_final.pth")


def identity(cfg: CfgNode) -> str:
    return cfg.dump()


def opts_for(step: str, opts: Sequence[str]) -> List[str]:
    """
    The overrides that a step reads. They are about the two students; the teacher is told of device
    and data, the student alone of everything but the distillation.
    """
    kept = {
        "teacher": lambda key: key.startswith(("MODEL.DEVICE", "DATASETS.", "DATALOADER.")),
        "student alone": lambda key: not key.startswith("DISTILL."),
        "student distilled": lambda key: True,
    }
    pairs = zip(opts[0::2], opts[1::2])
    return [word for key, value in pairs if kept[step](key) for word in (key, value)]


def load_json(path: str) -> Dict:
    with open(path) as file:
        return json.load(file)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("d2kd quickstart", __doc__, EXAMPLES)
    folder = "configs/quickstart"
    parser.add_argument(
        "--student", default=f"{folder}/student.yaml", metavar="FILE", help="the student alone"
    )
    parser.add_argument(
        "--distilled", default=f"{folder}/cwd.yaml", metavar="FILE", help="with its teacher"
    )
    parser.add_argument("--fresh", action="store_true", help="train anew what was trained before")
    add_overrides(parser, "overrides for both students")
    return parse_command_line(parser, argv)
