"""
See what distillation does, in minutes, from nothing: train a small detector alone and with a
teacher beside it, and compare the two on a test set on which nothing was chosen. Same seed, same
batches in the same order, same schedule; the teacher is the only difference. Beside them stands the
same student after a schedule that was long enough for it alone, whose weights are shipped.

Each step is a d2kd command, printed so that you can run it yourself. A step that was finished
before is not repeated; one that was interrupted continues where it stopped. On a CPU two steps run
at once, with one thread each: nets as small as these gain nothing from a second thread.
"""

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Dict, List, Optional, Sequence, Tuple

from tabulate import tabulate

from ..config import load_config
from ..data import register_datasets
from ..utils.command_line import add_overrides, parse_command_line
from .common import command_parser
from .draw_detections import draw_detections
from .steps import Steps, mask_warning, metrics_of, stop_on_sigterm

EXAMPLES = """
Examples:
  d2kd quickstart
  another method:
    d2kd quickstart --distilled configs/quickstart/mgd.yaml
"""
CHOSEN_ON, TEST = ("d2kd_shapes_val",), ("d2kd_shapes_test",)
TEACHER, FINISHED = "teacher", "student alone, finished"
ALONE, DISTILLED = "student alone", "student distilled"
STUDENT = "configs/quickstart/student.yaml"
# The same student after its full schedule, and its weights.
FINISHED_STUDENT = (
    "configs/quickstart/student_finished.yaml",
    "configs/quickstart/student_finished.pth",
)

Step = Tuple[str, List[str], str]  # YAML, overrides, trained weights or ""


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    if load_config(args.distilled, args.opts).DATASETS.TEST == CHOSEN_ON:
        args.opts = ["DATASETS.TEST", repr(TEST), *args.opts]
    cfg = load_config(args.distilled, args.opts)
    register_datasets(cfg)  # draws the built-in images once, before two processes need them
    stop_on_sigterm()
    runs, start = Steps(args.fresh), time.perf_counter()
    first, second = plan(args)
    jobs = runs_at_once(cfg.MODEL.DEVICE)
    print(f"\n[1/2] {' and '.join(first)}", flush=True)
    results = run_all(runs, first, jobs)
    print(f"\n[2/2] {' and '.join(second)}", flush=True)
    results.update(run_all(runs, second, jobs))

    report = make_report(results, time.perf_counter() - start)
    print("\n" + report)
    folder = os.path.dirname(load_config(args.student, args.opts).OUTPUT_DIR.rstrip("/")) or "."
    with open(os.path.join(folder, "table.md"), "w") as file:
        file.write(report + "\n")
    panels = []
    for name, (yaml, opts, weights) in {**second, **first}.items():
        own = load_config(yaml, opts)
        panels.append((name, own, weights or os.path.join(own.OUTPUT_DIR, "model_final.pth")))
    draw_detections(panels, rows=4, threshold=0.3, path=f"{folder}/detections.png")
    print(
        f"\nTable: {folder}/table.md. Picture: {folder}/detections.png. "
        f"Curves: tensorboard --logdir {folder}"
    )


def plan(args: argparse.Namespace) -> Tuple[Dict[str, Step], Dict[str, Step]]:
    """
    Returns:
        name -> step, for those that are only evaluated where their weights are there, and for the
        two that are compared
    """
    distill = load_config(args.distilled, args.opts).DISTILL
    if distill.TEACHERS:
        raise ValueError(
            f"--distilled {args.distilled} has several teachers (DISTILL.TEACHERS), and the "
            "quickstart trains and shows one. Train each by a command of its own, then the student."
        )
    teacher = distill.TEACHER
    pairs = zip(args.opts[0::2], args.opts[1::2])
    alone = [x for x in pairs if not x[0].startswith("DISTILL.")]
    place = ("MODEL.DEVICE", "DATASETS.", "DATALOADER.")
    shared = [word for pair in alone if pair[0].startswith(place) for word in pair]
    first = {TEACHER: (teacher.CONFIG_FILE, shared, teacher.WEIGHTS)}
    if args.student == STUDENT:
        yaml, weights = FINISHED_STUDENT
        first[FINISHED] = (yaml, shared, weights)
    second = {
        ALONE: (args.student, [word for pair in alone for word in pair], ""),
        DISTILLED: (args.distilled, args.opts, ""),
    }
    _check_folders(second)
    return first, second


def _check_folders(steps: Dict[str, Step]) -> None:
    """
    Raises:
        ValueError: one would overwrite the other's weights
    """
    folders = {load_config(yaml, opts).OUTPUT_DIR for yaml, opts, _ in steps.values()}
    if len(folders) < len(steps):
        raise ValueError(
            f"OUTPUT_DIR: {' and '.join(steps)} would both be written to {folders.pop()!r}. Leave "
            "it to their YAMLs, whose folders are below the one that the quickstart is run in."
        )


def runs_at_once(device: str) -> int:
    """
    Two on a CPU with two cores or more; one on a GPU. Prints a notice where other processes keep
    the cores busy.

    Args:
        device: MODEL.DEVICE
    """
    cores, busy = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    jobs = 2 if device == "cpu" and cores > 1 else 1
    if device == "cpu" and busy + jobs > cores + 0.5:
        print(
            f"\nOther processes keep {busy:.1f} of {cores} cores busy (mean of the last minute): "
            "this will take longer than on a quiet machine."
        )
    return jobs


def run_all(runs: Steps, steps: Dict[str, Step], jobs: int) -> Dict[str, Dict[str, float]]:
    """
    Args:
        jobs: steps at a time

    Returns:
        name to metrics, in the order of `steps`
    """
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            name: pool.submit(runs.run, yaml, opts, weights, name)
            for name, (yaml, opts, weights) in steps.items()
        }
        try:
            for future in as_completed(futures.values()):
                future.result()  # the first that fails ends the other
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runs.stop()
            raise
    return {name: future.result() for name, future in futures.items()}


def make_report(results: Dict[str, Dict[str, float]], seconds: float) -> str:
    """A row for each step and the gain, as a Markdown table, and how to read it."""
    metrics = metrics_of(results[ALONE], results[DISTILLED])
    rows = [
        [name] + [f"{v[k]:.1f}" if k in v else "" for k in metrics] for name, v in results.items()
    ]
    gains = {k: results[DISTILLED][k] - results[ALONE][k] for k in metrics}
    rows.append(["gain"] + [f"{x:+.1f}" for x in gains.values()])
    table = tabulate(rows, ["", *metrics], tablefmt="github", disable_numparse=True)
    lines = [f"Distillation gain: {gains['AP']:+.1f} AP (one seed; {seconds / 60:.1f} minutes)."]
    lines += filter(None, [mask_warning(gains)])
    if FINISHED in results:
        short = results[FINISHED]["AP"] - results[ALONE]["AP"]
        lines.append(
            f"After so few iterations the student alone is {short:.1f} AP short of its own end "
            "(row 2), so most of the gain is time saved."
            if short > 0
            else "The student alone is as good as at the end of a full schedule (row 2)."
        )
    else:
        lines.append("After so few iterations neither student is finished.")
    return "\n".join([table, "", *lines])


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("d2kd quickstart", __doc__, EXAMPLES)
    folder = "configs/quickstart"
    parser.add_argument("--student", default=STUDENT, metavar="FILE", help="the student alone")
    parser.add_argument(
        "--distilled", default=f"{folder}/cwd.yaml", metavar="FILE", help="with its teacher"
    )
    parser.add_argument("--fresh", action="store_true", help="train anew what was trained before")
    add_overrides(parser, "overrides for both students")
    return parse_command_line(parser, argv)
